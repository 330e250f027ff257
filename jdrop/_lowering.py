"""Functions of the target: computed in the form of the platform that a program is lowered for, under all transforms."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import jet
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching
from jax.interpreters import partial_eval as pe

from jdrop._platform import Target, register_lowerings
from jdrop._sharding import repeat_like

Function = Callable[..., Any]  # (target, *operands) -> pytree of arrays

_at_lowering_p = Primitive("jdrop_at_lowering")
_at_lowering_p.multiple_results = True


def at_lowering(f: Function, *operands: Any, types: Any = None) -> Any:
    """Return ``f(target, *operands)`` for the target that the program is lowered for.

    Args:
      f: a function at module level, or a callable frozen dataclass, because functions are compared by value. The shapes
        and dtypes of its results are the same for all targets.
      *operands: pytrees of arrays.
      types: the types of the results, as from ``jax.typeof``. ``None`` traces ``f`` once more to determine them.
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
    """A function of pytrees as a function of arrays."""

    f: Function
    tree: Any

    def __call__(self, target: Target, *leaves: Any) -> Any:
        return self.f(target, *jax.tree.unflatten(self.tree, leaves))


@dataclasses.dataclass(frozen=True)
class _Mapped:
    """A function of arrays under vmap."""

    f: Function
    axes: tuple[int | None, ...]
    out_axes: tuple[int | None, ...]

    def __call__(self, target: Target, *leaves: Any) -> list[Any]:
        def flat(*leaves: Any) -> tuple[Any, ...]:
            return tuple(jax.tree.leaves(self.f(target, *leaves)))

        # A kernel may copy a result that does not depend on mapped operands.
        copied = [
            axis is None and _is_mapped(self.f, target, self.axes, leaves, i) for i, axis in enumerate(self.out_axes)
        ]
        out_axes = tuple(0 if copy else axis for copy, axis in zip(copied, self.out_axes))
        results = jax.vmap(flat, in_axes=self.axes, out_axes=out_axes)(*leaves)
        return [x[0] if copy else x for copy, x in zip(copied, results)]


def _is_mapped(f: Function, target: Target, axes: Sequence[int | None], leaves: Sequence[Any], i: int) -> bool:
    """Return whether a result of a function under vmap has a mapped axis."""

    def result(*leaves: Any) -> Any:
        return jax.tree.leaves(f(target, *leaves))[i]

    try:
        jax.eval_shape(jax.vmap(result, in_axes=tuple(axes), out_axes=None), *leaves)
    except ValueError:  # "vmap has mapped output but out_axes is None"
        return True
    return False


def _map(f: Function, axes: Sequence[int | None], leaves: Sequence[Any], num_results: int) -> _Mapped:
    """Map a function, except for results that do not depend on mapped operands."""
    is_mapped = [_is_mapped(f, Target(), axes, leaves, i) for i in range(num_results)]
    return _Mapped(f, tuple(axes), tuple(0 if mapped else None for mapped in is_mapped))


@functools.partial(jax.jit, static_argnames=("f", "target"))
def _call(*leaves: Any, f: Function, target: Target) -> Any:
    return f(target, *leaves)


def _call_without_dead_code(*leaves: Any, f: Function, target: Target, **params: Any) -> list[Any]:
    """Call a function without the parts of its loops that no result needs, which XLA for CPU would compute."""
    del params
    closed = jax.make_jaxpr(functools.partial(_call, f=f, target=target))(*leaves)
    jaxpr, _ = pe.dce_jaxpr(closed.jaxpr, [True] * len(closed.out_avals), instantiate=True)
    return jaxpr_as_fun(ClosedJaxpr(jaxpr, closed.consts))(*leaves)


def _run_compiled(bind: Callable[..., Any], *leaves: Any, **params: Any) -> Any:
    with jax.disable_jit(False):  # a primitive runs compiled, even if the user disables jit
        return bind(*leaves, **params)


def _bind(f: Function, leaves: Sequence[Any]) -> list[Any]:
    avals = jax.make_jaxpr(functools.partial(_call, f=f, target=Target()))(*leaves).out_avals
    return _at_lowering_p.bind(*leaves, f=f, avals=tuple(avals))


def _batch(leaves: Any, axes: Any, *, f: Function, avals: Any) -> Any:
    mapped = _map(f, axes, leaves, len(avals))
    return _bind(mapped, leaves), list(mapped.out_axes)


def _jvp(primals: Any, tangents: Any, *, f: Function, avals: Any) -> Any:
    """Differentiate the plain form. First derivatives have their own rules, so only second ones use this."""
    moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]
    if not moving:
        return _at_lowering_p.bind(*primals, f=f, avals=avals), [ad.Zero(aval.to_tangent_aval()) for aval in avals]
    plain = functools.partial(_plain, f, primals, moving)
    return jax.jvp(plain, [primals[i] for i in moving], [tangents[i] for i in moving])


def _transpose(cotangents: Any, *leaves: Any, f: Function, avals: Any) -> Any:
    """Transpose the plain form, for ``jax.linear_transpose`` of a function that is linear in some of its operands."""
    del avals
    moving = [i for i, x in enumerate(leaves) if ad.is_undefined_primal(x)]
    plain = functools.partial(_plain, f, leaves, moving)
    transposed = jax.linear_transpose(plain, *(leaves[i].aval for i in moving))
    results = dict(zip(moving, transposed([ad.instantiate_zeros(ct) for ct in cotangents])))
    return [results.get(i) for i in range(len(leaves))]


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
_at_lowering_p.def_impl(functools.partial(_run_compiled, _bind_jit))
_at_lowering_p.def_abstract_eval(lambda *leaves, avals, **params: list(avals))
register_lowerings(_at_lowering_p, _call_without_dead_code, multiple_results=True)
batching.primitive_batchers[_at_lowering_p] = _batch
ad.primitive_jvps[_at_lowering_p] = _jvp
ad.primitive_transposes[_at_lowering_p] = _transpose
jet.jet_rules[_at_lowering_p] = _jet  # type: ignore[assignment]


# ---------------------------------------------------------------------------------- linear functions of the target

_linear_p = Primitive("jdrop_linear_at_lowering")
_linear_p.multiple_results = True


def linear_at_lowering(f: Function, transpose: Function, operands: Any, linear: Any, types: Any) -> Any:
    """Return ``f(target, operands, linear)``, linear in ``linear``, with its own transpose.

    Args:
      f: a function, as for :func:`at_lowering`.
      transpose: ``(target, operands, cotangents)`` to the cotangents of ``linear``.
      operands: pytree of arrays.
      linear: pytree of arrays.
      types: types of the results.
    """
    leaves, linear_leaves = jax.tree.leaves(operands), jax.tree.leaves(linear)
    avals, results_tree = jax.tree.flatten(types)
    results = _linear_p.bind(
        *leaves,
        *linear_leaves,
        f=_Flat(f, jax.tree.structure((operands, linear))),
        transpose=_Flat(transpose, jax.tree.structure((operands, types))),
        avals=tuple(avals),
        count=len(linear_leaves),
    )
    return jax.tree.unflatten(results_tree, results)


def _linear_jvp(primals: Any, tangents: Any, *, f: Function, count: int, **params: Any) -> Any:
    results = _linear_p.bind(*primals, f=f, count=count, **params)
    if all(isinstance(tangent, ad.Zero) for tangent in tangents[:-count]):
        moved = [ad.instantiate_zeros(tangent) for tangent in tangents[-count:]]
        return results, _linear_p.bind(*primals[:-count], *moved, f=f, count=count, **params)
    moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]
    plain = functools.partial(_plain, f, primals, moving)
    return results, jax.jvp(plain, [primals[i] for i in moving], [tangents[i] for i in moving])[1]


def _linear_transpose(cotangents: Any, *leaves: Any, transpose: Function, count: int, **params: Any) -> Any:
    del params
    operands, linear = leaves[:-count], leaves[-count:]
    cotangents = [ad.instantiate_zeros(ct) for ct in cotangents]
    types = tuple(x.aval if ad.is_undefined_primal(x) else jax.typeof(x) for x in linear)
    results = _at_lowering_p.bind(*operands, *cotangents, f=transpose, avals=types)
    return [None] * len(operands) + [ct if ad.is_undefined_primal(x) else None for x, ct in zip(linear, results)]


def _linear_batch(leaves: Any, axes: Any, *, f: Function, transpose: Function, avals: Any, count: int) -> Any:
    mapped = next((x, axis) for x, axis in zip(leaves, axes) if axis is not None)
    moved = list(leaves[:-count])
    for x, axis in zip(leaves[-count:], axes[-count:]):  # JAX sums the cotangents of the copies
        moved.append(repeat_like(x, *mapped) if axis is None else jnp.moveaxis(x, axis, 0))
    axes = tuple(axes[:-count])
    f = _Mapped(f, (*axes, *[0] * count), (0,) * len(avals))
    transpose = _Mapped(transpose, (*axes, *[0] * len(avals)), (0,) * count)
    avals = jax.make_jaxpr(functools.partial(_call, f=f, target=Target()))(*moved).out_avals
    results = _linear_p.bind(*moved, f=f, transpose=transpose, avals=tuple(avals), count=count)
    return results, [0] * len(results)


_bind_linear_jit = jax.jit(_linear_p.bind, static_argnames=("f", "transpose", "avals", "count"))
_linear_p.def_impl(functools.partial(_run_compiled, _bind_linear_jit))
_linear_p.def_abstract_eval(lambda *leaves, avals, **params: list(avals))
register_lowerings(_linear_p, _call_without_dead_code, multiple_results=True)
batching.primitive_batchers[_linear_p] = _linear_batch
ad.primitive_jvps[_linear_p] = _linear_jvp
ad.primitive_transposes[_linear_p] = _linear_transpose
