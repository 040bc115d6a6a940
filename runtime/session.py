"""A session: rows of text that grow token by token over caches of a fixed size.

    session = exe.session(rows=8, capacity=2048)
    row = session.open()
    logits = session.prefill({row: [464, 3139, 286]})[row]       # after the last token
    logits = session.step({row: 4881})[row]
    session.close(row, keep=True)
    row = session.resume([464, 3139, 286, 4881, 318])            # holds the longest prefix that a slot has

A session has slots, which rows occupy from `open` to `close`. The rows of one call may have different lengths, and a
row does not depend on other rows. A session holds the states of the decoding step that was derived from the model
(`treadle.passes.stepping.derivation`). All sessions of a model share weights and code.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence, Sized
from contextlib import suppress
from typing import Any, Literal, SupportsIndex, TypeVar

import numpy as np

from treadle.backends.protocol import Entry, StatefulExecutable
from treadle.backends.states import States
from treadle.files.available_memory import prefault
from treadle.ir.errors import Hint, UsageError
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.wording.checked_calls import with_checked_call, with_checked_methods
from treadle.ir.wording.other_interfaces import SESSION_ATTRIBUTES
from treadle.ir.wording.unknown_attributes import with_attribute_hints
from treadle.passes.stepping.derivation import DerivedStep
from treadle.passes.stepping.sampled import SAMPLED
from treadle.runtime.device_sampling import TokenDraw, sampling_inputs
from treadle.runtime.language_models import token_ports
from treadle.runtime.prefix_cache import PrefixCache
from treadle.runtime.row_inputs import RowInputs, RowPrompt
from treadle.runtime.sampling import no_finite_logit
from treadle.runtime.slots import Ring, Row, Slots

Array = np.ndarray[Any, Any]
X = TypeVar("X")
_GREEDY = TokenDraw()
Full = Literal["error", "slide"]
"""The effect of appending to a full row: raise an error, or drop the older half of the row's tokens."""

CHUNK = 256
"""Default maximum number of tokens of a row that one call prefills."""
_WIDTH = 16  # chunk widths are multiples of this, so that few sizes occur
_RING = 128  # ring capacities are multiples of this, as kernels read keys in blocks
_TOKENS = "session.prefill({row: [4, 3]})"  # small ids: vocabularies may be small
_APPENDED = f"{_TOKENS}, or session.step({{row: 4}})"
_PROMPT = "session.prompt([4, 3])"


@with_attribute_hints("a session", SESSION_ATTRIBUTES)
@with_checked_methods(examples={"tokens": _APPENDED, "prompt": _PROMPT, "other": _PROMPT})
class Session:
    """Rows of text with their caches; see the module.

    rows      number of slots
    capacity  number of positions of each slot
    chunk     maximum number of tokens of a row in one call
    full      behavior of a row whose slot is full
    resumes   True if `resume` continues from the contents of slots
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

        memory   maximum sizes by name (`{"S": 512}`), for a model whose prologue stores values of a size that rows
                 determine, such as a source text
        resumes  None: True if the backend's bits do not depend on the split of a row's tokens into calls, so that a
                 resumed row is bitwise identical to a row that was prefilled as a whole

        Raises UsageError for sizes that the model does not support, BackendError if there is not enough memory.
        """
        self.derived, self.chunk, self.full = derived, _positive("chunk", chunk), full
        self._ports = token_ports(derived)
        if full not in ("error", "slide"):
            raise UsageError("full must be 'error' or 'slide'", received=repr(full))
        capacity = capacity if capacity is not None else derived.context
        if capacity is None:
            what = "a session needs a capacity: the model does not limit the length of a text"
            raise UsageError(what, hint="capacity=2048")
        self.capacity = _positive("capacity", capacity)
        if derived.context is not None and self.capacity > derived.context:
            hint = Hint(f"capacity={derived.context} or less", f"--context {derived.context} or less")
            what = f"the model takes {derived.context} positions"
            raise UsageError(what, received=f"capacity={capacity}", hint=hint)
        sizes = {derived.slots: _positive("rows", rows), derived.capacity: self.capacity}
        for symbol, window in derived.windows.items():
            sizes[symbol] = _RING * -(-min(window + self.chunk, self.capacity) // _RING)
        self._add_memories(sizes, memory or {})
        held = {s for value in derived.graph.states.values() for s in value.type.symbols}
        self._pads = bool(getattr(executable, "captures_calls", False))
        slots = sizes[derived.slots] + self._pads  # the last slot is for rows that fill up a call
        of_states = {**sizes, derived.slots: slots}
        self.states: States = executable.new_states(**{s: size for s, size in of_states.items() if s in held})
        self._prefill, self._step = executable.entry("prefill"), executable.entry("step")
        self._verify = executable.entry("verify")
        self._prologue = executable.entry("prologue") if derived.has_prologue else None
        rings = [Ring(sizes[s], reach) for s, reach in derived.windows.items()]
        self._prefaulted = 0
        self._slots = Slots(self.states, sizes[derived.slots], rings, capacity=derived.capacity, whole=derived.carries)
        self._rows = self._slots.rows
        self._inputs = RowInputs(derived, sizes)
        exact = bool(getattr(executable, "exact_rows", False))
        self.resumes = exact if resumes is None else resumes

    def _add_memories(self, sizes: dict[str, int], memory: Mapping[str, int]) -> None:
        wanted = {name: symbol for symbol, name in self.derived.memories.items()}
        unknown = [name for name in memory if name not in wanted]
        if unknown:
            raise UsageError(
                f"rows of {self.derived.graph.name} keep no value of a size {unknown[0]}",
                hint="one of " + ", ".join(wanted) if wanted else "no memory=: the model has no such values",
            )
        for name, symbol in wanted.items():
            upper = self.derived.graph.symbols.get(symbol, Bounds()).upper
            most = memory.get(name, upper)
            if most is None:
                raise UsageError(
                    f"each row keeps values along {name}, whose maximum size is missing",
                    hint=f"memory={{{name!r}: 512}}",
                )
            sizes[symbol] = _positive(name, most)
            if upper is not None and sizes[symbol] > upper:
                raise UsageError(
                    f"a row keeps at most {upper:,} values along {name}",
                    received=f"memory={{{name!r}: {most}}}",
                    hint=f"memory={{{name!r}: {upper}}}, or no memory=",
                )

    # -- rows --------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Size of all states in bytes."""
        return self.states.nbytes

    def prefault(self, rows: int) -> None:
        """Let the operating system allocate the memory of the first `rows` rows now, unless it was called for them.
        Otherwise, the first tokens of a row wait for it. New rows are opened in this order.

        Safe on another thread, one call at a time. Has no effect on a device, and on systems without such a call.
        """
        for row in range(self._prefaulted, min(rows, self._slots.count)):
            for array in self.states.values():
                if isinstance(array, np.ndarray):
                    prefault(array[row])
            self._prefaulted = row + 1

    @property
    def vocabulary(self) -> int | None:
        """Number of token ids; None if no table determines it."""
        return self._ports.vocabulary

    @property
    def who_takes(self) -> str:
        """The part that limits the number of tokens of a row: the model or the session, as text for messages."""
        return "the model" if self.capacity == self.derived.context else "a row of the session"

    @property
    def rows(self) -> tuple[int, ...]:
        """The open rows, in the order in which they were opened."""
        return tuple(self._rows)

    @property
    def free(self) -> int:
        """Number of rows that can still be opened."""
        return self._slots.free

    def length(self, row: int) -> int:
        """Return the number of filled positions of a row's slot. Raises UsageError for a row that is not open."""
        return self._open(row).length

    def tokens(self, row: int) -> tuple[int, ...]:
        """Return all tokens passed to a row. Raises UsageError for a row that is not open."""
        return tuple(self._open(row).tokens)

    @with_checked_call(instead=f"row = session.open(), then {_TOKENS}")
    def open(self, /, **inputs: Any) -> int:
        """Open a row in a free slot. Return the number of the row.

        inputs   the model's inputs for this row in addition to tokens, without the first dimension: those that a row
                 begins with, such as a source text, and the values of those along the sequence for the row's first
                 tokens; see `treadle.runtime.row_inputs`

        Raises UsageError if no slot is free, or an input is missing or unknown.
        """
        return self._opened(self.prompt((), **inputs))

    def _opened(self, prompt: RowPrompt) -> int:
        """Open an empty row with the inputs of a prompt."""
        row = self._slots.take()
        try:
            if self._prologue is not None:
                given = {name: x[None] for name, x in prompt.prologue.items()}
                self._prologue(self.states, **{self.derived.port_names["rows"]: np.array([row])}, **given)
        except BaseException:
            self._slots.give_back(row)
            raise
        self._rows[row] = Row(along=dict(prompt.along), key=prompt.key)
        return row

    def reserve(self) -> int:
        """Occupy a free slot without beginning a text; `close` frees it. Raises UsageError if no slot is free."""
        row = self._slots.take()
        self._rows[row] = Row(is_lost=True)
        return row

    def close(self, row: int, *, keep: bool = False) -> None:
        """Close a row and free its slot. Raises UsageError for a row that is not open.

        keep  True: `resume` may continue from the row's text until the slot is reused; the least recently used slot is
              reused first
        """
        self._open(row)
        self._slots.close(row, keep=keep and self.resumes)

    def fork(self, row: int) -> int:
        """Open a row that continues from another row's current state. The other row's slot is copied. Raises
        UsageError as `open` does.
        """
        self._whole(row)
        return self._slots.fork(row)

    def resume(self, tokens: Sequence[int], /, **inputs: Any) -> int:
        """Open a row for a text that begins with these tokens. The row holds the longest prefix of the tokens that any
        slot has.

        The remaining tokens, at least one, must be prefilled: tokens[session.length(row):]. If `resumes` is False, the
        row holds no prefix. A prefix is held only if it was computed with equal inputs. Raises UsageError as `open`
        does; `inputs` are the same as for `open`.
        """
        return self.begin(self.prompt(tokens, **inputs))

    def prompt(self, tokens: Sequence[int], /, **inputs: Any) -> RowPrompt:
        """Return the tokens of a text with the checked inputs of its row. Raises UsageError for a missing or unknown
        input, or one whose shape does not fit.
        """
        return self._inputs.prompt(_ids("a row", tokens), inputs)

    def cache_prefixes(self, limit: int) -> None:
        """Store texts that lose their slots in host memory, up to `limit` bytes. `resume` continues from them, too.

        Raises UsageError if the session does not reuse prefixes, or if the states of a text depend on more than the
        tokens of its prefix: in a model with windows, running sums or further inputs.
        """
        derived = self.derived
        further = derived.windows or derived.carries or derived.memories or derived.has_prologue or derived.generated
        if not self.resumes or further:
            raise UsageError(
                f"rows of {self.derived.graph.name} cannot resume from prefixes in host memory",
                received="the model has windows, running sums or further inputs"
                if further
                else "the session does not reuse prefixes",
                hint=Hint("no cache_prefixes", "leave out --prefix-cache")
                if further
                else Hint(
                    "a session with resumes=True",
                    "--reuse, which is off by default on some backends, such as numpy",
                ),
            )
        self._slots.cache = PrefixCache(_positive("limit", limit))

    @property
    def cached_bytes(self) -> int:
        """Size of the prefixes in host memory in bytes."""
        return 0 if self._slots.cache is None else self._slots.cache.nbytes

    def begin(self, prompt: RowPrompt) -> int:
        """Open a row for a prompt, as `resume` does."""
        row = self._slots.resume(prompt) if self.resumes else None
        return self._opened(prompt) if row is None else row

    def prefix_length(self, prompt: RowPrompt) -> int:
        """Return the number of tokens that a row from `begin` would hold now."""
        return self._slots.held(prompt) if self.resumes else 0

    def shared(self, prompt: RowPrompt, other: RowPrompt) -> int:
        """Return the number of tokens that a row from `begin` would hold after another prompt has been prefilled."""
        return self._slots.worth(prompt, other) if self.resumes else 0

    def _open(self, row: int) -> Row:
        found = self._rows.get(row)
        if found is None:
            opened = ", ".join(map(str, self._rows)) or "none"
            raise UsageError(f"row {row} is not open", received=f"open: {opened}")
        return found

    def _whole(self, row: int) -> Row:
        """Return an open row whose slot holds the states of its tokens."""
        found = self._open(row)
        if found.is_lost:
            raise UsageError(
                f"row {row} cannot continue: a call failed while it changed the row's states",
                hint="close it, and prefill its tokens in another row",
            )
        return found

    # -- steps -------------------------------------------------------------------------------------------------

    def prefill(self, tokens: Mapping[int, Sequence[int]]) -> dict[int, Array]:
        """Append tokens to rows, any number for each; return the logits [vocab] after each row's last token.

        Raises UsageError, before anything is appended, for a row that is not open, an empty list, an id outside the
        vocabulary, more tokens than there is room for, or a session that chooses tokens on the device.
        """
        self._needs_logits("prefill")
        return self._prefilled({row: self._checked(row, ids) for row, ids in tokens.items()}, {})

    def _prefilled(self, tokens: Mapping[int, list[int]], draws: Mapping[int, TokenDraw]) -> dict[int, Array]:
        self._make_room({row: len(ids) for row, ids in tokens.items()})
        left = dict(tokens)
        made: dict[int, Array] = {}
        while left:
            for group in self._groups({row: ids[: self.chunk] for row, ids in left.items()}):
                made |= self._append(group, draws)
            left = {row: ids[self.chunk :] for row, ids in left.items() if len(ids) > self.chunk}
        return made

    def step(self, tokens: Mapping[int, int]) -> dict[int, Array]:
        """Append one token to each of these rows. Return the logits [vocab] after each row's token. Raises UsageError
        as `prefill` does.
        """
        self._needs_logits("step")
        return self._stepped({row: self._checked(row, [token]) for row, token in tokens.items()}, {})

    def _stepped(self, ids: Mapping[int, list[int]], draws: Mapping[int, TokenDraw]) -> dict[int, Array]:
        if not ids:
            return {}
        self._make_room(dict.fromkeys(ids, 1))
        found = self._run(self._step, ids, np.array(list(ids.values()), self._ports.dtype), draws)
        return {row: found[n] for n, row in enumerate(ids)}

    def sample(
        self, tokens: Mapping[int, Sequence[int]], draws: Mapping[int, TokenDraw] | None = None
    ) -> dict[int, int]:
        """Append tokens to rows, any number for each, and return the token that the device chooses after them.

        draws  sampling options by row; greedy for a row without any

        Only the chosen tokens are copied to the host, four bytes for each row. Raises UsageError as `prefill` does, for
        a session that returns logits, and if the logits of a row are not finite.
        """
        if self.derived.sampling is None:
            raise UsageError(
                "this session returns logits, and chooses no tokens", hint='device_sampling="greedy" or "random"'
            )
        draws = draws or {}
        ids = {row: self._checked(row, each) for row, each in tokens.items()}
        sampling_inputs(self.derived.sampling, draws.values())  # refused before anything is appended
        single = {row: each for row, each in ids.items() if len(each) == 1}
        longer = {row: each for row, each in ids.items() if len(each) > 1}
        self._make_room({row: len(each) for row, each in ids.items()})
        found = {**self._prefilled(longer, draws), **self._stepped(single, draws)}
        if any(int(found[row]) < 0 for row in ids):
            raise no_finite_logit()
        return {row: int(found[row]) for row in ids}

    def _needs_logits(self, method: str) -> None:
        if self.derived.sampling is not None:
            raise UsageError(
                f"{method} returns logits, and this session chooses tokens on the device",
                hint="sample, or a session without device_sampling",
            )

    def verify(self, row: int, tokens: Sequence[int]) -> Array:
        """Return the logits [n, vocab] after each of n tokens that would follow a row; the row is unchanged.

        Used for speculation: `accept` appends the accepted tokens. Raises UsageError as `prefill` does, and for a model
        with running sums, which cannot be rolled back.
        """
        if self.derived.carries:
            raise UsageError(
                f"{self.derived.graph.name} has running sums over its tokens, which cannot be rolled back",
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
        """Append the accepted tokens: a prefix, possibly empty, of the tokens of the preceding `verify` call.

        Raises UsageError for a row that is not open, and for tokens that are not such a prefix, since the row does not
        hold their keys and values.
        """
        state, ids = self._whole(row), _ids(f"row {row}", tokens)
        if ids != state.verified[: len(ids)]:
            raise UsageError(
                f"row {row} accepts only tokens that were just verified, from the first of them on",
                received=f"{ids}, where {state.verified or 'none'} were verified",
                hint=f"prefill({{{row}: ...}}), which appends any tokens",
            )
        self._extend(state, ids)
        state.verified = []

    def _checked(self, row: int, tokens: Sequence[int]) -> list[int]:
        self._whole(row)
        ids, most = _ids(f"row {row}", tokens), self._ports.vocabulary
        if not ids:
            raise UsageError(f"row {row} has no tokens to append")
        wrong = next((i for i in ids if i < 0 or (most is not None and i >= most)), None)
        if wrong is not None:
            known = "0 or more" if most is None else f"0 to {most - 1}"
            raise UsageError(f"token {wrong} is not in the vocabulary", received=f"ids are {known}")
        return ids

    def _run(
        self,
        entry: Entry,
        pieces: Mapping[int, Sequence[int]],
        ids: Array,
        draws: Mapping[int, TokenDraw] | None = None,
        **inputs: Array,
    ) -> Array:
        """Call an entry on ids [b, s] and append each row's piece; return the logits of all rows: [b, vocab], or
        without `draws` [b, s, vocab]. If the session chooses tokens on the device, return them for `draws`, i32[b].

        If the call fails, rows keep their tokens. Caches may have been written behind the last token of a row, which
        does no harm. Running sums may have advanced; rows with such sums are marked as lost.
        """
        rows = list(pieces)
        start = [self._rows[r].length for r in rows]
        padding = bucket(len(rows)) - len(rows) if self._pads else 0
        how = self.derived.sampling if draws is not None else None
        sampling: Mapping[str, Array] = {}
        if how is not None:
            assert draws is not None
            sampling = sampling_inputs(how, [*(draws.get(row, _GREEDY) for row in rows), *[_GREEDY] * padding])
        for row in rows:
            state = self._rows[row]
            state.verified, state.written = [], max(state.written, state.length + ids.shape[1])
        for name in self._inputs.rules:
            inputs[name] = self._along(name, {row: len(piece) or ids.shape[1] for row, piece in pieces.items()}, ids)
        inputs = {**{name: _padded(array, padding) for name, array in inputs.items()}, **sampling}
        inputs["rows"] = np.array(rows + [self._slots.count] * padding, np.int64)
        inputs["start"] = np.array(start + start[:1] * padding, np.int64)
        try:
            named = {self.derived.port_names.get(name, name): array for name, array in inputs.items()}
            out = entry(self.states, **{self._ports.tokens: _padded(ids, padding)}, **named)
        except BaseException:
            for row in rows:
                self._rows[row].is_lost = self.derived.carries
            raise
        for row in rows:
            self._extend(self._rows[row], pieces[row])
        if how is not None:
            return np.asarray(out[self.derived.port_names[SAMPLED]])[: len(rows)]
        logits = np.asarray(out[self._ports.logits])[: len(rows)]
        return logits if draws is None else logits[:, 0]

    def _along(self, name: str, counts: Mapping[int, int], ids: Array) -> Array:
        """Return an input's values [b, s, ...] for the next tokens of each row, padded with zeros."""
        known = [self._rows[row] for row in counts]
        sizes = known[0].along[name].shape[1:]
        values = np.zeros((*ids.shape, *sizes), known[0].along[name].dtype)
        for n, (state, count) in enumerate(zip(known, counts.values(), strict=True)):
            values[n, :count] = self._inputs.next_values(name, state.along[name], len(state.tokens), count)
        return values

    def _extend(self, state: Row, tokens: Sequence[int]) -> None:
        """Append tokens to a row's text, with the values of the inputs along the sequence."""
        state.tokens.extend(tokens)
        for name, known in state.along.items():
            if (missing := len(state.tokens) - len(known)) > 0:
                new = self._inputs.next_values(name, known, len(known), missing)
                state.along[name] = np.concatenate([known, new])

    def _make_room(self, wanted: Mapping[int, int]) -> None:
        """Make room in rows for the given numbers of tokens. Raises UsageError for a full row that may not slide."""
        for row, count in wanted.items():
            if self._rows[row].length + count > self.capacity and (self.full == "error" or count > self.capacity // 2):
                raise UsageError(
                    f"the cache of row {row} is full",
                    received=f"{self._rows[row].length} of {self.capacity} positions filled, {count} more are needed",
                    hint=self._way_to_room(self._rows[row].length + count, count),
                )
        for row, count in wanted.items():
            if self._rows[row].length + count > self.capacity:
                self._slide(row)

    def _way_to_room(self, length: int, count: int) -> str:
        """Return the hint for a row without room for `count` tokens more, `length` in all: settings that differ from
        the session's.
        """
        half, context = self.capacity // 2, self.derived.context
        ways = [f"capacity={length} or more"] if context is None or length <= context else []
        slides = [] if self.full == "slide" else ["full='slide', which forgets the older half"]
        if half and (slides or count > half):
            ways.append(", with ".join([*slides, *[f"at most {half} tokens in a call"] * (count > half)]))
        return ", or ".join(ways) or f"a shorter text: the model takes {context} positions"

    def _slide(self, row: int) -> None:
        """Drop the older part of a row. The other tokens move to the positions from 0 on and are recomputed."""
        state = self._rows[row]
        kept = state.tokens[-(self.capacity // 2) :]
        forgotten = len(state.tokens) - len(kept)
        state.tokens, state.forgotten = state.tokens[:forgotten], forgotten
        try:
            for at in range(0, len(kept), self.chunk):
                self._append({row: kept[at : at + self.chunk]}, {})
        except BaseException:
            state.tokens, state.is_lost = [*state.tokens[:forgotten], *kept], True
            raise

    def _groups(self, pieces: Mapping[int, list[int]]) -> list[dict[int, list[int]]]:
        """Split pieces into groups that are appended in one call: pieces of one width for which every row has room."""
        groups: dict[int, dict[int, list[int]]] = {}
        for row, ids in pieces.items():
            width = _WIDTH * -(-len(ids) // _WIDTH)
            if self._rows[row].length + width > self.capacity:
                width = len(ids)
            groups.setdefault(min(width, self.chunk), {})[row] = ids
        return list(groups.values())

    def _append(self, pieces: Mapping[int, list[int]], draws: Mapping[int, TokenDraw]) -> dict[int, Array]:
        width = max(map(len, pieces.values()))
        padded = _WIDTH * -(-width // _WIDTH)
        if padded <= self.chunk and all(self._rows[row].length + padded <= self.capacity for row in pieces):
            width = padded
        ids = np.zeros((len(pieces), width), self._ports.dtype)
        for n, piece in enumerate(pieces.values()):
            ids[n, : len(piece)] = piece
        last = np.array([len(piece) - 1 for piece in pieces.values()], np.int64)
        found = self._run(self._prefill, pieces, ids, draws, last=last)
        return {row: found[n] for n, row in enumerate(pieces)}

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


def bucket(rows: int) -> int:
    """Return the number of rows of a call that is captured for its sizes: a power of two, or a multiple of 8."""
    return -(-rows // 8) * 8 if rows > 4 else (1, 2, 4, 4)[rows - 1]


def _padded(array: Array, count: int) -> Array:
    """Return an array [b, ...] with `count` more rows of zeros."""
    return np.concatenate([array, np.zeros((count, *array.shape[1:]), array.dtype)]) if count else array


def _ids(who: str, tokens: Sequence[int]) -> list[int]:
    """Return ids as Python integers. Raises UsageError for a value that is not an integer."""
    try:
        return [operator.index(token) for token in tokens]
    except TypeError as error:
        what = f"{who} has a value that is not a token id"
        raise UsageError(what, received=repr(tokens)[:200], hint=_ids_hint(tokens)) from error


def _ids_hint(value: Any) -> str:
    """Return the hint for a value that is not a list of token ids."""
    with suppress(TypeError):
        return f"a list of integers: [{operator.index(value)}]"
    if isinstance(value, Mapping) or not hasattr(value, "__iter__") or getattr(value, "ndim", 1) == 0:
        return "a list of integers, such as [4, 3]"
    if isinstance(value, str) or any(isinstance(each, str) for each in value):
        return 'the ids of a text: tokenizer.ids(["a text"])[0]'
    if len(value) == 1 and getattr(value[0], "ndim", 0) == 1 and "float" in str(value[0].dtype):
        return "int(logits.argmax()), if this is a row of logits"
    if any(isinstance(each, Sized) and getattr(each, "ndim", 1) for each in value):
        return "the ids of one row: tokens[0]; session.prefill appends several ids, session.step one"
    return "integers"
