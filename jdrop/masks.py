"""Keep masks: thresholds, shared axes, windows, shards, and the two generators.

A mask has a static :class:`Layout` and up to three operands: the words that seed it, a probability, and,
for a part of a larger mask, where that part starts.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from jdrop import _checks, keys
from jdrop.bits import MIN_COLUMNS, WORD, Pair, coordinates, indices, mul64, pair, threefry2x32, word

Generator = Literal["fast", "jax"]
GENERATORS = ("fast", "jax")
_WORDS = float(WORD)
RateLike = float | np.ndarray | Array
Window = Sequence[tuple[int | Array, int]]


class Layout(NamedTuple):
    """What is static about a mask."""

    shape: tuple[Any, ...]
    """Shape of the whole mask; 1 on shared axes."""
    source: Any
    """``"fast"``; ``"indexed"`` for ``jax.random`` bits by index; else a key implementation of ``jax.random``."""


# ---------------------------------------------------------------------------------- arguments


def mask_shape(function: str, shape: Sequence[Any], shared_axes: Any) -> tuple[Any, ...]:
    """Return the shape of the decisions: the array's, with 1 on shared axes."""
    shared = _checks.axes(function, "shared_axes", shared_axes, len(shape))
    return tuple(1 if axis in shared else n for axis, n in enumerate(shape))


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
    function: str, key: Array | None, rate: np.ndarray | Array, generator: Generator, *, part: bool
) -> tuple[Any, Array, Array]:
    """Use the key, and return ``(source, words, probability)``.

    ``part`` tells that bits by index are needed.
    """
    if key is None:
        fix = "pass a key, or train=False, or rate=0."
        raise TypeError(_checks.text(function, "key", "must be a PRNG key when something is dropped", "None", fix))
    if generator == "fast":
        return "fast", keys.seed(keys.consume(key)), probability(rate, generator)
    source = _jax_source(function, key)
    if part and source != "indexed":
        fix = 'use generator="fast", or a threefry2x32 key with jax_threefry_partitionable'
        rule = 'must be "fast" for a part of a mask, unless the bits of the key can be drawn by index'
        raise NotImplementedError(_checks.text(function, "generator", rule, f"'jax' with {key.dtype} key", fix))
    return source, keys.consume(key), probability(rate, generator)


def probability(rate: np.ndarray | Array, generator: Generator) -> Array:
    """What the generator compares with: the float32 drop rate (fast), or 1 - rate in the rate's own dtype (jax)."""
    return jnp.asarray(rate, jnp.float32) if generator == "fast" else jnp.asarray(1 - rate)


def _jax_source(function: str, key: Array) -> Any:
    try:
        impl = jax.random.key_impl(key)  # legacy keys: the default implementation
    except (TypeError, ValueError):
        fix = "wrap it with jax.random.wrap_key_data(key, impl=...)"
        rule = 'must have the words of the default implementation for generator="jax"'
        raise ValueError(_checks.text(function, "key", rule, _checks.describe(key), fix)) from None
    config: Any = jax.config
    return "indexed" if impl == "threefry2x32" and config.jax_threefry_partitionable else impl


# ---------------------------------------------------------------------------------- shards

Shard = PartitionSpec | None


def shard_names(function: str, shape: Sequence[Any], shard: Shard) -> tuple[tuple[str, ...], ...]:
    """Require a partition of an array over manual mesh axes, and return the mesh axes of each of its axes."""
    if shard is None:
        return ()
    if not isinstance(shard, PartitionSpec):
        fix = "pass the in_specs entry of x"
        raise TypeError(_checks.text(function, "shard", "must be a PartitionSpec", _checks.describe(shard), fix))
    names = tuple(s if isinstance(s, tuple) else () if s is None else (s,) for s in shard)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    used = [name for entry in names for name in entry]
    if len(names) > len(shape) or len(set(used)) != len(used):
        rule = f"must name each mesh axis once, over the {len(shape)} axes of x"
        raise ValueError(_checks.text(function, "shard", rule, shard, "pass the in_specs entry of x"))
    if not set(used) <= set(manual):
        rule = f"must name manual mesh axes, here {tuple(manual)}"
        raise ValueError(_checks.text(function, "shard", rule, shard, "use it inside jax.shard_map, over these axes"))
    return names


def check_key_varies(function: str, key: Array | None, shard: Shard) -> None:
    """Inside ``shard_map``, require a key of each device's own, or word on how the array is laid out."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if shard is None and manual and key is not None:
        alike = [name for name in manual if name not in jax.typeof(key).manual_axis_type.varying]
        if alike:
            fix = "pass shard=, the PartitionSpec of x, or shard=PartitionSpec() if every tile shall have the same mask"
            rule = f"must vary over the manual mesh axes {tuple(alike)} when shard is None"
            raise ValueError(_checks.text(function, "key", rule, "the same key on every device", fix))


def tile(shape: Sequence[Any], names: tuple[tuple[str, ...], ...]) -> tuple[tuple[Any, ...], tuple[Array, ...]]:
    """Return the whole array's shape and, as no or one uint32 array [ndim, 2], where this device's tile starts."""
    if not any(names):
        return tuple(shape), ()
    whole, starts = list(shape), []
    for axis, size in enumerate(shape):
        index = jnp.uint32(0)
        for name in names[axis] if axis < len(names) else ():
            index = index * np.uint32(lax.axis_size(name)) + lax.axis_index(name).astype(jnp.uint32)
            whole[axis] *= lax.axis_size(name)
        starts.append(jnp.stack(mul64((np.uint32(0), index), size)))
    return tuple(whole), (jnp.stack(starts),)


# ---------------------------------------------------------------------------------- decisions


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
    return jnp.where(jnp.isnan(rate), jnp.full_like(kept, jnp.nan), kept)


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
    shared = [n == 1 for n in layout.shape]
    size = tuple(1 if one else n for one, n in zip(shared, size))
    if start is not None:
        start = [(np.uint32(0), np.uint32(0)) if one else at for one, at in zip(shared, start)]
    if sharding is not None:
        sharding = sharding.update(spec=PartitionSpec(*(None if one else s for one, s in zip(shared, sharding.spec))))
    if layout.source == "fast":
        # The barrier keeps XLA from merging the masks of the forward and the backward pass, and so storing one.
        seed = lax.optimization_barrier(words)
        row, col = indices(layout.shape, size, start, sharding)
        t, none = _threshold(rate)
        return (word((seed[0], seed[1]), row, col) >= t) & ~none
    if layout.source == "indexed":
        return _indexed_bits(words, layout.shape, size, start, sharding, rate.dtype) < _jax_threshold(rate)
    key = jax.random.wrap_key_data(words, impl=layout.source)
    return jax.random.bernoulli(key, rate, size, out_sharding=sharding) | jnp.isnan(rate)


def _indexed_bits(words: Array, shape: Any, size: Any, start: Any, sharding: Any, dtype: Any) -> Array:
    """Return the integer of ``nmant`` bits that ``jax.random.uniform`` makes a number of ``dtype`` from."""
    info = jnp.finfo(dtype)
    # One barrier around both: an index that does not depend on the key would be hoisted out of a scan, and stored.
    start = start or [(np.uint32(0), np.uint32(0))] * len(shape)
    words, start = lax.optimization_barrier((words, start))
    index = indices(shape, size, start, sharding, columns=False)[0]
    high, low = threefry2x32((words[0], words[1]), index)
    if info.bits == 64:
        return ((high.astype(jnp.uint64) << np.uint64(32)) | low.astype(jnp.uint64)) >> np.uint64(64 - info.nmant)
    drawn = 8 if info.nmant < 8 else info.bits
    return ((high ^ low) & np.uint32(2**drawn - 1)) >> np.uint32(drawn - info.nmant)


# ---------------------------------------------------------------------------------- the public mask


def dropout_mask(
    key: Array | None,
    shape: Sequence[int],
    rate: RateLike,
    *,
    shared_axes: int | Sequence[int] = (),
    generator: Generator = "fast",
    window: Window | None = None,
    out_sharding: NamedSharding | PartitionSpec | None = None,
) -> Array:
    """Draw the mask that :func:`jdrop.dropout` applies with the same key, shape and rate.

    ``mask[i] ~ Bernoulli(1 - rate)``, true where the element is kept.

    Args:
      key: one PRNG key, used once. ``None`` is fine for a concrete rate of 0.
      shape: shape of the array that the mask is for.
      rate: probability of dropping, as in :func:`jdrop.dropout`; NaN keeps. An array broadcasts to the mask's
        shape, 1 on shared axes; with ``window``, to the window's.
      shared_axes: axes along which one decision is shared.
      generator: ``"fast"`` or ``"jax"``, as in :func:`jdrop.dropout`.
      window: one ``(start, size)`` pair an axis: that part of the mask alone, without the cost of the rest. A start
        may be traced; a traced start out of range is not noticed, and gives bits of no element.
      out_sharding: how the mask is laid over a mesh, as in ``jax.random``: each device makes its part alone.

    Returns:
      A bool array of ``shape``, or of the window's sizes.

    Raises:
      ValueError: a rate, an axis, a size or a concrete start is out of range.
      TypeError: an argument is of the wrong type, or ``key`` is missing.
      NotImplementedError: a window with ``generator="jax"`` and a key whose bits do not go by index.

    References:
      Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov (2014), Dropout: A Simple Way to Prevent Neural
      Networks from Overfitting, JMLR.

    Example:
      >>> import jax, jdrop
      >>> whole = jdrop.dropout_mask(jax.random.key(0), (1000, 256), 0.1)
      >>> part = jdrop.dropout_mask(jax.random.key(0), (1000, 256), 0.1, window=((500, 2), (0, 256)))
      >>> bool((part == whole[500:502]).all())
      True
    """
    name = "dropout_mask"
    shape = _checks.sizes(name, "shape", shape)
    decisions = mask_shape(name, shape, shared_axes)
    _checks.choice(name, "generator", generator, GENERATORS)
    size, start = (shape, None) if window is None else _window(name, shape, window)
    rate = _checks.rate(name, rate, [1 if d == 1 else n for d, n in zip(decisions, size)])
    if key is not None:
        _checks.key(name, key)
    sharding = _out_sharding(name, size, out_sharding)
    if is_zero(rate) and key is None:
        return jnp.ones(size, bool, out_sharding=sharding)
    source, words, rate = operands(name, key, rate, generator, part=start is not None)
    return _dropout_mask(words, rate, start, layout=layout(name, decisions, source), size=size, sharding=sharding)


def _window(function: str, shape: tuple[Any, ...], window: Any) -> tuple[tuple[int, ...], tuple[Pair, ...]]:
    """Return the sizes of a window, and where it starts as ``(hi, lo)`` an axis."""
    fix = "pass one (start, size) pair an axis"
    try:
        starts, sizes = [w[0] for w in window], tuple(operator.index(w[1]) for w in window)
        starts = [at if isinstance(at, Array) else operator.index(at) for at in starts]
    except (TypeError, IndexError, KeyError):
        rule = "must hold pairs of a start and a static size"
        raise TypeError(_checks.text(function, "window", rule, _checks.describe(window), fix)) from None
    if len(starts) != len(shape):
        rule = f"must hold {len(shape)} pairs for shape {shape}"
        raise ValueError(_checks.text(function, "window", rule, len(starts), fix))
    for start, n, whole in zip(starts, sizes, shape):
        if isinstance(start, Array):
            if start.ndim or not jnp.issubdtype(start.dtype, jnp.integer):
                rule = "must start at integer scalars"
                raise TypeError(_checks.text(function, "window", rule, _checks.describe(start), fix))
        elif start < 0 or n < 0 or start + n > whole:
            rule = f"must lie inside shape {shape}"
            raise ValueError(_checks.text(function, "window", rule, (start, n), "keep 0 <= start <= start + size"))
    return sizes, tuple(pair(start) for start in starts)


def _out_sharding(function: str, size: tuple[int, ...], sharding: Any) -> NamedSharding | None:
    if sharding is None:
        return None
    if isinstance(sharding, PartitionSpec):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            fix = "set one with jax.set_mesh, or pass a NamedSharding"
            raise ValueError(_checks.text(function, "out_sharding", "needs a mesh in context", sharding, fix))
        sharding = NamedSharding(mesh, sharding)
    if not isinstance(sharding, NamedSharding) or len(sharding.spec) > len(size):
        rule = f"must be a PartitionSpec or NamedSharding of an array with {len(size)} axes"
        raise TypeError(_checks.text(function, "out_sharding", rule, sharding, "name at most one entry an axis"))
    return sharding


@functools.partial(jax.jit, static_argnames=("layout", "size", "sharding"))
def _dropout_mask(words: Array, rate: Array, start: Any, *, layout: Layout, size: Any, sharding: Any) -> Array:
    typed = None
    if sharding is not None:
        parts = [s if isinstance(s, tuple) else (s,) for s in sharding.spec]
        explicit = [s if set(s) <= set(sharding.mesh.explicit_axes) else None for s in parts]
        typed = explicit_sharding(sharding.update(spec=PartitionSpec(*explicit, *[None] * (len(size) - len(parts)))))
    mask = keep(layout, words, rate, size, start, sharding=typed)
    mask = jnp.broadcast_to(mask, size, out_sharding=typed)
    return mask if sharding is None else lax.with_sharding_constraint(mask, sharding)


def explicit_sharding(sharding: NamedSharding) -> NamedSharding | None:
    """The sharding that new arrays must be given, if any: on an explicit mesh it is part of their type."""
    return sharding if sharding.mesh.explicit_axes else None
