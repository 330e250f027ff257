"""Layers for Equinox: ``from jdrop.adapters.equinox import Dropout`` in the place of ``equinox.nn.Dropout``."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import Array

from jdrop import _checks
from jdrop.adapters import _layer
from jdrop.decisions import Generator, RateLike

try:
    import equinox
except ImportError as error:
    raise _layer.missing("jdrop.adapters.equinox", "equinox", "equinox", error) from error


class Dropout(equinox.nn.Dropout):
    """Drop each element with probability ``p`` and scale the rest: ``equinox.nn.Dropout``, and no mask in memory.

    ``y = x * m / (1 - p)`` with ``m ~ Bernoulli(1 - p)``, by the rules of :func:`jdrop.dropout`. As in
    ``equinox.nn.Dropout``, ``inference`` of the call goes before that of the layer, which
    ``equinox.nn.inference_mode`` sets, and ``p`` and ``inference`` may be replaced by ``equinox.tree_at``.

    Args:
      p: probability of dropping, as for :func:`jdrop.dropout`: checked when called, and it may be traced.
      inference: ``True`` returns x itself; ``False`` draws a mask.
      deterministic: the deprecated name of ``inference``.
      generator: ``"fast"``, or ``"jax"`` for the masks of ``equinox.nn.Dropout``, bit for bit.

    Raises:
      ValueError: ``p`` or ``generator`` is out of range, or ``key`` is a batch of keys.
      TypeError: x is no floating point array, or an argument is of the wrong type.
      RuntimeError: a mask is drawn, and there is no ``key``. None is drawn at a Python or NumPy ``p`` of 0 or 1.

    Limits:
      In ``jax.shard_map``, where a mask needs ``shard=``, call :func:`jdrop.dropout`.

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

    def __init__(
        self,
        p: RateLike = 0.5,
        inference: bool = False,
        *,
        deterministic: bool | None = None,
        generator: Generator = "fast",
    ) -> None:
        self.p: Any = p
        self.inference = _renamed(inference, deterministic)
        self.generator = generator

    def __call__(
        self,
        x: Array,
        *,
        key: Array | None = None,
        inference: bool | None = None,
        deterministic: bool | None = None,
    ) -> Array:
        """Drop elements of ``x`` by ``key``; ``inference`` goes before that of the layer."""
        return self._drop("Dropout", x, key, _renamed(inference, deterministic))

    def _drop(self, function: str, x: Array, key: Array | None, inference: bool | None, **axes: Any) -> Array:
        still = _checks.flag(function, "inference", self.inference if inference is None else inference)

        def ask() -> Array:
            if key is None:
                fix = "pass key=, or inference=True, or p=0."
                rule = "must be a PRNG key when something is dropped"
                raise RuntimeError(_checks.text(function, "key", rule, None, fix))
            return key

        rounded = isinstance(self.p, (np.generic, np.ndarray))  # by lax.stop_gradient, which leaves a Python float be
        options: Any = {"generator": self.generator, "names": ("x", "p", "key"), "in_jax": rounded, **axes}
        return _layer.drop(function, ask, x, self.p, train=not still, **options)


class DropPath(Dropout):
    """Drop a residual branch, by one decision for the array: use it as ``x + DropPath(p)(branch(x), key=key)``.

    ``y = x * m / (1 - p)`` with ``m ~ Bernoulli(1 - p)``, by the rules of :func:`jdrop.drop_path`; mode and key as for
    :class:`Dropout`. A layer of Equinox sees one example, and ``jax.vmap`` over examples and keys makes the decisions
    of a batch; a layer that sees the batch itself takes ``batch_axes=0``.

    Args:
      p: probability of dropping a branch; it may be traced.
      inference, deterministic: as for :class:`Dropout`.
      batch_axes: axes with decisions of their own.
      generator: ``"fast"`` or ``"jax"``, as for :func:`jdrop.drop_path`.

    Raises:
      ValueError, TypeError, RuntimeError: as for :class:`Dropout`.

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
    ) -> None:
        super().__init__(p, inference, deterministic=deterministic, generator=generator)
        self.batch_axes = batch_axes

    def __call__(
        self,
        x: Array,
        *,
        key: Array | None = None,
        inference: bool | None = None,
        deterministic: bool | None = None,
    ) -> Array:
        """Drop ``x`` by ``key``; arguments as for :class:`Dropout`."""
        return self._drop("DropPath", x, key, _renamed(inference, deterministic), batch_axes=self.batch_axes)


def _renamed(inference: Any, deterministic: bool | None) -> Any:
    if deterministic is None:
        return inference
    warnings.warn("deterministic is deprecated, as in Equinox; pass inference", stacklevel=3)
    return deterministic
