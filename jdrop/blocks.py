"""Dropout of contiguous blocks of feature maps."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jdrop import _checks, _loops, _member
from jdrop._linear import Draw, Rule
from jdrop._shards import Shard
from jdrop.decisions import Generator, RateLike, with_ones


def drop_block(
    key: Array | None,
    x: Array,
    rate: RateLike,
    block_size: int | Sequence[int],
    *,
    train: bool,
    spatial_axes: int | Sequence[int],
    channel_axis: int = -1,
    batch_axes: int | Sequence[int] = (0,),
    couple_channels: bool = False,
    generator: Generator = "fast",
    shard: Shard = None,
) -> Array:
    """Drop contiguous blocks of feature maps.

    Blocks start where they fit, each with probability ``gamma = rate * prod(n) / (prod(b) * prod(n - b + 1))`` for maps
    of sizes n and blocks of sizes b; ``m`` is 0 inside every block that starts. Then ``y = x * m * size(m) / sum(m)``,
    where the sums run over an example (everything but ``batch_axes``); where all is dropped, y is 0.

    A position is dropped with ``1 - (1 - gamma)**k``, k the number of blocks that can cover it: less at the border, and
    on average a little below ``rate``, because blocks overlap (0.0946 for rate 0.1, block 7 and a 56 x 56 map). The
    rescaling keeps the mean of an example, not the expectation of each position.

    Args:
      key: one PRNG key, used once. ``None`` is fine if ``train`` is false or ``rate`` is the number 0.
      x: floating or complex array ``[batch, *space, channel]``; other layouts by the axis arguments, which name each
        axis once.
      rate: nominal probability of dropping, or an array of it that broadcasts to the block starts ``[batch, n - b + 1,
        ..., channel]``. Rate 1 drops everything.
      block_size: size of the blocks along each spatial axis, or one size for all.
      train: ``True`` draws a mask; ``False`` returns x itself.
      spatial_axes: the 1, 2 or 3 axes of space, in the order of ``block_size``.
      channel_axis: the axis of channels.
      batch_axes: axes of examples; ``()`` for a single one.
      couple_channels: whether all channels of an example share their blocks.
      generator: as for :func:`jdrop.dropout`.
      shard: as for :func:`jdrop.dropout`; it may split batch axes only, because an example is rescaled as a whole.

    Returns:
      An array of the shape and dtype of x.

    Raises:
      ValueError: a rate, an axis, a size or an option is out of range, or a block is larger than the map.
      TypeError: an argument is of the wrong type, ``key`` is missing, or ``train`` is traced.
      NotImplementedError: ``shard`` splits an axis of space or channels.

    References:
      Ghiasi, Lin, Le (2018), DropBlock: A Regularization Method for Convolutional Networks, NeurIPS.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> x = jnp.ones([2, 16, 16, 3])
      >>> y = jdrop.drop_block(jax.random.key(0), x, 0.2, 4, train=True, spatial_axes=(1, 2))
      >>> round(float(y.mean()), 3)
      1.0
    """
    name = "drop_block"
    _checks.array(name, "x", x)
    space = _checks.axes(name, "spatial_axes", spatial_axes, x.ndim)
    channel = _checks.axis(name, "channel_axis", channel_axis, x.ndim)
    if not 1 <= len(space) <= 3:
        rule = "must be 1 to 3 axes"
        raise ValueError(_checks.text(name, "spatial_axes", rule, spatial_axes, "name the axes of space"))
    own = _checks.different_axes(name, x.ndim, spatial_axes=space, channel_axis=channel, batch_axes=batch_axes)
    if len(own) != x.ndim:
        rule = f"must name each of the {x.ndim} axes of x, with spatial_axes and channel_axis"
        raise ValueError(_checks.text(name, "batch_axes", rule, batch_axes, "add the axes that are left"))
    coupled = (channel,) if _checks.flag(name, "couple_channels", couple_channels) else ()
    sizes = tuple(x.shape[axis] for axis in space)
    block = _block(name, block_size, sizes)
    blocks = _Blocks(space, block, (*space, channel), coupled)
    call = _member.check(name, key, x.shape, rate, train=train, decided=blocks.starts, generator=generator, shard=shard)
    if any(call.names[axis] for axis in (*space, channel) if axis < len(call.names)):
        rule = "must split batch axes only"
        raise NotImplementedError(_checks.text(name, "shard", rule, shard, "gather the other axes"))
    if call.idle:
        return x
    share = math.prod(sizes) / (math.prod(block) * math.prod(n - b + 1 for n, b in zip(sizes, block)))
    return call._replace(rate=_gamma(call.rate, share)).apply(Rule(blocks), x)


def drop_block_mask(seeds: Array, block_size: int | Sequence[int]) -> Array:
    """Return the keep mask of blocks that start where ``seeds`` is true.

    Args:
      seeds: bool array ``[n - b + 1, ...]`` with an axis for each of the 1, 2 or 3 dimensions of a map: whether a block
        has its first corner there. Map over examples and channels with ``jax.vmap``.
      block_size: sizes b of the blocks, or one size for all axes.

    Returns:
      bool array ``[n, ...]``, false inside the blocks.

    Raises:
      ValueError: a size is below 1, or ``seeds`` has no or more than 3 axes.
      TypeError: ``seeds`` is no bool array, or a size is no integer.

    References:
      Ghiasi, Lin, Le (2018), DropBlock: A Regularization Method for Convolutional Networks, NeurIPS.

    Example:
      >>> import jax.numpy as jnp, jdrop
      >>> jdrop.drop_block_mask(jnp.array([False, True, False]), 2).tolist()
      [True, False, False, True]
    """
    name = "drop_block_mask"
    if not isinstance(seeds, (Array, np.ndarray)) or seeds.dtype != bool:
        fix = "compare the seeds with a threshold"
        raise TypeError(_checks.text(name, "seeds", "must be a bool array", _checks.describe(seeds), fix))
    if not 1 <= seeds.ndim <= 3:
        raise ValueError(_checks.text(name, "seeds", "must have 1 to 3 axes", seeds.shape, "use jax.vmap over others"))
    return ~_spread(jnp.asarray(seeds), tuple(range(seeds.ndim)), _block(name, block_size, (None,) * seeds.ndim))


def _gamma(rate: np.ndarray | Array, share: float) -> np.ndarray | Array:
    """The probability that a block starts, ``rate * share``; certain at rate 1."""
    if isinstance(rate, np.ndarray):
        return np.where(rate == 1, 1.0, rate.astype(np.float64) * share)
    wide = rate.astype(_loops.real_dtype(rate))
    return jnp.where(wide >= 1, jnp.ones_like(wide), wide * jnp.asarray(share, wide.dtype))


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The rule of drop_block."""

    space: tuple[int, ...]
    block: tuple[int, ...]
    example: tuple[int, ...]
    """The axes of an example: space and channel."""
    coupled: tuple[int, ...]
    """The axes that share blocks."""

    def starts(self, shape: tuple[Any, ...]) -> tuple[Any, ...]:
        """Shape of the block starts of data."""
        sizes = list(with_ones(shape, self.coupled))
        for axis, b in zip(self.space, self.block):
            sizes[axis] -= b - 1
        return tuple(sizes)

    def __call__(self, draw: Draw, x: Array) -> Array:
        dropped = _spread(~draw.kept(self.starts(draw.size)), self.space, self.block)
        kept = ~dropped
        size = math.prod(kept.shape[axis] for axis in self.example)
        real = _loops.real_dtype(x)
        count = jnp.sum(kept, axis=self.example, keepdims=True, dtype=jnp.int32).astype(real)
        scale = size / count  # infinite where all is dropped, and then not used
        nan = jnp.any(jnp.isnan(draw.rate), axis=[a for a in self.example if a < draw.rate.ndim], keepdims=True)
        return draw.multiply(x, jnp.where(nan, jnp.full_like(scale, jnp.nan), scale), where=kept | nan)


def _spread(seeds: Array, axes: Sequence[int], block: Sequence[int]) -> Array:
    """Extend each true element to the block that starts there."""
    for axis, b in zip(axes, block):
        window = [b if k == axis else 1 for k in range(seeds.ndim)]
        padding = [(b - 1, b - 1) if k == axis else (0, 0) for k in range(seeds.ndim)]
        seeds = lax.reduce_window(seeds, False, lax.bitwise_or, window, [1] * seeds.ndim, padding)
    return seeds


def _block(function: str, value: Any, sizes: Sequence[int | None]) -> tuple[int, ...]:
    """Require a block size for each axis of a map."""
    many = value if isinstance(value, Sequence) else (value,) * len(sizes)
    block = tuple(_checks.count(function, "block_size", b) for b in many)
    if len(block) != len(sizes):
        rule = f"must be an int or {len(sizes)} of them"
        raise ValueError(_checks.text(function, "block_size", rule, value, "give one size an axis"))
    if any(n is not None and b > n for b, n in zip(block, sizes)):
        rule = f"must fit into the map of {'x'.join(map(str, sizes))}"
        raise ValueError(_checks.text(function, "block_size", rule, value, "make the block smaller"))
    return block
