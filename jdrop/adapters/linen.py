"""Layers for Flax linen: ``from jdrop.adapters.linen import Dropout`` replaces ``linen.Dropout``."""

from collections.abc import Callable, Sequence
from typing import Any

from jax import Array

from jdrop._checks import as_bool
from jdrop._types import Generator, RateLike, Shard
from jdrop.adapters import _depth, _layer
from jdrop.adapters._attention import dot_product_attention as dot_product_attention

try:
    from flax import linen
    from flax.core import DenyList
    from flax.errors import InvalidRngError
except ImportError as error:
    raise _layer.missing("jdrop.adapters.linen", "flax", "flax", error) from error


NAMES = _layer.Names(
    data="inputs",
    rate="rate",
    key="rng",
    make_key='pass rngs={"dropout": key} to apply, or rng=key to the layer',
    map_keys='pass one key; linen.vmap with split_rngs={"dropout": True} gives each example its own',
)


def _make_rng(module: linen.Module, function: str, collection: str) -> Array:
    try:
        return module.make_rng(collection)
    except InvalidRngError as error:
        raise InvalidRngError(
            f'{function}: rngs must have a key for "{collection}" when something is dropped, got none; '
            f'pass rngs={{"{collection}": key}} to apply, rng=key to the layer, or deterministic=True'
        ) from error


class Dropout(linen.Dropout):
    """Drop elements with probability ``rate`` and rescale the rest, like ``linen.Dropout``, without storing the mask.

    ``y = x * m / (1 - rate)`` with ``m ~ Bernoulli(1 - rate)``, following the rules of :func:`jdrop.dropout`. Mode
    and rngs work as in ``linen.Dropout``. Pass ``deterministic`` either to the constructor or to the call, not to both.
    The key is ``rng`` if passed, else ``make_rng(rng_collection)``. No key is requested in evaluation, nor at a Python
    or NumPy rate of 0 or 1. The class has the same name as that of Flax, so the layer gets the same key.

    Args:
      rate: drop rate, as in :func:`jdrop.dropout`. It is checked at call time and may be traced.
      broadcast_dims: axes along which elements share one decision.
      deterministic: ``True`` returns the inputs themselves; ``False`` draws a mask.
      rng_collection: rng collection for ``make_rng``.
      generator: as in :func:`jdrop.dropout`. ``"jax"`` gives the masks of ``linen.Dropout``, bit for bit.
      shard: inside ``jax.shard_map``: the PartitionSpec of the data, as in :func:`jdrop.dropout`. Under ``jax.pmap``,
        or with ``check_vma=False``, ``None`` takes the key as it is, so bind a different key to each device.

    Raises:
      ValueError: a rate, an axis, or ``generator`` is out of range, or ``deterministic`` is passed twice or not at all.
      TypeError: the inputs are not a floating-point array, or ``deterministic`` is not a bool.
      flax.errors.InvalidRngError: the collection has no rng.

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
    shard: Shard = None

    @linen.compact
    def __call__(self, inputs: Array, deterministic: bool | None = None, rng: Array | None = None) -> Array:
        """Drop elements of ``inputs``; ``deterministic`` and ``rng`` as in the class."""
        inactive = linen.merge_param("deterministic", self.deterministic, deterministic)
        return _layer.drop(
            "Dropout",
            lambda: _make_rng(self, "Dropout", self.rng_collection) if rng is None else rng,
            inputs,
            self.rate,
            train=not as_bool("Dropout", "deterministic", inactive),
            broadcast_dims=self.broadcast_dims,
            generator=self.generator,
            shard=self.shard,
            names=NAMES,
        )


class DropPath(linen.Module):
    """Drop a residual branch for whole examples, as in ``x + DropPath(rate)(branch(x), deterministic)``.

    ``y[b, ...] = x[b, ...] * m[b] / (1 - rate)`` with ``m[b] ~ Bernoulli(1 - rate)``, following the rules of
    :func:`jdrop.drop_path`. Mode and rngs work as in :class:`Dropout`.

    Args:
      rate: drop rate of the branch; it may be traced.
      batch_axes: axes along which decisions are independent.
      deterministic: ``True`` returns the inputs themselves; ``False`` draws the decisions.
      rng_collection: rng collection for ``make_rng``.
      generator: as in :func:`jdrop.drop_path`.
      shard: inside ``jax.shard_map``: the PartitionSpec of the data, as in :func:`jdrop.dropout`. Under ``jax.pmap``,
        or with ``check_vma=False``, ``None`` takes the key as it is, so bind a different key to each device.

    Raises:
      ValueError, TypeError, flax.errors.InvalidRngError: as in :class:`Dropout`.

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
    shard: Shard = None

    @linen.compact
    def __call__(self, inputs: Array, deterministic: bool | None = None, rng: Array | None = None) -> Array:
        """Drop ``inputs`` for whole examples; ``deterministic`` and ``rng`` as in :class:`Dropout`."""
        inactive = linen.merge_param("deterministic", self.deterministic, deterministic)
        return _layer.drop(
            "DropPath",
            lambda: _make_rng(self, "DropPath", self.rng_collection) if rng is None else rng,
            inputs,
            self.rate,
            train=not as_bool("DropPath", "deterministic", inactive),
            batch_axes=self.batch_axes,
            generator=self.generator,
            shard=self.shard,
            names=NAMES,
        )


class StochasticDepth(linen.Module):
    """Add a residual branch, or skip its computation: ``StochasticDepth(Block(), rate)(x)`` for ``x + Block()(x)``.

    ``y = x + branch(x) * m / (1 - rate)`` with ``m ~ Bernoulli(1 - rate)``: one decision for the whole array, with the
    rules and the bits of :func:`jdrop.stochastic_depth`. The branch may have state: it runs in ``linen.cond``, so it
    updates its batch statistics only when it is kept. ``init`` always runs it, in both modes. Mode and rngs work as in
    :class:`Dropout`; the branch takes its own.

    Args:
      branch: module, or function that builds its modules itself, ``x -> array with the shape and dtype of x``.
      rate: scalar drop rate of the branch; it may be traced, such as one rate per layer in ``linen.scan``.
      deterministic: ``True`` returns ``x + branch(x)``; ``False`` draws the decision.
      rng_collection: rng collection for ``make_rng``.
      generator: as in :func:`jdrop.stochastic_depth`.
      shard: inside ``jax.shard_map``: as in :func:`jdrop.dropout`. All tiles share one decision. Under ``jax.pmap``, or
        with ``check_vma=False``, ``None`` takes the key as it is.

    Raises:
      ValueError, TypeError, flax.errors.InvalidRngError: as in :class:`Dropout`, or the branch does not return an array
        with the shape and dtype of x.

    References:
      Huang, Sun, Liu, Sedra, Weinberger (2016), Deep Networks with Stochastic Depth, ECCV.

    Limits:
      Under ``jax.vmap`` over keys or rates, the conditional becomes a select, so both sides are computed. A function
      must not use modules from outside; pass the module. Under ``jit``, ``intermediates`` of the branch are not
      recorded, and it must not create other variables than in ``init``. Inside ``jax.shard_map``, a branch with
      collectives needs ``shard``, or devices that decide differently wait for each other forever.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> from jdrop.adapters.linen import StochasticDepth
      >>> branch, x = linen.BatchNorm(use_running_average=False), jnp.ones([8, 4])
      >>> layer = StochasticDepth(branch, 0.5, deterministic=False)
      >>> variables = layer.init(jax.random.key(0), x)
      >>> rngs = {"dropout": jax.random.key(1)}
      >>> y, updates = layer.apply(variables, x, rngs=rngs, mutable=["batch_stats"])
      >>> y.shape
      (8, 4)
    """

    branch: Callable[..., Array]
    rate: RateLike
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    generator: Generator = "fast"
    shard: Shard = None

    @linen.compact
    def __call__(
        self, inputs: Array, *args: Any, deterministic: bool | None = None, rng: Array | None = None, **kwargs: Any
    ) -> Array:
        """Add the branch, or skip it; arguments as in :class:`Dropout`, and the branch gets the rest."""
        name = "StochasticDepth"
        inactive = linen.merge_param("deterministic", self.deterministic, deterministic)
        x, decision = _depth.decide_layer(
            name,
            lambda: _make_rng(self, name, self.rng_collection) if rng is None else rng,
            inputs,
            self.rate,
            self.branch,
            train=not as_bool(name, "deterministic", inactive),
            generator=self.generator,
            shard=self.shard,
            names=NAMES,
            initializes=self.is_initializing(),
        )

        def add(module: StochasticDepth, x: Array) -> Array:
            return decision.add(x, module.branch(x, *args, **kwargs))

        if decision.is_known:
            return add(self, x) if decision.kept else x
        variables = DenyList(("intermediates",))  # cond requires the same variables of both sides
        return linen.cond(decision.kept, add, lambda module, x: x, self, x, variables=variables)
