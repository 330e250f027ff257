"""``generator="fast"``: mask version 1, random-access words ``word(seed, row, col)`` and their thresholds.

Threefry makes a key for each row of an array, and a mixing function of 13 integer operations makes a word for each
column of that row. A word is a pure function of the seed and the index of an element, so any part of any mask can be
computed anywhere, in any order, without the rest. ``_random/indexing.py`` says which row and column an element has.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jdrop._random.threefry import WORD, Pair, threefry2x32

MASK_VERSION = 1
"""Version of the bits that ``generator="fast"`` draws; a version never changes its masks."""

TAG = 0x6A64726F  # "jdro": jax.random never reaches this high word of a counter
USE_SEED, USE_DERIVE = 1, 2
_GOLDEN = np.uint32(0x9E3779B9)


def absorb(state: Pair, blocks: Iterable[Any]) -> Pair:
    """Encrypt a state under each block ``(tag, a, b)`` in turn; the tag is the type of the block."""
    for tag, a, b in blocks:
        state = threefry2x32((a, b), (state[0] ^ jnp.asarray(tag, jnp.uint32), state[1]))
    return state


def hash_key(words: Array | Sequence[Any], use: int) -> Pair:
    """Hash the data words of a key, or of an array of keys, for one use: ``USE_SEED`` or ``USE_DERIVE``."""
    padded = [*words, *[np.uint32(0)] * (len(words) % 2)]
    return absorb((np.uint32(TAG), np.uint32(use)), [(0, *padded[i : i + 2]) for i in range(0, len(words), 2)])


@jax.jit
def seed(words: Array | Sequence[Any]) -> Pair:
    """Return the seed of the masks of a key, or of an array of keys, from the data words."""
    return hash_key(words, USE_SEED)


def row_key(seed: Pair, row: Pair) -> Pair:
    """Return the key of a row, or of an array of rows: ``threefry2x32(seed, row)``."""
    return threefry2x32(seed, row)


def key_from(key: Pair, first: Array) -> Pair:
    """Return the key whose columns count from ``first`` on: ``mix(key_from(key, i), j) == mix(key, i + j)``.

    No bit may be set in both i and j.
    """
    return first * _GOLDEN + key[0], first ^ key[1]


def mix(key: Pair, col: Array) -> Array:
    """Mix the key of a row and a column into a word. Two words feed each other, so the result does not permute ``col``.

    Multipliers: the golden ratio and three constants from C. Wellons' hash-prospector search.
    """
    x = col * _GOLDEN + key[0]
    y = col ^ key[1]
    x = x ^ (x >> np.uint32(16))
    y = y + x * np.uint32(0x7FEB352D)
    y = y ^ (y >> np.uint32(15))
    x = x + y * np.uint32(0x846CA68B)
    x = x ^ (x >> np.uint32(16))
    y = y + x * np.uint32(0xAC4C1B51)
    return y ^ (y >> np.uint32(15))


def word(seed: Pair, row: Pair, col: Array) -> Array:
    """Return the uint32 word of an element: ``mix(row_key(seed, row), col)``.

    Args:
      seed: two uint32 scalars, from :func:`seed`.
      row: ``(hi, lo)`` of the element's row.
      col: the element's column, uint32; rows and columns broadcast against each other.
    """
    return mix(row_key(seed, row), col)


def threshold(rate: Array) -> tuple[Array, Array]:
    """Return ``t = round_half_even(rate * 2**32)`` of a float32 rate, and whether it drops all words.

    Words below t are dropped. Rate 1 needs the second value, because its t exceeds uint32.
    """
    inside = (rate > 0) & (rate < 1)  # NaN is outside, and keeps everything
    steps = lax.select(inside, rate, lax.full_like(rate, 0)) * float(WORD)
    return lax.round(steps, lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.uint32), rate >= 1


def keep(words: Array, rate: Array) -> Array:
    """Decide for each word whether its element is kept."""
    t, none = threshold(rate)
    return (words >= t) & ~none


def keep_probability(rate: Array, dtype: Any) -> Array:
    """Return the exact probability that an element is kept, ``1 - t / 2**32``, rounded once to ``dtype``.

    0 and 1 for rates of 1 and 0, NaN for NaN.
    """  # functions of lax, as in threefry2x32
    t, none = threshold(rate)
    words = (np.uint32(0) - t).astype(dtype)
    kept = lax.select(t == 0, lax.full_like(words, WORD), words) / float(WORD)
    kept = lax.select(none, lax.full_like(kept, 0), kept)
    return lax.select(lax.ne(rate, rate), rate.astype(dtype), kept)
