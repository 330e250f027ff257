"""Shared code of all layers: check the arguments, then the mode, then the rate, and only then get a key."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from jdrop._axes import all_axes_but, as_axes
from jdrop._checks import check_array, check_key
from jdrop._ops import SCALE
from jdrop._prepare import Arguments, Shape, check_arguments, shared_shape
from jdrop._primitive import masked_op
from jdrop._sharding import check_key_varies, types_tell
from jdrop._types import Generator, RateLike, Shard


def missing(module: str, library: str, distribution: str, error: ImportError) -> ImportError:
    """Return the error of an adapter whose library cannot be imported."""
    return ImportError(
        f"{module}: {library} must be installed, got {error!r}; run pip install {distribution}", name=library
    )


class Names(NamedTuple):
    """What the layers of a library call their arguments, and how they get a key, for errors."""

    data: str
    rate: str
    key: str
    make_key: str
    """What to do instead of passing no key, or what is not one."""
    map_keys: str
    """What to do instead of passing a batch of keys."""
    cast: str = "cast it to a floating dtype"
    """What to do instead of passing data that are not floating."""


def drop(
    function: str,
    get_key: Callable[[], Any],
    x: Array,
    rate: RateLike,
    *,
    train: bool,
    generator: Generator,
    names: Names,
    broadcast_dims: Sequence[int] = (),
    batch_axes: int | Sequence[int] | None = None,
    in_jax: bool = False,
    shard: Shard = None,
) -> Array:
    """Apply dropout with a key from the library.

    Args:
      function: the layer, for errors.
      get_key: function that returns the key, as in :func:`take_key`.
      x: the data.
      rate: drop rate.
      train: whether to draw a mask.
      generator: as in :func:`jdrop.dropout`.
      names: names of the library, for errors.
      broadcast_dims: axes along which elements share one decision.
      batch_axes: replaces ``broadcast_dims``: axes along which decisions are independent.
      in_jax: whether the library computes ``1 - rate`` of this Python or NumPy rate on a JAX array, which rounds the
        rate first. ``generator="jax"`` then does the same.
      shard: as in :func:`check_layer`.
    """
    check_array(function, names.data, x, cast=names.cast)
    if batch_axes is None:
        shared = as_axes(function, "broadcast_dims", broadcast_dims, x.ndim)
    else:
        shared = all_axes_but(as_axes(function, "batch_axes", batch_axes, x.ndim), x.ndim)
    arguments = check_layer(function, x, rate, shared_shape(shared), train, generator, shard, names)
    if arguments.is_identity:
        return x
    if is_one(arguments.rate):
        return jnp.zeros_like(x)
    arguments = take_key(arguments, get_key, names)
    rounded = jnp.asarray(arguments.rate) if in_jax else arguments.rate
    return masked_op(SCALE, arguments._replace(rate=rounded).draw(), x)


def check_layer(
    function: str,
    x: Array,
    rate: RateLike,
    mask_shape: Callable[[Shape], Shape],
    train: bool,
    generator: Generator,
    shard: Shard,
    names: Names,
) -> Arguments:
    """Check the arguments of a layer.

    Where types do not say whether the key differs per device, ``shard=None`` takes the key as it is.
    """
    return check_arguments(
        function,
        None,
        x,
        rate,
        train=train,
        mask_shape=mask_shape,
        generator=generator,
        shard=PartitionSpec() if shard is None and not types_tell() else shard,
        rate_argument=names.rate,
        key_argument=names.key,
    )


def is_one(rate: np.ndarray | Array) -> bool:
    """Tell whether a checked rate drops everything for certain: a concrete 1."""
    return isinstance(rate, np.ndarray) and bool(np.all(rate == 1))


def take_key(arguments: Arguments, get_key: Callable[[], Any], names: Names) -> Arguments:
    """Return the arguments with a key from the library.

    Call this only if something is random: neither in evaluation nor at a Python or NumPy rate of 0 or 1. If the library
    takes keys from a stream, later layers therefore get the same keys as with the library's own layer.
    """
    key = get_key()
    check_key(arguments.function, key, names.key, make_key=names.make_key, map_keys=names.map_keys)
    check_key_varies(arguments.function, key, arguments.shard, names.key, "give the layer", data=arguments.data)
    return arguments._replace(key=key)
