"""Shared code of the attention tests: the implementations under test, attention in NumPy, and their comparison.

Every test that takes the fixture ``implementation`` runs once per row of ``IMPLEMENTATIONS``. To put a new
implementation under the whole suite, add a row.

No test needs to read a mask. With few keys, one wrong decision in the forward or backward pass moves a sum by far more
than the bound of :func:`close`, as ``test_one_wrong_decision_is_seen`` proves.
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import jdrop
from jdrop._platform import BlockSizes
from jdrop.attention import _blockwise
from jdrop.attention._registry import IMPLEMENTATIONS as REGISTRY
from jdrop.attention._registry import Implementation

KEY = jax.random.key(31)
BATCH, HEADS, KEY_HEADS, QUERIES, KEYS, WIDTH = 2, 4, 2, 20, 15, 16
"""The usual sizes. Operands of the same shapes share one compiled program, see :func:`step`."""


# ---------------------------------------------------------------------------------- the implementations


class Row(NamedTuple):
    """An implementation under test, and the optional calls that it supports."""

    name: str
    """The value of ``implementation=``."""
    registered: Implementation | None = None
    """Registered under this name during a test; ``None`` if the registry already has it."""
    zero_and_symbolic_sizes: bool = False
    rates_per_key: bool = False
    keys_without_random_access: bool = False
    any_explicit_sharding: bool = False

    def attend(self, key, q, k, v, rate=0.5, *, train=True, **options):
        return jdrop.dot_product_attention(key, q, k, v, rate, train=train, implementation=self.name, **options)


# With 20 queries: a loop over two blocks per head, inside a loop over batch and heads. With more queries and keys hidden
# by position: one segment per 20 queries, each waiting for the one before it.
SMALL_BLOCKS = BlockSizes(queries=16, scores=1, segment=20, segments=2, target_scores=1)
IMPLEMENTATIONS = (
    Row(
        "reference",
        zero_and_symbolic_sizes=True,
        rates_per_key=True,
        keys_without_random_access=True,
        any_explicit_sharding=True,
    ),
    Row("chunked"),
    Row(
        "chunked, small blocks",
        Implementation(_blockwise.refusal, functools.partial(_blockwise.attend, sizes=SMALL_BLOCKS)),
    ),
)


@pytest.fixture(params=IMPLEMENTATIONS, ids=lambda row: row.name)
def implementation(request, monkeypatch):
    """Each implementation in turn. Test files say ``implementation = attention_suite.implementation``."""
    row = request.param
    if row.registered is not None:
        monkeypatch.setitem(REGISTRY, row.name, row.registered)
    return row


# ---------------------------------------------------------------------------------- data


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def data(
    *, batch=BATCH, queries=QUERIES, keys=KEYS, heads=HEADS, key_heads=KEY_HEADS, width=WIDTH, seed=0, dtype=np.float32
):
    """Return query, key, value, and a gradient of the output."""
    shapes = [(queries, heads), (keys, key_heads), (keys, key_heads), (queries, heads)]
    return [normal(seed + i, batch, *shape, width).astype(dtype) for i, shape in enumerate(shapes)]


def scores_shape(q, k):
    return q.shape[0], q.shape[2], q.shape[1], k.shape[1]


# ---------------------------------------------------------------------------------- the library


def _compiler_options():
    """Return the options that compile the fastest. The older emitters take half the time; jaxlib 0.12 has none."""
    options = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda x: x + 1, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


# Most of the time of these tests is compilation. Queries and keys should be operands: XLA for CPU may fold a softmax of
# constants to NaN.
quick = functools.partial(jax.jit, compiler_options=_compiler_options())


def gradients(attend, q, k, v, do, bias=None):
    """Return the output of ``attend(q, k, v, bias)``, and the gradients of query, key, value and bias, if any."""
    primals = (q, k, v) if bias is None else (q, k, v, bias)
    out, pull = jax.vjp(lambda q, k, v, bias=None: attend(q, k, v, bias), *primals)
    return out, *pull(do)


STATIC = ("is_causal", "scale", "local_window_size", "shared_axes", "generator", "shard", "train")


class Concrete:
    """An array of rates that is not traced. It is compared by identity, so each one compiles its own program."""

    def __init__(self, rate):
        self.rate = rate


@functools.partial(quick, static_argnames=("attend", "concrete", *STATIC))
def _step(attend, key, arrays, rate, bias, operands, concrete=None, **static):
    rate = concrete if rate is None else rate
    rate = rate.rate if isinstance(rate, Concrete) else rate
    return gradients(lambda q, k, v, b: attend(key, q, k, v, rate, bias=b, **operands, **static), *arrays, bias)


def step(implementation, key, q, k, v, do, rate=0.5, bias=None, **options):
    """Return the output and the gradients, compiled once per implementation, shapes and static options.

    All arrays are operands, including mask and lengths. A rate is traced if it is a JAX array.
    """
    static = {name: options.pop(name) for name in STATIC if name in options}
    traced = rate if isinstance(rate, jax.Array) else None
    concrete = None if traced is not None else Concrete(rate) if np.ndim(rate) else rate
    return _step(implementation.attend, key, (q, k, v, do), traced, bias, options, concrete, **static)


# ---------------------------------------------------------------------------------- the formula


def visible(
    shape, mask=None, is_causal=False, local_window_size=None, query_seq_lengths=None, key_value_seq_lengths=None
):
    """Return a bool array [B, N, T, S]: whether a query sees a key."""
    i, j = np.indices(shape[2:])
    seen = np.ones(shape, bool) if mask is None else np.broadcast_to(mask, shape).copy()
    if is_causal:
        seen &= j <= i
    if local_window_size is not None:
        size = local_window_size
        left, right = size if isinstance(size, tuple) else (size, size)
        seen &= (j >= i - left) & (j <= i + right)
    for b in range(shape[0]):
        seen[b] &= query_seq_lengths is None or i < query_seq_lengths[b]
        seen[b] &= key_value_seq_lengths is None or j < key_value_seq_lengths[b]
    return seen


def formula(q, k, v, do=None, factor=1.0, *, seen=True, bias=None, scale=None, logits=np.float64):
    """Return the output and, with ``do``, the gradients of query, key, value and bias, if there is one.

    Args:
      q, k, v, do: as for the library.
      factor: the mask over the keep probability; broadcasts to [B, N, T, S].
      seen: whether a query sees a key, as from :func:`visible`.
      bias: as for the library.
      scale: as for the library.
      logits: the dtype in which the bias is added. Everything else is in float64.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    groups, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5 if scale is None else scale
    repeat = lambda x: np.repeat(x, groups, axis=2)
    s = (np.einsum("bqnh,bknh->bnqk", q, repeat(k)) * scale).astype(logits)
    s = (s if bias is None else s + np.asarray(bias, logits)).astype(np.float64)
    s = np.where(seen, s, -np.inf)
    e = np.exp(s - np.maximum(s.max(-1, keepdims=True), -1e300))
    p = e / np.maximum(e.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bnqk,bknh->bqnh", p * factor, repeat(v))
    if do is None:
        return [out]
    do = np.asarray(do, np.float64)
    dp = np.einsum("bqnh,bknh->bnqk", do, repeat(v)) * factor
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    sum_groups = lambda x: x.reshape(*k.shape[:3], groups, k.shape[3]).sum(3)
    dq = np.einsum("bnqk,bknh->bqnh", ds, repeat(k)) * scale
    dk = sum_groups(np.einsum("bnqk,bqnh->bknh", ds, q)) * scale
    dv = sum_groups(np.einsum("bnqk,bqnh->bknh", p * factor, do))
    results = [out, dq, dk, dv]
    if bias is not None:
        shape = (1,) * (4 - np.ndim(bias)) + np.shape(bias)
        axes = tuple(axis for axis in range(4) if shape[axis] == 1)
        results.append(ds.sum(axes, keepdims=True).reshape(np.shape(bias)))
    return results


def mask_factor(key, shape, rate, **options):
    """Return the mask of ``jdrop.dropout_mask``, divided by the keep probability; 0 where that is 0."""
    rate = np.clip(rate, 0, 1)
    if options.get("generator") == "packed":
        rate = np.round(np.asarray(rate, np.float32) * 2**16) / 2**16
    mask = np.asarray(jdrop.dropout_mask(key, shape, rate if np.ndim(rate) else float(rate), **options))
    return mask / np.where(rate == 1, 1, 1 - rate.astype(np.float64))


def truth(key, q, k, v, do=None, rate=0.5, bias=None, *, scale=None, train=True, logits=np.float64, **options):
    """Return the expected results of :func:`step`, from the formula and ``jdrop.dropout_mask``."""
    shape = scores_shape(q, k)
    of_mask = {name: options.pop(name) for name in ("shared_axes", "generator") if name in options}
    factor = mask_factor(key, shape, rate, **of_mask) if train else 1.0
    return formula(q, k, v, do, factor, seen=visible(shape, **options), bias=bias, scale=scale, logits=logits)


def close(results, expected, bound=2e-5):
    """Require every element to be within a bound times the largest one."""
    for i, (x, y) in enumerate(zip(results, expected, strict=True)):
        assert np.shape(x) == np.shape(y), i
        error = np.abs(np.asarray(x, np.float64) - y).max(initial=0.0)
        assert error <= bound * max(1.0, np.abs(y).max(initial=0.0)), (i, error)  # fails for NaN too


def check(implementation, arrays, rate=0.5, bias=None, *, key=KEY, bound=2e-5, **options):
    """Require the values, gradients, and mask to be those of the formula."""
    close(step(implementation, key, *arrays, rate, bias, **options), truth(key, *arrays, rate, bias, **options), bound)


# ---------------------------------------------------------------------------------- compiled text


def largest(text: str) -> int:
    """Return the size of the largest array in compiled text."""
    shapes = re.findall(r"= \(?\w+\[([\d,]+)\]", text)
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


def temp_bytes(compiled: Any) -> int:
    return compiled.memory_analysis().temp_size_in_bytes
