"""Artifacts designed to be expensive to read are refused by a limit, or load. Limits can be raised.

tests/fuzz/artifacts.py also measures the time that each file takes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.fuzz.artifacts import hostile_file
from tests.fuzz.hostile_artifacts import SHAPES
from treadle.artifacts.loading import load_artifact
from treadle.artifacts.reading import GRAPH_LIMITS, ArtifactLimits, open_artifact
from treadle.frontends.safetensors_file import CheckpointLimits as HeaderLimits
from treadle.ir.analysis.drawn_inputs import draw_inputs, small_sizes
from treadle.ir.builder import Builder
from treadle.ir.errors import CheckpointError, ParseError, TreadleError
from treadle.ir.graph import Graph
from treadle.ir.text.parser import parse_graph
from treadle.ir.text.printer import print_graph
from treadle.ir.text.scanner import TextLimits
from treadle.ir.transforms.inline import inline_calls
from treadle.ir.verifier import verify
from treadle.models.gpt2 import gpt2
from treadle.models.registry import family_names, find_family
from treadle.models.whisper import whisper


def computes_or_refuses(path: Path) -> None:
    """Check a loaded file: its graphs verify, and it computes the results that its signature promises, or raises a
    TreadleError.
    """
    made = load_artifact(path)
    verify(made.graph)
    verify(made.optimized.source)
    assert [p.name for p in made.inputs] == [v.name for v in made.graph.main.inputs]
    try:
        sizes = small_sizes(made.graph)[0] if made.graph.symbols else {}
        outputs = made(**draw_inputs(made.graph, sizes, [0]))
    except TreadleError:
        return
    assert list(outputs) == [p.name for p in made.outputs]
    for port in made.outputs:
        assert outputs[port.name].shape == port.type.evaluate(sizes)
        assert outputs[port.name].dtype == port.dtype.numpy


@pytest.mark.parametrize("name", SHAPES)
def test_is_refused_or_loads(name: str, tmp_path: Path) -> None:
    shape, path = SHAPES[name], tmp_path / "x.treadle"
    path.write_bytes(hostile_file(shape))
    if shape.refusal is None:
        computes_or_refuses(path)
        return
    with pytest.raises((CheckpointError, ParseError)) as caught:
        load_artifact(path)
    assert caught.value.what.startswith(shape.refusal)
    assert str(path) in (caught.value.within or "")
    assert len(str(caught.value)) < 3_000


def test_refused_files_load_under_higher_limits(tmp_path: Path) -> None:
    """A file that exceeds a limit is refused only for its size."""
    path = tmp_path / "x.treadle"
    for name in ("too many nodes", "no two nodes alike", "too many constants", "too many symbols", "too many sections"):
        path.unlink(missing_ok=True)
        path.write_bytes(hostile_file(SHAPES[name]))
        header = HeaderLimits(values=100_000)
        if name == "too many sections":  # the graph does not accept this number
            with pytest.raises(CheckpointError, match="a weight that the graph does not use"):
                open_artifact(path, limits=ArtifactLimits(header=header))
        else:
            assert open_artifact(path, limits=ArtifactLimits(graph=TextLimits())).name == "g"


def test_a_text_of_types_can_be_read_where_it_is_trusted() -> None:
    text = SHAPES["long sums"].text()
    with pytest.raises(ParseError, match="takes too long") as caught:
        parse_graph(text, GRAPH_LIMITS)
    assert "limits={'work': " in (caught.value.hint or "")
    assert len(parse_graph(text, replace(GRAPH_LIMITS, work=2_000_000)).main.inputs) == 801


# -- needs of models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", family_names())
def test_models_of_the_zoo_need_a_sixth_of_every_limit(name: str) -> None:
    text = print_graph(find_family(name).model.graph())
    sixth = replace(
        GRAPH_LIMITS,
        **{
            limit: getattr(GRAPH_LIMITS, limit) // 6
            for limit in ("characters", "nodes", "operands", "functions", "arguments", "parameters", "symbols", "work")
        },
    )
    assert parse_graph(text, sixth)


def test_deep_models_are_far_from_the_limits() -> None:
    """Models with 48 layers as blocks, and Whisper's largest model with the nodes of every layer written out."""
    half = replace(GRAPH_LIMITS, work=GRAPH_LIMITS.work // 2, nodes=GRAPH_LIMITS.nodes // 2)
    deep = gpt2.configure(dim=1600, heads=25, layers=48)
    large = whisper.configure(
        dim=1280, heads=20, layers=32, hidden=5120, decoder_heads=20, decoder_layers=32, decoder_hidden=5120
    )
    assert parse_graph(print_graph(deep.graph()), half)
    flat = inline_calls(large.graph())
    assert len(flat.main.nodes) > 1_300
    assert parse_graph(print_graph(flat), half)


def test_an_export_of_three_thousand_nodes_loads() -> None:
    """A file without blocks and with only numeric sizes, in which each layer is wider than the preceding one."""
    b = Builder(Graph("export"))
    x = b.input("x", "f32[1, 64, 16]")
    for i in range(150):
        wide = 16 + i // 3
        y = b.linear(x, b.parameter(f"layer.{i}.in", f"f32[{4 * wide}, {x.type.static_shape[-1]}]"))
        for name in ("scale", "shift"):
            y = (y if name == "scale" else -y) * b.parameter(f"layer.{i}.{name}", f"f32[{4 * wide}]") + 1.0
        for _ in range(3):
            y = b.exp(y * 0.5) - y
        x = b.linear(y, b.parameter(f"layer.{i}.out", f"f32[{wide}, {4 * wide}]"))
        for _ in range(2):
            x = b.reciprocal(x + 2.0)
    b.outputs(y=x)
    assert len(b.graph.main.nodes) >= 3_000
    assert parse_graph(print_graph(b.graph), GRAPH_LIMITS) == b.graph
