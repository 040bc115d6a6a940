"""What all tests share: the option --update-golden, the fixture `golden`, certificates, and how many threads work."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from functools import cache

# Said before NumPy and PyTorch are loaded, which ask once. Tests run side by side, and their arrays are small: further
# threads only wait for each other, and a test that is about threads asks for so many.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")  # idle threads of TVM's pool sleep at once

import pytest
import typer.main
import typer.testing
from hypothesis import HealthCheck, settings

from tests import error_texts, refusal_texts
from tests.golden import Golden
from tests.known_certificates import remember
from treadle.passes.framework.manager import PassManager
from treadle.reporting import told_errors

settings.register_profile("treadle", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("treadle")  # a busy machine is no fault of a test

# Typer makes all commands anew for every command line, which takes longer than most commands that tests run.
typer.main.get_command = typer.testing._get_command = cache(typer.main.get_command)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite the files in tests/golden/ from what is printed now"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Every rewrite in every test is tried before and after, unless TREADLE_CERTIFY=0 is set; what was is not again."""
    os.environ.setdefault("TREADLE_CERTIFY", "1")
    remember()
    if _updates(config) and (config.getoption("numprocesses", None) or 1) > 1:
        raise pytest.UsageError("golden files are written by one process: leave -n out")


def pytest_collection_finish() -> None:
    """What there is now stays: the cyclic collector need not look at thousands of tests again and again, nor as often
    as every 700 objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def _updates(config: pytest.Config) -> bool:
    return bool(config.getoption("--update-golden") or os.environ.get("TREADLE_UPDATE_GOLDEN") == "1")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compare text with a file in tests/golden/: `golden("printer/block.txt", text)`."""
    return Golden(_updates(request.config))


@pytest.fixture(autouse=True, scope="session")
def _texts_read_as_they_did(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a test meets in `pytest.raises` and in logs of passes stands in tests/golden/errors/ and refusals/."""
    config = request.config
    golden = Golden(_updates(config))
    errors = error_texts.ErrorTexts(golden, str(tmp_path_factory.getbasetemp()))
    refusals = refusal_texts.refusals(golden)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytest, "raises", error_texts.comparing(pytest.raises, errors))
        patch.setattr(PassManager, "run", refusal_texts.comparing(PassManager.run, refusals))
        for name in ("error_text", "error_facts"):
            patch.setattr(told_errors, name, errors.listening(getattr(told_errors, name)))
        yield
    some = config.getoption("keyword") or config.getoption("markexpr") or any("::" in name for name in config.args)
    for texts in (errors, refusals):
        texts.write(whole=not some)


@pytest.fixture
def quickly_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a run stay in the order of the program, mostly: to look for a better one is half of what a small trainer
    takes to be made."""
    from treadle.passes.memory import order

    monkeypatch.setattr(order, "MOST_LOOKS", 1)
