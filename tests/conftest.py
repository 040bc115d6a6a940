"""Setup for all tests: the option --update-golden, the fixture `golden`, certificates, and the number of threads."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path

# Set before NumPy and PyTorch are imported, because they read the variables once. Tests run in parallel on small
# arrays, so more threads would only compete for the cores. A test about threads sets its own number.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")  # idle threads of TVM's pool sleep at once
os.environ["TREADLE_BACKEND"] = "numpy"  # "auto", so that results do not depend on the installed packages

import pytest
import typer.main
import typer.testing
from hypothesis import HealthCheck, settings

from tests import error_texts, refusal_texts
from tests.golden import Golden
from tests.known_certificates import remember
from treadle.passes.framework import manager
from treadle.passes.framework.manager import PassManager
from treadle.reporting import errors as error_reports

MOST_GARBAGE = 3 << 29  # bytes
_RESIDENT = [0]
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0) if sys.platform == "linux" else lambda _: 0

settings.register_profile("treadle", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("treadle")  # a busy machine must not fail a test

# Typer builds all commands again for every command line, which takes longer than most commands that tests run.
typer.main.get_command = typer.testing._get_command = cache(typer.main.get_command)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite the files in tests/golden/ from what is printed now"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Let each of several processes begin with tests that follow each other, so that they share the fixtures of their
    modules; a process that is done takes half of another's rest.
    """
    if config.getoption("numprocesses", None) and config.getoption("dist") == "no":
        config.option.dist = "worksteal"


def pytest_configure(config: pytest.Config) -> None:
    """Certify every rewrite in every test, unless TREADLE_CERTIFY=0 is set. Known certificates are not tried again.

    The cyclic collector rests until the tests are collected: nearly all objects of modules and tests stay alive.
    """
    gc.disable()
    ask = manager.read_switch
    # The variable stays unset, so that the processes that tests start certify no more than a user's.
    manager.read_switch = lambda name: name not in os.environ or ask(name)
    remember()
    if _updates(config) and (config.getoption("numprocesses", None) or 1) > 1:
        raise pytest.UsageError("golden files are written by one process: leave -n out")


def pytest_collection_finish() -> None:
    """Exempt the objects that exist now from the cyclic collector, so that it need not scan thousands of tests again
    and again, and let it run less often than every 700 objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, None, None]:
    """After the last test of a module, free the memory that models in reference cycles and the allocator hold, if much
    was added since the last time. What is left belongs to imported modules: the collector skips it from now on.
    """
    yield
    if nextitem is None or nextitem.path != item.path:
        now = _resident_bytes()
        if now > _RESIDENT[-1] + MOST_GARBAGE:
            gc.collect()
            gc.freeze()
            _TRIM(0)
            _RESIDENT[:] = [_resident_bytes()]


def _resident_bytes() -> int:
    """Return the bytes of this process in memory, or 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _updates(config: pytest.Config) -> bool:
    return bool(config.getoption("--update-golden") or os.environ.get("TREADLE_UPDATE_GOLDEN") == "1")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compare text with a file in tests/golden/: `golden("printer/block.txt", text)`."""
    return Golden(_updates(request.config))


@pytest.fixture(autouse=True, scope="session")
def _texts_read_as_they_did(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compare the texts of errors caught by `pytest.raises` and of pass logs with tests/golden/errors/ and
    refusals/.
    """
    config = request.config
    golden = Golden(_updates(config))
    errors = error_texts.ErrorTexts(golden, str(tmp_path_factory.getbasetemp()))
    refusals = refusal_texts.refusals(golden)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytest, "raises", error_texts.comparing(pytest.raises, errors))
        patch.setattr(PassManager, "run", refusal_texts.comparing(PassManager.run, refusals))
        for name in ("error_text", "error_facts"):
            patch.setattr(error_reports, name, errors.listening(getattr(error_reports, name)))
        yield
    some = config.getoption("keyword") or config.getoption("markexpr") or any("::" in name for name in config.args)
    for texts in (errors, refusals):
        texts.write(whole=not some)


@pytest.fixture
def quickly_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit the search for a better order of steps, which takes half of the time that a small trainer takes to build.
    Steps stay mostly in program order.
    """
    from treadle.passes.memory import order

    monkeypatch.setattr(order, "MOST_LOOKS", 1)
