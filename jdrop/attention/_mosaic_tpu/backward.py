"""The backward pass of attention on TPUs."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from jdrop.attention._mosaic_tpu import tiles
from jdrop.attention._mosaic_tpu.grid import Grid
from jdrop.attention._mosaic_tpu.tiles import LN2, Rows, dot, for_visible


def _kernel(grid: Grid, numbers: Any, factor: Any, *refs: Any) -> None:
    """Compute all gradients.

    The grid is (batch, key heads, parts of their groups, tiles of keys, groups of a part, steps over queries).

    The gradients of the queries of a head stay in memory until all tiles of keys have been added.

    Operands: numbers, the factor of products, rows if there is dropout, query and gradient of the output
    [queries, width], the sums (maximum, and delta) as rows, key [keys, width] and [width, keys], and value
    [keys, width]. The gradient of the output is multiplied by 1 over the keep probability, and it and delta are divided
    by the sum of exponentials. Results: gradients of query [groups, width, queries], key and value [keys, width].
    """
    rows_ref = refs[0] if grid.bits else None
    query, do, sums, key, key_t, value, dq, dk, dv, dq_acc, dk_acc, dv_acc = refs[-12:]
    batch, j, group, step = pl.program_id(0), pl.program_id(3), pl.program_id(4), pl.program_id(5)
    groups = dq_acc.shape[0]
    low, high = grid.query_span(j)
    i = low + step
    starts, ends = (group == 0) & (step == 0), (group == groups - 1) & (step == grid.query_steps - 1)

    @pl.when(starts & (j == 0))
    def _() -> None:
        dq_acc[...] = jnp.zeros_like(dq_acc)

    @pl.when(starts)
    def _() -> None:
        dk_acc[...], dv_acc[...] = jnp.zeros_like(dk_acc), jnp.zeros_like(dv_acc)

    def tile(hide: Any) -> None:
        for part in grid.parts:
            q, g = query[0, 0, part], do[0, 0, part]
            products = hide(dot(key[0, 0], q, (1, 1)) * factor[0, 0], part.start)
            e = jnp.exp2(products - sums[0, 0, 0:1, part])
            kept, dp = e, dot(value[0, 0], g, (1, 1))
            if grid.bits is not None:
                keep = Rows.of(rows_ref, part).keep(grid.bits, j * grid.keys, grid.keys)
                kept, dp = jnp.where(keep, e, 0.0), jnp.where(keep, dp, 0.0)
            ds = (e * (dp - sums[0, 0, 1:2, part])).astype(query.dtype)
            dv_acc[...] += dot(kept.astype(do.dtype), g, (1, 0))
            dk_acc[...] += dot(ds, q, (1, 0))
            dq_acc[group, i, :, part] += dot(key_t[0, 0], ds, (1, 0))

    pl.when(i <= high)(lambda: for_visible(grid, numbers, batch, i, j, tile))

    @pl.when(ends)
    def _() -> None:
        dk[0, 0, 0] = (dk_acc[...] * (factor[0, 0] * LN2)).astype(dk.dtype)
        dv[0, 0, 0] = dv_acc[...].astype(dv.dtype)

    @pl.when(ends & (j == grid.key_tiles - 1))
    def _() -> None:
        dq[0] = (dq_acc[...] * (factor[0, 0] * LN2)).astype(dq.dtype)


def backward(
    grid: Grid,
    groups: int,
    dtype: Any,
    scalars: list[Array],
    rows: Array | None,
    query: Array,
    do: Array,
    sums: Array,
    key: Array,
    value: Array,
    interpret: bool,
) -> tuple[Array, Array, Array]:
    """Return the gradients of query [B, N, T / queries, H, queries], and of key and value [B, K, P, S, H].

    Those of key and value are sums over ``groups`` query heads each, so there are ``P = N / K / groups`` parts.

    Args:
      grid: sizes and loops.
      groups: number of query heads whose gradients stay in memory.
      dtype: dtype of the gradients of key and value.
      scalars: int32 numbers and the factor of products.
      rows: see :class:`Rows`, if there is dropout.
      query: [B, N, T, H].
      do: gradient of the output, scaled, [B, N, T, H].
      sums: maxima of the logits and delta, scaled, [B, N, 2, T].
      key: [B, K, S, H].
      value: [B, K, S, H].
      interpret: whether to run in Pallas' interpreter.
    """
    batch, heads, _, width = query.shape
    key_heads, num_keys = key.shape[1:3]
    parts = heads // key_heads // groups

    def at(b: Any, k: Any, part: Any, j: Any, group: Any, step: Any) -> Any:
        low, high = grid.query_span(j)
        return b, (k * parts + part) * groups + group, jnp.minimum(low + step, high)

    row_specs = [] if rows is None else [tiles.row_spec(rows, grid, at)]
    of_query = pl.BlockSpec((1, 1, grid.queries, width), lambda *steps: (*at(*steps), 0))
    of_key = pl.BlockSpec((1, 1, grid.keys, width), lambda b, k, part, j, group, step: (b, k, j, 0))
    of_key_gradient = pl.BlockSpec((1, 1, 1, grid.keys, width), lambda b, k, part, j, group, step: (b, k, part, j, 0))
    key_gradient = tiles.result(query, (batch, key_heads, parts, num_keys, width), dtype)
    return pl.pallas_call(
        functools.partial(_kernel, grid),
        grid=(batch, key_heads, parts, grid.key_tiles, groups, grid.query_steps),
        in_specs=[
            *tiles.scalars(),
            *row_specs,
            of_query,
            of_query,
            pl.BlockSpec((1, 1, 2, grid.queries), lambda *steps: (*at(*steps)[:2], 0, at(*steps)[2])),
            of_key,
            pl.BlockSpec((1, 1, width, grid.keys), lambda b, k, part, j, group, step: (b, k, 0, j)),
            of_key,
        ],
        out_specs=[
            pl.BlockSpec(
                (1, groups, grid.query_tiles, width, grid.queries),
                lambda b, k, part, j, group, step: (b, k * parts + part, 0, 0, 0),
            ),
            of_key_gradient,
            of_key_gradient,
        ],
        out_shape=[
            tiles.result(query, (batch, heads, grid.query_tiles, width, grid.queries), query.dtype),
            key_gradient,
            key_gradient,
        ],
        scratch_shapes=tiles.scratch(
            (groups, grid.query_tiles, width, grid.queries), (grid.keys, width), (grid.keys, width)
        ),
        compiler_params=tiles.semantics(3, 3),
        interpret=interpret,
    )(*scalars, *([] if rows is None else [rows]), query, do, sums, key, key.swapaxes(2, 3), value)
