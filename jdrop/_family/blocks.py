"""Dropout of contiguous blocks of feature maps."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jdrop._axes import as_axes, as_axis, as_different_axes
from jdrop._checks import as_bool, as_count, check_array
from jdrop._errors import describe
from jdrop._prepare import check_arguments, shared_shape
from jdrop._primitive import MaskedOp, MaskView, masked_op
from jdrop._types import Generator, RateLike, Shard, real_dtype


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

    For maps of size n and blocks of size b, a block starts at each position where it fits with probability
    ``gamma = rate * prod(n) / (prod(b) * prod(n - b + 1))``. The mask ``m`` is 0 inside every block and 1 elsewhere.
    The output is ``y = x * m * size(m) / sum(m)``, with the size and the sum taken per example (over all axes except
    ``batch_axes``). If an example is dropped entirely, its output is 0.

    A position is dropped with probability ``1 - (1 - gamma)**k``, where k is the number of blocks that can cover it.
    This probability is lower at the border, and on average a little below ``rate``, because blocks overlap (0.0946 for
    rate 0.1, block size 7, and a 56 x 56 map). Rescaling preserves the mean of an example, not the expectation of each
    position.

    Args:
      key: one PRNG key, used once; may be ``None`` if ``train`` is false or ``rate`` is a Python or NumPy 0.
      x: floating or complex array ``[batch, *space, channel]``. For other layouts, set the axis arguments, which
        together must name each axis once.
      rate: nominal drop rate, or an array of rates that broadcasts to the block starts ``[batch, n - b + 1, ...,
        channel]``. Rate 1 drops everything.
      block_size: block size along each spatial axis, or one size for all of them.
      train: ``True`` draws a mask; ``False`` returns x itself.
      spatial_axes: the 1, 2, or 3 spatial axes, in the order of ``block_size``.
      channel_axis: the channel axis.
      batch_axes: the batch axes; ``()`` for a single example.
      couple_channels: whether all channels of an example share the same blocks.
      generator: as in :func:`jdrop.dropout`.
      shard: as in :func:`jdrop.dropout`. Only batch axes may be split, because each example is rescaled as a whole.

    Returns:
      An array with the shape and dtype of x.

    Raises:
      ValueError: a rate, an axis, a size, or an option is out of range, or a block is larger than the map.
      TypeError: an argument has the wrong type, ``key`` is missing, or ``train`` is traced.
      NotImplementedError: ``shard`` splits a spatial axis or the channel axis.

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
    check_array(name, "x", x)
    space = as_axes(name, "spatial_axes", spatial_axes, x.ndim)
    channel = as_axis(name, "channel_axis", channel_axis, x.ndim)
    if not 1 <= len(space) <= 3:
        raise ValueError(f"{name}: spatial_axes must be 1 to 3 axes, got {spatial_axes}; name the spatial axes")
    own = as_different_axes(name, x.ndim, spatial_axes=space, channel_axis=channel, batch_axes=batch_axes)
    if len(own) != x.ndim:
        raise ValueError(
            f"{name}: batch_axes must name each of the {x.ndim} axes of x, with spatial_axes and channel_axis, "
            f"got {batch_axes}; add the remaining axes"
        )
    coupled = (channel,) if as_bool(name, "couple_channels", couple_channels) else ()
    sizes = tuple(x.shape[axis] for axis in space)
    block = _block_sizes(name, block_size, sizes)
    blocks = _Blocks(space, block, (*space, channel), coupled)
    arguments = check_arguments(
        name, key, x, rate, train=train, mask_shape=blocks.starts, generator=generator, shard=shard
    )
    if any(arguments.tile_axes[axis] for axis in (*space, channel) if axis < len(arguments.tile_axes)):
        raise NotImplementedError(f"{name}: shard must split batch axes only, got {shard}; gather the other axes")
    if arguments.is_identity:
        return x
    share = math.prod(sizes) / (math.prod(block) * math.prod(n - b + 1 for n, b in zip(sizes, block)))
    arguments = arguments._replace(rate=_gamma(arguments.rate, share))
    return masked_op(MaskedOp(blocks), arguments.draw(), x)


def drop_block_mask(seeds: Array, block_size: int | Sequence[int]) -> Array:
    """Return the keep mask for blocks that start where ``seeds`` is true.

    Args:
      seeds: bool array ``[n - b + 1, ...]`` with one axis for each of the 1, 2, or 3 dimensions of a map. True means
        that a block has its first corner at that position. Use ``jax.vmap`` to map over examples and channels.
      block_size: block size b along each axis, or one size for all axes.

    Returns:
      A bool array ``[n, ...]``, false inside the blocks.

    Raises:
      ValueError: a size is below 1, or ``seeds`` does not have 1 to 3 axes.
      TypeError: ``seeds`` is not a bool array, or a size is not an integer.

    References:
      Ghiasi, Lin, Le (2018), DropBlock: A Regularization Method for Convolutional Networks, NeurIPS.

    Example:
      >>> import jax.numpy as jnp, jdrop
      >>> jdrop.drop_block_mask(jnp.array([False, True, False]), 2).tolist()
      [True, False, False, True]
    """
    name = "drop_block_mask"
    if not isinstance(seeds, (Array, np.ndarray)) or seeds.dtype != bool:
        raise TypeError(
            f"{name}: seeds must be a bool array, got {describe(seeds)}; compare the seeds with a threshold"
        )
    if not 1 <= seeds.ndim <= 3:
        raise ValueError(f"{name}: seeds must have 1 to 3 axes, got {seeds.shape}; use jax.vmap over others")
    return ~_dilate(jnp.asarray(seeds), tuple(range(seeds.ndim)), _block_sizes(name, block_size, (None,) * seeds.ndim))


def _gamma(rate: np.ndarray | Array, share: float) -> np.ndarray | Array:
    """Return the probability that a block starts: ``rate * share``, or 1 at rate 1."""
    if isinstance(rate, np.ndarray):
        return np.where(rate == 1, 1.0, rate.astype(np.float64) * share)
    wide = rate.astype(real_dtype(rate))
    return jnp.where(wide >= 1, jnp.ones_like(wide), wide * jnp.asarray(share, wide.dtype))


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The masked op of ``drop_block``."""

    space: tuple[int, ...]
    block: tuple[int, ...]
    example: tuple[int, ...]
    """The axes of one example: spatial axes and channel axis."""
    coupled: tuple[int, ...]
    """The axes along which blocks are shared."""

    def starts(self, shape: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the shape of the block starts for data of the given shape."""
        sizes = list(shared_shape(self.coupled)(shape))
        for axis, b in zip(self.space, self.block):
            sizes[axis] -= b - 1
        return tuple(sizes)

    def __call__(self, view: MaskView, x: Array) -> Array:
        dropped = _dilate(~view.keep(self.starts(view.shape)), self.space, self.block)
        kept = ~dropped
        size = math.prod(kept.shape[axis] for axis in self.example)
        real = real_dtype(x)
        count = jnp.sum(kept, axis=self.example, keepdims=True, dtype=jnp.int32).astype(real)
        scale = size / count  # infinite, but unused, if the whole example is dropped
        nan = jnp.any(
            jnp.isnan(view.mask.rate), axis=[a for a in self.example if a < view.mask.rate.ndim], keepdims=True
        )
        return view.multiply(x, jnp.where(nan, jnp.full_like(scale, jnp.nan), scale), where=kept | nan)


def _dilate(seeds: Array, axes: Sequence[int], block: Sequence[int]) -> Array:
    """Extend each true element to a block that starts there."""
    for axis, b in zip(axes, block):
        window = [b if k == axis else 1 for k in range(seeds.ndim)]
        padding = [(b - 1, b - 1) if k == axis else (0, 0) for k in range(seeds.ndim)]
        seeds = lax.reduce_window(seeds, False, lax.bitwise_or, window, [1] * seeds.ndim, padding)
    return seeds


def _block_sizes(function: str, value: Any, sizes: Sequence[int | None]) -> tuple[int, ...]:
    """Return one block size per axis of a map, after checking them."""
    many = value if isinstance(value, Sequence) else (value,) * len(sizes)
    block = tuple(as_count(function, "block_size", b) for b in many)
    if len(block) != len(sizes):
        raise ValueError(
            f"{function}: block_size must be an int or {len(sizes)} of them, got {value}; give one size per axis"
        )
    if any(n is not None and b > n for b, n in zip(block, sizes)):
        raise ValueError(
            f"{function}: block_size must fit into the map of {'x'.join(map(str, sizes))}, got {value}; "
            "make the block smaller"
        )
    return block
