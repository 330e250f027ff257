"""What the kernels for TPUs share.

Tiles are [keys, queries]. What belongs to a query is then a row [1, queries] of a tile, sums over keys add vectors and
need no sum within a vector, and all products take their operands as they are. So values come as [width, keys], and
outputs leave as [width, queries].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jdrop._bits import FastBits
from jdrop.attention import _tile
from jdrop.attention._mosaic_tpu.grid import Grid

LN2 = float(np.log(2))


class Rows(NamedTuple):
    """What a kernel needs for each query, as the rows of a uint32 array [rows, queries]."""

    key: tuple[Any, Any]
    """The key of the words of the query."""
    threshold: Any
    factor: Any
    """1 over the keep probability, or 0 if that is 0; float32."""
    first: Any
    """The column of the first key; ``None`` if it is 0."""

    @classmethod
    def of(cls, ref: Any, part: Any = slice(None)) -> "Rows":
        """Read a part of the queries."""
        first, second, threshold, factor, *column = (ref[0, 0, i : i + 1, part] for i in range(ref.shape[2]))
        factor = lax.bitcast_convert_type(factor, jnp.float32)
        return cls((first, second), threshold, factor, column[0] if column else None)

    def keep(self, bits: FastBits, first_key: Any, keys: int) -> Array:
        """Return which scores of a tile are kept. Keys are a power of two, at least 8, and divide the first one."""
        start, queries = first_key.astype(jnp.uint32), self.threshold.shape[1]
        if self.first is not None:
            columns = lax.broadcasted_iota(jnp.uint32, (keys, queries), 0) + start + self.first
            return bits.mix(self.key, columns) >= self.threshold
        # Vectors have 8 rows: the number of a vector is constant in it, and only the row within it is in the key.
        rows = lax.broadcasted_iota(jnp.uint32, (1, 8, queries), 1)
        vectors = lax.broadcasted_iota(jnp.uint32, (keys // 8, 8, queries), 0) * np.uint32(8)
        key = self.key[0][None], self.key[1][None]
        kept = _tile.keep(bits, key, start, _tile.Index(rows, vectors), self.threshold[None], 0)
        return kept.reshape(keys, queries)


def dot(x: Array, y: Array, axes: tuple[int, int]) -> Array:
    """Contract an axis of x with one of y, in float32."""
    return lax.dot_general(x, y, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)


def for_visible(grid: Grid, numbers: Any, batch: Any, i: Any, j: Any, step: Any) -> None:
    """Run a step for the tile of queries i and keys j, unless all scores are hidden.

    The step gets a function that hides scores: of their products, and the index of the first query in the tile.
    """
    query, key = (i + grid.first_tile) * grid.queries, j * grid.keys
    padded = grid.num_keys < grid.all_keys
    lengths = (numbers[0, 1 + 2 * batch], numbers[0, 2 + 2 * batch]) if grid.has_lengths else (None, None)
    if padded and not grid.has_lengths:
        lengths = (None, grid.num_keys)
    limits = _tile.Limits.of(grid.spec, grid.num_keys, numbers[0, 0], *lengths)
    if not limits.hide:
        step(lambda products, first: products)
        return
    low, high = _tile.key_range(limits, query, grid.queries, grid.num_keys)
    seen = (key < high) & (key + grid.keys > low)
    cut = _tile.is_cut(limits, query, grid.queries, key, grid.keys)

    def hide(products: Array, first: int) -> Array:
        queries, keys = (lax.broadcasted_iota(jnp.int32, products.shape, axis) for axis in (1, 0))
        of_queries, of_keys = _tile.Index(jnp.int32(0), queries), _tile.Index(jnp.int32(0), keys)
        return jnp.where(_tile.visible(limits, query + first, of_queries, key, of_keys), products, -jnp.inf)

    pl.when(seen & cut)(lambda: step(hide))
    pl.when(seen & ~cut)(lambda: step(lambda products, first: products))


# ---------------------------------------------------------------------------------- calls


def scalars() -> list[Any]:
    """Return the specifications of the operands ``numbers`` and ``factor``."""
    return [pl.BlockSpec(memory_space=pltpu.SMEM)] * 2


def row_spec(rows: Any, grid: Grid, at: Callable[..., tuple[Any, Any, Any]]) -> Any:
    """Return the specification of ``rows``; ``at`` maps indices of the loops to batch, head, and tile of queries."""
    batches, heads, count, _ = rows.shape

    def index(*steps: Any) -> Any:
        b, n, i = at(*steps)
        return b if batches > 1 else 0, n if heads > 1 else 0, 0, i

    return pl.BlockSpec((1, 1, count, grid.queries), index)


def result(like: Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Return the type of a result that varies over the mesh axes that an array varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def scratch(*shapes: tuple[int, ...]) -> list[Any]:
    return [pltpu.VMEM(shape, jnp.float32) for shape in shapes]


def semantics(parallel: int, sequential: int) -> Any:
    """Return the compiler options of a call with some parallel loops outside of sequential ones."""
    return pltpu.CompilerParams(dimension_semantics=(pltpu.PARALLEL,) * parallel + (pltpu.ARBITRARY,) * sequential)
