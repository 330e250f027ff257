"""Parts of arrays at kept blocks: read, replaced, or added to, each shard by itself."""

import functools

import jax
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from jdrop._sharding import explicit_sharding
from jdrop._subsets import Blocks


def take_blocks(x: Array, units: Array, axis: int, blocks: Blocks) -> Array:
    """Return the kept units of x along an axis."""
    parts = _in_shards("get", axis, x, blocks, units)
    return parts.reshape(*x.shape[:axis], units.shape[0], *x.shape[axis + 1 :])


def put_blocks(x: Array, units: Array, parts: Array, axis: int, blocks: Blocks) -> Array:
    """Return x with its kept units replaced."""
    return _in_shards("set", axis, x, blocks, units, parts).reshape(x.shape)


def add_blocks(x: Array, units: Array, parts: Array, axis: int, blocks: Blocks) -> Array:
    """Return x with something added to its kept units."""
    return _in_shards("add", axis, x, blocks, units, parts).reshape(x.shape)


def _in_shards(method: str, axis: int, x: Array, blocks: Blocks, units: Array, *parts: Array) -> Array:
    """Apply a method of ``x.at`` to the kept blocks, mapped over shards: the compiler then knows that none needs data
    of another.
    """
    whole, *new = (_split(array, axis, blocks) for array in (x, *parts))
    chosen = _local(units, blocks)
    apply = functools.partial(_apply, method, axis)
    if blocks.shards == 1:
        return apply(whole, chosen[0], *new)
    sharding = explicit_sharding(jax.typeof(whole).sharding)
    if sharding is not None:
        chosen = jax.sharding.reshard(chosen, sharding.update(spec=PartitionSpec(sharding.spec[axis], None)))
    return jax.vmap(apply, (axis, 0, *[axis] * len(new)), axis)(whole, chosen, *new)


def _apply(method: str, axis: int, x: Array, chosen: Array, *parts: Array) -> Array:
    """Apply a method of ``x.at`` to blocks of ``[..., blocks, size, ...]``."""
    return getattr(x.at[(slice(None),) * axis + (chosen,)], method)(
        *parts,
        unique_indices=True,
        indices_are_sorted=True,
        mode="promise_in_bounds",
        wrap_negative_indices=False,
        out_sharding=explicit_sharding(jax.typeof(x).sharding),  # the result is sharded as x
    )


def _split(x: Array, axis: int, blocks: Blocks) -> Array:
    """Split an axis of units into ``[shards, blocks, size]``, or ``[blocks, size]`` if there is one shard."""
    shards = (blocks.shards,) if blocks.shards > 1 else ()
    per_shard = x.shape[axis] // blocks.size // blocks.shards
    return x.reshape(*x.shape[:axis], *shards, per_shard, blocks.size, *x.shape[axis + 1 :])


def _local(units: Array, blocks: Blocks) -> Array:
    """Return the numbers of the kept blocks within their shards, int32 ``[shards, blocks]``."""
    chosen = units.reshape(blocks.shards, -1, blocks.size)[..., 0] // np.int32(blocks.size)
    return chosen - np.arange(blocks.shards, dtype=np.int32)[:, None] * np.int32(blocks.per_shard)
