"""The plan of the loops of blockwise attention, and the slices of arrays for each block.

The axes of a block of scores are [batch, head, group, query, key]; grouped queries share a key head. Batch and key
heads are split into (major, minor) parts. The loops run over the minor parts, and a block spans all major parts. There
are at least as many major parts as devices, if the axis allows: on a mesh, each device then works on its part of every
block, and no loop runs over a sharded axis.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jdrop._platform import BlockSizes, Platform
from jdrop._random.threefry import U64
from jdrop.attention._spec import AttentionSpec

T = TypeVar("T")  # a pytree of arrays


class Segment(NamedTuple):
    """A range of queries, cut into blocks of one size, and the range of keys that they may see."""

    first: int
    blocks: int
    rows: int
    low: int
    high: int


class Plan(NamedTuple):
    """The static plan of the loops."""

    platform: Platform
    batch: tuple[int, int]
    heads: tuple[int, int]
    """Major and minor part of the axis of key heads."""
    groups: int
    segments: tuple[Segment, ...]
    max_in_flight: int
    """Maximum number of segments in flight."""
    unit_axes: tuple[int, ...]
    """Axes of size 1 that are squeezed from blocks."""


def make_plan(
    spec: AttentionSpec, query: Array, key: Array, platform: Platform, sizes: BlockSizes, devices: int
) -> Plan:
    """Choose the loops for a query [B, T, N, H] and a key [B, S, K, H], on a number of devices."""
    groups = query.shape[2] // key.shape[2]
    min_heads = math.gcd(key.shape[2], devices) * math.gcd(query.shape[0], devices)  # in every block, over all examples
    rows = max(sizes.queries // groups, sizes.scores // (min_heads * key.shape[1] * groups), 16)
    segments = _segments(spec, query.shape[1], key.shape[1], rows, sizes)
    largest = groups * max(s.rows * (s.high - s.low) for s in segments)
    room = sizes.target_scores // largest // min(len(segments), 2)
    heads, joined_heads = _parts(key.shape[2], devices, room)
    batch, joined_batch = _parts(query.shape[0], devices, room // joined_heads)
    max_in_flight = max(2 * sizes.target_scores // (joined_heads * joined_batch * largest), 1)
    unit_axes = [axis for axis, n in enumerate((batch[0], heads[0], groups)) if n == 1 and platform.squeezes_blocks]
    return Plan(platform, batch, heads, groups, segments, max_in_flight, tuple(unit_axes))


def _parts(size: int, devices: int, room: int) -> tuple[tuple[int, int], int]:
    """Split an axis so that a device works on up to ``room`` elements at a time; return the parts and that number."""
    shared = math.gcd(size, devices)
    each = max(n for n in range(1, size // shared + 1) if size // shared % n == 0 and n <= max(room, 1))
    return (shared * each, size // shared // each), each


def _segments(
    spec: AttentionSpec, num_queries: int, num_keys: int, rows: int, sizes: BlockSizes
) -> tuple[Segment, ...]:
    """Cut queries into segments if positions hide keys: 4, or 8 with a window, of 256 to 512 queries; 16 if longer."""
    left, right = spec.window or (num_queries, num_keys)
    right = 0 if spec.causal else right
    bounded = (spec.causal or spec.window is not None) and not spec.queries_are_tiled
    parts = sizes.segments if spec.window is None else 2 * sizes.segments
    span = max(min(-(-num_queries // parts), 2 * sizes.segment), sizes.segment, -(-num_queries // (4 * sizes.segments)))
    if not bounded:
        left, right, span = num_queries, num_keys, num_queries
    segments = []
    for first in range(0, num_queries, span):
        last = min(first + span, num_queries)
        low = min(max(0, first - left), num_keys - 1)  # at least one key, even if no query sees it
        high = max(min(num_keys, last + right), low + 1)
        size = math.ceil((last - first) / math.ceil((last - first) / rows))
        blocks, rest = divmod(last - first, size)
        segments.append(Segment(first, blocks, size, low, high))
        if rest:
            segments.append(Segment(last - rest, 1, rest, low, high))
    return tuple(segments)


# ---------------------------------------------------------------------------------- whole arrays


def split(x: Array, plan: Plan) -> Array:
    """Turn [B, T, heads, H] into [minor, batch, head, group, T, H]: one slice per step of the loop."""
    _, length, heads, width = x.shape
    x = x.reshape(*plan.batch, length, *plan.heads, heads // math.prod(plan.heads), width)
    x = x.transpose(1, 4, 0, 3, 5, 2, 6)
    return x.reshape(-1, *x.shape[2:])


def join(x: Array, plan: Plan) -> Array:
    """Invert :func:`split`."""
    *_, groups, length, width = x.shape
    x = x.reshape(plan.batch[1], plan.heads[1], plan.batch[0], plan.heads[0], groups, length, width)
    x = x.transpose(2, 0, 5, 3, 1, 4, 6)
    return x.reshape(math.prod(plan.batch), length, math.prod(plan.heads) * groups, width)


def loop_indices(plan: Plan) -> tuple[Array, Array]:
    """Return the minor index of batch and of heads in each step of the loop."""
    step, heads = np.arange(plan.batch[1] * plan.heads[1], dtype=np.int32), np.int32(plan.heads[1])
    return jnp.asarray(step // heads), jnp.asarray(step % heads)


def split_scores(operands: T, plan: Plan) -> T:
    """Turn arrays that broadcast to scores [B, N, T, S] into [batch, minor, head, minor, group, T, S].

    Other leaves are unchanged.
    """

    def one(x: Array) -> Array:
        batch = plan.batch if x.shape[0] > 1 else (1, 1)
        heads = (*plan.heads, plan.groups) if x.shape[1] > 1 else (1, 1, 1)
        return x.reshape(*batch, *heads, *x.shape[2:])

    return jax.tree.map(lambda x: one(x) if x.ndim == 4 else x, operands)


# ---------------------------------------------------------------------------------- one block


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of scores: queries of a segment and all keys that the segment may see."""

    plan: Plan
    segment: Segment
    batch: Array
    """Minor index of the batch, int32."""
    head: Array
    """Minor index of the key heads."""
    query: Array
    """Index of the first query."""
    dependency: Array | None = None
    """A result that the block must wait for."""

    def queries(self, x: Array) -> Array:
        """Slice the queries of [batch, head, group, T, H]."""
        x = lax.dynamic_slice_in_dim(x, self.query, self.segment.rows, axis=3)
        return jnp.squeeze(self.plan.platform.order_after(x, self.dependency), self.plan.unit_axes)

    def keys(self, x: Array) -> Array:
        """Slice the keys of [batch, head, 1, S, H], and drop the axis of groups."""
        return jnp.squeeze(x[:, :, :, self.segment.low : self.segment.high], sorted({*self.plan.unit_axes, 2}))

    def window(self, shape: tuple[int, ...]) -> tuple[list[Any], list[int]]:
        """Return starts and sizes of the block's part of an array from :func:`split_scores`."""
        zero = np.int32(0)  # dynamic_slice needs starts of one type, even with 64 bits enabled
        low, high = self.segment.low, self.segment.high
        starts: list[Any] = [zero, self.batch, zero, self.head, zero, self.query, np.int32(low)]
        sizes = [shape[0], 1, shape[2], 1, shape[4], self.segment.rows, high - low]
        for axis, n in enumerate(shape):
            if n == 1:  # it broadcasts
                starts[axis], sizes[axis] = zero, 1
        return starts, sizes

    def slice_scores(self, operands: T) -> T:
        """Slice the arrays from :func:`split_scores`."""

        def one(x: Array) -> Array:
            return jnp.squeeze(jnp.squeeze(lax.dynamic_slice(x, *self.window(x.shape)), (1, 3)), self.plan.unit_axes)

        return jax.tree.map(lambda x: one(x) if x.ndim == 7 else x, operands)

    def iota(self, axis: int, size: int, dtype: Any) -> Array:
        """Return 0, 1, ... along one axis of the block, with size 1 along the others."""
        shape = [1] * 5
        shape[axis] = size
        return jnp.squeeze(lax.broadcasted_iota(dtype, shape, axis), self.plan.unit_axes)

    def positions(self) -> tuple[Array, Array]:
        """Return the positions of queries and keys in the arrays of this device, int32."""
        queries = self.query.astype(jnp.int32) + self.iota(3, self.segment.rows, jnp.int32)
        return queries, self.segment.low + self.iota(4, self.segment.high - self.segment.low, jnp.int32)

    def index(self, start: Array | None) -> list[U64]:
        """Return the index of the scores along the axes [B, N, T, S] of the whole array."""
        plan, along = self.plan, functools.partial(self.iota, dtype=jnp.uint32)
        batch, head, query = (i.astype(jnp.uint32) for i in (self.batch, self.head, self.query))
        key_head = along(1, plan.heads[0]) * np.uint32(plan.heads[1]) + head
        axes = [
            along(0, plan.batch[0]) * np.uint32(plan.batch[1]) + batch,
            key_head * np.uint32(plan.groups) + along(2, plan.groups),
            along(3, self.segment.rows) + query,
            along(4, self.segment.high - self.segment.low) + np.uint32(self.segment.low),
        ]
        index = [U64(np.uint32(0), i) for i in axes]
        return index if start is None else [i + U64(at[0], at[1]) for i, at in zip(index, start)]

    def einsum(self, subscripts: str, x: Array, y: Array, dtype: Any) -> Array:
        """Contract two parts of the block. Its axes are b, k, g, then q or s."""
        squeezed = {ord("bkg"[axis]): None for axis in self.plan.unit_axes}
        return jnp.einsum(subscripts.translate(squeezed), x, y, preferred_element_type=dtype)
