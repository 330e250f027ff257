"""Random subsets of static size: an exact fraction without replacement, and as many in each shard."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding

from jdrop._checks import as_count, as_number
from jdrop._errors import describe
from jdrop._lowering import at_lowering
from jdrop._mask import Mask
from jdrop._platform import Target
from jdrop._prepare import Arguments
from jdrop._sharding import vary_like


class Blocks(NamedTuple):
    """Units in equal shards, each of equal blocks of adjacent units."""

    shards: int
    per_shard: int
    """Number of blocks in each shard."""
    size: int
    """Number of units in each block."""
    noun: str
    """What the units are, for errors."""

    @property
    def units(self) -> int:
        """The number of units."""
        return self.shards * self.per_shard * self.size

    def __str__(self) -> str:
        return f"blocks of {self.size} {self.noun}" if self.size > 1 else self.noun


def as_blocks(function: str, number: int, noun: str, *, block_size: int = 1, num_shards: int = 1) -> Blocks:
    """Require sizes that divide a number of units."""
    size = as_count(function, "block_size", block_size)
    shards = as_count(function, "num_shards", num_shards)
    check_divides(function, "block_size", size, number, noun)
    blocks = Blocks(shards, number // size // shards, size, noun)
    check_divides(function, "num_shards", shards, number // size, str(blocks))
    return blocks


def num_kept(function: str, rate: Any, blocks: Blocks) -> int:
    """Require a rate that drops a whole number of blocks in each shard; return how many it keeps there.

    The rate may differ from the exact fraction by 1e-6, or by a hundredth of a block if that is less.
    """
    share, number = as_number(function, "rate", rate, 0.0, 1.0), blocks.per_shard
    kept = round(number * (1 - share))
    if abs(number * (1 - share) - kept) > min(1e-6 * number, 0.01) or not kept:
        where = f" in each of {blocks.shards} shards" if blocks.shards > 1 else ""
        below = min(math.floor(number * share), number - 1)
        nearest = [str(Fraction(dropped, number)) for dropped in range(below, min(below + 2, number))]
        raise ValueError(
            f"{function}: rate must drop a whole number of the {number} {blocks}{where}, and keep at least one, "
            f"got {describe(rate)}; pass {' or '.join(nearest)}"
        )
    return kept


def check_divides(function: str, argument: str, value: int, number: int, items: str) -> None:
    """Require a divisor of the number of items; the error names the nearest ones."""
    if not isinstance(number, int):
        raise NotImplementedError(
            f"{function}: the number of {items} must be static, got {number}; export with a fixed size"
        )
    if not number:
        raise ValueError(f"{function}: the number of {items} must be at least 1, got 0; add some")
    if number % value:
        divisors = [n for n in range(1, number + 1) if number % n == 0]
        below, above = max(n for n in divisors if n < value) if value > 1 else 1, [n for n in divisors if n > value]
        nearest = " or ".join(map(str, [below, *above[:1]]))
        raise ValueError(
            f"{function}: {argument} must divide the number of {items}, {number}, got {value}; pass {nearest}"
        )


def rounded_kept(rate: float, number: int) -> int:
    """Return how many items a rate keeps: rounded, halves up, exact for the decimal rate, and at least one."""
    return max(1, math.floor(number * (1 - Fraction(str(rate))) + Fraction(1, 2)))


def draw_units(arguments: Arguments, blocks: Blocks, kept: int) -> Array:
    """Consume the key, and return the kept units, int32 ``[*groups, units]``, ascending.

    The shape of the data in the arguments is ``[*groups, shards, blocks]``; ``kept`` blocks remain in each shard.
    """
    local = draw_subset(arguments.draw(), arguments.shape, kept)
    size = (*local.shape, blocks.size)
    shard, within = (lax.broadcasted_iota(jnp.int32, size, len(size) + axis) for axis in (-3, -1))
    units = (local[..., None] + shard * np.int32(blocks.per_shard)) * np.int32(blocks.size) + within
    return units.reshape(*arguments.shape[:-2], -1)


@functools.partial(jax.jit, static_argnames=("size", "kept", "sharding"))
def draw_subset(mask: Mask, size: Sequence[Any], kept: int, sharding: NamedSharding | None = None) -> Array:
    """Return the indices along the last axis of the items with the largest random words, ascending.

    Args:
      mask: the source of the words, of ``generator="fast"``; its rate is not used.
      size: shape of this device's part of the decisions, ``[*batch, items]``.
      kept: number of items to keep.
      sharding: sharding of the decisions over an explicit mesh.

    Returns:
      An int32 array ``[*batch, kept]``.
    """
    words = at_lowering(_Words(tuple(size), sharding), mask)
    indices = jnp.sort(jnp.argsort(words, axis=-1)[..., -kept:], axis=-1).astype(jnp.int32)
    return vary_like(indices, jax.typeof(words))  # the result of argsort does not say over which mesh axes it varies


@dataclasses.dataclass(frozen=True)
class _Words:
    """The function that computes the random word of each item."""

    size: tuple[int, ...]
    sharding: NamedSharding | None

    def __call__(self, target: Target, mask: Mask) -> Array:
        return mask.word_at(mask.index(self.size, self.sharding), platform=target.platform)
