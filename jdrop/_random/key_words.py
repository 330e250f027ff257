"""The data words of PRNG keys, read in a way that ``jax.debug_key_reuse`` notices."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jdrop._checks import is_typed_key

# jax.debug_key_reuse does not notice jax.random.key_data, but counts a primitive that it does not know as a use of the
# key. Reading the words through such a primitive marks the key as consumed, once per mask.
_key_words_p = Primitive("jdrop_key_words")
_key_words_jit = jax.jit(_key_words_p.bind)


@_key_words_p.def_impl
def _(key: Any) -> Any:
    with jax.disable_jit(False):  # a primitive runs compiled, even if the user disables jit
        return _key_words_jit(key)


@_key_words_p.def_abstract_eval
def _(key: Any) -> Any:
    words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(key.shape, key.dtype))
    spec = key.sharding.spec.update(partitions=(*key.sharding.spec, None))
    return key.update(shape=words.shape, dtype=words.dtype, sharding=key.sharding.update(spec=spec))


def _jvp(primals: Any, tangents: Any) -> Any:
    del tangents  # a key has none
    words = _key_words_p.bind(*primals)
    return words, ad.Zero(jax.typeof(words).to_tangent_aval())


ad.primitive_jvps[_key_words_p] = _jvp
batching.defvectorized(_key_words_p)
mlir.register_lowering(_key_words_p, mlir.lower_fun(jax.random.key_data, multiple_results=False))


def key_words(key: Array) -> Array:
    """Return a key's data words, uint32, and mark a typed key as used."""
    return _key_words_jit(key) if is_typed_key(key) else jnp.asarray(key)  # bind would query the key's type


def mark_used(key: Array) -> Array:
    """Mark a key as used, and return one with the same words to derive keys from: one use, many masks."""
    return jax.random.wrap_key_data(key_words(key), impl=jax.random.key_impl(key)) if is_typed_key(key) else key
