"""Claim: the words of the library are uniform, and independent along columns, rows, steps, and neighboring keys.

Needs no external program and takes less than a minute: ``python scripts/check_randomness.py``; exit code 0 or 1. Every
test has a statistic with a known distribution for truly random words. Its p-value is two-sided, because words that are
too even are as bad as words that are too uneven. All keys are fixed. With N tests in total, the generator fails if any
p-value is below ``1e-4 / N`` (Bonferroni): a perfect generator fails at one ``--key-seed`` in 10,000.
``scripts/emit_bits.py`` feeds external suites.

With ``--generator packed``, a word joins the 16 bits of two decisions: the upper half decides about its element, and
the lower half about the element 2**62 rows further.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import stats

from jdrop import keys
from jdrop._platform import PLATFORMS
from jdrop._random import fast, packed

FAMILY_ERROR = 1e-4
MATRIX_WORDS = 2**17  # largest number of words for the comparison of 32 x 32 pairs of bits
COLUMNS = 1024
KEY_ROWS, KEY_COLUMNS = 64, 256  # words per key in comparisons of two keys
REACH = 64  # largest lag of a mask along both axes

Words = Callable[[Array, np.ndarray, np.ndarray], np.ndarray]
"""``words(keys [k], rows uint64 [r], cols uint32 [c]) -> uint32 [k, r, c]``: the generator under test."""


RowKeys = Callable[[Array, np.ndarray], np.ndarray]
"""``row_keys(keys [k], rows uint64 [r]) -> uint32 [k, r, 2]``: the row keys from which words are mixed."""


class Result(NamedTuple):
    """One test: its subject, its statistic, and the p-value."""

    subject: str
    statistic: str
    p: float


@functools.partial(jax.jit, static_argnames="mix")
def _library(key_words: Array, hi: Array, lo: Array, cols: Array, *, mix: Callable[..., Array]) -> Array:
    def one(key_words: Array) -> Array:
        row_key = PLATFORMS["cpu"].row_key(key_words, (hi[:, None], lo[:, None]), cols)  # once per row
        return mix(row_key, cols[None, :])

    return jax.vmap(one)(key_words)


def library(key: Array, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Return the words of the library."""
    return np.asarray(_library(jax.random.key_data(key), *_halves(rows), cols, mix=fast.mix))


def packed_library(key: Array, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Return the 16 bits of two decisions of ``generator="packed"`` in each word."""
    words = [
        np.asarray(_library(jax.random.key_data(key), *_halves(r), cols, mix=packed.mix))
        for r in (rows, rows ^ np.uint64(2**62))
    ]
    return words[0] & np.uint32(0xFFFF0000) | words[1] >> np.uint32(16)


@jax.jit
def _library_row_keys(key_words: Array, hi: Array, lo: Array) -> Array:
    return jax.vmap(lambda words: jnp.stack(fast.row_key(fast.seed(words), (hi, lo)), -1))(key_words)


def library_row_keys(key: Array, rows: np.ndarray) -> np.ndarray:
    """Return the row keys of the library."""
    return np.asarray(_library_row_keys(jax.random.key_data(key), *_halves(rows)))


def _halves(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (numbers >> np.uint64(32)).astype(np.uint32), numbers.astype(np.uint32)


# ---------------------------------------------------------------------------------- statistics


def normal(z: np.ndarray | float) -> float:
    """Return the two-sided p of a standard normal number; of several numbers, the Bonferroni bound of the largest."""
    z = np.atleast_1d(z)
    return min(1.0, 2 * float(stats.norm.sf(np.abs(z).max())) * z.size)


def chi_squared(x: float, df: int) -> float:
    """Return the two-sided p of a chi-squared number."""
    return min(1.0, 2 * float(min(stats.chi2.sf(x, df), stats.chi2.cdf(x, df))))


def cells(index: np.ndarray, count: int) -> tuple[float, int]:
    """Return Pearson's chi-squared and its degrees of freedom for indices that should fill ``count`` cells evenly."""
    expected = index.size / count
    return float(((np.bincount(index, minlength=count) - expected) ** 2).sum() / expected), count - 1


def stream(w: np.ndarray) -> Iterator[tuple[str, float]]:
    """Test that the 32 bits are fair and the 4 bytes uniform, and independent within a word."""
    n = w.size
    of_bytes = [np.bincount((w >> np.uint32(s)).astype(np.uint8), minlength=256) for s in (0, 8, 16, 24)]
    ones = [(of_byte * (np.arange(256) >> b & 1)).sum() for of_byte in of_bytes for b in range(8)]
    z = (2 * np.array(ones) - n) / np.sqrt(n)  # ones ~ Binomial(n, 1/2)
    yield "32 bits, largest z", normal(z)
    yield "32 bits, chi2", chi_squared(float((z**2).sum()), 32)
    x = sum(float(((of_byte - n / 256) ** 2).sum()) for of_byte in of_bytes) / (n / 256)
    yield "4 bytes, chi2", chi_squared(x, 4 * 255)


def couple(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[str, float]]:
    """Test that ``a[i]`` and ``b[i]`` are independent: as numbers, high or low bits, differences, and single bits."""
    a, b = a.ravel(), b.ravel()
    n = a.size
    u, v = (w * 2.0**-32 - (0.5 - 2.0**-33) for w in (a, b))  # mean 0, variance 1/12
    yield "correlation, z", normal(float(u @ v) * 12 / np.sqrt(n))
    for name, shift in (("high", 28), ("low", 0)):
        pair = (a >> np.uint32(shift) & np.uint32(15)) * np.uint32(16) + (b >> np.uint32(shift) & np.uint32(15))
        yield f"16 x 16 cells of {name} bits, chi2", chi_squared(*cells(pair, 256))
    for name, difference in (("xor", a ^ b), ("difference", a - b)):
        for statistic, p in stream(difference):
            yield f"{name}: {statistic}", p
    sums = np.asarray(_sums_of_signs(a[:MATRIX_WORDS], b[:MATRIX_WORDS]), np.float64)
    z = sums / np.sqrt(min(n, MATRIX_WORDS))  # sums of n fair signs, pairwise independent
    yield "32 x 32 pairs of bits, largest z", normal(z)
    yield "32 x 32 pairs of bits, chi2", chi_squared(float((z**2).sum()), z.size)


@jax.jit
def _sums_of_signs(a: Array, b: Array) -> Array:
    """Return the exact sum over i of s(bit j of a[i]) * s(bit k of b[i]), float32 [32, 32]; s(0) = -1, s(1) = 1."""
    bit = np.arange(32, dtype=np.uint32)[:, None]
    signs = [((w[None, :] >> bit) & np.uint32(1)).astype(jnp.float32) * 2 - 1 for w in (a, b)]
    return jnp.matmul(signs[0], signs[1].T, precision="highest")


def mask_lags(mask: np.ndarray, keep: float) -> Iterator[tuple[str, float]]:
    """Test the rate of a mask, and that its elements are uncorrelated at all circular lags within reach."""
    n, variance = mask.size, keep * (1 - keep)
    yield "kept, z", normal((mask.sum() - n * keep) / np.sqrt(n * variance))
    spectrum = np.fft.rfft2(mask - keep)
    sums = np.fft.irfft2(np.abs(spectrum) ** 2, mask.shape)  # sums over i of d[i] * d[i + lag]: n terms of variance**2
    ahead = sums[1 : REACH + 1, np.arange(-REACH, REACH + 1)]  # a lag and its negative give the same pairs
    z = np.concatenate([sums[0, 1 : REACH + 1], ahead.ravel()]) / (np.sqrt(n) * variance)
    yield f"{z.size} lags in two dimensions, largest z", normal(z)


# ---------------------------------------------------------------------------------- comparisons


def apart(count: int, distance: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return uint64 numbers from ``start``, and the same numbers plus ``distance``, all distinct."""
    i = np.arange(count, dtype=np.uint64)
    first = i % np.uint64(distance) + i // np.uint64(distance) * np.uint64(2) * np.uint64(distance) + np.uint64(start)
    return first, first + np.uint64(distance)


def one_stream(words: Words, key: Array, n: int) -> Iterator[Result]:
    """Test consecutive rows, with 1024 columns and with 1."""
    for columns in (COLUMNS, 1):
        rows = np.arange(4 * n // columns, dtype=np.uint64)
        w = words(key[None], rows, np.arange(columns, dtype=np.uint32)).ravel()
        subject = f"{columns} column{'s'[: columns - 1]}, row by row"
        for statistic, p in stream(w):
            yield Result(subject, statistic, p)
        yield Result(subject, "next word, 256 x 256 cells, chi2", chi_squared(*cells(_bytes(w[0::2], w[1::2]), 2**16)))
        u = w * 2.0**-32 - (0.5 - 2.0**-33)
        for lag in (1, 2, 4, 8, 16, 32, 64, COLUMNS, COLUMNS + 1):
            yield Result(
                subject, f"serial correlation, lag {lag}, z", normal(float(u @ np.roll(u, lag)) * 12 / np.sqrt(w.size))
            )
        for statistic, p in couple(w[0::2][:n], w[1::2][:n]):
            yield Result(subject, f"next word: {statistic}", p)


def _bytes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a >> np.uint32(24)) * np.uint32(256) + (b >> np.uint32(24))


def column_pairs(words: Words, key: Array, n: int) -> Iterator[Result]:
    """Test two columns of many rows, at all power-of-two distances."""
    rows = np.arange(n, dtype=np.uint64)
    for base in (0, 0x12345677):
        for power in range(32):
            cols = np.array([base, (base + 2**power) % 2**32], np.uint32)
            w = words(key[None], rows, cols)[0]
            for statistic, p in couple(w[:, 0], w[:, 1]):
                yield Result(f"columns {base}, +2**{power}", statistic, p)


def row_pairs(words: Words, key: Array, n: int) -> Iterator[Result]:
    """Test rows r and r + distance; rows are 64-bit numbers."""
    cols = np.arange(COLUMNS, dtype=np.uint32)
    for start, power in [(1, 0), *((0, power) for power in (0, 1, 2, 3, 4, 6, 8, 16, 31, 32, 33, 48, 63))]:
        w = words(key[None], np.concatenate(apart(n // COLUMNS, 2**power, start)), cols)[0]
        for statistic, p in couple(*np.split(w, 2)):
            yield Result(f"rows r, r + 2**{power}, from {start}", statistic, p)


def key_families(key: Array) -> dict[str, Callable[[np.ndarray], Array]]:
    """Return functions from numbers to keys, one for each way to make many keys."""
    return {
        "jax.random.key(i)": jax.vmap(jax.random.key),
        "jax.random.fold_in(key, i)": jax.vmap(lambda i: jax.random.fold_in(key, i)),
        "jax.random.split(key)[i]": lambda i: jax.random.split(key, int(i.max()) + 1)[i],
        "derive(key, i)": jax.vmap(lambda i: keys.derive(key, i)),
        "derive(key, 'layer', i, 'drop')": jax.vmap(lambda i: keys.derive(key, "layer", i, "drop")),
        "per_example(key, i)": lambda i: keys.per_example(key, i),
    }


def key_pairs(words: Words, key: Array, n: int) -> Iterator[Result]:
    """Test the same elements under neighboring keys, from seeds, steps, examples, and splits."""
    rows, cols = np.arange(KEY_ROWS, dtype=np.uint64), np.arange(KEY_COLUMNS, dtype=np.uint32)
    for name, keys_of in key_families(key).items():
        for start, power in [(1, 0), (0, 0), (0, 1), (0, 4), (0, 8), (0, 16), (0, 30)]:
            if "split" in name and power > 8:
                continue
            at = apart(n // (KEY_ROWS * KEY_COLUMNS), 2**power, start)
            w = words(keys_of(np.concatenate(at).astype(np.uint32)), rows, cols)
            for statistic, p in couple(*np.split(w, 2)):
                yield Result(f"{name}, i and i + 2**{power}, from {start}", statistic, p)


def draws(words: Words, key: Array, n: int) -> Iterator[Result]:
    """Test the words against the bits of ``jax.random`` from the same key."""
    w = words(key[None], np.arange(n // COLUMNS, dtype=np.uint64), np.arange(COLUMNS, dtype=np.uint32))
    for statistic, p in couple(w, np.asarray(jax.random.bits(key, w.shape))):
        yield Result("words and jax.random.bits(key)", statistic, p)


def mask_images(words: Words, key: Array, n: int) -> Iterator[Result]:
    """Test masks as images, at several rates."""
    for columns in (COLUMNS, 128):
        w = words(key[None], np.arange(n // columns, dtype=np.uint64), np.arange(columns, dtype=np.uint32))[0]
        for rate in (0.1, 0.5, 0.9):
            t = round(float(np.float32(rate)) * 2**32)
            for statistic, p in mask_lags(w >= np.uint32(t), 1 - t / 2**32):
                yield Result(f"mask [{len(w)}, {columns}] at rate {rate}", statistic, p)


def avalanche(row_keys: RowKeys, key: Array, n: int) -> Iterator[Result]:
    """Test that each bit of a row number and of a PRNG key flips each bit of the row key half of the time."""
    at = [apart(n // 32, 2**power) for power in range(64)]
    yield from _flips("row", (np.split(row_keys(key[None], np.concatenate(pair))[0], 2) for pair in at))
    row = np.zeros(1, np.uint64)
    of_keys = (row_keys(_keys_of(np.concatenate(pair)), row)[:, 0] for pair in at)
    yield from _flips("PRNG key", (np.split(of_key, 2) for of_key in of_keys))


def _keys_of(numbers: np.ndarray) -> Array:
    return jax.random.wrap_key_data(jnp.stack(_halves(numbers), -1), impl="threefry2x32")


def _flips(subject: str, pairs: Iterator[list[np.ndarray]]) -> Iterator[Result]:
    """Test the bits that differ between pairs of row keys, one pair for each flipped bit."""
    z = []
    for a, b in pairs:
        ones = np.unpackbits((a ^ b).view(np.uint8), axis=1).sum(0, dtype=np.int64)  # ~ Binomial(n, 1/2)
        z.append((2.0 * ones - len(a)) / np.sqrt(len(a)))
    z = np.concatenate(z)
    yield Result(f"one bit of the {subject} flipped", f"{z.size} pairs of bits, largest z", normal(z))
    yield Result(
        f"one bit of the {subject} flipped", f"{z.size} pairs of bits, chi2", chi_squared((z**2).sum(), z.size)
    )


def children(row_keys: RowKeys, key: Array, n: int) -> Iterator[Result]:
    """Test the row keys against keys and bits that ``jax.random`` derives from the same PRNG key."""
    count = n // 16
    index = np.arange(count, dtype=np.uint32)
    of_rows = row_keys(key[None], index.astype(np.uint64))[0]
    relatives = {
        "jax.random.split(key)": jax.random.key_data(jax.random.split(key, count)),
        "jax.random.fold_in(key, i)": jax.random.key_data(jax.vmap(lambda i: jax.random.fold_in(key, i))(index)),
        "jax.random.bits(key)": jax.random.bits(key, (count, 1)),
    }
    ours = {"first word": of_rows[:, 0], "second word": of_rows[:, 1], "xor of words": of_rows[:, 0] ^ of_rows[:, 1]}
    for name, words in relatives.items():
        for part, a in ours.items():
            for b in np.asarray(words).T:
                for statistic, p in couple(a, b):
                    yield Result(f"{part} of row keys and {name}", statistic, p)


ROW_KEY_GROUPS: dict[str, Callable[[RowKeys, Array, int], Iterator[Result]]] = {
    "avalanche of row keys": avalanche,
    "row keys and jax.random": children,
}
GROUPS: dict[str, Callable[[Words, Array, int], Iterator[Result]]] = {
    "one stream": one_stream,
    "pairs of columns": column_pairs,
    "pairs of rows": row_pairs,
    "pairs of keys": key_pairs,
    "draws of jax.random": draws,
    "masks in two dimensions": mask_images,
}


GENERATORS: dict[str, Words] = {"fast": library, "packed": packed_library}


def check(words: Words, log2_words: int, key_seed: int, groups: list[str] | None = None) -> dict[str, list[Result]]:
    """Run the groups of tests on a generator; most tests compare ``2**log2_words`` pairs of words."""
    key = jax.random.key(key_seed)
    return {name: list(GROUPS[name](words, key, 2**log2_words)) for name in groups or GROUPS}


def check_row_keys(
    row_keys: RowKeys, log2_words: int, key_seed: int, groups: list[str] | None = None
) -> dict[str, list[Result]]:
    """Run the groups of tests on row keys."""
    key = jax.random.key(key_seed)
    return {name: list(ROW_KEY_GROUPS[name](row_keys, key, 2**log2_words)) for name in groups or ROW_KEY_GROUPS}


def rejected(results: dict[str, list[Result]]) -> list[Result]:
    """Return the tests that fail."""
    every = [result for group in results.values() for result in group]
    return [result for result in every if not result.p >= FAMILY_ERROR / len(every)]


def main() -> int:
    """Print a table with the smallest p-value of each group, and all failures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--key-seed", type=int, default=0)
    parser.add_argument("--log2-words", type=int, default=20, help="pairs of words in most tests, from 14 (default 20)")
    parser.add_argument("--generator", choices=GENERATORS, default="fast")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    results = check(GENERATORS[arguments.generator], arguments.log2_words, arguments.key_seed)
    results |= check_row_keys(library_row_keys, arguments.log2_words, arguments.key_seed)
    failures, count = rejected(results), sum(map(len, results.values()))
    print(f"{'group':24} {'tests':>5}  {'smallest p':>10}  in")
    for group, tests in results.items():
        worst = min(tests, key=lambda result: result.p)
        print(f"{group:24} {len(tests):5}  {worst.p:10.2e}  {worst.subject}; {worst.statistic}")
    for failure in failures:
        print(f"FAILED {failure.subject}; {failure.statistic}: p = {failure.p:.2e}")
    verdict = f"{len(failures)} FAILED" if failures else "all passed"
    print(f"{count} tests, bound on p {FAMILY_ERROR / count:.1e}: {verdict}, in {time.perf_counter() - begin:.0f} s")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
