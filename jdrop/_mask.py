"""A keep mask that is never stored: each decision is a function of a key and an index."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from jdrop._bits import Bits, FastBits, bits_for
from jdrop._platform import GENERIC, Platform
from jdrop._random.indexing import window_index
from jdrop._random.key_words import key_words
from jdrop._random.threefry import U64, Pair
from jdrop._sharding import broadcast_spec
from jdrop._types import Generator, Rate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """The decisions of a whole array, or of a tile of it."""

    words: Array
    """The data words of the key, uint32."""
    rate: Rate
    """The drop rate: a scalar, or an array that broadcasts to the decisions."""
    start: Array | None
    """Where the tile starts, uint32 [ndim, 2] of ``(hi, lo)``; ``None`` for the whole array."""
    shape: tuple[Any, ...] = dataclasses.field(metadata={"static": True})
    """Shape of the decisions of the whole array: 1 on shared axes."""
    bits: Bits = dataclasses.field(metadata={"static": True})

    @property
    def word_bits(self) -> FastBits:
        """The bits of ``generator="fast"`` or ``"packed"``, as kernels need them."""
        assert isinstance(self.bits, FastBits)
        return self.bits

    def keep(
        self, size: Sequence[Any], *, platform: Platform = GENERIC, sharding: NamedSharding | None = None
    ) -> Array:
        """Return which elements of a window at ``start`` are kept: a bool array with size 1 on shared axes.

        Args:
          size: shape of the window.
          platform: the forms of operations.
          sharding: sharding of the window over an explicit mesh.
        """
        if self.bits.random_access:
            return self.keep_at(self.index(size, sharding), platform=platform)
        size, sharding = self._of_decisions(size, sharding)
        return self.bits.keep_all(self.words, self.rate, size, sharding)

    def keep_at(self, index: Sequence[U64], *, platform: Platform = GENERIC) -> Array:
        """Return which elements are kept, if the bits have random access.

        ``index`` counts along each axis of the whole array: arrays of one rank that broadcast. It is not read on shared
        axes.
        """
        return self.bits.keep_at(self.words, self.rate, self.shape, self._zero_where_shared(index), platform)

    def word_at(self, index: Sequence[U64], *, platform: Platform = GENERIC) -> Array:
        """Return the uint32 words behind decisions and noise of ``generator="fast"``; ``index`` as for keep_at."""
        assert type(self.bits) is FastBits  # not all bits of the words of its subclass are random
        return self.bits.word_at(self.words, self.shape, self._zero_where_shared(index), platform)

    def row_keys(self, size: Sequence[Any], start: Array | None, *, platform: Platform = GENERIC) -> tuple[Pair, Array]:
        """Return keys and first columns for kernels, such that ``bits.mix(key, column + j)`` is the word of element j.

        Elements count along the last axis, which is whole and not shared. ``size`` is that of a window with 1 on the
        last axis, and ``start`` is where it starts, as for a mask.
        """
        index = dataclasses.replace(self, start=start).index(size)
        return self.word_bits.row_keys(self.words, self.shape, self._zero_where_shared(index), platform)

    def keep_probability(self, dtype: Any) -> Array:
        """Return the exact probability that an element is kept; NaN where the rate is NaN."""
        return self.bits.keep_probability(self.rate, dtype)

    def inverse_keep_probability(self, dtype: Any) -> Array:
        """Return the factor of kept elements, 1 over the keep probability; 0 where nothing is kept."""
        keep = self.keep_probability(dtype)
        return jnp.where(keep == 0, 0.0, 1 / jnp.where(keep == 0, 1.0, keep))

    def index(self, size: Sequence[Any], sharding: NamedSharding | None = None) -> list[U64]:
        """Return the index along each axis of a window at ``start``, with size 1 on shared axes."""
        size, sharding = self._of_decisions(size, sharding)
        start = None if self.start is None else [U64(at[0], at[1]) for at in self.start]
        return window_index(size, start, sharding)

    def unshared_index(self, x: Array, index: Sequence[U64], platform: Platform) -> Sequence[U64]:
        """Return the index of the elements of x, in the form of a platform; the values of x do not matter.

        On some platforms, the compiler then cannot share the mask with other data.
        """
        return platform.unshared_index(x, index, hashed=self.bits.hashed)

    def _of_decisions(self, size: Sequence[Any], sharding: NamedSharding | None) -> tuple[tuple[Any, ...], Any]:
        """Return the size and the sharding of the decisions of a window: 1 and none on shared axes."""
        if 1 not in self.shape:
            return tuple(size), sharding
        if sharding is not None:
            sharding = sharding.update(spec=broadcast_spec(sharding.spec, self.shape))
        return tuple(1 if whole == 1 else n for whole, n in zip(self.shape, size)), sharding

    def _zero_where_shared(self, index: Sequence[U64]) -> Sequence[U64]:
        if 1 not in self.shape:
            return index
        zero = U64(np.uint32(0), jnp.zeros((1,) * np.ndim(index[0].lo), jnp.uint32))
        return [zero if n == 1 else at for n, at in zip(self.shape, index)]


def draw_mask(
    function: str,
    key: Array,
    rate: Rate,
    shape: tuple[Any, ...],
    generator: Generator = "fast",
    *,
    start: Array | None = None,
    random_access: bool = False,
    key_argument: str = "key",
) -> Mask:
    """Consume a key, and return the mask of checked arguments.

    Args:
      function: the caller, for errors.
      key: one PRNG key.
      rate: the drop rate.
      shape: shape of the decisions of the whole array.
      generator: source of the bits.
      start: where a tile starts.
      random_access: whether decisions are drawn by index, as those of a tile always are.
      key_argument: name of the key in the function.
    """
    bits = bits_for(function, key, generator, key_argument)
    if not bits.random_access and (random_access or start is not None):
        raise NotImplementedError(
            f'{function}: generator must be "fast" for a part of a mask, '
            f"unless the bits of the key can be drawn by index, got 'jax' with {key.dtype} key; "
            'use generator="fast", or a threefry2x32 key with jax_threefry_partitionable'
        )
    bits.check_shape(function, shape)
    return Mask(key_words(key), bits.rate(rate), start, shape, bits)
