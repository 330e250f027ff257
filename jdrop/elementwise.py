"""Dropout on every element."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jdrop import _checks, _linear, _shards, decisions
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
    is kept for it is a seed of 8 bytes and the rate. Kept values are divided by the keep probability really used,
    ``1 - round(float32(rate) * 2**32) / 2**32``.

    Args:
      key: one PRNG key, typed or legacy, of any implementation; used once. ``None`` is fine if ``train`` is false or
        ``rate`` is the number 0.
      x: float16, bfloat16, float32, float64 or complex array of any shape. 16-bit floats are scaled in float32 and
        rounded once. A dropped slot is exactly 0, and so is its gradient, also where x is NaN or infinite.
      rate: probability of dropping. A Python or NumPy value must lie in [0, 1]. An array of JAX may be traced: below
        0 it acts as 0, above 1 as 1, NaN gives NaN, and no gradient flows to it. An array of rates broadcasts to the
        decisions: the shape of x, with 1 on shared axes. The rate is rounded to float32 first.
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
      size of the trailing axes crosses 128. With ``jax.export`` those axes need static sizes.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> y = jdrop.dropout(jax.random.key(0), jnp.ones([2, 4]), 0.5, train=True)
      >>> sorted(set(y.ravel().tolist()))
      [0.0, 2.0]
    """
    name = "dropout"
    _checks.array(name, "x", x)
    train = _checks.flag(name, "train", train)
    _checks.choice(name, "scale_at", scale_at, ("train", "eval"))
    _checks.choice(name, "generator", generator, decisions.GENERATORS)
    rate = _checks.rate(name, rate, decisions.mask_shape(name, x.shape, shared_axes))
    names = _shards.names_of(name, x.shape, shard)
    if key is not None:
        _checks.key(name, key)
    if decisions.is_zero(rate) or (not train and scale_at == "train"):
        return x
    if not train:
        return _expectation(x, rate, generator)
    _shards.check_key_varies(name, key, shard)
    whole, offset = _shards.tile(x.shape, names)
    source, words, rate = decisions.operands(name, key, rate, generator, part=bool(offset))
    layout = decisions.layout(name, decisions.mask_shape(name, whole, shared_axes), source)
    return _linear.apply(x, words, rate, offset, layout=layout, scaled=scale_at == "train")


def _expectation(x: Array, rate: np.ndarray | Array, generator: Generator) -> Array:
    """``x * keep_probability``: what evaluation does in the original form."""
    probability = lax.stop_gradient(decisions.probability(rate, generator))
    keep = decisions.keep_probability(generator, probability, _linear.real_dtype(x))
    return _linear.multiply(jnp.asarray(x), keep, where=keep != 0)
