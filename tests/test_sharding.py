"""The same mask on one device and on eight, without collectives and without the whole mask on any device."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from members import COLLECTIVES

from jdrop import (
    bias_dropout_add,
    drop_path,
    dropout,
    dropout_mask,
    embedding_dropout,
    gaussian_noise,
    stochastic_depth,
    token_dropout,
    zoneout,
)
from jdrop._platform import PLATFORMS
from jdrop.keys import derive, per_example

KEY = jax.random.key(21)
SHAPE = (64, 32, 256)
X = jnp.arange(1.0, 1 + 64 * 32 * 256).reshape(SHAPE)
SPECS = [P("a"), P(None, "a"), P(None, None, "b"), P("a", None, "b"), P(("a", "b")), P("b", "a"), P()]


def mesh(kind):
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))


def parts(the_mesh, spec):
    names = [n for entry in spec if entry for n in (entry if isinstance(entry, tuple) else (entry,))]
    return int(np.prod([the_mesh.shape[n] for n in names], initial=1))


def largest(text):
    sizes = re.findall(r"= \(?\w+\[([\d,]+)\]", text)
    return max(int(np.prod([int(n) for n in size.split(",")])) for size in sizes)


def drop(key, x, **options):
    return dropout(key, x, 0.3, train=True, **options)


def both(key, x, **options):
    """Run forward and backward. The operator is its own transpose, so both give the same."""
    y, pull = jax.vjp(lambda x: drop(key, x, **options), x)
    return y, pull(x)[0]


def require_no_communication(compiled, the_mesh, spec):
    """Require each device to work only on its part: no collective, and no buffer larger than the part."""
    text = compiled.as_text()
    assert not re.search(COLLECTIVES, text), spec
    assert largest(text) <= X.size // parts(the_mesh, spec), spec


@pytest.mark.compiled
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("generator", ["fast", "jax"])
def test_jit_over_a_mesh(kind, generator):
    expected = np.asarray(drop(KEY, X, generator=generator))
    the_mesh = mesh(kind)
    with jax.set_mesh(the_mesh):
        for spec in SPECS:
            x = jax.device_put(X, NamedSharding(the_mesh, spec))
            compiled = jax.jit(lambda k, x: both(k, x, generator=generator)).lower(KEY, x).compile()
            for y in compiled(KEY, x):
                np.testing.assert_array_equal(y, expected)
                assert y.sharding.is_equivalent_to(x.sharding, x.ndim), spec
            require_no_communication(compiled, the_mesh, spec)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("generator", ["fast", "jax"])
def test_eager_over_a_mesh(kind, generator):
    expected = np.asarray(drop(KEY, X, generator=generator))
    the_mesh = mesh(kind)
    with jax.set_mesh(the_mesh):
        for spec in (P("a", None, "b"), P(("a", "b")), P()):
            x = jax.device_put(X, NamedSharding(the_mesh, spec))
            for y in both(KEY, x, generator=generator):
                np.testing.assert_array_equal(y, expected)


@pytest.mark.compiled
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_shared_axes_and_array_rates_over_a_mesh(kind):
    rates = jnp.linspace(0.1, 0.9, 32)[None, :, None]
    expected = np.asarray(dropout(KEY, X, rates, train=True, shared_axes=2))
    the_mesh = mesh(kind)
    with jax.set_mesh(the_mesh):
        for spec in SPECS:
            x = jax.device_put(X, NamedSharding(the_mesh, spec))
            f = jax.jit(lambda k, x: dropout(k, x, rates, train=True, shared_axes=2))
            compiled = f.lower(KEY, x).compile()
            np.testing.assert_array_equal(compiled(KEY, x), expected)
            assert not re.search(COLLECTIVES, compiled.as_text())


@pytest.mark.compiled
@pytest.mark.parametrize("generator", ["fast", "jax"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_with_shard(generator, check_vma):
    """Types of varying values depend on the mesh axes that split x, not on the axis of x that they split."""
    expected = np.asarray(drop(KEY, X, generator=generator))
    the_mesh = mesh(AxisType.Auto)
    for spec in SPECS if check_vma else (P(None, "a"), P("a", None, "b"), P(("a", "b")), P()):
        tiled = jax.shard_map(
            lambda k, x, spec=spec: both(k, x, generator=generator, shard=spec),
            mesh=the_mesh,
            in_specs=(P(), spec),
            out_specs=(spec, spec),
            check_vma=check_vma,
        )
        x = jax.device_put(X, NamedSharding(the_mesh, spec))
        compiled = jax.jit(tiled).lower(KEY, x).compile()
        for y in compiled(KEY, x):
            np.testing.assert_array_equal(y, expected)
        require_no_communication(compiled, the_mesh, spec)


def test_gradient_through_shard_map():
    spec = P("a", None, "b")
    tiled = jax.shard_map(
        lambda k, x: drop(k, x, shard=spec), mesh=mesh(AxisType.Auto), in_specs=(P(), spec), out_specs=spec
    )
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(drop(KEY, x))))(X)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(tiled(KEY, x)))))(X)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_shard_map_with_shared_axes():
    expected = np.asarray(dropout(KEY, X, 0.3, train=True, shared_axes=(1,)))
    for spec in (P("a"), P(None, "a"), P("b", "a")):
        tiled = jax.shard_map(
            lambda k, x, spec=spec: dropout(k, x, 0.3, train=True, shared_axes=(1,), shard=spec),
            mesh=mesh(AxisType.Auto),
            in_specs=(P(), spec),
            out_specs=spec,
        )
        np.testing.assert_array_equal(jax.jit(tiled)(KEY, X), expected)


def test_shard_map_over_some_axes_of_the_mesh():
    spec = P("a")
    tiled = jax.shard_map(
        lambda k, x: drop(k, x, shard=spec),
        mesh=mesh(AxisType.Auto),
        in_specs=(P(), spec),
        out_specs=spec,
        axis_names={"a"},
    )
    np.testing.assert_array_equal(jax.jit(tiled)(KEY, X), drop(KEY, X))


def test_shard_map_needs_a_key_per_device_or_shard():
    the_mesh = mesh(AxisType.Auto)

    def tiled(f, check_vma=True):
        f = jax.shard_map(f, mesh=the_mesh, in_specs=(P(), P("a", "b")), out_specs=P("a", "b"), check_vma=check_vma)
        return jax.jit(f)

    for check_vma, known in ((True, ""), (False, "be known to ")):
        with pytest.raises(
            ValueError, match=rf"dropout: key must {known}vary over the manual mesh axes .*'a'.* shard="
        ):
            tiled(drop, check_vma=check_vma)(KEY, X)
    y = tiled(lambda k, x: drop(k, x, shard=P()))(KEY, X)  # explicit: every tile has the mask of one tile
    tile = drop(KEY, jnp.ones((16, 16, 256)))
    np.testing.assert_array_equal(y != 0, np.tile(np.asarray(tile) != 0, (4, 2, 1)))

    def own(k, x):
        return drop(derive(k, jax.lax.axis_index("a"), jax.lax.axis_index("b")), x)

    y = tiled(own)(KEY, X)
    for i in range(4):
        for j in range(2):
            block = X[16 * i : 16 * i + 16, 16 * j : 16 * j + 16]
            expected = drop(derive(KEY, i, j), block)
            np.testing.assert_array_equal(y[16 * i : 16 * i + 16, 16 * j : 16 * j + 16], expected)


def test_replication_is_never_claimed_falsely():
    """x is the same on all devices but the key is not, so the result must not count as replicated."""
    keys = jax.random.split(KEY, 4)

    def f(keys, x):
        return drop(keys[0], x, shard=P())

    args = dict(mesh=jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4]))
    with pytest.raises(ValueError, match="out_specs"):
        jax.shard_map(f, in_specs=(P("a"), P()), out_specs=P(), **args)(keys, X)
    y = jax.shard_map(f, in_specs=(P("a"), P()), out_specs=P("a"), **args)(keys, X)
    np.testing.assert_array_equal(y, jnp.concatenate([drop(k, X) for k in keys]))


@pytest.mark.parametrize(
    ("shard", "error", "message"),
    [
        (P("a"), ValueError, r"dropout: shard must name manual mesh axes, here \(\)"),
        ("a", TypeError, "dropout: shard must be a PartitionSpec, got 'a'"),
        (P(None, None, None, None), ValueError, "dropout: shard must name each mesh axis once, over the 3 axes of x"),
    ],
)
def test_bad_shards(shard, error, message):
    with pytest.raises(error, match=message):
        drop(KEY, X, shard=shard)


def test_shard_with_bits_without_random_access():
    key = jax.random.key(0, impl="rbg")
    tiled = jax.shard_map(
        lambda k, x: drop(k, x, shard=P("a"), generator="jax"),
        mesh=mesh(AxisType.Auto),
        in_specs=(P(), P("a")),
        out_specs=P("a"),
    )
    with pytest.raises(NotImplementedError, match="dropout: generator must be"):
        tiled(key, X)


@pytest.mark.compiled
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("generator", ["fast", "jax"])
def test_dropout_mask_with_out_sharding(kind, generator):
    """Alternately as a spec and as a NamedSharding."""
    expected = np.asarray(dropout_mask(KEY, SHAPE, 0.3, generator=generator))
    the_mesh = mesh(kind)
    with jax.set_mesh(the_mesh):
        for i, spec in enumerate(SPECS):
            sharding = NamedSharding(the_mesh, spec) if i % 2 else spec
            f = jax.jit(lambda k, s=sharding: dropout_mask(k, SHAPE, 0.3, generator=generator, out_sharding=s))
            compiled = f.lower(KEY).compile()
            mask = compiled(KEY)
            np.testing.assert_array_equal(mask, expected)
            assert mask.sharding.is_equivalent_to(NamedSharding(the_mesh, spec), 3)
            require_no_communication(compiled, the_mesh, spec)
        eager = dropout_mask(KEY, SHAPE, 0.3, generator=generator, out_sharding=P("a"))
        np.testing.assert_array_equal(eager, expected)
        assert eager.sharding.is_equivalent_to(NamedSharding(the_mesh, P("a")), 3)


def test_out_sharding_needs_a_mesh():
    with pytest.raises(ValueError, match="dropout_mask: out_sharding needs a mesh in context"):
        dropout_mask(KEY, SHAPE, 0.3, out_sharding=P("a"))
    with pytest.raises(ValueError, match=r"out_sharding needs a mesh in context, got .*; enter it with jax.set_mesh"):
        dropout_mask(KEY, SHAPE, 0.3, out_sharding=NamedSharding(mesh(AxisType.Explicit), P("a")))
    with pytest.raises(TypeError, match="dropout_mask: out_sharding must be a PartitionSpec or NamedSharding"):
        dropout_mask(KEY, SHAPE, 0.3, out_sharding="a")
    for spec in (P("zz"), P("a", "a"), P(None, None, None, "a")):
        with (
            jax.set_mesh(mesh(AxisType.Auto)),
            pytest.raises(ValueError, match=r"out_sharding must name explicit or auto axes of the mesh, \('a', 'b'\)"),
        ):
            dropout_mask(KEY, SHAPE, 0.3, out_sharding=spec)
    manual = lambda k: dropout_mask(k, (64, 32), 0.3, out_sharding=P("a"))
    with pytest.raises(ValueError, match=r"out_sharding must name explicit or auto axes of the mesh, \(\)"):
        jax.shard_map(manual, mesh=mesh(AxisType.Auto), in_specs=P(), out_specs=P("a"))(KEY)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("kinds", [*itertools.permutations([AxisType.Auto, AxisType.Explicit])], ids=str)
def test_out_sharding_over_axes_of_two_kinds(kinds, rate):
    """A spec under jit, a NamedSharding without it. test_dropout_mask_with_out_sharding has axes of one kind."""
    the_mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=kinds)
    expected = np.asarray(dropout_mask(KEY, SHAPE, rate))
    draw = lambda k, s: dropout_mask(k, SHAPE, rate, out_sharding=s)
    with jax.set_mesh(the_mesh):
        for spec in (P("a"), P("b", None, "a"), P(("a", "b")), P()):
            for mask in (draw(KEY, NamedSharding(the_mesh, spec)), jax.jit(lambda k, s=spec: draw(k, s))(KEY)):
                np.testing.assert_array_equal(mask, expected)
                # If one axis is split by both kinds, the explicit mesh axis is the major part, in any order.
                if spec != P(("a", "b")) or kinds != (AxisType.Auto, AxisType.Explicit):
                    assert mask.sharding.is_equivalent_to(NamedSharding(the_mesh, spec), 3)


@pytest.mark.compiled
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_per_example_masks_over_a_mesh(kind):
    ids = jnp.arange(100, 164)

    def step(key, ids, x):
        """Return masks by per_example, their gradient, and masks by keys from derive."""
        f = lambda x: jax.vmap(lambda k, x: drop(k, x))(per_example(key, ids), x)
        keys = jax.vmap(lambda i: derive(key, "layer", i, "attention", 3))(ids)
        return f(x), jax.grad(lambda x: jnp.sum(f(x) ** 2))(x), jax.vmap(lambda k, x: drop(k, x))(keys, x)

    the_mesh = mesh(kind)
    expected = jax.jit(step)(KEY, ids, X)
    with jax.set_mesh(the_mesh):
        for spec in (P("a"), P(("a", "b")), P("a", "b")):
            x = jax.device_put(X, NamedSharding(the_mesh, spec))
            i = jax.device_put(ids, NamedSharding(the_mesh, P(spec[0])))
            compiled = jax.jit(step).lower(KEY, i, x).compile()
            for got, want in zip(compiled(KEY, i, x), expected, strict=True):
                np.testing.assert_array_equal(got, np.asarray(want))
            require_no_communication(compiled, the_mesh, spec)


def test_vary_together_is_the_identity_outside_shard_map():
    from jdrop._sharding import vary_together

    a, b = jnp.ones(3), jax.random.key_data(KEY)
    assert vary_together(a, b) == (a, b)


def test_one_x_under_sharded_keys_on_an_explicit_mesh():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    x = jnp.ones((3, 200))
    keys = jax.random.split(jax.random.key(1), 16)
    f = jax.vmap(lambda k, x: dropout(k, x, 0.5, train=True), in_axes=(0, None))
    with jax.set_mesh(mesh):
        y = jax.jit(f)(jax.device_put(keys, NamedSharding(mesh, P("d"))), x)
        assert y.sharding.spec[0] == "d"
    np.testing.assert_array_equal(y, f(keys, x))


def test_without_types_of_varying_values_the_error_says_so():
    keys, x = jax.random.split(jax.random.key(1), 8), jnp.ones((8, 200))
    with pytest.raises(ValueError, match=r"key must be known to vary .* check_vma=False"):
        jax.pmap(lambda k, x: dropout(k, x, 0.5, train=True))(keys, x)
    y = jax.pmap(lambda k, x: dropout(k, x, 0.5, train=True, shard=P()))(keys, x)
    np.testing.assert_array_equal(y, jax.vmap(lambda k, x: dropout(k, x, 0.5, train=True))(keys, x))


def test_a_key_that_varies_over_some_mesh_axes_only():
    the_mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def f(k, x):
        return dropout(derive(k, lax.axis_index("a")), x, 0.3, train=True)

    tiled = jax.shard_map(f, mesh=the_mesh, in_specs=(P(), P("a", "b")), out_specs=P("a", "b"))
    with pytest.raises(ValueError, match=r"dropout: key must vary over the manual mesh axes \('b',\)"):
        tiled(KEY, jnp.ones((64, 32)))
    # Tensor parallelism: x and its mask are equal along b.
    tiled = jax.shard_map(f, mesh=the_mesh, in_specs=(P(), P("a")), out_specs=P("a"))
    expected = [dropout(derive(KEY, i), jnp.ones((16, 32)), 0.3, train=True) for i in range(4)]
    np.testing.assert_array_equal(tiled(KEY, jnp.ones((64, 32))), jnp.concatenate(expected))


def test_a_mesh_axis_named_twice():
    tiled = jax.shard_map(
        lambda k, x: dropout(k, x, 0.3, train=True, shard=P("a", "a")),
        mesh=jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P("a")),
        out_specs=P("a"),
    )
    with pytest.raises(ValueError, match="dropout: shard must name each mesh axis once"):
        tiled(KEY, jnp.ones((8, 16)))


OPERANDS = {  # for x of shape [8, 16]: the argument, its shape, and the call
    "rates": ("rate", (8, 16), lambda x, other: dropout(KEY, x, other, train=True)),
    "rates of rows": ("rate", (8, 1), lambda x, other: drop_path(KEY, x, other, train=True)),
    "noise": ("stddev", (8, 16), lambda x, other: gaussian_noise(KEY, x, other, train=True)),
    "old state": ("old", (8, 16), lambda x, other: zoneout(KEY, x, 0.3, other, train=True)),
    "old state in evaluation": ("old", (8, 16), lambda x, other: zoneout(KEY, x, 0.3, other, train=False)),
    "residual": ("residual", (8, 16), lambda x, other: bias_dropout_add(KEY, x, 0.3, None, other, train=True)),
    "bias": ("bias", (16,), lambda x, other: bias_dropout_add(KEY, x, 0.3, other, x, train=True)),
    "protect": ("protect", (8, 16), lambda x, y: token_dropout(KEY, x.astype(int), 0.3, 5, train=True, protect=y > 0)),
    "replacement": (
        "replacement",
        (8, 16),
        lambda x, y: token_dropout(KEY, x.astype(int), 0.3, y.astype(int), train=True),
    ),
    "ids": ("ids", (8, 16), lambda x, y: embedding_dropout(KEY, x, 0.3, train=True, ids=y.astype(int))),
    "branch": ("the result of fn", (8, 16), lambda x, y: stochastic_depth(KEY, x, 0.0, lambda x: y, train=True)),
}


def test_a_replicated_old_state_on_an_explicit_mesh_in_the_forms_for_gpus(use_on_cpu):
    f, x, other = OPERANDS["old state"][2], np.ones((8, 16), np.float32), np.full((8, 16), 0.5, np.float32)
    expected = f(x, other)
    use_on_cpu(PLATFORMS["cuda"])
    with jax.set_mesh(mesh(AxisType.Explicit)):
        np.testing.assert_array_equal(f(jax.device_put(x, P("a", "b")), other), expected)


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("jit", [False, True])
def test_operands_on_an_explicit_mesh_are_sharded_as_the_data(operand, jit):
    argument, shape, f = OPERANDS[operand]
    f, the_mesh = jax.jit(f) if jit else f, mesh(AxisType.Explicit)
    x, other = np.ones((8, 16), np.float32), np.full(shape, 0.5, np.float32)

    def call(spec, spec_of_other):
        spec_of_other = P(*(s if n > 1 else None for n, s in zip(shape, spec_of_other[-len(shape) :])))
        with jax.set_mesh(the_mesh):
            arrays = [(x, P(*spec)), (other, spec_of_other)]
            return f(*(jax.device_put(array, NamedSharding(the_mesh, spec)) for array, spec in arrays))

    expected = f(jnp.asarray(x), jnp.asarray(other))
    for spec in [("a", "b"), (None, None), ("a", None)]:
        np.testing.assert_array_equal(call(("a", "b"), spec), expected)
    wrong = {(8, 16): ("b", "a"), (8, 1): ("b", None), (16,): (None, "a")}[shape]
    with pytest.raises(ValueError, match=f": {argument} must be sharded along each axis as "):
        call(("a", "b"), wrong)
