"""Layers for Flax nnx: ``from jdrop.adapters.nnx import Dropout`` in the place of ``nnx.Dropout``."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array

from jdrop import _checks
from jdrop.adapters import _layer
from jdrop.adapters._attention import dot_product_attention as dot_product_attention
from jdrop.decisions import Generator, RateLike

try:
    from flax import nnx
except ImportError as error:
    raise _layer.missing("jdrop.adapters.nnx", "flax", "flax", error) from error

Rngs = nnx.Rngs | nnx.RngStream | None


class Dropout(nnx.Dropout):
    """Drop each element with probability ``rate`` and scale the rest: ``nnx.Dropout``, and no mask in memory.

    ``y = x * m / (1 - rate)`` with ``m ~ Bernoulli(1 - rate)``, by the rules of :func:`jdrop.dropout`. Mode and rngs
    are those of ``nnx.Dropout``: what is passed to the call goes before what was passed to the constructor, and
    ``train()``, ``eval()`` and ``nnx.view`` set the mode. The constructor forks the stream ``rng_collection`` of
    ``rngs``; a call takes the next key of its stream, except in evaluation and at a Python rate of 0 or 1.

    Args:
      rate: probability of dropping, as for :func:`jdrop.dropout`: checked when called, and it may be traced.
      broadcast_dims: axes along which one decision is shared.
      deterministic: ``True`` returns the inputs themselves; ``False`` draws a mask; ``None`` leaves it to the call.
      rng_collection: the stream of ``rngs`` to take keys from.
      rngs: ``nnx.Rngs``, a stream, or nothing. A call may be given a key as well.
      generator: ``"fast"``, or ``"jax"`` for the masks of ``nnx.Dropout``, bit for bit.

    Raises:
      ValueError: a rate, an axis or ``generator`` is out of range, or there is no mode, or nothing to take a key from.
      TypeError: the inputs are no floating point array, or an argument is of the wrong type.

    Limits:
      In ``jax.shard_map``, where a mask needs ``shard=``, call :func:`jdrop.dropout` with a key of ``rngs``.

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
        rngs: Rngs = None,
        generator: Generator = "fast",
    ) -> None:
        options: Any = {"deterministic": deterministic, "rng_collection": rng_collection, "rngs": rngs}
        super().__init__(rate, broadcast_dims=broadcast_dims, **options)  # type: ignore[arg-type]
        self.generator = generator

    def __call__(self, inputs: Array, *, deterministic: bool | None = None, rngs: Rngs | Array = None) -> Array:
        """Drop elements of ``inputs``; ``deterministic`` and ``rngs`` go before those of the constructor."""
        return self._drop("Dropout", inputs, deterministic, rngs, broadcast_dims=self.broadcast_dims)

    def _drop(self, function: str, inputs: Array, deterministic: bool | None, rngs: Any, **axes: Any) -> Array:
        still = self.deterministic if deterministic is None else deterministic
        if still is None:
            fix = "pass it to the constructor or to the call, or set it with nnx.view"
            raise ValueError(_checks.text(function, "deterministic", "must be passed", None, fix))
        train = not _checks.flag(function, "deterministic", still)
        stream: Any = self.rngs if rngs is None else rngs

        def ask() -> Any:
            if isinstance(stream, jax.Array):
                return stream
            if isinstance(stream, (nnx.Rngs, nnx.RngStream)):
                return (stream[self.rng_collection] if isinstance(stream, nnx.Rngs) else stream)()
            fix = "pass it to the constructor or to the call"
            error = ValueError if stream is None else TypeError
            raise error(_checks.text(function, "rngs", "must be nnx.Rngs, a stream or a key", repr(stream), fix))

        options: Any = {"generator": self.generator, "names": ("inputs", "rate", "rngs"), **axes}
        return _layer.drop(function, ask, inputs, self.rate, train=train, **options)


class DropPath(Dropout):
    """Drop a residual branch for whole examples: use it as ``x + drop_path(branch(x))``.

    ``y[b, ...] = x[b, ...] * m[b] / (1 - rate)`` with ``m[b] ~ Bernoulli(1 - rate)``, by the rules of
    :func:`jdrop.drop_path`; mode and rngs as for :class:`Dropout`.

    Args:
      rate: probability of dropping a branch; it may be traced.
      batch_axes: axes with decisions of their own.
      deterministic, rng_collection, rngs: as for :class:`Dropout`.
      generator: ``"fast"`` or ``"jax"``, as for :func:`jdrop.drop_path`.

    Raises:
      ValueError, TypeError: as for :class:`Dropout`.

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
        rngs: Rngs = None,
        generator: Generator = "fast",
    ) -> None:
        options: Any = {"deterministic": deterministic, "rng_collection": rng_collection, "rngs": rngs}
        super().__init__(rate, generator=generator, **options)
        self.batch_axes = batch_axes

    def __call__(self, inputs: Array, *, deterministic: bool | None = None, rngs: Rngs | Array = None) -> Array:
        """Drop ``inputs`` of whole examples; arguments as for :class:`Dropout`."""
        return self._drop("DropPath", inputs, deterministic, rngs, batch_axes=self.batch_axes)
