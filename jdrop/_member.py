"""What every member of the family does first: check its arguments, then decide by mode, then by rate."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop import _checks, _linear, _loops, _shards, decisions
from jdrop._linear import Draw, Rule
from jdrop._shards import Shard
from jdrop.decisions import Generator, Layout, RateLike


class Call(NamedTuple):
    """The checked arguments of a call, for data of one shape."""

    function: str
    key: Array | None
    shape: tuple[Any, ...]
    rate: np.ndarray | Array
    train: bool
    decided: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    """Shape of the data to shape of the decisions."""
    generator: Generator
    shard: Shard
    names: tuple[tuple[str, ...], ...]
    key_argument: str
    """What the function calls its key."""

    @property
    def idle(self) -> bool:
        """Whether nothing random happens: in evaluation, or at a concrete rate of 0."""
        return not self.train or decisions.is_zero(self.rate)

    def operands(self, *, part: bool = False) -> tuple[Array, Array, tuple[Array, ...], Layout]:
        """Use the key, and return ``(words, rate, offset, layout)`` of the draw; ``part``: bits go by index."""
        _shards.check_key_varies(self.function, self.key, self.shard, self.key_argument)
        whole, offset = _shards.tile(self.shape, self.names)
        part = part or bool(offset)
        drawn = (self.function, self.key, self.rate, self.generator)
        source, words, rate = decisions.operands(*drawn, part=part, argument=self.key_argument)
        return words, rate, offset, decisions.layout(self.function, self.decided(whole), source)

    def apply(self, rule: Rule, *data: Array) -> Array:
        """Draw, and do to the data what a rule says."""
        return _linear.apply(rule, data, *self.operands())


def check(
    function: str,
    key: Array | None,
    shape: tuple[Any, ...],
    rate: RateLike,
    *,
    train: bool,
    shared_axes: Any = (),
    decided: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None,
    generator: Generator = "fast",
    shard: Shard = None,
    limit: tuple[str, float] = ("rate", 1.0),
    key_argument: str = "key",
) -> Call:
    """Check the arguments that members share.

    The shape of the decisions is that of the data with 1 on shared axes, unless ``decided`` says what it is.
    ``limit`` names the argument in the place of the rate, and its largest value; ``key_argument`` names the key's.
    """
    train = _checks.flag(function, "train", train)
    _checks.choice(function, "generator", generator, decisions.GENERATORS)
    if decided is None:
        shared = _checks.axes(function, "shared_axes", shared_axes, len(shape))
        decided = functools.partial(decisions.with_ones, axes=shared)
    rate = _checks.rate(function, rate, decided(shape), *limit)
    names = _shards.names_of(function, shape, shard)
    if key is not None:
        _checks.key(function, key, key_argument)
    return Call(function, key, shape, rate, train, decided, generator, shard, names, key_argument)


# ---------------------------------------------------------------------------------- multiplying by a mask


def scale(draw: Draw, x: Array, kept: Array) -> Array:
    """Divide by the keep probability where x is kept, 0 elsewhere."""
    return draw.multiply(x, 1 / draw.probability(_loops.real_dtype(x)), where=kept)  # 1 / 0 where nothing is kept


def _scale(draw: Draw, x: Array) -> Array:
    return scale(draw, x, draw.kept())


def _select(draw: Draw, x: Array) -> Array:
    return draw.multiply(x, _one_or_nan(draw, x), where=draw.kept())


def _select_dropped(draw: Draw, x: Array) -> Array:
    factor = _one_or_nan(draw, x)
    return draw.multiply(x, factor, where=~draw.kept() | jnp.isnan(factor))


def _one_or_nan(draw: Draw, x: Array) -> Array:
    """The factor of values that are not scaled: 1, or NaN where the rate is."""
    keep = draw.probability(_loops.real_dtype(x))
    return jnp.where(jnp.isnan(keep), keep, jnp.ones_like(keep))


SCALED = Rule(_scale)  # kept values over the keep probability, 0 where dropped
KEPT = Rule(_select)  # kept values as they are, 0 where dropped
DROPPED = Rule(_select_dropped)  # dropped values as they are, 0 where kept


def scaled(function: str, key: Array | None, x: Array, rate: RateLike, *, train: bool, **options: Any) -> Array:
    """Multiply by a mask over the keep probability: the members that differ in the axes that share decisions."""
    call = check(function, key, x.shape, rate, train=train, **options)
    return x if call.idle else call.apply(SCALED, x)
