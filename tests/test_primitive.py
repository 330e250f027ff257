"""The mask as a linear operator: every transform, and no stored mask."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jdrop import alpha_dropout, dropout, dropout_mask, gaussian_dropout, gaussian_noise, zoneout
from jdrop._mask import draw_mask
from jdrop._ops import SELECT
from jdrop._primitive import masked_op

KEY = jax.random.key(11)
X = jnp.sin(jnp.arange(6.0 * 200).reshape(6, 200)) + 2
GENERATORS = ["fast", "jax"]


def drop(x, key=KEY, rate=0.4, **options):
    return dropout(key, x, rate, train=True, **options)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ------------------------------------------------------------------------------------ derivatives


@pytest.mark.parametrize("generator", GENERATORS)
def test_every_derivative_is_the_operator_itself(generator):
    def f(x):
        return drop(x, generator=generator)

    y = f(X)
    t = jnp.cos(X)
    factor = np.asarray(f(jnp.ones_like(X)))
    same(f(X), np.asarray(X) * factor)
    for wrap in (lambda f: f, jax.jit, jax.checkpoint, jax.custom_jvp):
        g = wrap(f)
        if wrap is jax.custom_jvp:
            g.defjvp(lambda p, t: (f(*p), f(*t)))
        same(jax.vjp(g, X)[1](t)[0], f(t))
        same(jax.jvp(g, (X,), (t,)), (y, f(t)))
        same(jax.grad(lambda x, g=g: jnp.vdot(g(x), t))(X), f(t))
    same(jax.linear_transpose(f, X)(t)[0], f(t))
    same(jax.linearize(f, X)[1](t), f(t))
    small = X[:1, :130]

    def h(x):
        return drop(x, generator=generator)

    diagonal = np.diag(np.asarray(h(jnp.ones_like(small))).ravel())
    for jacobian in (jax.jacfwd, jax.jacrev):
        same(np.asarray(jacobian(h)(small)).reshape(130, 130), diagonal)


@pytest.mark.parametrize("generator", GENERATORS)
def test_second_derivatives(generator):
    def loss(x):
        return jnp.sum(jnp.sin(drop(x, generator=generator)))

    d = np.asarray(drop(jnp.ones_like(X), generator=generator))
    y = np.asarray(X) * d
    t = jnp.cos(X)
    expected = -np.sin(y) * d * d * np.asarray(t)
    hvp = jax.jvp(jax.grad(loss), (X,), (t,))[1]
    np.testing.assert_allclose(hvp, expected, rtol=2e-5, atol=1e-6)
    reverse = jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), t))(X)
    np.testing.assert_allclose(reverse, expected, rtol=2e-5, atol=1e-6)


def test_zero_tangents_and_integer_tangents():
    f = jax.jit(lambda x, k: drop(jnp.ones_like(x), k) + x)
    same(jax.jvp(lambda x: f(x, KEY), (X,), (X,))[1], X)
    same(jax.grad(lambda x: f(x, KEY).sum())(X), jnp.ones_like(X))
    step = jax.grad(lambda x, k: drop(x, k).sum(), argnums=(0, 1), allow_int=True)
    assert step(X, jax.random.PRNGKey(0))[1].dtype == jax.dtypes.float0


def test_complex_gradients_use_the_same_mask():
    x = X.astype(jnp.complex64) * (1 + 2j)
    y, pull = jax.vjp(drop, x)
    same(pull(x)[0], y)


# ------------------------------------------------------------------------------------ vmap


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize(
    "axes", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0), (1, 0, None), (2, 0, 0)]
)
def test_vmap_is_the_loop(axes, generator):
    n = 4
    keys = jax.random.split(KEY, n) if axes[1] == 0 else KEY
    rates = jnp.linspace(0.0, 1.0, n) if axes[2] == 0 else jnp.float32(0.3)
    x = jnp.ones((3, 150))
    if axes[0] is not None:
        x = jnp.asarray(np.stack([np.full((3, 150), i + 1, np.float32) for i in range(n)], axes[0]))

    def f(x, k, r):
        return dropout(k, x, r, train=True, generator=generator)

    def pull(x, k, r):
        return jax.vjp(lambda x: f(x, k, r), x)[1](x)[0]

    def take(a, axis, i):
        return a if axis is None else jnp.take(a, i, axis) if axis else a[i]

    def one(x, i):
        return f(take(x, axes[0], i), take(keys, axes[1], i), take(rates, axes[2], i))

    @jax.jit
    def compiled(x, keys, rates):  # x shared: gradients are summed
        mapped = jax.vmap(f, axes)(x, keys, rates), jax.vmap(pull, axes)(x, keys, rates)
        return *mapped, jax.grad(lambda x: jax.vmap(f, axes)(x, keys, rates).sum())(x)

    loop = np.stack([one(x, i) for i in range(n)])
    same(jax.vmap(f, axes)(x, keys, rates), loop)
    y, pulled, total = compiled(x, keys, rates)
    same(y, loop)
    same(pulled, loop)
    each = [jax.grad(lambda x, i=i: one(x, i).sum())(x) for i in range(n)]
    np.testing.assert_allclose(total, sum(each), rtol=1e-6)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg", "philox2x32"])
def test_vmap_over_keys_is_the_loop_for_every_implementation(impl):
    keys = jax.random.split(jax.random.key(0, impl=impl), 3)
    x = jnp.ones((3, 200))
    same(jax.vmap(lambda k, x: drop(x, k))(keys, x), jnp.stack([drop(x[i], keys[i]) for i in range(3)]))


def test_nested_vmap_is_the_nested_loop():
    keys = jax.random.split(KEY, (3, 4))
    rates = jnp.array([0.2, 0.5, 0.8])
    x = jnp.ones((4, 200))

    def f(k, x, r):
        return drop(x, k, r)

    nested = jax.vmap(jax.vmap(f, (0, 0, None)), (0, None, 0))
    loop = jnp.stack([jnp.stack([f(keys[i, j], x[j], rates[i]) for j in range(4)]) for i in range(3)])
    same(nested(keys, x, rates), loop)
    same(jax.jit(nested)(keys, x, rates), loop)
    out_axes = jax.vmap(jax.vmap(f, (0, 0, None), out_axes=1), (0, None, 0), out_axes=2)
    same(out_axes(keys, x, rates), jnp.transpose(loop, (2, 1, 0)))


def test_one_key_with_many_examples_shares_the_mask():
    y = jax.vmap(drop)(jnp.ones((5, 200)))
    same(y, jnp.broadcast_to(y[:1], y.shape))


def test_per_example_gradients_sum_to_the_batch_gradient():
    w = jnp.cos(jnp.arange(200.0))
    keys = jax.random.split(KEY, 6)

    def loss(w, x, k):
        return jnp.vdot(drop(x, k), w) ** 2

    each = jax.vmap(jax.grad(loss), (None, 0, 0))(w, X, keys)
    batch = jax.grad(lambda w: jax.vmap(loss, (None, 0, 0))(w, X, keys).sum())(w)
    np.testing.assert_allclose(each.sum(0), batch, rtol=1e-4)


# ------------------------------------------------------------------------------------ control flow


@pytest.mark.parametrize("generator", GENERATORS)
def test_scan_while_cond_and_map_agree_with_the_loop(generator):
    keys = jax.random.split(KEY, 5)

    def body(h, key):
        h = drop(h, key, generator=generator)
        return h, h

    h, ys = X, []
    for key in keys:
        h, y = body(h, key)
        ys.append(y)
    last, scanned = jax.lax.scan(body, X, keys)
    same(last, h)
    same(scanned, jnp.stack(ys))
    same(jax.lax.fori_loop(0, 5, lambda i, h: body(h, keys[i])[0], X), h)
    same(jax.lax.map(lambda k: drop(X, k, generator=generator), keys)[2], drop(X, keys[2], generator=generator))
    same(jax.lax.cond(True, lambda: drop(X, generator=generator), lambda: X), drop(X, generator=generator))

    def loss(x, step):
        return jnp.sum(jax.lax.scan(step, x, keys)[0] ** 2)

    g = jax.grad(loss)(X, body)
    same(jax.grad(loss)(X, jax.checkpoint(body)), g)
    same(jax.jit(jax.grad(loss), static_argnums=1)(X, jax.checkpoint(body, prevent_cse=False)), g)


# ------------------------------------------------------------------------------------ no mask is stored


def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))


@pytest.mark.parametrize("generator", GENERATORS)
def test_the_residuals_are_seed_and_rate(generator):
    pull = jax.vjp(lambda x: drop(x, generator=generator), X)[1]
    assert bytes_of(pull) == 8  # two uint32 words: a Python rate is a constant
    pull = jax.vjp(lambda x: drop(x, generator=generator, rate=jnp.float32(0.3)), X)[1]
    assert bytes_of(pull) == 12
    many = jax.random.split(KEY, 6)
    pull = jax.vjp(jax.vmap(lambda k, x: drop(x, k, generator=generator), (0, 0)), many, X)[1]
    assert bytes_of(pull) <= 6 * 8 + 4
    linear = jax.linearize(lambda x: drop(x, generator=generator), X)[1]
    assert bytes_of(linear) <= 12


def model(x, w, key, dropping):
    """Return layers with few other residuals, so that a stored mask would show, and the inputs of a scan."""

    def layer(h, kw):
        k, w = kw
        h = jnp.tanh(h @ w)
        return dropping(k, h), None

    return layer, (jax.random.split(key, w.shape[0]), w)


def plain(k, h):
    return h * 0.9


def fast(k, h):
    return dropout(k, h, 0.1, train=True)


def per_example(k, h):
    return jax.vmap(lambda k, h: dropout(k, h, 0.1, train=True))(jax.random.split(k, h.shape[0]), h)


def jax_generator(k, h):
    return dropout(k, h, 0.1, train=True, generator="jax")


@pytest.mark.compiled
@pytest.mark.parametrize("how", ["unrolled", "scan", "scan+checkpoint", "scan+checkpoint, no prevent_cse"])
def test_temporary_bytes_are_those_of_a_plain_scale(how):
    w = jnp.ones((4, 512, 512)) / 512
    x = jnp.ones((256, 512))

    def temp(dropping):
        def loss(x, w, key):
            layer, xs = model(x, w, key, dropping)
            if "checkpoint" in how:
                layer = jax.checkpoint(layer, prevent_cse="no prevent_cse" not in how)
            if "scan" in how:
                return jnp.sum(jax.lax.scan(layer, x, xs)[0])
            h = x
            for i in range(4):
                h, _ = layer(h, jax.tree.map(lambda a, i=i: a[i], xs))
            return jnp.sum(h)

        compiled = jax.jit(jax.grad(loss, argnums=1)).lower(x, w, KEY).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    mask = 256 * 512  # bytes of one bool mask, of which a stored form keeps one per layer
    rows = 256 * 8  # bytes of the seeds of 256 examples, or of the keys of 256 rows
    floor = temp(plain)
    assert temp(fast) < floor + 4 * rows + rows  # 4 layers, and one more for the alignment of buffers
    assert temp(jax_generator) < floor + 4 * rows + rows
    assert temp(per_example) < floor + 4 * 2 * rows + rows  # seeds and row keys

    def stored(k, h):  # shows that the test can fail: keeps a byte per element and layer
        return jnp.where(jax.random.bernoulli(k, 0.9, h.shape), h / 0.9, 0.0)

    if how == "scan":
        assert temp(stored) > floor + 3 * mask


@pytest.mark.compiled
def test_forward_is_one_loop_over_elements_with_the_row_hash_outside():
    x = jnp.ones((512, 1024))
    text = jax.jit(lambda k, x: drop(x, k)).lower(KEY, x).compile().as_text()
    computations = re.split(r"\n\n", text)
    elements = [c for c in computations if re.search(r"ROOT .* = f32\[512,1024\]", c) and "fused" in c.split("(")[0]]
    assert len(elements) == 1
    body = elements[0]
    wide = re.findall(r"= \w+\[512,1024\]\S* multiply\(", body)
    assert len(wide) <= 5, body  # 4 of the mixing function, one of them only by column, and the scale
    assert len(re.findall(r" xor\(", body)) <= 6, body  # 20 more would be the row hash
    assert not re.search(r"u32\[512,1024\]|pred\[512,1024\]", text.split("ENTRY")[1]), "a mask is written to memory"


def hashes(text, shape):
    """Return the fused computations that mix words, and those among them with data of a shape."""
    mixing = {c for c in re.split(r"\n\n", text) if "fused" in c.split("(")[0] and str(0x7FEB352D) in c}
    return mixing, {c for c in mixing if f"f32[{','.join(map(str, shape))}]" in c}


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("shape", "shared"), [((16, 64, 256), 1), ((8, 8, 32, 64), (0, 1)), ((64, 8, 128), (0,)), ((16, 64, 256), (0, 1))]
)
@pytest.mark.parametrize("member", [dropout, alpha_dropout, gaussian_dropout, gaussian_noise])
def test_shared_decisions_are_drawn_once_on_a_cpu(member, shape, shared):
    def f(k, x):
        y, pull = jax.vjp(lambda x: member(k, x, 0.3, train=True, shared_axes=shared), x)
        return y, pull(y)[0]

    x = jnp.ones(shape)
    compiled = jax.jit(f).lower(KEY, x).compile()
    mixing, again = hashes(compiled.as_text(), shape)
    assert mixing and not again
    decisions = x.size // np.prod([shape[axis] for axis in np.atleast_1d(shared)])
    stored = 2 * decisions * (1 if member in (dropout, alpha_dropout) else 4)  # twice a bool, or twice a float32
    assert compiled.memory_analysis().temp_size_in_bytes <= stored + 128  # seed and row keys, at multiples of 64


@pytest.mark.compiled
def test_decisions_that_few_elements_share_are_drawn_again():
    """Stored, they would take an eighth of the data. This also shows that the search of the test above works."""
    shape = (4, 512, 256)
    text = jax.jit(lambda k, x: drop(x, k, shared_axes=0)).lower(KEY, jnp.ones(shape)).compile().as_text()
    assert hashes(text, shape)[1]


def rows_of(n, f, *args):
    """Return the numbers of rows into which an axis of n elements is folded."""
    shapes = re.findall(r"[fc]\d+\[(\d+),(\d+)\]", jax.jit(f).lower(*args).compile().as_text())
    return {int(rows) for rows, width in shapes if int(rows) * int(width) == n and int(rows) > 1}


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("n", "width"), [(2**14, 1024), (3 * 2**14, 1024), (2**14 + 128, 128), (2**14 + 64, 0), (2**14 - 1024, 0)]
)
def test_a_long_axis_is_folded_on_one_cpu_and_keeps_its_bits(n, width):
    x = jnp.cos(jnp.arange(float(n)))
    mask = np.asarray(dropout_mask(KEY, (n,), 0.4))  # drawn without folding
    f = jax.jit(lambda k, x: drop(x, k))
    assert rows_of(n, f, KEY, x) == ({n // width} if width else set())
    temp = f.lower(KEY, x).compile().memory_analysis().temp_size_in_bytes
    assert temp >= 8 * (n // width) if width else temp < 128  # row keys, which a loop over one axis would not read
    same(f(KEY, x), drop(x))
    same(f(KEY, jnp.ones(n)) != 0, mask)
    same(jax.grad(lambda x: f(KEY, x).sum())(x), f(KEY, jnp.ones(n)))
    same(zoneout(KEY, x, 0.4, -x, train=True), jnp.where(mask, x, -x))
    rates = jnp.full(n, 0.4)
    same(drop(x, rate=rates), f(KEY, x))
    same(drop(x.astype(jnp.bfloat16)) != 0, mask & (x.astype(jnp.bfloat16) != 0))
    same(jax.vmap(drop)(jnp.stack([x, 2 * x])), jnp.stack([f(KEY, x), 2 * f(KEY, x)]))
    assert not rows_of(n, jax.vmap(drop), jnp.stack([x, 2 * x]))  # the loop over a row of many starts at 0
    for member in (gaussian_noise, alpha_dropout):
        f = functools.partial(lambda x, member: member(KEY, x, 0.4, train=True), member=member)
        same(f(x), jax.vmap(f)(x[None])[0])


@pytest.mark.compiled
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("devices", [1, 8])
def test_a_long_axis_on_a_mesh(axis_type, devices):
    n = 2**14 + 128  # 129 blocks, which 8 devices cannot share
    mesh = jax.make_mesh((devices,), ("i",), axis_types=(axis_type,), devices=jax.devices()[:devices])
    for data in (jnp.ones(n), jax.lax.complex(jnp.ones(n), jnp.arange(float(n)))):
        with jax.set_mesh(mesh):
            sharded = jax.device_put(data, NamedSharding(mesh, PartitionSpec("i")))
            y, z = jax.jit(drop)(sharded), jax.jit(lambda x: zoneout(KEY, x, 0.4, -x, train=True))(sharded)
            assert rows_of(n, drop, sharded) == ({129} if devices == 1 and axis_type == AxisType.Auto else set())
            assert y.sharding == sharded.sharding
        same((y, z), (drop(data), zoneout(KEY, data, 0.4, -data, train=True)))


# ------------------------------------------------------------------------------------ other platforms


@pytest.mark.parametrize(
    ("platform", "dtype", "generator"),
    list(itertools.product(["cuda", "tpu"], [jnp.float32, jnp.bfloat16], GENERATORS)),
)
def test_lowers_for_platforms_without_a_device(platform, dtype, generator):
    def f(x, k):
        return jax.grad(lambda x: jnp.sum(drop(x, k, generator=generator).astype(jnp.float32)))(x)

    assert "stablehlo" in jax.jit(f).trace(X.astype(dtype), KEY).lower(lowering_platforms=(platform,)).as_text()


def test_the_op_without_scale_on_a_tile():
    """As other files use it: unscaled, on a tile of a larger mask."""
    whole = dropout_mask(KEY, (12, 200), 0.4)
    start = jnp.array([[0, 6], [0, 0]], jnp.uint32)
    mask = draw_mask("test", KEY, np.asarray(0.4), (12, 200), start=start)
    same(masked_op(SELECT, mask, jnp.ones((6, 200))), whole[6:].astype(jnp.float32))
