"""Keep masks as arrays, whole or in part."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from jdrop import _checks, decisions
from jdrop._shards import mesh_axes
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
        return _laid(jnp.ones([1] * len(size), bool), size=size, sharding=sharding)
    source, words, rate = decisions.operands(name, key, rate, generator, part=start is not None)
    return _dropout_mask(words, rate, start, layout=decisions.layout(name, whole, source), size=size, sharding=sharding)


def _window(function: str, shape: tuple[Any, ...], window: Any) -> tuple[tuple[int, ...], tuple[Pair, ...]]:
    """Return the sizes of a window, and where it starts as ``(hi, lo)`` an axis."""
    fix = "pass one (start, size) pair an axis"
    try:
        pairs = [(at if isinstance(at, Array) else _checks.index(at), _checks.index(n)) for at, n in window]
    except (TypeError, ValueError):
        rule = "must hold pairs of a start and a static size"
        raise TypeError(_checks.text(function, "window", rule, _checks.describe(window), fix)) from None
    if len(pairs) != len(shape):
        rule = f"must hold {len(shape)} pairs for shape {shape}"
        raise ValueError(_checks.text(function, "window", rule, len(pairs), fix))
    for (start, n), whole in zip(pairs, shape):
        if isinstance(start, Array) and (start.ndim or not _checks.is_integers(start)):
            rule = "must start at integer scalars"
            raise TypeError(_checks.text(function, "window", rule, _checks.describe(start), fix))
        first = 0 if isinstance(start, Array) else start
        if first < 0 or n < 0 or (isinstance(whole, int) and first + n > whole):  # a symbolic size is not known yet
            rule, got = f"must lie inside shape {shape}", f"({_checks.describe(start)}, {n})"
            raise ValueError(_checks.text(function, "window", rule, got, "keep 0 <= start <= start + size"))
    return tuple(n for _, n in pairs), tuple(pair(start) for start, _ in pairs)


def _out_sharding(function: str, size: tuple[int, ...], sharding: Any) -> tuple[NamedSharding | None, ...]:
    """Return how a mask is laid over the explicit axes of a mesh, by its type, and over the auto ones."""
    if sharding is None:
        return None, None
    if not isinstance(sharding, (PartitionSpec, NamedSharding)):
        rule, fix = "must be a PartitionSpec or NamedSharding", "pass the PartitionSpec of the mask"
        raise TypeError(_checks.text(function, "out_sharding", rule, _checks.describe(sharding), fix))
    spec, mesh = (sharding, None) if isinstance(sharding, PartitionSpec) else (sharding.spec, sharding.mesh)
    if mesh is None or mesh.explicit_axes:
        in_context = jax.sharding.get_abstract_mesh()
        if in_context.empty:
            rule, fix = "needs a mesh in context", "enter it with jax.set_mesh"
            raise ValueError(_checks.text(function, "out_sharding", rule, spec, fix))
        mesh = in_context if mesh is None else mesh
    parts, known = mesh_axes(spec), (*mesh.explicit_axes, *mesh.auto_axes)
    names = [name for part in parts for name in part]
    if len(spec) > len(size) or len(set(names)) < len(names) or not set(names) <= set(known):
        rule = f"must name explicit or auto axes of the mesh, {known}, each once, for up to {len(size)} axes"
        raise ValueError(_checks.text(function, "out_sharding", rule, spec, "give one entry an axis of the mask"))
    whole = NamedSharding(mesh, spec) if isinstance(sharding, PartitionSpec) else sharding

    def over(axes: Sequence[str]) -> NamedSharding | None:
        own = [tuple(name for name in part if name in axes) or None for part in parts]
        return whole.update(spec=PartitionSpec(*own, *[None] * (len(size) - len(own)))) if axes else None

    return over(mesh.explicit_axes), over(mesh.auto_axes)


@functools.partial(jax.jit, static_argnames=("layout", "size", "sharding"))
def _dropout_mask(words: Array, rate: Array, start: Any, *, layout: Layout, size: Any, sharding: Any) -> Array:
    mask = decisions.keep(layout, words, rate, size, start, sharding=sharding[0])
    return _laid(mask, size=size, sharding=sharding)


@functools.partial(jax.jit, static_argnames=("size", "sharding"))
def _laid(mask: Array, *, size: Any, sharding: Any) -> Array:
    """Broadcast decisions to a mask."""
    explicit, auto = sharding
    mask = jnp.broadcast_to(mask, size, out_sharding=explicit)
    return mask if auto is None else lax.with_sharding_constraint(mask, auto)
