"""One primitive for all that is random: ``y = f(draw, x)``, whose derivative by x is linear and made again.

A :class:`Rule` says what a member of the family does to its data with a :class:`Draw`, the keep decisions or the
noise. What the backward pass keeps is a seed and a rate, because the rule's derivative is a rule of the same kind: an
elementwise linear map, which is its own transpose. The primitive batches to itself, because a rule in terms of
``where`` would bring the stored mask back. Derivatives with respect to the rate are none: a decision has none.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from jdrop import _loops, decisions
from jdrop._shards import explicit_sharding, repeat_like, vary_together
from jdrop.bits import Pair

_STATIC = ("rule", "layout", "batch")
_SHARING = 16  # how many elements have to share each byte of what is stored, on CPU


class Draw(NamedTuple):
    """What a rule may ask for, for one example: decisions, noise, and their probabilities."""

    layout: decisions.Layout
    words: Array
    rate: Array
    """The drop rate (fast) or 1 - rate (jax), as ``decisions.operands`` returned it; broadcasts to the decisions."""
    size: tuple[Any, ...]
    """Shape of the data: the whole, or a tile of it."""
    places: tuple[Array, ...]
    """Where a tile starts, as for :func:`apply`, or what else a rule was passed to look decisions up by."""
    sharding: NamedSharding | None
    on_cpu: bool = False

    @property
    def start(self) -> list[Pair] | None:
        """Where the tile starts along each axis, ``(hi, lo)``."""
        return [(at[0], at[1]) for at in self.places[0]] if self.places else None

    def kept(self, size: tuple[Any, ...] | None = None) -> Array:
        """Which decisions keep: a bool array with 1 on shared axes; ``size`` if decisions are not as many as data."""
        size = self.size if size is None else size
        kept = decisions.keep(self.layout, self.words, self.rate, size, self.start, sharding=self._spread(size))
        return self.once(kept)

    def word(self, size: tuple[Any, ...] | None = None) -> Array:
        """The uint32 words behind the decisions of ``generator="fast"``; as :meth:`kept`."""
        size = self.size if size is None else size
        return decisions.word_of(self.layout, self.words, size, self.start, sharding=self._spread(size))

    def probability(self, dtype: Any) -> Array:
        """The probability that a decision really keeps with."""
        return decisions.keep_probability(self.layout.source, self.rate, dtype)

    def once(self, drawn: Array) -> Array:
        """Return what was drawn, so that XLA for CPU makes it once for all elements that share it.

        XLA would draw again for each of them, except along the last axis, where LLVM takes it out of the loop.
        """
        static = all(isinstance(n, int) for n in self.size)
        if not (self.on_cpu and static and self.size and drawn.shape[-1] == self.size[-1]):
            return drawn
        few = drawn.size * drawn.dtype.itemsize * _SHARING <= math.prod(self.size)
        return _loops.stored(drawn) if few else drawn

    def _spread(self, size: tuple[Any, ...]) -> NamedSharding | None:
        if self.sharding is None:
            return None
        spec = (s if n == whole else None for s, n, whole in zip(self.sharding.spec, size, self.size))
        return self.sharding.update(spec=PartitionSpec(*spec))

    def multiply(self, x: Array, factor: Array, *, where: Array) -> Array:
        """:func:`jdrop._loops.multiply`, as it is fastest on this platform."""
        return _loops.multiply(x, factor, where=where, words=self.words if self.on_cpu else None)


class Rule(NamedTuple):
    """What a member does to its data."""

    value: Callable[..., Array]
    """``(draw, *data) -> y``, of the shape and dtype of the data; on one axis it works element by element."""
    partials: tuple["Rule", ...] = ()
    """The derivative by each of the data, linear and elementwise. None: ``value`` is so, in its one datum."""


def apply(
    rule: Rule,
    data: Sequence[Array],
    words: Array,
    rate: Array,
    places: tuple[Array, ...],
    layout: decisions.Layout,
) -> Array:
    """Apply a rule to data of one shape and dtype.

    Args:
      rule: what to do.
      data: arrays: the whole, or with ``places`` a tile of it.
      words: what seeds the draw, see :func:`jdrop.decisions.operands`.
      rate: the probability, see there; broadcasts to the decisions.
      places: nothing, or where the tile starts: uint32 [ndim, 2] of ``(hi, lo)``; or arrays of a rule's own.
      layout: what is static about all decisions.
    """
    operands = vary_together(*(jnp.asarray(x) for x in data), words, rate, *places)
    return _draw_p.bind(*operands, rule=rule, layout=layout, batch=())


def draw(
    x: Array, words: Array, rate: Array, places: tuple[Array, ...], layout: decisions.Layout, *, on_cpu: bool = False
) -> Draw:
    """Return the draw for data of the shape and sharding of x."""
    return Draw(layout, words, rate, x.shape, places, explicit_sharding(jax.typeof(x).sharding), on_cpu)


def _one(*operands: Array, rule: Rule, layout: decisions.Layout, on_cpu: bool, alone: bool = False) -> Array:
    """The rule in plain jnp, for one example.

    ``alone``: one CPU runs the whole computation, and under no vmap. Then a long axis may be looped over in rows.
    """
    data, (words, rate, *places) = operands[: _data(rule)], operands[_data(rule) :]
    shape = data[0].shape
    if alone and not places and rate.ndim == 0 and (width := _width(layout, data[0])):
        layout = layout._replace(shape=(shape[0] // width, width), cut=True)
        data = tuple(x.reshape(layout.shape) for x in data)
    return rule.value(draw(data[0], words, rate, tuple(places), layout, on_cpu=on_cpu), *data).reshape(shape)


def _width(layout: decisions.Layout, x: Array) -> int:
    """Return the width of the rows to loop over an array of one axis in, or 0."""
    one_axis = layout.source == "fast" and x.ndim == 1 and layout.shape == x.shape and isinstance(x.shape[0], int)
    return _loops.row_width(x.shape[0]) if one_axis and explicit_sharding(jax.typeof(x).sharding) is None else 0


def _data(rule: Rule) -> int:
    return max(1, len(rule.partials))


def _batched(*operands: Array, batch: tuple[Any, ...], alone: bool, **static: Any) -> Array:
    """The rule under as many levels of vmap as ``batch`` has entries: the axes of the operands in each."""
    f = functools.partial(_one, **static, alone=alone and not batch)
    for axes in batch:
        f = jax.vmap(f, in_axes=axes, out_axes=axes[0])
    return f(*operands)


_plain = jax.jit(_batched, static_argnames=(*_STATIC, "on_cpu", "alone"))  # traced once for all calls of one shape

_draw_p = Primitive("jdrop_draw")
_compiled = jax.jit(_draw_p.bind, static_argnames=_STATIC)


@_draw_p.def_impl
def _(*operands: Array, **static: Any) -> Any:
    with jax.disable_jit(False):  # a primitive runs compiled, also where the user wants no jit
        return _compiled(*operands, **static)


_draw_p.def_abstract_eval(lambda x, *operands, **static: x.update(weak_type=False))


def _lower(context: Any, *operands: Any, on_cpu: bool, **static: Any) -> Any:
    # Of a mesh no device could cut its part of an axis without the others. Inside shard_map there is no number.
    devices = getattr(getattr(context.module_context, "axis_context", None), "num_devices", None)
    alone = on_cpu and devices == 1
    plain = functools.partial(_plain, on_cpu=on_cpu, alone=alone)
    return mlir.lower_fun(plain, multiple_results=False)(context, *operands, **static)


mlir.register_lowering(_draw_p, functools.partial(_lower, on_cpu=False))
mlir.register_lowering(_draw_p, functools.partial(_lower, on_cpu=True), platform="cpu")


def _jvp(primals: Any, tangents: Any, *, rule: Rule, batch: tuple[Any, ...], **static: Any) -> Any:
    y, draw = _draw_p.bind(*primals, rule=rule, batch=batch, **static), primals[_data(rule) :]
    terms = [
        _draw_p.bind(t, *draw, rule=partial, batch=_batch_of_one(rule, batch), **static)
        for partial, t in zip(rule.partials or (rule,), tangents)
        if not isinstance(t, ad.Zero)
    ]
    return y, functools.reduce(ad.add_tangents, terms) if terms else ad.Zero(jax.typeof(y).to_tangent_aval())


def _transpose(cotangent: Any, *operands: Any, rule: Rule, batch: tuple[Any, ...], **static: Any) -> Any:
    draw, static["batch"] = operands[_data(rule) :], _batch_of_one(rule, batch)
    found: list[Any] = [None] * len(operands)
    for i, (x, partial) in enumerate(zip(operands, rule.partials or (rule,))):
        if ad.is_undefined_primal(x):
            zero = isinstance(cotangent, ad.Zero)
            found[i] = cotangent if zero else _draw_p.bind(cotangent, *draw, rule=partial, **static)
    return found


def _batch_of_one(rule: Rule, batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """The axes of a rule's partials, which have one datum each: all data are mapped along the same axis."""
    return tuple((axes[0], *axes[_data(rule) :]) for axes in batch)


def _batch(operands: Any, dims: Any, *, rule: Rule, batch: tuple[Any, ...], **static: Any) -> Any:
    count = _data(rule)
    mapped = next((a, d) for a, d in zip(operands, dims) if d is not None)
    axis = next((d for d in dims[:count] if d is not None), 0)
    data = []
    for x, d in zip(operands[:count], dims):
        if d is None:  # one x, many masks: the copies are not stored, and JAX sums their gradient
            x, d = repeat_like(x, *mapped), 0
        data.append(jnp.moveaxis(x, d, axis))
    y = _draw_p.bind(*data, *operands[count:], rule=rule, batch=(*batch, (*[axis] * count, *dims[count:])), **static)
    return y, axis


ad.primitive_jvps[_draw_p] = _jvp
ad.primitive_transposes[_draw_p] = _transpose
batching.primitive_batchers[_draw_p] = _batch
