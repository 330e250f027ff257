"""The weights of kept units: taken from full arrays, and put back."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from jdrop._axes import as_axis
from jdrop._checks import check_array, check_integers, is_array
from jdrop._errors import describe
from jdrop._sharding import explicit_sharding
from jdrop.thin._units import Blocks, as_blocks


def take(weights: Array, units: Array, axis: int = 0, *, block_size: int = 1, num_shards: int = 1) -> Array:
    """Return the parts of weights that belong to kept units.

    ``weights[..., units, ...]`` along ``axis``, gathered by blocks. The gradient with respect to the weights is that of
    the kept parts, and 0 elsewhere.

    Args:
      weights: array with an axis of units, such as a kernel ``[features, units]``, a bias ``[units]``, or a moment of
        an optimizer with their shape.
      units: indices from :func:`kept_units`, int32 ``[kept]``. They are not checked: indices that are out of range, in
        another order, or not in blocks of ``block_size`` give undefined results.
      axis: the axis of units.
      block_size: as it was in :func:`kept_units`.
      num_shards: as it was in :func:`kept_units`. If a mesh splits ``axis`` over as many devices, no weight moves
        between devices.

    Returns:
      An array like ``weights``, but with size ``kept`` along ``axis``.

    Raises:
      ValueError: ``axis`` is out of range, or sizes do not divide.
      TypeError: an argument has the wrong type.

    References:
      Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov (2014), Dropout: A Simple Way to Prevent Neural Networks
      from Overfitting, JMLR, section 2 (thinned networks).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jdrop import thin
      >>> units = thin.kept_units(jax.random.key(0), 512, 0.5, block_size=64)
      >>> thin.take(jnp.ones([32, 512]), units, axis=1, block_size=64).shape
      (32, 256)
    """
    axis, blocks = _check("take", weights, units, axis, block_size, num_shards)
    return take_blocks(jnp.asarray(weights), jnp.asarray(units), axis, blocks)


def put(weights: Array, units: Array, kept: Array, axis: int = 0, *, block_size: int = 1, num_shards: int = 1) -> Array:
    """Return weights with the parts that belong to kept units replaced: the inverse of :func:`take`.

    With it an optimizer can update only the kept parts, of weights and moments: take them, update them, put them back.
    Under ``jax.jit`` with ``donate_argnums``, this does not copy the weights.

    Args:
      weights: array with an axis of units, as in :func:`take`.
      units: indices from :func:`kept_units`, int32 ``[kept]``, as in :func:`take`.
      kept: the new parts, an array like ``take(weights, units, axis)``.
      axis: the axis of units.
      block_size: as it was in :func:`kept_units`.
      num_shards: as it was in :func:`kept_units`.

    Returns:
      An array like ``weights``.

    Raises:
      ValueError: ``axis`` is out of range, sizes do not divide, or ``kept`` has another shape or dtype.
      TypeError: an argument has the wrong type.

    References:
      Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov (2014), Dropout: A Simple Way to Prevent Neural Networks
      from Overfitting, JMLR, section 2 (thinned networks).

    Example:
      >>> import jax.numpy as jnp
      >>> from jdrop import thin
      >>> thin.put(jnp.zeros(4), jnp.array([0, 3]), jnp.ones(2)).tolist()
      [1.0, 0.0, 0.0, 1.0]
    """
    name = "put"
    axis, blocks = _check(name, weights, units, axis, block_size, num_shards)
    check_array(name, "kept", kept, (weights.dtype.name,), cast="convert it to the dtype of weights")
    shape = (*weights.shape[:axis], units.shape[0], *weights.shape[axis + 1 :])
    if kept.shape != shape:
        raise ValueError(f"{name}: kept must have shape {shape}, got {describe(kept)}; take it from weights first")
    weights, kept = jnp.asarray(weights), jnp.asarray(kept)
    return _in_shards(_put, axis, weights, blocks, jnp.asarray(units), kept).reshape(weights.shape)


def take_blocks(weights: Array, units: Array, axis: int, blocks: Blocks) -> Array:
    """Return the result of :func:`take` for checked arguments."""
    parts = _in_shards(_take, axis, weights, blocks, units)
    return parts.reshape(*weights.shape[:axis], units.shape[0], *weights.shape[axis + 1 :])


def _check(
    function: str, weights: Array, units: Array, axis: int, block_size: int, num_shards: int
) -> tuple[int, Blocks]:
    if not is_array(weights):
        raise TypeError(f"{function}: weights must be an array, got {describe(weights)}; use jax.tree.map for a pytree")
    axis = as_axis(function, "axis", axis, weights.ndim)
    blocks = as_blocks(function, weights.shape[axis], block_size, num_shards)
    check_integers(function, "units", units)
    if units.ndim != 1 or units.shape[0] % (blocks.shards * blocks.size) or units.shape[0] > weights.shape[axis]:
        raise ValueError(
            f"{function}: units must be [kept] in {blocks.items}, as many in each of {blocks.shards} shards, "
            f"got {describe(units)}; pass the result of kept_units, and use jax.vmap over groups"
        )
    return axis, blocks


_Operation = Callable[..., Array]  # (array [..., blocks, size, ...], blocks, ...) at an axis -> such an array
_HOW: Any = {"unique_indices": True, "indices_are_sorted": True, "mode": "promise_in_bounds"}


def _take(axis: int, weights: Array, chosen: Array) -> Array:
    sharding = explicit_sharding(jax.typeof(weights).sharding)  # that of the result, too
    return weights.at[(slice(None),) * axis + (chosen,)].get(out_sharding=sharding, **_HOW)


def _put(axis: int, weights: Array, chosen: Array, parts: Array) -> Array:
    sharding = explicit_sharding(jax.typeof(weights).sharding)
    return weights.at[(slice(None),) * axis + (chosen,)].set(parts, out_sharding=sharding, **_HOW)


def _in_shards(operation: _Operation, axis: int, weights: Array, blocks: Blocks, units: Array, *parts: Array) -> Array:
    """Map an operation over shards as a batch axis, so that the compiler knows that none needs data of another."""
    whole, chosen, *new = (
        _split(weights, axis, blocks),
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


def _split(weights: Array, axis: int, blocks: Blocks) -> Array:
    """Split an axis of units into ``[shards, blocks, size]``, or ``[blocks, size]`` if there is one shard."""
    shards = (blocks.shards,) if blocks.shards > 1 else ()
    per_shard = weights.shape[axis] // blocks.size // blocks.shards
    return weights.reshape(*weights.shape[:axis], *shards, per_shard, blocks.size, *weights.shape[axis + 1 :])


def _local(units: Array, blocks: Blocks) -> Array:
    """Return the numbers of the kept blocks within their shards, int32 ``[shards, blocks]``."""
    chosen = units.reshape(blocks.shards, -1, blocks.size)[..., 0] // np.int32(blocks.size)
    return chosen - np.arange(blocks.shards, dtype=np.int32)[:, None] * np.int32(blocks.per_shard)
