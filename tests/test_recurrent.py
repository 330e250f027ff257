"""locked_dropout and zoneout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdrop

KEY = jax.random.key(71)


def same(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_locked_dropout_is_dropout_that_shares_time():
    x = jnp.ones((8, 30, 64))
    y = jdrop.locked_dropout(KEY, x, 0.3, train=True, time_axis=1)
    same(y, jdrop.dropout(KEY, x, 0.3, train=True, shared_axes=1))
    same(y, jnp.broadcast_to(y[:, :1], y.shape))
    assert abs(float((y[:, 0] == 0).mean()) - 0.3) < 5 * np.sqrt(0.21 / (8 * 64))
    t = jnp.swapaxes(x, 0, 1)
    same(jdrop.locked_dropout(KEY, t, 0.3, train=True, time_axis=0), jnp.swapaxes(y, 0, 1))


def test_a_cloned_key_inside_a_scan_gives_the_same_mask_at_each_step():
    x = jnp.ones((30, 8, 64))
    step = lambda _, v: (None, jdrop.dropout(jax.random.clone(KEY), v, 0.3, train=True))
    y = jax.lax.scan(step, None, x)[1]
    same(y, jnp.broadcast_to(y[:1], y.shape))
    assert bool((y == 0).any())


@pytest.mark.parametrize("generator", ["fast", "jax"])
def test_zoneout_keeps_old_values_where_the_mask_drops(generator):
    new, old = jnp.arange(1.0, 1 + 4 * 500).reshape(4, 500), -jnp.arange(1.0, 1 + 4 * 500).reshape(4, 500)
    y = jdrop.zoneout(KEY, new, 0.2, old, train=True, generator=generator)
    mask = jdrop.dropout_mask(KEY, new.shape, 0.2, generator=generator)
    same(y, np.where(mask, new, old))
    assert abs(float((y < 0).mean()) - 0.2) < 5 * np.sqrt(0.16 / 2000)


def test_zoneout_gradients_go_where_values_came_from():
    new, old = jnp.full((3, 200), 2.0), jnp.full((3, 200), jnp.inf)
    f = lambda new, old: jdrop.zoneout(KEY, new, 0.4, old, train=True)
    y, pull = jax.vjp(f, new, old)
    c = jnp.arange(1.0, 601.0).reshape(3, 200)
    mask = np.asarray(jdrop.dropout_mask(KEY, new.shape, 0.4))
    g_new, g_old = pull(c)
    same(g_new, np.where(mask, c, 0))
    same(g_old, np.where(mask, 0, c))
    same(y, np.where(mask, 2, np.inf))
    same(jax.jvp(f, (new, new), (c, 2 * c))[1], np.where(mask, c, 2 * c))
    same(jax.grad(lambda o: jnp.vdot(f(new, o), jnp.where(mask, 1.0, c)))(new), np.where(mask, 0, c))
    keys = jax.random.split(KEY, 3)
    one = lambda k, n, o: jdrop.zoneout(k, n, 0.4, o, train=True)
    loop = jnp.stack([one(k, n, new[0]) for k, n in zip(keys, c, strict=True)])
    same(jax.vmap(one, in_axes=(0, 0, None))(keys, c, new[0]), loop)
    same(
        jax.vmap(one, in_axes=(0, None, 0))(keys, new[0], c),
        jnp.stack([one(k, new[0], o) for k, o in zip(keys, c, strict=True)]),
    )
    same(jax.vmap(one, in_axes=(0, 1, 0), out_axes=1)(keys, c.T, c), c.T)
    square = c[:, :3]
    for axis in (1, 2):  # one state unmapped, the other mapped along another axis
        news = jnp.moveaxis(jnp.stack([square, 2 * square, 3 * square]), 0, axis)
        y = jax.vmap(one, in_axes=(0, axis, None))(keys, news, -square)
        same(y, jnp.stack([one(k, (i + 1) * square, -square) for i, k in enumerate(keys)]))
    w = jnp.stack([square, square.T, 2 * square])
    y = jax.vmap(lambda k, w: one(k, square @ w, square))(keys, w)
    same(y, jnp.stack([one(k, square @ v, square) for k, v in zip(keys, w, strict=True)]))
    summed = jax.grad(lambda o: jax.vmap(one, in_axes=(0, 0, None))(keys, c, o).sum())(new[0])
    same(summed, sum(1 - np.asarray(jdrop.dropout_mask(jax.random.clone(k), (200,), 0.4), np.float32) for k in keys))


def test_zoneout_is_linear_in_both_states():
    new, old = jnp.ones((3, 200)), jnp.zeros((3, 200))
    c = jnp.arange(1.0, 601.0).reshape(3, 200)
    transposed = jax.linear_transpose(lambda n, o: jdrop.zoneout(KEY, n, 0.4, o, train=True), new, old)
    mask = np.asarray(jdrop.dropout_mask(KEY, new.shape, 0.4))
    for got, want in zip(transposed(c), (np.where(mask, c, 0), np.where(mask, 0, c)), strict=True):
        same(got, want)


def test_numpy_states_of_64_bits():
    new, old = np.ones((2, 3)), jnp.zeros((2, 3))
    for train in (True, False):
        assert jdrop.zoneout(KEY, new, 0.5, old, train=train).dtype == jnp.float32


def test_a_nan_rate_gives_nan_values_and_gradients():
    x = jnp.ones((2, 200))
    y, pull = jax.vjp(lambda new, old: jdrop.zoneout(KEY, new, jnp.float32(jnp.nan), old, train=True), x, x)
    for a in (y, *pull(x)):
        assert bool(jnp.isnan(a).all())


def test_zoneout_returns_the_expectation_in_evaluation():
    new, old = jnp.linspace(-1, 1, 300), jnp.linspace(3, 2, 300)
    y = jdrop.zoneout(None, new, 0.3, old, train=False)
    t = round(float(np.float32(0.3)) * 2**32) / 2**32
    np.testing.assert_allclose(y, (1 - t) * np.asarray(new, float) + t * np.asarray(old, float), rtol=2**-22)
    rates = jnp.array([0.0, 1.0, 0.5])[:, None]
    wide = jnp.broadcast_to(new[None], (3, 300)), jnp.broadcast_to(old[None], (3, 300))
    y = jdrop.zoneout(None, wide[0], rates, wide[1], train=False)
    same(y[0], new)
    same(y[1], old)
    assert jdrop.zoneout(None, new, 0.0, old, train=False) is new
    bad = jnp.full(300, jnp.nan)
    same(jdrop.zoneout(None, bad, 1.0, old, train=False), old)
    narrow = jdrop.zoneout(None, new.astype("bfloat16"), 0.3, old.astype("bfloat16"), train=False)
    exact = 0.7 * np.asarray(new.astype("bfloat16"), float) + 0.3 * np.asarray(old.astype("bfloat16"), float)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(narrow, float), exact, rtol=2**-8)
    mean = np.mean([jdrop.zoneout(jax.random.key(i), new, 0.3, old, train=True) for i in range(400)], axis=0)
    standard_error = np.sqrt(0.21 / 400) * np.abs(np.asarray(new - old))
    assert (np.abs(mean - np.asarray(jdrop.zoneout(None, new, 0.3, old, train=False))) < 5 * standard_error).all()


def test_errors():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"zoneout: old must be float32\[2,3\], like new, got float32\[3\]"):
        jdrop.zoneout(KEY, x, 0.5, x[0], train=True)
    with pytest.raises(ValueError, match=r"zoneout: old must be .* got bfloat16"):
        jdrop.zoneout(KEY, x, 0.5, x.astype("bfloat16"), train=False)
    with pytest.raises(TypeError, match="zoneout: old must be an array"):
        jdrop.zoneout(KEY, x, 0.5, 1.0, train=True)
    with pytest.raises(ValueError, match="locked_dropout: time_axis must be axes"):
        jdrop.locked_dropout(KEY, x, 0.5, train=True, time_axis=2)


def test_complex_states():
    new = jnp.arange(1.0, 601.0).reshape(3, 200).astype("complex64") * (1 - 2j)
    old = -3j * new
    y = jdrop.zoneout(KEY, new, 0.4, old, train=True)
    same(y, np.where(jdrop.dropout_mask(jax.random.clone(KEY), new.shape, 0.4), new, old))
    y = jdrop.zoneout(None, new, 0.25, old, train=False)
    np.testing.assert_allclose(y, 0.75 * np.asarray(new) + 0.25 * np.asarray(old), rtol=2**-21)


def test_zoneout_in_evaluation_uses_the_probability_of_generator_jax():
    """A bfloat16 rate draws 7 bits: 1 - bfloat16(0.1) = 0.8984375 = 115 / 128."""
    new, old = jnp.ones((2, 3)), jnp.zeros((2, 3))
    y = jdrop.zoneout(None, new, jnp.bfloat16(0.1), old, train=False, generator="jax")
    same(y, np.full((2, 3), 115 / 128, np.float32))
