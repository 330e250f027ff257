"""Layers for Flax linen: ``from jdrop.adapters.linen import Dropout`` in the place of ``linen.Dropout``."""

from collections.abc import Sequence

from jax import Array

from jdrop import _checks
from jdrop.adapters import _layer
from jdrop.adapters._attention import dot_product_attention as dot_product_attention
from jdrop.decisions import Generator, RateLike

try:
    from flax import linen
except ImportError as error:
    raise _layer.missing("jdrop.adapters.linen", "flax", "flax", error) from error


class Dropout(linen.Dropout):
    """Drop each element with probability ``rate`` and scale the rest: ``linen.Dropout``, and no mask in memory.

    ``y = x * m / (1 - rate)`` with ``m ~ Bernoulli(1 - rate)``, by the rules of :func:`jdrop.dropout`. Mode and rngs
    are those of ``linen.Dropout``: ``deterministic`` is passed to the constructor or to the call, not to both; the key
    is ``rng`` if it is passed, else ``make_rng(rng_collection)``, and none is asked for in evaluation or at a Python
    rate of 0 or 1. The layer is named as theirs is, so it gets the same key.

    Args:
      rate: probability of dropping, as for :func:`jdrop.dropout`: checked when called, and it may be traced.
      broadcast_dims: axes along which one decision is shared.
      deterministic: ``True`` returns the inputs themselves; ``False`` draws a mask.
      rng_collection: the collection that the key is made from.
      generator: ``"fast"``, or ``"jax"`` for the masks of ``linen.Dropout``, bit for bit.

    Raises:
      ValueError: a rate, an axis or ``generator`` is out of range, or ``deterministic`` is passed twice or never.
      TypeError: the inputs are no floating point array, or ``deterministic`` is no bool.
      flax.errors.InvalidRngError: there is no rng in the collection.

    Limits:
      In ``jax.shard_map``, where a mask needs ``shard=``, call :func:`jdrop.dropout` with ``self.make_rng("dropout")``.

    References:
      Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov (2014), Dropout: A Simple Way to Prevent Neural
      Networks from Overfitting, JMLR.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jdrop.adapters.linen import Dropout
      >>> y = Dropout(0.5, deterministic=False).apply({}, jnp.ones([2, 4]), rngs={"dropout": jax.random.key(0)})
      >>> sorted(set(y.ravel().tolist()))
      [0.0, 2.0]
    """

    generator: Generator = "fast"

    @linen.compact
    def __call__(self, inputs: Array, deterministic: bool | None = None, rng: Array | None = None) -> Array:
        """Drop elements of ``inputs``; ``deterministic`` and ``rng`` as for the class."""
        still = linen.merge_param("deterministic", self.deterministic, deterministic)
        return _layer.drop(
            "Dropout",
            lambda: self.make_rng(self.rng_collection) if rng is None else rng,
            inputs,
            self.rate,
            train=not _checks.flag("Dropout", "deterministic", still),
            broadcast_dims=self.broadcast_dims,
            generator=self.generator,
            names=("inputs", "rate", "rng"),
        )


class DropPath(linen.Module):
    """Drop a residual branch for whole examples: use it as ``x + DropPath(rate)(branch(x), deterministic)``.

    ``y[b, ...] = x[b, ...] * m[b] / (1 - rate)`` with ``m[b] ~ Bernoulli(1 - rate)``, by the rules of
    :func:`jdrop.drop_path`; mode and rngs as for :class:`Dropout`.

    Args:
      rate: probability of dropping a branch; it may be traced.
      batch_axes: axes with decisions of their own.
      deterministic: ``True`` returns the inputs themselves; ``False`` decides.
      rng_collection: the collection that the key is made from.
      generator: ``"fast"`` or ``"jax"``, as for :func:`jdrop.drop_path`.

    Raises:
      ValueError, TypeError, flax.errors.InvalidRngError: as for :class:`Dropout`.

    References:
      Huang, Sun, Liu, Sedra, Weinberger (2016), Deep Networks with Stochastic Depth, ECCV.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jdrop.adapters.linen import DropPath
      >>> y = DropPath(0.5).apply({}, jnp.ones([8, 16]), False, rngs={"dropout": jax.random.key(0)})
      >>> bool((y == y[:, :1]).all())
      True
    """

    rate: RateLike
    batch_axes: int | Sequence[int] = (0,)
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    generator: Generator = "fast"

    @linen.compact
    def __call__(self, inputs: Array, deterministic: bool | None = None, rng: Array | None = None) -> Array:
        """Drop ``inputs`` of whole examples; ``deterministic`` and ``rng`` as for :class:`Dropout`."""
        still = linen.merge_param("deterministic", self.deterministic, deterministic)
        return _layer.drop(
            "DropPath",
            lambda: self.make_rng(self.rng_collection) if rng is None else rng,
            inputs,
            self.rate,
            train=not _checks.flag("DropPath", "deterministic", still),
            batch_axes=self.batch_axes,
            generator=self.generator,
            names=("inputs", "rate", "rng"),
        )
