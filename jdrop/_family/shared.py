"""Dropout with shared decisions: per feature map, per unit at all time steps, or per residual branch."""

from collections.abc import Sequence

from jax import Array

from jdrop._axes import all_axes_but, as_axes, as_axis, as_different_axes
from jdrop._checks import check_array
from jdrop._ops import SCALE
from jdrop._prepare import prepare
from jdrop._primitive import masked_op
from jdrop._types import Generator, RateLike, Shard


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
      key: one PRNG key, used once; may be ``None`` if ``train`` is false or ``rate`` is a Python or NumPy 0.
      x: floating or complex array ``[batch, *space, channel]`` with any number of spatial dimensions. For other
        layouts, set the axis arguments.
      rate: drop rate, or an array of rates that broadcasts to ``[batch, 1, ..., channel]``, as in
        :func:`jdrop.dropout`.
      train: ``True`` draws a mask; ``False`` returns x itself.
      channel_axis: the channel axis.
      batch_axes: axes along which decisions are independent, in addition to ``channel_axis``; ``()`` for a single
        example.
      generator: as in :func:`jdrop.dropout`.
      shard: as in :func:`jdrop.dropout`.

    Returns:
      An array with the shape and dtype of x.

    Raises:
      ValueError: a rate, an axis, or an option is out of range, or ``channel_axis`` is one of ``batch_axes``.
      TypeError: an argument has the wrong type, ``key`` is missing, or ``train`` is traced.

    References:
      Tompson, Goroshin, Jain, LeCun, Bregler (2015), Efficient Object Localization Using Convolutional Networks, CVPR.

    Limits:
      Inside a ``jax.vmap`` over examples, x has no batch axis, and the default takes the first axis of the example as
      one: each row then has its own decisions. Pass ``batch_axes=()`` there, and map over one key per example.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> y = jdrop.channel_dropout(jax.random.key(0), jnp.ones([2, 8, 8, 3]), 0.5, train=True)
      >>> bool((y == y[:, :1, :1]).all())
      True
    """
    name = "channel_dropout"
    check_array(name, "x", x)
    channel = as_axis(name, "channel_axis", channel_axis, x.ndim)
    own = as_different_axes(name, x.ndim, batch_axes=batch_axes, channel_axis=channel)
    shared = all_axes_but(own, x.ndim)
    mask = prepare(name, key, x, rate, train=train, shared_axes=shared, generator=generator, shard=shard)
    return x if mask is None else masked_op(SCALE, mask, x)


def locked_dropout(
    key: Array | None,
    x: Array,
    rate: RateLike,
    *,
    train: bool,
    time_axis: int | Sequence[int],
    generator: Generator = "fast",
    shard: Shard = None,
) -> Array:
    """Drop elements with the same mask at all time steps (variational dropout).

    ``y[b, t, f] = x[b, t, f] * m[b, f] / (1 - rate)`` with ``m[b, f] ~ Bernoulli(1 - rate)``. Inside a scan over time,
    apply :func:`jdrop.dropout` with ``jax.random.clone(key)`` at each step instead: every step gets the same mask.

    Args:
      key: one PRNG key, used once; may be ``None`` if ``train`` is false or ``rate`` is a Python or NumPy 0.
      x: floating or complex array with a time axis, such as ``[batch, time, feature]``.
      rate: drop rate, or an array of rates that broadcasts to the mask, with 1 on ``time_axis``, as in
        :func:`jdrop.dropout`.
      train: ``True`` draws a mask; ``False`` returns x itself.
      time_axis: the time axis, or several axes that share decisions.
      generator: as in :func:`jdrop.dropout`.
      shard: as in :func:`jdrop.dropout`.

    Returns:
      An array with the shape and dtype of x.

    Raises:
      ValueError: a rate, an axis, or an option is out of range, or ``key`` is a batch of keys.
      TypeError: an argument has the wrong type, ``key`` is missing, or ``train`` is traced.

    References:
      Gal, Ghahramani (2016), A Theoretically Grounded Application of Dropout in Recurrent Neural Networks, NeurIPS.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> y = jdrop.locked_dropout(jax.random.key(0), jnp.ones([4, 10, 8]), 0.5, train=True, time_axis=1)
      >>> bool((y == y[:, :1]).all())
      True
    """
    name = "locked_dropout"
    check_array(name, "x", x)
    shared = as_axes(name, "time_axis", time_axis, x.ndim)
    mask = prepare(name, key, x, rate, train=train, shared_axes=shared, generator=generator, shard=shard)
    return x if mask is None else masked_op(SCALE, mask, x)


def drop_path(
    key: Array | None,
    x: Array,
    rate: RateLike,
    *,
    train: bool,
    batch_axes: int | Sequence[int] = (0,),
    generator: Generator = "fast",
    shard: Shard = None,
) -> Array:
    """Drop a residual branch for whole examples (stochastic depth without skipping the computation).

    ``y[b, ...] = x[b, ...] * m[b] / (1 - rate)`` with ``m[b] ~ Bernoulli(1 - rate)``. Use it as
    ``x + drop_path(key, branch(x), rate, train=train)``.

    Args:
      key: one PRNG key, used once; may be ``None`` if ``train`` is false or ``rate`` is a Python or NumPy 0.
      x: floating or complex array ``[batch, ...]``, the output of the branch.
      rate: drop rate, or an array of rates that broadcasts to ``[batch, 1, ...]``, as in :func:`jdrop.dropout`.
      train: ``True`` draws a mask; ``False`` returns x itself.
      batch_axes: axes along which decisions are independent; ``()`` for one decision for the whole array.
      generator: as in :func:`jdrop.dropout`.
      shard: as in :func:`jdrop.dropout`.

    Returns:
      An array with the shape and dtype of x.

    Raises:
      ValueError: a rate, an axis, or an option is out of range, or ``key`` is a batch of keys.
      TypeError: an argument has the wrong type, ``key`` is missing, or ``train`` is traced.

    References:
      Huang, Sun, Liu, Sedra, Weinberger (2016), Deep Networks with Stochastic Depth, ECCV. Larsson, Maire,
      Shakhnarovich (2017), FractalNet, ICLR, for decisions per example.

    Limits:
      Inside a ``jax.vmap`` over examples, x has no batch axis, and the default takes the first axis of the example as
      one: each row is then dropped by itself. Pass ``batch_axes=()`` there, and map over one key per example.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> y = jdrop.drop_path(jax.random.key(0), jnp.ones([8, 16]), 0.5, train=True)
      >>> bool((y == y[:, :1]).all())
      True
    """
    name = "drop_path"
    check_array(name, "x", x)
    own = as_axes(name, "batch_axes", batch_axes, x.ndim)
    shared = all_axes_but(own, x.ndim)
    mask = prepare(name, key, x, rate, train=train, shared_axes=shared, generator=generator, shard=shard)
    return x if mask is None else masked_op(SCALE, mask, x)
