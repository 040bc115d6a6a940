"""`treadle doctor`: what is installed, what the machine has, and what commands lack."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from treadle.backends.tvm.kernels.host import linking
from treadle.cli import COMMANDS, app
from treadle.extras import OPTIONAL_PACKAGES
from treadle.reporting import installation_report
from treadle.reporting.installation_report import installation_facts

ROOT = Path(__file__).resolve().parent.parent


def doctor(*options: str) -> str:
    done = CliRunner().invoke(app, ["doctor", *options])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every optional package uninstalled."""
    monkeypatch.delenv("TREADLE_BACKEND")
    for each in OPTIONAL_PACKAGES:
        monkeypatch.setitem(sys.modules, each.module, None)
    monkeypatch.setitem(sys.modules, "tvm_ffi", None)


def test_each_optional_package_is_in_its_extra_and_its_commands_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for each in OPTIONAL_PACKAGES:
        names = {re.match(r"[\w-]+", line)[0] for line in extras[each.extra]}  # type: ignore[index]
        assert each.distribution in names or each.distribution == "huggingface_hub", each  # tokenizers needs that one
        assert set(each.commands) <= set(COMMANDS), each
    (of_all,) = extras["all"]
    of_devices = {"cuda", "opencl", "webgpu"}  # large, and without a driver of no use
    assert {*re.findall(r"\w+", of_all)} - {"treadle"} == {each.extra for each in OPTIONAL_PACKAGES} - of_devices


def test_without_optional_packages_it_says_what_adds_them(bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation_report, "linkers", lambda: ())
    facts = json.loads(doctor("--json"))
    assert facts["auto"] == "numpy"
    missing = {each["install"]: each for each in facts["missing"]}
    assert set(missing) == {f"pip install '.[{each.extra}]'" for each in OPTIONAL_PACKAGES}
    assert missing["pip install '.[serve]'"]["packages"] == ["starlette", "uvicorn", "prometheus-client"]
    assert missing["pip install '.[text]'"]["commands"][:3] == ["generate", "chat", "describe"]
    assert [each["version"] for each in facts["packages"]][4:] == [None] * len(OPTIONAL_PACKAGES)
    assert facts["packages"][0]["version"] is not None
    assert facts["machine"]["gpus"] is None
    text = doctor()
    for line in (
        "backend numpy: can be used  (the default)",
        "backend tvm: TVM is not installed: pip install '.[tvm]'",
        "GPU      unknown without PyTorch",
        "opencl: none; webgpu: none; metal: none  (treadle targets)",
        "kernels are compiled again in each process",
        "pip install '.[images]'",
    ):
        assert line in text


def test_a_platform_without_a_wheel_gets_no_command(bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from treadle.backends.tvm.kernels.host.platforms import Platform

    monkeypatch.setattr(installation_report, "this_platform", lambda: Platform("Darwin", "x86_64"))
    tvm = next(each for each in installation_facts()["missing"] if "apache-tvm" in each["packages"])
    assert tvm["install"] is None and "TVM has no wheel for Darwin on x86_64" in tvm["reason"]


def test_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "not" / "yet"))
    machine: Any = installation_facts()["machine"]
    assert (machine["cache"], machine["cache_is_writable"]) == (str(tmp_path / "not" / "yet"), True)
    assert machine["cores"] >= 1 and machine["memory"] > 1 << 28
    assert machine["linker"] is None or Path(machine["linker"]).is_file()
    assert (machine["linker"] is None) == (not linking.linkers())
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "cannot be written; TREADLE_CACHE names another folder" in doctor()
    monkeypatch.setattr("os.sysconf", lambda name: (_ for _ in ()).throw(ValueError(name)))
    assert "unknown of memory" in doctor()


def test_with_everything_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    if not all(each.is_installed for each in OPTIONAL_PACKAGES):
        pytest.skip("an optional package is not installed")
    assert doctor().endswith("every command has its packages\n")
    assert json.loads(doctor("--json"))["missing"] == []


def test_a_roofline_without_tvm_names_no_other_backend(bare: None) -> None:
    done = CliRunner().invoke(app, ["roofline", "gpt2"])
    assert done.exit_code == 2
    assert "a roofline needs the kernels of the tvm backend" in done.stderr
    assert done.stderr.splitlines()[-1] == "  try       pip install '.[tvm]'"
