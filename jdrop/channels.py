"""Dropout of whole feature maps."""

from collections.abc import Sequence
from typing import Any

from jax import Array

from jdrop import _checks, _member
from jdrop._shards import Shard
from jdrop.decisions import Generator, RateLike


def channel_dropout(
    key: Array | None,
    x: Array,
    rate: RateLike,
    *,
    train: bool,
    channel_axis: int = -1,
    batch_axes: int | Sequence[int] = (0,),
    generator: Generator = "fast",
    shard: Shard = None,
) -> Array:
    """Drop whole feature maps: one decision for each example and channel (SpatialDropout).

    ``y[b, ..., c] = x[b, ..., c] * m[b, c] / (1 - rate)`` with ``m[b, c] ~ Bernoulli(1 - rate)``.

    Args:
      key: one PRNG key, used once. ``None`` is fine if ``train`` is false or ``rate`` is the number 0.
      x: floating or complex array ``[batch, *space, channel]``, with space in 1, 2, 3 or any number of dimensions;
        other layouts by the axis arguments.
      rate: probability of dropping, or an array of it that broadcasts to ``[batch, 1, ..., channel]``, as for
        :func:`jdrop.dropout`.
      train: ``True`` draws a mask; ``False`` returns x itself.
      channel_axis: the axis of channels.
      batch_axes: axes with decisions of their own beside the channels; ``()`` for a single example.
      generator: as for :func:`jdrop.dropout`.
      shard: as for :func:`jdrop.dropout`.

    Returns:
      An array of the shape and dtype of x.

    Raises:
      ValueError: a rate, an axis or an option is out of range, or ``channel_axis`` is one of ``batch_axes``.
      TypeError: an argument is of the wrong type, ``key`` is missing, or ``train`` is traced.

    References:
      Tompson, Goroshin, Jain, LeCun, Bregler (2015), Efficient Object Localization Using Convolutional Networks, CVPR.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> y = jdrop.channel_dropout(jax.random.key(0), jnp.ones([2, 8, 8, 3]), 0.5, train=True)
      >>> bool((y == y[:, :1, :1]).all())
      True
    """
    name = "channel_dropout"
    _checks.array(name, "x", x)
    channel = _checks.axis(name, "channel_axis", channel_axis, x.ndim)
    own = _checks.different_axes(name, x.ndim, batch_axes=batch_axes, channel_axis=channel)
    shared = [axis for axis in range(x.ndim) if axis not in own]
    options: Any = {"shared_axes": shared, "generator": generator, "shard": shard}
    return _member.scaled(name, key, x, rate, train=train, **options)
