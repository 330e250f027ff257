"""Attention on TPUs by kernels in Pallas, whose scores never leave fast memory.

This is the method of FlashAttention-2 (Dao 2024, ICLR), with one kernel for the backward pass. The kernels draw the
mask of ``jdrop.dropout_mask``. On CPUs they run in Pallas' interpreter, which is slow, and meant for tests.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jdrop._platform import Target
from jdrop._prepare import Arguments
from jdrop._random import fast
from jdrop._random.indexing import MIN_COLUMNS
from jdrop.attention import _blockwise, _checks, _derivative, _tile
from jdrop.attention._mosaic_tpu.grid import Grid
from jdrop.attention._spec import AttentionInputs, AttentionSpec, first_query

NAME = "mosaic_tpu"
LARGEST_WIDTH = 256
SMALLEST = 128
"""Queries or keys of the smallest tile."""


def refusal(arguments: Arguments, query: Array, key: Array, value: Array, over_scores: tuple[str, ...]) -> str | None:
    """Return why this implementation cannot serve a call, or ``None``."""
    if over_scores:
        return over_scores[0]
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{query.dtype} arrays"
    if query.shape[3] > LARGEST_WIDTH:
        return f"a width of {query.shape[3]}"
    reason = _blockwise.refusal(arguments, query, key, value, over_scores)
    if reason or arguments.is_identity:
        return reason
    if arguments.generator == "jax":
        return f"generator={arguments.generator!r}"
    if arguments.mask_shape(arguments.shape)[3] == 1:
        return "keys that share decisions"
    return None


@dataclasses.dataclass(frozen=True)
class MosaicTpu:
    """The method of these kernels, see :class:`jdrop.attention._derivative.Method`."""

    queries: int = 512
    """Maximum number of queries per tile."""
    keys: int = 512
    chunk: int = 128
    """Queries of a tile that are computed at a time."""
    resident: int = 2**20
    """Maximum number of elements of gradients of queries that stay in fast memory."""

    @property
    def differentiable(self) -> _blockwise.Blockwise:
        return _blockwise.Blockwise()

    def forward(
        self,
        target: Target,
        spec: AttentionSpec,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None,
        inputs: AttentionInputs,
    ) -> tuple[Array, ...]:
        del bias  # refused
        from jdrop.attention._mosaic_tpu.forward import forward  # half a second, only for those who use it

        interpret, grid = _interprets(target), self._grid(spec, query, key, inputs)
        rows = _rows(target, inputs, query, grid)
        query_length, heads_first = query.shape[1], (_padded(query, grid.all_queries), _padded(key, grid.all_keys))
        value_t = _padded(value, grid.all_keys).swapaxes(2, 3)
        out, sums = forward(grid, _scalars(spec, inputs, query, key), rows, *heads_first, value_t, interpret)
        peak, log_sum = (sums[:, :, i, :query_length].swapaxes(1, 2)[..., None] for i in range(2))
        return out[..., :query_length].transpose(0, 3, 1, 2), peak, log_sum

    def backward(self, target: Target, spec: AttentionSpec, residuals: tuple[Any, ...], do: Array) -> tuple[Any, ...]:
        from jdrop.attention._mosaic_tpu.backward import backward

        query, key, value, _, inputs, peak, log_sum, out = residuals
        interpret, grid = _interprets(target), self._grid(spec, query, key, inputs)
        rows, scalars = _rows(target, inputs, query, grid), _scalars(spec, inputs, query, key)
        inverse = jnp.exp(-log_sum)  # 0 for queries that see no key, which have no gradient, whatever do is
        do = jnp.where(inverse == 0, 0, do.astype(peak.dtype))
        delta = jnp.sum(do * out.astype(peak.dtype), axis=-1, keepdims=True) * inverse
        if inputs.dropout is not None:
            inverse = inverse * _as_scores(inputs.dropout.inverse_keep_probability(jnp.float32)).swapaxes(1, 2)
        sums = jnp.concatenate([peak * _tile.LOG2E, delta], axis=-1)
        q, do, sums = (_padded(x, grid.all_queries) for x in (query, (do * inverse).astype(query.dtype), sums))
        k, v = (_padded(x, grid.all_keys) for x in (key, value))
        sums = sums.swapaxes(2, 3)

        segments, together = self._plan(grid, query, key)
        dtype = query.dtype if len(segments) == 1 and together * key.shape[2] == query.shape[2] else jnp.float32
        dqs, dks, dvs = [], [], []
        for segment in segments:
            part = slice(segment.first_tile * grid.queries, (segment.first_tile + segment.query_tiles) * grid.queries)
            rows_of_part = None if rows is None else rows[..., part]
            of_part = (q[:, :, part], do[:, :, part], sums[..., part])
            dq, dk, dv = backward(segment, together, dtype, scalars, rows_of_part, *of_part, k, v, interpret)
            dqs.append(dq.transpose(0, 2, 4, 1, 3).reshape(dq.shape[0], -1, *query.shape[2:]))
            dks.append(dk)
            dvs.append(dv)
        dq = jnp.concatenate(dqs, axis=1)[:, : query.shape[1]]
        dk, dv = (functools.reduce(jnp.add, parts).sum(2, dtype=dtype) for parts in (dks, dvs))
        dk, dv = (x.astype(key.dtype).swapaxes(1, 2)[:, : key.shape[1]] for x in (dk, dv))
        return dq, dk, dv, None

    def _plan(self, grid: Grid, query: Array, key: Array) -> tuple[list[Grid], int]:
        """Return segments of queries, and a number of query heads, whose gradients fit into fast memory."""
        most = max(self.resident // (grid.queries * query.shape[3]), 1)  # tiles of queries
        tiles = -(-grid.query_tiles // -(-grid.query_tiles // most))  # per segment: as many segments, but alike
        starts = range(0, grid.query_tiles, tiles)
        segments = [grid._replace(query_tiles=min(tiles, grid.query_tiles - i), first_tile=i) for i in starts]
        groups = query.shape[2] // key.shape[2]
        together = [n for n in range(1, groups + 1) if groups % n == 0 and n * tiles <= max(most, tiles)]
        return segments, max(together)

    def _grid(self, spec: AttentionSpec, query: Array, key: Array, inputs: AttentionInputs) -> Grid:
        queries, keys = tile_size(query.shape[1], self.queries), tile_size(key.shape[1], self.keys)
        return Grid(
            spec,
            queries,
            keys,
            query_tiles=-(-query.shape[1] // queries),
            key_tiles=-(-key.shape[1] // keys),
            num_keys=key.shape[1],
            has_lengths=inputs.query_lengths is not None or inputs.key_lengths is not None,
            bits=None if inputs.dropout is None else inputs.dropout.word_bits,
            chunk=self.chunk,
        )


def tile_size(length: int, largest: int) -> int:
    """Return the largest power of two that pads a length by at most a quarter, or as little as the smallest."""
    limit = max(-(-length // SMALLEST) * SMALLEST, length * 1.25)
    size = largest
    while -(-length // size) * size > limit:
        size //= 2
    return size


def _interprets(target: Target) -> bool:
    """Return whether to run in the interpreter, and require a platform that can run the kernels."""
    _checks.check_target(target, NAME, ("tpu", "cpu"))
    return target.name == "cpu"


def _padded(x: Array, length: int) -> Array:
    """Turn [B, T, N, H] into [B, N, T, H], padded with zeros."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)


def _scalars(spec: AttentionSpec, inputs: AttentionInputs, query: Array, key: Array) -> list[Array]:
    """Return the position of query 0 and all lengths [1, 1 + 2 B], and the factor of products [1, 1]."""
    first = jnp.reshape(jnp.asarray(first_query(spec, inputs), jnp.int32), (1,))
    batch = query.shape[0]
    lengths = []
    for length, most in ((inputs.query_lengths, 2**31 - 1), (inputs.key_lengths, key.shape[1])):
        lengths.append(jnp.full(batch, most, jnp.int32) if length is None else jnp.minimum(length.reshape(batch), most))
    lengths[0] = lengths[0] - first
    numbers = jnp.concatenate([first, jnp.stack(lengths, 1).reshape(-1)])
    scale = jnp.float32(1) if inputs.scale is None else inputs.scale
    return [numbers[None], jnp.reshape(scale * np.float32(_tile.LOG2E), (1, 1))]


def _as_scores(x: Array) -> Array:
    """Give a number, or an array that broadcasts to scores, four axes."""
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _rows(target: Target, inputs: AttentionInputs, query: Array, grid: Grid) -> Array | None:
    """Return what the kernels need for each query of the mask, see :class:`grid.Rows`; 1 on shared axes."""
    mask = inputs.dropout
    if mask is None:
        return None
    batch, length, heads, _ = query.shape
    row_key, first = mask.row_keys((batch, heads, length, 1), inputs.start, platform=target.platform)
    threshold = _as_scores(fast.threshold(jnp.asarray(mask.rate))[0])
    factor = lax.bitcast_convert_type(_as_scores(mask.inverse_keep_probability(jnp.float32)), jnp.uint32)
    columns = [first] if mask.shape[3] < MIN_COLUMNS else []  # otherwise, the only columns are those of the keys
    rows = jnp.stack(jnp.broadcast_arrays(*row_key, threshold, factor, *columns), axis=2)[..., 0]
    if rows.shape[-1] == 1:
        return jnp.broadcast_to(rows, (*rows.shape[:-1], grid.all_queries))
    return jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, grid.all_queries - length)))


attend = functools.partial(_derivative.attend, MosaicTpu())
