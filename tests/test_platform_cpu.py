"""Elementwise operations in the forms for CPU: the same bits as the plain forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdrop._platform import cpu
from jdrop._platform.generic import GENERIC

CPU = cpu.Cpu()


def test_bfloat16_is_rounded_as_xla_does_for_every_value():
    top = np.arange(2**16, dtype=np.uint32) << 16
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (top | low).view(np.float32)
        x = x[~np.isnan(x) | (low == 0)]
        ours, xla = jax.jit(cpu._round_to_bfloat16)(x), jax.jit(lambda x: x.astype(jnp.bfloat16))(x)
        np.testing.assert_array_equal(np.isnan(np.asarray(ours, np.float32)), np.isnan(x))
        number = ~np.isnan(x)
        np.testing.assert_array_equal(np.asarray(ours).view(np.uint16)[number], np.asarray(xla).view(np.uint16)[number])


def test_the_opaque_zero_is_zero():
    words = np.random.default_rng(0).integers(0, 2**32, (2, 10**6), dtype=np.uint64).astype(np.uint32)
    words[0, :4] = 0, 1, 2**32 - 1, 2**31
    assert not np.asarray(cpu._opaque_zero(jnp.asarray(words))).any()


def test_order_after_preserves_bits():
    x = jnp.array([0.0, -0.0, 1.5, jnp.nan, -jnp.inf, 1e-37])
    for dtype in ("float16", "bfloat16", "float32"):
        for dependency in (x.astype(dtype), jnp.float32(jnp.nan)):
            y = jax.jit(CPU.order_after)(x, dependency)
            np.testing.assert_array_equal(y.view(jnp.uint32), x.view(jnp.uint32))
    assert CPU.order_after(x, None) is x and GENERIC.order_after(x, x) is x


def test_stored_arrays_preserve_bits():
    words = np.random.default_rng(1).integers(0, 2**32, 4096, dtype=np.uint64).astype(np.uint32)  # some of them NaN
    words[:4] = 0, 1 << 31, 0x7F800001, 0xFFFFFFFF
    back = np.asarray(jax.jit(cpu._stored)(words.view(np.float32)))
    np.testing.assert_array_equal(back.view(np.uint32), words)
    kept = words % 3 == 0
    np.testing.assert_array_equal(jax.jit(cpu._stored)(kept), kept)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64", "int32", "uint8"])
def test_select_is_where(dtype):
    x, y = (jnp.arange(k, k + 512).astype(dtype) for k in (1, 700))
    x = x if x.dtype.kind in "iu" else x.at[:2].set(jnp.array([jnp.nan, jnp.inf], dtype))
    kept = jnp.arange(512) % 3 != 0
    words = jnp.array([7, 8], jnp.uint32)
    np.testing.assert_array_equal(jax.jit(CPU.select)(kept, x, y, words=words), jnp.where(kept, x, y))


def test_an_axis_is_folded_only_within_2_to_the_32_columns():
    assert CPU.fold(2**32, 1).width == 1024
    assert not any(CPU.fold(n, 1) for n in (2**32 + 1024, 2**33, 2**14 + 1))
    assert CPU.fold(2**32, 2) is GENERIC.fold(2**32, 1) is None


def text_of(f, *args):
    return jax.jit(f).lower(*args).as_text()


def test_a_product_hides_its_factor():
    """Without the opaque 1 and -0.0 there would be one multiplication and no addition."""
    x, words = jnp.ones(256), jnp.zeros(2, jnp.uint32)
    for platform, additions in ((CPU, 1), (GENERIC, 0)):
        text = text_of(lambda x, words, p=platform: p.multiply(x, jnp.float32(2), where=x > 0, words=words), x, words)
        wide = [line for line in text.splitlines() if "tensor<256xf32>" in line]
        assert sum("stablehlo.add" in line for line in wide) == additions


def test_a_selection_is_made_of_bits():
    x, words = jnp.ones(256), jnp.zeros(2, jnp.uint32)
    f = lambda x, words, p: p.select(x > 0, x, -x, words=words)
    assert "stablehlo.xor" in text_of(lambda x, w: f(x, w, CPU), x, words)
    assert "stablehlo.xor" not in text_of(lambda x, w: f(x, w, GENERIC), x, words)
