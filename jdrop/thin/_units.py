"""Which units a group of examples keeps: a random subset of blocks, of static size."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from jdrop._checks import as_count
from jdrop._prepare import Arguments, check_arguments
from jdrop._subsets import check_divides, draw_subset, subset_size
from jdrop._types import Shard


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Units in equal shards, each of equal blocks of adjacent units."""

    shards: int
    per_shard: int
    size: int

    @property
    def units(self) -> int:
        """The number of units."""
        return self.shards * self.per_shard * self.size

    @property
    def items(self) -> str:
        """What is kept or dropped, for errors."""
        return f"blocks of {self.size} units" if self.size > 1 else "units"


class Kept(NamedTuple):
    """The kept units of one group of examples."""

    units: Array
    """int32 ``[kept]``."""
    blocks: Blocks

    @property
    def keep_probability(self) -> float:
        """The fraction of kept units."""
        return self.units.shape[0] / self.blocks.units


def as_blocks(function: str, num_units: int, block_size: int, num_shards: int) -> Blocks:
    """Require numbers that divide the units."""
    size = as_count(function, "block_size", block_size)
    shards = as_count(function, "num_shards", num_shards)
    check_divides(function, "block_size", size, num_units, "units")
    blocks = Blocks(shards, num_units // size // shards, size)
    check_divides(function, "num_shards", shards, num_units // size, blocks.items)
    return blocks


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
        ``num_shards`` are then those of this device, and so are the indices.

    Returns:
      Indices in ascending order: int32 ``[kept]``, or ``[groups, kept]``.

    Raises:
      ValueError: a number is out of range or does not divide the units, ``rate`` does not drop a whole number of
        blocks, or ``key`` is a batch of keys.
      TypeError: an argument has the wrong type.

    References:
      Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov (2014), Dropout: A Simple Way to Prevent Neural Networks
      from Overfitting, JMLR, section 2 (thinned networks).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jdrop import thin
      >>> units = thin.kept_units(jax.random.key(0), 512, 0.5, block_size=64)
      >>> w = jnp.ones([32, 512])
      >>> w[:, units].shape
      (32, 256)
    """
    name = "kept_units"
    blocks = as_blocks(name, as_count(name, "num_units", num_units), block_size, num_shards)
    number = 1 if groups is None else as_count(name, "groups", groups)
    arguments = check_subset(name, key, (), rate, blocks, number, train=True, shard=shard)
    units = draw_units(arguments, blocks)
    return units[0] if groups is None else units


def check_subset(
    function: str, key: Array | None, data: Any, rate: float, blocks: Blocks, groups: int, *, train: bool, shard: Shard
) -> Arguments:
    """Check the arguments of random subsets of blocks, one per group of the examples of ``data``."""
    subset_size(function, rate, blocks.shards * blocks.per_shard, blocks.items, blocks.shards)
    shape = (groups, blocks.shards, blocks.per_shard)
    arguments = check_arguments(function, key, data, rate, shape=shape, train=train, shard=shard)
    if len(arguments.tile_axes) > 2:
        raise ValueError(f"{function}: shard must have the axes (groups, units), got {shard}; leave out the others")
    return arguments


def draw_units(arguments: Arguments, blocks: Blocks) -> Array:
    """Consume the key, and return the kept units of each group, int32 ``[groups, kept]``."""
    kept = subset_size(arguments.function, float(arguments.rate), blocks.per_shard, blocks.items)
    local = draw_subset(arguments.draw(), arguments.shape, kept)
    first = np.arange(blocks.shards, dtype=np.int32)[:, None] * np.int32(blocks.per_shard)
    units = (local + first)[..., None] * np.int32(blocks.size) + np.arange(blocks.size, dtype=np.int32)
    return units.reshape(arguments.shape[0], -1)


def as_kept(units: Array | None, blocks: Blocks) -> Kept | None:
    """Return the kept units of a group, or ``None`` for all."""
    return None if units is None else Kept(units, blocks)


def splits_units(arguments: Arguments) -> bool:
    """Tell whether the units are split over devices inside ``jax.shard_map``."""
    return any(arguments.tile_axes[1:])
