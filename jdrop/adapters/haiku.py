"""Dropout for Haiku: ``from jdrop.adapters.haiku import dropout`` replaces ``haiku.dropout``."""

from collections.abc import Callable, Sequence

from jax import Array

from jdrop._types import Generator, RateLike, Shard
from jdrop.adapters import _depth, _layer

try:
    import haiku
except ImportError as error:
    raise _layer.missing("jdrop.adapters.haiku", "haiku", "dm-haiku", error) from error


NAMES = _layer.Names(
    data="x",
    rate="rate",
    key="rng",
    make_key="pass haiku.next_rng_key(), and an rng to apply",
    map_keys="use jax.vmap over keys",
    cast="pass rng, rate, then a float array",
)


def dropout(
    rng: Array | None,
    rate: RateLike,
    x: Array,
    broadcast_dims: Sequence[int] = (),
    *,
    generator: Generator = "fast",
    shard: Shard = None,
) -> Array:
    """Drop elements with probability ``rate`` and rescale the rest, like ``haiku.dropout``, without storing the mask.

    ``y = x * m / (1 - rate)`` with ``m ~ Bernoulli(1 - rate)``, following the rules of :func:`jdrop.dropout`. As in
    Haiku, there is no mode: call it only in training.

    Args:
      rng: one PRNG key, such as ``haiku.next_rng_key()``; may be ``None`` if ``rate`` is a Python or NumPy 0 or 1.
      rate: drop rate, as in :func:`jdrop.dropout`; it may be traced. Rate 1 gives zeros.
      x: floating-point array.
      broadcast_dims: axes along which elements share one decision.
      generator: as in :func:`jdrop.dropout`. ``"jax"`` gives the masks of ``haiku.dropout``, bit for bit.
      shard: inside ``jax.shard_map``: the PartitionSpec of the data, as in :func:`jdrop.dropout`. Under ``jax.pmap``,
        or with ``check_vma=False``, ``None`` takes the key as it is, so bind a different key to each device.

    Returns:
      An array with the shape and dtype of x.

    Raises:
      ValueError: a rate, an axis, or ``generator`` is out of range, or ``rng`` is a batch of keys.
      TypeError: x is not a floating-point array, or ``rng`` is not a key.

    References:
      Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov (2014), Dropout: A Simple Way to Prevent Neural
      Networks from Overfitting, JMLR.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jdrop.adapters.haiku import dropout
      >>> sorted(set(dropout(jax.random.key(0), 0.5, jnp.ones([2, 4])).ravel().tolist()))
      [0.0, 2.0]
    """
    return _layer.drop(
        "dropout",
        lambda: rng,
        x,
        rate,
        train=True,
        generator=generator,
        shard=shard,
        names=NAMES,
        broadcast_dims=broadcast_dims,
    )


def drop_path(
    rng: Array | None,
    rate: RateLike,
    x: Array,
    batch_axes: int | Sequence[int] = (0,),
    *,
    generator: Generator = "fast",
    shard: Shard = None,
) -> Array:
    """Drop a residual branch for whole examples.

    ``y[b, ...] = x[b, ...] * m[b] / (1 - rate)`` with ``m[b] ~ Bernoulli(1 - rate)``, following the rules of
    :func:`jdrop.drop_path`. Use it as ``x + drop_path(haiku.next_rng_key(), rate, branch(x))``.

    Args:
      rng: one PRNG key, as in :func:`dropout`.
      rate: drop rate of the branch; it may be traced.
      x: floating-point array, the output of the branch.
      batch_axes: axes along which decisions are independent.
      generator: as in :func:`jdrop.drop_path`.
      shard: inside ``jax.shard_map``: the PartitionSpec of the data, as in :func:`jdrop.dropout`. Under ``jax.pmap``,
        or with ``check_vma=False``, ``None`` takes the key as it is, so bind a different key to each device.

    Returns:
      An array with the shape and dtype of x.

    Raises:
      ValueError, TypeError: as in :func:`dropout`.

    References:
      Huang, Sun, Liu, Sedra, Weinberger (2016), Deep Networks with Stochastic Depth, ECCV.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jdrop.adapters.haiku import drop_path
      >>> y = drop_path(jax.random.key(0), 0.5, jnp.ones([8, 16]))
      >>> bool((y == y[:, :1]).all())
      True
    """
    return _layer.drop(
        "drop_path",
        lambda: rng,
        x,
        rate,
        train=True,
        generator=generator,
        shard=shard,
        names=NAMES,
        batch_axes=batch_axes,
    )


def stochastic_depth(
    rng: Array | None,
    rate: RateLike,
    x: Array,
    branch: Callable[[Array], Array],
    *,
    generator: Generator = "fast",
    shard: Shard = None,
) -> Array:
    """Add a residual branch, or skip its computation, with one decision for the whole array.

    ``y = x + branch(x) * m / (1 - rate)`` with ``m ~ Bernoulli(1 - rate)``, with the rules and the bits of
    :func:`jdrop.stochastic_depth`. The branch may have state: it runs in ``haiku.cond``, so it updates its batch
    statistics only when it is kept. ``init`` always runs it. As in Haiku, there is no mode: in evaluation, write
    ``x + branch(x)``.

    Args:
      rng: one PRNG key, as in :func:`dropout`. The branch takes its own by ``haiku.next_rng_key()``.
      rate: scalar drop rate of the branch; it may be traced. Rate 1 gives x.
      x: floating-point array of any shape.
      branch: module or function, ``x -> array with the shape and dtype of x``.
      generator: as in :func:`jdrop.stochastic_depth`.
      shard: inside ``jax.shard_map``: as in :func:`jdrop.dropout`. All tiles share one decision. Under ``jax.pmap``, or
        with ``check_vma=False``, ``None`` takes the key as it is.

    Returns:
      An array with the shape and dtype of x.

    Raises:
      ValueError: as in :func:`dropout`, or ``branch`` does not return an array with the shape and dtype of x, or the
        call is not inside ``haiku.transform``.
      TypeError: as in :func:`dropout`.

    References:
      Huang, Sun, Liu, Sedra, Weinberger (2016), Deep Networks with Stochastic Depth, ECCV.

    Limits:
      Under ``jax.vmap`` over keys or rates, the conditional becomes a select, so both sides are computed. Without
      ``jit``, ``haiku.cond`` compiles the branch at every call. Inside ``jax.shard_map``, a branch with collectives
      needs ``shard``, or devices that decide differently wait for each other forever.

    Example:
      >>> import haiku, jax, jax.numpy as jnp
      >>> from jdrop.adapters.haiku import stochastic_depth
      >>> branch = lambda x: haiku.BatchNorm(True, True, 0.9)(x, is_training=True)
      >>> f = haiku.transform_with_state(lambda x: stochastic_depth(haiku.next_rng_key(), 0.5, x, branch))
      >>> params, state = f.init(jax.random.key(0), jnp.ones([8, 4]))
      >>> y, state = f.apply(params, state, jax.random.key(1), jnp.ones([8, 4]))
      >>> y.shape
      (8, 4)
    """
    x, decision = _depth.decide_layer(
        "stochastic_depth",
        lambda: rng,
        x,
        rate,
        branch,
        train=True,
        generator=generator,
        shard=shard,
        names=NAMES,
        initializes=haiku.running_init(),
    )

    def add(x: Array) -> Array:
        return decision.add(x, branch(x))

    if isinstance(decision.kept, bool):
        return add(x) if decision.kept else x
    # In eager mode too: with haiku.config(rng_reserve_size=...), haiku.cond changes which keys come after it.
    return haiku.cond(decision.kept, add, lambda x: x, x)
