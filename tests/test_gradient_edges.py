"""Gradients where derivatives are easily wrong: a sample of the cases of tests/fuzz/gradient_edges.py."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.gradient_edges import CASES, EdgeCase, judged
from tests.masked_programs import drawn_program, gradients_of
from tests.torch_modules import leaves
from treadle.ir.builder import Builder
from treadle.ir.graph import Graph
from treadle.ir.op_registry import OPS
from treadle.passes.framework.manager import PassManager
from treadle.passes.fusion.attention import chain
from treadle.passes.pipelines import RECOGNITION

pytestmark = pytest.mark.filterwarnings("ignore")

SAMPLE = (
    *(
        "elu",
        "celu",
        "log1p, near 0",
        "expm1",
        "softplus",
        "logsigmoid",
        "logaddexp",
        "bce with logits",
        "sinc",
        "fmod",
    ),
    *(
        "clamp, between",
        "clamp, both",
        "hardtanh",
        "relu6",
        "hardswish",
        "extremes along",
        "extremes with places",
        "topk",
    ),
    *("max_pool2d", "normalize", "norms", "statistics", "detached", "safe softmax, empty rows", "softmax by max"),
    *("attention, filled lowest", "attention, where -1e4", "attention, filled -inf", "sdpa, masked"),
)


@pytest.mark.parametrize("float64", [True, False], ids=["f64", "f32"])
@pytest.mark.parametrize("name", SAMPLE)
def test_gradients_equal_autograds(name: str, float64: bool) -> None:
    with np.errstate(all="ignore"):
        for recognized in (False, True):
            assert judged(CASES[name], float64=float64, recognized=recognized) == [], f"{recognized=}"


@pytest.mark.parametrize(
    "name",
    [
        *(
            "elu",
            "selu",
            "celu",
            "leaky_relu",
            "logsigmoid",
            "sinc",
            "clamp, between",
            "clamp, max",
            "norms",
            "max_pool2d",
        ),
        *("deviations", "layer_norm", "safe softmax, empty rows", "sdpa, masked"),
    ],
)
def test_gradients_of_onnx_files_equal_autograds_of_their_modules(name: str) -> None:
    pytest.importorskip("onnxscript")
    assert judged(CASES[name], float64=name != "logsigmoid", onnx=True) == []


@pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in CASES.items() if c.stable])
def test_functions_with_our_gradient_at_ties_are_the_functions_of_pytorch(case: EdgeCase) -> None:
    """Values are equal everywhere, gradients next to the ties: at ties, those of PyTorch depend on its version."""
    assert case.stable is not None
    for offset in (0.0, 1e-3):
        results = []
        for rule in (case.rule, case.stable):
            tensors = [torch.tensor(a + offset * (1 + i), requires_grad=True) for i, a in enumerate(case.at)]
            outputs = leaves(rule(*tensors))
            gradients = torch.autograd.grad(sum(y.sum() * (i + 1) for i, y in enumerate(outputs)), tensors)
            results.append([*outputs, *(gradients if offset else ())])
        for theirs, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_number_at_the_bound_of_a_clamp_gets_the_whole_gradient() -> None:
    rule = CASES["clamp, between"].stable
    assert rule is not None
    x = torch.tensor([-1, -0.5, 0, 3, 4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(rule(x).sum(), x)[0].tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("seed", range(12))
def test_recognition_keeps_gradients_of_masked_programs(seed: int) -> None:
    graph, inputs = drawn_program(seed)
    before, after = gradients_of(graph, inputs), gradients_of(recognized(graph), inputs)
    assert before.keys() == after.keys()
    for name, wanted in before.items():
        np.testing.assert_allclose(after[name], wanted, rtol=0, atol=1e-9 * max(1, abs(wanted).max()), err_msg=name)


def recognized(graph: Graph, *, certify: bool = False) -> Graph:
    return PassManager(RECOGNITION, certify=certify, differentiated=True).run(graph).graph


def test_the_programs_become_attention() -> None:
    ops = [{n.op.name for _, n in recognized(drawn_program(seed)[0]).walk()} for seed in range(12)]
    assert sum("attention" in each for each in ops) >= 6


def test_a_certificate_tries_gradients_where_the_graph_will_be_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused as for inference, attention with an empty row has the right values but wrong gradients."""
    emptied = chain._emptied
    monkeypatch.setattr(chain, "_emptied", lambda steps, scores, trained: emptied(steps, scores, False))
    graph, _ = drawn_program(0, how="filled", lowest=-3e38)
    for differentiated in (False, True):
        done = PassManager(RECOGNITION, certify=True, differentiated=differentiated).run(graph)
        undone = [event.reason for record in done.log for event in record.refusals if "rolled back" in event.reason]
        fused = any(node.op.name == "attention" for _, node in done.graph.walk())
        assert fused != differentiated
        assert bool(undone) == differentiated
        if differentiated:
            assert "of derivatives" in undone[0], undone
    monkeypatch.undo()
    assert any(node.op.name == "attention" for _, node in recognized(graph, certify=True).walk())


def test_stop_gradient_is_removed_without_a_gradient() -> None:
    b = Builder(Graph("g"))
    x = b.input("x", "f32[N, 4]")
    b.outputs(y=b.softmax(b.stop_gradient(x)))
    for differentiated, ops in ((False, ["softmax"]), (True, ["stop_gradient", "softmax"])):
        done = PassManager(RECOGNITION, differentiated=differentiated).run(b.graph).graph
        assert [node.op.name for node in done.main.nodes] == ops


def test_a_wrong_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    gradient = OPS["softplus"].gradient
    wrong = lambda op, b, g, x, y: [gradient(op, b, g, x, y)[0] * (1 + 1e-7)]  # noqa: E731
    monkeypatch.setattr(OPS["softplus"], "gradient", wrong)
    assert judged(CASES["softplus"], float64=True) != []
