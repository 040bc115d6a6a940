"""Quantization by a plan: weights of products are stored in low-bit encodings, and the products' operands are
quantized.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from treadle.ir.errors import Hint, UsageError
from treadle.ir.graph import Graph, Node
from treadle.ir.ops.blocks import Decode, Encode
from treadle.ir.transforms.encoded_weights import encode_parameters
from treadle.ir.transforms.rounded_inputs import AS_STORED
from treadle.ir.wording.named_values import value_hint
from treadle.passes.framework.facts import BEFORE_LOWERING, FULL_PRECISION, Facts
from treadle.passes.framework.manager import Pass
from treadle.passes.framework.pass_log import PassRecord
from treadle.passes.quantization.plan_checking import check_encoded_products, check_quantization
from treadle.passes.quantization.planning import SCHEMES, plan_quantization
from treadle.passes.quantization.quantization_plan import ActivationPlan, QuantizationPlan


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """linear(x, w, bias)   -->   linear(x, decode(w), bias)        for a weight w, as int8_rows or int4_groups(32)

    In the schemes that end in "int8", the result is linear(decode(encode(x)), decode(w), bias). If w is in rows, x is
    in uint8_rows, with a scale and a zero point per token; otherwise x is in groups of 32 with a scale each. For the
    result of a norm it is encode(x, 1 / s) and w s (`treadle.ir.transforms.balances`).

    scheme  "int8-weights": 8 bits and a scale per row. "int4": 4 bits and a scale for 32 neighbors, 8 bits if the
            product is an output. "int8", "int4-int8": the same, and operands of weights in blocks in 8 bits

    Numbers change, by at most half a step of their scale (for 4 bits by at most a whole step: the largest of a group is
    -8 steps, and the largest positive is 7), so no certificate is required. The plan reports the encoding of every
    weight, and an independent checker verifies the plan before it is applied. The pass runs last, so that the same
    fusions apply as in the float model. The owner of the weights encodes them (`treadle.compiling`). Weights that a
    file stores in blocks are unchanged.

    Refuses, with a reason in the plan: a weight that is not a matrix, or that has readers other than products and row
    lookups; a row whose length is not a multiple of the group. Raises UsageError if nothing changes for a model in
    blocks, or for one with such rows.
    """

    requires: ClassVar[Facts] = BEFORE_LOWERING | {FULL_PRECISION}
    changes_numbers: ClassVar[bool] = True
    scheme: str

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise UsageError(
                f"unknown quantization scheme {str(self.scheme)[:40]!r}",
                hint=value_hint("quantize", self.scheme, (*SCHEMES, AS_STORED)),
            )

    def run_graph(self, graph: Graph, log: PassRecord) -> int:
        plan = plan_quantization(graph, self.scheme)
        check_quantization(plan, graph)
        log.notes += str(plan).splitlines()
        log.products[QuantizationPlan] = plan
        rounded = [each for each in plan.activations if each.encoding is not None]
        if not plan.encodings and not rounded:
            _refuse_without_effect(plan)
            return 0
        encode_activations(graph, plan.activations)
        encoded = encode_parameters(
            graph, plan.encodings, plan.balances, lambda node, copy: log.lineage.stand([copy], [node])
        )
        graph.functions = encoded.functions
        check_encoded_products(graph, plan.balances)
        log.touched = None
        return len(plan.encodings) or len(rounded)


def _refuse_without_effect(plan: QuantizationPlan) -> None:
    """Raise UsageError if a plan quantizes nothing of a model whose weights are in blocks, or have other sizes than the
    scheme takes, so that it would have no effect.
    """
    if plan.misfits:
        raise UsageError(
            f"{plan.scheme} quantizes nothing of {plan.model}: no matrix has the sizes for it",
            received="\n".join(plan.misfits[:4]),
            hint=Hint(
                'quantize="int8-weights", which takes rows of any length',
                "--quantize int8-weights, which takes rows of any length",
            ),
        )
    forms = Counter(str(weight.type.encoding) for weight in plan.weights if weight.type.encoding is not None)
    if forms:
        held = ", ".join(f"{count} in {form}" for form, count in forms.items())
        raise UsageError(
            f"{plan.scheme} quantizes nothing of {plan.model}: its matrices are in blocks already",
            received=held,
            hint=Hint(
                'quantize="int8", which quantizes their operands, or widen="blocks", which decodes them first',
                "--quantize int8, which quantizes their operands, or --widen blocks, which decodes them first",
            ),
        )


def encode_activations(graph: Graph, plans: Iterable[ActivationPlan]) -> None:
    """Replace operands of planned products by quantized values. Each value is encoded and decoded once."""
    by_function: dict[str, list[ActivationPlan]] = {}
    for plan in plans:
        by_function.setdefault(plan.function, []).append(plan)
    for name, planned in by_function.items():
        function = graph.functions[name]
        before: dict[Node, list[Node]] = {}
        for plan in planned:
            if plan.encoding is None:
                continue
            readers = [function.nodes[place] for place in plan.products]
            x, first = readers[0].operands[0], readers[0]
            assert x is not None
            short, what = x.name.rpartition(".")[2], "groups" if plan.encoding.group else "rows"
            held = Node(
                Encode(to=plan.encoding), [x, None, None, None], [x.type.as_encoded(plan.encoding)], f"{short}_{what}"
            )
            read = Node(Decode(of=plan.encoding), held.results, [x.type], f"{short}_rounded")
            for node in (held, read):
                node.scope, node.source = first.scope, first.source
            before[first] = [*before.get(first, ()), held, read]
            for reader in readers:
                reader.operands = (read.result, *reader.operands[1:])
        function.nodes = [each for node in function.nodes for each in (*before.get(node, ()), node)]
