"""jax.export: symbolic sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jdrop
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


def export_of(f, shape):
    return export.export(jax.jit(f))(jax.ShapeDtypeStruct((2,), jnp.uint32), jax.ShapeDtypeStruct(shape, jnp.float32))


FIRST_AXIS = {  # axes after the first, and the member: the first axis is a column of its mask
    "dropout of a vector": ((), dropout),
    "dropout": ((5,), dropout),
    "dropout of images": ((5, 4, 3), dropout),
    "gaussian_noise": ((5,), jdrop.gaussian_noise),
    "drop_path": ((20, 300), jdrop.drop_path),
    "channel_dropout": ((4, 4, 64), jdrop.channel_dropout),
    "locked_dropout": ((128, 64), lambda *x, train: jdrop.locked_dropout(*x, train=train, time_axis=1)),
    "zoneout": ((7,), lambda key, x, rate, train: jdrop.zoneout(key, x, rate, -x, train=train)),
    "attention": ((5, 2, 8), lambda key, x, rate, train: jdrop.dot_product_attention(key, x, x, x, rate, train=train)),
    "a mask": ((7,), lambda key, x, rate, train: jnp.where(dropout_mask(key, x.shape, rate), x, 0)),
}


@pytest.mark.parametrize("name", FIRST_AXIS)
def test_a_symbolic_first_axis_may_be_a_column(name):
    """No stride depends on its size, so the bits equal those of the concrete size."""
    axes, member = FIRST_AXIS[name]
    (b,) = export.symbolic_shape("b")
    f = lambda k, x: member(k, x, 0.5, train=True)
    exported = export_of(lambda k, x: jax.value_and_grad(lambda x: jnp.sum(jnp.sin(f(k, x))))(x), (b, *axes))
    key = jax.random.PRNGKey(0)
    for size in (1, 6, 300):
        x = jnp.cos(jnp.arange(size * np.prod(axes, dtype=int), dtype=jnp.float32)).reshape(size, *axes)
        expected = jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(f(key, x)))))(x)
        for result, want in zip(exported.call(key, x), expected):
            np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(result != 0, want != 0)


def test_ids_of_symbolic_shape():
    b, t = export.symbolic_shape("b, t")
    f = lambda k, x: jdrop.embedding_dropout(k, x, 0.5, train=True, ids=jnp.zeros(x.shape[:2], jnp.int32))
    key, x = jax.random.PRNGKey(0), jnp.ones((5, 6, 16))
    same(export_of(f, (b, t, 16)).call(key, x), f(key, x))


def test_other_symbolic_columns_need_the_bits_of_jax():
    b, t = export.symbolic_shape("b, t")
    rule = r"dropout: shape of the mask must have static sizes on the trailing axes that hold 128 elements, except"
    with pytest.raises(ValueError, match=rule + r' .* got \(b, t\); .* or use generator="jax"'):
        export_of(lambda k, x: drop(x, k), (b, t))
    f = lambda k, x: drop(x, k, generator="jax")
    key = jax.random.PRNGKey(0)
    same(export_of(f, (b, t)).call(key, jnp.ones((5, 6))), f(key, jnp.ones((5, 6))))
    with pytest.raises(ValueError, match="dot_product_attention: shape of the mask must have static sizes"):
        export_of(lambda k, x: jdrop.dot_product_attention(k, x, x, x, 0.5, train=True), (2, t, 2, 8))
