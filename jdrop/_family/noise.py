"""Multiplicative and additive Gaussian noise, from the same random-access words as the masks."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop._checks import check_array
from jdrop._errors import describe
from jdrop._ops import IDENTITY
from jdrop._prepare import check_arguments, prepare
from jdrop._primitive import MaskedOp, MaskView, masked_op
from jdrop._types import REAL, RateLike, Shard, real_dtype

_BELOW_ONE = 1 - 2.0**-24  # the largest float32 below 1


def gaussian_dropout(
    key: Array | None,
    x: Array,
    rate: RateLike,
    *,
    train: bool,
    shared_axes: int | Sequence[int] = (),
    shard: Shard = None,
) -> Array:
    """Multiply by Gaussian noise with the mean and variance of dropout at ``rate``.

    ``y[i] = x[i] * (1 + sqrt(rate / (1 - rate)) * z[i])`` with ``z[i] ~ N(0, 1)``. The backward pass recomputes the
    noise from the key instead of storing it.

    Args:
      key: one PRNG key, used once; may be ``None`` if ``train`` is false or ``rate`` is a Python or NumPy 0.
      x: float8, float16, bfloat16, float32, float64, or complex array of any shape. Floats of 8 and 16 bits are
        multiplied in float32 and rounded once.
      rate: drop rate of the equivalent dropout, or an array of rates that broadcasts to the noise, as in
        :func:`jdrop.dropout`. At 1 the variance is infinite: a Python or NumPy 1 is an error, and a JAX array is
        clipped to the largest float32 below 1.
      train: ``True`` draws noise; ``False`` returns x itself.
      shared_axes: axes along which elements share one noise value.
      shard: as in :func:`jdrop.dropout`.

    Returns:
      An array with the shape and dtype of x.

    Raises:
      ValueError: a rate is not in [0, 1), an axis is out of range, or ``key`` is a batch of keys.
      TypeError: an argument has the wrong type, ``key`` is missing, or ``train`` is traced.

    References:
      Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov (2014), Dropout: A Simple Way to Prevent Neural
      Networks from Overfitting, JMLR, section 10.

    Limits:
      Each noise value is computed from 32 random bits. It lies within 6.34 standard deviations and is accurate to 5e-6
      standard deviations. The random bits are the same on every platform, but floating-point results may differ if one
      platform fuses ``a * b + c`` and another does not: by at most ``2**-24 * (42 * abs(z) + 4)``, a few millionths.
      The same holds between two programs on one platform, such as a tile and the whole array.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> y = jdrop.gaussian_dropout(jax.random.key(0), jnp.ones([1000, 100]), 0.2, train=True)
      >>> round(float(y.mean()), 2), round(float(y.std()), 2)
      (1.0, 0.5)
    """
    name = "gaussian_dropout"
    check_array(name, "x", x)
    arguments = check_arguments(name, key, x, rate, train=train, shared_axes=shared_axes, shard=shard)
    if isinstance(arguments.rate, np.ndarray) and np.any(arguments.rate == 1):
        raise ValueError(
            f"{name}: rate must lie in [0, 1): at 1 the variance is infinite, got {describe(rate)}; pass a smaller rate"
        )
    return x if arguments.is_identity else masked_op(_MULTIPLY, arguments.draw(), x)


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
      key: one PRNG key, used once; may be ``None`` if ``train`` is false or ``stddev`` is a Python or NumPy 0.
      x: float8, float16, bfloat16, float32, or float64 array of any shape. Floats of 8 and 16 bits are added in float32
        and rounded once.
      stddev: standard deviation in the units of x, or an array of them that broadcasts to the noise. A Python or NumPy
        value must be at least 0 and lie in the range of float32. Negative values in a JAX array act as 0. ``stddev`` is
        first rounded to float32, and no gradient flows to it.
      train: ``True`` draws noise; ``False`` returns x itself.
      shared_axes: axes along which elements share one noise value.
      shard: as in :func:`jdrop.dropout`.

    Returns:
      An array with the shape and dtype of x.

    Raises:
      ValueError: ``stddev`` or an axis is out of range, or ``key`` is a batch of keys.
      TypeError: an argument has the wrong type, x is complex, ``key`` is missing, or ``train`` is traced.

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
    check_array(name, "x", x, REAL)
    mask = prepare(
        name,
        key,
        x,
        stddev,
        train=train,
        shared_axes=shared_axes,
        shard=shard,
        rate_argument="stddev",
        highest_rate=float(np.finfo(np.float32).max),
    )
    return x if mask is None else masked_op(_ADD, mask, x)


def _multiply(view: MaskView, x: Array) -> Array:
    real = real_dtype(x)
    rate = jnp.clip(view.mask.rate, 0, _BELOW_ONE).astype(real)  # NaN stays NaN
    factor = 1 + jnp.sqrt(rate / (1 - rate)) * view.normal(real)
    return view.multiply(x, factor, where=jnp.ones_like(factor, bool))


def _add(view: MaskView, x: Array) -> Array:
    real = real_dtype(x)
    stddev = jnp.maximum(view.mask.rate, 0).astype(real)
    return (x.astype(real) + stddev * view.normal(real)).astype(x.dtype)


_MULTIPLY = MaskedOp(_multiply)
_ADD = MaskedOp(_add, (IDENTITY,))
