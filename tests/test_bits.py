"""bits: geometry and 64-bit arithmetic. (The bits themselves: test_known_answers.py.)"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jdrop import bits


def flat_coordinates(shape):
    """(row, col) of every element by the definition, in Python integers."""
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
    (hi, lo), col = bits.indices(shape, shape)
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
    found = bits.coordinates(shape)
    assert (found.row_strides, found.col_strides, found.long) == (rows, cols, long)


def test_strides_give_distinct_words_at_the_corners_of_large_shapes():
    """Every corner of a huge array has a (row, col) of its own, equal to Python's own arithmetic."""
    for shape in ((3, 2**33), (2**40, 2, 256), (2**20, 2**20, 200), (5, 2**32 + 7)):
        where = bits.coordinates(shape)
        seen = set()
        for corner in np.ndindex(*(2,) * len(shape)):
            at = [c * (n - 1) for c, n in zip(corner, shape, strict=True)]
            (hi, lo), col = bits.indices(shape, [1] * len(shape), [bits.pair(i) for i in at])
            first = len(where.row_strides)
            row = sum(i * s for i, s in zip(at[:first], where.row_strides, strict=True))
            column = sum(i * s for i, s in zip(at[first:], where.col_strides, strict=True))
            row, column = (row + column // 2**32, column % 2**32) if where.long else (row, column)
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
        x = tuple(jnp.asarray(part) for part in bits.pair(a))
        assert value(x) == a
        for b in numbers:
            assert value(bits.add64(x, tuple(jnp.asarray(p) for p in bits.pair(b)))) == (a + b) % 2**64
            assert value(bits.mul64(x, b)) == (a * b) % 2**64


@pytest.mark.parametrize("value", [0, 5, -1, -(2**31), 2**31 - 1])
def test_pairs_are_sign_extended(value):
    for array in (np.int32(value), np.array(value, np.int64), jnp.int32(value)):
        hi, lo = bits.pair(array)
        assert (int(hi) << 32) + int(lo) == value % 2**64


def test_a_word_is_the_same_alone_and_in_an_array():
    seed = (jnp.uint32(5), jnp.uint32(6))
    row, col = bits.indices((9, 300), (9, 300))
    words = np.asarray(bits.word(seed, row, col))
    for r, c in ((0, 0), (4, 200), (8, 299)):
        assert int(bits.word(seed, (np.uint32(0), jnp.uint32(r)), jnp.uint32(c))) == words[r, c]
    assert words.dtype == np.uint32 and len(np.unique(words)) == words.size


def test_unsigned_words_are_not_sign_extended():
    for value in (2**31, 2**32 - 1):
        hi, lo = bits.pair(jnp.uint32(value))
        assert (int(hi), int(lo)) == (0, value)


def test_indices_along_an_axis_beyond_2_to_the_32():
    """A slice of the index alone: XLA makes no more of it than that."""

    @jax.jit
    def at():
        hi, lo = bits._iota(0, (2**33,), None)
        return tuple(lax.slice(part, (2**32 - 2,), (2**32 + 2,)) for part in (hi, lo))

    hi, lo = at.lower().compile()()
    assert hi.tolist() == [0, 0, 1, 1] and lo.tolist() == [2**32 - 2, 2**32 - 1, 0, 1]


def test_rows_between_2_to_the_32_and_twice_as_many():
    (hi, lo), col = bits.indices((2**33, 128), (1, 1), [bits.pair(2**32 + 5), bits.pair(7)])
    assert (int(np.asarray(hi).item()), int(np.asarray(lo).item()), int(np.asarray(col).item())) == (1, 5, 7)
