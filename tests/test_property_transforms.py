"""Members commute with the transforms of JAX: every composition of them is the plain call, example by example."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import export, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from members import MEMBERS
from strategies import axes, cases

import jdrop

pytestmark = pytest.mark.property
NOT_LINEAR = {  # or not elementwise enough to be its own transpose
    "stochastic_depth", "patch_dropout", "token_dropout", "alpha_dropout", "gaussian_noise", "bias_dropout_add",
    "zoneout", "dot_product_attention",
}  # fmt: skip
STATIC_RATE = {"patch_dropout"}
INTEGERS = {"token_dropout"}
SHAPES = ((2, 3, 2, 3), (1, 4, 5, 127), (3, 3, 2, 1), (2, 3, 8, 16), (1, 3, 2, 129), (0, 3, 2, 5))


def same(got, expected, claim, name):
    got, expected = np.asarray(got), np.asarray(expected)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), claim
    if ROUNDS.get(name):
        atol = ROUNDS[name] * np.finfo(np.float32).eps * max(1.0, float(np.abs(expected).max(initial=0.0)))
        np.testing.assert_allclose(got, expected, rtol=0, atol=atol, err_msg=claim)
    else:
        np.testing.assert_array_equal(got, expected, err_msg=claim)


# By how many eps results may differ, where a compiler is free to fuse a product and a sum, or to order a sum.
ROUNDS = {
    "dot_product_attention": 256, "multi_sample_dropout": 8, "bias_dropout_add": 4, "alpha_dropout": 8,
    "gaussian_dropout": 32, "gaussian_noise": 32, "stochastic_depth": 8,
}  # fmt: skip


def member(name, rate, generator="fast"):
    options = {"generator": generator} if MEMBERS[name].generator else {}

    def f(key, x, r):
        return MEMBERS[name](key, x, rate if name in STATIC_RATE else r, train=True, **options)

    return f


def value(f, key, x, rate):
    return f(key, x, rate)


def pull(f, key, x, rate):
    y, back = jax.vjp(lambda x: f(key, x, rate), x)
    return back(jnp.cos(y))[0]


def push(f, key, x, rate):
    return jax.jvp(lambda x: f(key, x, rate), (x,), (jnp.cos(x),))[1]


class Call(NamedTuple):
    name: str
    rate: float
    generator: str
    mode: Any
    shape: tuple[int, ...]

    def __call__(self, key, x, rate):
        return self.mode(member(self.name, self.rate, self.generator), key, x, rate)

    def key(self, draw):
        """A key of either kind; but ``jax.random`` draws other bits from rbg keys under vmap than in a loop."""
        kinds = ("threefry2x32", "rbg")[: 1 if self.generator == "jax" else 2]
        return jax.random.key(draw(st.integers(0, 99)), impl=draw(st.sampled_from(kinds)))


@st.composite
def calls(draw, names=tuple(MEMBERS), modes=(value, pull, push)):
    name = draw(st.sampled_from(names))
    rate = draw(st.sampled_from((0.5, 0.3, 0.9)))
    generator = draw(st.sampled_from(("fast", "fast", "jax")))
    mode = value if name in INTEGERS else draw(st.sampled_from(modes))
    return Call(name, rate, generator, mode, draw(st.sampled_from(SHAPES)))


class Level(NamedTuple):
    """One vmap: the axes of key, x and rate, and of the result."""

    size: int
    axes: tuple[int | None, ...]
    out: int


@st.composite
def levels(draw, ndim, most=3):
    """Levels of vmap from the outermost, and the number of axes that each operand has under all of them."""
    ranks, found = [0, ndim, 0], []
    for depth in range(draw(st.integers(1, most))):
        mapped = draw(st.lists(st.booleans(), min_size=3, max_size=3).filter(any))
        own: list[int | None] = []
        for i, is_mapped in enumerate(mapped):
            if is_mapped:
                ranks[i] += 1
                axis = draw(st.integers(0, ranks[i] - 1))
                own.append(axis - ranks[i] * (draw(st.booleans()) and i > 0))
            else:
                own.append(None)
        found.insert(0, Level(draw(st.sampled_from((2, 1, 3))), tuple(own), draw(st.integers(0, ndim + depth))))
    return found


def arguments(levels, key, shape, seed, rate):
    """Operands that have the axes of all levels."""
    shapes = [[], list(shape), []]
    for level in reversed(levels):
        for own, axis in zip(shapes, level.axes, strict=True):
            if axis is not None:
                own.insert(axis % (len(own) + 1), level.size)
    rng = np.random.default_rng(seed)
    number = int(np.prod(shapes[0]))
    keys = jax.vmap(lambda i: jdrop.keys.derive(key, i))(jnp.arange(max(number, 1)))[:number].reshape(shapes[0])
    keys = keys if shapes[0] else key
    rates = jnp.asarray((rate * rng.uniform(0.5, 1, shapes[2])).astype(np.float32))
    return keys, jnp.asarray(rng.standard_normal(shapes[1]).astype(np.float32)), rates


def mapped(f, levels):
    for level in reversed(levels):
        f = jax.vmap(f, in_axes=level.axes, out_axes=level.out)
    return f


def looped(f, levels, operands):
    if not levels:
        return np.asarray(f(*operands))
    level, results = levels[0], []
    for i in range(level.size):
        each = [
            x if axis is None else x[(slice(None),) * (axis % x.ndim) + (i,)]
            for x, axis in zip(operands, level.axes, strict=True)
        ]
        results.append(looped(f, levels[1:], each))
    return np.stack(results, axis=level.out)


@cases(10)
@given(st.data())
def test_nested_vmap_is_a_loop(data):
    """Over any of key, x and rate, along any axes, of values and derivatives, under jit or not."""
    f = data.draw(calls())
    name, rate, shape = f.name, f.rate, f.shape
    found = data.draw(levels(len(shape)))
    key = f.key(data.draw)
    operands = arguments(found, key, shape, data.draw(st.integers(0, 99)), rate)
    vmapped = mapped(f, found)
    vmapped = jax.jit(vmapped) if data.draw(st.booleans()) else vmapped
    same(vmapped(*operands), looped(f, found, operands), "vmap", name)


@cases(6)
@given(st.data())
def test_jit_checkpoint_and_eager_agree(data):
    """Under jit, ``jax.checkpoint``, ``jax.disable_jit`` and ``jax.linearize``, in a random order."""
    f = data.draw(calls(modes=(value,)))
    name, rate, shape = f.name, f.rate, f.shape
    key, r = f.key(data.draw), jnp.float32(rate)
    x = jnp.asarray(np.random.default_rng(data.draw(st.integers(0, 9))).standard_normal(shape).astype(np.float32))
    wrapped = lambda x: f(key, x, r)
    for wrap in data.draw(st.lists(st.sampled_from((jax.jit, jax.checkpoint, jax.remat)), min_size=1, max_size=3)):
        wrapped = wrap(wrapped)
    plain = lambda x: f(key, x, r)
    same(wrapped(x), plain(x), "value", name)
    with jax.disable_jit(data.draw(st.booleans())):
        same(f(key, x, r), plain(x), "without jit", name)
    if name in INTEGERS:
        return
    y, back = jax.vjp(plain, x)
    ct = jnp.cos(y)
    expected = back(ct)[0]
    same(jax.vjp(wrapped, x)[1](ct)[0], expected, "vjp", name)
    same(jax.jit(lambda x, ct: jax.vjp(wrapped, x)[1](ct)[0])(x, ct), expected, "vjp under jit", name)
    t = jnp.sin(3 * x)
    pushed = jax.jvp(plain, (x,), (t,))[1]
    same(jax.linearize(wrapped, x)[1](t), pushed, "linearize", name)
    if name not in NOT_LINEAR:
        same(pushed, plain(t), "a linear map is its own derivative", name)
        if name != "multi_sample_dropout":
            same(expected, plain(ct), "and its own transpose", name)
    # <ct, J t> = <J' ct, t>, in float64
    a, b = (np.asarray(v, np.float64) for v in (expected, pushed))
    left, right = (a * np.asarray(t, np.float64)).sum(), (b * np.asarray(ct, np.float64)).sum()
    size = (abs(a) * abs(np.asarray(t))).sum() + (abs(b) * abs(np.asarray(ct))).sum()
    assert abs(left - right) <= 1e-5 * size + 1e-6, "forward and reverse mode"


@cases(4)
@given(st.data())
def test_scan_over_keys_is_a_loop(data):
    """With a derivative through it, rematerialized or not; no step has the mask of another."""
    f = data.draw(calls(tuple(n for n in MEMBERS if n not in STATIC_RATE), modes=(value,)))
    name, rate, shape = f.name, f.rate, f.shape
    key, number = f.key(data.draw), data.draw(st.integers(1, 4))
    keys = jax.vmap(lambda i: jdrop.keys.derive(key, "step", i))(jnp.arange(number))
    x = jnp.asarray(np.random.default_rng(data.draw(st.integers(0, 9))).standard_normal(shape).astype(np.float32))
    rates = jnp.linspace(0.1, rate, number).astype(jnp.float32)
    remat, by_index = data.draw(st.booleans()), data.draw(st.booleans())
    body = jax.checkpoint(lambda *operands: f(*operands)) if remat else f

    def scanned(x):
        def step(carry, at):
            own, r, i = at
            own = jdrop.keys.derive(key, "step", i) if by_index else own
            y = body(own, x, r)
            return carry + y, y

        return lax.scan(
            step,
            jnp.zeros_like(x if name not in INTEGERS else f(key, x, jnp.float32(0.5))),
            (keys, rates, jnp.arange(number)),
        )

    loop = lambda x: jnp.stack([f(keys[i], x, rates[i]) for i in range(number)])
    _, stacked = scanned(x)
    same(stacked, loop(x), "scan", name)
    if name in INTEGERS:
        return
    y, back = jax.vjp(loop, x)
    ct = jnp.cos(y)
    expected, got = back(ct)[0], jax.vjp(lambda x: scanned(x)[1], x)[1](ct)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4, err_msg="the gradient, a sum over steps")


EXPORTED = (
    "dropout",
    "channel_dropout",
    "drop_path",
    "locked_dropout",
    "zoneout",
    "embedding_dropout",
    "alpha_dropout",
    "gaussian_dropout",
    "gaussian_noise",
    "bias_dropout_add",
    "token_dropout",
    "drop_connect",
    "drop_block",
    "multi_sample_dropout",
    "patch_dropout",
    "dot_product_attention",
    "stochastic_depth",
)


@cases(5)
@given(st.data())
def test_exported_programs_are_the_call(data):
    """With all sizes static or the first one symbolic."""
    f = data.draw(calls(EXPORTED, modes=(value, pull)))
    name, rate, shape = f.name, f.rate, f.shape
    symbolic = data.draw(st.booleans())
    sizes = [data.draw(st.sampled_from((1, 2, 5))) for _ in range(2)] if symbolic else [shape[0]]
    of_x = (*export.symbolic_shape("b"), *shape[1:]) if symbolic else shape
    word = jax.ShapeDtypeStruct((2,), jnp.uint32)
    types = word, jax.ShapeDtypeStruct(of_x, jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    wrapped = lambda words, x, r: f(jax.random.wrap_key_data(words, impl="threefry2x32"), x, r)
    exported = export.export(jax.jit(wrapped))(*types)
    words = jax.random.key_data(jax.random.key(data.draw(st.integers(0, 99))))
    for n in sizes:
        x = jnp.asarray(np.random.default_rng(n).standard_normal((n, *shape[1:])).astype(np.float32))
        same(exported.call(words, x, jnp.float32(rate)), wrapped(words, x, jnp.float32(rate)), "export", name)


# ---------------------------------------------------------------------------------- meshes


@st.composite
def specs(draw, ndim):
    """A PartitionSpec over the mesh axes a and b, each used once at most."""
    entries: list[Any] = [None] * ndim
    for names in draw(st.sampled_from(([], ["a"], ["b"], ["a", "b"], ["b", "a"], [("a", "b")], [("b", "a")]))):
        entries[draw(st.sampled_from([i for i, e in enumerate(entries) if e is None]))] = names
    return P(*entries)


ON_MESHES = {
    "dropout": lambda shared, **o: lambda k, x, r: jdrop.dropout(k, x, r, train=True, shared_axes=shared, **o),
    "zoneout": lambda shared, **o: lambda k, x, r: jdrop.zoneout(k, x, r, -x, train=True, **o),
    "gaussian": lambda shared, **o: lambda k, x, r: jdrop.gaussian_noise(k, x, r, train=True, shared_axes=shared, **o),
    "alpha": lambda shared, **o: lambda k, x, r: jdrop.alpha_dropout(k, x, r, train=True, shared_axes=shared, **o),
    "connect": lambda shared, **o: lambda k, x, r: jdrop.drop_connect(k, [x], r, train=True, **o)[0],
    "bias": lambda shared, **o: lambda k, x, r: jdrop.bias_dropout_add(k, x, r, None, x * x, train=True, **o),
    "samples": lambda shared, **o: lambda k, x, r: jdrop.multi_sample_dropout(k, x, r, jnp.tanh, 2, train=True, **o),
}


@cases(6)
@given(st.data())
def test_meshes_give_the_bits_of_one_device(data):
    """On auto and explicit meshes, eagerly or not, and in ``shard_map``: values and gradients."""
    kind = data.draw(st.sampled_from((AxisType.Auto, AxisType.Explicit, "shard_map")))
    name = data.draw(st.sampled_from(sorted(ON_MESHES)))
    shape = data.draw(st.sampled_from(((16, 8, 24), (8, 136), (64,), (8, 8, 8, 8), (2**14,))))
    spec, shared = data.draw(specs(len(shape))), data.draw(axes(len(shape)))
    key, rate = jax.random.key(data.draw(st.integers(0, 99))), jnp.float32(data.draw(st.sampled_from((0.5, 0.1))))
    x = jnp.asarray(np.random.default_rng(1).standard_normal(shape).astype(np.float32))

    def both(f):
        def step(k, x, r):
            y, back = jax.vjp(lambda x: f(k, x, r), x)
            return y, back(y)[0]

        return step

    expected = jax.tree.map(np.asarray, both(ON_MESHES[name](shared))(key, x, rate))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto if kind == "shard_map" else kind,) * 2)
    if kind == "shard_map":
        tiled = jax.shard_map(
            both(ON_MESHES[name](shared, shard=spec)), mesh=mesh, in_specs=(P(), spec, P()), out_specs=(spec, spec)
        )
        results = jax.jit(tiled)(key, x, rate)
    else:
        with jax.set_mesh(mesh):
            placed = jax.device_put(x, NamedSharding(mesh, spec))
            f = both(ON_MESHES[name](shared))
            results = (jax.jit(f) if data.draw(st.booleans()) else f)(key, placed, rate)
            if kind == AxisType.Explicit:
                assert all(y.sharding.is_equivalent_to(placed.sharding, y.ndim) for y in results)
    for got, want in zip(results, expected, strict=True):
        atol = 0 if name in ("dropout", "zoneout", "connect") else 1e-5
        np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg="the bits of one device")


@cases(4)
@given(st.data())
def test_masks_on_meshes(data):
    """``out_sharding``, under jit or not."""
    kind = data.draw(st.sampled_from((AxisType.Auto, AxisType.Explicit)))
    shape = data.draw(st.sampled_from(((16, 8, 24), (8, 136), (64,), (8, 8, 8, 8))))
    spec, shared = data.draw(specs(len(shape))), data.draw(axes(len(shape)))
    key = jax.random.key(data.draw(st.integers(0, 99)))
    draw = lambda k, s: jdrop.dropout_mask(k, shape, 0.4, shared_axes=shared, out_sharding=s)
    expected = np.asarray(draw(key, None))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        f = jax.jit(lambda k: draw(k, spec)) if data.draw(st.booleans()) else lambda k: draw(k, spec)
        mask = f(key)
    np.testing.assert_array_equal(mask, expected)
    assert mask.sharding.is_equivalent_to(NamedSharding(mesh, spec), len(shape))
