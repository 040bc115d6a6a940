"""The output of commands, as text: a changed page is read as a diff. Other tests check that its content is right."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from pprint import pformat
from typing import Any

import pytest
import typer

import treadle.cli
from tests.golden import Golden
from treadle.benching.benchmark import Benchmark, BenchRow, MachineLimits
from treadle.benching.report import report_lines
from treadle.benching.roofline import KernelRow, Roofline
from treadle.benching.roofline_drawing import draw_roofline
from treadle.benching.workload import Workload
from treadle.cli.application import app
from treadle.ir.analysis.cost import graph_cost
from treadle.ir.text.parser import parse_graph
from treadle.reporting.tables import console
from treadle.runtime.verification_report import BackendReport, Difference, NotFinite, OpFault, VerificationReport

MODEL = """\
import treadle as t


@t.model
def small(tokens: t.i64["B S"], lengths: t.i64["B"] | None, *, dim=32, layers=2, act=t.gelu):
    \"\"\"A small encoder.\"\"\"
    x = t.embed(tokens, 10, dim, name="wte")
    mask = None if lengths is None else t.padding(lengths)
    for _ in t.stack("h", layers):
        y = t.layer_norm(x, name="ln")
        x += t.self_attention(y, 2, mask=mask, name="attn")
        x += t.mlp(t.layer_norm(x, name="ln_2"), 64, act=act, name="mlp")
    return {"hidden": x}


@t.model
def scale(x: t.f32["B 3"]):
    return {"y": x * 2, "total": t.reduce_sum(x, axes=(0, 1)), "large": x > 2.0, "none": x / 0.0}
"""
SMALL = "model.py:small"
SIZES = ("--sizes", "B=2,S=5")

PAGES: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", SMALL, *SIZES, "--inputs", "lengths"),
    "inspect_raw.json": ("inspect", SMALL, "--raw", "--json"),
    "inspect_follow": ("inspect", SMALL, "--follow", "S", "--inputs", "lengths"),
    "inspect_follow.json": ("inspect", SMALL, "--follow", "S", "--json"),
    "compile": ("compile", SMALL, "--explain", "--set", "act=t.relu"),
    "compile.json": ("compile", SMALL, "--json", "--set", "act=t.relu"),
    "run": ("run", "model.py:scale", "--input", "x=1,2,3"),
    "run.json": ("run", "model.py:scale", "--input", "x=[[1,2,3],[4,5,6]]", "--json"),
    "fusion.json": ("explain", SMALL, "fusion", "--json"),
    "memory": ("explain", SMALL, "memory", "--backend", "torch", *SIZES),
    "memory.json": ("explain", SMALL, "memory", "--backend", "numpy", *SIZES, "--json"),
    "memory.svg": ("explain", SMALL, "memory", "--backend", "torch", *SIZES, "--svg", "memory.svg"),
    "sharding.json": ("explain", SMALL, "sharding", "--mesh", "tp=2,dp=2", "--recipe", "megatron", *SIZES, "--json"),
    "sharding.svg": (
        "explain",
        SMALL,
        "sharding",
        "--mesh",
        "pp=2,micro=2",
        "--recipe",
        "gpipe",
        *SIZES,
        "--svg",
        "sharding.svg",
    ),
    "diff": ("diff", SMALL, "--b", "--set layers=3 --set act=t.relu", *SIZES, "--fail-if", "attention<3, peak>9x"),
    "diff.json": ("diff", SMALL, "--a", "--set layers=1", "--quantize", "int4", *SIZES, "--json"),
    "diff_fusions": ("diff", f"{SMALL}@merge-projections", f"{SMALL}@fuse-gelu", *SIZES),
    "dot": ("export", SMALL, "--to", "dot", "-o", "small.dot"),
    "quantization": ("explain", SMALL, "quantization", "--quantize", "int8"),
    "quantization.json": ("explain", SMALL, "quantization", "--quantize", "int4", "--json"),
    "shard": ("shard", SMALL, "--mesh", "tp=2", "--axis", "heads=tp", *SIZES),
    "shard.json": ("shard", "model.py:scale", "--mesh", "dp=2", "--recipe", "dp", "--sizes", "B=4", "--json"),
    "shard_rank": ("shard", SMALL, "--mesh", "tp=2", "--recipe", "megatron", *SIZES, "--rank", "1"),
}


MEASURED = re.compile(r"\b\d+(\.\d+)? m?s\b|(?<='seconds': )[\d.e-]+|(?<='cores': )\d+|\d+ cores?")
"""Measurements that differ from run to run, and between machines, if a model is compiled or run."""


def shortly(facts: Any) -> Any:
    """Return numbers in six digits, and only the passes that changed something."""
    if isinstance(facts, dict):
        return {key: shortly(value) for key, value in facts.items()}
    if isinstance(facts, list):
        return [shortly(each) for each in facts if not isinstance(each, dict) or each.get("changes") != 0]
    return float(f"{facts:.6g}") if isinstance(facts, float) else facts


@pytest.mark.parametrize("page", PAGES)
def test_a_page(
    page: str, golden: Golden, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if "torch" in PAGES[page]:
        pytest.importorskip("torch")
    (tmp_path / "model.py").write_text(MODEL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TREADLE_CERTIFY", "0")
    monkeypatch.setattr(sys, "argv", ["treadle", *PAGES[page]])
    with pytest.raises(SystemExit) as ended:
        treadle.cli.main()
    said = capsys.readouterr()
    assert ended.value.code in (0, None), said.err
    if page.endswith(".svg"):
        text = Path(page).read_text(encoding="utf-8")
    elif page == "dot":
        text = Path("small.dot").read_text(encoding="utf-8")
    elif page.endswith(".json"):
        text = pformat(shortly(json.loads(said.out)), width=118, sort_dicts=False, underscore_numbers=True)
    else:
        text = said.out
    if page == "compile":
        text = text.partition("\n\n")[2]  # the table of passes is as wide as its times
    if PAGES[page][0] in ("compile", "run"):
        text = MEASURED.sub("...", text)
    golden(f"pages/{page}{'' if '.' in page else '.txt'}", text)


def test_commands_and_their_options(golden: Golden) -> None:
    """All commands and options, with their defaults, bounds and help texts."""
    lines: list[str] = []
    for name, command in sorted(typer.main.get_group(app).commands.items()):
        lines += ["", f"{name}: {' '.join((command.help or '').split())}"]
        for each in command.params:
            help_text = getattr(each, "help", None)
            has_default = isinstance(each.default, str | int | float)  # otherwise the library's replacement for it
            facts = [f"default {each.default!r}" * has_default, "required" * each.required]
            kind = getattr(each, "type", each)  # the one that has the bounds, depending on typer's version
            bounds = (getattr(kind, "min", None), getattr(kind, "max", None))
            facts += [
                f"{what} {bound}" for what, bound in zip(("from", "to"), bounds, strict=True) if bound is not None
            ]
            facts += ["unsaid" * (not each.show_default), "repeatable" * (each.multiple or each.nargs < 0)]
            spelled = ", ".join([*each.opts, *each.secondary_opts]) + (f" {each.metavar}" if each.metavar else "")
            lines.append(f"  {spelled}  {'; '.join(filter(None, [*facts, help_text]))}")
    golden("pages/options.txt", "\n".join(lines).replace(sys.executable, "PYTHON"))


def test_a_roofline_of_known_numbers(golden: Golden) -> None:
    """The table, the lines above and below it, and the plot."""
    rows = (
        KernelRow(
            "matmul_64_gelu",
            "activated_linear",
            12,
            1e-4,
            50_000_000,
            {1 << 18: 400_000},
            "f32",
            8e-5,
            "m.py:12, scope mlp",
        ),
        KernelRow("pair_product_48", "linear", 24, 2e-5, 20_000_000, {1 << 16: 100_000}, "bf16", 1.8e-5, "m.py:9"),
        KernelRow("copy", "rearrange", 1, 3e-6, 0, {1 << 14: 30_000}, "f32", 2e-6, ""),
    )
    reads = {1 << 14: 2e11, 1 << 16: 1e11, 1 << 18: 1.5e10}
    made = Roofline("small", "x86-64-v4", 2, {"B": 1, "S": 16}, rows, {"f32": 6e11, "bf16": 1.2e12}, reads, 9_000_000)
    golden("pages/roofline.txt", str(made))
    golden("pages/roofline.svg", draw_roofline(made))


def test_a_benchmark_of_known_numbers(golden: Golden, capsys: pytest.CaptureFixture[str]) -> None:
    """The table, the lines below it, and the output as data."""
    graph = parse_graph("graph small { symbols B main(x: f32[B, 4]) -> (y: f32[B, 4]) { y = relu(x) return y = y } }")
    rows = (
        BenchRow("treadle", "small for tvm", 0.002, 1.0, (1.0, 1.0), None, 1.25, 900_000_000),
        BenchRow("eager", "PyTorch 2", 0.004, 2.0, (1.5, 2.5), 2e-7, 0.5, 1_500_000_000),
        BenchRow("onnxruntime", "ONNX Runtime 1", 0.003, 1.5, (1.25, 1.75), 0.01, 0.75, 800_000_000),
        BenchRow("compile", "torch.compile", 0.001, 0.5, (0.25, 0.75), math.inf, 30.0, 2_000_000_000),
        BenchRow("openvino", "OpenVINO 2025", 0.001, 0.5, (0.5, 0.5), None, 2.0, 700_000_000),
    )
    missing = {"onnxruntime-int8": "the package is not installed", "openvino-int8": "it ended"}
    work = Workload("small", 2, {"backend": "tvm", "dtype": "bf16", "quantize": "int8-weights"})
    cost = graph_cost(graph, {"B": 1000})
    kernels = MachineLimits({"bf16": 2e11, "int8": 4e11}, 1e10, 0.0016)
    found = Benchmark(work, graph, {"B": 1000}, rows, missing, cost, kernels, rounds=15)
    for made in (found, replace(found, machine=MachineLimits({"f32": 5e10}, 1e10, None))):
        for line in report_lines(made):
            console().print(line, soft_wrap=isinstance(line, str))
    golden("pages/bench.txt", f"{capsys.readouterr().out}\n{pformat(found.as_dict(), width=118, sort_dicts=False)}")


def test_a_verification_of_known_numbers(golden: Golden) -> None:
    """Every possible verdict, as text and as data."""
    near, far, loose = Difference(1e-7, 1e-5), Difference(0.1, 1e-5), Difference(0.2, 0.7)
    fault = OpFault("gelu", "h.0.mlp", "m.py:7", far, None, {"B": 2})
    backends = (
        BackendReport("numpy", difference=near),
        BackendReport("torch", refused="PyTorch is not installed"),
        BackendReport("tvm", difference=far, fault=fault),
        BackendReport("mine", difference=far),
        BackendReport("broken", failure="an error", fault=replace(fault, difference=None, failure="failed", scope="")),
        BackendReport("loose", difference=loose),
        BackendReport("endless", difference=Difference(0.0, math.inf)),
    )
    unclear = (
        NotFinite("logits", "NaN", 3, 12, "weight h.0.w", "", "", {"B": 2}, from_a_weight=True),
        NotFinite("state", "infinite", 4, 4, "div", "h.0", "m.py:9", {"B": 2}),
        NotFinite("mask", "infinite", 1, 4, "the input x", "", "", {"B": 2}, from_a_weight=True),
    )
    text: list[str] = []
    cases: tuple[tuple[Difference, tuple[NotFinite, ...], tuple[BackendReport, ...]], ...] = (
        (near, (), backends[:2]),
        (far, unclear, backends),
        (near, unclear[2:], backends[:1]),
    )
    for rewrites, found, shown in cases:
        report = VerificationReport("small", "cpu", 3, ({"B": 2, "S": 5}, {}), found, rewrites, shown)
        text += [str(report), pformat(report.as_dict(), width=118, sort_dicts=False), ""]
    assert near.worse(far) is far and far.worse(near) is far and loose.worse(near) is loose
    golden("pages/verification.txt", "\n".join(text))
