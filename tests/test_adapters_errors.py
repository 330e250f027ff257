"""Errors of the layers: each names the way of its library, not the arguments of jdrop's functions."""

import re

import jax
import jax.numpy as jnp
import peers
import pytest

KEY = jax.random.key(3)
X = jnp.ones([4, 8])
LIBRARIES = pytest.mark.parametrize("library", peers.ADAPTERS)
pytestmark = pytest.mark.usefixtures("usual_promotion")

WITHOUT_KEY = {
    "linen": 'pass rngs={"dropout": key} to apply',
    "nnx": "pass rngs=nnx.Rngs(dropout=seed) to the constructor or to the call",
    "equinox": "pass key=jax.random.key(seed), or inference=True",
    "haiku": "pass haiku.next_rng_key(), and an rng to apply",
}
NOT_A_KEY = {
    "linen": 'pass rngs={"dropout": key} to apply, or rng=key to the layer',
    "nnx": "pass nnx.Rngs(dropout=seed)",
    "equinox": "pass key=jax.random.key(seed)",
    "haiku": "pass haiku.next_rng_key(), and an rng to apply",
}
KEYS = {
    "linen": 'linen.vmap with split_rngs={"dropout": True}',
    "nnx": "nnx.vmap under nnx.split_rngs",
    "equinox": "use jax.vmap over x and keys",
    "haiku": "use jax.vmap over keys",
}
INTEGERS = dict.fromkeys(peers.ADAPTERS, "cast it to a floating dtype") | {
    "haiku": "pass rng, rate, then a float array"
}
CASES = [(None, X, WITHOUT_KEY), (X, X, NOT_A_KEY), (jax.random.split(KEY), X, KEYS), (KEY, jnp.arange(4), INTEGERS)]


@LIBRARIES
@pytest.mark.parametrize("layer", ["Dropout", "DropPath"])
@pytest.mark.parametrize(("key", "x", "fixes"), CASES, ids=["no key", "not a key", "keys", "integers"])
def test_the_fix_is_that_of_the_library(library, layer, key, x, fixes):
    with pytest.raises(Exception, match=r", got .*; .*" + re.escape(fixes[library])) as caught:
        peers.ours(library, layer)(key, x, 0.5)
    for of_functions in ("before the data", "pass key first", "train="):
        assert of_functions not in str(caught.value)


def test_the_rng_collection_is_named():
    module, nnx = peers.adapter("linen"), peers.require("flax.nnx")
    with pytest.raises(Exception, match=re.escape('pass rngs={"noise": key} to apply')):
        module.Dropout(0.5, rng_collection="noise", deterministic=False).apply({}, X)
    text = "rngs must have the stream 'noise', or a default, got ['params']; pass nnx.Rngs(noise=seed)"
    with pytest.raises(ValueError, match=re.escape(text)):
        peers.adapter("nnx").Dropout(0.5, rng_collection="noise")(X, rngs=nnx.Rngs(params=0))


MODES = {
    "linen": ("deterministic", lambda m, d: m.Dropout(0.5).apply({}, X, d, rng=KEY)),
    "nnx": ("deterministic", lambda m, d: m.DropPath(0.5)(X, deterministic=d, rngs=KEY)),
    "equinox": ("inference", lambda m, d: m.Dropout(0.5)(X, inference=d, key=KEY)),
}


@pytest.mark.parametrize("library", MODES)
def test_a_traced_mode_gets_the_hint_that_a_traced_train_gets(library):
    (mode, call), module = MODES[library], peers.adapter(library)
    rate = "p" if library == "equinox" else "rate"
    text = f"{mode} must be static, got a traced value; "
    text += f"pass {rate}=jnp.where({mode}, 0., {rate}), or list {mode} in static_argnames"
    with pytest.raises(TypeError, match=re.escape(text)):
        jax.jit(lambda d: call(module, d))(True)


def test_a_traced_mode_of_attention_names_its_own_rate():
    q = jnp.ones([2, 8, 2, 4])
    f = lambda d: peers.adapter("linen").dot_product_attention(q, q, q, deterministic=d, dropout_rng=KEY)
    with pytest.raises(TypeError, match=re.escape("pass dropout_rate=jnp.where(deterministic, 0., dropout_rate), or")):
        jax.jit(f)(True)
    with pytest.raises(TypeError, match="pass dropout_rng=, one key"):
        peers.adapter("linen").dot_product_attention(q, q, q, dropout_rate=0.5)
