"""bias_dropout_add and multi_sample_dropout."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdrop

KEY = jax.random.key(81)
X, RESIDUAL = jnp.linspace(-3, 3, 64 * 256).reshape(64, 256), jnp.linspace(5, 9, 64 * 256).reshape(64, 256)
BIAS = jnp.linspace(0, 1, 256)


def same(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_it_is_the_sum_of_its_parts():
    y = jdrop.bias_dropout_add(KEY, X, 0.3, BIAS, RESIDUAL, train=True)
    parts = RESIDUAL + jdrop.dropout(KEY, X + BIAS[None], 0.3, train=True)
    np.testing.assert_allclose(y, parts, rtol=2**-22)
    dropped = ~np.asarray(jdrop.dropout_mask(KEY, X.shape, 0.3))
    same(y[dropped], RESIDUAL[dropped])
    same(jdrop.bias_dropout_add(None, X, 0.3, BIAS, RESIDUAL, train=False), RESIDUAL + (X + BIAS[None]))
    plain = jdrop.bias_dropout_add(KEY, X, 0.3, None, RESIDUAL, train=True)
    np.testing.assert_allclose(plain, RESIDUAL + jdrop.dropout(KEY, X, 0.3, train=True), rtol=2**-22)


def test_sixteen_bits_are_rounded_once():
    x, bias, residual = (a.astype("bfloat16") for a in (X, BIAS, RESIDUAL))
    wide = jdrop.bias_dropout_add(
        KEY, *(a.astype("float32") for a in (x,)), 0.3, bias.astype("float32"), residual.astype("float32"), train=True
    )
    y = jdrop.bias_dropout_add(KEY, x, 0.3, bias, residual, train=True)
    assert y.dtype == jnp.bfloat16
    same(y, wide.astype("bfloat16"))


def test_gradients():
    f = lambda x, b, r: jdrop.bias_dropout_add(KEY, x, 0.3, b, r, train=True)
    c = jnp.cos(X)
    dx, db, dr = jax.vjp(f, X, BIAS, RESIDUAL)[1](c)
    scaled = jdrop.dropout(KEY, c, 0.3, train=True)
    same(dx, scaled)
    same(dr, c)
    np.testing.assert_allclose(db, np.asarray(scaled, float).sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.compiled
def test_one_fusion_computes_the_result():
    """One loop over elements, which stores no array of the size of x except the result."""
    for dtype in ("float32", "bfloat16"):
        args = [a.astype(dtype) for a in (X, BIAS, RESIDUAL)]
        f = jax.jit(lambda k, x, b, r: jdrop.bias_dropout_add(k, x, 0.3, b, r, train=True))
        entry = f.lower(KEY, *args).compile().as_text().split("ENTRY ")[1]
        arrays = [
            line for line in entry.splitlines() if re.search(r"= \w+\[64,256\]", line) and "parameter(" not in line
        ]
        assert len(arrays) == 1 and "fusion(" in arrays[0], arrays


def test_bias_errors():
    f = lambda b=BIAS, r=RESIDUAL: jdrop.bias_dropout_add(KEY, X, 0.3, b, r, train=True)
    for call, error, text in [
        (
            lambda: f(BIAS[1:]),
            ValueError,
            r"bias_dropout_add: bias must broadcast to shape \(64, 256\), got shape \(255,\)",
        ),
        (lambda: f(BIAS.astype("bfloat16")), ValueError, "bias_dropout_add: bias must have the dtype of x, float32"),
        (lambda: f(r=RESIDUAL[0]), ValueError, r"bias_dropout_add: residual must be float32\[64,256\], like x"),
        (lambda: f(1.0), TypeError, "bias_dropout_add: bias must be an array"),
        (lambda: f(r=None), TypeError, "bias_dropout_add: residual must be an array"),
    ]:
        with pytest.raises(error, match=text):
            call()


# ------------------------------------------------------------------------------------ several masks


def test_it_averages_the_head_over_masks_of_derived_keys():
    w = jnp.linspace(-1, 1, 256 * 3).reshape(256, 3)
    head = lambda h: {"logits": jnp.tanh(h @ w), "norm": (h**2).sum()}
    y = jdrop.multi_sample_dropout(KEY, X, 0.5, head, 5, train=True)
    keys = [jdrop.keys.derive(KEY, "multi_sample_dropout", i) for i in range(5)]
    outputs = [head(jdrop.dropout(k, X, 0.5, train=True)) for k in keys]
    np.testing.assert_allclose(y["logits"], np.mean([o["logits"] for o in outputs], axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(y["norm"], np.mean([o["norm"] for o in outputs]), rtol=1e-5)
    same(jdrop.multi_sample_dropout(None, X, 0.5, head, 5, train=False)["norm"], head(X)["norm"])


def test_more_samples_come_closer_to_the_expectation():
    """The mean of n scaled masks has variance r / (1 - r) / n."""
    for n in (1, 4, 16):
        y = jdrop.multi_sample_dropout(KEY, jnp.ones_like(X), 0.5, lambda h: h, n, train=True)
        variance = float(jnp.var(y))
        assert abs(variance * n - 1) < 5 * np.sqrt(
            2 / X.size
        )  # a mean of fair signs has at most the kurtosis of a normal


def test_the_gradient_of_one_sample_is_the_mask():
    g = jax.grad(lambda x: jdrop.multi_sample_dropout(KEY, x, 0.5, jnp.sum, 1, train=True))(X)
    same(g, jdrop.dropout(jdrop.keys.derive(KEY, "multi_sample_dropout", 0), jnp.ones_like(X), 0.5, train=True))


def test_sample_errors():
    with pytest.raises(ValueError, match="multi_sample_dropout: num_samples must be at least 1, got 0"):
        jdrop.multi_sample_dropout(KEY, X, 0.5, jnp.sum, 0, train=True)
    with pytest.raises(TypeError, match="multi_sample_dropout: head must be a function"):
        jdrop.multi_sample_dropout(KEY, X, 0.5, 3, 3, train=True)
    for bad, got in ((jnp.int32(1), r"int32\[\]"), ("a", "'a'"), (1.0, "1.0")):
        for train in (True, False):
            with pytest.raises(
                TypeError, match=f"multi_sample_dropout: head must return floating .* got {got}; return"
            ):
                jdrop.multi_sample_dropout(
                    KEY, X, 0.5, lambda h, bad=bad: {"loss": h.sum(), "bad": bad}, 3, train=train
                )
    with pytest.raises(TypeError, match="multi_sample_dropout: key must be a PRNG key when something is dropped"):
        jdrop.multi_sample_dropout(None, X, 0.5, jnp.sum, 3, train=True)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_dropped_element_leaves_the_residual(bad):
    """NaN and Inf of x do not leak, and the gradient is exactly 0 there."""
    kept = jdrop.dropout_mask(KEY, X.shape, 0.3)
    x = jnp.where(kept, X, bad)
    y, pull = jax.vjp(lambda x: jdrop.bias_dropout_add(KEY, x, 0.3, BIAS, RESIDUAL, train=True), x)
    same(jnp.where(kept, 0, y), jnp.where(kept, 0, RESIDUAL))
    assert bool(jnp.isfinite(y).all())
    (dx,) = pull(jnp.where(kept, 1.0, bad))
    same(dx == 0, ~kept)
