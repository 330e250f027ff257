"""The kernels of attention for Hopper GPUs, in Pallas Mosaic GPU.

Each kernel has two warpgroups that compute, with 64 queries or keys each, and one that copies tiles of the others into
shared memory. All arrays have whole tiles. Never run on a GPU: compiled for one, and checked with JAX's interpreter.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

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

    def limits(self, numbers: Any, batch: Array) -> Limits:
        return Limits.of(
            self.spec,
            self.num_keys,
            numbers[batch, 2],
            numbers[batch, 0] if self.limits_queries else None,
            numbers[batch, 1] if self.limits_keys else None,
        )


# ---------------------------------------------------------------------------------- parts of kernels


def load(ref: Any, layout: Any) -> Array:
    """Load a whole reference into registers."""
    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # required by jax 0.10, an error in 0.12
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def zeros(shape: tuple[int, ...], value: float = 0.0, layout: Any = TILE) -> Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def index(dtype: Any, shape: tuple[int, int], axis: int) -> Index:
    """Return the index along an axis of a tile in registers."""
    whole = plgpu.broadcasted_iota(dtype, shape, axis, layout=TILE)
    if axis == 0:
        return Index(whole, whole & np.array(0, dtype))
    lane = whole & np.array(6, dtype)  # a thread has the columns 8 i + 2 lane + (0, 1)
    return Index(lane, whole - lane)


def product_of_rows(a: Any, b: Any) -> Array:
    """Return ``a @ b.T``, float32; both are in shared memory."""

    def multiply(result: Any) -> Array:
        plgpu.wgmma(result, a, b.transpose((1, 0)))
        return result[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))


def add_product(total: Array, a: Array, b: Any) -> Array:
    """Return ``total + a @ b``; b is in shared memory."""
    return pl.run_state(lambda result: plgpu.wgmma(result, a, b))(plgpu.ACC.init(total))


def negate_if(sign: Array, x: Any) -> None:
    """Multiply an array in shared memory by 1 or -1."""
    x[...] = (load(x, TILE).astype(jnp.float32) * sign).astype(x.dtype)
    plgpu.commit_smem()


def hide(limits: Limits, products: Array, query: Array, key: Array, key_axis: int) -> Array:
    """Return the products of a tile that starts at a query and a key, -inf where the key is hidden."""
    if not limits.hide:
        return products
    shape = products.shape
    cut = _tile.is_cut(limits, query, shape[1 - key_axis], key, shape[key_axis])

    def hidden(products: Array) -> Array:
        queries, keys = index(jnp.int32, shape, 1 - key_axis), index(jnp.int32, shape, key_axis)
        return jnp.where(_tile.visible(limits, query, queries, key, keys), products, -jnp.inf)

    return lax.cond(cut, hidden, lambda x: x, products)


def keep(row_key: tuple[Array, Array], refs: Operands, key: Array, shape: tuple[int, int], key_axis: int) -> Array:
    return _tile.keep(row_key, key.astype(jnp.uint32), index(jnp.uint32, shape, key_axis), refs.threshold[0], key_axis)


def separate(kept: Array) -> Array:
    """Return kept scores, such that LLVM selects them before it rounds them, not after.

    Symptom: it selects halves of registers, and puts them together again. Gain: 1.1 instructions per score. Seen: jax
    0.10.2. Test: test_accelerators.py.
    """
    return lax.optimization_barrier(kept)


def load_rows(rows: Any, count: int) -> list[Array]:
    """Load rows from [count, n] in global memory."""
    return [load(rows.at[i], ROW) for i in range(count)]


def steps(low: Any, high: Any, block: int) -> tuple[Any, Any]:
    """Return the first of the blocks that cover a range, and their number."""
    first = low // block if isinstance(low, int) else lax.div(low, jnp.int32(block))
    if isinstance(high, int):
        last = -(-high // block)
    else:
        last = lax.div(high + (block - 1), jnp.int32(block))
    return first, last - first if isinstance(last - first, int) else jnp.maximum(last - first, 0)


def shared(*shape: int, dtype: Any) -> Any:
    """Return the type of arrays in shared memory that matrix products read."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def blocks(shape: tuple[int | None, ...], index: Callable[..., Any], swizzled: bool = True) -> Any:
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)) if swizzled else ()
    return plgpu.BlockSpec(block_shape=shape, index_map=index, transforms=transforms)


def pipeline(body: Callable[..., Any], compute: Callable[..., None], grid: tuple[Any, ...], specs: list[Any]) -> Any:
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
    """Run a kernel over heads, tiles, and examples; ``body`` takes the operands, the results, and the scratch memory."""
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


# ---------------------------------------------------------------------------------- the forward pass


def forward(options: Options, operands: Operands) -> tuple[Array, Array, Array]:
    """Return the output, the peaks of logits in units of log 2, and the sums of exponentials, both [B, N, T]."""
    batch_size, num_queries, heads, width = operands.query.shape
    padded_keys, dtype = operands.key.shape[1], operands.query.dtype
    groups, num_tiles = heads // operands.key.shape[2], num_queries // BLOCK
    tile = (ROWS, 128)

    def kernel(refs: Operands, out: Any, peaks: Any, totals: Any, q_shared: Any, rows_shared: Any, ready: Any) -> None:
        batch, head, query, first_query = place(num_tiles, options.spec.causal)
        limits, own = options.limits(refs.numbers, batch), lax.axis_index("warpgroup")
        low, count = steps(*_tile.key_range(limits, first_query, BLOCK, padded_keys), tile[1])
        factor, sign, _, inverse = (refs.factors[i] for i in range(4))

        def compute(run: Callable[..., Any]) -> None:
            q, rows = q_shared.at[own], rows_shared.at[own]
            plgpu.copy_gmem_to_smem(refs.query.at[batch, pl.ds(query, ROWS), head], q, ready.at[own])
            plgpu.barrier_wait(ready.at[own])
            negate_if(sign, q)
            row_key = () if refs.threshold is None else load_rows(refs.row_keys.at[batch, head, :, pl.ds(query, ROWS)], 2)
            start = zeros((ROWS, width)), zeros((ROWS,), _tile.LOWEST, ROW), zeros((ROWS,), layout=ROW), tuple(row_key)
            total_out, peak, total, _ = run(start)
            scale = jnp.where(total == 0, 0.0, inverse / jnp.where(total == 0, 1.0, total))
            q[...] = (total_out * _tile.along(scale, (ROWS, width), 0)).astype(dtype)
            rows.at[0][...] = peak
            rows.at[1][...] = total
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q, out.at[batch, pl.ds(query, ROWS), head])
            plgpu.copy_smem_to_gmem(rows.at[0], peaks.at[batch, head, pl.ds(query, ROWS)])
            plgpu.copy_smem_to_gmem(rows.at[1], totals.at[batch, head, pl.ds(query, ROWS)])
            plgpu.wait_smem_to_gmem(0)

        def step(block: Any, k: Any, v: Any, carry: Any) -> Any:
            total_out, peak, total, row_key = carry
            key = (low + block[0]) * tile[1]
            products = hide(limits, product_of_rows(q_shared.at[own], k), query, key, 1)
            e, shrink, peak, total = _tile.softmax_step(products, factor, peak, total, 1)
            if row_key:
                e = separate(jnp.where(keep(row_key, refs, key, tile, 1), e, 0.0))
            total_out = total_out * _tile.along(shrink, (ROWS, width), 0)
            return add_product(total_out, e.astype(dtype), v), peak, total, row_key

        of_keys = blocks((tile[1], None, width), lambda i: (low + i, lax.div(head, jnp.int32(groups)), 0))
        pipeline(step, compute, (count,), [of_keys, of_keys])(refs.key.at[batch], refs.value.at[batch])

    rows_type = jax.ShapeDtypeStruct((batch_size, heads, num_queries), jnp.float32)
    return launch(
        kernel,
        operands,
        (heads, num_tiles, batch_size),
        (jax.ShapeDtypeStruct(operands.query.shape, dtype), rows_type, rows_type),
        [
            shared(WARPGROUPS, ROWS, width, dtype=dtype),
            plgpu.SMEM((WARPGROUPS, 2, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=WARPGROUPS),
        ],
    )


# ---------------------------------------------------------------------------------- the backward pass


def gradient_of_queries(options: Options, operands: Operands) -> Array:
    batch_size, num_queries, heads, width = operands.query.shape
    padded_keys, dtype = operands.key.shape[1], operands.query.dtype
    groups, num_tiles = heads // operands.key.shape[2], num_queries // BLOCK
    tile = (ROWS, 64)

    def kernel(refs: Operands, dq: Any, q_shared: Any, do_shared: Any, ready: Any) -> None:
        batch, head, query, first_query = place(num_tiles, options.spec.causal)
        limits, own = options.limits(refs.numbers, batch), lax.axis_index("warpgroup")
        low, count = steps(*_tile.key_range(limits, first_query, BLOCK, padded_keys), tile[1])
        factor, sign, scale, inverse = (refs.factors[i] for i in range(4))

        def compute(run: Callable[..., Any]) -> None:
            q, do, at = q_shared.at[own], do_shared.at[own], (batch, pl.ds(query, ROWS), head)
            plgpu.copy_gmem_to_smem(refs.query.at[at], q, ready.at[own])
            plgpu.copy_gmem_to_smem(refs.do.at[at], do, ready.at[own])
            plgpu.barrier_wait(ready.at[own])
            negate_if(sign, q)
            rows = (batch, head, slice(None), pl.ds(query, ROWS))
            sums = load_rows(refs.sums.at[rows], 2)
            row_key = () if refs.threshold is None else load_rows(refs.row_keys.at[rows], 2)
            total, *_ = run((zeros((ROWS, width)), tuple(sums), tuple(row_key)))
            q[...] = (total * (scale * inverse)).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q, dq.at[at])
            plgpu.wait_smem_to_gmem(0)

        def step(block: Any, k: Any, v: Any, carry: Any) -> Any:
            total, sums, row_key = carry
            key = (low + block[0]) * tile[1]
            products = hide(limits, product_of_rows(q_shared.at[own], k), query, key, 1)
            dp = product_of_rows(do_shared.at[own], v)
            kept = keep(row_key, refs, key, tile, 1) if row_key else None
            _, ds = _tile.gradients(products, dp, factor, *sums, kept, 1)
            return add_product(total, ds.astype(dtype), k), sums, row_key

        of_keys = blocks((tile[1], None, width), lambda i: (low + i, lax.div(head, jnp.int32(groups)), 0))
        pipeline(step, compute, (count,), [of_keys, of_keys])(refs.key.at[batch], refs.value.at[batch])

    memory = shared(WARPGROUPS, ROWS, width, dtype=dtype)
    return launch(
        kernel,
        operands,
        (heads, num_tiles, batch_size),
        jax.ShapeDtypeStruct(operands.query.shape, dtype),
        [memory, memory, plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS)],
    )


def gradients_of_keys(options: Options, operands: Operands) -> tuple[Array, Array]:
    """Return the gradients of keys and values, from tiles with the axes keys and queries."""
    batch_size, padded_keys, key_heads, width = operands.key.shape
    num_queries, dtype = operands.query.shape[1], operands.query.dtype
    groups, num_tiles = operands.query.shape[2] // key_heads, padded_keys // BLOCK
    tile = (ROWS, 64)

    def kernel(refs: Operands, dk: Any, dv: Any, k_shared: Any, v_shared: Any, ready: Any) -> None:
        batch, key_head, key, first_key = place(num_tiles, False)
        limits, own = options.limits(refs.numbers, batch), lax.axis_index("warpgroup")
        low, count = steps(*_tile.query_range(limits, first_key, BLOCK, num_queries), tile[1])
        factor, sign, scale, inverse = (refs.factors[i] for i in range(4))

        def compute(run: Callable[..., Any]) -> None:
            k, v, at = k_shared.at[own], v_shared.at[own], (batch, pl.ds(key, ROWS), key_head)
            plgpu.copy_gmem_to_smem(refs.key.at[at], k, ready.at[own])
            plgpu.copy_gmem_to_smem(refs.value.at[at], v, ready.at[own])
            plgpu.barrier_wait(ready.at[own])
            negate_if(sign, k)
            total_dk, total_dv = run((zeros((ROWS, width)), zeros((ROWS, width))))
            k[...] = (total_dk * (scale * inverse)).astype(dtype)
            v[...] = (total_dv * inverse).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k, dk.at[at])
            plgpu.copy_smem_to_gmem(v, dv.at[at])
            plgpu.wait_smem_to_gmem(0)

        def step(block: Any, q: Any, do: Any, sums: Any, *rest: Any) -> Any:
            *row_key, (total_dk, total_dv) = rest
            query = (low + block[1]) * tile[1]
            products = hide(limits, product_of_rows(k_shared.at[own], q), query, key, 0)
            dp = product_of_rows(v_shared.at[own], do)
            words = [load(row_key[0].at[i], COLUMN) for i in range(2)] if row_key else ()
            kept = keep(tuple(words), refs, key, tile, 0) if row_key else None
            log_sum, delta = (load(sums.at[i], COLUMN) for i in range(2))
            p, ds = _tile.gradients(products, dp, factor, log_sum, delta, kept, 0)
            total_dv = add_product(total_dv, separate(p).astype(dtype), do)
            return add_product(total_dk, ds.astype(dtype), q), total_dv

        head = lambda group: key_head * groups + group
        of_queries = blocks((tile[1], None, width), lambda g, i: (low + i, head(g), 0))
        of_rows = blocks((None, 2, tile[1]), lambda g, i: (head(g), 0, low + i), swizzled=False)
        arrays = [refs.query, refs.do, refs.sums, *([] if refs.threshold is None else [refs.row_keys])]
        specs = [of_queries, of_queries, *[of_rows] * (len(arrays) - 2)]
        pipeline(step, compute, (groups, count), specs)(*(x.at[batch] for x in arrays))

    memory = shared(WARPGROUPS, ROWS, width, dtype=dtype)
    out_type = jax.ShapeDtypeStruct(operands.key.shape, dtype)
    return launch(
        kernel,
        operands,
        (key_heads, num_tiles, batch_size),
        (out_type, out_type),
        [memory, memory, plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS)],
    )
