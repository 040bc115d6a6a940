"""The shape of the source tree: the packaged files, the imports between layers, the names of modules."""

from __future__ import annotations

import ast
import json
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "files": set(),
    "ir": {"files"},
    "frontends": {"ir", "files"},
    "passes": {"ir", "files"},
    "backends": {"passes", "ir", "files"},
    "runtime": {"backends", "passes", "ir", "files"},
    "models": {"frontends", "ir", "files"},
    "treadle": {"models", "runtime", "backends", "passes", "frontends", "ir", "files"},
}
"""The layers, one for each top-level folder, and the layers that each may import."""

LAYERS = sorted(MAY_IMPORT)
BESIDE = ["benchmarks", "examples", "tests"]


@cache
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@pytest.fixture(autouse=True, scope="module")
def _trees_are_freed() -> Iterator[None]:
    """The trees of all files are 3 million objects."""
    yield
    tree_of.cache_clear()


@cache
def imports_of(path: Path) -> list[tuple[int, str]]:
    """Return the line and the full dotted name of every import in a file, including imports inside functions."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found += ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
    return found


def layer_of(module: str) -> str | None:
    """Return the layer of a dotted name: "ir" for treadle.ir.graph, None for a name that is not ours."""
    first, *rest = module.split(".")
    if first != "treadle":
        return None
    return rest[0] if rest and rest[0] in MAY_IMPORT else "treadle"


def where(path: Path, line: int | None = None) -> str:
    return path.relative_to(ROOT).as_posix() + (f":{line}" if line else "")


# Packaged files


def package_folders() -> dict[str, str]:
    """Return every package of the tree and its folder, as pyproject.toml should have them."""
    found = {}
    for path in python_files(*LAYERS):
        if path.name == "__init__.py":
            folder = where(path.parent)
            found["treadle." * (folder.split("/")[0] != "treadle") + folder.replace("/", ".")] = folder
    return found


def test_the_listed_packages_are_those_of_the_tree() -> None:
    setuptools = pyproject()["tool"]["setuptools"]
    assert sorted(setuptools["packages"]) == sorted(package_folders())
    assert setuptools["package-dir"] == package_folders()


def test_every_folder_with_code_is_a_package() -> None:
    folders = {where(path.parent) for path in python_files(*LAYERS)}
    assert folders == set(package_folders().values())


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the tree with the files that a build needs; skip if a build would need the network."""
    for tool, oldest in (("pip", 21), ("setuptools", 77)):
        try:
            found = metadata.version(tool)
        except metadata.PackageNotFoundError:
            found = "0"
        if int(found.split(".")[0]) < oldest:
            pytest.skip(f"needs {tool} {oldest} or newer")
    source = tmp_path_factory.mktemp("source")
    for name in LAYERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", pyproject()["project"]["readme"], "LICENSE"):
        shutil.copy(ROOT / name, source)
    return source


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel."""
    built = tmp_path_factory.mktemp("built")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(built)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = built.glob("*.whl")
    return path


def packaged_files() -> set[str]:
    """Return every file of the packages, at its installed path."""
    found = set()
    for path in (path for layer in LAYERS for path in (ROOT / layer).rglob("*") if path.is_file()):
        if "__pycache__" not in path.parts:
            inside = where(path)
            found.add(inside if inside.startswith("treadle/") else f"treadle/{inside}")
    return found


def test_type_checkers_see_every_file_of_the_packages(tmp_path: Path) -> None:
    """`make .typecheck` creates links to all files, so that `make lint` checks every file."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    for layer in LAYERS:
        (tmp_path / layer).symlink_to(ROOT / layer)
    subprocess.run(["make", "-f", str(ROOT / "Makefile"), ".typecheck"], cwd=tmp_path, check=True)
    seen = tmp_path / ".typecheck"
    assert sorted(file for file in packaged_files() if not (seen / file).is_file()) == []


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == packaged_files()


def test_a_strict_editable_install_is_a_folder_that_type_checkers_can_follow(source: Path, tmp_path: Path) -> None:
    """As README describes, the installation is a path that contains every module, with the code of the checkout."""
    program = (
        "import sys\n"
        "from setuptools.build_meta import build_editable\n"
        "build_editable(sys.argv[1], {'editable_mode': 'strict'})"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        (listing,) = (name for name in archive.namelist() if name.endswith(".pth"))
        folder = Path(archive.read(listing).decode().strip())
    held = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert held == packaged_files()
    assert (folder / "treadle/ir/graph.py").samefile(source / "ir/graph.py")


def test_the_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        "import importlib, json, sys\n"
        "modules = [importlib.import_module(name) for name in json.loads(sys.argv[1])]\n"
        "print(json.dumps([module.__file__ for module in modules]))"
    )
    command = [sys.executable, "-c", program, json.dumps(sorted(package_folders()))]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for file in json.loads(result.stdout):
        assert Path(file).is_relative_to(tmp_path / "site")


def test_the_command_that_adds_an_extra_to_an_installed_wheel_works(wheel: Path, tmp_path: Path) -> None:
    """Hints name the command. It is followed up to the download."""
    options, site = ["--no-deps", "--no-index", "--quiet"], tmp_path / "site"
    environment = os.environ | {"PYTHONPATH": str(site)}

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    run("-m", "pip", "install", *options, "--target", str(site), str(wheel))
    hint = run("-c", "from treadle.files.installation import pip_install; print(pip_install('text'))")
    assert hint == f"pip install '{wheel}[text]'"
    run("-m", *shlex.split(hint), *options, "--dry-run", "--ignore-installed")


def test_lines_of_an_installed_package_are_not_the_users(tmp_path: Path) -> None:
    """All folders of an installed package are in one folder, also those of `treadle/` in a checkout."""
    package = tmp_path / "treadle"
    package.mkdir()
    for path in [*(ROOT / "treadle").iterdir(), *(ROOT / name for name in LAYERS if name != "treadle")]:
        (package / path.name).symlink_to(path)
    program = (
        "import sys; from treadle.ir.source_lines import _is_compiler\n"
        "for part in sys.argv[1:]: print(_is_compiler[part])"
    )
    paths = [str(package / part) for part in ("training/trainer.py", "ir/graph.py", "__init__.py", "models/gpt2.py")]
    done = subprocess.run(
        [sys.executable, "-c", program, *paths, "model.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True", "True", "False", "False"]


def test_a_checkout_works_without_being_installed(tmp_path: Path) -> None:
    """The checkout's root is on the path, and the import hooks of an editable install are absent."""
    program = (
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in f'{f.__module__} {f}'.lower()]\n"
        "import treadle.ir.graph, treadle.files\n"
        "print(treadle.ir.graph.__file__, treadle.files.__file__, sep='\\n')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(ROOT / "ir/graph.py"), str(ROOT / "files/__init__.py")]


def test_console_scripts_exist() -> None:
    for target in pyproject()["project"]["scripts"].values():
        module, function = target.split(":")
        place = ROOT.joinpath(*module.split("."))
        path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        assert path.is_file(), target
        assert any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree_of(path).body)


def test_importing_treadle_loads_no_third_party_but_numpy() -> None:
    program = (
        "import json, sys\n"
        "before = set(sys.modules)\n"
        "import treadle\n"
        "new = [name for name in set(sys.modules) - before if getattr(sys.modules[name], '__file__', None)]\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in new})))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    loaded = set(json.loads(result.stdout)) - sys.stdlib_module_names
    assert "treadle" in loaded
    assert loaded <= {"treadle", "numpy"}


# Imports between layers


def test_imports_point_down_only() -> None:
    upward = []
    for layer in LAYERS:
        for path in python_files(layer):
            for line, name in imports_of(path):
                target = layer_of(name)
                if target not in {None, layer} | MAY_IMPORT[layer]:
                    upward.append(f"{where(path, line)}: {layer} must not import {name}")
    assert upward == []


def test_importers_share_recipes_and_nothing_else() -> None:
    folders = ("onnx_import", "torch_export")
    shared = [
        f"{where(path, line)}: {name}"
        for own, other in (folders, folders[::-1])
        for path in python_files(f"frontends/{own}")
        for line, name in imports_of(path)
        if name.startswith(f"treadle.frontends.{other}.")
    ]
    assert shared == []


def test_no_module_of_the_package_has_the_name_of_an_op() -> None:
    """An imported module would replace the op of its name as an attribute of the package."""
    import treadle.ir.ops  # noqa: F401  registers the ops
    from treadle.ir.op_registry import OPS

    modules = {path.stem for path in (ROOT / "treadle").iterdir()}
    assert not modules & OPS.keys()


def test_the_front_door_imports_in_one_order() -> None:
    """No module of `treadle/` imports itself indirectly, also not inside functions or for types."""
    needs: dict[str, set[str]] = {}
    for path in python_files("treadle"):
        if path.name != "__init__.py":
            module = where(path)[: -len(".py")].replace("/", ".")
            needs[module] = {part for _, name in imports_of(path) for part in (name, name.rpartition(".")[0])}
    left = dict(needs)
    while ready := [module for module, needed in left.items() if not needed & left.keys()]:
        for module in ready:
            del left[module]
    assert not left, "each of these needs another of them"


def test_imports_are_absolute_and_by_the_full_name() -> None:
    """`ir.graph.Graph is not treadle.ir.graph.Graph`, so no module may be loaded under its short name."""
    short = [
        f"{where(path, line)}: {name}"
        for path in python_files(*LAYERS, *BESIDE)
        for line, name in imports_of(path)
        if name.startswith(".") or name.partition(".")[0] in MAY_IMPORT.keys() - {"treadle"}
    ]
    assert short == []


# Names of modules


def test_no_file_is_named_after_a_library() -> None:
    """A folder may have a library's name: `treadle.backends.torch` is named after its target. But no file is named
    torch.py.
    """
    libraries = {
        name.partition(".")[0]
        for path in python_files(*LAYERS, *BESIDE)
        for _, name in imports_of(path)
        if not name.startswith(".")
    } - sys.stdlib_module_names
    for path in python_files(*LAYERS):
        own_imports = {name.partition(".")[0] for _, name in imports_of(path)}
        assert path.stem not in (libraries | own_imports) - {"treadle"}, where(path)


def test_no_two_things_have_one_name() -> None:
    """If two public classes have the same name, a reader can only distinguish them by their files.

    A rewrite that builds an op, and a kernel that computes an op, may have the op's name.
    """
    places: dict[str, dict[str, str]] = {}
    double = []
    for path in python_files(*LAYERS):
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                about_an_op = {"Rewrite", "Kernel"}.intersection(ast.unparse(base) for base in node.bases)
                role = "op" if where(path).startswith("ir/ops/") else "".join(about_an_op) or "other"
                known = places.setdefault(node.name, {})
                if role in known or (known and "other" in {role, *known}):
                    double.append(f"{node.name}: {where(path, node.lineno)}, {', '.join(known.values())}")
                known[role] = where(path, node.lineno)
    assert double == []


def test_no_module_is_a_drawer() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    paths = [path for path in python_files(*LAYERS, *BESIDE) if drawers & {path.stem, path.parent.name}]
    assert [where(path) for path in paths] == []


def test_no_module_shares_a_name_with_what_it_exports() -> None:
    """Otherwise `treadle.x.name` would be the module or the function, depending on the order of imports.

    A family's file is named after the declaration in it (models/gpt2.py, gpt2): so its package does not re-export the
    declaration.
    """
    for path in python_files(*(layer for layer in LAYERS if layer != "models")):
        defined = {
            node.name
            for node in tree_of(path).body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        }
        assert path.stem not in defined, where(path)
    for package, folder in package_folders().items():
        submodules = {child.stem for child in (ROOT / folder).iterdir() if child.stem.isidentifier()}
        exported = {
            alias.asname or alias.name
            for node in tree_of(ROOT / folder / "__init__.py").body
            if isinstance(node, ast.ImportFrom) and node.module != package
            for alias in node.names
        }
        assert not exported & submodules, package


CHANGING = {
    "ir/transforms/outline.py": {"RepeatedRegion", "_Repetition"},
    "frontends/onnx_import/scopes.py": {"Scope"},
    "passes/certificates/certifying.py": {"_Tally"},
    "passes/certificates/regions.py": {"Recorded"},
    "passes/cleanup/parts_read.py": {"FoundParts"},
    "passes/cleanup/position_slices.py": {"_Cut"},
    "passes/framework/pass_log.py": {"PassRecord"},
    "passes/fusion/attention/chain.py": {"ChainTerms"},
    "passes/fusion/attention/roles.py": {"Reading"},
    "passes/fusion/fuse_embedding_sum.py": {"_Tree"},
    "passes/lowering/grouping.py": {"_Group"},
    "passes/stepping/last_position.py": {"_Body", "_Widening"},
    "passes/quantization/activation_planning.py": {"_Product"},
    "passes/quantization/planning.py": {"_Readers"},
    "passes/sites/product_sites.py": {"_Origin"},
    "backends/onnx/spelled_line.py": {"Tensor", "OnnxNode"},
    "backends/python/emission.py": {"_Text"},
    "backends/torch/captured_graphs.py": {"_Repeated"},
    "backends/tvm/planning.py": {"Relocation", "Plan"},
    "backends/tvm/kernels/devices/group_kernel.py": {"GroupKernel"},
    "backends/tvm/kernels/devices/statements.py": {"Memory"},
    "backends/tvm/lowering/program.py": {"KernelStep", "RoutineStep", "Routine"},
    "runtime/generation.py": {"_Running"},
    "runtime/prefix_cache.py": {"_Block"},
    "runtime/scheduler.py": {"_Row"},
    "runtime/slots.py": {"Row"},
    "runtime/speculation.py": {"SpeculationTally"},
    "treadle/chatting/conversation.py": {"Conversation"},
    "treadle/serving/answers.py": {"GrowingChoice"},
    "treadle/serving/observing.py": {"HttpExchange"},
    "treadle/tasks/text_generation.py": {"TextGeneration", "Written"},
    "treadle/training/run_report.py": {"RunReport"},
    "treadle/training/text_training.py": {"TextTraining"},
}
"""Dataclasses that change while something is built from them. All others are values: they are frozen, and usable as
keys.
"""

BY_IDENTITY = {"Memory", "Tensor", "OnnxNode", "KernelStep", "RoutineStep", "Routine", "_Row", "_Block"}
"""Members of CHANGING that are compared by identity."""


def test_values_are_frozen() -> None:
    changing: dict[str, set[str]] = {}
    for path in python_files(*LAYERS):
        for node in ast.walk(tree_of(path)):
            for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else ():
                text = ast.unparse(decorator)
                if text.startswith("dataclass") and "frozen=True" not in text:
                    changing.setdefault(where(path), set()).add(node.name)
                    assert ("eq=False" in text) == (node.name in BY_IDENTITY), where(path, node.lineno)
    assert changing == CHANGING


def test_every_file_begins_with_its_subject() -> None:
    for path in python_files(*LAYERS, *BESIDE):
        assert ast.get_docstring(tree_of(path)), where(path)
