"""Dropout of parameters: individual weights, and rows of an embedding table."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from jdrop._checks import as_count, check_array, check_integers, is_array, is_typed_key, names_of
from jdrop._errors import describe
from jdrop._ops import SCALE
from jdrop._prepare import check_arguments, prepare, require_key
from jdrop._primitive import masked_op
from jdrop._random.key_words import mark_used
from jdrop._random.threefry import U64
from jdrop._sharding import check_sharded_as, tile_axes
from jdrop._types import INEXACT, Generator, RateLike, Shard
from jdrop.keys import derive


def drop_connect(
    key: Array | None,
    params: Any,
    rate: RateLike,
    *,
    train: bool,
    where: Callable[[tuple[Any, ...], Array], bool] | None = None,
    generator: Generator = "fast",
    shard: Any = None,
) -> Any:
    """Drop individual weights in a pytree of parameters.

    ``w'[i] = w[i] * m[i] / (1 - rate)`` with ``m[i] ~ Bernoulli(1 - rate)`` for each floating leaf w. A leaf's mask
    depends only on the key, its path in the tree, and its shape, so adding or removing other leaves does not change it.

    Args:
      key: one PRNG key, used once; may be ``None`` if ``train`` is false or ``rate`` is a Python or NumPy 0.
      params: pytree, such as a whole Equinox model. Leaves that are not floating arrays are returned unchanged:
        integers, bools, keys, functions, Python numbers. A sparse ``BCOO`` array is dropped from by its data.
      rate: scalar drop rate, as in :func:`jdrop.dropout`.
      train: ``True`` draws masks; ``False`` returns ``params`` itself.
      where: predicate ``(path, leaf) -> bool`` that selects the floating leaves to drop from, with the path of
        ``jax.tree_util.tree_map_with_path``. ``None`` selects all, including biases and norms.
      generator: as in :func:`jdrop.dropout`.
      shard: inside ``jax.shard_map``, one PartitionSpec for all leaves, or a pytree of them like ``params``.

    Returns:
      A pytree like ``params``.

    Raises:
      ValueError: a rate or an option is out of range, or ``key`` is a batch of keys.
      TypeError: an argument or a leaf has the wrong type, ``key`` is missing, or ``train`` is traced.

    References:
      Wan, Zeiler, Zhang, LeCun, Fergus (2013), Regularization of Neural Networks using DropConnect, ICML; Merity,
      Keskar, Socher (2018), Regularizing and Optimizing LSTM Language Models, ICLR (for hidden-to-hidden weights).

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> params = {"w": jnp.ones([4, 4]), "b": jnp.ones([4])}
      >>> matrices = lambda path, leaf: leaf.ndim == 2
      >>> y = jdrop.drop_connect(jax.random.key(0), params, 0.5, train=True, where=matrices)
      >>> sorted(set(y["w"].ravel().tolist())), y["b"].tolist()
      ([0.0, 2.0], [1.0, 1.0, 1.0, 1.0])
    """
    name = "drop_connect"
    if where is not None and not callable(where):
        raise TypeError(f"{name}: where must be a predicate on path and leaf, got {describe(where)}; pass a function")
    arguments = check_arguments(name, key, None, rate, shape=(), train=train, generator=generator)
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    shards = _leaf_specs(name, shard, tree, leaves)
    chosen = [_is_floating(leaf) and (where is None or bool(where(path, leaf))) for path, leaf in leaves]
    for (_, leaf), drop in zip(leaves, chosen):
        if drop and leaf.dtype.name not in INEXACT:
            raise TypeError(
                f"{name}: params must be {names_of(INEXACT)} where weights are dropped, "
                f"got {describe(leaf)}; leave it out with where="
            )
    if arguments.is_identity:
        return params
    base_key = mark_used(require_key(name, key))
    dropped = []
    for (path, leaf), spec, drop in zip(leaves, shards, chosen):
        if drop:
            leaf_key = derive(base_key, "drop_connect", *map(_path_element, path))
            mask = prepare(name, leaf_key, leaf, rate, train=train, generator=generator, shard=spec)
            leaf = leaf if mask is None else masked_op(SCALE, mask, leaf)
        dropped.append(leaf)
    return jax.tree.unflatten(tree, dropped)


def _is_floating(leaf: Any) -> bool:
    return is_array(leaf) and not is_typed_key(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _path_element(entry: Any) -> str | int:
    """Return the path element for :func:`derive` of one entry of a pytree path."""
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            value = getattr(entry, attribute)
            return value if isinstance(value, str) or (type(value) is int and value >= 0) else repr(value)
    return str(entry)


def _leaf_specs(function: str, shard: Any, tree: Any, leaves: Sequence[Any]) -> list[Any]:
    """Return a PartitionSpec or None for each leaf."""
    if shard is None or isinstance(shard, PartitionSpec):
        specs = [shard] * len(leaves)
    else:
        try:
            specs = tree.flatten_up_to(shard)
        except (TypeError, ValueError):
            raise ValueError(
                f"{function}: shard must be a PartitionSpec, or a pytree of them like params, got {shard}; "
                "give each leaf its own"
            ) from None
    for (_, leaf), spec in zip(leaves, specs):
        if _is_floating(leaf):
            tile_axes(function, leaf.shape, spec)
    return specs


# ---------------------------------------------------------------------------------- rows of an embedding


def embedding_dropout(
    key: Array | None,
    x: Array,
    rate: RateLike,
    *,
    train: bool,
    ids: Array | None = None,
    vocab_size: int | None = None,
    generator: Generator = "fast",
    shard: Shard = None,
) -> Array:
    """Drop whole words: all occurrences of a word in the batch share one decision.

    ``y[v, :] = x[v, :] * m[v] / (1 - rate)`` with ``m[v] ~ Bernoulli(1 - rate)`` for an embedding table x. With
    ``ids``, x contains the gathered rows, and ``y[..., :] = x[..., :] * m[ids[...]] / (1 - rate)``. The result equals
    that of gathering from the dropped table, at a cost independent of the vocabulary size.

    Args:
      key: one PRNG key, used once; may be ``None`` if ``train`` is false or ``rate`` is a Python or NumPy 0.
      x: floating or complex array: the table ``[vocab, features]``, or with ``ids`` the embeddings ``[..., features]``.
      rate: drop rate, or an array of rates that broadcasts to ``[vocab, 1]``, or with ``ids`` to ``[..., 1]``, as in
        :func:`jdrop.dropout`.
      train: ``True`` draws a mask; ``False`` returns x itself.
      ids: integer array ``[...]``: the row of the table behind each embedding in x.
      vocab_size: with ``ids``, the number of rows of the table. Negative ids then count from the end, and out-of-range
        ids are clipped, as in JAX gathers. Without it, ids must not be negative.
      generator: as in :func:`jdrop.dropout`. ``"jax"`` with ``ids`` requires random access (a threefry2x32 key).
      shard: as in :func:`jdrop.dropout`. With ``ids``, decisions depend only on the id, so any PartitionSpec only
        states that all tiles share them.

    Returns:
      An array with the shape and dtype of x.

    Raises:
      ValueError: a rate, a shape, or an option is out of range, or ``key`` is a batch of keys.
      TypeError: an argument has the wrong type, ``key`` is missing, or ``train`` is traced.
      NotImplementedError: ``ids`` with ``generator="jax"`` and a key whose bits lack random access.

    References:
      Gal, Ghahramani (2016), A Theoretically Grounded Application of Dropout in Recurrent Neural Networks, NeurIPS.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> table, ids, key = jnp.ones([1000, 4]), jnp.array([[7, 8, 7]]), jax.random.key(0)
      >>> a = jdrop.embedding_dropout(key, table, 0.5, train=True)[ids]
      >>> b = jdrop.embedding_dropout(key, table[ids], 0.5, train=True, ids=ids)
      >>> bool((a == b).all())
      True
    """
    name = "embedding_dropout"
    check_array(name, "x", x)
    size = None if vocab_size is None else as_count(name, "vocab_size", vocab_size)
    if ids is None:
        if size is not None and (not x.ndim or size != x.shape[0]):
            raise ValueError(
                f"{name}: vocab_size must be the number of rows of x, got {size}; leave it out with a table"
            )
        if not x.ndim:
            raise ValueError(f"{name}: x must have an axis of rows, got {x.shape}; pass [vocab, features]")
        mask = prepare(name, key, x, rate, train=train, shared_axes=range(1, x.ndim), generator=generator, shard=shard)
        return x if mask is None else masked_op(SCALE, mask, x)
    check_integers(name, "ids", ids)
    if ids.ndim > x.ndim or ids.shape != x.shape[: ids.ndim]:
        raise ValueError(
            f"{name}: ids must have the leading axes of x, whose shape is {x.shape}, got shape {ids.shape}; "
            "pass x = table[ids]"
        )
    if size is None and not isinstance(ids, Array) and np.any(np.asarray(ids) < 0):
        raise ValueError(
            f"{name}: ids must not be negative without vocab_size, got {int(np.min(ids))}; pass vocab_size"
        )
    aligned = ids.reshape(ids.shape + (1,) * (x.ndim - ids.ndim))
    check_sharded_as(name, "ids", aligned, x)
    shared = range(ids.ndim, x.ndim)
    arguments = check_arguments(name, key, x, rate, train=train, shared_axes=shared, generator=generator, shard=shard)
    if arguments.is_identity:
        return x
    rows = _rows_of(aligned, size)
    every_id = (2**64, 1)  # the decisions of a table that holds them all
    mask = arguments.draw(one_for_all_tiles=True, random_access=True, mask_shape=every_id)
    return masked_op(SCALE, mask, x, index=[rows, U64(jnp.uint32(0), jnp.zeros((1,) * x.ndim, jnp.uint32))])


def _rows_of(ids: Array, size: int | None) -> U64:
    """Return the rows that JAX gathers for ids, as ``(hi, lo)``; narrow ids share one hi."""
    xp: Any = jnp if isinstance(ids, Array) else np  # NumPy ids may be 64-bit while x64 is off
    index = ids.astype(np.int32) if ids.dtype.itemsize < 4 else ids
    most = int(np.iinfo(index.dtype).max)
    if size is not None and size - 1 > most:  # every id is inside, but the end is beyond its dtype
        below = index < 0
        end = U64(*(xp.where(below, word, np.uint32(0)) for word in U64.of(size)))
        return U64.of(index) + end
    if size is not None:
        if jnp.issubdtype(index.dtype, jnp.signedinteger):
            index = xp.where(index < 0, index + index.dtype.type(size - 1) + index.dtype.type(1), index)
            index = xp.maximum(index, index.dtype.type(0))
        index = xp.minimum(index, index.dtype.type(size - 1))
    if index.dtype.itemsize == 8:
        high, low = U64.of(index)
        return U64(jnp.asarray(high), jnp.asarray(low))
    return U64(jnp.uint32(0), jnp.asarray(index).astype(jnp.uint32))
