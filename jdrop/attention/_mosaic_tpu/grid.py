"""The loops of the kernels for TPUs over tiles of scores."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jdrop._bits import FastBits
from jdrop.attention._spec import AttentionSpec


class Grid(NamedTuple):
    """The static sizes of a call, and its loops over tiles."""

    spec: AttentionSpec
    queries: int
    """Queries per tile."""
    keys: int
    query_tiles: int
    key_tiles: int
    num_keys: int
    """Number of keys without padding."""
    has_lengths: bool
    bits: FastBits | None
    """Where decisions come from; ``None`` if nothing is dropped."""
    chunk: int
    """Queries that are computed at a time: as much work as needs the compiler's registers and fast memory."""
    first_tile: int = 0
    """The tile of queries at which the arrays of a kernel start."""

    @property
    def all_queries(self) -> int:
        """Number of queries with padding."""
        return self.query_tiles * self.queries

    @property
    def all_keys(self) -> int:
        return self.key_tiles * self.keys

    @property
    def parts(self) -> list[slice]:
        """The parts of the queries of a tile that are computed one after another."""
        size = min(self.chunk, self.queries)
        return [slice(first, first + size) for first in range(0, self.queries, size)]

    @property
    def _reach(self) -> tuple[int | None, int | None]:
        """How many keys a query sees to its left and right; ``None`` if all, or if positions are not static."""
        if self.spec.queries_are_tiled:
            return None, None
        left, right = self.spec.window or (None, None)
        return left, 0 if self.spec.causal else right

    def key_span(self, query_tile: Any) -> tuple[Any, Any]:
        """Return the first and the last tile of keys that some query of a tile may see; at least one."""
        left, right = self._reach
        query, last = (query_tile + self.first_tile) * self.queries, self.key_tiles - 1
        return (
            0 if left is None else tile_of(query - left, self.keys, last),
            last if right is None else tile_of(query + self.queries - 1 + right, self.keys, last),
        )

    def query_span(self, key_tile: Any) -> tuple[Any, Any]:
        """Return the first and the last tile of queries that may see some key of a tile; at least one."""
        left, right = self._reach
        key, last = key_tile * self.keys - self.first_tile * self.queries, self.query_tiles - 1
        return (
            0 if right is None else tile_of(key - right, self.queries, last),
            last if left is None else tile_of(key + self.keys - 1 + left, self.queries, last),
        )

    @property
    def key_steps(self) -> int:
        """Number of steps of the loop over the keys of a tile of queries."""
        return max(high - low + 1 for low, high in map(self.key_span, range(self.query_tiles)))

    @property
    def query_steps(self) -> int:
        return max(high - low + 1 for low, high in map(self.query_span, range(self.key_tiles)))


def tile_of(position: Any, size: int, last: int) -> Any:
    """Return the tile of a position, at least 0 and at most ``last``."""
    if isinstance(position, int):
        return min(max(position, 0) // size, last)
    return jnp.minimum(lax.div(jnp.maximum(position, 0), jnp.int32(size)), last)  # a division of JAX rounds down
