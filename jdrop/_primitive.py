"""One primitive for everything random: ``y = op(mask, x)``, whose derivative is linear and recomputes the mask.

A :class:`MaskedOp` is what a member of the family does to its data with the decisions or the noise of a mask. The
backward pass stores only the words of the key and the rate, because the derivative of an op is an op of the same kind:
an elementwise linear map, which is its own transpose. The primitive batches to itself, because a rule in terms of
``where`` would store the mask. There is no derivative with respect to the rate, because decisions have none.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
from jax.sharding import NamedSharding, PartitionSpec

from jdrop._mask import Mask
from jdrop._platform import GENERIC, Platform, Target, register_lowerings
from jdrop._random import normal
from jdrop._random.threefry import U64
from jdrop._sharding import explicit_sharding, repeat_like, vary_together


@dataclasses.dataclass(frozen=True)
class MaskView:
    """A mask as an op sees it: for one example, and for data of one shape, sharding and platform."""

    mask: Mask
    data: Array
    """The first array of the op: the whole, or a tile. Its values do not matter."""
    platform: Platform = GENERIC
    index: Sequence[U64] | None = None
    """The index of the decisions, if it differs from that of the data."""
    transposed: bool = False
    """Whether the data are cotangents."""

    @property
    def shape(self) -> tuple[Any, ...]:
        return self.data.shape

    @property
    def sharding(self) -> NamedSharding | None:
        return explicit_sharding(jax.typeof(self.data).sharding)

    def keep(self, size: tuple[Any, ...] | None = None) -> Array:
        """Return the keep decisions, a bool array with 1 on shared axes; ``size`` replaces the shape of the data."""
        if not self.mask.bits.random_access:
            size = self.shape if size is None else size
            return self._materialize(self.mask.keep(size, sharding=self._sharding_of(size)))
        return self._materialize(self.mask.keep_at(self._index_of(size), platform=self.platform))

    def word(self, size: tuple[Any, ...] | None = None) -> Array:
        """Return the uint32 words behind the decisions, with arguments as for :meth:`keep`."""
        return self.mask.word_at(self._index_of(size), platform=self.platform)

    def normal(self, dtype: Any) -> Array:
        """Return standard normal noise, with 1 on shared axes."""
        return self._materialize(normal.normal(self.word())).astype(dtype)

    def multiply(self, x: Array, factor: Array, *, where: Array) -> Array:
        """Multiply by a real factor in its dtype, rounded once; exactly 0 where ``where`` is false."""
        return self.platform.multiply(x, factor, where=where, words=self.mask.words)

    def select(self, kept: Array, x: Array, y: Array) -> Array:
        """Return ``where(kept, x, y)``."""
        return self.platform.select(kept, x, y, words=self.mask.words)

    def _index_of(self, size: tuple[Any, ...] | None) -> Sequence[U64]:
        if self.index is not None:
            return self.index
        size = self.shape if size is None else size
        index = self.mask.index(size, self._sharding_of(size))
        return self.mask.unshared_index(self.data, index, self.platform) if self.transposed else index

    def _sharding_of(self, size: tuple[Any, ...]) -> NamedSharding | None:
        if self.sharding is None:
            return None
        spec = (s if n == whole else None for s, n, whole in zip(self.sharding.spec, size, self.shape))
        return self.sharding.update(spec=PartitionSpec(*spec))

    def _materialize(self, x: Array) -> Array:
        return self.platform.materialize(x, self.shape)


class MaskedOp(NamedTuple):
    """The operation of a member on its data."""

    value: Callable[..., Array]
    """``(view, *data) -> y``, with the shape and dtype of the data. If the data have one axis, it is elementwise."""
    partials: tuple["MaskedOp", ...] = ()
    """One linear elementwise op per input. Empty if ``value`` itself is linear in its only input."""

    num_inputs: int = 1
    """The number of data arrays."""
    transposed: bool = False
    """Whether the data are cotangents, in a backward pass."""


def masked_op(op: MaskedOp, mask: Mask, *data: Array, index: Sequence[U64] | None = None) -> Array:
    """Apply an op to data of one shape and dtype.

    Args:
      op: the operation.
      mask: the mask of the data: the whole, or a tile.
      *data: one array per input of the op.
      index: the index of the decisions along each axis of the mask, as arrays that broadcast to the data; by default,
        that of the data.
    """
    leaves, tree = jax.tree.flatten((mask, index))
    operands = vary_together(*(x if isinstance(x, Array) else jnp.asarray(x) for x in data), *leaves)
    return _bind_jit(*operands, op=op, tree=tree, batch=())  # inlined under jit; outside, half the time of bind


# ---------------------------------------------------------------------------------- the plain computation


def _impl(*operands: Array, op: MaskedOp, tree: Any, target: Target, under_vmap: bool) -> Array:
    """Apply an op to one example."""
    data, (mask, index) = operands[: op.num_inputs], jax.tree.unflatten(tree, operands[op.num_inputs :])
    shape = data[0].shape
    platform = target.platform
    can_fold = not under_vmap and index is None and _can_fold(mask, data[0])
    fold = platform.fold(shape[0], target.devices) if can_fold else None
    if fold is not None:
        mask, platform = dataclasses.replace(mask, shape=(shape[0] // fold.width, fold.width)), fold.platform
        data = tuple(x.reshape(mask.shape) for x in data)
    return op.value(MaskView(mask, data[0], platform, index, op.transposed), *data).reshape(shape)


def _can_fold(mask: Mask, x: Array) -> bool:
    """Tell whether the data have a single whole axis that may be computed in rows."""
    one_axis = x.ndim == 1 and mask.shape == x.shape and isinstance(x.shape[0], int) and mask.start is None
    scalar_rate = mask.rate.ndim == 0 and mask.bits.random_access
    return one_axis and scalar_rate and explicit_sharding(jax.typeof(x).sharding) is None


@functools.partial(jax.jit, static_argnames=("op", "tree", "batch", "target"))  # traced once for calls of one shape
def _impl_vmapped(*operands: Array, batch: tuple[Any, ...], target: Target, **static: Any) -> Array:
    """Apply an op under one level of vmap per entry of ``batch``, which gives the axes of the operands."""
    f = functools.partial(_impl, **static, target=target, under_vmap=bool(batch))
    for axes in batch:
        f = jax.vmap(f, in_axes=axes, out_axes=axes[0])
    return f(*operands)


# ---------------------------------------------------------------------------------- the primitive

_masked_op_p = Primitive("jdrop_masked_op")
_bind_jit = jax.jit(_masked_op_p.bind, static_argnames=("op", "tree", "batch"), inline=True)


@_masked_op_p.def_impl
def _(*operands: Array, **static: Any) -> Any:
    with jax.disable_jit(False):  # a primitive runs compiled, even if the user disables jit
        return _bind_jit(*operands, **static)


_masked_op_p.def_abstract_eval(lambda x, *operands, **static: x.update(weak_type=False))
register_lowerings(_masked_op_p, _impl_vmapped, multiple_results=False)


def _jvp(primals: Any, tangents: Any, *, op: MaskedOp, batch: tuple[Any, ...], **static: Any) -> Any:
    y, of_mask = _masked_op_p.bind(*primals, op=op, batch=batch, **static), primals[op.num_inputs :]
    terms = [
        _masked_op_p.bind(tangent, *of_mask, op=partial, batch=_batch_of_one(op, batch), **static)
        for partial, tangent in zip(op.partials or (op,), tangents)
        if not isinstance(tangent, ad.Zero)
    ]
    return y, functools.reduce(ad.add_tangents, terms) if terms else ad.Zero(jax.typeof(y).to_tangent_aval())


def _transpose(cotangent: Any, *operands: Any, op: MaskedOp, batch: tuple[Any, ...], **static: Any) -> Any:
    of_mask, static["batch"] = operands[op.num_inputs :], _batch_of_one(op, batch)
    cotangents: list[Any] = [None] * len(operands)
    for i, (x, partial) in enumerate(zip(operands, op.partials or (op,))):
        if ad.is_undefined_primal(x) and isinstance(cotangent, ad.Zero):
            cotangents[i] = cotangent
        elif ad.is_undefined_primal(x):
            partial = partial._replace(transposed=True)
            cotangents[i] = _masked_op_p.bind(cotangent, *of_mask, op=partial, **static)
    return cotangents


def _batch_of_one(op: MaskedOp, batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the axes of an op's partials, which have one input each: all inputs are mapped along the same axis."""
    return tuple((axes[0], *axes[op.num_inputs :]) for axes in batch)


def _batch(operands: Any, dims: Any, *, op: MaskedOp, batch: tuple[Any, ...], **static: Any) -> Any:
    n = op.num_inputs
    mapped = next((a, d) for a, d in zip(operands, dims) if d is not None)
    axis = next((d for d in dims[:n] if d is not None), 0)
    data = []
    for x, d in zip(operands[:n], dims):
        if d is None:  # one x, many masks: the copies are not stored, and JAX sums their gradient
            x, d = repeat_like(x, *mapped), 0
        data.append(jnp.moveaxis(x, d, axis))
    batch = (*batch, (*[axis] * n, *dims[n:]))
    return _masked_op_p.bind(*data, *operands[n:], op=op, batch=batch, **static), axis


def _jet(primals: Any, series: Any, *, op: MaskedOp, batch: tuple[Any, ...], **static: Any) -> Any:
    """Apply the partials to the terms of each order (``jax.experimental.jet``): an op is affine in its inputs."""
    of_mask, terms = primals[op.num_inputs :], []
    for of_order in zip(*series[: op.num_inputs]):
        parts = [
            _masked_op_p.bind(term, *of_mask, op=partial, batch=_batch_of_one(op, batch), **static)
            for partial, term in zip(op.partials or (op,), of_order)
        ]
        terms.append(functools.reduce(jnp.add, parts))
    return _masked_op_p.bind(*primals, op=op, batch=batch, **static), terms


ad.primitive_jvps[_masked_op_p] = _jvp
jet.jet_rules[_masked_op_p] = _jet  # type: ignore[assignment]
ad.primitive_transposes[_masked_op_p] = _transpose
batching.primitive_batchers[_masked_op_p] = _batch
