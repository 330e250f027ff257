"""The chunked implementation of attention: what it stores, and what it does not depend on."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_formula import QUICK, close, normal, quick, shows, use_plan, visible
from test_sharding import largest

import jdrop
from jdrop import _chunked, _scores, _tiles

KEY = jax.random.key(51)
PLANS = {  # rows, segment, segments, scores
    "one query": (1, 1, 2, 1),
    "a few queries": (48, 32, 3, 1),
    "some heads": (512, 16, 8, 3 * 40 * 50),
    "all": (512, 128, 8, 2**25),
}


def attend(q, k, v, rate=0.5, **options):
    return jdrop.dot_product_attention(KEY, q, k, v, rate, train=True, implementation="chunked", **options)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_mask_does_not_depend_on_the_plan(plan, causal, monkeypatch):
    """Batch and key heads are 6: two parts that a block holds, for the devices, and three turns of the loop."""
    shape = (6, 12, 40, 50)
    with monkeypatch.context() as patch:
        use_plan(patch, *PLANS[plan])
        seen = visible(shape, causal=True) if causal else None
        shows(KEY, shape, 0.5, seen, key_heads=6, implementation="chunked", is_causal=causal)
    _chunked.attend.clear_cache()


def test_the_mask_of_more_than_a_thousand_queries(monkeypatch):
    monkeypatch.setattr(_tiles, "BLOCK", 2**20)  # else they are one block
    _chunked.attend.clear_cache()
    shows(KEY, (1, 1, 1025, 1025), 0.5, implementation="chunked")


def compiled_gradient(length, wrt=(0, 1, 2), bias=None, **options):
    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    f = lambda q, k, v, b: attend(q, k, v, bias=b, **options).sum()
    return jax.jit(jax.grad(f, wrt)).lower(x, x, x, bias).compile(compiler_options=QUICK)


@pytest.fixture
def one_device(monkeypatch):
    """Of eight, which would share the heads of a block."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    _chunked.attend.clear_cache()
    yield
    _chunked.attend.clear_cache()


def test_memory_is_linear_in_length(one_device):
    small, large = (compiled_gradient(n) for n in (4096, 8192))
    sizes = [c.memory_analysis().temp_size_in_bytes for c in (small, large)]
    assert sizes[1] <= 2.2 * sizes[0]
    for compiled, length in ((small, 4096), (large, 8192)):
        assert largest(compiled.as_text()) <= 512 * length + 2**21 < length**2


@pytest.mark.parametrize(
    ("length", "dtype", "most"),
    [(700, "float32", 1.02), (2048, "float32", 1.02), (4096, "float32", 1.02), (2048, "bfloat16", 1.25)],
)
@pytest.mark.parametrize("backward", [False, True])
def test_dropout_takes_no_memory(one_device, length, dtype, most, backward):
    """What is kept takes the place of probabilities: in float32 no more scores are held than at rate 0, and in bfloat16
    half an array more, of what is kept, beside two and a half."""
    x = jax.ShapeDtypeStruct((1, length, 2, 16), dtype)

    def bytes_of(rate):
        f = lambda *x: attend(*x, rate).sum()
        compiled = jax.jit(jax.grad(f, (0, 1, 2)) if backward else f).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_of(0.5) <= most * bytes_of(0.0)


@pytest.mark.parametrize(("length", "scores", "most"), [(4096, 9.4e6, 1.3), (8192, 36e6, 2)])
def test_segments_take_turns_in_memory(one_device, length, scores, most):
    """Those abreast hold at most as many scores as a block of the full attention, but may overlap with the next."""
    bytes_of = lambda **options: compiled_gradient(length, **options).memory_analysis().temp_size_in_bytes
    full = bytes_of()
    assert bytes_of(is_causal=True) <= most * full < 3 * 4 * scores / 2  # all at once, in three arrays
    assert bytes_of(local_window_size=(length // 8, length // 8)) <= 1.5 * full


def test_segments_abreast_are_few(one_device):
    """They have 2^22 scores, in three arrays of four bytes each."""
    for options in ({"is_causal": True}, {"local_window_size": (256, 256)}):
        compiled = compiled_gradient(2048, **options)
        assert compiled.memory_analysis().temp_size_in_bytes <= 1.1 * 3 * 4 * 2**22


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=str)
def test_layers_hold_no_scores_for_the_backward_pass(one_device, rate, options):
    """Where no loop is left that takes the gradient of out, nothing else would keep XLA from making them early."""
    x = jax.ShapeDtypeStruct((1, 512, 2, 32), jnp.float32)

    def bytes_of(layers):
        def f(x):
            for _ in range(layers):
                x = jnp.tanh(attend(x, x, x, rate, **options))
            return x.sum()

        compiled = jax.jit(jax.grad(f)).lower(x).compile(compiler_options=QUICK)
        return compiled.memory_analysis().temp_size_in_bytes

    scores, one = 2 * 512 * 512 * 4, 512 * 2 * 32 * 4
    assert (bytes_of(6) - bytes_of(2)) / 4 <= 6 * one < scores / 2


@pytest.mark.parametrize(("causal", "backward"), [(False, False), (True, False), (False, True)])
def test_many_masks_over_the_same_scores_share_them(monkeypatch, causal, backward):
    """Logits and exponentials are made once for all keys of a vmap; forward also by segments that wait for one another,
    backward where a loop takes the gradient of out."""
    arrays = normal(0, 3, 16, 64, 1, 16)

    def exponentials(count):
        def f(key):
            options = {"train": True, "is_causal": causal, "implementation": "chunked"}
            attend = lambda *x: jdrop.dot_product_attention(key, *x, 0.5, **options)
            return jax.grad(lambda *x: jnp.sum(attend(*x) ** 2), (0, 1, 2))(*arrays) if backward else attend(*arrays)

        compiled = quick(jax.vmap(f)).lower(jax.random.split(KEY, count)).compile()
        return compiled.cost_analysis()["transcendentals"]

    with monkeypatch.context() as patch:
        use_plan(patch, 16, segment=16, scores=1)
        assert exponentials(16) == exponentials(1) > 0
    _chunked.attend.clear_cache()


def test_second_derivatives_through_segments_in_turn(monkeypatch):
    arrays = [jnp.asarray(x) for x in normal(0, 3, 1, 40, 2, 16)]

    def second(implementation):
        f = lambda *x: jnp.sin(
            jdrop.dot_product_attention(KEY, *x, 0.5, train=True, is_causal=True, implementation=implementation)
        ).sum()
        g = lambda *x: sum(jnp.sum(d**2) for d in jax.grad(f, (0, 1, 2))(*x))
        return quick(jax.grad(g, (0, 1, 2)))(*arrays)

    with monkeypatch.context() as patch:
        use_plan(patch, 8, segment=8, scores=1)
        close(second("chunked"), [np.asarray(x, np.float64) for x in second("reference")])
    _chunked.attend.clear_cache()


def test_what_is_kept_for_the_backward_pass():
    """Queries, keys, values, out, two numbers for each query, and of the mask its seed and rate alone."""
    q, k, v = (jnp.asarray(normal(i, 2, 200, n, 32)) for i, n in ((0, 4), (1, 2), (2, 2)))

    def bytes_kept(rate, **options):
        f = lambda q, k, v, r: jax.vjp(lambda q, k, v: attend(q, k, v, r, **options), q, k, v)[1]
        pull = f(q, k, v, rate) if isinstance(rate, float) else jax.eval_shape(f, q, k, v, rate)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pull))

    without = q.nbytes + k.nbytes + v.nbytes + q.nbytes + 2 * 4 * 2 * 4 * 200
    assert bytes_kept(0.0) == bytes_kept(0.0, is_causal=True) == without
    assert bytes_kept(jnp.float32(0.5)) == bytes_kept(0.5) == without + 2 * 4 + 4
    assert bytes_kept(jnp.full([2, 1, 200, 1], 0.5)) == without + 2 * 4 + 2 * 200 * 4


@pytest.mark.parametrize(
    ("dtype", "scale", "moves"),
    [("float32", 0.3, True), ("bfloat16", -0.125, True), ("bfloat16", 0.3, False), ("float16", 0.125, False)],
)
def test_the_scale_goes_into_queries_where_that_rounds_as_little(dtype, scale, moves):
    q = jnp.asarray(normal(0, 1, 300, 1, 16), dtype)
    exact = np.asarray(q, np.float64) * np.float64(np.float32(scale))
    plan, scaled = _chunked._scale_queries(_tiles.plan(_scores.Problem(scale, False, None, False, None), q, q), q)
    assert plan.problem.scale == (1.0 if moves else scale) and scaled.dtype == q.dtype
    np.testing.assert_allclose(np.asarray(scaled, np.float64), exact if moves else q, rtol=2**-24)


def test_the_sums_for_gradients_are_exact_on_every_platform():
    """On a GPU, products of float32 are rounded to 10 bits by default; this sum is no product that a user sees."""
    x = normal(0, 1, 300, 1, 16)
    text = jax.jit(jax.grad(lambda x: attend(x, x, x).sum())).lower(x).as_text()
    sums = [line for line in text.splitlines() if "dot_general" in line and "batching_dims = [0, 1, 2]" in line]
    assert len(sums) == 1 and "precision = [HIGHEST, HIGHEST]" in sums[0]


def test_the_gradient_of_bias_is_made_on_demand():
    bias = jax.ShapeDtypeStruct((2, 4096, 4096), jnp.float32)

    def written(wrt):
        lines = compiled_gradient(4096, wrt, bias).as_text().splitlines()
        return [line for line in lines if re.search(r"= f32\[[\d,]*4096,4096\]\S* dynamic-update-slice", line)]

    assert written((0, 1, 2, 3)) and not written((0, 1, 2))


def test_layers_of_a_scan_keep_no_mask():
    keys = jax.random.split(KEY, 3)

    def layer(x, key):
        y = jdrop.dot_product_attention(key, x, x, x, 0.5, train=True, implementation="chunked")
        return jnp.tanh(x + y), None

    f = jax.grad(lambda x: jax.lax.scan(layer, x, keys)[0].sum())
    text = jax.jit(f).lower(normal(0, 1, 300, 2, 16)).compile(compiler_options=QUICK).as_text()
    assert "[3,1,300,2,16]" in text and largest(text) <= 2 * 300 * 300


def test_layers_of_a_scan_keep_no_index_for_the_bits_of_jax():
    """An index that does not depend on the key would be made before the loop, and stored: 8 bytes a score."""
    keys = jax.random.split(KEY, 3)

    def bytes_of(generator):
        def layer(x, key):
            options = {"train": True, "generator": generator, "implementation": "chunked"}
            return jnp.tanh(x + jdrop.dot_product_attention(key, x, x, x, 0.5, **options)), None

        f = jax.grad(lambda x: jax.lax.scan(layer, x, keys)[0].sum())
        compiled = jax.jit(f).lower(normal(0, 1, 300, 2, 16)).compile(compiler_options=QUICK)
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_of("jax") <= bytes_of("fast") + 300 * 300 * 4
