"""Arrays on meshes: tiles of ``jax.shard_map``, and types that carry a sharding."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from jdrop._errors import describe
from jdrop._random.threefry import U64
from jdrop._types import Shard


def tile_axes(function: str, shape: Sequence[Any], shard: Shard) -> tuple[tuple[str, ...], ...]:
    """Require ``shard=`` to fit a tile of ``jax.shard_map``, and return the mesh axes of each axis of the array."""
    if shard is None:
        return ()
    if not isinstance(shard, PartitionSpec):
        raise TypeError(
            f"{function}: shard must be a PartitionSpec, got {describe(shard)}; pass the in_specs entry of x"
        )
    axes = mesh_axes(shard)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    used = [name for entry in axes for name in entry]
    if len(axes) > len(shape) or len(set(used)) != len(used):
        raise ValueError(
            f"{function}: shard must name each mesh axis once, over the {len(shape)} axes of x, got {shard}; "
            "pass the in_specs entry of x"
        )
    if not set(used) <= set(manual):
        raise ValueError(
            f"{function}: shard must name manual mesh axes, here {tuple(manual)}, got {shard}; "
            "use it inside jax.shard_map, over these axes"
        )
    return axes


def mesh_axes(spec: PartitionSpec) -> tuple[tuple[str, ...], ...]:
    """Return the mesh axes of each axis of an array."""
    return tuple(s if isinstance(s, tuple) else () if s is None else (s,) for s in spec)


def types_tell() -> bool:
    """Tell whether types show over which mesh axes arrays vary: not under ``jax.pmap`` or with ``check_vma=False``."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return not manual or bool(jax.typeof(lax.axis_index(manual[0])).manual_axis_type.varying)


def check_key_varies(
    function: str, key: Array | None, shard: Shard, argument: str = "key", how: str = "pass", *, data: Any
) -> None:
    """Inside ``shard_map``, require a key that differs over the mesh axes that the data vary over, or ``shard=``.

    ``how`` tells the user how to set ``shard=``.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if shard is not None or not manual or key is None:
        return
    if not types_tell():
        raise ValueError(
            f"{function}: {argument} must be known to vary over the manual mesh axes {tuple(manual)} when shard is "
            "None, "
            "got a type without this information (jax.pmap, or check_vma=False); "
            f"{how} shard=PartitionSpec() to draw from the key as it is, or shard= the PartitionSpec of x"
        )
    of_data = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(data)))
    equal = [name for name in manual if name in of_data - jax.typeof(key).manual_axis_type.varying]
    if equal:
        raise ValueError(
            f"{function}: {argument} must vary over the manual mesh axes {tuple(equal)} when shard is None, "
            "got the same key on every device; "
            f"{how} shard=, the PartitionSpec of x, or shard=PartitionSpec() to give all tiles the same mask"
        )


def whole_array(shape: Sequence[Any], axes: tuple[tuple[str, ...], ...]) -> tuple[tuple[Any, ...], Array | None]:
    """Return the shape of the whole array, and where this device's tile starts: uint32 [ndim, 2] of ``(hi, lo)``."""
    if not any(axes):
        return tuple(shape), None
    whole, starts = list(shape), []
    for axis, size in enumerate(shape):
        index = jnp.uint32(0)
        for name in axes[axis] if axis < len(axes) else ():
            index = index * np.uint32(lax.axis_size(name)) + lax.axis_index(name).astype(jnp.uint32)
            whole[axis] *= lax.axis_size(name)
        starts.append(jnp.stack(U64(np.uint32(0), index) * size))
    return tuple(whole), jnp.stack(starts)


def explicit_sharding(sharding: NamedSharding) -> NamedSharding | None:
    """Return the sharding if it is part of types, on an explicit mesh; new arrays then need it."""
    return sharding if sharding.mesh.explicit_axes else None


def broadcast_spec(spec: PartitionSpec, shape: Sequence[Any]) -> PartitionSpec:
    """Return the spec of an array that broadcasts to one with a spec: none on axes of size 1."""
    return PartitionSpec(*(s if n != 1 else None for s, n in zip(spec, shape)))


def check_sharded_as(function: str, argument: str, value: Any, data: Array, whose: str = "the data") -> None:
    """On an explicit mesh, forbid arrays that broadcast to the data but are sharded differently along an axis."""
    sharding = explicit_sharding(jax.typeof(data).sharding) if isinstance(value, Array) and value.ndim else None
    if sharding is None:
        return
    axes, used = mesh_axes(sharding.spec), {name for names in mesh_axes(sharding.spec) for name in names}
    for mine, theirs in zip(reversed(mesh_axes(jax.typeof(value).sharding.spec)), reversed(axes)):
        if mine and mine != theirs and (theirs or used & set(mine)):
            raise ValueError(
                f"{function}: {argument} must be sharded along each axis as {whose}, {jax.typeof(data)}, or not there, "
                f"got {jax.typeof(value)}; use jax.sharding.reshard first"
            )


def repeat_like(x: Array, mapped: Array, axis: int) -> Array:
    """Repeat x along a new first axis, with the size and any explicit sharding of an axis of ``mapped``."""
    sharding = explicit_sharding(jax.typeof(mapped).sharding)
    if sharding is not None:
        sharding = sharding.update(spec=PartitionSpec(sharding.spec[axis], *jax.typeof(x).sharding.spec))
    return jnp.broadcast_to(x, (mapped.shape[axis], *x.shape), out_sharding=sharding)


def vary_together(*arrays: Any) -> tuple[Any, ...]:
    """Cast arrays inside ``jax.shard_map`` to the union of the mesh axes that any of them varies over."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return arrays
    axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))
    return tuple(_vary(a, axes) for a in arrays)


def vary_like(x: Array, aval: Any) -> Array:
    """Cast an array inside ``jax.shard_map`` to vary also over the mesh axes that a type varies over."""
    return _vary(x, aval.manual_axis_type.varying)


def _vary(x: Array, axes: frozenset[str]) -> Array:
    missing = axes - jax.typeof(x).manual_axis_type.varying
    return lax.pcast(x, tuple(missing), to="varying") if missing else x
