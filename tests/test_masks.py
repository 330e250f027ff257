"""dropout_mask: windows, generators, large shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdrop
from jdrop import dropout, dropout_mask
from jdrop._mask import draw_mask
from jdrop._random import jax_bits
from jdrop._random.threefry import U64, threefry2x32
from jdrop._types import GENERATORS

KEY = jax.random.key(3)


@pytest.mark.parametrize("shape", [(300,), (7, 33, 5), (2, 5, 7, 3), (6, 4, 256), (40, 1)])
@pytest.mark.parametrize("generator", GENERATORS)
def test_windows_are_parts_of_the_whole(shape, generator):
    whole = np.asarray(dropout_mask(KEY, shape, 0.5, generator=generator))
    rng = np.random.default_rng(0)
    at = jax.jit(
        lambda starts, sizes: dropout_mask(
            KEY, shape, 0.5, generator=generator, window=tuple(zip(starts, sizes, strict=True))
        ),
        static_argnums=1,
    )
    for _ in range(2):  # sizes are static, and one program serves all starts
        sizes = tuple(int(rng.integers(0, n + 1)) for n in shape)
        for _ in range(4):
            starts = [int(rng.integers(0, n - size + 1)) for n, size in zip(shape, sizes, strict=True)]
            part = whole[tuple(slice(s, s + n) for s, n in zip(starts, sizes, strict=True))]
            window = list(zip(starts, sizes, strict=True))
            np.testing.assert_array_equal(dropout_mask(KEY, shape, 0.5, generator=generator, window=window), part)
            np.testing.assert_array_equal(at([jnp.int32(s) for s in starts], sizes), part)


def test_window_with_shared_axes_and_array_rates():
    shape, shared = (5, 6, 200), (1,)
    whole = dropout_mask(KEY, shape, 0.5, shared_axes=shared)
    part = dropout_mask(KEY, shape, 0.5, shared_axes=shared, window=((1, 2), (3, 3), (100, 50)))
    np.testing.assert_array_equal(part, whole[1:3, 3:6, 100:150])
    rates = np.array([0.0, 1.0])[:, None, None]
    part = dropout_mask(KEY, shape, rates, window=((1, 2), (3, 3), (100, 50)))
    assert bool(part[0].all()) and not bool(part[1].any())


def test_windows_of_arrays_beyond_memory_agree():
    """Overlapping windows at huge indices agree, and traced starts give the same windows."""
    for shape, start in (
        ((2**26, 100), (2**26 - 3, 10)),
        ((2**34,), (2**33 - 50,)),
        ((5, 2**33), (1, 2**32 - 50)),
        ((2**40, 256), (2**36 + 5, 20)),
        ((2**20, 2**20, 200), (2**19 + 1, 2**20 - 5, 3)),
    ):
        sizes = [min(80, n - s) for n, s in zip(shape, start, strict=True)]
        a = dropout_mask(KEY, shape, 0.5, window=tuple(zip(start, sizes, strict=True)))
        inner = [(s + 1, n - 2) for s, n in zip(start, sizes, strict=True)]
        b = dropout_mask(KEY, shape, 0.5, window=inner)
        np.testing.assert_array_equal(b, a[tuple(slice(1, -1) for _ in shape)])
        assert 0.3 < float(a.mean()) < 0.7
    traced = jax.jit(lambda s: dropout_mask(KEY, (2**32 - 1,), 0.5, window=((s, 60),)))
    start = 2**31 + 77
    np.testing.assert_array_equal(
        traced(jnp.uint32(start)), dropout_mask(KEY, (2**32 - 1,), 0.5, window=((start, 60),))
    )


def test_traced_starts_of_64_bits(x64):
    f = jax.jit(lambda s: dropout_mask(KEY, (2**34,), 0.5, window=((s, 60),)))
    for start in (5, 2**32 - 7, 2**33 + 1):
        np.testing.assert_array_equal(f(jnp.int64(start)), dropout_mask(KEY, (2**34,), 0.5, window=((start, 60),)))


def test_the_two_halves_of_a_long_axis_differ():
    low, high = (dropout_mask(KEY, (2**33,), 0.5, window=((s, 2000),)) for s in (100, 100 + 2**32))
    same = float(jnp.mean(low == high))
    assert abs(same - 0.5) < 5 * np.sqrt(0.25 / 2000)


def test_a_long_axis_equals_two_rows_of_2_to_the_32():
    """The high word of a long axis counts as a row."""
    long = dropout_mask(KEY, (2**33,), 0.5, window=((2**32 + 9, 50),))
    rows = dropout_mask(KEY, (2, 2**32), 0.5, window=((1, 1), (9, 50)))
    np.testing.assert_array_equal(long, rows[0])


def test_huge_shapes_are_abstract_until_they_are_computed():
    for shape in ((2**33,), (2**26, 100), (2**40, 256)):
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        y = jax.eval_shape(lambda x: dropout(KEY, x, 0.5, train=True), x)
        assert (y.shape, y.dtype) == (shape, jnp.bfloat16)
        assert jax.eval_shape(lambda s=shape: dropout_mask(KEY, s, 0.5)).shape == shape
    jax.jit(lambda: dropout_mask(KEY, (2**33,), 0.5)).lower()


def words_of(shape):
    mask = draw_mask("test", KEY, np.asarray(0.5), shape)
    return np.asarray(jnp.broadcast_to(mask.word_at(mask.index(shape)), shape))


def just_above(rate):
    return np.nextafter(rate, np.float32(1))


def test_a_word_equal_to_the_threshold_is_kept():
    """Words with 24 significant bits are thresholds of float32 rates: kept at this rate, dropped one step above."""
    shape = (64, 512)
    words = words_of(shape)
    at = np.argwhere((words % 256 == 0) & (words > 0))
    assert len(at) > 50
    for i, j in at[:5]:
        rate = np.float32(words[i, j] / 2**32)
        assert np.asarray(dropout_mask(KEY, shape, rate))[i, j]
        assert not np.asarray(dropout_mask(KEY, shape, just_above(rate)))[i, j]


# ------------------------------------------------------------------------------------ generator="jax"


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg", "threefry4x32", "philox2x32", "philox4x32"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 130), (2, 5, 7, 3)])
def test_generator_jax_equals_bernoulli(impl, shape):
    """Every dtype of the rate has every shape where bits are drawn by index, and one shape elsewhere."""
    key = jax.random.key(5, impl=impl)
    rates = [0.1, 0.5, 0.999]
    if impl == "threefry2x32" or shape == (3, 130):
        rates += [np.float32(0.3), jnp.float32(0.7), jnp.bfloat16(0.1), jnp.float16(0.2)]
    for rate in rates:
        mask = dropout_mask(key, shape, rate, generator="jax")
        np.testing.assert_array_equal(mask, jax.random.bernoulli(key, 1 - rate, shape))


@pytest.mark.parametrize("rate", [0.1, np.float32(0.1), np.float64(0.1), "jnp64", "bf16"])
def test_generator_jax_follows_the_x64_setting(rate, x64):
    rate = {"jnp64": jnp.asarray(0.1, jnp.float64), "bf16": jnp.asarray(0.1, jnp.bfloat16)}.get(rate, rate)
    mask = dropout_mask(KEY, (50, 200), rate, generator="jax")
    np.testing.assert_array_equal(mask, jax.random.bernoulli(KEY, 1 - rate, (50, 200)))
    y = dropout(KEY, jnp.ones((50, 200), jnp.float32), rate, train=True, generator="jax")
    np.testing.assert_array_equal(y != 0, mask)


def test_generator_jax_without_partitionable_bits():
    with jax.threefry_partitionable(False):
        mask = dropout_mask(KEY, (50, 201), 0.3, generator="jax")
        np.testing.assert_array_equal(mask, jax.random.bernoulli(KEY, 1 - 0.3, (50, 201)))
        with pytest.raises(NotImplementedError, match="dropout_mask: generator must be"):
            dropout_mask(KEY, (50, 201), 0.3, generator="jax", window=((0, 1), (0, 1)))
    assert bool(jnp.any(mask != dropout_mask(KEY, (50, 201), 0.3, generator="jax")))


def test_generator_jax_scales_by_the_exact_keep_probability():
    """A bfloat16 rate draws 7 bits: 1 - bfloat16(0.1) = 0.8984375 = 115 / 128."""
    x = jnp.ones((100, 100))
    y = dropout(KEY, x, jnp.bfloat16(0.1), train=True, generator="jax")
    assert float(y.max()) == np.float32(128 / 115)
    y = dropout(KEY, x, jnp.bfloat16(0.001), train=True, generator="jax")  # 1 - 0.001 is 1 in bfloat16
    np.testing.assert_array_equal(y, x)


def test_the_two_generators_differ():
    fast, jaxs = (dropout_mask(KEY, (100, 200), 0.5, generator=g) for g in ("fast", "jax"))
    assert abs(float(jnp.mean(fast == jaxs)) - 0.5) < 5 * np.sqrt(0.25 / 20000)


# ------------------------------------------------------------------------------------ peers, bit for bit


def test_masks_of_flax_linen(need):
    need("flax")
    import flax.linen as nn

    x = jnp.ones((16, 300))
    layer = nn.Dropout(0.3, deterministic=False)
    theirs = layer.apply({}, x, rngs={"dropout": KEY})

    class Ours(nn.Module):
        @nn.compact
        def __call__(self, x):
            return dropout(self.make_rng("dropout"), x, 0.3, train=True, generator="jax")

    class Theirs(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.where(jax.random.bernoulli(self.make_rng("dropout"), 1 - 0.3, x.shape), x / (1 - 0.3), 0)

    ours = Ours().apply({}, x, rngs={"dropout": KEY})
    np.testing.assert_allclose(ours, Theirs().apply({}, x, rngs={"dropout": KEY}), rtol=1e-6)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_masks_of_equinox(need):
    need("equinox")
    import equinox as eqx

    x = jnp.ones((16, 300))
    theirs = eqx.nn.Dropout(0.3)(x, key=KEY)
    np.testing.assert_allclose(dropout(KEY, x, 0.3, train=True, generator="jax"), theirs, rtol=1e-6)


def test_masks_of_haiku(need):
    need("haiku")
    import haiku as hk

    x = jnp.ones((16, 300))
    key = jax.random.PRNGKey(3)
    with jax.numpy_dtype_promotion("standard"):
        theirs = hk.dropout(key, 0.3, x, broadcast_dims=(0,))
    ours = dropout(key, x, 0.3, train=True, generator="jax", shared_axes=(0,))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_mask_is_unrelated_to_other_draws_from_the_key():
    shape = (200, 200)
    ours = dropout_mask(KEY, shape, 0.5)
    for draw in (
        jax.random.bernoulli(KEY, 0.5, shape),
        jax.random.bernoulli(jax.random.split(KEY)[0], 0.5, shape),
        jax.random.bernoulli(jax.random.fold_in(KEY, 1), 0.5, shape),
        dropout_mask(jax.random.fold_in(KEY, 0), shape, 0.5),
        dropout_mask(jdrop.keys.derive(KEY, 0), shape, 0.5),
    ):
        assert abs(float(jnp.mean(ours == draw)) - 0.5) < 5 * np.sqrt(0.25 / ours.size)


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 23), ("float16", 10), ("bfloat16", 7)])
def test_thresholds_of_generator_jax_are_rounded_up(dtype, bits):
    """``uniform < p`` holds for ceil(p * 2**bits) of the 2**bits values; random draws would rarely show it."""
    for p in jnp.array([0.0, 1e-4, 0.1, 0.3, 0.5, 0.7, 0.999, 1.0], dtype):
        rate = jax_bits.realized_rate(1 - p)
        kept = int(np.ceil(np.float64(1 - (1 - p)) * 2**bits))
        assert rate.dtype == dtype and float(rate) == 1 - kept / 2**bits
        of_bits = jnp.array([max(kept - 1, 0), min(kept, 2**bits - 1)], "uint64" if bits == 52 else "uint32")
        assert jax_bits.keep(of_bits, rate).tolist() == [kept > 0, kept == 2**bits]


def test_windows_of_generator_jax_beyond_2_to_the_32_elements():
    """The index has 64 bits: by hand, the mask is uniform(threefry(key, index)) < 1 - rate."""
    shape, start, n = (2**20, 2**20), (2**15 + 3, 77), 200
    mask = dropout_mask(KEY, shape, 0.5, generator="jax", window=((start[0], 1), (start[1], n)))[0]
    words = jax.random.key_data(KEY)
    flat = [start[0] * shape[1] + start[1] + i for i in range(n)]
    hi, lo = (jnp.asarray(np.array(part, np.uint32)) for part in zip(*(divmod(i, 2**32) for i in flat), strict=True))
    high, low = threefry2x32((words[0], words[1]), (hi, lo))
    np.testing.assert_array_equal(mask, ((high ^ low) >> 9) < jnp.uint32(2**22))


def test_keep_at_keeps_a_word_equal_to_the_threshold():
    for shape in ((64, 512), (2**17, 1)):
        words = words_of(shape)
        mask = draw_mask("test", jax.random.clone(KEY), np.asarray(0.5), shape)
        at = np.argwhere((words % 256 == 0) & (words > 0))[:5]  # float32 holds these exactly
        assert len(at) == 5
        for element in at:
            threshold = np.float32(words[tuple(element)] / 2**32)
            index = [U64(np.uint32(0), jnp.full((1, 1), i, jnp.uint32)) for i in element]
            for rate, kept in ((threshold, True), (just_above(threshold), False)):
                assert bool(dataclasses.replace(mask, rate=jnp.asarray(rate)).keep_at(index).item()) == kept


def test_generator_jax_subtracts_a_python_rate_before_rounding():
    """1 - rate in Python, rounded once to float32, as in bernoulli(key, 1 - rate): the difference is a step of 2**-23."""
    differing = 0
    for rate in np.random.default_rng(0).uniform(0, 0.5, 200):
        realized = jax_bits.realized_rate(np.asarray(rate))
        steps = lambda p: np.ceil(np.float64(p) * 2**23)
        assert realized.dtype == jnp.float32 and 1 - float(realized) == steps(np.float32(1 - rate)) / 2**23
        differing += steps(np.float32(1 - rate)) != steps(np.float32(1) - np.float32(rate))
    assert differing >= 10, "some rates show the difference"


def test_rate_zero_keeps_all_of_the_window():
    window = ((1, 2), (3, 3), (100, 50))
    for rate in (0.0, np.zeros((2, 1, 50))):
        mask = dropout_mask(None, (5, 6, 200), rate, window=window)
        assert mask.shape == (2, 3, 50) and mask.dtype == bool and bool(mask.all())


@pytest.mark.parametrize("generator", GENERATORS)
def test_arrays_of_2_to_the_32_elements_and_more(generator):
    """Strides exceed 32 bits, even those of axes with one element or none."""
    shape, first = (1, 2**32, 128), 2**32 - 2
    window = dropout_mask(KEY, shape, 0.5, generator=generator, window=((0, 1), (first, 2), (0, 128)))
    without = dropout_mask(KEY, shape[1:], 0.5, generator=generator, window=((first, 2), (0, 128)))
    np.testing.assert_array_equal(window[0], without)
    for large in ((1, 65536, 65536), shape, (2**33, 3)):
        f = jax.jit(lambda k, x: dropout(k, x, 0.5, train=True, generator=generator))
        f.lower(KEY, jax.ShapeDtypeStruct(large, jnp.float32))
    assert dropout(KEY, jnp.zeros((0, 2**33, 128)), 0.5, train=True, generator=generator).shape == (0, 2**33, 128)
