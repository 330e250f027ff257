"""Monte Carlo dropout against exact enumeration, NumPy and SciPy."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jdrop
from jdrop.uncertainty import (
    expected_entropy,
    mc_moments,
    mc_samples,
    mutual_information,
    predictive_entropy,
    variance_split,
)

KEY = jax.random.key(3)
ENTROPIES = (predictive_entropy, expected_entropy, mutual_information)


def network(key, x, w, *, shared_axes=()):
    """Return two outputs per example of x [batch, feature], as a pytree."""
    h = jnp.tanh(jdrop.dropout(key, x, 0.5, train=True, shared_axes=shared_axes) @ w)
    return {"mean": h, "sum": h.sum(-1)}


def data(batch=5):
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], (batch, 8)), jax.random.normal(keys[1], (8, 3))


# ---------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 5, 7, 100])
def test_sample_i_is_the_network_with_derived_key_i(chunk_size):
    samples = mc_samples(network, KEY, 7, *data(), chunk_size=chunk_size)
    for i in range(7):
        one = network(jdrop.keys.derive(KEY, i), *data())
        for name, value in one.items():
            np.testing.assert_allclose(samples[name][i], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 5, 7, 100])
def test_moments_are_those_of_the_samples(chunk_size):
    samples = mc_samples(network, KEY, 7, *data())
    mean, variance = mc_moments(network, KEY, 7, *data(), chunk_size=chunk_size)
    for name, values in samples.items():
        values = np.asarray(values, np.float64)
        np.testing.assert_allclose(mean[name], values.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(variance[name], values.var(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("take", [mc_samples, mc_moments])
def test_chunks_bound_how_many_samples_are_computed_at_once(take):
    sizes = set()

    @jax.custom_batching.custom_vmap
    def record(x):
        return x

    @record.def_vmap
    def _(axis_size, in_batched, x):
        sizes.add(axis_size)
        return x, in_batched[0]

    for chunk_size, expected in ((3, {1, 3}), (7, {7}), (100, {7}), (None, {7})):
        sizes.clear()
        take(lambda key: record(jax.random.uniform(key)), KEY, 7, chunk_size=chunk_size)
        assert sizes == expected


@pytest.mark.parametrize(
    "dtype, result", [("bfloat16", "float32"), ("float16", "float32"), ("int32", "float32"), ("complex64", "complex64")]
)
def test_moments_of_other_dtypes(dtype, result):
    values = np.array([[1, 5], [2, 7], [4, 1]]) * (1j if dtype == "complex64" else 1)
    table = jnp.asarray(values, dtype)
    index = jax.vmap(lambda key: jax.random.bits(key))(jdrop.keys.per_example(KEY, jnp.arange(6))) % 3
    mean, variance = mc_moments(lambda key: table[jax.random.bits(key) % 3], KEY, 6, chunk_size=4)
    assert mean.dtype == result and variance.dtype == "float32"
    drawn = values[np.asarray(index)]
    np.testing.assert_allclose(mean, drawn.mean(0), rtol=1e-6)
    np.testing.assert_allclose(variance, drawn.var(0), rtol=1e-5)


def test_moments_keep_the_digits_of_a_small_variance():
    """E[y^2] - E[y]^2 in float32 would return 0, or less."""

    def fn(key):
        return 1e4 + jax.random.uniform(key, (50,))

    _, variance = mc_moments(fn, KEY, 64, chunk_size=8)
    exact = np.asarray(mc_samples(fn, KEY, 64), np.float64).var(0)
    np.testing.assert_allclose(variance, exact, rtol=2e-3)


def test_moments_of_float64_and_of_integers_have_64_bits():
    with jax.enable_x64(True):

        def fn(key):
            x = jax.random.uniform(key, (50,), jnp.float64)
            return {"float": x, "complex": jax.lax.complex(x, 3 * x), "int": (2**40 + 100 * x).astype(jnp.int64)}

        samples = mc_samples(fn, KEY, 7)
        for chunk_size in (1, 3, None):
            mean, variance = mc_moments(fn, KEY, 7, chunk_size=chunk_size)
            for name, rtol in (("float", 1e-13), ("complex", 1e-13), ("int", 1e-5)):
                np.testing.assert_allclose(mean[name], np.mean(samples[name], 0), rtol=1e-13)
                np.testing.assert_allclose(variance[name], np.var(samples[name], 0), rtol=rtol)


def test_numbers_of_numpy():
    plain = mc_moments(network, KEY, 7, *data(), chunk_size=2)
    numbers = mc_moments(network, KEY, np.int32(7), *data(), chunk_size=np.int64(2))
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (plain, numbers))))


def test_moments_are_within_5_standard_errors_of_exact_enumeration():
    n, rate = 20_000, 0.3
    x, w = data(batch=1)
    x, w = x[:, :4], w[:4]

    def fn(key):
        return jnp.tanh(jdrop.dropout(key, x, rate, train=True) @ w)[0]

    masks = np.array(list(itertools.product([0, 1], repeat=4)))
    p = np.prod(np.where(masks, 1 - rate, rate), axis=1)
    y = np.tanh((np.asarray(x) * masks / (1 - rate)) @ np.asarray(w))
    exact = p @ y
    central = [p @ (y - exact) ** k for k in (2, 4)]
    mean, variance = mc_moments(fn, KEY, n, chunk_size=1000)
    assert (abs(mean - exact) < 5 * np.sqrt(central[0] / n)).all()
    assert (abs(variance - central[0]) < 5 * np.sqrt((central[1] - central[0] ** 2) / n)).all()


def test_one_sampled_network_for_all_inputs():
    """A sample with decisions shared over the batch is a function: its values do not depend on the other inputs."""
    x, w = data(batch=8)
    samples = mc_samples(lambda key, x: network(key, x, w, shared_axes=0)["mean"], KEY, 4, x)
    single = mc_samples(lambda key, x: network(key, x, w, shared_axes=0)["mean"], KEY, 4, x[3:4])
    np.testing.assert_allclose(samples[:, 3:4], single, rtol=1e-6)
    mapped = mc_samples(lambda key, x: jax.vmap(lambda one: network(key, one[None], w)["mean"][0])(x), KEY, 4, x)
    np.testing.assert_allclose(samples, mapped, rtol=1e-6)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(x, NamedSharding(mesh, P("data")))
    sharded = jax.jit(lambda x: mc_samples(lambda key, x: network(key, x, w, shared_axes=0)["mean"], KEY, 4, x))(spread)
    np.testing.assert_allclose(samples, sharded, rtol=1e-5, atol=1e-6)


def test_a_mask_for_each_example():
    """Equal inputs get different outputs, so a curve over inputs is not smooth."""
    x, w = jnp.ones((64, 8)), data()[1]
    own = mc_samples(lambda key: network(key, x, w)["mean"], KEY, 4)
    shared = mc_samples(lambda key: network(key, x, w, shared_axes=0)["mean"], KEY, 4)
    assert (own.std(1) > 0.1).all() and (shared.std(1) < 1e-6).all()
    assert (shared.std(0) > 0.01).any()


@pytest.mark.parametrize("take", [mc_samples, mc_moments])
def test_transforms(take):
    x, w = data()

    def f(x, key=KEY):
        return jax.tree.leaves(take(network, key, 6, x, w, chunk_size=4))[0].sum()

    assert np.isclose(jax.jit(f)(x), f(x), rtol=1e-5)
    plain = jax.grad(lambda x: jax.tree.leaves(take(network, KEY, 6, x, w))[0].sum())(x)
    np.testing.assert_allclose(jax.grad(f)(x), plain, rtol=1e-4, atol=1e-6)
    keys = jax.random.split(KEY, 3)
    np.testing.assert_allclose(jax.vmap(f, in_axes=(None, 0))(x, keys), [f(x, key) for key in keys], rtol=1e-5)
    legacy = take(network, jax.random.key_data(KEY), 6, x, w, chunk_size=4)
    assert all(
        (a == b).all() for a, b in zip(*map(jax.tree.leaves, (legacy, take(network, KEY, 6, x, w, chunk_size=4))))
    )


@pytest.mark.parametrize("explicit", [False, True])
def test_moments_on_a_mesh(explicit):
    x, w = data(batch=8)
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        spread = jax.device_put(x, NamedSharding(mesh, P("data")))
        ours = jax.jit(lambda x: mc_moments(lambda key, x: network(key, x, w)["mean"], KEY, 6, x, chunk_size=4))(spread)
    for sharded, single in zip(ours, mc_moments(network, KEY, 6, x, w, chunk_size=4)):
        np.testing.assert_allclose(sharded, single["mean"], rtol=1e-5, atol=1e-6)


def test_moments_in_shard_map():
    x, w = data(batch=8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def fn(key, x):
        return jdrop.dropout(key, x, 0.5, train=True, shard=P("data")) @ w

    f = jax.shard_map(
        lambda x: mc_moments(fn, KEY, 7, x, chunk_size=2), mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    single = mc_moments(lambda key, x: jdrop.dropout(key, x, 0.5, train=True) @ w, KEY, 7, x)
    for a, b in zip(f(x), single):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_samples, chunk_size, traces", [(6, 2, 1), (7, 2, 2), (6, None, 1)])
def test_moments_trace_the_network_once_for_each_size_of_chunks(num_samples, chunk_size, traces):
    traced = []

    def fn(key):
        traced.append(key)
        return jax.random.uniform(key, (3,))

    mc_moments(fn, KEY, num_samples, chunk_size=chunk_size)
    assert len(traced) == traces


@pytest.mark.compiled
def test_memory_of_moments_does_not_grow_with_the_number_of_samples():
    x, w = data(batch=256)

    def temporary_bytes(num_samples):
        f = jax.jit(lambda key, x: mc_moments(network, key, num_samples, x, w, chunk_size=10))
        return f.lower(KEY, x).compile().memory_analysis().temp_size_in_bytes

    few, many = temporary_bytes(50), temporary_bytes(5000)
    keys = 4 * 16 * 5000  # those of all samples, and the words they are hashed from
    assert many <= few + keys < 256 * 3 * 4 * 5000 / 10


# ---------------------------------------------------------------------------------- classification


def random_log_probs(shape=(6, 4, 5), scale=2.0):
    return jax.nn.log_softmax(scale * jax.random.normal(jax.random.key(1), shape))


def test_entropies_are_those_of_scipy():
    log_probs = random_log_probs()
    p = np.exp(np.asarray(log_probs, np.float64))
    p /= p.sum(-1, keepdims=True)
    total, expected = scipy.stats.entropy(p.mean(0), axis=-1), scipy.stats.entropy(p, axis=-1).mean(0)
    for f, exact in zip(ENTROPIES, (total, expected, total - expected)):
        np.testing.assert_allclose(f(log_probs), exact, rtol=1e-5)
        for axis in (1, -2):
            moved = jnp.moveaxis(log_probs, 0, axis)
            np.testing.assert_allclose(f(moved, sample_axis=axis), exact, rtol=1e-5)
        assert f(log_probs.astype(jnp.bfloat16)).dtype == jnp.float32


def test_small_mutual_information_keeps_its_digits():
    """The difference of two float32 entropies near 1.6 is off by 1e-7, more than these values."""
    log_probs = random_log_probs((4, 3, 5), scale=2e-4)
    p = np.exp(np.asarray(log_probs, np.float64))
    p /= p.sum(-1, keepdims=True)
    exact = scipy.stats.entropy(p, np.broadcast_to(p.mean(0), p.shape), axis=-1).mean(0)
    assert (exact < 1e-7).all()
    np.testing.assert_allclose(mutual_information(log_probs), exact, rtol=0.01)


@pytest.mark.parametrize("f", ENTROPIES)
@pytest.mark.parametrize("p", [[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]], [[0.5, 0.5], [1.0, 0.0]]])
def test_probabilities_of_exactly_0(f, p):
    p = np.array(p)
    log_probs = jnp.log(jnp.array(p, jnp.float32))
    total, expected = scipy.stats.entropy(p.mean(0)), scipy.stats.entropy(p, axis=-1).mean()
    exact = dict(zip(ENTROPIES, (total, expected, total - expected)))[f]
    value, gradient = jax.value_and_grad(f)(log_probs)
    np.testing.assert_allclose(value, exact, atol=1e-6)
    assert np.isfinite(gradient).all() and (gradient[p == 0] == 0).all()


@pytest.mark.parametrize("f", ENTROPIES)
def test_nan_is_not_hidden(f):
    """Neither a NaN in one class of one sample, nor one beside a probability of exactly 0."""
    log_probs = random_log_probs().at[1, 2, 3].set(jnp.nan).at[0, 2, 3].set(-jnp.inf)
    assert np.isnan(f(log_probs)).tolist() == [False, False, True, False]
    assert np.isnan(f(jnp.full((3, 4), jnp.nan)))


@pytest.mark.parametrize("f", ENTROPIES)
def test_entropies_of_numpy_and_small_arrays(f):
    log_probs = random_log_probs()
    np.testing.assert_array_equal(f(np.asarray(log_probs, np.float64)), f(log_probs))
    assert isinstance(f(np.asarray(log_probs)), jax.Array)
    assert f(log_probs[:, :0]).shape == (0,)
    one = predictive_entropy(log_probs[:1]) if f is not mutual_information else np.zeros(4)
    np.testing.assert_allclose(f(log_probs[:1]), one, rtol=1e-6)


@pytest.mark.parametrize("f", ENTROPIES)
def test_probabilities_of_exactly_0_need_no_nan_on_the_way(f):
    """As users see who debug with ``jax_debug_nans``."""
    with jax.debug_nans(True):
        value, gradient = jax.value_and_grad(f)(jnp.array([[0.0, -jnp.inf], [0.0, -jnp.inf]]))
        assert value == 0 and (gradient[:, 1] == 0).all()


def test_mutual_information_is_0_if_samples_agree_and_never_negative():
    equal = jnp.broadcast_to(random_log_probs((1, 500, 7)), (9, 500, 7))
    assert (mutual_information(equal) == 0).all()
    assert (mutual_information(equal + 1e-7 * jax.random.normal(KEY, equal.shape)) >= 0).all()


@pytest.mark.parametrize("f", ENTROPIES)
def test_gradients_of_entropies(f):
    with jax.enable_x64(True):
        logits = jax.random.normal(jax.random.key(2), (3, 2, 4), jnp.float64)
        check_grads(lambda x: f(jax.nn.log_softmax(x)), (logits,), order=1)


def test_variances_of_a_mixture_add_up():
    means, variances = jax.random.normal(KEY, (2, 5, 7))
    variances = variances**2
    aleatoric, epistemic = variance_split(means, variances)
    total = np.asarray(variances + means**2, np.float64).mean(0) - np.asarray(means, np.float64).mean(0) ** 2
    np.testing.assert_allclose(aleatoric + epistemic, total, rtol=1e-4)
    moved = variance_split(means.T, variances.T, sample_axis=1)
    np.testing.assert_allclose(moved, (aleatoric, epistemic), rtol=1e-5)
    assert variance_split(means.astype(jnp.float16), variances)[0].dtype == jnp.float32
    assert all(isinstance(x, jax.Array) for x in variance_split(np.asarray(means), np.asarray(variances)))
    with jax.enable_x64(True):
        assert {x.dtype.name for x in variance_split(means.astype(jnp.float64), variances)} == {"float64"}
    assert math.isclose(float(variance_split(jnp.array([1.0, 3.0]), jnp.array([0.5, 0.7]))[0]), 0.6, rel_tol=1e-6)


# ---------------------------------------------------------------------------------- errors

LOG_PROBS = jnp.zeros((2, 3))


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: mc_samples(3, KEY, 2), TypeError, "mc_samples: fn must be callable, got 3"),
        (lambda: mc_samples(network, 3, 2), TypeError, "mc_samples: key must be a PRNG key, got 3"),
        (lambda: mc_samples(network, KEY, 0), ValueError, "mc_samples: num_samples must be at least 1, got 0"),
        (lambda: mc_samples(network, KEY, 2.0), TypeError, "mc_samples: num_samples must be an integer, got 2.0"),
        (lambda: mc_moments(network, KEY, 2, chunk_size=0), ValueError, "mc_moments: chunk_size must be at least 1"),
        (lambda: mc_moments(network, jax.random.split(KEY), 2), ValueError, "mc_moments: key must be one key"),
        (lambda: predictive_entropy(jnp.zeros(3)), ValueError, "predictive_entropy: log_probs must have an axis of"),
        (lambda: expected_entropy([0.0]), TypeError, "expected_entropy: log_probs must be an array, got [0.0]"),
        (lambda: mutual_information(LOG_PROBS, sample_axis=2), ValueError, "mutual_information: sample_axis must be"),
        (lambda: mutual_information(LOG_PROBS, sample_axis=None), TypeError, "mutual_information: sample_axis must be"),
        (lambda: mutual_information(LOG_PROBS.astype(int)), TypeError, "mutual_information: log_probs must be"),
        (lambda: mutual_information(LOG_PROBS[:0]), ValueError, "mutual_information: log_probs must have at least 1"),
        (lambda: variance_split(LOG_PROBS[:0], LOG_PROBS[:0]), ValueError, "variance_split: means must have at least"),
        (lambda: variance_split(LOG_PROBS, LOG_PROBS[:1]), ValueError, "variance_split: variances must have the shape"),
        (lambda: variance_split(LOG_PROBS, 1.0), TypeError, "variance_split: variances must be an array, got 1.0"),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match="^" + re.escape(text)):
        call()
