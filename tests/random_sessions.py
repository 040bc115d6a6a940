"""Random sessions with random models and caches: rows open, grow, fork, resume, slide and close.

    played = play(seed, "numpy", sessions=4)      # raises AssertionError if logits differ from the whole text's

A session's logits are compared with the logits of one run of the same compiled model over the whole text. The
difference may not exceed the effect of roundings on this model's logits at that token (`treadle.runtime.roundings`):
roundings of every op, of keys and values if caches are in 16 bits, and of activations that are rounded for weights in
blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np

import treadle as t
from tests.random_steps import VOCABULARY, drawn_model
from tests.support.gpu_emulator.emulator_runtime import emulated, runtime_of
from treadle.backends.registry import find_backend
from treadle.compiled import Compiled
from treadle.ir.analysis.tolerances import room, spacing_of
from treadle.ir.graph import Node
from treadle.ir.interpreter import interpret
from treadle.ir.ops.blocks import Decode, Encode
from treadle.ir.target import Target
from treadle.ir.types import DTYPES, f32
from treadle.runtime.roundings import Moved, changed, moved_by_rounding
from treadle.runtime.session import Session
from treadle.runtime.slots import LEAST

Array = np.ndarray[Any, Any]
CONTEXT = 320
MEMORY = 9
RINGS = (1, 4, 16, 128)
"""The capacity of a ring is a multiple of one of these numbers; outside of tests it is 128, with which few rows are
long enough to wrap.
"""
DRAWS, THOROUGH = 2, 24
ROUNDING = ("int8", "int4-int8")
SCHEMES = ("int8-weights", "int4", *ROUNDING)


@dataclass(frozen=True)
class Chosen:
    """The drawn options of a model: shared blocks, compile options, and the dtype of its caches."""

    shared: bool
    compiled: Mapping[str, Any]
    cache: str | None

    def __str__(self) -> str:
        report = {"shared": self.shared, **self.compiled, "cache": self.cache}
        return ", ".join(f"{name}={value}" for name, value in report.items() if value)


@dataclass
class Text:
    """An open row: its slot, its known tokens, and the index of its other inputs in the session."""

    row: int
    tokens: list[int]
    inputs: int


@dataclass
class Played:
    """The record of all sessions of a model.

    chosen      the model's options
    sessions    the sizes of each session
    events      the number of moves of each kind
    checked     the number of compared logits
    overflowed  the number of logits not compared: a value of the whole text is infinite or NaN, or overflows in f16
    sharp       the number of compared logits whose tolerance is below a tenth of the largest logit
    worst       the largest difference, as a fraction of the tolerance
    """

    chosen: Chosen
    sessions: list[Mapping[str, Any]] = field(default_factory=list)
    events: dict[str, int] = field(default_factory=dict)
    checked: int = 0
    overflowed: int = 0
    sharp: int = 0
    worst: float = 0.0


def drawn_choice(rng: np.random.Generator, backend: str, seed: int) -> Chosen:
    """Draw options. Of ten models, one has shared blocks and quantization, two have only shared blocks, and two only
    quantization.
    """
    shared, quantized = seed % 10 in (0, 1, 2), seed % 10 in (0, 3, 4)
    compiled: dict[str, Any] = {"quantize": str(rng.choice(SCHEMES))} if quantized else {}
    if not quantized and backend != "numpy" and rng.random() < 0.15:
        compiled["dtype"] = "bf16"
    caches = [None, None, "f16"] if backend == "numpy" else [None, None, "f16", "bf16"]
    return Chosen(shared, compiled, caches[int(rng.integers(len(caches)))])


def drawn_sizes(rng: np.random.Generator) -> dict[str, Any]:
    """Draw a session's sizes."""
    return {
        "rows": int(rng.integers(1, 6)),
        "capacity": int(rng.choice([24, 40, 100, 200])),
        "chunk": int(rng.choice([4, 16, 33, 64])),
        "full": "slide" if rng.random() < 0.3 else "error",
    }


def play(seed: int, backend: str, *, sessions: int = 1, moves: int = 24) -> Played:
    """Draw a model and sessions with it, make `moves` moves in each session, and compare all logits.

    backend  name of a backend, or `emulator`: the tvm backend with states on an emulated device

    Raises AssertionError if logits differ by more than roundings explain, or are not finite although the whole text's
    are.
    """
    rng = np.random.default_rng(seed)
    chosen = drawn_choice(rng, backend, seed)
    model = drawn_model(rng, context=CONTEXT, shared=chosen.shared, wide="quantize" in chosen.compiled)
    weights = {
        name: (rng.standard_normal(size) * min(0.4, 1.2 / size[-1] ** 0.5)).astype(np.float32)
        for name, size in ((n, v.type.evaluate({})) for n, v in model.graph().parameters.items())
    }
    target = Target("cpu") if backend == "numpy" else Target("cpu", threads=1)
    if backend == "emulator":
        exe = t.compile(model, backend="tvm", weights=weights, target="cuda", **chosen.compiled)
        runtime = runtime_of(emulated(exe))
        emulated(exe._stepped_with(chosen.cache), runtime)
    else:
        exe = t.compile(model, backend=backend, weights=weights, target=target, **chosen.compiled)
    game = _Game(exe, chosen, rng)
    for _ in range(sessions):
        game.begin()
        for _ in range(moves):
            game.move()
    game.compare()
    return game.played


class _Game:
    """The sessions of a model, run one after the other."""

    session: Session
    rows: list[Text]
    closed: list[tuple[list[int], int]]

    def __init__(self, exe: Compiled, chosen: Chosen, rng: np.random.Generator) -> None:
        self.exe, self.rng, self.played = exe, rng, Played(chosen)
        self.stepped = exe._stepped_with(chosen.cache)
        self.brought = [self._drawn_inputs() for _ in range(3)] if self.stepped.derived.has_prologue else [{}]
        self.seen: list[tuple[int, tuple[int, ...], Array]] = []

    def begin(self) -> None:
        """Open another session."""
        sizes, derived = drawn_sizes(self.rng), self.stepped.derived
        memory = dict.fromkeys(derived.memories.values(), MEMORY)
        with patch("treadle.runtime.session._RING", int(self.rng.choice(RINGS))):
            self.session = self.stepped.session(**sizes, memory=memory, resumes=True)
        self.rows, self.closed = [], []
        self.played.sessions.append(sizes)

    def _drawn_inputs(self) -> dict[str, Array]:
        """Draw a row's inputs other than tokens."""
        made: dict[str, Array] = {}
        length = int(self.rng.integers(2, MEMORY + 1))
        for value in self.exe.graph.main.inputs:
            if value.name == "source":
                made["source"] = self.rng.integers(0, VOCABULARY, length)
            elif value.name == "lengths":
                made["lengths"] = np.asarray(self.rng.integers(1, length + 1))
            elif value.name == "picture":
                made["picture"] = self.rng.standard_normal(6).astype(np.float32)
        return made

    # -- moves ---------------------------------------------------------------------------------------------------

    def move(self) -> None:
        """Make a random move out of those that are possible."""
        possible: list[tuple[Callable[[], None], float]] = []
        if self.session.free:
            possible += [(self._open, 2 if self.rows else 9), (self._resume, 6 if self.closed else 0)]
            possible += [(self._fork, 1.5 if self.rows else 0)]
        if self._some(1):
            possible += [(self._prefill, 4), (self._steps, 4), (self._verify, 2)]
        if self.rows:
            possible += [(self._close, 2.5)]
        odds = np.array([weight for _, weight in possible])
        action = possible[int(self.rng.choice(len(possible), p=odds / odds.sum()))][0]
        name = action.__name__.removeprefix("_")
        self.played.events[name] = self.played.events.get(name, 0) + 1
        action()

    def _tokens(self, count: int) -> list[int]:
        return [int(token) for token in self.rng.integers(0, VOCABULARY, count)]

    def _room(self, text: Text, most: int) -> int:
        """Return the number of tokens that can be appended to a row, at most `most`. A sliding row takes at most half
        of its capacity at once.
        """
        if self.session.full == "slide":
            return min(most, self.session.capacity // 2)
        return min(most, self.session.capacity - self.session.length(text.row))

    def _some(self, least: int) -> list[Text]:
        """Return some of the rows that have room for `least` tokens."""
        open_rows = [text for text in self.rows if self._room(text, least) >= least]
        count = int(self.rng.integers(1, len(open_rows) + 1)) if open_rows else 0
        return [open_rows[i] for i in self.rng.permutation(len(open_rows))[:count]]

    def _grown(self, text: Text, new: Sequence[int], logits: Array) -> None:
        """Record a row's new tokens, and the logits after them."""
        text.tokens += new
        known = self.session.length(text.row)
        assert self.session.tokens(text.row)[-known:] == tuple(text.tokens[-known:])
        text.tokens = text.tokens[-known:]  # a row that slid has dropped the others
        self.seen.append((text.inputs, tuple(text.tokens), np.array(logits)))

    def _open(self) -> None:
        inputs = int(self.rng.integers(len(self.brought)))
        text = Text(self.session.open(**self.brought[inputs]), [], inputs)
        self.rows.append(text)
        new = self._tokens(max(1, self._room(text, int(self.rng.integers(1, 60)))))
        self._grown(text, new, self.session.prefill({text.row: new})[text.row])

    def _resume(self) -> None:
        """Resume a closed text: all its tokens, or a prefix of them, followed by other tokens."""
        enough = [text for text in self.closed if len(text[0]) > LEAST] or self.closed
        before, inputs = enough[int(self.rng.integers(len(enough)))]
        kept = before if self.rng.random() < 0.5 else before[: int(self.rng.integers(1, len(before) + 1))]
        tokens = [*kept, *self._tokens(int(self.rng.integers(1, 8)))][: self.session.capacity]
        row = self.session.resume(tokens, **self.brought[inputs])
        held = self.session.length(row)
        self.played.events["held"] = self.played.events.get("held", 0) + (held > 0)
        text = Text(row, tokens[:held], inputs)
        self.rows.append(text)
        self._grown(text, tokens[held:], self.session.prefill({row: tokens[held:]})[row])

    def _fork(self) -> None:
        source = self.rows[int(self.rng.integers(len(self.rows)))]
        self.rows.append(Text(self.session.fork(source.row), list(source.tokens), source.inputs))

    def _prefill(self) -> None:
        some = self._some(1)
        most = int(self.rng.choice([3, 20, 70]))
        new = {text.row: self._tokens(self._room(text, int(self.rng.integers(1, most)))) for text in some}
        logits = self.session.prefill(new)
        for text in some:
            self._grown(text, new[text.row], logits[text.row])

    def _steps(self) -> None:
        for _ in range(int(self.rng.integers(1, 10))):
            some = self._some(1)
            new = {text.row: self._tokens(1)[0] for text in some}
            logits = self.session.step(new)
            for text in some:
                self._grown(text, [new[text.row]], logits[text.row])

    def _verify(self) -> None:
        if self.stepped.derived.carries:
            return
        count = int(self.rng.integers(1, min(5, self.session.chunk) + 1))
        fitting = [x for x in self.rows if self.session.length(x.row) + count <= self.session.capacity]
        if not fitting:
            return
        text = fitting[int(self.rng.integers(len(fitting)))]
        new = self._tokens(count)
        for n, logits in enumerate(self.session.verify(text.row, new), 1):
            self.seen.append((text.inputs, (*text.tokens, *new[:n]), np.array(logits)))
        right = new[: int(self.rng.integers(count + 1))]
        self.session.accept(text.row, right)
        text.tokens += right

    def _close(self) -> None:
        text = self.rows.pop(int(self.rng.integers(len(self.rows))))
        keep = bool(self.rng.random() < 0.8)
        if keep and self.session.resumes:
            self.closed.append((text.tokens, text.inputs))
        self.session.close(text.row, keep=keep)

    # -- the whole texts -----------------------------------------------------------------------------------------

    def compare(self) -> None:
        """Compare all logits with the logits of the whole texts."""
        for number, brought in enumerate(self.brought):
            seen = [(tokens, logits) for inputs, tokens, logits in self.seen if inputs == number]
            if seen:
                self._compare(brought, seen)

    def _compare(self, brought: Mapping[str, Array], seen: Sequence[tuple[tuple[int, ...], Array]]) -> None:
        texts: list[tuple[int, ...]] = []
        # a text that is a prefix of another needs no run of its own
        for tokens in sorted({tokens for tokens, _ in seen}):
            if texts and tokens[: len(texts[-1])] == texts[-1]:
                texts.pop()
            texts.append(tokens)
        given = {name: np.repeat(x[None], len(texts), axis=0) for name, x in brought.items()}
        ids = np.zeros((len(texts), max(map(len, texts))), np.int64)
        for row, tokens in zip(ids, texts, strict=True):
            row[: len(tokens)] = tokens
        (name,) = (port.name for port in self.exe.outputs)
        whole = np.asarray(self.exe(tokens=ids, **given)[name]).astype(np.float64)
        thorough = False
        given["tokens"] = ids
        moved = self._moved(given, name, DRAWS)
        for tokens, logits in seen:
            n = next(n for n, text in enumerate(texts) if text[: len(tokens)] == tokens)
            wanted, at = whole[n, len(tokens) - 1], len(tokens) - 1
            # A value that overflows in the run over the whole text affects earlier tokens, as 0 times infinity; f16
            # overflows sooner.
            if not np.isfinite(whole[n]).all() or not np.isfinite(moved.by[n, at]).all():
                self.played.overflowed += 1
                continue
            apart, size = float(np.abs(logits - wanted).max()), max(float(np.abs(wanted).max()), 1e-30)
            allowed = room(spacing_of(f32), size, float(moved.by[n, at].max()))
            if not apart <= allowed and not thorough:  # a quotient of nearly 0 changes much in few of the draws
                moved, thorough = self._moved(given, name, THOROUGH), True
                allowed = room(spacing_of(f32), size, float(moved.by[n, at].max()))
            off = apart / allowed
            self.played.sharp += allowed < 0.1 * size
            self.played.checked += 1
            self.played.worst = max(self.played.worst, off)
            assert off <= 1, f"{self.played}\nafter {len(tokens)} tokens, {off:.3g} times too far off"

    def _moved(self, inputs: Mapping[str, Array], name: str, draws: int) -> Moved:
        """Return the largest effect of roundings on the logits, over this number of draws."""
        exe = self.exe
        exact = interpret(exe.graph, inputs, exe.weights, float64=True)
        plain = moved_by_rounding(exe.graph, inputs, exe.weights, exact, draws)[name]
        if self.played.chosen.cache is None and self.played.chosen.compiled.get("quantize") not in ROUNDING:
            return plain
        coarse = [
            interpret(exe.graph, inputs, exe.weights, float64=True, disturb=self._coarsely(np.random.default_rng(n)))
            for n in range(draws)
        ]
        more = Moved.between(exact[name], [each[name] for each in coarse])
        return Moved(np.maximum(plain.by, more.by), more.undecided)

    def _coarsely(self, rng: np.random.Generator) -> Callable[..., list[Array]]:
        """Round keys and values as the cache does. Of the numbers rounded to blocks, move a fiftieth to a neighbouring
        step.

        Numbers rounded to blocks are equal in both runs, except that roundings of f32 move a few numbers across the
        middle between two steps.
        """
        cache = self.played.chosen.cache
        spacing = spacing_of(DTYPES[cache]) if cache else 0.0
        most = float(np.finfo(np.float16).max) if cache == "f16" else np.inf

        def disturb(node: Node, operands: Sequence[Array | None], compute: Callable[..., list[Array]]) -> list[Array]:
            given = list(operands)
            names = node.op.operand_names(len(operands))
            if node.op.pairs is not None:
                given = [
                    np.where(np.abs(x) <= most, changed(x, spacing, rng), np.inf) if x is not None and n in "kv" else x
                    for n, x in zip(names, given, strict=True)
                ]
            made = compute(given)
            (source, *_) = node.inputs or (None,)
            if (
                isinstance(node.op, Decode)
                and source is not None
                and source.node
                and isinstance(source.node.op, Encode)
            ):
                step = node.op.of.block.spacing
                flips = [rng.choice([-1, 0, 1], x.shape, p=[0.01, 0.98, 0.01]) for x in made]
                made = [x + step * np.abs(x).max(-1, keepdims=True) * f for x, f in zip(made, flips, strict=True)]
            return made

        return disturb


def backends() -> list[str]:
    """Return our backends that are installed."""
    return [name for name in ("numpy", "torch", "tvm") if find_backend(name).available() is None]
