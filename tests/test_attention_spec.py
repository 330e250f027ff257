"""The logits that all implementations share: which keys are visible, and where positions start."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import normal, visible

from jdrop.attention._checks import as_window
from jdrop.attention._spec import AttentionInputs, AttentionSpec, first_query, visible_logits

SHAPE = (2, 3, 9, 7)
PRODUCTS = normal(0, *SHAPE)


def logits(inputs=None, bias=None, scale=1.0, causal=False, window=None, first=0):
    inputs = (AttentionInputs() if inputs is None else inputs)._replace(scale=jnp.float32(scale))
    queries, keys = (jnp.arange(n, dtype=jnp.int32) for n in SHAPE[2:])
    spec = AttentionSpec(causal, window, queries_are_tiled=False)
    positions = queries[None, None, :, None] + first, keys[None, None, None]
    return visible_logits(spec, jnp.asarray(PRODUCTS), bias, inputs, *positions)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, (0, 0), (2, 1), (0, 9), (9, 0)])
def test_hidden_keys_have_logits_of_minus_infinity(causal, window):
    query_lengths, key_lengths = np.array([9, 4], np.int32), np.array([0, 5], np.int32)
    mask = normal(1, *SHAPE) > 0
    per_example = lambda x: jnp.asarray(x)[:, None, None, None]
    for inputs, options in (
        (AttentionInputs(), {}),
        (AttentionInputs(visible=jnp.asarray(mask)), {"mask": mask}),
        (AttentionInputs(query_lengths=per_example(query_lengths)), {"query_seq_lengths": query_lengths}),
        (AttentionInputs(key_lengths=per_example(key_lengths)), {"key_value_seq_lengths": key_lengths}),
    ):
        s, may_be_blind = logits(inputs, causal=causal, window=window)
        seen = visible(SHAPE, is_causal=causal, local_window_size=window, **options)
        np.testing.assert_array_equal(s > -np.inf, seen)
        np.testing.assert_array_equal(np.asarray(s)[seen], PRODUCTS[seen])
        assert may_be_blind or seen.any(-1).all()


def test_positions_count_from_the_whole_array():
    start = jnp.array([(0, 5), (0, 6), (0, 3), (0, 0)], jnp.uint32)
    whole, tile = (AttentionSpec(True, None, queries_are_tiled=tiled) for tiled in (False, True))
    assert first_query(whole, AttentionInputs()) == first_query(whole, AttentionInputs(start=start)) == 0
    assert first_query(tile, AttentionInputs()) == 0
    s, _ = logits(causal=True, first=first_query(tile, AttentionInputs(start=start)))
    np.testing.assert_array_equal(np.asarray(s)[0, 0] > -np.inf, np.arange(7) <= np.arange(9)[:, None] + 3)


def test_scale_and_bias():
    bias = jnp.asarray(normal(2, *SHAPE), jnp.bfloat16)
    s, may_be_blind = logits(bias=bias, scale=0.25)
    np.testing.assert_allclose(s, PRODUCTS * 0.25 + bias.astype(float), rtol=1e-6)
    assert s.dtype == jnp.float32 and may_be_blind  # a bias may be -inf
    assert not logits()[1]


def test_windows_fit_32_bits():
    assert as_window(None) is None
    assert as_window(12) == (12, 12) and as_window((3, 0)) == (3, 0)
    assert as_window((2**40, 2)) == (2**31 - 1, 2) and as_window(2**31) == (2**31 - 1, 2**31 - 1)
