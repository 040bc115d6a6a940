"""The weights of a compiled model: given by the caller, read from a checkpoint, or drawn at random."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from treadle.files.available_memory import free_memory
from treadle.files.nearest_names import NearestNames
from treadle.files.shown_names import printable
from treadle.ir.errors import Hint, UsageError
from treadle.ir.graph import Graph
from treadle.ir.initial_values import Init
from treadle.ir.transforms.balances import balances_of
from treadle.ir.transforms.encoded_weights import encode_weights, given_parameters
from treadle.passes.sharding.divided_products import DividedWeights
from treadle.program.source import Resolved
from treadle.reporting.counts import human

Array = np.ndarray[Any, Any]
_SHOWN = 8  # maximum number of names in an error


def weights_of(
    resolved: Resolved, graph: Graph, weights: Mapping[str, Array] | None, seed: int
) -> tuple[dict[str, Array], int | None]:
    """Return the weights of an optimized graph, and the seed if they were drawn. Weights are the caller's, or else the
    model's, or else random.

    Raises UsageError for weights that do not fit, as `compile` does.
    """
    if weights is not None:
        _refuse_unknown({*map(str, weights)}.difference(resolved.unused), resolved.graph.parameters)
    given = (
        {name: _kept(str(name), array) for name, array in weights.items()} if weights is not None else resolved.weights
    )
    if given is not None:
        if resolved.new_weights:
            given = {**given, **{name: initial_weight(resolved.graph, name, seed) for name in resolved.new_weights}}
        return encode_weights(graph, _chosen(graph, given)), None
    _refuse_large(graph, *_memory_to_quantize(graph))
    return encode_weights(graph, InitialWeights(graph, seed, resolved.divided)), seed


def initial_weights(graph: Graph, seed: int = 0) -> dict[str, Array]:
    """Return initial values of every weight as numbers, also of a weight that the graph stores in blocks. Each value
    depends only on the seed and the weight's name, so adding a weight does not change the others.

    Raises UsageError for a negative seed, a weight that cannot be drawn, and weights that need more memory than this
    machine has.
    """
    static = [v.type.decoded for v in graph.parameters.values() if v.type.static_shape is not None]
    _refuse_large(graph, sum(type.bytes_at({}) for type in static))
    return dict(InitialWeights(graph, seed))


class InitialWeights(Mapping[str, Array]):
    """The initial values of all weights, as numbers. Each is drawn when it is read, and not stored.

    divided   the weights that are parts of others, which are drawn whole; None if there are none

    Raises UsageError for a negative seed.
    """

    def __init__(self, graph: Graph, seed: int, divided: DividedWeights | None = None) -> None:
        if seed < 0:
            raise UsageError(f"a seed is 0 or more, not {seed}")
        self._graph, self._seed, self._divided = graph, seed, divided

    def __getitem__(self, name: str) -> Array:
        part = None if self._divided is None else self._divided.parts.get(name)
        if self._divided is None or part is None:
            return initial_weight(self._graph, name, self._seed)
        return np.asarray(part.of(initial_weight(self._divided.graph, part.whole, self._seed)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._graph.parameters)

    def __len__(self) -> int:
        return len(self._graph.parameters)


def _memory_to_quantize(graph: Graph) -> tuple[int, int]:
    """Return the bytes of all weights as the graph stores them, and the largest number of bytes of numbers that are in
    memory at once before they are blocks: of one weight, or of the weights of a balance and a copy of one of them.
    """
    stored, numbers = 0, dict[str, int]()
    for name, value in graph.parameters.items():
        if value.type.static_shape is not None:
            encoding, plain = value.type.encoding, value.type.decoded.bytes_at({})
            if encoding is None or not encoding.block.encodes:  # numbers stay numbers if the form can only be read
                stored += plain
            else:
                stored += value.type.bytes_at({})
                numbers[name] = plain
    read = [[numbers.get(name, 0) for name in balance.read] for balance in balances_of(graph)]
    return stored, max([*numbers.values(), *(sum(each) + max(each) for each in read)], default=0)


def _refuse_large(graph: Graph, stored: int, numbers: int = 0) -> None:
    """Raise UsageError if less memory is free than weights need: `stored` bytes in addition to `numbers` bytes
    while they are quantized.
    """
    memory = machine_memory()
    if memory is not None and stored + numbers > memory:
        drawn = f", {human(numbers, 'B')} of numbers to quantize" if numbers else ""
        raise UsageError(
            f"the weights of {printable(graph.name)} need more memory than is free",
            received=f"{human(stored, 'B')} of weights{drawn}, {human(memory, 'B')} of free memory",
            hint="a smaller configuration of the model",
        )


def machine_memory() -> int | None:
    """Return the bytes that this process can still allocate, or if the system does not report them, the bytes of this
    machine's memory; None if it reports neither.
    """
    free = free_memory()
    if free is not None:
        return free
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def initial_weight(graph: Graph, name: str, seed: int = 0) -> Array:
    """Return the initial value of one weight. Raises UsageError if it cannot be drawn."""
    value = graph.parameters[name]
    shape = value.type.static_shape
    if shape is None or value.type.dtype.numpy is None:
        narrow = shape is not None
        hint = Hint(
            "weights=" + ', or widen="bf16"' * narrow, "--widen bf16" if narrow else "a checkpoint with its weights"
        )
        raise UsageError(f"parameter {name}: {value.type} cannot be drawn", hint=hint)
    rng = np.random.default_rng([seed, *name.encode()])
    return graph.initial.get(name, Init("normal", 0.02)).draw(shape, value.type.dtype, rng)


def _refuse_unknown(weights: Iterable[str], known: Iterable[str]) -> None:
    names = [*known]
    unknown = sorted({*map(str, weights)}.difference(names))
    if unknown:
        nearest = NearestNames(names)
        pairs = [(name, near) for name in unknown[:3] for near in nearest.of_parts(name)]
        meant = ", ".join(f"{near} for {name}" for name, near in pairs)
        some = list(dict.fromkeys([*nearest.of(unknown[0], _SHOWN, 0.5), *names]))
        raise UsageError(
            f"the model lacks {len(unknown)} of the parameters in weights=",
            received=_few(unknown),
            hint=f"{meant}?"
            if meant
            else f"one of the model's parameters: {_few(some)}"
            if some
            else "leave it out: the model has no parameters",
        )


def _kept(name: str, array: Any) -> Any:
    """Return an array of the caller, copied if it can be written, or a tensor of PyTorch as an array: a backend packs
    some weights and reads others in place, so a later write would change the results only in part.
    """
    if hasattr(array, "detach"):
        from treadle.frontends.torch_export.model import array_of

        array = array_of(name, array)
    return array.copy() if isinstance(array, np.ndarray) and array.flags.writeable else array


def _chosen(graph: Graph, weights: Mapping[str, Array]) -> dict[str, Array]:
    names = given_parameters(graph)
    missing = [name for name in names if name not in weights]
    if missing:
        raise UsageError(
            f"weights= lacks {len(missing)} of {len(names)} parameter{'s' * (len(names) != 1)}: {_few(missing)}",
            received=_few([*weights]) or "no weights",
            hint=f"an array for {missing[0]}" + ", and for the others" * (len(missing) > 1),
        )
    return {name: weights[name] for name in names}


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
