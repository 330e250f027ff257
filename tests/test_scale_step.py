"""A train step: the same masks on any mesh, microbatch, and checkpoint policy, without communication."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from members import COLLECTIVES

import jdrop
from jdrop.keys import derive, per_example

KEY = jax.random.key(31)
B, T, W, N = 16, 24, 40, 4  # batch, time, width, heads: no other array has the shape of a mask
KINDS = ["auto", "explicit", "shard_map"]
POLICIES = {
    "dots saved": jax.checkpoint_policies.dots_saveable,
    "nothing saved": jax.checkpoint_policies.nothing_saveable,
    "everything saved": jax.checkpoint_policies.everything_saveable,
}
rng = np.random.default_rng(0)
SIZES = {"qkv": (3, W, N, W // N), "out": (N, W // N, W), "up": (W, 3 * W), "down": (3 * W, W), "bias": (W,)}
PARAMS = {name: rng.normal(0, 0.2, size) for name, size in SIZES.items()}
X = rng.normal(0, 1, (B, T, W))
PROBE = np.zeros((B, T, N, T)), np.broadcast_to(np.eye(T)[:, None], (B, T, N, T))
MASKS = [f"[{B},{T},{W}]", f"[{B},{T},{3 * W}]", f"[{B},{N},{T},{T}]"]  # as in compiled text


def dropouts(key, train, shard=None):
    """Return the dropouts of a model by name."""
    o = dict(train=train, shard=shard)
    k = lambda *path: derive(key, *path) if train else None
    return {
        "in": lambda x: jdrop.locked_dropout(k("in"), x, 0.1, time_axis=1, **o),
        "attention": lambda q, k_, v: jdrop.dot_product_attention(k("attention"), q, k_, v, 0.1, **o),
        "path": lambda x: jdrop.drop_path(k("path"), x, 0.2, **o),
        "up": lambda x: jdrop.alpha_dropout(k("up"), x, 0.1, **o),
        "channel": lambda x: jdrop.channel_dropout(k("channel"), x, 0.1, **o),
        "add": lambda x, bias, old: jdrop.bias_dropout_add(k("add"), x, 0.1, bias, old, **o),
    }


def loss_fn(params, x, drop):
    x = drop["in"](x)
    q, k, v = (jnp.einsum("btw,wnh->btnh", x, params["qkv"][i]) for i in range(3))
    x = x + drop["path"](jnp.einsum("btnh,nhw->btw", drop["attention"](q, k, v), params["out"]))
    h = drop["channel"](drop["up"](jax.nn.selu(jnp.einsum("btw,wu->btu", x, params["up"]))))
    return jnp.mean(drop["add"](jnp.einsum("btu,uw->btw", h, params["down"]), params["bias"], x) ** 2)


def masks_of(drop, x, zeros, eye):
    """Return the mask of each dropout of ones; equal scores and identity values show the mask of attention."""
    ones = jnp.ones_like(x)
    wide = jnp.concatenate([ones] * 3, axis=-1)
    masks = {name: drop[name](ones) != 0 for name in ("in", "path")}
    masks |= {name: drop[name](wide) for name in ("up", "channel")}
    masks["add"] = drop["add"](ones, jnp.zeros(W), jnp.zeros_like(x)) != 0
    return masks | {"attention": drop["attention"](zeros, zeros, eye) != 0}


def on_mesh(kind, devices, train):
    """Return a mesh, the shardings of batch and weights, the step, and its masks."""
    axis = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(axis,), devices=jax.devices()[:devices])
    batch, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    if kind != "shard_map":
        step = lambda params, x: jax.value_and_grad(loss_fn)(params, x, dropouts(KEY, train))
        return mesh, batch, replicated, step, lambda x, *probe: masks_of(dropouts(KEY, train), x, *probe)

    def step(params, x):
        one = lambda params, x: jax.lax.pmean(loss_fn(params, x, dropouts(KEY, train, P("data"))), "data")
        return jax.value_and_grad(jax.shard_map(one, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))(params, x)

    each = lambda x, *probe: masks_of(dropouts(KEY, train, P("data")), x, *probe)
    return mesh, batch, replicated, step, jax.shard_map(each, mesh=mesh, in_specs=(P("data"),) * 3, out_specs=P("data"))


def assert_equal_up_to_rounding(results, expected):
    """A sum of n terms in any order has an error of at most n eps, relative to the sum of their sizes.

    In float64, if the sums behind one number have fewer than 10^5 terms, whose sizes add up to less than 100 times the
    largest result, the error is below 100 x 10^5 x 2.2e-16 = 2.2e-9. One wrong decision changes a gradient by about
    1 / (B T) = 2.6e-3 of its size.
    """
    for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=0, atol=2.2e-9 * np.abs(b).max())


@pytest.fixture(scope="module")
def single_device():
    """Return loss, gradients, and masks of the step on one device, without a mesh."""
    drop = dropouts(KEY, True)
    with jax.enable_x64(True):
        loss, grads = jax.jit(lambda p, x: jax.value_and_grad(loss_fn)(p, x, drop))(PARAMS, X)
        return loss, grads, jax.jit(lambda *a: masks_of(drop, *a))(X, *PROBE)


COMPILED = [("auto", 1), *((kind, 8) for kind in KINDS)]
LONG = [(kind, n) for n, kind in zip((4, 2, 1), KINDS, strict=True)]


@pytest.mark.parametrize(
    ("kind", "devices"),
    [pytest.param(*one, marks=pytest.mark.compiled) for one in COMPILED]
    + [pytest.param(*one, marks=pytest.mark.long) for one in LONG],
)
def test_step_over_a_mesh(kind, devices, single_device, x64):
    text = {}
    for train in (False, True):
        mesh, batch, replicated, step, masks = on_mesh(kind, devices, train)
        with jax.set_mesh(mesh):
            params, x = jax.device_put(PARAMS, replicated), jax.device_put(X, batch)
            compiled = jax.jit(step).lower(params, x).compile()
            text[train] = compiled.as_text()
            if train:
                loss, grads = compiled(params, x)
                mesh_masks = jax.jit(masks)(x, *jax.device_put(PROBE, batch))
    for name, mask in mesh_masks.items():
        np.testing.assert_array_equal(mask, single_device[2][name], name)
    assert_equal_up_to_rounding((loss, grads), single_device[:2])
    dropped, plain = (Counter(re.findall(rf"\b{COLLECTIVES}(?:-start)?\(", text[train])) for train in (True, False))
    assert dropped == plain, "a collective that the program without dropout lacks"
    assert plain.total() or devices == 1, "gradients are summed over devices, so there is something to count"
    for shape in MASKS:
        assert (shape in text[True]) == (devices == 1), f"a buffer {shape} of the unsharded size"


# ---------------------------------------------------------------------------------- microbatches and checkpoints

IDS = jnp.asarray(rng.permutation(1000)[:B])
STEP = 7


def by_example(params, x, ids, policy="no checkpoint", keys=per_example):
    """Return the mean loss and the masks, with one key per example."""

    def one(key, x, zeros, eye):
        drop = dropouts(key, True)
        masks = masks_of(drop, x[None], zeros[None], eye[None])
        loss = lambda params, x: loss_fn(params, x[None], drop)
        loss = loss if policy == "no checkpoint" else jax.checkpoint(loss, policy=POLICIES[policy])
        return loss(params, x), masks

    probe = [p[: len(x)] for p in PROBE]
    losses, masks = jax.vmap(one)(keys(derive(KEY, "dropout", STEP), ids), x, *probe)
    return losses.mean(), masks


def accumulated(parts, policy):
    """Return the gradients of weights and inputs, and the masks, of a step in microbatches."""
    step = jax.jit(jax.grad(lambda p, x, i: by_example(p, x, i, policy), argnums=(0, 1), has_aux=True))
    steps = [step(PARAMS, x, ids) for x, ids in zip(np.split(X, parts), jnp.split(IDS, parts), strict=True)]
    by_params = jax.tree.map(lambda *g: sum(g) / parts, *[grads[0] for grads, _ in steps])
    by_inputs = jnp.concatenate([grads[1] for grads, _ in steps]) / parts
    return by_params, by_inputs, jax.tree.map(lambda *m: jnp.concatenate(m), *[masks for _, masks in steps])


@pytest.fixture(scope="module")
def at_once():
    with jax.enable_x64(True):
        return accumulated(1, "no checkpoint")


@pytest.mark.parametrize(
    ("parts", "policy"),
    [
        (4, "no checkpoint"),
        (2, "dots saved"),
        (2, "nothing saved"),
        pytest.param(2, "no checkpoint", marks=pytest.mark.long),
        pytest.param(2, "everything saved", marks=pytest.mark.long),
    ],
)
def test_microbatches_and_checkpoint_policies(parts, policy, at_once, x64):
    by_params, by_inputs, masks = accumulated(parts, policy)
    jax.tree.map(np.testing.assert_array_equal, masks, at_once[2])
    np.testing.assert_array_equal(by_inputs == 0, at_once[1] == 0)  # shows the masks of the backward pass
    assert 0.05 < float(jnp.mean(at_once[1] == 0)) < 0.15
    assert_equal_up_to_rounding((by_params, by_inputs), at_once[:2])


def test_keys_by_position_in_a_microbatch_would_be_noticed(x64):
    by_position = lambda key, ids: per_example(key, jnp.arange(len(ids)))
    masks = jax.jit(lambda x, ids: by_example(PARAMS, x, ids, keys=by_position)[1]["in"])
    parts = [masks(x, ids) for x, ids in zip(np.split(X, 2), jnp.split(IDS, 2), strict=True)]
    assert (np.asarray(masks(X, IDS)) != np.concatenate(parts)).any()
