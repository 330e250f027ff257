"""Random-access words: ``word(seed, row, col) -> uint32``, and the rows and columns of an array.

A word is a pure function of a seed and an element's index, so any part of any mask can be computed
anywhere, in any order, without the rest: in the backward pass, in a tile, on one device of many.
Threefry (Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3, SC) makes a key for each
row; a mixing function of 13 integer operations makes a word for each column of that row.
Everything is plain ``jnp`` on uint32 and works without x64; 64-bit numbers are pairs ``(hi, lo)``.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

MASK_VERSION = 1
"""Version of the bits that ``generator="fast"`` draws; the same version gives the same masks for ever."""

MIN_COLUMNS = 128  # a row hash is shared by at least this many elements, where the array has them
WORD = 2**32

Pair = tuple[Any, Any]  # two uint32 arrays or scalars: a key, a counter, or (hi, lo) of a 64-bit number

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_GOLDEN = np.uint32(0x9E3779B9)


def threefry2x32(key: Pair, counter: Pair) -> Pair:
    """Encrypt a 64-bit counter under a 64-bit key with Threefry-2x32, 20 rounds."""
    a, b = jnp.asarray(key[0]), jnp.asarray(key[1])
    keys = (a, b, a ^ b ^ np.uint32(_PARITY))
    x, y = counter[0] + a, counter[1] + b
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            x = x + y
            y = (y << np.uint32(r)) | (y >> np.uint32(32 - r))
            y = x ^ y
        x, y = x + keys[(i + 1) % 3], y + keys[(i + 2) % 3] + np.uint32(i + 1)
    return x, y


def row_keys(seed: Pair, row: Pair) -> Pair:
    """Return the keys of rows, ``threefry2x32(seed, row)``, kept out of the loop over columns.

    XLA would fuse a plain hash into the loop over elements and repeat it for each.
    """
    return made_once(threefry2x32(seed, row))


def made_once(pair: Pair) -> Pair:
    """Return two arrays of one shape so that XLA does not fuse what makes them into a loop that reads both.

    XLA for CPU removes barriers before it fuses, but it does not fuse two arrays in one. The barrier keeps it from
    taking these apart earlier.
    """
    both = lax.optimization_barrier(jnp.stack(pair))
    return both[0], both[1]


def mix(row_key: Pair, col: Array) -> Array:
    """Mix a row's key and a column into a word: two words feed each other, so no permutation of ``col``.

    Multipliers: the golden ratio and three constants from C. Wellons' hash-prospector search.
    """
    x = col * _GOLDEN + row_key[0]
    y = col ^ row_key[1]
    x = x ^ (x >> np.uint32(16))
    y = y + x * np.uint32(0x7FEB352D)
    y = y ^ (y >> np.uint32(15))
    x = x + y * np.uint32(0x846CA68B)
    x = x ^ (x >> np.uint32(16))
    y = y + x * np.uint32(0xAC4C1B51)
    return y ^ (y >> np.uint32(15))


def word(seed: Pair, row: Pair, col: Array) -> Array:
    """Return the uint32 word of an element: ``mix(threefry2x32(seed, row), col)``.

    Args:
      seed: two uint32 scalars, from :func:`jdrop.keys.seed`.
      row: ``(hi, lo)`` of the element's row, see :func:`coordinates`.
      col: the element's column, uint32; rows and columns broadcast against each other.
    """
    return mix(row_keys(seed, row), col)


def one_row(seed: Pair, blocks: int, width: int) -> Array:
    """Return the words of the row 0 in blocks: ``word(seed, (0, 0), i * width + j)``, uint32 [blocks, width].

    ``width`` is a power of two, so the bits of ``i * width`` and of j do not meet, and the first joins the row's key.
    There are at most 2**32 columns.
    """
    first = lax.broadcasted_iota(jnp.uint32, (blocks, 1), 0) * np.uint32(width)
    key = threefry2x32(seed, (np.uint32(0), np.uint32(0)))
    block_key = made_once((first * _GOLDEN + key[0], first ^ key[1]))
    return mix(block_key, lax.broadcasted_iota(jnp.uint32, (1, width), 1))


class Coordinates(NamedTuple):
    """How the elements of an array number the words: ``row = sum(i * row_strides)``, likewise ``col``.

    With ``long`` the one column axis exceeds 2**32: ``col`` is the low word of its index, and the high
    word is added to ``row``.
    """

    row_strides: tuple[Any, ...]
    col_strides: tuple[int, ...]
    long: bool
    num_rows: Any


def coordinates(shape: Sequence[Any], *, columns: bool = True) -> Coordinates:
    """Split the axes of a shape into rows and columns.

    The columns are the shortest suffix of axes with at least 128 elements (or all axes); an axis joins
    only while the columns stay within 2**32. Sizes of row axes may be symbolic (``jax.export``). With
    ``columns=False`` all axes are rows, and the row is the flat index.

    Raises:
      TypeError: a column axis has a symbolic size.
    """
    first, width = len(shape), 1
    while columns and first and width < MIN_COLUMNS:
        size = shape[first - 1]
        if not isinstance(size, int):
            raise TypeError(f"the sizes of column axes must be static, got shape {tuple(shape)}")
        if width * size > WORD and width > 1:
            break
        first, width = first - 1, width * size
    long = width > WORD
    high_words = -(-width // WORD) if long else 1
    return Coordinates(
        row_strides=tuple(math.prod(shape[k + 1 : first], start=high_words) for k in range(first)),
        col_strides=tuple(math.prod(shape[k + 1 :]) for k in range(first, len(shape))),
        long=long,
        num_rows=math.prod(shape[:first], start=high_words),
    )


def indices(
    shape: Sequence[Any],
    size: Sequence[Any],
    start: Sequence[Pair] | None = None,
    sharding: NamedSharding | None = None,
    *,
    columns: bool = True,
) -> tuple[Pair, Array]:
    """Return ``(row, col)`` of the elements of a window, as arrays that broadcast to the window.

    Args:
      shape: shape of the whole array.
      size: shape of the window.
      start: the window's first index along each axis, as ``(hi, lo)``; ``None`` means the whole array.
      sharding: how the window is laid over an explicit mesh, so that each device makes its own indices only.
      columns: as in :func:`coordinates`.
    """
    axes = []
    for axis in range(len(size)):
        index = _iota(axis, size, sharding)
        axes.append(index if start is None else add64(index, start[axis]))
    return place(shape, axes, columns=columns)


def place(shape: Sequence[Any], index: Sequence[Pair], *, columns: bool = True) -> tuple[Pair, Array]:
    """Return ``(row, col)`` of the elements at an index.

    Args:
      shape: shape of the whole array.
      index: the index along each axis of the array, as ``(hi, lo)``: arrays of one rank that broadcast.
      columns: as in :func:`coordinates`.
    """
    where = coordinates(shape, columns=columns)
    first, ndim = len(where.row_strides), np.ndim(index[0][1]) if index else 0
    col = _sum([lo * np.uint32(stride) for (_, lo), stride in zip(index[first:], where.col_strides)], ndim)
    if isinstance(where.num_rows, int) and where.num_rows <= WORD and not where.long:
        low = [lo * np.uint32(stride) for (_, lo), stride in zip(index[:first], where.row_strides)]
        return (np.uint32(0), _sum(low, ndim)), col
    row: Pair = (np.uint32(0), np.uint32(0))
    for at, stride in zip(index[:first], where.row_strides):
        row = add64(row, mul64(at, stride))
    if where.long:
        row = add64(row, (np.uint32(0), index[first][0]))
    return row, col


def _sum(terms: list[Array], ndim: int) -> Array:
    return sum(terms[1:], start=terms[0]) if terms else jnp.zeros((1,) * ndim, jnp.uint32)


def _iota(axis: int, size: Sequence[Any], sharding: NamedSharding | None) -> Pair:
    """Index along one axis, of shape (1, .., n, .., 1)."""
    shape = [n if k == axis else 1 for k, n in enumerate(size)]
    if sharding is not None:
        spec = (s if k == axis else None for k, s in enumerate(sharding.spec))
        sharding = sharding.update(spec=PartitionSpec(*spec))
    if not isinstance(size[axis], int) or size[axis] <= WORD:
        return np.uint32(0), lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=sharding)
    with jax.enable_x64(True):
        index = lax.broadcasted_iota(jnp.uint64, shape, axis, out_sharding=sharding)
        return (index >> np.uint64(32)).astype(jnp.uint32), index.astype(jnp.uint32)


def pair(value: Any) -> Pair:
    """Return ``(hi, lo)`` of an integer or an array of integers: its value modulo 2**64."""
    if not isinstance(value, Array):
        exact = np.asarray(value, object) if isinstance(value, int) else np.asarray(value).astype(object)
        return np.asarray(exact // WORD % WORD).astype(np.uint32)[()], np.asarray(exact % WORD).astype(np.uint32)[()]
    if value.dtype.itemsize == 8:
        return (value >> value.dtype.type(32)).astype(jnp.uint32), value.astype(jnp.uint32)
    if jnp.issubdtype(value.dtype, jnp.unsignedinteger):
        return jnp.zeros_like(value, jnp.uint32), value.astype(jnp.uint32)
    wide = value.astype(jnp.int32)
    return (wide >> np.int32(31)).astype(jnp.uint32), wide.astype(jnp.uint32)


def add64(a: Pair, b: Pair) -> Pair:
    """Sum modulo 2**64 of two numbers ``(hi, lo)``."""
    lo = a[1] + b[1]
    return a[0] + b[0] + (lo < b[1]).astype(jnp.uint32), lo


def mul64(a: Pair, stride: Any) -> Pair:
    """Product modulo 2**64 of ``(hi, lo)`` and a stride: a Python integer, or a symbolic size below 2**31."""
    hi, lo = pair(stride) if isinstance(stride, int) else (np.uint32(0), jnp.asarray(stride).astype(jnp.uint32))
    half, low = np.uint32(16), np.uint32(0xFFFF)
    a0, a1, b0, b1 = a[1] & low, a[1] >> half, lo & low, lo >> half
    cross = a0 * b1
    middle = (a0 * b0 >> half) + (cross & low) + a1 * b0
    carry = a1 * b1 + (cross >> half) + (middle >> half)
    return a[0] * lo + a[1] * hi + carry, a[1] * lo
