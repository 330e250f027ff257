"""Attention in blocks: no array of [query, key] is ever whole, forward or backward.

The method of FlashAttention-2 (Dao 2024, ICLR) in plain JAX. A block of queries meets all keys that it may see, so
that its softmax takes one pass. The backward pass makes probabilities again from the logsumexp of their logits, and
the mask again from its seed.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from jdrop import _loops, _scores, _tiles, decisions
from jdrop._loops import real_dtype
from jdrop._scores import Given, Problem
from jdrop._shards import explicit_sharding, names_of, tile, vary_like, vary_together
from jdrop._tiles import At, Plan, Segment

# ---------------------------------------------------------------------------------- one block


def _logits(plan: Plan, q: Array, k: Array, bias: Array | None, given: Given, at: At, segment: Segment) -> Array:
    products = jnp.einsum("bkgqh,bksh->bkgqs", q, k, preferred_element_type=real_dtype(q))
    first = _scores.first_query(plan.problem, given) + at.query.astype(jnp.int32)
    queries = first + lax.broadcasted_iota(jnp.int32, (1, 1, 1, segment.rows, 1), 3)
    keys = segment.low + lax.broadcasted_iota(jnp.int32, (1, 1, 1, 1, segment.high - segment.low), 4)
    return _scores.logits(plan.problem, products, bias, given, queries, keys)[0]


def _keep(plan: Plan, p: Array, given: Given, at: At, segment: Segment) -> Array:
    """Return p where it is kept, else 0; not scaled."""
    if plan.problem.layout is None or given.drawn is None:
        return p
    index = _tiles.index(plan, at, segment, given.offset)
    return jnp.where(decisions.keep_at(plan.problem.layout, *given.drawn, index), p, 0.0)


def _scale_kept(plan: Plan, x: Array, given: Given) -> Array:
    """Divide rows, which are linear in what is kept, by the keep probability; 0 where nothing is kept."""
    if plan.problem.layout is None or given.drawn is None:
        return x
    keep = decisions.keep_probability(plan.problem.layout.source, given.drawn.rate, real_dtype(x))
    return x * jnp.where(keep == 0, 0.0, 1 / jnp.where(keep == 0, 1.0, keep))


def _forward_block(
    plan: Plan, x: tuple[Array, ...], bias: Array | None, given: Given, at: At, segment: Segment
) -> tuple[Array, Array]:
    """Return the output of a block's queries, and the logsumexp of their logits: +inf where they see nothing."""
    q, (k, v) = _tiles.rows(x[0], at, segment), (a[:, :, 0, segment.low : segment.high] for a in x[1:])
    bias, given = _tiles.cut((bias, given), at, segment)
    s = _logits(plan, q, k, bias, given, at, segment)
    m = lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))  # it cancels in all that is returned
    m = jnp.where(m == -jnp.inf, 0.0, m)
    e = jnp.exp(s - m)
    total = jnp.sum(e, axis=-1, keepdims=True)
    kept = _keep(plan, e, given, at, segment).astype(v.dtype)
    out = jnp.einsum("bkgqs,bksh->bkgqh", kept, v, preferred_element_type=s.dtype)
    out = _scale_kept(plan, out / jnp.where(total == 0, 1.0, total), given)
    return out.astype(q.dtype), jnp.where(total == 0, jnp.inf, m + jnp.log(total))


def _backward_block(
    plan: Plan, x: tuple[Array, ...], bias: Array | None, given: Given, at: At, segment: Segment
) -> tuple[Array, Array, Array, Array]:
    """Return a block's part of the gradients: of q times scale, of k and v as [.., H, S], and of its logits.

    That of k is short of the scale that logits are multiplied by here. ``delta``, if there is one, is the sum over keys
    of p times its gradient.
    """
    q, do, lse, *delta = (_tiles.rows(a, at, segment) for a in (x[0], *x[3:]))
    k, v = (a[:, :, 0, segment.low : segment.high] for a in x[1:3])
    bias, given = _tiles.cut((bias, given), at, segment)
    p = jnp.exp(_logits(plan, q, k, bias, given, at, segment) - lse)
    if q.dtype == jnp.float16:  # which has not the range for gradients over a keep probability
        q, k, v = (a.astype(p.dtype) for a in (q, k, v))
    # Behind a barrier it is drawn once; XLA for CPU draws again for ds, which takes no longer than storing it.
    kept = p if given.drawn is None else lax.optimization_barrier(_keep(plan, p, given, at, segment))
    do = _scale_kept(plan, do.astype(p.dtype), given).astype(q.dtype)
    einsum = functools.partial(jnp.einsum, preferred_element_type=p.dtype)
    dp = kept * einsum("bkgqh,bksh->bkgqs", do, v)
    ds = dp - p * (delta[0] if delta else jnp.sum(dp, axis=-1, keepdims=True))
    # The sums over queries as [H, S]: as [S, H] they would transpose a block of scores first.
    dv = einsum("bkgqh,bkgqs->bkhs", do, kept.astype(q.dtype))
    dk = einsum("bkgqh,bkgqs->bkhs", q, ds.astype(q.dtype))
    return einsum("bkgqs,bksh->bkgqh", ds.astype(q.dtype), k), dk, dv, ds


# ---------------------------------------------------------------------------------- the loops


def _scale_queries(plan: Plan, query: Array) -> tuple[Plan, Array]:
    """Multiply the queries by the scale, in place of each logit, where that rounds no more than their products do."""
    as_wide = query.dtype == real_dtype(query)
    power_of_two = math.frexp(abs(plan.problem.scale))[0] == 0.5
    if not (as_wide or (query.dtype == jnp.bfloat16 and power_of_two)):
        return plan, query
    return plan._replace(problem=plan.problem._replace(scale=1.0)), query * plan.problem.scale


def _after(plan: Plan, before: list[Array]) -> Array | None:
    """Return -0.0 made from the last of what segments before returned, for the next one to wait for.

    On a mesh each device waits for its own part of that.
    """
    if not before or not plan.in_turn:
        return None
    word = lax.bitcast_convert_type(before[-1][..., :1, :1].astype(jnp.float32), jnp.uint32)
    return _loops.hidden(word, 0x80000000)


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

    def turn(x: tuple[Any, ...]) -> tuple[Array, Array]:
        batch, head, *arrays = x
        outs: list[Array] = []
        lses: list[Array] = []
        for segment in plan.segments:
            after = _after(plan, lses)  # not outs: under vmap they may be many where queries and keys are not

            def block(carry: None, first: Array, segment: Segment = segment, after: Any = after) -> tuple[None, Any]:
                return carry, _forward_block(inner, tuple(arrays), *fine, At(batch, head, first, after), segment)

            out, lse = _over_blocks(block, None, segment)[1]
            outs.append(out)
            lses.append(lse)
        return jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)

    out, lse = lax.map(turn, (*_tiles.minor(plan), *(_tiles.split(x, plan) for x in (q, key, value))))
    out = _tiles.join(out, plan)
    return out, (query, key, value, bias, given, lse, out if out.dtype == lse.dtype else None)


def _backward(plan: Plan, residuals: tuple[Any, ...], do: Array) -> tuple[Any, ...]:
    query, key, value, bias, given, lse, out = residuals
    fine, (inner, q) = _tiles.fine((bias, given), plan), _scale_queries(plan, query)
    # The sum over keys of p times its gradient is that over H of out times its own, but not with 16 bits of out.
    delta = [] if out is None else [_tiles.split(jnp.sum(do * out, axis=-1, keepdims=True), plan)]

    def zeros(*shape: int) -> Array:
        return vary_like(jnp.zeros(shape, lse.dtype), jax.typeof(do))

    def turn(dbias: Any, x: tuple[Any, ...]) -> tuple[Any, tuple[Array, Array, Array]]:
        batch, head, *arrays = x
        dk = dv = zeros(plan.batch[0], plan.heads[0], key.shape[3], key.shape[1])
        dqs: list[Array] = []
        for segment in plan.segments:
            after = _after(plan, dqs)

            def block(carry: Any, first: Array, segment: Segment = segment, after: Any = after) -> tuple[Any, Array]:
                (dk, dv, dbias), at = carry, At(batch, head, first, after)
                dq, more_dk, more_dv, ds = _backward_block(inner, tuple(arrays), *fine, at, segment)
                return (dk + more_dk, dv + more_dv, _add(dbias, ds, at, segment)), dq

            seen = (..., slice(segment.low, segment.high))
            (dk_seen, dv_seen, dbias), dq = _over_blocks(block, (dk[seen], dv[seen], dbias), segment)
            dk, dv = dk.at[seen].set(dk_seen), dv.at[seen].set(dv_seen)
            dqs.append(dq)
        dq, dk = jnp.concatenate(dqs, axis=3) * plan.problem.scale, dk * inner.problem.scale
        return dbias, (dq.astype(query.dtype), dk.astype(key.dtype), dv.astype(value.dtype))

    dbias: Any = None if fine[0] is None else zeros(*fine[0].shape)
    arrays = [_tiles.split(x, plan) for x in (q, key, value, do)]
    dbias, gradients = lax.scan(turn, dbias, (*_tiles.minor(plan), *arrays, lse, *delta))
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
