"""Attention has the values and gradients of its formula, in every implementation."""

import functools

import attention_suite
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import (
    KEY,
    check,
    close,
    data,
    formula,
    gradients,
    mask_factor,
    normal,
    quick,
    step,
    truth,
    visible,
)

import jdrop
from jdrop._platform import PLATFORMS

implementation = attention_suite.implementation
SCORES = (2, 4, 20, 15)
FEW_KEYS = {"queries": 20, "keys": 16, "heads": 2, "key_heads": 1, "batch": 5}


# ---------------------------------------------------------------------------------- what a query sees


def test_bias_mask_and_scale(implementation):
    mask, bias = normal(9, 2, 1, 20, 1) > -1, normal(8, 4, 1, 15)
    check(implementation, data(), 0.25, bias, mask=mask, scale=-0.3, is_causal=True, shared_axes=(0, 1))


def test_one_query_without_batch_with_an_array_as_scale(implementation):
    """Bias, mask, and lengths are NumPy arrays. The scale has a gradient too."""
    q, k, v, do = data(batch=1, queries=1, keys=40)
    bias, mask, lengths = normal(4, 4, 1, 40), normal(5, 4, 1, 40) > -1, np.array([30], np.uint8)
    options = {"mask": mask, "key_value_seq_lengths": lengths}

    @quick
    def f(scale, q, k, v, do):
        attend = lambda q, k, v, s: implementation.attend(KEY, q, k, v, bias=bias, scale=s, **options)
        return gradients(attend, q, k, v, do, scale)

    *results, slope = f(jnp.float32(0.2), *(x[0] for x in (q, k, v, do)))
    expected = lambda scale: truth(KEY, q, k, v, do, bias=bias, scale=scale, **options)
    close(results, [x[0] for x in expected(0.2)[:4]])
    dot = lambda scale: np.vdot(expected(scale)[0], do)
    np.testing.assert_allclose(slope, (dot(0.2 + 1e-5) - dot(0.2 - 1e-5)) / 2e-5, rtol=1e-4)


def test_one_wrong_decision_is_seen():
    """All mask comparisons rely on this: `close` fails for the formula with one decision changed."""
    q, k, v, do = data()
    factor = mask_factor(KEY, SCORES, 0.25)
    expected = formula(q, k, v, do, factor)
    close(expected, expected)
    for at in np.random.default_rng(0).integers(SCORES, size=(50, 4)):
        wrong = factor.copy()
        wrong[tuple(at)] = 1 / 0.75 - wrong[tuple(at)]
        results = formula(q, k, v, do, wrong)
        for x, y in zip(results, expected):  # in each pass, and for both uses of the mask in the backward pass
            with pytest.raises(AssertionError):
                close([x], [y])


def test_a_window_may_be_as_wide_as_an_integer(implementation):
    q, k, v, _ = data(queries=9, keys=12)
    f = lambda q, k, v: implementation.attend(None, q, k, v, train=False, local_window_size=2**31 - 1)
    close([quick(f)(q, k, v)], truth(None, q, k, v, train=False))


def test_query_key_and_value_may_be_numpy_arrays(implementation):
    q, k, v, _ = data()
    assert isinstance(q, np.ndarray)
    out = jax.eval_shape(lambda: implementation.attend(KEY, q, k, v))
    assert out.shape == q.shape and out.dtype == q.dtype


def test_sizes_of_zero(implementation):
    empty = {
        "batch": {"batch": 0},
        "queries": {"queries": 0},
        "keys": {"keys": 0},
        "heads": {"heads": 0, "key_heads": 1},
    }
    for sizes in empty.values():
        arrays = data(**{"queries": 5, "keys": 5, **sizes})
        if implementation.zero_and_symbolic_sizes:
            out, *slopes = step(implementation, KEY, *arrays)
            assert out.shape == arrays[0].shape and not np.asarray(out).any()
            assert all(not np.asarray(x).any() for x in slopes)
        else:
            with pytest.raises(NotImplementedError, match='"reference" for sizes that are 0 or symbolic, got'):
                implementation.attend(KEY, *arrays[:3])
            without_name = lambda q, k, v: jdrop.dot_product_attention(KEY, q, k, v, 0.5, train=True)
            assert jax.eval_shape(without_name, *arrays[:3]).shape == arrays[0].shape


@pytest.mark.parametrize("option", ["is_causal", "local_window_size", "bias", "mask", "key_value_seq_lengths"])
def test_no_keys_at_all(option):
    """With each option, no key is visible: the output and the gradients are zero."""
    q, k, v, do = data(keys=0)
    options = {
        "is_causal": {"is_causal": True},
        "local_window_size": {"local_window_size": 3},
        "bias": {"bias": np.zeros((20, 0), np.float32)},
        "mask": {"mask": np.ones((20, 0), bool)},
        "key_value_seq_lengths": {"key_value_seq_lengths": np.array([0, 0])},
    }[option]
    f = lambda q, k, v: jdrop.dot_product_attention(KEY, q, k, v, 0.5, train=True, **options)
    out, pull = jax.vjp(f, q, k, v)
    assert out.shape == q.shape and not out.any() and not any(x.any() for x in pull(do))


def test_no_width():
    q, k, v, _ = data(width=0)
    assert jdrop.dot_product_attention(KEY, q, k, v, 0.5, train=True).shape == q.shape


@pytest.mark.parametrize(
    "lengths", [np.array([2**40, 7]), np.array([2**32 - 1, 7], np.uint32)], ids=["int64", "uint32"]
)
def test_lengths_beyond_32_bits_hide_nothing(implementation, lengths):
    arrays = data()
    for option in ("query_seq_lengths", "key_value_seq_lengths"):
        close(
            [implementation.attend(KEY, *arrays[:3], **{option: lengths})], truth(KEY, *arrays[:3], **{option: lengths})
        )


def test_a_float32_scale_of_bfloat16_queries():
    """Under strict promotion, like all tests."""
    q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in data())
    out = jdrop.dot_product_attention(KEY, q, k, v, 0.0, train=True, scale=jnp.float32(0.3))
    close([out], truth(KEY, *(np.asarray(x, np.float32) for x in (q, k, v)), rate=0.0, scale=0.3), 0.03)


def test_bias_keeps_its_dtype(implementation):
    q, k, v, do = data(dtype=jnp.bfloat16)
    f = lambda *x: gradients(lambda q, k, v, b: implementation.attend(KEY, q, k, v, bias=b), *x)
    assert jax.eval_shape(f, q, k, v, do, jnp.ones([15], jnp.bfloat16))[4].dtype == jnp.bfloat16
    assert with_bias(implementation, [jnp.asarray(x) for x in (q, k, v, do)])[4].dtype == jnp.float32


# ---------------------------------------------------------------------------------- logits of any size


def with_bias(implementation, arrays, rate=0.5, bias=None):
    """Run the program with a traced rate and a bias, one per dtype."""
    bias = np.zeros((20, 15), np.float32) if bias is None else bias
    return step(implementation, KEY, *arrays, jnp.float32(rate), bias)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_logits_of_any_size(implementation, dtype):
    """With rows, columns, or all of the logits far from 0, the softmax and all gradients stay exact.

    A logsumexp of such logits would absorb the logarithm of the sum, which is a factor of the whole row: 15 for a
    padding row with finfo.min as its bias. All products are exact in float32, even next to 1e4. A bias of -inf hides
    all keys of some queries, without any mask.
    """
    q, k, v, do = (np.rint(4 * x.clip(-2, 2)) / 4 for x in data())
    arrays = [jnp.asarray(x, dtype) for x in (q, k, v, do)]
    factor = mask_factor(KEY, SCORES, 0.5)
    bound = 2e-5 if dtype == "float32" else 2 * float(jnp.finfo(dtype).eps)
    lowest = {float(jnp.finfo(d).min) for d in (dtype, "float32")}
    for far in (0.0, -300.0, 300.0, -1e4, 1e4, -1e9, *lowest, -np.inf):
        for where in (np.s_[5:8], np.s_[:, 3:9], np.s_[:], np.s_[2, 1:]):
            bias = np.zeros((20, 15), np.float32)
            bias[where] = far
            results = with_bias(implementation, arrays, bias=bias)
            close(results, formula(q, k, v, do, factor, bias=bias, logits=np.float32), bound)


def test_a_padding_row_does_not_change_the_gradients_of_others():
    """In the implementation of calls that name none: blockwise from 65,536 scores on."""
    q, k, v, do = data(batch=1, queries=256, keys=256, heads=1, key_heads=1)
    bias = np.zeros((256, 256), np.float32)
    bias[5] = np.finfo(np.float32).min

    @quick
    def f(*x):
        attend = lambda q, k, v, b: jdrop.dot_product_attention(KEY, q, k, v, 0.0, train=True, bias=b)
        return gradients(attend, *x)

    close(f(q, k, v, do, bias), formula(q, k, v, do, bias=bias, logits=np.float32))


# ---------------------------------------------------------------------------------- queries that see no key


def blind_queries():
    """Return operands, and which queries [B, T, N] see a key.

    Keys are hidden by a mask, by lengths, by a bias of -inf, and by a window past the keys.
    """
    mask, bias = np.ones((5, 1, 20, 16), bool), normal(8, 5, 1, 20, 16)
    mask[0, 0, 3], mask[0, 0, 4, 1:] = False, False
    bias[3, 0, 5], bias[3, 0, 6, 2:], bias[4, 0, :, 7] = -np.inf, -np.inf, -np.inf
    options = {
        "mask": mask,
        "query_seq_lengths": np.array([20, 9, 20, 20, 20], np.int32),
        "key_value_seq_lengths": np.array([16, 16, 0, 16, 16], np.int32),
        "local_window_size": (2, 0),
    }
    seen = visible((5, 2, 20, 16), **options) & (bias > -np.inf)
    sighted = np.swapaxes(seen.any(-1), 1, 2)
    assert not sighted.all((1, 2)).any() and sighted.any((1, 2))[[0, 1, 3, 4]].all()
    return bias, options, seen, sighted


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_queries_that_see_no_key(implementation, rate):
    """Their output and gradients are zero."""
    bias, options, seen, sighted = blind_queries()
    arrays = data(**FEW_KEYS)
    results = step(implementation, KEY, *arrays, jnp.float32(rate), bias, **options)
    close(results, truth(KEY, *arrays, rate, bias, **options))
    for x in results[:2]:
        assert not np.asarray(x)[~sighted].any()
    assert not np.asarray(results[4])[~seen.any(1, keepdims=True)].any()


def test_gradients_that_reach_blind_queries_are_not_read(implementation):
    """A norm after attention has a NaN gradient at a row of zeros, which must not reach queries and keys."""
    bias, options, _, sighted = blind_queries()
    q, k, v, do = data(**FEW_KEYS)
    do = np.where(sighted[..., None], do, np.nan)
    results = step(implementation, KEY, q, k, v, do, jnp.float32(0.5), bias, **options)
    assert not np.asarray(results[1])[~sighted].any() and all(np.isfinite(x).all() for x in results[:3])
    if implementation.name != "reference":  # its gradient of value has 0 times NaN, as in the formula
        assert np.isfinite(results[3]).all()
    expected = truth(KEY, q, k, v, np.where(sighted[..., None], do, 0), 0.5, bias, **options)
    close(results[:3], expected[:3])


# ---------------------------------------------------------------------------------- without dropout


def test_without_dropout_it_equals_the_formula_and_jax_nn(implementation):
    """``jax.nn`` has no rule for queries that see no key, so these are compared only with the formula."""
    arrays = q, k, v, do = data()
    options = {
        "mask": normal(6, 20, 15) > -1,
        "is_causal": True,
        "local_window_size": (6, 4),
        "key_value_seq_lengths": np.array([15, 11], np.int32),
        "scale": 0.2,
    }
    bias = normal(7, 1, 4, 20, 15)
    results = step(implementation, None, *arrays, 0.5, bias, train=False, **options)
    close(results, truth(None, *arrays, 0.5, bias, train=False, **options))
    rows = np.swapaxes(visible(SCORES, **{n: x for n, x in options.items() if n != "scale"}).any(-1), 1, 2)
    assert 0.8 < rows.mean() < 1
    results = step(implementation, None, q, k, v, do * rows[..., None], 0.5, bias, train=False, **options)
    theirs = of_jax(q, k, v, do * rows[..., None], bias, options)
    close([np.asarray(results[0])[rows]], [theirs[0][rows]])
    close(results[1:], theirs[1:])


def of_jax(q, k, v, do, bias, options):
    attend = lambda q, k, v, b: jax.nn.dot_product_attention(q, k, v, bias=b, **options)
    return [np.asarray(x) for x in quick(lambda *x: gradients(attend, *x))(*map(jnp.asarray, (q, k, v, do, bias)))]


def test_no_key_is_needed_or_read_without_dropout(implementation):
    """A rate of 0 compiles the program of evaluation."""
    arrays, bias = data(), np.zeros(15, np.float32)

    def trace(key, rate, train):
        attend = lambda q, k, v, b: implementation.attend(key, q, k, v, rate, train=train, bias=b)
        return quick(lambda *x: gradients(attend, *x)).trace(*arrays, bias)

    evaluation = trace(None, 0.5, False)
    for same in (trace(KEY, 0.5, False), trace(None, 0, True), trace(None, np.zeros([20, 1]), True)):
        assert str(same.jaxpr) == str(evaluation.jaxpr)
    without, with_mask = evaluation.lower().as_text(), trace(KEY, 0.5, True).lower().as_text()
    for constant in ("466688986", "2146121005"):  # of Threefry, and of the mixing function
        assert constant in with_mask and constant not in without


# ---------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize(
    ("dtype", "deviation"),
    [("bfloat16", 1), ("bfloat16", 4), ("float16", 1), ("float32", 1), ("float64", 1)],
)
def test_errors_are_at_most_twice_those_of_a_dense_reference(implementation, dtype, deviation):
    """``deviation``: the standard deviation of logits; if it is large, few keys have most of the probability."""
    with jax.enable_x64(dtype == "float64"):
        arrays, exact, bounds = dense_errors(dtype, deviation)
        assert max(bounds) < {"bfloat16": 0.02, "float16": 0.003, "float32": 1e-6, "float64": 1e-14}[dtype]
        results = with_bias(implementation, arrays, 0.25)[:4]
        errors = relative_errors(results, exact, dtype)
        formula_error = 1e-15 if dtype == "float64" else 0  # the formula is in float64
        assert all(error <= 2 * bound + formula_error for error, bound in zip(errors, bounds)), (errors, bounds)


@pytest.mark.parametrize(("dtype", "deviation"), [("bfloat16", 1), ("bfloat16", 4), ("float16", 1)])
@pytest.mark.parametrize("name", ["cuda", "tpu"])
def test_gradients_from_rounded_outputs_are_almost_as_accurate(use_on_cpu, name, dtype, deviation):
    arrays, exact, bounds = dense_errors(dtype, deviation)
    attend = functools.partial(jdrop.dot_product_attention, KEY, train=True, implementation="chunked")
    run = lambda *x: gradients(lambda q, k, v, bias: attend(q, k, v, 0.25), *x)
    own = [np.asarray(x) for x in quick(run)(*arrays)]
    use_on_cpu(PLATFORMS[name])
    results = quick(lambda *x: run(*x))(*arrays)
    errors = relative_errors(results, exact, dtype)
    assert all(error <= 3 * bound for error, bound in zip(errors, bounds)), (errors, bounds)
    assert not np.array_equal(results[1], own[1])


@functools.cache
def dense_errors(dtype, deviation):
    """Return operands, the formula, and the errors of an implementation as written by hand."""
    q, *others = data()
    arrays = [jnp.asarray(x).astype(dtype) for x in (deviation * q, *others)]
    factor = mask_factor(KEY, SCORES, 0.25)
    exact = formula(*(np.asarray(x, np.float64) for x in arrays), factor)
    wide = jnp.float64 if dtype == "float64" else jnp.float32

    def dense(q, k, v, bias):
        """Logits and softmax in float32, the rest in the dtype of query."""
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        s = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
        p = (jax.nn.softmax(s) * jnp.asarray(factor, wide)).astype(q.dtype)
        return jnp.einsum("bnqk,bknh->bqnh", p, v)

    results = quick(lambda *x: gradients(dense, *x))(*arrays)
    return arrays, exact, relative_errors(results, exact, dtype)


def relative_errors(results, exact, dtype):
    assert all(x.dtype == dtype for x in results)
    norm = np.linalg.norm
    return [norm(np.asarray(x, np.float64) - y) / norm(y) for x, y in zip(results, exact, strict=True)]


def test_gradients_of_float16_may_come_near_the_end_of_its_range(implementation):
    """As under loss scaling: divided by the keep probability, gradients of the output would overflow."""
    q, k, v, do = data()
    v, do = v / 8, do * (np.arange(16) == 0)  # keeps their products in range
    do = 5e4 / np.abs(do).max() * do
    expected = truth(KEY, q, k, v, do)
    assert np.abs(do).max() * 2 > np.finfo(np.float16).max > np.abs(expected[3]).max()
    results = with_bias(implementation, [x.astype(np.float16) for x in (q, k, v, do)])
    close(results[1:4], expected[1:], 0.01)


def test_arrays_over_scores_with_64_bits(implementation, x64):
    """Indices then have 64 bits by default."""
    bias, mask = normal(1, 1, 4, 9, 7), normal(2, 2, 1, 9, 7) > -1
    rates = jnp.linspace(0.1, 0.9, 9)[:, None]
    arrays = data(queries=9, keys=7, dtype=np.float64)
    check(implementation, arrays, rates, bias, mask=mask, is_causal=True, generator="jax", bound=1e-6)
