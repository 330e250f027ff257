"""Dropout of tokens: replace them with another id, or remove them from the sequence."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from jdrop._axes import as_axis
from jdrop._checks import as_count, as_number, check_array, check_broadcastable, check_integers, expand_rank
from jdrop._errors import describe
from jdrop._lowering import at_lowering
from jdrop._mask import Mask
from jdrop._platform import Target
from jdrop._prepare import check_arguments
from jdrop._primitive import MaskView
from jdrop._sharding import broadcast_spec, check_sharded_as, explicit_sharding
from jdrop._subsets import draw_subset, rounded_kept
from jdrop._types import Generator, RateLike, Shard


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

    ``y[b, t] = ids[b, t] if m[b, t] or protect[b, t] else replacement`` with ``m[b, t] ~ Bernoulli(1 - rate)``.
    Nothing is rescaled.

    Args:
      key: one PRNG key, used once; may be ``None`` if ``train`` is false or ``rate`` is a Python or NumPy 0.
      ids: integer array of any shape, such as ``[batch, time]``.
      rate: probability of replacing a token, or an array of probabilities that broadcasts to ``ids``, as in
        :func:`jdrop.dropout`. NaN in a JAX array replaces nothing, because integers cannot represent NaN.
      replacement: the id to insert, such as that of UNK or MASK: an int, or an integer array that broadcasts to
        ``ids``.
      train: ``True`` draws a mask; ``False`` returns ``ids`` itself.
      protect: bool array that broadcasts to ``ids``: true for tokens that must not be replaced, such as padding or CLS.
      generator: as in :func:`jdrop.dropout`.
      shard: as in :func:`jdrop.dropout`; the PartitionSpec of ``ids``.

    Returns:
      An integer array with the shape and dtype of ``ids``.

    Raises:
      ValueError: a rate, a shape, or an option is out of range, or ``replacement`` does not fit the dtype of ``ids``.
      TypeError: an argument has the wrong type, ``key`` is missing, or ``train`` is traced.

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
    check_integers(name, "ids", ids)
    arguments = check_arguments(name, key, ids, rate, train=train, generator=generator, shard=shard)
    new = _as_ids(name, replacement, jnp.asarray(ids))
    if protect is not None:
        check_broadcastable(name, "protect", protect, ids.shape)
        if protect.dtype != bool:
            raise TypeError(
                f"{name}: protect must be a bool array, got {describe(protect)}; pass a comparison, such as ids < 2"
            )
        check_sharded_as(name, "protect", protect, ids, "ids")
    if arguments.is_identity:
        return ids
    return _replace(arguments.draw(), jnp.asarray(ids), new, protect)


def _as_ids(function: str, value: Any, ids: Array) -> Array:
    """Return replacement ids in the dtype of ids, after checking that they are in its range."""
    limits = jnp.iinfo(ids.dtype)
    replacement: Any = np.asarray(value) if type(value) is int else value
    if type(value) is not int:
        check_integers(function, "replacement", replacement)
        check_broadcastable(function, "replacement", replacement, ids.shape)
        check_sharded_as(function, "replacement", replacement, ids, "ids")
    if not isinstance(replacement, Array) and not np.all((replacement >= limits.min) & (replacement <= limits.max)):
        raise ValueError(
            f"{function}: replacement must fit the dtype of ids, {ids.dtype}, got {describe(value)}; "
            "pass an id within its range"
        )
    replacement = expand_rank(jnp.asarray(replacement).astype(ids.dtype), ids.ndim)
    sharding = explicit_sharding(jax.typeof(ids).sharding)
    if sharding is None or not replacement.ndim:
        return replacement
    return jax.sharding.reshard(replacement, broadcast_spec(sharding.spec, replacement.shape))


@jax.jit
def _replace(mask: Mask, ids: Array, new: Array, protect: Array | None) -> Array:
    return at_lowering(_replace_on, mask, ids, new, protect)


def _replace_on(target: Target, mask: Mask, ids: Array, new: Array, protect: Array | None) -> Array:
    masked = MaskView(mask, ids, target.platform)
    kept = masked.keep()
    if protect is not None:
        kept = kept | expand_rank(jnp.asarray(protect), ids.ndim)
    return masked.select(kept, ids, new)


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
    """Remove random tokens from a sequence, which makes the following layers cheaper.

    Of n tokens, a random subset of ``max(1, floor(n * (1 - rate) + 1/2))`` is kept, in the original order. The first
    ``num_prefix`` tokens, such as CLS, are always kept and not counted in n. Nothing is rescaled.

    Args:
      key: one PRNG key, used once; may be ``None`` if ``train`` is false or ``rate`` is 0.
      x: floating or complex array ``[*batch, tokens, *features]``. Axes before ``token_axis`` are batch axes; each
        example gets its own subset.
      rate: fraction of the tokens to remove. It determines a shape, so it must be a Python or NumPy number.
      train: ``True`` draws a subset; ``False`` returns all of x and all indices.
      num_prefix: number of tokens at the start that are always kept.
      token_axis: the token axis.
      shard: as in :func:`jdrop.dropout`; it must not split ``token_axis``.

    Returns:
      A tuple of the kept tokens, an array like x except for the size of ``token_axis``, and their indices along this
      axis, int32 ``[*batch, kept]`` in ascending order, including the prefix. Use the indices with
      ``jnp.take_along_axis``, for example to gather position embeddings.

    Raises:
      ValueError: a rate, an axis, or a number is out of range, or ``key`` is a batch of keys.
      TypeError: an argument has the wrong type, ``rate`` is an array, ``key`` is missing, or ``train`` is traced.
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
    check_array(name, "x", x)
    share = as_number(name, "rate", rate, 0.0, 1.0)
    axis = as_axis(name, "token_axis", token_axis, x.ndim)
    prefix = as_count(name, "num_prefix", num_prefix, 0)
    if prefix >= x.shape[axis]:
        raise ValueError(
            f"{name}: num_prefix must be below the number of tokens, {x.shape[axis]}, got {prefix}; "
            "leave a token to choose from"
        )
    n = x.shape[axis] - prefix
    decided = functools.partial(_token_shape, axis, prefix)
    arguments = check_arguments(name, key, x, share, train=train, mask_shape=decided, shard=shard, static_rate=True)
    if axis < len(arguments.tile_axes) and arguments.tile_axes[axis]:
        raise NotImplementedError(f"{name}: shard must not split token_axis, got {shard}; gather the tokens")
    if arguments.is_identity:
        return x, _positions(x, axis, x.shape[axis])
    x = jnp.asarray(x)
    size, sharding = _token_shape(axis, prefix, x.shape), _token_sharding(x, axis)
    indices = _with_prefix(
        draw_subset(arguments.draw(), size, rounded_kept(share, n), sharding), _positions(x, axis, prefix)
    )
    wide = indices.reshape(indices.shape + (1,) * (x.ndim - axis - 1))
    return jnp.take_along_axis(x, wide, axis=axis, mode="promise_in_bounds"), indices


def _token_shape(axis: int, prefix: int, shape: tuple[Any, ...]) -> tuple[Any, ...]:
    return *shape[:axis], shape[axis] - prefix


def _token_sharding(x: Array, axis: int) -> NamedSharding | None:
    """Return the sharding of an array ``[*batch, number]`` on the explicit mesh of x, if there is one."""
    sharding = explicit_sharding(jax.typeof(x).sharding)
    return sharding if sharding is None else sharding.update(spec=PartitionSpec(*sharding.spec[:axis], None))


def _positions(x: Array, axis: int, number: int) -> Array:
    """Return the first positions along an axis, int32 ``[*batch, number]``."""
    return lax.broadcasted_iota(jnp.int32, (*x.shape[:axis], number), axis, out_sharding=_token_sharding(x, axis))


@jax.jit
def _with_prefix(kept: Array, prefix: Array) -> Array:
    return jnp.concatenate([prefix, kept + np.int32(prefix.shape[-1])], axis=-1)
