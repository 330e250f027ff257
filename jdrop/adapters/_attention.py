"""Attention with the arguments of Flax. Linen and nnx share one function, because their first 12 arguments agree."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

import jdrop
from jdrop._checks import as_bool, as_rate, check_broadcastable, check_key, expand_rank, is_zero
from jdrop._sharding import check_key_varies, types_tell
from jdrop._types import Generator, RateLike, Shard

NAME = "dot_product_attention"


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: RateLike = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    *,
    is_causal: bool = False,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    promote_dtype: Any = None,
    input_positions: Any = None,
    generator: Generator = "fast",
    implementation: Any = None,
    shard: Shard = None,
) -> Array:
    """Compute attention with dropout, as the ``attention_fn`` of Flax's multi-head attention, without storing the mask.

    This is :func:`jdrop.dot_product_attention` with the arguments of the Flax function of the same name. Unsupported
    arguments raise an error.

    Args:
      query: ``[batch..., queries, heads, width]`` with any number of batch axes.
      key: ``[batch..., keys, heads, width]``. The number of heads must divide that of query.
      value: like key.
      bias: floating array that broadcasts to ``[batch..., heads, queries, keys]``.
      mask: array that broadcasts to the same shape; false or 0 hides a key. A query that sees no key gets zeros;
        Flax returns the mean of the values.
      broadcast_dropout: whether all batch elements and heads share one mask, the default in Flax.
      dropout_rng: one PRNG key; may be ``None`` if nothing is random.
      dropout_rate: scalar drop rate of the attention probabilities; it may be traced.
      deterministic: ``True`` drops nothing.
      dtype: dtype to which query, key, and value are cast.
      precision: must be ``None`` or the default. Use ``jax.default_matmul_precision`` to set it globally.
      module: must be ``None``. ``sow_weights`` is not supported, because the attention weights are not available.
      is_causal: whether a query sees only keys up to its own position (nnx).
      force_fp32_for_softmax: no effect (linen); the softmax of 16-bit floats is always computed in float32.
      einsum_dot_general: must be ``None`` (linen).
      qk_attn_weights_einsum: must be ``None`` (linen).
      attn_weights_value_einsum: must be ``None`` (linen).
      promote_dtype: must be ``None`` (nnx).
      input_positions: must be ``None`` (nnx): rotate query and key first.
      generator: as in :func:`jdrop.dropout`. ``"jax"`` gives the masks of Flax, bit for bit. Set it with
        ``functools.partial``.
      implementation: as in :func:`jdrop.dot_product_attention`. Set it with ``functools.partial``.
      shard: as in :func:`jdrop.dot_product_attention`, for a single batch axis. Set it with ``functools.partial``.
        Under ``jax.pmap``, or with ``check_vma=False``, ``None`` takes the key as it is.

    Returns:
      ``[batch..., queries, heads, width]``.

    Raises:
      ValueError: a rate or a shape is out of range.
      TypeError: an argument has the wrong type, or ``dropout_rng`` is missing.
      NotImplementedError: an argument that must be ``None`` is not, or batch axes are sharded over an explicit mesh in
        such a way that JAX cannot merge them.

    References:
      Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin (2017), Attention Is All You Need, NeurIPS.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> from jdrop.adapters.linen import dot_product_attention
      >>> layer = linen.MultiHeadDotProductAttention(2, dropout_rate=0.1, attention_fn=dot_product_attention)
      >>> rng, x = jax.random.key(0), jnp.ones([2, 8, 16])
      >>> params = layer.init(rng, x, deterministic=True)
      >>> layer.apply(params, x, deterministic=False, rngs={"dropout": rng}).shape
      (2, 8, 16)
    """
    unsupported_arguments = {
        "precision": None if precision in ("default", lax.Precision.DEFAULT) else precision,
        "module": module,
        "einsum_dot_general": einsum_dot_general,
        "qk_attn_weights_einsum": qk_attn_weights_einsum,
        "attn_weights_value_einsum": attn_weights_value_einsum,
        "promote_dtype": promote_dtype,
        "input_positions": input_positions,
    }
    for argument, unsupported in unsupported_arguments.items():
        if unsupported is not None:
            fix = "leave it out, or use Flax's own function"
            fix = "run the step under jax.default_matmul_precision" if argument == "precision" else fix
            raise NotImplementedError(f"{NAME}: {argument} must be None, got {type(unsupported).__name__}; {fix}")
    train = not as_bool(NAME, "deterministic", deterministic, "dropout_rate")
    rate = as_rate(NAME, dropout_rate, (), "dropout_rate")
    drops = train and not is_zero(rate)
    if dropout_rng is not None or drops:
        fix = "pass dropout_rng=, one key; the attention layers of Flax pass it from their rngs"
        check_key(NAME, dropout_rng, "dropout_rng", make_key=fix)
    if drops:
        shard = PartitionSpec() if shard is None and not types_tell() else shard
        check_key_varies(NAME, dropout_rng, shard, "dropout_rng", "pass", data=(query, key, value))
    shared = (0, 1) if as_bool(NAME, "broadcast_dropout", broadcast_dropout) else ()
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype
    query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
    batch = query.shape[:-3]
    for argument, x in (("key", key), ("value", value)):
        if x.shape[:-3] != batch:
            raise ValueError(
                f"{NAME}: {argument} must have the batch axes of query, {batch}, got {x.shape[:-3]}; broadcast it"
            )
    scores = (*batch, query.shape[-2], query.shape[-3], key.shape[-3])
    bias = _one_batch_axis("bias", bias, scores)
    mask = _one_batch_axis("mask", None if mask is None else jnp.asarray(mask) != 0, scores)
    if len(batch) > 1:
        try:
            query, key, value = (x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:]) for x in (query, key, value))
        except Exception as error:  # JAX has no public name for this error of explicit meshes
            raise NotImplementedError(
                f"{NAME}: query, key and value must have batch axes that JAX can merge, "
                f"got {jax.typeof(query)}, {jax.typeof(key)}, {jax.typeof(value)}; shard only the first of them"
            ) from error
    out = jdrop.dot_product_attention(
        dropout_rng,
        query,
        key,
        value,
        rate,
        train=train,
        shared_axes=shared,
        generator=generator,
        bias=bias,
        mask=mask,
        is_causal=is_causal,
        implementation=implementation,
        shard=shard,
    )
    return out.reshape(*batch, *out.shape[-3:]) if len(batch) > 1 else out


def _one_batch_axis(argument: str, x: Array | None, scores: tuple[int, ...]) -> Array | None:
    """Merge several batch axes of an array that broadcasts to ``[batch..., heads, queries, keys]``."""
    if x is None or len(scores) <= 4:
        return x
    check_broadcastable(NAME, argument, x, scores, "[batch..., heads, queries, keys] =")
    x = expand_rank(x, len(scores))
    if x.ndim and any(n != 1 for n in x.shape[:-3]):
        x = jnp.broadcast_to(x, (*scores[:-3], *x.shape[-3:]))
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:]) if x.ndim else x
