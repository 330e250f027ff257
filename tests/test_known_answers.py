"""The masks of both generators and derived keys are frozen: literals first, then the NumPy reference on random shapes.

A failure here means that existing runs would get other masks. Never change a literal: create a new mask version.
"""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jdrop
from jdrop import keys
from jdrop._bits import FastBits
from jdrop._mask import Mask
from jdrop._random import fast
from jdrop._random.key_words import key_words
from jdrop._random.threefry import U64, threefry2x32

KEYS = {
    "threefry2x32": (0, 42),
    "rbg": (0, 42, 0, 42),
    "unsafe_rbg": (1, 2, 3, 4),
    "threefry4x32": (0xFFFFFFFF, 0, 0x80000000, 7),
    "philox2x32": (2193621824,),
    "philox4x32": (1801635674, 389949022),
}
MAIN = KEYS["threefry2x32"]


def typed(impl: str) -> jax.Array:
    return jax.random.wrap_key_data(jnp.asarray(np.array(KEYS[impl], np.uint32)), impl=impl)


def legacy(words: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.array(words, np.uint32))


@functools.partial(jax.jit, static_argnames="size")
def _words(mask, *, size):
    return jnp.broadcast_to(mask.word_at(mask.index(size)), size)


def library_words(key, shape, window=None):
    window = [(0, n) for n in shape] if window is None else window
    start = jnp.array([U64.of(at) for at, _ in window], jnp.uint32).reshape(-1, 2)
    mask = Mask(key_words(key), jnp.float32(0), start, tuple(shape), FastBits())
    return np.asarray(_words(mask, size=tuple(n for _, n in window)))


def as_bytes(mask) -> bytes:
    """Pack bits, with the first element in the lowest bit of the first byte."""
    return np.packbits(np.asarray(mask).ravel(), bitorder="little").tobytes()


# ---------------------------------------------------------------------------------- literals


@pytest.mark.parametrize(
    ("key", "counter", "answer"),
    [  # the known answers of Random123
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_published_answers(key, counter, answer):
    assert tuple(int(w[0]) for w in reference.threefry2x32(key, counter)) == answer
    of_library = jax.jit(threefry2x32)(tuple(map(np.uint32, key)), tuple(map(np.uint32, counter)))
    assert tuple(map(int, of_library)) == answer


SEEDS = [
    ("threefry2x32", (0x79E18488, 0xD01E08C3)),
    ("rbg", (0x96A49465, 0x3E332285)),
    ("unsafe_rbg", (0xE11B4791, 0x7CD02095)),
    ("threefry4x32", (0xD0DF772D, 0xCD926598)),
    ("philox2x32", (0x71E605B1, 0xC965F1C6)),
    ("philox4x32", (0x3B1EE875, 0xEBF3618A)),
]


@pytest.mark.parametrize(("impl", "answer"), SEEDS)
def test_seeds_are_frozen(impl, answer):
    assert reference.seed(KEYS[impl]) == answer
    assert tuple(map(int, fast.seed(key_words(typed(impl))))) == answer
    assert tuple(map(int, fast.seed(key_words(legacy(KEYS[impl]))))) == answer


WORDS = [
    ("threefry2x32", (), (), 0xA07B1333),
    ("threefry2x32", (5,), (4,), 0x36FAF387),
    ("threefry2x32", (3, 130), (2, 129), 0x8D3AE89E),
    ("threefry2x32", (2, 3, 64), (1, 2, 63), 0xCAACFB13),
    ("threefry2x32", (2**26, 100), (2**26 - 1, 99), 0x9B438F24),  # two column axes: 100 is below 128, 2**26 joins
    ("threefry2x32", (2**26, 100), (2**25 + 3, 1), 0x49BC7548),
    ("threefry2x32", (2**40, 256), (2**32, 0), 0x84CFD6FB),  # the high word of the row
    ("threefry2x32", (2**40, 256), (2**40 - 1, 255), 0xDDC450EA),
    ("threefry2x32", (3, 2**32, 2), (2, 2**32 - 1, 1), 0xA2D9C4A1),  # 2**32 does not join 2
    ("threefry2x32", (2**33,), (2**32 + 5,), 0x2D828362),  # one axis too long for columns: its high word is a row
    ("threefry2x32", (3, 2**33), (2, 2**33 - 1), 0x2EE32461),
    ("threefry2x32", (2**40, 1), (2**39 + 1, 0), 0x91FB54A2),
    ("rbg", (3, 130), (1, 77), 0xBC11ED18),
    ("unsafe_rbg", (3, 130), (1, 77), 0xA397AE7D),
    ("threefry4x32", (3, 130), (1, 77), 0xDA2E2F93),
    ("philox2x32", (3, 130), (1, 77), 0xA28B593D),
    ("philox4x32", (3, 130), (1, 77), 0x00D49005),
]


@pytest.mark.parametrize(("impl", "shape", "index", "answer"), WORDS)
def test_words_are_frozen(impl, shape, index, answer):
    window = [(i, 1) for i in index]
    assert int(reference.words(KEYS[impl], shape, window).ravel()[0]) == answer
    assert int(library_words(typed(impl), shape, window).ravel()[0]) == answer
    assert int(library_words(legacy(KEYS[impl]), shape, window).ravel()[0]) == answer


FAST_MASKS = [
    ((), 0.5, None, "01"),
    ((5,), 0.5, None, "07"),
    (
        (3, 130),
        0.1,
        None,
        "fffffffddbf77fdffbbfdffffefffff7feffb7dffbffff7ffeeff7f5ff7ffffbfff7fffdfffbffffb7dd7ffff7dfffbf2b",
    ),
    (
        (2, 3, 64),
        0.5,
        None,
        "e7e7e4ac5b9331c8db2b009ee4e05986127096e7c178eb4c16c329f4f65c299ebbda7d3c9850a4fc64b11660a2080cc3",
    ),
    ((2, 5, 7, 3), 0.25, None, "eff7fdbddb977ddedbabcbffe6fcfdb7b6ffbff7f7fbfbffe4f603"),
    ((200, 1), 0.5, None, "e7e7e4ac5b9331c8db2b009ee4e05986127096e7c178eb4c64"),
    ((2**26, 100), 0.5, ((2**26 - 2, 2), (0, 100)), "dc5993e116fbdbcc54eefa35477a2cbdf0b335b315ea80fec2"),
    ((2**40, 256), 0.5, ((2**32 - 1, 2), (100, 64)), "5f89709c07036da6252702dfa950254f"),
    ((2**33,), 0.5, ((2**32 - 64, 128),), "297a551d3836412a16c329f4f65c299e"),
]


LARGE = (300, 1000)
FAST_DIGESTS = [
    (1e-6, "a029edd095745096980649d9d4211b902ceeb74b64e1e97c78d51f24afbc427d"),
    (0.1, "78de4bc3b4ad8d0b5b35d0f971a44e30c08a179f21f48eed447ae0ecbd97c3c3"),
    (0.5, "d75c2b308c2dd94fbbd469e7025868273c7be9178c2276edc0fd235f5b4e0376"),
    (0.999, "65ed1e2df10cc8ec1c7f4a68cb9543cc1258ab4ac33f67365c71f3e3c80057b7"),
]


PACKED_MASKS = [
    ((), 0.5, None, "01"),
    ((20,), 0.5, None, "e71404"),
    (
        (3, 130),
        0.1,
        None,
        "fffeffffdbff7f7ffbefdfd7fefffffffeafb7fffbf3ffeffffff7f5fdffffbfffd7fffdf7fbf3ffbffd7ffffdffffff2f",
    ),
    (
        (2, 3, 64),
        0.5,
        None,
        "e714e4a25b94312cdb000012e4a859a91238968bc134eb8116222914f6dc2951bbde7d0d988ca4cc6498163ba2a70c82",
    ),
    ((2, 5, 7, 3), 0.25, None, "ef16fdf6dbff7d6fdb20cb53e6fdfdffb67abfbff73dfb95e4bd03"),
    ((2**26, 100), 0.5, ((2**26 - 2, 2), (0, 100)), "dc3c93f016bedb6054cafaed472a263df26338d31afa85dec9"),
    ((2**40, 256), 0.5, ((2**32 - 1, 2), (100, 64)), "ef80209e570d2da0052d42dd695f6547"),
    ((2**33,), 0.5, ((2**32 - 64, 128),), "29c855e3389c413716222914f6dc2951"),
]


PACKED_DIGESTS = [
    (2.0**-16, "c35aca06e2c856f6c7d28a52d9b1fd9b4542024117da54436cd4f6e42c7e988b"),
    (0.1, "52e5a4e3f2d7e75b22e72feca6a67920607f195cc26d1561650f56fd846f4124"),
    (0.5, "c38547439494f534da9360796c764d437bf046c6343963080f02c5d1a20e80a1"),
    (0.999, "c0a7ce43bd8c40dd6ea85409b2c6a408b6bdcfa1d2e0ec2d41738f264599c0de"),
]


REFERENCE = {"fast": reference.mask, "packed": reference.packed_mask}


def of_both(fast, packed):
    """Return the cases of both generators."""
    return [(generator, *case) for generator, cases in (("fast", fast), ("packed", packed)) for case in cases]


MASKS, DIGESTS = of_both(FAST_MASKS, PACKED_MASKS), of_both(FAST_DIGESTS, PACKED_DIGESTS)


@pytest.mark.parametrize(("generator", "shape", "rate", "window", "answer"), MASKS)
def test_small_masks_are_frozen(generator, shape, rate, window, answer):
    assert as_bytes(REFERENCE[generator](MAIN, shape, rate, window)).hex() == answer
    mask = jdrop.dropout_mask(typed("threefry2x32"), shape, rate, window=window, generator=generator)
    assert as_bytes(mask).hex() == answer


@pytest.mark.parametrize(("generator", "rate", "answer"), DIGESTS)
def test_large_masks_are_frozen(generator, rate, answer):
    key = typed("threefry2x32")
    for x in (rate, jnp.float32(rate)):
        mask = jdrop.dropout_mask(key, LARGE, x, generator=generator)
        assert hashlib.sha256(as_bytes(mask)).hexdigest() == answer
    y = jdrop.dropout(key, jnp.ones(LARGE), rate, train=True, generator=generator)
    assert hashlib.sha256(as_bytes(np.asarray(y) != 0)).hexdigest() == answer


DERIVED = [
    ("threefry2x32", ("a",), (0xD632EFEE, 0x54EE15B4)),
    ("threefry2x32", ("encoder", 3, "attention", 1000), (0x31682AC7, 0x730731C5)),
    ("threefry2x32", (0,), (0x4B2A6CC9, 0x479BA857)),
    ("threefry2x32", ("0",), (0x67CFE242, 0xB4AEFB18)),
    ("threefry2x32", ("",), (0x77DFA0BF, 0x607FED3E)),
    ("threefry2x32", ("Größe",), (0x06BCC2DD, 0x36B67132)),
    ("threefry2x32", (2**64 - 1,), (0x0BC4AE84, 0x1D76896F)),
    ("threefry2x32", (2**32,), (0x0DD07B59, 0x905A903D)),
    ("threefry2x32", (1, 0), (0x851E8B6C, 0x353AF169)),
    ("threefry2x32", (0, 1), (0x2A07D3A5, 0x566F366F)),
    ("rbg", ("a", 7), (0x98075388, 0x42E21EB7, 0xDA4E6329, 0x39EDE609)),
    ("unsafe_rbg", ("a", 7), (0xD314BA8A, 0x3323B3EC, 0x0023F9A7, 0x20E0F26C)),
    ("threefry4x32", ("a", 7), (0x7E8A7AAD, 0x5410F7E3, 0xF2FF33B5, 0x0120B83D)),
    ("philox2x32", ("a", 7), (0x07F6FD4B,)),
    ("philox4x32", ("a", 7), (0xAD53BD36, 0xB848F81B)),
]


@pytest.mark.parametrize(("impl", "path", "answer"), DERIVED)
def test_derived_keys_are_frozen(impl, path, answer):
    assert tuple(reference.derive(KEYS[impl], *path)) == answer
    derived = keys.derive(typed(impl), *path)
    assert derived.dtype == typed(impl).dtype
    assert tuple(jax.random.key_data(derived).tolist()) == answer
    assert tuple(keys.derive(legacy(KEYS[impl]), *path).tolist()) == answer


IDS = {
    0: (0x4B2A6CC9, 0x479BA857),
    1: (0x38C3F421, 0xB7E4884F),
    -1: (0x0BC4AE84, 0x1D76896F),
    -300: (0xE78AF2EE, 0xD5043FC1),
    2**31 - 1: (0x9BF2AB23, 0xCC0ECF30),
    -(2**31): (0x6B8399C3, 0x6786CEBA),
    2**40 + 1: (0xFC563D8E, 0xD7EBE5CE),
    -(2**63): (0x8B18A80F, 0xDC65CB5F),
}
DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


def ids_of(dtype: str) -> list[int]:
    """Return eight ids that a dtype can hold, some of them repeated."""
    info = np.iinfo(dtype)
    return ([i for i in IDS if info.min <= i <= info.max] * 8)[:8]


def as_words(batch) -> list[tuple[int, ...]]:
    return [tuple(words) for words in jax.random.key_data(batch).tolist()]


def test_reference_derives_the_frozen_keys_of_ids():
    assert {i: tuple(reference.derive(MAIN, i)) for i in IDS} == IDS


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_of_numpy_ids_are_frozen(dtype):
    key, ids = typed("threefry2x32"), ids_of(dtype)
    assert as_words(keys.per_example(key, np.array(ids, dtype))) == [IDS[i] for i in ids]
    assert as_words(keys.derive(key, np.array(ids, dtype)[1]).reshape(1)) == [IDS[ids[1]]]


@pytest.mark.parametrize("dtype", ["int8", "uint16", "uint32", "int64", "uint64"])
def test_keys_of_jax_ids_are_frozen(dtype):
    key, ids = typed("threefry2x32"), ids_of(dtype)
    with jax.enable_x64("64" in dtype):
        array = jnp.asarray(np.array(ids, dtype))
        assert array.dtype == dtype
        assert as_words(keys.per_example(key, array)) == [IDS[i] for i in ids]
        assert as_words(keys.derive(key, array[1]).reshape(1)) == [IDS[ids[1]]]


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_keys_of_traced_ids_are_frozen(dtype):
    ids = ids_of(dtype)
    with jax.enable_x64("64" in dtype):
        batch = jax.jit(keys.per_example)(typed("threefry2x32"), jnp.asarray(np.array(ids, dtype)))
    assert as_words(batch) == [IDS[i] for i in ids]


# ---------------------------------------------------------------------------------- library against reference


def random_shapes(count: int) -> list[tuple[int, ...]]:
    """Return shapes of 0 to 5 axes and at most 4,000 elements, with sizes around the limits of the geometry."""
    rng = np.random.default_rng(0)
    shapes: list[tuple[int, ...]] = []
    while len(shapes) < count:
        shape = tuple(rng.choice([0, 1, 2, 3, 5, 8, 16, 64, 127, 128, 129, 300], rng.integers(0, 6)).tolist())
        if np.prod(shape, dtype=np.int64) <= 4000 and (0 not in shape or rng.random() < 0.1):
            shapes.append(shape)
    return shapes


@pytest.mark.parametrize("shape", random_shapes(12), ids=str)
def test_words_equal_the_reference(shape):
    np.testing.assert_array_equal(library_words(typed("threefry2x32"), shape), reference.words(MAIN, shape))


HUGE = [
    (2**16, 2**16, 3),  # 2**16 * 3 columns, not all of 2**32 * 3
    (2**20, 2**20, 2**20, 100),
    (2**35, 7, 130),
    (2**32 + 1,),
    (5, 2**40),
    (2**40, 1, 1),
]


@pytest.mark.parametrize("shape", HUGE, ids=str)
def test_windows_of_huge_arrays_equal_the_reference(shape):
    rng = np.random.default_rng(1)
    corners = [tuple(0 for _ in shape), tuple(max(n - 3, 0) for n in shape)]
    corners += [tuple(int(rng.integers(0, max(n - 3, 1))) for n in shape) for _ in range(4)]
    for corner in [*corners, tuple(min(2**32 - 1, max(n - 3, 0)) for n in shape)]:
        window = [(at, min(3, n)) for at, n in zip(corner, shape, strict=True)]
        result = library_words(typed("threefry2x32"), shape, window)
        np.testing.assert_array_equal(result, reference.words(MAIN, shape, window), err_msg=str(window))


@pytest.mark.parametrize("impl", KEYS)
def test_masks_and_scale_equal_the_reference(impl):
    shape = (5, 3, 50)
    words = reference.words(KEYS[impl], shape).astype(np.uint64)
    for rate in (0.0, 1e-10, 1e-6, 0.1, 1 / 3, 0.5, 0.9, 0.999, 1 - 2**-24, 1.0):
        t = reference.threshold(rate)
        keep = words >= np.uint64(t)
        np.testing.assert_array_equal(jdrop.dropout_mask(typed(impl), shape, rate), keep)
        scale = np.float32(2**32) / np.float32(2**32 - t) if t < 2**32 else np.float32(0)
        y = jdrop.dropout(legacy(KEYS[impl]), jnp.ones(shape), jnp.float32(rate), train=True)
        np.testing.assert_array_equal(y, np.where(keep, scale, np.float32(0)))


@pytest.mark.parametrize("impl", KEYS)
def test_packed_masks_and_scale_equal_the_reference(impl):
    """Rates round to steps of 2**-16, and the scale belongs to what they become: also 0 and 1."""
    shape = (5, 3, 50)
    numbers = reference.packed_numbers(KEYS[impl], shape)
    for rate in (0.0, 1e-6, 2.0**-17, 3 * 2.0**-17, 0.1, 1 / 3, 0.5, 0.9, 0.999, 1 - 2**-16, 1 - 2**-18, 1.0):
        t = reference.packed_threshold(rate)
        keep = numbers >= t
        np.testing.assert_array_equal(jdrop.dropout_mask(typed(impl), shape, rate, generator="packed"), keep)
        scale = np.float32(2**16) / np.float32(2**16 - t) if t < 2**16 else np.float32(0)
        for x in (rate, jnp.float32(rate), np.full((5, 1, 1), rate)):
            y = jdrop.dropout(legacy(KEYS[impl]), jnp.ones(shape), x, train=True, generator="packed")
            np.testing.assert_array_equal(y, np.where(keep, scale, np.float32(0)))


def test_threshold_rounds_half_to_even():
    halves = {2.0**-33: 0, 3 * 2.0**-33: 2, 5 * 2.0**-33: 2, 7 * 2.0**-33: 4, 0.1: 429496736, 1 - 2.0**-24: 2**32 - 256}
    assert {rate: reference.threshold(rate) for rate in halves} == halves
    for rate, t in halves.items():
        with jax.enable_x64(True):
            kept = jdrop.dropout(None, jnp.ones((), jnp.float64), rate, train=False, scale_at="eval")
        assert float(kept) == (2**32 - t) / 2**32


def test_packed_thresholds_round_half_to_even():
    halves = {2.0**-17: 0, 3 * 2.0**-17: 2, 5 * 2.0**-17: 2, 0.1: 6554, 1 - 2.0**-17: 2**16, 1 - 2.0**-16: 2**16 - 1}
    assert {rate: reference.packed_threshold(rate) for rate in halves} == halves
    for rate, t in halves.items():
        for x in (rate, jnp.float32(rate)):
            kept = jdrop.dropout(None, jnp.ones(()), x, train=False, scale_at="eval", generator="packed")
            assert float(kept) == (2**16 - t) / 2**16


def test_the_mask_versions_are_one():
    assert jdrop.MASK_VERSION == jdrop.PACKED_MASK_VERSION == 1
