"""Blockwise attention in its form for GPUs, on a CPU: in bfloat16, matrix products end with rounded exponentials."""

import re

import attention_suite
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import KEY, data, formula, mask_factor, quick, visible

import jdrop
from jdrop._platform import PLATFORMS

SCORES = (2, 4, 20, 15)
RNG = np.random.default_rng(5)
OPTIONS = [
    {},
    {"is_causal": True},
    {"local_window_size": (5, 2), "scale": -0.3},
    {"key_value_seq_lengths": np.array([9, 15]), "query_seq_lengths": np.array([20, 11]), "scale": 0.25},
    {"mask": RNG.random((2, 4, 20, 15)) < 0.5, "scale": 1e-3},
]


def both(arrays, **options):
    """Return output and gradients, by the library and by the formula."""

    @quick
    def run(q, k, v, do):
        attend = lambda q, k, v, bias: jdrop.dot_product_attention(KEY, q, k, v, 0.25, train=True, **chunked)
        return attention_suite.gradients(attend, q, k, v, do)

    chunked = {**options, "implementation": "chunked"}
    scale = options.pop("scale", None)
    exact = [np.asarray(x, np.float64) for x in arrays]
    seen = visible(SCORES, **options)
    expected = formula(*exact, mask_factor(KEY, SCORES, 0.25), seen=seen, scale=scale)
    return [np.asarray(x, np.float64) for x in run(*arrays)], expected, seen


def bfloat16(*arrays):
    return [jnp.asarray(x, jnp.bfloat16) for x in arrays]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "none")
def test_values_and_gradients_are_those_of_the_formula(options, use_on_cpu):
    use_on_cpu(PLATFORMS["cuda"])
    results, expected, seen = both(bfloat16(*data()), **options)
    for x, y in zip(results, expected, strict=True):
        assert np.linalg.norm(x - y) <= 0.012 * np.linalg.norm(y)
    blind = ~seen.any(-1).swapaxes(1, 2)
    assert not results[0][blind].any() and not results[1][blind].any()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 30.0, -300.0, 900.0])
def test_logits_of_any_size(scale, use_on_cpu):
    """All products are exact, and logits of up to 14,400 too far apart for the rounded maximum to matter."""
    use_on_cpu(PLATFORMS["cuda"])
    arrays = bfloat16(*(np.rint(2 * x.clip(-1, 1)) / 2 for x in data()))
    results, expected, _ = both(arrays, scale=scale)
    for x, y in zip(results, expected, strict=True):
        assert np.linalg.norm(x - y) <= 0.012 * np.linalg.norm(y) + 1e-6 * abs(scale)


def test_logits_beyond_all_bounds_stay_finite(use_on_cpu):
    """The largest ones count as equal, and the others have no weight."""
    use_on_cpu(PLATFORMS["cuda"])
    (out, *gradients), *_ = both(bfloat16(*data()), scale=1e30)
    assert np.isfinite(out).all() and out.any() and np.isfinite(gradients[2]).all()


def test_forward_mode_and_vmap_over_keys(use_on_cpu):
    use_on_cpu(PLATFORMS["cuda"])
    q, k, v, do = bfloat16(*data())
    attend = lambda key, q: jdrop.dot_product_attention(key, q, k, v, 0.25, train=True, implementation="chunked")
    _, tangent = quick(lambda q, t: jax.jvp(lambda q: attend(KEY, q), (q,), (t,)))(q, do)
    slope = lambda key: jax.vjp(lambda q: attend(key, q), q)[1](do)[0]
    backward = quick(slope)(KEY)
    forward = np.vdot(np.asarray(tangent, np.float64), np.asarray(do, np.float64))
    np.testing.assert_allclose(
        forward, np.vdot(np.asarray(backward, np.float64), np.asarray(do, np.float64)), rtol=0.05
    )
    mapped = quick(jax.vmap(slope))(jnp.stack([KEY, jax.random.key(1)]))
    np.testing.assert_allclose(mapped[0].astype("float32"), backward.astype("float32"), atol=0.02)


# ---------------------------------------------------------------------------------- the choice


def program(platform, *, length=256, dtype="bfloat16", bias=False, batch=1):
    x = jax.ShapeDtypeStruct((batch, length, 2, 64), dtype)

    def loss(q, k, v):
        added = jnp.zeros((length, length), "float32") if bias else None
        y = jdrop.dot_product_attention(jax.random.key(0), q, k, v, 0.1, train=True, bias=added)
        return y.astype("float32").sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, x, x)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("platform", "batch", "block"),
    [
        ("cuda", 1, "1x2x1x8192x8192"),
        ("cuda", 2, "2x2x1x8192x8192"),
        ("cuda", 4, "2x2x1x8192x8192"),
        ("tpu", 2, "2x2x1x512x8192"),
        ("cpu", 2, "512x8192"),
    ],
)
def test_the_default_holds_all_scores_on_a_gpu_up_to_its_budget(platform, batch, block):
    """8192 * 8192 scores are 2**26, and the budget is 2**28."""
    text = program(platform, length=8192, batch=batch)
    assert set(re.findall(r"exponential .* : tensor<(\w+x8192)x[a-z]\w*>", text)) == {block}


def test_the_choice_for_other_platforms_holds_no_scores_on_a_cpu():
    """A choice between implementations at lowering would hold the residuals of all of them."""
    q = jnp.ones((2, 256, 4, 8), jnp.bfloat16)
    attend = jax.jit(lambda q: jdrop.dot_product_attention(KEY, q, q, q, 0.1, train=True))
    residuals = jax.tree.leaves(jax.vjp(attend, q)[1])
    assert residuals and max(x.size for x in residuals) == q.size


@pytest.mark.parametrize(
    ("platform", "options", "rounded"),
    [
        ("cuda", {}, True),
        ("rocm", {}, True),
        ("cuda", {"dtype": "float32"}, False),
        ("cuda", {"dtype": "float16"}, False),
        ("cuda", {"bias": True}, False),
        ("cpu", {}, False),
        ("tpu", {}, False),
    ],
    ids=str,
)
def test_products_end_with_exponentials_only_in_bfloat16_without_bias_on_gpus(platform, options, rounded):
    """Maxima are in eight more columns of the 64, in both passes and in the product with values."""
    wide = re.findall(r"dot_general .*x72xbf16>, tensor", program(platform, **options))
    assert len(wide) == (3 if rounded else 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_the_query_of_the_backward_pass_keeps_its_bits(dtype, x64):
    query = jnp.asarray([0.0, -0.0, 1.5, -3.0, jnp.inf, 1e-8], dtype)
    other = jnp.asarray([jnp.nan, -1.0, 0.0, 2.0, 6e4, -jnp.inf], dtype)
    same = PLATFORMS["cuda"].unshared_query(query, other)
    np.testing.assert_array_equal(
        jax.lax.bitcast_convert_type(same, "uint8"), jax.lax.bitcast_convert_type(query, "uint8")
    )
