"""Rows and columns of arrays, and 64-bit arithmetic. (The bits themselves: test_known_answers.py.)"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jdrop._random import fast
from jdrop._random.indexing import _iota, row_and_column, strides, window_index
from jdrop._random.threefry import U64


def at(shape, size, start=None, **options):
    return row_and_column(shape, window_index(size, start), **options)


def flat_coordinates(shape):
    """Return (row, col) of every element by definition, in Python integers."""
    first = len(shape)
    while first and np.prod(shape[first:], dtype=object) < 128:
        first -= 1
    index = np.arange(int(np.prod(shape, dtype=object)))
    width = int(np.prod(shape[first:], dtype=object))
    return index // max(width, 1), index % max(width, 1)


@pytest.mark.parametrize(
    "shape",
    [(), (1,), (127,), (128,), (5, 127), (5, 128), (3, 64, 2), (3, 63, 2), (2, 5, 7, 3), (2, 9, 5, 3), (200, 1), (4, 0), (0,)],
)  # fmt: skip
def test_rows_and_columns(shape):
    (hi, lo), col = at(shape, shape)
    row = np.broadcast_to(np.asarray(hi, np.int64) * 2**32 + np.asarray(lo), shape).ravel()
    expected_row, expected_col = flat_coordinates(shape)
    np.testing.assert_array_equal(row, expected_row)
    np.testing.assert_array_equal(np.broadcast_to(col, shape).ravel(), expected_col)


@pytest.mark.parametrize(
    ("shape", "rows", "cols", "long"),
    [
        ((2**26, 100), (1,), (1,), False),  # joining would exceed 2**32 columns
        ((2**25, 64, 2), (1,), (2, 1), False),
        ((2**32,), (), (1,), False),
        ((2**32 + 1,), (), (1,), True),
        ((3, 2**33), (2,), (1,), True),
        ((3, 2**33 + 1), (3,), (1,), True),
        ((2**33, 1), (), (1, 1), True),
        ((7, 5, 2**20, 512), (5 * 2**20, 2**20, 1), (1,), False),
        ((4, 2**31, 2), (1,), (2, 1), False),
    ],
)
def test_strides_of_large_shapes(shape, rows, cols, long):
    result = strides(shape)
    assert (result.row_strides, result.col_strides, result.long) == (rows, cols, long)


def test_strides_give_distinct_words_at_the_corners_of_large_shapes():
    """Every corner of a huge array has its own (row, col), as computed in Python integers."""
    for shape in ((3, 2**33), (2**40, 2, 256), (2**20, 2**20, 200), (5, 2**32 + 7)):
        steps = strides(shape)
        seen = set()
        for corner in np.ndindex(*(2,) * len(shape)):
            corner_index = [c * (n - 1) for c, n in zip(corner, shape, strict=True)]
            (hi, lo), col = at(shape, [1] * len(shape), [U64.of(i) for i in corner_index])
            first = len(steps.row_strides)
            row = sum(i * s for i, s in zip(corner_index[:first], steps.row_strides, strict=True))
            column = sum(i * s for i, s in zip(corner_index[first:], steps.col_strides, strict=True))
            row, column = (row + column // 2**32, column % 2**32) if steps.long else (row, column)
            assert (int(np.asarray(hi).item()) << 32) + int(np.asarray(lo).item()) == row
            assert int(np.asarray(col).item()) == column
            seen.add((row, column))
        assert len(seen) == 2 ** len(shape)


def test_64_bit_arithmetic():
    rng = np.random.default_rng(0)
    numbers = [0, 1, 2**16, 2**31, 2**32 - 1, 2**32, 2**48 + 3, 2**64 - 1, *rng.integers(0, 2**63, 20).tolist()]

    def value(pair):
        return (int(pair[0]) << 32) + int(pair[1])

    for a in numbers:
        x = U64(*(jnp.asarray(part) for part in U64.of(a)))
        assert value(x) == a
        for b in numbers:
            assert value(x + U64(*(jnp.asarray(part) for part in U64.of(b)))) == (a + b) % 2**64
            assert value(x * b) == (a * b) % 2**64


@pytest.mark.parametrize("value", [0, 5, -1, -(2**31), 2**31 - 1])
def test_pairs_are_sign_extended(value):
    for array in (np.int32(value), np.array(value, np.int64), jnp.int32(value)):
        hi, lo = U64.of(array)
        assert (int(hi) << 32) + int(lo) == value % 2**64


def test_a_word_is_the_same_for_one_element_and_in_an_array():
    seed = (jnp.uint32(5), jnp.uint32(6))
    row, col = at((9, 300), (9, 300))
    words = np.asarray(fast.word(seed, row, col))
    for r, c in ((0, 0), (4, 200), (8, 299)):
        assert int(fast.word(seed, (np.uint32(0), jnp.uint32(r)), jnp.uint32(c))) == words[r, c]
    assert words.dtype == np.uint32 and len(np.unique(words)) == words.size


def test_unsigned_words_are_not_sign_extended():
    for value in (2**31, 2**32 - 1):
        hi, lo = U64.of(jnp.uint32(value))
        assert (int(hi), int(lo)) == (0, value)


def test_indices_along_an_axis_beyond_2_to_the_32():
    """XLA computes only the slice of the index."""

    @jax.jit
    def ends():
        hi, lo = _iota(0, (2**33,), None)
        return tuple(lax.slice(part, (2**32 - 2,), (2**32 + 2,)) for part in (hi, lo))

    hi, lo = ends.lower().compile()()
    assert hi.tolist() == [0, 0, 1, 1] and lo.tolist() == [2**32 - 2, 2**32 - 1, 0, 1]


def test_rows_from_2_to_the_32_on():
    (hi, lo), col = at((2**33, 128), (1, 1), [U64.of(2**32 + 5), U64.of(7)])
    assert (int(np.asarray(hi).item()), int(np.asarray(lo).item()), int(np.asarray(col).item())) == (1, 5, 7)


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 3, 200), (5, 127), (300,), (2**33, 3), (2**20, 2**20, 200)])
def test_single_elements_agree_with_a_window(shape, columns):
    """Single elements in any order have the row and column of a window."""
    rng = np.random.default_rng(0)
    index = [[int(rng.integers(n)) for n in shape] for _ in range(4)]
    index[0], index[1] = [0 for _ in shape], [n - 1 for n in shape]
    axes = [
        (np.array([i >> 32 for i in axis], np.uint32), np.array([i % 2**32 for i in axis], np.uint32))
        for axis in zip(*index)
    ]
    (hi, lo), col = row_and_column(shape, [U64(jnp.asarray(h), jnp.asarray(x)) for h, x in axes], columns=columns)
    for k, where in enumerate(index):
        start = [U64.of(i) for i in where]
        (one_hi, one_lo), one_col = at(shape, [1] * len(shape), start, columns=columns)
        element = [np.broadcast_to(np.asarray(x), (4,))[k] for x in (hi, lo, col)]
        assert element == [np.asarray(x).item() for x in (one_hi, one_lo, one_col)]
