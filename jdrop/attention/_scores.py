"""One block of blockwise attention: its scores, its output, and its part of the gradients."""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from jdrop._platform import Platform
from jdrop._random.threefry import U64
from jdrop._types import real_dtype
from jdrop.attention._blocking import Block
from jdrop.attention._spec import AttentionInputs, AttentionSpec, first_query, visible, visible_logits

_HIGHEST = 60.0  # exponent, such that the sum of its exponentials is finite
_COLUMNS = 8  # of bfloat16: 16 bytes, to which the rows of operands of matrix products should be aligned


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of a block, and the block's part of their inputs."""

    block: Block
    spec: AttentionSpec
    bias: Array | None
    inputs: AttentionInputs
    index: list[U64] | None
    """The index of the scores in the whole array, if there is dropout."""

    @classmethod
    def of(cls, block: Block, spec: AttentionSpec, bias: Array | None, inputs: AttentionInputs) -> "Scores":
        """Slice arrays from :func:`_blocking.split_scores` for a block."""
        bias, inputs = block.slice_scores((bias, inputs))
        return cls(block, spec, bias, inputs, None if inputs.dropout is None else block.index(inputs.start))

    def products(self, q: Array, k: Array) -> Array:
        """Return the products of queries and keys."""
        return self.block.einsum("bkgqh,bksh->bkgqs", q, k, real_dtype(q))

    def scaled_products(self, q: Array, k: Array) -> Array:
        """Return the products of queries and keys, times the scale."""
        products = self.products(q, k)
        return products if self.inputs.scale is None else products * self.inputs.scale

    def positions(self) -> tuple[Array, Array]:
        """Return the positions of queries in the whole array, and of keys."""
        queries, keys = self.block.positions()
        return first_query(self.spec, self.inputs) + queries, keys

    def logits(self, q: Array, k: Array) -> Array:
        """Return the logits, -inf where a key is hidden."""
        return visible_logits(self.spec, self.products(q, k), self.bias, self.inputs, *self.positions())[0]

    def hide(self, x: Array, value: float) -> Array:
        """Return x with a value where a key is hidden."""
        condition = visible(self.spec, self.inputs, *self.positions())
        return x if condition is None else jnp.where(condition, x, value)

    def rough_peaks(self, q: Array, k: Array) -> Array:
        """Return the maxima of the rounded logits; 0 where no key is visible.

        The largest logit exceeds them by at most 16, or falls below by at most 16, as long as it is at most 2**13.
        Beyond, it is never below.
        """
        logits = self.hide(self.scaled_products(q, k).astype(q.dtype), -jnp.inf)
        peak = jnp.max(logits, axis=-1, keepdims=True).astype(real_dtype(q))
        peak = jnp.where(peak == -jnp.inf, 0.0, peak)
        return peak - jnp.maximum(jnp.abs(peak) / 2**8 - 32, 0.0)

    def exponentials(self, q: Array, k: Array) -> Array:
        """Return the rounded exponentials of logits minus peaks, also of hidden ones, from :func:`with_peaks`.

        They are a function of products only, so that a kernel of the matrix product can end with them.
        """
        return jnp.exp(jnp.minimum(self.scaled_products(q, k), _HIGHEST)).astype(q.dtype)

    def drop(self, x: Array, after: Array | None = None, dropped: Array | float = 0.0) -> Array:
        """Return x where it is kept, unscaled, and another value elsewhere.

        Computed after all other reads of x, it may reuse its memory.
        """
        if self.inputs.dropout is None or self.index is None:
            return x
        platform, mask = self.block.plan.platform, self.inputs.dropout
        keep = mask.keep_at(mask.unshared_index(x, self.index, platform), platform=platform)
        return jnp.where(keep, platform.order_after(x, after), dropped)

    def scale_kept(self, rows: Array) -> Array:
        """Divide rows, which are linear in kept values, by the keep probability; 0 where nothing is kept."""
        if self.inputs.dropout is None:
            return rows
        return rows * self.inputs.dropout.inverse_keep_probability(real_dtype(rows))


def rounds_probabilities(platform: Platform, query: Array, bias: Array | None) -> bool:
    """Return whether exponentials, and differences of gradients, are rounded to the dtype of the query."""
    return platform.rounds_probabilities and query.dtype == jnp.bfloat16 and bias is None


def with_ones(key: Array) -> Array:
    """Return keys with more columns, for queries from :func:`with_peaks`."""
    return jnp.concatenate([key, jnp.ones((*key.shape[:-1], _COLUMNS), key.dtype)], axis=-1)


def with_peaks(query: Array, peak: Array, scale: Array | None) -> Array:
    """Return queries with more columns: their products with wider keys, times the scale, are logits minus peaks.

    Three columns of bfloat16 are exact, because their 24 bits are those of float32. The logits are products times the
    scale, so for a scale of 0, their maximum is 0, too. Any other number per row can be subtracted in the same way.
    """
    rest = -peak if scale is None else -peak / jnp.where(scale == 0, 1.0, scale)
    columns = []
    for _ in range(3):
        columns.append(rest.astype(query.dtype))
        rest = rest - columns[-1].astype(rest.dtype)
    columns.append(jnp.zeros((*rest.shape[:-1], _COLUMNS - len(columns)), query.dtype))
    return jnp.concatenate([query, *columns], axis=-1)


def forward_block(scores: Scores, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Return the output of a block's queries, the maximum of their logits, and the log of the sum of exponentials.

    The exponentials are of differences from the maximum. For queries that see no key, these numbers are 0 and +inf.
    """
    block = scores.block
    q, k, v = block.queries(q), block.keys(k), block.keys(v)
    if rounds_probabilities(block.plan.platform, q, scores.bias):
        peak = lax.stop_gradient(scores.rough_peaks(q, k[..., : q.shape[-1]]))
        e = scores.exponentials(with_peaks(q, peak, scores.inputs.scale), k)
        # Without a barrier, XLA for GPUs sums and drops in two kernels.
        e = scores.hide(lax.optimization_barrier(e).astype(peak.dtype), 0.0)
    else:
        logits = scores.logits(q, k)
        peak = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))  # it cancels in all results
        peak = jnp.where(peak == -jnp.inf, 0.0, peak)
        e = jnp.exp(logits - peak)
    total = jnp.sum(e, axis=-1, keepdims=True)
    kept = scores.drop(e, after=total)
    out = block.einsum("bkgqs,bksh->bkgqh", kept.astype(v.dtype), v, peak.dtype)
    nonzero = jnp.where(total == 0, 1.0, total)
    out = scores.scale_kept(out / nonzero).astype(q.dtype)
    log_sum = jnp.where(total == 0, jnp.inf, jnp.log(nonzero))
    out, peak, log_sum = (jnp.expand_dims(x, block.plan.unit_axes) for x in (out, peak, log_sum))
    return out, peak, log_sum


def backward_block(
    scores: Scores, q: Array, k: Array, v: Array, do: Array, peak: Array, log_sum: Array, *delta: Array
) -> tuple[Array, Array, Array, Array]:
    """Return a block's part of the gradients of q times scale, of k and v as [.., H, S], and of its logits.

    The gradient of k is not yet multiplied by ``scale``. The optional ``delta`` is the sum over keys of p times its
    gradient. If probabilities are rounded, q is that of :func:`with_peaks`, and k and v are those of :func:`with_ones`.
    """
    block = scores.block
    q, do, peak, log_sum = (block.queries(x) for x in (q, do, peak, log_sum))
    delta = tuple(block.queries(x) for x in delta)
    k, v = block.keys(k), block.keys(v)
    real, width = log_sum.dtype, do.shape[-1]
    wide_q, wide_k, q, k = q, k, q[..., :width], k[..., :width]
    if q.dtype == jnp.float16:  # its range is too small for gradients divided by the keep probability
        q, k, v = (x.astype(real) for x in (q, k, v))
    do = scores.scale_kept(do.astype(real)).astype(q.dtype)
    # The mask is drawn twice, which is as fast as keeping it in memory.
    if rounds_probabilities(block.plan.platform, q, scores.bias):
        p = scores.hide(scores.exponentials(wide_q, wide_k).astype(real) * jnp.exp(-log_sum), 0.0)
        difference = block.einsum("bkgqh,bksh->bkgqs", with_peaks(do, delta[0], None), v, q.dtype).astype(real)
        ds = p * scores.drop(difference, dropped=-delta[0])
    else:
        p = jnp.exp(scores.logits(wide_q, wide_k) - peak - log_sum)
        dp = scores.drop(block.einsum("bkgqh,bksh->bkgqs", do, v, real))
        ds = p * (dp - (delta[0] if delta else jnp.sum(p * dp, axis=-1, keepdims=True)))
    kept = scores.drop(p, after=ds[..., :1])
    # Sums over queries have the shape [H, S], because [S, H] would first transpose a block of scores.
    do_t, q_t = block.plan.platform.separate(do.swapaxes(-1, -2), q.swapaxes(-1, -2))
    dv = block.einsum("bkghq,bkgqs->bkhs", do_t, kept.astype(q.dtype), real)
    dk = block.einsum("bkghq,bkgqs->bkhs", q_t, ds.astype(q.dtype), real)
    dq = block.einsum("bkgqs,bksh->bkgqh", ds.astype(q.dtype), k, real)
    unit_axes = block.plan.unit_axes
    dk, dv = (jnp.expand_dims(x, [axis for axis in unit_axes if axis < 2]) for x in (dk, dv))
    return jnp.expand_dims(dq, unit_axes), dk, dv, jnp.expand_dims(ds, unit_axes)
