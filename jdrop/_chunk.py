"""One block of chunked attention: queries against all the keys that they may see, forward and backward.

A softmax takes one pass, since a block holds all of its keys. The backward pass recomputes the probabilities from the
maximum of their logits and the sum of their exponentials, and the mask from its seed. Maximum and sum stay apart: in
their logsumexp a maximum of large size would swallow the logarithm of the sum.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jdrop import _loops, _scores, _tiles, decisions
from jdrop._loops import real_dtype
from jdrop._scores import Given
from jdrop._tiles import At, Plan, Segment


def _einsum(plan: Plan, subscripts: str, x: Array, y: Array, dtype: Any) -> Array:
    """Contract two parts of a block, whose axes b, k and g are left out where they have one element."""
    left_out = {ord("bkg"[axis]): None for axis in plan.ones}
    return jnp.einsum(subscripts.translate(left_out), x, y, preferred_element_type=dtype)


def _logits(plan: Plan, q: Array, k: Array, bias: Array | None, given: Given, at: At, segment: Segment) -> Array:
    products = _einsum(plan, "bkgqh,bksh->bkgqs", q, k, real_dtype(q))
    first = _scores.first_query(plan.problem, given) + at.query.astype(jnp.int32)
    queries = first + _tiles.iota(plan, 3, segment.rows, jnp.int32)
    keys = segment.low + _tiles.iota(plan, 4, segment.high - segment.low, jnp.int32)
    return _scores.logits(plan.problem, products, bias, given, queries, keys)[0]


def _keep(plan: Plan, p: Array, given: Given, at: At, segment: Segment, after: Array | None = None) -> Array:
    """Return p where it is kept, else 0; not scaled.

    In float32 it may take the place of p, if it is drawn after the rest that reads p.
    """
    if plan.problem.layout is None or given.drawn is None:
        return p
    if after is not None:
        p = p + _loops.later(after).astype(p.dtype)
    index = _tiles.index(plan, at, segment, given.offset)
    return jnp.where(decisions.keep_at(plan.problem.layout, *given.drawn, index), p, 0.0)


def _scale_kept(plan: Plan, x: Array, given: Given) -> Array:
    """Divide rows, which are linear in what is kept, by the keep probability; 0 where nothing is kept."""
    if plan.problem.layout is None or given.drawn is None:
        return x
    keep = decisions.keep_probability(plan.problem.layout.source, given.drawn.rate, real_dtype(x))
    return x * jnp.where(keep == 0, 0.0, 1 / jnp.where(keep == 0, 1.0, keep))


def forward(
    plan: Plan, x: tuple[Array, ...], bias: Array | None, given: Given, at: At, segment: Segment
) -> tuple[Array, Array, Array]:
    """Return the output of a block's queries, the maximum of their logits, and 1 over the sum of exponentials.

    The last counts from the maximum. For queries that see no key, both are 0.
    """
    q, (k, v) = _tiles.queries(x[0], plan, at, segment), (_tiles.keys(a, plan, segment) for a in x[1:])
    bias, given = _tiles.cut((bias, given), plan, at, segment)
    s = _logits(plan, q, k, bias, given, at, segment)
    m = lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))  # it cancels in all that is returned
    m = jnp.where(m == -jnp.inf, 0.0, m)
    e = jnp.exp(s - m)
    total = jnp.sum(e, axis=-1, keepdims=True)
    kept = _keep(plan, e, given, at, segment, after=total)
    out = _einsum(plan, "bkgqs,bksh->bkgqh", kept.astype(v.dtype), v, s.dtype)
    nonzero = jnp.where(total == 0, 1.0, total)
    out = _scale_kept(plan, out / nonzero, given).astype(q.dtype)
    inverse = jnp.where(total == 0, 0.0, 1 / nonzero)
    return jnp.expand_dims(out, plan.ones), jnp.expand_dims(m, plan.ones), jnp.expand_dims(inverse, plan.ones)


def backward(
    plan: Plan, x: tuple[Array, ...], bias: Array | None, given: Given, at: At, segment: Segment
) -> tuple[Array, Array, Array, Array]:
    """Return a block's part of the gradients: of q times scale, of k and v as [.., H, S], and of its logits.

    That of k is short of the scale that logits are multiplied by here. ``delta``, if there is one, is the sum over keys
    of p times its gradient.

    A probability is ``e * inverse``. The factor of a query goes into its row of do and delta, where it costs nothing.
    """
    q, do, m, inverse, *delta = (_tiles.queries(a, plan, at, segment) for a in (x[0], *x[3:]))
    k, v = (_tiles.keys(a, plan, segment) for a in x[1:3])
    bias, given = _tiles.cut((bias, given), plan, at, segment)
    e = jnp.exp(_logits(plan, q, k, bias, given, at, segment) - m)
    if q.dtype == jnp.float16:  # which has not the range for gradients over a keep probability
        q, k, v = (a.astype(e.dtype) for a in (q, k, v))
    do = _scale_kept(plan, do.astype(e.dtype) * inverse, given).astype(q.dtype)
    # The mask is drawn twice, which takes no longer than to hold it.
    dp = _keep(plan, _einsum(plan, "bkgqh,bksh->bkgqs", do, v, e.dtype), given, at, segment)
    ds = e * (dp - inverse * (delta[0] if delta else jnp.sum(e * dp, axis=-1, keepdims=True)))
    kept = _keep(plan, e, given, at, segment, after=ds[..., :1])
    # The sums over queries as [H, S]: as [S, H] they would transpose a block of scores first. The barrier keeps the
    # transpose of queries out of the product, which XLA for CPU then has no fast kernel for.
    do_t, q_t = lax.optimization_barrier((do.swapaxes(-1, -2), q.swapaxes(-1, -2)))
    dv = _einsum(plan, "bkghq,bkgqs->bkhs", do_t, kept.astype(q.dtype), e.dtype)
    dk = _einsum(plan, "bkghq,bkgqs->bkhs", q_t, ds.astype(q.dtype), e.dtype)
    dq = _einsum(plan, "bkgqs,bksh->bkgqh", ds.astype(q.dtype), k, e.dtype)
    of_keys = [axis for axis in plan.ones if axis < 2]
    dk, dv = (jnp.expand_dims(a, of_keys) for a in (dk, dv))
    return jnp.expand_dims(dq, plan.ones), dk, dv, jnp.expand_dims(ds, plan.ones)
