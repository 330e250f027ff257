"""Rows and columns: how the elements of an array number the words."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from jdrop._random.threefry import U64, WORD, ZERO

MIN_COLUMNS = 128  # the key of a row serves at least this many elements, if the array has them


class Strides(NamedTuple):
    """How the elements of an array number the words: ``row = sum(i * row_strides)``, likewise ``col``.

    With ``long``, the only column axis exceeds 2**32: ``col`` is the low word of its index, and the high word is added
    to ``row``.
    """

    row_strides: tuple[Any, ...]
    col_strides: tuple[int, ...]
    long: bool
    num_rows: Any


def strides(shape: Sequence[Any], *, columns: bool = True) -> Strides:
    """Split the axes of a shape into rows and columns.

    The columns are the shortest suffix of axes with at least 128 elements (or all axes); an axis joins only while the
    columns stay within 2**32. With ``columns=False`` all axes are rows, and the row is the flat index.

    Sizes of row axes may be symbolic (``jax.export``). So may the size of the first axis, on which no stride depends:
    as a column axis, it is assumed to keep the whole array within 2**32.

    Raises:
      TypeError: a column axis other than the first has a symbolic size.
    """
    first, width = len(shape), 1
    while columns and first and width < MIN_COLUMNS:
        size = shape[first - 1]
        if not isinstance(size, int):
            if first > 1:
                raise TypeError(f"the sizes of column axes must be static, got shape {tuple(shape)}")
            first = 0
            break
        if width * size > WORD and width > 1:
            break
        first, width = first - 1, width * size
    long = width > WORD
    high_words = -(-width // WORD) if long else 1
    return Strides(
        row_strides=tuple(math.prod(shape[k + 1 : first], start=high_words) for k in range(first)),
        col_strides=tuple(math.prod(shape[k + 1 :]) for k in range(first, len(shape))),
        long=long,
        num_rows=math.prod(shape[:first], start=high_words),
    )


def row_and_column(shape: Sequence[Any], index: Sequence[U64], *, columns: bool = True) -> tuple[U64, Array]:
    """Return the row and the column of the elements at an index.

    Args:
      shape: shape of the whole array.
      index: the index along each axis of the array: arrays of one rank that broadcast.
      columns: as for :func:`strides`.
    """
    steps = strides(shape, columns=columns)
    first = len(steps.row_strides)
    ndim = np.ndim(index[0].lo) if index else 0
    col = _low_word(index[first:], steps.col_strides, ndim)
    if isinstance(steps.num_rows, int) and steps.num_rows <= WORD and not steps.long:
        return U64(np.uint32(0), _low_word(index[:first], steps.row_strides, ndim)), col
    row = ZERO
    for at, step in zip(index[:first], steps.row_strides):
        row = row + at * step
    if steps.long:
        row = row + U64(np.uint32(0), index[first].hi)
    return row, col


def _low_word(index: Sequence[U64], steps: Sequence[Any], ndim: int) -> Array:
    """Return ``sum(index * steps)`` modulo 2**32, an array of ndim axes."""
    total: Any = None
    for at, step in zip(index, steps):
        term = at.lo * np.uint32(step % WORD)
        total = term if total is None else total + term
    return jnp.zeros((1,) * ndim, jnp.uint32) if total is None else total


def window_index(
    size: Sequence[Any], start: Sequence[U64] | None = None, sharding: NamedSharding | None = None
) -> list[U64]:
    """Return the index of a window along each axis, as arrays that broadcast to the window.

    Args:
      size: shape of the window.
      start: the window's first index along each axis; ``None`` means 0.
      sharding: sharding of the window over an explicit mesh, so that each device computes only its own indices.
    """
    index = []
    for axis in range(len(size)):
        at = _iota(axis, size, sharding)
        index.append(at if start is None else at + start[axis])
    return index


def _iota(axis: int, size: Sequence[Any], sharding: NamedSharding | None) -> U64:
    """Return the index along one axis, of shape (1, .., n, .., 1)."""
    shape = [1] * len(size)
    shape[axis] = size[axis]
    if sharding is not None:
        spec = (s if k == axis else None for k, s in enumerate(sharding.spec))
        sharding = sharding.update(spec=PartitionSpec(*spec))
    if not isinstance(size[axis], int) or size[axis] <= WORD:
        return U64(np.uint32(0), lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=sharding))
    with jax.enable_x64(True):
        index = lax.broadcasted_iota(jnp.uint64, shape, axis, out_sharding=sharding)
        return U64((index >> np.uint64(32)).astype(jnp.uint32), index.astype(jnp.uint32))
