"""One place for what exists only because of a compiler, chosen when a program is lowered.

``generic.py`` has each operation in its plain form, and there is one file per platform for forms of its own. GPUs and
TPUs take the plain forms until a measurement says otherwise.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jdrop._platform.cpu import Cpu
from jdrop._platform.generic import GENERIC, BlockSizes, Platform
from jdrop._platform.gpu import Gpu
from jdrop._platform.tpu import Tpu

__all__ = ["GENERIC", "PLATFORMS", "BlockSizes", "Platform", "Target", "at_lowering", "register_lowerings"]

PLATFORMS: dict[str, Platform] = {"cpu": Cpu(), "cuda": Gpu(), "rocm": Gpu(), "tpu": Tpu()}


class Target(NamedTuple):
    """What a program is lowered for."""

    name: str | None = None
    """JAX's name of the platform; ``None`` for one without an entry in ``PLATFORMS``."""
    devices: int = 1
    """How many devices may share each array: inside ``jax.shard_map``, those along axes of the mesh that are auto."""

    @property
    def platform(self) -> Platform:
        """The forms of its operations."""
        return PLATFORMS.get(self.name, GENERIC) if self.name else GENERIC


def register_lowerings(primitive: Primitive, f: Callable[..., Any], *, multiple_results: bool) -> None:
    """Lower a primitive as ``f(*operands, target=target, **params)``, traced for the target."""

    def lower(context: Any, *operands: Any, name: str | None, **params: Any) -> Any:
        traced = functools.partial(f, target=Target(name, _num_devices(context)), **params)
        return mlir.lower_fun(traced, multiple_results=multiple_results)(context, *operands)

    mlir.register_lowering(primitive, functools.partial(lower, name=None))
    for name in PLATFORMS:
        mlir.register_lowering(primitive, functools.partial(lower, name=name), platform=name)


def _num_devices(context: Any) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:
        return math.prod(n for name, n in mesh.shape.items() if name not in mesh.manual_axes)
    return getattr(getattr(context.module_context, "axis_context", None), "num_devices", 1)


# ---------------------------------------------------------------------------------- functions of the target

Function = Callable[..., Any]  # (target, *operands) -> pytree of arrays

_at_lowering_p = Primitive("jdrop_at_lowering")
_at_lowering_p.multiple_results = True


def at_lowering(f: Function, *operands: Any, types: Any = None) -> Any:
    """Return ``f(target, *operands)`` for the target that the program is lowered for.

    Args:
      f: a function at module level, or a callable frozen dataclass: functions are compared by value. Its results have
        the same shapes and dtypes for all targets.
      *operands: pytrees of arrays.
      types: the results' types, as ``jax.typeof`` returns them. ``None`` traces ``f`` once more to find out.
    """
    leaves, tree = jax.tree.flatten(operands)
    flat = _Flat(f, tree)
    if types is None:
        types = jax.eval_shape(functools.partial(_call, f=flat, target=Target()), *leaves)
        results = _bind(flat, leaves)
    else:
        results = _at_lowering_p.bind(*leaves, f=flat, avals=tuple(jax.tree.leaves(types)))
    return jax.tree.unflatten(jax.tree.structure(types), results)


@dataclasses.dataclass(frozen=True)
class _Flat:
    """A function of pytrees as one of arrays."""

    f: Function
    tree: Any

    def __call__(self, target: Target, *leaves: Any) -> Any:
        return self.f(target, *jax.tree.unflatten(self.tree, leaves))


@dataclasses.dataclass(frozen=True)
class _Mapped:
    """A function of arrays under vmap."""

    f: Function
    axes: tuple[int | None, ...]

    def __call__(self, target: Target, *leaves: Any) -> Any:
        return jax.vmap(functools.partial(self.f, target), in_axes=self.axes)(*leaves)


@functools.partial(jax.jit, static_argnames=("f", "target"))
def _call(*leaves: Any, f: Function, target: Target) -> Any:
    return f(target, *leaves)


def _call_flat(*leaves: Any, f: Function, avals: Any, target: Target) -> list[Any]:
    del avals
    return jax.tree.leaves(_call(*leaves, f=f, target=target))


def _bind(f: Function, leaves: Sequence[Any]) -> list[Any]:
    avals = jax.make_jaxpr(functools.partial(_call, f=f, target=Target()))(*leaves).out_avals
    return _at_lowering_p.bind(*leaves, f=f, avals=tuple(avals))


def _batch(leaves: Any, axes: Any, *, f: Function, avals: Any) -> Any:
    del avals
    results = _bind(_Mapped(f, tuple(axes)), leaves)
    return results, [0] * len(results)


def _jvp(primals: Any, tangents: Any, *, f: Function, avals: Any) -> Any:
    """Differentiate the plain form. First derivatives have rules of their own, so only second ones come here."""
    moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]
    if not moving:
        return _at_lowering_p.bind(*primals, f=f, avals=avals), [ad.Zero(aval.to_tangent_aval()) for aval in avals]
    plain = functools.partial(_plain, f, primals, moving)
    return jax.jvp(plain, [primals[i] for i in moving], [tangents[i] for i in moving])


def _jet(primals: Any, series: Any, *, f: Function, avals: Any) -> Any:
    del avals
    moving = [i for i, x in enumerate(primals) if jnp.issubdtype(x.dtype, jnp.inexact)]
    plain = functools.partial(_plain, f, primals, moving)
    return jet.jet(plain, [primals[i] for i in moving], [series[i] for i in moving])


def _plain(f: Function, operands: Sequence[Any], moving: Sequence[int], *values: Any) -> list[Any]:
    """Return the results of the plain form with some of the operands replaced."""
    changed = dict(zip(moving, values))
    return jax.tree.leaves(f(Target(), *(changed.get(i, x) for i, x in enumerate(operands))))


_bind_jit = jax.jit(_at_lowering_p.bind, static_argnames=("f", "avals"))
_at_lowering_p.def_impl(lambda *leaves, **params: _bind_jit(*leaves, **params))
_at_lowering_p.def_abstract_eval(lambda *leaves, avals, **params: list(avals))
register_lowerings(_at_lowering_p, _call_flat, multiple_results=True)
batching.primitive_batchers[_at_lowering_p] = _batch
ad.primitive_jvps[_at_lowering_p] = _jvp
jet.jet_rules[_at_lowering_p] = _jet
