"""Views by strides, compared with NumPy: the offsets of elements, and that a view exists exactly if NumPy needs no
copy.
"""

from __future__ import annotations

from itertools import permutations
from random import Random

import numpy as np
import pytest

from treadle.ir.layouts import panels
from treadle.ir.sizing.sizes import ONE, ZERO, Size
from treadle.ir.storage.views import Storage, StorageKind, View, row_major
from treadle.ir.types import f32

S = Size.symbol("S")


def sizes(*numbers: int) -> tuple[Size, ...]:
    return tuple(map(Size.of, numbers))


def whole(*shape: int) -> tuple[View, np.ndarray]:
    """Return a storage as a view, and an array with the offset of each element."""
    count = int(np.prod(shape))
    storage = Storage("x", f32, Size.of(count), StorageKind.LOCAL)
    return View.contiguous(storage, sizes(*shape)), np.arange(count).reshape(shape)


def same(view: View | None, array: np.ndarray) -> bool:
    """Return True if each element of a view has the offset that the array holds."""
    if view is None or tuple(n.evaluate({}) for n in view.shape) != array.shape:
        return False
    places = np.full(array.shape, view.offset.evaluate({}))
    for axis, stride in enumerate(view.strides):
        along = np.arange(array.shape[axis]) * stride.evaluate({})
        places = places + along.reshape([-1] + [1] * (array.ndim - 1 - axis))
    return np.array_equal(places, array)


def shapes_of(count: int) -> list[tuple[int, ...]]:
    two = [(a, count // a) for a in range(1, count + 1) if count % a == 0]
    return [(count,), *two, *[(a, c, b // c) for a, b in two for c in range(1, b + 1) if b % c == 0]]


@pytest.mark.parametrize("seed", range(12))
def test_another_shape_is_a_view_where_numpy_needs_no_copy(seed: int) -> None:
    r = Random(seed)
    view, array = whole(2, 3, r.choice((1, 4)), 2)
    order = r.choice(list(permutations(range(4))))
    view, array = view.permuted(order), array.transpose(order)
    axis = r.randrange(4)
    start, step = r.randrange(array.shape[axis]), r.choice((1, 2))
    array = np.moveaxis(np.moveaxis(array, axis, 0)[start::step], 0, axis)
    view = view.sliced(axis, Size.of(start), Size.of(array.shape[axis]), Size.of(step))
    assert same(view, array)
    for shape in shapes_of(array.size):
        wanted, found = array.reshape(shape), view.reshaped(sizes(*shape))
        assert (found is not None) == np.shares_memory(wanted, array), (array.shape, array.strides, shape)
        assert found is None or same(found, wanted)


def test_dimensions_are_split_and_merged() -> None:
    view, array = whole(6, 4)
    split = view.split(0, sizes(2, 3))
    assert same(split, array.reshape(2, 3, 4)) and split.is_contiguous
    assert same(split.merged(0, 2), array) and same(split.merged(1, 2), array.reshape(2, 12))
    turned = split.permuted((1, 0, 2))
    assert same(turned, array.reshape(2, 3, 4).transpose(1, 0, 2))
    assert turned.merged(0, 2) is None and turned.merged(1, 2) is None
    assert same(turned.merged(0, 1), array.reshape(2, 3, 4).transpose(1, 0, 2))
    assert same(view.merged(1, 0), array.reshape(6, 1, 4)), "a dimension of 1 more"
    single, places = whole(1, 5)
    assert same(single.split(0, ()), places[0]), "a dimension of 1 less"
    assert same(single.permuted((1, 0)).merged(0, 2), places.reshape(5)), "whatever stride a dimension of 1 has"


def test_a_view_is_repeated_as_numpy_broadcasts() -> None:
    view, array = whole(3, 1)
    assert same(view.broadcast(sizes(2, 3, 4)), np.broadcast_to(array, (2, 3, 4)))
    assert same(view.broadcast(sizes(3, 1)), array)
    assert view.broadcast(sizes(2, 3, 4)).strides == (ZERO, ONE, ZERO)


def test_contiguous_views_and_equal_views() -> None:
    view, _ = whole(1, 4, 3)
    other = View(view.storage, view.shape, (Size.of(7), *view.strides[1:]), view.offset)
    assert view.is_contiguous and other.is_contiguous and view.lies_as(other) and other.lies_as(view)
    later = view.sliced(1, ONE, Size.of(3))
    assert later.is_contiguous and later.offset == 3 and not later.lies_as(view)
    assert not view.permuted((0, 2, 1)).is_contiguous and not view.sliced(1, ZERO, Size.of(2), Size.of(2)).is_contiguous
    elsewhere = View(Storage("y", f32, Size.of(12), StorageKind.LOCAL), view.shape, view.strides)
    assert not elsewhere.lies_as(view)
    moved = View(view.storage, view.shape, (ONE, ONE, Size.of(4)), view.offset)
    assert not moved.lies_as(view)
    assert view.rank == 3 and view.dtype is f32


def test_a_matrix_in_panels_has_no_other_shape() -> None:
    storage = Storage("w", f32, Size.of(128), StorageKind.LOCAL, panels(16))
    view = View.contiguous(storage, sizes(16, 8))
    assert not view.is_contiguous and view.reshaped(sizes(128)) is None and view.panels == panels(16)


def test_sizes_of_symbols() -> None:
    storage = Storage("x", f32, 12 * S, StorageKind.LOCAL)
    view = View.contiguous(storage, (S, Size.of(3), Size.of(4)))
    assert view.strides == row_major((S, Size.of(3), Size.of(4))) == sizes(12, 4, 1)
    merged = view.reshaped((3 * S, Size.of(4)))
    assert merged is not None and merged.strides == sizes(4, 1)
    turned = view.permuted((1, 0, 2))
    assert turned.reshaped((3 * S, Size.of(4))) is None and turned.reshaped((S, Size.of(12))) is None
    halves = turned.reshaped((Size.of(3), S, Size.of(2), Size.of(2)))
    assert halves is not None and halves.strides == sizes(4, 12, 2, 1)
    assert storage.nbytes == 48 * S
    assert [kind.value for kind in StorageKind if kind.is_own] == ["local", "foreign"]
