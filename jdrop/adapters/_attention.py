"""Attention with the arguments of Flax: one function for linen and nnx, whose first twelve are the same."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

import jdrop
from jdrop import _checks, _shards, decisions
from jdrop.decisions import Generator, RateLike

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
) -> Array:
    """Attention with dropout as the ``attention_fn`` of Flax's multi-head attention, with no mask in memory.

    :func:`jdrop.dot_product_attention` with the arguments of Flax's function of this name. What cannot be served
    raises.

    Args:
      query: ``[batch..., queries, heads, width]`` with any number of batch axes.
      key: ``[batch..., keys, heads, width]``; its heads may be fewer, a divisor of those of query.
      value: as key.
      bias: floating array that broadcasts to ``[batch..., heads, queries, keys]``.
      mask: array that broadcasts to the same; false or 0 hides a key. A query that sees no key gets zeros, where Flax
        gives it the mean of the values.
      broadcast_dropout: share one mask between all batches and heads, as Flax does by default.
      dropout_rng: one PRNG key; ``None`` is fine where nothing is random.
      dropout_rate: probability of dropping an attention probability: a scalar, and it may be traced.
      deterministic: ``True`` drops nothing.
      dtype: what query, key and value are cast to.
      precision: must be ``None`` or the default; ``jax.default_matmul_precision`` sets it for all.
      module: must be ``None``, so no ``sow_weights``: the weights are not returned.
      is_causal: hide the keys after a query (nnx).
      force_fp32_for_softmax: of no effect (linen): the softmax of 16-bit floats is in float32 anyway.
      einsum_dot_general: must be ``None`` (linen).
      qk_attn_weights_einsum: must be ``None`` (linen).
      attn_weights_value_einsum: must be ``None`` (linen).
      promote_dtype: must be ``None`` (nnx).
      input_positions: must be ``None`` (nnx): rotate query and key first.
      generator: ``"fast"``, or ``"jax"`` for the masks of Flax, bit for bit; pass it by ``functools.partial``.
      implementation: as for :func:`jdrop.dot_product_attention`; pass it by ``functools.partial``.

    Returns:
      ``[batch..., queries, heads, width]``.

    Raises:
      ValueError: a rate or a shape is out of range.
      TypeError: an argument is of the wrong type, or ``dropout_rng`` is missing.
      NotImplementedError: an argument that must be ``None`` is not, or several batch axes are spread over an explicit
        mesh so that JAX cannot merge them.

    Limits:
      In ``jax.shard_map``, where a mask needs ``shard=``, call :func:`jdrop.dot_product_attention`.

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
    unserved = {
        "precision": None if precision in ("default", lax.Precision.DEFAULT) else precision,
        "module": module,
        "einsum_dot_general": einsum_dot_general,
        "qk_attn_weights_einsum": qk_attn_weights_einsum,
        "attn_weights_value_einsum": attn_weights_value_einsum,
        "promote_dtype": promote_dtype,
        "input_positions": input_positions,
    }
    for argument, given in unserved.items():
        if given is not None:
            fix = "leave it out, or use Flax's own function"
            fix = "run the step under jax.default_matmul_precision" if argument == "precision" else fix
            raise NotImplementedError(_checks.text(NAME, argument, "must be None", type(given).__name__, fix))
    train = not _checks.flag(NAME, "deterministic", deterministic)
    rate = _checks.rate(NAME, dropout_rate, (), "dropout_rate")
    drawn = train and not decisions.is_zero(rate)
    if dropout_rng is not None or drawn:
        _checks.key(NAME, dropout_rng, "dropout_rng")
    if drawn:
        _shards.check_key_varies(NAME, dropout_rng, None, "dropout_rng", f"call jdrop.{NAME} with")
    shared = (0, 1) if _checks.flag(NAME, "broadcast_dropout", broadcast_dropout) else ()
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype
    query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
    batch = query.shape[:-3]
    for argument, x in (("key", key), ("value", value)):
        if x.shape[:-3] != batch:
            rule = f"must have the batch axes of query, {batch}"
            raise ValueError(_checks.text(NAME, argument, rule, x.shape[:-3], "broadcast it"))
    scores = (*batch, query.shape[-2], query.shape[-3], key.shape[-3])
    bias = _one_batch_axis("bias", bias, scores)
    mask = _one_batch_axis("mask", None if mask is None else jnp.asarray(mask) != 0, scores)
    if len(batch) > 1:
        try:
            query, key, value = (x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:]) for x in (query, key, value))
        except Exception as error:  # on an explicit mesh; JAX has no public name for it
            rule, fix = "must have batch axes that JAX can merge", "spread the first of them alone"
            got = f"{jax.typeof(query)}, {jax.typeof(key)}, {jax.typeof(value)}"
            raise NotImplementedError(_checks.text(NAME, "query, key and value", rule, got, fix)) from error
    options: Any = {"bias": bias, "mask": mask, "is_causal": is_causal, "implementation": implementation}
    options |= {"train": train, "shared_axes": shared, "generator": generator}
    out = jdrop.dot_product_attention(dropout_rng, query, key, value, rate, **options)
    return out.reshape(*batch, *out.shape[-3:]) if len(batch) > 1 else out


def _one_batch_axis(argument: str, x: Array | None, scores: tuple[int, ...]) -> Array | None:
    """Merge the batch axes, if there are more, of an array that broadcasts to ``[batch..., heads, queries, keys]``."""
    if x is None or len(scores) <= 4:
        return x
    _checks.broadcasts(NAME, argument, x, scores, "[batch..., heads, queries, keys] =")
    x = _checks.ranked(x, len(scores))
    if x.ndim and any(n != 1 for n in x.shape[:-3]):
        x = jnp.broadcast_to(x, (*scores[:-3], *x.shape[-3:]))
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:]) if x.ndim else x
