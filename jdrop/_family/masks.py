"""Keep masks as arrays: the whole mask, or a window of it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from jdrop._axes import as_axes, as_index, as_shape
from jdrop._checks import as_rate, check_choice, check_key, is_integer_array, is_zero
from jdrop._errors import describe
from jdrop._lowering import at_lowering
from jdrop._mask import Mask, draw_mask
from jdrop._platform import Target
from jdrop._prepare import require_key, shared_shape
from jdrop._random.threefry import U64
from jdrop._sharding import mesh_axes
from jdrop._types import GENERATORS, Generator, RateLike, Window


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
    """Return the mask that :func:`jdrop.dropout` applies with the same key, shape, and rate.

    ``mask[i] ~ Bernoulli(1 - rate)``, true where an element is kept.

    Args:
      key: one PRNG key, used once; may be ``None`` if ``rate`` is a Python or NumPy 0.
      shape: shape of the array to mask.
      rate: drop rate, as in :func:`jdrop.dropout`, except that NaN keeps the element. An array of rates broadcasts to
        the shape of the mask (or to that of the window), with 1 on shared axes.
      shared_axes: axes along which elements share one decision.
      generator: as in :func:`jdrop.dropout`.
      window: one ``(start, size)`` pair per axis. Only this part of the mask is computed, at the cost of this part. A
        start may be traced. A traced start is not checked: out of range, it gives bits that belong to no element.
      out_sharding: sharding of the mask over a mesh, as in ``jax.random``. Each device computes only its own shard.

    Returns:
      A bool array with shape ``shape``, or with the sizes of the window.

    Raises:
      ValueError: a rate, an axis, a size, or a concrete start is out of range.
      TypeError: an argument has the wrong type, or ``key`` is missing.
      NotImplementedError: a window with ``generator="jax"`` and a key whose bits lack random access.

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
    shape = as_shape(name, "shape", shape)
    mask_shape = shared_shape(as_axes(name, "shared_axes", shared_axes, len(shape)))(shape)
    check_choice(name, "generator", generator, GENERATORS)
    size, start = (shape, None) if window is None else _as_window(name, shape, window)
    rate = as_rate(name, rate, [1 if d == 1 else n for d, n in zip(mask_shape, size)])
    if key is not None:
        check_key(name, key)
    sharding = _out_sharding(name, size, out_sharding)
    if is_zero(rate):
        return _lay_out(jnp.ones([1] * len(size), bool), size=size, sharding=sharding)
    mask = draw_mask(name, require_key(name, key), rate, mask_shape, generator, start=start)
    return _keep(mask, size=size, sharding=sharding)


def _as_window(function: str, shape: tuple[Any, ...], window: Any) -> tuple[tuple[int, ...], Array]:
    """Return the sizes of a window, and its start as uint32 [ndim, 2] with rows ``(hi, lo)``."""
    fix = "pass one (start, size) pair per axis"
    try:
        pairs = [(at if isinstance(at, Array) else as_index(at), as_index(n)) for at, n in window]
    except (TypeError, ValueError):
        raise TypeError(
            f"{function}: window must hold pairs of a start and a static size, got {describe(window)}; {fix}"
        ) from None
    if len(pairs) != len(shape):
        raise ValueError(f"{function}: window must hold {len(shape)} pairs for shape {shape}, got {len(pairs)}; {fix}")
    for (start, n), whole in zip(pairs, shape):
        if isinstance(start, Array) and (start.ndim or not is_integer_array(start)):
            raise TypeError(f"{function}: window must start at integer scalars, got {describe(start)}; {fix}")
        first = 0 if isinstance(start, Array) else start
        if first < 0 or n < 0 or (isinstance(whole, int) and first + n > whole):  # symbolic sizes are unknown here
            raise ValueError(
                f"{function}: window must lie inside shape {shape}, got ({describe(start)}, {n}); "
                "keep 0 <= start <= start + size"
            )
    starts = [jnp.stack(U64.of(start)) for start, _ in pairs]
    return tuple(n for _, n in pairs), jnp.stack(starts) if starts else jnp.zeros((0, 2), jnp.uint32)


def _out_sharding(function: str, size: tuple[int, ...], sharding: Any) -> tuple[NamedSharding | None, ...]:
    """Return the sharding of a mask over the explicit axes of a mesh, and its sharding over the auto axes."""
    if sharding is None:
        return None, None
    if not isinstance(sharding, (PartitionSpec, NamedSharding)):
        raise TypeError(
            f"{function}: out_sharding must be a PartitionSpec or NamedSharding, got {describe(sharding)}; "
            "pass the PartitionSpec of the mask"
        )
    spec, mesh = (sharding, None) if isinstance(sharding, PartitionSpec) else (sharding.spec, sharding.mesh)
    if mesh is None or mesh.explicit_axes:
        in_context = jax.sharding.get_abstract_mesh()
        if in_context.empty:
            raise ValueError(
                f"{function}: out_sharding needs a mesh in context, got {spec}; enter it with jax.set_mesh"
            )
        mesh = in_context if mesh is None else mesh
    parts, known = mesh_axes(spec), (*mesh.explicit_axes, *mesh.auto_axes)
    names = [name for part in parts for name in part]
    if len(spec) > len(size) or len(set(names)) < len(names) or not set(names) <= set(known):
        raise ValueError(
            f"{function}: out_sharding must name explicit or auto axes of the mesh, {known}, each once, for up to "
            f"{len(size)} axes, "
            f"got {spec}; give one entry per axis of the mask"
        )
    whole = NamedSharding(mesh, spec) if isinstance(sharding, PartitionSpec) else sharding

    def over(axes: Sequence[str]) -> NamedSharding | None:
        own = [tuple(name for name in part if name in axes) or None for part in parts]
        return whole.update(spec=PartitionSpec(*own, *[None] * (len(size) - len(own)))) if axes else None

    return over(mesh.explicit_axes), over(mesh.auto_axes)


@functools.partial(jax.jit, static_argnames=("size", "sharding"))
def _keep(mask: Mask, *, size: tuple[int, ...], sharding: tuple[NamedSharding | None, ...]) -> Array:
    return _lay_out(at_lowering(_Keep(size, sharding[0]), mask), size=size, sharding=sharding)


@dataclasses.dataclass(frozen=True)
class _Keep:
    """The function that computes the decisions of a window."""

    size: tuple[int, ...]
    sharding: NamedSharding | None

    def __call__(self, target: Target, mask: Mask) -> Array:
        return mask.keep(self.size, platform=target.platform, sharding=self.sharding)


@functools.partial(jax.jit, static_argnames=("size", "sharding"))
def _lay_out(keep: Array, *, size: tuple[int, ...], sharding: tuple[NamedSharding | None, ...]) -> Array:
    """Broadcast decisions to a mask, sharded over the explicit and auto axes of a mesh."""
    explicit, auto = sharding
    mask = jnp.broadcast_to(keep, size, out_sharding=explicit)
    return mask if auto is None else lax.with_sharding_constraint(mask, auto)
