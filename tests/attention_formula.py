"""Attention in NumPy float64, and masks read off what attention returns, for the tests of attention."""

import jax
import jax.numpy as jnp
import numpy as np

import jdrop
from jdrop import _chunked, _tiles

IMPLEMENTATIONS = ("reference", "chunked")
# Compiling is most of what these tests take; what is tested does not depend on how well LLVM optimizes.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def quick(f):
    """Compile cheaply. Queries and keys should be operands: XLA may fold a softmax of constants to NaN on a CPU."""
    return jax.jit(f, compiler_options=QUICK)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def use_plan(monkeypatch, rows, segment=128, segments=8, scores=2**19):
    """Cut the blocks of the chunked implementation otherwise than by default."""
    sizes = {"ROWS": rows, "BLOCK": 0, "SEGMENT": segment, "SEGMENTS": segments, "CPU_SCORES": scores}
    for name, value in sizes.items():
        monkeypatch.setattr(_tiles, name, value)
    _chunked.attend.clear_cache()


# ---------------------------------------------------------------------------------- values


def visible(shape, mask=None, causal=False, window=None, query_lengths=None, key_lengths=None):
    """Which scores [B, N, T, S] a query sees."""
    i, j = np.indices(shape[2:])
    seen = np.ones(shape, bool) if mask is None else np.broadcast_to(mask, shape).copy()
    if causal:
        seen &= j <= i
    if window is not None:
        left, right = window if isinstance(window, tuple) else (window, window)
        seen &= (j >= i - left) & (j <= i + right)
    for b in range(shape[0]):
        seen[b] &= query_lengths is None or i < query_lengths[b]
        seen[b] &= key_lengths is None or j < key_lengths[b]
    return seen


def formula(query, key, value, factor=1.0, *, seen=True, bias=None, scale=None, do=None, logits=np.float64):
    """Return out and, with ``do``, the gradients of query, key, value and bias; ``factor`` is mask over keep rate.

    ``logits`` is the dtype in which the bias is added. The rest is in float64.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    groups, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5 if scale is None else scale
    every = lambda x: np.repeat(x, groups, axis=2)
    s = (np.einsum("bqnh,bknh->bnqk", q, every(k)) * scale).astype(logits)
    s = (s if bias is None else s + np.asarray(bias, logits)).astype(np.float64)
    s = np.where(seen, s, -np.inf)
    e = np.exp(s - np.maximum(s.max(-1, keepdims=True), -1e300))
    p = e / np.maximum(e.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bnqk,bknh->bqnh", p * factor, every(v))
    if do is None:
        return out
    do = np.asarray(do, np.float64)
    dp = np.einsum("bqnh,bknh->bnqk", do, every(v)) * factor
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    of_key = lambda x: x.reshape(*k.shape[:3], groups, k.shape[3]).sum(3)
    dq = np.einsum("bnqk,bknh->bqnh", ds, every(k)) * scale
    dk = of_key(np.einsum("bnqk,bqnh->bknh", ds, q)) * scale
    dv = of_key(np.einsum("bnqk,bqnh->bknh", p * factor, do))
    found = [out, dq, dk, dv]
    if bias is not None:
        wide = (1,) * (4 - np.ndim(bias)) + np.shape(bias)
        axes = tuple(a for a in range(4) if wide[a] == 1)
        found.append(ds.sum(axes, keepdims=True).reshape(np.shape(bias)))
    return found


def close(found, expected, bound=2e-5):
    """Every element within a bound of the largest one."""
    for i, (got, want) in enumerate(zip(found, expected, strict=True)):
        error = np.abs(np.asarray(got, np.float64) - want).max(initial=0.0)
        assert error <= bound * max(1.0, np.abs(want).max(initial=0.0)), (i, error)  # NaN fails too


# ---------------------------------------------------------------------------------- masks


def reveal(key, shape, rate, key_heads=None, seen=None, dtype=jnp.float32, **options):
    """Return the masks [B, N, T, S] of the forward and of the backward pass.

    Zero logits make probabilities of one over the number of keys seen. Identity values show where they are not
    dropped; so does, in the gradient of value, an identity as the gradient of the output. Query heads that share a
    key head are the digits of a binary number there.
    """
    batch, heads, queries, keys = shape
    key_heads = heads if key_heads is None else key_heads
    width, groups = max(queries, keys), heads // key_heads
    eye = np.eye(width)
    value = np.broadcast_to(eye[:keys, None], (batch, keys, key_heads, width))
    count = np.full(shape[:3], keys) if seen is None else seen.sum(-1)
    weight = count * np.broadcast_to(1 - np.asarray(rate, np.float64), (*shape[:3], 1))[..., 0]
    weight = weight * 2.0 ** (np.arange(heads) % groups)[:, None]
    do = eye[:queries, None] * np.swapaxes(weight, 1, 2)[..., None]
    zeros = np.zeros((batch, queries, heads, width)), np.zeros(value.shape)  # operands, see quick

    def both(key, rate, query, k, value, do):
        out, pull = jax.vjp(lambda v: jdrop.dot_product_attention(key, query, k, v, rate, train=True, **options), value)
        return out, pull(do)[0]

    traced = jnp.asarray(rate) if isinstance(rate, jax.Array) else None
    f = quick(lambda k, r, *x: both(k, rate if r is None else r, *x))
    out, dv = (np.asarray(x) for x in f(key, traced, *(jnp.asarray(x, dtype) for x in (*zeros, value, do))))
    digits = np.rint(dv[..., :queries]).astype(int)  # [B, S, K, T]
    np.testing.assert_allclose(dv[..., :queries], digits, atol=1e-2)
    backward = (digits[..., None] >> np.arange(groups)) & 1
    return np.moveaxis(out[..., :keys] != 0, 2, 1), np.moveaxis(backward, 1, -1).transpose(0, 1, 3, 2, 4).reshape(shape)


def shows(key, shape, rate, seen=None, dtype=jnp.float32, key_heads=None, **options):
    """Require the mask of ``dropout_mask``, forward and backward."""
    drawn = {name: options[name] for name in ("shared_axes", "generator") if name in options}
    expected = np.asarray(jdrop.dropout_mask(key, shape, rate, **drawn))
    assert 0 < expected.mean() < 1
    expected = expected if seen is None else expected & seen
    for found in reveal(key, shape, rate, key_heads, seen, dtype, **options):
        np.testing.assert_array_equal(found, expected)
