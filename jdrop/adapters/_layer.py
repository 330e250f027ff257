"""Shared code of all layers: check the arguments, then the mode, then the rate, and only then get a key."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from jdrop._axes import all_axes_but, as_axes
from jdrop._checks import check_array, check_key
from jdrop._ops import SCALE
from jdrop._prepare import check_arguments
from jdrop._primitive import masked_op
from jdrop._sharding import check_key_varies, types_tell
from jdrop._types import Generator, RateLike, Shard


def missing(module: str, library: str, distribution: str, error: ImportError) -> ImportError:
    """Return the error of an adapter whose library cannot be imported."""
    return ImportError(
        f"{module}: {library} must be installed, got {error!r}; run pip install {distribution}", name=library
    )


def drop(
    function: str,
    get_key: Callable[[], Any],
    x: Array,
    rate: RateLike,
    *,
    train: bool,
    generator: Generator,
    names: tuple[str, str, str],
    broadcast_dims: Sequence[int] = (),
    batch_axes: int | Sequence[int] | None = None,
    in_jax: bool = False,
    shard: Shard = None,
) -> Array:
    """Apply dropout with a key from the library.

    Args:
      function: the layer, for errors.
      get_key: function that returns the key. It is called only if something is random: neither in evaluation nor at a
        Python or NumPy rate of 0 or 1. If the library takes keys from a stream, later layers therefore get the same
        keys as with the library's own layer.
      x: the data.
      rate: drop rate.
      train: whether to draw a mask.
      generator: as in :func:`jdrop.dropout`.
      names: the layer's names of x, the rate, and the key, for errors.
      broadcast_dims: axes along which elements share one decision.
      batch_axes: replaces ``broadcast_dims``: axes along which decisions are independent.
      in_jax: whether the library computes ``1 - rate`` of this Python or NumPy rate on a JAX array, which rounds the
        rate first. ``generator="jax"`` then does the same.
      shard: as in :func:`jdrop.dropout`. If types do not show whether the key differs per device, ``None`` uses the
        key as it is.
    """
    data_argument, rate_argument, key_argument = names
    check_array(function, data_argument, x)
    if batch_axes is None:
        shared = as_axes(function, "broadcast_dims", broadcast_dims, x.ndim)
    else:
        shared = all_axes_but(as_axes(function, "batch_axes", batch_axes, x.ndim), x.ndim)
    arguments = check_arguments(
        function,
        None,
        x,
        rate,
        train=train,
        shared_axes=shared,
        generator=generator,
        shard=PartitionSpec() if shard is None and not types_tell() else shard,
        rate_argument=rate_argument,
        key_argument=key_argument,
    )
    if arguments.is_identity:
        return x
    if isinstance(arguments.rate, np.ndarray) and np.all(arguments.rate == 1):
        return jnp.zeros_like(x)
    key = get_key()
    check_key(function, key, key_argument)
    check_key_varies(function, key, arguments.shard, key_argument, "give the layer", data=x)
    rounded = jnp.asarray(arguments.rate) if in_jax else arguments.rate
    return masked_op(SCALE, arguments._replace(key=key, rate=rounded).draw(), x)
