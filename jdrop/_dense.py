"""Attention with all of its scores at once: the formula itself, under every transform of JAX."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from jdrop import _linear, _loops, _member, _scores
from jdrop._scores import Given, Problem
from jdrop._shards import explicit_sharding


@functools.partial(jax.jit, static_argnums=0)
def attend(problem: Problem, query: Array, key: Array, value: Array, bias: Array | None, given: Given) -> Array:
    """Return ``dropout(softmax(query @ key.T * scale + bias)) @ value``; arguments as for ``_chunked.attend``."""
    groups = query.shape[2] // key.shape[2]
    if groups > 1:
        spread = explicit_sharding(jax.typeof(key).sharding)
        key, value = (jnp.repeat(x, groups, axis=2, out_sharding=spread) for x in (key, value))
    products = jnp.einsum("bqnh,bknh->bnqk", query, key, preferred_element_type=_loops.real_dtype(query))
    queries = _scores.first_query(problem, given) + lax.broadcasted_iota(jnp.int32, (1, 1, query.shape[1], 1), 2)
    keys = lax.broadcasted_iota(jnp.int32, (1, 1, 1, key.shape[1]), 3)
    s, may_be_blind = _scores.logits(problem, products, bias, given, queries, keys)
    if may_be_blind:
        blind = jnp.max(s, axis=-1, keepdims=True) == -jnp.inf
        p = jnp.where(blind, 0.0, jax.nn.softmax(jnp.where(blind, 0.0, s)))
    else:
        p = jax.nn.softmax(s)
    if problem.layout is not None and given.drawn is not None:
        places = () if given.offset is None else (given.offset,)
        p = _linear.apply(_member.SCALED, (p,), *given.drawn, places, problem.layout)
    out = jnp.einsum("bnqk,bknh->bqnh", p.astype(value.dtype), value, preferred_element_type=products.dtype)
    return out.astype(query.dtype)
