"""Keys without bookkeeping: derived keys for a place, a time or an example.

For users there are :func:`derive` and :func:`per_example`; the other functions are how members use a key up.
"""

import functools
import hashlib
import operator
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jdrop import _checks
from jdrop.bits import WORD, Pair, pair, threefry2x32

_TAG = 0x6A64726F  # "jdro": as the high word of a counter it is out of reach of jax.random
_SEED, _DERIVE = 1, 2
_STR_HIGH, _STR_LOW, _INT, _OUT = 1, 2, 3, 4

# ---------------------------------------------------------------------------------- the words of a key

# jax.debug_key_reuse does not see jax.random.key_data. A primitive that it does not know it takes for a
# use of the key, so reading the words through one marks the key consumed: once a mask.
_consume_p = Primitive("jdrop_key_words")
_consume = jax.jit(_consume_p.bind)


@_consume_p.def_impl
def _(key: Any) -> Any:
    with jax.disable_jit(False):  # a primitive runs compiled, also where the user wants no jit
        return _consume(key)


@_consume_p.def_abstract_eval
def _(key: Any) -> Any:
    words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(key.shape, key.dtype))
    return key.update(shape=words.shape, dtype=words.dtype, sharding=_trailing_axis(key.sharding))


def _trailing_axis(sharding: Any) -> Any:
    return sharding.update(spec=sharding.spec.update(partitions=(*sharding.spec, None)))


def _consume_jvp(primals: Any, tangents: Any) -> Any:
    del tangents  # a key has none
    words = _consume_p.bind(*primals)
    return words, ad.Zero(jax.typeof(words).to_tangent_aval())


ad.primitive_jvps[_consume_p] = _consume_jvp
batching.defvectorized(_consume_p)
mlir.register_lowering(_consume_p, mlir.lower_fun(jax.random.key_data, multiple_results=False))


def consume(key: Array) -> Array:
    """Return a key's data words, uint32, and mark a typed key as used (``jax.debug_key_reuse``)."""
    return _consume_p.bind(key) if _checks.is_typed_key(key) else jnp.asarray(key)


def spend(key: Array) -> Array:
    """Mark a key as used, and return one of the same words to derive keys from: one use, many draws."""
    return jax.random.wrap_key_data(consume(key), impl=jax.random.key_impl(key)) if _checks.is_typed_key(key) else key


# ---------------------------------------------------------------------------------- seeds and derived keys


def _absorb(state: Pair, blocks: Iterable[Any]) -> Pair:
    """Encrypt a state under each block ``(tag, a, b)`` in turn; the tag says what the block is."""
    for tag, a, b in blocks:
        state = threefry2x32((a, b), (state[0] ^ jnp.asarray(tag, jnp.uint32), state[1]))
    return state


def _start(words: Array, use: int) -> Pair:
    n = words.shape[-1]
    at: list[Any] = [*(words[..., i] for i in range(n)), *[np.uint32(0)] * (n % 2)]
    return _absorb((np.uint32(_TAG), np.uint32(use)), [(0, *at[i : i + 2]) for i in range(0, n, 2)])


@jax.jit
def seed(words: Array) -> Array:
    """Hash a key's data words to the seed of a mask, uint32 [2]."""
    return jnp.stack(_start(words, _SEED), axis=-1)


def derive(key: Array, *path: str | int | Array) -> Array:
    """Return the key for a place and a time, such as ``derive(key, "encoder", 3, "attention", step)``.

    The key's words, then each element of the path with a tag of its type, are absorbed one after another
    by Threefry-2x32; the result shares no construction with ``jax.random.split`` and ``fold_in``, so the
    three do not meet. Two keys of 64 bits are the same by chance alone, 1 in 2**64 (philox2x32: 1 in 2**32).
    Deriving does not use ``key`` up: derive as many keys from it as there are places, and draw from each
    derived key once.

    Args:
      key: one PRNG key of any implementation, typed or legacy uint32.
      *path: at least one element; order matters. A str counts by its UTF-8 text; an int from 0 to
        2**64 - 1, or an integer array scalar (it may be traced), counts by its value, sign-extended to 64
        bits. ``"3"`` and ``3`` differ, and ``derive(derive(k, "a"), "b")`` differs from
        ``derive(k, "a", "b")``.

    Returns:
      A key of the type of ``key``: the same one in every process, on every platform.

    Raises:
      TypeError: ``key`` is no key, or an element is neither str nor integer (a bool is neither).
      ValueError: ``key`` is a batch of keys, the path is empty, a Python int is out of range, or a str is no text.

    Example:
      >>> import jax
      >>> from jdrop import keys
      >>> key = jax.random.key(0)
      >>> attention, mlp = keys.derive(key, "block", 3, "attention"), keys.derive(key, "block", 3, "mlp")
      >>> bool(attention == mlp)
      False
    """
    _checks.key("derive", key)
    if not path:
        raise ValueError(_checks.text("derive", "path", "must not be empty", "()", 'name the use, such as "encoder"'))
    return _derive(key, [block for element in path for block in _blocks("derive", "path", element)])


def per_example(key: Array, ids: Array) -> Array:
    """Return a batch of keys, ``derive(key, ids[i])`` for each element of an integer array.

    Map a dropout over them with ``jax.vmap``: an example's mask then depends on its id alone, not on the
    size, order or sharding of the batch it is in.

    Args:
      key: one PRNG key, such as ``derive(key, "dropout", step)``.
      ids: integer array of any shape, such as the indices of the examples in the data set ``[batch]``.

    Returns:
      Keys of shape ``ids.shape`` (legacy keys: ``[*ids.shape, words]``).

    Raises:
      TypeError: ``key`` is no key, or ``ids`` is no integer array.
      ValueError: ``key`` is a batch of keys.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> key, x, ids = jax.random.key(0), jnp.ones([2, 8]), jnp.array([17, 4])
      >>> drop = lambda key, x: jdrop.dropout(key, x, 0.5, train=True)
      >>> jax.vmap(drop)(jdrop.keys.per_example(key, ids), x).shape
      (2, 8)
    """
    _checks.key("per_example", key)
    if not _checks.is_integers(ids):
        fix = "pass the examples' indices as an integer array"
        raise TypeError(_checks.text("per_example", "ids", "must be an integer array", _checks.describe(ids), fix))

    def one(high: Array, low: Array) -> Array:
        return _derive(key, [(_INT, high, low)])

    for _ in ids.shape:
        one = jax.vmap(one)
    return one(*pair(ids))


def _derive(key: Array, blocks: list[tuple[int, Any, Any]]) -> Array:
    typed = _checks.is_typed_key(key)
    words = jax.random.key_data(key) if typed else jnp.asarray(key)
    tags = tuple(tag for tag, _, _ in blocks)
    derived = _derived_words(words, [(a, b) for _, a, b in blocks], tags=tags)
    return jax.random.wrap_key_data(derived, impl=jax.random.key_impl(key)) if typed else derived


@functools.partial(jax.jit, static_argnames="tags")
def _derived_words(words: Array, pairs: list[Pair], *, tags: tuple[int, ...]) -> Array:
    state, parts = _start(words, _DERIVE), [part for pair in pairs for part in pair]
    mixed = functools.reduce(operator.xor, parts, state[0])
    alike = mixed ^ mixed  # 0, mapped and sharded as all parts together: what a loop wants of its carry and inputs
    high, low = (jnp.stack([pair[k] ^ alike for pair in pairs]) for k in (0, 1))
    # A loop: unrolled, a long path takes seconds to compile on CPU.
    tagged = (jnp.array(tags, jnp.uint32), high, low)
    state, _ = lax.scan(lambda s, block: (_absorb(s, [block]), None), (state[0] ^ alike, state[1] ^ alike), tagged)
    n = words.shape[-1]
    out = [w for i in range(-(-n // 2)) for w in _absorb(state, [(_OUT, np.uint32(0), np.uint32(i))])]
    return jnp.stack(out[:n], axis=-1)


def _blocks(function: str, argument: str, element: Any) -> list[tuple[int, Any, Any]]:
    if isinstance(element, str):
        try:
            digest = hashlib.blake2b(element.encode(), digest_size=16).digest()
        except UnicodeEncodeError:
            rule, fix = "must hold str that are text", "replace lone surrogates"
            raise ValueError(_checks.text(function, argument, rule, _checks.describe(element), fix)) from None
        a, b, c, d = np.frombuffer(digest, ">u4").astype(np.uint32)
        return [(_STR_HIGH, a, b), (_STR_LOW, c, d)]
    if isinstance(element, int) and not isinstance(element, bool):
        if not 0 <= element < WORD * WORD:
            fix = "use a non-negative int, or an integer array"
            rule = "must hold ints from 0 to 2**64 - 1"
            raise ValueError(_checks.text(function, argument, rule, element, fix))
        return [(_INT, *pair(element))]
    if _checks.is_integers(element) and element.ndim == 0:
        return [(_INT, *pair(element))]
    fix = "convert it to one of these"
    rule = "must hold str, int or integer scalars"
    raise TypeError(_checks.text(function, argument, rule, _checks.describe(element), fix))
