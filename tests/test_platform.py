"""The forms of a platform are chosen when a program is lowered, and reach no other platform."""

import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval as pe
from members import MEMBERS

import jdrop
from jdrop._lowering import at_lowering
from jdrop._mask import draw_mask
from jdrop._platform import GENERIC, PLATFORMS, Target, cpu, gpu, tpu
from jdrop._platform.generic import index_of_data
from jdrop._primitive import MaskView
from jdrop._random import fast
from jdrop._random.threefry import U64

KEY = jax.random.key(7)
X = jnp.asarray(((np.arange(2 * 3 * 8 * 128) % 61 - 29.5) / 16).astype(np.float32).reshape(2, 3, 8, 128))


def text_for(platform, f, *args):
    """Return the StableHLO of a program, without the attributes that name the platform."""
    text = jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return re.sub(r"module @\S+ attributes \{[^}]*\}", "module", text)


def step_of(name):
    member = MEMBERS[name]

    def step(key, x):
        return jax.value_and_grad(lambda x: jnp.sum(member(key, x, 0.3, train=True).astype("float32")))(x)

    return step


@pytest.fixture(scope="module")
def texts():
    """Return the programs of all members for two platforms that have the same forms."""
    return {name: [text_for(p, step_of(name), KEY, X) for p in ("cuda", "tpu")] for name in MEMBERS}


@pytest.mark.parametrize("name", MEMBERS)
def test_the_forms_for_cpu_reach_no_other_platform(name, texts, use_on_cpu):
    use_on_cpu(PLATFORMS["cuda"])
    text = text_for("cpu", step_of(name), KEY, X)
    assert texts[name] == [text, text]


def test_the_forms_for_cpu_reach_the_cpu(texts):
    """Otherwise the test above would compare nothing. All members share the same few operations."""
    own = {name for name in MEMBERS if text_for("cpu", step_of(name), KEY, X) != texts[name][0]}
    assert own == set(MEMBERS)


DRAWS = ("dropout", "alpha_dropout", "zoneout", "drop_block", "drop_connect", "bias_dropout_add")


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {"generator": g}) for name in DRAWS for g in ("fast", "jax")] + [("gaussian_dropout", {})],
    ids=str,
)
def test_the_forms_for_gpus_give_the_same_values(name, options, use_on_cpu):
    member = MEMBERS[name]
    step = lambda x: jax.value_and_grad(lambda x: member(KEY, x, 0.3, train=True, **options).sum())(x)
    use_on_cpu(GENERIC)
    plain = jax.jit(step)(X)
    use_on_cpu(PLATFORMS["cuda"])
    for form in (step, jax.jit(step), jax.jit(lambda x: jax.tree.map(lambda y: y[0], jax.vmap(step)(x[None])))):
        jax.tree.map(np.testing.assert_array_equal, form(X), plain)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "complex64", "float8_e4m3fn"])
def test_data_of_any_dtype_leave_the_index_as_it_is(dtype, x64):
    values = jnp.asarray([[0.0, -0.0, 1.5, -3.0, jnp.nan, -jnp.nan]]).astype(dtype)
    index = [U64(np.uint32(0), jnp.uint32([[3]])), U64(np.uint32(0), jnp.arange(6, dtype=jnp.uint32)[None])]
    np.testing.assert_array_equal(index_of_data(values, index)[1].lo, np.arange(6)[None])


def depends_on_data(shape, platform, shared=(), bits="fast", transposed=True):
    """Whether decisions of a mask depend on the data, to the eyes of the compiler."""
    mask_shape = tuple(1 if axis in shared else size for axis, size in enumerate(shape))
    mask = draw_mask("f", KEY, jnp.float32(0.3), mask_shape, bits)
    jaxpr = jax.make_jaxpr(lambda x: MaskView(mask, x, platform, transposed=transposed).keep())(jnp.ones(shape)).jaxpr
    return pe.dce_jaxpr(jaxpr, [True])[1] == [True]


@pytest.mark.parametrize("name", ["cuda", "rocm", "tpu"])
def test_masks_depend_on_cotangents_so_that_passes_do_not_share_them(name):
    """XLA for GPUs and TPUs would compute the mask once for both passes, and store it in between."""
    platform = PLATFORMS[name]
    for bits in ("fast", "jax"):
        depends = name != "tpu" or bits == "fast"  # XLA for TPUs would need more memory if those of jax.random did
        assert depends_on_data((2, 3, 130), platform, bits=bits) == depends
        assert depends_on_data((1, 130), platform, bits=bits) == depends, "an axis of size 1 is not shared"
        assert not depends_on_data((2, 3, 130), platform, shared=(1,), bits=bits), "shared decisions stay small"
        assert not depends_on_data((2, 3, 130), PLATFORMS["cpu"], bits=bits)
        assert not depends_on_data((2, 3, 130), platform, bits=bits, transposed=False), "it would follow a softmax"


@pytest.mark.parametrize("name", ["dropout", "alpha_dropout", "zoneout", "gaussian_dropout", "bias_dropout_add"])
def test_only_backward_passes_mask_cotangents(name, use_on_cpu):
    """Under vmap too."""

    class Recorded(gpu.Gpu):
        def unshared_index(self, x, index, *, hashed):
            calls.append(x.shape)
            return index

    calls = []
    use_on_cpu(Recorded())
    f = lambda x: MEMBERS[name](KEY, x, 0.3, train=True)
    gradient = lambda x: jax.vjp(f, x)[1](x)[0]
    for g, number in (
        (f, 0),
        (lambda x: jax.jvp(f, (x,), (x,)), 0),
        (gradient, 1),
        (lambda x: jax.vmap(gradient)(x[None]), 1),
    ):
        calls.clear()
        jax.jit(g)(X)
        assert len(calls) == number, (g, calls)


@pytest.mark.parametrize(("name", "size"), [("cuda", 2**17), ("rocm", 2**17), ("tpu", 2**14)])
@pytest.mark.parametrize("words", [(3, 5), (3, 5, 7, 9), (4,)])
def test_the_key_is_hashed_for_each_row_so_that_one_kernel_makes_row_keys(name, size, words):
    """XLA for GPUs would launch kernels for one seed, and XLA for TPUs would hash it one word at a time."""
    words = jnp.array(words, jnp.uint32)
    row, few, many = (jnp.arange(n, dtype=jnp.uint32) for n in (64, size // 64, size // 64 + 1))
    row = (np.uint32(1), row[:, None])
    key = fast.row_key(fast.seed(words), row)
    for col, shape in (
        (many[None], (64, 1)),
        (few[None], (64, size // 64)),
    ):  # small arrays need no kernel of their own for row keys
        found = PLATFORMS[name].row_key(words, row, col)
        assert found[0].shape == found[1].shape == shape
        np.testing.assert_array_equal(found, np.broadcast_to(key, (2, *shape)))
        hashed = lambda words, col: PLATFORMS[name].row_key(words, row, col)
        seeds = [eqn for eqn in jax.make_jaxpr(hashed)(words, col).eqns if eqn.params.get("name") == "seed"]
        assert [v.aval.shape for eqn in seeds for v in eqn.outvars] == [shape, shape]


def test_a_path_of_names_is_a_loop_only_on_a_cpu():
    derive = lambda k: jdrop.keys.derive(k, "block", 3, "mlp")
    text = {p: text_for(p, derive, KEY) for p in ("cpu", "cuda", "tpu")}
    assert "stablehlo.while" in text["cpu"]
    assert text["cuda"] == text["tpu"] and "stablehlo.while" not in text["cuda"]


@pytest.mark.parametrize("path", [("mlp",), ("block", 3, "mlp", 2**40)], ids=str)
def test_paths_of_names_give_the_same_keys_without_a_loop(path, use_on_cpu):
    derived = jax.jit(lambda k: jdrop.keys.derive(k, *path))(KEY)
    of_ids = lambda k: jdrop.keys.per_example(k, jnp.arange(6, dtype=jnp.int32).reshape(2, 3))
    examples = jax.jit(of_ids)(KEY)
    use_on_cpu(GENERIC)
    assert jax.jit(lambda k: jdrop.keys.derive(k, *path))(KEY) == derived
    assert (jax.jit(of_ids)(KEY) == examples).all()


def test_the_mask_of_a_block_of_scores_depends_on_them():
    q = jnp.ones((1, 8, 1, 16))
    attend = lambda k, q: jdrop.dot_product_attention(k, q, q, q, 0.3, train=True, implementation="chunked")
    grad = jax.grad(lambda q, k: attend(k, q).sum())
    bits_of = lambda platform: re.findall(r"bitcast_convert .*8x8xf32", text_for(platform, grad, q, KEY))
    assert len(bits_of("cuda")) == 3 and not bits_of("cpu")


def test_blockwise_attention_lowers_for_each_platform_in_its_own_form():
    q = jnp.ones((1, 600, 1, 16))
    f = lambda k, q: jdrop.dot_product_attention(k, q, q, q, 0.3, train=True, is_causal=True, implementation="chunked")
    squeezed = {
        p: bool(re.search(r"tensor<1x1x1x\d+x600xf32>", text_for(p, f, KEY, q))) for p in ("cuda", "tpu", "cpu")
    }
    assert squeezed == {"cuda": True, "tpu": True, "cpu": False}


def test_a_program_for_two_platforms_contains_both_forms():
    f = jax.jit(lambda k, x: jdrop.dropout(k, x, 0.3, train=True))
    exported = jax.export.export(f, platforms=("cpu", "tpu"))(jax.random.PRNGKey(0), X)
    np.testing.assert_array_equal(exported.call(jax.random.PRNGKey(0), X), f(jax.random.PRNGKey(0), X))


def test_a_symbolic_axis_exports_for_gpus_and_tpus():
    f = jax.jit(lambda k, x: jdrop.dropout(k, x, 0.3, train=True))
    x = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), 128), jnp.float32)
    assert jax.export.export(f, platforms=("cuda", "tpu"))(jax.random.PRNGKey(0), x).platforms == ("cuda", "tpu")


@pytest.mark.parametrize(("module", "platform"), [(cpu, cpu.Cpu), (gpu, gpu.Gpu), (tpu, tpu.Tpu)])
def test_every_form_says_why_it_exists_and_names_its_test(module, platform):
    forms = [value for value in vars(platform).values() if inspect.isfunction(value)]
    for form in forms:
        for part in ("symptom", "gain", "seen: jax", "test:"):
            assert part in " ".join(form.__doc__.lower().split()), (form, part)
    folder = pathlib.Path(__file__).parent
    source = pathlib.Path(module.__file__).read_text()
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(p.read_text() for p in folder.glob("test_*.py")), re.M))
    assert set(re.findall(r"\btest_\w+\b(?!\.py)", source)) <= defined
    assert all((folder / name).exists() for name in re.findall(r"\btest_\w+\.py", source))


# ---------------------------------------------------------------------------------- at_lowering


def times_two_on_cpu(target, x, scale):
    return {"y": x * (2 * scale if target.name == "cpu" else scale)}


def product(x, scale=1.5):
    return at_lowering(times_two_on_cpu, x, jnp.float32(scale))["y"]


def test_a_function_of_the_target_gets_the_platform_of_lowering():
    x = jnp.arange(3.0)
    for f in (product, jax.jit(product), jax.vmap(product), jax.jit(jax.vmap(product))):
        np.testing.assert_array_equal(f(x), 3 * x)
    mapped = jax.vmap(product, in_axes=(1, 0), out_axes=1)(jnp.ones((3, 2)), jnp.arange(2.0))
    np.testing.assert_array_equal(mapped, np.ones((3, 2)) * np.array([0.0, 2.0]))


def test_its_derivatives_are_those_of_the_plain_form():
    """Callers define first derivatives; only second ones use these."""
    y, slope = jax.jvp(product, (jnp.float32(1),), (jnp.float32(1),))
    assert (y, slope) == (1.5, 1.5) and jax.grad(product)(jnp.float32(1)) == 1.5
    assert jax.jvp(lambda x: product(jnp.float32(1)) * x, (1.0,), (1.0,)) == (3, 3)


def test_types_of_results_may_be_given():
    x = jnp.arange(3.0)
    f = lambda x: at_lowering(times_two_on_cpu, x, jnp.float32(1), types={"y": jax.typeof(x)})["y"]
    np.testing.assert_array_equal(f(x), 2 * x)
    np.testing.assert_array_equal(jax.jit(f)(x), 2 * x)


def number_of_devices(target, x):
    return x * 0 + target.devices


def test_the_target_knows_how_many_devices_share_an_array():
    x, devices = jnp.ones(8), lambda x: at_lowering(number_of_devices, x)
    assert devices(x)[0] == 1 and Target().devices == 1 and Target().platform is GENERIC
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec("a")
    sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    assert jax.jit(devices)(sharded)[0] == 8
    whole, part = (
        jax.jit(jax.shard_map(devices, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=names))(sharded)
        for names in ({"a", "b"}, {"a"})
    )
    assert whole[0] == 1 and part[0] == 2
