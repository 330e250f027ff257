"""Rates and means are exact: within 5 standard errors for 10**8 draws. A bias of 0.1% would fail every test here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdrop import dropout

RATES = [1e-6, 1e-4, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99, 0.9999, 0.999999]
SHAPE = (10_000, 1_000)  # 10**7 draws per rate, 10**8 for all rates


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
def test_drop_frequency_and_mean(dtype, x64):
    n = SHAPE[0] * SHAPE[1]

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})  # fast code for 10**8 draws
    def draw(key, rate):
        y = dropout(key, jnp.ones(SHAPE, dtype), rate, train=True)
        return jnp.sum(y == 0), jnp.sum(jnp.real(y).astype(jnp.float64))

    deviations = []
    for i, rate in enumerate(RATES):
        dropped, total = draw(jax.random.key(i), jnp.asarray(rate, jnp.float64))
        standard_error = np.sqrt(rate * (1 - rate) / n)
        deviations.append((float(dropped) / n - rate) / standard_error)
        if dtype in ("float32", "float64"):
            # y is 0 or 1/(1-rate): its standard deviation is sqrt(rate / (1 - rate)).
            assert abs(float(total) / n - 1) < 5 * np.sqrt(rate / (1 - rate) / n), rate
    assert max(map(abs, deviations)) < 5, deviations
    # All rates together: the sum of 10 independent deviations has standard deviation sqrt(10).
    assert abs(sum(deviations)) < 5 * np.sqrt(len(RATES)), deviations


@pytest.mark.parametrize(("dtype", "mantissa_bits"), [("bfloat16", 7), ("float16", 10)])
@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_16_bit_values_are_unbiased_over_mantissas(dtype, mantissa_bits, rate):
    """With every mantissa equally often in the input, the ratio of the means is 1.

    Two errors are independent: that of the decisions, sqrt(rate / (1 - rate) / n) for inputs of one size, and that of
    the one rounding of m distinct products, each uniform within half a unit in the last place, which is at most 2**-b
    of the value: 2**-b / sqrt(12 m).
    """
    m = 2**mantissa_bits
    x = (1 + jnp.arange(m) / m).astype(dtype)
    n = 10_000 * 1024
    y = dropout(jax.random.key(5), jnp.tile(x, (10_000, 1024 // m)), rate, train=True)
    ratio = np.asarray(y, np.float64).sum() / n / np.asarray(x, np.float64).mean()
    second_moment = np.mean(np.asarray(x, np.float64) ** 2) / np.mean(np.asarray(x, np.float64)) ** 2
    standard_error = np.hypot(np.sqrt(rate / (1 - rate) * second_moment / n), 2.0**-mantissa_bits / np.sqrt(12 * m))
    assert abs(ratio - 1) < 5 * standard_error
    # A scale rounded to the dtype, as in other libraries, has a larger error unless it is exact.
    rounded_scale = float((1 / (1 - jnp.asarray(rate, dtype))).astype(dtype)) * (1 - rate)
    if dtype == "bfloat16" and rate == 0.1:
        assert abs(rounded_scale - 1) > 5 * standard_error


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.999])
def test_expectation_of_generator_jax(rate):
    n = 10**7
    y = dropout(jax.random.key(1), jnp.ones((10_000, 1_000)), rate, train=True, generator="jax")
    mean = float(np.asarray(y, np.float64).mean())
    assert abs(mean - 1) < 5 * np.sqrt(rate / (1 - rate) / n)
