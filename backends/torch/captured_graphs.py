"""CUDA graphs: an entry that reads nothing back from the device is captured once for a set of sizes, and replayed.

A replay launches all kernels of the entry at once. It reads and writes the memory that the capture used. So inputs are
copied to the addresses of the capture, and outputs and status words are copied before the next replay. A graph belongs
to one set of sizes, one object of states, one arena, and one range of positions in the cache.

An entry is captured at its second call with the same key: the first call fills caches of constants, and collects the
limits of values that the host checks. If a value is outside of them, the entry runs without a graph, and its checks
raise the error.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from treadle.backends.python.executable import EntryCall
from treadle.backends.torch.cached_terms import BUCKET
from treadle.backends.torch.devices import TorchDevice
from treadle.backends.torch.status import Status, packed

MOST_GRAPHS = 32
"""Maximum number of captured graphs of an executable; the least recently used one is dropped."""


class _Graph(NamedTuple):
    """A captured run.

    inputs   the tensors that a replay reads, in the order of the entry's inputs
    results  the entry's results, which a replay overwrites
    status   its records, whose words a replay overwrites
    replay   launches the run again
    memory   the arena's memory that the run uses, which must not be freed before it
    """

    inputs: Sequence[Tensor]
    results: Mapping[str, Tensor]
    status: Status
    replay: Callable[[], None]
    memory: object


@dataclass
class _Repeated:
    """Calls with the same key.

    limits  for each input, the limits of its values that the host checks
    graph   their graph; None before the second call
    """

    limits: Sequence[Sequence[tuple[int, int]]]
    graph: _Graph | None = None

    def hold(self, arguments: Sequence[Tensor]) -> bool:
        """Return True if the values that the host knows are within the limits."""
        return all(
            low <= value <= high
            for x, limits in zip(arguments, self.limits, strict=True)
            for low, high in limits
            for value in x.on_host  # type: ignore[attr-defined]
        )


class CapturedGraphs:
    """The captured graphs of an executable.

    failure  the error of a capture that failed, after which nothing is captured; None
    """

    def __init__(self, device: TorchDevice) -> None:
        self.failure: str | None = None
        self._device = device
        self._lock = threading.RLock()
        self._calls: OrderedDict[Hashable, _Repeated] = OrderedDict()

    def run(self, call: EntryCall, status: Status) -> Mapping[str, Tensor]:
        """Run an entry, or replay its graph. The results belong to the caller."""
        with self._lock:
            states, _ = call.states
            inputs = tuple((x.shape, x.dtype, _bounds_of(x)) for x in call.arguments)
            key = call.entry, tuple(call.sizes.items()), inputs, id(states), *map(id, call.memory)
            repeated = self._calls.get(key)
            if repeated is None:
                return self._first(key, call, status)
            self._calls.move_to_end(key)
            if repeated.graph is None and self.failure is None:
                repeated.graph = self._capture(call)
            if repeated.graph is None or not repeated.hold(call.arguments):
                return call.run(status)
            graph = repeated.graph
            for own, given in zip(graph.inputs, call.arguments, strict=True):
                own.copy_(given, non_blocking=True)
            graph.replay()
            status += graph.status
            if status and status[0].words is not None:
                status[0] = status[0]._replace(words=status[0].words.clone())
            return {name: x.clone() for name, x in graph.results.items()}

    def _first(self, key: Hashable, call: EntryCall, status: Status) -> Mapping[str, Tensor]:
        """Run an entry, and collect the limits of its inputs."""
        limits: list[list[tuple[int, int]]] = [[] for _ in call.arguments]
        for x, own in zip(call.arguments, limits, strict=True):
            x.limits = own
        results = call.run(status)
        states, _ = call.states
        weakref.finalize(states, self._calls.pop, key, None).atexit = False
        self._calls[key] = _Repeated([sorted(set(each)) for each in limits])
        while len(self._calls) > MOST_GRAPHS:
            self._calls.popitem(last=False)
        return results

    def _capture(self, call: EntryCall) -> _Graph | None:
        inputs = [x.clone() for x in call.arguments]
        for own, given in zip(inputs, call.arguments, strict=True):
            own.bounds = _bounds_of(given)
        status: Status = []

        def run() -> Mapping[str, Tensor]:
            results = call._replace(arguments=inputs).run(status)
            if status:
                status[0] = status[0]._replace(words=packed(status))
            return results

        try:
            results, replay = self._device.capture(run)
        except RuntimeError as error:
            self.failure = str(error).splitlines()[0]
            return None
        return _Graph(inputs, results, status, replay, call.memory)


def _bounds_of(x: Tensor) -> tuple[int, int] | None:
    bounds: tuple[int, int] | None = getattr(x, "bounds", None)
    return bounds


def bounds_around(values: Sequence[int]) -> tuple[int, int]:
    """Return limits of values, rounded so that few different ones occur: a graph belongs to one range of positions."""
    return min(values) // BUCKET * BUCKET, max(values) // BUCKET * BUCKET + BUCKET - 1
