"""Dropout of elements: to zero, or for SELU networks to the negative limit of that activation."""

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop import _checks, _loops, _member, decisions
from jdrop._linear import Draw, Rule
from jdrop._shards import Shard
from jdrop.decisions import Generator, RateLike


def dropout(
    key: Array | None,
    x: Array,
    rate: RateLike,
    *,
    train: bool,
    shared_axes: int | Sequence[int] = (),
    scale_at: Literal["train", "eval"] = "train",
    generator: Generator = "fast",
    shard: Shard = None,
) -> Array:
    """Drop each element with probability ``rate`` and scale the rest so that the expectation stays.

    ``y[i] = x[i] * m[i] / (1 - rate)`` with ``m[i] ~ Bernoulli(1 - rate)``, a pure function of the key and of the
    index ``i``. The gradient is multiplied by the same ``m[i] / (1 - rate)``; the mask is made again there, and what
    is kept for it is a seed of 8 bytes and the rate. Kept values are divided by the keep probability really used:
    ``1 - round(float32(rate) * 2**32) / 2**32``, or with ``generator="jax"`` that of ``jax.random.bernoulli``,
    ``ceil(p * 2**n) / 2**n`` with ``p = 1 - rate`` in the dtype of the rate, which has n bits of mantissa.

    Args:
      key: one PRNG key, typed or legacy, of any implementation; used once. ``None`` is fine if ``train`` is false or
        ``rate`` is the number 0.
      x: float16, bfloat16, float32, float64 or complex array of any shape. 16-bit floats are scaled in float32 and
        rounded once. A dropped slot is exactly 0, and so is its gradient, also where x is NaN or infinite.
      rate: probability of dropping. A Python or NumPy value must lie in [0, 1]. An array of JAX may be traced: below
        0 it acts as 0, above 1 as 1, NaN gives NaN, and no gradient flows to it. An array of rates broadcasts to the
        decisions: the shape of x, with 1 on shared axes. ``generator="fast"`` rounds the rate to float32 first.
      train: ``True`` draws a mask; ``False`` returns x itself.
      shared_axes: axes along which one decision is shared, such as ``(1,)`` for one mask at all time steps of
        ``[batch, time, feature]``. Negative axes count from the end.
      scale_at: ``"train"`` is inverted dropout. ``"eval"`` is the original form: kept values stay as they are in
        training, and ``train=False`` multiplies x by the keep probability (the one case where it changes x).
      generator: ``"fast"`` makes a word an element from a hash of the key and the index. ``"jax"`` keeps exactly
        where ``jax.random.bernoulli(key, 1 - rate, decisions)`` is true, as Flax, Haiku and Equinox do; its masks
        follow ``jax.random``, also in what vmap over rbg keys does there.
      shard: inside ``jax.shard_map``, where x is a tile: the PartitionSpec of x over the manual mesh axes. The mask
        is then the tile of the whole array's mask. With ``None`` the key must vary over those axes;
        ``PartitionSpec()`` gives every tile the mask of its own shape.

    Returns:
      An array of the shape and dtype of x.

    Raises:
      ValueError: a rate, an axis or an option is out of range, ``key`` is a batch of keys, or ``key`` is the same on
        every tile.
      TypeError: an argument is of the wrong type, ``key`` is missing, or ``train`` is traced.
      NotImplementedError: ``shard`` with ``generator="jax"`` and a key whose bits do not go by index.

    References:
      Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov (2014), Dropout: A Simple Way to Prevent Neural
      Networks from Overfitting, JMLR; its section 10 for ``scale_at="eval"``.

    Limits:
      The mask is a function of the shape: it is stable under a longer batch, but not under reshaping, nor when the
      size of the trailing axes crosses 128, nor when the whole of an array whose trailing axes hold fewer crosses
      2**32. With ``jax.export`` those axes need static sizes.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> y = jdrop.dropout(jax.random.key(0), jnp.ones([2, 4]), 0.5, train=True)
      >>> sorted(set(y.ravel().tolist()))
      [0.0, 2.0]
    """
    name = "dropout"
    _checks.array(name, "x", x)
    _checks.choice(name, "scale_at", scale_at, ("train", "eval"))
    options: Any = {"shared_axes": shared_axes, "generator": generator, "shard": shard}
    call = _member.check(name, key, x.shape, rate, train=train, **options)
    if call.train and not call.idle:
        return call.apply(_member.SCALED if scale_at == "train" else _member.KEPT, x)
    if scale_at == "train" or decisions.is_zero(call.rate):
        return x
    return _expectation(x, call.rate, generator)


def _expectation(x: Array, rate: np.ndarray | Array, generator: Generator) -> Array:
    """``x * keep_probability``: what evaluation does in the original form."""
    x = jnp.asarray(x)
    keep = decisions.expectation(rate, generator, _loops.real_dtype(x))
    return _loops.multiply(x, keep, where=keep != 0)


_LIMIT = -1.7580993408473766  # SELU(-inf) = -alpha * lambda of Klambauer et al.


def alpha_dropout(
    key: Array | None,
    x: Array,
    rate: RateLike,
    *,
    train: bool,
    shared_axes: int | Sequence[int] = (),
    generator: Generator = "fast",
    shard: Shard = None,
) -> Array:
    """Drop elements to the negative limit of SELU, and keep mean 0 and variance 1 of its activations.

    ``y[i] = a * (x[i] if m[i] else s) + b`` with ``m[i] ~ Bernoulli(q)``, ``q = 1 - rate``, ``s = SELU(-inf) =
    -1.7581``, ``a = 1 / sqrt(q * (1 + (1 - q) * s**2))`` and ``b = -a * (1 - q) * s``. The keep probability q is the
    one really used. The gradient is ``a * m[i]``; its mask is made again, not stored. With shared axes it is feature
    alpha dropout.

    Args:
      key: one PRNG key, used once. ``None`` is fine if ``train`` is false or ``rate`` is the number 0.
      x: float16, bfloat16, float32 or float64 array of any shape: activations of mean 0 and variance 1. A dropped slot
        gets ``a * s + b``, and its gradient is exactly 0, also where x is NaN or infinite.
      rate: probability of dropping, or an array of them that broadcasts to the decisions, as for
        :func:`jdrop.dropout`. Rate 1 gives zeros, the limit of the formula.
      train: ``True`` draws a mask; ``False`` returns x itself.
      shared_axes: axes along which one decision is shared.
      generator: as for :func:`jdrop.dropout`.
      shard: as for :func:`jdrop.dropout`.

    Returns:
      An array of the shape and dtype of x.

    Raises:
      ValueError: a rate, an axis or an option is out of range, or ``key`` is a batch of keys.
      TypeError: an argument is of the wrong type, x is complex, ``key`` is missing, or ``train`` is traced.

    References:
      Klambauer, Unterthiner, Mayr, Hochreiter (2017), Self-Normalizing Neural Networks, NeurIPS.

    Example:
      >>> import jax, jdrop
      >>> x = jax.random.normal(jax.random.key(0), [1000, 100])
      >>> y = jdrop.alpha_dropout(jax.random.key(1), x, 0.5, train=True)
      >>> round(float(y.mean()), 1) + 0.0, round(float(y.var()), 1)
      (0.0, 1.0)
    """
    name = "alpha_dropout"
    _checks.array(name, "x", x, _checks.FLOATS)
    options: Any = {"shared_axes": shared_axes, "generator": generator, "shard": shard}
    call = _member.check(name, key, x.shape, rate, train=train, **options)
    return x if call.idle else call.apply(_ALPHA, x)


def _alpha(draw: Draw, x: Array) -> Array:
    q, a = _alpha_factor(draw, x)
    b = -a * (1 - q) * _LIMIT
    dropped = a * q * _LIMIT  # a * s + b
    y = jnp.where(draw.kept(), x.astype(a.dtype) * a + b, dropped)
    return jnp.where(q == 0, jnp.zeros_like(y), y).astype(x.dtype)


def _alpha_factor(draw: Draw, x: Array) -> tuple[Array, Array]:
    q = draw.probability(_loops.real_dtype(x))
    some = jnp.where(q == 0, jnp.ones_like(q), q)
    # q + s**2 * q * (1 - q), without a sum of a product, which a compiler may or may not contract; exactly 1 for q = 1
    a = jnp.sqrt(1 / (some * (_LIMIT**2 * ((1 + _LIMIT**-2) - some))))
    return q, jnp.where(some == 1, jnp.ones_like(a), a)


def _alpha_gradient(draw: Draw, x: Array) -> Array:
    return draw.multiply(x, _alpha_factor(draw, x)[1], where=draw.kept())


_ALPHA = Rule(_alpha, (Rule(_alpha_gradient),))
