"""The mask of attention is that of dropout_mask, forward and backward, in every implementation.

Most tests compare masks through values and gradients, see attention_suite.py.
"""

import attention_suite
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import KEY, check, close, data, normal, quick, step, truth

import jdrop

implementation = attention_suite.implementation


# ---------------------------------------------------------------------------------- shapes and keys


@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "queries", "keys", "key"),
    [
        (2, 4, 2, 5, 17, jax.random.key(3, impl="rbg")),
        (1, 2, 1, 9, 130, jax.random.PRNGKey(3)),
    ],
    ids=["heads, queries and keys; rbg key", "keys; legacy key"],
)
def test_the_mask_is_that_of_dropout_mask(implementation, batch, heads, key_heads, queries, keys, key):
    """Zero queries make all probabilities equal, and identity values show which are kept.

    The ids say which axes are columns of the mask. In other tests they are queries and keys, in test_without_jit all.
    The backward pass is compared with the formula.
    """
    q, k, _, do = data(batch=batch, heads=heads, key_heads=key_heads, queries=queries, keys=keys, width=keys)
    v = np.broadcast_to(np.eye(keys, dtype=np.float32)[:, None], k.shape)
    mask = np.asarray(jdrop.dropout_mask(key, (batch, heads, queries, keys), 0.5))
    assert 0 < mask.mean() < 1
    results = step(implementation, key, np.zeros_like(q), k, v, do)
    np.testing.assert_array_equal(np.swapaxes(results[0], 1, 2) != 0, mask)
    close(results, truth(key, np.zeros_like(q), k, v, do))


def test_x64_changes_no_bit_of_the_fast_generator():
    shape = (2, 2, 9, 130)
    with jax.enable_x64(True):
        expected = np.asarray(jdrop.dropout_mask(KEY, shape, 0.3))
    np.testing.assert_array_equal(expected, jdrop.dropout_mask(KEY, shape, 0.3))


def test_jax_bits_of_keys_without_random_access(implementation):
    key = jax.random.key(3, impl="rbg")
    arrays = q, k, v, _ = data(queries=5, keys=7)
    if implementation.keys_without_random_access:
        check(implementation, arrays, 0.3, key=key, generator="jax")
    else:
        with pytest.raises(NotImplementedError, match="a PRNG key whose bits lack random access"):
            implementation.attend(key, q, k, v, 0.3, generator="jax")


# ---------------------------------------------------------------------------------- shared axes, rates, hidden keys


CASES = {
    "whole heads, a rate per head, a window": {
        "rate": np.linspace(0.2, 0.8, 4, dtype=np.float32)[:, None, None],
        "shared_axes": (2, 3),
        "local_window_size": (5, 9),
    },
    "one mask for all keys, a rate per example, head and query, lengths": {
        "rate": jnp.linspace(0.1, 0.9, 2 * 4 * 20).reshape(2, 4, 20, 1),
        "shared_axes": (-1,),
        "query_seq_lengths": np.array([17, 20], np.int32),
        "key_value_seq_lengths": np.array([15, 9], np.int32),
    },
    "two decisions per word": {"rate": 0.3, "generator": "packed"},
}


@pytest.mark.parametrize("case", CASES)
def test_shared_axes_rates_and_hidden_keys(implementation, case):
    """The mask does not depend on visibility. test_attention_values.py shares one mask over examples and heads."""
    options = CASES[case]
    check(implementation, data(), options["rate"], **{name: x for name, x in options.items() if name != "rate"})


def test_everything_at_once(implementation):
    """Several segments, the bits of jax.random.bernoulli, a rate per query, and all options that hide keys."""
    options = {
        "generator": "jax",
        "shared_axes": 1,
        "is_causal": True,
        "local_window_size": (15, 3),
        "query_seq_lengths": np.array([33, 23], np.int32),
        "key_value_seq_lengths": np.array([12, 15], np.int32),
        "mask": normal(2, 4, 1, 15) > -1,
    }
    rate = np.linspace(0.1, 0.9, 36, dtype=np.float32)[:, None]
    check(implementation, data(queries=36), rate, normal(3, 2, 1, 36, 1), **options)


def test_a_rate_per_key(implementation):
    arrays = q, k, v, _ = data(queries=5, keys=7)
    rates = np.linspace(0.1, 0.9, 7, dtype=np.float32)
    if implementation.rates_per_key:
        check(implementation, arrays, rates)
    else:
        with pytest.raises(NotImplementedError, match="a rate that varies along the keys"):
            implementation.attend(KEY, q, k, v, rates)


# ---------------------------------------------------------------------------------- the rate


def test_traced_rates(implementation):
    """They are clipped to [0, 1]. NaN gives NaN, 0 drops nothing, 1 drops everything, and one program serves all."""
    arrays, bias = data(), np.zeros((20, 15), np.float32)
    run = lambda rate, arrays=arrays: step(implementation, KEY, *arrays, jnp.float32(rate), bias)
    overflow = [*arrays[:2], np.full_like(arrays[2], 3e38), arrays[3]]  # values whose sum is infinite
    assert not np.asarray(run(1.0, overflow)[0]).any()
    programs = attention_suite._step._cache_size()
    for rate in (0.5, 0.25, 0.0, 1.0, -0.3, 1.7):
        results = run(rate)
        close(results, truth(KEY, *arrays, rate, bias))
        assert rate < 1 or not any(np.asarray(x).any() for x in results)
    assert np.isnan(run(np.nan)[0]).all()
    assert attention_suite._step._cache_size() == programs
    close(run(0.0), truth(None, *arrays, bias=bias, train=False))


def test_no_gradient_flows_to_the_rate(implementation):
    q, k, v, do = data(queries=5, keys=7)
    f = lambda rate, *x: jnp.vdot(implementation.attend(KEY, *x, rate), do)
    assert not quick(jax.grad(f))(jnp.full([4, 5, 1], 0.3), q, k, v).any()
