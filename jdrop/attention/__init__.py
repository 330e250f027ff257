"""Dot-product attention with dropout on the attention probabilities."""

import math
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from jax import Array

from jdrop._checks import as_bool
from jdrop._prepare import check_arguments
from jdrop._sharding import whole_array
from jdrop._types import FLOATS, Generator, RateLike, Shard, real_dtype
from jdrop.attention._checks import (
    NAME,
    as_lengths,
    as_scale,
    as_scores,
    as_window,
    check_data,
    check_sharding,
    check_whole_keys,
)
from jdrop.attention._registry import choose
from jdrop.attention._spec import AttentionInputs, AttentionSpec

__all__ = ["dot_product_attention"]


def dot_product_attention(
    prng_key: Array | None,
    query: Array,
    key: Array,
    value: Array,
    rate: RateLike,
    /,
    *,
    train: bool,
    shared_axes: int | Sequence[int] = (),
    generator: Generator = "fast",
    shard: Shard = None,
    bias: Array | None = None,
    mask: Array | None = None,
    is_causal: bool = False,
    scale: float | Array | None = None,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["reference", "chunked", "mosaic_tpu", "mosaic_gpu"] | None = None,
) -> Array:
    """Compute attention with dropout on the attention probabilities, without storing the mask.

    ``out[b, i, n] = sum_j m[b, n, i, j] / (1 - rate) * p[b, n, i, j] * value[b, j, n]`` with
    ``p = softmax_j(scale * query[b, i, n] . key[b, j, n] + bias[b, n, i, j])`` and ``m ~ Bernoulli(1 - rate)``.
    The mask is ``jdrop.dropout_mask(prng_key, [B, N, T, S], rate)``, the same in the forward and the backward pass, in
    every implementation, and on every mesh. Dropping a probability does not change the denominator of the softmax.
    A query that sees no key gets a zero output and zero gradients.

    Args:
      prng_key: one PRNG key, used once; may be ``None`` if ``train`` is false or ``rate`` is a Python or NumPy 0.
      query: float16, bfloat16, float32, or float64 array ``[B, T, N, H]`` (batch, queries, heads, width) or
        ``[T, N, H]``. Logits and probabilities are computed in float32 (float64 for float64).
      key: array ``[B, S, K, H]`` or ``[S, K, H]`` with the dtype of query. N must be a multiple of K: each key head
        serves ``N / K`` adjacent query heads (grouped-query attention, or multi-query attention for ``K = 1``).
      value: array with the shape and dtype of key.
      rate: drop rate, as in :func:`jdrop.dropout`. An array of rates broadcasts to ``[B, N, T, S]``, with 1 on shared
        axes.
      train: ``True`` draws a mask; ``False`` applies no dropout.
      shared_axes: axes of ``[B, N, T, S]`` along which elements share one decision (B is 1 for unbatched arrays):
        ``(2, 3)`` drops whole heads, and ``(0, 1)`` uses one mask for all examples and heads.
      generator: as in :func:`jdrop.dropout`.
      shard: inside ``jax.shard_map``: the PartitionSpec of ``[B, N, T, S]`` over the manual mesh axes, with ``S``
        unsharded. For example, ``PartitionSpec("data", "model")`` if the batch is sharded over ``data`` and the heads
        over ``model``. If queries are sharded, ``is_causal``, lengths, and window count from the first query of the
        whole array. Pass the local tile of ``bias``, ``mask``, lengths, and array rates.
      bias: array that broadcasts to ``[B, N, T, S]``, added to the scaled logits. Its gradient is summed over the
        broadcast axes.
      mask: bool array that broadcasts to ``[B, N, T, S]``: true where a query may see a key.
      is_causal: whether query i sees only keys 0 to i.
      scale: factor of the query-key products; ``None`` means ``1 / sqrt(H)``. A JAX array is multiplied into query, and
        the product is rounded to the dtype of query.
      query_seq_lengths: integer array ``[B]``: queries at or after this index see no key.
      key_value_seq_lengths: integer array ``[B]``: keys at or after this index are hidden.
      local_window_size: number of keys that a query sees to the left and right of its own position: one int for both
        sides, or a pair. ``None`` means all.
      implementation: ``"reference"`` materializes all probabilities. ``"chunked"`` materializes a few blocks at a time,
        each of 2**22 scores or of 512 queries per key head, so its memory is otherwise linear in T and S. In float32 on
        CPU, dropout adds no further block. On GPUs, a block has up to 2**28 scores per device, counted over all
        examples and heads: 2 GiB in bfloat16. Both support every JAX transform. ``"mosaic_tpu"`` and ``"mosaic_gpu"``
        are kernels for TPUs and Hopper GPUs, which have not run on them yet; those for TPUs also run in an interpreter
        on CPU. ``None`` selects ``"chunked"`` if it supports the call and T * S >= 2**16, where it was at least as fast
        on CPU, and never a kernel.

    Returns:
      An array with the shape and dtype of query.

    Raises:
      ValueError: a shape, a rate, an axis, or an option is invalid, or ``prng_key`` is a batch of keys.
      TypeError: an argument has the wrong type, ``prng_key`` is missing, or ``train`` or ``is_causal`` is traced.
      NotImplementedError: ``implementation="chunked"`` does not support the call: a rate that varies along the axis S,
        ``generator="jax"`` with a key whose bits lack random access, sizes that are 0 or symbolic, or an explicit mesh
        that shards axes other than batch and heads, or that shards query, key, and value differently. Kernels do not
        support bias, mask, ``generator="jax"``, shared keys, other platforms, and automatic meshes of several devices,
        either. ``"mosaic_tpu"`` needs float32 or bfloat16, and a width of at most 256; ``"mosaic_gpu"`` needs float16
        or bfloat16, a width of 64 or 128, at least 128 keys, and one rate.

    References:
      Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin (2017), Attention Is All You Need, NeurIPS.
      Dao (2024), FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning, ICLR.

    Limits:
      The mask depends on the shape ``[B, N, T, S]``; see :func:`jdrop.dropout`. Second derivatives of ``"chunked"``
      store the intermediate values that they differentiate. On GPUs and TPUs, the gradients of ``"chunked"`` by query
      and key in 16 bits are computed from the rounded output, as in FlashAttention-2: their rounding errors are about
      twice as large. On GPUs, without bias in bfloat16, logits beyond 2**13 that differ by less than 1% may count as
      equal. NaN in a hidden key or value spreads, as in ``jax.nn``: its product with a probability of 0 is
      NaN. Under ``jax.checkpoint`` the forward pass of ``"chunked"`` runs again, unless the policy saves its output and
      two numbers per query: ``save_only_these_names("jdrop_attention")``.

    Example:
      >>> import jax, jdrop
      >>> q, k, v = jax.random.normal(jax.random.key(0), [3, 2, 64, 4, 32])
      >>> y = jdrop.dot_product_attention(jax.random.key(1), q, k, v, 0.1, train=True, is_causal=True)
      >>> y.shape
      (2, 64, 4, 32)
    """
    check_data(query, key, value)
    check_sharding(query, key, value)
    unbatched = query.ndim == 3
    query, key, value = (jnp.asarray(x)[None] if unbatched else jnp.asarray(x) for x in (query, key, value))
    shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    bias, mask = as_scores("bias", bias, shape, FLOATS), as_scores("mask", mask, shape, ("bool",))
    query_lengths = as_lengths("query_seq_lengths", query_seq_lengths, shape[0])
    key_lengths = as_lengths("key_value_seq_lengths", key_value_seq_lengths, shape[0])
    causal, window = as_bool(NAME, "is_causal", is_causal), as_window(local_window_size)
    scale = as_scale(query, scale)
    arguments = check_arguments(
        NAME,
        prng_key,
        (query, key, value),
        rate,
        shape=shape,
        train=train,
        shared_axes=shared_axes,
        generator=generator,
        shard=shard,
        key_argument="prng_key",
    )
    check_whole_keys(arguments)
    over_scores = tuple(name for name, x in (("bias", bias), ("mask", mask)) if x is not None)
    attend = choose(arguments, implementation, query, key, value, over_scores=over_scores)
    dropout = None if arguments.is_identity else arguments.draw()
    start = whole_array(shape, arguments.tile_axes)[1]
    query, factor, scales_queries = _scaled(query, scale)
    inputs = AttentionInputs(factor, mask, query_lengths, key_lengths, start, dropout)
    spec = AttentionSpec(causal, window, any(arguments.tile_axes[2:3]), scales_queries)
    out = attend(spec, query, key, value, bias, inputs)
    return out[0] if unbatched else out


def _scaled(query: Array, scale: float | Array) -> tuple[Array, Array | None, bool]:
    """Return the query, the scale of its products, and whether the query is to be multiplied by it."""
    real = real_dtype(query)
    if isinstance(scale, Array):  # so that gradients flow to it
        return (query.astype(real) * scale.astype(real)).astype(query.dtype), None, True
    power_of_two = query.dtype == jnp.bfloat16 and math.frexp(abs(scale))[0] == 0.5
    return query, jnp.asarray(scale, real), query.dtype == real or power_of_two
