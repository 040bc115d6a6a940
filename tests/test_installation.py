"""The pip command that hints name: it installs an extra from where Treadle itself came."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from treadle.files import installation
from treadle.files.installation import pip_install

ROOT = Path(__file__).resolve().parent.parent


def test_in_a_clone_it_installs_the_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert pip_install("text") == "pip install '.[text]'"
    assert pip_install("text", "gguf", options="--upgrade") == "pip install --upgrade '.[text,gguf]'"
    monkeypatch.chdir(tmp_path)
    assert pip_install("text") == f"pip install '{ROOT}[text]'"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Pretend that Treadle is installed outside a clone, with this record of its address."""
    monkeypatch.setattr(installation, "_PACKAGE", tmp_path / "site-packages" / "treadle")

    def record(text: str | None) -> None:
        monkeypatch.setattr(installation, "distribution", lambda name: SimpleNamespace(read_text=lambda file: text))

    return record


def test_from_a_wheel_it_installs_the_wheel(installed: Any, tmp_path: Path) -> None:
    wheel = tmp_path / "my files" / "treadle-0.1.0-py3-none-any.whl"
    installed(json.dumps({"url": wheel.as_uri(), "archive_info": {"hash": "sha256=00"}}))
    assert pip_install("text") == "pip install 'treadle-0.1.0-py3-none-any.whl[text]'", "it is no longer there"
    wheel.parent.mkdir()
    wheel.touch()
    assert pip_install("text") == f"pip install '{wheel}[text]'"


def test_other_origins(installed: Any) -> None:
    installed(json.dumps({"url": "https://example.org/treadle.git", "vcs_info": {"vcs": "git", "commit_id": "0"}}))
    assert pip_install("tvm") == "pip install 'treadle[tvm] @ git+https://example.org/treadle.git'"
    installed(json.dumps({"url": "https://example.org/treadle-0.1.0-py3-none-any.whl", "archive_info": {}}))
    assert pip_install("tvm") == "pip install 'treadle[tvm] @ https://example.org/treadle-0.1.0-py3-none-any.whl'"


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"url": 3}'])
def test_from_an_index_it_is_the_name(text: str | None, installed: Any) -> None:
    installed(text)
    assert pip_install("tvm") == "pip install 'treadle[tvm]'"


def test_without_a_record_of_the_installation(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    installed(None)
    monkeypatch.setattr(installation, "distribution", missing)
    assert pip_install("tvm") == "pip install 'treadle[tvm]'"
