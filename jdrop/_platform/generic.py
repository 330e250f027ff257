"""The operations that platforms may override, in their plain form, which is right for every compiler."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jdrop._random import fast
from jdrop._random.threefry import U64, Pair


class BlockSizes(NamedTuple):
    """Sizes of the blocks of attention. Scores are counted per device."""

    queries: int = 512
    """Queries per block and key head, over all groups."""
    scores: int = 2**22
    """A block takes more queries while it has at most this many scores."""
    segment: int = 256
    """Minimum number of queries per segment: a range of queries that sees only a range of keys."""
    segments: int = 4
    """Number of segments, if their size allows; twice as many with a window."""
    target_scores: int = 2**25
    """Target number of scores per block. Segmented attention uses half per block, and up to twice in flight."""


class Platform:
    """The plain form of each operation. A platform overrides those that its compiler makes slow or large."""

    squeezes_blocks = False
    """Whether attention squeezes axes of size 1 from blocks."""
    block_sizes = BlockSizes()
    reuses_rounded_outputs = False
    """Whether the backward pass of attention takes a sum from outputs of 16 bits, and not from the scores."""
    rounds_probabilities = False
    """Whether attention in bfloat16 without bias rounds exponentials, and differences of gradients, to bfloat16.

    Needs ``reuses_rounded_outputs``.
    """
    unrolls_hashes = True
    """Whether the hashes of a path of names are straight-line code."""

    def recomputed(self, x: Any) -> Any:
        """Return what masks are computed from, such that the backward pass recomputes the mask of the forward pass."""
        return x

    def unshared_index(self, x: Array, index: Sequence[U64], *, hashed: bool) -> Sequence[U64]:
        """Return the index of the elements of x, such that other data do not share the mask.

        The values of x do not matter. ``hashed`` is whether each decision takes a whole hash.
        """
        del x, hashed
        return index

    def row_key(self, words: Array, row: Pair, col: Array) -> Pair:
        """Return the keys of rows, for a loop over columns to share, from the data words of a key."""
        del col
        return fast.row_key(fast.seed(words), row)

    def materialize(self, x: Array, shape: tuple[Any, ...]) -> Array:
        """Return decisions or noise that broadcast to data of a shape, computed once for all data that share them."""
        del shape
        return x

    def multiply(self, x: Array, factor: Array, *, where: Array, words: Array) -> Array:
        """Multiply by a real factor in float32 (float64 for float64 x), rounded once; exactly 0 elsewhere.

        ``words`` is any uint32 array that is not constant to the compiler.
        """
        del words
        return multiply(x, factor, where=where)

    def select(self, kept: Array, x: Array, y: Array, *, words: Array) -> Array:
        """Return ``where(kept, x, y)``."""
        del words
        return jnp.where(kept, x, y)

    def fold(self, size: int, devices: int) -> "Fold | None":
        """Return how to loop over a single whole axis in rows, or ``None`` to leave it unchanged."""
        del size, devices
        return None

    def order_after(self, x: Array, dependency: Array | None) -> Array:
        """Return x, such that computations from it start only after a dependency is computed."""
        del dependency
        return x

    def unshared_query(self, query: Array, do: Array) -> Array:
        """Return the query, such that the backward pass shares no scores with the forward pass.

        ``do`` is the gradient of the output, with the shape and the dtype of the query.
        """
        return self.order_after(query, do[..., :1])

    def separate(self, *arrays: Array) -> tuple[Array, ...]:
        """Return arrays that are not fused with their consumers."""
        return arrays

    def sum_of_products(self, x: Array, y: Array) -> Array:
        """Return ``sum(x * y, axis=-1)`` in full precision."""
        return jnp.sum(x * y, axis=-1)


def multiply(x: Array, factor: Array, *, where: Array) -> Array:
    """Multiply by a real factor in its dtype, rounded once to that of x; exactly 0 where ``where`` is false."""
    if jnp.iscomplexobj(x):
        return jnp.where(where, lax.complex(x.real * factor, x.imag * factor), jnp.zeros((), x.dtype))
    product = jnp.where(where, x.astype(factor.dtype) * factor, jnp.zeros((), factor.dtype))
    return product.astype(x.dtype)


def opaque_zero(x: Array) -> Array:
    """Return ``(x + x) & 1`` of unsigned words, which is 0: XLA does not know that, and LLVM does."""
    return (x + x) & np.asarray(1, x.dtype)


def index_of_data(x: Array, index: Sequence[U64]) -> Sequence[U64]:
    """Return an index with a dependence on x: add ``(b + b) & 1`` of the bits of x, which is 0.

    XLA does not simplify this, so it cannot merge the masks of two passes, which have different data. Decisions that
    elements share do not depend on x, because few are stored.
    """
    shapes = [at.lo.shape for at in index]
    own = all(len(shape) == x.ndim for shape in shapes) and all(
        any(shape[axis] == size for shape in shapes) for axis, size in enumerate(x.shape)
    )
    if not own or not shapes or not jnp.issubdtype(x.dtype, jnp.inexact):
        return index
    real = x.real if jnp.iscomplexobj(x) else x
    bits = lax.bitcast_convert_type(real, jnp.dtype(f"uint{8 * real.dtype.itemsize}")).astype(jnp.uint32)
    return [*index[:-1], U64(index[-1].hi, index[-1].lo ^ opaque_zero(bits))]


def row_key_of_elements(words: Array, row: Pair, col: Array, *, small: int) -> Pair:
    """Return the keys of rows, from a hash of the key that depends on the row, and on the column in small arrays.

    XLA fuses a computation for each element, but not one whose result many elements share. Arrays of up to ``small``
    elements hash the key for each element: about 150 instructions more.
    """
    high, low = row
    size = math.prod(jnp.broadcast_shapes(np.shape(low), np.shape(col)))
    if isinstance(size, int) and size <= small:  # unknown if symbolic
        low = low ^ opaque_zero(col)
    zero = opaque_zero(low)
    return fast.row_key(fast.seed([word ^ zero for word in words]), (high, low))


class Fold(NamedTuple):
    """A single axis in rows."""

    width: int
    platform: Platform
    """Computes row keys such that the words of the rows are those of the axis."""


GENERIC = Platform()
