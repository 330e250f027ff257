"""Sources of random decisions: one class per generator and mask version."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding

from jdrop._errors import describe
from jdrop._platform import Platform
from jdrop._random import fast, jax_bits, packed
from jdrop._random.indexing import MIN_COLUMNS, row_and_column, strides
from jdrop._random.threefry import U64, Pair
from jdrop._types import Generator, Rate


class Bits(Protocol):
    """A source of decisions. Instances are static: compared by value, and hashable."""

    @property
    def random_access(self) -> bool:
        """Whether a decision can be drawn by its index, without the others."""

    @property
    def hashed(self) -> bool:
        """Whether each decision takes a whole hash."""

    def rate(self, rate: Rate) -> Rate:
        """Return the drop rate as a mask stores it. Concrete rates stay concrete, because moving them takes time."""

    def check_shape(self, function: str, shape: tuple[Any, ...]) -> None:
        """Require a shape of decisions that the bits support."""

    def keep_at(
        self, words: Array, rate: Rate, shape: tuple[Any, ...], index: Sequence[U64], platform: Platform
    ) -> Array:
        """Return which elements are kept, at the index along each axis of the whole array."""

    def keep_all(self, words: Array, rate: Rate, shape: tuple[Any, ...], sharding: NamedSharding | None) -> Array:
        """Return which elements of a whole array are kept, without random access."""

    def keep_probability(self, rate: Rate, dtype: Any) -> Array:
        """Return the exact probability that an element is kept, in ``dtype``; NaN for NaN."""


@dataclasses.dataclass(frozen=True)
class FastBits:
    """``generator="fast"``: mask version 1."""

    @property
    def random_access(self) -> bool:
        return True

    @property
    def hashed(self) -> bool:
        return False

    def rate(self, rate: Rate) -> Rate:
        return np.asarray(rate, np.float32) if isinstance(rate, np.ndarray) else rate.astype(jnp.float32)

    def check_shape(self, function: str, shape: tuple[Any, ...]) -> None:
        try:
            strides(shape)
        except TypeError:
            raise ValueError(
                f"{function}: shape of the mask must have static sizes on the trailing axes that hold "
                f"{MIN_COLUMNS} elements, except for its first axis, got {shape}; "
                'export with those sizes fixed, or use generator="jax"'
            ) from None

    def word_at(self, words: Array, shape: tuple[Any, ...], index: Sequence[U64], platform: Platform) -> Array:
        """Return the uint32 words at an index, from which decisions and noise are computed."""
        key, col = self.row_keys(words, shape, index, platform)
        return self.mix(key, col)

    def mix(self, key: Pair, col: Array) -> Array:
        """Mix the key of a row and a column into the word of an element."""
        return fast.mix(key, col)

    def row_keys(
        self, words: Array, shape: tuple[Any, ...], index: Sequence[U64], platform: Platform
    ) -> tuple[Pair, Array]:
        """Return the keys of the rows, and the columns, of an index."""
        row, col = row_and_column(shape, index)
        return platform.row_key(platform.recomputed(words), row, col), col

    def keep_at(
        self, words: Array, rate: Rate, shape: tuple[Any, ...], index: Sequence[U64], platform: Platform
    ) -> Array:
        return fast.keep(self.word_at(words, shape, index, platform), jnp.asarray(rate))

    def keep_all(self, words: Array, rate: Rate, shape: tuple[Any, ...], sharding: NamedSharding | None) -> Array:
        raise NotImplementedError("these bits have random access")

    def keep_probability(self, rate: Rate, dtype: Any) -> Array:
        return fast.keep_probability(jnp.asarray(rate), dtype)


@dataclasses.dataclass(frozen=True)
class PackedBits(FastBits):
    """``generator="packed"``: two decisions per word."""

    def rate(self, rate: Rate) -> Rate:
        xp: Any = np if isinstance(rate, np.ndarray) else jnp
        return xp.asarray(xp.round(super().rate(rate) * packed.STEPS) / packed.STEPS)

    def mix(self, key: Pair, col: Array) -> Array:
        return packed.mix(key, col)


@dataclasses.dataclass(frozen=True)
class JaxBits:
    """``generator="jax"``: the decisions of ``jax.random.bernoulli``."""

    implementation: str
    """The implementation of the key, as named by ``jax.random.key_impl``."""
    random_access: bool

    @property
    def hashed(self) -> bool:
        return True

    def rate(self, rate: Rate) -> Rate:
        return jax_bits.realized_rate(rate)

    def check_shape(self, function: str, shape: tuple[Any, ...]) -> None:
        del function, shape

    def keep_at(
        self, words: Array, rate: Rate, shape: tuple[Any, ...], index: Sequence[U64], platform: Platform
    ) -> Array:
        # The index too: on CPU, it would be hoisted out of a scan and stored if it did not depend on the key.
        words, index = platform.recomputed((words, index))
        flat, _ = row_and_column(shape, index, columns=False)
        return jax_bits.keep(jax_bits.bits_at((words[0], words[1]), flat, rate.dtype), jnp.asarray(rate))

    def keep_all(self, words: Array, rate: Rate, shape: tuple[Any, ...], sharding: NamedSharding | None) -> Array:
        key = jax.random.wrap_key_data(words, impl=self.implementation)
        return jax.random.bernoulli(key, 1 - rate, shape, out_sharding=sharding) | jnp.isnan(rate)

    def keep_probability(self, rate: Rate, dtype: Any) -> Array:
        return jax_bits.keep_probability(jnp.asarray(rate), dtype)


WORD_BITS: dict[str, FastBits] = {"fast": FastBits(), "packed": PackedBits()}
"""The generators whose decisions come from words."""


def bits_for(function: str, key: Array, generator: Generator, argument: str = "key") -> Bits:
    """Return the source of decisions for a key; ``argument`` is the name of the key in the function."""
    if generator in WORD_BITS:
        return WORD_BITS[generator]
    try:
        implementation = str(jax.random.key_impl(key))  # legacy keys: the default implementation
    except (TypeError, ValueError):
        raise ValueError(
            f'{function}: {argument} must have the words of the default implementation for generator="jax", '
            f"got {describe(key)}; wrap it with jax.random.wrap_key_data(key, impl=...)"
        ) from None
    return JaxBits(implementation, jax_bits.has_random_access(implementation))


def expected_keep(rate: Rate, generator: Generator, dtype: Any) -> Array:
    """Return the keep probability without a key, as the factor of evaluation if training does not divide."""
    bits: Bits = WORD_BITS.get(generator) or JaxBits("", False)
    return bits.keep_probability(lax.stop_gradient(bits.rate(rate)), dtype)
