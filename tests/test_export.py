"""jax.export: symbolic sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jdrop import dropout, dropout_mask

KEY = jax.random.key(11)


def drop(x, key=KEY, rate=0.4, **options):
    return dropout(key, x, rate, train=True, **options)


def same(a, b):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("generator", ["fast", "jax"])
def test_export_with_symbolic_batch_sizes(generator):
    b, t = export.symbolic_shape("b, t")
    key = jax.random.PRNGKey(0)

    def f(k, x):
        return jax.value_and_grad(lambda x: jnp.sum(drop(x, k, generator=generator)))(x)

    for shape, sizes in (((b, 256), (5, 256)), ((b, t, 256), (5, 3, 256)), ((b, t, 16, 8), (2, 3, 16, 8))):
        exported = export.export(jax.jit(f))(
            jax.ShapeDtypeStruct((2,), jnp.uint32), jax.ShapeDtypeStruct(shape, jnp.float32)
        )
        same(exported.call(key, jnp.ones(sizes))[1], f(key, jnp.ones(sizes))[1])


def test_a_window_of_a_symbolic_batch():
    (b,) = export.symbolic_shape("b")
    args = jax.ShapeDtypeStruct((2,), jnp.uint32), jax.ShapeDtypeStruct((b, 256), jnp.float32)
    exported = export.export(jax.jit(lambda k, x: dropout_mask(k, x.shape, 0.3, window=((5, 2), (9, 40)))))(*args)
    key = jax.random.PRNGKey(0)
    same(exported.call(key, jnp.ones((7, 256))), dropout_mask(key, (7, 256), 0.3)[5:, 9:49])


def test_export_wants_static_columns():
    (b,) = export.symbolic_shape("b")
    args = jax.ShapeDtypeStruct((2,), jnp.uint32), jax.ShapeDtypeStruct((b, 64), jnp.float32)
    with pytest.raises(ValueError, match="dropout: shape must have static sizes on the trailing axes that hold 128"):
        export.export(jax.jit(lambda k, x: drop(x, k)))(*args)
