"""The hint for an input with a size that is fixed where the model was declared or imported: a name takes any size."""

from __future__ import annotations

from treadle.ir.errors import Hint


def named_sizes_hint(name: str, dtype: object, axes: str) -> Hint:
    """Return the hint for an input that should have names of sizes.

    axes  its axes with these names: "B S"
    """
    names = f'names of the sizes, as "{axes}":'
    return Hint(
        f'{names} {name}: t.{dtype}["{axes}"] in a declaration, dynamic={{"{name}": "{axes}"}} in from_torch, dynamic '
        "axes in the export of an ONNX file",
        f"{names} in the declaration of {name}, or as dynamic axes in the export of an ONNX file",
    )
