"""Access to the file system: files that are opened, read, written and removed, limits, names and errors."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from treadle.files import contained_files, user_cache, whole_files
from treadle.files.contained_files import canonical, contained, open_regular, read_regular
from treadle.files.errors import CheckpointError, Hint, TreadleError, UsageError
from treadle.files.limits import MORE, check_limits, limit_hint, limits_of
from treadle.files.nearest_names import NearestNames
from treadle.files.shown_names import on_one_line, printable, shown_path
from treadle.files.user_cache import UNUSED, forget_unused, is_private
from treadle.files.whole_files import replacing, sweep

posix = pytest.mark.skipif(os.name != "posix", reason="pipes, owners and links are POSIX's")

# -- opened and read ---------------------------------------------------------------------------------------------------


@posix
def test_only_a_regular_file_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a pipe that has no writer does not block."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(CheckpointError, match="not a regular file") as error:
            open_regular(name)
        assert (error.value.received, error.value.within) == ("a folder, a pipe or a device", name)
    for name in ("nothing", "pipe/inside"):
        with pytest.raises(CheckpointError, match="the file does not exist"):
            open_regular(name, "the file")
    for name, reason in (("a\0b", "a null character"), ("a\ud800b", "a character that the system cannot encode")):
        for opening in (open_regular, canonical):
            with pytest.raises(CheckpointError, match="the file cannot be opened") as error:
                opening(name)
            assert (error.value.received, error.value.within) == (f"{reason} in the path", shown_path(name))


def test_a_file_is_read_up_to_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ten").write_bytes(b"0123456789")
    assert read_regular("ten", 10) == b"0123456789"
    with pytest.raises(CheckpointError, match="the file is longer than the limit") as error:
        read_regular("ten", 9, setting="bytes")
    report = error.value
    assert (report.received, report.within) == ("10 bytes, limit 9", "ten")
    assert report.hint == "limits={'bytes': 10}, if you trust the file"
    with pytest.raises(CheckpointError, match="the file is longer than the limit") as error:
        read_regular("ten", 0, "the file")
    assert (error.value.within, error.value.hint) == ("the file", None)


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fstat(descriptor: int) -> Any:
        raise OSError(5, "Input/output error")

    (tmp_path / "a").write_bytes(b"")
    monkeypatch.setattr(
        contained_files, "open_regular", lambda path, shown: os.fdopen(os.open(path, os.O_RDONLY), "rb")
    )
    monkeypatch.setattr(contained_files, "os", SimpleNamespace(fstat=fstat))
    with pytest.raises(CheckpointError, match="the file cannot be opened") as error:
        read_regular(tmp_path / "a", 9, "a")
    assert (error.value.received, error.value.within) == ("Input/output error", "a")


@posix
def test_links_lead_nowhere_out_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    root = canonical(".")
    for name, target in (("out", ".."), ("inside", "."), ("gone", "nowhere"), ("circle", "circle")):
        Path(name).symlink_to(target)
    assert contained("inside", root) == root
    for name, what in (
        ("out", "the path leads out of the model's folder, and files outside it are not read"),
        ("gone", "the target of a link does not exist"),
        ("circle", "the file cannot be opened"),
        ("nothing", "the file does not exist"),
    ):
        for shown in (None, "the weights"):
            with pytest.raises(CheckpointError) as error:
                contained(name, root, shown)
            assert (error.value.what, error.value.within) == (what, shown or name)
            if name == "out":
                assert error.value.hint == f"move the file itself into {root}"
    with pytest.raises(CheckpointError) as error:
        canonical("gone")
    assert error.value.within == "gone"


# -- written and swept -------------------------------------------------------------------------------------------------


def test_a_name_that_is_long_is_staged_by_its_beginning(tmp_path: Path) -> None:
    target = tmp_path / ("x" * 250)
    with replacing(target) as file:
        staged = Path(file.name)
        file.write(b"whole")
    assert (staged.name[:66], len(staged.name)) == ("." + "x" * 64 + "-", 66 + 12)
    assert [each.name for each in tmp_path.iterdir()] == [target.name]


def test_failed_writes_leave_only_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(TypeError), replacing(tmp_path / "a") as file:
        file.write(b"half") + file.write(None)  # type: ignore[arg-type]
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"a": b"old"}


@posix
@pytest.mark.parametrize(
    ("error", "writes", "swept"), [(None, True, True), (BlockingIOError, False, False), (OSError, True, False)]
)
def test_a_file_of_which_nobody_can_tell_whether_it_is_locked_stays(
    error: type[OSError] | None, writes: bool, swept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, how: int) -> None:
        assert how == 2 | 4, "alone, and without waiting"
        if error is not None:
            raise error

    monkeypatch.setattr(whole_files, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4))
    with (tmp_path / "file").open("xb") as file:
        assert whole_files._lock(file.fileno(), otherwise=True) == writes
    left = tmp_path / ".a-0123456789ab"
    left.write_bytes(b"")
    whole_files._sweep_dead(tmp_path / "a")
    assert left.exists() != swept


@posix
def test_files_of_others_are_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f".a-{n:012x}" for n in range(3)]
    os.mkfifo(tmp_path / names[0])
    (tmp_path / names[1]).symlink_to(tmp_path / names[2])
    (tmp_path / names[2]).write_bytes(b"")
    user = os.geteuid()
    for owner, left in ((user + 1, names), (user, names[:2])):
        monkeypatch.setattr(os, "geteuid", lambda owner=owner: owner)
        whole_files._sweep_dead(tmp_path / "a")
        assert sorted(each.name for each in tmp_path.iterdir()) == left


def test_only_what_is_staged_and_a_day_old_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    day, now = 86400, 2_000_000_000
    monkeypatch.setattr(whole_files, "time", SimpleNamespace(time=lambda: now))
    kept = {".a-0123456789ab": day, "a-0123456789ab": 9 * day, ".a-0123456789abc": 9 * day, ".a-0123456789a": 9 * day}
    for name, age in {**kept, ".b\n-0123456789ab": day + 1}.items():
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (now - age, now - age))
    sweep(tmp_path)
    sweep(tmp_path / "nothing")
    assert {each.name for each in tmp_path.iterdir()} == kept.keys()


def test_two_months_are_kept_to_the_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 2_000_000_000
    assert UNUSED == 60 * 86400
    monkeypatch.setattr(user_cache, "time", SimpleNamespace(time=lambda: now))
    for name, age in (("kept", UNUSED), ("goes", UNUSED + 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "inside").write_bytes(b"")
        os.utime(tmp_path / name, (now - age, now - age))
    forget_unused(tmp_path, re.compile("kept|goes"))
    assert [each.name for each in tmp_path.iterdir()] == ["kept"]


@dataclass(frozen=True)
class _Folder:
    """A stand-in for a folder with an owner, a group and a mode, and for the folder's parents."""

    uid: int = 7
    gid: int = 8
    mode: int = 0o755
    above: tuple[_Folder, ...] = ()

    @property
    def parents(self) -> tuple[_Folder, ...]:
        return self.above

    def resolve(self, strict: bool) -> _Folder:
        assert strict
        return self

    def stat(self) -> Any:
        return SimpleNamespace(st_uid=self.uid, st_gid=self.gid, st_mode=self.mode | stat.S_IFDIR)


@posix
@pytest.mark.parametrize(
    ("folder", "private"),
    [
        (_Folder(), True),
        (_Folder(uid=0), True),
        (_Folder(uid=1), False),
        (_Folder(mode=0o775), True),  # the user's own group
        (_Folder(mode=0o775, gid=0), True),
        (_Folder(mode=0o775, gid=1), False),
        (_Folder(gid=1), True),
        (_Folder(mode=0o757), False),
        (_Folder(mode=0o1757), False),
        (_Folder(above=(_Folder(mode=0o1777, uid=0),)), True),
        (_Folder(above=(_Folder(mode=0o1777, uid=1),)), False),
        (_Folder(above=(_Folder(mode=0o777, uid=0),)), False),
        (_Folder(above=(_Folder(uid=0), _Folder(mode=0o775, gid=1))), False),
    ],
)
def test_a_folder_is_private_by_its_owners_and_modes(
    folder: Any, private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 7)
    monkeypatch.setattr("treadle.files.user_cache._is_own_group", lambda number: number in (0, 8))
    assert is_private(folder) == private


# -- limits, names, errors ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Limits:
    nodes: int = 5
    bytes: int = 6


def test_limits_are_given_by_name_or_all() -> None:
    assert limits_of(_Limits, None) == _Limits()
    assert limits_of(_Limits, _Limits(1, 2)) == _Limits(1, 2)
    assert limits_of(_Limits, {"nodes": 1}) == _Limits(nodes=1)
    assert MORE == 4
    assert limit_hint("nodes", 9).command == "--limit nodes=9, if you trust the file"


@pytest.mark.parametrize(
    ("given", "what", "received", "hint"),
    [
        (7, "limits must be a _Limits, or numbers by name", "a int", "one of nodes, bytes"),
        ({"node": 1}, "this kind of file has no limit 'node'", None, "one of nodes, bytes"),
        ({"nodes": 0}, "the limit nodes must be a positive integer", "0", None),
        ({"bytes": True}, "the limit bytes must be a positive integer", "True", None),
        ({"bytes": "9" * 100}, "the limit bytes must be a positive integer", "'" + "9" * 79, None),
    ],
)
def test_invalid_limits_are_refused(given: Any, what: str, received: str | None, hint: str | None) -> None:
    with pytest.raises(UsageError) as error:
        limits_of(_Limits, given)
    assert (error.value.what, error.value.received, error.value.hint) == (what, received, hint)
    if isinstance(given, dict):
        with pytest.raises(UsageError):
            check_limits(given, ["nodes", "bytes"])


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("é" * 160, "é" * 160),
        ("é" * 161, "é" * 160 + "... (161 characters)"),
        ("", "''"),
        ("a\nb", r"'a\nb'"),
        ("\x1b" + "a" * 160, "'\\x1b" + "a" * 159 + "'... (161 characters)"),
    ],
)
def test_a_name_is_shown_without_what_a_terminal_obeys(name: str, shown: str) -> None:
    assert printable(name) == shown
    assert "\n" not in on_one_line(name)


def test_a_path_is_shown_as_long_as_a_system_takes_it() -> None:
    assert shown_path(Path("x" * 4096)) == "x" * 4096
    assert shown_path("x" * 4097) == "x" * 4096 + "... (4097 characters)"
    assert on_one_line("a\né") == "a\\n\\xe9"


def test_a_name_that_is_near_is_near_by_three_fifths() -> None:
    names = NearestNames(["abcfg", "abxyz"])
    assert names.of("abcde") == ["abcfg"]  # 6 of 10 characters agree
    assert names.of("abcde", 2, 0.4) == ["abcfg", "abxyz"]
    assert names.of("abcdeh") == []  # 6 of 11 agree


def test_an_error_reads_line_by_line() -> None:
    error = TreadleError("what", received="a\nb", within="c", source="d", hint=Hint("e", "f"))
    assert str(error).splitlines() == [
        "what", "  received  a", "            b", "  in        c", "  from      d", "  try       e"
    ]  # fmt: skip
    assert str(TreadleError("what", hint="")) == "what"
    assert not error.is_reported
