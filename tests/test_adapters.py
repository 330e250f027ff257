"""Common behavior of all adapters: masks of the libraries, jdrop's rules, residuals, and the recipes."""

import doctest
import inspect
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from members import MEMBERS, SHAPE

import jdrop

KEY = jax.random.key(17)
X = jnp.linspace(1, 2, 6 * 10 * 40).reshape(6, 10, 40)
LIBRARIES = pytest.mark.parametrize("library", peers.ADAPTERS)
LAYERS = pytest.mark.parametrize("layer", ["Dropout", "DropPath"])
pytestmark = pytest.mark.usefixtures("usual_promotion")

# ------------------------------------------------------------------------------------ the masks of the library

RATES = {
    "0.1": 0.1,
    "0.37": 0.37,
    "0.999": 0.999,
    "float16": np.float16(0.3),
    "float32": np.float32(0.3),
    "float64": np.float64(0.3),
    "array": jnp.float32(0.3),
    "bfloat16 array": jnp.bfloat16(0.3),
}


@LIBRARIES
@pytest.mark.parametrize("wide", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rate", RATES)
def test_masks_of_the_library_bit_for_bit(library, rate, dtype, wide):
    rate, x = RATES[rate], X.astype(dtype)
    with jax.enable_x64(wide):
        y = peers.ours(library, generator="jax")(KEY, x, rate)
        if (isinstance(rate, jax.Array) and dtype == "bfloat16") or isinstance(rate, np.floating):
            expected = jax.random.bernoulli(KEY, 1 - rate, X.shape)  # the library raises for some of these
        else:
            expected = peers.theirs(library)(KEY, x, rate) != 0
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y != 0, expected)


def test_equinox_rounds_a_numpy_rate_before_it_subtracts():
    """Key 1 draws one word that lies between the two thresholds of this rate."""
    x, key = jnp.ones(2**16), jax.random.key(1)
    for p in (0.256, np.float64(0.256)):
        masks = {library: peers.ours(library, generator="jax")(key, x, p) != 0 for library in peers.ADAPTERS}
        for library, mask in masks.items():
            np.testing.assert_array_equal(mask, peers.theirs(library)(key, x, p) != 0)
        assert (masks["equinox"] != masks["haiku"]).sum() == isinstance(p, np.floating)


@pytest.mark.parametrize("library", ["linen", "nnx", "haiku"])
@pytest.mark.parametrize("dims", [(1,), (0, 2), (-1,), (0, 1, 2)], ids=str)
def test_broadcast_dims(library, dims):
    y = peers.ours(library, generator="jax")(KEY, X, 0.4, dims)
    np.testing.assert_array_equal(y != 0, peers.theirs(library)(KEY, X, 0.4, dims) != 0)
    y = peers.ours(library)(KEY, X, 0.4, dims)
    np.testing.assert_array_equal(y, jdrop.dropout(KEY, X, 0.4, train=True, shared_axes=dims))


@LIBRARIES
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "legacy"])
def test_every_kind_of_key(library, impl):
    key = jax.random.PRNGKey(3) if impl == "legacy" else jax.random.key(3, impl=impl)
    expected = peers.theirs(library)(key, X, 0.4) != 0
    np.testing.assert_array_equal(peers.ours(library, generator="jax")(key, X, 0.4) != 0, expected)


@LIBRARIES
def test_under_jit_with_a_traced_rate(library):
    f = jax.jit(peers.ours(library, generator="jax"))
    for rate in (0.1, 0.6):
        expected = jax.random.bernoulli(KEY, 1 - jnp.float32(rate), X.shape)
        np.testing.assert_array_equal(f(KEY, X, jnp.float32(rate)) != 0, expected)
    assert f._cache_size() == 1


# ------------------------------------------------------------------------------------ jdrop's layers


@LIBRARIES
def test_default_is_jdrop(library):
    np.testing.assert_array_equal(peers.ours(library)(KEY, X, 0.4), jdrop.dropout(KEY, X, 0.4, train=True))


@LIBRARIES
@pytest.mark.parametrize("generator", ["fast", "jax"])
def test_drop_path(library, generator):
    default = () if library == "equinox" else (0,)
    y = peers.ours(library, "DropPath", generator=generator)(KEY, X, 0.4)
    options = {"train": True, "generator": generator}
    np.testing.assert_array_equal(y, jdrop.drop_path(KEY, X, 0.4, batch_axes=default, **options))
    y = peers.ours(library, "DropPath", generator=generator, batch_axes=(0, -1))(KEY, X, 0.4)
    np.testing.assert_array_equal(y, jdrop.drop_path(KEY, X, 0.4, batch_axes=(0, 2), **options))


@LIBRARIES
@LAYERS
def test_rate_out_of_range(library, layer):
    f, argument = peers.ours(library, layer), "p" if library == "equinox" else "rate"
    name = {"Dropout": "dropout", "DropPath": "drop_path"}[layer] if library == "haiku" else layer
    key = {"equinox": "key", "nnx": "rngs"}.get(library, "rng")
    for rate in (-0.5, 1.5, float("nan"), np.float64(1.01)):
        text = f"{name}: {argument} must lie in [0, 1], got {rate!r}; pass the probability of dropping"
        with pytest.raises(ValueError, match="^" + re.escape(text)):
            f(KEY, X, rate)
    with pytest.raises(TypeError, match=f"^{name}: {argument} must be a number"):
        f(KEY, X, "0.5")
    with pytest.raises(TypeError, match=f"^{name}: (x|inputs) must be float8"):
        f(KEY, jnp.arange(3), 0.5)
    with pytest.raises(ValueError, match=f"^{name}: {key} must be one key"):
        f(jax.random.split(KEY), X, 0.5)
    with pytest.raises(ValueError, match=f"^{name}: generator must be"):
        peers.ours(library, layer, generator="threefry")(KEY, X, 0.5)
    with pytest.raises(ValueError, match=f"^{name}: batch_axes must be axes" if layer == "DropPath" else "broadcast_"):
        if layer == "DropPath":
            peers.ours(library, layer, batch_axes=3)(KEY, X, 0.5)
        elif library == "equinox":
            raise ValueError("it has no broadcast_dims")
        else:
            f(KEY, X, 0.5, (3,))


@LIBRARIES
@LAYERS
@pytest.mark.parametrize("generator", ["fast", "jax"])
def test_traced_rates_out_of_range(library, layer, generator):
    f = jax.jit(peers.ours(library, layer, generator=generator))
    np.testing.assert_array_equal(f(KEY, X, jnp.float32(-0.5)), X)
    assert not f(KEY, X, jnp.float32(1.5)).any() and not f(KEY, X, jnp.float32(1)).any()
    assert jnp.isnan(f(KEY, X, jnp.float32(jnp.nan))).all()


@LIBRARIES
@LAYERS
@pytest.mark.parametrize("generator", ["fast", "jax"])
def test_bfloat16_stays_bfloat16(library, layer, generator):
    f, x = peers.ours(library, layer, generator=generator), X.astype("bfloat16")
    for rate in (np.float64(0.3), jnp.float32(0.3), jnp.bfloat16(0.3), np.float32(0.0), 1):
        y = f(KEY, x, rate)
        assert y.dtype == x.dtype and y.shape == x.shape


@LIBRARIES
@LAYERS
@pytest.mark.parametrize("rate", [1, 1.0, np.float32(1), jnp.float32(1)], ids=str)
def test_rate_1_gives_zeros_and_finite_gradients(library, layer, rate):
    f = peers.ours(library, layer)
    y, pull = jax.vjp(lambda x: f(KEY, x, rate), X.at[0].set(jnp.inf))
    assert not y.any() and not pull(jnp.ones_like(y))[0].any()
    grad = jax.grad(lambda r: f(KEY, X, r).sum())(jnp.float32(1))
    assert grad == 0  # no gradient flows to a rate


@LIBRARIES
@LAYERS
@pytest.mark.parametrize("rate", [0, 0.0, np.float64(0)], ids=str)
def test_rate_0_needs_no_key_and_returns_the_input(library, layer, rate):
    f = peers.ours(library, layer)
    assert f(None, X, rate) is X


@LIBRARIES
@LAYERS
def test_a_key_is_consumed(library, layer):
    f, key = peers.ours(library, layer), jax.random.key(5)
    with jax.debug_key_reuse(True):
        f(key, X, 0.5)
        with pytest.raises(jax.errors.KeyReuseError):
            f(key, X, 0.5)


# ------------------------------------------------------------------------------------ residuals


def residual_bytes(f):
    pull = jax.vjp(lambda x: f(KEY, x, 0.3), X)[1]
    return sum(leaf.nbytes for leaf in jax.tree.leaves(pull) if isinstance(leaf, jax.Array))


@LIBRARIES
@pytest.mark.parametrize("generator", ["fast", "jax"])
def test_no_mask_is_stored(library, generator):
    """Only a seed; the library stores at least one byte per element."""
    for layer in ("Dropout", "DropPath"):
        assert residual_bytes(peers.ours(library, layer, generator=generator)) == 8
    assert residual_bytes(peers.theirs(library)) >= X.size


# ------------------------------------------------------------------------------------ meshes


@LIBRARIES
@pytest.mark.parametrize(("layer", "generator"), [("Dropout", "fast"), ("DropPath", "jax")])
def test_output_sharding_on_an_explicit_mesh(library, layer, generator):
    f = peers.ours(library, layer, generator=generator)
    x = jnp.linspace(1, 2, 16 * 256).reshape(16, 256)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P("data", "model")))
        for rate in (0.4, 1.0):
            y = jax.jit(lambda x, rate=rate: f(KEY, x, rate))(sharded)
            assert jax.typeof(y).sharding.spec == P("data", "model")
            np.testing.assert_array_equal(y, f(KEY, np.asarray(x), rate))


# ------------------------------------------------------------------------------------ every other member, by recipe


def through_linen(member, key, x, rate, train):
    from flax import linen

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            key = self.make_rng("dropout") if train else None
            return member(key, x, rate, train=train), key

    return Layer().apply({}, x, train, rngs={"dropout": key} if train else {})


def through_nnx(member, key, x, rate, train):
    from flax import nnx

    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.stream, self.deterministic = rngs.dropout.fork(), False

        def __call__(self, x):
            key = None if self.deterministic else self.stream()
            return member(key, x, rate, train=not self.deterministic), key

    layer = Layer(nnx.Rngs(dropout=key))
    layer.train() if train else layer.eval()
    return layer(x)


def through_equinox(member, key, x, rate, train):
    import equinox

    class Layer(equinox.Module):
        inference: bool = False

        def __call__(self, x, *, key):
            return member(key, x, rate, train=not self.inference)

    layer = Layer() if train else equinox.nn.inference_mode(Layer())
    key = key if train else None
    return layer(x, key=key), key


def through_haiku(member, key, x, rate, train):
    import haiku

    def layer(x, train):
        key = haiku.next_rng_key() if train else None
        return member(key, x, rate, train=train), key

    f = haiku.transform(layer)
    words = jax.random.key_data(key)
    return f.apply(f.init(words, x, train), words if train else None, x, train)


ONE_LIBRARY_EACH = [(member, [*peers.ADAPTERS][i % len(peers.ADAPTERS)]) for i, member in enumerate(MEMBERS)]


@pytest.mark.parametrize(
    ("member", "library"), sorted({*ONE_LIBRARY_EACH, *(("dropout", library) for library in peers.ADAPTERS)})
)
def test_every_member_by_the_recipe(library, member):
    """The library provides the key and the member is a pure function, so one library per member is enough."""
    peers.require(peers.ADAPTERS[library])
    through = globals()[f"through_{library}"]
    f = MEMBERS[member]
    x = jax.random.normal(jax.random.key(2), SHAPE)
    y, key = through(f, KEY, x, 0.3, True)
    np.testing.assert_array_equal(y, f(key, x, 0.3, train=True))
    y, key = through(f, KEY, x, 0.3, False)
    assert key is None
    np.testing.assert_array_equal(y, f(None, x, 0.3, train=False))


@LIBRARIES
def test_in_shard_map_one_key_for_all_tiles_is_an_error_with_a_fix(library):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    f = jax.shard_map(lambda x: peers.ours(library)(KEY, x, 0.5), mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    with pytest.raises(ValueError, match=r"must vary over the manual mesh axes .* give the layer shard="):
        f(X)


@LIBRARIES
def test_in_shard_map_a_layer_takes_shard(library):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    f = lambda x: peers.ours(library, shard=P("d"))(KEY, x, 0.5)
    tiled = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d")))(X)
    np.testing.assert_array_equal(tiled, peers.ours(library)(KEY, X, 0.5))


@LIBRARIES
@pytest.mark.parametrize("how", ["pmap", "check_vma=False"])
def test_without_types_of_varying_values_a_layer_uses_the_key_as_it_is(library, how):
    """Trainers that use pmap pass one key per device."""
    keys, x = jax.random.split(KEY, 2), jnp.stack([X, 2 * X])
    f = lambda key, x: peers.ours(library)(key, x, 0.5)
    if how == "pmap":
        y = jax.pmap(f, devices=jax.devices()[:2])(keys, x)
    else:
        mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
        each = lambda keys, x: f(keys[0], x[0])[None]
        y = jax.jit(jax.shard_map(each, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False))(keys, x)
    np.testing.assert_array_equal(y, jnp.stack([f(key, one) for key, one in zip(keys, x)]))


# ------------------------------------------------------------------------------------ the files


def test_the_error_of_a_missing_library_says_what_to_install(tmp_path):
    for package in peers.ADAPTERS.values():
        (tmp_path / f"{package}.py").write_text("raise ModuleNotFoundError('nothing here')")
    code = f"""
import importlib, sys
sys.path.insert(0, {str(tmp_path)!r})
for library in {[*peers.ADAPTERS]}:
    try:
        importlib.import_module(f"jdrop.adapters.{{library}}")
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for line, (library, package) in zip(done.stdout.splitlines(), peers.ADAPTERS.items(), strict=True):
        text = f"jdrop.adapters.{library}: {package} must be installed, got ModuleNotFoundError('nothing here')"
        assert line == f"{text}; run pip install {peers.PACKAGES[package]}"


def test_importing_jdrop_imports_no_adapter():
    code = "import sys, jdrop.adapters; print({m.split('.')[0] for m in sys.modules} & {'flax', 'equinox', 'haiku'},"
    code += "[m for m in sys.modules if m.startswith('jdrop.adapters.')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set() []"


@LIBRARIES
def test_docstrings_are_complete_and_run(library):
    module = peers.adapter(library)
    public = [v for n, v in vars(module).items() if inspect.isclass(v) or inspect.isfunction(v)]
    public = [v for v in public if v.__module__.startswith("jdrop.adapters") and v.__name__[0] != "_"]
    names = {"Dropout", "DropPath", "StochasticDepth"}
    names = {"dropout", "drop_path", "stochastic_depth"} if library == "haiku" else names
    assert {v.__name__ for v in public} - {"dot_product_attention"} == names
    for value in public:
        doc = inspect.getdoc(value)
        call = value if inspect.isfunction(value) else value.__init__
        for parameter in set(inspect.signature(call).parameters) - {"self", "parent", "name"}:
            assert re.search(rf"^\s+(\w+, )*{parameter}(, \w+)*: ", doc, re.MULTILINE), f"{value}: {parameter}"
        assert re.search(r"\((19|20)\d\d\)", doc.split("References:")[1]) and "Raises:" in doc
        assert doctest.DocTestFinder().find(value)[0].examples
    for name in {v.__module__ for v in public}:
        results = doctest.testmod(sys.modules[name])
        assert results.attempted and not results.failed
