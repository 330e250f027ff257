"""Stochastic depth in each library's own style: keys inside the branch, scans over layers, flags, forms of a branch."""

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest

import jdrop

X = jax.random.normal(jax.random.key(1), [8, 4])
KEYS = [jax.random.key(i) for i in range(10)]
pytestmark = pytest.mark.usefixtures("usual_promotion")


def kept(key, rate=0.5):
    return bool(jdrop.stochastic_depth(key, jnp.float32(1), rate, lambda x: x, train=True) != 1)


def words(key):
    return tuple(np.ravel(jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key).tolist())


# ------------------------------------------------------------------------------------ linen


def test_linen_scan_over_layers_with_a_rate_per_layer():
    linen, depth = peers.require("flax.linen"), peers.adapter("linen").StochasticDepth

    class Branch(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.BatchNorm(use_running_average=False)(linen.Dense(4)(x))
            return linen.Dropout(0.5, deterministic=False)(x)

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, rate):
            return depth(Branch(), rate, deterministic=False)(x), None

    stack = linen.scan(
        Layer,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True, "dropout": True},
        length=4,
    )()
    rates = jnp.array([0.0, 1.0, 0.0, 1.0])
    variables = stack.init({"params": KEYS[0], "dropout": KEYS[1]}, X, rates)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(variables)} == {4}

    def loss(params, rates):
        rest = {"batch_stats": variables["batch_stats"]}
        (y, _), new = stack.apply(
            {"params": params} | rest, X, rates, rngs={"dropout": KEYS[2]}, mutable=["batch_stats"]
        )
        return (y**2).sum(), new["batch_stats"]

    grads, new = jax.jit(jax.grad(loss, has_aux=True))(variables["params"], rates)
    (before,), (after,) = ([*tree.values()] for tree in (variables["batch_stats"], new))
    changed = [any((p[i] != q[i]).any() for p, q in zip(*map(jax.tree.leaves, (before, after)))) for i in range(4)]
    assert changed == [True, False, True, False]
    moved = [any(leaf[i].any() for leaf in jax.tree.leaves(grads)) for i in range(4)]
    assert moved == [True, False, True, False]
    same = jax.jit(lambda p: loss(p, jnp.full(4, 0.5))[1])(variables["params"])
    (after,) = same.values()
    decided = {tuple((p != q).any(axis=1).tolist()) for p, q in zip(*map(jax.tree.leaves, (before, after)))}
    assert len(decided) == 1  # all statistics of a layer agree


def test_linen_branch_that_is_a_function():
    linen, depth = peers.require("flax.linen"), peers.adapter("linen").StochasticDepth
    layer = depth(lambda x: linen.BatchNorm(use_running_average=False)(linen.Dense(4)(x)), 0.5, deterministic=False)
    variables = layer.init(KEYS[0], X)
    for key in KEYS[:4]:
        y, new = jax.jit(lambda v, key: layer.apply(v, X, rng=key, mutable=["batch_stats"]))(variables, key)
        means = [tree["batch_stats"]["BatchNorm_0"]["mean"] for tree in (variables, new)]
        assert (means[0] != means[1]).any() == (y != X).any() == kept(key)


def test_linen_flags_rngs_and_intermediates():
    linen, depth = peers.require("flax.linen"), peers.adapter("linen").StochasticDepth
    errors = peers.require("flax.errors")
    layer = depth(linen.Dense(4), 0.5)
    variables = layer.init(KEYS[0], X, deterministic=False)
    with pytest.raises(ValueError, match='Parameter "deterministic"'):
        layer.apply(variables, X)
    with pytest.raises(
        TypeError, match=r"^StochasticDepth: deterministic must be static, got a traced value; pass rate="
    ):
        jax.jit(lambda d: layer.apply(variables, X, deterministic=d))(True)
    with pytest.raises(errors.InvalidRngError, match=r"^StochasticDepth: rngs must have a key for"):
        layer.apply(variables, X, deterministic=False)
    noise = depth(linen.Dense(4), 0.5, False, "noise")
    f = jax.jit(lambda key: noise.apply(variables, X, rngs={"noise": key}, capture_intermediates=True)[0])
    assert len({bool((f(key) == X).all()) for key in KEYS}) == 2  # capturing does not break the conditional


def test_linen_masks_in_the_branch_are_those_without_the_layer():
    """linen.cond hands the branch the keys that it has by itself, and they differ from that of the decision."""
    linen, depth = peers.require("flax.linen"), peers.adapter("linen").StochasticDepth
    seen = []

    class Branch(linen.Module):
        @linen.compact
        def __call__(self, x):
            key = self.make_rng("dropout")
            jax.debug.callback(lambda w: seen.append(tuple(w.tolist())), jax.random.key_data(key))
            return x

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return depth(Branch(), jnp.float32(1e-30), deterministic=False)(x), self.make_rng("dropout")

    for run in (Net().apply, jax.jit(Net().apply)):
        _, after = run({}, X, rngs={"dropout": KEYS[0]})
        jax.effects_barrier()
        assert words(after) not in seen
    assert len(seen) == 2 and seen[0] == seen[1]


# ------------------------------------------------------------------------------------ nnx


def nnx_branch(rngs):
    nnx = peers.require("flax.nnx")
    return nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))


def test_nnx_training_with_streams():
    """nnx.jit, nnx.grad and the layer's own stream: each step decides anew, and the state follows the decision."""
    nnx, depth = peers.require("flax.nnx"), peers.adapter("nnx").StochasticDepth
    layer = depth(nnx_branch(nnx.Rngs(0)), 0.5, rngs=nnx.Rngs(7))
    norm, drop = layer.branch.layers[1], layer.branch.layers[2]

    @nnx.jit
    def step(layer):
        loss = lambda layer: (layer(X) ** 2).sum()
        return nnx.grad(loss)(layer)

    decisions = []
    for i in range(10):
        mean, count = norm.mean[...], int(drop.rngs.count[...])
        grads = step(layer)
        ran = bool((norm.mean[...] != mean).any())
        assert int(drop.rngs.count[...]) == count + ran and int(layer.rngs.count[...]) == i + 1
        assert ran == any(leaf.any() for leaf in jax.tree.leaves(grads))
        decisions.append(ran)
    assert len(set(decisions)) == 2
    stream = nnx.Rngs(7).dropout.fork()
    assert decisions == [kept(stream()) for _ in range(10)]


def test_nnx_modes():
    nnx, depth = peers.require("flax.nnx"), peers.adapter("nnx").StochasticDepth
    layer = depth(nnx_branch(nnx.Rngs(0)), 0.5)
    layer.eval()
    assert layer.deterministic and layer.branch.layers[1].use_running_average and layer.branch.layers[2].deterministic
    np.testing.assert_array_equal(layer(X), X + layer.branch(X))
    layer.train()
    with pytest.raises(
        ValueError, match=r"^StochasticDepth: rngs must be nnx.Rngs, a stream or a key, got None; pass rngs="
    ):
        layer(X)
    with pytest.raises(ValueError, match=r"^StochasticDepth: deterministic must be passed"):
        depth(jnp.sin, 0.5, deterministic=None)(X)


def test_nnx_rngs_of_the_call_also_reach_a_branch_that_takes_them():
    nnx, depth = peers.require("flax.nnx"), peers.adapter("nnx").StochasticDepth
    for layer in (depth(nnx.Dropout(0.5), 0.5), depth(jnp.sin, 0.5)):
        f = nnx.jit(lambda layer, rngs: layer(X, rngs=rngs))
        for seed in range(6):
            rngs = nnx.Rngs(dropout=seed)
            y = f(layer, rngs)
            ran = bool((y != X).any())
            assert int(rngs.dropout.count[...]) == 1 + (ran and isinstance(layer.branch, nnx.Dropout))
            assert ran == kept(nnx.Rngs(dropout=seed).dropout())


def test_nnx_scan_over_layers_with_a_rate_per_layer():
    nnx, depth = peers.require("flax.nnx"), peers.adapter("nnx").StochasticDepth

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stack(rngs):
        return nnx_branch(rngs), rngs.fork()

    branches, rngs = stack(nnx.Rngs(0))
    mean = branches.layers[1].mean[...]

    @nnx.jit
    @nnx.scan(in_axes=(0, 0, 0, nnx.Carry), out_axes=nnx.Carry)
    def run(branch, rngs, rate, x):
        return depth(branch, rate)(x, rngs=rngs)

    run(branches, rngs, jnp.array([0.0, 1.0, 0.0]), X)
    np.testing.assert_array_equal((branches.layers[1].mean[...] != mean).any(axis=1), [True, False, True])


# ------------------------------------------------------------------------------------ Equinox


def test_equinox_keys_of_the_branch():
    """Derived from that of the decision if none is passed, and never that of the decision."""
    depth, seen = peers.adapter("equinox").StochasticDepth, []

    def branch(x, *, key):
        seen.append(key)
        return x

    depth(branch, 1e-30)(X, key=KEYS[0])
    depth(branch, 1e-30)(X, key=KEYS[0], branch_key=KEYS[1])
    depth(branch, inference=True)(X)
    depth(branch, 0)(X, key=KEYS[0])
    derived = jdrop.keys.derive(KEYS[0], "StochasticDepth")
    assert seen[0] == derived != KEYS[0] and seen[1] == KEYS[1] and seen[2] is None and seen[3] == derived
    with pytest.raises(RuntimeError, match=r"^StochasticDepth: key must be a PRNG key when something is dropped"):
        depth(branch)(X, branch_key=KEYS[1])


def test_equinox_in_a_sequence_and_the_old_state():
    eqx, depth = peers.require("equinox"), peers.adapter("equinox").StochasticDepth
    make = lambda: eqx.nn.Sequential(
        [depth(eqx.nn.BatchNorm(4, "b", mode="batch"), 0.5), depth(eqx.nn.Identity(), 0.5)]
    )
    model, state = eqx.nn.make_with_state(make)()
    assert [layer.is_stateful() for layer in model.layers] == [True, False]

    @eqx.filter_jit
    def f(model, state, key):
        run = lambda x: model(x, state, key=key)
        y, new = jax.vmap(run, axis_name="b", out_axes=(0, None))(X)
        return y, new

    decisions = set()
    for key in KEYS:
        _, new = f(model, jax.tree.map(lambda leaf: leaf, state), key)
        count = new.get(model.layers[0].branch.batch_counter)
        assert count == kept(jax.random.split(key)[0])
        decisions.add(int(count))
    assert decisions == {0, 1}

    @eqx.filter_jit
    def twice(layer, state, x, key):
        y, _ = layer(x, state, key=key)
        return layer(y, state, key=key)

    with pytest.raises(ValueError, match="Attempted to use old state"):
        jax.vmap(lambda x: twice(model.layers[0], state, x, KEYS[0]), axis_name="b", out_axes=(0, None))(X)


def test_equinox_flags_and_a_stack_of_layers():
    eqx, depth = peers.require("equinox"), peers.adapter("equinox").StochasticDepth
    linear = lambda key: eqx.nn.Sequential([eqx.nn.Linear(4, 4, key=key), eqx.nn.Dropout(0.5)])
    layer = eqx.nn.inference_mode(depth(linear(KEYS[0]), 0.5))
    assert layer.inference and layer.branch.layers[1].inference
    np.testing.assert_allclose(layer(X[0]), X[0] + layer.branch.layers[0](X[0]), rtol=1e-6)
    layers = eqx.filter_vmap(lambda key, p: depth(linear(key), p))(jnp.stack(KEYS[:3]), jnp.array([0.0, 1.0, 0.0]))
    arrays, rest = eqx.partition(layers, eqx.is_array)

    @jax.jit
    def run(arrays, x):
        body = lambda x, at: ((y := eqx.combine(at[0], rest)(x, key=at[1])), (y != x).any())
        return jax.lax.scan(body, x, (arrays, jnp.stack(KEYS[3:6])))

    np.testing.assert_array_equal(run(arrays, X[0])[1], [True, False, True])


# ------------------------------------------------------------------------------------ Haiku


@pytest.mark.parametrize("reserved", [1, 4])
def test_haiku_keys_before_in_and_after_the_branch_differ(reserved):
    """And are the same in eager mode as under jit."""
    haiku, depth = peers.require("haiku"), peers.adapter("haiku").stochastic_depth
    ran = []

    def branch(x):
        jax.debug.callback(lambda w: ran.append(tuple(w.tolist())), haiku.next_rng_key())
        return x

    def net(x):
        keys = [haiku.next_rng_key() for _ in range(2)]
        y = depth(keys[1], 0.5, x, branch)
        return y, keys + [haiku.next_rng_key() for _ in range(6)]

    seen = {}
    for apply in (haiku.transform(net).apply, jax.jit(haiku.transform(net).apply)):
        for seed in range(6):
            with haiku.config.context(rng_reserve_size=reserved):
                y, keys = apply({}, jax.random.PRNGKey(seed), X)
            assert bool((y != X).any()) == kept(keys[1])
            assert seen.setdefault(seed, keys) is keys or all(map(np.array_equal, seen[seed], keys))
        jax.effects_barrier()
    used = {words(key) for keys in seen.values() for key in keys}
    assert len(used) == 48 and 0 < len(set(ran)) < 6 and ran == 2 * ran[: len(ran) // 2] and not used & {*ran}


def test_haiku_needs_a_transform():
    depth = peers.adapter("haiku").stochastic_depth
    peers.require("haiku")
    with pytest.raises(ValueError, match=r"hk\.transform"):
        depth(KEYS[0], 0.5, X, jnp.sin)
