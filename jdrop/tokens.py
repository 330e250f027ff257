"""Dropout of tokens: replaced by another id, or left out of the sequence."""

import functools
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec

from jdrop import _checks, _linear, _loops, _member, decisions
from jdrop._shards import Shard, explicit_sharding
from jdrop.decisions import Generator, RateLike


def token_dropout(
    key: Array | None,
    ids: Array,
    rate: RateLike,
    replacement: int | Array,
    *,
    train: bool,
    protect: Array | None = None,
    generator: Generator = "fast",
    shard: Shard = None,
) -> Array:
    """Replace tokens at random (word dropout).

    ``y[b, t] = ids[b, t] if m[b, t] or protect[b, t] else replacement`` with ``m[b, t] ~ Bernoulli(1 - rate)``. Nothing
    is scaled.

    Args:
      key: one PRNG key, used once. ``None`` is fine if ``train`` is false or ``rate`` is the number 0.
      ids: integer array of any shape, such as ``[batch, time]``.
      rate: probability of replacing, or an array of it that broadcasts to ``ids``, as for :func:`jdrop.dropout`; a NaN
        in an array of JAX replaces nothing, because integers hold no NaN.
      replacement: the id that takes the place, such as that of UNK or MASK; an int, or an integer array that
        broadcasts to ``ids``.
      train: ``True`` draws a mask; ``False`` returns ``ids`` itself.
      protect: bool array that broadcasts to ``ids``: true where a token is never replaced, such as padding or CLS.
      generator: as for :func:`jdrop.dropout`.
      shard: as for :func:`jdrop.dropout`, of ``ids``.

    Returns:
      An integer array of the shape and dtype of ``ids``.

    Raises:
      ValueError: a rate, a shape or an option is out of range, or ``replacement`` does not fit the dtype of ``ids``.
      TypeError: an argument is of the wrong type, ``key`` is missing, or ``train`` is traced.

    References:
      Bowman, Vilnis, Vinyals, Dai, Jozefowicz, Bengio (2016), Generating Sentences from a Continuous Space, CoNLL;
      Iyyer, Manjunatha, Boyd-Graber, Daume (2015), Deep Unordered Composition Rivals Syntactic Methods, ACL.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> ids = jnp.array([[1, 5, 9, 0]])
      >>> y = jdrop.token_dropout(jax.random.key(0), ids, 1.0, 3, train=True, protect=ids < 2)
      >>> y.tolist()
      [[1, 3, 3, 0]]
    """
    name = "token_dropout"
    _checks.integers(name, "ids", ids)
    call = _member.check(name, key, ids.shape, rate, train=train, generator=generator, shard=shard)
    new = _fitting(name, replacement, jnp.asarray(ids))
    if protect is not None:
        _checks.broadcasts(name, "protect", protect, ids.shape)
        if protect.dtype != bool:
            fix = "compare ids with what to protect"
            raise TypeError(_checks.text(name, "protect", "must be a bool array", _checks.describe(protect), fix))
    if call.idle:
        return ids
    *draw, layout = call.operands()
    return _replace(jnp.asarray(ids), new, protect, draw, layout=layout)


def _fitting(function: str, given: Any, ids: Array) -> Array:
    """Require an int or integers of the range of ids, and return them in the dtype of ids."""
    limits = jnp.iinfo(ids.dtype)
    replacement: Any = np.asarray(given) if type(given) is int else given
    if type(given) is not int:
        _checks.integers(function, "replacement", replacement)
        _checks.broadcasts(function, "replacement", replacement, ids.shape)
    if not isinstance(replacement, Array) and not np.all((replacement >= limits.min) & (replacement <= limits.max)):
        rule = f"must fit the dtype of ids, {ids.dtype}"
        raise ValueError(
            _checks.text(function, "replacement", rule, _checks.describe(given), "pass an id in its range")
        )
    return _checks.ranked(jnp.asarray(replacement).astype(ids.dtype), ids.ndim)


@functools.partial(jax.jit, static_argnames="layout")
def _replace(ids: Array, new: Array, protect: Array | None, draw: Any, *, layout: decisions.Layout) -> Array:
    words, rate, places = draw
    kept = _linear.draw(ids, words, rate, places, layout).kept()
    if protect is not None:
        kept = kept | _checks.ranked(jnp.asarray(protect), ids.ndim)
    return _loops.choose(kept, ids, new, words)


def patch_dropout(
    key: Array | None,
    x: Array,
    rate: float,
    *,
    train: bool,
    num_prefix: int = 0,
    token_axis: int = -2,
    shard: Shard = None,
) -> tuple[Array, Array]:
    """Leave tokens out of a sequence, so that the layers that follow have less to do.

    Of n tokens, ``max(1, floor(n * (1 - rate) + 1/2))`` are kept, a random subset of this size in the old order. The
    tokens before ``num_prefix``, such as CLS, stay and do not count. Nothing is scaled.

    Args:
      key: one PRNG key, used once. ``None`` is fine if ``train`` is false or ``rate`` is 0.
      x: floating or complex array ``[*batch, tokens, *features]``. Axes before ``token_axis`` are batch axes, each with
        a subset of its own.
      rate: share of the tokens to leave out. It sets a shape, so it must be a Python or NumPy number.
      train: ``True`` draws a subset; ``False`` returns all of x and all indices.
      num_prefix: how many tokens at the start always stay.
      token_axis: the axis of tokens.
      shard: as for :func:`jdrop.dropout`; it must not split ``token_axis``.

    Returns:
      The kept tokens, an array like x but for the size of ``token_axis``; and their indices along this axis in
      ascending order, prefix included, int32 ``[*batch, kept]``: ``jnp.take_along_axis`` with them gathers positions.

    Raises:
      ValueError: a rate, an axis or a number is out of range, or ``key`` is a batch of keys.
      TypeError: an argument is of the wrong type, ``rate`` is an array, ``key`` is missing, or ``train`` is traced.
      NotImplementedError: ``shard`` splits ``token_axis``.

    References:
      Liu, Matsoukas, Strand, Azizpour, Smith (2023), PatchDropout: Economizing Vision Transformers Using Patch Dropout,
      WACV.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> x = jnp.ones([8, 1 + 196, 32])  # a CLS token and 14 x 14 patches
      >>> y, indices = jdrop.patch_dropout(jax.random.key(0), x, 0.5, train=True, num_prefix=1)
      >>> y.shape, indices.shape
      ((8, 99, 32), (8, 99))
    """
    name = "patch_dropout"
    _checks.array(name, "x", x)
    share = _checks.number(name, "rate", rate, 0.0, 1.0)
    axis = _checks.axis(name, "token_axis", token_axis, x.ndim)
    prefix = _checks.count(name, "num_prefix", num_prefix, 0)
    if prefix >= x.shape[axis]:
        rule = f"must be below the number of tokens, {x.shape[axis]}"
        raise ValueError(_checks.text(name, "num_prefix", rule, prefix, "leave a token to choose from"))
    n = x.shape[axis] - prefix
    decided = functools.partial(_scores, axis, prefix)
    call = _member.check(name, key, x.shape, share, train=train, decided=decided, shard=shard)
    if axis < len(call.names) and call.names[axis]:
        raise NotImplementedError(_checks.text(name, "shard", "must not split token_axis", shard, "gather the tokens"))
    if call.idle:
        return x, _positions(x, axis, x.shape[axis])
    words, _, offset, layout = call.operands()
    keep = max(1, math.floor(n * (1 - Fraction(str(share))) + Fraction(1, 2)))  # of the number as it is written
    return _choose(jnp.asarray(x), words, offset, layout=layout, axis=axis, prefix=prefix, keep=keep)


def _scores(axis: int, prefix: int, shape: tuple[Any, ...]) -> tuple[Any, ...]:
    return *shape[:axis], shape[axis] - prefix


def _positions(x: Array, axis: int, number: int) -> Array:
    """The first positions along an axis, int32 ``[*batch, number]``, laid over an explicit mesh as x is."""
    sharding = explicit_sharding(jax.typeof(x).sharding)
    if sharding is not None:
        sharding = sharding.update(spec=PartitionSpec(*sharding.spec[:axis], None))
    return lax.broadcasted_iota(jnp.int32, (*x.shape[:axis], number), axis, out_sharding=sharding)


@functools.partial(jax.jit, static_argnames=("layout", "axis", "prefix", "keep"))
def _choose(
    x: Array, words: Array, offset: Any, *, layout: decisions.Layout, axis: int, prefix: int, keep: int
) -> tuple[Array, Array]:
    """Keep the tokens with the largest words."""
    draw = _linear.draw(x, words, jnp.float32(0), offset, layout)
    word = draw.word(_scores(axis, prefix, x.shape))
    chosen = jnp.sort(jnp.argsort(word, axis=-1)[..., -keep:], axis=-1).astype(jnp.int32) + np.int32(prefix)
    indices = jnp.concatenate([_positions(x, axis, prefix), chosen], axis=-1)
    places = indices.reshape(indices.shape + (1,) * (x.ndim - axis - 1))
    return jnp.take_along_axis(x, places, axis=axis, mode="promise_in_bounds"), indices
