"""Hoisting: values computed from weights alone are computed once, in `bind`, with unchanged results."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle
from treadle.backends.made_weights import notes_on, recipes_of
from treadle.backends.registry import find_backend
from treadle.ir.builder import Builder
from treadle.ir.errors import BackendError
from treadle.ir.graph import Function, Graph
from treadle.ir.interpreter import interpret
from treadle.ir.source_lines import SourceLine
from treadle.ir.target import Target
from treadle.ir.text.parser import parse_graph
from treadle.ir.types import bf16, f32, i16, i64
from treadle.ir.verifier import verify
from treadle.passes.framework.manager import PassManager
from treadle.passes.lowering.hoist_weights import MOST_GROWTH, HoistWeights
from treadle.program.weights import initial_weights
from treadle.resolving import resolve

BACKENDS = ("numpy", "torch", "tvm")


@pytest.fixture
def merged() -> Graph:
    """Return two blocks; each joins two weights, halves them and multiplies by them."""
    graph = Graph("merged")
    b = Builder(graph)
    x = b.input("x", f32["B", 4])
    for i in range(2):
        q, k = b.parameter(f"h.{i}.q.weight", f32[3, 4]), b.parameter(f"h.{i}.k.weight", f32[2, 4])
        b.scope = f"h.{i}"
        halved = b.concat(q, k, axis=0) * 0.5
        z = b.linear(x, halved, None)
        x = b.linear(z, b.parameter(f"h.{i}.out.weight", f32[4, 5]), None)
    b.outputs(y=x)
    return graph


def test_weights_of_weights_are_parameters_with_recipes(merged: Graph) -> None:
    before = str(merged)
    lowered = hoisted(merged)
    verify(lowered)
    assert [node.op.name for node in lowered.main.nodes] == ["linear"] * 4
    assert list(notes_on(recipes_of(lowered))) == [
        f"h.{i}.x = mul(concat(h.{i}.q.weight, h.{i}.k.weight, axis=0), 0.5)" for i in range(2)
    ]
    assert set(lowered.main.parameters) == {"h.0.x", "h.1.x", "h.0.out.weight", "h.1.out.weight"}
    assert set(lowered.parameters) == set(merged.parameters)
    assert str(merged) == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_derived_weights_may_be_read_by_other_recipes(backend: str) -> None:
    graph = Graph("g")
    b = Builder(graph)
    x, w = b.input("x", f32["B", 4]), b.parameter("w", f32[4])
    first = b.exp(w)
    second = first * 2.0
    b.outputs(y=x * first + second, w=second)
    assert len(hoisted(graph).derived_weights) == 2
    runs_like_its_meaning(graph, backend, {"x": np.ones((2, 4), np.float32)})


def test_a_line_on_a_prepared_weight_is_one_line_and_not_long() -> None:
    """Written as a full expression, a value that is added to itself forty times in a row would have 2^40 terms."""
    graph = Graph("g")
    b = Builder(graph)
    w = b.parameter("w\nimport os", f32[4])
    doubled = w
    for _ in range(40):
        doubled = doubled + doubled
    b.outputs(y=b.input("x", f32["B", 4]) * doubled, z=b.input("u", f32[4]) + b.exp(w))
    long, plain = notes_on(recipes_of(hoisted(graph)))
    assert long.startswith("x = add(") and long.count("add(...)") > 1 and len(long) < 500
    assert plain == "exp = exp(w\\nimport os)"


@pytest.mark.parametrize(("longest", "shown"), [(160, True), (161, False)])
def test_an_operand_of_160_characters_is_written_out(longest: int, shown: bool) -> None:
    graph, name = Graph("g"), "w" * (longest - len("exp()"))
    b = Builder(graph)
    b.outputs(y=b.input("x", f32["B", 4]) * b.sin(b.exp(b.parameter(name, f32[4]))))
    (line,) = notes_on(recipes_of(hoisted(graph)))
    assert line == f"sin = sin(exp({name if shown else '...'}))"


def test_of_one_making_one_key_of_another_two(merged: Graph) -> None:
    first, second = recipes_of(hoisted(merged)).values()
    assert first.key == second.key
    assert first.sources.keys() != second.sources.keys()


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_give_what_the_graph_means(merged: Graph, backend: str) -> None:
    runs_like_its_meaning(merged, backend, {"x": np.random.default_rng(0).standard_normal((3, 4), np.float32)})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_leaves_it_to_its_callers(backend: str) -> None:
    graph = resolve(gated_scales).graph
    assert [f for f in graph.functions if f != "main"]
    lowered = hoisted(graph)
    maker, block, _, _ = lowered.functions.values()
    assert "concat" not in [node.op.name for node in block.nodes]
    assert [node.op.name for node in maker.nodes] == ["concat"]
    assert len(lowered.derived_weights) == 3
    runs_like_its_meaning(graph, backend, {"x": np.random.default_rng(0).standard_normal((2, 8), np.float32)})


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_derived_weights_are_computed_once(backend: str) -> None:
    """Equal values of the same weights are shared, and so are values computed from them; not values of other weights or
    with other attributes.
    """
    graph = Graph("tied")
    b = Builder(graph)
    x, w, v = b.input("x", f32["B", 4]), b.parameter("w", f32[4, 4]), b.parameter("v", f32[4, 4])
    for weight, axis in ((w, 0), (w, 0), (v, 0), (w, 1)):
        x = b.linear(x, b.tanh(b.softmax(weight, axis=axis)), None)
    b.outputs(y=x)
    lowered = hoisted(graph)
    assert len(lowered.derived_weights) == 3
    made = [node.op.name for f in lowered.functions.values() if f is not lowered.main for node in f.nodes]
    assert sorted(made) == ["softmax"] * 3 + ["tanh"] * 3
    first, second, third, fourth = (node.inputs[1] for node in lowered.main.nodes)
    assert first is second and len({first, third, fourth}) == 3
    runs_like_its_meaning(graph, backend, {"x": np.random.default_rng(0).standard_normal((3, 4), np.float32)})


@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_with_the_same_weights_have_them_made_once(backend: str) -> None:
    """All layers share the same weights, as in ALBERT."""
    graph = Graph("tied")
    block = Function("layer")
    graph.add_function(block)
    b = Builder(graph, block)
    x, weight = b.input("x", f32["B", 4]), b.parameter("w", f32[4, 4])
    b.outputs(y=b.linear(x, b.tanh(weight), None))
    b = Builder(graph)
    x, w, v = b.input("x", f32["B", 4]), b.parameter("w", f32[4, 4]), b.parameter("v", f32[4, 4])
    for weight in (w, w, v, w):
        (x,) = b.call(block, [x, weight])
    b.outputs(y=x)
    assert len(hoisted(graph).derived_weights) == 2
    runs_like_its_meaning(graph, backend, {"x": np.random.default_rng(0).standard_normal((3, 4), np.float32)})


def test_names_that_are_taken_are_numbered() -> None:
    graph = Graph("g")
    b = Builder(graph)
    x, exp_2 = b.input("x", f32[4]), b.parameter("exp_2", f32[4])
    for name in "uvw":
        x = x * b.exp(b.parameter(name, f32[4]))
    b.outputs(y=x * exp_2)
    assert list(hoisted(graph).derived_weights) == ["exp", "exp_3", "exp_4"]


def test_values_of_inputs_or_constants_are_not_hoisted() -> None:
    graph = Graph("g")
    b = Builder(graph)
    x, w = b.input("x", f32["B", 4]), b.parameter("w", f32[4])
    ones = b.exp(b.constant(np.ones(4, np.float32)))
    b.outputs(y=x * w + ones)
    assert hoisted(graph) == graph


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_depend_on_input_sizes_are_not_hoisted(backend: str) -> None:
    graph = Graph("g")
    b = Builder(graph)
    x, w = b.input("x", f32["B", "S"]), b.parameter("w", f32[6])
    part = b.slice(w, axis=0, start="S-2", stop="S")  # two elements, but their positions are unknown
    b.outputs(y=part * 2.0, z=w * b.cast(b.size(value="S"), to=f32), x=x)
    assert not hoisted(graph).derived_weights
    runs_like_its_meaning(graph, backend, {"x": np.ones((1, 4), np.float32)})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_whose_size_is_that_of_an_input_stays(backend: str) -> None:
    graph = Graph("g")
    b = Builder(graph)
    x, w, v = b.input("x", f32["B", "S"]), b.parameter("w", f32["S"]), b.parameter("v", f32[4])
    b.outputs(y=x * b.exp(w), z=b.exp(v) * 2.0)
    assert list(notes_on(recipes_of(hoisted(graph)))) == ["x = mul(exp(v), 2.0)"]
    found = find_backend(backend)
    if found.available() is not None:
        pytest.skip(str(found.available()))
    weights = {"w": np.arange(3, dtype=np.float32), "v": np.ones(4, np.float32)}
    made = found.compile(graph, Target("cpu"), weights)(x=np.ones((2, 3), np.float32))
    np.testing.assert_allclose(made["y"], np.exp([np.arange(3)] * 2), rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_a_recipe_cannot_take_are_told_with_the_line(backend: str) -> None:
    graph = Graph("g")
    b = Builder(graph)
    b.source = SourceLine("model.py", 7)
    picked = b.gather(b.parameter("table", f32[5, 4]), b.parameter("rows", i64[2]), axis=0)
    b.outputs(y=b.linear(b.input("x", f32["B", 4]), picked, None))
    weights = {"table": np.ones((5, 4), np.float32), "rows": np.array([1, 9])}
    found = find_backend(backend)
    if found.available() is not None:
        pytest.skip(str(found.available()))
    with pytest.raises(BackendError, match="gather: failed on the weights that it reads") as error:
        found.compile(graph, Target("cpu"), weights)
    assert "index 9 is outside an axis of size 5" in str(error.value)
    assert "gather(table, rows, axis=0)" in str(error.value) and "model.py:7" in str(error.value)


def test_smaller_values_are_hoisted_if_larger_ones_do_not_fit() -> None:
    graph = Graph("g")
    b = Builder(graph)
    b.source = SourceLine("model.py", 7)
    x, w = b.input("x", f32[1000]), b.parameter("w", f32[1, 1000])
    large = [b.exp(b.expand(w * float(n), shape=(200, 1000))) for n in (2, 3)]  # 800 kB each; the limit is 1 MB
    b.outputs(y=x + large[0], z=x + large[1], small=x + w * 5.0)
    lowered = PassManager((HoistWeights(),)).run(graph)
    assert len(lowered.graph.derived_weights) == 2  # one of the large values, and the small value
    assert lowered.log[0].notes == ["exp stays in main: 800,000 bytes, model.py:7"]


def hoisted(graph: Graph) -> Graph:
    """A graph after hoisting; the manager verifies it."""
    return PassManager((HoistWeights(),)).run(graph).graph


def nested(depth: int) -> Graph:
    """Return nested blocks. Each calls the preceding block twice, with weights that it computes."""
    graph = Graph("nested")
    inner = None
    for level in range(depth):
        block = Function(f"f{level}")
        graph.add_function(block)
        b = Builder(graph, block)
        x, w = b.input("x", f32["B", 4]), b.parameter("w", f32[4])
        for made in (b.tanh(w), w * 0.5):
            (x,) = (x * made,) if inner is None else b.call(inner, [x, made])
        b.outputs(y=x)
        inner = block
    assert inner is not None
    b = Builder(graph)
    (y,) = b.call(inner, [b.input("x", f32["B", 4]), b.parameter("w", f32[4])])
    b.outputs(y=y)
    return graph


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_within_blocks(backend: str) -> None:
    assert len(hoisted(nested(3)).derived_weights) == 8
    runs_like_its_meaning(nested(3), backend, {"x": np.ones((2, 4), np.float32)})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_may_be_called_bind(backend: str) -> None:
    graph = Graph("g")
    block = Function("bind")
    b = Builder(graph, block)
    b.outputs(y=b.input("x", f32["B", 4]) * b.exp(b.parameter("w", f32[4])))
    graph.add_function(block)
    main = Builder(graph)
    x = main.input("x", f32["B", 4])
    for name in ("one", "two"):
        (x,) = main.call(block, [x, main.parameter(name, f32[4])])
    main.outputs(y=x)
    lowered = hoisted(graph)
    verify(lowered)
    assert lowered.entry_names == ("bind", "main")
    assert [node.op.callee for node in lowered.main.nodes] == ["bind_block"] * 2
    runs_like_its_meaning(graph, backend, {"x": np.ones((2, 4), np.float32)})


def test_calls_that_multiply_do_not_fill_the_memory() -> None:
    lowered = PassManager((HoistWeights(),)).run(nested(30))  # all values computed from weights would be 2^31 nodes
    assert sum(len(function.nodes) for function in lowered.graph.functions.values()) < 30_000
    assert lowered.log[0].notes == ["the graph is too large to be compared with the graph before this pass"]


def test_values_that_would_fill_the_memory_are_not_hoisted() -> None:
    graph = Graph("g")
    b = Builder(graph)
    x, w = b.input("x", f32["B", 1000]), b.parameter("w", f32[1, 1000])
    large = b.expand(w, shape=(4 * MOST_GROWTH * 1000, 1000))
    b.outputs(y=b.matmul(x, b.rearrange(b.exp(large), pattern="m n -> n m")))
    assert not hoisted(graph).derived_weights


@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_and_misfitting_weights_are_named_as_the_caller_knows_them(merged: Graph, backend: str) -> None:
    weights = initial_weights(merged)
    with pytest.raises(BackendError, match="lacks weights") as error:
        find_backend(backend).compile(merged, Target("cpu"), {n: w for n, w in weights.items() if n != "h.1.k.weight"})
    assert "h.1.k.weight" in str(error.value) and "h.1.x" not in str(error.value)
    weights["h.1.k.weight"] = np.zeros((2, 5), np.float32)
    with pytest.raises(BackendError, match=r"weight h.1.k.weight must be f32\[2, 4\]"):
        find_backend(backend).compile(merged, Target("cpu"), weights)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_conversion_of_a_misfitting_weight_works(merged: Graph, backend: str) -> None:
    """An array or a tensor of another float dtype is converted, and a matrix of [inputs, outputs] is transposed."""
    weights = initial_weights(merged)
    w = weights["h.1.k.weight"]
    misfits: list[Any] = [w.astype(np.float64), w.astype(np.float16), np.ascontiguousarray(w.T)]
    names: dict[str, Any] = {}
    if importlib.util.find_spec("torch") is not None:
        names["torch"] = importlib.import_module("torch")
        misfits.append(names["torch"].from_numpy(w.copy()).double())
    for misfit in misfits:
        with pytest.raises(BackendError, match=r"weight h\.1\.k\.weight must be") as error:
            find_backend(backend).compile(merged, Target("cpu"), {**weights, "h.1.k.weight": misfit})
        converted = eval(str(error.value.hint).partition(",")[0], {**names, "w": misfit})
        find_backend(backend).compile(merged, Target("cpu"), {**weights, "h.1.k.weight": converted})


def test_weights_in_bfloat16_are_joined_as_they_are() -> None:
    torch = pytest.importorskip("torch")
    graph = Graph("g")
    b = Builder(graph)
    x = b.input("x", f32["B", 4])
    parts = [b.parameter(name, bf16[2, 4]) for name in "ab"]
    b.outputs(y=b.linear(x, b.cast(b.concat(*parts, axis=0), to=f32), None))
    weights = {name: torch.randn(2, 4).to(torch.bfloat16) for name in "ab"}
    exe = find_backend("torch").compile(graph, Target("cpu"), weights)
    x_array = np.random.default_rng(0).standard_normal((3, 4), np.float32)
    joined = torch.cat([weights["a"], weights["b"]]).float().numpy()
    np.testing.assert_allclose(exe(x=x_array)["y"], x_array @ joined.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [8, 32, 200])
def test_each_prepared_weight_in_bfloat16_is_its_own(size: int) -> None:
    """The weights are computed in float32, one after the other, possibly at the same address. A backend identifies
    weights by address.
    """
    torch = pytest.importorskip("torch")
    graph = Graph("g")
    b = Builder(graph)
    x = b.input("x", bf16["B", size])
    for i in range(6):
        halves = [b.parameter(f"{name}{i}", bf16[size // 2, size]) for name in "ab"]
        b.function.outputs[f"y{i}"] = b.linear(x, b.concat(*halves, axis=0), None).value
    tensors = {name: torch.randn(size // 2, size).to(torch.bfloat16) for name in graph.parameters}
    weights = {name: tensor.float().numpy() for name, tensor in tensors.items()}
    made = find_backend("torch").compile(graph, Target("cpu"), weights)(x=torch.eye(size).to(torch.bfloat16))
    for i in range(6):
        joined = torch.cat([tensors[f"a{i}"], tensors[f"b{i}"]])
        assert torch.equal(torch.as_tensor(made[f"y{i}"]).to(torch.bfloat16), joined.T)


def test_sources_of_another_dtype_make_another_key() -> None:
    keys = set()
    for dtype in (bf16, i16):
        graph = Graph("g")
        b = Builder(graph)
        b.outputs(y=b.input("x", f32[4]) * b.cast(b.parameter("w", dtype[4]), to=f32))
        keys |= {recipe.key for recipe in recipes_of(hoisted(graph)).values()}
    assert len(keys) == 2


def test_panels_of_a_prepared_weight_come_from_the_file_of_the_first_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tvm")
    from treadle.backends.tvm import panel_memory, weight_packing

    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "cache"))
    graph = Graph("g")
    b = Builder(graph)
    x = b.input("x", f32["B", 512])
    b.outputs(y=b.linear(x, b.concat(*[b.parameter(n, f32[320, 512]) for n in "ab"], axis=0), None))
    weights = {}
    for name in "ab":
        np.random.default_rng(ord(name)).standard_normal((320, 512), np.float32).tofile(tmp_path / name)
        weights[name] = np.memmap(tmp_path / name, np.float32, "r", shape=(320, 512))
    x_array = np.ones((2, 512), np.float32)
    first = find_backend("tvm").compile(graph, Target("cpu"), weights)(x=x_array)["y"]
    panel_memory.finish_writing()
    monkeypatch.setattr(weight_packing, "_fill", None)  # must not be called
    second = find_backend("tvm").compile(graph, Target("cpu"), weights)(x=x_array)["y"]
    np.testing.assert_array_equal(first, second)
    swapped = {"a": weights["b"], "b": weights["a"]}
    with pytest.raises(TypeError):  # other contents need other panels
        find_backend("tvm").compile(graph, Target("cpu"), swapped)


@treadle.model
def gated_scales(x: treadle.f32["B 8"], *, layers: int = 3) -> Any:
    for _ in treadle.stack("h", layers):
        first = treadle.parameter("a.weight", 4, 8)
        second = treadle.parameter("b.weight", 4, 8)
        x = x + treadle.tanh(treadle.einsum(x, treadle.concat(first, second, axis=0), equation="b k, n k -> b n"))
    return x


def runs_like_its_meaning(graph: Graph, backend: str, inputs: dict[str, Any]) -> None:
    weights = initial_weights(graph, 3)
    exe = find_backend(backend)
    if exe.available() is not None:
        pytest.skip(str(exe.available()))
    made = exe.compile(graph, Target("cpu"), weights)(**inputs)
    for name, wanted in interpret(graph, inputs, weights).items():
        np.testing.assert_allclose(made[name], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_that_was_hoisted_is_compiled_as_it_is(merged: Graph, backend: str) -> None:
    again = parse_graph(str(hoisted(merged)))
    found = find_backend(backend)
    if found.available() is not None:
        pytest.skip(str(found.available()))
    weights, x = initial_weights(merged, 3), np.random.default_rng(0).standard_normal((3, 4), np.float32)
    exe = treadle.compile(again, backend=backend, weights=weights)
    assert exe.graph.bind is not None
    (record,) = [record for record in exe.log if record.name == "hoist-weights"]
    assert record.notes == ["the graph has bind already"]
    np.testing.assert_allclose(exe(x=x)["y"], interpret(merged, {"x": x}, weights)["y"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dead", [False, True])
def test_weights_that_nobody_reads_stay(merged: Graph, dead: bool) -> None:
    b = Builder(merged)
    unread = b.parameter("unread", f32[3])
    if dead:
        b.exp(unread)
    lowered = hoisted(merged)
    assert set(lowered.parameters) == set(merged.parameters)
    assert "unread" in lowered.main.parameters and len(lowered.derived_weights) == 2
    assert parse_graph(str(lowered)) == lowered


def test_dead_work_of_a_block_is_left_alone() -> None:
    """If the unused ops moved, a block without results would be left."""
    graph = Graph("g")
    block = Function("h")
    graph.add_function(block)
    b = Builder(graph, block)
    b.outputs(y=b.exp(b.input("x", f32["B", 4])))
    b.tanh(b.parameter("w", f32[4]))
    b = Builder(graph)
    (y,) = b.call(block, [b.input("x", f32["B", 4]), b.parameter("w", f32[4])])
    b.outputs(y=y)
    assert hoisted(graph) == graph


def test_moves_between_blocks_count_as_changes() -> None:
    """The block's weight is an input of main. So values computed from it move to main, and nothing moves to bind."""
    graph = Graph("g")
    block = Function("h")
    graph.add_function(block)
    b = Builder(graph, block)
    b.outputs(y=b.input("x", f32["B", 4]) * b.tanh(b.parameter("w", f32[4])))
    b = Builder(graph)
    (y,) = b.call(block, [b.input("x", f32["B", 4]), b.input("given", f32[4])])
    b.outputs(y=y)
    made = PassManager((HoistWeights(),)).run(graph)
    assert made.graph.bind is None and made.graph != graph
    assert made.log[0].changed and made.log[0].graph == made.graph


def test_numbers_of_equal_value_do_not_part_what_is_the_same() -> None:
    """Each `w * 0.5` has its own constant."""
    graph = Graph("g")
    b = Builder(graph)
    x, w = b.input("x", f32["B", 4]), b.parameter("w", f32[4])
    b.outputs(y=x * (w * 0.5), z=x + w * 0.5)
    assert len(hoisted(graph).derived_weights) == 1
