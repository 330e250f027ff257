"""Attention under the transforms of JAX, in every implementation."""

import attention_suite
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import KEY, close, data, gradients, mask_factor, normal, quick, truth

import jdrop

implementation = attention_suite.implementation


# ---------------------------------------------------------------------------------- jit, vmap


def test_without_jit(implementation):
    """With concrete rates. At 1, the output is 0 even if sums of values overflow. All mask axes are columns."""
    q, k, v, do = data(batch=1, queries=4, keys=7)
    for rate, size in ((0.5, 1), (0.25, 1), (1, 3e38)):
        attend = lambda q, k, v, b, rate=rate: implementation.attend(KEY, q, k, v, rate, bias=b)
        results = gradients(attend, q, k, np.full_like(v, size) if rate == 1 else v, do, np.zeros(7, np.float32))
        if rate == 1:
            assert not np.asarray(results[0]).any()
        else:
            close(results, truth(KEY, q, k, v, do, rate, np.zeros(7)))


def test_a_key_and_a_rate_per_example_under_vmap(implementation):
    """Zero queries and identity values show the masks. Query, key, and value are shared."""
    keys, rates = jax.random.split(KEY, 2), np.array([0.0, 0.3, 0.9], np.float32)
    q, k, v, _ = data(width=15)
    q, v = np.zeros_like(q), np.broadcast_to(np.eye(15, dtype=np.float32)[:, None], v.shape)

    @quick
    def f(q, k, v, keys, rates):
        one = lambda key, rate: implementation.attend(key, q, k, v, rate)
        return jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))(keys, rates)

    masks = np.moveaxis(f(q, k, v, keys, rates) != 0, 4, 3)
    for i in range(2):
        for j in range(3):
            np.testing.assert_array_equal(masks[i, j], jdrop.dropout_mask(keys[i], (2, 4, 20, 15), rates[j]))


def test_values_and_bias_per_example_under_vmap(implementation):
    """All examples have the same mask."""
    q, k, v, _ = data(batch=1, queries=5)
    values, biases = normal(3, 3, *v.shape), normal(4, 3, 15)

    @quick
    def f(q, k, values, biases):
        return jax.vmap(lambda v, b: implementation.attend(KEY, q, k, v, bias=b))(values, biases)

    outs = f(q, k, values, biases)
    for i in range(3):
        close([outs[i]], truth(KEY, q, k, values[i], bias=biases[i]))


def test_vmap_over_everything(implementation):
    keys, rates = jax.random.split(KEY, 3), np.array([0.2, 0.5, 0.7], np.float32)
    arrays = [normal(i, 3, *x.shape) for i, x in enumerate(data(batch=1, queries=12))]
    bias, mask, lengths = normal(7, 3, 1, 15), normal(8, 3, 12, 15) > -1, np.array([[15], [3], [0]], np.int32)

    @quick
    @jax.vmap
    def f(key, rate, q, k, v, do, bias, mask, lengths):
        options = {"mask": mask, "key_value_seq_lengths": lengths}
        attend = lambda q, k, v, b: implementation.attend(key, q, k, v, rate, bias=b, **options)
        return gradients(attend, q, k, v, do, bias)

    results = f(keys, rates, *arrays, bias, mask, lengths)
    for i in range(3):
        options = {"mask": mask[i], "key_value_seq_lengths": lengths[i]}
        expected = truth(keys[i], *(x[i] for x in arrays), rates[i], bias[i], **options)
        close([x[i] for x in results], expected)


# ---------------------------------------------------------------------------------- more derivatives


CAUSAL = data(batch=1, queries=24, keys=8, heads=2, key_heads=1, width=8)


def second_derivatives(f):
    """Differentiate a function of all first derivatives of ``f(q, k, v, bias)``."""
    *primals, do = *CAUSAL[:3], normal(5, 24, 8), CAUSAL[3]

    def of_first(*x):
        return sum(jnp.vdot(g, jnp.cos(g)) for g in jax.grad(lambda *x: jnp.vdot(f(*x), do), (0, 1, 2, 3))(*x))

    return quick(jax.grad(of_first, (0, 1, 2, 3)))(*primals)


@pytest.fixture(scope="module")
def plain_second_derivatives():
    seen = np.arange(8) <= np.arange(24)[:, None]
    factor = mask_factor(KEY, (1, 2, 24, 8), 0.5).astype(np.float32)

    def plain(q, k, v, bias):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        s = jnp.einsum("bqnh,bknh->bnqk", q, k) * 8**-0.5 + bias[None, None]
        p = jax.nn.softmax(jnp.where(seen, s, -jnp.inf)) * factor
        return jnp.einsum("bnqk,bknh->bqnh", p, v)

    return second_derivatives(plain)


def test_second_derivatives(implementation, plain_second_derivatives):
    """24 queries: small blocks have two segments, one of them in a loop."""
    results = second_derivatives(lambda q, k, v, b: implementation.attend(KEY, q, k, v, bias=b, is_causal=True))
    for x, y in zip(results, plain_second_derivatives, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max())


def test_checkpoint_and_scan_over_layers(implementation):
    """The value and the gradient of layers ``x -> tanh(attention(x, cos(x), x))``, by the chain rule in NumPy."""
    keys, x = jax.random.split(KEY, 3), normal(0, 1, 12, 2, 16)

    @jax.checkpoint
    def layer(x, key):
        return jnp.tanh(implementation.attend(key, x, jnp.cos(x), x, is_causal=True)), None

    value, slope = quick(jax.value_and_grad(lambda x: jax.lax.scan(layer, x, keys)[0].sum()))(x)
    inputs, y = [], x
    for key in keys:
        inputs.append(y)
        y = np.tanh(truth(key, y, np.cos(y), y, is_causal=True)[0])
    expected = np.ones_like(y)
    np.testing.assert_allclose(value, y.sum(), rtol=1e-4)
    for key, z in reversed(list(zip(keys, inputs))):
        _, dq, dk, dv = truth(key, z, np.cos(z), z, expected * (1 - y**2), is_causal=True)
        expected, y = dq - dk * np.sin(z) + dv, z
    close([slope], [expected])


# ---------------------------------------------------------------------------------- forward mode


Q, K, V, DO = data(batch=1, queries=6, keys=6, heads=2, key_heads=1, width=4)


@pytest.fixture
def attend(implementation):
    """Return attention as a function of query, key, value and bias."""
    return lambda q, k=K, v=V, b=None: implementation.attend(KEY, q, k, v, bias=b, is_causal=True)


@pytest.mark.parametrize("moving", [(0,), (1, 2), (3,), (0, 1, 2, 3)], ids=str)
def test_forward_mode_is_reverse_mode(attend, moving):
    """With tangents of some operands, and of all."""
    operands = (Q, K, V, normal(4, 6, 6))
    tangents = [normal(5 + i, *operands[i].shape) for i in moving]

    @quick
    def both(operands, tangents):
        def f(*values):
            changed = dict(zip(moving, values))
            return attend(*(changed.get(i, x) for i, x in enumerate(operands)))

        values = [operands[i] for i in moving]
        y, slope = jax.jvp(f, values, tangents)
        pulled = jax.vjp(f, *values)[1](jnp.cos(y))
        return jnp.vdot(slope, jnp.cos(y)), sum(jnp.vdot(t, x) for t, x in zip(tangents, pulled))

    np.testing.assert_allclose(*both(operands, tangents), rtol=1e-4, atol=1e-5)


def test_forward_mode_under_vmap_and_scan(attend):
    """Over tangents, and over examples that share a query."""
    tangents = normal(3, 5, *Q.shape)
    slope = lambda t: jax.jvp(attend, (Q,), (t,))[1]
    mapped, scanned = quick(lambda ts: (jax.vmap(slope)(ts), jax.lax.map(slope, ts)))(tangents)
    np.testing.assert_allclose(mapped, scanned, rtol=1e-4, atol=1e-6)
    values = normal(6, 5, *V.shape)
    loss = lambda q, v: jnp.sum(jnp.sin(attend(q, K, v)))
    one, all_at_once = quick(
        lambda q: (
            sum(jax.grad(loss)(q, v) for v in values),
            jax.grad(lambda q: jax.vmap(lambda v: loss(q, v))(values).sum())(q),
        )
    )(Q)
    np.testing.assert_allclose(one, all_at_once, rtol=1e-4, atol=1e-5)


def test_jacobians_and_hessian_vector_products(attend):
    t = normal(3, *Q.shape)
    f = lambda q: jnp.sum(jnp.sin(attend(q)))

    @quick
    def both(q, t):
        jacobians = jax.jacfwd(attend)(q), jax.jacrev(attend)(q)
        over = jax.jvp(jax.grad(f), (q,), (t,))[1]
        return *jacobians, over, jax.grad(lambda q: jnp.vdot(jax.grad(f)(q), t))(q)

    forward, reverse, over, under = both(Q, t)
    np.testing.assert_allclose(forward, reverse, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(over, under, rtol=1e-3, atol=1e-5)


def test_it_is_linear_in_values(attend):
    @quick
    def both(q, k, v, do):
        f = lambda v: attend(q, k, v)
        return jax.linear_transpose(f, v)(do)[0], jax.vjp(f, v)[1](do)[0]

    np.testing.assert_allclose(*both(Q, K, V, DO), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------- lowering


def test_export_for_three_platforms(implementation):
    """With its gradients, lowered for GPUs and TPUs too, and run on this machine."""
    arrays, bias = data(queries=24), normal(5, 24, 15)
    f = lambda *x: gradients(lambda q, k, v, b: implementation.attend(KEY, q, k, v, bias=b, is_causal=True), *x)
    exported = jax.export.export(quick(f), platforms=("cpu", "cuda", "tpu"))(*arrays, bias)
    assert "stablehlo" in exported.mlir_module()
    close(quick(exported.call)(*arrays, bias), truth(KEY, *arrays, bias=bias, is_causal=True))


def test_export_with_a_symbolic_batch(implementation):
    batch, *_ = jax.export.symbolic_shape("b, 12, 2, 8")
    argument = jax.ShapeDtypeStruct((batch, 12, 2, 8), jnp.float32)
    f = quick(lambda q, k, v: implementation.attend(KEY, q, k, v, is_causal=True))
    if not implementation.zero_and_symbolic_sizes:
        with pytest.raises(NotImplementedError, match='"reference" for sizes that are 0 or symbolic, got'):
            jax.export.export(f)(argument, argument, argument)
        return
    exported = jax.export.export(f)(argument, argument, argument)
    q, k, v, _ = data(batch=3, queries=12, keys=12, heads=2, key_heads=2, width=8)
    close([exported.call(q, k, v)], truth(KEY, q, k, v, is_causal=True))


def test_a_symbolic_batch_needs_no_implementation_by_name():
    """With at least 65,536 scores, for which blockwise attention is preferred."""
    batch, *_ = jax.export.symbolic_shape("b, 256, 2, 8")
    argument = jax.ShapeDtypeStruct((batch, 256, 2, 8), jnp.float32)
    f = quick(lambda q, k, v: jdrop.dot_product_attention(KEY, q, k, v, 0.5, train=True, is_causal=True))
    exported = jax.export.export(f)(argument, argument, argument)
    q, k, v, _ = data(batch=2, queries=256, keys=256, heads=2, key_heads=2, width=8)
    close([exported.call(q, k, v)], truth(KEY, q, k, v, is_causal=True))
