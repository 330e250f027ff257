"""dot_product_attention: one mask and one formula in every implementation.

On meshes: test_attention_sharding.py. Memory and blocks: test_chunked.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_formula import IMPLEMENTATIONS, close, formula, normal, quick, shows, use_plan, visible

import jdrop
from jdrop import _chunked, _dense, _tiles

KEY = jax.random.key(31)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks, segments and turns of the loops, also for small arrays."""
    with monkeypatch.context() as patch:
        use_plan(patch, rows=16, segment=24, segments=3, scores=1)
        yield
    _chunked.attend.clear_cache()


def data(batch, queries, keys, heads, key_heads, width, seed=0):
    shapes = [(queries, heads), (keys, key_heads), (keys, key_heads), (queries, heads)]
    return [normal(seed + i, batch, *s, width) for i, s in enumerate(shapes)]


def attend(key, q, k, v, rate=0.5, *, train=True, **options):
    return jdrop.dot_product_attention(key, q, k, v, rate, train=train, **options)


def with_gradients(key, q, k, v, do, rate=0.5, bias=None, **options):
    """Return out and the gradients of query, key, value and bias, if there is one."""
    primals = (q, k, v) if bias is None else (q, k, v, bias)
    out, pull = jax.vjp(lambda q, k, v, b=None: attend(key, q, k, v, rate, bias=b, **options), *primals)
    return out, *pull(do)


def scores(q, k):
    return q.shape[0], q.shape[2], q.shape[1], k.shape[1]


# ---------------------------------------------------------------------------------- the mask


@pytest.mark.parametrize(
    ("shape", "key_heads"),
    [
        ((1, 16, 1, 100), 4),  # columns: queries and keys
        ((8, 8, 64, 64), 8),
        ((2, 4, 5, 17), 2),  # columns: heads too
        ((2, 3, 2, 5), 1),  # all are columns
        ((3, 6, 9, 128), 3),
        ((2, 4, 130, 257), 1),
        ((1, 1, 257, 97), 1),
    ],
)
def test_the_mask_is_that_of_dropout_mask(implementation, shape, key_heads):
    shows(KEY, shape, 0.5, key_heads=key_heads, implementation=implementation)


@pytest.mark.parametrize("shared_axes", [(0, 1), (2, 3), 1, (-1,)])
def test_shared_axes(implementation, shared_axes):
    shape = (3, 4, 20, 130 if shared_axes in ((0, 1), (2, 3)) else 50)
    shows(KEY, shape, 0.4, key_heads=2, shared_axes=shared_axes, implementation=implementation)


RATES = {
    "per example": np.linspace(0.2, 0.8, 3, dtype=np.float32)[:, None, None, None],
    "per head": np.linspace(0.2, 0.8, 4, dtype=np.float32)[:, None, None],
    "per query": np.linspace(0.1, 0.9, 20, dtype=np.float32)[:, None],
    "of all three": jnp.linspace(0.1, 0.9, 3 * 4 * 20).reshape(3, 4, 20, 1),
}


def test_array_rates(implementation):
    shows(KEY, (3, 4, 20, 40), RATES["of all three"], key_heads=2, implementation=implementation)


@pytest.mark.parametrize("which", RATES)
def test_array_rates_of_small_blocks(small_blocks, which):
    shows(KEY, (3, 4, 20, 40), RATES[which], key_heads=2, implementation="chunked")


def test_a_rate_for_each_key():
    """The reference alone can do so, and so what is picked does."""
    rates = np.linspace(0.1, 0.9, 40, dtype=np.float32)
    q, k, v, _ = data(2, 20, 40, 2, 2, 32)
    expected = formula(q, k, v, np.asarray(jdrop.dropout_mask(KEY, (2, 2, 20, 40), rates)) / (1 - rates))
    for implementation in (None, "reference"):
        close([attend(KEY, q, k, v, rates, implementation=implementation)], [expected])


def test_bits_of_jax(implementation):
    shows(KEY, (2, 4, 20, 130), 0.3, key_heads=2, generator="jax", implementation=implementation)
    shows(KEY, (2, 2, 9, 50), 0.3, shared_axes=0, generator="jax", implementation=implementation)


def test_keys_of_other_kinds(implementation):
    shows(jax.random.key(3, impl="rbg"), (2, 2, 9, 50), 0.3, implementation=implementation)
    shows(jax.random.PRNGKey(3), (2, 2, 9, 50), 0.3, implementation=implementation)


def test_bits_that_do_not_go_by_index():
    shows(jax.random.key(3, impl="rbg"), (2, 2, 9, 50), 0.3, generator="jax", implementation=None)


@pytest.mark.parametrize("generator", ["fast", "jax"])
def test_the_mask_with_x64(implementation, generator, x64):
    for dtype in (jnp.float64, jnp.float32)[: 2 if generator == "fast" else 1]:
        shows(KEY, (2, 2, 9, 130), 0.3, dtype=dtype, generator=generator, implementation=implementation)


def test_x64_changes_no_bit_of_the_fast_generator():
    with jax.enable_x64(True):
        expected = np.asarray(jdrop.dropout_mask(KEY, (2, 2, 9, 130), 0.3))
    np.testing.assert_array_equal(expected, jdrop.dropout_mask(KEY, (2, 2, 9, 130), 0.3))


@pytest.mark.parametrize("which", ["causal", "both", "masked"])
def test_the_mask_does_not_depend_on_what_is_seen(implementation, which):
    shape = (2, 2, 150, 150)
    options = {
        "causal": {"is_causal": True},
        "both": {"is_causal": True, "local_window_size": 20},
        "masked": {"mask": normal(0, 1, 2, 150, 150) > 1},
    }[which]
    seen = visible(shape, options.get("mask"), options.get("is_causal"), options.get("local_window_size"))
    shows(KEY, shape, 0.5, seen, implementation=implementation, **options)


# ---------------------------------------------------------------------------------- values and gradients


CASES = {  # batch, queries, keys, heads, key heads, width; options
    "one": ((1, 1, 1, 1, 1, 32), {}),
    "97": ((2, 97, 97, 4, 2, 64), {}),
    "128 of width 256": ((1, 128, 128, 2, 2, 256), {}),
    "257 causal": ((1, 257, 257, 4, 1, 32), {"causal": True}),
    "decoding": ((3, 1, 100, 4, 2, 128), {"key_lengths": [100, 1, 37]}),
    "128 and 257": ((1, 128, 257, 2, 2, 32), {"causal": True, "window": (40, 0)}),
    "257 and 97": ((1, 257, 97, 2, 1, 32), {"window": 30}),
    "257, a pair": ((1, 257, 257, 1, 1, 48), {"window": (5, 70)}),
    "lengths": ((3, 33, 40, 2, 2, 32), {"query_lengths": [33, 0, 7], "key_lengths": [40, 22, 0]}),
    "all at once": (
        (2, 60, 50, 4, 2, 32),
        {"causal": True, "window": (20, 3), "query_lengths": [55, 31], "key_lengths": [44, 50], "mask": (1, 4, 60, 50)},
    ),
}
NAMES = {
    "causal": "is_causal",
    "window": "local_window_size",
    "query_lengths": "query_seq_lengths",
    "key_lengths": "key_value_seq_lengths",
    "mask": "mask",
}


def agrees(arrays, implementation, rate=0.25, bias=None, scale=None, mask=None, which=slice(None), **seeing):
    """Require values and gradients of the formula, or ``which`` of them."""
    q, k, v, do = arrays
    seeing = {n: np.asarray(x, np.int32) if n.endswith("lengths") else x for n, x in seeing.items()}
    if mask is not None:
        seeing["mask"] = normal(9, *mask) > -1
    kept = np.asarray(jdrop.dropout_mask(KEY, scores(q, k), rate)) / (1 - rate)
    expected = formula(q, k, v, kept, seen=visible(scores(q, k), **seeing), bias=bias, scale=scale, do=do)
    options = {NAMES[n]: x for n, x in seeing.items()}
    options |= {"scale": scale, "implementation": implementation}
    f = quick(lambda *x: with_gradients(KEY, *x[:4], rate, *x[4:], **options)[which])
    close(f(*arrays, *([] if bias is None else [jnp.asarray(bias)])), expected[which])


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case):
    sizes, options = CASES[case]
    agrees(data(*sizes), "chunked", **options)


@pytest.mark.parametrize("case", ["97", "257 and 97", "lengths", "all at once"])
def test_values_and_gradients_of_the_reference(case):
    sizes, options = CASES[case]
    agrees(data(*sizes), "reference", **options)


@pytest.mark.parametrize("case", ["97", "all at once"])
def test_values_and_gradients_of_small_blocks(small_blocks, case):
    sizes, options = CASES[case]
    agrees(data(*sizes), "chunked", **options)


def test_a_long_sequence(monkeypatch):
    monkeypatch.setattr(_tiles, "BLOCK", 2**20)  # else it is one block
    _chunked.attend.clear_cache()
    agrees(data(1, 1025, 1025, 1, 1, 32), "chunked")


# All sixteen are cut in test_tiles.
BROADCASTS = [
    tuple(n if i >> axis & 1 else 1 for axis, n in enumerate((3, 4, 20, 30))) for i in (0, 1, 2, 4, 8, 5, 10, 15)
]


@pytest.mark.parametrize("shape", BROADCASTS, ids=str)
def test_bias_and_mask_broadcast(small_blocks, shape):
    """Bias over some axes, the mask over the others."""
    mask = tuple(n if one == 1 else 1 for one, n in zip(shape, (3, 4, 20, 30)))
    agrees(data(3, 20, 30, 4, 2, 32), "chunked", bias=normal(5, *shape), mask=mask, which=slice(None, None, 4))


@pytest.mark.parametrize("shape", [(4, 1, 30), ()], ids=str)
def test_bias_of_fewer_axes(implementation, shape):
    agrees(data(3, 20, 30, 4, 2, 32), implementation, bias=normal(5, *shape))


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_logits_may_be_large(implementation, shift):
    """A constant changes no softmax: what exp takes is counted from the largest logit."""
    q, k, v, _ = data(1, 20, 30, 2, 2, 32)
    found, expected = (
        attend(KEY, q, k, v, bias=jnp.full([30], b), implementation=implementation) for b in (shift, 0.0)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_logits_of_any_size(implementation, dtype):
    """Rows, columns or all of the logits far from 0: the softmax and all gradients stay exact.

    A logsumexp of such logits would swallow the logarithm of the sum, and with it the factor of a whole row: 30 for a
    padding row with finfo.min as its bias. All products are exact in float32, and next to 1e4 too.
    """
    q, k, v, do = (np.rint(4 * x.clip(-2, 2)) / 4 for x in data(2, 12, 30, 2, 1, 16))
    kept = np.asarray(jdrop.dropout_mask(KEY, scores(q, k), 0.5)) * 2
    f = quick(lambda *x: with_gradients(KEY, *x, implementation=implementation))
    bound = 2e-5 if dtype == "float32" else 2 * float(jnp.finfo(dtype).eps)
    lowest = {float(jnp.finfo(d).min) for d in (dtype, "float32")}
    for far in (0.0, -1e4, 1e4, -1e9, *lowest, -np.inf):
        for place in (np.s_[5:8], np.s_[:, 3:9], np.s_[:]):
            bias = np.zeros((12, 30), np.float32)
            bias[place] = far
            found = f(*(jnp.asarray(x, dtype) for x in (q, k, v, do)), jnp.float32(0.5), bias)
            close(found, formula(q, k, v, kept, bias=bias, do=do, logits=np.float32), bound)


def test_a_padding_row_does_not_change_the_gradients_of_others():
    """The default takes blocks from 65,536 scores on."""
    q, k, v, do = (jax.random.normal(jax.random.key(i), (1, 256, 1, 16)) for i in range(4))
    bias = jnp.zeros((256, 256)).at[5].set(jnp.finfo(jnp.float32).min)
    found = quick(lambda *x: with_gradients(KEY, *x[:4], 0.0, x[4]))(q, k, v, do, bias)
    close(found, formula(q, k, v, bias=bias, do=do, logits=np.float32))


def test_bias_beside_segments(small_blocks):
    agrees(data(1, 70, 60, 2, 2, 32), "chunked", bias=normal(5, 1, 1, 70, 60), causal=True)


def test_scale(implementation):
    arrays = q, k, v, do = data(2, 12, 10, 2, 2, 32)
    agrees(arrays, implementation, scale=-0.3)
    dot = lambda s, q, k, v: jnp.vdot(attend(KEY, q, k, v, scale=s, implementation=implementation), do)
    f = quick(jax.value_and_grad(dot))
    kept = np.asarray(jdrop.dropout_mask(KEY, (2, 2, 12, 10), 0.5)) * 2
    value = lambda s: np.vdot(formula(q, k, v, kept, scale=s), do)
    found = f(jnp.float32(0.2), q, k, v)
    np.testing.assert_allclose(found, (value(0.2), (value(0.2 + 1e-5) - value(0.2 - 1e-5)) / 2e-5), rtol=1e-4)


def test_arrays_without_batch(implementation):
    q, k, v, do = (x[0] for x in data(1, 12, 30, 4, 2, 32))
    bias, lengths = jnp.asarray(normal(4, 4, 1, 30)), np.array([25], np.int32)
    options = {"implementation": implementation, "key_value_seq_lengths": lengths, "mask": np.ones([4, 12, 1], bool)}
    f = quick(lambda *x: with_gradients(KEY, *x, bias=bias, **options))
    flat, whole = f(q, k, v, do), f(q[None], k[None], v[None], do[None])
    assert flat[0].shape == q.shape
    for a, b in zip(flat, whole, strict=True):
        np.testing.assert_array_equal(a, b.reshape(a.shape))


def test_numpy_arrays_pass(implementation):
    q, k, v, _ = data(1, 5, 7, 2, 1, 32)
    mask = normal(3, 5, 7) > 0
    options = {"mask": mask, "query_seq_lengths": np.array([4], np.uint8), "implementation": implementation}
    y = attend(KEY, q, k, v, bias=normal(5, 7), **options)
    np.testing.assert_array_equal(
        y, attend(KEY, *map(jnp.asarray, (q, k, v)), bias=jnp.asarray(normal(5, 7)), **options)
    )


@pytest.mark.parametrize("wide", [12, 2**31 - 1, 2**40])
def test_windows_as_wide_as_can_be(implementation, wide):
    q, k, v, _ = data(1, 9, 12, 1, 1, 32)
    for window, hidden in (
        ((wide, 0), {"causal": True}),
        ((0, wide), {"mask": np.arange(12) >= np.arange(9)[:, None]}),
    ):
        out = attend(None, q, k, v, train=False, local_window_size=window, implementation=implementation)
        close([out], [formula(q, k, v, seen=visible((1, 1, 9, 12), **hidden))])


# ---------------------------------------------------------------------------------- queries that see nothing


@pytest.mark.parametrize("mode", ["train", "traced rate of 1", "eval"])
def test_queries_that_see_nothing(implementation, mode):
    """Zeros, and zero gradients: by a mask, by lengths, by a bias of -inf, and by a window past the keys."""
    batch, queries, keys = 5, 24, 16
    q, k, v, do = data(batch, queries, keys, 2, 1, 32)
    shape = scores(q, k)
    mask, bias = np.ones((batch, 1, queries, keys), bool), normal(8, batch, 1, queries, keys)
    mask[0, 0, 3], mask[0, 0, 4, 1:] = False, False
    query_lengths, key_lengths = np.array([24, 9, 24, 24, 24]), np.array([16, 16, 0, 16, 16])
    bias[3, 0, 5], bias[3, 0, 6, 2:], bias[4, 0, :, 7] = -np.inf, -np.inf, -np.inf
    rate = {"train": 0.5, "traced rate of 1": 1.0}.get(mode, 0.0)
    kept = np.asarray(jdrop.dropout_mask(KEY, shape, rate)) / max(1 - rate, 0.5)
    seen = visible(shape, mask, False, (2, 0), query_lengths, key_lengths)
    expected = formula(q, k, v, kept, seen=seen, bias=bias, do=do)
    options = {
        "train": mode != "eval",
        "mask": mask,
        "query_seq_lengths": query_lengths,
        "key_value_seq_lengths": key_lengths,
        "local_window_size": (2, 0),
        "implementation": implementation,
    }
    traced = mode == "traced rate of 1"
    f = quick(lambda r, *x: with_gradients(KEY, *x[:4], r if traced else rate, x[4], **options))
    found = f(jnp.float32(rate), q, k, v, do, bias)
    close(found, expected)
    blind = ~np.swapaxes((seen & (bias > -np.inf)).any(-1), 1, 2)
    assert blind.any((1, 2)).all() and not blind.all((1, 2))[[0, 1, 3, 4]].any()
    for x in found[:2]:
        assert not np.asarray(x)[blind].any()
    assert not np.asarray(found[4])[~(seen & (bias > -np.inf)).any(1, keepdims=True)].any()


def test_what_comes_back_to_queries_that_see_nothing_is_not_read(implementation):
    """A norm after attention has a gradient of NaN at a row of zeros; queries and keys get none of it."""
    q, k, v, do = data(2, 24, 16, 2, 1, 32)
    do = np.where(np.arange(24)[:, None, None] < 9, do, np.nan).astype(np.float32)
    options = {"train": True, "query_seq_lengths": np.array([9, 9]), "implementation": implementation}
    found = quick(lambda *x: with_gradients(KEY, *x, 0.5, **options))(q, k, v, do)
    assert not np.asarray(found[1])[:, 9:].any() and all(np.isfinite(x).all() for x in found[:3])
    assert implementation == "reference" or np.isfinite(found[3]).all()  # value times a probability of 0 there


def test_a_bias_alone_hides_all_keys(implementation):
    q, k, v, do = data(1, 6, 5, 2, 1, 32)
    bias = normal(4, 6, 5)
    bias[2], bias[4, 1:] = -np.inf, -np.inf
    kept = np.asarray(jdrop.dropout_mask(KEY, (1, 2, 6, 5), 0.5)) * 2
    f = quick(lambda *x: with_gradients(KEY, *x, implementation=implementation))
    close(f(q, k, v, do, jnp.float32(0.5), bias), formula(q, k, v, kept, bias=bias, do=do))


# ---------------------------------------------------------------------------------- dtypes


def dense(q, k, v, factor):
    """What one would write without a library: logits and softmax in float32, the rest in the dtype of query."""
    wide = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    s = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
    p = (jax.nn.softmax(s) * jnp.asarray(factor, wide)).astype(q.dtype)
    return jnp.einsum("bnqk,bknh->bqnh", p, v)


@pytest.mark.parametrize(
    ("dtype", "batch", "spread"),
    [("bfloat16", 2, 1), ("float16", 2, 1), ("float32", 2, 1), ("float64", 2, 1), ("bfloat16", 1, 4)],
)
def test_errors_are_at_most_twice_those_of_a_dense_reference(implementation, dtype, batch, spread, x64):
    """``spread``: the standard deviation of logits; where it is large, few keys have all of the probability."""
    q, *others = data(batch, 100, 130, 2, 2, 64)
    arrays = [jnp.asarray(x).astype(dtype) for x in (spread * q, *others)]
    factor = np.asarray(jdrop.dropout_mask(KEY, (batch, 2, 100, 130), 0.25)) / 0.75
    truth = formula(*(np.asarray(x, np.float64) for x in arrays[:3]), factor, do=arrays[3])

    def errors(f):
        def both(q, k, v, do):
            out, pull = jax.vjp(f, q, k, v)
            return out, *pull(do)

        found = jax.jit(both)(*arrays)
        assert all(x.dtype == dtype for x in found)
        return [np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y) for x, y in zip(found, truth)]

    bounds = errors(lambda q, k, v: dense(q, k, v, factor))
    assert max(bounds) < {"bfloat16": 0.02, "float16": 0.003, "float32": 1e-6, "float64": 1e-14}[dtype]
    own = 1e-15 if dtype == "float64" else 0  # of the formula, which is in float64
    found = errors(lambda q, k, v: attend(KEY, q, k, v, 0.25, implementation=implementation))
    assert all(error <= 2 * bound + own for error, bound in zip(found, bounds)), (found, bounds)


def test_gradients_of_float16_are_as_large_as_its_range(implementation):
    """A loss is scaled until gradients come near it; divided by the keep probability they are beyond."""
    q, k, v, do = data(1, 40, 60, 1, 1, 32)
    v, do = v / 8, do * (np.arange(32) == 0)  # so that their products stay in range
    do = 6e4 / np.abs(do).max() * do
    kept = np.asarray(jdrop.dropout_mask(KEY, (1, 1, 40, 60), 0.5)) * 2
    f = quick(lambda *x: with_gradients(KEY, *x, implementation=implementation))
    found = f(*(x.astype(np.float16) for x in (q, k, v, do)))
    expected = formula(q, k, v, kept, do=do)
    assert np.abs(do).max() * 2 > np.finfo(np.float16).max > np.abs(expected[3]).max()
    close(found[1:], expected[1:], 0.01)


def test_bias_keeps_its_dtype(implementation):
    q, k, v, do = (x.astype(jnp.bfloat16) for x in data(1, 8, 9, 2, 2, 32))
    for dtype in (jnp.float32, jnp.bfloat16):
        f = lambda b: with_gradients(KEY, q, k, v, do, bias=b, implementation=implementation)
        assert jax.eval_shape(f, jnp.ones([9], dtype))[-1].dtype == dtype


# ---------------------------------------------------------------------------------- without dropout


def test_without_dropout_it_is_attention_of_jax(implementation):
    q, k, v, do = data(2, 30, 40, 4, 2, 32)
    lengths = np.array([40, 17], np.int32)
    options = {
        "bias": normal(7, 1, 4, 30, 40),
        "mask": normal(6, 30, 40) > -1,
        "is_causal": True,
        "local_window_size": (30, 4),
        "key_value_seq_lengths": lengths,
        "scale": 0.2,
    }
    seen = visible((2, 4, 30, 40), options["mask"], True, (30, 4), None, lengths)
    rows = np.swapaxes(seen.any(-1), 1, 2)
    assert rows.mean() > 0.9
    do = do * rows[..., None]
    ours = lambda q, k, v: attend(None, q, k, v, train=False, implementation=implementation, **options)
    theirs = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **options)

    @quick
    def both(q, k, v, do):
        pairs = [jax.vjp(f, q, k, v) for f in (ours, theirs)]
        return [(out, *pull(do)) for out, pull in pairs]

    found, expected = both(*map(jnp.asarray, (q, k, v, do)))
    close([np.asarray(found[0])[rows]], [np.asarray(expected[0])[rows]])
    close(found[1:], [np.asarray(x) for x in expected[1:]])


def test_no_key_is_needed_or_read_without_dropout(implementation):
    """A rate of 0 is the program of evaluation: what holds for one holds for the other."""
    arrays = data(2, 20, 20, 2, 1, 32)
    texts = set()
    for key, rate, train in ((None, 0.5, False), (KEY, 0.5, False), (None, 0, True), (None, np.zeros([20, 1]), True)):
        options = {"train": train, "is_causal": True, "bias": jnp.zeros([20]), "implementation": implementation}
        f = lambda *x, key=key, rate=rate, o=options: with_gradients(key, *x, rate, **o)
        texts.add(jax.jit(f).lower(*arrays).as_text())
    (text,) = texts
    with_mask = jax.jit(lambda *x: with_gradients(KEY, *x, 0.5, **options)).lower(*arrays).as_text()
    for constant in ("466688986", "2146121005"):  # of Threefry, and of the mix of columns
        assert constant in with_mask and constant not in text


# ---------------------------------------------------------------------------------- the rate


def test_traced_rates(implementation):
    arrays = q, k, v, do = data(1, 12, 30, 2, 1, 32)
    traces = []

    @quick
    def f(rate, *x):
        traces.append(rate)
        return with_gradients(KEY, *x, rate, jnp.zeros([30]), implementation=implementation)

    for rate in (0.5, 0.25, 0.0, 1.0, -0.3, 1.7):
        clipped = min(max(rate, 0.0), 1.0)
        kept = np.asarray(jdrop.dropout_mask(KEY, (1, 2, 12, 30), clipped)) / max(1 - clipped, 0.1)
        found = f(jnp.float32(rate), *arrays)
        close(found, formula(q, k, v, kept, bias=np.zeros(30), do=do))
        assert rate < 1 or not any(np.asarray(x).any() for x in found)
    assert np.isnan(f(jnp.float32(np.nan), *arrays)[0]).all()
    assert len(traces) == 1
    for same in (jnp.float32(0.0), jnp.float32(-1.0)):
        np.testing.assert_allclose(f(same, *arrays)[0], attend(None, q, k, v, train=False), rtol=1e-5, atol=1e-6)


def test_a_concrete_rate_of_one(implementation):
    q, k, v, do = data(1, 6, 7, 2, 1, 32)
    f = quick(lambda *x: with_gradients(KEY, *x, 1, jnp.zeros([7]), implementation=implementation))
    for x in f(q, k, v, do):
        assert not np.asarray(x).any()


def test_no_gradient_flows_to_the_rate(implementation):
    q, k, v, do = data(1, 6, 7, 2, 1, 32)
    f = lambda rate, *x: jnp.vdot(attend(KEY, *x, rate, implementation=implementation), do)
    assert not quick(jax.grad(f))(jnp.full([2, 6, 1], 0.3), q, k, v).any()


# ---------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("small", [False, True])
def test_a_key_for_each_example_under_vmap(implementation, small, request):
    if small:
        request.getfixturevalue("small_blocks")
    keys = jax.random.split(KEY, 3)
    shape = (2, 4, 20, 30)
    v = np.broadcast_to(np.eye(30, dtype=np.float32)[:, None], (2, 30, 2, 30))
    q, k = np.zeros((2, 20, 4, 30), np.float32), np.zeros((2, 30, 2, 30), np.float32)
    f = lambda q, k, key, rate: attend(key, q, k, v, rate, implementation=implementation)
    expected = [jdrop.dropout_mask(key, shape, 0.5) for key in keys]
    found = quick(jax.vmap(f, in_axes=(None, None, 0, None)))(q, k, keys, jnp.float32(0.5))
    np.testing.assert_array_equal(np.moveaxis(found != 0, 3, 2), expected)
    if not small:  # the words of one key, more and more of them dropped
        rates = jnp.array([0.0, 0.3, 0.9])
        expected = [jdrop.dropout_mask(KEY, shape, rate) for rate in rates]
        found = quick(jax.vmap(f, in_axes=(None, None, None, 0)))(q, k, KEY, rates)
        np.testing.assert_array_equal(np.moveaxis(found != 0, 3, 2), expected)


def test_vmap_over_everything(implementation):
    keys, rates = jax.random.split(KEY, 3), jnp.array([0.2, 0.5, 0.7])
    arrays = [normal(i, 3, *x.shape) for i, x in enumerate(data(1, 12, 20, 2, 1, 32))]
    bias, mask, lengths = normal(7, 3, 1, 20), normal(8, 3, 12, 20) > -1, np.array([[20], [3], [0]], np.int32)

    def f(key, rate, q, k, v, do, bias, mask, lengths):
        options = {"mask": mask, "key_value_seq_lengths": lengths, "implementation": implementation}
        return with_gradients(key, q, k, v, do, rate, bias, **options)

    operands = (keys, rates, *arrays, bias, mask, lengths)
    found = quick(jax.vmap(f))(*operands)
    one = quick(f)
    for i in range(3):
        want = one(*(x[i] for x in operands))
        close([x[i] for x in found], [np.asarray(x, np.float64) for x in want])


def test_one_query_meets_many_keys_under_vmap(implementation):
    """Values and bias alone are mapped: the mask is the same for each."""
    q, k, v, _ = data(1, 12, 20, 2, 2, 32)
    values, biases = normal(3, 3, *v.shape), normal(4, 3, 20)
    f = lambda q, k, v, b: attend(KEY, q, k, v, bias=b, implementation=implementation)
    found = quick(jax.vmap(f, in_axes=(None, None, 0, 0)))(q, k, values, biases)
    close([found[2]], [np.asarray(f(q, k, values[2], biases[2]), np.float64)])


def test_jit_is_eager(implementation):
    arrays = data(2, 20, 140, 2, 2, 32)
    f = lambda *x: with_gradients(KEY, *x, implementation=implementation)
    for a, b in zip(jax.jit(f)(*arrays), f(*arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_second_derivatives(implementation):
    q, k, v, do = data(1, 6, 8, 2, 1, 8)
    bias = normal(5, 6, 8)
    seen = np.arange(8) <= np.arange(6)[:, None]
    kept = np.asarray(jdrop.dropout_mask(KEY, (1, 2, 6, 8), 0.5), np.float32) * 2

    def library(q, k, v, bias):
        return attend(KEY, q, k, v, bias=bias, is_causal=True, implementation=implementation)

    def plain(q, k, v, bias):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        s = jnp.einsum("bqnh,bknh->bnqk", q, k) * 8**-0.5 + bias[None, None]
        p = jax.nn.softmax(jnp.where(seen, s, -jnp.inf)) * kept
        return jnp.einsum("bnqk,bknh->bqnh", p, v)

    def second(f):
        def first(*x):
            return sum(jnp.vdot(g, jnp.cos(g)) for g in jax.grad(lambda *x: jnp.vdot(f(*x), do), (0, 1, 2, 3))(*x))

        return jax.grad(first, (0, 1, 2, 3))

    found, expected = quick(lambda *x: (second(library)(*x), second(plain)(*x)))(q, k, v, bias)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_checkpoint_and_scan_over_layers(implementation):
    keys, x = jax.random.split(KEY, 3), normal(0, 1, 20, 2, 32)

    def layer(x, key):
        return jnp.tanh(x + attend(key, x, jnp.cos(x), x, is_causal=True, implementation=implementation))

    def scanned(x):
        return jax.lax.scan(jax.checkpoint(lambda x, key: (layer(x, key), None)), x, keys)[0].sum()

    def looped(x):
        for i in range(3):
            x = layer(x, keys[i])
        return x.sum()

    found, expected = (quick(jax.value_and_grad(f))(x) for f in (scanned, looped))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------- which implementation


@pytest.fixture
def chosen(monkeypatch):
    """Return a function that tells what implementation a call without one takes."""
    made = []
    for name, module in (("chunked", _chunked), ("reference", _dense)):
        monkeypatch.setattr(module, "attend", lambda problem, q, *_, name=name: made.append(name) or q)

    def choose(queries, keys, key=KEY, rate=0.5, **options):
        q, k, v, _ = data(1, queries, keys, 2, 2, 8)
        attend(key, q, k, v, rate, **options)
        return made.pop()

    return choose


def test_the_choice_is_by_the_size_of_the_scores(chosen):
    assert chosen(256, 256) == "chunked" and chosen(256, 255) == "reference"
    assert chosen(1, 65536) == "chunked" and chosen(1, 65535) == "reference"
    assert chosen(256, 256, None, train=False) == "chunked"
    assert chosen(256, 256, implementation="reference") == "reference"
    assert chosen(2, 2, implementation="chunked") == "chunked"


def test_the_choice_serves_every_call(chosen):
    assert chosen(256, 256, rate=np.full([256], 0.5)) == "reference"
    assert chosen(256, 256, rate=np.full([256, 1], 0.5)) == "chunked"
    assert chosen(256, 256, rate=np.zeros([256])) == "chunked"
    rbg = jax.random.key(0, impl="rbg")
    assert chosen(256, 256, rbg) == "chunked"
    assert chosen(256, 256, rbg, generator="jax") == "reference"
    assert chosen(256, 256, rbg, generator="jax", train=False) == "chunked"
    assert chosen(256, 256, generator="jax") == "chunked"


@pytest.mark.parametrize("sizes", [(0, 5, 5, 2, 2, 8), (2, 0, 5, 2, 2, 8), (2, 5, 0, 2, 2, 8), (1, 5, 5, 0, 1, 8)])
def test_sizes_of_zero(sizes):
    q, k, v, do = data(*sizes)
    out, *gradients = quick(lambda *x: with_gradients(KEY, *x))(q, k, v, do)
    assert out.shape == q.shape and not np.asarray(out).any()
    assert all(not np.asarray(g).any() for g in gradients)
    with pytest.raises(NotImplementedError, match='"reference" for sizes that are 0 or symbolic, got'):
        attend(KEY, q, k, v, implementation="chunked")


def test_export_with_a_symbolic_batch():
    batch, *_ = jax.export.symbolic_shape("b, 256, 2, 8")
    argument = jax.ShapeDtypeStruct((batch, 256, 2, 8), jnp.float32)
    f = lambda q, k, v: attend(KEY, q, k, v, is_causal=True)
    exported = jax.export.export(jax.jit(f))(argument, argument, argument)
    q, k, v, _ = data(3, 256, 256, 2, 2, 8)
    np.testing.assert_allclose(exported.call(q, k, v), f(q, k, v), rtol=1e-4, atol=1e-5)


def test_it_lowers_for_gpus_and_tpus(implementation):
    arrays = data(2, 256, 256, 4, 2, 64)
    f = lambda *x: with_gradients(KEY, *x, bias=jnp.zeros([256, 256]), is_causal=True, implementation=implementation)
    assert "stablehlo" in jax.jit(f).trace(*arrays).lower(lowering_platforms=("cuda", "tpu")).as_text()


# ---------------------------------------------------------------------------------- errors


Q, K = jnp.ones([2, 8, 4, 16]), jnp.ones([2, 10, 2, 16])
CHOICE = 'implementation must be "reference" for '


def call(q=Q, k=K, v=None, rate=0.5, key=KEY, **options):
    return lambda: attend(key, q, k, k if v is None else v, rate, **options)


@pytest.mark.parametrize(
    ("f", "error", "text"),
    [
        (call(q=[1.0]), TypeError, "query must be an array, got [1.0]; convert it with jnp.asarray"),
        (call(q=KEY), TypeError, "query must be float16, bfloat16, float32, float64, got key<fry>[]; pass key first"),
        (call(k=K.astype(int)), TypeError, "key must be float16, bfloat16, float32, float64, got int32[2,10,2,16];"),
        (call(v=K.astype(complex)), TypeError, "value must be float16, bfloat16, float32, float64, got complex64["),
        (
            call(q=Q[0, 0]),
            ValueError,
            "query must be [batch, length, heads, width] or [length, heads, width], got float32[4,16]; reshape it",
        ),
        (call(k=K[None]), ValueError, "key must be [batch, length, heads, width] or [length, heads, width], got"),
        (
            call(v=K.astype("bfloat16")),
            TypeError,
            "query, key and value must have one dtype, got float32, float32 and bfloat16; convert them",
        ),
        (call(q=Q.astype("bfloat16")), TypeError, "query, key and value must have one dtype, got bfloat16, float32"),
        (
            call(v=K[..., :8]),
            ValueError,
            "value must have the shape of key, (2, 10, 2, 16), got (2, 10, 2, 8); give each key a value of the same",
        ),
        (
            call(k=K[:1]),
            ValueError,
            "key must have batch and width of query, (2, 8, 4, 16), got (1, 10, 2, 16); project them alike",
        ),
        (call(k=K[..., :8]), ValueError, "key must have batch and width of query, (2, 8, 4, 16), got (2, 10, 2, 8);"),
        (call(q=Q[0]), ValueError, "key must have batch and width of query, (8, 4, 16), got (2, 10, 2, 16);"),
        (
            call(q=Q[:, :, :3]),
            ValueError,
            "key must have a number of heads that divides query's, got 2 for 3; group query heads evenly",
        ),
        (call(k=K[:, :, :0]), ValueError, "key must have a number of heads that divides query's, got 0 for 4;"),
        (
            call(bias=jnp.ones([10, 8])),
            ValueError,
            "bias must broadcast to [batch, heads, queries, keys] = (2, 4, 8, 10), got shape (10, 8); give it these",
        ),
        (call(bias=1.0), TypeError, "bias must be an array, got 1.0; convert it with jnp.asarray"),
        (call(bias=jnp.ones(10, int)), TypeError, "bias must be floating, got int32[10]; convert it"),
        (
            call(mask=jnp.ones([1, 2, 4, 8, 10], bool)),
            ValueError,
            "mask must broadcast to [batch, heads, queries, keys] = (2, 4, 8, 10), got shape (1, 2, 4, 8, 10);",
        ),
        (call(mask=jnp.ones(10)), TypeError, "mask must be bool, got float32[10]; pass x != 0"),
        (call(query_seq_lengths=jnp.ones(2)), TypeError, "query_seq_lengths must be an integer array, got float32[2];"),
        (call(query_seq_lengths=[1, 2]), TypeError, "query_seq_lengths must be an integer array, got [1, 2]; convert"),
        (
            call(key_value_seq_lengths=jnp.ones(3, int)),
            ValueError,
            "key_value_seq_lengths must have shape (2,), got (3,); pass one an example",
        ),
        (call(key_value_seq_lengths=KEY), TypeError, "key_value_seq_lengths must be an integer array, got key<fry>[]"),
        (call(is_causal=1), TypeError, "is_causal must be a bool, got 1; pass is_causal=True or False"),
        (
            lambda: jax.jit(lambda c: call(is_causal=c)())(True),
            TypeError,
            "is_causal must be static, got a traced value; list is_causal in static_argnames",
        ),
        (call(local_window_size=-1), ValueError, "local_window_size must be at least 0, got -1; pass a larger int"),
        (call(local_window_size=(3, -2)), ValueError, "local_window_size must be at least 0, got -2;"),
        (call(local_window_size=2.0), TypeError, "local_window_size must be an integer, got 2.0; pass a Python int"),
        (call(local_window_size=(1, 2, 3)), TypeError, "local_window_size must be an integer, got (1, 2, 3);"),
        (call(scale="1"), TypeError, "scale must be a number, got '1'; pass a Python float"),
        (call(scale=True), TypeError, "scale must be a number, got True; pass a Python float"),
        (call(scale=jnp.ones(2)), ValueError, "scale must broadcast to shape (), got shape (2,);"),
        (call(scale=jnp.int32(2)), TypeError, "scale must be float16, bfloat16, float32, float64, got int32[]"),
        (call(scale=np.nan), ValueError, "scale must be finite, got nan; pass a number within the limits"),
        (call(scale=-np.inf), ValueError, "scale must be finite, got -inf; pass a number within the limits"),
        (
            call(implementation="flash"),
            ValueError,
            "implementation must be 'reference' or 'chunked', got 'flash'; pick one of them",
        ),
        (call(key=None), TypeError, "prng_key must be a PRNG key when something is dropped, got None; pass a key, or"),
        (call(key=jax.random.split(KEY)), ValueError, "prng_key must be one key, got a batch of shape (2,); use jax.v"),
        (call(key=Q), TypeError, "prng_key must be a PRNG key, got float32[2,8,4,16]; make one with jax.random.key"),
        (call(key=K, train=False), TypeError, "prng_key must be a PRNG key, got float32[2,10,2,16]"),
        (call(rate=1.5), ValueError, "rate must lie in [0, 1], got 1.5; pass the probability of dropping"),
        (call(rate=jnp.ones([8])), ValueError, "rate must broadcast to the mask's shape (2, 4, 8, 10), got shape (8,)"),
        (
            call(rate=np.ones([4, 1, 1]), shared_axes=1),
            ValueError,
            "rate must broadcast to the mask's shape (2, 1, 8, 10), got shape (4, 1, 1); give it these sizes or 1",
        ),
        (call(shared_axes=4), ValueError, "shared_axes must be axes of an array with 4 axes, got 4; use axes from -4"),
        (call(generator="torch"), ValueError, "generator must be 'fast' or 'jax', got 'torch'; pick one of them"),
        (call(train=1), TypeError, "train must be a bool, got 1; pass train=True or False"),
        (
            call(rate=np.full([10], 0.5), implementation="chunked"),
            NotImplementedError,
            CHOICE + "a rate that differs from key to key, got 'chunked'; pass \"reference\"",
        ),
        (
            call(key=jax.random.key(0, impl="rbg"), generator="jax", implementation="chunked"),
            NotImplementedError,
            CHOICE + "a key whose bits do not go by index, got 'chunked'; pass \"reference\"",
        ),
        (
            call(q=Q[:, :0], implementation="chunked", train=False),
            NotImplementedError,
            CHOICE + "sizes that are 0 or symbolic, got 'chunked'; pass \"reference\"",
        ),
    ],
)
def test_errors(f, error, text):
    with pytest.raises(error) as found:
        f()
    assert str(found.value).startswith("dot_product_attention: " + text)


def test_the_first_five_arguments_go_by_position():
    with pytest.raises(TypeError, match="positional-only"):
        jdrop.dot_product_attention(KEY, Q, key=K, value=K, rate=0.5, train=True)
    with pytest.raises(TypeError, match="train"):
        jdrop.dot_product_attention(KEY, Q, K, K, 0.5)


def test_forward_mode_of_chunked_is_an_error():
    f = lambda q, i: attend(KEY, q, K, K, implementation=i)
    jax.jvp(lambda q: f(q, "reference"), (Q,), (Q,))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: f(q, "chunked"), (Q,), (Q,))


@pytest.mark.parametrize("rate", [1.0, jnp.float32(1)])
def test_rate_one_gives_zeros_also_for_values_whose_sum_overflows(implementation, rate):
    q = jnp.ones((1, 4, 2, 8))
    options = {"train": True, "implementation": implementation}
    y = jdrop.dot_product_attention(KEY, q, q, jnp.full_like(q, 3e38), rate, **options)
    np.testing.assert_array_equal(y, jnp.zeros_like(q))


def test_x64_with_what_is_over_scores(implementation, x64):
    """Indices of 64 bits are the default then."""
    q, k, v, _ = data(2, 20, 40, 2, 2, 32)
    bias, mask = normal(1, 1, 2, 20, 40), normal(2, 2, 1, 20, 40) > -1
    rates = np.full((1, 1, 20, 1), 0.3, np.float32)
    factor = np.asarray(jdrop.dropout_mask(KEY, (2, 2, 20, 40), 0.3)) / 0.7
    expected = formula(q, k, v, factor, seen=mask, bias=bias)
    close([attend(KEY, q, k, v, rates, bias=bias, mask=mask, implementation=implementation)], [expected])
    f = lambda bias: attend(KEY, q, k, v, rates, bias=bias, mask=mask, implementation=implementation).sum()
    do = np.ones_like(expected)
    close([jax.grad(f)(jnp.asarray(bias))], [formula(q, k, v, factor, seen=mask, bias=bias, do=do)[-1]])
