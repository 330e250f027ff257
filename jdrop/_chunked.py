"""Attention in blocks: of the scores, forward and backward, a few blocks are held at a time.

The method of FlashAttention-2 (Dao 2024, ICLR) in plain JAX: the loops over the blocks, and their gradients.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from jdrop import _chunk, _loops, _tiles
from jdrop._loops import real_dtype
from jdrop._scores import Given, Problem
from jdrop._shards import explicit_sharding, names_of, tile, vary_like, vary_together
from jdrop._tiles import At, Plan, Segment

# ---------------------------------------------------------------------------------- the loops


def _scale_queries(plan: Plan, query: Array) -> tuple[Plan, Array]:
    """Multiply the queries by the scale, in place of each logit, where that rounds no more than their products do."""
    as_wide = query.dtype == real_dtype(query)
    power_of_two = math.frexp(abs(plan.problem.scale))[0] == 0.5
    if not (as_wide or (query.dtype == jnp.bfloat16 and power_of_two)):
        return plan, query
    return plan._replace(problem=plan.problem._replace(scale=1.0)), query * plan.problem.scale


def _after(plan: Plan, before: list[Array]) -> Array | None:
    """Return -0.0 made from what a segment before returned, for the next one to wait for.

    On a mesh each device waits for its own part of that.
    """
    return _loops.later(before[-plan.abreast][..., :1, :1]) if len(before) >= plan.abreast else None


def _over_blocks(f: Callable[[Any, Array], tuple[Any, Any]], carry: Any, segment: Segment) -> tuple[Any, Any]:
    """Scan over the blocks of a segment, and join what they return along the queries, axis 3."""
    if segment.blocks == 1:
        return f(carry, jnp.int32(segment.first))
    carry, found = lax.scan(f, carry, segment.first + segment.rows * jnp.arange(segment.blocks, dtype=jnp.int32))
    return carry, jax.tree.map(_join_blocks, found)


def _join_blocks(x: Array) -> Array:
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, query: Array, key: Array, value: Array, bias: Array | None, given: Given) -> Array:
    return _forward(plan, query, key, value, bias, given)[0]


def _forward(
    plan: Plan, query: Array, key: Array, value: Array, bias: Array | None, given: Given
) -> tuple[Array, tuple[Any, ...]]:
    fine, (inner, q) = _tiles.fine((bias, given), plan), _scale_queries(plan, query)

    def turn(x: tuple[Any, ...]) -> tuple[Array, ...]:
        batch, head, *arrays = x
        found: list[tuple[Array, ...]] = []  # out, maximum, inverse of the sum
        for segment in plan.segments:
            # Not the outs: under vmap they may be many where queries and keys are not.
            after = _after(plan, [inverse for *_, inverse in found])

            def block(carry: None, first: Array, segment: Segment = segment, after: Any = after) -> tuple[None, Any]:
                return carry, _chunk.forward(inner, tuple(arrays), *fine, At(batch, head, first, after), segment)

            found.append(_over_blocks(block, None, segment)[1])
        return tuple(jnp.concatenate(parts, axis=3) for parts in zip(*found))

    out, *sums = lax.map(turn, (*_tiles.minor(plan), *(_tiles.split(x, plan) for x in (q, key, value))))
    out = _tiles.join(out, plan)
    return out, (query, key, value, bias, given, sums, out if out.dtype == sums[0].dtype else None)


def _backward(plan: Plan, residuals: tuple[Any, ...], do: Array) -> tuple[Any, ...]:
    query, key, value, bias, given, sums, out = residuals
    real = sums[0].dtype
    if plan.batch[1] * plan.heads[1] == 1:
        # With no loop that takes do, XLA would make the probabilities in the forward pass and hold them until here.
        # Under a vmap over PRNG keys they are then made for each.
        query = query + _loops.later(do[..., :1]).astype(query.dtype)
    fine, (inner, q) = _tiles.fine((bias, given), plan), _scale_queries(plan, query)
    # The sum over keys of p times its gradient is that over H of out times its own, but not with 16 bits of out. For
    # jnp.sum of a product, with a batch of one, XLA for CPU takes up to 30 times as long (jax 0.10.2).
    delta = [] if out is None else [jnp.einsum("bqnh,bqnh->bqn", do, out, precision="highest")[..., None]]
    # Queries that see nothing have no gradient, whatever comes in.
    do, *delta = (jnp.where(sums[1] == 0, 0, _tiles.split(x, plan)) for x in (do, *delta))

    def zeros(*shape: int) -> Array:
        return vary_like(jnp.zeros(shape, real), jax.typeof(query))

    def turn(dbias: Any, x: tuple[Any, ...]) -> tuple[Any, tuple[Array, Array, Array]]:
        batch, head, *arrays = x
        dk = dv = zeros(plan.batch[0], plan.heads[0], key.shape[3], key.shape[1])
        dqs: list[Array] = []
        for segment in plan.segments:
            after = _after(plan, dqs)

            def block(carry: Any, first: Array, segment: Segment = segment, after: Any = after) -> tuple[Any, Array]:
                (dk, dv, dbias), at = carry, At(batch, head, first, after)
                dq, more_dk, more_dv, ds = _chunk.backward(inner, tuple(arrays), *fine, at, segment)
                return (dk + more_dk, dv + more_dv, _add(dbias, ds, at, segment)), dq

            seen = (..., slice(segment.low, segment.high))
            (dk_seen, dv_seen, dbias), dq = _over_blocks(block, (dk[seen], dv[seen], dbias), segment)
            dk, dv = dk.at[seen].set(dk_seen), dv.at[seen].set(dv_seen)
            dqs.append(dq)
        dq, dk = jnp.concatenate(dqs, axis=3) * plan.problem.scale, dk * inner.problem.scale
        return dbias, (dq.astype(query.dtype), dk.astype(key.dtype), dv.astype(value.dtype))

    dbias: Any = None if fine[0] is None else zeros(*fine[0].shape)
    operands = [_tiles.split(x, plan) for x in (q, key, value)]
    dbias, gradients = lax.scan(turn, dbias, (*_tiles.minor(plan), *operands, do, *sums, *delta))
    dq, dk, dv = gradients
    dk, dv = (jnp.expand_dims(x.swapaxes(-1, -2), 3) for x in (dk, dv))  # all at once
    dq, dk, dv = (_tiles.join(x, plan) for x in (dq, dk, dv))
    return dq, dk, dv, bias if bias is None else dbias.reshape(bias.shape).astype(bias.dtype), None


def _add(dbias: Array | None, ds: Array, at: At, segment: Segment) -> Array | None:
    """Add the gradient of a block's logits to that of the bias, summed where the bias broadcasts."""
    if dbias is None:
        return None
    starts, sizes = _tiles.window(dbias.shape, at, segment)
    of_block = [n for axis, n in enumerate(sizes) if axis not in (1, 3)]
    ds = ds.sum([axis for axis, n in enumerate(of_block) if n == 1], keepdims=True).reshape(sizes)
    return lax.dynamic_update_slice(dbias, lax.dynamic_slice(dbias, starts, sizes) + ds, starts)


_attend.defvjp(_forward, _backward)

# ---------------------------------------------------------------------------------- one device, or a mesh


@functools.partial(jax.jit, static_argnums=0)
def attend(problem: Problem, query: Array, key: Array, value: Array, bias: Array | None, given: Given) -> Array:
    """Return ``dropout(softmax(query @ key.T * scale + bias)) @ value``.

    Args:
      problem: what is static.
      query: [B, T, N, H]; on an explicit mesh, batch and heads alone are spread, and those of key and value alike.
      key: [B, S, K, H].
      value: [B, S, K, H].
      bias: ``None``, or over scores: an array with four axes that broadcasts to [B, N, T, S].
      given: what no gradient flows to.
    """
    sharding = explicit_sharding(jax.typeof(query).sharding)
    if sharding is None or not any(sharding.spec):
        return _one_tile(problem, query, key, value, bias, given)
    batch, _, heads, _ = sharding.spec

    def laid(x: Array) -> PartitionSpec:
        return PartitionSpec(*(s if n > 1 else None for s, n in zip((batch, heads), x.shape if x.ndim == 4 else ())))

    def each(query: Array, key: Array, value: Array, bias: Array | None, given: Given) -> Array:
        shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        _, offset = tile(shape, names_of("attend", shape, PartitionSpec(batch, heads)))
        return _one_tile(problem, query, key, value, bias, given._replace(offset=offset[0]))

    over_scores = jax.tree.map(laid, (bias, given))
    bias, given = jax.tree.map(jax.sharding.reshard, (bias, given), over_scores)
    specs = (*(PartitionSpec(batch, None, heads),) * 3, *over_scores)
    return jax.shard_map(each, in_specs=specs, out_specs=specs[0])(query, key, value, bias, given)


def _one_tile(problem: Problem, *operands: Any) -> Array:
    """Attend on one device, on an auto mesh, or on a device's part of a manual one."""
    arrays, tree = jax.tree.flatten(operands)
    query, key, value, bias, given = jax.tree.unflatten(tree, vary_together(*arrays))
    return _attend(_tiles.plan(problem, query, key), query, key, value, bias, given)
