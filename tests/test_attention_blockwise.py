"""Blockwise attention: one block, the loops over blocks, and their compiled programs.

The rows "chunked" of attention_suite.py test its values, gradients, and masks. Neither LLVM flags nor the choice of
emitters change the sizes of buffers (jax 0.10.2), so memory does not depend on how the tests are compiled.
"""

import functools
import re

import attention_suite
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import (
    KEY,
    Row,
    check,
    close,
    data,
    formula,
    largest,
    mask_factor,
    normal,
    quick,
    temp_bytes,
    visible,
)

from jdrop import dot_product_attention
from jdrop._mask import draw_mask
from jdrop._platform import GENERIC, PLATFORMS, BlockSizes
from jdrop.attention import _blockwise, _scaled, _scores
from jdrop.attention._blocking import Block, Segment, make_plan, split, split_scores
from jdrop.attention._registry import Implementation
from jdrop.attention._spec import AttentionInputs, AttentionSpec

CPU = PLATFORMS["cpu"]
CHUNKED = attention_suite.IMPLEMENTATIONS[1]


def attend(q, k, v, rate=0.5, **options):
    return CHUNKED.attend(KEY, q, k, v, rate, **options)


@pytest.fixture
def with_sizes(monkeypatch):
    """Return a function from block sizes to an implementation."""

    def register(sizes):
        name = f"chunked, {sizes}"
        attend = functools.partial(_blockwise.attend, sizes=sizes)
        monkeypatch.setitem(attention_suite.REGISTRY, name, Implementation(_blockwise.refusal, attend))
        return Row(name)

    return register


# ---------------------------------------------------------------------------------- one block


@pytest.mark.parametrize(
    ("batch", "key_heads", "groups", "rate", "platform"),
    [
        (1, 1, 1, 0.25, CPU),
        (2, 1, 2, 0.25, CPU),
        (1, 2, 1, 0.0, CPU),
        (1, 2, 2, 0.25, GENERIC),
    ],
)
def test_a_block_agrees_with_the_formula(batch, key_heads, groups, rate, platform):
    """Queries 3 to 8 see keys up to their own position. The block has the keys 1 to 16."""
    arrays = data(batch=batch, queries=12, keys=20, heads=key_heads * groups, key_heads=key_heads)
    shape, segment = (batch, key_heads * groups, 12, 20), Segment(first=3, blocks=1, rows=6, low=1, high=17)
    rows, keys = slice(3, 9), slice(1, 17)
    seen = visible(shape, is_causal=True)
    seen[..., :1] = False
    do = np.zeros_like(arrays[3])
    do[:, rows] = arrays[3][:, rows]
    factor = mask_factor(KEY, shape, rate) if rate else 1.0
    out, dq, dk, dv, ds = formula(*arrays[:3], do, factor, seen=seen, scale=0.3, bias=np.zeros(shape))
    delta = (do * out).sum(-1, keepdims=True)

    spec = AttentionSpec(True, None, queries_are_tiled=False, scales_queries=False)
    plan = make_plan(spec, *arrays[:2], platform, BlockSizes(), 1)
    assert plan.batch == (batch, 1) and plan.heads == (key_heads, 1)
    dropout = draw_mask("test", KEY, np.float32(rate), shape) if rate else None
    inputs = AttentionInputs(jnp.float32(0.3), dropout=dropout)
    part = lambda x: split(jnp.asarray(x), plan)[0]

    @quick
    def forward_and_backward(q, k, v, do, delta):
        block = Block(plan, segment, *map(jnp.int32, (0, 0, 3)))
        scores = _scores.Scores.of(block, spec, None, split_scores(inputs, plan))
        out, *sums = _scores.forward_block(scores, q, k, v)
        assert all(x.shape == (*out.shape[:-1], 1) for x in sums)
        others = jnp.full((*q.shape[:4], 1), jnp.nan)  # sums of other queries are not read
        sums = [others.at[:, :, :, rows].set(x) for x in sums]
        backward = functools.partial(_scores.backward_block, scores, q, k, v, do, *sums)
        return out, backward(), backward(delta)

    block_out, *gradients = forward_and_backward(*map(part, (*arrays[:3], do, delta)))
    close([block_out], [np.asarray(part(out))[:, :, :, rows]])
    expected = [
        np.asarray(part(dq))[:, :, :, rows] / 0.3,
        np.asarray(part(dk))[:, :, 0, keys].swapaxes(-1, -2) / 0.3,
        np.asarray(part(dv))[:, :, 0, keys].swapaxes(-1, -2),
        ds.reshape(batch, key_heads, groups, 12, 20)[..., rows, keys],
    ]
    for results in gradients:
        close(results, expected)


@pytest.mark.parametrize(
    ("dtype", "scale", "moves"),
    [("float32", 0.3, True), ("bfloat16", -0.125, True), ("bfloat16", 0.3, False), ("float16", 0.125, False)],
)
def test_the_scale_moves_into_queries_if_that_rounds_no_more(dtype, scale, moves):
    q = jnp.asarray(normal(0, 1, 300, 1, 16), dtype)
    exact = np.asarray(q, np.float64) * np.float64(np.float32(scale))
    q, factor, scales_queries = _scaled(q, scale)
    spec = AttentionSpec(False, None, False, scales_queries)
    scaled, inputs = _blockwise._scale_queries(spec, q, AttentionInputs(factor))
    assert inputs.scale == (None if moves else np.float32(scale)) and scaled.dtype == q.dtype
    np.testing.assert_allclose(np.asarray(scaled, np.float64), exact if moves else q, rtol=2**-24)


# ---------------------------------------------------------------------------------- any blocks


@pytest.mark.parametrize(
    ("sizes", "causal"),
    [
        (BlockSizes(queries=1, scores=1, segment=1, segments=1, target_scores=1), True),
        (BlockSizes(queries=32, scores=1, segment=32, segments=3, target_scores=1), False),
        (BlockSizes(queries=512, scores=1, segment=16, segments=8, target_scores=2 * 2 * 2 * 16 * 50), True),
    ],
    ids=[
        "one head, segments of 10 queries",
        "blocks of 13 queries and a remainder",
        "some heads, segments of 16 queries",
    ],
)
def test_values_gradients_and_mask_do_not_depend_on_the_sizes_of_blocks(with_sizes, sizes, causal):
    arrays = data(batch=3, queries=37, keys=50, heads=8, key_heads=4, width=8)
    check(with_sizes(sizes), arrays, is_causal=causal)


def test_a_segment_and_a_remainder_by_default():
    """One segment of 256 queries, and one more query."""
    arrays = data(batch=1, queries=257, keys=257, heads=2, key_heads=1)
    check(CHUNKED, arrays, 0.25, is_causal=True)


def test_more_than_a_thousand_queries(with_sizes):
    """In two blocks of about half of them."""
    arrays = data(batch=1, queries=1025, keys=1025, heads=1, key_heads=1)
    check(with_sizes(CPU.block_sizes._replace(scores=2**20)), arrays, 0.25)


# ---------------------------------------------------------------------------------- memory


@functools.cache
def compiled_gradient(length, dtype="float32", rate=0.5, backward=True):
    x = jax.ShapeDtypeStruct((1, length, 2, 16), dtype)
    f = lambda q, k, v: attend(q, k, v, rate).sum()
    return quick(jax.grad(f, (0, 1, 2)) if backward else f).lower(x, x, x).compile()


@pytest.mark.compiled
def test_memory_is_linear_in_length():
    small, large = (compiled_gradient(n) for n in (4096, 8192))
    assert temp_bytes(large) <= 2.2 * temp_bytes(small)
    for compiled, length in ((small, 4096), (large, 8192)):
        assert largest(compiled.as_text()) <= 512 * length + 2**21 < length**2


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("length", "dtype", "backward", "most"),
    [
        (700, "float32", True, 1.02),
        (2048, "float32", False, 1.02),
        (2048, "float32", True, 1.02),
        (4096, "float32", True, 1.02),
        (2048, "bfloat16", False, 1.25),
        (2048, "bfloat16", True, 1.25),
    ],
)
def test_dropout_takes_no_memory(length, dtype, backward, most):
    """Kept values replace probabilities: in float32, as many scores are in memory as at rate 0.

    In bfloat16, half an array of kept values is added to two and a half.
    """
    sizes = [temp_bytes(compiled_gradient(length, dtype, rate, backward)) for rate in (0.5, 0.0)]
    assert sizes[0] <= most * sizes[1]


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("segments", "hidden"), [(4, {"is_causal": True}), (2, {"local_window_size": (256, 256)})], ids=["causal", "window"]
)
def test_segments_take_turns_in_memory(with_sizes, segments, hidden):
    """One of four is in flight, but may overlap with the next. Segments are smaller than a block with all keys."""
    implementation = with_sizes(BlockSizes(scores=2**20, segments=segments, target_scores=2**19))
    x = jax.ShapeDtypeStruct((1, 2048, 1, 16), jnp.float32)

    def bytes_of(**options):
        f = lambda q, k, v: implementation.attend(KEY, q, k, v, **options).sum()
        return temp_bytes(quick(jax.grad(f, (0, 1, 2))).lower(x, x, x).compile())

    seen = visible((1, 1, 2048, 2048), **hidden)[0, 0]
    scores = [512 * rows.any(0).sum() for rows in seen.reshape(4, 512, 2048)]
    all_at_once = 3 * 4 * sum(scores)  # three arrays of four bytes
    assert bytes_of(**hidden) <= 1.3 * bytes_of() < all_at_once


@pytest.mark.compiled
@pytest.mark.parametrize(("rate", "causal"), [(0.0, True), (0.5, False)])
def test_layers_hold_no_scores_for_the_backward_pass(rate, causal):
    """Unless a loop takes the gradient of the output, only the form for CPU keeps XLA from computing them early."""
    x = jax.ShapeDtypeStruct((1, 512, 2, 32), jnp.float32)

    def bytes_of(layers):
        def f(x):
            for _ in range(layers):
                x = jnp.tanh(attend(x, x, x, rate, is_causal=causal))
            return x.sum()

        return temp_bytes(quick(jax.grad(f)).lower(x).compile())

    scores, one = 2 * 512 * 512 * 4, 512 * 2 * 32 * 4
    assert (bytes_of(3) - bytes_of(1)) / 2 <= 6 * one < scores / 2


def test_residuals_of_the_backward_pass():
    """Query, key, value, output, two numbers per query, and the key and rate of the mask."""
    q, k, v = (jnp.asarray(normal(i, 2, 200, n, 32)) for i, n in ((0, 4), (1, 2), (2, 2)))

    def bytes_kept(rate, **options):
        f = lambda q, k, v, r: jax.vjp(lambda q, k, v: attend(q, k, v, r, **options), q, k, v)[1]
        if isinstance(rate, float):
            pull = jax.eval_shape(functools.partial(f, r=rate), q, k, v)
        else:
            pull = jax.eval_shape(f, q, k, v, rate)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pull))

    without = q.nbytes + k.nbytes + v.nbytes + q.nbytes + 2 * 4 * 2 * 4 * 200 + 4  # two numbers per row, and the scale
    assert bytes_kept(0.0) == bytes_kept(0.0, is_causal=True) == without
    assert bytes_kept(0.5) == without + 2 * 4  # a Python rate is a constant
    assert bytes_kept(jnp.float32(0.5)) == without + 2 * 4 + 4
    assert bytes_kept(jnp.full([2, 1, 200, 1], 0.5)) == without + 2 * 4 + 2 * 200 * 4


def test_saved_by_name_the_forward_pass_runs_once():
    """Of jax.checkpoint(policy=...): the forward pass, what it repeats of it, and the backward pass."""
    q = jnp.ones((1, 32, 2, 8))

    def loss(q):
        return dot_product_attention(KEY, q, q, q, 0.1, train=True, implementation="chunked").sum()

    def passes(policy):
        text = str(jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(q))
        return len(re.findall(r"jdrop_at_lowering\[", text))

    policies = jax.checkpoint_policies
    assert passes(policies.nothing_saveable) == 3
    assert passes(policies.save_only_these_names("jdrop_attention")) == 2


@pytest.mark.compiled
def test_the_gradient_of_bias_is_computed_on_demand():
    bias, x = jax.ShapeDtypeStruct((2, 4096, 4096), jnp.float32), jax.ShapeDtypeStruct((1, 4096, 2, 16), jnp.float32)
    f = lambda q, k, v, bias: attend(q, k, v, bias=bias).sum()

    def writes(wrt):
        lines = quick(jax.grad(f, wrt)).lower(x, x, x, bias).compile().as_text().splitlines()
        return [line for line in lines if re.search(r"= f32\[[\d,]*4096,4096\]\S* dynamic-update-slice", line)]

    assert writes((0, 1, 2, 3)) and not writes((0, 1, 2))


@pytest.mark.compiled
def test_layers_of_a_scan_keep_neither_mask_nor_index():
    """The index for the bits of JAX does not depend on the key: hoisted from the loop, it takes 8 bytes per score."""
    keys = jax.random.split(KEY, 3)

    def compiled(generator):
        def layer(x, key):
            return jnp.tanh(x + CHUNKED.attend(key, x, x, x, generator=generator)), None

        f = jax.grad(lambda x: jax.lax.scan(layer, x, keys)[0].sum())
        return quick(f).lower(normal(0, 1, 300, 2, 16)).compile()

    fast, of_jax = compiled("fast"), compiled("jax")
    assert "[3,1,300,2,16]" in fast.as_text() and largest(fast.as_text()) <= 2 * 300 * 300
    assert temp_bytes(of_jax) <= temp_bytes(fast) + 300 * 300 * 4


# ---------------------------------------------------------------------------------- order and sharing of work


@pytest.mark.compiled
@pytest.mark.parametrize(("causal", "backward"), [(True, False), (False, True)])
def test_many_masks_over_the_same_scores_share_them(with_sizes, causal, backward):
    """Logits and exponentials are computed once for all keys of a vmap.

    This also holds forward in segments that wait for each other, and backward if a loop takes the gradient of the output.
    """
    arrays = normal(0, 3, 4, 24, 1, 16)
    implementation = with_sizes(BlockSizes(queries=16, scores=1, segment=20, segments=2, target_scores=1))

    def exponentials(count):
        def f(key, *arrays):
            attend = lambda *x: implementation.attend(key, *x, is_causal=causal)
            return jax.grad(lambda *x: jnp.sum(attend(*x) ** 2), (0, 1, 2))(*arrays) if backward else attend(*arrays)

        mapped = quick(jax.vmap(f, in_axes=(0, None, None, None)))
        return mapped.lower(jax.random.split(KEY, count), *arrays).compile().cost_analysis()["transcendentals"]

    assert exponentials(4) == exponentials(1) > 0


def lowered_gradient(platform):
    x = jax.ShapeDtypeStruct((1, 300, 1, 16), jnp.float32)
    f = jax.jit(jax.grad(lambda x: attend(x, x, x).sum()))
    return f.trace(x).lower(lowering_platforms=(platform,)).as_text()


def test_the_sums_for_gradients_are_one_exact_product_on_a_cpu():
    """On a GPU, float32 products have 10 bits by default, so there the elements are multiplied and then summed."""
    sums = lambda text: [x for x in text.splitlines() if "dot_general" in x and "batching_dims = [0, 1, 2]" in x]
    (line,) = sums(lowered_gradient("cpu"))
    assert "precision = [HIGHEST, HIGHEST]" in line
    assert not sums(lowered_gradient("cuda")) and not sums(lowered_gradient("tpu"))


@pytest.mark.compiled
def test_transposes_stay_out_of_products_on_a_cpu(monkeypatch):
    """All products [batch, m, k] x [batch, k, n] have k last on the left, which XLA has fast kernels for."""

    def contracting():
        x = jax.ShapeDtypeStruct((1, 512, 2, 64), jnp.float32)
        jax.clear_caches()
        f = jax.jit(jax.grad(lambda q, k, v: attend(q, k, v).sum(), (0, 1, 2)))
        return set(re.findall(product, f.lower(x, x, x).compile().as_text()))

    product = r" dot\(.*lhs_batch_dims=\{0\}, lhs_contracting_dims=\{(\d)\}"
    assert contracting() == {"2"}

    class WithoutSeparate(type(CPU)):
        separate = type(GENERIC).separate

    monkeypatch.setitem(PLATFORMS, "cpu", WithoutSeparate())
    assert contracting() == {"1", "2"}
