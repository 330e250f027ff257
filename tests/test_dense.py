"""The reference implementation of attention: every transform."""

import jax
import jax.numpy as jnp
import numpy as np
from attention_formula import normal, quick

import jdrop

KEY = jax.random.key(61)
Q, K, V = (normal(i, 1, 6, n, 8) for i, n in ((0, 2), (1, 1), (2, 1)))


def attend(q, k=K, v=V, key=KEY):
    return jdrop.dot_product_attention(key, q, k, v, 0.5, train=True, is_causal=True, implementation="reference")


def test_forward_mode_is_reverse_mode():
    tangent = normal(3, *Q.shape)

    @quick
    def both(q, t):
        y, slope = jax.jvp(attend, (q,), (t,))
        return jnp.vdot(slope, jnp.cos(y)), jnp.vdot(t, jax.vjp(attend, q)[1](jnp.cos(y))[0])

    np.testing.assert_allclose(*both(Q, tangent), rtol=1e-4)


def test_jacobians_and_hessian_vector_products():
    forward, backward = (quick(j(attend))(Q) for j in (jax.jacfwd, jax.jacrev))
    np.testing.assert_allclose(forward, backward, rtol=1e-4, atol=1e-6)
    f = lambda q: jnp.sum(jnp.sin(attend(q)))
    t = normal(3, *Q.shape)
    over = quick(lambda q, t: jax.jvp(jax.grad(f), (q,), (t,))[1])(Q, t)
    under = quick(jax.grad(lambda q: jnp.vdot(jax.grad(f)(q), t)))(Q)
    np.testing.assert_allclose(over, under, rtol=1e-3, atol=1e-5)


def test_it_is_linear_in_values():
    f = lambda v: attend(Q, K, v)
    (transposed,) = jax.linear_transpose(f, V)(Q)
    np.testing.assert_allclose(transposed, jax.vjp(f, V)[1](Q)[0], rtol=1e-5, atol=1e-6)


def test_no_mask_is_kept_for_the_backward_pass():
    """Of the mask, its seed and rate; of the scores, the probabilities on both sides of dropout at most."""

    def kept(train):
        f = lambda *x: jdrop.dot_product_attention(KEY, *x, 0.5, train=train, implementation="reference")
        return jax.tree.leaves(jax.vjp(f, Q, K, V)[1])

    assert not any(x.dtype == jnp.bool_ and x.size > 1 for x in kept(True))
    size = lambda leaves: sum(x.size * x.dtype.itemsize for x in leaves)
    assert size(kept(True)) - size(kept(False)) <= 2 * 4 + 4 + 4 * 2 * 6 * 6
