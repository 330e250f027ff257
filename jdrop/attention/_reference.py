"""Attention with all scores at once: the formula itself, under every transform of JAX."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jdrop._ops import SCALE
from jdrop._prepare import Arguments
from jdrop._primitive import masked_op
from jdrop._sharding import explicit_sharding
from jdrop._types import real_dtype
from jdrop.attention._spec import AttentionInputs, AttentionSpec, first_query, reshard_as_scores, visible_logits


def refusal(arguments: Arguments, *call: Any) -> str | None:
    """Return ``None``: this implementation serves all calls."""
    del arguments, call
    return None


@functools.partial(jax.jit, static_argnums=0)
def attend(
    spec: AttentionSpec, query: Array, key: Array, value: Array, bias: Array | None, inputs: AttentionInputs
) -> Array:
    """Return ``dropout(softmax(query @ key.T * scale + bias)) @ value``; arguments as for ``_derivative.attend``."""
    bias, inputs = reshard_as_scores((bias, inputs), query)
    groups = query.shape[2] // key.shape[2]
    if groups > 1:
        sharding = explicit_sharding(jax.typeof(key).sharding)
        key, value = (jnp.repeat(x, groups, axis=2, out_sharding=sharding) for x in (key, value))
    products = jnp.einsum("bqnh,bknh->bnqk", query, key, preferred_element_type=real_dtype(query))
    queries = first_query(spec, inputs) + lax.broadcasted_iota(jnp.int32, (1, 1, query.shape[1], 1), 2)
    keys = lax.broadcasted_iota(jnp.int32, (1, 1, 1, key.shape[1]), 3)
    logits, may_be_blind = visible_logits(spec, products, bias, inputs, queries, keys)
    if may_be_blind:
        blind = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf) == -jnp.inf
        p = jnp.where(blind, 0.0, jax.nn.softmax(jnp.where(blind, 0.0, logits)))
    else:
        p = jax.nn.softmax(logits)
    if inputs.dropout is not None:
        p = masked_op(SCALE, inputs.dropout, p)
    out = jnp.einsum("bnqk,bknh->bqnh", p.astype(value.dtype), value, preferred_element_type=products.dtype)
    return out.astype(query.dtype)
