"""The kernels of attention for TPUs, in Pallas' interpreter: values, gradients and masks are those of the formula.

Most tests use small tiles, so that there are several of both kinds, with padding.
"""

import functools

import attention_suite
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import KEY, Row, check, data, normal, quick, step, truth
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jdrop
from jdrop.attention import _derivative
from jdrop.attention._mosaic_tpu import MosaicTpu, refusal, tile_size
from jdrop.attention._registry import Implementation

ROW = Row("mosaic_tpu")
LONG = {"queries": 300, "keys": 280}  # three tiles of each


@pytest.fixture
def small(monkeypatch):
    """Tiles of 128, and room in memory for the gradients of two tiles of queries of the usual width."""
    method = MosaicTpu(queries=128, keys=128, resident=2 * 128 * attention_suite.WIDTH)
    registered = Implementation(refusal, functools.partial(_derivative.attend, method))
    monkeypatch.setitem(attention_suite.REGISTRY, "mosaic_tpu", registered)
    return ROW


def lengths(*values):
    return np.array(values, np.int32)


OF_LENGTHS = {"query_seq_lengths": lengths(299, 130), "key_value_seq_lengths": lengths(0, 140)}
CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "a window, lengths, shared queries": {"local_window_size": (20, 130), "shared_axes": 2, **OF_LENGTHS},
    "causal with a window, shared batch and heads": {
        "is_causal": True,
        "local_window_size": (150, 3),
        "shared_axes": (0, 1),
        "scale": -0.3,
    },
    "packed": {"generator": "packed"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_several_tiles(small, options):
    check(small, data(**LONG), **options)


@pytest.mark.parametrize("generator", ["fast", "packed"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"queries": 20, "keys": 15},  # columns are keys and queries
        {"queries": 1, "keys": 3},  # and heads
        {"queries": 130, "keys": 129, "heads": 3, "key_heads": 1},
        {"queries": 5, "keys": 200, "heads": 2, "key_heads": 2, "width": 64},
    ],
    ids=lambda sizes: f"{sizes['queries']} queries, {sizes['keys']} keys",
)
def test_sizes(sizes, generator):
    check(ROW, data(**sizes), jnp.float32(0.3), is_causal=True, generator=generator)


def test_traced_rates():
    for rate in (0.0, 1.0, 0.25):
        check(ROW, data(), jnp.float32(rate))


def test_a_rate_per_example_head_and_query(small):
    rates = np.linspace(0, 1, 2 * 4 * 300, dtype=np.float32).reshape(2, 4, 300, 1)
    check(small, data(**LONG), rates)


def test_without_dropout(small):
    check(small, data(**LONG), is_causal=True, train=False, key_value_seq_lengths=lengths(1, 1000))


def test_bfloat16_is_almost_as_accurate_as_blockwise(small):
    """The gradient of the query is computed from the rounded output, as on GPUs and TPUs by blocks."""
    arrays = data(**LONG, dtype=jnp.bfloat16)
    exact = truth(KEY, *arrays, is_causal=True)
    errors = []
    for row in (small, Row("chunked")):
        results = step(row, KEY, *(jnp.asarray(x) for x in arrays), is_causal=True)
        assert all(x.dtype == jnp.bfloat16 for x in results)
        errors.append([np.abs(np.asarray(x, np.float64) - y).mean() for x, y in zip(results, exact)])
    assert np.all(np.array(errors[0]) <= 1.5 * np.array(errors[1])), errors


def test_queries_that_see_no_key_have_no_gradient():
    q, k, v, do = data()
    do[1] = np.nan
    out, *slopes = step(ROW, KEY, q, k, v, do, key_value_seq_lengths=lengths(15, 0))
    assert not np.any(out[1]) and not any(np.any(x[1]) for x in slopes)
    assert all(np.any(x[0]) and np.all(np.isfinite(x[0])) for x in slopes)


def test_large_logits():
    q, k, v, do = data()
    check(ROW, (100 * q, k, v, do), bound=1e-3)
    q[0], k[0] = 3e4, 1e4  # equal logits of 1e9: their maximum has no digits left for the logarithm of their sum
    results = step(ROW, KEY, q, k, v, do, train=False)
    np.testing.assert_allclose(results[0][0, 0, 0], v[0, :, 0].mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(results[3][0, 3, 0], do[0, :, :2].sum((0, 1)) / 15, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------- transforms


def test_vmap_over_everything():
    """Over keys, rates and lengths, too, and over a part of the operands."""
    arrays = [np.stack([x, 2 * x, x[::-1]]) for x in data()]
    keys, rates = jax.random.split(KEY, 3), jnp.array([0.2, 0.5, 0.9], jnp.float32)
    seen = np.array([[15, 3], [2, 15], [9, 9]], np.int32)

    def one(key, rate, seen, q, k, v, do):
        return step(ROW, key, q, k, v, do, rate, key_value_seq_lengths=seen)

    results = jax.vmap(one)(keys, rates, seen, *arrays)
    shared = jax.vmap(lambda key: step(ROW, key, *(x[0] for x in arrays)))(keys)
    for i in range(3):
        mine = [x[i] for x in arrays]
        rate = np.float32(rates[i])
        expected = truth(keys[i], *mine, rate, key_value_seq_lengths=seen[i])
        attention_suite.close([x[i] for x in results], expected, 5e-5)
        attention_suite.close([x[i] for x in shared], truth(keys[i], *(x[0] for x in arrays)))


def test_other_derivatives_are_those_of_the_reference():
    """Forward mode, second derivatives, checkpoint, and scan."""
    q, k, v, do = (jnp.asarray(x) for x in data(heads=2, key_heads=1, width=8))

    def derivatives(name):
        f = lambda q, k, v: jdrop.dot_product_attention(KEY, q, k, v, 0.5, train=True, implementation=name)
        _, tangent = jax.jvp(f, (q, k, v), (do, jnp.cos(k), jnp.sin(v)))
        slope = jax.grad(lambda q: jnp.vdot(f(q, k, v), do))
        second = jax.jvp(slope, (q,), (jnp.cos(q),))[1]
        layer = jax.checkpoint(lambda x, i: (jnp.tanh(f(x, k, v)) + i, None))
        deep = jax.grad(lambda q: jnp.vdot(jax.lax.scan(layer, q, jnp.arange(3.0))[0], do))(q)
        return tangent, second, deep

    for mine, reference in zip(*(quick(derivatives, static_argnums=0)(name) for name in ("mosaic_tpu", "reference"))):
        np.testing.assert_allclose(mine, reference, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------- devices


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_meshes(kind):
    """Explicit ones keep batch and heads where they are. A kernel cannot be partitioned automatically."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2, devices=jax.devices()[:4])
    arrays = [jax.device_put(x, NamedSharding(mesh, P("data", None, "model"))) for x in data()]
    with jax.set_mesh(mesh):
        if kind == AxisType.Auto:
            with pytest.raises(NotImplementedError, match="automatic mesh of 4 devices"):
                step(ROW, KEY, *arrays)
        else:
            attention_suite.close(step(ROW, KEY, *arrays, is_causal=True), truth(KEY, *data(), is_causal=True))


@pytest.mark.parametrize("check_vma", [True, False])
def test_tiles_of_shard_map(check_vma):
    """Over batch, heads and queries, whose positions and lengths count from the whole array."""
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)
    q, k, v, do = data()
    options = {"is_causal": True, "query_seq_lengths": lengths(19, 11), "key_value_seq_lengths": lengths(15, 7)}

    def tile(q, k, v, do, query_lengths, key_lengths):
        of_lengths = {"query_seq_lengths": query_lengths, "key_value_seq_lengths": key_lengths}
        attend = lambda q, k, v, _: ROW.attend(KEY, q, k, v, shard=P("a", "b", "c"), is_causal=True, **of_lengths)
        out, dq, dk, dv = attention_suite.gradients(attend, q, k, v, do)
        return (out, dq, dk, dv) if check_vma else (out, dq, jax.lax.psum(dk, "c"), jax.lax.psum(dv, "c"))

    of_queries, of_keys = P("a", "c", "b"), P("a", None, "b")
    specs = (of_queries, of_keys, of_keys, of_queries, P("a"), P("a"))
    f = jax.shard_map(
        tile, mesh=mesh, in_specs=specs, out_specs=(of_queries, of_queries, of_keys, of_keys), check_vma=check_vma
    )
    results = quick(f)(q, k, v, do, options["query_seq_lengths"], options["key_value_seq_lengths"])
    attention_suite.close(results, truth(KEY, q, k, v, do, **options))


def test_it_lowers_for_tpus_and_for_no_gpu():
    arrays = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in data(queries=600, keys=700, width=64)]
    rate = jax.ShapeDtypeStruct((3,), jnp.float32)

    def f(keys, rates, *arrays):
        def one(key, rate):
            attend = lambda q, k, v, _: ROW.attend(key, q, k, v, rate, is_causal=True)
            return attention_suite.gradients(attend, *arrays)

        return jax.vmap(one)(keys, rates)

    traced = jax.jit(f).trace(jax.ShapeDtypeStruct((3,), KEY.dtype), rate, *arrays)
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 2
    with pytest.raises(NotImplementedError, match="platform cuda, got 'mosaic_tpu'"):
        traced.lower(lowering_platforms=("cuda",))


# ---------------------------------------------------------------------------------- what it does not serve


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"bias": normal(5, 15)}, "bias"),
        ({"mask": np.ones(15, bool)}, "mask"),
        ({"generator": "jax"}, "generator='jax'"),
        ({"shared_axes": 3}, "keys that share decisions"),
        ({"rate": np.linspace(0, 1, 15, dtype=np.float32)}, "a rate that varies along the keys"),
        ({"dtype": np.float16}, "float16 arrays"),
        ({"width": 257}, "a width of 257"),
        ({"keys": 0}, "sizes that are 0 or symbolic"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refusals(options, reason):
    sizes = {name: options.pop(name) for name in ("dtype", "width", "keys") if name in options}
    q, k, v, _ = data(**sizes)
    with pytest.raises(NotImplementedError, match=f'implementation must be "reference" for {reason}, got'):
        ROW.attend(KEY, q, k, v, **options)


def test_tiles_pad_little():
    for length, size in [(1, 128), (128, 128), (129, 256), (256, 256), (400, 512), (600, 128), (900, 512), (5000, 512)]:
        assert tile_size(length, 512) == size, length
