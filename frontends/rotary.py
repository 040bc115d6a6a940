"""Frequencies of rotary positions, in radians per position for each pair of a head's dimensions, and their scalings.

    frequencies = t.rotary_frequencies(64, base=10000.0)                       # constants: base ** (-2 i / dims)
    frequencies = t.rotary_frequencies(64, scaling=Dynamic(2.0, 2048), length=t.size_of(tokens, 1))
    q = t.rotary(q, t.positions(tokens), frequencies)

docs/decisions/0003-rotary-frequencies.md explains why frequencies are an operand of the op.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from treadle.frontends.dsl import Tensor, trace
from treadle.ir.errors import FrontendError
from treadle.ir.sizing.sizes import Size, SizeLike
from treadle.ir.source_lines import user_line
from treadle.ir.types import f32

Frequencies = npt.NDArray[np.float64]

_MOST_DIMS = 1 << 16  # known heads have up to 576 dimensions; a config.json may hold any number


@dataclass(frozen=True)
class LinearScaling:
    """frequency / factor: a context `factor` times as long is compressed into the old range     (Chen et al. 2023)"""

    factor: float

    def apply(self, frequencies: Frequencies) -> Frequencies:
        """Return the scaled frequencies."""
        scaled: Frequencies = frequencies / self.factor
        return scaled


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's scaling: long waves are slowed by `factor`, short waves are kept, those between are interpolated
    (Grattafiori et al. 2024)

    A wave is long past context / low_freq_factor positions, and short below context / high_freq_factor.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    context: int

    def apply(self, frequencies: Frequencies) -> Frequencies:
        """Return the scaled frequencies."""
        turns = self.context * frequencies / (2 * math.pi)
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
        scaled: Frequencies = kept * frequencies + (1 - kept) * frequencies / self.factor
        return scaled


@dataclass(frozen=True)
class Divided:
    """frequency i / factors[i]: factors that a file lists, such as the tensor rope_freqs of a GGUF file"""

    factors: tuple[float, ...]

    def apply(self, frequencies: Frequencies) -> Frequencies:
        """Return the scaled frequencies. Raises FrontendError if the number of factors differs."""
        if len(self.factors) != len(frequencies):
            raise FrontendError(f"{len(self.factors)} factors for {len(frequencies)} rotary frequencies")
        scaled: Frequencies = frequencies / np.array(self.factors)
        return scaled


@dataclass(frozen=True)
class Dynamic:
    """A base that grows with the sequence's length past the context: Hugging Face's "dynamic" (NTK)

    base' = base (factor length / context - factor + 1) ** (dims / (dims - 2)) for length > context. The graph computes
    the frequencies from the length, so each call has its own frequencies, and such a model has no step. If the sequence
    is bounded by the context, the frequencies are constants, and the model has a step.
    """

    factor: float
    context: int


@dataclass(frozen=True)
class Yarn:
    """frequency / factor for pairs that turn rarely within the context; others are kept   (Peng et al. 2023)

    Pairs that turn more than `fast` times in the context are kept. Pairs that turn less than `slow` times are divided.
    Between these two pairs, the scaling is interpolated linearly in the pair's index i. `truncate` rounds both indices
    outwards. Scores are multiplied by temperature ** 2, so that attention stays as sharp with more keys.
    """

    factor: float
    context: int
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True
    temperature: float = 1.0

    def apply(self, frequencies: Frequencies) -> Frequencies:
        """Return the scaled frequencies. Raises FrontendError for a single frequency, which does not determine the
        base, and for a base of 1.
        """
        half = len(frequencies)
        if half == 1 or frequencies[1] == 1.0:
            raise FrontendError("yarn scaling needs more than one rotary frequency, and a base that is not 1")
        # frequencies are base ** (-i / half), and a wave of frequency w turns context w / 2 pi times
        step = -math.log(frequencies[1])
        low, high = (math.log(self.context / (turns * 2 * math.pi)) / step for turns in (self.fast, self.slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        slowed = np.clip((np.arange(half) - low) / ((high - low) or 1e-3), 0.0, 1.0)
        scaled: Frequencies = frequencies * (1 - slowed) + frequencies / self.factor * slowed
        return scaled


@dataclass(frozen=True)
class LongRope:
    """frequency i / short[i], or, if a sequence is longer than the context, frequency i / long[i] (Ding et al. 2024)

    Scores are multiplied by temperature ** 2, as by `Yarn`. Every call chooses by its length, so such a model has no
    step: the cached keys of a text that grows past the context would have to be rotated again. If the sequence is
    bounded by the context, the frequencies are constants, and the model has a step.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    context: int
    temperature: float = 1.0


Scaling = LinearScaling | Llama3 | Divided | Dynamic | Yarn | LongRope


def rotary_frequencies(
    dims: int, *, base: float = 10000.0, scaling: Scaling | None = None, length: SizeLike | None = None
) -> Tensor:
    """Frequencies f32[dims / 2] in radians per position: base ** (-2 i / dims), scaled        (Su et al. 2021, 3.2.2)

    scaling is an object of this module, such as `Yarn`; None: the frequencies are not scaled. length is the sequence's
    length, which `Dynamic` and `LongRope` need. Raises FrontendError for an odd number of
    dims, for a base that is not positive, and if one of these two scalings has no length.
    """
    if not 2 <= dims <= _MOST_DIMS or dims % 2:
        raise _misfit(f"rotary positions need an even number of dimensions from 2 to {_MOST_DIMS}", f"{dims}")
    if not 0 < base < math.inf:
        raise _misfit("the base of rotary positions must be positive and finite", f"{base}")
    b = trace()
    exponents = -np.arange(0, dims, 2) / dims
    frequencies = base**exponents
    if isinstance(scaling, LongRope):
        return _chosen(frequencies, scaling, length)
    if isinstance(scaling, Dynamic) and length is not None and _within(length, scaling.context):
        scaling = None
    if not isinstance(scaling, Dynamic):
        return b.constant((frequencies if scaling is None else scaling.apply(frequencies)).astype(np.float32), f32)
    if length is None or dims == 2:
        raise _misfit("dynamic scaling needs the sequence's length, and more than 2 dims", f"length {length}")
    longest = b.maximum(b.size(value=length, dtype=f32), float(scaling.context))
    growth = longest * (scaling.factor / scaling.context) - (scaling.factor - 1)
    slowed = b.pow(growth, b.constant((exponents * dims / (dims - 2)).astype(np.float32), f32))
    made = b.mul(slowed, b.constant(frequencies.astype(np.float32), f32), name="frequencies")
    assert isinstance(made, Tensor)
    return made


def _chosen(frequencies: Frequencies, scaling: LongRope, length: SizeLike | None) -> Tensor:
    """Return the short frequencies, or the long ones if the sequence is longer than the context."""
    b = trace()
    if length is None:
        raise _misfit("longrope scaling needs the sequence's length", f"length {length}")
    short, long = (
        b.constant(Divided(factors).apply(frequencies).astype(np.float32), f32)
        for factors in (scaling.short, scaling.long)
    )
    if _within(length, scaling.context):
        return short
    is_long = b.greater(b.size(value=Size.of(length)), scaling.context)
    made = b.where(is_long, long, short, name="frequencies")
    assert isinstance(made, Tensor)
    return made


def _within(length: SizeLike, context: int) -> bool:
    """Return True if a sequence can be no longer than the context."""
    upper = Size.of(length).bounds(trace().graph.symbols).upper
    return upper is not None and upper <= context


def temperature_of(scaling: Scaling | None) -> float:
    """Return the temperature of a scaling, by which the rotated dimensions of queries and keys are multiplied."""
    return scaling.temperature if isinstance(scaling, Yarn | LongRope) else 1.0


def _misfit(what: str, received: str) -> FrontendError:
    return FrontendError(what, received=received, source=str(user_line() or "") or None)
