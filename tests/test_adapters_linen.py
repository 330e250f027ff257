"""Flax linen: flags, rngs, lifted transforms and training with jdrop's layers, compared with linen's own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest

flax, linen = peers.require("flax", whole_file=True), peers.require("flax.linen")
Dropout, DropPath = peers.adapter("linen").Dropout, peers.adapter("linen").DropPath
KEY = jax.random.key(23)
X = jnp.linspace(1, 2, 8 * 32).reshape(8, 32)
Ours = functools.partial(Dropout, generator="jax")
LAYERS = pytest.mark.parametrize("layer", [Dropout, DropPath], ids=["Dropout", "DropPath"])
pytestmark = pytest.mark.usefixtures("usual_promotion")


# ------------------------------------------------------------------------------------ flags


@LAYERS
def test_the_flag_is_passed_once(layer):
    rngs = {"dropout": KEY}
    built = layer(0.5, deterministic=False).apply({}, X, rngs=rngs)
    called = layer(0.5).apply({}, X, deterministic=False, rngs=rngs)
    np.testing.assert_array_equal(built, called)
    assert (built == 0).any()
    assert layer(0.5, deterministic=True).apply({}, X) is X and layer(0.5).apply({}, X, True) is X
    for f in (
        lambda: layer(0.5).apply({}, X, rngs=rngs),
        lambda: layer(0.5, deterministic=True).apply({}, X, False, rngs=rngs),
    ):
        with pytest.raises(ValueError, match='Parameter "deterministic"'):
            f()
    name = layer.__name__
    with pytest.raises(TypeError, match=f"^{name}: deterministic must be a bool, got 1"):
        layer(0.5).apply({}, X, 1, rngs=rngs)
    with pytest.raises(TypeError, match=f"^{name}: deterministic must be static"):
        jax.jit(lambda d: layer(0.5).apply({}, X, d, rngs=rngs))(True)
    with pytest.raises(ValueError, match=f"^{name}: rate must lie in"):  # even if nothing would be dropped
        layer(1.5).apply({}, X, True)


# ------------------------------------------------------------------------------------ rngs


@LAYERS
def test_no_rng_is_needed_if_nothing_is_random(layer):
    for rate in (0, 0.0):
        assert layer(rate).apply({}, X, False) is X
    assert not layer(1.0).apply({}, X, False).any()
    with pytest.raises(flax.errors.InvalidRngError, match='rngs must have a key for "dropout"'):
        layer(0.5).apply({}, X, False)
    with pytest.raises(flax.errors.InvalidRngError, match='rngs must have a key for "noise"'):
        layer(0.5, rng_collection="noise").apply({}, X, False, rngs={"dropout": KEY})


@LAYERS
def test_an_rng_of_the_call_takes_precedence(layer):
    f = layer(0.5, deterministic=False)
    by_call = f.apply({}, X, rng=KEY)
    np.testing.assert_array_equal(by_call, f.apply({}, X, rng=KEY, rngs={"dropout": jax.random.key(1)}))
    assert (by_call != f.apply({}, X, rngs={"dropout": KEY})).any()  # make_rng folds in the scope


def test_the_collection():
    for rngs in ({"dropout": KEY}, {"params": KEY}, {"noise": KEY, "dropout": jax.random.key(1)}):
        options = {"deterministic": False, "rng_collection": "noise" if "noise" in rngs else "dropout"}
        y = Ours(0.5, **options).apply({}, X, rngs=rngs)
        np.testing.assert_array_equal(y, linen.Dropout(0.5, **options).apply({}, X, rngs=rngs))


def test_it_is_a_dropout_of_linen_with_the_same_name():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return Dropout(0.5, deterministic=False)(x)

    _, seen = Net().apply({}, X, rngs={"dropout": KEY}, capture_intermediates=lambda m, _: isinstance(m, linen.Dropout))
    assert list(seen["intermediates"]) == ["Dropout_0", "__call__"] or list(seen["intermediates"]) == ["Dropout_0"]
    assert Dropout(0.5, (1,), True, "noise") == Dropout(
        0.5, broadcast_dims=(1,), deterministic=True, rng_collection="noise"
    )


# ------------------------------------------------------------------------------------ a model


class Block(linen.Module):
    """A residual block that returns its output and its masks."""

    dropout: Any
    rate: Any = 0.3

    @linen.compact
    def __call__(self, x, deterministic=False):
        h = linen.relu(linen.Dense(32)(linen.LayerNorm()(x)))
        hidden = self.dropout(self.rate, broadcast_dims=())(h, deterministic=deterministic)
        out = self.dropout(rate=0.1, broadcast_dims=(-1,))(linen.Dense(x.shape[-1])(hidden), deterministic)
        kept = self.dropout(0.5, deterministic=deterministic)(jnp.ones_like(x)) != 0
        return x + out, (hidden != 0, out != 0, kept)


class Net(linen.Module):
    dropout: Any
    form: str = "loop"

    @linen.compact
    def __call__(self, x):
        if self.form == "loop":
            masks = []
            for _ in range(2):
                x, kept = Block(self.dropout)(x)
                masks.append(kept)
        elif self.form == "remat":
            x, masks = linen.remat(Block)(self.dropout)(x)
        elif self.form == "jit":
            x, masks = linen.jit(Block)(self.dropout)(x)
        elif self.form == "vmap":
            lifted = linen.vmap(Block, variable_axes={"params": None}, split_rngs={"params": False, "dropout": True})
            x, masks = lifted(self.dropout)(x[:, None])
            x = x[:, 0]
        else:
            block = linen.remat(Block) if self.form == "scan of remat" else Block
            options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True, "dropout": True}, "length": 3}
            x, masks = linen.scan(block, **options)(self.dropout)(x)
        return linen.Dense(1)(x), masks


FORMS = ["loop", "remat", "jit", "vmap", "scan", "scan of remat"]


@functools.cache
def params_of(form):
    rngs = {"params": jax.random.key(0), "dropout": KEY}
    return jax.jit(Net(linen.Dropout, form).init)(rngs, peers.data()[0])


def loss_of(dropout, form):
    """``(params, key) -> (loss, (y, masks))``."""
    x, target = peers.data()

    def loss(params, key):
        y, masks = Net(dropout, form).apply(params, x, rngs={"dropout": key})
        return ((y - target) ** 2).mean(), (y, masks)

    return loss


@pytest.mark.parametrize("form", FORMS)
def test_masks_and_gradients_of_a_model(form):
    steps = [jax.jit(jax.value_and_grad(loss_of(d, form), has_aux=True)) for d in (linen.Dropout, Ours)]
    results = [step(params_of(form), KEY) for step in steps]
    peers.same_step(*results)
    y, masks = results[1][0][1]
    fast, other = jax.jit(loss_of(Dropout, form))(params_of(form), KEY)[1]
    assert fast.shape == y.shape
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (masks, other))))


@pytest.mark.examples
def test_training():
    def run(dropout):
        loss = loss_of(dropout, "scan of remat")
        step = lambda params, i: loss(params, jax.random.fold_in(KEY, i))[0]
        return peers.train(step, params_of("scan of remat"))

    peers.same_run(run(linen.Dropout), run(Ours))


def test_a_rate_that_changes_does_not_recompile():
    x, _ = peers.data()
    params = Block(Dropout).init({"params": jax.random.key(0), "dropout": KEY}, x)
    f = jax.jit(lambda rate: Block(Dropout, rate).apply(params, x, rngs={"dropout": KEY})[1][0].mean())
    few, many = f(jnp.float32(0.1)), f(jnp.float32(0.9))
    assert many < few / 3 and f._cache_size() == 1
