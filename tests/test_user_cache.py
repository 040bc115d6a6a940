"""The user's cache folder among other users: nothing of theirs is read, and nothing is left in their folders."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from treadle.files.user_cache import is_private, make_private, private_folder

pytestmark = pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")

OTHER = 54321
root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give folders away")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("TREADLE_CACHE", str(folder))
    return folder


def test_folders_are_made_for_their_user_alone(cache: Path) -> None:
    before = os.umask(0)
    try:
        assert private_folder("kernels", "version") == cache / "kernels" / "version"
    finally:
        os.umask(before)
    for each in (cache, cache / "kernels", cache / "kernels" / "version"):
        assert each.stat().st_mode & 0o777 == 0o700


@root
def test_a_folder_of_another_user_is_left_alone(cache: Path) -> None:
    (cache / "kernels").mkdir(parents=True)
    os.chown(cache / "kernels", OTHER, OTHER)
    own = cache / f"user-{os.geteuid()}" / "kernels" / "version"
    assert private_folder("kernels", "version") == own
    assert list((cache / "kernels").iterdir()) == []
    os.chown(cache, OTHER, OTHER)  # what is in it may be replaced
    beside = cache.with_name(f"cache-{os.geteuid()}")
    assert private_folder("kernels", "version") == beside / "kernels" / "version"
    assert private_folder("panels") == beside / "panels"


@root
def test_root_leaves_nothing_in_the_folder_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise one `sudo treadle` would take the user's cache away."""
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, OTHER, OTHER)
    monkeypatch.setenv("TREADLE_CACHE", str(home / ".cache" / "treadle"))
    assert private_folder("kernels") is None
    assert list(home.iterdir()) == []


@root
def test_a_folder_that_root_alone_reads_is_not_the_users(tmp_path: Path) -> None:
    """The folder that `sudo treadle` of an older version left: it is private, and its files cannot be opened."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o711)
    (folder / "kernels").mkdir(mode=0o700)
    tmp_path.chmod(0o711)
    child = os.fork()
    if child == 0:
        os.setresgid(OTHER, OTHER, OTHER)
        os.setresuid(OTHER, OTHER, OTHER)
        os._exit(int(make_private(folder / "kernels")) + 2 * int(make_private(folder / "kernels" / "version")))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_unreadable_or_missing_place_is_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("TREADLE_CACHE", str(file / "below"))
    assert private_folder("kernels") is None
    monkeypatch.setenv("TREADLE_CACHE", "~no user of this name/cache")
    assert private_folder("kernels") is None


@pytest.mark.parametrize(
    ("group", "user", "members", "private"),
    [("ada", "ada", ["ada"], True), ("ada", "ada", [], True), ("users", "ada", [], False),
     ("ada", "ada", ["ada", "bob"], False)],
)  # fmt: skip
def test_a_group_counts_if_the_user_is_alone_in_it(
    group: str, user: str, members: list[str], private: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import grp
    import pwd

    number = 4321
    monkeypatch.setattr(os, "getegid", lambda: number)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: SimpleNamespace(pw_name=user))
    monkeypatch.setattr(grp, "getgrgid", lambda _: SimpleNamespace(gr_name=group, gr_mem=members))
    folder = tmp_path.resolve() / "folder"
    folder.mkdir()
    real = Path.stat

    def stat(path: Path, **given: bool) -> object:
        about = real(path, **given)
        if path != folder:
            return about
        return SimpleNamespace(st_mode=about.st_mode | 0o020, st_uid=about.st_uid, st_gid=number)

    monkeypatch.setattr(Path, "stat", stat)
    assert is_private(folder) is private
