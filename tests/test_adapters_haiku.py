"""Haiku: keys, transforms and training with jdrop's functions, compared with Haiku's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest

haiku = peers.require("haiku", whole_file=True)
dropout, drop_path = peers.adapter("haiku").dropout, peers.adapter("haiku").drop_path
KEY = jax.random.PRNGKey(37)
X = jnp.linspace(1, 2, 8 * 32).reshape(8, 32)
ours = functools.partial(dropout, generator="jax")
FUNCTIONS = pytest.mark.parametrize("function", [dropout, drop_path], ids=["dropout", "drop_path"])
pytestmark = pytest.mark.usefixtures("usual_promotion")


@FUNCTIONS
def test_no_key(function):
    assert function(None, 0.0, X) is X
    for rng in (None, 3):
        with pytest.raises(TypeError, match=f"^{function.__name__}: rng must be a PRNG key, got {rng}"):
            function(rng, 0.5, X)
    with pytest.raises(ValueError, match="PRNGKey"):  # Haiku's own error: apply got no rng
        f = haiku.transform(lambda x: function(haiku.next_rng_key(), 0.5, x))
        f.apply({}, None, X)


def test_arguments_have_the_positions_of_haiku():
    np.testing.assert_array_equal(ours(KEY, 0.5, X, (1,)) != 0, haiku.dropout(KEY, 0.5, X, (1,)) != 0)
    by_name = dropout(rng=KEY, rate=0.5, x=X, broadcast_dims=[1])
    np.testing.assert_array_equal(by_name, dropout(KEY, 0.5, X, [1]))


# ------------------------------------------------------------------------------------ a model


def block(drop, x):
    """A residual block that returns its output and its masks."""
    h = drop(haiku.next_rng_key(), 0.3, jax.nn.gelu(haiku.Linear(32)(x)))
    y = drop(haiku.next_rng_key(), 0.1, haiku.Linear(16)(h), (1,))
    return x + y, (h != 0, y != 0)


def net(drop, form):
    def forward(x):
        if form == "scan":  # haiku.scan threads Haiku's state, including the rng
            w = haiku.get_parameter("w", [3, 16, 16], init=haiku.initializers.VarianceScaling())

            def layer(x, w):
                y = drop(haiku.next_rng_key(), 0.3, jnp.tanh(x @ w))
                return x + y, y != 0

            x, masks = haiku.scan(layer, x, w)
        else:
            masks = []
            for _ in range(2):
                f = functools.partial(block, drop)
                x, kept = haiku.remat(f)(x) if form == "remat" else f(x)
                masks.append(kept)
        return haiku.Linear(1)(x), masks

    return haiku.transform(forward)


FORMS = ["loop", "remat", "scan"]


@functools.cache
def params_of(form):
    return jax.jit(net(haiku.dropout, form).init)(jax.random.PRNGKey(0), peers.data()[0])


def loss_of(drop, form):
    """``(params, key) -> (loss, (y, masks))``."""
    x, target = peers.data()

    def loss(params, key):
        y, masks = net(drop, form).apply(params, key, x)
        return ((y - target) ** 2).mean(), (y, masks)

    return loss


@pytest.mark.parametrize("form", FORMS)
def test_masks_and_gradients_of_a_model(form):
    steps = [jax.jit(jax.value_and_grad(loss_of(drop, form), has_aux=True)) for drop in (haiku.dropout, ours)]
    results = [step(params_of(form), KEY) for step in steps]
    peers.same_step(*results)
    other = jax.jit(loss_of(dropout, form))(params_of(form), KEY)[1][1]
    assert any((p != q).any() for p, q in zip(*map(jax.tree.leaves, (results[1][0][1][1], other))))


@pytest.mark.examples
def test_training():
    def run(drop):
        loss = loss_of(drop, "loop")
        step = lambda params, i: loss(params, jax.random.fold_in(KEY, i))[0]
        return peers.train(step, params_of("loop"))

    peers.same_run(run(haiku.dropout), run(ours))
