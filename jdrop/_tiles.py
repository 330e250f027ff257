"""How chunked attention is cut: the loops' plan, and a block's part of each array.

The axes of a block of scores are [batch, head, group, query, key], without the first three where they have one element;
grouped queries share a key head. Batch and key heads are split into (major, minor) parts. The loops run over the minor
ones; a block holds all of the major ones, at least as many as there are devices where the axis has them, so that on a
mesh each device works at its part of every block, and no loop runs over an axis that is spread.
"""

import functools
import math
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jdrop._scores import Problem
from jdrop.bits import Pair, add64

T = TypeVar("T")  # operands: a pytree

# Queries of a key head in a block, over all groups, and more where the block then has no more scores than BLOCK.
ROWS, BLOCK = 512, 2**22
# Where the position says what is seen, queries are cut into segments with a range of keys of their own: four of them,
# or eight with a window, but of 256 to 512 queries each, and from 8192 queries on sixteen.
SEGMENT = 256
SEGMENTS = 4
# Scores up to which a block takes in further heads, half of them where there are segments, and half of those that
# segments may have abreast: what was best on a CPU, and on other platforms, where nothing was measured, to keep an
# accelerator busy.
CPU_SCORES, OTHER_SCORES = 2**21, 2**25


class Segment(NamedTuple):
    """Queries that are worked off in blocks of one size, and the keys that they may see."""

    first: int
    blocks: int
    rows: int
    low: int
    high: int


class Plan(NamedTuple):
    """What is static about the loops."""

    problem: Problem
    batch: tuple[int, int]
    heads: tuple[int, int]
    """Parts of the axis of key heads."""
    groups: int
    segments: tuple[Segment, ...]
    abreast: int
    """How many segments are under way at a time; others wait. XLA orders only what depends on another, and would hold
    blocks of all."""

    @property
    def ones(self) -> tuple[int, ...]:
        """The axes that a block leaves out: with them XLA for CPU would let no result take the place of an operand."""
        return tuple(axis for axis, n in enumerate((self.batch[0], self.heads[0], self.groups)) if n == 1)


class At(NamedTuple):
    """Where a block is: its minor parts of batch and heads, and its first query."""

    batch: Array
    head: Array
    query: Array
    after: Array | None = None
    """-0.0, made from what the block has to wait for."""


def plan(problem: Problem, query: Array, key: Array) -> Plan:
    """Choose the loops for a query [B, T, N, H] and a key [B, S, K, H]."""
    groups = query.shape[2] // key.shape[2]
    scores = CPU_SCORES if jax.default_backend() == "cpu" else OTHER_SCORES
    mesh = jax.sharding.get_abstract_mesh()
    apart = [n for name, n in mesh.shape.items() if name not in mesh.manual_axes]
    devices = math.prod(apart) if mesh.manual_axes else jax.device_count()
    spread = math.gcd(key.shape[2], devices) * math.gcd(query.shape[0], devices)  # heads that every block holds
    rows = max(ROWS // groups, BLOCK // (spread * key.shape[1] * groups), 16)
    segments = _segments(problem, query.shape[1], key.shape[1], rows)
    sizes = [groups * s.rows * (s.high - s.low) for s in segments]
    room = scores // max(sizes) // min(len(segments), 2)
    heads, joined_heads = _parts(key.shape[2], devices, room)
    batch, joined_batch = _parts(query.shape[0], devices, room // joined_heads)
    abreast = max(2 * scores // (joined_heads * joined_batch * max(sizes)), 1)
    return Plan(problem, batch, heads, groups, segments, abreast)


def _parts(size: int, devices: int, room: int) -> tuple[tuple[int, int], int]:
    """Split an axis, so that a device works at up to ``room`` of its elements at a time, and return at how many."""
    spread = math.gcd(size, devices)
    each = max(n for n in range(1, size // spread + 1) if size // spread % n == 0 and n <= max(room, 1))
    return (spread * each, size // spread // each), each


def _segments(problem: Problem, num_queries: int, num_keys: int, rows: int) -> tuple[Segment, ...]:
    left, right = problem.window or (num_queries, num_keys)
    right = 0 if problem.causal else right
    bounded = (problem.causal or problem.window is not None) and not problem.spread
    parts = SEGMENTS if problem.window is None else 2 * SEGMENTS
    span = max(min(-(-num_queries // parts), 2 * SEGMENT), SEGMENT, -(-num_queries // (4 * SEGMENTS)))
    if not bounded:
        left, right, span = num_queries, num_keys, num_queries
    found = []
    for first in range(0, num_queries, span):
        last = min(first + span, num_queries)
        low = min(max(0, first - left), num_keys - 1)  # one key at least, which then no query sees
        high = max(min(num_keys, last + right), low + 1)
        size = math.ceil((last - first) / math.ceil((last - first) / rows))
        blocks, rest = divmod(last - first, size)
        found.append(Segment(first, blocks, size, low, high))
        if rest:
            found.append(Segment(last - rest, 1, rest, low, high))
    return tuple(found)


# ---------------------------------------------------------------------------------- the parts of arrays


def split(x: Array, plan: Plan) -> Array:
    """[B, T, heads, H] to [minor, batch, head, group, T, H]: a slice for each turn of the loop."""
    _, num, heads, width = x.shape
    x = x.reshape(*plan.batch, num, *plan.heads, heads // math.prod(plan.heads), width)
    x = x.transpose(1, 4, 0, 3, 5, 2, 6)
    return x.reshape(-1, *x.shape[2:])


def join(x: Array, plan: Plan) -> Array:
    """The inverse of :func:`split`."""
    *_, groups, num, width = x.shape
    x = x.reshape(plan.batch[1], plan.heads[1], plan.batch[0], plan.heads[0], groups, num, width)
    x = x.transpose(2, 0, 5, 3, 1, 4, 6)
    return x.reshape(math.prod(plan.batch), num, math.prod(plan.heads) * groups, width)


def minor(plan: Plan) -> tuple[Array, Array]:
    """The minor parts of batch and heads in each turn of the loop."""
    turn, heads = np.arange(plan.batch[1] * plan.heads[1], dtype=np.int32), np.int32(plan.heads[1])
    return jnp.asarray(turn // heads), jnp.asarray(turn % heads)


def fine(operands: T, plan: Plan) -> T:
    """What is over scores, [B, N, T, S] or 1, to [batch, minor, head, minor, group, T, S] or 1; all else as it is."""

    def one(x: Array) -> Array:
        batch = plan.batch if x.shape[0] > 1 else (1, 1)
        heads = (*plan.heads, plan.groups) if x.shape[1] > 1 else (1, 1, 1)
        return x.reshape(*batch, *heads, *x.shape[2:])

    return jax.tree.map(lambda x: one(x) if x.ndim == 4 else x, operands)


def window(shape: tuple[int, ...], at: At, segment: Segment) -> tuple[list[Any], list[int]]:
    """Starts and sizes of a block's part of an array of :func:`fine`."""
    zero = np.int32(0)  # of one type, as dynamic_slice wants its starts, with 64 bits enabled too
    starts = [zero, at.batch, zero, at.head, zero, at.query, np.int32(segment.low)]
    sizes = [shape[0], 1, shape[2], 1, shape[4], segment.rows, segment.high - segment.low]
    there = [n > 1 for n in shape]
    return [s if t else zero for s, t in zip(starts, there)], [s if t else 1 for s, t in zip(sizes, there)]


def cut(operands: T, plan: Plan, at: At, segment: Segment) -> T:
    """A block's part of what :func:`fine` returned."""

    def one(x: Array) -> Array:
        return jnp.squeeze(jnp.squeeze(lax.dynamic_slice(x, *window(x.shape, at, segment)), (1, 3)), plan.ones)

    return jax.tree.map(lambda x: one(x) if x.ndim == 7 else x, operands)


def queries(x: Array, plan: Plan, at: At, segment: Segment) -> Array:
    """A block's queries of [batch, head, group, T, H]."""
    x = lax.dynamic_slice_in_dim(x, at.query, segment.rows, axis=3)
    x = x if at.after is None else x + at.after.astype(x.dtype)  # the same numbers, but later
    return jnp.squeeze(x, plan.ones)


def keys(x: Array, plan: Plan, segment: Segment) -> Array:
    """A block's keys of [batch, head, 1, S, H], without groups."""
    return jnp.squeeze(x[:, :, :, segment.low : segment.high], sorted({*plan.ones, 2}))


def iota(plan: Plan, axis: int, size: int, dtype: Any) -> Array:
    """0, 1, .. along one axis of a block, and 1 element along the others."""
    return jnp.squeeze(lax.broadcasted_iota(dtype, [size if axis == k else 1 for k in range(5)], axis), plan.ones)


def index(plan: Plan, at: At, segment: Segment, offset: Array | None) -> list[Pair]:
    """The index of a block's scores along the axes [B, N, T, S] of the whole array."""
    along = functools.partial(iota, plan, dtype=jnp.uint32)
    batch, head, query = (i.astype(jnp.uint32) for i in (at.batch, at.head, at.query))
    key_head = along(1, plan.heads[0]) * np.uint32(plan.heads[1]) + head
    axes = [
        along(0, plan.batch[0]) * np.uint32(plan.batch[1]) + batch,
        key_head * np.uint32(plan.groups) + along(2, plan.groups),
        along(3, segment.rows) + query,
        along(4, segment.high - segment.low) + np.uint32(segment.low),
    ]
    index: list[Pair] = [(np.uint32(0), i) for i in axes]
    return index if offset is None else [add64(i, (start[0], start[1])) for i, start in zip(index, offset)]
