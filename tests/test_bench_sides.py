"""A benchmark without processes or peers: the specifications of sides, the count of turns, and the inputs of peers.

Packages with the same calls stand in for the peers.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from treadle.benching import benchmark, limits, measured_roofline, serving
from treadle.benching.benchmark import BenchRow, MachineLimits, bench_model
from treadle.benching.serving import Unfit
from treadle.benching.sides import LIMITS, PEERS, SERVING, Side, peers_of
from treadle.benching.workload import Workload, files_of
from treadle.ir.builder import Builder
from treadle.ir.errors import UsageError
from treadle.ir.graph import Graph
from treadle.ir.text.parser import parse_graph
from treadle.program.options import CompileOptions

GRAPH = parse_graph("graph g { symbols B main(x: f32[B, 4]) -> (y: f32[B, 4]) { y = relu(x) return y = y } }")


class _Side:
    """A stand-in for a process: it was opened with `spec`, and takes the seconds of its list."""

    answers: dict[str, dict[str, Any]] = {}
    seconds: dict[str, Iterator[float]] = {}
    made: list[_Side] = []

    def __init__(self, spec: dict[str, Any], python: str = sys.executable, script: str = SERVING) -> None:
        assert script == (LIMITS if spec["side"] == "limits" else SERVING)
        self.spec, self.python, self.name, self.closed, self.counts = spec, python, spec["side"], False, list[int]()
        self.answer = self.answers[self.name]
        if "outputs" in spec and "missing" not in self.answer:
            serving.save_arrays(spec["outputs"], {"y": [1.0, 4.0 if self.name == "treadle" else 3.0]})
        self.made.append(self)

    def run(self, count: int = 1) -> list[float]:
        assert not self.closed
        self.counts.append(count)
        return [next(self.seconds[self.name])]

    def peak(self) -> int:
        return 7

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> list[_Side]:
    _Side.made = []
    _Side.answers = {
        "limits": {"rates": {"f32": 3e9}, "read": 4e9, "least": None},
        **{name: {"opened": 0.5, "note": f"a {name}"} for name in ("treadle", "eager", "onnxruntime")},
        "openvino": {"missing": "openvino is not installed"},
    }
    monkeypatch.setattr(benchmark, "Side", _Side)
    monkeypatch.setattr(benchmark, "opened", lambda workload: (GRAPH, {}))
    monkeypatch.setattr(benchmark.shutil, "which", lambda python: python)
    export = SimpleNamespace(path="m.onnx", inputs={"x": "x_0"})
    monkeypatch.setattr(benchmark, "export_onnx", lambda graph, weights, path: export)
    return _Side.made


def test_a_ratio_is_the_median_over_turns_of_which_the_first_warms_up(sides: list[_Side]) -> None:
    ours, theirs = [99.0, 1.0, 2.0, 4.0, 2.0, 1.0], [99.0, 3.0, 2.0, 2.0, 8.0, 1.0]
    _Side.seconds = {"treadle": iter(ours), "eager": iter(theirs), "onnxruntime": iter(theirs[::-1])}
    lines: list[str] = []
    names = ["eager", "openvino", "onnxruntime", "eager"]
    chosen = {"backend": "numpy", "config": {"a": 1}, "limits": {"b": 2}, "seed": 5, "quantize": "int8"}
    workload = Workload("m", 2, {**chosen, "widen": ("f16",)})
    found = bench_model(workload, names, sizes={"B": 3}, rounds=5, python="other", emit=lines.append)
    assert found.rows[:2] == [
        BenchRow("treadle", "a treadle", 2.0, 1.0, (1.0, 1.0), None, 0.5, 7),
        BenchRow("eager", "a eager", 2.0, 1.0, (1.0, 3.0), 0.25, 0.5, 7),
    ]
    assert (found.missing, found.rounds) == ({"openvino": "openvino is not installed"}, 5)
    assert (found.machine, found.cost.flops) == (MachineLimits({"f32": 3e9}, 4e9, None), 12)
    assert lines == [*(f"opening {name}" for name in ("treadle", "eager", "openvino", "onnxruntime")), "running"]
    assert {each.name: each.python for each in sides} == {
        "limits": sys.executable, "treadle": sys.executable, "eager": sys.executable,
        "openvino": "other", "onnxruntime": "other",
    }  # fmt: skip
    assert all(each.closed for each in sides)
    assert {tuple(each.counts) for each in sides} == {(), (1,) * 6}
    spec = sides[0].spec
    assert {"folder": None, "gguf": None, "model": "m", "threads": 2, "sizes": {"B": 3}}.items() <= spec.items()
    assert Workload.from_dict(json.loads(json.dumps(spec))).options == replace(workload.options, widen=["f16"])
    assert (spec["onnx"], spec["renamed"]) == ("m.onnx", {"x": "x_0"})


def test_a_quantized_model_costs_its_blocks(sides: list[_Side], monkeypatch: pytest.MonkeyPatch) -> None:
    b = Builder(Graph("m"))
    b.outputs(y=b.linear(b.input("x", "f32[B, 256]"), b.parameter("w", "f32[256, 256]")))
    monkeypatch.setattr(benchmark, "opened", lambda workload: (b.graph, {}))
    moved = {}
    for scheme in (None, "int8-weights"):
        _Side.seconds = {"treadle": iter([1.0] * 2)}
        workload = Workload("m", 2, {"backend": "numpy", "quantize": scheme})
        moved[scheme] = bench_model(workload, [], sizes={"B": 1}, rounds=1).cost
    plain, blocks = moved.values()
    assert plain.flops == blocks.flops
    assert plain.bytes == 4 * (256 + 256 * 256 + 256) and blocks.bytes < plain.bytes / 3


def test_others_are_given_all_that_a_model_declares(sides: list[_Side], monkeypatch: pytest.MonkeyPatch) -> None:
    """Treadle computes only the values that the outputs need: the first row."""
    graph = parse_graph(
        "graph m {\n symbols B\n main(x: f32[9, B]) -> (y: f32[B]) {\n"
        "  h = mul(x, x)\n  g = exp(h)\n  y = gather(g, 0, axis=0)\n  return y = y\n }\n}"
    )
    given: list[Graph] = []
    monkeypatch.setattr(benchmark, "opened", lambda workload: (graph, {}))

    def write(exported: Graph, weights: object, path: Path) -> SimpleNamespace:
        given.append(exported)
        return SimpleNamespace(path=path, inputs={})

    monkeypatch.setattr(benchmark, "export_onnx", write)
    _Side.seconds = {name: iter([1.0] * 16) for name in ("treadle", "onnxruntime")}
    bench_model(Workload("m"), ["onnxruntime"])
    assert [str(node.result.type) for node in given[0].main.nodes] == ["f32[9, B]", "f32[9, B]", "f32[B]"]


def test_defaults_of_a_benchmark(sides: list[_Side]) -> None:
    _Side.seconds = {"treadle": iter([1.0] * 16)}
    found = bench_model(Workload("m"), [])
    assert (found.rounds, len(found.rows), found.missing) == (15, 1, {})
    assert "onnx" not in sides[0].spec, "the specification is unused"
    assert Workload("m") == Workload("m", 1, {}) and Workload("m").options == CompileOptions(
        backend="numpy", entry="bench"
    )


@pytest.mark.parametrize("side", ["limits", "treadle"])
def test_without_limits_or_ours_there_is_no_benchmark(side: str, sides: list[_Side]) -> None:
    _Side.answers[side] = {"missing": "no memory"}
    what = "the machine's limits were not measured" if side == "limits" else "g did not run"
    with pytest.raises(UsageError, match=what) as error:
        bench_model(Workload("m"), ["eager"])
    assert error.value.received == "no memory"
    assert all(each.closed for each in sides)


def test_peers_are_named_once() -> None:
    assert peers_of(["eager", "openvino", "eager"]) == ["eager", "openvino"]
    assert {name for name, peer in PEERS.items() if peer.reads == "torch"} == {"eager", "compile"}


def test_files_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treadle.benching.workload.fetched_model", lambda name: tmp_path)
    assert files_of(str(tmp_path)) == (None, None)
    (tmp_path / "a.gguf").write_bytes(b"")
    assert files_of(str(tmp_path)) == files_of("minilm") == (None, tmp_path / "a.gguf")
    assert files_of(str(tmp_path / "a.gguf")) == (None, tmp_path / "a.gguf")
    (tmp_path / "config.json").write_bytes(b"")
    assert files_of(str(tmp_path)) == (tmp_path, tmp_path / "a.gguf")
    assert files_of(str(tmp_path / "config.json")) == (None, None)
    (tmp_path / "b.gguf").write_bytes(b"")
    assert files_of(str(tmp_path)) == (tmp_path, None)


# -- a side's process --------------------------------------------------------------------------------------------------


def test_a_side_is_started_with_its_threads_and_asked_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, Any] = {}
    answers = io.StringIO('{"note": "n"}\n{"seconds": [1, 2]}\n{"seconds": [3]}\n{"peak": 5}\n')
    ended: list[str] = []

    def start(command: list[str], **how: Any) -> Any:
        started.update(how, command=command)
        ends = {name: lambda name=name: ended.append(name) or 9 for name in ("kill", "wait")}
        return SimpleNamespace(stdin=io.StringIO(), stdout=answers, **ends)

    monkeypatch.setattr(subprocess, "Popen", start)
    side = Side({"side": "eager", "threads": 3}, "python")
    assert side.answer == {"note": "n"}
    assert (side.run(2), side.run(), side.peak()) == ([1, 2], [3], 5)
    process: Any = side._process
    assert process.stdin.getvalue() == "2\n1\n\n"
    python, script, spec = started["command"]
    assert (python, Path(script).name, json.loads(spec)) == ("python", "serving.py", {"side": "eager", "threads": 3})
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    assert [started["env"][name] for name in names] == ["3"] * 3
    assert (started["text"], started["stderr"]) == (True, subprocess.DEVNULL)
    assert (started["stdin"], started["stdout"]) == (subprocess.PIPE, subprocess.PIPE)
    with pytest.raises(UsageError, match="a side of the benchmark ended while it ran") as error:
        side.peak()
    assert error.value.received == "its process ended with status 9"
    side.close()
    assert ended[-2:] == ["kill", "wait"]
    assert answers.closed


class _Flushed(io.StringIO):
    count = 0

    def flush(self) -> None:
        self.count += 1


@contextmanager
def process(spec: dict[str, Any], asked: str, patch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Yield the answers of a side's process, run in this process."""
    answers = _Flushed()
    copies: list[Any] = []
    opened = {(91, "w"): answers}
    system = SimpleNamespace(dup=lambda n: 90 + n, dup2=lambda *n: copies.append(n), fdopen=lambda *n: opened[n])
    patch.setattr(serving, "os", system)
    patch.setattr(sys, "argv", ["serving.py", json.dumps(spec)])
    patch.setattr(sys, "stdin", io.StringIO(asked))
    found: list[dict[str, Any]] = []
    serving.main()
    found.extend(map(json.loads, answers.getvalue().splitlines()))
    assert copies == [(2, 1)], "output of a package is not an answer"
    assert answers.count >= len(found), "the caller waits for each answer"
    yield found


@pytest.mark.parametrize("threads", [1, 2])
def test_a_sides_process_answers(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one thread, time is the CPU time."""
    clocks = {"process_time": iter(range(0, 90, 3)), "perf_counter": iter(range(0, 90, 2))}
    monkeypatch.setattr(serving, "time", SimpleNamespace(**{n: lambda c=c: next(c) for n, c in clocks.items()}))
    monkeypatch.setattr(serving, "peak_bytes", lambda: 11)
    monkeypatch.setattr(serving, "OPENERS", {"eager": lambda spec: (lambda: {"y": np.ones(2)}, "n")})
    spec = {"side": "eager", "threads": threads, "outputs": str(tmp_path / "y.npz")}
    with process(spec, "2\n1\n\n", monkeypatch) as (opened, *answers):
        assert opened == {"opened": 2, "note": "n"}
        took = 3 if threads == 1 else 2
        assert answers == [{"seconds": [took] * 2}, {"seconds": [took]}, {"peak": 11}]
    assert serving.read_arrays(tmp_path / "y.npz")["y"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ImportError("gone", name="nncf"), "nncf is not installed"),
        (ImportError("gone"), "gone is not installed"),
        (Unfit("it is none"), "it is none"),
        (ValueError("a\n  b" + "c" * 400), "ValueError: a b" + "c" * 385),
    ],
)
def test_the_reason_for_a_missing_side_is_printed(
    error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opens(spec: Any) -> Any:
        raise error

    monkeypatch.setattr(serving, "OPENERS", {"eager": opens})
    with process({"side": "eager", "threads": 1}, "1\n", monkeypatch) as answers:
        assert answers == [{"missing": expected}]


def test_the_machines_limits_are_of_the_best_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks: list[Any] = []
    took = iter([0.2, 0.1, 0.3, 0.25, 0.125, 0.125, *[0.1] * 4, 0.05, 0.1])

    def timed(run: Callable[[], Any], clock: Any) -> float:
        clocks.append(clock)
        return next(took)

    monkeypatch.setattr(serving, "timed", timed)
    assert [serving.best(dict), serving.best(dict), serving.best(dict)] == [0.1, 0.125, 0.05]
    monkeypatch.setattr(serving, "best", lambda run, clock=serving.time.perf_counter: clocks.append(clock) or 0.5)
    clocks.clear()
    monkeypatch.setattr(limits, "best", serving.best)
    numpy = {"rates": {"f32": 2 * 1536**3 / 0.5}, "read": (1 << 28) / 0.5, "least": None}
    assert limits.machine_limits(Workload("m", 1, {"backend": "torch"}).as_dict()) == numpy
    assert clocks == [serving.time.perf_counter] * 2
    read: list[Any] = []
    monkeypatch.setattr(serving, "best", lambda run: read.append(run()) or 0.25)
    assert serving.measured_read(3) == (1 << 28) / 0.25
    assert [*read[0].values()] == [1.0] * 3, "each thread reads a part"


def test_limits_of_kernels_are_those_of_a_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    found = SimpleNamespace(rates={"f32": 3e9, "int8": 9e9}, read=4e9, least=0.25)
    ours = SimpleNamespace(graph=SimpleNamespace(states=()))
    monkeypatch.setattr(limits, "compiled", lambda spec: given.append(spec) or ours)
    monkeypatch.setattr(measured_roofline, "measure_roofline", lambda *args, **how: given.append((args, how)) or found)
    spec = {**Workload("m", 1, {"backend": "tvm", "seed": 7}).as_dict(), "sizes": {"B": 2}}
    assert limits.machine_limits(spec) == {"rates": {"f32": 3e9, "int8": 9e9}, "read": 4e9, "least": 0.25}
    assert given == [spec, ((ours, {"B": 2}), {"seed": 7})]
    ours.graph.states = ("keys",)
    monkeypatch.setattr(limits, "best", lambda run: 0.5)
    assert limits.machine_limits(spec)["least"] is None, "a model with states has no roofline"


def test_limits_are_a_line_of_a_process_or_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is on standard output, and nothing else is."""
    for backend, error in (("numpy", ""), ("tvm", "UsageError: there is no file none.onnx")):
        spec = {**Workload("none.onnx", 1, {"backend": backend}).as_dict(), "sizes": {}}
        done = subprocess.run(
            [sys.executable, str(Path(limits.__file__)), json.dumps(spec)], capture_output=True, text=True, check=True
        )
        output = json.loads(done.stdout)
        assert (
            output == {"missing": error}
            if error
            else output["rates"]["f32"] > 1e8 < output["read"] and output["least"] is None
        )


def test_the_most_memory_is_in_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=5))
    monkeypatch.setitem(sys.modules, "resource", usage)
    status = tmp_path / "status"
    monkeypatch.setattr(serving, "STATUS", status)
    status.write_text("Name:\tpython\nVmHWM:\t     7 kB\nVmRSS:\t     6 kB\n")
    assert serving.peak_bytes() == 7 * 1024
    status.unlink()
    for platform, count in (("linux", 5 * 1024), ("darwin", 5)):
        monkeypatch.setattr(serving, "sys", SimpleNamespace(platform=platform))
        assert serving.peak_bytes() == count


# -- inputs of peers ---------------------------------------------------------------------------------------------------


class _Called:
    """A stand-in that records its calls and returns a fixed result."""

    def __init__(self, gives: Any = None) -> None:
        self.gives, self.calls = gives, list[Any]()

    def __call__(self, *given: Any, **options: Any) -> Any:
        self.calls.append((given, options))
        return self.gives


def spec_of(place: Path, side: str, arrays: dict[str, Any], **more: Any) -> dict[str, Any]:
    serving.save_arrays(place / "inputs.npz", arrays)
    spec = {"side": side, "threads": 3, "inputs": str(place / "inputs.npz"), "outputs": str(place / "o.npz")}
    return {**spec, "onnx": "m.onnx", "renamed": {"x": "x_0"}, **more}


@pytest.mark.parametrize("form", ["", "-int8"])
def test_onnx_runtime_is_given_the_file(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = SimpleNamespace(get_outputs=lambda: [SimpleNamespace(name="y")], run=_Called([np.ones(1)]))
    options, opens, dynamic, folds = SimpleNamespace(), _Called(session), _Called(), _Called()
    package = SimpleNamespace(SessionOptions=lambda: options, InferenceSession=opens)
    quantization = SimpleNamespace(
        QuantType=SimpleNamespace(QInt8="i8"),
        quantize_dynamic=dynamic,
        shape_inference=SimpleNamespace(quant_pre_process=folds),
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", package)
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", quantization)
    run, note = serving.OPENERS[f"onnxruntime{form}"](spec_of(tmp_path, f"onnxruntime{form}", {"x": [2.0]}))
    assert run() == {"y": np.ones(1)}
    (((names, given), _),) = session.run.calls
    assert (names, given["x_0"].tolist()) == (["y"], [2.0])
    assert options.intra_op_num_threads == 3
    path = "m.onnx.int8.onnx" if form else "m.onnx"
    assert opens.calls == [((path, options), {"providers": ["CPUExecutionProvider"]})]
    assert note == ("dynamic int8" if form else "float32")
    if form:
        assert folds.calls == [
            (("m.onnx", "m.onnx.folded.onnx"), {"skip_symbolic_shape": True, "save_as_external_data": True})
        ]
        settings = {"op_types_to_quantize": ["MatMul", "Gemm"], "weight_type": "i8", "use_external_data_format": True}
        assert dynamic.calls == [(("m.onnx.folded.onnx", "m.onnx.int8.onnx"), settings)]


@pytest.mark.parametrize(
    ("side", "precision", "note"),
    [
        ("openvino", "f32", "f32, sizes fixed"),
        ("openvino-bf16", "bf16", "bf16, sizes fixed"),
        ("openvino-int8", "bf16", "int8 by NNCF, static, the rest in bf16, sizes fixed"),
    ],
)
def test_openvino_is_given_the_file_and_its_sizes(
    side: str, precision: str, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SimpleNamespace(reshape=_Called(), outputs=[SimpleNamespace(get_any_name=lambda: "y")])
    request = SimpleNamespace(infer=_Called({0: 5}))
    compiles = _Called(SimpleNamespace(create_infer_request=lambda: request))
    core, quantizes = SimpleNamespace(read_model=_Called(model)), _Called(model)
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=lambda: core, compile_model=compiles))
    kinds = SimpleNamespace(TRANSFORMER="t")
    nncf = SimpleNamespace(Dataset=list, quantize=quantizes, ModelType=kinds)
    monkeypatch.setitem(sys.modules, "nncf", nncf)
    run, summary = serving.OPENERS[side](spec_of(tmp_path, side, {"x": np.ones((2, 3))}))
    assert (run(), summary) == ({"y": 5}, note)
    assert core.read_model.calls == [(("m.onnx",), {})]
    assert model.reshape.calls == [(({"x_0": [2, 3]},), {})]
    hints = {"INFERENCE_NUM_THREADS": 3, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    assert compiles.calls == [((model, "CPU", hints), {})]
    assert [options for _, options in quantizes.calls] == (
        [{"model_type": "t", "subset_size": 1}] if side.endswith("int8") else []
    )


@pytest.mark.parametrize("pooled", [None, [[1.0]]])
@pytest.mark.parametrize("side", ["ctranslate2", "ctranslate2-int8"])
def test_ctranslate2_is_given_ids_and_lengths(
    side: str, pooled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("config.json", '{"model_type": "bert"}'), ("vocab.txt", "")):
        (tmp_path / name).write_text(text)
    found = SimpleNamespace(pooler_output=pooled, last_hidden_state=[[2.0]])
    encoder, convert = SimpleNamespace(forward_batch=_Called(found)), _Called()
    reads, made = _Called(SimpleNamespace(convert=convert)), _Called(encoder)
    package = SimpleNamespace(
        Encoder=made,
        StorageView=SimpleNamespace(from_array=lambda array: array),
        converters=SimpleNamespace(TransformersConverter=reads),
    )
    monkeypatch.setitem(sys.modules, "ctranslate2", package)
    spec = spec_of(tmp_path, side, {"ids": np.ones((2, 3), np.int64)}, folder=str(tmp_path))
    run, note = serving.OPENERS[side](spec)
    assert run() == {"hidden": [[2.0]], **({} if pooled is None else {"pooled": pooled})}
    form = "int8" if side.endswith("int8") else "float32"
    assert note == ("dynamic int8, the encoder" if form == "int8" else "float32, the encoder")
    assert reads.calls == [((str(tmp_path),), {})]
    assert convert.calls == [((str(tmp_path / f"o.{form}"),), {"quantization": form})]
    settings = {"device": "cpu", "compute_type": form, "inter_threads": 1, "intra_threads": 3}
    assert made.calls == [((str(tmp_path / f"o.{form}"),), settings)]
    (((words, lengths), _),) = encoder.forward_batch.calls
    assert (words.dtype, words.shape, lengths.tolist(), lengths.dtype) == (np.int32, (2, 3), [3, 3], np.int32)


@pytest.mark.parametrize(
    ("folder", "arrays", "why"),
    [
        (
            "",
            {"ids": np.ones((1, 3), np.int64)},
            "CTranslate2 can only run a folder of Hugging Face's, and this model is",
        ),
        ("t5", {"ids": np.ones((1, 3), np.int64)}, "CTranslate2 cannot run a t5 by itself"),
        ("t5", {"x": np.ones(3)}, "CTranslate2 supports only tokens as input, and this model has 1 inputs"),
    ],
)
def test_models_that_ctranslate2_cannot_run(
    folder: str, arrays: dict[str, Any], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ctranslate2", SimpleNamespace())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": folder}))
    with pytest.raises(Unfit, match=why):
        serving.OPENERS["ctranslate2"](spec_of(tmp_path, "ctranslate2", arrays, folder=folder and str(tmp_path)))
