"""Files with a declaration that import modules beside them, as `python file.py` would."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import treadle as t
from tests.command_line import commands_in
from treadle.files.errors import TreadleError
from treadle.frontends.declaration_files import load_declaration
from treadle.ir.errors import FrontendError

MODEL = """from typing import Annotated
import treadle as t
{first}

@t.model
def net(x: Annotated[t.Tensor, t.f32["B 8"]]):
    {lines}
"""
BLOCKS = """import treadle as t

def mlp(x, hidden={hidden}):
    return t.mlp(x, hidden, name="mlp")
"""


def write(folder: Path, first: str, lines: str = "return mlp(x)", hidden: int = 16) -> Path:
    """Write net.py and blocks.py to a folder, and return the file of the model."""
    folder.mkdir(exist_ok=True)
    (folder / "blocks.py").write_text(BLOCKS.format(hidden=hidden))
    path = folder / "net.py"
    path.write_text(MODEL.format(first=first, lines=lines))
    return path


def hidden(path: Path) -> int | None:
    """Return the size of the hidden axis of a file's model."""
    return load_declaration(path, "net").graph().parameters["mlp.up.weight"].type.shape[0].constant


FIRST = [
    "from blocks import mlp",
    "import blocks; mlp = blocks.mlp",
    "from pack.blocks import mlp",
    "from bare.blocks import mlp",
]


@pytest.mark.parametrize("first", FIRST)
def test_a_model_imports_modules_and_packages_beside_it(first: str, tmp_path: Path) -> None:
    path = write(tmp_path, first)
    for folder in ("pack", "bare"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "blocks.py").write_text("from .inner import mlp\n")
        (tmp_path / folder / "inner.py").write_text(BLOCKS.format(hidden=16))
    (tmp_path / "pack" / "__init__.py").write_text("")
    before, path_before = dict(sys.modules), list(sys.path)
    assert hidden(path) == 16
    assert {*sys.modules} - {*before} <= {"treadle_model_net"}
    assert sys.path == path_before
    assert not list(tmp_path.rglob("__pycache__")), "no bytecode is written"


def test_a_command_runs_it_from_another_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "models", "from blocks import mlp")
    said = commands_in(tmp_path, capsys, monkeypatch)("inspect", f"{path}:net")
    assert said.code == 0
    assert "mlp.up.weight" in said.out


def test_a_model_may_import_while_it_is_traced(tmp_path: Path) -> None:
    assert hidden(write(tmp_path, "", "from blocks import mlp\n    return mlp(x)")) == 16


def test_files_in_different_folders_have_their_own_neighbors(tmp_path: Path) -> None:
    inside = "from blocks import mlp\n    return mlp(x)"
    models = [load_declaration(write(tmp_path / str(n), "import blocks", inside, n), "net") for n in (8, 24)]
    sizes = [model.graph().parameters["mlp.up.weight"].type.shape[0].constant for model in models]
    assert sizes == [8, 24]


def test_a_file_that_is_loaded_again_reads_its_neighbors_again(tmp_path: Path) -> None:
    path = write(tmp_path, "from blocks import mlp")
    assert hidden(path) == 16
    (tmp_path / "blocks.py").write_text(BLOCKS.format(hidden=40))
    assert hidden(path) == 40


def test_a_neighbor_does_not_replace_a_standard_module(tmp_path: Path) -> None:
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('not the standard one')")
    sys.modules.pop("colorsys", None)
    assert hidden(write(tmp_path, "import colorsys; colorsys.rgb_to_hsv\nfrom blocks import mlp")) == 16


@pytest.mark.parametrize(
    ("first", "hint"),
    [
        ("import absent_module", "a file absent_module.py beside net.py"),
        ("from .blocks import mlp", "the import without the dot"),
    ],
)
def test_an_import_that_fails_says_what_would_work(first: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(FrontendError, match=r"net\.py cannot be imported") as caught:
        hidden(write(tmp_path, first))
    assert hint in str(caught.value)


def test_an_error_in_a_neighbor_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "from blocks import mlp")
    (tmp_path / "blocks.py").write_text("import treadle\n\nx = 1 / 0\n")
    with pytest.raises(FrontendError, match=r"(?s)ZeroDivisionError.*blocks\.py:3"):
        hidden(path)


def test_weights_notice_that_a_neighbor_has_changed(tmp_path: Path) -> None:
    path = write(tmp_path, "from blocks import mlp", 'return {"loss": mlp(x).mean()}')
    trainer = t.Trainer(f"{path}:net", loss="loss", backend="numpy")
    trainer.save(tmp_path / "out")
    (tmp_path / "blocks.py").write_text(BLOCKS.format(hidden=16) + "# a comment\n")
    t.compile(f"{path}:net", weights=tmp_path / "out", backend="numpy")
    (tmp_path / "blocks.py").write_text(BLOCKS.format(hidden=16).replace("t.mlp(x", "t.mlp(2 * x"))
    with pytest.raises(TreadleError, match="not the declaration with which these weights were trained"):
        t.compile(f"{path}:net", weights=tmp_path / "out", backend="numpy")
