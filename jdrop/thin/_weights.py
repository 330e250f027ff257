"""The weights of kept units: taken from full arrays, and put back."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop._axes import as_axis
from jdrop._checks import check_array, check_integers
from jdrop._errors import describe
from jdrop._gather import put_blocks, take_blocks
from jdrop._subsets import Blocks, as_blocks


def take(weights: Array, units: Array, axis: int = 0, *, block_size: int = 1, num_shards: int = 1) -> Array:
    """Return the parts of weights that belong to kept units.

    ``weights[..., units, ...]`` along ``axis``, gathered by blocks. The gradient with respect to the weights is that of
    the kept parts, and 0 elsewhere.

    Args:
      weights: array with an axis of units, such as a kernel ``[features, units]``, a bias ``[units]``, or a moment of
        an optimizer with their shape.
      units: indices from :func:`kept_units`, int32 ``[kept]``. JAX arrays are not read: if they are out of range, in
        another order, not in blocks of ``block_size``, or not as many in each shard, the result is undefined.
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
      Graham, Reizenstein, Robinson (2015), Efficient Batchwise Dropout Training Using Submatrices, arXiv:1502.02478.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jdrop import thin
      >>> units = thin.kept_units(jax.random.key(0), 512, 0.5, block_size=64)
      >>> thin.take(jnp.ones([32, 512]), units, axis=1, block_size=64).shape
      (32, 256)
    """
    weights, units, axis, blocks = _check("take", weights, units, axis, block_size, num_shards)
    return take_blocks(weights, units, axis, blocks)


def put(weights: Array, units: Array, kept: Array, axis: int = 0, *, block_size: int = 1, num_shards: int = 1) -> Array:
    """Return weights with the parts that belong to kept units replaced: the inverse of :func:`take`.

    With it an optimizer can update only the kept parts, of weights and moments: take them, update them, put them back.
    Under ``jax.jit`` with ``donate_argnums``, this does not copy the weights, if there is one shard.

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
      Graham, Reizenstein, Robinson (2015), Efficient Batchwise Dropout Training Using Submatrices, arXiv:1502.02478.

    Example:
      >>> import jax.numpy as jnp
      >>> from jdrop import thin
      >>> thin.put(jnp.zeros(4), jnp.array([0, 3]), jnp.ones(2)).tolist()
      [1.0, 0.0, 0.0, 1.0]
    """
    name = "put"
    weights, units, axis, blocks = _check(name, weights, units, axis, block_size, num_shards)
    check_array(name, "kept", kept, (weights.dtype.name,), cast="convert it to the dtype of weights")
    shape = (*weights.shape[:axis], units.shape[0], *weights.shape[axis + 1 :])
    if kept.shape != shape:
        raise ValueError(f"{name}: kept must have shape {shape}, got {describe(kept)}; take it from weights first")
    return put_blocks(weights, units, jnp.asarray(kept), axis, blocks)


def _check(
    function: str, weights: Array, units: Array, axis: int, block_size: int, num_shards: int
) -> tuple[Array, Array, int, Blocks]:
    """Return weights and units as JAX arrays, and their axis and blocks. Units of NumPy are read."""
    check_array(function, "weights", weights, cast="use jax.tree.map for a pytree, and leave out integers")
    axis = as_axis(function, "axis", axis, weights.ndim)
    blocks = as_blocks(function, weights.shape[axis], "units", block_size=block_size, num_shards=num_shards)
    check_integers(function, "units", units)
    number = units.shape[0] if units.ndim == 1 else 0
    fits = 0 < number <= blocks.units and number % (blocks.shards * blocks.size) == 0
    if not fits or (isinstance(units, np.ndarray) and not _are_kept(units, blocks)):
        raise ValueError(
            f"{function}: units must be ascending indices of {blocks}, as many in each of {blocks.shards} shards, "
            f"got {describe(units)}; pass the result of kept_units, and use jax.vmap over groups"
        )
    return jnp.asarray(weights), jnp.asarray(units).astype(jnp.int32), axis, blocks


def _are_kept(units: np.ndarray, blocks: Blocks) -> bool:
    """Tell whether kept_units could have returned these units."""
    of_blocks = units.astype(np.int64).reshape(blocks.shards, -1, blocks.size)
    chosen = of_blocks[..., 0] // blocks.size
    first = np.arange(blocks.shards)[:, None] * blocks.per_shard
    return bool(
        (of_blocks == chosen[..., None] * blocks.size + np.arange(blocks.size)).all()
        and ((chosen >= first) & (chosen < first + blocks.per_shard)).all()
        and (np.diff(chosen, axis=1) > 0).all()
    )
