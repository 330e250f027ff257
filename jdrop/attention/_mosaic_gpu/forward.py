"""The attention kernel of the forward pass for Hopper GPUs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdrop.attention import _tile
from jdrop.attention._mosaic_gpu import parts
from jdrop.attention._mosaic_gpu.parts import BLOCK, ROW, ROWS, WARPGROUPS, Operands, Options


def forward(options: Options, operands: Operands) -> tuple[Array, Array, Array]:
    """Return the output, the peaks of logits in units of log 2, and the sums of exponentials, both [B, N, T]."""
    batch_size, num_queries, heads, width = operands.query.shape
    padded_keys, dtype = operands.key.shape[1], operands.query.dtype
    groups, num_tiles = heads // operands.key.shape[2], num_queries // BLOCK
    tile = (ROWS, 128)

    def kernel(refs: Operands, out: Any, peaks: Any, totals: Any, q_shared: Any, rows_shared: Any, ready: Any) -> None:
        batch, head, query, first_query = parts.place(num_tiles, options.spec.causal)
        limits, own = options.limits(refs.numbers, batch), lax.axis_index("warpgroup")
        low, count = parts.steps(*_tile.key_range(limits, first_query, BLOCK, padded_keys), tile[1])
        factor, sign, _, inverse = (refs.factors[i] for i in range(4))

        def compute(run: Callable[..., Any]) -> None:
            q, rows = q_shared.at[own], rows_shared.at[own]
            plgpu.copy_gmem_to_smem(refs.query.at[batch, pl.ds(query, ROWS), head], q, ready.at[own])
            plgpu.barrier_wait(ready.at[own])
            parts.negate_if(sign, q)
            row_key = parts.load_row_keys(refs, (batch, head, slice(None), pl.ds(query, ROWS)))
            start = (
                parts.full((ROWS, width)),
                parts.full((ROWS,), _tile.LOWEST, ROW),
                parts.full((ROWS,), layout=ROW),
                row_key,
            )
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
            products = parts.hide(limits, parts.product_of_rows(q_shared.at[own], k), query, key, 1)
            e, shrink, peak, total = _tile.softmax_step(products, factor, peak, total, 1)
            if options.bits is not None:
                e = parts.separate(jnp.where(parts.keep(options.bits, row_key, refs, key, tile, 1), e, 0.0))
            total_out = total_out * _tile.along(shrink, (ROWS, width), 0)
            return parts.add_product(total_out, e.astype(dtype), v), peak, total, row_key

        of_keys = parts.blocks((tile[1], None, width), lambda i: (low + i, lax.div(head, jnp.int32(groups)), 0))
        parts.pipeline(step, compute, (count,), [of_keys, of_keys])(refs.key.at[batch], refs.value.at[batch])

    rows_type = jax.ShapeDtypeStruct((batch_size, heads, num_queries), jnp.float32)
    return parts.launch(
        kernel,
        operands,
        (heads, num_tiles, batch_size),
        (jax.ShapeDtypeStruct(operands.query.shape, dtype), rows_type, rows_type),
        [
            parts.shared(WARPGROUPS, ROWS, width, dtype=dtype),
            plgpu.SMEM((WARPGROUPS, 2, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=WARPGROUPS),
        ],
    )
