"""The capabilities of a backend on a target: what its kernels compute, read and write.

    mine = Capabilities("mine", keeps=lambda op, types: op.name in ("linear", "softmax"))
    pipeline = (Legalize(mine), HoistWeights(mine), PlanStorage(mine))
    print(pipeline_text(pipeline))        # legalize{backend=mine}, hoist-weights{backend=mine}, ...

The passes in `passes/lowering` and `passes/memory` call these functions. In the text of a pipeline, capabilities are
the name of a backend, whose `StagedBackend.capabilities(target)` returns them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from treadle.ir.encodings.encoding import Encoding
from treadle.ir.graph import Function, Node, Value
from treadle.ir.layouts import Layout
from treadle.ir.operation import Op
from treadle.ir.ops.blocks import ROWS
from treadle.ir.storage.views import View
from treadle.ir.types import Type
from treadle.passes.memory.library_places import Workspaces, allocates, nothing_beside
from treadle.passes.memory.storage_plan import Step
from treadle.passes.memory.strided_places import Parts
from treadle.passes.memory.value_places import Over


class Reads(Enum):
    """The way in which a node reads an operand for which it requires no particular layout."""

    ROW_MAJOR = "row-major"
    ANY = "any layout"


Keeps = Callable[[Op, Sequence[Type | None]], bool]
"""A function that returns True if a backend emits an op on operands of these types without lowering it."""

Wants = Callable[[Node, int], Layout | Reads]
"""A function that returns the way in which a node reads an operand. It is called for operands that depend on weights
alone.
"""

WantsBlocks = Callable[[Node, int, Layout | None], Layout | str]
"""A function that returns the layout in which a node reads the blocks of a decoded operand, or the reason why it
reads numbers. The last argument is the layout in which other nodes read these blocks directly, if there are any.
"""

Multiplies = Callable[[Node, int], Layout | None]
"""A function that returns the layout in which a node reads an encoded operand directly, or None."""

Grouping = Callable[[Function], Sequence[Step]]
"""A function that partitions a function's nodes into steps that are computed together, in order. Each node is in one
step.
"""


def keeps_none(op: Op, types: Sequence[Type | None]) -> bool:
    """Return False: the backend emits no composite."""
    return False


def reads_row_major(node: Node, position: int) -> Layout | Reads:
    """Return that a node reads an operand in row-major order."""
    return Reads.ROW_MAJOR


def reads_numbers(node: Node, position: int, beside: Layout | None) -> Layout | str:
    """Return the reason why no node reads blocks."""
    return "the backend has no kernel that reads blocks"


def multiplies_none(node: Node, position: int) -> Layout | None:
    """Return None: no node reads encoded operands directly."""
    return None


def reads_no_blocks(node: Node, position: int) -> bool:
    """Return False: no node reads an operand as blocks."""
    return False


def refuses_all_groups(weight: Value) -> str | None:
    """Return the reason why no product reads weights in groups of 4 bits."""
    return "the backend has no kernel for weights in groups of 4 bits"


def takes_rows(weight: Encoding) -> bool:
    """Return True for weights with one scale per row."""
    return weight == ROWS


def each_alone(function: Function) -> Sequence[Step]:
    """Return a step for each node."""
    return [Step((node,)) for node in function.nodes]


def every_part(step: Step, view: View) -> bool:
    """Return True: every step can write its result through any view."""
    return True


def over_nothing(step: Step) -> Sequence[Value]:
    """Return no operands: no step overwrites its operands."""
    return ()


@dataclass(frozen=True)
class Capabilities:
    """Functions that describe the kernels of a backend. The defaults describe a backend that emits only primitives, and
    whose library chooses strides and allocates results.

    name        the backend's name; empty for capabilities without a text form
    keeps       returns True for the composites that the backend emits
    layouts     returns the way in which a node reads an operand
    blocks      returns the way in which a node reads blocks
    multiplies  returns the layout in which a node reads an encoded operand that is not decoded for it
    takes       returns True if the backend multiplies rounded values with weights of an encoding as integers
    reads_blocks  returns True if a node reads encoded weights as blocks: the decode stays directly before that node,
                and `bind` stores the blocks
    refuses_groups  returns the reason why products decode a weight in groups of 4 bits; None: a kernel reads the groups
    grouped     the nodes that the backend computes together, so that only the last of them needs a storage
    parts       returns True if a step can write its result as a part of another value
    over        the operands that a step may overwrite with its result, element by element
    placed      with a library: the nodes whose result it writes to a given destination
    workspaces  memory that calls of these nodes need in addition to their result, while the step runs
    """

    name: str = ""
    keeps: Keeps = field(default=keeps_none, repr=False)
    layouts: Wants = field(default=reads_row_major, repr=False)
    blocks: WantsBlocks = field(default=reads_numbers, repr=False)
    multiplies: Multiplies = field(default=multiplies_none, repr=False)
    takes: Callable[[Encoding], bool] = field(default=takes_rows, repr=False)
    reads_blocks: Callable[[Node, int], bool] = field(default=reads_no_blocks, repr=False)
    refuses_groups: Callable[[Value], str | None] = field(default=refuses_all_groups, repr=False)
    grouped: Grouping = field(default=each_alone, repr=False)
    parts: Parts = field(default=every_part, repr=False)
    over: Over = field(default=over_nothing, repr=False)
    placed: Callable[[Node], bool] = field(default=allocates, repr=False)
    workspaces: Workspaces = field(default=nothing_beside, repr=False)

    def __str__(self) -> str:
        return self.name or "unnamed"


PRIMITIVES = Capabilities()
"""The capabilities of a backend that emits primitives only."""
