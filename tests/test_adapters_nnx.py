"""Flax nnx: flags, streams, graph transforms and training with jdrop's layers, compared with nnx's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import pytest

nnx = peers.require("flax.nnx", whole_file=True)
Dropout, DropPath = peers.adapter("nnx").Dropout, peers.adapter("nnx").DropPath
KEY = jax.random.key(29)
X = jnp.linspace(1, 2, 8 * 32).reshape(8, 32)
Ours = functools.partial(Dropout, generator="jax")
LAYERS = pytest.mark.parametrize("layer", [Dropout, DropPath], ids=["Dropout", "DropPath"])
pytestmark = pytest.mark.usefixtures("usual_promotion")


# ------------------------------------------------------------------------------------ flags


@LAYERS
def test_the_flag_of_the_call_takes_precedence(layer):
    f = layer(0.5, deterministic=True, rngs=nnx.Rngs(0))
    assert f(X) is X and (f(X, deterministic=False) == 0).any()
    f = layer(0.5, rngs=nnx.Rngs(0))
    assert f.deterministic is False and f(X, deterministic=True) is X and (f(X) == 0).any()
    name = layer.__name__
    with pytest.raises(ValueError, match=f"^{name}: deterministic must be passed, got None"):
        layer(0.5, deterministic=None, rngs=nnx.Rngs(0))(X)
    assert layer(0.5, deterministic=None)(X, deterministic=True) is X
    with pytest.raises(TypeError, match=f"^{name}: deterministic must be a bool, got 1"):
        layer(0.5)(X, deterministic=1)
    with pytest.raises(ValueError, match=f"^{name}: rate must lie in"):  # even if nothing would be dropped
        layer(1.5, deterministic=True)(X)


class Pair(nnx.Module):
    def __init__(self, rngs):
        self.drop, self.path = Dropout(0.5, rngs=rngs), DropPath(0.5, rngs=rngs)

    def __call__(self, x):
        return self.path(self.drop(x))


def test_modes_of_a_model():
    model = Pair(nnx.Rngs(0))
    model.eval()
    assert model(X) is X and model.drop.deterministic and model.path.deterministic
    model.train()
    assert (model(X) == 0).any()
    view = nnx.view(model, deterministic=True)
    assert view(X) is X and not model.drop.deterministic
    model.drop.set_view(deterministic=True)
    assert model.drop.deterministic
    model.set_attributes(nnx.Dropout, deterministic=False)
    assert not model.drop.deterministic and not model.path.deterministic


# ------------------------------------------------------------------------------------ streams


@LAYERS
def test_no_source_of_keys(layer):
    assert layer(0.0)(X) is X and not layer(1.0)(X).any()
    name = layer.__name__
    with pytest.raises(ValueError, match=f"^{name}: rngs must be nnx.Rngs, a stream or a key, got None"):
        layer(0.5)(X)
    with pytest.raises(TypeError, match=f"^{name}: rngs must be nnx.Rngs, a stream or a key, got 3"):
        layer(0.5)(X, rngs=3)
    with pytest.raises(TypeError, match="rngs must be a Rngs, RngStream or None"):
        layer(0.5, rngs=3)


SOURCES = {
    "rngs": lambda: nnx.Rngs(dropout=5),
    "rngs with another stream": lambda: nnx.Rngs(5, params=6),
    "stream": lambda: nnx.Rngs(7).noise,
}


@pytest.mark.parametrize("source", SOURCES)
def test_streams_are_forked_and_advance_as_in_nnx(source):
    """Three masks from the constructor's stream, then three from the call's."""
    draws = []
    for dropout in (nnx.Dropout, Ours):
        layer = dropout(0.5, rngs=SOURCES[source]())
        call = SOURCES[source]()
        assert isinstance(layer.rngs, nnx.RngStream)
        draws.append([layer(X) for _ in range(3)] + [layer(X, rngs=call) for _ in range(3)] + [layer(X)])
    for a, b in zip(*draws):
        np.testing.assert_array_equal(a, b)
    masks = {bytes(np.asarray(y != 0)) for y in draws[1]}
    assert len(masks) == 7 if source != "stream" else len(masks) >= 4


def test_no_key_is_used_if_nothing_is_random():
    for dropout in (nnx.Dropout, Ours):
        for rate, count in ((0.0, 0), (1.0, 0), (0.5, 1)):
            layer = dropout(rate, rngs=nnx.Rngs(0))
            layer(X), layer(X, deterministic=True)
            assert layer.rngs.count[...] == count


def test_rngs_of_the_call_take_precedence():
    layer = Ours(0.5, rngs=nnx.Rngs(0))
    y = layer(X, rngs=KEY)
    assert layer.rngs.count[...] == 0
    np.testing.assert_array_equal(y, nnx.Dropout(0.5)(X, rngs=KEY))
    other = Ours(0.5, rng_collection="noise")
    theirs = nnx.Dropout(0.5, rng_collection="noise")
    np.testing.assert_array_equal(other(X, rngs=nnx.Rngs(noise=4)), theirs(X, rngs=nnx.Rngs(noise=4)))


# ------------------------------------------------------------------------------------ a model


class Block(nnx.Module):
    """A residual block that returns its output and its masks."""

    def __init__(self, dropout, rngs):
        self.up, self.down = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)
        self.hidden, self.out = dropout(0.3, rngs=rngs), dropout(0.1, broadcast_dims=(-1,), rngs=rngs)

    def __call__(self, x):
        h = self.hidden(nnx.gelu(self.up(x)))
        y = self.out(self.down(h))
        return x + y, (h != 0, y != 0)


class Net(nnx.Module):
    def __init__(self, dropout, form, rngs):
        self.form, self.head = form, nnx.Linear(16, 1, rngs=rngs)
        if form == "scan":

            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def stack(rngs):
                return Block(dropout, rngs)

            self.blocks = stack(rngs)
        else:
            self.blocks = nnx.List([Block(dropout, rngs) for _ in range(2)])

    def __call__(self, x):
        if self.form == "scan":

            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=(nnx.Carry, 0))
            def run(block, x):
                return block(x)

            x, masks = run(self.blocks, x)
        else:
            masks = []
            for block in self.blocks:
                x, kept = nnx.remat(lambda block, x: block(x))(block, x) if self.form == "remat" else block(x)
                masks.append(kept)
        return self.head(x), masks


FORMS = ["loop", "remat", "scan"]


def loss_of(model, x, target):
    y, masks = model(x)
    return ((y - target) ** 2).mean(), (y, masks)


@pytest.mark.parametrize("form", FORMS)
def test_masks_and_gradients_of_a_model(form):
    """In two steps with different masks, after split, merge, and clone, and without dropout in evaluation."""
    models = [Net(d, form, nnx.Rngs(0)) for d in (nnx.Dropout, Ours)]
    step = nnx.jit(nnx.value_and_grad(loss_of, has_aux=True))
    first, second = ([step(model, *peers.data()) for model in models] for _ in range(2))
    peers.same_step(*first)
    peers.same_step(*second)
    masks = [jax.tree.leaves(result[0][1][1]) for result in (first[1], second[1])]
    assert any((a != b).any() for a, b in zip(*masks))
    models = [nnx.clone(nnx.merge(*nnx.split(model))) for model in models]
    peers.same_step(*(step(model, *peers.data()) for model in models))
    for model in models:
        model.eval()
        assert all(m.deterministic for _, m in nnx.iter_modules(model) if isinstance(m, nnx.Dropout))
    evaluate = nnx.jit(lambda model, x: model(x)[0])
    np.testing.assert_allclose(*(evaluate(model, peers.data()[0]) for model in models), rtol=1e-6)


def test_masks_of_a_model_without_jit():
    results = [loss_of(Net(d, "remat", nnx.Rngs(0)), *peers.data()) for d in (nnx.Dropout, Ours)]
    peers.same_step(*((result, {}) for result in results))


@pytest.mark.examples
def test_training():
    x, target = peers.data()

    def run(dropout, steps=100):
        model = Net(dropout, "loop", nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            (value, _), grads = nnx.value_and_grad(loss_of, has_aux=True)(model, x, target)
            optimizer.update(model, grads)
            return value

        losses = [step(model, optimizer) for _ in range(steps // 2)]
        model = nnx.merge(*nnx.split(model))
        losses += [step(model, optimizer) for _ in range(steps - len(losses))]
        return np.asarray(losses)

    peers.same_run(run(nnx.Dropout), run(Ours))


def test_a_traced_rate():
    @nnx.jit
    def kept(layer, rate):
        layer.rate = rate
        return (layer(X) != 0).mean()

    few, many = (kept(Dropout(0.5, rngs=nnx.Rngs(0)), jnp.float32(rate)) for rate in (0.9, 0.1))
    assert few < many / 3
