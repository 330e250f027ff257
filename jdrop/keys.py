"""Derived PRNG keys: one per name, layer, step, or example, without bookkeeping."""

import functools
import hashlib
import operator
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jdrop._checks import check_key, is_integer_array, is_typed_key
from jdrop._errors import describe
from jdrop._lowering import at_lowering
from jdrop._platform import Target
from jdrop._random.fast import USE_DERIVE, absorb, hash_key
from jdrop._random.threefry import U64, WORD, Pair

__all__ = ["derive", "per_example"]

_STR_HIGH, _STR_LOW, _INT, _OUT = 1, 2, 3, 4  # tags of the absorbed blocks


@overload
def derive(key: Array, *path: str | int | Array) -> Array: ...
@overload
def derive(key: None, *path: str | int | Array) -> None: ...
def derive(key: Array | None, *path: str | int | Array) -> Array | None:
    """Return the key for a path of names and integers, such as ``derive(key, "encoder", 3, "attention", step)``.

    Threefry-2x32 absorbs the data words of the key, then each element of the path with a tag for its type. This
    construction is independent of ``jax.random.split`` and ``fold_in``, so derived keys do not coincide with theirs.
    Two derived 64-bit keys are equal only by chance, 1 in 2**64 (philox2x32: 1 in 2**32). Deriving does not consume
    ``key``: derive as many keys from it as you need, and use each derived key once.

    Args:
      key: one PRNG key of any implementation, typed or legacy uint32; or ``None``, so that a model derives its keys in
        evaluation, too.
      *path: one or more elements; order matters. A str is identified by its UTF-8 text. An int from 0 to 2**64 - 1, or
        a scalar integer array (which may be traced), is identified by its value, sign-extended to 64 bits. ``"3"`` and
        ``3`` differ, and ``derive(derive(k, "a"), "b")`` differs from ``derive(k, "a", "b")``.

    Returns:
      A key of the same type as ``key``, identical in every process and on every platform; ``None`` for ``None``.

    Raises:
      TypeError: ``key`` is not a key, or an element is neither a str nor an integer (a bool is neither).
      ValueError: ``key`` is a batch of keys, the path is empty, a Python int is out of range, or a str is not valid
        text (it has lone surrogates).

    Example:
      >>> import jax
      >>> from jdrop import keys
      >>> key = jax.random.key(0)
      >>> attention, mlp = keys.derive(key, "block", 3, "attention"), keys.derive(key, "block", 3, "mlp")
      >>> bool(attention == mlp)
      False
    """
    if key is not None:
        check_key("derive", key)
    if not path:
        raise ValueError('derive: path must not be empty, got (); name the use, such as "encoder"')
    blocks = [block for element in path for block in _as_blocks("derive", "path", element)]
    return None if key is None else _derive(key, blocks)


@overload
def per_example(key: Array, ids: Array) -> Array: ...
@overload
def per_example(key: None, ids: Array) -> None: ...
def per_example(key: Array | None, ids: Array) -> Array | None:
    """Return one key per example: ``derive(key, ids[i])`` for each element of an integer array.

    Use ``jax.vmap`` to map dropout over the keys. The mask of an example then depends only on its id, and not on the
    size, order, or sharding of its batch.

    Args:
      key: one PRNG key, such as ``derive(key, "dropout", step)``; or ``None``, as in evaluation.
      ids: integer array of any shape, such as the indices ``[batch]`` of the examples in the data set.

    Returns:
      Keys with shape ``ids.shape``, or ``[*ids.shape, words]`` for legacy keys; ``None`` for ``None``.

    Raises:
      TypeError: ``key`` is not a key, or ``ids`` is not an integer array.
      ValueError: ``key`` is a batch of keys.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> key, x, ids = jax.random.key(0), jnp.ones([2, 8]), jnp.array([17, 4])
      >>> drop = lambda key, x: jdrop.dropout(key, x, 0.5, train=True)
      >>> jax.vmap(drop)(jdrop.keys.per_example(key, ids), x).shape
      (2, 8)
    """
    if key is not None:
        check_key("per_example", key)
    if not is_integer_array(ids):
        raise TypeError(
            f"per_example: ids must be an integer array, got {describe(ids)}; "
            "pass the examples' indices as an integer array"
        )

    return None if key is None else _derive(key, [(_INT, _as_number(ids))])


def _derive(key: Array, blocks: list[tuple[int, Any]]) -> Array:
    """Absorb blocks ``(tag, number)``, with numbers of one shape from :func:`_as_number`."""
    typed = is_typed_key(key)
    words = jax.random.key_data(key) if typed else jnp.asarray(key)
    derived = _derived_words(words, [number for _, number in blocks], tags=tuple(tag for tag, _ in blocks))
    return jax.random.wrap_key_data(derived, impl=jax.random.key_impl(key)) if typed else derived


@functools.partial(jax.jit, static_argnames="tags")
def _derived_words(words: Array, numbers: list[Any], *, tags: tuple[int, ...]) -> Array:
    state = hash_key(words, USE_DERIVE)
    pairs = [number if isinstance(number, U64) else U64.of(number) for number in numbers]
    mixed = functools.reduce(operator.xor, [part for pair in pairs for part in pair], state[0])
    zero = mixed ^ mixed  # batched and sharded like all parts combined, as a scan needs
    high, low = (jnp.stack([pair[k] ^ zero for pair in pairs]) for k in (0, 1))
    state = at_lowering(_absorb, (state[0] ^ zero, state[1] ^ zero), (jnp.array(tags, jnp.uint32), high, low))
    n = words.shape[-1]
    out = [w for i in range(-(-n // 2)) for w in absorb(state, [(_OUT, np.uint32(0), np.uint32(i))])]
    return jnp.stack(out[:n], axis=-1)


def _absorb(target: Target, state: Pair, blocks: tuple[Array, Array, Array]) -> Pair:
    """Absorb blocks, stacked as arrays of tags, high words, and low words."""
    unroll = target.platform.unrolls_hashes
    return lax.scan(lambda state, block: (absorb(state, [block]), None), state, blocks, unroll=unroll)[0]


def _as_number(value: Any) -> Any:
    """Return an integer, or an array of them, for :func:`_derived_words`.

    JAX arrays are split into words there, in compiled code; NumPy arrays here, because JAX may not allow their width.
    """
    return value if isinstance(value, Array) else U64.of(value)


def _as_blocks(function: str, argument: str, element: Any) -> list[tuple[int, Any]]:
    if isinstance(element, str):
        try:
            digest = hashlib.blake2b(element.encode(), digest_size=16).digest()
        except UnicodeEncodeError:
            raise ValueError(
                f"{function}: {argument} must hold valid text, got {describe(element)}; replace lone surrogates"
            ) from None
        a, b, c, d = np.frombuffer(digest, ">u4").astype(np.uint32)
        return [(_STR_HIGH, U64(a, b)), (_STR_LOW, U64(c, d))]
    if isinstance(element, int) and not isinstance(element, bool):
        if not 0 <= element < WORD * WORD:
            raise ValueError(
                f"{function}: {argument} must hold ints from 0 to 2**64 - 1, got {element}; "
                "use a non-negative int, or an integer array"
            )
        return [(_INT, _as_number(element))]
    if is_integer_array(element) and element.ndim == 0:
        return [(_INT, _as_number(element))]
    raise TypeError(
        f"{function}: {argument} must hold str, int or integer scalars, got {describe(element)}; "
        "convert it to one of them"
    )
