"""What every member of the family keeps, and a table of who does not and why.

An exemption has to be real: where a member is exempt, the check must fail.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from members import COLLECTIVES, MEMBERS, SHAPE, UNBATCHED

import jdrop

KEY = jax.random.key(5)
X = jnp.asarray(((np.arange(np.prod(SHAPE)) % 61 - 29.5) / 16).astype(np.float32).reshape(SHAPE))
CHECKS = {}
BY_CHANNEL = {  # decisions along channels are independent too
    "dropout",
    "alpha_dropout",
    "gaussian_dropout",
    "gaussian_noise",
    "channel_dropout",
    "drop_connect",
    "locked_dropout",
    "zoneout",
    "multi_sample_dropout",
}
EXEMPT = {
    ("identity", "dot_product_attention"): "evaluation attends",
    ("complex", "dot_product_attention"): "a softmax is of real numbers",
    ("contained", "dot_product_attention"): "what is dropped is a probability, not an element of x",
    (
        "residuals",
        "dot_product_attention",
    ): "queries, keys and values stay, as without dropout: counted in test_attention",
    ("identity", "stochastic_depth"): "evaluation adds the branch",
    ("identity", "token_dropout"): "the test makes new ids",
    ("identity", "zoneout"): "evaluation gives the expectation",
    ("identity", "bias_dropout_add"): "evaluation adds bias and residual",
    ("dtypes", "token_dropout"): "integers stay integers",
    ("dtypes", "patch_dropout"): "the number of tokens is what changes",
    ("complex", "alpha_dropout"): "SELU is real",
    ("complex", "gaussian_noise"): "real noise on complex numbers has no agreed meaning",
    ("complex", "token_dropout"): "integers stay integers",
    ("complex", "patch_dropout"): "the number of tokens is what changes",
    ("traced", "patch_dropout"): "the rate sets a shape",
    ("traced at one", "patch_dropout"): "the rate sets a shape",
    ("traced at one", "gaussian_dropout"): "the variance is infinite: clipped just below",
    ("traced at one", "gaussian_noise"): "a standard deviation is no rate",
    ("traced at one", "stochastic_depth"): "x stays where the branch is dropped",
    ("traced at one", "token_dropout"): "tokens are replaced by an id",
    ("traced at one", "zoneout"): "the old state stays",
    ("traced at one", "bias_dropout_add"): "the residual stays",
    ("contained", "gaussian_dropout"): "nothing is dropped",
    ("contained", "gaussian_noise"): "nothing is dropped",
    ("contained", "alpha_dropout"): "a dropped slot has the value of the limit; its gradient is tested beside",
    ("contained", "stochastic_depth"): "x stays where the branch is dropped",
    ("contained", "token_dropout"): "integers hold no NaN",
    ("contained", "patch_dropout"): "what is dropped is not there",
    ("contained", "zoneout"): "the old state stays; its gradient is tested beside",
    ("contained", "multi_sample_dropout"): "a mean over masks",
    ("contained", "bias_dropout_add"): "the residual stays",
    ("derivatives", "token_dropout"): "integers have no derivative",
    ("residuals", "stochastic_depth"): "the branch keeps what its own derivative needs",
    ("residuals", "token_dropout"): "integers have no derivative",
    ("residuals", "patch_dropout"): "the indices of the kept tokens stay",
    ("residuals", "embedding_dropout of ids"): "the ids stay, which the embedding's own gradient needs too",
    ("tiles", "token_dropout"): "the test makes ids of a tile: a test in test_tokens",
    ("tiles", "embedding_dropout of ids"): "the test makes ids of a tile: a test in test_weights",
    ("meshes", "token_dropout"): "integers have no derivative: a test in test_tokens",
    ("jax generator", "gaussian_dropout"): "noise, no mask",
    ("jax generator", "gaussian_noise"): "noise, no mask",
    ("jax generator", "patch_dropout"): "an order, no mask",
}


FAILS_WITH = {  # how a check fails that a member is exempt from, where it is not by an assertion
    ("complex", "dot_product_attention"): TypeError,
    ("complex", "alpha_dropout"): TypeError,
    ("complex", "gaussian_noise"): TypeError,
    ("traced", "patch_dropout"): TypeError,
    ("traced at one", "patch_dropout"): TypeError,
    ("residuals", "token_dropout"): ValueError,
    ("meshes", "token_dropout"): IndexError,
    ("jax generator", "gaussian_dropout"): TypeError,
    ("jax generator", "gaussian_noise"): TypeError,
    ("jax generator", "patch_dropout"): TypeError,
}
ROUNDED = {
    "dot_product_attention": "matrix products round as shapes want it: sums of 40 and of 6 terms, each eps at most"
}


def check(f):
    CHECKS[f.__name__.replace("_", " ")] = f
    return f


def train(name, **options):
    return lambda key, x, rate: MEMBERS[name](key, x, rate, train=True, **options)


def same(a, b, name=None):
    """Bit for bit, or up to rounding."""
    if name in ROUNDED:
        np.testing.assert_allclose(a, b, rtol=0, atol=64 * np.finfo(np.float32).eps * float(jnp.abs(b).max()))
    else:
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@check
def jit(name):
    for rate in (0.1, 0.3, 0.5, 0.9):
        same(jax.jit(lambda k, x, r=rate: train(name)(k, x, r))(KEY, X), train(name)(KEY, X, rate), name)
        off = lambda x, r=rate: MEMBERS[name](None, x, r, train=False)
        same(jax.jit(off)(X), off(X), name)


@check
def vmap(name):
    for impl in ("threefry2x32", "rbg"):
        keys = jax.vmap(lambda i, impl=impl: jdrop.keys.derive(jax.random.key(0, impl=impl), i))(jnp.arange(8))
        f = UNBATCHED.get(name, MEMBERS[name])
        one = lambda k, x, f=f: f(k, x, 0.5, train=True)
        same(jax.vmap(one)(keys, X), jnp.stack([one(k, x) for k, x in zip(keys, X, strict=True)]), name)
    f = train(name)
    same(jax.vmap(lambda k: f(k, X, 0.5))(keys[:2])[1], f(keys[1], X, 0.5), name)
    last = jax.vmap(lambda k, x: f(k, x, 0.5), in_axes=(0, -1), out_axes=-1)(keys[:3], jnp.stack([X, 2 * X, 3 * X], -1))
    same(last[..., 2], f(keys[2], 3 * X, 0.5), name)


@check
def dtypes(name):
    with jax.enable_x64(True):
        for dtype in ("float16", "bfloat16", "float32", "float64"):
            x = X.astype(dtype)
            for rate in (0.5, jnp.float32(0.5), jnp.bfloat16(0.5), np.float64(0.5)):
                y = train(name)(KEY, x, float(rate) if name == "patch_dropout" else rate)
                assert (y.dtype, y.shape) == (x.dtype, x.shape)


def complex_(name):
    x = X.astype("complex64") * (1 - 2j)
    y = train(name)(KEY, x, 0.5)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)


CHECKS["complex"] = complex_


@check
def identity(name):
    assert MEMBERS[name](None, X, 0.5, train=False) is X
    assert MEMBERS[name](None, X, 0.0, train=True) is X


@check
def traced(name):
    traces = []

    @jax.jit
    def f(x, rate):
        traces.append(1)
        return train(name)(KEY, x, rate)

    same(f(X, 0.0), MEMBERS[name](None, X, 0.0, train=True))
    same(f(X, -1.0), f(X, 0.0))
    np.testing.assert_allclose(f(X, 0.3), train(name)(KEY, X, 0.3), rtol=1e-6, atol=1e-6)
    assert bool(jnp.any(f(X, 0.0) != f(X, 0.6))), "the rate is used"
    if not jnp.issubdtype(f(X, 0.3).dtype, jnp.integer):
        assert bool(jnp.all(jnp.isnan(f(X, jnp.nan))))
    assert len(traces) == 1
    gradient = jax.grad(lambda r: jnp.sum(f(X, r).astype("float32")))(0.3)
    assert gradient == 0, "no gradient flows to the rate"


@check
def traced_at_one(name):
    f = jax.jit(train(name))
    for rate in (1.0, 1.5):
        y, pull = jax.vjp(functools.partial(f, KEY, rate=rate), X)
        same(y, jnp.zeros_like(X))
        same(pull(y)[0], jnp.zeros_like(X))
    same(train(name)(KEY, X, 1.0), jnp.zeros_like(X))


@check
def contained(name):
    """NaN and Inf do not leak out of dropped slots, and the gradient is exactly 0 there."""
    plain = train(name)(KEY, jnp.ones_like(X), 0.5)
    dropped = plain == 0
    assert 0.2 < float(dropped.mean()) < 0.8
    for bad in (jnp.nan, jnp.inf):
        y, pull = jax.vjp(lambda x: train(name)(KEY, x, 0.5), jnp.where(dropped, bad, X))
        same(y, train(name)(KEY, jnp.where(dropped, 0, X), 0.5))
        same(pull(jnp.where(dropped, bad, X))[0], train(name)(KEY, jnp.where(dropped, 0, X), 0.5))


@check
def derivatives(name):
    """Forward and reverse mode agree, twice."""
    t, c = jnp.cos(X), jnp.sin(3 * X)
    f = lambda x: train(name)(KEY, x, 0.4)
    y, forward = jax.jvp(f, (X,), (t,))
    same(y, f(X))
    c = c[:, : y.shape[1]]
    backward = jax.vjp(f, X)[1](c)[0]
    assert float(jnp.abs(backward).max()) > 0
    np.testing.assert_allclose(jnp.vdot(forward, c), jnp.vdot(t, backward), rtol=1e-4)
    slope = (f(X + 1e-2 * t) - f(X - 1e-2 * t)) / 2e-2
    np.testing.assert_allclose(forward, slope, rtol=1e-2, atol=1e-2)
    g = jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))
    np.testing.assert_allclose(
        jnp.vdot(t, jax.grad(lambda x: jnp.vdot(g(x), t))(X)), jnp.vdot(t, jax.jvp(g, (X,), (t,))[1]), rtol=1e-3
    )


@check
def residuals(name):
    """The backward pass is given seeds and rates: no mask, no noise; nor does a scan stack them."""
    pull = jax.vjp(lambda x: train(name)(KEY, x, 0.5), X)[1]
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pull) if hasattr(leaf, "nbytes")) <= 40

    def loss(x):
        keys = jax.vmap(lambda i: jdrop.keys.derive(KEY, i))(jnp.arange(5))
        return jax.lax.scan(lambda x, k: (jnp.sum(x) * 0 + train(name)(k, x, 0.5), None), x, keys)[0].sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(X))
    stacked = set(re.findall(rf"\w+\[5,{','.join(map(str, SHAPE))}\]", text))
    assert not stacked, stacked


@check
def key_use(name):
    with jax.debug_key_reuse(True):
        f = train(name)
        key = jax.random.key(1)
        f(key, X, 0.5)
        with pytest.raises(jax.errors.KeyReuseError):
            f(key, X, 0.5)
        step = jax.jit(jax.grad(lambda x, k: jnp.sum(f(k, x, 0.5).astype("float32"))))
        key = jax.random.key(2)
        step(X, key)
        with pytest.raises(jax.errors.KeyReuseError):
            step(X, key)
        key = jax.random.key(3)
        MEMBERS[name](key, X, 0.5, train=False)
        MEMBERS[name](key, X, 0.0, train=True)
        f(key, X, 0.5)


def over(devices, kind):
    return jax.make_mesh((devices,), ("data",), axis_types=(kind,), devices=jax.devices()[:devices])


def stays_apart(compiled, shapes, devices):
    """Require that each device works at its part alone: no collective, and no buffer of these unsharded shapes."""
    text = compiled.as_text()
    assert not re.search(COLLECTIVES, text)
    for shape in shapes:
        assert (f"[{','.join(map(str, shape))}]" in text) == (devices == 1), "a buffer of the unsharded size"


@check
def tiles(name, devices=8):
    """In shard_map with ``shard=``: the single-device result, no collective, no unsharded buffer."""
    mesh = over(devices, AxisType.Auto)
    f = jax.shard_map(
        lambda k, x: train(name, shard=P("data"))(k, x, 0.5), mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
    )
    expected = train(name)(KEY, X, 0.5)
    arguments = jax.device_put(KEY, NamedSharding(mesh, P())), jax.device_put(X, NamedSharding(mesh, P("data")))
    compiled = jax.jit(f).lower(*arguments).compile()
    same(compiled(*arguments), expected, name)
    stays_apart(compiled, [expected.shape], devices)
    with pytest.raises(ValueError, match=r"key must vary over the manual mesh axes"):
        g = jax.shard_map(
            lambda k, x: train(name)(k, x, 0.5), mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
        )
        jax.jit(g)(KEY, X)


@check
def meshes(name, devices=8):
    """On auto and explicit meshes: the single-device bits, no collective, no unsharded buffer, forward and backward."""

    def step(k, x):
        y, pull = jax.vjp(lambda x: train(name)(k, x, 0.5), x)
        return y, pull(y)[0]

    whole = jax.jit(step)(KEY, X)
    for kind, axis in itertools.product((AxisType.Auto, AxisType.Explicit), (0, 3) if name in BY_CHANNEL else (0,)):
        mesh = over(devices, kind)
        with jax.set_mesh(mesh):
            x = jax.device_put(X, NamedSharding(mesh, P(*[None] * axis, "data")))
            key = jax.device_put(KEY, NamedSharding(mesh, P()))
            compiled = jax.jit(step).lower(key, x).compile()
            placed = compiled(key, x)
            for got, want in zip(placed, whole, strict=True):
                same(got, want, name)
                assert devices == 1 or got.sharding.spec[axis] == "data"
            stays_apart(compiled, {one.shape for one in whole}, devices)


@check
def platforms(name):
    """Forward and backward lower for a GPU and a TPU, on a machine without one."""

    def step(k, x):
        return jax.grad(lambda x: jnp.sum(train(name)(k, x, 0.5).astype("float32")))(x)

    lowered = jax.jit(step).trace(KEY, X).lower(lowering_platforms=("cuda", "tpu"))
    assert "stablehlo" in lowered.as_text()


@check
def jax_generator(name):
    y = train(name, generator="jax")(KEY, X, 0.5)
    assert y.shape == train(name)(KEY, X, 0.5).shape
    assert bool(jnp.any(y != train(name)(KEY, X, 0.5)))


@check
def generator_names(name):
    with pytest.raises((ValueError, TypeError), match="generator"):
        train(name, generator="torch")(KEY, X, 0.5)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("what", CHECKS)
def test_members_keep_the_rules(what, name):
    if (what, name) in EXEMPT:
        with pytest.raises(FAILS_WITH.get((what, name), AssertionError)):
            CHECKS[what](name)
    else:
        CHECKS[what](name)


@pytest.mark.long
@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("what", ["tiles", "meshes"])
def test_members_on_fewer_devices(what, name, devices):
    if (what, name) not in EXEMPT:
        CHECKS[what](name, devices)


def test_exemptions_name_checks_and_members():
    assert {what for what, _ in EXEMPT} <= set(CHECKS) and {name for _, name in EXEMPT} <= set(MEMBERS)


@pytest.mark.parametrize("name", MEMBERS)
def test_clean_numbers_pass_debug_nans(name):
    """No NaN is made on the way, not even eagerly; in evaluation neither."""
    with jax.debug_nans(True):
        train(name)(KEY, X, 0.5)
        MEMBERS[name](None, X, 0.5, train=False)
