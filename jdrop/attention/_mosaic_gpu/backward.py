"""The attention kernels of the backward pass for Hopper GPUs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdrop.attention import _tile
from jdrop.attention._mosaic_gpu import parts
from jdrop.attention._mosaic_gpu.parts import BLOCK, COLUMN, ROWS, WARPGROUPS, Operands, Options


def gradient_of_queries(options: Options, operands: Operands) -> Array:
    """Return the gradient of queries, from tiles with the axes queries and keys."""
    batch_size, num_queries, heads, width = operands.query.shape
    padded_keys, dtype = operands.key.shape[1], operands.query.dtype
    groups, num_tiles = heads // operands.key.shape[2], num_queries // BLOCK
    tile = (ROWS, 64)

    def kernel(refs: Operands, dq: Any, q_shared: Any, do_shared: Any, ready: Any) -> None:
        batch, head, query, first_query = parts.place(num_tiles, options.spec.causal)
        limits, own = options.limits(refs.numbers, batch), lax.axis_index("warpgroup")
        low, count = parts.steps(*_tile.key_range(limits, first_query, BLOCK, padded_keys), tile[1])
        factor, sign, scale, inverse = (refs.factors[i] for i in range(4))

        def compute(run: Callable[..., Any]) -> None:
            q, do, at = q_shared.at[own], do_shared.at[own], (batch, pl.ds(query, ROWS), head)
            plgpu.copy_gmem_to_smem(refs.query.at[at], q, ready.at[own])
            plgpu.copy_gmem_to_smem(refs.do.at[at], do, ready.at[own])
            plgpu.barrier_wait(ready.at[own])
            parts.negate_if(sign, q)
            rows = (batch, head, slice(None), pl.ds(query, ROWS))
            sums = parts.load_rows(refs.sums.at[rows])
            row_key = parts.load_row_keys(refs, rows)
            total, *_ = run((parts.full((ROWS, width)), sums, row_key))
            q[...] = (total * (scale * inverse)).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q, dq.at[at])
            plgpu.wait_smem_to_gmem(0)

        def step(block: Any, k: Any, v: Any, carry: Any) -> Any:
            total, sums, row_key = carry
            key = (low + block[0]) * tile[1]
            products = parts.hide(limits, parts.product_of_rows(q_shared.at[own], k), query, key, 1)
            dp = parts.product_of_rows(do_shared.at[own], v)
            kept = parts.keep(options.bits, row_key, refs, key, tile, 1) if options.bits else None
            _, ds = _tile.gradients(products, dp, factor, sums[0], sums[1], kept, 1)
            return parts.add_product(total, ds.astype(dtype), k), sums, row_key

        of_keys = parts.blocks((tile[1], None, width), lambda i: (low + i, lax.div(head, jnp.int32(groups)), 0))
        parts.pipeline(step, compute, (count,), [of_keys, of_keys])(refs.key.at[batch], refs.value.at[batch])

    memory = parts.shared(WARPGROUPS, ROWS, width, dtype=dtype)
    return parts.launch(
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
        batch, key_head, key, first_key = parts.place(num_tiles, False)
        limits, own = options.limits(refs.numbers, batch), lax.axis_index("warpgroup")
        low, count = parts.steps(*_tile.query_range(limits, first_key, BLOCK, num_queries), tile[1])
        factor, sign, scale, inverse = (refs.factors[i] for i in range(4))

        def compute(run: Callable[..., Any]) -> None:
            k, v, at = k_shared.at[own], v_shared.at[own], (batch, pl.ds(key, ROWS), key_head)
            plgpu.copy_gmem_to_smem(refs.key.at[at], k, ready.at[own])
            plgpu.copy_gmem_to_smem(refs.value.at[at], v, ready.at[own])
            plgpu.barrier_wait(ready.at[own])
            parts.negate_if(sign, k)
            total_dk, total_dv = run((parts.full((ROWS, width)), parts.full((ROWS, width))))
            k[...] = (total_dk * (scale * inverse)).astype(dtype)
            v[...] = (total_dv * inverse).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k, dk.at[at])
            plgpu.copy_smem_to_gmem(v, dv.at[at])
            plgpu.wait_smem_to_gmem(0)

        def step(block: Any, q: Any, do: Any, sums: Any, *rest: Any) -> Any:
            *row_key, (total_dk, total_dv) = rest
            query = (low + block[1]) * tile[1]
            products = parts.hide(limits, parts.product_of_rows(k_shared.at[own], q), query, key, 0)
            dp = parts.product_of_rows(v_shared.at[own], do)
            words = [parts.load(row_key[0].at[i], COLUMN) for i in range(2)] if row_key else ()
            kept = parts.keep(options.bits, tuple(words), refs, key, tile, 0) if options.bits else None
            log_sum, delta = (parts.load(sums.at[i], COLUMN) for i in range(2))
            p, ds = _tile.gradients(products, dp, factor, log_sum, delta, kept, 0)
            total_dv = parts.add_product(total_dv, parts.separate(p).astype(dtype), do)
            return parts.add_product(total_dk, ds.astype(dtype), q), total_dv

        of_queries = parts.blocks((tile[1], None, width), lambda g, i: (low + i, key_head * groups + g, 0))
        of_rows = parts.blocks((None, 2, tile[1]), lambda g, i: (key_head * groups + g, 0, low + i), swizzled=False)
        arrays = [refs.query, refs.do, refs.sums, *([] if refs.threshold is None else [refs.row_keys])]
        specs = [of_queries, of_queries, *[of_rows] * (len(arrays) - 2)]
        parts.pipeline(step, compute, (groups, count), specs)(*(x.at[batch] for x in arrays))

    memory = parts.shared(WARPGROUPS, ROWS, width, dtype=dtype)
    out_type = jax.ShapeDtypeStruct(operands.key.shape, dtype)
    return parts.launch(
        kernel,
        operands,
        (key_heads, num_tiles, batch_size),
        (out_type, out_type),
        [memory, memory, plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS)],
    )
