"""The arithmetic of one tile of attention scores, shared by the kernels and their tests.

A tile has two axes, queries and keys in either order: ``key_axis`` says which one is that of the keys. Rows are values
of one axis. Exponentials have base 2: logits in these units are ``products * factor`` with ``factor > 0``.
"""

import functools
import math
import operator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jdrop._bits import FastBits
from jdrop._random import fast
from jdrop._random.threefry import Pair
from jdrop.attention._spec import AttentionSpec

LOG2E = math.log2(math.e)
LOWEST = float(np.finfo(np.float32).min)
"""The peak before the first tile. Unlike -inf, it has a difference from hidden logits."""


class Limits(NamedTuple):
    """What hides keys: ``None`` and false hide nothing. Queries and keys count from 0 in the arrays of a kernel."""

    causal: bool = False
    left: int | None = None
    """How many keys a query sees to its left."""
    right: int | None = None
    first: Array | int = 0
    """The position of query 0; that of key 0 is 0."""
    queries: Array | int | None = None
    """How many queries see keys."""
    keys: Array | int | None = None
    """How many keys can be seen."""

    @classmethod
    def of(cls, spec: AttentionSpec, size: int, first: Any, queries: Array | None, keys: Array | None) -> "Limits":
        """Return the limits of a call with ``size`` keys. Windows are cut so that no position overflows."""
        if spec.window is None:
            return cls(spec.causal, None, None, first, queries, keys)
        left, right = spec.window
        right = 0 if spec.causal else min(right, size)
        return cls(False, min(left, 2**31 - 1 - size), right, first, queries, keys)

    @property
    def hide(self) -> bool:
        """Whether any key may be hidden."""
        return self.causal or any(x is not None for x in (self.left, self.right, self.queries, self.keys))


class Index(NamedTuple):
    """The index along an axis of a tile: the sum of two tiles, which have no bit in common.

    On a GPU, ``register`` is a constant of each register, and ``lane`` the same in all registers of a row or thread. So
    only operations with ``register`` take time, and neither has to stay in registers.
    """

    lane: Array
    register: Array


def along(rows: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Broadcast the values of an axis to a tile, unless they have both axes."""
    if rows.ndim == len(shape):
        return rows
    return lax.broadcast_in_dim(rows, shape, (axis,))


# ---------------------------------------------------------------------------------- the mask


def keep(bits: FastBits, row_key: Pair, first: Array, keys: Index, threshold: Array, key_axis: int) -> Array:
    """Return which scores of a tile are kept.

    ``row_key`` are the keys of its rows. ``first`` is the index of its first key, uint32 as ``keys``, and a multiple of
    their number. The lanes of ``keys`` lack the bit of value 8.
    """
    high, low = (along(word, keys.lane.shape, 1 - key_axis) for word in row_key)
    return bits.mix(fast.key_from((high, low), first + keys.lane), keys.register) >= threshold


# ---------------------------------------------------------------------------------- hidden keys


def visible(limits: Limits, query: Array, queries: Index, key: Array, keys: Index) -> Array:
    """Return which queries of a tile that starts at a query and a key see which of its keys; all int32."""
    conditions = []
    ahead = keys.register - queries.register
    same = query + limits.first - key + queries.lane - keys.lane  # if the key is ahead by this, it has this position
    if limits.causal:
        conditions.append(ahead <= same)
    if limits.left is not None:
        conditions.append(ahead >= same - limits.left)
    if limits.right is not None:
        conditions.append(ahead <= same + limits.right)
    if limits.queries is not None:
        conditions.append(queries.register < limits.queries - query - queries.lane)
    if limits.keys is not None:
        conditions.append(keys.register < limits.keys - key - keys.lane)
    return functools.reduce(operator.and_, conditions)


def is_cut(limits: Limits, query: Array, num_queries: int, key: Array, num_keys: int) -> Array:
    """Return whether a tile that starts at a query and a key may have hidden keys."""
    last_query, last_key = query + num_queries - 1, key + num_keys - 1
    conditions = []
    if limits.causal:
        conditions.append(last_key > query + limits.first)
    if limits.left is not None:
        conditions.append(key < last_query + limits.first - limits.left)
    if limits.right is not None:
        conditions.append(last_key > query + limits.first + limits.right)
    if limits.queries is not None:
        conditions.append(last_query >= limits.queries)
    if limits.keys is not None:
        conditions.append(last_key >= limits.keys)
    return functools.reduce(operator.or_, conditions)


def key_range(limits: Limits, query: Array, num_queries: int, num_keys: int) -> tuple[Array | int, Array | int]:
    """Return the first key that some of the queries may see, and the end of the keys that they may see."""
    low: Array | int = 0
    high: Array | int = num_keys if limits.keys is None else limits.keys
    last = query + limits.first + num_queries - 1
    if limits.left is not None:
        low = jnp.maximum(query + limits.first - limits.left, 0)
    if limits.causal:
        high = jnp.minimum(high, last + 1)
    if limits.right is not None:
        high = jnp.minimum(high, last + limits.right + 1)
    if limits.queries is not None:
        high = jnp.where(query < limits.queries, high, 0)
    return low, high


def query_range(limits: Limits, key: Array, num_keys: int, num_queries: int) -> tuple[Array | int, Array | int]:
    """Return the first query that may see some of the keys, and the end of the queries that may see them."""
    low: Array | int = 0
    high: Array | int = num_queries if limits.queries is None else limits.queries
    if limits.causal:
        low = jnp.maximum(key - limits.first, 0)
    if limits.right is not None:
        low = jnp.maximum(key - limits.right - limits.first, 0)
    if limits.left is not None:
        high = jnp.minimum(high, key + num_keys + limits.left - limits.first)
    if limits.keys is not None:
        high = jnp.where(key < limits.keys, high, 0)
    return low, high


# ---------------------------------------------------------------------------------- softmax


def softmax_step(
    products: Array, factor: Array, peak: Array, total: Array, key_axis: int
) -> tuple[Array, Array, Array, Array]:
    """Add a tile to the sums of its queries.

    Returns:
      The exponentials of the tile, the factor of earlier sums, the new peak of the logits, and the new sum of
      exponentials of differences from it.
    """
    higher = jnp.maximum(peak, jnp.max(products, axis=key_axis) * factor)
    shrink = jnp.exp2(peak - higher)
    e = jnp.exp2(products * factor - along(higher, products.shape, 1 - key_axis))
    return e, shrink, higher, total * shrink + jnp.sum(e, axis=key_axis)


def gradients(
    products: Array, dp: Array, factor: Array, log_sum: Array, delta: Array, keep: Array | None, key_axis: int
) -> tuple[Array, Array]:
    """Return the kept probabilities of a tile, and the gradient of its logits, both times the keep probability.

    Args:
      products: of queries and keys, -inf where a key is hidden.
      dp: products of the gradients of the output and of values.
      factor: of the products.
      log_sum: logarithm to base 2 of the sum of exponentials of the logits, +inf for queries that see no key.
      delta: for each query, the sum over keys of the probabilities times their gradients, times the keep probability.
      keep: which scores are kept; ``None`` if all are.
      key_axis: the axis of the keys.
    """
    p = jnp.exp2(products * factor - along(log_sum, products.shape, 1 - key_axis))
    delta = along(delta, products.shape, 1 - key_axis)
    if keep is None:
        return p, p * (dp - delta)
    kept = jnp.where(keep, p, 0.0)
    return kept, kept * dp - p * delta
