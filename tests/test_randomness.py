"""The randomness checks accept the library and reject broken generators; emit_bits writes the library's words."""

import importlib.util
import itertools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jdrop
from jdrop._random import fast

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"
LOG2_WORDS = 16


def load(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


randomness, emit = load("check_randomness"), load("emit_bits")


# ---------------------------------------------------------------------------------- broken generators


def seeds(key):
    return np.array([reference.seed(words) for words in jax.random.key_data(key).tolist()], np.uint32)[..., None, None]


def row_keys(key, rows):
    seed = seeds(key)
    row = rows[None, :, None]
    return reference.threefry2x32((seed[:, 0], seed[:, 1]), (row >> np.uint64(32), row))


def healthy(key, rows, cols):
    return reference.mix(*row_keys(key, rows), cols.astype(np.uint32))


def counter(key, rows, cols):
    return seeds(key)[:, 0] + rows.astype(np.uint32)[None, :, None] * np.uint32(1024) + cols


def no_row_hash(key, rows, cols):
    seed, row = seeds(key), rows[None, :, None]
    high, low = (row >> np.uint64(32)).astype(np.uint32), row.astype(np.uint32)
    return reference.mix(seed[:, 0] + low, seed[:, 1] ^ high, cols)


def row_xored_on(key, rows, cols):
    """One hash per key, with the row xored onto the word."""
    return healthy(key, np.zeros(1, np.uint64), cols) ^ rows.astype(np.uint32)[None, :, None]


def low_rows_only(key, rows, cols):
    return healthy(key, rows & np.uint64(2**32 - 1), cols)


def without_last_multiplication(key, rows, cols):
    k0, k1 = row_keys(key, rows)
    x = cols * np.uint32(0x9E3779B9) + k0
    y = cols ^ k1
    x = x ^ (x >> np.uint32(16))
    y = y + x * np.uint32(0x7FEB352D)
    y = y ^ (y >> np.uint32(15))
    x = x + y * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def reused_key(key, rows, cols):
    return np.repeat(healthy(key[:1], rows, cols), key.shape[0], axis=0)


def raw_key_words(key, rows, cols):
    """Key data xored into a counter, without a hash of the key."""
    words = np.asarray(jax.random.key_data(key))[:, :, None, None]
    row = rows[None, :, None]
    k0, k1 = reference.threefry2x32((0, 0), (row >> np.uint64(32), row))
    return reference.mix(k0 ^ words[:, 0], k1 ^ words[:, 1], cols)


def jax_bits(key, rows, cols):
    return np.asarray(jax.vmap(lambda k: jax.random.bits(k, (rows.size, cols.size)))(key))


def biased_bit(key, rows, cols):
    """The highest bit is always 1 in 1/64 of the words."""
    w = healthy(key, rows, cols)
    return w | np.where(w & np.uint32(63) == 0, np.uint32(2**31), np.uint32(0))


def too_even(key, rows, cols):
    """Every byte of the stream takes all of its values in turn."""
    w = counter(key, rows, cols)
    return w * np.uint32(0x01010101)


BROKEN = [
    (counter, "one stream"),
    (counter, "pairs of rows"),
    (counter, "masks in two dimensions"),
    (no_row_hash, "pairs of rows"),
    (row_xored_on, "one stream"),
    (row_xored_on, "pairs of rows"),
    (row_xored_on, "masks in two dimensions"),
    (low_rows_only, "pairs of rows"),
    (without_last_multiplication, "pairs of columns"),
    (reused_key, "pairs of keys"),
    (raw_key_words, "pairs of keys"),
    (jax_bits, "draws of jax.random"),
    (biased_bit, "one stream"),
    (biased_bit, "masks in two dimensions"),
    (too_even, "one stream"),
]


@pytest.mark.parametrize(("broken", "group"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_broken_generators_are_rejected(broken, group):
    assert randomness.rejected(randomness.check(broken, LOG2_WORDS, 0, [group]))


@jax.jit
def hash_keys(words):
    return fast.seed(jnp.moveaxis(words, -1, 0))


def few_rounds(rounds):
    """Row keys by a Threefry that stops early."""

    def row_keys(key, rows):
        seed = np.stack(hash_keys(jax.random.key_data(key)), -1)[..., None]
        hi, lo = (rows >> np.uint64(32)).astype(np.uint32)[None], rows.astype(np.uint32)[None]
        return np.stack(np.broadcast_arrays(*short_threefry(seed[:, 0], seed[:, 1], hi, lo, rounds)), -1)

    return row_keys


def short_threefry(k0, k1, x, y, rounds):
    keys = (k0, k1, k0 ^ k1 ^ np.uint32(0x1BD11BDA))
    x, y = x + k0, y + k1
    for i in range(rounds):
        r = np.uint32(((13, 15, 26, 6), (17, 29, 16, 24))[i // 4 % 2][i % 4])
        x = x + y
        y = x ^ (y << r | y >> (np.uint32(32) - r))
        if i % 4 == 3:
            j = i // 4
            x, y = x + keys[(j + 1) % 3], y + keys[(j + 2) % 3] + np.uint32(j + 1)
    return x, y


def unhashed_seed(key, rows):
    """Row keys as jax.random splits a key, with the words of the key as the seed."""
    words = np.asarray(jax.random.key_data(key))[:, :, None]
    row = rows[None, :]
    return np.stack(reference.threefry2x32((words[:, 0], words[:, 1]), (row >> np.uint64(32), row)), -1)


BROKEN_ROW_KEYS = {
    "8 rounds": (few_rounds(8), "avalanche of row keys"),
    "unhashed seed": (unhashed_seed, "row keys and jax.random"),
}


@pytest.mark.parametrize("broken", BROKEN_ROW_KEYS)
def test_broken_row_keys_are_rejected(broken):
    row_keys, group = BROKEN_ROW_KEYS[broken]
    assert randomness.rejected(randomness.check_row_keys(row_keys, LOG2_WORDS, 0, [group]))


@pytest.mark.parametrize("group", randomness.ROW_KEY_GROUPS)
def test_the_row_keys_of_the_library_pass(group):
    results = randomness.check_row_keys(randomness.library_row_keys, LOG2_WORDS, 0, [group])
    assert results[group] and not randomness.rejected(results)


def test_broken_row_keys_start_from_healthy_ones():
    key, rows = jax.random.split(jax.random.key(3), 2), np.array([0, 5, 2**32 + 1], np.uint64)
    np.testing.assert_array_equal(few_rounds(20)(key, rows), randomness.library_row_keys(key, rows))


@pytest.mark.parametrize("generator", randomness.GENERATORS)
@pytest.mark.parametrize("group", randomness.GROUPS)
def test_the_library_passes(group, generator):
    results = randomness.check(randomness.GENERATORS[generator], LOG2_WORDS, 0, [group])
    assert results[group] and not randomness.rejected(results)


def test_a_nan_result_is_rejected():
    assert randomness.rejected({"group": [randomness.Result("subject", "statistic", float("nan"))]})


def test_the_broken_generators_start_from_a_healthy_one():
    key, rows, cols = jax.random.key(3)[None], np.array([0, 5, 2**32 + 1], np.uint64), np.arange(9, dtype=np.uint32)
    np.testing.assert_array_equal(healthy(key, rows, cols), randomness.library(key, rows, cols))


def test_p_values_are_uniform_for_random_words():
    """Of 400 p-values, Binomial(400, q) lie below q: within 4 standard errors if the distribution is exact."""
    rng, n = np.random.default_rng(0), 400
    results = [dict(randomness.couple(*rng.integers(0, 2**32, (2, 4096), np.uint32))) for _ in range(n)]
    for statistic in results[0]:
        p = np.array([result[statistic] for result in results])
        for q in (0.05, 0.5):
            excess = ((p < q).mean() - q) / np.sqrt(q * (1 - q) / n)
            assert excess < 4, statistic
            assert excess > -4 or "largest" in statistic, statistic  # Bonferroni's bound is conservative


# ---------------------------------------------------------------------------------- emit_bits


def joined(columns, order, rate, count, generator="fast"):
    """Return the first numbers or bytes of the stream."""
    blocks = emit.stream(columns, order, 7, rate, generator)
    parts, size = [], 0
    while size < count:
        parts.append(next(blocks).ravel())
        size += parts[-1].size
    return np.concatenate(parts)[:count]


@pytest.mark.parametrize(("columns", "band"), [(24, 174760), (1024, 4096), (2**20, 1024)])
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_the_stream_is_the_words_of_the_library(monkeypatch, columns, band, order):
    count = 2**22 + 4096  # more than one block
    at = np.arange(count - 5000, count)
    if order == "rows":
        rows, cols = at // columns, at % columns
    else:
        rows, cols = at // (band * columns) * band + at % band, at // band % columns
    expected = reference.element_words(reference.seed((0, 7)), rows.tolist(), cols.tolist())
    np.testing.assert_array_equal(joined(columns, order, None, count)[at], expected)


def test_the_packed_stream_is_the_numbers_that_decide():
    expected = reference.packed_numbers((0, 7), (32, 128)).ravel()
    stream = joined(128, "rows", None, expected.size, "packed")
    assert stream.dtype == np.uint16
    np.testing.assert_array_equal(stream, expected)


@pytest.mark.parametrize("generator", emit.WORD_BITS)
def test_mask_bits_are_the_mask_of_the_library(generator):
    key, columns, rows = jax.random.key(7), 256, 64
    mask = np.asarray(jdrop.dropout_mask(key, (rows, columns), 0.1, generator=generator))
    expected = np.packbits(mask.ravel(), bitorder="little")
    np.testing.assert_array_equal(joined(columns, "rows", 0.1, expected.size, generator), expected)
    band = emit.BLOCK // columns
    mask = jdrop.dropout_mask(key, (band, columns), 0.1, generator=generator, window=((0, band), (0, 2)))
    expected = np.packbits(np.asarray(mask).T.ravel(), bitorder="little")
    np.testing.assert_array_equal(joined(columns, "columns", 0.1, expected.size, generator), expected)


@pytest.mark.parametrize("columns", [1, 3, 1000, 4097, 2**22 + 8, 2**32])
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_blocks_follow_one_another(columns, order):
    """Every block starts where the previous one ends, and has a few million elements at most."""
    row = col = 0
    for at_row, rows, at_col, cols in itertools.islice(emit.blocks(columns, order), 50):
        assert (at_row, at_col) == (row, col) and cols <= columns - col
        assert rows * cols <= emit.BLOCK
        col += cols
        if col == columns:
            row, col = row + rows, 0


def test_a_closed_pipe_ends_the_stream_quietly():
    path = os.pathsep.join([str(pathlib.Path(jdrop.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(SCRIPTS / "emit_bits.py"), "--key-seed", "7"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    ) as process:
        head = process.stdout.read(4096)
        process.stdout.close()
        assert (process.wait(timeout=60), process.stderr.read()) == (0, b"")
    expected = reference.element_words(reference.seed((0, 7)), [0] * 1024, range(1024))
    assert head == expected.astype("<u4").tobytes()
