"""Gaussian members: the quantile function, moments, shared axes, and limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jdrop
from jdrop._family.noise import _ADD
from jdrop._mask import draw_mask
from jdrop._primitive import masked_op
from jdrop._random import normal

KEY = jax.random.key(21)
N = 2**22


def exact(word):
    """Return the quantile in float64 from the same 31 bits and sign."""
    word = np.asarray(word, np.uint64)
    tail = ((word >> 1) + 0.5) * 2.0**-31
    return np.where(word & 1, -1, 1) * stats.norm.isf(tail / 2)


def test_the_quantile_is_accurate_over_all_words():
    random = np.random.default_rng(0).integers(0, 2**32, 2**20, dtype=np.uint64)
    ends = np.concatenate([np.arange(2**16), 2**32 - 1 - np.arange(2**16)]).astype(np.uint64)
    powers = (np.uint64(1) << np.arange(32, dtype=np.uint64)).repeat(3) + np.tile([0, 1, 2], 32).astype(np.uint64)
    word = np.concatenate([random, ends, powers]) % 2**32
    z = np.asarray(normal.normal(jnp.asarray(word.astype(np.uint32))), np.float64)
    assert np.abs(z - exact(word)).max() < 5e-6  # as the docstring says
    assert 6.33 < np.abs(z).max() < 6.34


def test_arithmetic_without_contraction_agrees_within_its_roundings():
    """NumPy rounds each product and each sum: 10 times for P, 8 for Q, and 3 times to combine them. Two orders of
    rounding differ by at most 42 half units of z, and by 4 of l, whose error does not shrink with z."""
    word = np.random.default_rng(2).integers(0, 2**32, 2**20, dtype=np.uint64).astype(np.uint32)
    tail = (word >> np.uint32(1)).astype(np.int32).astype(np.float32) + np.float32(0.5)
    bits = tail.view(np.int32)
    f = ((bits & np.int32(0x007FFFFF)) | np.int32(0x3F800000)).view(np.float32) - np.float32(1)

    def polynomial(coefficients, x):
        y = np.full_like(x, coefficients[-1])
        for c in coefficients[-2::-1]:
            y = y * x + np.float32(c)
        return y

    length = (158 - (bits >> 23)).astype(np.float32) - f * (1 + (1 - f) * polynomial(normal._G, f))
    size = length * polynomial(normal._P, length) / polynomial(normal._Q, length)
    z = np.where(word & 1, -size, size)
    assert z.dtype == np.float32
    ours = np.asarray(normal.normal(jnp.asarray(word)))
    assert (np.abs(z.astype(np.float64) - ours) <= 2.0**-24 * (42 * np.abs(z) + 4)).all()


def test_the_lowest_bit_is_the_sign_and_the_rest_decreases_in_size():
    word = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 2**31, 10**5)) * 2, jnp.uint32)
    z, minus = normal.normal(word), normal.normal(word + 1)
    np.testing.assert_array_equal(z, -minus)
    assert float(jnp.diff(z).max()) <= 2e-6, "monotone up to rounding"


@pytest.mark.parametrize("shape", [(2**12, 2**10), (N,), (2**20, 4)])
def test_added_noise_is_standard_normal(shape):
    """Moments within 5 standard errors (k-th moment: sqrt((E z^2k - (E z^k)^2) / N)), and a Kolmogorov-Smirnov test."""
    z = np.asarray(jdrop.gaussian_noise(KEY, jnp.zeros(shape), 1.0, train=True), np.float64).ravel()
    for k, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs((z**k).mean() - mean) < 5 * np.sqrt(variance / N), k
    assert stats.kstest(z[:100_000], "norm").pvalue > 1e-6
    assert abs((z[1:] * z[:-1]).mean()) < 5 / np.sqrt(N)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_gaussian_dropout_has_the_variance_of_dropout(rate):
    """The variance is r / (1 - r), with a relative standard error of sqrt(2 / N) for N draws."""
    y = np.asarray(jdrop.gaussian_dropout(KEY, jnp.full((2048, 2048), 2.0), rate, train=True), np.float64) / 2
    variance = rate / (1 - rate)
    assert abs(y.mean() - 1) < 5 * np.sqrt(variance / N)
    assert abs(y.var() / variance - 1) < 5 * np.sqrt(2 / N)


@pytest.mark.compiled
def test_shared_axes_share_one_draw():
    x = jnp.ones((4, 50, 8))
    for f in (jdrop.gaussian_dropout, jdrop.gaussian_noise):
        y = f(KEY, x, 0.5, train=True, shared_axes=1)
        np.testing.assert_array_equal(y, jnp.broadcast_to(y[:, :1], y.shape))
        assert len(np.unique(y)) == 32
        np.testing.assert_array_equal(y[:, :1], f(KEY, x[:, :1], 0.5, train=True))


def test_arrays_of_rates_and_deviations():
    x = jnp.ones((4, 300))
    for f in (jdrop.gaussian_dropout, jdrop.gaussian_noise):
        y = f(KEY, x, jnp.array([0.0, 0.1, 0.5, 0.9])[:, None], train=True)
        np.testing.assert_array_equal(y[0], x[0])
        assert float(y[1].std()) < float(y[2].std()) < float(y[3].std())
        np.testing.assert_array_equal(y[2], f(KEY, x, 0.5, train=True)[2])


def test_gradients_are_the_noise_itself():
    x = jnp.linspace(1, 2, 600).reshape(2, 300)
    g = jax.grad(lambda x: jdrop.gaussian_dropout(KEY, x, 0.5, train=True).sum())(x)
    np.testing.assert_array_equal(g, jdrop.gaussian_dropout(KEY, jnp.ones_like(x), 0.5, train=True))
    g = jax.grad(lambda x: jdrop.gaussian_noise(KEY, x, 0.5, train=True).sum())(x)
    np.testing.assert_array_equal(g, jnp.ones_like(x))


def test_noise_is_unrelated_to_the_mask_of_another_key_and_to_jax_random():
    z = np.asarray(jdrop.gaussian_noise(KEY, jnp.zeros((2048, 1024)), 1.0, train=True))
    other = np.asarray(jax.random.normal(KEY, z.shape))
    assert abs((z * other).mean()) < 5 / np.sqrt(z.size)


def test_limits():
    x = jnp.ones((3, 200))
    with pytest.raises(ValueError, match=r"gaussian_dropout: rate must lie in \[0, 1\): at 1 the variance is infinite"):
        jdrop.gaussian_dropout(KEY, x, 1.0, train=True)
    with pytest.raises(ValueError, match="at 1 the variance"):
        jdrop.gaussian_dropout(KEY, x, np.array([0.5] * 199 + [1.0]), train=False)
    y = jdrop.gaussian_dropout(KEY, x, jnp.float32(1), train=True)
    assert bool(jnp.isfinite(y).all()) and float(y.std()) > 1000
    np.testing.assert_array_equal(y, jdrop.gaussian_dropout(KEY, x, jnp.float32(7), train=True))
    for bad in (-0.1, np.nan, np.inf, 1e39, 10**400):
        with pytest.raises(ValueError, match=r"gaussian_noise: stddev must lie in \[0, 3.40282e\+38\]"):
            jdrop.gaussian_noise(KEY, x, bad, train=True)
    np.testing.assert_array_equal(jdrop.gaussian_noise(KEY, x, jnp.float32(-1), train=True), x)
    assert float(jdrop.gaussian_noise(KEY, x, 30.0, train=True).std()) > 20
    with pytest.raises(TypeError, match="gaussian_noise: x must be float8, float16, bfloat16, float32 or float64, got"):
        jdrop.gaussian_noise(KEY, x.astype("complex64"), 1.0, train=True)


def test_sixteen_bit_floats_are_rounded_once():
    x = (jnp.arange(1.0, 1025.0) / 64).astype("bfloat16").reshape(4, 256)
    wide = jdrop.gaussian_dropout(KEY, x.astype("float32"), 0.5, train=True)
    np.testing.assert_array_equal(jdrop.gaussian_dropout(KEY, x, 0.5, train=True), wide.astype("bfloat16"))
    wide = jdrop.gaussian_noise(KEY, x.astype("float32"), 0.5, train=True)
    np.testing.assert_array_equal(jdrop.gaussian_noise(KEY, x, 0.5, train=True), wide.astype("bfloat16"))


def test_noise_of_a_tile_of_one_element_is_as_close_as_promised():
    """The words are equal, but another program may round differently."""
    x = jnp.zeros((8, 300))
    whole = np.asarray(jax.jit(lambda x: jdrop.gaussian_noise(KEY, x, 1.0, train=True))(x), np.float64)
    mask = draw_mask("test", KEY, np.asarray(1.0), x.shape)
    for i, j in ((0, 0), (3, 131), (7, 299)):
        start = jnp.array([(0, i), (0, j)], jnp.uint32)
        tile = dataclasses.replace(mask, start=start)
        one = float(jax.jit(lambda x, tile=tile: masked_op(_ADD, tile, x))(jnp.zeros((1, 1)))[0, 0])
        assert abs(one - whole[i, j]) <= 2.0**-24 * (42 * abs(whole[i, j]) + 4)
