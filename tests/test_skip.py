"""skip_path against the same mask on the whole batch; its subsets, operands, transforms, and meshes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from members import COLLECTIVES

import jdrop
from jdrop.keys import derive

KEY = jax.random.key(5)
X = jax.random.normal(jax.random.key(0), (16, 3, 6))
W = jax.random.normal(jax.random.key(1), (6, 6)) / 3


def branch(x, w=W):
    return jnp.tanh(x @ w)


def kept_of(rate, batch=16, num_shards=1):
    """Return which examples are kept, from independent words."""
    size = batch // num_shards
    kept = max(1, int(np.floor(size * (1 - rate) + 0.5)))
    words = reference.words((0, 5), (num_shards, size))
    mask = np.zeros((num_shards, size), bool)
    np.put_along_axis(mask, np.argsort(words, axis=1)[:, size - kept :], True, axis=1)
    return mask.ravel(), kept * num_shards


def close(a, b, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max()), a, b)


@pytest.mark.parametrize("rate, num_shards", [(0.5, 1), (0.4, 1), (0.25, 4), (0.9, 4), (1.0, 1)])
def test_values_and_gradients_are_those_of_the_mask_on_the_whole_batch(rate, num_shards):
    mask, kept = kept_of(rate, 16, num_shards)
    scale = jnp.asarray(mask * 16 / kept, jnp.float32)[:, None, None]
    seen = []

    def skipped(x, w):
        fn = lambda x: seen.append(x.shape) or branch(x, w)
        return jdrop.skip_path(KEY, x, rate, fn, train=True, num_shards=num_shards)

    def masked(x, w):
        return x + branch(x, w) * scale

    def derivatives(f):
        grads = jax.grad(lambda x, w: jnp.sum(jnp.sin(f(x, w))), (0, 1))(X, W)
        return f(X, W), grads, jax.jvp(f, (X, W), (jnp.cos(X), jnp.cos(W)))

    close(*(jax.jit(lambda f=f: derivatives(f))() for f in (skipped, masked)))
    assert set(seen) == {(kept, 3, 6)}
    np.testing.assert_array_equal(skipped(X, W)[~mask], X[~mask])


def test_subsets_are_uniform_and_the_result_unbiased():
    keys = jdrop.keys.per_example(KEY, jnp.arange(10_000))
    x = jnp.arange(6.0)[:, None]
    y = jax.vmap(lambda k: jdrop.skip_path(k, x, 0.5, lambda x: 1 + x, train=True))(keys)[..., 0]
    kept = np.asarray(y != x[:, 0][None])
    assert (kept.sum(1) == 3).all()
    subsets = np.unique(kept @ 2 ** np.arange(6), return_counts=True)[1]
    assert len(subsets) == 20
    assert np.abs(subsets - 500).max() < 5 * np.sqrt(500 * 0.95)
    error = (y.mean(0) - (2 * x[:, 0] + 1)) / (y.std(0) / 100)
    assert float(jnp.abs(error).max()) < 5


def test_operands_are_those_of_the_kept_examples():
    ids = jnp.arange(16)
    padding = {"mask": jnp.arange(16 * 3).reshape(16, 3) % 5 > 0}

    def fn(x, ids, padding):
        assert ids.shape == (8,) and padding["mask"].shape == (8, 3)
        return x * ids[:, None, None].astype(x.dtype) + padding["mask"][..., None].astype(x.dtype)

    y = jdrop.skip_path(KEY, X, 0.5, fn, train=True, operands=(ids, padding))
    mask, _ = kept_of(0.5)
    expected = X + 2 * (X * ids[:, None, None].astype(X.dtype) + padding["mask"][..., None].astype(X.dtype))
    close(y, jnp.where(mask[:, None, None], expected, X))


def test_dropout_inside_takes_one_key_per_example():
    ids = jdrop.keys.per_example(derive(KEY, "inner"), jnp.arange(16))
    fn = lambda x, keys: jax.vmap(lambda k, x: jdrop.dropout(k, x, 0.5, train=True))(keys, x)
    y = jdrop.skip_path(KEY, X, 0.5, fn, train=True, operands=(ids,))
    mask, _ = kept_of(0.5)
    close(y, jnp.where(mask[:, None, None], X + 2 * fn(X, ids), X))


def test_evaluation_and_a_rate_of_0_compute_the_branch_for_all():
    expected = X + branch(X)
    for y in (
        jdrop.skip_path(None, X, 0.4, branch, train=False),
        jdrop.skip_path(None, X, 0, branch, train=True),
        jdrop.skip_path(None, X, 0.4, branch, train=False, num_shards=7),
    ):
        close(y, expected)


def test_evaluation_takes_a_batch_of_any_size():
    for batch in (0, 1, 3):
        y = jdrop.skip_path(None, X[:batch], 0.4, branch, train=False, num_shards=2)
        np.testing.assert_array_equal(y, X[:batch] + branch(X[:batch]))


def test_scan_and_checkpoint_give_the_values_of_a_loop():
    layer = lambda x, i: jdrop.skip_path(derive(KEY, i), x, 0.4, branch, train=True)

    def scanned(x, f=layer):
        return jax.lax.scan(lambda x, i: (f(x, i), None), x, jnp.arange(4))[0]

    def loop(x):
        for i in range(4):
            x = layer(x, i)
        return x

    total = lambda f: jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(f(x)))))(X)
    close(total(scanned), total(loop))
    close(total(lambda x: scanned(x, jax.checkpoint(layer))), total(loop))


@pytest.mark.parametrize("data, model", [(2, 1), (8, 1), (4, 2)])
def test_tiles_of_shard_map_drop_as_many_each(data, model):
    """The shift is the same on all devices that share the batch, so its gradient is a sum over them."""
    devices = jax.devices()[: data * model]
    mesh = jax.make_mesh((data, model), ("d", "m"), axis_types=(AxisType.Auto,) * 2, devices=devices)

    def run(x, scale, shift, **options):
        fn = lambda x, scale, shift: jnp.tanh(x * scale + shift)
        return jdrop.skip_path(KEY, x, 0.5, fn, train=True, operands=(scale, shift), **options)

    def derivatives(f):
        args = X, jnp.ones_like(X), jnp.sin(X[: 16 // data])
        return jax.jit(jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(f(*args))), (0, 1, 2)))(*args)

    spec = P("d", None, "m")
    tile = lambda *args: run(*args, shard=spec)
    f = jax.shard_map(tile, mesh=mesh, in_specs=(spec, spec, P(None, None, "m")), out_specs=spec)
    whole = lambda x, scale, shift: run(x, scale, jnp.tile(shift, (data, 1, 1)), num_shards=data)
    close(derivatives(f), derivatives(whole))


@pytest.mark.compiled
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("devices", [*(pytest.param(n, marks=pytest.mark.long) for n in (1, 2, 4)), 8])
def test_a_mesh_drops_as_many_per_device_without_communication(kind, devices):
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(kind,), devices=jax.devices()[:devices])
    f = jax.jit(lambda x: jdrop.skip_path(KEY, x, 0.5, branch, train=True, num_shards=8))
    step = jax.jit(lambda x: jax.vjp(f, x)[1](jnp.sin(x))[0])
    expected = f(X), step(X)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("d", None, None)))
        programs = [g.lower(x).compile() for g in (f, step)]
        close(tuple(program(x) for program in programs), expected)
    assert not any(re.search(COLLECTIVES, program.as_text()) for program in programs)


def test_errors():
    call = lambda x=X, rate=0.5, fn=branch, **o: jdrop.skip_path(KEY, x, rate, fn, train=True, **o)
    for function, error, text in [
        (lambda: call(fn=3), TypeError, "skip_path: fn must be a function, got 3"),
        (lambda: call(x=jnp.float32(1)), ValueError, r"skip_path: x must be \[batch, ...\]"),
        (lambda: call(rate=jnp.float32(0.5)), TypeError, r"skip_path: rate must be a number, got float32\[\]"),
        (lambda: call(rate=1.5), ValueError, r"skip_path: rate must lie in \[0, 1\]"),
        (
            lambda: call(num_shards=3),
            ValueError,
            "num_shards must divide the number of examples, 16, got 3; pass 2 or 4",
        ),
        (lambda: call(operands=X), TypeError, "skip_path: operands must be a tuple, got float32"),
        (
            lambda: call(operands=(X[:3],)),
            ValueError,
            r"operands must be arrays \[batch, ...\] with the batch of x, 16",
        ),
        (lambda: call(operands=(2.0,)), ValueError, "skip_path: operands must be arrays"),
        (lambda: call(fn=lambda x: x[:, 0]), ValueError, r"skip_path: fn must return float32\[8,3,6\], like x"),
        (
            lambda: call(rate=0.01),
            ValueError,
            "rate must drop at least one of 16 examples, got 0.01; pass 0, or a larger",
        ),
        (lambda: call(rate=0.9, num_shards=16), ValueError, "at least one of 1 examples in each of 16 shards, got 0.9"),
        (lambda: call(x=X[:0]), ValueError, "skip_path: the number of examples must be at least 1, got 0"),
        (
            lambda: jax.jit(lambda t: jdrop.skip_path(KEY, X, 0.5, branch, train=t))(True),
            TypeError,
            "skip_path: train must be static, got a traced value; list",
        ),
        (lambda: call(shard=P("d")), ValueError, "skip_path: shard must name manual mesh axes"),
    ]:
        with pytest.raises(error, match=text):
            function()
