"""Arrays on meshes: tiles of ``jax.shard_map``, and types that carry a sharding."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from jdrop import _checks
from jdrop.bits import mul64

Shard = PartitionSpec | None


def names_of(function: str, shape: Sequence[Any], shard: Shard) -> tuple[tuple[str, ...], ...]:
    """Require a partition of an array over manual mesh axes, and return the mesh axes of each of its axes."""
    if shard is None:
        return ()
    if not isinstance(shard, PartitionSpec):
        fix = "pass the in_specs entry of x"
        raise TypeError(_checks.text(function, "shard", "must be a PartitionSpec", _checks.describe(shard), fix))
    names = mesh_axes(shard)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    used = [name for entry in names for name in entry]
    if len(names) > len(shape) or len(set(used)) != len(used):
        rule = f"must name each mesh axis once, over the {len(shape)} axes of x"
        raise ValueError(_checks.text(function, "shard", rule, shard, "pass the in_specs entry of x"))
    if not set(used) <= set(manual):
        rule = f"must name manual mesh axes, here {tuple(manual)}"
        raise ValueError(_checks.text(function, "shard", rule, shard, "use it inside jax.shard_map, over these axes"))
    return names


def mesh_axes(spec: PartitionSpec) -> tuple[tuple[str, ...], ...]:
    """Return the mesh axes of each axis of an array."""
    return tuple(s if isinstance(s, tuple) else () if s is None else (s,) for s in spec)


def check_key_varies(function: str, key: Array | None, shard: Shard, argument: str = "key", how: str = "pass") -> None:
    """Inside ``shard_map``, require a key of each device's own, or word on how the array is laid out.

    ``how`` says where the user can give ``shard=``.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if shard is None and manual and key is not None:
        alike = [name for name in manual if name not in jax.typeof(key).manual_axis_type.varying]
        if alike and not jax.typeof(lax.axis_index(alike[0])).manual_axis_type.varying:
            fix = f"{how} shard=PartitionSpec() to draw from the key as it is, or shard= the PartitionSpec of x"
            rule = f"must be known to vary over the manual mesh axes {tuple(alike)} when shard is None"
            got = "a type that does not tell (jax.pmap, or check_vma=False)"
            raise ValueError(_checks.text(function, argument, rule, got, fix))
        if alike:
            fix = f"{how} shard=, the PartitionSpec of x, or shard=PartitionSpec() if all tiles shall have one mask"
            rule = f"must vary over the manual mesh axes {tuple(alike)} when shard is None"
            raise ValueError(_checks.text(function, argument, rule, "the same key on every device", fix))


def tile(shape: Sequence[Any], names: tuple[tuple[str, ...], ...]) -> tuple[tuple[Any, ...], tuple[Array, ...]]:
    """Return the whole array's shape and, as no or one uint32 array [ndim, 2], where this device's tile starts."""
    if not any(names):
        return tuple(shape), ()
    whole, starts = list(shape), []
    for axis, size in enumerate(shape):
        index = jnp.uint32(0)
        for name in names[axis] if axis < len(names) else ():
            index = index * np.uint32(lax.axis_size(name)) + lax.axis_index(name).astype(jnp.uint32)
            whole[axis] *= lax.axis_size(name)
        starts.append(jnp.stack(mul64((np.uint32(0), index), size)))
    return tuple(whole), (jnp.stack(starts),)


def explicit_sharding(sharding: NamedSharding) -> NamedSharding | None:
    """The sharding that new arrays must be given, if any: on an explicit mesh it is part of their type."""
    return sharding if sharding.mesh.explicit_axes else None


def repeat_like(x: Array, mapped: Array, axis: int) -> Array:
    """Give x a new first axis like one of another array: of its size, and on an explicit mesh of its sharding."""
    sharding = explicit_sharding(jax.typeof(mapped).sharding)
    if sharding is not None:
        sharding = sharding.update(spec=PartitionSpec(sharding.spec[axis], *jax.typeof(x).sharding.spec))
    return jnp.broadcast_to(x, (mapped.shape[axis], *x.shape), out_sharding=sharding)


def vary_together(*arrays: Any) -> tuple[Any, ...]:
    """Cast arrays inside ``jax.shard_map`` to the union of the mesh axes that any of them varies over."""
    axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))
    return tuple(_vary(a, axes) for a in arrays)


def vary_like(x: Array, aval: Any) -> Array:
    """Cast an array inside ``jax.shard_map`` to the mesh axes that a type varies over, beside its own."""
    return _vary(x, aval.manual_axis_type.varying)


def _vary(x: Array, axes: frozenset[str]) -> Array:
    missing = axes - jax.typeof(x).manual_axis_type.varying
    return lax.pcast(x, tuple(missing), to="varying") if missing else x
