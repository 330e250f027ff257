"""drop_connect and embedding_dropout: masks by path and by word."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jdrop

KEY = jax.random.key(51)
PARAMS = {
    "lstm": [{"w": jnp.ones((64, 100)), "b": jnp.ones(100)}, {"w": jnp.ones((64, 100)), "b": jnp.ones(100)}],
    "step": jnp.int32(3),
    "key": jax.random.key(0),
    "scale": jnp.ones((), "bfloat16"),
}


def same(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_each_leaf_has_its_own_mask():
    y = jdrop.drop_connect(KEY, PARAMS, 0.5, train=True)
    assert jax.tree.structure(y) == jax.tree.structure(PARAMS)
    first, second = (y["lstm"][i]["w"] for i in (0, 1))
    for w in (first, second):
        assert set(np.unique(w)) == {0.0, 2.0}
        assert abs(float((w == 0).mean()) - 0.5) < 5 * np.sqrt(0.25 / w.size)
    agree = float((first == second).mean())
    assert abs(agree - 0.5) < 5 * np.sqrt(0.25 / first.size)
    assert y["step"] is PARAMS["step"] and y["key"] is PARAMS["key"]
    assert y["scale"].dtype == jnp.bfloat16


def test_a_mask_depends_only_on_path_and_shape():
    y = jdrop.drop_connect(KEY, PARAMS, 0.5, train=True)
    less = {"lstm": [PARAMS["lstm"][0]]}
    same(jdrop.drop_connect(KEY, less, 0.5, train=True)["lstm"][0]["w"], y["lstm"][0]["w"])
    key = jdrop.keys.derive(KEY, "drop_connect", "lstm", 0, "w")
    same(jdrop.dropout(key, PARAMS["lstm"][0]["w"], 0.5, train=True), y["lstm"][0]["w"])
    single = jdrop.drop_connect(KEY, jnp.ones(50), 0.5, train=True)
    same(jdrop.dropout(jdrop.keys.derive(KEY, "drop_connect"), jnp.ones(50), 0.5, train=True), single)


def test_where_selects_by_path_and_leaf():
    seen = []

    def hidden(path, leaf):
        seen.append(jax.tree_util.keystr(path))
        return "['w']" in seen[-1] and leaf.ndim == 2

    y = jdrop.drop_connect(KEY, PARAMS, 0.5, train=True, where=hidden)
    assert y["lstm"][0]["b"] is PARAMS["lstm"][0]["b"] and y["scale"] is PARAMS["scale"]
    assert bool((y["lstm"][1]["w"] == 0).any())
    assert "['step']" not in seen and "['lstm'][0]['b']" in seen


def test_eval_returns_the_tree_itself_and_gradients_are_masked():
    assert jdrop.drop_connect(None, PARAMS, 0.5, train=False) is PARAMS
    assert jdrop.drop_connect(None, PARAMS, 0.0, train=True) is PARAMS
    w = {"w": jnp.full((8, 200), jnp.inf)}
    g = jax.grad(lambda p: jdrop.drop_connect(KEY, p, 0.5, train=True)["w"].sum())(w)["w"]
    same(g, jdrop.drop_connect(KEY, {"w": jnp.ones((8, 200))}, 0.5, train=True)["w"])


def test_tiles_of_leaves_in_shard_map():
    mesh = jax.make_mesh((8,), ("m",), axis_types=(AxisType.Auto,))
    params, specs = {"a": jnp.ones((16, 30)), "b": jnp.ones((5, 64))}, {"a": P("m"), "b": P(None, "m")}
    f = jax.shard_map(
        lambda k, p: jdrop.drop_connect(k, p, 0.5, train=True, shard=specs),
        mesh=mesh,
        in_specs=(P(), specs),
        out_specs=specs,
    )
    jax.tree.map(same, jax.jit(f)(KEY, params), jdrop.drop_connect(KEY, params, 0.5, train=True))
    with pytest.raises(ValueError, match="drop_connect: shard must name manual mesh axes"):
        jdrop.drop_connect(KEY, params, 0.5, train=False, shard=P("m"))
    for wrong in ([P(), P()], {"a": P(), "c": P()}):
        with pytest.raises(ValueError, match="drop_connect: shard must be a PartitionSpec, or a pytree"):
            jdrop.drop_connect(KEY, params, 0.5, train=True, shard=wrong)
    with_none = {"a": jnp.ones(4), "b": None}
    assert jdrop.drop_connect(KEY, with_none, 0.5, train=True, shard={"a": None, "b": None})["b"] is None


def test_drop_connect_errors():
    for call, error, text in [
        (
            lambda: jdrop.drop_connect(KEY, PARAMS, 0.5, train=True, where=2),
            TypeError,
            "drop_connect: where must be a pred",
        ),
        (
            lambda: jdrop.drop_connect(KEY, PARAMS, jnp.ones(2), train=True),
            ValueError,
            "drop_connect: rate must broadcast",
        ),
        (
            lambda: jdrop.drop_connect(None, PARAMS, 0.5, train=True),
            TypeError,
            "drop_connect: key must be a PRNG key when",
        ),
        (
            lambda: jdrop.drop_connect(KEY, PARAMS, 0.5, train=True, shard=[P()]),
            ValueError,
            "drop_connect: shard must be",
        ),
        (
            lambda: jdrop.drop_connect(KEY, {"w": jnp.ones(3, jnp.float8_e8m0fnu)}, 0.5, train=True),
            TypeError,
            r"drop_connect: params must be float8, .*got float8_e8m0fnu\[3\]; leave it out with where=",
        ),
    ]:
        with pytest.raises(error, match=text):
            call()


# ------------------------------------------------------------------------------------ embeddings


@pytest.mark.parametrize("generator", ["fast", "jax"])
@pytest.mark.parametrize("vocab,dtype", [(1, "int32"), (5, "uint8"), (200, "int16"), (70_000, "int32")])
def test_gathered_rows_equal_rows_of_the_dropped_table(vocab, generator, dtype):
    table = jnp.arange(1.0, 1 + 3 * vocab).reshape(vocab, 3)
    ids = (jnp.arange(40).reshape(4, 10) * 7919 % min(vocab, 127)).astype(dtype)
    dropped = jdrop.embedding_dropout(KEY, table, 0.4, train=True, generator=generator)
    y = jdrop.embedding_dropout(KEY, table[ids], 0.4, train=True, ids=ids, generator=generator)
    same(y, dropped[ids])
    same(jdrop.dropout(KEY, table, 0.4, train=True, shared_axes=1, generator=generator), dropped)


def test_wide_ids_and_high_words(x64):
    table = jnp.ones((300, 2))
    ids = jnp.arange(300, dtype=jnp.int64)
    same(
        jdrop.embedding_dropout(KEY, table[ids], 0.5, train=True, ids=ids),
        jdrop.embedding_dropout(KEY, table, 0.5, train=True),
    )
    far = ids + 2**40
    y = jdrop.embedding_dropout(KEY, jnp.ones((300, 2)), 0.5, train=True, ids=far)
    mask = jdrop.dropout_mask(KEY, (2**41, 1), 0.5, window=((2**40, 300), (0, 1)))
    same(y != 0, jnp.broadcast_to(mask, (300, 2)))


@pytest.mark.parametrize("dtype,vocab", [("uint8", 300), ("int8", 200), ("int16", 50_257), ("uint16", 70_000)])
def test_narrow_ids_with_a_larger_vocabulary(dtype, vocab):
    table = jnp.ones((vocab, 2))
    ids = jnp.arange(200 if dtype == "uint8" else 120).astype(dtype)
    y = jdrop.embedding_dropout(KEY, table[: len(ids)], 0.5, train=True, ids=ids, vocab_size=vocab)
    same(y, jdrop.embedding_dropout(KEY, table, 0.5, train=True)[: len(ids)])


def test_wide_numpy_ids_are_not_truncated():
    ids = np.array([0, 2**32, 5, 2**32 + 5, 2**40])
    rows = [jdrop.dropout_mask(KEY, (2**41, 1), 0.5, window=((int(i), 1), (0, 1)))[0, 0] for i in ids]
    y = jdrop.embedding_dropout(KEY, jnp.ones((5, 2)), 0.5, train=True, ids=ids)
    same(y[:, 0] != 0, jnp.stack(rows))


def test_ids_out_of_range_follow_the_gathers_of_jax():
    table = jnp.ones((50, 2))
    ids = jnp.arange(-60, 70)
    for key in jax.random.split(KEY, 4):  # so that rows at the ends are kept with some keys and dropped with others
        y = jdrop.embedding_dropout(key, table[ids], 0.5, train=True, ids=ids, vocab_size=50)
        same(y, jdrop.embedding_dropout(jax.random.clone(key), table, 0.5, train=True)[ids])


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("dtype", ["int16", "int32"])
def test_negative_ids_count_from_an_end_beyond_their_dtype(dtype, asarray):
    size, ids = 2**33, np.array([-1, -300, 5], dtype)
    rows = [size - 1, size - 300, 5]
    masks = [jdrop.dropout_mask(KEY, (size, 1), 0.5, window=((row, 1), (0, 1)))[0, 0] for row in rows]
    y = jdrop.embedding_dropout(KEY, jnp.ones((3, 2)), 0.5, train=True, ids=asarray(ids), vocab_size=size)
    same(y[:, 0] != 0, jnp.stack(masks))


@pytest.mark.compiled
def test_the_size_of_the_vocabulary_costs_no_memory():
    ids, x = jnp.zeros((4, 8), jnp.int32), jnp.ones((4, 8, 16))
    f = jax.jit(lambda k, x: jdrop.embedding_dropout(k, x, 0.5, train=True, ids=ids, vocab_size=10**9))
    assert f.lower(KEY, x).compile().memory_analysis().temp_size_in_bytes < 4096
    y = f(KEY, x)
    same(y, jnp.broadcast_to(y[:1, :1], y.shape))


def test_rates_by_word_and_under_vmap():
    ids = jnp.array([[0, 1, 2, 0], [2, 2, 1, 0]])
    x = jnp.ones((2, 4, 3))
    rate = jnp.where(ids == 2, 1.0, 0.0)[..., None]
    y = jdrop.embedding_dropout(KEY, x, rate, train=True, ids=ids)
    same(y, jnp.where((ids == 2)[..., None], 0.0, x))
    keys = jax.random.split(KEY, 2)
    f = lambda k, x, i: jdrop.embedding_dropout(k, x, 0.5, train=True, ids=i)
    same(jax.vmap(f)(keys, x, ids), jnp.stack([f(*args) for args in zip(keys, x, ids, strict=True)]))
    same(jax.grad(lambda x: f(KEY, x, ids).sum())(x), f(KEY, x, ids))


@pytest.mark.parametrize(
    "devices",
    [*(pytest.param(n, marks=pytest.mark.long) for n in (1, 2, 4)), pytest.param(8, marks=pytest.mark.compiled)],
)
def test_ids_on_tiles_and_meshes(devices):
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:devices])
    ids, x = jnp.arange(64).reshape(16, 4) % 9, jnp.ones((16, 4, 5))
    whole = jdrop.embedding_dropout(KEY, x, 0.5, train=True, ids=ids)
    f = lambda k, x, i, **o: jdrop.embedding_dropout(k, x, 0.5, train=True, ids=i, **o)
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(a, jax.NamedSharding(mesh, P("d"))) for a in (x, ids)]
        compiled = jax.jit(f).lower(KEY, *sharded).compile()
        same(compiled(KEY, *sharded), whole)
        assert "all-" not in compiled.as_text()
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    tiled = jax.shard_map(
        lambda k, x, i: f(k, x, i, shard=P("d")), mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=P("d")
    )
    same(jax.jit(tiled)(KEY, x, ids), whole)


def test_embedding_errors():
    x, ids = jnp.ones((2, 4, 3)), jnp.zeros((2, 4), jnp.int32)
    f = lambda x=x, k=KEY, **o: jdrop.embedding_dropout(k, x, 0.5, train=True, **o)
    for call, error, text in [
        (
            lambda: f(ids=ids[0]),
            ValueError,
            r"embedding_dropout: ids must have the leading axes of x, whose shape is \(2, 4, 3\), got shape \(4,\)",
        ),
        (lambda: f(ids=x), TypeError, "embedding_dropout: ids must be an integer array"),
        (lambda: f(ids=ids, vocab_size=0), ValueError, "embedding_dropout: vocab_size must be at least 1"),
        (lambda: f(vocab_size=3), ValueError, "embedding_dropout: vocab_size must be the number of rows of x, got 3"),
        (lambda: f(jnp.ones(())), ValueError, "embedding_dropout: x must have an axis of rows"),
        (
            lambda: f(ids=np.array(ids) - 1),
            ValueError,
            "embedding_dropout: ids must not be negative without vocab_size, got -1",
        ),
        (
            lambda: f(ids=ids, generator="jax", k=jax.random.key(0, impl="rbg")),
            NotImplementedError,
            "embedding_dropout: generator must be",
        ),
    ]:
        with pytest.raises(error, match=text):
            call()


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    w: jax.Array
    b: jax.Array


def test_paths_with_attributes_and_other_keys():
    layer = Layer(jnp.ones((8, 100)), jnp.ones(100))
    y = jdrop.drop_connect(KEY, layer, 0.5, train=True)
    for name in ("w", "b"):
        key = jdrop.keys.derive(KEY, "drop_connect", name)
        same(getattr(y, name), jdrop.dropout(key, getattr(layer, name), 0.5, train=True))
    for step, entry in ((2, 2), (-1, "-1"), (True, "True"), ((1, "a"), "(1, 'a')")):
        y = jdrop.drop_connect(KEY, {step: jnp.ones((8, 100))}, 0.5, train=True)[step]
        same(y, jdrop.dropout(jdrop.keys.derive(KEY, "drop_connect", entry), jnp.ones((8, 100)), 0.5, train=True))


def test_leaves_that_are_not_weights_are_unchanged():
    """Even if ``where`` would fail on them."""
    params = {
        "w": jnp.ones((8, 130)),
        "f": jnp.tanh,
        "none": None,
        "name": "x",
        "p": 0.5,
        "n": jnp.arange(3),
        "key": KEY,
    }
    for train in (True, False):
        y = jdrop.drop_connect(jax.random.key(4), params, 0.5, train=train, where=lambda path, leaf: leaf.ndim == 2)
        assert all(y[name] is params[name] for name in params if name != "w")
        assert (y["w"] == 0).any() == train
    float8 = {"w": jnp.ones(4), "small": jnp.ones(4, "float8_e4m3fn")}
    y = jdrop.drop_connect(jax.random.key(5), float8, 1.0, train=True, where=lambda path, leaf: leaf.dtype == "float32")
    assert y["small"] is float8["small"] and not y["w"].any()


def test_dropout_of_sparse_arrays_acts_on_their_data():
    from jax.experimental import sparse

    y = jdrop.drop_connect(jax.random.key(6), sparse.BCOO.fromdense(jnp.eye(300)), 0.5, train=True)
    assert set(np.unique(y.data).tolist()) == {0.0, 2.0} and y.shape == (300, 300)


@pytest.mark.parametrize("library", ["equinox", "linen", "nnx"])
def test_whole_models(library, need, usual_promotion):
    need({"linen": "flax", "nnx": "flax"}.get(library, library))
    x = jnp.ones((2, 8))
    if library == "equinox":
        import equinox as eqx

        mlp = eqx.nn.MLP(8, 3, 16, 2, key=KEY)
        model = eqx.nn.Sequential([mlp, eqx.nn.Dropout(0.5), eqx.nn.Lambda(jax.nn.relu)])
        dropped = jdrop.drop_connect(jax.random.key(7), model, 0.5, train=True)
        assert dropped.layers[1].p == 0.5 and (dropped.layers[0].layers[0].weight == 0).any()
        assert jax.vmap(lambda x: dropped.layers[0](x))(x).shape == (2, 3)
    elif library == "linen":
        from flax import linen

        params = linen.Dense(130).init(KEY, x)
        dropped = jdrop.drop_connect(jax.random.key(7), params, 0.5, train=True)
        assert linen.Dense(130).apply(dropped, x).shape == (2, 130) and (dropped["params"]["kernel"] == 0).any()
    else:
        from flax import nnx

        graph, state = nnx.split(
            nnx.Sequential(nnx.Linear(8, 130, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
        )
        dropped = jdrop.drop_connect(jax.random.key(7), state, 0.5, train=True)
        assert nnx.merge(graph, dropped)(x).shape == (2, 130)
        assert any((leaf == 0).any() for leaf in jax.tree.leaves(dropped) if leaf.ndim == 2)
