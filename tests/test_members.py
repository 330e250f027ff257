"""Rules of all members of the family; ``members.py`` lists the exemptions and their reasons.

Exemptions are tested too: where a member is exempt, the check must fail in the way that the table says.
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
from members import (
    COLLECTIVES,
    DROPPED_IS_ZERO,
    HAS_SLOPE,
    MEMBERS,
    NO_COLLECTIVE,
    NOT_STACKED,
    NOTHING_LEAKS,
    ON_ONE_DEVICE,
    SAME_TYPE,
    SEED_AND_RATE,
    SHAPE,
    X_ITSELF,
    ZERO_AT_ONE,
)

import jdrop

KEY = jax.random.key(5)
X = jnp.asarray(((np.arange(np.prod(SHAPE)) % 61 - 29.5) / 16).astype(np.float32).reshape(SHAPE))
CHECKS = {}
COMPILATIONS = []


def on_event(event, seconds, **details):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILATIONS.append(seconds)


jax.monitoring.register_event_duration_secs_listener(on_event)


def check(f):
    CHECKS[f.__name__.strip("_").replace("_", " ")] = f
    return f


def train(name, **options):
    return lambda key, x, rate: MEMBERS[name](key, x, rate, train=True, **options)


def same(a, b, claim, name=None):
    """Require equality bit for bit, or up to rounding if the member may round differently."""
    a, b = np.asarray(a), np.asarray(b)
    if name and MEMBERS[name].rounds:
        atol = 64 * np.finfo(np.float32).eps * float(np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=claim)
    else:
        np.testing.assert_array_equal(a, b, err_msg=claim)


@check
def jit(name):
    """At two rates that are constants of the program; in ``traced``, rates are operands."""
    for rate in (0.3, 0.9):
        same(jax.jit(lambda k, x, r=rate: train(name)(k, x, r))(KEY, X), train(name)(KEY, X, rate), "eager bits", name)
    off = lambda x: MEMBERS[name](None, x, 0.3, train=False)
    same(jax.jit(off)(X), off(X), "eager bits in evaluation", name)
    counts = []
    for key in list(jax.random.split(KEY, 16)):
        train(name)(key, X, 0.3), off(X)
        counts.append(len(COMPILATIONS))
    assert counts[7] == counts[-1], "eager calls compile once"  # by then a branch was kept, and skipped


@functools.cache
def derived(n, impl="threefry2x32"):
    """Keys of a loop over n examples."""
    return jax.vmap(lambda i: jdrop.keys.derive(jax.random.key(0, impl=impl), i))(jnp.arange(n))


@check
def vmap(name):
    """Over keys and data, with keys whose bits under vmap differ from a loop; over keys only; over another axis."""
    keys = derived(8, "rbg")
    one = jax.jit(lambda k, x: (MEMBERS[name].one or MEMBERS[name])(k, x, 0.5, train=True))
    loop = np.stack([one(k, x) for k, x in zip(keys, X, strict=True)])
    same(jax.jit(jax.vmap(one))(keys, X), loop, "as a loop", name)
    keys = derived(3)
    f = jax.jit(lambda k, x: train(name)(k, x, 0.5))
    same(jax.jit(jax.vmap(f, in_axes=(0, None)))(keys, X)[1], f(keys[1], X), "as a loop over keys", name)
    last = jax.jit(jax.vmap(f, in_axes=(0, -1), out_axes=-1))(keys, np.stack([X, 2 * X, 3 * X], -1))
    same(last[..., 2], f(keys[2], 3 * X), "as a loop over the last axis", name)


@check
def dtypes(name):
    with jax.enable_x64(True):
        for dtype in ("float16", "bfloat16", "float32", "float64"):
            for rate in (0.5, jnp.float32(0.5), jnp.bfloat16(0.5), np.float64(0.5)):
                rate = float(rate) if name in ("patch_dropout", "skip_path") else rate
                y = jax.eval_shape(lambda x, r=rate: train(name)(KEY, x, r), jax.ShapeDtypeStruct(SHAPE, dtype))
                assert (y.dtype, y.shape) == (dtype, SHAPE), SAME_TYPE


@check
def complex_(name):
    x = X.astype("complex64") * (1 - 2j)
    y = train(name)(KEY, x, 0.5)
    assert (y.dtype, y.shape) == (x.dtype, x.shape), SAME_TYPE


@check
def identity(name):
    assert MEMBERS[name](None, X, 0.5, train=False) is X, X_ITSELF
    assert MEMBERS[name](None, X, 0.0, train=True) is X, "rate 0 returns x itself"


@check
def traced(name):
    traces = []

    @jax.jit
    def f(x, rate):
        traces.append(1)
        return train(name)(KEY, x, rate)

    same(f(X, 0.0), MEMBERS[name](None, X, 0.0, train=True), "nothing is dropped at rate 0")
    same(f(X, -1.0), f(X, 0.0), "rates below 0 are 0")
    for rate in (0.1, 0.3, 0.9):
        message = "eager values"
        np.testing.assert_allclose(f(X, rate), train(name)(KEY, X, rate), rtol=1e-6, atol=1e-6, err_msg=message)
    assert bool(jnp.any(f(X, 0.0) != f(X, 0.6))), "the rate is used"
    if not jnp.issubdtype(f(X, 0.3).dtype, jnp.integer):
        assert bool(jnp.all(jnp.isnan(f(X, jnp.nan)))), "a NaN rate gives NaN"
    assert len(traces) == 1, "one trace for all rates"
    gradient = jax.grad(lambda r: jnp.sum(f(X, r).astype("float32")))(0.3)
    assert gradient == 0, "no gradient flows to the rate"


@check
def traced_at_one(name):
    zero = np.zeros_like(X)
    step = jax.jit(lambda x, rate: (lambda y, pull: (y, pull(y)[0]))(*jax.vjp(lambda x: train(name)(KEY, x, rate), x)))
    for rate in (1.0, 1.5):
        y, gradient = step(X, rate)
        same(y, zero, ZERO_AT_ONE)
        same(gradient, zero, "no gradient at rate 1")
    same(train(name)(KEY, X, 1.0), zero, ZERO_AT_ONE)


@check
def contained(name):
    """NaN and Inf do not leak from dropped elements, whose gradient is exactly 0."""
    plain = train(name)(KEY, jnp.ones_like(X), 0.5)
    dropped = plain == 0
    assert 0.2 < float(dropped.mean()) < 0.8, DROPPED_IS_ZERO
    for bad in (jnp.nan, jnp.inf):
        y, pull = jax.vjp(lambda x: train(name)(KEY, x, 0.5), jnp.where(dropped, bad, X))
        clean = train(name)(KEY, jnp.where(dropped, 0, X), 0.5)
        same(y, clean, NOTHING_LEAKS)
        same(pull(jnp.where(dropped, bad, X))[0], clean, f"{NOTHING_LEAKS}, in the gradient")


@check
def derivatives(name):
    """Forward and reverse mode agree, twice."""
    t, c = jnp.cos(X), jnp.sin(3 * X)
    f = jax.jit(lambda x: train(name)(KEY, x, 0.4))
    y, forward = jax.jit(lambda x: jax.jvp(f, (x,), (t,)))(X)
    same(y, f(X), "forward mode gives the value", name)
    c = c[:, : y.shape[1]]
    backward = jax.jit(lambda x: jax.vjp(f, x)[1](c)[0])(X)
    assert float(jnp.abs(backward).max()) > 0, HAS_SLOPE
    np.testing.assert_allclose(jnp.vdot(forward, c), jnp.vdot(t, backward), rtol=1e-4)
    slope = (f(X + 1e-2 * t) - f(X - 1e-2 * t)) / 2e-2
    np.testing.assert_allclose(forward, slope, rtol=1e-2, atol=1e-2)
    g = jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))
    twice = jax.jit(lambda x: (jax.grad(lambda x: jnp.vdot(g(x), t))(x), jax.jvp(g, (x,), (t,))[1]))
    reverse, forward = twice(X)
    np.testing.assert_allclose(jnp.vdot(t, reverse), jnp.vdot(t, forward), rtol=1e-3)


@check
def taylor(name):
    """jax.experimental.jet gives the first and the second derivative along a line."""
    from jax.experimental import jet

    t = jnp.cos(X)
    f = lambda x: jnp.sin(train(name)(KEY, x, 0.4))
    _, (first, second) = jet.jet(f, (X,), ((t, jnp.zeros_like(t)),))
    assert float(jnp.abs(first).max()) > 0, HAS_SLOPE
    along = lambda s: jax.jvp(lambda s: f(X + s * t), (s,), (1.0,))[1]
    slope, bend = jax.jit(lambda s: jax.jvp(along, (s,), (1.0,)))(0.0)
    np.testing.assert_allclose(first, slope, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(second, bend, rtol=1e-3, atol=1e-3)


@check
def residuals(name):
    """The backward pass needs seeds and rates, but no mask and no noise, and a scan stacks none either."""
    pull = jax.vjp(lambda x: train(name)(KEY, x, 0.5), X)[1]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(pull) if hasattr(leaf, "nbytes"))
    assert size <= 40, SEED_AND_RATE

    def loss(x):
        keys = jax.vmap(lambda i: jdrop.keys.derive(KEY, i))(jnp.arange(5))
        return jax.lax.scan(lambda x, k: (jnp.sum(x) * 0 + train(name)(k, x, 0.5).astype(x.dtype), None), x, keys)[
            0
        ].sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(X))
    stacked = set(re.findall(rf"\w+\[5,{','.join(map(str, SHAPE))}\]", text))
    assert not stacked, NOT_STACKED


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


def require_no_communication(compiled, shapes, devices):
    """Require each device to work only on its part: no collective, and no buffer of these unsharded shapes."""
    text = compiled.as_text()
    assert not re.search(COLLECTIVES, text), NO_COLLECTIVE
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
    same(compiled(*arguments), expected, ON_ONE_DEVICE, name)
    require_no_communication(compiled, [expected.shape], devices)
    with pytest.raises(ValueError, match=r"key must vary over the manual mesh axes"):
        g = jax.shard_map(
            lambda k, x: train(name)(k, x, 0.5), mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
        )
        jax.eval_shape(g, KEY, X)


@check
def meshes(name, devices=8):
    """On auto and explicit meshes: the single-device bits, no collective, no unsharded buffer, forward and backward.

    The explicit mesh splits channels if their decisions are independent. test_sharding splits every axis on both kinds
    of mesh.
    """

    def step(k, x):
        y, pull = jax.vjp(lambda x: train(name)(k, x, 0.5), x)
        return y, pull(y)[0]

    whole = jax.jit(step)(KEY, X)
    for kind, axis in ((AxisType.Auto, 0), (AxisType.Explicit, 3 if MEMBERS[name].by_channel else 0)):
        mesh = over(devices, kind)
        with jax.set_mesh(mesh):
            x = jax.device_put(X, NamedSharding(mesh, P(*[None] * axis, "data")))
            key = jax.device_put(KEY, NamedSharding(mesh, P()))
            compiled = jax.jit(step).lower(key, x).compile()
            results = compiled(key, x)
            for got, want in zip(results, whole, strict=True):
                same(got, want, ON_ONE_DEVICE, name)
                assert devices == 1 or got.sharding.spec[axis] == "data", "the result is sharded like x"
            require_no_communication(compiled, {one.shape for one in whole}, devices)


@check
def platforms(name):
    """Forward and backward lower for a GPU and a TPU, on a machine without one."""

    def step(k, x):
        return jax.grad(lambda x: jnp.sum(train(name)(k, x, 0.5).astype("float32")))(x)

    lowered = jax.jit(step).trace(KEY, X).lower(lowering_platforms=("cuda", "tpu"))
    assert "stablehlo" in lowered.as_text()


@check
def generators(name):
    """Generators draw other bits. Other names are errors, and so is any for members without a mask."""
    if not MEMBERS[name].generator:
        with pytest.raises(TypeError, match="unexpected keyword argument 'generator'"):
            train(name, generator="jax")(KEY, X, 0.5)
        return
    y, fast = train(name, generator="jax")(KEY, X, 0.5), train(name)(KEY, X, 0.5)
    assert y.shape == fast.shape
    assert bool(jnp.any(y != fast))
    packed = train(name, generator="packed")(KEY, X, 2**-18)  # rounds to 0; others scale by 1 + 4e-6
    np.testing.assert_allclose(packed, train(name)(KEY, X, 0.0), rtol=1e-6)
    with pytest.raises(ValueError, match="generator must be"):
        train(name, generator="torch")(KEY, X, 0.5)


ROUNDS = ("derivatives", "gaussian_dropout")  # with the compiler options of the tier unit
OF_PROGRAMS = ("jit", "tiles", "meshes")  # these read or depend on the optimized program


def is_compiled(what, name):
    return [pytest.mark.compiled] * (what in OF_PROGRAMS or (what, name) == ROUNDS)


def cases(marks):
    return [
        pytest.param(what, name, marks=marks(what, name), id=f"{what}-{name}") for what in CHECKS for name in MEMBERS
    ]


@pytest.mark.parametrize(("what", "name"), cases(is_compiled))
def test_members_keep_the_rules(what, name):
    if exempt := MEMBERS[name].exempt.get(what):
        with pytest.raises(exempt.error, match=exempt.fails):
            CHECKS[what](name)
    else:
        CHECKS[what](name)


@pytest.mark.long
@pytest.mark.parametrize(("name", "devices"), list(zip(MEMBERS, itertools.cycle([1, 2, 4]))))
@pytest.mark.parametrize("what", ["tiles", "meshes"])
def test_members_on_fewer_devices(what, name, devices):
    if what not in MEMBERS[name].exempt:
        CHECKS[what](name, devices)


def test_exemptions_name_checks():
    assert {what for member in MEMBERS.values() for what in member.exempt} <= set(CHECKS)


@pytest.mark.parametrize("name", MEMBERS)
def test_clean_numbers_pass_debug_nans(name):
    """No intermediate result is NaN, eagerly or in evaluation."""
    with jax.debug_nans(True):
        train(name)(KEY, X, 0.5)
        MEMBERS[name](None, X, 0.5, train=False)
