"""Blockwise attention: forward and backward, only a few blocks of scores exist at a time.

This is the method of FlashAttention-2 (Dao 2024, ICLR) in plain JAX. A softmax takes one pass, because a block has all
keys of its queries. The backward pass recomputes the probabilities from the maximum of the logits and the logarithm of
the sum of exponentials, and the mask from its seed. Maximum and logarithm are stored separately: in their sum, the
logsumexp, a large maximum would absorb the logarithm.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jdrop._bits import bits_for
from jdrop._platform import BlockSizes, Target
from jdrop._prepare import Arguments
from jdrop._sharding import explicit_sharding, vary_like
from jdrop.attention import _blocking, _derivative
from jdrop.attention._blocking import Block, Plan, Segment
from jdrop.attention._scores import Scores, backward_block, forward_block, rounds_probabilities, with_ones, with_peaks
from jdrop.attention._spec import AttentionInputs, AttentionSpec


def refusal(arguments: Arguments, query: Array, key: Array, value: Array, over_scores: tuple[str, ...]) -> str | None:
    """Return why this implementation cannot serve a call, or ``None``."""
    del over_scores
    arrays = query, key, value
    sizes = [n for x in arrays for n in x.shape]
    if not all(isinstance(n, int) for n in sizes) or 0 in sizes:
        return "sizes that are 0 or symbolic"
    explicit = [s.spec for x in arrays if (s := explicit_sharding(jax.typeof(x).sharding)) is not None]
    if any(spec != explicit[0] for spec in explicit):
        return "an explicit mesh that shards more than batch and heads, or query, key and value differently"
    if arguments.is_identity:
        return None
    if arguments.rate.ndim and arguments.rate.shape[-1] > 1:
        return "a rate that varies along the keys"
    name, prng_key, generator = arguments.function, arguments.key, arguments.generator
    if prng_key is not None and not bits_for(name, prng_key, generator, arguments.key_argument).random_access:
        return "a PRNG key whose bits lack random access"
    return None


# ---------------------------------------------------------------------------------- the loops


def _plan(target: Target, spec: AttentionSpec, sizes: BlockSizes | None, query: Array, key: Array) -> Plan:
    sizes = target.platform.block_sizes if sizes is None else sizes
    return _blocking.make_plan(spec, query, key, target.platform, sizes, target.devices)


def _scale_queries(spec: AttentionSpec, query: Array, inputs: AttentionInputs) -> tuple[Array, AttentionInputs]:
    """Multiply the queries instead of the logits by the scale, if that rounds no more than their products do."""
    if inputs.scale is None or not spec.scales_queries:
        return query, inputs
    return query * inputs.scale.astype(query.dtype), inputs._replace(scale=None)


def _dependency(plan: Plan, before: list[Array]) -> Array | None:
    """Return an element of an earlier segment's result (one per device), for the next segment to wait for."""
    return before[-plan.max_in_flight][..., :1, :1] if len(before) >= plan.max_in_flight else None


def _over_blocks(f: Callable[[Any, Array], tuple[Any, Any]], carry: Any, segment: Segment) -> tuple[Any, Any]:
    """Scan over the blocks of a segment, and join the results along the queries, axis 3."""
    if segment.blocks == 1:
        return f(carry, jnp.int32(segment.first))
    carry, results = lax.scan(f, carry, segment.first + segment.rows * jnp.arange(segment.blocks, dtype=jnp.int32))
    return carry, jax.tree.map(_join_blocks, results)


def _join_blocks(x: Array) -> Array:
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


@dataclasses.dataclass(frozen=True)
class Blockwise:
    """The method of this file, see :class:`jdrop.attention._derivative.Method`."""

    sizes: BlockSizes | None = None
    """Sizes of the blocks; ``None`` uses those of the platform."""

    @property
    def differentiable(self) -> "Blockwise":
        return self

    def forward(
        self,
        target: Target,
        spec: AttentionSpec,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None,
        inputs: AttentionInputs,
    ) -> tuple[Array, ...]:
        plan = _plan(target, spec, self.sizes, query, key)
        scaled, inputs = _scale_queries(spec, query, inputs)
        key = with_ones(key) if rounds_probabilities(target.platform, query, bias) else key
        bias, inputs = _blocking.split_scores((bias, inputs), plan)

        def step(x: tuple[Any, ...]) -> tuple[Array, ...]:
            batch, head, *arrays = x
            results: list[tuple[Array, ...]] = []
            for segment in plan.segments:
                # Not the outputs: under vmap, there may be many of them for shared queries and keys.
                after = _dependency(plan, [log_sum for _, _, log_sum in results])

                def block(carry: None, first: Array, segment: Segment = segment, after: Any = after) -> Any:
                    at = Block(plan, segment, batch, head, first, after)
                    return carry, forward_block(Scores.of(at, spec, bias, inputs), *arrays)

                results.append(_over_blocks(block, None, segment)[1])
            return tuple(jnp.concatenate(parts, axis=3) for parts in zip(*results))

        operands = [_blocking.split(x, plan) for x in (scaled, key, value)]
        return tuple(_blocking.join(x, plan) for x in lax.map(step, (*_blocking.loop_indices(plan), *operands)))

    def backward(self, target: Target, spec: AttentionSpec, residuals: tuple[Any, ...], do: Array) -> tuple[Any, ...]:
        query, key, value, whole_bias, inputs, peak, log_sum, out = residuals
        plan, platform = _plan(target, spec, self.sizes, query, key), target.platform
        if plan.batch[1] * plan.heads[1] == 1:
            # Without a loop that takes do, XLA could compute the probabilities in the forward pass and store them.
            # With this dependency, a vmap over PRNG keys computes them for each key.
            query = platform.unshared_query(query, do)
        scale = inputs.scale
        scaled, inputs = _scale_queries(spec, query, inputs)
        wide_key, wide_value = key, value
        if rounds_probabilities(platform, query, whole_bias):
            scaled = with_peaks(scaled, peak, inputs.scale)
            wide_key, wide_value = with_ones(key), with_ones(value)
        bias, inputs = _blocking.split_scores((whole_bias, inputs), plan)
        # The sum over keys of p times its gradient is the sum over H of out times its own. If out is rounded, not all
        # platforms use it: it is a residual all the same, because the platform is known only at lowering.
        use_out = out.dtype == peak.dtype or platform.reuses_rounded_outputs
        delta = [platform.sum_of_products(*(x.astype(peak.dtype) for x in (do, out)))[..., None]] if use_out else []
        peak, log_sum, do, *delta = (_blocking.split(x, plan) for x in (peak, log_sum, do, *delta))
        # Queries that see no key have no gradient, whatever do is.
        do, *delta = (jnp.where(log_sum == jnp.inf, 0, x) for x in (do, *delta))

        def zeros(*shape: int) -> Array:
            return vary_like(jnp.zeros(shape, peak.dtype), jax.typeof(query))

        def step(dbias: Any, x: tuple[Any, ...]) -> tuple[Any, tuple[Array, Array, Array]]:
            batch, head, *arrays = x
            dk = dv = zeros(plan.batch[0], plan.heads[0], key.shape[3], key.shape[1])
            dqs: list[Array] = []
            for segment in plan.segments:
                after = _dependency(plan, dqs)

                def block(carry: Any, first: Array, segment: Segment = segment, after: Any = after) -> Any:
                    (dk, dv, dbias), at = carry, Block(plan, segment, batch, head, first, after)
                    dq, more_dk, more_dv, ds = backward_block(Scores.of(at, spec, bias, inputs), *arrays)
                    return (dk + more_dk, dv + more_dv, _add(dbias, ds, at)), dq

                seen = (..., slice(segment.low, segment.high))
                (dk_seen, dv_seen, dbias), dq = _over_blocks(block, (dk[seen], dv[seen], dbias), segment)
                dk, dv = dk.at[seen].set(dk_seen), dv.at[seen].set(dv_seen)
                dqs.append(dq)
            dq = jnp.concatenate(dqs, axis=3)
            dq, dk = dq if scale is None else dq * scale, dk if inputs.scale is None else dk * inputs.scale
            return dbias, (dq.astype(query.dtype), dk.astype(key.dtype), dv.astype(value.dtype))

        dbias: Any = None if bias is None else zeros(*bias.shape)
        operands = [_blocking.split(x, plan) for x in (scaled, wide_key, wide_value)] + [do, peak, log_sum, *delta]
        dbias, gradients = lax.scan(step, dbias, (*_blocking.loop_indices(plan), *operands))
        dq, dk, dv = gradients
        dk, dv = (jnp.expand_dims(x.swapaxes(-1, -2), 3) for x in (dk, dv))  # all at once
        dq, dk, dv = (_blocking.join(x, plan) for x in (dq, dk, dv))
        return dq, dk, dv, None if bias is None else dbias.reshape(whole_bias.shape).astype(bias.dtype)


def _add(dbias: Array | None, ds: Array, block: Block) -> Array | None:
    """Add the gradient of a block's logits to that of the bias, summed over axes along which the bias broadcasts."""
    if dbias is None:
        return None
    starts, sizes = block.window(dbias.shape)
    of_block = [n for axis, n in enumerate(sizes) if axis not in (1, 3)]
    ds = ds.sum([axis for axis, n in enumerate(of_block) if n == 1], keepdims=True).reshape(sizes)
    return lax.dynamic_update_slice(dbias, lax.dynamic_slice(dbias, starts, sizes) + ds, starts)


def attend(spec: AttentionSpec, *operands: Any, sizes: BlockSizes | None = None) -> Array:
    """Attend blockwise; arguments as for :func:`jdrop.attention._derivative.attend`."""
    return _derivative.attend(Blockwise(sizes), spec, *operands)
