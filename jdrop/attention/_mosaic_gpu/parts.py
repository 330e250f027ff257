"""Parts of the attention kernels for Hopper GPUs, in Pallas Mosaic GPU.

Each kernel has two warpgroups that compute, with 64 queries or keys each, and one that copies tiles of the others into
shared memory. All arrays have whole tiles. Never run on a GPU: compiled for one, and checked with JAX's interpreter.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdrop._bits import FastBits
from jdrop.attention import _tile
from jdrop.attention._spec import AttentionSpec
from jdrop.attention._tile import Index, Limits

ROWS = 64  # of a warpgroup: the rows of a matrix product
WARPGROUPS = 2  # that compute
BLOCK = ROWS * WARPGROUPS
STAGES = 2  # of the pipelines
COPY_REGISTERS = 24  # of the warpgroup that copies
INTERPRET: Any = False
"""Parameters of JAX's interpreter, for tests."""

TILE, ROW, COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


class Operands(NamedTuple):
    """What all kernels read, in whole tiles."""

    query: Any
    key: Any
    value: Any
    numbers: Any
    """int32 [B, 3]: numbers of queries and keys of each example that see or are seen, and the position of query 0."""
    factors: Any
    """float32 [4]: the absolute scale times log2(e), the sign of the scale, the scale, and 1 / keep probability."""
    threshold: Any = None
    """uint32 [1]: words below it are dropped; ``None`` if nothing is dropped."""
    row_keys: Any = None
    """uint32 [B, N, 2, T]."""
    do: Any = None
    sums: Any = None
    """float32 [B, N, 2, T]: logarithms to base 2 of the sums of exponentials, and delta times the keep probability."""


class Options(NamedTuple):
    """What is static."""

    spec: AttentionSpec
    num_keys: int
    """Without padding."""
    limits_queries: bool
    limits_keys: bool
    bits: FastBits | None
    """Where decisions come from; ``None`` if nothing is dropped."""

    def limits(self, numbers: Any, batch: Array) -> Limits:
        """Return what hides keys of an example."""
        return Limits.of(
            self.spec,
            self.num_keys,
            numbers[batch, 2],
            numbers[batch, 0] if self.limits_queries else None,
            numbers[batch, 1] if self.limits_keys else None,
        )


# ---------------------------------------------------------------------------------- tiles in registers


def load(ref: Any, layout: Any) -> Array:
    """Load a whole reference into registers."""
    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # required by jax 0.10, an error in 0.12
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def full(shape: tuple[int, ...], value: float = 0.0, layout: Any = TILE) -> Array:
    """Return registers of one value."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def index(dtype: Any, shape: tuple[int, int], axis: int) -> Index:
    """Return the index along an axis of a tile in registers."""
    whole = plgpu.broadcasted_iota(dtype, shape, axis, layout=TILE)
    if axis == 0:  # a thread has the rows i and i + 8
        register = whole & np.array(8, dtype)
        return Index(whole - register, register)
    lane = whole & np.array(6, dtype)  # a thread has the columns 8 i + 2 lane + (0, 1)
    return Index(lane, whole - lane)


def product_of_rows(a: Any, b: Any) -> Array:
    """Return ``a @ b.T``, float32; both are in shared memory."""

    def multiply(result: Any) -> Array:
        plgpu.wgmma(result, a, b.transpose((1, 0)))
        return result[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[0]), jnp.float32))


def add_product(total: Array, a: Array, b: Any) -> Array:
    """Return ``total + a @ b``; b is in shared memory."""
    return pl.run_state(lambda result: plgpu.wgmma(result, a, b))(plgpu.WGMMAAccumulatorRef.init(total))


def negate_if(sign: Array, x: Any) -> None:
    """Multiply an array in shared memory by 1 or -1."""
    x[...] = (load(x, TILE).astype(jnp.float32) * sign).astype(x.dtype)
    plgpu.commit_smem()


def hide(limits: Limits, products: Array, query: Array, key: Array, key_axis: int) -> Array:
    """Return the products of a tile that starts at a query and a key, -inf where the key is hidden."""
    if not limits.hide:
        return products
    shape: Any = products.shape
    cut = _tile.is_cut(limits, query, shape[1 - key_axis], key, shape[key_axis])

    def hidden(products: Array) -> Array:
        queries, keys = index(jnp.int32, shape, 1 - key_axis), index(jnp.int32, shape, key_axis)
        return jnp.where(_tile.visible(limits, query, queries, key, keys), products, -jnp.inf)

    return lax.cond(cut, hidden, lambda x: x, products)


def keep(bits: FastBits, row_key: Any, refs: Operands, key: Array, shape: tuple[int, int], key_axis: int) -> Array:
    """Return which scores of a tile are kept, for the keys of its rows."""
    keys = index(jnp.uint32, shape, key_axis)
    return _tile.keep(bits, row_key, key.astype(jnp.uint32), keys, refs.threshold[0], key_axis)


def separate(kept: Array) -> Array:
    """Return kept scores, such that LLVM selects them before it rounds them, not after.

    Symptom: it selects halves of registers, and puts them together again. Gain: 1.1 instructions per score. Seen: jax
    0.10.2. Test: test_accelerators.py.
    """
    return lax.optimization_barrier(kept)


def load_rows(rows: Any) -> tuple[Array, Array]:
    """Load the rows [2, n] of a tile from global memory."""
    return load(rows.at[0], ROW), load(rows.at[1], ROW)


def load_row_keys(refs: Operands, at: Any) -> Any:
    """Load the keys of the rows of a tile; none if nothing is dropped."""
    return () if refs.threshold is None else load_rows(refs.row_keys.at[at])


# ---------------------------------------------------------------------------------- memory and launch


def steps(low: Any, high: Any, block: int) -> tuple[Any, Any]:
    """Return the first of the blocks that cover a range, and their number."""
    if isinstance(low, int) and isinstance(high, int):
        return low // block, -(-high // block) - low // block
    first = lax.div(jnp.int32(low), jnp.int32(block))
    return first, jnp.maximum(lax.div(jnp.int32(high) + (block - 1), jnp.int32(block)) - first, 0)


def shared(*shape: int, dtype: Any) -> Any:
    """Return the type of arrays in shared memory that matrix products read."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def blocks(shape: tuple[int | None, ...], index: Callable[..., Any], swizzled: bool = True) -> Any:
    """Return the tiles of an array that a pipeline copies; those of matrix products are swizzled."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)) if swizzled else ()
    return plgpu.BlockSpec(block_shape=shape, index_map=index, transforms=transforms)


def pipeline(body: Callable[..., Any], compute: Callable[..., None], grid: tuple[Any, ...], specs: list[Any]) -> Any:
    """Return the loop of the warpgroups: ``compute`` calls it, and ``body`` is one step."""
    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=grid,
        in_specs=specs,
        max_concurrent_steps=STAGES,
        num_compute_wgs=WARPGROUPS,
        memory_registers=COPY_REGISTERS,
        wg_axis="warpgroup",
        compute_context=compute,
    )


def launch(
    body: Callable[..., None], operands: Operands, grid: tuple[int, int, int], out_types: Any, scratch: Any
) -> Any:
    """Run a kernel over heads, tiles, and examples; ``body`` takes operands, results, and scratch memory."""
    present = [name for name, x in operands._asdict().items() if x is not None]

    def entry(*refs: Any) -> None:
        body(Operands(**{**dict.fromkeys(Operands._fields), **dict(zip(present, refs))}), *refs[len(present) :])

    kernel = plgpu.kernel(
        entry,
        out_type=out_types,
        scratch_types=scratch,
        grid=grid,
        grid_names=("head", "tile", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=INTERPRET,
    )
    with jax.enable_x64(False):  # the pipelines mix int32 with Python integers
        return kernel(*(getattr(operands, name) for name in present))


def place(num_tiles: int, last_first: bool) -> tuple[Array, Array, Array, Array]:
    """Return example, head, first row of the warpgroup, and first row of all warpgroups."""
    tile = lax.axis_index("tile")
    tile = num_tiles - 1 - tile if last_first else tile  # long tiles first
    first = tile * BLOCK
    return lax.axis_index("batch"), lax.axis_index("head"), first + lax.axis_index("warpgroup") * ROWS, first
