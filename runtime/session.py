"""A session: rows of text that grow token by token over caches of a fixed size.

    session = exe.session(rows=8, capacity=2048)
    row = session.open()
    logits = session.prefill({row: [464, 3139, 286]})[row]       # of its last token
    logits = session.step({row: 4881})[row]
    session.close(row, keep=True)
    row = session.resume([464, 3139, 286, 4881, 318])            # holds the first of them, as many as a slot does

A session has slots, which rows take and leave; rows of one call may have different lengths, and none sees another. It
holds the states of the step that was derived from the model (`treadle.passes.stepping.derivation`), and shares weights
and code with every other session of the model.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, SupportsIndex, TypeVar

import numpy as np

from treadle.backends.protocol import Entry, StatefulExecutable
from treadle.backends.states import States
from treadle.ir.errors import UsageError
from treadle.ir.sizing.size_bounds import Bounds
from treadle.passes.stepping.derivation import DerivedStep
from treadle.passes.stepping.functions import CAPACITY, SLOTS
from treadle.runtime.language_models import token_ports
from treadle.runtime.slots import Ring, Row, Slots

Array = np.ndarray[Any, Any]
X = TypeVar("X")
Full = Literal["error", "slide"]
"""What happens to a row whose cache is full: an error, or the older half of its tokens is forgotten."""

CHUNK = 256
"""Tokens of a row that are prefilled at a time."""
_WIDTH = 16  # chunks are as wide as a multiple of this, so that few sizes are planned for
_RING = 128  # capacities of rings are multiples of this, as kernels read keys in blocks


class Session:
    """Rows that grow by steps; see the module.

    rows      how many slots there are
    capacity  the positions of each
    chunk     the most tokens of a row that one call takes
    full      what happens to a row whose slot is full
    resumes   whether `resume` goes on from what slots hold
    """

    def __init__(
        self,
        derived: DerivedStep,
        executable: StatefulExecutable,
        *,
        rows: int = 8,
        capacity: int | None = None,
        chunk: int = CHUNK,
        full: Full = "error",
        memory: Mapping[str, int] | None = None,
        resumes: bool | None = None,
    ) -> None:
        """Allocate the states.

        memory   for a model whose prologue keeps something of a size that rows bring, such as a source text: the most
                 that a row may bring, by the size's name (`{"S": 512}`)
        resumes  None: where a row then has the bits that it has alone, since the backend's do not depend on how a row's
                 tokens are cut into calls

        Raises UsageError for sizes that the model does not take, BackendError where there is not enough memory.
        """
        self.derived, self.chunk, self.full = derived, _positive("chunk", chunk), full
        self._ports = token_ports(derived)
        if full not in ("error", "slide"):
            raise UsageError("full must be 'error' or 'slide'", received=repr(full))
        capacity = capacity if capacity is not None else derived.context
        if capacity is None:
            raise UsageError("a session needs a capacity: the model takes any number of tokens", hint="capacity=2048")
        self.capacity = _positive("capacity", capacity)
        if derived.context is not None and self.capacity > derived.context:
            raise UsageError(f"the model takes {derived.context} positions", received=f"capacity={capacity}")
        sizes = {SLOTS: _positive("rows", rows), CAPACITY: self.capacity}
        for symbol, window in derived.windows.items():
            sizes[symbol] = _RING * -(-min(window + self.chunk, self.capacity) // _RING)
        self._add_memories(sizes, memory or {})
        held = {s for value in derived.graph.states.values() for s in value.type.symbols}
        self.states: States = executable.new_states(**{s: size for s, size in sizes.items() if s in held})
        self._prefill, self._step = executable.entry("prefill"), executable.entry("step")
        self._verify = executable.entry("verify")
        self._prologue = executable.entry("prologue") if derived.has_prologue else None
        rings = [Ring(sizes[s], reach) for s, reach in derived.windows.items()]
        self._slots = Slots(self.states, sizes[SLOTS], rings, whole=derived.carries)
        self._rows = self._slots.rows
        if resumes and derived.has_prologue:
            raise UsageError(
                f"a row of {derived.graph.name} goes on from no other's text",
                received=f"it begins with {', '.join(derived.prologue)} of its own",
                hint="resumes=None",
            )
        exact = bool(getattr(executable, "exact_rows", False))
        self.resumes = not derived.has_prologue and (exact if resumes is None else resumes)

    def _add_memories(self, sizes: dict[str, int], memory: Mapping[str, int]) -> None:
        wanted = {s.removeprefix("C_"): s for s in self.derived.memories}
        unknown = [name for name in memory if name not in wanted]
        if unknown:
            raise UsageError(
                f"no row of {self.derived.graph.name} keeps anything of a size {unknown[0]}",
                hint="one of " + ", ".join(wanted) if wanted else "memory is not needed",
            )
        for name, symbol in wanted.items():
            most = memory.get(name, self.derived.graph.symbols.get(symbol, Bounds()).upper)
            if most is None:
                raise UsageError(
                    f"each row keeps what it brings along {name}: how much at most?", hint=f"memory={{{name!r}: 512}}"
                )
            sizes[symbol] = _positive(name, most)

    # -- rows --------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return self.states.nbytes

    @property
    def vocabulary(self) -> int | None:
        """How many ids there are; None where no table says."""
        return self._ports.vocabulary

    @property
    def who_takes(self) -> str:
        """What says how many tokens a row may have: the model, or the session."""
        return "the model" if self.capacity == self.derived.context else "a row of the session"

    @property
    def rows(self) -> tuple[int, ...]:
        """The rows that are open, in the order in which they were opened."""
        return tuple(self._rows)

    @property
    def free(self) -> int:
        """How many more rows can be opened."""
        return self._slots.free

    def length(self, row: int) -> int:
        """How many positions of a row's slot are filled. Raises UsageError for a row that is not open."""
        return self._open(row).length

    def tokens(self, row: int) -> tuple[int, ...]:
        """All tokens that a row was given. Raises UsageError for a row that is not open."""
        return tuple(self._open(row).tokens)

    def open(self, /, **inputs: Any) -> int:
        """Take a free slot; returns its row.

        inputs   what the model takes beside tokens, such as a source text, for this row: without the first dimension

        Raises UsageError where no slot is free, or an input is missing or unknown.
        """
        row, names = self._slots.take(), self.derived.prologue
        try:
            if set(inputs) != set(names):
                raise UsageError(
                    f"a row of {self.derived.graph.name} begins with {', '.join(names) or 'nothing'}",
                    received=", ".join(inputs) or "nothing",
                )
            if self._prologue is not None:
                given = {name: np.asarray(x)[None] for name, x in inputs.items()}
                self._prologue(self.states, **{self.derived.told["rows"]: np.array([row])}, **given)
        except BaseException:
            self._slots.give_back(row)
            raise
        self._rows[row] = Row()
        return row

    def close(self, row: int, *, keep: bool = False) -> None:
        """Give a row's slot back. Raises UsageError for a row that is not open.

        keep  others may go on from its text by `resume`, until the slot is taken: those that were used last come last
        """
        self._open(row)
        self._slots.close(row, keep=keep and self.resumes)

    def fork(self, row: int) -> int:
        """A new row that goes on from where a row is: its slot is copied. Raises UsageError as `open` does."""
        self._whole(row)
        return self._slots.fork(row)

    def resume(self, tokens: Sequence[int], /, **inputs: Any) -> int:
        """Take a slot for a text of these tokens; returns its row, which holds as many of the first as any slot does.

        The others, one at least, are to be prefilled: tokens[session.length(row):]. None are held where `resumes` is
        False. Raises UsageError as `open` does, which inputs are for.
        """
        ids = _ids("a row", tokens)
        if not self.resumes or inputs:
            return self.open(**inputs)
        return self._slots.resume(ids)

    def held(self, tokens: Sequence[int]) -> int:
        """How many tokens of a text a row would hold that `resume` gives now."""
        return self._slots.held(list(tokens)) if self.resumes else 0

    def shared(self, tokens: Sequence[int], other: Sequence[int]) -> int:
        """How many tokens of a text a row would hold that `resume` gives once another text has been prefilled."""
        return self._slots.worth(list(tokens), list(other)) if self.resumes else 0

    def _open(self, row: int) -> Row:
        found = self._rows.get(row)
        if found is None:
            opened = ", ".join(map(str, self._rows)) or "none"
            raise UsageError(f"row {row} is not open", received=f"open: {opened}")
        return found

    def _whole(self, row: int) -> Row:
        """A row that is open, and whose slot holds what its tokens left there."""
        found = self._open(row)
        if found.is_lost:
            raise UsageError(
                f"row {row} cannot go on: a call was broken off while it changed what the row holds",
                hint="close it, and prefill its tokens in another row",
            )
        return found

    # -- steps -------------------------------------------------------------------------------------------------

    def prefill(self, tokens: Mapping[int, Sequence[int]]) -> dict[int, Array]:
        """Append tokens to rows, each as many as it brings; the logits [vocab] after each row's last one.

        Raises UsageError, before anything is appended, for a row that is not open, no tokens, an id out of the
        vocabulary, or more tokens than there is room for.
        """
        left = {row: self._checked(row, ids) for row, ids in _by_row(tokens)}
        self._make_room({row: len(ids) for row, ids in left.items()})
        made: dict[int, Array] = {}
        while left:
            for group in self._groups({row: ids[: self.chunk] for row, ids in left.items()}):
                made |= self._append(group)
            left = {row: ids[self.chunk :] for row, ids in left.items() if len(ids) > self.chunk}
        return made

    def step(self, tokens: Mapping[int, int]) -> dict[int, Array]:
        """Append one token to each of these rows; the logits [vocab] after it. Raises UsageError as `prefill` does."""
        ids = {row: self._checked(row, [token]) for row, token in _by_row(tokens)}
        if not ids:
            return {}
        self._make_room(dict.fromkeys(ids, 1))
        logits = self._run(self._step, ids, np.array(list(ids.values()), self._ports.dtype))
        return {row: logits[n, 0] for n, row in enumerate(ids)}

    def verify(self, row: int, tokens: Sequence[int]) -> Array:
        """The logits [n, vocab] after each of n tokens that would follow a row; the row stays as it is.

        For speculation: the tokens that are accepted are appended by `accept`. Raises UsageError as `prefill` does, and
        for a model that carries sums along, which cannot be taken back.
        """
        if self.derived.carries:
            raise UsageError(
                f"{self.derived.graph.name} carries sums over its tokens, which cannot be taken back",
                hint="prefill, or step",
            )
        ids = self._checked(row, tokens)
        state = self._rows[row]
        if len(ids) > self.chunk or state.length + len(ids) > self.capacity:
            raise UsageError(
                f"row {row} has no room for {len(ids)} tokens at once",
                received=f"{state.length} of {self.capacity} positions are filled; a call takes {self.chunk} tokens",
            )
        logits = self._run(self._verify, {row: []}, np.array([ids], self._ports.dtype))
        state.verified = ids
        found: Array = logits[0]
        return found

    def accept(self, row: int, tokens: Sequence[int]) -> None:
        """Append the first of the tokens that `verify` was called with just before, as many as are right; or none.

        Raises UsageError for a row that is not open, and for other tokens, whose keys and values the row does not hold.
        """
        state, ids = self._whole(row), _ids(f"row {row}", tokens)
        if ids != state.verified[: len(ids)]:
            raise UsageError(
                f"row {row} accepts tokens that were verified just before, from the first of them on",
                received=f"{ids}, where {state.verified or 'none'} were verified",
                hint=f"prefill({{{row}: ...}}) appends any tokens",
            )
        state.tokens.extend(ids)
        state.verified = []

    def _checked(self, row: int, tokens: Sequence[int]) -> list[int]:
        self._whole(row)
        ids, most = _ids(f"row {row}", tokens), self._ports.vocabulary
        if not ids:
            raise UsageError(f"row {row} is given no tokens")
        wrong = next((i for i in ids if i < 0 or (most is not None and i >= most)), None)
        if wrong is not None:
            known = "0 or more" if most is None else f"0 to {most - 1}"
            raise UsageError(f"token {wrong} is not in the vocabulary", received=f"ids are {known}")
        return ids

    def _run(self, entry: Entry, pieces: Mapping[int, Sequence[int]], ids: Array, **told: Array) -> Array:
        """Call an entry on ids [b, s], and append each row's piece; all logits.

        Where the call is broken off, rows stay as they were. Caches may be written past a row's end; sums that are
        carried along may have gone on, and these rows are lost.
        """
        rows = list(pieces)
        told["rows"], told["start"] = np.array(rows, np.int64), np.array([self._rows[r].length for r in rows], np.int64)
        for row in rows:
            state = self._rows[row]
            state.verified, state.written = [], max(state.written, state.length + ids.shape[1])
        try:
            named = {self.derived.told[name]: array for name, array in told.items()}
            out = entry(self.states, **{self._ports.tokens: ids}, **named)
        except BaseException:
            for row in rows:
                self._rows[row].is_lost = self.derived.carries
            raise
        for row in rows:
            self._rows[row].tokens.extend(pieces[row])
        return np.asarray(out[self._ports.logits])

    def _make_room(self, wanted: Mapping[int, int]) -> None:
        """See that rows have room for so many tokens more. Raises UsageError where one has not, and may not slide."""
        for row, count in wanted.items():
            if self._rows[row].length + count > self.capacity and (self.full == "error" or count > self.capacity // 2):
                raise UsageError(
                    f"the cache of row {row} is full",
                    received=f"{self._rows[row].length} of {self.capacity} positions are filled, {count} are to follow",
                    hint="a larger capacity=, or full='slide', which forgets the older half",
                )
        for row, count in wanted.items():
            if self._rows[row].length + count > self.capacity:
                self._slide(row)

    def _slide(self, row: int) -> None:
        """Forget the older part of a row: what is left stands at positions from 0 on, and is computed anew."""
        state = self._rows[row]
        kept = state.tokens[-(self.capacity // 2) :]
        forgotten = len(state.tokens) - len(kept)
        state.tokens, state.forgotten = state.tokens[:forgotten], forgotten
        try:
            for at in range(0, len(kept), self.chunk):
                self._append({row: kept[at : at + self.chunk]})
        except BaseException:
            state.tokens, state.is_lost = [*state.tokens[:forgotten], *kept], True
            raise

    def _groups(self, pieces: Mapping[int, list[int]]) -> list[dict[int, list[int]]]:
        """Pieces that are appended together: of one width, where every row has room for it."""
        groups: dict[int, dict[int, list[int]]] = {}
        for row, ids in pieces.items():
            width = _WIDTH * -(-len(ids) // _WIDTH)
            if self._rows[row].length + width > self.capacity:
                width = len(ids)
            groups.setdefault(min(width, self.chunk), {})[row] = ids
        return list(groups.values())

    def _append(self, pieces: Mapping[int, list[int]]) -> dict[int, Array]:
        width = max(map(len, pieces.values()))
        padded = _WIDTH * -(-width // _WIDTH)
        if padded <= self.chunk and all(self._rows[row].length + padded <= self.capacity for row in pieces):
            width = padded
        ids = np.zeros((len(pieces), width), self._ports.dtype)
        for n, piece in enumerate(pieces.values()):
            ids[n, : len(piece)] = piece
        last = np.array([len(piece) - 1 for piece in pieces.values()], np.int64)
        logits = self._run(self._prefill, pieces, ids, last=last)
        return {row: logits[n, 0] for n, row in enumerate(pieces)}

    def __repr__(self) -> str:
        used = ", ".join(f"{row}: {state.length}" for row, state in self._rows.items())
        return (
            f"<session of {self.derived.graph.name}: {len(self._rows)} of {len(self._rows) + self.free} rows open"
            f"{f' ({used})' if used else ''}, {self.capacity} positions each, {self.nbytes / 1e6:.1f} MB>"
        )


def _positive(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex) or (number := operator.index(value)) < 1:
        raise UsageError(f"{name} must be 1 or more", received=repr(value))
    return number


def _by_row(tokens: Mapping[int, X]) -> Iterable[tuple[int, X]]:
    """What each row is given. Raises UsageError for anything but a mapping."""
    if not isinstance(tokens, Mapping):
        raise UsageError("tokens are given by row", received=type(tokens).__name__, hint="{row: tokens}")
    return tokens.items()


def _ids(who: str, tokens: Sequence[int]) -> list[int]:
    """Ids as plain numbers. Raises UsageError for what is none."""
    try:
        return [operator.index(token) for token in tokens]
    except TypeError as error:
        raise UsageError(
            f"{who} is given what is no id of a token", received=repr(tokens)[:200], hint="whole numbers"
        ) from error
