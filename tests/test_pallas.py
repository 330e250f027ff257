"""The bits of masks are plain functions that Pallas kernels can call: tiles of masks on TPUs and Hopper GPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import jdrop
from jdrop._random import fast
from jdrop._random.indexing import row_and_column
from jdrop._random.threefry import U64

KEY = jax.random.key(3)
SEED = jnp.stack(fast.seed(jax.random.key_data(KEY)))
SHAPE = (4, 64, 256)  # rows: the first two axes; columns: the last
TILE = (1, 32, 128)
RATE = 0.3


def draw_tile(seed, start, iota):
    """Return the keep decisions of a tile, as uint32; ``iota(axis)`` is the index in the tile along an axis."""
    index = [U64(np.uint32(0), jnp.uint32(start[axis]) + iota(axis)) for axis in range(3)]
    row, col = row_and_column(SHAPE, index)
    kept = fast.keep(fast.mix(fast.row_key((seed[0], seed[1]), row), col), jnp.full((1, 1), RATE, jnp.float32))
    return kept.astype(jnp.uint32)


# ---------------------------------------------------------------------------------- TPU


def tpu_kernel(seed, out):
    start = [pl.program_id(axis) * size for axis, size in enumerate(TILE)]
    iota = lambda axis: jnp.uint32(0) if axis == 0 else jax.lax.broadcasted_iota(jnp.uint32, TILE[1:], axis - 1)
    out[0] = draw_tile((seed[0], seed[1]), start, iota)


@functools.partial(jax.jit, static_argnames="interpret")
def mask_on_tpu(seed, interpret=False):
    from jax.experimental.pallas import tpu as pltpu

    return pl.pallas_call(
        tpu_kernel,
        grid=tuple(n // size for n, size in zip(SHAPE, TILE)),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)],
        out_specs=pl.BlockSpec(TILE, lambda i, j, k: (i, j, k)),
        out_shape=jax.ShapeDtypeStruct(SHAPE, jnp.uint32),
        interpret=interpret,
    )(seed)


def test_a_tpu_kernel_draws_the_mask():
    result = mask_on_tpu(SEED, interpret=True)
    np.testing.assert_array_equal(result != 0, jdrop.dropout_mask(jax.random.clone(KEY), SHAPE, RATE))


def test_a_tpu_kernel_lowers():
    lowered = mask_on_tpu.trace(SEED).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


# ---------------------------------------------------------------------------------- Mosaic GPU


def test_a_mosaic_gpu_kernel_lowers():
    """One warpgroup per tile, with the register layout of Hopper's matrix products."""
    pytest.importorskip("absl", reason="Mosaic GPU needs absl-py on jax 0.10")
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rows, columns = 64, 128
    swizzled = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))  # no bank conflicts

    def kernel(seed, out, tile):
        iota = lambda axis: plgpu.broadcasted_iota(jnp.uint32, (rows, columns), axis, layout=plgpu.Layout.WGMMA)
        column = (jax.lax.axis_index("column") * columns).astype(jnp.uint32) + iota(1)
        row = (jax.lax.axis_index("row") * rows).astype(jnp.uint32) + iota(0)
        row_key = fast.row_key((seed[0], seed[1]), (np.uint32(0), row))
        tile[...] = fast.keep(fast.mix(row_key, column), jnp.float32(RATE)).astype(jnp.float32)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            tile,
            out.at[
                pl.ds(jax.lax.axis_index("row") * rows, rows), pl.ds(jax.lax.axis_index("column") * columns, columns)
            ],
        )
        plgpu.wait_smem_to_gmem(0)

    f = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((256, 256), jnp.float32),
        scratch_types=[plgpu.SMEM((rows, columns), jnp.float32, transforms=swizzled)],
        grid=(4, 2),
        grid_names=("row", "column"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    lowered = jax.jit(f).trace(SEED).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
