"""Random subsets of static size: an exact fraction without replacement, and as many in each shard."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding

from jdrop._checks import as_number
from jdrop._errors import describe
from jdrop._lowering import at_lowering
from jdrop._mask import Mask
from jdrop._platform import Target


def subset_size(function: str, rate: Any, number: int, items: str, shards: int = 1) -> int:
    """Require a rate that drops a whole number of items, and return how many of them are kept, in each shard.

    Args:
      function: the caller, for errors.
      rate: the fraction to drop, a Python or NumPy number. 1e-6 off a whole number is close enough.
      number: number of all items.
      items: what they are, for errors.
      shards: number of parts of equal size, of which each keeps as many.
    """
    share = as_number(function, "rate", rate, 0.0, 1.0)
    check_divides(function, "num_shards", shards, number, items)
    size = number // shards
    kept = round(size * (1 - share))
    if abs(size * (1 - share) - kept) > 1e-6 or not kept:
        where = f" in each of the {shards} shards" if shards > 1 else ""
        below = min(math.floor(size * share), size - 1)
        nearest = [str(Fraction(dropped, size)) for dropped in range(below, min(below + 2, size))]
        raise ValueError(
            f"{function}: rate must drop a whole number of the {size} {items}{where} and keep at least one, "
            f"got {describe(rate)}; pass {' or '.join(nearest)}"
        )
    return kept


def check_divides(function: str, argument: str, value: int, number: int, items: str) -> None:
    """Require a divisor of the number of items; the error names the nearest ones."""
    if number % value:
        divisors = [n for n in range(1, number + 1) if number % n == 0]
        below, above = max(n for n in divisors if n < value) if value > 1 else 1, [n for n in divisors if n > value]
        nearest = " or ".join(map(str, [below, *above[:1]]))
        raise ValueError(
            f"{function}: {argument} must divide the number of {items}, {number}, got {value}; pass {nearest}"
        )


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
    return jnp.sort(jnp.argsort(words, axis=-1)[..., -kept:], axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class _Words:
    """The function that computes the random word of each item."""

    size: tuple[int, ...]
    sharding: NamedSharding | None

    def __call__(self, target: Target, mask: Mask) -> Array:
        return mask.word_at(mask.index(self.size, self.sharding), platform=target.platform)
