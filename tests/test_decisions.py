"""The compiler's decisions for small models of the zoo, as golden texts, so that a changed decision appears in a diff.

The text of a model contains the optimized graph, the refusals of passes, and the kernels on one instruction set with
their specs, which decide their code. The texts of steps, dtypes and encodings contain the kernels on each instruction
set. Nothing is compiled, so any machine prints the same.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

import treadle
from tests.attention_near_misses import NEAR_MISSES
from tests.attention_programs import graph_of
from tests.golden import Golden
from tests.sharded_models import small_options
from tests.stepped_models import MODELS as STEPPED
from tests.test_explaining_layouts import without_lines
from tests.test_models import ZOO
from treadle.backends.onnx.exporter import export_onnx
from treadle.backends.tvm.backend import TvmBackend
from treadle.backends.tvm.kernels.isa import isa_of
from treadle.backends.tvm.lowering.listing import unique_titles
from treadle.backends.tvm.lowering.program import KernelProgram, KernelStep, RoutineStep, kernels_of
from treadle.backends.tvm.lowering.routine_writer import lower
from treadle.backends.tvm.lowering.rules import RULES
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.ir.text.printer import print_graph
from treadle.ir.transforms.fixing import bounded
from treadle.models.llama import llama
from treadle.passes.budget.fitted_pipeline import MemoryLimit, search_of
from treadle.passes.framework.manager import Optimized, PassManager
from treadle.passes.framework.pass_log import count_ops
from treadle.passes.pipelines import DEFAULT
from treadle.passes.stages import run
from treadle.passes.stepping.derivation import derive_step
from treadle.program.options import CompileOptions
from treadle.program.weights import initial_weights
from treadle.sharding import shard_model

MODELS = (
    *("gpt2 classifier", "bert token_classifier", "roberta masked_lm", "albert None", "vit distilled", "modernbert"),
    *("dinov2", "siglip", "llama, all options", "llama, windows beside full layers", "llama, norms after"),
    *("gpt_neox, one norm", "opt, norms after", "t5 gated", "transformer", "bart", "whisper"),
)
INSTRUCTION_SETS = ("x86-64-amx", "x86-64-v4-bf16", "x86-64-v4", "x86-64-v3", "x86-64-v2")


def file_name(title: str) -> str:
    return re.sub(r"[, ]+", "_", title)


def optimized(graph: Graph, dtype: str | None = None, quantize: str | None = None) -> Optimized:
    stages = CompileOptions(dtype=dtype, quantize=quantize).stages()
    return run(graph, stages, certify=False)


def lowered(graph: Graph, isa: str) -> tuple[Optimized, KernelProgram]:
    pytest.importorskip("tvm")
    target = Target(isa, threads=2)
    found = TvmBackend().lower(graph, target, certify=False)
    assert found.plan is not None
    return found, lower(found.graph, found.plan, isa_of(target), RULES, target.cores())


def specs(program: KernelProgram) -> list[str]:
    """Return a line for each distinct kernel with its spec, which decides its code. The instructions of a chain are
    shortened.
    """
    operands, attributes = r"operands=\(([^)]*)\)", r"attributes=\(((?:[^()]|\([^()]*\))*)\)"
    instruction = re.compile(rf"Instruction\(op='(\w+)', {operands}, dtype='(\w+)', {attributes}\)")
    return [
        instruction.sub(lambda m: f"{m[1]}.{m[3]}({m[2]}{'; ' * bool(m[4])}{m[4]})", kernel.key)
        for kernel in kernels_of(program)
    ]


def steps(program: KernelProgram) -> list[str]:
    """Return a line for each step: results, kernel, arguments with the strides of views, and sizes."""
    titles = unique_titles(kernels_of(program))
    lines: list[str] = []
    for routine in program.routines:
        lines += ["", f"{routine.name}:"]
        for step in routine.steps:
            match step:
                case RoutineStep():
                    line = f"{', '.join(map(str, step.results))} = {step.routine.name}()"
                case KernelStep():
                    reads, writes = step.pointers[: -step.writes], step.pointers[-step.writes :]
                    line = f"{', '.join(map(str, writes))} = {titles[step.kernel]}({', '.join(map(str, reads))})"
                    line += f"  {step.note}" if step.note else ""
            lines += [f"  {line}"] * (f"  {line}" != lines[-1])
    return lines


@pytest.mark.parametrize("name", MODELS)
def test_a_model(name: str, golden: Golden) -> None:
    found = optimized(ZOO[name][0].graph())
    code, program = lowered(found.graph, "x86-64-v4")
    notes = without_lines(f"{found.log.explain()}\n{code.log.explain()}")
    text = [print_graph(found.graph, sources=False), notes, *steps(program), "", *specs(program)]
    golden(f"decisions/models/{file_name(name)}.txt", "\n".join(text))


LLAMA = llama.configure(vocab=96, dim=64, heads=4, kv_heads=2, layers=2, hidden=128)
COMPUTING: dict[str, tuple[str | None, str | None, str | None]] = {
    "f32, and the step with a bf16 cache": (None, None, "bf16"),
    "bf16, and its step": ("bf16", None, None),
    "int8-weights": (None, "int8-weights", ""),
    "int8": (None, "int8", ""),
    "int4, and the step with an f16 cache": (None, "int4", "f16"),
    "int4-int8": (None, "int4-int8", ""),
}
"""Settings of a model: its dtype, the quantization of its weights, and the dtype of caches ("": without a step)."""


@pytest.mark.parametrize("case", COMPUTING)
def test_instruction_sets(case: str, golden: Golden) -> None:
    dtype, quantize, cache = COMPUTING[case]
    graph = optimized(LLAMA.graph(), dtype, quantize).graph
    if cache != "":
        graph = derive_step(graph, cache=cache).graph
    decisions: dict[str, list[str]] = {}
    for isa in INSTRUCTION_SETS:
        code, program = lowered(graph, isa)
        layouts = Counter(str(v.layout) for e in code.graph.entries for v in e.parameters.values() if v.layout)
        packed = [f"{count} weights in {layout}" for layout, count in sorted(layouts.items())]
        decisions[isa] = [*packed, *specs(program)]
    first, *others = decisions.values()
    common = [line for line in first if all(line in lines for lines in others)]
    text = ["# on each of them", *common]
    for isa, lines in decisions.items():
        text += ["", f"# {isa}", *(line for line in lines if line not in common)]
    golden(f"decisions/instruction_sets/{file_name(case)}.txt", "\n".join(text))


@pytest.mark.parametrize("name", ["windows", "packed", "alibi", "summed"])
def test_a_step(name: str, golden: Golden) -> None:
    derived = derive_step(optimized(STEPPED[name].graph()).graph)
    golden(f"decisions/steps/{name}.txt", print_graph(derived.graph, sources=False))


SPELLED = ("llama, windows beside full layers", "t5 gated", "vit distilled")


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("name", SPELLED)
def test_what_is_spelled(name: str, backend: str, golden: Golden) -> None:
    """The emitted Python code: the calls, and the memory that each value is written to."""
    if backend == "torch":
        pytest.importorskip("torch")
    layers = {option: 2 for option in ("layers", "decoder_layers") if option in ZOO[name][0].defaults}
    source = treadle.compile(ZOO[name][0].configure(**layers), backend=backend, certify=False).source
    golden(f"decisions/{backend}/{file_name(name)}.txt", without_lines(source))


SHARDINGS = (
    *(("gpt2", "pp=2,tp=2", "gpipe"), ("llama", "tp=2,dp=2", "megatron-fsdp"), ("t5", "tp=2", "sequence")),
    *(("bart", "cp=2", "context"), ("vit", "tp=2,dp=2", "megatron")),
)


@pytest.mark.parametrize(("family", "mesh", "recipe"), SHARDINGS, ids=[f"{f} {r}" for f, _, r in SHARDINGS])
def test_a_sharding(family: str, mesh: str, recipe: str, golden: Golden) -> None:
    sizes = {"B": 8} if family == "vit" else {"B": 8, "S": 16}
    plan = shard_model(family, mesh, recipe=recipe, sizes=sizes, **small_options(family))
    golden(f"decisions/shardings/{family}_{recipe}.txt", without_lines(str(plan)))


def test_a_budget(golden: Golden) -> None:
    """A model that is computed in parts: the resulting graph, and the report on the parts."""
    pytest.importorskip("tvm")
    budget = MemoryLimit(400_000, {"B": 4, "S": 64})
    found = TvmBackend().lower(optimized(LLAMA.graph()).graph, Target("x86-64-v4", threads=1), budget=budget)
    text = [found.log.explain(), print_graph(found.after("fit-memory"), sources=False)]
    golden("decisions/budget.txt", without_lines("\n".join(text)))


def test_ways_to_keep_to_a_budget(golden: Golden) -> None:
    """All alternatives that are tried, the fastest first: estimated bytes and time, and the values computed in
    parts.
    """
    pytest.importorskip("tvm")
    sizes = {"B": 4, "S": 64}
    search, _ = search_of(TvmBackend(), bounded(optimized(LLAMA.graph()).graph, sizes), Target("x86-64-v4", 1), sizes)
    whole = search.whole
    text = [f"whole {whole.bytes} bytes, {whole.here} here; none needs fewer than {search.bound}"]
    for each in search.candidates:
        choices = [each.variant.apart * "apart", each.variant.again * "again", *map(str, each.chunks)]
        text.append(f"{each.bytes} bytes, {each.seconds:.6g} s: {'; '.join(filter(None, choices))}")
    golden("decisions/budget_ways.txt", without_lines("\n".join(text)))


@pytest.mark.parametrize("opset", [13, 23])
@pytest.mark.parametrize("name", ["llama, all options", "vit distilled"])
def test_an_export(name: str, opset: int, golden: Golden, tmp_path: Path) -> None:
    """The nodes of the ONNX model."""
    onnx = pytest.importorskip("onnx")
    graph = optimized(ZOO[name][0].configure(layers=1).graph()).graph
    model = onnx.load(export_onnx(graph, initial_weights(graph), tmp_path / "m.onnx", opset=opset).path)
    lines = []
    for node in model.graph.node:
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        attributes = "".join(f", {name}={value!r}" for name, value in sorted(given.items()))
        lines.append(f"{', '.join(node.output)} = {node.op_type}({', '.join(node.input)}{attributes})")
    golden(f"decisions/onnx/{file_name(name)}_{opset}.txt", "\n".join(lines))


def test_what_is_nearly_attention(golden: Golden) -> None:
    """The report on each program that looks like attention but is not, or that is attention with other terms."""
    lines: list[str] = []
    for each in NEAR_MISSES:
        found = PassManager(DEFAULT, certify=False).run(graph_of(each.build))
        lines += [f"# {each.name}: {', '.join(f'{n} {op}' for op, n in sorted(count_ops(found.graph).items()))}"]
        lines += [re.sub(r"(tests/\w+\.py):\d+", r"\1", found.log.explain())]
    golden("decisions/near_misses.txt", "\n".join(lines))
