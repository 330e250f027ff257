"""Attention with dropout on its probabilities."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop import _checks, _chunked, _dense, _loops, _member, _shards, decisions
from jdrop._scores import Drawn, Given, Problem
from jdrop._shards import Shard
from jdrop.decisions import Generator, RateLike

_NAME = "dot_product_attention"
_T, _S = 2, 3  # axes of [B, N, T, S]
_MANY = 2**16  # scores of a head: from there on chunked is no slower than reference


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
    implementation: Literal["reference", "chunked"] | None = None,
) -> Array:
    """Attend, with dropout on the attention probabilities and no mask in memory.

    ``out[b, i, n] = sum_j m[b, n, i, j] / (1 - rate) * p[b, n, i, j] * value[b, j, n]`` with
    ``p = softmax_j(scale * query[b, i, n] . key[b, j, n] + bias[b, n, i, j])`` and ``m ~ Bernoulli(1 - rate)``, the
    mask ``jdrop.dropout_mask(prng_key, [B, N, T, S], rate)``. A dropped probability does not change the sum of the
    softmax. Forward and backward draw the same mask, by index, in every implementation and on every mesh. A query that
    sees no key gets zeros, and so do its gradients.

    Args:
      prng_key: one PRNG key, used once. ``None`` is fine if ``train`` is false or ``rate`` is the number 0.
      query: float16, bfloat16, float32 or float64 array ``[B, T, N, H]``: batch, queries, heads, width; or
        ``[T, N, H]``. Logits and probabilities are in float32 (float64 for float64).
      key: array ``[B, S, K, H]`` or ``[S, K, H]`` of the dtype of query. N is a multiple of K: each key head serves
        ``N / K`` neighbouring query heads (grouped-query and, for ``K = 1``, multi-query attention).
      value: array of the shape and dtype of key.
      rate: probability of dropping, as for :func:`jdrop.dropout`. An array of rates broadcasts to ``[B, N, T, S]``,
        with 1 on shared axes.
      train: ``True`` draws a mask; ``False`` attends without.
      shared_axes: axes of ``[B, N, T, S]`` along which one decision is shared (B is 1 for arrays without batch):
        ``(2, 3)`` drops whole heads, ``(0, 1)`` takes one mask for all examples and heads.
      generator: as for :func:`jdrop.dropout`.
      shard: inside ``jax.shard_map``: how ``[B, N, T, S]`` is laid over the manual mesh axes, with ``S`` whole:
        ``PartitionSpec("data", "model")`` where the batch is spread over ``data`` and heads over ``model``. With
        queries spread, ``is_causal``, lengths and window count from the first query of the whole array. ``bias``,
        ``mask``, lengths and array rates are those of the tile.
      bias: array that broadcasts to ``[B, N, T, S]``, added to the scaled logits. Its gradient is summed over the
        axes that it broadcasts on.
      mask: bool array that broadcasts to ``[B, N, T, S]``: true where a query sees a key.
      is_causal: whether query i sees the keys up to i alone.
      scale: what products are multiplied by; ``None`` means ``1 / sqrt(H)``. An array of JAX is multiplied into query,
        and that is rounded to the dtype of query.
      query_seq_lengths: integer array ``[B]``: queries from there on see nothing.
      key_value_seq_lengths: integer array ``[B]``: keys from there on are not seen.
      local_window_size: how many keys to the left and to the right a query sees beside its own place, one int for
        both or a pair; ``None`` means all.
      implementation: ``"reference"`` holds all probabilities and works under every transform of JAX, forward mode
        too. ``"chunked"`` holds a few blocks of them, of 2**22 or of 512 queries of a key head; beyond these its memory
        is linear in T and S, and in float32 on a CPU dropout adds no block; it has reverse mode only. ``None`` takes
        ``"chunked"`` where it can serve the call and T times S is at least 2**16, from where on it was no slower on a
        CPU; for forward mode at such sizes, pass ``"reference"``.

    Returns:
      An array of the shape and dtype of query.

    Raises:
      ValueError: a shape, a rate, an axis or an option does not fit, or ``prng_key`` is a batch of keys.
      TypeError: an argument is of the wrong type, ``prng_key`` is missing, or ``train`` or ``is_causal`` is traced.
      NotImplementedError: ``implementation="chunked"`` cannot serve the call: a rate that differs from key to key,
        ``generator="jax"`` with a key whose bits do not go by index, sizes that are 0 or symbolic, or an explicit mesh
        that spreads more than batch and heads.

    References:
      Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin (2017), Attention Is All You Need, NeurIPS.
      Dao (2024), FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning, ICLR.

    Limits:
      The mask is a function of the shape ``[B, N, T, S]``; see :func:`jdrop.dropout`. A second derivative of
      ``"chunked"`` stores what it differentiates.

    Example:
      >>> import jax, jdrop
      >>> q, k, v = jax.random.normal(jax.random.key(0), [3, 2, 64, 4, 32])
      >>> y = jdrop.dot_product_attention(jax.random.key(1), q, k, v, 0.1, train=True, is_causal=True)
      >>> y.shape
      (2, 64, 4, 32)
    """
    _check_data(query, key, value)
    flat = query.ndim == 3
    query, key, value = (jnp.asarray(x)[None] if flat else jnp.asarray(x) for x in (query, key, value))
    shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    _check_whole(query, key, value)
    bias, mask = _over_scores("bias", bias, shape, _checks.FLOATS), _over_scores("mask", mask, shape, ("bool",))
    query_lengths = _lengths("query_seq_lengths", query_seq_lengths, shape[0])
    key_lengths = _lengths("key_value_seq_lengths", key_value_seq_lengths, shape[0])
    causal, window = _checks.flag(_NAME, "is_causal", is_causal), _window(local_window_size)
    query, factor = _scaled(query, scale)
    if implementation is not None:
        _checks.choice(_NAME, "implementation", implementation, ("reference", "chunked"))
    options: Any = {"shared_axes": shared_axes, "generator": generator, "shard": shard}
    call = _member.check(_NAME, prng_key, shape, rate, train=train, key_argument="prng_key", **options)
    if any(call.names[_S:]):
        rule, fix = "must not spread the keys", "gather keys and values first: a softmax needs all of them"
        raise ValueError(_checks.text(_NAME, "shard", rule, shard, fix))
    refusal = _refusal(call, query, key, value)
    if refusal and implementation == "chunked":
        raise NotImplementedError(_checks.text(_NAME, "implementation", refusal, "'chunked'", 'pass "reference"'))
    chunked = implementation == "chunked" or (implementation is None and not refusal and shape[_T] * shape[_S] >= _MANY)
    drawn, layout = None, None
    if call.idle:
        offset = _shards.tile(shape, call.names)[1]
    else:
        words, probability, offset, layout = call.operands(part=chunked)
        drawn = Drawn(words, probability)
    given = Given(mask, query_lengths, key_lengths, offset[0] if offset else None, drawn)
    problem = Problem(factor, causal, window, any(call.names[_T : _T + 1]), layout)
    out = (_chunked if chunked else _dense).attend(problem, query, key, value, bias, given)
    return out[0] if flat else out


# ---------------------------------------------------------------------------------- checks


def _refusal(call: _member.Call, *arrays: Array) -> str | None:
    """Why the chunked implementation cannot serve a call."""
    sizes = [n for x in arrays for n in x.shape]
    if not all(isinstance(n, int) for n in sizes) or 0 in sizes:
        return 'must be "reference" for sizes that are 0 or symbolic'
    explicit = [s.spec for x in arrays if (s := _shards.explicit_sharding(jax.typeof(x).sharding)) is not None]
    if any(spec != explicit[0] for spec in explicit):
        return 'must be "reference" on an explicit mesh that spreads more than batch and heads, or not all alike'
    if call.idle:
        return None
    if call.rate.ndim and call.rate.shape[_S] > 1:
        return 'must be "reference" for a rate that differs from key to key'
    if call.key is not None and not decisions.by_index(_NAME, call.key, call.generator, call.key_argument):
        return 'must be "reference" for a key whose bits do not go by index'
    return None


def _check_data(query: Array, key: Array, value: Array) -> None:
    for argument, x in (("query", query), ("key", key), ("value", value)):
        _checks.array(_NAME, argument, x, _checks.FLOATS)
        if x.ndim not in (3, 4):
            rule, fix = "must be [batch, length, heads, width] or [length, heads, width]", "reshape it"
            raise ValueError(_checks.text(_NAME, argument, rule, _checks.describe(x), fix))
    if key.dtype != query.dtype or value.dtype != query.dtype:
        got = f"{query.dtype}, {key.dtype} and {value.dtype}"
        raise TypeError(_checks.text(_NAME, "query, key and value", "must have one dtype", got, "convert them"))
    if value.shape != key.shape:
        fix = "give each key a value of the same width"
        raise ValueError(_checks.text(_NAME, "value", f"must have the shape of key, {key.shape}", value.shape, fix))
    if query.ndim != key.ndim or query.shape[:-3] != key.shape[:-3] or query.shape[-1] != key.shape[-1]:
        rule = f"must have batch and width of query, {query.shape}"
        raise ValueError(_checks.text(_NAME, "key", rule, key.shape, "project them alike"))
    if key.shape[-2] == 0 or query.shape[-2] % key.shape[-2]:
        rule, fix = "must have a number of heads that divides query's", "group query heads evenly"
        raise ValueError(_checks.text(_NAME, "key", rule, f"{key.shape[-2]} for {query.shape[-2]}", fix))


def _check_whole(query: Array, key: Array, value: Array) -> None:
    """On an explicit mesh, require keys and width whole: sums over them would need communication."""
    for argument, x, axes in (("query", query, (3,)), ("key", key, (1, 3)), ("value", value, (1, 3))):
        sharding = _shards.explicit_sharding(jax.typeof(x).sharding)
        if sharding is not None and any(sharding.spec[axis] for axis in axes):
            rule = "must be whole along width" if argument == "query" else "must be whole along keys and width"
            raise ValueError(_checks.text(_NAME, argument, rule, jax.typeof(x), "use jax.sharding.reshard first"))


def _over_scores(argument: str, x: Array | None, shape: tuple[int, ...], dtypes: Sequence[str]) -> Array | None:
    """Require an array that broadcasts to [B, N, T, S], and give it four axes."""
    if x is None:
        return None
    _checks.broadcasts(_NAME, argument, x, shape, "[batch, heads, queries, keys] =")
    if x.dtype.name not in dtypes:
        rule, fix = ("must be bool", "pass x != 0") if dtypes == ("bool",) else ("must be floating", "convert it")
        raise TypeError(_checks.text(_NAME, argument, rule, _checks.describe(x), fix))
    return jnp.reshape(x, (1,) * (4 - x.ndim) + x.shape)


def _lengths(argument: str, x: Array | None, batch: int) -> Array | None:
    """Require one length an example, and give them four axes."""
    if x is None:
        return None
    _checks.integers(_NAME, argument, x)
    if x.shape != (batch,):
        raise ValueError(_checks.text(_NAME, argument, f"must have shape {(batch,)}", x.shape, "pass one an example"))
    return jnp.reshape(x, (batch, 1, 1, 1)).astype(jnp.int32)


def _window(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = size if isinstance(size, tuple) and len(size) == 2 else (size, size)
    left, right = (min(_checks.count(_NAME, "local_window_size", n, low=0), 2**31 - 1) for n in pair)
    return left, right


def _scaled(query: Array, scale: Any) -> tuple[Array, float]:
    """Return the query, and the number that logits are multiplied by; an array's factor goes into the query."""
    if scale is None:
        return query, query.shape[-1] ** -0.5
    if isinstance(scale, Array):
        _checks.array(_NAME, "scale", scale, _checks.FLOATS)
        _checks.broadcasts(_NAME, "scale", scale, ())
        return (query * scale.astype(_loops.real_dtype(query))).astype(query.dtype), 1.0
    return query, _checks.number(_NAME, "scale", scale, -np.inf, np.inf)
