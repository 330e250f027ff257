"""Layers for Flax nnx: ``from jdrop.adapters.nnx import Dropout`` replaces ``nnx.Dropout``."""

from collections.abc import Callable, Sequence
from typing import Any

from jax import Array

from jdrop._types import Generator, RateLike, Shard
from jdrop.adapters import _depth, _layer
from jdrop.adapters._attention import dot_product_attention as dot_product_attention

try:
    from flax import nnx

    from jdrop.adapters import _nnx
except ImportError as error:
    raise _layer.missing("jdrop.adapters.nnx", "flax", "flax", error) from error


class Dropout(nnx.Dropout):
    """Drop elements with probability ``rate`` and rescale the rest, like ``nnx.Dropout``, without storing the mask.

    ``y = x * m / (1 - rate)`` with ``m ~ Bernoulli(1 - rate)``, following the rules of :func:`jdrop.dropout`. Mode
    and rngs work as in ``nnx.Dropout``: arguments of the call take precedence over those of the constructor, and
    ``train()``, ``eval()``, and ``nnx.view`` set the mode. The constructor forks the stream ``rng_collection`` of
    ``rngs``. Each call takes the next key of its stream, except in evaluation and at a Python or NumPy rate of 0 or
    1.

    Args:
      rate: drop rate, as in :func:`jdrop.dropout`. It is checked at call time and may be traced.
      broadcast_dims: axes along which elements share one decision.
      deterministic: ``True`` returns the inputs themselves; ``False`` draws a mask; ``None`` leaves it to the call.
      rng_collection: name of the stream in ``rngs`` that provides the keys.
      rngs: ``nnx.Rngs``, a stream, or ``None``. The call also accepts a key.
      generator: as in :func:`jdrop.dropout`. ``"jax"`` gives the masks of ``nnx.Dropout``, bit for bit.
      shard: inside ``jax.shard_map``: the PartitionSpec of the data, as in :func:`jdrop.dropout`. Under ``jax.pmap``,
        or with ``check_vma=False``, ``None`` takes the key as it is, so bind a different key to each device.

    Raises:
      ValueError: a rate, an axis, or ``generator`` is out of range, or the mode or the source of keys is missing.
      TypeError: the inputs are not a floating-point array, or an argument has the wrong type.

    References:
      Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov (2014), Dropout: A Simple Way to Prevent Neural
      Networks from Overfitting, JMLR.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jdrop.adapters.nnx import Dropout
      >>> y = Dropout(0.5, rngs=nnx.Rngs(0))(jnp.ones([2, 4]))
      >>> sorted(set(y.ravel().tolist()))
      [0.0, 2.0]
    """

    def __init__(
        self,
        rate: RateLike,
        *,
        broadcast_dims: Sequence[int] = (),
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: _nnx.Rngs = None,
        generator: Generator = "fast",
        shard: Shard = None,
    ) -> None:
        super().__init__(
            rate,  # type: ignore[arg-type]
            broadcast_dims=broadcast_dims,
            deterministic=deterministic,
            rng_collection=rng_collection,
            rngs=rngs,
        )
        self.generator = generator
        self.shard = shard

    def __call__(self, inputs: Array, *, deterministic: bool | None = None, rngs: _nnx.Rngs | Array = None) -> Array:
        """Drop elements of ``inputs``; ``deterministic`` and ``rngs`` override those of the constructor."""
        return self._drop("Dropout", inputs, deterministic, rngs, broadcast_dims=self.broadcast_dims)

    def _drop(
        self,
        function: str,
        inputs: Array,
        deterministic: bool | None,
        rngs: _nnx.Rngs | Array,
        *,
        broadcast_dims: Sequence[int] = (),
        batch_axes: int | Sequence[int] | None = None,
    ) -> Array:
        return _layer.drop(
            function,
            _nnx.key_getter(function, self, rngs),
            inputs,
            self.rate,
            train=_nnx.is_training(function, self, deterministic),
            generator=self.generator,
            shard=self.shard,
            names=_nnx.NAMES,
            broadcast_dims=broadcast_dims,
            batch_axes=batch_axes,
        )


class DropPath(Dropout):
    """Drop a residual branch for whole examples, as in ``x + drop_path(branch(x))``.

    ``y[b, ...] = x[b, ...] * m[b] / (1 - rate)`` with ``m[b] ~ Bernoulli(1 - rate)``, following the rules of
    :func:`jdrop.drop_path`. Mode and rngs work as in :class:`Dropout`.

    Args:
      rate: drop rate of the branch; it may be traced.
      batch_axes: axes along which decisions are independent.
      deterministic, rng_collection, rngs: as in :class:`Dropout`.
      generator: as in :func:`jdrop.drop_path`.
      shard: inside ``jax.shard_map``: the PartitionSpec of the data, as in :func:`jdrop.dropout`. Under ``jax.pmap``,
        or with ``check_vma=False``, ``None`` takes the key as it is, so bind a different key to each device.

    Raises:
      ValueError, TypeError: as in :class:`Dropout`.

    References:
      Huang, Sun, Liu, Sedra, Weinberger (2016), Deep Networks with Stochastic Depth, ECCV.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jdrop.adapters.nnx import DropPath
      >>> y = DropPath(0.5, rngs=nnx.Rngs(0))(jnp.ones([8, 16]))
      >>> bool((y == y[:, :1]).all())
      True
    """

    def __init__(
        self,
        rate: RateLike,
        *,
        batch_axes: int | Sequence[int] = (0,),
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: _nnx.Rngs = None,
        generator: Generator = "fast",
        shard: Shard = None,
    ) -> None:
        super().__init__(
            rate,
            deterministic=deterministic,
            rng_collection=rng_collection,
            rngs=rngs,
            generator=generator,
            shard=shard,
        )
        self.batch_axes = batch_axes

    def __call__(self, inputs: Array, *, deterministic: bool | None = None, rngs: _nnx.Rngs | Array = None) -> Array:
        """Drop ``inputs`` for whole examples; arguments as in :class:`Dropout`."""
        return self._drop("DropPath", inputs, deterministic, rngs, batch_axes=self.batch_axes)


class StochasticDepth(Dropout):
    """Add a residual branch, or skip its computation, as in ``StochasticDepth(block, rate)(x)`` for ``x + block(x)``.

    ``y = x + branch(x) * m / (1 - rate)`` with ``m ~ Bernoulli(1 - rate)``: one decision for the whole array, with the
    rules and the bits of :func:`jdrop.stochastic_depth`. The branch may have state: it runs in ``nnx.cond``, so it
    updates its batch statistics and its streams only when it is kept. Mode and rngs work as in :class:`Dropout`.

    Args:
      branch: module, ``x -> array with the shape and dtype of x``; or function without state.
      rate: scalar drop rate of the branch; it may be traced.
      deterministic, rng_collection, rngs: as in :class:`Dropout`. ``nnx.Rngs`` or a stream passed to the call also goes
        to a branch that takes ``rngs``.
      generator: as in :func:`jdrop.stochastic_depth`.
      shard: inside ``jax.shard_map``: as in :func:`jdrop.dropout`. All tiles share one decision. Under ``jax.pmap``, or
        with ``check_vma=False``, ``None`` takes the key as it is.

    Raises:
      ValueError, TypeError: as in :class:`Dropout`, or the branch does not return an array with the shape and dtype
        of x.

    References:
      Huang, Sun, Liu, Sedra, Weinberger (2016), Deep Networks with Stochastic Depth, ECCV.

    Limits:
      Under ``jax.vmap`` over keys or rates, the conditional becomes a select, so both sides are computed. A function
      must not use modules from outside, nor may other arguments of the branch hold nnx state; pass the module. Inside
      ``jax.shard_map``, a branch with collectives needs ``shard``, or devices that decide differently wait forever.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jdrop.adapters.nnx import StochasticDepth
      >>> layer = StochasticDepth(nnx.BatchNorm(4, rngs=nnx.Rngs(0)), 0.5, rngs=nnx.Rngs(1))
      >>> layer(jnp.ones([8, 4])).shape
      (8, 4)
    """

    def __init__(
        self,
        branch: Callable[..., Array],
        rate: RateLike,
        *,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: _nnx.Rngs = None,
        generator: Generator = "fast",
        shard: Shard = None,
    ) -> None:
        options: Any = {"deterministic": deterministic, "rng_collection": rng_collection, "rngs": rngs}
        super().__init__(rate, **options, generator=generator, shard=shard)
        self.branch = branch

    def __call__(
        self,
        inputs: Array,
        *args: Any,
        deterministic: bool | None = None,
        rngs: _nnx.Rngs | Array = None,
        **kwargs: Any,
    ) -> Array:
        """Add the branch, or skip it; arguments as in :class:`Dropout`, and the branch gets the rest."""
        name = "StochasticDepth"
        x, decision = _depth.decide_layer(
            name,
            _nnx.key_getter(name, self, rngs),
            inputs,
            self.rate,
            self.branch,
            train=_nnx.is_training(name, self, deterministic),
            generator=self.generator,
            shard=self.shard,
            names=_nnx.NAMES,
        )

        def add(branch: Any, rngs: dict[str, Any], x: Array) -> Array:
            return decision.add(x, branch(x, *args, **rngs, **kwargs))

        return _nnx.run_or_skip(decision, add, self.branch, _nnx.rngs_of_branch(self.branch, rngs), x)
