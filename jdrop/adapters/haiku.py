"""Dropout for Haiku: ``from jdrop.adapters.haiku import dropout`` in the place of ``haiku.dropout``."""

import importlib
from collections.abc import Sequence
from typing import Any

from jax import Array

from jdrop.adapters import _layer
from jdrop.decisions import Generator, RateLike

try:
    importlib.import_module("haiku")
except ImportError as error:
    raise _layer.missing("jdrop.adapters.haiku", "haiku", "dm-haiku", error) from error


def dropout(
    rng: Array | None,
    rate: RateLike,
    x: Array,
    broadcast_dims: Sequence[int] = (),
    *,
    generator: Generator = "fast",
) -> Array:
    """Drop each element with probability ``rate`` and scale the rest: ``haiku.dropout``, and no mask in memory.

    ``y = x * m / (1 - rate)`` with ``m ~ Bernoulli(1 - rate)``, by the rules of :func:`jdrop.dropout`. As in Haiku
    there is no mode: call it in training only.

    Args:
      rng: one PRNG key, such as ``haiku.next_rng_key()``. ``None`` is fine at a Python or NumPy rate of 0 or 1.
      rate: probability of dropping, as for :func:`jdrop.dropout`; it may be traced. Rate 1 gives zeros.
      x: floating point array.
      broadcast_dims: axes along which one decision is shared.
      generator: ``"fast"``, or ``"jax"`` for the masks of ``haiku.dropout``, bit for bit.

    Returns:
      An array of the shape and dtype of x.

    Raises:
      ValueError: a rate, an axis or ``generator`` is out of range, or ``rng`` is a batch of keys.
      TypeError: x is no floating point array, or ``rng`` is no key.

    Limits:
      In ``jax.shard_map``, where a mask needs ``shard=``, call :func:`jdrop.dropout`.

    References:
      Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov (2014), Dropout: A Simple Way to Prevent Neural
      Networks from Overfitting, JMLR.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jdrop.adapters.haiku import dropout
      >>> sorted(set(dropout(jax.random.key(0), 0.5, jnp.ones([2, 4])).ravel().tolist()))
      [0.0, 2.0]
    """
    options: Any = {"train": True, "generator": generator, "names": ("x", "rate", "rng")}
    return _layer.drop("dropout", lambda: rng, x, rate, broadcast_dims=broadcast_dims, **options)


def drop_path(
    rng: Array | None,
    rate: RateLike,
    x: Array,
    batch_axes: int | Sequence[int] = (0,),
    *,
    generator: Generator = "fast",
) -> Array:
    """Drop a residual branch for whole examples.

    Use it as ``x + drop_path(haiku.next_rng_key(), rate, branch(x))``.
    ``y[b, ...] = x[b, ...] * m[b] / (1 - rate)`` with ``m[b] ~ Bernoulli(1 - rate)``, by the rules of
    :func:`jdrop.drop_path`.

    Args:
      rng: one PRNG key, as for :func:`dropout`.
      rate: probability of dropping a branch; it may be traced.
      x: floating point array, the output of the branch.
      batch_axes: axes with decisions of their own.
      generator: ``"fast"`` or ``"jax"``, as for :func:`jdrop.drop_path`.

    Returns:
      An array of the shape and dtype of x.

    Raises:
      ValueError, TypeError: as for :func:`dropout`.

    References:
      Huang, Sun, Liu, Sedra, Weinberger (2016), Deep Networks with Stochastic Depth, ECCV.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jdrop.adapters.haiku import drop_path
      >>> y = drop_path(jax.random.key(0), 0.5, jnp.ones([8, 16]))
      >>> bool((y == y[:, :1]).all())
      True
    """
    options: Any = {"train": True, "generator": generator, "names": ("x", "rate", "rng")}
    return _layer.drop("drop_path", lambda: rng, x, rate, batch_axes=batch_axes, **options)
