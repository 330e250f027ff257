"""The mask bits in plain NumPy, written only from the text of the design: this file imports nothing from jdrop.

It is slow, direct, and independent: 64-bit numbers are uint64 or Python integers, and Python integers count the row and
column of an element. This file defines mask version 1, and packed mask version 1.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np

TAG = 0x6A64726F
MASK_SEED, DERIVED_KEY = 1, 2
STR_HIGH, STR_LOW, INT, OUT = 1, 2, 3, 4
TWO32, TWO64 = 2**32, 2**64
ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)

Words = Sequence[int]
Pair = tuple[int, int]


def u32(value: int | np.ndarray) -> np.ndarray:
    """Return an array of at least one axis, modulo 2**32, whose arithmetic wraps without a warning."""
    return np.atleast_1d(value % TWO32 if isinstance(value, int) else value).astype(np.uint32)


def threefry2x32(key: tuple, counter: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Threefry-2x32-20 of Salmon et al. (2011): 20 rounds, with key words added before them and after every fourth."""
    k = [u32(key[0]), u32(key[1])]
    k.append(k[0] ^ k[1] ^ np.uint32(0x1BD11BDA))
    x0, x1 = u32(counter[0]) + k[0], u32(counter[1]) + k[1]
    for i in range(20):
        r = ROTATIONS[i % 8]
        x0 = x0 + x1
        x1 = ((x1 << np.uint32(r)) | (x1 >> np.uint32(32 - r))) ^ x0
        if i % 4 == 3:
            n = i // 4 + 1
            x0, x1 = x0 + k[n % 3], x1 + k[(n + 1) % 3] + np.uint32(n)
    return x0, x1


def chain(start: Pair, blocks: Sequence[tuple[int, int, int]]) -> Pair:
    """Encrypt a state under each block ``(tag, a, b)``, with the tag xored into its first word."""
    state = start
    for tag, a, b in blocks:
        out = threefry2x32((a, b), (state[0] ^ tag, state[1]))
        state = int(out[0][0]), int(out[1][0])
    return state


def key_blocks(words: Words) -> list[tuple[int, int, int]]:
    padded = [*map(int, words)] + [0] * (len(words) % 2)
    return [(0, padded[i], padded[i + 1]) for i in range(0, len(padded), 2)]


def seed(words: Words) -> Pair:
    """Return the seed of a mask from the data words of a key."""
    return chain((TAG, MASK_SEED), key_blocks(words))


def derive(words: Words, *path: str | int) -> list[int]:
    """Return the data words of ``jdrop.keys.derive(key, *path)``; negative integers count modulo 2**64."""
    blocks = key_blocks(words)
    for element in path:
        if isinstance(element, str):
            digest = hashlib.blake2b(element.encode("utf-8"), digest_size=16).digest()
            a, b, c, d = (int.from_bytes(digest[i : i + 4], "big") for i in range(0, 16, 4))
            blocks += [(STR_HIGH, a, b), (STR_LOW, c, d)]
        else:
            blocks += [(INT, element % TWO64 // TWO32, element % TWO32)]
    state = chain((TAG, DERIVED_KEY), blocks)
    out: list[int] = []
    for j in range((len(words) + 1) // 2):
        out += chain(state, [(OUT, 0, j)])
    return out[: len(words)]


def mix(k0: np.ndarray, k1: np.ndarray, col: np.ndarray) -> np.ndarray:
    """Return the word of a row's key and a column."""
    x = col * np.uint32(0x9E3779B9) + k0
    y = col ^ k1
    x = x ^ (x >> np.uint32(16))
    y = y + x * np.uint32(0x7FEB352D)
    y = y ^ (y >> np.uint32(15))
    x = x + y * np.uint32(0x846CA68B)
    x = x ^ (x >> np.uint32(16))
    y = y + x * np.uint32(0xAC4C1B51)
    return y ^ (y >> np.uint32(15))


def element_words(seed_: Pair, rows: Sequence[int], cols: Sequence[int]) -> np.ndarray:
    """Return the words of elements from 64-bit rows and columns. The key of a row is hashed again for each element."""
    row, col = np.array([r % TWO64 for r in rows], np.uint64), np.array(cols, np.uint64)
    k0, k1 = threefry2x32(seed_, (row // TWO32, row))
    return mix(k0, k1, u32(col))


def split_axes(shape: Sequence[int]) -> int:
    """Return the number of leading axes that are rows; columns are the shortest suffix of 128 to 2**32 elements."""
    for first in range(len(shape) - 1, 0, -1):
        width = math.prod(shape[first:])
        if width >= 128 or (width > 1 and width * shape[first - 1] > TWO32):
            return first
    return 0


def row_and_column(shape: Sequence[int], index: Sequence[int]) -> Pair:
    """Return the row and column of the element at ``index`` in an array of ``shape``."""
    first = split_axes(shape)
    row = col = 0
    for n, i in zip(shape[:first], index[:first], strict=True):
        row = row * n + i
    for n, i in zip(shape[first:], index[first:], strict=True):
        col = col * n + i
    rows_per_axis = -(-math.prod(shape[first:]) // TWO32)  # above 1 only for a single axis longer than 2**32
    return row * max(rows_per_axis, 1) + col // TWO32, col % TWO32


def positions(window: Sequence[Pair]) -> Iterator[tuple[int, ...]]:
    """Yield the indices of a window, with the last axis fastest."""
    for flat in np.ndindex(*(size for _, size in window)):
        yield tuple(start + i for (start, _), i in zip(window, flat, strict=True))


def words(key_words: Words, shape: Sequence[int], window: Sequence[Pair] | None = None) -> np.ndarray:
    """Return the words of an array, or of a window with one ``(start, size)`` per axis."""
    window = [(0, n) for n in shape] if window is None else window
    elements = [row_and_column(shape, index) for index in positions(window)]
    result = element_words(seed(key_words), [row for row, _ in elements], [col for _, col in elements])
    return result.reshape([size for _, size in window])


def threshold(rate: float) -> int:
    """Return float32(rate) * 2**32, rounded half to even (exact in float64); smaller words are dropped."""
    return round(float(np.float32(rate)) * TWO32)


def mask(key_words: Words, shape: Sequence[int], rate: float, window: Sequence[Pair] | None = None) -> np.ndarray:
    """Return which elements are kept."""
    return words(key_words, shape, window).astype(np.uint64) >= np.uint64(threshold(rate))


def packed_numbers(key_words: Words, shape: Sequence[int], window: Sequence[Pair] | None = None) -> np.ndarray:
    """Return numbers below 2**16: upper halves of words where (column // 8) is even, else the lower half of 8 before."""
    window = [(0, n) for n in shape] if window is None else window
    elements = [row_and_column(shape, index) for index in positions(window)]
    of_second = np.array([col // 8 % 2 for _, col in elements], bool)
    cols = [col - 8 * int(second) for (_, col), second in zip(elements, of_second, strict=True)]
    both = element_words(seed(key_words), [row for row, _ in elements], cols)
    return np.where(of_second, both % 2**16, both // 2**16).reshape([size for _, size in window])


def packed_threshold(rate: float) -> int:
    """Return float32(rate) * 2**16, rounded half to even; smaller numbers are dropped."""
    return round(float(np.float32(rate)) * 2**16)


def packed_mask(
    key_words: Words, shape: Sequence[int], rate: float, window: Sequence[Pair] | None = None
) -> np.ndarray:
    """Return which elements ``generator="packed"`` keeps."""
    return packed_numbers(key_words, shape, window) >= packed_threshold(rate)
