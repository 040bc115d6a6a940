"""Type checkers and linters on models. The models in the README and in docs/dsl.md have no finding except for the
misspelt word there; in a model with mistakes, all are found.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_overloads

import pytest

import treadle
from treadle.tasks.loaded import LoadedModel

ROOT = Path(__file__).resolve().parent.parent

MISTAKEN = """\
from typing import Annotated, assert_type

import treadle as t
from treadle.compiled import Compiled
from treadle.ir.ops.normalization import Softmax
from treadle.tasks.filling import Filled
from treadle.tasks.loaded import LoadedModel

Tokens = Annotated[t.Tensor, t.i64["B S"]]


@t.model
def inner(tokens: Tokens, lengths: Annotated[t.Tensor, t.i64["B"]] | None = None, *, dim: int = 8) -> t.Tensor:
    return t.embed(tokens, 10, dim, name="e")


@t.model
def outer(tokens: Tokens, *, dim: int = 8) -> t.Tensor:
    x = inner(tokens, dim=dim)
    y, z = t.top_k(t.softmax(x, axis=-1) @ x, k=2)
    t.layer_norm(2.0 * y + z.cast(t.f32), name="n").shape
    t.self_attention(x, 4, causal=True, scale=x.shape[-1] ** -0.5, bias=t.alibi([0.5, 0.25, 0.1, 0.05]))
    x = x / x.shape[-1] + x.shape[1] * x * (x.shape[-1] * 0.5) * (1 / x.shape[-1])
    inner()  # wrong
    inner(tokens, dim="8")  # wrong
    inner(tokens, width=8)  # wrong
    t.sofmax(x)  # wrong
    t.softmax(x, axes=1)  # wrong
    t.softmax("x")  # wrong
    t.self_attention(x, 4, casual=True)  # wrong
    x[:, 0].mean(-1).reshape(-1, x.size(0)).exp().maximum(x.max(-1).values)
    first, *rest = x.chunk(2, dim=-1)
    x.meen()  # wrong
    x.exp(1)  # wrong
    x["b"]  # wrong
    return t.ops.layer_norm(x, eps=1e-6)


outer.configure(dim=4)
t.compile(outer, dim=4)(tokens=[[1]])
t.compile(outer, sed=4, seed="4")  # wrong
assert_type(t.compile(outer), Compiled)
assert_type(t.compile(t.ModelSource.open("folder", limits={"tensors": 7})), Compiled)
assert_type(t.load("folder"), LoadedModel)
assert_type(t.load("folder").fill(["a", "b"]), list[Filled])
assert_type(t.load_artifact("m.treadle"), Compiled)
assert_type(t.Trainer(outer), t.Trainer)
t.load("folder").clasify("a")  # wrong
t.load_artifact("m.treadle").classify("a")  # wrong
t.load_artifact("m.treadle", quantize="int4")  # wrong
t.UsageError, t.BackendError
op = Softmax(axis=-1)
op.axis = 0  # wrong
Softmax(axs=0)  # wrong
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """Write a folder with the models of two pages, a model with mistakes, and the package in a form for type checkers.
    Return its path.
    """
    for page, name in (("README.md", "readme.py"), ("docs/dsl.md", "language.py")):
        blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.M)
        (tmp_path / name).write_text("\n\n".join(blocks), encoding="utf-8")
    (tmp_path / "mistaken.py").write_text(MISTAKEN, encoding="utf-8")
    package = tmp_path / "packages" / "treadle"
    package.mkdir(parents=True)
    layers = [ROOT / name for name in ("backends", "files", "frontends", "ir", "models", "passes", "runtime")]
    for path in [*(ROOT / "treadle").iterdir(), *layers]:
        (package / path.name).symlink_to(path)
    return tmp_path


def _run(folder: Path, *command: str) -> str:
    environment = os.environ | {"MYPYPATH": str(folder / "packages")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False).stdout


def _wrong_places(folder: Path) -> set[tuple[str, int]]:
    """Return the lines marked as wrong, and the line of the page that shows the error for a misspelt word."""
    language = (folder / "language.py").read_text(encoding="utf-8").splitlines()
    wrong = {("mistaken.py", i) for i, line in enumerate(MISTAKEN.splitlines(), 1) if line.endswith("# wrong")}
    return wrong | {("language.py", i) for i, line in enumerate(language, 1) if "t.sofmax(" in line}


def test_mypy(workplace: Path) -> None:
    pytest.importorskip("mypy")
    (workplace / "mypy.ini").write_text(
        "[mypy]\n"
        "strict = true\n"
        f"cache_dir = {ROOT / '.mypy_cache' / 'models'}\n"
        "[mypy-language]\ndisallow_untyped_defs = false\ndisallow_incomplete_defs = false\n"  # a common first attempt
        "[mypy-treadle.*]\nfollow_imports = silent\n"
        "[mypy-torch.*,tvm.*,networkx.*,onnx.*,rich.*,typer.*,tokenizers.*]\n"
        "follow_imports = skip\nignore_missing_imports = true\n"
    )
    said = _run(
        workplace, sys.executable, "-m", "mypy", "--no-error-summary", "readme.py", "language.py", "mistaken.py"
    )
    found = [re.match(r"(.*?\.py):(\d+): error", line) for line in said.splitlines() if " error: " in line]
    places = {(m[1], int(m[2])) for m in found if m}
    assert places == _wrong_places(workplace), said


def test_pyright(workplace: Path) -> None:
    if importlib.util.find_spec("basedpyright"):
        command = [sys.executable, "-m", "basedpyright"]
    elif shutil.which("basedpyright"):
        command = ["basedpyright"]
    else:
        pytest.skip("needs basedpyright")
    settings = {"typeCheckingMode": "standard", "extraPaths": ["packages"], "include": ["*.py"]}
    (workplace / "pyrightconfig.json").write_text(json.dumps(settings))
    said = _run(workplace, *command, "--pythonpath", sys.executable, "--outputjson")
    found = [d for d in json.loads(said)["generalDiagnostics"] if d["severity"] == "error"]
    places = {(Path(d["file"]).name, d["range"]["start"]["line"] + 1) for d in found}
    assert places == _wrong_places(workplace), found


def test_ruff(workplace: Path) -> None:
    pytest.importorskip("ruff")
    said = _run(workplace, sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", "readme.py")
    assert said.strip() == "All checks passed!"


# -- what the public API returns ---------------------------------------------------------------------------------------


def _returns(name: str, found: object) -> Iterator[tuple[str, str]]:
    """Yield the return annotation of each public function and of the methods of public classes; of all overloads if
    there are any.
    """
    members = inspect.getmembers_static(found) if inspect.isclass(found) else [("", found)]
    for member, value in members:
        each = getattr(value, "__func__", getattr(value, "fget", getattr(value, "func", value)))
        if not inspect.isfunction(each) or not each.__module__.startswith("treadle") or member.startswith("_"):
            continue
        for function in get_overloads(each) or [each]:
            yield f"{name}.{member}", str(function.__annotations__.get("return"))


def test_no_result_of_the_public_api_is_any() -> None:
    """The results of the DSL's ops and methods are annotated in stubs. Elements of arrays and values of JSON may be
    Any.
    """
    stub = (ROOT / "frontends" / "operations.pyi").read_text(encoding="utf-8")
    methods = (ROOT / "ir" / "tensors" / "elementwise.pyi").read_text(encoding="utf-8")
    in_stub = set(re.findall(r"^def (\w+)\(", stub, re.MULTILINE))
    assert "softmax" in in_stub and not re.search(r"-> .*\bAny\b", stub + methods)
    named = {name: getattr(treadle, name) for name in dir(treadle) if name[0] != "_" and name not in in_stub}
    assert {"compile", "load", "load_artifact", "Trainer", "ModelSource"} <= named.keys()
    known = r"ndarray\[Any, Any\]|(dict|Mapping)\[str, Any\]|list\[Array\]"
    returns = dict(
        pair for name, found in {**named, "LoadedModel": LoadedModel}.items() for pair in _returns(name, found)
    )
    stubbed = {f"Tensor.{name}" for name in re.findall(r"def (\w+)\(", methods)}
    wrong = {where: said for where, said in returns.items() if re.search(r"\bAny\b", re.sub(known, "", said))}
    wrong = {where: said for where, said in wrong.items() if where not in stubbed}
    assert not wrong, wrong
    assert "LoadedModel.answer" in returns and returns["load."] == "LoadedModel"
    assert returns["load_artifact."] == returns["compile."] == "Compiled"
