"""Parts of arrays at kept blocks: read, replaced, or added to, each shard by itself."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from jdrop._sharding import explicit_sharding
from jdrop._subsets import Blocks


def take_blocks(x: Array, units: Array, axis: int, blocks: Blocks) -> Array:
    """Return the kept units of x along an axis."""
    parts = _in_shards(_take, axis, x, blocks, units)
    return parts.reshape(*x.shape[:axis], units.shape[0], *x.shape[axis + 1 :])


def put_blocks(x: Array, units: Array, parts: Array, axis: int, blocks: Blocks) -> Array:
    """Return x with its kept units replaced."""
    return _in_shards(_put, axis, x, blocks, units, parts).reshape(x.shape)


def add_blocks(x: Array, units: Array, parts: Array, axis: int, blocks: Blocks) -> Array:
    """Return x with something added to its kept units."""
    return _in_shards(_add, axis, x, blocks, units, parts).reshape(x.shape)


_Operation = Callable[..., Array]  # (array [..., blocks, size, ...], blocks, ...) at an axis -> such an array
_HOW: Any = {
    "unique_indices": True,
    "indices_are_sorted": True,
    "mode": "promise_in_bounds",
    "wrap_negative_indices": False,
}


def _take(axis: int, x: Array, chosen: Array) -> Array:
    sharding = explicit_sharding(jax.typeof(x).sharding)  # that of the result, too
    return x.at[(slice(None),) * axis + (chosen,)].get(out_sharding=sharding, **_HOW)


def _put(axis: int, x: Array, chosen: Array, parts: Array) -> Array:
    sharding = explicit_sharding(jax.typeof(x).sharding)
    return x.at[(slice(None),) * axis + (chosen,)].set(parts, out_sharding=sharding, **_HOW)


def _add(axis: int, x: Array, chosen: Array, parts: Array) -> Array:
    sharding = explicit_sharding(jax.typeof(x).sharding)
    return x.at[(slice(None),) * axis + (chosen,)].add(parts, out_sharding=sharding, **_HOW)


def _in_shards(operation: _Operation, axis: int, x: Array, blocks: Blocks, units: Array, *parts: Array) -> Array:
    """Map an operation over shards as a batch axis, so that the compiler knows that none needs data of another."""
    whole, chosen, *new = (
        _split(x, axis, blocks),
        _local(units, blocks),
        *(_split(p, axis, blocks) for p in parts),
    )
    operation = functools.partial(operation, axis)
    if blocks.shards == 1:
        return operation(whole, chosen[0], *new)
    sharding = explicit_sharding(jax.typeof(whole).sharding)
    if sharding is not None:
        chosen = jax.sharding.reshard(chosen, sharding.update(spec=PartitionSpec(sharding.spec[axis], None)))
    return jax.vmap(operation, (axis, 0, *[axis] * len(new)), axis)(whole, chosen, *new)


def _split(x: Array, axis: int, blocks: Blocks) -> Array:
    """Split an axis of units into ``[shards, blocks, size]``, or ``[blocks, size]`` if there is one shard."""
    shards = (blocks.shards,) if blocks.shards > 1 else ()
    per_shard = x.shape[axis] // blocks.size // blocks.shards
    return x.reshape(*x.shape[:axis], *shards, per_shard, blocks.size, *x.shape[axis + 1 :])


def _local(units: Array, blocks: Blocks) -> Array:
    """Return the numbers of the kept blocks within their shards, int32 ``[shards, blocks]``."""
    chosen = units.reshape(blocks.shards, -1, blocks.size)[..., 0] // np.int32(blocks.size)
    return chosen - np.arange(blocks.shards, dtype=np.int32)[:, None] * np.int32(blocks.per_shard)
