"""Parts that vision-language models share: image features among the embeddings of tokens, rotations by several
positions, and checkpoint tables that are composed of the parts' tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

import treadle.frontends.language as t
from treadle.frontends.binding import Entry, Source, Table, Tied
from treadle.ir.types import f32


def insert_features(x: t.Tensor, features: t.Tensor, index: t.Tensor) -> t.Tensor:
    """Return embeddings x [B, S, D] with image features [B, M, D] in place of those of image tokens.

    index  i64[B, S]: 0 for a text token; 1 + m for a token that stands for feature m of its row
    """
    batch, _, dim = x.shape
    rows = t.concat(t.expand(t.constant(0.0), shape=(batch, 1, dim)), features, axis=1)  # row 0 is never read
    index = t.rearrange(index, pattern="b s -> b s 1")
    found = t.take_along_axis(rows, t.expand(index, shape=(None, None, dim)), axis=1)
    return t.where(t.equal(index, 0), x, found)


def each_image(pixels: t.Tensor) -> t.Tensor:
    """Return the images [B, N, C, H, W] of all rows as one batch [B N, C, H, W]."""
    return t.rearrange(pixels, pattern="b n c h w -> (b n) c h w")


def by_row(x: t.Tensor, pixels: t.Tensor) -> t.Tensor:
    """Return features [B N, P, D] of the images of all rows as [B, N P, D]; `pixels` [B, N, ...] are the images."""
    rows, images = pixels.shape[:2]  # both: of no images, rows cannot be inferred
    return t.rearrange(x, pattern=f"(b={rows} n={images}) p d -> b (n p) d")


def angles(positions: t.Tensor, frequencies: npt.NDArray[np.floating]) -> t.Tensor:
    """Return the angles [B, S, F] of a rotation by K positions per token: the sum over k of positions[b, s, k] *
    frequencies[k, f]. With one nonzero frequency in each column, a pair of dimensions turns by one of the positions.
    """
    table = t.constant(frequencies.astype(np.float32), f32)
    return t.einsum(positions.cast(f32), table, equation="b s k, k f -> b s f")


def rotation(by: t.Tensor) -> Callable[[t.Tensor], t.Tensor]:
    """Return a function that rotates x [B, heads, S, 2 F] by the angles [B, S, F]: the pairs are (i, i + F)."""
    cos, sin = (t.rearrange(turn, pattern="b s f -> b 1 s f") for turn in (t.cos(by), t.sin(by)))

    def rotate(x: t.Tensor) -> t.Tensor:
        half = (x.shape[3].constant or 0) // 2
        first, second = t.slice(x, axis=3, stop=half), t.slice(x, axis=3, start=half)
        return t.concat(first * cos - second * sin, second * cos + first * sin, axis=3)

    return rotate


def table_under(scope: str, table: Table, names: Callable[[str], Sequence[str]]) -> dict[str, Entry]:
    """Return the table of a part for a model that calls the part under a scope.

    names  the possible names in the whole model's checkpoint of a tensor of the part's checkpoint
    """
    return {f"{scope}.{ours}": _renamed(entry, names) for ours, entry in table.items()}


def _renamed(entry: Entry, names: Callable[[str], Sequence[str]]) -> Entry:
    if isinstance(entry, Tied):
        return Tied([name for each in entry for name in names(each)])
    found: list[str | Source] = []
    for each in (entry,) if isinstance(entry, str | Source) else entry:
        if isinstance(each, Source):
            found += [replace(each, name=name) for name in names(each.name)]
        else:
            found += names(each)
    return tuple(found)
