"""Keep masks as arrays, whole or in part."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from jdrop import _checks, decisions
from jdrop._shards import explicit_sharding
from jdrop.bits import Pair, pair
from jdrop.decisions import Generator, Layout, RateLike

Window = Sequence[tuple[int | Array, int]]


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
    whole = decisions.mask_shape(name, shape, shared_axes)
    _checks.choice(name, "generator", generator, decisions.GENERATORS)
    size, start = (shape, None) if window is None else _window(name, shape, window)
    rate = _checks.rate(name, rate, [1 if d == 1 else n for d, n in zip(whole, size)])
    if key is not None:
        _checks.key(name, key)
    sharding = _out_sharding(name, size, out_sharding)
    if decisions.is_zero(rate):
        return jnp.ones(size, bool, out_sharding=sharding)
    source, words, rate = decisions.operands(name, key, rate, generator, part=start is not None)
    return _dropout_mask(words, rate, start, layout=decisions.layout(name, whole, source), size=size, sharding=sharding)


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
    mask = decisions.keep(layout, words, rate, size, start, sharding=typed)
    mask = jnp.broadcast_to(mask, size, out_sharding=typed)
    return mask if sharding is None else lax.with_sharding_constraint(mask, sharding)
