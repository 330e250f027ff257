"""Elementwise dropout: to zero, or to the negative limit of SELU for self-normalizing networks."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from jax import Array

from jdrop._bits import expected_keep
from jdrop._checks import check_array, check_choice, is_zero
from jdrop._ops import SCALE, SELECT
from jdrop._platform.generic import multiply
from jdrop._prepare import check_arguments, prepare
from jdrop._primitive import MaskedOp, MaskView, masked_op
from jdrop._types import REAL, Generator, Rate, RateLike, Shard, real_dtype


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
    """Drop each element with probability ``rate`` and rescale the rest to preserve the expectation.

    ``y[i] = x[i] * m[i] / (1 - rate)`` with ``m[i] ~ Bernoulli(1 - rate)``, where ``m[i]`` is a pure function of the
    key and the index ``i``. The gradient is multiplied by the same ``m[i] / (1 - rate)``. The backward pass recomputes
    the mask, so the only residuals are the words of the key and the rate. Kept values are divided by the exact keep
    probability: ``1 - round(float32(rate) * 2**32) / 2**32``, with ``2**16`` in place of ``2**32`` for
    ``generator="packed"``, and for ``generator="jax"`` that of ``jax.random.bernoulli``, ``ceil(p * 2**n) / 2**n`` with
    ``p = 1 - rate`` in the dtype of the rate, which has n mantissa bits.

    Args:
      key: one PRNG key, used once; may be ``None`` if ``train`` is false or ``rate`` is a Python or NumPy 0. Typed and
        legacy keys of any implementation are supported.
      x: float8, float16, bfloat16, float32, float64, or complex array of any shape. Floats of 8 and 16 bits are scaled
        in float32 and rounded once. Dropped elements and their gradients are exactly 0, even where x is NaN or
        infinite.
      rate: drop rate. A Python or NumPy value must lie in [0, 1]. A JAX array may be traced: values below 0 act as 0,
        values above 1 as 1, NaN gives NaN, and no gradient flows to it. An array of rates broadcasts to the decisions,
        whose shape is that of x with 1 on shared axes. ``generator="fast"`` first rounds the rate to float32.
      train: ``True`` draws a mask; ``False`` returns x itself.
      shared_axes: axes along which elements share one decision, such as ``(1,)`` for one mask at all time steps of
        ``[batch, time, feature]``. Negative axes count from the end.
      scale_at: ``"train"`` is inverted dropout. ``"eval"`` is the original form: training leaves kept values unscaled,
        and ``train=False`` multiplies x by the keep probability (the only case in which it changes x).
      generator: ``"fast"`` hashes the key and the index to one 32-bit word per element. ``"packed"`` takes two
        decisions from a word, so that kernels of :func:`jdrop.dot_product_attention` need fewer instructions; elsewhere
        it gains nothing. It rounds rates to multiples of 2**-16: below 2**-17 nothing is dropped. ``"jax"`` keeps
        exactly the elements where ``jax.random.bernoulli(key, 1 - rate, decisions)`` is true, as Flax, Haiku, and
        Equinox do. Its masks follow ``jax.random``, including its behavior under vmap over rbg keys.
      shard: inside ``jax.shard_map``, where x is a tile: the PartitionSpec of x over the manual mesh axes. Each device
        then applies its tile of the whole array's mask. With ``None``, the key must vary over those axes.
        ``PartitionSpec()`` gives all tiles the same mask, that of an array with the shape of one tile.

    Returns:
      An array with the shape and dtype of x.

    Raises:
      ValueError: a rate, an axis, or an option is out of range, ``key`` is a batch of keys, or ``key`` is the same on
        every tile.
      TypeError: an argument has the wrong type, ``key`` is missing, or ``train`` is traced.
      NotImplementedError: ``shard`` with ``generator="jax"`` and a key whose bits lack random access.

    References:
      Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov (2014), Dropout: A Simple Way to Prevent Neural
      Networks from Overfitting, JMLR. Section 10 describes ``scale_at="eval"``.

    Limits:
      The mask depends on the shape of x. A longer batch does not change it. Reshaping does, as does a change of shape
      in which the size of the trailing axes crosses 128 elements, or, if they hold fewer than 128, the size of the
      whole array crosses 2**32. With ``jax.export``, these trailing axes of the mask need static sizes, except for
      its first axis, if the whole array stays within 2**32 elements.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> y = jdrop.dropout(jax.random.key(0), jnp.ones([2, 4]), 0.5, train=True)
      >>> sorted(set(y.ravel().tolist()))
      [0.0, 2.0]
    """
    name = "dropout"
    check_array(name, "x", x)
    check_choice(name, "scale_at", scale_at, ("train", "eval"))
    arguments = check_arguments(
        name, key, x, rate, train=train, shared_axes=shared_axes, generator=generator, shard=shard
    )
    if not arguments.is_identity:
        return masked_op(SCALE if scale_at == "train" else SELECT, arguments.draw(), x)
    if scale_at == "train" or is_zero(arguments.rate):
        return x
    return _expectation(x, arguments.rate, generator)


def _expectation(x: Array, rate: Rate, generator: Generator) -> Array:
    """Return ``x * keep_probability``, the evaluation step of the original form."""
    x = jnp.asarray(x)
    keep_probability = expected_keep(rate, generator, real_dtype(x))
    return multiply(x, keep_probability, where=keep_probability != 0)


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
    """Drop elements to the negative limit of SELU, preserving mean 0 and variance 1 of its activations.

    ``y[i] = a * (x[i] if m[i] else s) + b`` with ``m[i] ~ Bernoulli(q)``, ``q = 1 - rate``, ``s = SELU(-inf) =
    -1.7581``, ``a = 1 / sqrt(q * (1 + (1 - q) * s**2))`` and ``b = -a * (1 - q) * s``. Here q is the exact
    keep probability. The gradient is ``a * m[i]``, with a recomputed mask. With shared axes, this is feature alpha
    dropout.

    Args:
      key: one PRNG key, used once; may be ``None`` if ``train`` is false or ``rate`` is a Python or NumPy 0.
      x: float8, float16, bfloat16, float32, or float64 array of any shape: activations with mean 0 and variance 1.
        Dropped elements become ``a * s + b`` and their gradients exactly 0, even where x is NaN or infinite.
      rate: drop rate, or an array of rates that broadcasts to the decisions, as in :func:`jdrop.dropout`. Rate 1 gives
        zeros, the limit of the formula.
      train: ``True`` draws a mask; ``False`` returns x itself.
      shared_axes: axes along which elements share one decision.
      generator: as in :func:`jdrop.dropout`.
      shard: as in :func:`jdrop.dropout`.

    Returns:
      An array with the shape and dtype of x.

    Raises:
      ValueError: a rate, an axis, or an option is out of range, or ``key`` is a batch of keys.
      TypeError: an argument has the wrong type, x is complex, ``key`` is missing, or ``train`` is traced.

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
    check_array(name, "x", x, REAL)
    mask = prepare(name, key, x, rate, train=train, shared_axes=shared_axes, generator=generator, shard=shard)
    return x if mask is None else masked_op(_ALPHA, mask, x)


def _alpha(view: MaskView, x: Array) -> Array:
    q, a = _alpha_factor(view, x)
    b = -a * (1 - q) * _LIMIT
    dropped = a * q * _LIMIT  # a * s + b
    y = jnp.where(view.keep(), x.astype(a.dtype) * a + b, dropped)
    return jnp.where(q == 0, jnp.zeros_like(y), y).astype(x.dtype)


def _alpha_factor(view: MaskView, x: Array) -> tuple[Array, Array]:
    q = view.mask.keep_probability(real_dtype(x))
    safe_q = jnp.where(q == 0, jnp.ones_like(q), q)
    # q + s**2 * q * (1 - q), written without adding to a product, which compilers may or may not fuse into an FMA. The
    # result is exactly 1 for q = 1.
    a = jnp.sqrt(1 / (safe_q * (_LIMIT**2 * ((1 + _LIMIT**-2) - safe_q))))
    return q, jnp.where(safe_q == 1, jnp.ones_like(a), a)


def _alpha_gradient(view: MaskView, x: Array) -> Array:
    return view.multiply(x, _alpha_factor(view, x)[1], where=view.keep())


_ALPHA = MaskedOp(_alpha, (MaskedOp(_alpha_gradient),))
