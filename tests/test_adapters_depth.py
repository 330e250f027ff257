"""Stochastic depth of every library, around a branch with BatchNorm and dropout: state, keys, and skipped work."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
from jax.extend.core import jaxprs_in_params

import jdrop

X = jax.random.normal(jax.random.key(1), [8, 4])
KEYS = [jax.random.key(i) for i in range(10)]
LIBRARIES = pytest.mark.parametrize("library", peers.ADAPTERS)
pytestmark = pytest.mark.usefixtures("usual_promotion")

# ------------------------------------------------------------------------------------ one interface to all libraries
# Each returns (params, state), made in training mode, and the pure function
# (params, state, key, x, rate, train) -> (y, state), whose key is that of the decision. The branch reports its runs.


def linen_model(runs=None, rate=0.5):
    from flax import linen

    from jdrop.adapters.linen import StochasticDepth

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            report(runs)
            x = linen.BatchNorm(use_running_average=not train)(linen.Dense(4)(x))
            return linen.Dropout(0.5, deterministic=not train)(x)

    layer = lambda rate: StochasticDepth(Block(), rate)
    rngs = lambda i: {"params": jax.random.key(i), "dropout": jax.random.key(i + 1)}
    start = dict(layer(rate).init(rngs(0), X, True, deterministic=False))

    def f(params, state, key, x, rate, train):
        options = {"deterministic": not train, "rng": key, "rngs": {"dropout": jdrop.keys.derive(key, "others")}}
        y, new = layer(rate).apply({"params": params, **state}, x, train, mutable=["batch_stats"], **options)
        return y, dict(new)

    return start.pop("params"), start, f


def nnx_model(runs=None, rate=0.5):
    from flax import nnx

    from jdrop.adapters.nnx import StochasticDepth

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            report(runs)
            return self.drop(self.norm(self.dense(x)))

    layer = StochasticDepth(Block(nnx.Rngs(0)), rate)
    structure, params, state = nnx.split(layer, nnx.Param, ...)

    def f(params, state, key, x, rate, train):
        layer = nnx.merge(structure, params, state, copy=True)
        layer.train() if train else layer.eval()
        layer.rate = nnx.data(rate) if isinstance(rate, jax.Array) else rate
        y = layer(x, rngs=key)
        layer.rate = nnx.static(0.5)
        return y, nnx.split(layer, nnx.Param, ...)[2]

    return params, state, f


def equinox_model(runs=None, rate=0.5):
    import equinox

    from jdrop.adapters.equinox import StochasticDepth

    class Block(equinox.Module):
        dense: equinox.nn.Linear
        norm: equinox.nn.BatchNorm
        drop: equinox.nn.Dropout

        def __init__(self):
            self.dense = equinox.nn.Linear(4, 4, key=jax.random.key(0))
            self.norm, self.drop = equinox.nn.BatchNorm(4, "batch", mode="batch"), equinox.nn.Dropout(0.5)

        def __call__(self, x, state, *, key):
            report(runs)
            x, state = self.norm(self.dense(x), state)
            return self.drop(x, key=key), state

    layer, state = equinox.nn.make_with_state(lambda: StochasticDepth(Block(), rate))()
    params, static = equinox.partition(layer, equinox.is_inexact_array)

    def f(params, state, key, x, rate, train):
        layer = equinox.tree_at(lambda layer: layer.p, equinox.combine(params, static), rate)
        layer = equinox.nn.inference_mode(layer, not train)
        keys = jax.random.split(jdrop.keys.derive(key, "branch"), len(x))
        call = lambda x, state, key, branch_key: layer(x, state, key=key, branch_key=branch_key)
        mapped = jax.vmap(call, axis_name="batch", in_axes=(0, None, None, 0), out_axes=(0, None))
        state = jax.tree.map(lambda leaf: leaf, state)  # Equinox refuses a state that was used before
        return mapped(x, state, key, keys)

    return params, state, f


def haiku_model(runs=None, rate=0.5):
    import haiku

    from jdrop.adapters.haiku import stochastic_depth

    def net(key, x, rate, train):
        linear, norm = haiku.Linear(4), haiku.BatchNorm(True, True, 0.9)

        def branch(x):
            report(runs)
            y = norm(linear(x), is_training=train)
            return haiku.dropout(haiku.next_rng_key(), 0.5, y) if train else y

        return stochastic_depth(key, rate, x, branch) if train else x + branch(x)

    model = haiku.transform_with_state(net)
    words = jax.random.PRNGKey(0)
    params, state = model.init(words, words, X, rate, True)

    def f(params, state, key, x, rate, train):
        rng = jax.random.key_data(jdrop.keys.derive(key, "others")) if train else None
        return model.apply(params, state, rng, key, x, rate, train)

    return params, state, f


def report(runs):
    if runs is not None:
        jax.debug.callback(lambda: runs.append(1))


def model_of(library, **options):
    peers.require(peers.ADAPTERS[library])
    return globals()[f"{library}_model"](**options)


def kept(key, rate=0.5):
    return bool(jdrop.stochastic_depth(key, jnp.float32(1), rate, lambda x: x, train=True) != 1)


def differs(a, b):
    words = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return any((words(p) != words(q)).any() for p, q in zip(*map(jax.tree.leaves, (a, b)), strict=True))


# ------------------------------------------------------------------------------------ state and work


@LIBRARIES
def test_state_changes_and_the_branch_runs_only_where_it_is_kept(library):
    """With the bits of jdrop.stochastic_depth, under jit."""
    runs = []
    params, state, f = model_of(library, runs=runs)
    step = jax.jit(functools.partial(f, train=True))
    decisions = [kept(key) for key in KEYS]
    assert 2 < sum(decisions) < 8
    for key, decision in zip(KEYS, decisions):
        runs.clear()
        y, new = step(params, state, key, X, jnp.float32(0.5))
        jax.effects_barrier()
        assert len(runs) == decision
        assert differs(state, new) == (y != X).any() == decision
        if not decision:
            np.testing.assert_array_equal(y, X)
    assert step._cache_size() == 1


def equations(jaxpr, name):
    """The equations of a primitive that always run: not those inside another cond."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation
        if equation.primitive.name != "cond":
            for inner in jaxprs_in_params(equation.params):
                yield from equations(inner, name)


@LIBRARIES
def test_the_work_is_inside_the_conditional(library):
    """In the gradient too: the layer has its matrix products in one branch of a cond, and none outside."""
    params, state, f = model_of(library)
    loss = lambda params, x: (f(params, state, KEYS[0], x, jnp.float32(0.5), True)[0] ** 2).sum()
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, X).jaxpr
    assert not list(equations(jaxpr, "dot_general"))
    products = [
        [len(list(equations(branch.jaxpr, "dot_general"))) for branch in equation.params["branches"]]
        for equation in equations(jaxpr, "cond")
    ]
    forward, backward = [numbers for numbers in products if any(numbers)]
    assert forward == [0, 1] and backward == [0, 2]


@LIBRARIES
@pytest.mark.compiled
def test_the_conditional_is_in_the_compiled_program(library):
    params, state, f = model_of(library)
    step = jax.jit(functools.partial(f, train=True))
    text = step.lower(params, state, KEYS[0], X, jnp.float32(0.5)).compile().as_text()
    assert re.search(r" conditional\(", text)


@LIBRARIES
def test_gradients(library):
    """Those of the branch, scaled; and none where it is skipped."""
    params, state, f = model_of(library)
    loss = lambda params, x, key, rate: (f(params, state, key, x, rate, True)[0] ** 2).sum()
    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 3)))
    for key in KEYS[:5]:
        of_params, of_x, of_rate = grads(params, X, key, jnp.float32(0.5))
        assert any(leaf.any() for leaf in jax.tree.leaves(of_params)) == kept(key)
        assert of_rate == 0 and all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(of_params))
        if not kept(key):
            np.testing.assert_array_equal(of_x, 2 * X)


@LIBRARIES
@pytest.mark.parametrize("rate", [0.5, 0.0, 1.0])
def test_initialization_in_training_mode_makes_everything(library, rate):
    params, state, f = model_of(library, rate=rate)
    assert sorted(leaf.size for leaf in jax.tree.leaves(params)) == [4, 4, 4, 16]
    assert [leaf.size for leaf in jax.tree.leaves(state)].count(4) == (4 if library == "haiku" else 2)  # and averages
    f(params, state, KEYS[0], X, 0.5, True)


@LIBRARIES
def test_evaluation_adds_the_branch_and_changes_no_state(library):
    params, state, f = model_of(library)
    y, new = jax.jit(functools.partial(f, key=KEYS[0], train=False, rate=0.5))(params, state, x=X)
    assert (y != X).all() and not differs(strip(state), strip(new))
    again, _ = f(params, state, KEYS[1], X, 0.9, False)
    np.testing.assert_allclose(y, again, rtol=1e-5, atol=1e-6)


def strip(state):
    """The statistics only: nnx keeps counts of keys in its state."""
    return [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]


@LIBRARIES
def test_eager_as_under_jit(library):
    params, state, f = model_of(library)
    for key in KEYS[:4]:
        eager, compiled = (
            f(params, state, key, X, 0.5, True),
            jax.jit(f, static_argnums=(4, 5))(params, state, key, X, 0.5, True),
        )
        np.testing.assert_array_equal(eager[0] == X, compiled[0] == X)  # the mask of the dropout in the branch
        for a, b in zip(*map(jax.tree.leaves, (eager, compiled)), strict=True):
            if jnp.issubdtype(a.dtype, jnp.floating):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@LIBRARIES
def test_rates_0_and_1_need_no_key(library):
    for rate in (0, 1):
        np.testing.assert_allclose(layer_of(library, jnp.sin, rate)(None, X), X + (1 - rate) * jnp.sin(X), rtol=1e-6)
    params, state, f = model_of(library)
    y, new = f(params, state, KEYS[0], X, 1.0, True)
    np.testing.assert_array_equal(y, X)
    assert not differs(state, new)
    y, new = f(params, state, KEYS[0], X, 0.0, True)
    assert differs(state, new)


@LIBRARIES
def test_vmap_over_keys_is_a_loop(library):
    """The conditional becomes a select."""
    params, state, f = model_of(library)
    ys, news = jax.vmap(lambda key: f(params, state, key, X, jnp.float32(0.5), True))(jnp.stack(KEYS))
    for i, key in enumerate(KEYS):
        y, _ = jax.jit(f, static_argnums=5)(params, state, key, X, jnp.float32(0.5), True)
        np.testing.assert_allclose(ys[i], y, rtol=1e-5, atol=1e-5)
        assert differs(state, jax.tree.map(lambda leaf, i=i: leaf[i], news)) == kept(key)


# ------------------------------------------------------------------------------------ values


def layer_of(library, branch, rate, **options):
    """``(key, x) -> y`` for a branch without state."""
    module = peers.adapter(library)
    if library == "linen":
        return lambda key, x: module.StochasticDepth(branch, rate, False, **options).apply({}, x, rng=key)
    if library == "nnx":
        return lambda key, x: module.StochasticDepth(branch, rate, **options)(x, rngs=key)
    if library == "equinox":
        pure = lambda x, *, key: branch(x)
        return lambda key, x: module.StochasticDepth(pure, rate, **options)(x, key=key)
    haiku = peers.require("haiku")
    f = haiku.transform(lambda key, x: module.stochastic_depth(key, rate, x, branch, **options))
    return lambda key, x: f.apply({}, jax.random.PRNGKey(0), key, x)


@LIBRARIES
@pytest.mark.parametrize("generator", ["fast", "jax"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_of_jdrop(library, generator, dtype):
    x = X.astype(dtype)
    for rate in (0.3, np.float32(0.3), jnp.float32(0.3), 0):
        layer = layer_of(library, jnp.sin, rate, generator=generator)
        options = {"train": True, "generator": generator}
        jdrops = lambda key, x, rate=rate, options=options: jdrop.stochastic_depth(key, x, rate, jnp.sin, **options)
        for key in KEYS[:4]:
            np.testing.assert_array_equal(jax.jit(layer)(key, x), jax.jit(jdrops)(key, x))
            np.testing.assert_array_equal(layer(key, x) == x, jdrops(key, x) == x)


@LIBRARIES
def test_a_key_is_used_up(library):
    layer, key = layer_of(library, jnp.sin, 0.5), jax.random.key(5)
    with jax.debug_key_reuse(True):
        layer(key, X)
        with pytest.raises(jax.errors.KeyReuseError):
            layer(key, X)


@LIBRARIES
def test_in_shard_map_all_tiles_share_one_decision(library):
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("d")
    for key in KEYS[:3]:
        run = lambda shard, key=key: jax.jit(
            jax.shard_map(
                lambda x: layer_of(library, jnp.sin, 0.5, shard=shard)(key, x), mesh=mesh, in_specs=spec, out_specs=spec
            )
        )(X)
        np.testing.assert_array_equal(run(spec), jdrop.stochastic_depth(key, X, 0.5, jnp.sin, train=True))
        with pytest.raises(ValueError, match=r"must vary over the manual mesh axes .* give the layer shard="):
            run(None)


@LIBRARIES
def test_errors(library):
    name = "stochastic_depth" if library == "haiku" else "StochasticDepth"
    data, rate = ("inputs" if library in ("linen", "nnx") else "x"), ("p" if library == "equinox" else "rate")
    cases = [
        (layer_of(library, lambda x: x[:, :2], 0.0), KEYS[0], X, "branch must return float32[8,4], like x"),
        (layer_of(library, 3, 0.5), KEYS[0], X, "branch must be a module or a function, got 3"),
        (layer_of(library, jnp.sin, 1.5), KEYS[0], X, f"{rate} must lie in [0, 1]"),
        (layer_of(library, jnp.sin, jnp.ones(4)), KEYS[0], X, f"{rate} must broadcast to the mask's shape ()"),
        (layer_of(library, jnp.sin, 0.5), KEYS[0], jnp.arange(3), f"{data} must be float8"),
        (layer_of(library, jnp.sin, 0.5, generator="x"), KEYS[0], X, "generator must be"),
        (layer_of(library, jnp.sin, 0.5), None, X, ""),
        (layer_of(library, jnp.sin, 0.5), jnp.stack(KEYS), X, ""),
    ]
    for f, key, x, text in cases:
        if library == "equinox" and "3" in text[-2:]:
            f = lambda key, x: peers.adapter("equinox").StochasticDepth(3, 0.5)(x, key=key)
        with pytest.raises(Exception, match="^" + re.escape(f"{name}: {text}")):
            f(key, x)
