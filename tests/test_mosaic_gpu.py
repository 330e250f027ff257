"""The attention kernels for Hopper GPUs: tiles and whole kernels against the formula, refusals, and lowering.

No test needs a GPU. JAX's interpreter runs the kernels on CPU: jax 0.12 has one for all that they use, except for
products of an array in registers, which ``jnp.dot`` computes here.
"""

import functools
import importlib
import pathlib
import sys

import attention_suite as suite
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdrop
from jdrop._mask import draw_mask
from jdrop._platform import Target
from jdrop._prepare import check_arguments
from jdrop._random import fast
from jdrop.attention import _mosaic_gpu, _tile
from jdrop.attention._spec import AttentionInputs, AttentionSpec
from jdrop.attention._tile import Index, Limits

KEY = suite.KEY
METHOD, CUDA = _mosaic_gpu.MosaicGpu(), Target("cuda")
BOUND = {"bfloat16": 1e-2, "float16": 2e-3}  # times the largest element


@pytest.fixture
def plgpu():
    pytest.importorskip("absl", reason="Mosaic GPU needs absl-py on jax 0.10")
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


# ---------------------------------------------------------------------------------- tiles


def index(dtype, shape, axis, lanes=6):
    whole = jnp.asarray(np.indices(shape)[axis], dtype)
    return Index(whole & lanes, whole & ~dtype(lanes))


def tile_shape(queries, keys, key_axis):
    return (queries, keys) if key_axis == 1 else (keys, queries)


@pytest.mark.parametrize("generator", ["fast", "packed"])
def test_a_tile_has_the_bits_of_dropout_mask(generator):
    shape = 2, 3, 64, 300
    whole = draw_mask("f", KEY, jnp.float32(0.3), shape, generator)
    mask = jdrop.dropout_mask(jax.random.clone(KEY), shape, 0.3, generator=generator)
    words = _mosaic_gpu.row_keys(CUDA, whole, shape[:3], None)
    threshold, _ = fast.threshold(whole.rate)
    for key_axis, lanes in [(1, 6), (1, 0), (0, 6), (0, 2**20 - 9)]:
        size = tile_shape(16, 128, key_axis)
        keys = index(np.uint32, size, key_axis, lanes)
        kept = _tile.keep(whole.word_bits, tuple(words[1, 2, :, 32:48]), jnp.uint32(128), keys, threshold, key_axis)
        kept = kept if key_axis == 1 else kept.T
        np.testing.assert_array_equal(kept, mask[1, 2, 32:48, 128:256])


LIMITS = {
    "causal": {"is_causal": True},
    "window": {"local_window_size": (20, 30)},
    "left": {"local_window_size": (5, 2**31 - 1)},
    "causal window": {"is_causal": True, "local_window_size": (9, 2)},
    "lengths": {"query_seq_lengths": np.array([50, 0]), "key_value_seq_lengths": np.array([77, 20])},
    "all": {
        "is_causal": True,
        "local_window_size": 40,
        "query_seq_lengths": np.array([64, 30]),
        "key_value_seq_lengths": np.array([0, 96]),
    },
}


def limits_of(options, example, num_queries, num_keys, first=0):
    options = dict(options)
    window = options.get("local_window_size")
    window = (window, window) if isinstance(window, int) else window
    queries, keys = (options.get(name) for name in ("query_seq_lengths", "key_value_seq_lengths"))
    spec = AttentionSpec(options.get("is_causal", False), window, False)
    queries = None if queries is None else jnp.int32(queries[example] - first)
    return Limits.of(spec, num_keys, first, queries, None if keys is None else jnp.int32(keys[example]))


@pytest.mark.parametrize("options", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("first", [0, 32])
def test_tiles_hide_the_keys_that_are_hidden(options, first):
    """``first`` is the position of the first query of a tile of ``shard_map``."""
    num_queries, num_keys, rows, columns = 64, 96, 16, 32
    whole = suite.visible((2, 1, num_queries, num_keys), **options)[:, 0, first:]
    for example in range(2):
        limits, some = limits_of(options, example, num_queries, num_keys, first), np.zeros_like(whole[0])
        for query in range(0, num_queries - first, rows):
            low, high = (int(n) for n in _tile.key_range(limits, jnp.int32(query), rows, num_keys))
            for key in range(0, num_keys, columns):
                expected = whole[example, query : query + rows, key : key + columns]
                for key_axis in (0, 1):
                    size = tile_shape(rows, columns, key_axis)
                    of = [index(np.int32, size, axis) for axis in (1 - key_axis, key_axis)]
                    seen = _tile.visible(limits, jnp.int32(query), of[0], jnp.int32(key), of[1])
                    seen = np.broadcast_to(seen, size)
                    np.testing.assert_array_equal(seen if key_axis == 1 else seen.T, expected)
                assert expected.all() or _tile.is_cut(limits, jnp.int32(query), rows, jnp.int32(key), columns)
                if expected.any():
                    assert low < key + columns and high > key
                    begin, end = (int(n) for n in _tile.query_range(limits, jnp.int32(key), columns, num_queries))
                    assert begin < query + rows and end > query
            some[query : query + rows, low : max(high, low)] = True
        assert not (whole[example] & ~some).any()


def scores(seed=0, queries=64, keys=256, width=16):
    q, k, v, do = (
        x[0, :, 0] for x in suite.data(batch=1, heads=1, key_heads=1, queries=queries, keys=keys, width=width)
    )
    return q, k, v, do


@pytest.mark.parametrize("key_axis", [0, 1])
@pytest.mark.parametrize("drops", [True, False])
def test_tiles_give_the_softmax_and_its_gradients(key_axis, drops):
    q, k, v, do = scores()
    seen = suite.visible((1, 1, 64, 256), key_value_seq_lengths=np.array([200]))[0, 0].copy()
    seen[5] = False
    mask = np.random.default_rng(1).random((64, 256)) < 0.7 if drops else np.ones((64, 256), bool)
    keep, scale = 0.7 if drops else 1.0, 0.3
    turn = (lambda x: x) if key_axis == 1 else np.transpose
    whole = lambda x: x[None, :, None]
    out, dq, dk, dv = suite.formula(
        *map(whole, (q, k, v, do)), mask[None, None] / keep, seen=seen[None, None], scale=scale
    )
    factor, tiles = jnp.float32(scale * _tile.LOG2E), [slice(i, i + 64) for i in range(0, 256, 64)]
    peak, total, result = jnp.full(64, _tile.LOWEST), jnp.zeros(64), jnp.zeros((64, 16))
    products = [np.where(seen[:, at], q @ k[at].T, -np.inf).astype(np.float32) for at in tiles]
    for x, at in zip(products, tiles):
        e, shrink, peak, total = _tile.softmax_step(jnp.asarray(turn(x)), factor, peak, total, key_axis)
        result = result * shrink[:, None] + jnp.where(mask[:, at], turn(np.asarray(e)), 0) @ v[at]
    result = jnp.where(total == 0, 0, 1 / total / keep)[:, None] * result
    np.testing.assert_allclose(result, out[0, :, 0], atol=1e-5)
    assert total[5] == 0 and (np.delete(np.asarray(total), 5) >= 1).all()
    log_sum = jnp.where(total == 0, jnp.inf, peak + jnp.log2(total))
    delta = jnp.sum(result * do, axis=-1) * keep
    grads = [np.zeros_like(x) for x in (q, k, v)]
    for x, at in zip(products, tiles):
        kept = jnp.asarray(turn(mask[:, at])) if drops else None
        p, ds = _tile.gradients(turn(x), turn(do @ v[at].T), factor, log_sum, delta, kept, key_axis)
        p, ds = (turn(np.asarray(y)) for y in (p, ds))
        grads[0] += ds @ k[at] * scale / keep
        grads[1][at] += ds.T @ q * scale / keep
        grads[2][at] += p.T @ do / keep
    for x, y in zip(grads, (dq, dk, dv)):
        np.testing.assert_allclose(x, y[0, :, 0], atol=2e-5)


# ---------------------------------------------------------------------------------- whole kernels


def attend(key, rate, options, q, k, v, do):
    """Return the output and the gradients by the kernels, with the arguments of the public function."""
    shape, options = suite.scores_shape(q, k), dict(options)
    shared, scale, start = options.pop("shared_axes", ()), options.pop("scale", q.shape[-1] ** -0.5), None
    window = options.get("local_window_size")
    window = (window, window) if isinstance(window, int) else window
    spec = AttentionSpec(options.get("is_causal", False), window, False)
    lengths = [options.get(name) for name in ("query_seq_lengths", "key_value_seq_lengths")]
    lengths = [None if x is None else jnp.asarray(x, jnp.int32).reshape(-1, 1, 1, 1) for x in lengths]
    decisions = tuple(1 if axis in shared else n for axis, n in enumerate(shape))
    generator = options.get("generator", "fast")
    mask = None if rate is None else draw_mask("f", key, rate, decisions, generator)
    inputs = AttentionInputs(jnp.float32(scale), None, *lengths, start, mask)
    out, peak, log_sum = METHOD.forward(CUDA, spec, q, k, v, None, inputs)
    gradients = METHOD.backward(CUDA, spec, (q, k, v, None, inputs, peak, log_sum, out), do)
    return (out, *gradients[:3]), (peak, log_sum)


def data(dtype, **sizes):
    sizes = {"batch": 1, "heads": 1, "key_heads": 1, "queries": 128, "keys": 256, "width": 64, **sizes}
    return [jnp.asarray(x, dtype) for x in suite.data(**sizes)]


CASES = {
    "plain": ({}, {}),
    "no dropout": ({}, {"train": False}),
    "any lengths": ({"queries": 72, "keys": 201}, {}),
    "causal": ({"queries": 256}, {"is_causal": True}),
    "causal, more queries": ({"queries": 256, "keys": 130}, {"is_causal": True}),
    "grouped": ({"heads": 4, "key_heads": 2, "queries": 64, "keys": 128}, {}),
    "wide": ({"width": 128}, {"is_causal": True}),
    "float16": ({"dtype": "float16"}, {}),
    "window": ({"queries": 200}, {"local_window_size": (40, 60)}),
    "causal window": ({"queries": 200}, {"is_causal": True, "local_window_size": 70}),
    "lengths": (
        {"batch": 3, "queries": 128, "keys": 256},
        {"query_seq_lengths": np.array([128, 70, 0]), "key_value_seq_lengths": np.array([256, 0, 131])},
    ),
    "negative scale": ({}, {"scale": -0.2}),
    "scale 0": ({"queries": 64}, {"scale": 0.0, "is_causal": True}),
    "shared by heads and batch": (
        {"batch": 2, "heads": 2, "key_heads": 2, "queries": 64, "keys": 128},
        {"shared_axes": (0, 1)},
    ),
    "shared by queries": ({"heads": 2}, {"shared_axes": (2,)}),
    "packed": ({"queries": 72, "keys": 201}, {"generator": "packed"}),
}


@pytest.fixture
def interpreted(plgpu, monkeypatch):
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("the interpreter of this JAX lacks operations of the kernels")
    from jdrop.attention._mosaic_gpu import parts

    def add_product(total, a, b):
        return total + jnp.dot(a.astype("float32"), b[...].astype("float32"))

    monkeypatch.setattr(parts, "INTERPRET", plgpu.InterpretGPUParams())
    monkeypatch.setattr(parts, "add_product", add_product)


@pytest.mark.every_case
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("sizes", "options"), CASES.values(), ids=CASES)
def test_kernels_give_the_formula(sizes, options):
    sizes, options = dict(sizes), dict(options)
    dtype, rate = sizes.pop("dtype", "bfloat16"), 0.4 if options.pop("train", True) else None
    arrays = data(dtype, **sizes)
    key = jax.random.clone(KEY)
    run = jax.jit(lambda rate, *arrays: attend(key, rate, options, *arrays))
    results, (peak, log_sum) = run(None if rate is None else jnp.float32(rate), *arrays)
    exact = [np.asarray(x, np.float32) for x in arrays]
    expected = suite.truth(
        jax.random.clone(KEY), *exact, *([] if rate is None else [rate]), train=rate is not None, **options
    )
    suite.close([np.asarray(x, np.float32) for x in results], expected, BOUND[dtype])
    hiding = {name: x for name, x in options.items() if name not in ("scale", "shared_axes", "generator")}
    blind = ~suite.visible(suite.scores_shape(*arrays[:2]), **hiding).any(-1).swapaxes(1, 2)[..., None]
    np.testing.assert_array_equal(log_sum == np.inf, blind)
    assert (np.asarray(peak)[blind] == 0).all()
    assert (np.asarray(results[0], np.float32)[blind[..., 0]] == 0).all()


@pytest.mark.every_case
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("rate", [0.0, 1.0, 2**-31, 0.999])
def test_kernels_take_any_traced_rate(rate):
    arrays = data("bfloat16", queries=64, keys=128)
    results, _ = jax.jit(lambda rate: attend(jax.random.clone(KEY), rate, {}, *arrays))(jnp.float32(rate))
    expected = suite.truth(jax.random.clone(KEY), *(np.asarray(x, np.float32) for x in arrays), np.float64(rate))
    suite.close([np.asarray(x, np.float32) for x in results], expected, 1.5e-2)


@pytest.mark.every_case
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("generator", ["fast", "packed"])
def test_kernels_draw_the_mask(generator):
    """With equal probabilities and one-hot values, the output shows each decision."""
    shape, parts = (1, 1, 70, 256), []
    for first in range(0, 256, 128):
        mask = draw_mask("f", jax.random.clone(KEY), jnp.float32(0.5), shape, generator)
        q, k = jnp.zeros((1, 70, 1, 128), "bfloat16"), jnp.zeros((1, 256, 1, 128), "bfloat16")
        v = jnp.eye(256, dtype="bfloat16")[None, :, None, first : first + 128]
        inputs = AttentionInputs(dropout=mask)
        out, *_ = jax.jit(functools.partial(METHOD.forward, CUDA, AttentionSpec(False, None, False)))(
            q, k, v, None, inputs
        )
        parts.append(np.asarray(out, np.float32).swapaxes(1, 2))
    mask = np.asarray(jdrop.dropout_mask(jax.random.clone(KEY), shape, 0.5, generator=generator))
    np.testing.assert_array_equal(np.concatenate(parts, axis=-1), mask * 2 / 256)


@pytest.mark.usefixtures("interpreted")
def test_a_tile_of_shard_map_has_its_part_of_the_mask():
    q, k, v, do = data("bfloat16", batch=2, heads=2, key_heads=2, queries=64, keys=128)
    whole = suite.truth(jax.random.clone(KEY), *(np.asarray(x, np.float32) for x in (q, k, v, do)), 0.5, is_causal=True)
    mask = draw_mask("f", jax.random.clone(KEY), jnp.float32(0.5), (2, 2, 64, 128))
    start = jnp.asarray([[0, 1], [0, 0], [0, 24], [0, 0]], jnp.uint32)
    inputs = AttentionInputs(jnp.float32(1 / 8), start=start, dropout=mask)
    out, *_ = jax.jit(functools.partial(METHOD.forward, CUDA, AttentionSpec(True, None, True)))(
        q[1:, 24:56], k[1:], v[1:], None, inputs
    )
    suite.close([np.asarray(out, np.float32)], [whole[0][1:, 24:56]], 1e-2)


@pytest.mark.usefixtures("interpreted")
def test_kernels_under_vmap_give_the_results_of_each_key():
    arrays = data("bfloat16", queries=64, keys=128)
    words = jnp.asarray([[0, 1], [0, 2]], jnp.uint32)
    one = lambda words: attend(jax.random.wrap_key_data(words), jnp.float32(0.5), {}, *arrays)[0]
    together = jax.jit(jax.vmap(one))(words)
    for i in range(2):
        for x, y in zip(together, jax.jit(one)(words[i])):
            np.testing.assert_array_equal(x[i], y)


# ---------------------------------------------------------------------------------- lowering and refusals


@pytest.mark.parametrize(("sizes", "options"), CASES.values(), ids=CASES)
@pytest.mark.usefixtures("plgpu")
def test_kernels_lower(sizes, options):
    rate = jnp.float32(0.5) if options.get("train", True) else None
    arrays = data(**{"dtype": "bfloat16", **sizes})
    options = {name: x for name, x in options.items() if name != "train"}
    f = jax.jit(lambda *arrays: attend(jax.random.clone(KEY), rate, options, *arrays)[0])
    assert f.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu") >= 3


@pytest.mark.usefixtures("plgpu")
def test_kernels_lower_with_64_bits():
    arrays = data("bfloat16", heads=2)
    with jax.enable_x64(True):
        f = jax.jit(lambda *x: attend(jax.random.clone(KEY), jnp.float32(0.5), {"is_causal": True}, *x)[0])
        assert "mosaic_gpu" in f.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.usefixtures("plgpu")
def test_kernels_lower_inside_shard_map():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    f = lambda *x: attend(jax.random.clone(KEY), jnp.float32(0.5), {"is_causal": True}, *x)[0]
    f = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec))
    assert "mosaic_gpu" in f.trace(*data("bfloat16", batch=2)).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.usefixtures("plgpu")
def test_kernels_lower_in_the_check_for_devices(monkeypatch):
    """On a GPU, device_report.py calls the kernels by the public function."""
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "scripts")
    checks = importlib.import_module("_kernel_checks")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    arrays = checks.arrays({}, "bfloat16")
    name = checks.implementation()
    attend = lambda *x: jdrop.dot_product_attention(KEY, *x, 0.3, train=True, implementation=name)
    f = jax.jit(lambda q, k, v, do: jax.vjp(attend, q, k, v)[1](do))
    assert f.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu") >= 3


def refusal(dtype="bfloat16", rate=0.5, generator="fast", shared_axes=(), train=True, over_scores=(), **sizes):
    q, k, v, _ = data(dtype, **sizes)
    arguments = check_arguments(
        "f",
        KEY,
        (q, k, v),
        rate,
        shape=suite.scores_shape(q, k),
        train=train,
        shared_axes=shared_axes,
        generator=generator,
        key_argument="prng_key",
    )
    return _mosaic_gpu.refusal(arguments, q, k, v, over_scores)


REFUSED = {
    "float32 arrays": {"dtype": "float32"},
    "a width of 80": {"width": 80},
    "fewer than 128 keys": {"keys": 127},
    "bias": {"over_scores": ("bias", "mask")},
    "generator='jax'": {"generator": "jax"},
    "more than one rate": {"rate": np.full((1, 1, 128, 1), 0.5, np.float32)},
    "keys that share decisions": {"shared_axes": 3},
    "sizes that are 0": {"queries": 0},
}


@pytest.mark.parametrize(("reason", "options"), REFUSED.items(), ids=REFUSED)
def test_what_the_kernels_cannot_serve_is_refused(reason, options):
    assert reason in refusal(**options)


@pytest.mark.usefixtures("plgpu")
@pytest.mark.parametrize(
    "options",
    [{}, {"shared_axes": (0, 1, 2)}, {"rate": np.full((1, 1, 1, 1), 0.5, np.float32)}, {"train": False, "rate": 0.0}],
    ids=str,
)
def test_what_the_kernels_can_serve_is_not_refused(options):
    assert refusal(**options) is None


def test_kernels_that_cannot_be_imported_are_refused(monkeypatch):
    _mosaic_gpu._missing.cache_clear()
    monkeypatch.setitem(sys.modules, "jdrop.attention._mosaic_gpu.parts", None)
    assert "cannot be imported" in refusal()
    _mosaic_gpu._missing.cache_clear()
