"""Artifacts: loading restores the saved model bitwise, equal builds write identical files, and damaged or hostile
files are refused.
"""

from __future__ import annotations

import builtins
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import treadle
from tests.fuzz.artifacts import Parts, judge, mutations, put, sealed
from tests.fuzz.safetensors_files import header_and_data, split
from tests.op_checks import BACKENDS
from tests.test_models import ZOO, in_turns
from treadle.artifacts import reading
from treadle.artifacts.file import write_sections
from treadle.artifacts.loading import load_artifact
from treadle.artifacts.reading import ArtifactLimits, open_artifact
from treadle.backends.registry import find_backend
from treadle.cli import app
from treadle.ir.analysis.drawn_inputs import draw_inputs, small_sizes
from treadle.ir.builder import Builder
from treadle.ir.errors import BackendError, CheckpointError, ParseError, TreadleError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.ir.text.parser import parse_graph
from treadle.ir.text.scanner import TextLimits
from treadle.ir.types import bf16, f32, i64
from treadle.models.gpt2 import gpt2
from treadle.passes.framework.pass_log import Event

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"vocab": 11, "dim": 12, "heads": 3, "layers": 2}


def save_small(path: Path, **options: Any) -> treadle.Compiled:
    made = treadle.compile(gpt2, **options, **SMALL)
    made.save(path)
    return made


def same_bits(a: Any, b: Any) -> bool:
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and a[n].tobytes() == b[n].tobytes() for n in a)


# -- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "backend"), in_turns(BACKENDS))
def test_every_model_of_the_zoo_comes_back(name: str, backend: str, tmp_path: Path) -> None:
    if reason := find_backend(backend).available():
        pytest.skip(reason)
    made = treadle.compile(ZOO[name][0], backend=backend, seed=3)
    seal = made.save(tmp_path / "model.treadle")
    again = load_artifact(tmp_path / "model.treadle")
    assert (again.name, again.backend, str(again.target), again.seed) == (made.name, backend, "cpu", 3)
    assert again.graph == made.graph
    assert again.optimized.source == made.optimized.source
    assert again.log.as_dict() == made.log.as_dict()
    sizes = small_sizes(made.optimized.source)[-1]
    inputs = draw_inputs(made.optimized.source, sizes, [1])
    assert same_bits(made(**inputs), again(**inputs))
    assert again.save(tmp_path / "again.treadle") == seal
    assert (tmp_path / "again.treadle").read_bytes() == (tmp_path / "model.treadle").read_bytes()


def test_weights_are_mapped_and_aligned(tmp_path: Path) -> None:
    path = tmp_path / "small.treadle"
    save_small(path)
    for array in load_artifact(path).weights.values():
        assert not array.flags.owndata
        assert not array.flags.writeable
    assert "weights" not in repr(open_artifact(path)), "it would print all of their numbers"
    parts = Parts.of(path.read_bytes())
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert len(parts.sections) > 20
    assert all((8 + length + header[name]["data_offsets"][0]) % 64 == 0 for name in parts.sections)


def test_every_dtype_comes_back(tmp_path: Path) -> None:
    """All dtypes, including bf16: NumPy lacks it, so its arrays are float32 on both sides."""
    pytest.importorskip("torch")
    b = Builder(Graph("dtypes"))
    arrays: dict[str, Any] = {
        "f64": np.array([0.1, -0.0]), "f32": np.float32([1 / 3, 2]), "f16": np.float16([1.5, 65504]),
        "bf16": np.float32([1.5, -3.0]), "i64": np.array([2**62, -1]), "i32": np.int32([7, 8]),
        "i16": np.int16([7, -8]), "i8": np.int8([-128, 3]), "u8": np.uint8([255, 0]), "bool": np.array([True, False]),
    }  # fmt: skip
    for name in arrays:
        x = b.parameter(f"w.{name}", f"{name}[2]")
        b.function.outputs[name] = b.concat(x, x, axis=0).value
    b.parameter("none", "f32[0, 3]")
    weights = {f"w.{name}": array for name, array in arrays.items()} | {"none": np.zeros((0, 3), np.float32)}
    made = treadle.compile(b.graph, backend="torch", weights=weights, passes=())
    made.save(tmp_path / "dtypes.treadle")
    again = load_artifact(tmp_path / "dtypes.treadle")
    assert same_bits(made(), again())
    assert all(np.array_equal(again()[name][:2], array) for name, array in arrays.items())


def test_matches_and_near_misses_are_read_back(tmp_path: Path) -> None:
    """A near miss, and a refusal that names ops. In files written before these facts were fields, the reason contains
    both.
    """
    b = Builder(Graph("near"))
    x = b.input("x", "f32[B, S, 8]")
    scores = b.minimum(b.matmul(x, b.rearrange(x, pattern="b s d -> b d s")), 3.0)
    b.outputs(y=x * 0.5 * (b.erf(x * 0.7) + 1.0), z=b.matmul(b.softmax(scores), x))
    path = tmp_path / "near.treadle"
    made = treadle.compile(b.graph, certify=False)
    made.save(path)
    again = load_artifact(path)
    near, refused = (
        [e for r in again.log for e in getattr(r, kind) if e.matched] for kind in ("near_misses", "refusals")
    )
    assert (near[0].matched, near[0].edge) == (("mul", "mul", "add", "erf", "mul"), "operand 1 of mul")
    assert (refused[0].matched, refused[0].reason) == (("softmax",), "the scores are clipped")
    assert again.log.explain() == made.log.explain()

    def as_before(parts: Parts) -> None:
        log = json.loads(parts.sections["log"][2])
        for event in [e for record in log["passes"] for kind in ("refusals", "near_misses") for e in record[kind]]:
            event["reason"] = Event(**{**event, "matched": tuple(event.pop("matched", ()))}).description
            event.pop("edge", None)
        put(parts, "log", json.dumps(log).encode())

    old = load_artifact(edited(path, as_before))
    assert not any(event.matched for record in old.log for event in record.refusals)
    assert old.log.explain() == made.log.explain()


def test_the_bytes_of_a_file_are_those_of_its_version(tmp_path: Path) -> None:
    """If the bytes differ, the version of the format must change."""
    texts = {"graph": b"the graph", "declared": b"", "log": b"{}" * 40}
    weights = {
        "w": (f32, np.arange(6, dtype=np.float32).reshape(2, 3).T), "b": (bf16, np.array([1.5, -2], np.float32)),
        "n": (i64, np.array(7)),
    }  # fmt: skip
    seal = write_sections(tmp_path / "a.treadle", texts, weights, {"name": "m"})
    assert seal == "a1feffd0f627fbf8b5fe8445966453062f6c9bd3192387df78319adf0c6b6616"
    data = (tmp_path / "a.treadle").read_bytes()
    assert hashlib.sha256(data).hexdigest() == "b383bd3f8bb03f83694d631650fef06bdec6a18a4e9101f0dcc5dccc10547c81"


def test_another_backend_than_it_was_made_for(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = tmp_path / "small.treadle"
    made = save_small(path, backend="torch")
    other = load_artifact(path, backend="numpy")
    assert other.backend == "numpy"
    tokens = np.arange(8).reshape(2, 4)
    np.testing.assert_allclose(other(tokens=tokens).logits, made(tokens=tokens).logits, rtol=1e-4, atol=1e-6)
    with pytest.raises(BackendError, match="runs on the CPU only"):
        load_artifact(path, backend="numpy", target="cuda")


def test_unsupported_tasks(tmp_path: Path) -> None:
    path = tmp_path / "small.treadle"
    save_small(path)
    with pytest.raises(UsageError, match="an artifact is compiled already"):
        treadle.compile(path)
    with pytest.raises(UsageError, match="the artifact cannot be written"):
        load_artifact(path).save(tmp_path / "no" / "such" / "folder.treadle")


# -- other builds ----------------------------------------------------------------------------------------------------


def test_other_weights_or_options_have_other_seals(tmp_path: Path) -> None:
    seals = [
        treadle.compile(gpt2, seed=seed, **{**SMALL, "dim": dim}).save(tmp_path / "x.treadle")
        for seed, dim in ((0, 12), (1, 12), (0, 24), (0, 12))
    ]
    assert len(set(seals)) == 3
    assert seals[0] == seals[3]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.treadle"
    made = save_small(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("no space left on the device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="cannot be written") as caught:
        made.save(path)
    assert "no space left" in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# -- untrusted files -------------------------------------------------------------------------------------------------


def test_a_flipped_bit_of_a_weight_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.treadle"
    save_small(path)
    data = bytearray(path.read_bytes())
    data[-200] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="bytes have changed since they were written") as caught:
        load_artifact(path)
    assert "section weight/" in str(caught.value)
    load_artifact(path, check=False)  # a log message says that hashes are not checked
    data[int.from_bytes(data[:8], "little") + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="bytes have changed since they were written"):
        load_artifact(path, check=False)  # texts are always compared


def edited(path: Path, change: Any) -> Path:
    """Return a file whose parts were changed and whose hashes were corrected."""
    parts = Parts.of(path.read_bytes())
    change(parts)
    result = path.with_name("edited.treadle")
    result.unlink(missing_ok=True)
    result.write_bytes(parts.file())
    return result


def replace(name: str, old: str, new: str) -> Any:
    def change(parts: Parts) -> None:
        text = parts.sections[name][2].decode()
        assert old in text
        put(parts, name, text.replace(old, new, 1).encode())

    return change


def drop_weight(parts: Parts) -> None:
    del parts.sections["weight/wte.weight"]


def extra_weight(parts: Parts) -> None:
    parts.sections["weight/more"] = ("F32", [1], bytes(4))


def other_weight(parts: Parts) -> None:
    parts.sections["weight/wte.weight"] = ("F32", [1, 11, 12], parts.sections["weight/wte.weight"][2])


def unknown_section(parts: Parts) -> None:
    parts.sections["code"] = ("U8", [4], b"pass")


def other_version(parts: Parts) -> None:
    parts.metadata["version"] = "3"


def unknown_field(parts: Parts) -> None:
    parts.metadata["hook"] = "os.system"


def drop_log(parts: Parts) -> None:
    del parts.sections["log"]


def drop_field(parts: Parts) -> None:
    del parts.metadata["seed"]


def seeded(seed: str) -> Any:
    return lambda parts: parts.metadata.update(seed=seed)


def everywhere(name: str, old: str, new: str) -> Any:
    """Rename something wherever a graph mentions it."""
    return lambda parts: put(parts, name, parts.sections[name][2].replace(old.encode(), new.encode()))


def logged(change: Callable[[list[Any]], object]) -> Any:
    """Replace the list of passes."""

    def changed(parts: Parts) -> None:
        log = json.loads(parts.sections["log"][2])
        change(log["passes"])
        put(parts, "log", json.dumps(log).encode())

    return changed


def fewer_than_no_ops(passes: list[Any]) -> None:
    passes[0]["ops"]["changes"] = {"tanh": -1, "exp": 1}


def counts_that_disagree(passes: list[Any]) -> None:
    passes[0]["ops"]["after"] += 1


HOSTILE: list[tuple[Any, str, str]] = [
    (drop_log, "a section is missing", "section log"),
    (drop_field, "a field is missing", "__metadata__, seed"),
    *((seeded(seed), "the seed must be digits or nothing", "__metadata__, seed") for seed in ("-1", "²", "9" * 40)),
    (
        everywhere("declared", "tokens", "ids"),
        "has other inputs than the declared one",
        "section graph, inputs of main",
    ),
    (
        everywhere("declared", "logits", "y"),
        "has other outputs than the declared one",
        "section graph, outputs of main",
    ),
    (everywhere("declared", "wte.weight", "w"), "a weight that was not declared", "section graph, $wte.weight"),
    (logged(list.clear), "the op counts at the end of the pass log differ from the optimized graph's", "section log"),
    *(
        (logged(change), "the pass log has an invalid record", "section log, pass 0")
        for change in (
            fewer_than_no_ops,
            counts_that_disagree,
            lambda passes: passes[0].update({"pass": 3}),
            lambda passes: passes[0].update(notes=[None]),
        )
    ),
    (drop_weight, "a weight is missing", "section weight/wte.weight"),
    (extra_weight, "a weight that the graph does not use", "section weight/more"),
    (other_weight, "the weight must be f32[11, 12]", "section weight/wte.weight"),
    (unknown_section, "the format has no such section", "section code"),
    (other_version, "the artifact has an unsupported version", "__metadata__, version"),
    (unknown_field, "the format has no such field", "__metadata__, hook"),
    (replace("graph", "attention(", "attenshun("), "unknown op", "section graph, line"),
    (replace("declared", "main(", "main[("), "expected '('", "section declared, line"),
    (replace("graph", "main(tokens:", "main(ids:"), "tokens", "section graph, line"),
    (replace("log", '"passes"', '"pass"'), "the pass log has no list of passes", "section log"),
    (replace("log", '"changes":0', '"changes":null'), "the pass log has an invalid record", "section log, pass"),
    (replace("log", '"rule":', '"given":"x","rule":'), "the pass log has an invalid record", "section log, pass"),
    (replace("log", '"rule":', '"matched":"x","rule":'), "the pass log has an invalid record", "section log, pass"),
    (replace("log", "[", "{"), "expected", "section log, byte"),
]


@pytest.mark.parametrize(("change", "what", "place"), HOSTILE)
def test_a_hostile_file_is_refused_with_its_place(change: Any, what: str, place: str, tmp_path: Path) -> None:
    save_small(tmp_path / "x.treadle")
    path = edited(tmp_path / "x.treadle", change)
    with pytest.raises((CheckpointError, ParseError)) as caught:
        load_artifact(path)
    assert what in caught.value.what
    assert place in (caught.value.within or "")
    assert str(path) in (caught.value.within or "")


def rename(old: str, new: str) -> Any:
    def change(header: dict[str, Any], data: bytearray) -> None:
        header[new] = header.pop(old)

    return change


def forget_a_hash(header: dict[str, Any], data: bytearray) -> None:
    del header["__metadata__"]["sha256:log"]


def first_padding(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(entry for name, entry in header.items() if name.startswith("padding/"))
    return entry


def write_into_padding(header: dict[str, Any], data: bytearray) -> None:
    data[first_padding(header)["data_offsets"][0]] = 1


def pad_by_bools(header: dict[str, Any], data: bytearray) -> None:
    first_padding(header)["dtype"] = "BOOL"


def pad_by_64(header: dict[str, Any], data: bytearray) -> None:
    """Add padding before the seal."""
    begin, end = header["seal"]["data_offsets"]
    header["padding/more"] = {"dtype": "U8", "shape": [64], "data_offsets": [begin, begin + 64]}
    header["seal"]["data_offsets"] = [begin + 64, end + 64]
    data[begin:begin] = bytes(64)


def begin_later(header: dict[str, Any], data: bytearray) -> None:
    """Start the log one byte later, with a correct hash, and shorten the padding after it by one byte."""
    begin, end = header["log"]["data_offsets"]
    after = next(entry for entry in header.values() if entry.get("data_offsets", [0])[0] == end)
    text = bytes(data[begin:end])
    data[begin : end + 1] = b"\0" + text
    header["padding/one"] = {"dtype": "U8", "shape": [1], "data_offsets": [begin, begin + 1]}
    header["log"]["data_offsets"] = [begin + 1, end + 1]
    after["shape"], after["data_offsets"] = [after["shape"][0] - 1], [end + 1, after["data_offsets"][1]]


PADDING = "padding must be fewer than 64 bytes, all zero"


@pytest.mark.parametrize(
    ("change", "what", "place"),
    [
        (rename("seal", "padding/seal"), "the artifact has no seal", "header"),
        (forget_a_hash, "a section has no hash", ", section log"),
        (rename("log", "weight/log"), "a section has no hash", ", section weight/log"),
        (begin_later, "a section must begin at a multiple of 64", ", section log"),
        (write_into_padding, PADDING, ", section padding/"),
        (pad_by_bools, PADDING, ", section padding/"),
        (pad_by_64, PADDING, ", section padding/more"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_another_layout_of_sections_is_refused(change: Any, what: str, place: str, tmp_path: Path) -> None:
    save_small(tmp_path / "x.treadle")
    header, data = split((tmp_path / "x.treadle").read_bytes())
    held = bytearray(data)
    change(header, held)
    path = tmp_path / "edited.treadle"
    path.write_bytes(sealed(header_and_data(header, bytes(held), pad=1)))
    with pytest.raises(CheckpointError) as caught:
        load_artifact(path)
    assert caught.value.what == what
    assert place in (caught.value.within or "")
    assert (caught.value.hint or "").startswith("write the file again")


def test_foreign_and_truncated_files(tmp_path: Path) -> None:
    path = tmp_path / "x.treadle"
    save_small(path)
    whole = path.read_bytes()
    for length in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        cut = tmp_path / f"{length}.treadle"
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as caught:
            load_artifact(cut)
        assert str(cut) in (caught.value.within or "")
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "plain.treadle")
    with pytest.raises(CheckpointError, match="not an artifact"):
        load_artifact(tmp_path / "plain.treadle")
    with pytest.raises(CheckpointError, match="the file does not exist"):
        load_artifact(tmp_path / "nothing.treadle")


def test_limits_hold_and_can_be_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is nested deeper than Python's stack. The real limit is lowered here, because writing a graph of that
    size takes long.
    """
    limits = ArtifactLimits().graph
    assert limits.nodes < TextLimits().nodes
    monkeypatch.setattr(reading, "GRAPH_LIMITS", dataclasses.replace(limits, nodes=2000))
    path = tmp_path / "x.treadle"
    save_small(path)
    with pytest.raises(ParseError, match="too many nodes"):
        load_artifact(path, limits=ArtifactLimits(graph=TextLimits(nodes=10)))
    with pytest.raises(CheckpointError, match="the section is longer than the limit"):
        load_artifact(path, limits=ArtifactLimits(log_bytes=100))
    deep = Builder(Graph("deep"))
    x = deep.input("x", "f32[S]")
    for _ in range(ArtifactLimits().graph.nodes + 1):
        x = -x
    deep.outputs(y=x)
    treadle.compile(deep.graph, passes=()).save(path)
    with pytest.raises(ParseError, match="too many nodes"):
        open_artifact(path)
    held = open_artifact(path, limits=ArtifactLimits(graph=TextLimits()))
    assert len(held.optimized.graph.main.nodes) == ArtifactLimits().graph.nodes + 1


def test_text_of_a_file_never_becomes_code() -> None:
    """Names and scopes are quoted in the emitted code; no name can end a comment or a string there."""
    attack = "\\n    import builtins; builtins.treadle_ran = 1 #"
    text = f"""graph "g{attack}" {{
      symbols S
      parameters {{ "w\\"{attack}": f32[3] }}
      block "b{attack}"(x: f32[S]) -> (y: f32[S])
        weights "w{attack}": f32[3]
      {{
        y = neg(x)                                   # f32[S]  "{attack}"
        return y = y
      }}
      main("x{attack}": f32[S]) -> ("y{attack}": f32[S], w: f32[3]) {{
        y = "b{attack}"("x{attack}") with {{"w{attack}": $"w\\"{attack}"}}       # f32[S]  "s{attack}"
        return "y{attack}" = y, w = $"w\\"{attack}"
      }}
    }}"""
    graph = parse_graph(text)
    (parameter,) = graph.parameters
    for name in BACKENDS:
        if find_backend(name).available() is None:
            exe = find_backend(name).compile(graph, Target("cpu"), {parameter: np.ones(3, np.float32)})
            made = exe(**{graph.main.inputs[0].name: np.ones(2, np.float32)})
            assert [array.tolist() for array in made.values()] == [[-1, -1], [1, 1, 1]]
    assert not hasattr(builtins, "treadle_ran")


def test_mutations(tmp_path: Path) -> None:
    """400 damaged files; tests/fuzz/artifacts.py does 10,000 of the same kind, with limits on time and memory."""
    outcomes = set()
    for number, (kind, file, valid) in enumerate(mutations(400, seed=11)):
        verdict = judge(file, tmp_path / f"{number}.treadle", valid)
        assert verdict.failure is None, f"mutation {number} ({kind}): {verdict.failure}"
        outcomes.add(verdict.outcome)
    assert outcomes >= {"refused", "loaded"}


# -- the command line ------------------------------------------------------------------------------------------------


def test_compile_run_and_inspect(tmp_path: Path) -> None:
    path = tmp_path / "small.treadle"
    sets = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
    runner = CliRunner()
    made = runner.invoke(app, ["compile", "gpt2", *sets, "-o", str(path), "--json"])
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["seal"] == open_artifact(path).seal
    np.save(tmp_path / "ids.npy", np.array([[1, 2, 3]]))
    ran = runner.invoke(app, ["run", str(path), "--input", f"tokens={tmp_path / 'ids.npy'}", "--json"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["outputs"]["logits"]["shape"] == [1, 3, 11]
    for options, op in (([], "linear("), (["--raw"], "linear(")):
        shown = runner.invoke(app, ["inspect", str(path), *options])
        assert shown.exit_code == 0, shown.output
        assert op in shown.stdout
    assert runner.invoke(app, ["run", str(path), "--set", "layers=3"]).exit_code == 2
    assert runner.invoke(app, ["compile", "gpt2", *sets, "-o", str(tmp_path / "small.bin")]).exit_code == 2


# -- files of a killed save ------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from treadle.files.whole_files import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write(b"half of it")
    file.flush()
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    print("writing", flush=True)
    sys.stdin.read()
"""


def saving(target: Path, fate: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", KILLED, str(target), fate]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.skipif(os.name != "posix", reason="files are locked by flock")
def test_files_of_a_killed_save_are_removed_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "m.treadle"
    assert saving(target, "killed").wait() == -9
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".m.treadle-")
    living = saving(target, "lives")
    assert living.stdout is not None
    assert living.stdin is not None
    assert living.stdout.readline() == "writing\n"
    staged = set(os.listdir(tmp_path))
    assert left not in staged
    assert len(staged) == 1
    others = [".m.treadle-0123456789ab.txt", ".n.treadle-0123456789ab", "m.treadle-0123456789ab"]
    for name in others:
        (tmp_path / name).write_bytes(b"not ours")
    (tmp_path / ".m.treadle-0123456789ab").symlink_to(tmp_path / others[0])
    treadle.compile("gpt2", vocab=11, dim=8, heads=2, layers=1, context=4).save(target)
    found = os.listdir(tmp_path)
    assert sorted(found) == sorted([*others, ".m.treadle-0123456789ab", "m.treadle", *staged])
    living.stdin.close()
    assert living.wait() == 0, "files of a running save are kept"
    assert target.read_bytes() == b"half of it"


@pytest.mark.parametrize("name", ["x.onnx", "x.gguf", "folder", "gpt2", "minilm", "m.py:model"])
def test_files_that_are_not_artifacts_name_their_reader(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for file in ("x.onnx", "x.gguf"):
        (tmp_path / file).write_bytes(bytes(100))
    with pytest.raises(CheckpointError, match="not an artifact") as caught:
        load_artifact(name)
    for_tasks = f", or treadle.load({name!r}) for its tasks" if name in ("x.gguf", "folder", "minilm") else ""
    assert caught.value.hint == f"treadle.compile({name!r}){for_tasks}"


def test_limits_are_given_by_name(tmp_path: Path) -> None:
    path = tmp_path / "m.treadle"
    x = Builder(Graph("g"))
    x.outputs(y=x.input("x", "f32[2]") * 2.0)
    treadle.compile(x.graph).save(path)
    for limits in ({"work": 10}, {"log_bytes": 10}, {"header_bytes": 10}):
        with pytest.raises(TreadleError) as caught:
            load_artifact(path, limits=limits)
        (name,) = limits
        assert str(caught.value.hint).startswith(f"limits={{'{name}': ")
        raised = eval(str(caught.value.hint).removeprefix("limits=").partition(", if")[0])
        assert raised[name] > limits[name]
    assert load_artifact(path, limits={"work": 1_000_000, "header_bytes": 100_000}).name == "g"
    with pytest.raises(UsageError, match="no limit 'nods'"):
        load_artifact(path, limits={"nods": 1})


@pytest.mark.parametrize("name", ["m.model", "m", "m.tredle"])
def test_a_name_under_which_no_artifact_is_read_is_refused(name: str, tmp_path: Path) -> None:
    x = Builder(Graph("g"))
    x.outputs(y=x.input("x", "f32[2]") * 2.0)
    made = treadle.compile(x.graph)
    with pytest.raises(UsageError, match=r"the name of an artifact must end in \.treadle") as caught:
        made.save(tmp_path / name)
    assert not list(tmp_path.iterdir())
    made.save(str(caught.value.hint))
    assert load_artifact(str(caught.value.hint)).name == "g"


# -- names with the suffix of another format --------------------------------------------------------------------------

OTHER_FORMATS = [*[".onnx", ".gguf", ".safetensors", ".html", ".htm", ".dot", ".json", ".pt", ".pth", ".bin", ".ONNX"]]


@pytest.mark.parametrize("suffix", OTHER_FORMATS)
def test_an_artifact_is_not_written_under_the_suffix_of_another_format(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = treadle.compile(gpt2, backend="numpy", **SMALL)
    with pytest.raises(UsageError, match=rf"the name of an artifact cannot end in {suffix.lower()}") as refused:
        made.save(f"x{suffix}")
    assert refused.value.hint
    assert list(tmp_path.iterdir()) == []


def test_the_code_that_writes_another_format_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exe = treadle.compile(gpt2, backend="numpy", seed=4, **SMALL)
    for suffix in OTHER_FORMATS:
        if suffix.lower() == ".onnx":
            pytest.importorskip("onnx")
        with pytest.raises(UsageError) as refused:
            exe.save(f"x{suffix}")
        exec(re.split(r"; `|; or `|: no", refused.value.hint or "")[0], {"exe": exe})
    ids = np.array([[1, 2, 3]])
    (logits,) = exe(ids).values()
    again = treadle.compile(gpt2, backend="numpy", weights="x.safetensors", **SMALL)
    assert np.array_equal(again(ids)["logits"], logits)
    assert np.array_equal(load_artifact("x.treadle", backend="numpy")(ids)["logits"], logits)
    np.testing.assert_allclose(treadle.compile("x.onnx", backend="numpy")(ids)["logits"], logits, atol=1e-5)
    assert Path("x.html").read_text().startswith("<!doctype html>")
    with pytest.raises(UsageError, match=r"the name of a report cannot end in \.treadle"):
        exe.report().save("page.treadle")


@pytest.mark.parametrize("suffix", [".onnx", ".gguf", ".html", ".dot", ".json", ".pt", ".safetensors"])
def test_the_command_that_writes_another_format_works(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    asked = CliRunner().invoke(app, ["compile", "gpt2", "-o", f"x{suffix}", *small])
    assert asked.exit_code == 2
    hint = asked.output.partition("  try ")[2].split("\n\n")[0].split()
    words = hint[1:] if hint[0] == "treadle" else ["compile", "gpt2", "-o", hint[0].rstrip(":,;")]
    done = CliRunner().invoke(app, [*words, *small])
    assert done.exit_code == 0, done.output
    assert len(list(tmp_path.glob("x.*"))) == 1
