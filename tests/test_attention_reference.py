"""The reference implementation of attention: its residuals."""

import jax
import jax.numpy as jnp
from attention_suite import KEY, data

import jdrop


def test_the_residuals_have_no_mask():
    """Residuals are the key and rate of the mask, and at most the probabilities before and after dropout."""
    q, k, v, _ = data(batch=1, queries=6, keys=6, heads=2, key_heads=1, width=8)

    def residuals(train):
        f = lambda *x: jdrop.dot_product_attention(KEY, *x, 0.5, train=train, implementation="reference")
        return jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(f, *x)[1], q, k, v))

    assert not any(x.dtype == jnp.bool_ and x.size > 1 for x in residuals(True))
    size = lambda leaves: sum(x.size * x.dtype.itemsize for x in leaves)
    assert size(residuals(True)) - size(residuals(False)) <= 2 * 4 + 4 + 4 * 2 * 6 * 6
