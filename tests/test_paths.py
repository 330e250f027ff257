"""drop_path and stochastic_depth: whole branches, and work that is skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jdrop

KEY = jax.random.key(41)


def test_drop_path_is_dropout_that_shares_all_but_the_batch():
    x = jnp.arange(1.0, 1 + 500 * 6).reshape(500, 2, 3)
    y = jdrop.drop_path(KEY, x, 0.4, train=True)
    np.testing.assert_array_equal(y, jdrop.dropout(KEY, x, 0.4, train=True, shared_axes=(1, 2)))
    dropped = np.asarray((y == 0).all((1, 2)))
    np.testing.assert_array_equal(dropped, np.asarray((y == 0).any((1, 2))))
    assert abs(dropped.mean() - 0.4) < 5 * np.sqrt(0.24 / 500)
    whole = jdrop.drop_path(KEY, x, 0.4, train=True, batch_axes=())
    np.testing.assert_array_equal(whole, jdrop.dropout(KEY, x, 0.4, train=True, shared_axes=(0, 1, 2)))
    np.testing.assert_array_equal(
        jdrop.drop_path(KEY, x.T, 0.4, train=True, batch_axes=-1),
        jdrop.dropout(KEY, x.T, 0.4, train=True, shared_axes=(0, 1)),
    )


def decisions_of(rate, count=4000, **options):
    keys = jax.vmap(lambda i: jdrop.keys.derive(KEY, i))(jnp.arange(count))
    f = lambda k: jdrop.stochastic_depth(k, jnp.ones(3), rate, lambda x: 2 * x, train=True, **options)
    return jax.vmap(f)(keys)


@pytest.mark.parametrize("generator", ["fast", "jax"])
def test_stochastic_depth_keeps_the_expectation(generator):
    y = np.asarray(decisions_of(0.3, generator=generator))
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1], y.shape))
    np.testing.assert_allclose(np.unique(y), [1, 1 + 2 / 0.7], rtol=1e-6)
    assert abs((y == 1).all(1).mean() - 0.3) < 5 * np.sqrt(0.21 / len(y))


def test_one_decision_equals_a_scalar_mask():
    for i in range(20):
        key = jax.random.key(i)
        y = jdrop.stochastic_depth(key, jnp.float32(1), 0.5, lambda x: x, train=True)
        assert bool(y > 1) == bool(jdrop.dropout_mask(key, (), 0.5))


def test_a_dropped_branch_is_not_computed():
    calls = []

    def branch(x):
        jax.debug.callback(lambda: calls.append(1))
        return x

    step = jax.jit(lambda k, r: jdrop.stochastic_depth(k, jnp.ones(2), r, branch, train=True))
    for rate, expected in ((1.0, 0), (0.0, 1)):
        calls.clear()
        step(KEY, rate)
        jax.effects_barrier()
        assert len(calls) == expected


@pytest.mark.compiled
def test_a_dropped_branch_is_a_branch_of_the_program():
    f = jax.jit(lambda k, r: jdrop.stochastic_depth(k, jnp.ones(2), r, jnp.sin, train=True))
    assert "conditional(" in f.lower(KEY, 0.5).compile().as_text()


def test_the_branch_is_traced_once():
    traces = []
    jax.jit(lambda k: jdrop.stochastic_depth(k, jnp.ones(2), 0.5, lambda x: traces.append(1) or x, train=True))(KEY)
    assert len(traces) == 1


def test_scan_over_layers_with_a_rate_per_layer():
    layers, width = 6, 16
    w = jnp.stack([jnp.eye(width) * (i + 1) / 10 for i in range(layers)])
    rates = jnp.array(jdrop.schedules.depth_rates(0.5, layers, "i/(n-1)"))
    keys = jax.vmap(lambda i: jdrop.keys.derive(KEY, "layer", i))(jnp.arange(layers))

    def loss(w, train):
        def layer(x, scanned):
            key, rate, w = scanned
            return jdrop.stochastic_depth(key, x, rate, lambda x: x @ w, train=train), None

        return jax.lax.scan(layer, jnp.ones(width), (keys, rates, w))[0].sum()

    x = np.ones(width, np.float32)
    for i in range(layers):
        if bool(jdrop.dropout_mask(jax.random.clone(keys[i]), (), rates[i])):
            x = x + x * np.float32((i + 1) / 10) / (1 - np.float32(rates[i]))
    np.testing.assert_allclose(jax.jit(loss, static_argnums=1)(w, True), x.sum(), rtol=1e-5)
    gradient = jax.grad(loss)(w, True)
    for i in range(layers):
        kept = bool(jdrop.dropout_mask(jax.random.clone(keys[i]), (), rates[i]))
        assert bool((gradient[i] != 0).any()) == kept
    assert np.isfinite(loss(w, False))


@pytest.mark.parametrize("rate", [1.0, jnp.float32(1), jnp.float32(2)])
def test_rate_one_leaves_x_and_finite_gradients_even_under_vmap(rate):
    f = lambda k, x: jdrop.stochastic_depth(k, x, rate, jnp.log1p, train=True)
    x = jnp.ones((4, 3))
    keys = jax.random.split(KEY, 4)
    np.testing.assert_array_equal(f(KEY, x), x)
    np.testing.assert_array_equal(jax.vmap(f)(keys, x), x)
    np.testing.assert_array_equal(jax.vmap(jax.grad(lambda x, k: f(k, x).sum()))(x, keys), jnp.ones_like(x))
    np.testing.assert_array_equal(jax.grad(lambda x: jax.vmap(f)(keys, x).sum())(x), jnp.ones_like(x))


def test_a_branch_that_varies_more_than_x_in_shard_map():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w = jnp.ones(3), jnp.arange(8.0)
    for rate in (0.0, 0.5, 1.0):
        f = lambda k, x, w, r=rate: jdrop.stochastic_depth(
            k, x, jnp.float32(r), lambda x: x * w[0], train=True, shard=jax.P(), generator="jax"
        )
        specs = {"in_specs": (jax.P(), jax.P(), jax.P("d")), "out_specs": jax.P("d")}
        tiles = jax.jit(jax.shard_map(f, mesh=mesh, **specs))(jax.random.key(3, impl="rbg"), x, w).reshape(8, 3)
        single = [f(jax.random.key(3, impl="rbg"), x, w[i : i + 1]) for i in range(8)]
        np.testing.assert_allclose(tiles, single, rtol=1e-6)


def test_errors():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"stochastic_depth: fn must return float32\[2,3\], like x, got float32\[3\]"):
        jdrop.stochastic_depth(KEY, x, 0.5, lambda x: x[0], train=True)
    with pytest.raises(ValueError, match=r"stochastic_depth: fn must return .* got bfloat16"):
        jdrop.stochastic_depth(KEY, x, 0.5, lambda x: x.astype("bfloat16"), train=False)
    for bad, got in ((None, "None"), (1.0, "1.0"), ((x, x), "a tuple of arrays"), (jnp.int32(1), r"int32\[\]")):
        with pytest.raises(ValueError, match=rf"stochastic_depth: fn must return float32\[2,3\], like x, got {got}"):
            jdrop.stochastic_depth(KEY, x, 0.5, lambda x, bad=bad: bad, train=False)
    with pytest.raises(TypeError, match="stochastic_depth: fn must be a function"):
        jdrop.stochastic_depth(KEY, x, 0.5, x, train=True)
    with pytest.raises(ValueError, match=r"stochastic_depth: rate must broadcast to the mask's shape \(\)"):
        jdrop.stochastic_depth(KEY, x, jnp.ones(2), lambda x: x, train=True)
    with pytest.raises(ValueError, match="drop_path: batch_axes must be axes"):
        jdrop.drop_path(KEY, x, 0.5, train=True, batch_axes=2)


def test_one_decision_for_all_tiles_even_if_bits_lack_random_access():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    key, x = jax.random.key(3, impl="rbg"), jnp.arange(1.0, 33.0).reshape(8, 4)
    f = lambda k, x, **o: jdrop.stochastic_depth(k, x, 0.5, jnp.sin, train=True, generator="jax", **o)
    tiled = jax.shard_map(lambda k, x: f(k, x, shard=P("d")), mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))
    np.testing.assert_allclose(jax.jit(tiled)(key, x), f(key, x), rtol=1e-6)


def test_eager_calls_compile_nothing_after_the_first(caplog):
    """lax.cond would compile two new functions at every call."""
    f = lambda key: jdrop.stochastic_depth(key, jnp.ones(3), 0.5, lambda x: 2 * x, train=True)
    keys = jax.random.split(KEY, 8)
    results = [f(key) for key in keys[:4]]
    with jax.log_compiles(), caplog.at_level("WARNING"):
        results += [f(key) for key in keys[4:]]
    assert not [record for record in caplog.records if "Compiling" in record.message]
    expected = jax.jit(lambda keys: jnp.stack([f(key) for key in keys]))(keys)
    np.testing.assert_array_equal(jnp.stack(results), expected)
    slope = jax.grad(lambda x: jdrop.stochastic_depth(keys[0], x, 0.5, lambda x: 2 * x, train=True).sum())(jnp.ones(3))
    np.testing.assert_array_equal(slope, results[0])


def test_jet_has_no_rule_for_its_condition():
    from jax.experimental import jet

    f = lambda x: jdrop.stochastic_depth(KEY, x, 0.5, jnp.sin, train=True)
    with pytest.raises(NotImplementedError, match=r"stochastic_depth: x must not be traced by jax\.experimental\.jet"):
        jet.jet(f, (jnp.ones(3),), ((jnp.ones(3), jnp.ones(3)),))
