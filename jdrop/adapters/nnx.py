"""Layers for Flax nnx: ``from jdrop.adapters.nnx import Dropout`` replaces ``nnx.Dropout``."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array

from jdrop._checks import as_bool
from jdrop._types import Generator, RateLike, Shard
from jdrop.adapters import _layer
from jdrop.adapters._attention import dot_product_attention as dot_product_attention

try:
    from flax import nnx
except ImportError as error:
    raise _layer.missing("jdrop.adapters.nnx", "flax", "flax", error) from error

NAMES = _layer.Names(
    data="inputs",
    rate="rate",
    key="rngs",
    make_key="pass nnx.Rngs(dropout=seed), or a key of jax.random.key",
    map_keys="pass one key; nnx.vmap under nnx.split_rngs gives each example its own",
)
Rngs = nnx.Rngs | nnx.RngStream | None


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
      generator: ``"fast"``, or ``"jax"`` for the same masks as ``nnx.Dropout``, bit for bit.
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
        rngs: Rngs = None,
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

    def __call__(self, inputs: Array, *, deterministic: bool | None = None, rngs: Rngs | Array = None) -> Array:
        """Drop elements of ``inputs``; ``deterministic`` and ``rngs`` override those of the constructor."""
        return self._drop("Dropout", inputs, deterministic, rngs, broadcast_dims=self.broadcast_dims)

    def _drop(
        self,
        function: str,
        inputs: Array,
        deterministic: bool | None,
        rngs: Rngs | Array,
        *,
        broadcast_dims: Sequence[int] = (),
        batch_axes: int | Sequence[int] | None = None,
    ) -> Array:
        inactive = self.deterministic if deterministic is None else deterministic
        if inactive is None:
            raise ValueError(
                f"{function}: deterministic must be passed, got None; "
                "pass it to the constructor or to the call, or set it with nnx.view"
            )
        train = not as_bool(function, "deterministic", inactive)
        stream: Any = self.rngs if rngs is None else rngs

        def get_key() -> Any:
            if isinstance(stream, jax.Array):
                return stream
            if isinstance(stream, nnx.RngStream):
                return stream()
            collection = self.rng_collection
            if not isinstance(stream, nnx.Rngs):
                wrong = ValueError if stream is None else TypeError
                raise wrong(
                    f"{function}: rngs must be nnx.Rngs, a stream or a key, got {stream!r}; "
                    f"pass rngs=nnx.Rngs({collection}=seed) to the constructor or to the call"
                )
            try:
                return stream[collection]()
            except KeyError:
                raise ValueError(
                    f"{function}: rngs must have the stream {collection!r}, or a default, got {list(stream)}; "
                    f"pass nnx.Rngs({collection}=seed)"
                ) from None

        return _layer.drop(
            function,
            get_key,
            inputs,
            self.rate,
            train=train,
            generator=self.generator,
            shard=self.shard,
            names=NAMES,
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
      generator: ``"fast"`` or ``"jax"``, as in :func:`jdrop.drop_path`.
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
        rngs: Rngs = None,
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

    def __call__(self, inputs: Array, *, deterministic: bool | None = None, rngs: Rngs | Array = None) -> Array:
        """Drop ``inputs`` for whole examples; arguments as in :class:`Dropout`."""
        return self._drop("DropPath", inputs, deterministic, rngs, batch_axes=self.batch_axes)
