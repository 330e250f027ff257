"""Layers for Equinox: ``from jdrop.adapters.equinox import Dropout`` replaces ``equinox.nn.Dropout``."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import Array

from jdrop._checks import as_bool
from jdrop._types import Generator, RateLike, Shard
from jdrop.adapters import _depth, _layer

try:
    import equinox

    from jdrop.adapters import _equinox
except ImportError as error:
    raise _layer.missing("jdrop.adapters.equinox", "equinox", "equinox", error) from error


class Dropout(equinox.nn.Dropout):
    """Drop elements with probability ``p`` and rescale the rest, like ``equinox.nn.Dropout``, without storing the mask.

    ``y = x * m / (1 - p)`` with ``m ~ Bernoulli(1 - p)``, following the rules of :func:`jdrop.dropout`. As in
    ``equinox.nn.Dropout``, ``inference`` in the call overrides the attribute of the layer, which
    ``equinox.nn.inference_mode`` sets, and ``equinox.tree_at`` can replace ``p`` and ``inference``.

    Args:
      p: drop rate, as in :func:`jdrop.dropout`. It is checked at call time and may be traced.
      inference: ``True`` returns x itself; ``False`` draws a mask.
      deterministic: deprecated name of ``inference``.
      generator: as in :func:`jdrop.dropout`. ``"jax"`` gives the masks of ``equinox.nn.Dropout``, bit for bit.
      shard: inside ``jax.shard_map``: the PartitionSpec of the data, as in :func:`jdrop.dropout`. Under ``jax.pmap``,
        or with ``check_vma=False``, ``None`` takes the key as it is, so bind a different key to each device.

    Raises:
      ValueError: ``p`` or ``generator`` is out of range, or ``key`` is a batch of keys.
      TypeError: x is not a floating-point array, or an argument has the wrong type.
      RuntimeError: ``key`` is missing when a mask is drawn. A Python or NumPy ``p`` of 0 or 1 draws no mask.

    References:
      Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov (2014), Dropout: A Simple Way to Prevent Neural
      Networks from Overfitting, JMLR.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jdrop.adapters.equinox import Dropout
      >>> y = Dropout(0.5)(jnp.ones([2, 4]), key=jax.random.key(0))
      >>> sorted(set(y.ravel().tolist()))
      [0.0, 2.0]
    """

    generator: Generator = equinox.field(static=True)
    shard: Shard = equinox.field(static=True)

    def __init__(
        self,
        p: RateLike = 0.5,
        inference: bool = False,
        *,
        deterministic: bool | None = None,
        generator: Generator = "fast",
        shard: Shard = None,
    ) -> None:
        self.p: Any = p
        self.inference = _equinox.renamed(inference, deterministic)
        self.generator = generator
        self.shard = shard

    def __call__(
        self,
        x: Array,
        *,
        key: Array | None = None,
        inference: bool | None = None,
        deterministic: bool | None = None,
    ) -> Array:
        """Drop elements of ``x``; ``inference`` overrides the attribute of the layer."""
        return self._drop("Dropout", x, key, _equinox.renamed(inference, deterministic))

    def _drop(
        self,
        function: str,
        x: Array,
        key: Array | None,
        inference: bool | None,
        batch_axes: int | Sequence[int] | None = None,
    ) -> Array:
        inactive = as_bool(function, "inference", self.inference if inference is None else inference, "p")

        rounded = isinstance(self.p, (np.generic, np.ndarray))  # by lax.stop_gradient; it leaves Python floats as is
        return _layer.drop(
            function,
            lambda: _equinox.require_key(function, key),
            x,
            self.p,
            train=not inactive,
            generator=self.generator,
            shard=self.shard,
            names=_equinox.NAMES,
            batch_axes=batch_axes,
            in_jax=rounded,
        )


class DropPath(Dropout):
    """Drop a residual branch with one decision for the array, as in ``x + DropPath(p)(branch(x), key=key)``.

    ``y = x * m / (1 - p)`` with ``m ~ Bernoulli(1 - p)``, following the rules of :func:`jdrop.drop_path`. Mode and key
    work as in :class:`Dropout`. Equinox layers see one example; use ``jax.vmap`` over examples and keys for one
    decision per example. If the layer sees the whole batch, pass ``batch_axes=0``.

    Args:
      p: drop rate of the branch; it may be traced.
      inference, deterministic: as in :class:`Dropout`.
      batch_axes: axes along which decisions are independent.
      generator: as in :func:`jdrop.drop_path`.
      shard: inside ``jax.shard_map``: the PartitionSpec of the data, as in :func:`jdrop.dropout`. Under ``jax.pmap``,
        or with ``check_vma=False``, ``None`` takes the key as it is, so bind a different key to each device.

    Raises:
      ValueError, TypeError, RuntimeError: as in :class:`Dropout`.

    References:
      Huang, Sun, Liu, Sedra, Weinberger (2016), Deep Networks with Stochastic Depth, ECCV.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jdrop.adapters.equinox import DropPath
      >>> y = jax.vmap(lambda x, key: DropPath()(x, key=key))(jnp.ones([8, 16]), jax.random.split(jax.random.key(0), 8))
      >>> bool((y == y[:, :1]).all())
      True
    """

    batch_axes: int | Sequence[int] = equinox.field(static=True)

    def __init__(
        self,
        p: RateLike = 0.5,
        inference: bool = False,
        *,
        deterministic: bool | None = None,
        batch_axes: int | Sequence[int] = (),
        generator: Generator = "fast",
        shard: Shard = None,
    ) -> None:
        super().__init__(p, inference, deterministic=deterministic, generator=generator, shard=shard)
        self.batch_axes = batch_axes

    def __call__(
        self,
        x: Array,
        *,
        key: Array | None = None,
        inference: bool | None = None,
        deterministic: bool | None = None,
    ) -> Array:
        """Drop ``x`` or keep it; arguments as in :class:`Dropout`."""
        return self._drop("DropPath", x, key, _equinox.renamed(inference, deterministic), batch_axes=self.batch_axes)


class StochasticDepth(equinox.nn.StatefulLayer):
    """Add a residual branch, or skip its computation: ``StochasticDepth(block, p)(x, key=key)`` for ``x + block(x)``.

    ``y = x + branch(x, key=...) * m / (1 - p)`` with ``m ~ Bernoulli(1 - p)``: one decision for the array, with the
    rules and the bits of :func:`jdrop.stochastic_depth`. The branch may have state: ``layer(x, state, key=key)`` then
    returns ``(y, state)``, and the state is updated only when the branch is kept.

    Args:
      branch: module or function, ``(x, *, key) -> y``, or ``(x, state, *, key) -> (y, state)``. y has the shape and
        dtype of x.
      p: scalar drop rate of the branch; it may be traced.
      inference: ``True`` returns ``x + branch(x)``; ``False`` draws the decision. The branch has its own flags, which
        ``equinox.nn.inference_mode`` sets too.
      generator: as in :func:`jdrop.stochastic_depth`.
      shard: inside ``jax.shard_map``: as in :func:`jdrop.dropout`. All tiles share one decision. Under ``jax.pmap``, or
        with ``check_vma=False``, ``None`` takes the key as it is.

    Raises:
      ValueError, TypeError, RuntimeError: as in :class:`Dropout`, or the branch does not return an array with the shape
        and dtype of x.

    References:
      Huang, Sun, Liu, Sedra, Weinberger (2016), Deep Networks with Stochastic Depth, ECCV.

    Limits:
      Under ``jax.vmap`` over ``key`` or ``p``, the conditional becomes a select: both sides are computed, and so is one
      state per example. With BatchNorm, map over x and ``branch_key``, and share ``key`` (``in_axes=None``). Inside
      ``jax.shard_map``, a branch with collectives needs ``shard``, or devices that decide differently wait forever.

    Example:
      >>> import equinox, jax, jax.numpy as jnp
      >>> from jdrop.adapters.equinox import StochasticDepth
      >>> branch = lambda: equinox.nn.BatchNorm(4, axis_name="batch", mode="batch")
      >>> layer, state = equinox.nn.make_with_state(lambda: StochasticDepth(branch(), 0.5))()
      >>> f = jax.vmap(lambda x: layer(x, state, key=jax.random.key(0)), axis_name="batch", out_axes=(0, None))
      >>> f(jnp.ones([8, 4]))[0].shape
      (8, 4)
    """

    branch: Callable[..., Any]
    p: Any = 0.5
    inference: bool = False
    generator: Generator = equinox.field(default="fast", static=True)
    shard: Shard = equinox.field(default=None, static=True)

    def is_stateful(self) -> bool:
        """Tell ``equinox.nn.Sequential`` whether the branch has state."""
        return isinstance(self.branch, equinox.nn.StatefulLayer) and self.branch.is_stateful()

    def __call__(
        self,
        x: Array,
        state: Any = None,
        *,
        key: Array | None = None,
        branch_key: Array | None = None,
        inference: bool | None = None,
    ) -> Any:
        """Add the branch, or skip it. The branch gets ``branch_key``; if it is None, a key derived from ``key``."""
        name = "StochasticDepth"
        inactive = as_bool(name, "inference", self.inference if inference is None else inference, "p")
        key, branch_key = _equinox.two_keys(name, key, branch_key)
        x, decision = _depth.decide_layer(
            name,
            lambda: _equinox.require_key(name, key),
            x,
            self.p,
            self.branch,
            train=not inactive,
            generator=self.generator,
            shard=self.shard,
            names=_equinox.NAMES,
        )

        def add(x: Array, state: Any) -> tuple[Array, Any]:
            y, state = (
                (self.branch(x, key=branch_key), None) if state is None else self.branch(x, state, key=branch_key)
            )
            return decision.add(x, y), state

        y, new_state = _equinox.run_or_skip(decision, add, x, state)
        return y if state is None else (y, new_state)
