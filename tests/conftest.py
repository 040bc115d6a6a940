"""What all tests share: the option --update-golden, the fixture `golden`, and certificates."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from tests.golden import Golden

settings.register_profile("treadle", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("treadle")  # a busy machine is no fault of a test


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite the files in tests/golden/ from what is printed now"
    )


def pytest_configure() -> None:
    """Every rewrite in every test is tried before and after, unless TREADLE_CERTIFY=0 is set."""
    os.environ.setdefault("TREADLE_CERTIFY", "1")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compare text with a file in tests/golden/: `golden("printer/block.txt", text)`."""
    update = request.config.getoption("--update-golden") or os.environ.get("TREADLE_UPDATE_GOLDEN") == "1"
    return Golden(bool(update))
