"""A mask as a linear operator: ``y = D(seed, rate) x``, which is its own transpose.

One primitive, linear in x, whose mask is made again wherever it is needed: what the backward pass keeps
is the seed and the rate. It batches to itself, because a rule in terms of ``where`` would bring the
stored mask back. Derivatives with respect to the rate are none: a keep decision has no derivative.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jdrop import decisions
from jdrop._shards import explicit_sharding, vary_together

_STATIC = ("layout", "scaled", "batch")


def apply(
    x: Array, words: Array, rate: Array, offset: tuple[Array, ...], *, layout: decisions.Layout, scaled: bool
) -> Array:
    """Return x where it is kept, divided by the keep probability if ``scaled``, and 0 where it is dropped.

    Args:
      x: floating array: the whole, or with ``offset`` a part of it.
      words: what seeds the mask, see :func:`jdrop.decisions.operands`.
      rate: the probability, see there; broadcasts to the decisions.
      offset: nothing, or where the part starts: uint32 [ndim, 2] of ``(hi, lo)``.
      layout: what is static about the whole mask.
      scaled: whether kept values are divided by the keep probability.
    """
    operands = vary_together(jnp.asarray(x), words, rate, *offset)
    return _linear_p.bind(*operands, layout=layout, scaled=scaled, batch=())


def _masked(
    x: Array, words: Array, rate: Array, *offset: Array, layout: decisions.Layout, scaled: bool, on_cpu: bool
) -> Array:
    """The operator in plain jnp, for one example."""
    probability = decisions.keep_probability(layout.source, rate, real_dtype(x))
    one = jnp.ones_like(probability)
    if scaled:
        scale = one / jnp.where(probability == 0, one, probability)
    else:
        scale = jnp.where(jnp.isnan(probability), probability, one)
    sharding = explicit_sharding(jax.typeof(x).sharding)
    start = [(at[0], at[1]) for at in offset[0]] if offset else None
    kept = decisions.keep(layout, words, rate, x.shape, start, sharding=sharding)
    return multiply(x, scale, where=kept, on_cpu=on_cpu)


def real_dtype(x: Array) -> Any:
    """The dtype that x is scaled in."""
    return jnp.float64 if x.dtype in (jnp.float64, jnp.complex128) else jnp.float32


def multiply(x: Array, scale: Array, *, where: Array, on_cpu: bool = False) -> Array:
    """Multiply by a real factor in float32 (float64 for float64 x), rounded once; exactly 0 elsewhere."""
    if jnp.iscomplexobj(x):
        return jnp.where(where, lax.complex(x.real * scale, x.imag * scale), jnp.zeros((), x.dtype))
    product = jnp.where(where, x.astype(scale.dtype) * scale, jnp.zeros((), scale.dtype))
    return _round_to_bfloat16(product) if on_cpu and x.dtype == jnp.bfloat16 else product.astype(x.dtype)


def _round_to_bfloat16(x: Array) -> Array:
    """Round float32 to nearest even in five integer operations, where XLA's own form on CPU takes eight.

    It leaves out the case of a NaN whose payload lies in the lower half alone, which no product with a bfloat16 has.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    half = np.uint32(16)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> half) & np.uint32(1))) >> half
    return lax.bitcast_convert_type(rounded.astype(jnp.uint16), jnp.bfloat16)


def _batched(*operands: Array, batch: tuple[Any, ...], **static: Any) -> Array:
    """The operator under as many levels of vmap as ``batch`` has entries: the axes of the operands in each."""
    masked = functools.partial(_masked, **static)
    for axes in batch:
        masked = jax.vmap(masked, in_axes=axes, out_axes=axes[0])
    return masked(*operands)


_plain = jax.jit(_batched, static_argnames=(*_STATIC, "on_cpu"))  # traced once for all calls of one shape

_linear_p = Primitive("jdrop_mask")
_compiled = jax.jit(_linear_p.bind, static_argnames=_STATIC)


@_linear_p.def_impl
def _(*operands: Array, **static: Any) -> Any:
    with jax.disable_jit(False):  # a primitive runs compiled, also where the user wants no jit
        return _compiled(*operands, **static)


_linear_p.def_abstract_eval(lambda x, *operands, **static: x.update(weak_type=False))
for _platform in (None, "cpu"):
    _rule = mlir.lower_fun(functools.partial(_plain, on_cpu=_platform == "cpu"), multiple_results=False)
    mlir.register_lowering(_linear_p, _rule, platform=_platform)


def _jvp(primals: Any, tangents: Any, **static: Any) -> Any:
    y, t = _linear_p.bind(*primals, **static), tangents[0]
    return y, t if isinstance(t, ad.Zero) else _linear_p.bind(t, *primals[1:], **static)


def _transpose(cotangent: Any, x: Any, *operands: Any, **static: Any) -> Any:
    del x
    if not isinstance(cotangent, ad.Zero):
        cotangent = _linear_p.bind(cotangent, *operands, **static)
    return cotangent, *[None] * len(operands)


def _batch(operands: Any, dims: Any, *, batch: tuple[Any, ...], **static: Any) -> Any:
    (x, *rest), (x_dim, *dims) = operands, dims
    if x_dim is None:  # one x, many masks: the copies are not stored, and their gradient is summed by JAX
        size = next(a.shape[d] for a, d in zip(rest, dims) if d is not None)
        x, x_dim = jnp.broadcast_to(x, (size, *x.shape)), 0
    return _linear_p.bind(x, *rest, batch=(*batch, (x_dim, *dims)), **static), x_dim


ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batch
