"""Gaussian noise, multiplied or added, from the same random-access words as the masks."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jdrop import _checks, _loops, _member
from jdrop._linear import Draw, Rule
from jdrop._shards import Shard
from jdrop.decisions import RateLike

_BELOW_ONE = 1 - 2.0**-24  # the largest float32 below 1

# The quantile of |z| as a function of l = -log2(its tail probability): |z| = l * P(l) / Q(l) for 0 <= l <= 32, within
# 6e-7 of its value; and log2(1 + f) = f + f * (1 - f) * G(f) for 0 <= f <= 1, within 5e-7.
_P = (0.868730653, 0.889600427, 0.21859531, 0.0124690131, 8.80280327e-05, -1.83493107e-07)
_Q = (1.0, 1.37056879, 0.520976108, 0.056791107, 0.00127495326)
_G = (0.442656509, -0.277746862, 0.194768754, -0.128317284, 0.0620254748, -0.0147599605)


def gaussian_dropout(
    key: Array | None,
    x: Array,
    rate: RateLike,
    *,
    train: bool,
    shared_axes: int | Sequence[int] = (),
    shard: Shard = None,
) -> Array:
    """Multiply by Gaussian noise with the mean and variance that dropout at ``rate`` has.

    ``y[i] = x[i] * (1 + sqrt(rate / (1 - rate)) * z[i])`` with ``z[i] ~ N(0, 1)``. The noise of the gradient is made
    again from the key, not stored.

    Args:
      key: one PRNG key, used once. ``None`` is fine if ``train`` is false or ``rate`` is the number 0.
      x: float16, bfloat16, float32, float64 or complex array of any shape. 16-bit floats are multiplied in float32 and
        rounded once.
      rate: what dropout would drop with, or an array of it that broadcasts to the noise, as for
        :func:`jdrop.dropout`. At 1 the variance is infinite: a Python or NumPy 1 is an error, and an array of JAX is
        clipped to the float32 just below 1.
      train: ``True`` draws noise; ``False`` returns x itself.
      shared_axes: axes along which one draw is shared.
      shard: as for :func:`jdrop.dropout`.

    Returns:
      An array of the shape and dtype of x.

    Raises:
      ValueError: a rate is not in [0, 1), an axis is out of range, or ``key`` is a batch of keys.
      TypeError: an argument is of the wrong type, ``key`` is missing, or ``train`` is traced.

    References:
      Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov (2014), Dropout: A Simple Way to Prevent Neural
      Networks from Overfitting, JMLR, section 10.

    Limits:
      A number has 32 random bits: the noise lies within 6.34 standard deviations, and is accurate to 5e-6 of one. The
      words are the same on every platform. Real arithmetic is not, where one contracts ``a * b + c`` and another does
      not: two such platforms differ by at most ``2**-24 * (42 * abs(z) + 4)``, a few millionths.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> y = jdrop.gaussian_dropout(jax.random.key(0), jnp.ones([1000, 100]), 0.2, train=True)
      >>> round(float(y.mean()), 2), round(float(y.std()), 2)
      (1.0, 0.5)
    """
    name = "gaussian_dropout"
    _checks.array(name, "x", x)
    call = _member.check(name, key, x.shape, rate, train=train, shared_axes=shared_axes, shard=shard)
    if isinstance(call.rate, np.ndarray) and np.any(call.rate == 1):
        rule = "must lie in [0, 1): at 1 the variance is infinite"
        raise ValueError(_checks.text(name, "rate", rule, _checks.describe(rate), "pass a smaller rate"))
    return x if call.idle else call.apply(_MULTIPLIED, x)


def gaussian_noise(
    key: Array | None,
    x: Array,
    stddev: RateLike,
    *,
    train: bool,
    shared_axes: int | Sequence[int] = (),
    shard: Shard = None,
) -> Array:
    """Add Gaussian noise: ``y[i] = x[i] + stddev * z[i]`` with ``z[i] ~ N(0, 1)``.

    The gradient passes unchanged.

    Args:
      key: one PRNG key, used once. ``None`` is fine if ``train`` is false or ``stddev`` is the number 0.
      x: float16, bfloat16, float32 or float64 array of any shape. 16-bit floats are added in float32 and rounded once.
      stddev: standard deviation, in the units of x, or an array of them that broadcasts to the noise. A Python or NumPy
        value must lie in the range of float32 and be at least 0; an array of JAX acts as 0 where it is below. It is
        rounded to float32 first. No gradient flows to it.
      train: ``True`` draws noise; ``False`` returns x itself.
      shared_axes: axes along which one draw is shared.
      shard: as for :func:`jdrop.dropout`.

    Returns:
      An array of the shape and dtype of x.

    Raises:
      ValueError: ``stddev`` or an axis is out of range, or ``key`` is a batch of keys.
      TypeError: an argument is of the wrong type, x is complex, ``key`` is missing, or ``train`` is traced.

    References:
      Bishop (1995), Training with Noise is Equivalent to Tikhonov Regularization, Neural Computation.

    Limits:
      As for :func:`jdrop.gaussian_dropout`.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> y = jdrop.gaussian_noise(jax.random.key(0), jnp.ones([1000, 100]), 0.5, train=True)
      >>> round(float(y.mean()), 2), round(float(y.std()), 2)
      (1.0, 0.5)
    """
    name = "gaussian_noise"
    _checks.array(name, "x", x, _checks.FLOATS)
    options: Any = {"shared_axes": shared_axes, "shard": shard, "limit": ("stddev", float(np.finfo(np.float32).max))}
    call = _member.check(name, key, x.shape, stddev, train=train, **options)
    return x if call.idle else call.apply(_ADDED, x)


def normal(word: Array) -> Array:
    """Turn uint32 words into standard normal numbers, float32: a sign bit, and 31 bits for the quantile of ``|z|``."""
    tail = (word >> np.uint32(1)).astype(jnp.int32).astype(jnp.float32) + np.float32(0.5)  # its probability * 2**31
    bits = lax.bitcast_convert_type(tail, jnp.int32)
    f = lax.bitcast_convert_type((bits & np.int32(0x007FFFFF)) | np.int32(0x3F800000), jnp.float32) - np.float32(1)
    exponent = (np.int32(127 + 31) - (bits >> np.int32(23))).astype(jnp.float32)
    length = exponent - f * (1 + (1 - f) * _polynomial(_G, f))  # -log2 of the tail
    size = length * _polynomial(_P, length) / _polynomial(_Q, length)
    return lax.bitcast_convert_type(lax.bitcast_convert_type(size, jnp.uint32) | (word << np.uint32(31)), jnp.float32)


def _polynomial(coefficients: Sequence[float], x: Array) -> Array:
    y = jnp.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        y = y * x + np.float32(c)
    return y


def _noise(draw: Draw, dtype: Any) -> Array:
    return draw.once(normal(draw.word())).astype(dtype)


def _multiply(draw: Draw, x: Array) -> Array:
    real = _loops.real_dtype(x)
    rate = jnp.clip(draw.rate, 0, _BELOW_ONE).astype(real)  # NaN stays NaN
    factor = 1 + jnp.sqrt(rate / (1 - rate)) * _noise(draw, real)
    return draw.multiply(x, factor, where=jnp.ones_like(factor, bool))


def _add(draw: Draw, x: Array) -> Array:
    real = _loops.real_dtype(x)
    return (x.astype(real) + jnp.maximum(draw.rate, 0).astype(real) * _noise(draw, real)).astype(x.dtype)


def _pass(draw: Draw, x: Array) -> Array:
    del draw
    return x


_MULTIPLIED = Rule(_multiply)
_ADDED = Rule(_add, (Rule(_pass),))
