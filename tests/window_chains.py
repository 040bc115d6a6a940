"""Random chains of convolutions and poolings of axes whose sizes vary, as ONNX models and as PyTorch modules.

The same seed returns the same chain. A chain's results are compared with ONNX Runtime's and PyTorch's at several sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np

import treadle
from treadle.frontends.onnx_import.importer import import_onnx
from treadle.ir.errors import TreadleError

Array = np.ndarray[Any, Any]

CHANNELS = 3
SYMBOLS = ("L", "W")
NEAR = 1e-4
"""Tolerance in float32; a chain has up to four layers, whose outputs are near 1."""


def drawn_sizes(r: Random, rank: int) -> Iterator[tuple[int, ...]]:
    """Draw shapes of inputs; the last shapes are small."""
    for least, most in ((24, 60), (24, 60), (12, 40), (8, 20), (3, 12)):
        yield r.randint(1, 3), CHANNELS, *[r.randint(least, most) for _ in range(rank)]


def onnx_chain(seed: int) -> Any:
    """Return a model of up to four convolutions and poolings, and a Resize or an op that reads an axis's length."""
    from onnx import TensorProto, helper

    r, rng = Random(seed), np.random.default_rng(seed)
    rank = r.choice([1, 1, 2])
    nodes, weights, x = [], [], "x"
    for n in range(r.randint(1, 4)):
        kernel, stride, pad = r.randint(1, 4), r.randint(1, 3), r.randint(0, 1)
        kind = r.choice(["Conv", "Conv", "AveragePool", "MaxPool", "Resize", "ConvTranspose"])
        options: dict[str, Any] = {"kernel_shape": [kernel] * rank, "strides": [stride] * rank}
        operands = [x]
        if kind == "Resize":
            scales = np.array([1, 1, *[r.choice([0.5, 2.0, 3.0])] * rank], np.float32)
            weights.append(helper.make_tensor(f"scales{n}", TensorProto.FLOAT, [2 + rank], scales))
            operands += ["", f"scales{n}"]
            options = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        else:
            options["pads"] = [min(pad, kernel // 2)] * (2 * rank)
        if kind.startswith("Conv"):
            shape = [CHANNELS, CHANNELS, *[kernel] * rank]
            weights.append(helper.make_tensor(f"w{n}", TensorProto.FLOAT, shape, rng.normal(size=shape).ravel() * 0.3))
            operands.append(f"w{n}")
        elif kind.endswith("Pool"):
            options["ceil_mode"] = int(r.random() < 0.3)
        nodes.append(helper.make_node(kind, operands, [f"y{n}"], **options))
        x = f"y{n}"
    nodes.append(helper.make_node("Shape", [x], ["shape"]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", CHANNELS, *SYMBOLS[:rank]])]
    outputs = [helper.make_tensor_value_info(x, TensorProto.FLOAT, None)]
    outputs.append(helper.make_tensor_value_info("shape", TensorProto.INT64, None))
    graph = helper.make_graph(nodes, "chain", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def torch_chain(seed: int) -> tuple[Any, int]:
    """Return a module of up to four convolutions and poolings with a last op, and the number of axes over which windows
    slide.
    """
    import torch
    from torch import nn

    r = Random(seed)
    torch.manual_seed(seed)
    rank = r.choice([1, 1, 2])
    layers: list[Any] = []
    for _ in range(r.randint(1, 4)):
        kernel, stride = r.randint(1, 4), r.randint(1, 3)
        kind = r.choice(["Conv", "Conv", "Conv", "AvgPool", "MaxPool", "ConstantPad"])
        if kind == "MaxPool" and rank == 1:
            kind = "AvgPool"  # torch.export fixes the size of MaxPool1d's input
        cls, pad = getattr(nn, f"{kind}{rank}d"), r.randint(0, kernel // 2)
        if kind == "ConstantPad":
            layers.append(cls(pad, 0.5))
        elif kind == "Conv":
            layers.append(cls(CHANNELS, CHANNELS, kernel, stride, pad, dilation=r.choice([1, 1, 2])))
        else:
            layers.append(cls(kernel, stride, pad))
    end = r.choice(["none", "flat", "mean", "turned"])

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*layers)

        def forward(self, x: Any) -> Any:
            y = self.layers(x)
            if end == "flat":
                return y.flatten(2)
            if end == "mean":
                return y.mean(dim=tuple(range(2, 2 + rank)))
            return y.transpose(1, 2).reshape(y.shape[0], -1, y.shape[1]) if end == "turned" else y

    return Chain().eval(), rank


def onnx_verdict(seed: int) -> str:
    """Compare an imported file with ONNX Runtime: "equal", "refused: ..." or "wrong: ..."."""
    import onnxruntime

    model, r = onnx_chain(seed), Random(seed)
    onnxruntime.set_default_logger_severity(4)
    session = onnxruntime.InferenceSession(model.SerializeToString())

    def run(x: Array) -> list[Array]:
        found: list[Array] = session.run(None, {"x": x})
        return found

    try:
        graph, weights, _ = import_onnx(model)
        made = treadle.compile(graph, weights=weights)
    except TreadleError as error:
        return f"refused: {error}"
    return _compared(made, run, r, len(session.get_inputs()[0].shape) - 2)


def torch_verdict(seed: int) -> str:
    """Compare an imported module with PyTorch: "equal", "refused: ..." or "wrong: ..."."""
    import torch

    (module, rank), r = torch_chain(seed), Random(seed)

    def run(x: Array) -> list[Array]:
        with torch.no_grad():
            return [module(torch.from_numpy(x)).numpy()]

    example = torch.randn(2, CHANNELS, *[r.randint(30, 60) for _ in range(rank)])
    try:
        run(example.numpy())
    except RuntimeError:
        return "equal"  # inputs are too small for any output
    dynamic = {"x": {0: "B", **{n + 2: name for n, name in enumerate(SYMBOLS[:rank])}}}
    try:
        made = treadle.compile(treadle.from_torch(module, (example,), dynamic=dynamic))
    except TreadleError as error:
        return f"refused: {error}"
    return _compared(made, run, r, rank)


def _compared(made: Any, run: Any, r: Random, rank: int) -> str:
    """Compare at several sizes. Sizes that the other side refuses, or that are too small for us, are skipped."""
    for shape in drawn_sizes(r, rank):
        x = np.random.default_rng(shape).normal(size=shape).astype(np.float32)
        try:
            wanted = run(x)
        except Exception:
            continue
        try:
            found = list(made(x=x).values())
        except TreadleError as error:
            if "must be at least" in error.what or "a window spans" in error.what:
                continue
            return f"wrong: {shape}: {error}"
        for ours, theirs in zip(found, wanted, strict=True):
            if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=NEAR, atol=NEAR):
                return f"wrong: {shape} gives {ours.shape}, not {theirs.shape}, or other numbers"
    return "equal"
