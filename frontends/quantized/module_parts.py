"""The tensors of a quantized checkpoint, found by the module to which they belong; errors name the tensor and byte."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from treadle.files.shown_names import printable
from treadle.frontends.huggingface import Checkpoint
from treadle.frontends.mapped_tensors import TensorRecord
from treadle.ir.errors import CheckpointError
from treadle.ir.transforms.rounded_inputs import InputRounding, InputSteps

Array = np.ndarray[Any, Any]

SCALES = ("f16", "bf16", "f32")
"""Dtypes of scales."""
_LARGEST_SCALE = 1e35
"""Codes, and their differences from zeros, are below 1,000, and the largest float32 is 3e38."""


class ModuleParts:
    """The parts of quantized weights: `P.qweight` and `P.scales` are parts of module P.

    A part is taken when its entry is requested; the names of these tensors are then hidden from the model.

    roundings  the roundings of inputs that the settings ask for, by the names of weights
    steps      the tensors with the scale and the zero of static roundings, by the names of weights
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.roundings: dict[str, InputRounding] = {}
        self.steps: dict[str, tuple[str, str]] = {}
        self._taken: set[str] = set()

    @property
    def names(self) -> frozenset[str]:
        """The names of the tensors that are parts."""
        return frozenset(self._taken)

    def modules(self, part: str) -> Iterator[str]:
        """Yield the modules that have this part: ".qweight" yields h.0.attn for h.0.attn.qweight."""
        for name in self.checkpoint.names():
            if name.endswith(part) and len(name) > len(part):
                yield name.removesuffix(part)

    def has(self, name: str) -> bool:
        """Return True if the checkpoint has a tensor."""
        return name in self.checkpoint

    def take(self, name: str, dtypes: Sequence[str], shape: Sequence[int | None] | None = None) -> TensorRecord:
        """Return the entry of a part, and hide it. None in a shape is any size except 0.

        Raises CheckpointError if the tensor is missing, or has another dtype or shape.
        """
        if name not in self.checkpoint:
            what = f"a quantized weight lacks {printable(name)}"
            hint = "fetch the checkpoint again, or check that config.json belongs to it"
            raise CheckpointError(what, received=f"{len(self.checkpoint)} tensors", within=self.label, hint=hint)
        record = self.checkpoint.record(name)
        fits = shape is None or (
            len(shape) == len(record.shape)
            and all(size > 0 if n is None else n == size for n, size in zip(shape, record.shape, strict=True))
        )
        if record.dtype not in dtypes or not fits or 0 in record.shape:
            sizes = "" if shape is None else f"[{', '.join('n' if n is None else str(n) for n in shape)}]"
            raise self.error(
                name, "a part of a quantized weight does not fit", str(record), " or ".join(dtypes) + sizes
            )
        self._taken.add(name)
        return record

    def group(self, integers: TensorRecord, size: int, group: int) -> int:
        """Return the number of inputs in a group, for rows of `size`; -1 is a whole row. Raises CheckpointError if
        groups do not divide a row.
        """
        length = size if group == -1 else group
        if size % length:
            what = f"groups of {length} do not divide the {size} inputs"
            raise self.error(integers.name, what, str(integers), "check bits and group_size of the settings")
        return length

    def members(self, name: str, groups: int, group: int, unused: int | None = None) -> Array | None:
        """Return the group of each input, from a tensor i32[K]; None if they are in order, or all are `unused`. Raises
        CheckpointError for a group out of range.
        """
        members = self.array(name).astype(np.int64)
        if unused is not None and (members == unused).all():
            return None
        bad = (members < 0) | (members >= groups)
        if bad.any():
            at = int(bad.argmax())
            what = f"a group is out of range: there are {groups}"
            raise self.error(name, what, f"{members[at]} at [{at}]", element=at)
        return None if np.array_equal(members, np.arange(len(members)) // group) else members

    def codes(self, name: str) -> Array:
        """Return the bytes of a tensor of narrow floats or integers of 8 bits, u8 of its shape."""
        return self.checkpoint.raw(name).reshape(self.checkpoint.record(name).shape)

    def code_rows(self, name: str, rows: slice) -> Array:
        """Return a range of rows of `codes`."""
        return self.codes(name)[rows]

    def powers(self, name: str) -> Array:
        """Return scales that are stored as exponents of 8 bits, e8m0, as float32: 2^(s - 127), and NaN for 255. Raises
        CheckpointError as `scales` does.
        """
        codes = self.codes(name)
        with np.errstate(over="ignore"):
            made = np.ldexp(np.float32(1), codes.astype(np.int32) - 127).astype(np.float32)
        made[codes == 255] = np.nan
        return self.checked_scales(name, made)

    def hide(self, name: str) -> None:
        """Hide a tensor that changes no weight, if the checkpoint has it."""
        if name in self.checkpoint:
            self._taken.add(name)

    def input_steps(self, weight: str) -> InputSteps:
        """Return the scale and the zero of the static rounding of a weight's inputs. Raises CheckpointError if the
        checkpoint lacks the scale, if there are several, or if one is NaN, infinite or zero, and for a zero that is not
        an integer of 8 bits.
        """
        scale, zero = self.steps[weight]
        if np.prod(self.take(scale, SCALES).shape) != 1:
            raise self.error(scale, "inputs have one scale", str(self.checkpoint.record(scale)))
        number = float(self.scales(scale).reshape(()))
        if zero not in self.checkpoint:
            return InputSteps(number)
        if np.prod(self.take(zero, (*SCALES, "i8", "u8", "i32", "i64", "f8_e4m3")).shape) != 1:
            raise self.error(zero, "inputs have one zero", str(self.checkpoint.record(zero)))
        held = np.asarray(self.array(zero), np.float32).reshape(())
        moved = not self.roundings[weight].symmetric
        if not (held in range(-128, 128) if moved else held == 0):
            raise self.error(zero, "unsupported zero of inputs", f"{held}", "-128 to 127" if moved else "0: symmetric")
        return InputSteps(number, float(held))

    def scales(self, name: str) -> Array:
        """Return a tensor of scales as float32. Raises CheckpointError for a scale that is NaN, infinite or zero, or so
        large that weights may be infinite.
        """
        return self.checked_scales(name, np.asarray(self.checkpoint.array(name), np.float32))

    def checked_scales(self, name: str, scales: Array, *, zero: bool = False) -> Array:
        """Return scales that were read from a tensor. Raises CheckpointError as `scales` does; with `zero`, a scale of
        0 is accepted, as the largest magnitude of a block of zeros is.
        """
        bad = ~(np.abs(scales) <= _LARGEST_SCALE) | ((scales == 0) & (not zero))
        if bad.any():
            at = int(bad.reshape(-1).argmax())
            received = f"{scales.reshape(-1)[at]} at {[int(i) for i in np.unravel_index(at, scales.shape)]}"
            what = "a scale is NaN or infinite" if zero else "a scale is NaN, infinite or zero"
            if scales.reshape(-1)[at] != 0 and np.isfinite(scales.reshape(-1)[at]):
                what = f"a scale is larger than {_LARGEST_SCALE:.0e}, so weights may be infinite"
            raise self.error(name, what, received, element=at)
        return scales

    def array(self, name: str) -> Array:
        """Return a tensor as the file has it."""
        return self.checkpoint.array(name)

    @property
    def label(self) -> str:
        """The name, in errors, of the file that lists the tensors."""
        return self.checkpoint.label

    def error(
        self, name: str, what: str, received: str, hint: str | None = None, element: int | None = None
    ) -> CheckpointError:
        """Return an error at a tensor, or at one of its elements."""
        place = self.checkpoint.place(name, element or 0)
        return CheckpointError(what, received=received, within=place, hint=hint)
