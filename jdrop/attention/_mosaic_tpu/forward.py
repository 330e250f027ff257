"""The forward pass of attention on TPUs."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from jdrop.attention import _tile
from jdrop.attention._mosaic_tpu import tiles
from jdrop.attention._mosaic_tpu.grid import Grid
from jdrop.attention._mosaic_tpu.tiles import LN2, Rows, dot, for_visible


def _kernel(grid: Grid, numbers: Any, factor: Any, *refs: Any) -> None:
    """Attend: the grid is (batch, heads, tiles of queries, steps over keys).

    Operands: numbers, the factor of products, rows if there is dropout, query [queries, width], key [keys, width],
    value [width, keys]. Results: output [width, queries], and maxima and logarithms as rows.
    """
    rows_ref = refs[0] if grid.bits else None
    query, key, value, out, sums, peak, total, acc = refs[-8:]
    batch, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    low, high = grid.key_span(i)
    j = low + step

    @pl.when(step == 0)
    def _() -> None:
        peak[...] = jnp.full_like(peak, _tile.LOWEST)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def tile(hide: Any) -> None:
        products = hide(dot(key[0, 0], query[0, 0], (1, 1)) * factor[0, 0], 0)
        higher = jnp.maximum(peak[...], jnp.max(products, axis=0, keepdims=True))
        shrink = jnp.exp2(peak[...] - higher)
        e = jnp.exp2(products - higher)
        peak[...], total[...] = higher, total[...] * shrink + jnp.sum(e, axis=0, keepdims=True)
        if grid.bits is not None:
            e = jnp.where(Rows.of(rows_ref).keep(grid.bits, j * grid.keys, grid.keys), e, 0.0)
        acc[...] = acc[...] * shrink + dot(value[0, 0], e.astype(value.dtype), (1, 0))

    pl.when(j <= high)(lambda: for_visible(grid, numbers, batch, i, j, tile))

    @pl.when(step == grid.key_steps - 1)
    def _() -> None:
        blind = total[...] == 0
        scale = 1 / jnp.where(blind, 1.0, total[...])
        log_sum = jnp.where(blind, jnp.inf, jnp.log(jnp.where(blind, 1.0, total[...])))
        sums[0, 0] = jnp.concatenate([jnp.where(blind, 0.0, peak[...] * LN2), log_sum])
        if rows_ref is not None:
            scale *= Rows.of(rows_ref).factor
        out[0, 0] = (acc[...] * scale).astype(out.dtype)


def forward(
    grid: Grid, scalars: list[Array], rows: Array | None, query: Array, key: Array, value: Array, interpret: bool
) -> tuple[Array, Array]:
    """Return the output [B, N, H, T], and maxima of logits and logarithms of sums [B, N, 2, T].

    Args:
      grid: sizes and loops.
      scalars: int32 numbers and the factor of products.
      rows: see :class:`Rows`, if there is dropout.
      query: [B, N, T, H].
      key: [B, K, S, H].
      value: [B, K, H, S].
      interpret: whether to run in Pallas' interpreter.
    """
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]

    def key_head(n: Any) -> Any:
        return lax.div(n, jnp.int32(groups))

    def key_tile(i: Any, step: Any) -> Any:
        low, high = grid.key_span(i)
        return jnp.minimum(low + step, high)

    row_specs = [] if rows is None else [tiles.row_spec(rows, grid, lambda b, n, i, step: (b, n, i))]
    return pl.pallas_call(
        functools.partial(_kernel, grid),
        grid=(batch, heads, grid.query_tiles, grid.key_steps),
        in_specs=[
            *tiles.scalars(),
            *row_specs,
            pl.BlockSpec((1, 1, grid.queries, width), lambda b, n, i, step: (b, n, i, 0)),
            pl.BlockSpec((1, 1, grid.keys, width), lambda b, n, i, step: (b, key_head(n), key_tile(i, step), 0)),
            pl.BlockSpec((1, 1, width, grid.keys), lambda b, n, i, step: (b, key_head(n), 0, key_tile(i, step))),
        ],
        out_specs=[
            pl.BlockSpec((1, 1, width, grid.queries), lambda b, n, i, step: (b, n, 0, i)),
            pl.BlockSpec((1, 1, 2, grid.queries), lambda b, n, i, step: (b, n, 0, i)),
        ],
        out_shape=[
            tiles.result(query, (batch, heads, width, length), query.dtype),
            tiles.result(query, (batch, heads, 2, length), jnp.float32),
        ],
        scratch_shapes=tiles.scratch((1, grid.queries), (1, grid.queries), (width, grid.queries)),
        compiler_params=tiles.semantics(3, 1),
        interpret=interpret,
    )(*scalars, *([] if rows is None else [rows]), query, key, value)
