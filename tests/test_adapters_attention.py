"""Attention for linen and nnx: compared with their functions, and inside both multi-head modules."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jdrop

linen, nnx = peers.require("flax.linen", whole_file=True), peers.require("flax.nnx")
attend = peers.adapter("linen").dot_product_attention
as_flax = functools.partial(attend, generator="jax")
KEY = jax.random.key(41)
BOTH_OF_FLAX = (linen.dot_product_attention, nnx.dot_product_attention)
pytestmark = pytest.mark.usefixtures("usual_promotion")


def qkv(*batch, queries=12, keys=20, heads=4, kv_heads=4, width=8, dtype="float32"):
    shapes = [(queries, heads), (keys, kv_heads), (keys, kv_heads)]
    draws = jax.random.split(jax.random.key(1), 3)
    return [jax.random.normal(d, (*batch, *shape, width), dtype) for d, shape in zip(draws, shapes)]


def test_one_function_for_both():
    assert peers.adapter("nnx").dot_product_attention is attend
    ours = list(inspect.signature(attend).parameters.values())
    for theirs in BOTH_OF_FLAX:
        parameters = list(inspect.signature(theirs).parameters.values())
        assert [p.name for p in parameters[:12]] == [p.name for p in ours[:12]]
        assert {p.name for p in parameters} <= {p.name for p in ours}
        for p in parameters[:12]:
            assert p.default == inspect.signature(attend).parameters[p.name].default


@pytest.mark.parametrize(
    ("batch", "broadcast"),
    [((), False), ((3,), False), ((2, 3), False), ((2, 1, 3), False), ((), True), ((2, 3), True)],
    ids=str,
)
def test_masks_of_flax_bit_for_bit(batch, broadcast):
    """Zero logits and identity values show which probabilities are kept."""
    q = jnp.zeros((*batch, 12, 4, 20))
    k = jnp.zeros((*batch, 20, 4, 20))
    v = jnp.broadcast_to(jnp.eye(20)[:, None], k.shape)
    options = {"dropout_rng": KEY, "dropout_rate": 0.3, "broadcast_dropout": broadcast}
    y = as_flax(q, k, v, **options)
    for theirs in BOTH_OF_FLAX:
        np.testing.assert_array_equal(y != 0, jax.jit(functools.partial(theirs, **options))(q, k, v) != 0)
    assert ((y == 0).mean() - 0.3) ** 2 < 25 * 0.3 * 0.7 / (12 * 20)
    fast = attend(q, k, v, **options)
    shape = (int(np.prod(batch)), 4, 12, 20)
    mask = jdrop.dropout_mask(KEY, shape, 0.3, shared_axes=(0, 1) if broadcast else ())
    mask = jnp.broadcast_to(mask, shape).swapaxes(1, 2).reshape(fast.shape)
    np.testing.assert_array_equal(fast != 0, mask)


SCATTERED = np.random.default_rng(3).random((2, 3, 1, 12, 20)) < 0.7
SCATTERED[..., 0] = True


@pytest.mark.parametrize(
    ("batch", "mask", "rate"),
    [((), None, 0.0), ((3,), np.arange(20) < 15, 0.3), ((3,), SCATTERED[0], 0.3), ((2, 3), SCATTERED, 0.3)],
    ids=["no mask", "a mask of keys", "a mask of scores", "two batch axes"],
)
def test_values_and_gradients_of_flax(batch, mask, rate):
    data = qkv(*batch)
    bias = jax.random.normal(jax.random.key(2), (4, 12, 20))

    def results(f, mask):
        options = {"dropout_rng": KEY, "dropout_rate": rate, "mask": mask, "bias": bias}
        return jax.jit(jax.value_and_grad(lambda q, k, v: (f(q, k, v, **options) ** 2).sum(), (0, 1, 2)))(*data)

    ours = results(as_flax, None if mask is None else mask.astype(jnp.float32))  # nnx needs a bool mask
    for theirs in BOTH_OF_FLAX:
        for a, b in zip(*map(jax.tree.leaves, (ours, results(theirs, mask)))):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_options_that_only_nnx_has():
    data = qkv(2, 3, queries=16, keys=16, kv_heads=2)
    for options in ({"is_causal": True}, {"dropout_rng": KEY, "dropout_rate": 0.3, "is_causal": True}):
        ours, theirs = (jax.jit(functools.partial(f, **options))(*data) for f in (as_flax, nnx.dot_product_attention))
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("generator", ["fast", "jax"])
def test_rates(generator):
    f, data = functools.partial(attend, generator=generator), qkv(2)
    plain = f(*data)
    for options in ({"dropout_rate": 0.5, "deterministic": True}, {"dropout_rate": 0}, {"dropout_rate": np.float64(0)}):
        np.testing.assert_array_equal(f(*data, **options), plain)  # and no key is needed
    for rate in (1, jnp.float32(1)):
        y, pull = jax.vjp(functools.partial(f, dropout_rng=KEY, dropout_rate=rate), *data)
        assert not y.any() and all(jnp.isfinite(g).all() for g in pull(jnp.ones_like(y)))
    traced = jax.jit(lambda rate, *x: f(*x, dropout_rng=KEY, dropout_rate=rate))
    assert jnp.isfinite(traced(jnp.float32(0.3), *data)).all() and traced(jnp.float32(0.6), *data).any()
    assert traced._cache_size() == 1
    half = jax.eval_shape(lambda *x: f(*x, dropout_rng=KEY, dropout_rate=np.float64(0.3)), *qkv(2, dtype="bfloat16"))
    assert half.dtype == jax.eval_shape(lambda *x: f(*x, dtype=jnp.bfloat16), *data).dtype == jnp.bfloat16


def test_errors():
    data, text = qkv(2), "^dot_product_attention: "
    for rate in (-0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match=text + "dropout_rate must lie in"):
            attend(*data, dropout_rng=KEY, dropout_rate=rate, deterministic=True)
    with pytest.raises(ValueError, match=text + "dropout_rate must broadcast"):
        attend(*data, dropout_rng=KEY, dropout_rate=np.full(2, 0.5))
    with pytest.raises(TypeError, match=text + "dropout_rng must be a PRNG key, got None"):
        attend(*data, dropout_rate=0.5)
    with pytest.raises(TypeError, match=text + "deterministic must be a bool"):
        attend(*data, deterministic=0)
    with pytest.raises(TypeError, match=text + "broadcast_dropout must be a bool"):
        attend(*data, broadcast_dropout=1)
    q, k, v = qkv(2, 3)
    with pytest.raises(ValueError, match=text + "key must have the batch axes of query"):
        attend(q, k.swapaxes(0, 1), v)
    with pytest.raises(ValueError, match=text + "mask must broadcast to"):
        attend(q, k, v, mask=jnp.ones((3, 2, 1, 12, 20)))
    unserved = ("precision", "module", "einsum_dot_general", "qk_attn_weights_einsum", "attn_weights_value_einsum")
    for name in (*unserved, "promote_dtype", "input_positions"):
        with pytest.raises(NotImplementedError, match=text + f"{name} must be None, got str"):
            attend(*data, **{name: "highest"})


def test_the_default_precision_is_accepted():
    data = qkv(2)
    for precision in ("default", jax.lax.Precision.DEFAULT):
        np.testing.assert_array_equal(attend(*data, precision=precision), attend(*data))
    with pytest.raises(NotImplementedError, match="precision must be None, got str; run the step under"):
        attend(*data, precision="highest")


def test_in_shard_map_one_key_for_all_tiles_is_an_error_with_a_fix():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    tiled = functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("d"),) * 3, out_specs=P("d"))
    data, f = qkv(8), functools.partial(attend, dropout_rng=KEY, dropout_rate=0.5)
    with pytest.raises(ValueError, match=r"dropout_rng must vary .* pass shard="):
        tiled(f)(*data)
    sharded = tiled(functools.partial(f, broadcast_dropout=False, shard=P("d")))(*data)
    np.testing.assert_allclose(sharded, f(*data, broadcast_dropout=False), rtol=1e-5, atol=1e-6)
    evaluated = tiled(functools.partial(f, deterministic=True))(*data)  # the key is not used
    np.testing.assert_allclose(evaluated, attend(*data), rtol=1e-5, atol=1e-6)


def test_under_pmap_the_key_is_used_as_it_is():
    keys = jax.random.split(KEY, 2)
    data = [jnp.stack([x, x]) for x in qkv(2)]
    f = lambda key, *data: attend(*data, dropout_rng=key, dropout_rate=0.5)
    y = jax.pmap(f, devices=jax.devices()[:2])(keys, *data)
    np.testing.assert_allclose(y, jnp.stack([f(key, *(x[0] for x in data)) for key in keys]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("spec", "served"), [(P("d"), True), (P(None, "d"), False)], ids=str)
def test_batch_axes_on_an_explicit_mesh(spec, served):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    data = qkv(2, 2)
    f = jax.jit(functools.partial(attend, dropout_rng=KEY, dropout_rate=0.5, broadcast_dropout=False))
    expected = f(*data)
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(x, NamedSharding(mesh, spec)) for x in data]
        if served:
            np.testing.assert_allclose(f(*sharded), expected, rtol=1e-5, atol=1e-6)
        else:
            with pytest.raises(NotImplementedError, match="must have batch axes that JAX can merge, got float32"):
                f(*sharded)


# ------------------------------------------------------------------------------------ the modules


def in_linen(f, rate=0.3, **options):
    """Return parameters, and ``(params, rng, x) -> y`` of linen's module, which requests a key as it does by default."""
    layer = linen.MultiHeadDotProductAttention(
        2, dropout_rate=rate, deterministic=False, **({"attention_fn": f} if f else {}), **options
    )
    x = jnp.ones((64, 4, 4))
    params = layer.init({"params": jax.random.key(0), "dropout": KEY}, x)
    return params, lambda params, rng, x: layer.apply(params, x, rngs={"dropout": rng})


def in_nnx(f, rate=0.3, **options):
    options |= {"attention_fn": f} if f else {}
    layer = nnx.MultiHeadAttention(
        2, 4, dropout_rate=rate, deterministic=False, decode=False, rngs=nnx.Rngs(0), **options
    )
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    return params, lambda params, rng, x: nnx.merge(graph, params, rest)(x, rngs=nnx.Rngs(dropout=rng))


BOTH = pytest.mark.parametrize("module", [in_linen, in_nnx], ids=["linen", "nnx"])


@pytest.mark.examples
@pytest.mark.parametrize(("module", "broadcast"), [(in_linen, False), (in_nnx, True)], ids=["linen", "nnx"])
def test_training(module, broadcast):
    x, target = peers.data()
    x = x.reshape(64, 4, 4)  # [batch, time, feature]

    def run(f):
        params, apply = module(f, broadcast_dropout=broadcast)

        def loss(params, step):
            y = apply(params, jax.random.fold_in(KEY, step), x) + x
            return ((y.sum((1, 2)) - 4 * target[:, 0]) ** 2).mean()

        return peers.train(loss, params)

    theirs = run(None)
    peers.same_run(theirs, run(as_flax))
    if not broadcast:  # other masks would be noticed
        assert abs(run(attend) - theirs).max() > 1e-3


@BOTH
def test_nothing_is_dropped_in_evaluation(module):
    x = peers.data()[0].reshape(64, 4, 4)
    results = []
    for f in (None, attend):
        params, apply = module(f, rate=0.0)
        results.append(apply(params, KEY, x))
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-5)


@BOTH
def test_sow_weights_is_not_supported(module):
    if module is in_linen:
        layer = linen.MultiHeadDotProductAttention(2, attention_fn=attend)
        call = lambda: layer.init(KEY, jnp.ones((2, 4, 4)), sow_weights=True)
    else:
        layer = nnx.MultiHeadAttention(2, 4, attention_fn=attend, decode=False, rngs=nnx.Rngs(0))
        call = lambda: layer(jnp.ones((2, 4, 4)), sow_weights=True)
    with pytest.raises(NotImplementedError, match=r"^dot_product_attention: module must be None"):
        call()


@pytest.mark.compiled
@BOTH
def test_memory_of_a_gradient_is_linear_in_time(module):
    sizes = {}
    for name, f, steps in (("theirs", None, 4096), ("ours", attend, 4096), ("quarter", attend, 1024)):
        params, apply = module(f, broadcast_dropout=False)
        step = jax.jit(jax.grad(lambda p, x, apply=apply: (apply(p, KEY, x) ** 2).sum()))
        compiled = step.lower(params, jax.ShapeDtypeStruct((1, steps, 4), jnp.float32)).compile()
        sizes[name] = compiled.memory_analysis().temp_size_in_bytes
    assert sizes["ours"] < sizes["theirs"] / 10 and sizes["ours"] < 4.1 * sizes["quarter"], sizes
