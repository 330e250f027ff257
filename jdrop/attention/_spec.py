"""Shared parts of the attention implementations: static specification, inputs, and visible logits.

Scores have the axes [batch, head, query, key], or finer ones that split batch and head, with 1 where they broadcast.
"""

import functools
import operator
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from jdrop._mask import Mask
from jdrop._sharding import broadcast_spec, explicit_sharding

T = TypeVar("T")


class AttentionSpec(NamedTuple):
    """The static options of a call."""

    causal: bool
    window: tuple[int, int] | None
    """How many keys a query sees to its left and to its right."""
    queries_are_tiled: bool
    """Whether the queries are a tile of the whole array, from whose start their positions count."""
    scales_queries: bool = True
    """Whether queries times the scale round no more than their products times the scale."""


class AttentionInputs(NamedTuple):
    """The inputs without gradients. Arrays that broadcast to scores have four axes."""

    scale: Array | None = None
    """Factor of the query-key products; ``None`` means 1. As an operand, it can change without recompiling."""
    visible: Array | None = None
    query_lengths: Array | None = None
    key_lengths: Array | None = None
    start: Array | None = None
    """The start of a tile of ``jax.shard_map``: uint32 [4, 2], ``(hi, lo)`` for each axis of the scores."""
    dropout: Mask | None = None
    """The mask of the scores; ``None`` if nothing is dropped."""


def reshard_as_scores(operands: T, query: Array) -> T:
    """On an explicit mesh, shard arrays that broadcast to scores like the scores of the query."""
    sharding = explicit_sharding(jax.typeof(query).sharding)
    if sharding is None:
        return operands
    batch, queries, heads, _ = sharding.spec
    of_scores = PartitionSpec(batch, heads, queries, None)

    def one(x: Array) -> Array:
        sizes = x.shape if x.ndim == 4 else ()  # the key and the scale are replicated
        return jax.sharding.reshard(x, broadcast_spec(of_scores, sizes))

    return jax.tree.map(one, operands)


def first_query(spec: AttentionSpec, inputs: AttentionInputs) -> Array | int:
    """Return the position of the first query in the whole array, int32."""
    if not spec.queries_are_tiled or inputs.start is None:
        return 0
    return inputs.start[2, 1].astype(jnp.int32)


def visible_logits(
    spec: AttentionSpec, products: Array, bias: Array | None, inputs: AttentionInputs, queries: Array, keys: Array
) -> tuple[Array, bool]:
    """Return ``products * scale + bias`` with -inf where a key is hidden, and whether a query may see no key.

    ``queries`` and ``keys`` are positions; ``bias`` and ``inputs`` broadcast to the products.
    """
    logits = products if inputs.scale is None else products * inputs.scale
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)
    condition = visible(spec, inputs, queries, keys)
    if condition is not None:
        logits = jnp.where(condition, logits, -jnp.inf)
    return logits, condition is not None or bias is not None


def visible(spec: AttentionSpec, inputs: AttentionInputs, queries: Array, keys: Array) -> Array | None:
    """Return where a query sees a key, or ``None`` if each query sees all keys; see :func:`visible_logits`."""
    conditions = [] if inputs.visible is None else [inputs.visible]
    if spec.causal:
        conditions.append(keys <= queries)
    if spec.window is not None:
        left, right = spec.window
        conditions += [queries - keys <= left, keys - queries <= right]
    if inputs.query_lengths is not None:
        conditions.append(queries < inputs.query_lengths)
    if inputs.key_lengths is not None:
        conditions.append(keys < inputs.key_lengths)
    return functools.reduce(operator.and_, conditions) if conditions else None
