"""The logits of scores: which of them are seen."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention_formula import normal, visible
from jdrop._scores import Given, Problem, first_query, logits

SHAPE = (2, 3, 9, 7)


def of(given=None, bias=None, scale=1.0, causal=False, window=None, first=0):
    given, products = Given() if given is None else given, jnp.asarray(normal(0, *SHAPE))
    queries, keys = (jnp.arange(n, dtype=jnp.int32) for n in SHAPE[2:])
    problem = Problem(scale, causal, window, False, None)
    return logits(problem, products, bias, given, queries[None, None, :, None] + first, keys[None, None, None])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, (0, 0), (2, 1), (0, 9), (9, 0)])
def test_what_is_seen(causal, window):
    query_lengths, key_lengths = np.array([9, 4], np.int32), np.array([0, 5], np.int32)
    mask = normal(1, *SHAPE) > 0
    wide = lambda x: jnp.asarray(x)[:, None, None, None]
    for given, options in (
        (Given(), {}),
        (Given(jnp.asarray(mask)), {"mask": mask}),
        (Given(query_lengths=wide(query_lengths)), {"query_lengths": query_lengths}),
        (Given(key_lengths=wide(key_lengths)), {"key_lengths": key_lengths}),
    ):
        s, may_be_blind = of(given, causal=causal, window=window)
        seen = visible(SHAPE, causal=causal, window=window, **options)
        np.testing.assert_array_equal(s > -np.inf, seen)
        np.testing.assert_array_equal(np.asarray(s)[seen], normal(0, *SHAPE)[seen])
        assert may_be_blind or seen.any(-1).all()


def test_positions_count_from_the_whole_array():
    offset = jnp.array([(0, 5), (0, 6), (0, 3), (0, 0)], jnp.uint32)
    whole, tile = (Problem(1.0, True, None, spread, None) for spread in (False, True))
    assert first_query(whole, Given()) == first_query(whole, Given(offset=offset)) == 0
    s, _ = of(causal=True, first=first_query(tile, Given(offset=offset)))
    np.testing.assert_array_equal(np.asarray(s)[0, 0] > -np.inf, np.arange(7) <= np.arange(9)[:, None] + 3)


def test_scale_and_bias():
    bias = normal(2, *SHAPE)
    s, may_be_blind = of(bias=jnp.asarray(bias, jnp.bfloat16), scale=0.25)
    np.testing.assert_allclose(s, normal(0, *SHAPE) * 0.25 + jnp.asarray(bias, jnp.bfloat16).astype(float), rtol=1e-6)
    assert s.dtype == jnp.float32 and may_be_blind  # a bias may be -inf
    assert not of()[1]
