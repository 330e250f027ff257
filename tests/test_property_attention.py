"""Attention is its formula in float64, in value and gradients, in every implementation, with the mask of dropout_mask."""

import attention_suite as suite
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases

pytestmark = pytest.mark.property
implementation = suite.implementation
# [batch, queries, keys, heads, key heads, width]: few, as every one is compiled
SIZES = (
    (2, 20, 15, 4, 2, 16),
    (1, 1, 130, 2, 1, 3),
    (3, 45, 45, 1, 1, 8),
    (1, 129, 7, 6, 3, 4),
    (2, 17, 128, 2, 2, 1),
    (1, 5, 1, 3, 3, 2),
)
BIASES = (0.0, -1e9, float(np.finfo(np.float32).min), -np.inf, 1e4, 80.0)


@cases(4)
@given(data=st.data())
def test_attention_is_its_formula(implementation, data):
    """With any lengths, window, causal mask, mask, bias and rate; logits far from 0 included."""
    batch, queries, keys, heads, key_heads, width = data.draw(st.sampled_from(SIZES))
    seed = data.draw(st.integers(0, 99))
    arrays = suite.data(
        batch=batch, queries=queries, keys=keys, heads=heads, key_heads=key_heads, width=width, seed=seed
    )
    rng, shape = np.random.default_rng(seed), (batch, heads, queries, keys)
    options = {}
    if data.draw(st.booleans()):
        options["is_causal"] = True
    if data.draw(st.integers(0, 2)) == 0:
        left, right = (data.draw(st.sampled_from((0, 1, 7, 1000, 2**31))) for _ in range(2))
        options["local_window_size"] = data.draw(st.sampled_from(((left, right), left)))
    for name, size in (("query_seq_lengths", queries), ("key_value_seq_lengths", keys)):
        if data.draw(st.integers(0, 2)) == 0:
            options[name] = jnp.asarray([data.draw(st.integers(-1, size + 1)) for _ in range(batch)])
    at = tuple(1 if data.draw(st.booleans()) else n for n in shape)
    if data.draw(st.integers(0, 2)) == 0:
        options["mask"] = jnp.asarray(rng.random(at) < 0.7)
    bias = None
    if data.draw(st.booleans()):
        at = tuple(1 if data.draw(st.booleans()) else n for n in shape)
        extreme = np.float32(data.draw(st.sampled_from(BIASES)))
        bias = np.where(rng.random(at) < 0.3, extreme, rng.standard_normal(at)).astype(np.float32)
    rate = data.draw(st.sampled_from((0.0, 0.5, 0.1, 0.9, 1.0)))
    shared = data.draw(st.sampled_from(((), (), (2, 3), (0, 1), (1,))))
    if shared:
        options["shared_axes"] = shared
    key = jax.random.key(seed)
    results = suite.step(
        implementation, key, *arrays, jnp.float32(rate), bias if bias is None else jnp.asarray(bias), **options
    )
    plain = {n: np.asarray(v) if isinstance(v, jax.Array) else v for n, v in options.items()}
    expected = suite.truth(key, *arrays, np.float32(rate), bias, logits=np.float32, **plain)
    suite.close(results, expected, 4e-5 if rate < 0.9 else 2e-4)
