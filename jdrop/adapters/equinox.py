"""Layers for Equinox: ``from jdrop.adapters.equinox import Dropout`` replaces ``equinox.nn.Dropout``."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import Array

from jdrop._checks import as_bool
from jdrop._types import Generator, RateLike, Shard
from jdrop.adapters import _layer

try:
    import equinox
except ImportError as error:
    raise _layer.missing("jdrop.adapters.equinox", "equinox", "equinox", error) from error


NAMES = _layer.Names(
    data="x",
    rate="p",
    key="key",
    make_key="pass key=jax.random.key(seed)",
    map_keys="use jax.vmap over x and keys",
)


class Dropout(equinox.nn.Dropout):
    """Drop elements with probability ``p`` and rescale the rest, like ``equinox.nn.Dropout``, without storing the mask.

    ``y = x * m / (1 - p)`` with ``m ~ Bernoulli(1 - p)``, following the rules of :func:`jdrop.dropout`. As in
    ``equinox.nn.Dropout``, ``inference`` in the call overrides the attribute of the layer, which
    ``equinox.nn.inference_mode`` sets, and ``equinox.tree_at`` can replace ``p`` and ``inference``.

    Args:
      p: drop rate, as in :func:`jdrop.dropout`. It is checked at call time and may be traced.
      inference: ``True`` returns x itself; ``False`` draws a mask.
      deterministic: deprecated name of ``inference``.
      generator: ``"fast"``, or ``"jax"`` for the same masks as ``equinox.nn.Dropout``, bit for bit.
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
        self.inference = _renamed(inference, deterministic)
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
        return self._drop("Dropout", x, key, _renamed(inference, deterministic))

    def _drop(
        self,
        function: str,
        x: Array,
        key: Array | None,
        inference: bool | None,
        batch_axes: int | Sequence[int] | None = None,
    ) -> Array:
        inactive = as_bool(function, "inference", self.inference if inference is None else inference, "p")

        def get_key() -> Array:
            if key is None:
                raise RuntimeError(
                    f"{function}: key must be a PRNG key when something is dropped, got None; "
                    "pass key=jax.random.key(seed), or inference=True, or p=0."
                )
            return key

        rounded = isinstance(self.p, (np.generic, np.ndarray))  # by lax.stop_gradient; it leaves Python floats as is
        return _layer.drop(
            function,
            get_key,
            x,
            self.p,
            train=not inactive,
            generator=self.generator,
            shard=self.shard,
            names=NAMES,
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
      generator: ``"fast"`` or ``"jax"``, as in :func:`jdrop.drop_path`.
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
        return self._drop("DropPath", x, key, _renamed(inference, deterministic), batch_axes=self.batch_axes)


def _renamed(inference: Any, deterministic: bool | None) -> Any:
    if deterministic is None:
        return inference
    warnings.warn("deterministic is deprecated, as in Equinox; pass inference", stacklevel=3)
    return deterministic
