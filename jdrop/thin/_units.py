"""Which units a group of examples keeps: a random subset of blocks, of static size."""

from typing import Any, NamedTuple

import numpy as np
from jax import Array

from jdrop._checks import as_count, check_key
from jdrop._prepare import Arguments, check_arguments
from jdrop._subsets import Blocks, as_blocks, draw_units, num_kept
from jdrop._types import Shard


class Kept(NamedTuple):
    """The kept units of one group of examples."""

    units: Array
    """int32 ``[kept]``."""
    blocks: Blocks

    @property
    def keep_probability(self) -> float:
        """The fraction of kept units."""
        return self.units.shape[0] / self.blocks.units

    def of_parts(self, number: int) -> "Kept":
        """Return the kept parts, if each unit consists of a number of adjacent parts."""
        blocks = self.blocks._replace(size=self.blocks.size * number)
        parts = self.units[:, None] * np.int32(number) + np.arange(number, dtype=np.int32)[None]
        return Kept(parts.reshape(-1), blocks)


def kept_units(
    key: Array,
    num_units: int,
    rate: float,
    *,
    block_size: int = 1,
    groups: int | None = None,
    num_shards: int = 1,
    shard: Shard = None,
) -> Array:
    """Return the indices of the units that a minibatch keeps: a random subset of exact size.

    The units form blocks of ``block_size`` adjacent ones. Of n blocks, a uniformly random subset of
    ``k = (1 - rate) * n`` is kept, without replacement. So every unit is kept with probability ``1 - rate``, and two
    units of different blocks are both kept with probability ``k * (k - 1) / (n * (n - 1))``.

    Args:
      key: one PRNG key, used once.
      num_units: number of units, such as the width of a hidden layer or the number of attention heads.
      rate: fraction of the units to drop. It determines a shape, so it must be a Python or NumPy number, and drop a
        whole number of blocks.
      block_size: number of adjacent units that are kept or dropped together.
      groups: number of subsets to draw, one for each group of examples. ``None`` draws one, without an axis for it.
      num_shards: number of equal parts of the units that keep the same number of blocks each. Use the number of devices
        that share the units, or a multiple of it, so that all of them have the same work.
      shard: inside ``jax.shard_map``, the PartitionSpec of an array ``[groups, units]``. ``num_units``, ``groups`` and
        ``num_shards`` are then those of this device, and so are the indices. ``None`` draws from the key as it is: with
        the same key, all devices then keep the same of their units.

    Returns:
      Indices in ascending order: int32 ``[kept]``, or ``[groups, kept]``.

    Raises:
      ValueError: a number is out of range or does not divide the units, ``rate`` does not drop a whole number of
        blocks, or ``key`` is a batch of keys.
      TypeError: an argument has the wrong type.

    References:
      Graham, Reizenstein, Robinson (2015), Efficient Batchwise Dropout Training Using Submatrices, arXiv:1502.02478.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jdrop import thin
      >>> units = thin.kept_units(jax.random.key(0), 512, 0.5, block_size=64)
      >>> w = jnp.ones([32, 512])
      >>> w[:, units].shape
      (32, 256)
    """
    name = "kept_units"
    check_key(name, key)
    number = as_count(name, "num_units", num_units)
    blocks = as_blocks(name, number, "units", block_size=block_size, num_shards=num_shards)
    num_groups = 1 if groups is None else as_count(name, "groups", groups)
    arguments = check_subset(name, key, (), rate, blocks, num_groups, train=True, shard=shard)
    units = draw_kept(arguments, blocks)
    return units[0] if groups is None else units


def check_subset(
    function: str, key: Array | None, data: Any, rate: float, blocks: Blocks, groups: int, *, train: bool, shard: Shard
) -> Arguments:
    """Check the arguments of random subsets of blocks, one per group of examples; ``data`` is what they are for."""
    num_kept(function, rate, blocks)
    shape = (groups, blocks.shards, blocks.per_shard)
    arguments = check_arguments(function, key, data, rate, shape=shape, train=train, shard=shard, static_rate=True)
    if len(arguments.tile_axes) > 2:
        raise ValueError(f"{function}: shard must have the axes (groups, units), got {shard}; leave out the others")
    return arguments


def draw_kept(arguments: Arguments, blocks: Blocks) -> Array:
    """Consume the key of checked arguments, and return the kept units, int32 ``[groups, kept]``."""
    return draw_units(arguments, blocks, num_kept(arguments.function, float(arguments.rate), blocks))


def as_kept(units: Array | None, blocks: Blocks) -> Kept | None:
    """Return the kept units of a group, or ``None`` for all."""
    return None if units is None else Kept(units, blocks)


def splits_units(arguments: Arguments) -> bool:
    """Tell whether the units are split over devices inside ``jax.shard_map``."""
    return any(arguments.tile_axes[1:])
