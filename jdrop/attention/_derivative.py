"""Attention and its derivatives by a method that stores two numbers per query, on one device or on a mesh.

Reverse mode takes its own backward pass, forward mode and second derivatives differentiate plain JAX.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from jdrop._lowering import at_lowering, linear_at_lowering
from jdrop._platform import Target
from jdrop._sharding import explicit_sharding, tile_axes, vary_together, whole_array
from jdrop._types import real_dtype
from jdrop.attention._spec import AttentionInputs, AttentionSpec, reshard_as_scores

CHECKPOINT_NAME = "jdrop_attention"


class Method(Protocol):
    """How to compute attention: a frozen dataclass, because methods are compared by value."""

    @property
    def differentiable(self) -> "Method":
        """The method in plain JAX, which JAX can differentiate."""

    def forward(
        self,
        target: Target,
        spec: AttentionSpec,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None,
        inputs: AttentionInputs,
    ) -> tuple[Array, ...]:
        """Return the output, the maxima of the logits, and the logarithms of the sums of exponentials.

        All are [B, T, N, ...]. The exponentials are of differences from the maximum. For queries that see no key, these
        numbers are 0 and +inf.
        """

    def backward(self, target: Target, spec: AttentionSpec, residuals: tuple[Any, ...], do: Array) -> tuple[Any, ...]:
        """Return the gradients of query, key, value, and bias.

        The residuals are ``(query, key, value, bias, inputs, peak, log_sum, out)``.
        """


def _for_target(method: Method, target: Target) -> Method:
    """Return the method for a target: without a name, it is only for types and derivatives, which need plain JAX."""
    return method.differentiable if target.name is None else method


@dataclasses.dataclass(frozen=True)
class _Forward:
    """The output and the sums of a method."""

    method: Method
    spec: AttentionSpec

    def __call__(self, target: Target, *operands: Any) -> tuple[Array, ...]:
        return _for_target(self.method, target).forward(target, self.spec, *operands)


@dataclasses.dataclass(frozen=True)
class _Tangent:
    """The tangent of the output, linear in the tangents of query, key, value, and bias (``None`` if there is none)."""

    method: Method
    spec: AttentionSpec

    def __call__(self, target: Target, residuals: tuple[Any, ...], tangents: tuple[Array | None, ...]) -> Array:
        primals, inputs = residuals[:4], residuals[4]
        moving = [i for i, tangent in enumerate(tangents) if tangent is not None]

        def forward(*values: Array) -> Array:
            changed = dict(zip(moving, values))
            query, key, value, bias = (changed.get(i, x) for i, x in enumerate(primals))
            return self.method.differentiable.forward(target, self.spec, query, key, value, bias, inputs)[0]

        return jax.jvp(forward, [primals[i] for i in moving], [tangents[i] for i in moving])[1]


@dataclasses.dataclass(frozen=True)
class _Transpose:
    """The transpose of the tangent: the gradients of the operands that have a tangent."""

    method: Method
    spec: AttentionSpec
    moving: tuple[bool, ...]

    def __call__(self, target: Target, residuals: tuple[Any, ...], do: Array) -> tuple[Array, ...]:
        gradients = _for_target(self.method, target).backward(target, self.spec, residuals, do)
        return tuple(x for x, moves in zip(gradients, self.moving) if moves)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attend(method: Method, spec: AttentionSpec, *operands: Any) -> Array:
    return _attend_with_sums(method, spec, operands)[0]


def _attend_with_sums(method: Method, spec: AttentionSpec, operands: tuple[Any, ...]) -> tuple[Array, ...]:
    out_type = jax.typeof(operands[0])
    row_type = out_type.update(shape=(*out_type.shape[:-1], 1), dtype=jnp.dtype(real_dtype(out_type)))
    return at_lowering(_Forward(method, spec), *operands, types=(out_type, row_type, row_type))


@functools.partial(_attend.defjvp, symbolic_zeros=True)
def _attend_jvp(
    method: Method, spec: AttentionSpec, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    """Define the tangent for forward mode, and its transpose for reverse mode."""
    out, peak, log_sum = (checkpoint_name(x, CHECKPOINT_NAME) for x in _attend_with_sums(method, spec, primals))
    residuals = (*primals, peak, log_sum, out)
    nonzero = tuple(None if isinstance(t, SymbolicZero) else t for t in tangents[:4])
    moving = tuple(t is not None for t in nonzero)
    if not any(moving):
        return out, jnp.zeros_like(out)
    transpose = _Transpose(method, spec, moving)
    return out, linear_at_lowering(_Tangent(method, spec), transpose, residuals, nonzero, jax.typeof(out))


# ---------------------------------------------------------------------------------- one device, or a mesh


@functools.partial(jax.jit, static_argnums=(0, 1))
def attend(
    method: Method,
    spec: AttentionSpec,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    inputs: AttentionInputs,
) -> Array:
    """Return ``dropout(softmax(query @ key.T * scale + bias)) @ value``.

    Args:
      method: how to compute it.
      spec: the static options.
      query: [B, T, N, H]; an explicit mesh shards only batch and heads, in the same way for query, key, and value.
      key: [B, S, K, H].
      value: [B, S, K, H].
      bias: ``None``, or an array with four axes that broadcasts to [B, N, T, S].
      inputs: the inputs without gradients.
    """
    sharding = explicit_sharding(jax.typeof(query).sharding)
    if sharding is None or not any(sharding.spec):
        return _attend_on_device(method, spec, query, key, value, bias, inputs)
    batch, _, heads, _ = sharding.spec

    def on_device(query: Array, key: Array, value: Array, bias: Array | None, inputs: AttentionInputs) -> Array:
        shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        _, start = whole_array(shape, tile_axes("attend", shape, PartitionSpec(batch, heads)))
        return _attend_on_device(method, spec, query, key, value, bias, inputs._replace(start=start))

    bias, inputs = reshard_as_scores((bias, inputs), query)
    specs = (
        *(PartitionSpec(batch, None, heads),) * 3,
        *jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (bias, inputs)),
    )
    return jax.shard_map(on_device, in_specs=specs, out_specs=specs[0])(query, key, value, bias, inputs)


def _attend_on_device(method: Method, spec: AttentionSpec, *operands: Any) -> Array:
    """Attend on one device, on an auto mesh, or on a device's part of a manual one."""
    arrays, tree = jax.tree.flatten(operands)
    return _attend(method, spec, *jax.tree.unflatten(tree, vary_together(*arrays)))
