"""Dropout of parameters: single weights, and rows of an embedding."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from jdrop import _checks, _linear, _member, decisions, keys
from jdrop._linear import Draw, Rule
from jdrop._shards import Shard, names_of
from jdrop.bits import Pair, pair
from jdrop.decisions import Generator, RateLike


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
    """Drop single weights of a pytree of parameters.

    ``w'[i] = w[i] * m[i] / (1 - rate)`` with ``m[i] ~ Bernoulli(1 - rate)`` for each floating leaf w. A leaf's mask
    depends on the key, its path in the tree and its shape, so other leaves may come and go.

    Args:
      key: one PRNG key, used once. ``None`` is fine if ``train`` is false or ``rate`` is the number 0.
      params: pytree of arrays. Integer, bool and key leaves are returned as they are.
      rate: probability of dropping, a scalar, as for :func:`jdrop.dropout`.
      train: ``True`` draws masks; ``False`` returns ``params`` itself.
      where: which floating leaves to drop from, a predicate ``(path, leaf) -> bool`` with the path of
        ``jax.tree_util.tree_map_with_path``; ``None`` for all, biases and norms included.
      generator: as for :func:`jdrop.dropout`.
      shard: inside ``jax.shard_map``, the PartitionSpec of every leaf, or a pytree of them like ``params``.

    Returns:
      A pytree like ``params``.

    Raises:
      ValueError: a rate or an option is out of range, or ``key`` is a batch of keys.
      TypeError: an argument or a leaf is of the wrong type, ``key`` is missing, or ``train`` is traced.

    References:
      Wan, Zeiler, Zhang, LeCun, Fergus (2013), Regularization of Neural Networks using DropConnect, ICML; Merity,
      Keskar, Socher (2018), Regularizing and Optimizing LSTM Language Models, ICLR (on hidden-to-hidden weights).

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
        rule = "must be a predicate on path and leaf"
        raise TypeError(_checks.text(name, "where", rule, _checks.describe(where), "pass a function"))
    call = _member.check(name, key, (), rate, train=train, generator=generator)
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    shards = _like(name, shard, tree, leaves)
    chosen = [_floating(name, leaf) and (where is None or bool(where(path, leaf))) for path, leaf in leaves]
    for (_, leaf), drop in zip(leaves, chosen):
        if drop and leaf.dtype.name not in _checks.INEXACT:
            rule = "must be float16, bfloat16, float32, float64 or complex where weights are dropped"
            raise TypeError(_checks.text(name, "params", rule, _checks.describe(leaf), "leave it out with where="))
    if call.idle:
        return params
    own = keys.spend(decisions.needed(name, key))
    dropped = []
    for (path, leaf), spec, drop in zip(leaves, shards, chosen):
        if drop:
            place = keys.derive(own, "drop_connect", *map(_entry, path))
            leaf = _member.scaled(name, place, leaf, rate, train=train, generator=generator, shard=spec)
        dropped.append(leaf)
    return jax.tree.unflatten(tree, dropped)


def _floating(function: str, leaf: Any) -> bool:
    if not _checks.is_array(leaf):
        rule = "must hold arrays"
        raise TypeError(_checks.text(function, "params", rule, _checks.describe(leaf), "convert it with jnp.asarray"))
    return not _checks.is_typed_key(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _entry(entry: Any) -> str | int:
    """Name one step of a path in a pytree."""
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            value = getattr(entry, attribute)
            return value if isinstance(value, str) or (type(value) is int and value >= 0) else repr(value)
    return str(entry)


def _like(function: str, shard: Any, tree: Any, leaves: Sequence[Any]) -> list[Any]:
    """Return a PartitionSpec, or None, for each leaf."""
    if shard is None or isinstance(shard, PartitionSpec):
        found = [shard] * len(leaves)
    else:
        try:
            found = tree.flatten_up_to(shard)
        except (TypeError, ValueError):
            rule = "must be a PartitionSpec, or a pytree of them like params"
            raise ValueError(_checks.text(function, "shard", rule, shard, "give each leaf its own")) from None
    for (_, leaf), spec in zip(leaves, found):
        if _floating(function, leaf):
            names_of(function, leaf.shape, spec)
    return found


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
    """Drop whole words: all places of a word in the batch share one decision.

    ``y[v, :] = x[v, :] * m[v] / (1 - rate)`` with ``m[v] ~ Bernoulli(1 - rate)`` for an embedding table x. With
    ``ids``, x holds the rows already gathered, ``y[..., :] = x[..., :] * m[ids[...]] / (1 - rate)``: the same result as
    gathering from the dropped table, at no cost in the size of the vocabulary.

    Args:
      key: one PRNG key, used once. ``None`` is fine if ``train`` is false or ``rate`` is the number 0.
      x: floating or complex array: the table ``[vocab, features]``, or with ``ids`` the embeddings ``[..., features]``.
      rate: probability of dropping, or an array of it that broadcasts to ``[vocab, 1]``, or with ``ids`` to
        ``[..., 1]``, as for :func:`jdrop.dropout`.
      train: ``True`` draws a mask; ``False`` returns x itself.
      ids: integer array ``[...]``: which rows x was gathered from.
      vocab_size: with ``ids``, the number of rows of the table: negative ids then count from the end and others are
        clipped to it, as JAX does where it gathers. Without it, ids must not be negative.
      generator: as for :func:`jdrop.dropout`. ``"jax"`` with ``ids`` needs bits that go by index (threefry2x32).
      shard: as for :func:`jdrop.dropout`. With ``ids``, decisions go by id, and it only says that all tiles share them.

    Returns:
      An array of the shape and dtype of x.

    Raises:
      ValueError: a rate, a shape or an option is out of range, or ``key`` is a batch of keys.
      TypeError: an argument is of the wrong type, ``key`` is missing, or ``train`` is traced.
      NotImplementedError: ``ids`` with ``generator="jax"`` and a key whose bits do not go by index.

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
    _checks.array(name, "x", x)
    size = None if vocab_size is None else _checks.count(name, "vocab_size", vocab_size)
    if ids is None:
        if size is not None and (not x.ndim or size != x.shape[0]):
            rule = "must be the number of rows of x"
            raise ValueError(_checks.text(name, "vocab_size", rule, size, "leave it out with a table"))
        if not x.ndim:
            raise ValueError(_checks.text(name, "x", "must have an axis of rows", x.shape, "pass [vocab, features]"))
        shared = range(1, x.ndim)
        return _member.scaled(name, key, x, rate, train=train, shared_axes=shared, generator=generator, shard=shard)
    _checks.integers(name, "ids", ids)
    if ids.ndim > x.ndim or ids.shape != x.shape[: ids.ndim]:
        rule = f"must have the leading axes of x, whose shape is {x.shape}"
        raise ValueError(_checks.text(name, "ids", rule, f"shape {ids.shape}", "pass x = table[ids]"))
    if size is None and not isinstance(ids, Array) and np.any(np.asarray(ids) < 0):
        rule = "must not be negative without vocab_size"
        raise ValueError(_checks.text(name, "ids", rule, int(np.min(ids)), "pass vocab_size"))
    shared = range(ids.ndim, x.ndim)
    call = _member.check(name, key, x.shape, rate, train=train, shared_axes=shared, generator=generator, shard=shard)
    if call.idle:
        return x
    high, low = _rows_of(ids.reshape(ids.shape + (1,) * (x.ndim - ids.ndim)), size)
    words, probability, _, layout = call._replace(names=()).operands(part=True)
    return _linear.apply(_ROWS, (x,), words, probability, (high, low), layout)


def _rows_of(ids: Array, size: int | None) -> Pair:
    """Return the rows that JAX gathers for ids, as ``(hi, lo)``; one hi for all where ids are narrow."""
    xp: Any = jnp if isinstance(ids, Array) else np  # NumPy's may be wider than JAX allows
    index = ids.astype(np.int32) if ids.dtype.itemsize < 4 else ids
    if size is not None:
        last = min(size - 1, int(np.iinfo(index.dtype).max))
        if jnp.issubdtype(index.dtype, jnp.signedinteger):
            index = xp.where(index < 0, index + index.dtype.type(last) + index.dtype.type(1), index)
            index = xp.maximum(index, index.dtype.type(0))
        index = xp.minimum(index, index.dtype.type(last))
    if index.dtype.itemsize == 8:
        high, low = pair(index)
        return jnp.asarray(high), jnp.asarray(low)
    return jnp.uint32(0), jnp.asarray(index).astype(jnp.uint32)


def _rows(draw: Draw, x: Array) -> Array:
    high, low = draw.places
    return _member.scale(draw, x, decisions.keep_rows(draw.layout, draw.words, draw.rate, (high, low)))


_ROWS = Rule(_rows)
