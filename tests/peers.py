"""Other libraries in the tests: required or not, one calling convention for all, and training runs to compare."""

import importlib
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

PACKAGES = {"flax": "flax", "equinox": "equinox", "haiku": "dm-haiku", "keras": "keras", "torch": "torch"}
ADAPTERS = {"linen": "flax", "nnx": "flax", "equinox": "equinox", "haiku": "haiku"}  # the package of each


def require(name, *, whole_file=False):
    """Import a module of a library. If it is missing, skip the test, or fail it if the library is required.

    ``JDROP_PEERS`` lists the required libraries, separated by commas; ``required`` means all.
    """
    _find(name, whole_file)
    return importlib.import_module(name)


def require_file(library, path):
    """Like :func:`require`, but import one file: timm's layers need only torch, the package also torchvision."""
    file = os.path.join(_find(library).submodule_search_locations[0], path)
    spec = importlib.util.spec_from_file_location(f"{library}_{os.path.basename(path)[:-3]}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _find(name, whole_file=False):
    library = name.split(".")[0]
    spec = importlib.util.find_spec(library)
    if spec is None:
        if {library, "required"} & set(os.environ.get("JDROP_PEERS", "").split(",")):
            pytest.fail(f"{name} is required here and is not installed")
        pytest.skip(f"{name} is not installed", allow_module_level=whole_file)
    return spec


def adapter(library):
    require(ADAPTERS[library])
    return importlib.import_module(f"jdrop.adapters.{library}")


def theirs(library):
    """Return the library's own dropout as ``(key, x, rate, dims) -> y``, which draws from ``key`` directly."""
    if library == "haiku":
        haiku = require("haiku")
        return lambda key, x, rate, dims=(): haiku.dropout(key, rate, x, *[dims] * bool(dims))
    return _layer(library, require({"equinox": "equinox.nn"}.get(library, f"flax.{library}")).Dropout)


def ours(library, name="Dropout", **options):
    """Return a layer of an adapter, like :func:`theirs`; keyword arguments go to its constructor."""
    module = adapter(library)
    if library == "haiku":
        f = {"Dropout": module.dropout, "DropPath": module.drop_path}[name]
        return lambda key, x, rate, dims=(): f(key, rate, x, *[dims] * bool(dims), **options)
    return _layer(library, getattr(module, name), **options)


def _layer(library, layer, **options):
    dims = lambda dims: options | ({"broadcast_dims": dims} if dims else {})
    return {
        "linen": lambda key, x, rate, d=(): layer(rate, deterministic=False, **dims(d)).apply({}, x, rng=key),
        "nnx": lambda key, x, rate, d=(): layer(rate, **dims(d))(x, rngs=key),
        "equinox": lambda key, x, rate: layer(rate, **options)(x, key=key),
    }[library]


def data(n=64, width=16):
    """Return inputs and targets of a small regression."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((n, width)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(np.sin(x.sum(1, keepdims=True)))


def train(loss, params, steps=100):
    """Return the losses of a training run with Adam; ``loss(params, step)`` draws a new mask at every step."""
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, i):
        value, grads = jax.value_and_grad(loss)(params, i)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for i in range(steps):
        params, state, value = step(params, state, jnp.int32(i))
        losses.append(value)
    return np.asarray(losses)


def same_step(a, b):
    """Require ``((loss, (y, masks)), gradients)`` of two steps to have equal masks, and to agree up to rounding."""
    (loss_a, (y_a, masks_a)), grads_a = a
    (loss_b, (y_b, masks_b)), grads_b = b
    for first, second in zip(jax.tree.leaves(masks_a), jax.tree.leaves(masks_b), strict=True):
        np.testing.assert_array_equal(first, second)
    for first, second in zip(*map(jax.tree.leaves, ((loss_a, y_a, grads_a), (loss_b, y_b, grads_b))), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)


def same_run(a, b):
    """Require the losses of two runs to fall, and to differ only by rounding: at most one unit per step."""
    assert a[-1] < 0.8 * a[0]
    np.testing.assert_allclose(a, b, rtol=len(a) * np.finfo(np.float32).eps)
