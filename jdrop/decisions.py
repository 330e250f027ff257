"""Keep or drop: the rate's thresholds, and the two generators that are compared with them.

A mask has a static :class:`Layout` and up to three operands: the words that seed it, a probability, and,
for a part of a larger mask, where that part starts.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from jdrop import _checks, keys
from jdrop.bits import MIN_COLUMNS, WORD, Pair, coordinates, indices, one_row, place, threefry2x32, word

Generator = Literal["fast", "jax"]
GENERATORS = ("fast", "jax")
_WORDS = float(WORD)
RateLike = float | np.ndarray | Array


class Layout(NamedTuple):
    """What is static about a mask."""

    shape: tuple[Any, ...]
    """Shape of the whole mask; 1 on shared axes."""
    source: Any
    """``"fast"``; ``"indexed"`` for ``jax.random`` bits by index; else a key implementation of ``jax.random``."""
    cut: bool = False
    """Whether the shape is [blocks, width] for the whole of a mask of one axis, see :func:`jdrop.bits.one_row`."""


def mask_shape(function: str, shape: Sequence[Any], shared_axes: Any) -> tuple[Any, ...]:
    """Return the shape of the decisions: the array's, with 1 on shared axes."""
    return with_ones(shape, _checks.axes(function, "shared_axes", shared_axes, len(shape)))


def with_ones(shape: Sequence[Any], axes: Sequence[int]) -> tuple[Any, ...]:
    """Return a shape with 1 on some axes."""
    return tuple(1 if axis in axes else n for axis, n in enumerate(shape))


def layout(function: str, shape: tuple[Any, ...], source: Any) -> Layout:
    """Return the layout of a mask; symbolic sizes (``jax.export``) may not be columns."""
    if source == "fast":
        try:
            coordinates(shape)
        except TypeError:
            rule = f"must have static sizes on the trailing axes that hold {MIN_COLUMNS} elements"
            raise ValueError(_checks.text(function, "shape", rule, shape, "export with those sizes fixed")) from None
    return Layout(shape, source)


def is_zero(rate: np.ndarray | Array) -> bool:
    """Whether nothing can be dropped: a concrete rate of 0."""
    return isinstance(rate, np.ndarray) and not np.any(rate)


def operands(
    function: str,
    key: Array | None,
    rate: np.ndarray | Array,
    generator: Generator,
    *,
    part: bool,
    argument: str = "key",
) -> tuple[Any, Array, Array]:
    """Use the key, and return ``(source, words, probability)``.

    ``part`` tells that bits by index are needed; ``argument`` is what the function calls the key.
    """
    key = needed(function, key, argument)
    if generator == "fast":
        return "fast", keys.seed(keys.consume(key)), probability(rate, generator)
    source = _jax_source(function, key, argument)
    if part and source != "indexed":
        fix = 'use generator="fast", or a threefry2x32 key with jax_threefry_partitionable'
        rule = 'must be "fast" for a part of a mask, unless the bits of the key can be drawn by index'
        raise NotImplementedError(_checks.text(function, "generator", rule, f"'jax' with {key.dtype} key", fix))
    return source, keys.consume(key), probability(rate, generator)


def needed(function: str, key: Array | None, argument: str = "key") -> Array:
    """Require a key, because something is dropped."""
    if key is None:
        fix = "pass a key, or train=False, or rate=0."
        rule = "must be a PRNG key when something is dropped"
        raise TypeError(_checks.text(function, argument, rule, "None", fix))
    return key


def probability(rate: np.ndarray | Array, generator: Generator) -> Array:
    """What the generator compares with: the float32 drop rate (fast), or 1 - rate in the rate's own dtype (jax)."""
    return jnp.asarray(rate, jnp.float32) if generator == "fast" else jnp.asarray(1 - rate)


def by_index(function: str, key: Array, generator: Generator, argument: str = "key") -> bool:
    """Whether a part of a mask can be drawn without the rest."""
    return generator == "fast" or _jax_source(function, key, argument) == "indexed"


def _jax_source(function: str, key: Array, argument: str) -> Any:
    try:
        impl = jax.random.key_impl(key)  # legacy keys: the default implementation
    except (TypeError, ValueError):
        fix = "wrap it with jax.random.wrap_key_data(key, impl=...)"
        rule = 'must have the words of the default implementation for generator="jax"'
        raise ValueError(_checks.text(function, argument, rule, _checks.describe(key), fix)) from None
    config: Any = jax.config
    return "indexed" if impl == "threefry2x32" and config.jax_threefry_partitionable else impl


def keep_probability(source: Any, rate: Array, dtype: Any) -> Array:
    """Return the probability that a mask really keeps with: exact in ``dtype`` up to one rounding.

    0 and 1 for rates of 1 and 0, NaN for NaN.
    """
    if source == "fast":
        t, none = _threshold(rate)
        kept = jnp.where(t == 0, jnp.asarray(_WORDS, dtype), (np.uint32(0) - t).astype(dtype)) / _WORDS
        kept = jnp.where(none, jnp.zeros_like(kept), kept)
    else:
        steps = 2.0 ** jnp.finfo(rate.dtype).nmant
        kept = _jax_threshold(rate).astype(dtype) / steps
    return jnp.where(jnp.isnan(rate), rate.astype(dtype), kept)


def expectation(rate: np.ndarray | Array, generator: Generator, dtype: Any) -> Array:
    """Return the keep probability as a constant: what evaluation multiplies by where training does not divide."""
    return keep_probability(generator, lax.stop_gradient(probability(rate, generator)), dtype)


def _threshold(rate: Array) -> tuple[Array, Array]:
    """Drop words below ``t = round_half_even(rate * 2**32)``; at rate 1, which uint32 cannot hold, drop all."""
    inside = (rate > 0) & (rate < 1)  # NaN is outside, and keeps
    return jnp.round(jnp.where(inside, rate, jnp.zeros_like(rate)) * _WORDS).astype(jnp.uint32), rate >= 1


def _jax_threshold(probability: Array) -> Array:
    """Keep the top bits of a word below ``ceil(p * 2**nmant)``: ``jax.random.uniform(key) < p``."""
    steps = 2.0 ** jnp.finfo(probability.dtype).nmant
    clipped = jnp.where(jnp.isnan(probability), jnp.ones_like(probability), jnp.clip(probability, 0, 1))
    return jnp.ceil(clipped * steps).astype(jnp.uint64 if probability.dtype == jnp.float64 else jnp.uint32)


def keep(
    layout: Layout,
    words: Array,
    rate: Array,
    size: Sequence[Any],
    start: Sequence[Pair] | None = None,
    *,
    sharding: NamedSharding | None = None,
) -> Array:
    """Return which elements are kept: a bool array with 1 on shared axes.

    Args:
      layout: what is static about the whole mask.
      words: the seed (fast) or the key's data words (jax).
      rate: as :func:`operands` returned it; broadcasts to the result.
      size: shape of the part of the array that is wanted.
      start: where that part starts, ``(hi, lo)`` an axis; ``None`` means at 0.
      sharding: how that part is laid over an explicit mesh.
    """
    size, start, sharding = _own(layout, size, start, sharding)
    if layout.source == "fast":
        t, none = _threshold(rate)
        return (word_of(layout, words, size, start, sharding=sharding) >= t) & ~none
    if layout.source == "indexed":
        return _indexed_bits(words, layout.shape, size, start, sharding, rate.dtype) < _jax_threshold(rate)
    key = jax.random.wrap_key_data(words, impl=layout.source)
    return jax.random.bernoulli(key, rate, size, out_sharding=sharding) | jnp.isnan(rate)


def word_of(
    layout: Layout,
    words: Array,
    size: Sequence[Any],
    start: Sequence[Pair] | None = None,
    *,
    sharding: NamedSharding | None = None,
) -> Array:
    """Return the uint32 words of ``generator="fast"``, with 1 on shared axes; arguments as for :func:`keep`."""
    size, start, sharding = _own(layout, size, start, sharding)
    # The barrier keeps XLA from merging the masks of the forward and the backward pass, and so storing one.
    seed = lax.optimization_barrier(words)
    if layout.cut:
        return one_row((seed[0], seed[1]), *size)
    row, col = indices(layout.shape, size, start, sharding)
    return word((seed[0], seed[1]), row, col)


def keep_at(layout: Layout, words: Array, rate: Array, index: Sequence[Pair]) -> Array:
    """Return which elements are kept, of a mask whose bits go by index.

    ``index`` is ``(hi, lo)`` along each axis of the mask: arrays of one rank that broadcast; not read on shared axes.
    """
    zero = (np.uint32(0), jnp.zeros((1,) * np.ndim(index[0][1]), jnp.uint32))
    index = [zero if n == 1 else at for n, at in zip(layout.shape, index)]
    if layout.source == "indexed":
        words, index = lax.optimization_barrier((words, index))
        return _bits_of(words, place(layout.shape, index, columns=False)[0], rate.dtype) < _jax_threshold(rate)
    seed = lax.optimization_barrier(words)
    t, none = _threshold(rate)
    return (word((seed[0], seed[1]), *place(layout.shape, index)) >= t) & ~none


def keep_rows(layout: Layout, words: Array, rate: Array, index: Pair) -> Array:
    """Return which rows are kept, of a mask of shape [rows, 1]; ``index`` is ``(hi, lo)`` of each row asked for."""
    if layout.source == "indexed":
        words = lax.optimization_barrier(words)
        return _bits_of(words, index, rate.dtype) < _jax_threshold(rate)
    seed = lax.optimization_barrier(words)
    t, none = _threshold(rate)
    return (word((seed[0], seed[1]), (np.uint32(0), index[0]), index[1]) >= t) & ~none


def _own(layout: Layout, size: Sequence[Any], start: Any, sharding: Any) -> tuple[Any, Any, Any]:
    """Return size, start and sharding of the decisions of a part of the array: 1, 0 and none on shared axes."""
    shared = [n == 1 for n in layout.shape]
    size = tuple(1 if one else n for one, n in zip(shared, size))
    if start is not None:
        start = [(np.uint32(0), np.uint32(0)) if one else at for one, at in zip(shared, start)]
    if sharding is not None:
        sharding = sharding.update(spec=PartitionSpec(*(None if one else s for one, s in zip(shared, sharding.spec))))
    return size, start, sharding


def _indexed_bits(words: Array, shape: Any, size: Any, start: Any, sharding: Any, dtype: Any) -> Array:
    """Return the integer of ``nmant`` bits that ``jax.random.uniform`` makes a number of ``dtype`` from."""
    # One barrier around both: an index that does not depend on the key would be hoisted out of a scan, and stored.
    start = start or [(np.uint32(0), np.uint32(0))] * len(shape)
    words, start = lax.optimization_barrier((words, start))
    return _bits_of(words, indices(shape, size, start, sharding, columns=False)[0], dtype)


def _bits_of(words: Array, index: Pair, dtype: Any) -> Array:
    info = jnp.finfo(dtype)
    high, low = threefry2x32((words[0], words[1]), index)
    if info.bits == 64:
        return ((high.astype(jnp.uint64) << np.uint64(32)) | low.astype(jnp.uint64)) >> np.uint64(64 - info.nmant)
    drawn = 8 if info.nmant < 8 else info.bits
    return ((high ^ low) & np.uint32(2**drawn - 1)) >> np.uint32(drawn - info.nmant)
