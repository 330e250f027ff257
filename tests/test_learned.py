"""Concrete and variational dropout against NumPy, quadrature, and optima that can be computed."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import scipy.optimize
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jdrop
from jdrop.learned import concrete_dropout, concrete_regularizer, variational_dense, variational_keep, variational_kl
from jdrop.learned._parts import ADD_LOGISTIC

KEY = jax.random.key(5)
X = jax.random.normal(jax.random.key(0), (4, 200))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# ---------------------------------------------------------------------------------- concrete dropout


@pytest.mark.parametrize("shape, shared_axes", [((4, 200), ()), ((3, 5, 130), (1,)), ((7,), (0,))])
def test_concrete_dropout_is_its_formula(shape, shared_axes):
    x = jax.random.normal(jax.random.key(0), shape)
    decisions = tuple(1 if axis in shared_axes else n for axis, n in enumerate(shape))
    u = (reference.words((0, 5), decisions).astype(np.float64) + 0.5) / 2**32
    for logit in (-3.0, 0.0, 2.0):
        z = sigmoid((logit - np.log(u / (1 - u))) / 0.1)
        y = concrete_dropout(KEY, x, logit, train=True, shared_axes=shared_axes)
        np.testing.assert_allclose(y, np.asarray(x) * (1 - z) / (1 - sigmoid(logit)), rtol=2e-4, atol=1e-6)


def test_logistic_noise_of_the_lowest_and_the_highest_word_is_finite_and_symmetric():
    words = types.SimpleNamespace(word=lambda: jnp.array([0, 2**32 - 1], jnp.uint32))
    noise = ADD_LOGISTIC.value(words, jnp.zeros(2))
    np.testing.assert_allclose(noise, [-33 * np.log(2), 33 * np.log(2)], rtol=1e-6)


def test_at_a_low_temperature_it_is_dropout():
    soft = concrete_dropout(KEY, X, 0.0, train=True, temperature=1e-5)
    hard = jdrop.dropout(KEY, X, 0.5, train=True)
    assert np.isclose(soft, hard).mean() > 0.995


def test_in_evaluation_it_is_the_identity():
    assert concrete_dropout(None, X, 0.0, train=False) is X


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5, 0.9])
def test_the_mean_is_that_of_the_formula(rate):
    logit = np.log(rate / (1 - rate))
    u = (np.arange(100_000) + 0.5) / 100_000
    factor = sigmoid((np.log(u / (1 - u)) - logit) / 0.1) / (1 - rate)
    assert abs((1 - rate) * (factor.mean() - 1)) < 0.002  # the limit in the docstring
    y = concrete_dropout(KEY, jnp.ones(200_000), logit, train=True)
    assert abs(y.mean() - factor.mean()) < 5 * factor.std() / np.sqrt(y.size)


def test_gradients_reach_x_and_the_logit():
    with jax.enable_x64(True):
        x = X[:, :50].astype(jnp.float64)
        for logit in (jnp.float64(-1.0), jnp.linspace(-2.0, 1.0, 50)):
            check_grads(lambda x, logit: concrete_dropout(KEY, x, logit, train=True), (x, logit), order=2, rtol=1e-4)


def test_nothing_of_the_size_of_the_mask_is_kept_but_x():
    x = jnp.ones((64, 1024))
    _, pull = jax.vjp(lambda x, logit: concrete_dropout(KEY, x, logit, train=True), x, jnp.float32(0))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pull)) <= x.nbytes + 100


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_low_precision_is_rounded_once(dtype):
    x = X.astype(dtype)
    exact = concrete_dropout(KEY, x.astype(jnp.float32), -1.0, train=True)
    y = concrete_dropout(KEY, x, -1.0, train=True)
    assert y.dtype == dtype and (y == exact.astype(dtype)).all()


def test_extreme_logits_are_finite():
    for logit in (-80.0, 80.0):
        y, gradient = jax.value_and_grad(lambda logit: concrete_dropout(KEY, X, logit, train=True).sum())(logit)
        assert np.isfinite(y) and np.isfinite(gradient)


def regularizer_by_hand(logit, kernel, n, length_scale, precision):
    rate = sigmoid(np.asarray(logit, np.float64))
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
    entropies = np.broadcast_to(entropy, kernel.shape[-2]).sum()
    squares = (np.asarray(kernel, np.float64) ** 2).sum(tuple(i for i in range(kernel.ndim) if i != kernel.ndim - 2))
    return (length_scale**2 / 2 * (squares / (1 - rate)).sum() - entropies) / (n * precision)


@pytest.mark.parametrize("shape", [(8, 4), (3, 3, 8, 4)])
@pytest.mark.parametrize("logit", [-2.0, np.linspace(-2, 1, 8, dtype=np.float32)])
def test_the_regularizer_is_its_formula(shape, logit):
    kernel = jax.random.normal(KEY, shape)
    ours = concrete_regularizer(logit, kernel, num_examples=50, length_scale=0.3, precision=2.0)
    np.testing.assert_allclose(ours, regularizer_by_hand(logit, kernel, 50, 0.3, 2.0), rtol=1e-5)
    moved = jnp.moveaxis(kernel, -2, 0)
    same = concrete_regularizer(logit, moved, num_examples=50, length_scale=0.3, precision=2.0, feature_axis=0)
    np.testing.assert_allclose(same, ours, rtol=1e-5)


def test_the_regularizer_of_low_precision_and_its_default():
    kernel = (jax.random.normal(KEY, (8, 4)) / 300).astype(jnp.float16)  # squares are below float16
    ours = concrete_regularizer(-2.0, kernel, num_examples=1, length_scale=1e3)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, regularizer_by_hand(-2.0, kernel, 1, 1e3, 1.0), rtol=1e-5)


def test_the_learned_rate_is_the_optimum():
    """Of the mean of ``(factor w)^2 / 2`` plus the regularizer, whose expectation is computed by quadrature."""
    w, options = jnp.full((16, 1), 0.4), {"num_examples": 40, "length_scale": 0.5}
    u = (np.arange(20_000) + 0.5) / 20_000
    logistic = np.log(u / (1 - u))

    def expected(logit):
        factor = sigmoid((logistic - logit) / 0.1) / (1 - sigmoid(logit))
        return (factor**2).mean() * 0.4**2 / 2 + regularizer_by_hand(logit, w, 40, 0.5, 1.0)

    optimum = scipy.optimize.minimize_scalar(expected, bounds=(-5, 3), method="bounded").x

    def loss(logit, step):
        key = jdrop.keys.derive(KEY, step)
        y = concrete_dropout(key, jnp.full(4000, 0.4), logit, train=True)
        return (y**2).mean() / 2 + concrete_regularizer(logit, w, **options)

    optimizer = optax.sgd(optax.linear_schedule(5.0, 0.0, 400))

    def update(carry, step):
        logit, state = carry
        updates, state = optimizer.update(jax.grad(loss)(logit, step), state)
        return (optax.apply_updates(logit, updates), state), logit

    start = jnp.float32(2.0)
    (logit, _), _ = jax.jit(lambda: jax.lax.scan(update, (start, optimizer.init(start)), jnp.arange(400)))()
    assert -4 < optimum < 1 and abs(sigmoid(logit) - sigmoid(optimum)) < 0.005


# ---------------------------------------------------------------------------------- variational dropout


def test_variational_outputs_have_the_mean_and_variance_of_noisy_weights():
    x, kernel = X[:2, :6], jax.random.normal(KEY, (6, 3))
    log_alpha = jnp.linspace(-4.0, 5.0, 18).reshape(6, 3)  # training also uses weights that evaluation drops
    n = 20_000
    mean, variance = jdrop.uncertainty.mc_moments(
        lambda key: variational_dense(key, x, kernel, log_alpha, train=True), KEY, n, chunk_size=1000
    )
    exact = np.asarray(x, np.float64) ** 2 @ (np.exp(np.asarray(log_alpha)) * np.asarray(kernel, np.float64) ** 2)
    assert (abs(mean - np.asarray(x) @ np.asarray(kernel)) < 5 * np.sqrt(exact / n)).all()
    assert (abs(variance / exact - 1) < 5 * np.sqrt(2 / n)).all()


def test_variational_variance_of_low_precision_is_computed_in_float32():
    x, kernel = jnp.full((1, 4), 300, jnp.float16), jnp.full((4, 500), 0.01, jnp.float16)  # 300^2 is above float16
    y = variational_dense(KEY, x, kernel, 0.0, train=True)
    exact = variational_dense(KEY, x.astype(jnp.float32), kernel.astype(jnp.float32), 0.0, train=True)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y, exact, rtol=2**-10, atol=12 * 2**-11)  # the mean, 12, is rounded too


def test_variational_dense_is_pruned_in_evaluation():
    kernel, log_alpha = jax.random.normal(KEY, (6, 3)), jnp.linspace(-4.0, 6.0, 18).reshape(6, 3)
    keep = variational_keep(log_alpha)
    assert keep.any() and not keep.all()
    y = variational_dense(None, X[:, :6], kernel, log_alpha, train=False)
    np.testing.assert_allclose(y, X[:, :6] @ jnp.where(keep, kernel, 0), rtol=1e-5)
    all_kept = variational_dense(None, X[:, :6], kernel, log_alpha, train=False, threshold=10.0)
    np.testing.assert_allclose(all_kept, X[:, :6] @ kernel, rtol=1e-5, atol=1e-6)


def test_the_threshold_itself_is_dropped():
    """As the authors' code does, which keeps ``log_alpha`` below the threshold."""
    assert variational_keep(jnp.array([2.9, 3.0, 3.1])).tolist() == [True, False, False]


def test_variational_kl_is_its_formula():
    log_alpha = np.linspace(-10, 10, 41)
    exact = np.log1p(np.exp(-log_alpha)) / 2 + 0.63576 * (1 - sigmoid(1.87320 + 1.48695 * log_alpha))
    for i, x in enumerate(log_alpha):
        np.testing.assert_allclose(variational_kl(jnp.float32(x)), exact[i], rtol=2e-5)
    np.testing.assert_allclose(variational_kl(jnp.asarray(log_alpha, jnp.float32)), exact.sum(), rtol=1e-5)
    halves = variational_kl(jnp.zeros(5000, jnp.float16))
    assert halves.dtype == jnp.float32
    np.testing.assert_allclose(halves, 5000 * exact[20], rtol=1e-4)


def test_variational_kl_is_close_to_the_integral():
    """``E[log|1 + sqrt(alpha) z|] - log(alpha) / 2 + c``, by quadrature; it vanishes as alpha grows."""
    z = np.linspace(-10, 10, 400_001) + 1e-7
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * (z[1] - z[0])

    def integral(log_alpha):
        return density @ np.log(abs(1 + np.exp(log_alpha / 2) * z)) - log_alpha / 2

    for log_alpha in (-8.0, -4.0, -1.0, 0.0, 2.0, 6.0):
        exact = integral(log_alpha) - integral(20.0)
        assert abs(variational_kl(jnp.float32(log_alpha)) - exact) < 0.01


def test_variational_gradients_and_residuals():
    with jax.enable_x64(True):
        x, kernel = X[:2, :6].astype(jnp.float64), jax.random.normal(KEY, (6, 3), jnp.float64)
        log_alpha = jnp.linspace(-4.0, 1.0, 18).reshape(6, 3)
        call = lambda *operands: variational_dense(KEY, *operands, train=True)
        check_grads(call, (x, kernel, log_alpha), order=1, rtol=1e-4)
    zeros = jax.grad(lambda x: variational_dense(KEY, x, jnp.ones((6, 3)), jnp.zeros((6, 3)), train=True).sum())
    assert np.isfinite(zeros(jnp.zeros((2, 6)))).all()
    x = jnp.ones((8, 16))
    _, pull = jax.vjp(lambda x: variational_dense(KEY, x, jnp.ones((16, 4096)), jnp.zeros(()), train=True), x)
    outputs = 8 * 4096 * 4  # the variance is kept, and the noise is not
    weights = 2 * 16 * 4096 * 4
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pull)) <= outputs + weights + 2 * x.nbytes + 1000


@pytest.mark.examples
def test_variational_dropout_prunes_noise_features():
    """A regression on 10 features that matter and 20 that do not."""
    n, real, noise = 300, 10, 20
    x = jax.random.normal(jdrop.keys.derive(KEY, "x"), (n, real + noise))
    w = jnp.concatenate([jnp.where(jnp.arange(real) % 2 == 0, 1.0, -1.0), jnp.zeros(noise)])[:, None]
    y = x @ w + 0.1 * jax.random.normal(jdrop.keys.derive(KEY, "y"), (n, 1))

    def log_alpha(params):
        return params["log_sigma2"] - jnp.log(params["kernel"] ** 2 + 1e-8)

    def loss(params, step):
        key = jdrop.keys.derive(KEY, "dropout", step)
        mean = variational_dense(key, x, params["kernel"], log_alpha(params), train=True)
        nll = ((y - mean) ** 2 / 2).mean()
        warm_up = jnp.minimum(step / 1000, 1).astype(jnp.float32)
        return nll + warm_up * variational_kl(log_alpha(params)) / n

    optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, 2000))
    params = {"kernel": jnp.full_like(w, 0.1), "log_sigma2": jnp.full_like(w, -8.0)}

    def update(carry, step):
        params, state = carry
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jax.grad(loss)(params, step), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda p: jax.lax.scan(update, (p, optimizer.init(p)), jnp.arange(2000)))(params)
    keep = np.asarray(variational_keep(log_alpha(params)))[:, 0]
    assert keep[:real].all() and not keep[real:].any()


# ---------------------------------------------------------------------------------- both

KERNEL = jnp.ones((200, 16)) / 200
CALLS = {
    "concrete_dropout": lambda key, x, **options: concrete_dropout(key, x, -1.0, train=True, **options),
    "variational_dense": lambda key, x, **options: variational_dense(
        key, x, KERNEL, jnp.float32(-1), train=True, **options
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_transforms(name):
    call = CALLS[name]
    np.testing.assert_allclose(jax.jit(call)(KEY, X), call(KEY, X), rtol=1e-5, atol=1e-6)
    keys = jax.random.split(KEY, 4)
    for row, key, x in zip(jax.vmap(call)(keys, X), keys, X):
        np.testing.assert_allclose(row, call(key, x), rtol=1e-5, atol=1e-6)
    _, scanned = jax.lax.scan(lambda _, key: (None, call(key, X)), None, keys)
    np.testing.assert_allclose(scanned[2], call(keys[2], X), rtol=1e-5, atol=1e-6)


def test_arrays_of_numpy():
    """Also of float64, which is float32 without ``jax_enable_x64``."""
    options = {"num_examples": 9, "length_scale": 1.0}
    for dtype in (np.float32, np.float64):
        x, kernel = np.asarray(X, dtype), np.asarray(KERNEL, dtype)
        for train in (False, True):
            exact = variational_dense(KEY, X, KERNEL, -1.0, train=train)
            np.testing.assert_allclose(variational_dense(KEY, x, kernel, -1.0, train=train), exact, rtol=1e-6)
        exact = concrete_dropout(KEY, X, 0.0, train=True)
        np.testing.assert_array_equal(concrete_dropout(KEY, x, np.zeros(200, dtype), train=True), exact)
        exact = concrete_regularizer(0.0, KERNEL, **options)
        np.testing.assert_allclose(concrete_regularizer(0.0, kernel, **options), exact, rtol=1e-6)
    assert isinstance(variational_keep(np.zeros(3)), jax.Array)


def test_python_numbers_keep_their_digits_in_float64():
    with jax.enable_x64(True):
        x = X.astype(jnp.float64)
        ours, exact = (concrete_dropout(KEY, x, logit, train=True) for logit in (-2.2, jnp.float64(-2.2)))
        np.testing.assert_allclose(ours, exact, rtol=1e-14)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_on_a_mesh(name, explicit):
    x = jnp.concatenate([X, X])
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        ours = jax.jit(CALLS[name])(KEY, jax.device_put(x, NamedSharding(mesh, P("data"))))
    np.testing.assert_allclose(ours, CALLS[name](KEY, x), rtol=1e-5, atol=1e-6)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tiles = jax.shard_map(
        lambda x: CALLS[name](KEY, x, shard=P("data")), mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    np.testing.assert_allclose(tiles(x), CALLS[name](KEY, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (
            lambda: concrete_dropout(KEY, X, 0.0, train=True, temperature=0),
            ValueError,
            "concrete_dropout: temperature must",
        ),
        (
            lambda: concrete_dropout(KEY, X, jnp.ones(3), train=True),
            ValueError,
            "concrete_dropout: logit must broadcast",
        ),
        (
            lambda: concrete_dropout(KEY, X, True, train=True),
            TypeError,
            "concrete_dropout: logit must be an array, got T",
        ),
        (
            lambda: concrete_dropout(None, X, 0.0, train=True),
            TypeError,
            "concrete_dropout: key must be a PRNG key when",
        ),
        (
            lambda: concrete_dropout(KEY, X, np.inf, train=True),
            ValueError,
            "concrete_dropout: logit must be finite, got inf",
        ),
        (
            lambda: jax.jit(lambda train: concrete_dropout(KEY, X, 0.0, train=train))(True),
            TypeError,
            "concrete_dropout: train must be static, got a traced value; list train in static_argnames",
        ),
        (
            lambda: variational_dense(None, X, KERNEL, 0.0, train=True),
            TypeError,
            "variational_dense: key must be a PRNG key when train is true, got None; pass a key, or train=False",
        ),
        (
            lambda: variational_dense(3, X, KERNEL, 0.0, train=False),
            TypeError,
            "variational_dense: key must be a PRNG key, got 3",
        ),
        (
            lambda: variational_dense(KEY, X, KERNEL, 0.0, train=True, threshold="3"),
            TypeError,
            "variational_dense: threshold must be a number, got '3'",
        ),
        (lambda: concrete_dropout(KEY, X, 0.0, train=1), TypeError, "concrete_dropout: train must be a bool, got 1"),
        (
            lambda: concrete_dropout(KEY, X, 0.0, train=True, shared_axes=2),
            ValueError,
            "concrete_dropout: shared_axes must",
        ),
        (
            lambda: concrete_regularizer(0.0, KERNEL, num_examples=0, length_scale=1.0),
            ValueError,
            "concrete_regularizer: num_examples must be at least 1",
        ),
        (
            lambda: concrete_regularizer(jnp.ones(3), KERNEL, num_examples=9, length_scale=1.0),
            ValueError,
            "concrete_regularizer: logit must broadcast",
        ),
        (
            lambda: variational_dense(KEY, X, KERNEL[:3], jnp.zeros(()), train=True),
            ValueError,
            "variational_dense: kernel must be [features, outputs]",
        ),
        (
            lambda: variational_dense(KEY, X, KERNEL, jnp.zeros(3), train=True),
            ValueError,
            "variational_dense: log_alpha must broadcast",
        ),
        (lambda: variational_kl(jnp.arange(3)), TypeError, "variational_kl: log_alpha must be"),
        (lambda: variational_keep(jnp.zeros(3), np.inf), ValueError, "variational_keep: threshold must be finite"),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match="^" + re.escape(text)):
        call()
