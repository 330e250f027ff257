"""dropout: its results for every dtype, key, shape, rate, and mode."""

import functools

import jax
import jax.numpy as jnp
import members
import numpy as np
import pytest
from members import MEMBERS

import jdrop
from jdrop import dropout, dropout_mask
from jdrop._bits import FastBits
from jdrop._mask import draw_mask
from jdrop._ops import SCALE
from jdrop._platform import GENERIC
from jdrop._primitive import MaskView
from jdrop._random import fast
from jdrop._types import FLOAT8, GENERATORS

KEY = jax.random.key(0)
SHAPES = [(), (0, 3), (7,), (300,), (200, 1), (2, 5, 7, 3), (6, 4, 256)]
DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64"]
IMPLS = ["threefry2x32", "rbg", "unsafe_rbg", "threefry4x32", "philox2x32", "philox4x32"]


def some(shape, dtype="float32"):
    x = np.reshape(np.arange(1, 1 + int(np.prod(shape)), dtype=np.float32) % 61 + 1, shape)
    return jnp.asarray((x * (1 - 2j) if dtype.startswith("complex") else x).astype(jnp.dtype(dtype)))


def keys_of_all_types():
    return [jax.random.key(7, impl=impl) for impl in IMPLS] + [jax.random.PRNGKey(7)]


def expected(x, mask, rate):
    """Kept values times float32(2**32 / (2**32 - t)) in float32 (float64 for float64), rounded once."""
    x, mask = np.asarray(x), np.asarray(mask)
    real = np.float64 if x.dtype == np.float64 else np.float32
    t = np.round(np.float64(np.float32(rate)) * 2**32)
    scale = real(2**32) / real(2**32 - t)
    if np.iscomplexobj(x):
        product = (x.real * scale + 1j * (x.imag * scale)).astype(x.dtype)
    else:
        product = (x.astype(real) * scale).astype(x.dtype)
    return np.where(mask, product, np.zeros((), x.dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("generator", GENERATORS)
def test_the_mask_of_dropout_is_dropout_mask(shape, generator):
    x = some(shape)
    y = dropout(KEY, x, 0.4, train=True, generator=generator)
    mask = dropout_mask(KEY, shape, 0.4, generator=generator)
    assert mask.shape == shape and mask.dtype == bool
    np.testing.assert_array_equal(np.asarray(y) != 0, mask)


@jax.jit
def scale_elsewhere(mask, x):
    """The form that every other platform gets, run here."""
    return SCALE.value(MaskView(mask, x, GENERIC), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rate", [1e-3, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("on_cpu_kernel", [True, False])
def test_kept_values_are_the_product_rounded_once(dtype, rate, on_cpu_kernel, x64):
    x = some((16, 256), dtype)
    if on_cpu_kernel:
        y = dropout(KEY, x, rate, train=True)
    else:  # the form of all other platforms, run on this machine
        y = scale_elsewhere(draw_mask("dropout", KEY, np.asarray(rate), x.shape), x)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, expected(x, dropout_mask(KEY, x.shape, rate), rate))


@pytest.mark.parametrize("dtype", FLOAT8)
def test_every_float8_is_scaled_in_float32_and_rounded_once(dtype):
    values = np.tile(np.arange(256, dtype=np.uint8), 8).view(dtype)
    with np.errstate(all="ignore"):
        scaled = expected(values, dropout_mask(KEY, values.shape, 0.3), 0.3)
    for y in (jax.jit(lambda x: dropout(KEY, x, 0.3, train=True))(values), dropout(KEY, values, 0.3, train=True)):
        assert y.dtype == dtype
        np.testing.assert_array_equal(np.asarray(y).astype(np.float32), scaled.astype(np.float32))  # NaN is NaN


@pytest.mark.parametrize("member", [name for name in MEMBERS if name not in ("dot_product_attention", "token_dropout")])
def test_members_take_float8(member):
    x = jax.ShapeDtypeStruct(members.SHAPE, jnp.float8_e5m2)
    for train in (True, False):
        y = jax.eval_shape(functools.partial(MEMBERS[member], rate=0.3, train=train), KEY, x)
        assert {leaf.dtype for leaf in jax.tree.leaves(y)} <= {x.dtype, jnp.dtype("int32")}


def test_zeros_keep_their_signs():
    """The form for CPU adds a zero that is opaque to the compiler."""
    x = jnp.where(jnp.arange(2048) % 2 == 0, 0.0, -0.0).reshape(2, 1024)
    for dtype in ("float32", "bfloat16", "float16"):
        y = dropout(KEY, x.astype(dtype), 0.5, train=True)
        mask = dropout_mask(KEY, x.shape, 0.5)
        np.testing.assert_array_equal(jnp.signbit(y), jnp.signbit(x) & mask)


@pytest.mark.parametrize("key", keys_of_all_types(), ids=[*IMPLS, "legacy"])
@pytest.mark.parametrize("generator", GENERATORS)
def test_every_key_type(key, generator):
    x = some((8, 200))
    y = np.asarray(dropout(key, x, 0.3, train=True, generator=generator))
    np.testing.assert_array_equal(y, dropout(key, x, 0.3, train=True, generator=generator))
    dropped = np.mean(y == 0)
    assert abs(dropped - 0.3) < 5 * np.sqrt(0.3 * 0.7 / x.size)
    other = jax.random.split(key)[0]
    assert np.any(y != dropout(other, x, 0.3, train=True, generator=generator))


def test_transposed_input_follows_its_own_indices():
    x = some((40, 300))
    np.testing.assert_array_equal(
        dropout(KEY, x.T, 0.5, train=True), dropout(KEY, jnp.array(np.asarray(x).T.copy()), 0.5, train=True)
    )


@pytest.mark.parametrize("scale_at", ["train", "eval"])
@pytest.mark.parametrize("x", [np.ones((2, 3), np.float32), some((4,)), some((4,), "bfloat16")])
def test_rate_zero_is_the_identity_and_needs_no_key(x, scale_at):
    for rate in (0, 0.0, np.float32(0), np.zeros(x.shape)):
        assert dropout(None, x, rate, train=True, scale_at=scale_at) is x
        assert dropout(None, x, rate, train=False, scale_at=scale_at) is x


def test_train_false_returns_x_itself():
    x = some((4,))
    assert dropout(None, x, 0.5, train=False) is x
    assert dropout(KEY, x, jnp.float32(0.5), train=np.bool_(False)) is x


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("scale_at", ["train", "eval"])
@pytest.mark.parametrize("rate", [1.0, 1, jnp.float32(1), jnp.float32(2)])
def test_rate_one_gives_zeros_and_finite_gradients(rate, scale_at, generator):
    x = some((3, 200)).at[0, 0].set(jnp.nan).at[0, 1].set(jnp.inf)

    def f(x):
        return dropout(KEY, x, rate, train=True, scale_at=scale_at, generator=generator)

    y, pull = jax.vjp(f, x)
    np.testing.assert_array_equal(y, np.zeros(x.shape))
    np.testing.assert_array_equal(pull(x)[0], np.zeros(x.shape))
    if scale_at == "eval":
        y = dropout(None, x, rate, train=False, scale_at="eval", generator=generator)
        np.testing.assert_array_equal(y, np.zeros(x.shape))


@pytest.mark.parametrize("generator", GENERATORS)
def test_traced_rates_follow_the_rules_without_recompiling(generator):
    x = some((16, 256))
    traces = 0

    @jax.jit
    def f(x, rate):
        nonlocal traces
        traces += 1
        return dropout(KEY, x, rate, train=True, generator=generator)

    for rate in (0.1, 0.5, 0.999):
        np.testing.assert_array_equal(f(x, rate), dropout(KEY, x, rate, train=True, generator=generator))
    for below in (0.0, -0.5, -np.inf):
        np.testing.assert_array_equal(f(x, below), x)
    for above in (1.0, 1.5, np.inf):
        np.testing.assert_array_equal(f(x, above), np.zeros(x.shape))
    assert bool(jnp.all(jnp.isnan(f(x, np.nan))))
    assert traces == 1


@pytest.mark.parametrize("scale_at", ["train", "eval"])
@pytest.mark.parametrize("train", [True, False])
def test_nan_rate_gives_nan(scale_at, train):
    if train or scale_at == "eval":
        for dtype in ("bfloat16", "float32", "complex64"):
            y = dropout(KEY, some((4, 300), dtype), jnp.float32(jnp.nan), train=train, scale_at=scale_at)
            assert bool(jnp.all(jnp.isnan(y)))


def test_no_gradient_flows_to_the_rate():
    x = some((8, 128))
    for train, scale_at in ((True, "train"), (True, "eval"), (False, "eval")):
        g = jax.grad(lambda r, t=train, s=scale_at: dropout(KEY, x, r, train=t, scale_at=s).sum())(0.5)
        assert g == 0.0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("rate_dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtype_of_x_is_kept_whatever_the_dtype_of_the_rate(dtype, rate_dtype, x64):
    x = some((4, 256), dtype)

    def dtype_of(rate, **options):
        return jax.eval_shape(lambda x: dropout(KEY, x, rate, **options), x).dtype

    for rate in (jnp.asarray(0.25, rate_dtype), np.asarray(0.25, np.float64)[()], jnp.full((4, 1), 0.25, rate_dtype)):
        for generator in ("fast", "jax"):
            assert dtype_of(rate, train=True, generator=generator) == x.dtype
        assert dtype_of(rate, train=False, scale_at="eval") == x.dtype


def test_the_rate_is_first_rounded_to_float32(x64):
    """0.1 and float32(0.1) differ by 1.5e-9, 6 steps of 2**-32. Words that tell them apart are rare, so the test compares
    the thresholds."""
    for rate in (0.1, 1e-6, 1 / 3):
        exact = np.round(np.float64(np.float32(rate)) * 2**32)
        for value in (rate, np.float32(rate), jnp.asarray(rate)):
            p = FastBits().rate(value if isinstance(value, jax.Array) else np.asarray(value))
            assert int(fast.threshold(p)[0]) == exact
            assert float(fast.keep_probability(p, jnp.float64)) == (2**32 - exact) / 2**32


def test_thresholds_round_half_to_even():
    for steps, t in ((0.5, 0), (1.5, 2), (2.5, 2), (3.5, 4), (3.25, 3)):
        assert int(fast.threshold(jnp.float32(steps * 2.0**-32))[0]) == t


def test_array_rates_compare_the_same_words_with_other_thresholds():
    x = jnp.ones((3, 1000))
    rates = jnp.array([0.2, 0.5, 0.8])[:, None]
    y = dropout(KEY, x, rates, train=True)
    for i, rate in enumerate([0.2, 0.5, 0.8]):
        np.testing.assert_array_equal(y[i], dropout(KEY, x, rate, train=True)[i])
    nested = [dropout_mask(KEY, x.shape, r) for r in (0.2, 0.5, 0.8)]
    assert bool(jnp.all(nested[0] | ~nested[1])) and bool(jnp.all(nested[1] | ~nested[2]))
    per_feature = dropout(KEY, x, np.linspace(0, 1, 1000), train=True)  # NumPy's rules: broadcast from the right
    np.testing.assert_array_equal(per_feature[:, 0], x[:, 0])
    np.testing.assert_array_equal(per_feature[:, -1], np.zeros(3))


@pytest.mark.parametrize("generator", ["fast", "jax"])
def test_shared_axes_share_one_decision(generator):
    x = jnp.ones((4, 50, 300))
    for axes, equal in (((1,), (1,)), ((-2,), (1,)), ((0, 1), (0, 1)), (-3, (0,)), ((0, 1, 2), (0, 1, 2))):
        y = np.asarray(dropout(KEY, x, 0.5, train=True, shared_axes=axes, generator=generator))
        np.testing.assert_array_equal(y, np.broadcast_to(y.max(axis=equal, keepdims=True), y.shape))
        decisions = tuple(1 if a in equal else n for a, n in enumerate(x.shape))
        mask = dropout_mask(KEY, decisions, 0.5, generator=generator)
        np.testing.assert_array_equal(y != 0, np.broadcast_to(mask, x.shape))
    rates = np.array([0.0, 1.0, 0.5, 0.5])[:, None, None]
    y = dropout(KEY, x, rates, train=True, shared_axes=1, generator=generator)
    assert bool(jnp.all(y[0] == 1)) and bool(jnp.all(y[1] == 0))


def test_dropped_nan_and_inf_do_not_leak():
    for dtype in ("float16", "bfloat16", "float32", "complex64"):
        for bad in (jnp.nan, jnp.inf, -jnp.inf):
            x = jnp.full((8, 300), bad, dtype)
            y, pull = jax.vjp(lambda x: dropout(KEY, x, 0.5, train=True), x)
            mask = np.asarray(dropout_mask(KEY, x.shape, 0.5))
            for z in (np.asarray(y), np.asarray(pull(x)[0])):
                assert np.all(z[~mask] == 0) and not np.any(np.isfinite(z[mask]))


def test_inverted_and_original_dropout():
    x = some((64, 256))
    rate = 0.3
    train, evaluate = (dropout(KEY, x, rate, train=t, scale_at="eval") for t in (True, False))
    mask = np.asarray(dropout_mask(KEY, x.shape, rate))
    np.testing.assert_array_equal(train, np.where(mask, x, 0))
    t = np.round(np.float64(np.float32(rate)) * 2**32)
    np.testing.assert_array_equal(evaluate, np.asarray(x) * np.float32((2**32 - t) / 2**32))
    inverted = dropout(KEY, x, rate, train=True)
    np.testing.assert_allclose(inverted * (1 - rate), train, rtol=1e-6)
    np.testing.assert_array_equal(
        jax.grad(lambda x: dropout(KEY, x, rate, train=False, scale_at="eval").sum())(x)[0, 0],
        np.float32((2**32 - t) / 2**32),
    )


@pytest.mark.parametrize("generator", ["fast", "jax"])
def test_original_dropout_with_a_traced_rate(generator):
    x = some((4, 256))
    f = jax.jit(lambda x, r: dropout(None, x, r, train=False, scale_at="eval", generator=generator))
    for rate, factor in ((0.0, 1), (-1.0, 1), (0.25, 0.75), (1.0, 0), (2.0, 0)):
        np.testing.assert_array_equal(f(x, rate), x * factor)


def test_jit_equals_eager_and_needs_train_static():
    x = some((8, 256))
    f = jax.jit(dropout, static_argnames="train")
    np.testing.assert_array_equal(f(KEY, x, 0.5, train=True), dropout(KEY, x, 0.5, train=True))
    np.testing.assert_array_equal(f(KEY, x, 0.5, train=False), x)
    with pytest.raises(TypeError, match=r"dropout: train must be static, got a traced value; .*jnp.where\(train"):
        jax.jit(dropout)(KEY, x, 0.5, train=True)


def test_disabled_jit_gives_the_same():
    x = some((4, 200))
    y, mask, key = dropout(KEY, x, 0.5, train=True), dropout_mask(KEY, x.shape, 0.5), jdrop.keys.derive(KEY, "a", 1)
    with jax.disable_jit():
        np.testing.assert_array_equal(dropout(KEY, x, 0.5, train=True), y)
        np.testing.assert_array_equal(dropout_mask(KEY, x.shape, 0.5), mask)
        assert bool(jdrop.keys.derive(KEY, "a", 1) == key)


def test_a_longer_batch_keeps_the_masks_of_a_shorter_one():
    short, long = (dropout_mask(KEY, (n, 4, 100), 0.5) for n in (3, 9))
    np.testing.assert_array_equal(short, long[:3])


def test_key_is_used_once(monkeypatch):
    x = some((4, 200))
    with jax.debug_key_reuse(True):
        for generator in ("fast", "jax"):
            key = jax.random.key(1)
            y = dropout(key, x, 0.5, train=True, generator=generator)
            with pytest.raises(jax.errors.KeyReuseError):
                dropout(key, x, 0.5, train=True, generator=generator)
            with pytest.raises(jax.errors.KeyReuseError):
                dropout_mask(key, x.shape, 0.5, generator=generator)
            again = dropout(jax.random.clone(key), x, 0.5, train=True, generator=generator)
            np.testing.assert_array_equal(y, again)

            key = jax.random.key(2)  # forward and backward of one call are one use
            step = jax.jit(jax.grad(lambda x, k, g=generator: dropout(k, x, 0.5, train=True, generator=g).sum()))
            step(x, key)
            with pytest.raises(jax.errors.KeyReuseError):
                step(x, key)

            @jax.jit
            def twice(k, x, g=generator):
                return dropout(k, x, 0.5, train=True, generator=g) + dropout(k, x, 0.5, train=True, generator=g)

            with pytest.raises(jax.errors.KeyReuseError):
                twice(jax.random.key(3), x)

        key = jax.random.key(4)  # nothing is random, so the key stays unused
        dropout(key, x, 0.5, train=False)
        dropout(key, x, 0.0, train=True)
        dropout(jdrop.keys.derive(key, "a"), x, 0.5, train=True)
        dropout(jdrop.keys.derive(key, "b"), x, 0.5, train=True)
        jax.vmap(lambda k, x: dropout(k, x, 0.5, train=True))(jdrop.keys.per_example(key, jnp.arange(4)), x)
        dropout(key, x, 0.5, train=True)


# ------------------------------------------------------------------------------------ alpha dropout

LIMIT = -1.0507009873554804934193349852946 * 1.6732632423543772848170429916717  # -lambda * alpha of the paper


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_alpha_dropout_keeps_mean_and_variance(rate):
    """For N standard normal inputs, the standard error of the mean is 1 / sqrt(N), and that of the variance is
    sqrt((E y^4 - 1) / N), with the fourth moment of the same sample."""
    x = jax.random.normal(jax.random.key(1), (2048, 2048))
    y = np.asarray(jdrop.alpha_dropout(KEY, x, rate, train=True), np.float64)
    assert abs(y.mean()) < 5 / np.sqrt(y.size)
    assert abs(y.var() - 1) < 5 * np.sqrt((np.square(y * y).mean() - 1) / y.size)


@pytest.mark.parametrize("rate", [1e-3, 0.2, 0.9])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_alpha_dropout_is_the_formula_of_the_paper(rate, dtype, x64):
    x = some((16, 256), dtype) / jnp.asarray(8, dtype) - jnp.asarray(3, dtype)
    y = jdrop.alpha_dropout(KEY, x, rate, train=True)
    q = 1 - np.round(np.float64(np.float32(rate)) * 2**32) / 2**32
    a = (q + LIMIT**2 * q * (1 - q)) ** -0.5
    b = -a * (1 - q) * LIMIT
    mask = np.asarray(dropout_mask(KEY, x.shape, rate))
    exact = a * np.where(mask, np.asarray(x, np.float64), LIMIT) + b
    step = {"bfloat16": 2**-8, "float32": 2**-22, "float64": 2**-50}[dtype]
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=step, atol=4 * step)
    g = jax.grad(lambda x: jdrop.alpha_dropout(KEY, x, rate, train=True).sum())(jnp.where(mask, x, jnp.nan))
    np.testing.assert_allclose(np.asarray(g, np.float64), np.where(mask, a, 0), rtol=step)


@pytest.mark.compiled
def test_alpha_dropout_at_the_limits_and_with_rates_along_an_axis():
    x = some((5, 300))
    rates = jnp.array([0.0, 1e-9, 0.5, 1 - 2**-24, 1.0])[:, None]
    y, pull = jax.vjp(lambda x: jdrop.alpha_dropout(KEY, x, rates, train=True), x)
    np.testing.assert_allclose(y[:2], x[:2], rtol=1e-6)
    np.testing.assert_array_equal(y[4], np.zeros(300))
    np.testing.assert_array_equal(y[2], jdrop.alpha_dropout(KEY, x, 0.5, train=True)[2])
    assert bool(jnp.isfinite(y).all()) and bool(jnp.isfinite(pull(x)[0]).all())
    assert float(jnp.abs(y[3]).max()) < 1e-3, "close to the limit 0"


def test_feature_alpha_dropout_shares_decisions():
    x = jnp.ones((8, 5, 64))
    y = jdrop.alpha_dropout(KEY, x, 0.5, train=True, shared_axes=1)
    np.testing.assert_array_equal(y, jnp.broadcast_to(y[:, :1], y.shape))
    mask = dropout_mask(KEY, x.shape, 0.5, shared_axes=1)
    np.testing.assert_array_equal(np.asarray(y) > 0, mask)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "philox2x32"])
def test_nan_rate_gives_nan_for_every_key_implementation(impl):
    key = jax.random.key(7, impl=impl)
    y = dropout(key, jnp.ones((4, 300)), jnp.float32(jnp.nan), train=True, generator="jax")
    assert bool(jnp.isnan(y).all())
    assert bool(dropout_mask(jax.random.clone(key), (4, 300), jnp.float32(jnp.nan), generator="jax").all())


def test_complex128_is_scaled_in_float64(x64):
    x = jnp.arange(1.0, 4097.0).reshape(16, 256).astype("complex128") * (1 - 2j)
    y = dropout(KEY, x, 0.1, train=True)
    assert y.dtype == jnp.complex128
    mask = np.asarray(dropout_mask(jax.random.clone(KEY), x.shape, 0.1))
    scale = 2**32 / (2**32 - np.round(np.float64(np.float32(0.1)) * 2**32))
    z = np.asarray(x)
    np.testing.assert_array_equal(y, np.where(mask, z.real * scale + 1j * (z.imag * scale), 0))


def test_a_result_is_never_weakly_typed():
    for x in (jnp.asarray(2.0), jnp.full((4, 300), 2.0)):
        assert x.aval.weak_type
        assert not dropout(KEY, x, 0.5, train=True).aval.weak_type
        assert not jax.jit(lambda x: dropout(KEY, x, 0.5, train=True))(x).aval.weak_type


def test_original_dropout_with_the_probability_of_generator_jax():
    """A bfloat16 rate draws 7 bits: 1 - bfloat16(0.1) = 0.8984375 = 115 / 128."""
    y = dropout(None, jnp.ones((2, 3)), jnp.bfloat16(0.1), train=False, scale_at="eval", generator="jax")
    np.testing.assert_array_equal(y, np.full((2, 3), 115 / 128, np.float32))
