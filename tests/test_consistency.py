"""Losses between two outputs against NumPy, SciPy and Optax."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jdrop.consistency import r_drop_loss, simcse_loss

KEYS = jax.random.split(jax.random.key(0))
A, B = (jax.random.normal(key, (6, 8)) for key in KEYS)


def test_r_drop_is_the_mean_of_both_divergences():
    p, q = (np.asarray(jax.nn.softmax(x.astype(jnp.float32)), np.float64) for x in (A, B))
    exact = (scipy.stats.entropy(p, q, axis=-1) + scipy.stats.entropy(q, p, axis=-1)) / 2
    np.testing.assert_allclose(r_drop_loss(A, B), exact, rtol=1e-5)
    np.testing.assert_array_equal(r_drop_loss(A, B), r_drop_loss(B, A))
    assert (r_drop_loss(A, A) == 0).all()


def test_r_drop_of_masked_classes():
    a, b = A.at[:, 2].set(-jnp.inf), B.at[:, 2].set(-jnp.inf)
    without = r_drop_loss(jnp.delete(A, 2, axis=1), jnp.delete(B, 2, axis=1))
    np.testing.assert_allclose(r_drop_loss(a, b), without, rtol=1e-5)
    gradients = jax.grad(lambda a, b: r_drop_loss(a, b).sum(), argnums=(0, 1))(a, b)
    assert all(np.isfinite(g).all() and (g[:, 2] == 0).all() for g in gradients)


def test_r_drop_of_a_class_that_one_prediction_excludes_is_infinite():
    assert np.isposinf(r_drop_loss(A.at[1, 2].set(-jnp.inf), B)).tolist() == [False, True, False, False, False, False]


def test_r_drop_of_examples_whose_classes_are_all_masked():
    a, b = A.at[1].set(-jnp.inf), B.at[1].set(-jnp.inf)
    value, gradients = jax.value_and_grad(lambda a, b: r_drop_loss(a, b).sum(), argnums=(0, 1))(a, b)
    np.testing.assert_allclose(value, r_drop_loss(A, B).sum() - r_drop_loss(A, B)[1], rtol=1e-5)
    assert all(np.isfinite(g).all() and (g[1] == 0).all() for g in gradients)


def test_nan_and_infinity_are_not_hidden():
    for value in (jnp.nan, jnp.inf):
        a = A.at[1, 2].set(value)
        assert np.isnan(r_drop_loss(a, B)).tolist() == [False, True, False, False, False, False]
        assert np.isnan(simcse_loss(a, B)).tolist() == [False, True, False, False, False, False]
        assert np.isnan(simcse_loss(A, B.at[1, 2].set(value))).all()


def test_temperatures_of_other_dtypes():
    exact = simcse_loss(A, B, 0.25)
    for temperature in (np.float64(0.25), np.float16(0.25), jnp.bfloat16(0.25)):
        np.testing.assert_array_equal(simcse_loss(A, B, temperature), exact)
    np.testing.assert_array_equal(simcse_loss(np.asarray(A, np.float64), np.asarray(B, np.float64), 0.25), exact)
    with jax.enable_x64(True):
        assert simcse_loss(A, B, np.float64(0.25)).dtype == jnp.float32
        assert simcse_loss(A.astype(jnp.float64), B.astype(jnp.float64), jnp.float32(0.25)).dtype == jnp.float64


@pytest.mark.parametrize("loss", [r_drop_loss, simcse_loss])
def test_small_batches(loss):
    assert loss(A[:0], B[:0]).shape == (0,)
    assert simcse_loss(A[:1], B[:1]) == 0


def test_simcse_is_the_cross_entropy_of_finding_the_twin():
    a, b = (np.asarray(x, np.float64) for x in (A, B))
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    similarities = jnp.asarray(a @ b.T / 0.05, jnp.float32)
    exact = optax.softmax_cross_entropy_with_integer_labels(similarities, jnp.arange(len(a)))
    np.testing.assert_allclose(simcse_loss(A, B), exact, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(simcse_loss(1e30 * A, 1e-30 * B), exact, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(simcse_loss(A, B, jnp.float32(0.05)), exact, rtol=1e-4, atol=1e-5)
    assert (simcse_loss(A, A, 0.01) < 1e-4).all()


def test_simcse_of_zeros():
    """As if the cosine were 0 to all others: the loss of that row is log(batch)."""
    a = A.at[1].set(0)
    value, gradient = jax.value_and_grad(lambda a: simcse_loss(a, B)[1])(a)
    np.testing.assert_allclose(value, np.log(6), rtol=1e-5)
    assert (gradient[1] == 0).all()


@pytest.mark.parametrize("loss", [r_drop_loss, simcse_loss])
def test_gradients_dtypes_and_transforms(loss):
    with jax.enable_x64(True):
        a, b = (x.astype(jnp.float64) for x in (A, B))
        check_grads(loss, (a, b), order=1, rtol=1e-5)
        assert loss(a, b).dtype == jnp.float64
    half = loss(A.astype(jnp.bfloat16), B.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32
    exact = loss(A.astype(jnp.bfloat16).astype(jnp.float32), B.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(half, exact, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(loss)(A, B), loss(A, B), rtol=1e-5, atol=1e-6)
    stacked = jnp.stack([A, B]), jnp.stack([B, A])
    for row, pair in zip(jax.vmap(loss)(*stacked), zip(*stacked)):
        np.testing.assert_allclose(row, loss(*pair), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("loss", [r_drop_loss, simcse_loss])
def test_on_a_mesh(loss, explicit):
    a, b = (jnp.concatenate([x, x[:2] + 1]) for x in (A, B))
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        spread = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (a, b)]
        ours = jax.jit(loss)(*spread)
    np.testing.assert_allclose(ours, loss(a, b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: r_drop_loss(A, 1.0), TypeError, "r_drop_loss: logits_b must be an array, got 1.0"),
        (lambda: r_drop_loss(A, B[:2]), ValueError, "r_drop_loss: logits_b must have the shape and dtype of logits_a"),
        (lambda: r_drop_loss(A[0, 0], B[0, 0]), ValueError, "r_drop_loss: logits_a must have axes [..., classes]"),
        (lambda: simcse_loss(A.astype(int), B), TypeError, "simcse_loss: a must be"),
        (lambda: simcse_loss(A, B.astype(jnp.bfloat16)), ValueError, "simcse_loss: b must have the shape and dtype"),
        (lambda: simcse_loss(A[0], B[0]), ValueError, "simcse_loss: a must have axes [batch, feature]"),
        (lambda: simcse_loss(A, B, 0.0), ValueError, "simcse_loss: temperature must be above 0, got 0"),
        (lambda: simcse_loss(A, B, -1), ValueError, "simcse_loss: temperature must be finite and at least 0, got -1"),
        (lambda: simcse_loss(A, B, jnp.int32(1)), TypeError, "simcse_loss: temperature must be float16"),
        (lambda: simcse_loss(A, B, jnp.ones(3)), TypeError, "simcse_loss: temperature must be a number"),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match="^" + re.escape(text)):
        call()
