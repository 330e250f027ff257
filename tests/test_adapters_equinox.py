"""Equinox: flags, keys, filtered transforms and training with jdrop's layers, compared with Equinox's own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest

eqx = peers.require("equinox", whole_file=True)
Dropout, DropPath = peers.adapter("equinox").Dropout, peers.adapter("equinox").DropPath
KEY = jax.random.key(31)
X = jnp.linspace(1, 2, 8 * 32).reshape(8, 32)
Ours = functools.partial(Dropout, generator="jax")
LAYERS = pytest.mark.parametrize("layer", [Dropout, DropPath], ids=["Dropout", "DropPath"])
pytestmark = pytest.mark.usefixtures("usual_promotion")


# ------------------------------------------------------------------------------------ flags


@LAYERS
def test_the_flag_of_the_call_takes_precedence(layer):
    f = functools.partial(layer, **({"batch_axes": (0, 1)} if layer is DropPath else {}))
    assert f().p == 0.5 and f().inference is False
    assert f(0.5, True)(X) is X and f(inference=True)(X, key=KEY) is X
    assert (f(0.5, True)(X, key=KEY, inference=False) == 0).any()
    assert f()(X, inference=True) is X and (f()(X, key=KEY) == 0).any()
    with pytest.raises(TypeError, match=f"^{layer.__name__}: inference must be a bool, got 1"):
        f()(X, key=KEY, inference=1)
    with pytest.raises(ValueError, match=f"^{layer.__name__}: p must lie in"):  # even if nothing would be dropped
        f(1.5, True)(X)


@LAYERS
def test_the_deprecated_flag(layer):
    with pytest.warns(UserWarning, match="deterministic is deprecated"):
        assert layer(deterministic=True).inference is True
    with pytest.warns(UserWarning, match="deterministic is deprecated"):
        assert layer()(X, deterministic=True) is X
    assert layer(inference=True).deterministic is True


def test_inference_mode_and_tree_at():
    model = eqx.nn.Sequential([Dropout(0.5), DropPath(0.5)])
    inference = eqx.nn.inference_mode(model)
    assert inference(X) is X and [layer.inference for layer in inference.layers] == [True, True]
    assert (eqx.nn.inference_mode(inference, False)(X, key=KEY) == 0).any()
    layer = eqx.tree_at(lambda layer: layer.p, Ours(0.5), 0.9)
    np.testing.assert_array_equal(layer(X, key=KEY) != 0, eqx.nn.Dropout(0.9)(X, key=KEY) != 0)
    assert isinstance(layer, eqx.nn.Dropout)
    for layer in (Dropout(0.5), DropPath(0.5, batch_axes=0)):  # p and inference are leaves, and nothing else
        assert jax.tree.leaves(layer) == jax.tree.leaves(eqx.nn.Dropout(0.5)) == [0.5, False]


# ------------------------------------------------------------------------------------ keys


@LAYERS
def test_no_key(layer):
    assert layer(0)(X) is X and layer(0.0)(X) is X
    name = layer.__name__
    with pytest.raises(RuntimeError, match=f"^{name}: key must be a PRNG key when something is dropped, got None"):
        layer()(X)


def test_drop_path_of_a_batch():
    x, keys = jnp.ones([64, 4, 8]), jax.random.split(KEY, 64)
    y = jax.vmap(lambda x, key: DropPath(0.5)(x, key=key))(x, keys)
    assert ((y == y[:, :1, :1]).all()) and 10 < (y[:, 0, 0] == 0).sum() < 54
    y = DropPath(0.5, batch_axes=0)(x, key=KEY)
    assert ((y == y[:, :1, :1]).all()) and 10 < (y[:, 0, 0] == 0).sum() < 54


# ------------------------------------------------------------------------------------ a model


class Block(eqx.Module):
    """A residual block for one example that returns its output and its masks."""

    up: eqx.nn.Linear
    down: eqx.nn.Linear
    hidden: Any
    out: Any

    def __init__(self, dropout, key):
        keys = jax.random.split(key)
        self.up, self.down = eqx.nn.Linear(16, 32, key=keys[0]), eqx.nn.Linear(32, 16, key=keys[1])
        self.hidden, self.out = dropout(0.3), dropout(p=0.1)

    def __call__(self, x, key):
        keys = jax.random.split(key)
        h = self.hidden(jax.nn.gelu(self.up(x)), key=keys[0])
        y = self.out(self.down(h), key=keys[1])
        return x + y, (h != 0, y != 0)


class Net(eqx.Module):
    """Two blocks, in a loop or stacked for a scan."""

    blocks: Any
    head: eqx.nn.Linear
    form: str = eqx.field(static=True)

    def __init__(self, dropout, form, key):
        keys = jax.random.split(key, 3)
        if form == "scan":
            self.blocks = eqx.filter_vmap(lambda key: Block(dropout, key))(keys[:2])
        else:
            self.blocks = [Block(dropout, key) for key in keys[:2]]
        self.head, self.form = eqx.nn.Linear(16, 1, key=keys[2]), form

    def __call__(self, x, key):
        keys = jax.random.split(key)
        if self.form == "scan":
            arrays, rest = eqx.partition(self.blocks, eqx.is_array)
            x, masks = jax.lax.scan(lambda x, at: eqx.combine(at[0], rest)(x, at[1]), x, (arrays, keys))
            return self.head(x), masks
        masks = []
        for block, key in zip(self.blocks, keys):
            x, kept = eqx.filter_checkpoint(block)(x, key) if self.form == "checkpoint" else block(x, key)
            masks.append(kept)
        return self.head(x), masks


FORMS = ["loop", "checkpoint", "scan"]


def run_of(dropout, form):
    """Return parameters, and ``(params, keys) -> (loss, (y, masks))`` with one key per example under filter_vmap."""
    x, target = peers.data()
    params, static = eqx.partition(Net(dropout, form, jax.random.key(0)), eqx.is_inexact_array)

    def loss(params, keys):
        y, masks = eqx.filter_vmap(eqx.combine(params, static))(x, keys)
        return ((y - target) ** 2).mean(), (y, masks)

    return params, loss


@pytest.mark.parametrize("form", FORMS)
def test_masks_and_gradients_of_a_model(form):
    """Compiled by filter_jit."""
    keys = jax.random.split(KEY, len(peers.data()[0]))
    results = []
    for dropout in (eqx.nn.Dropout, Ours):
        params, loss = run_of(dropout, form)
        results.append(eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))(params, keys))
    peers.same_step(*results)
    masks = results[1][0][1][1]
    params, loss = run_of(Dropout, form)
    other = eqx.filter_jit(loss)(params, keys)[1][1]
    assert any((p != q).any() for p, q in zip(*map(jax.tree.leaves, (masks, other))))
    one = Net(Ours, form, jax.random.key(0))(peers.data()[0][3], keys[3])[1]
    for first, second in zip(*map(jax.tree.leaves, (one, jax.tree.map(lambda m: m[3], masks))), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.examples
def test_training():
    def run(dropout):
        params, loss = run_of(dropout, "loop")
        keys = lambda step: jax.random.split(jax.random.fold_in(KEY, step), len(peers.data()[0]))
        return peers.train(lambda params, step: loss(params, keys(step))[0], params)

    peers.same_run(run(eqx.nn.Dropout), run(Ours))


def test_an_ensemble_of_layers_with_rates():
    """One rate per ensemble member under filter_vmap, and one compilation for all rates under filter_jit."""
    rates = jnp.array([0.1, 0.5, 0.9])
    layers = eqx.filter_vmap(lambda p: Ours(p))(rates)
    keys = jax.random.split(KEY, 3)
    y = eqx.filter_vmap(lambda layer, key: layer(X, key=key))(layers, keys)
    for i, p in enumerate(rates):
        np.testing.assert_array_equal(y[i] != 0, eqx.nn.Dropout(p)(X, key=keys[i]) != 0)
    count = 0

    @eqx.filter_jit
    def f(layer):
        nonlocal count
        count += 1
        return layer(X, key=KEY)

    for p in rates:
        f(Dropout(p))
    assert count == 1
