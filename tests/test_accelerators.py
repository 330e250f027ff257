"""What the compilers for GPUs and TPUs make of the library, counted in programs that no device runs."""

import functools
import os
import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jdrop

sys.path.append(str(pathlib.Path(__file__).parents[1] / "scripts"))
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # pytest-xdist has several processes
import _aot
import _bench
import _examples
import _machine_code
import _thin
import check_compiled
import check_kernels_gpu
import check_thin

pytestmark = [pytest.mark.accelerators, pytest.mark.usefixtures("usual_promotion")]
WORDS = check_compiled.WORDS
FORMS = [pytest.param(form, id=", ".join(form)) for form in (("unrolled", "plain"), ("scan", "checkpoint"))]
MODEL = types.SimpleNamespace(size="8x512x768", heads=12, rate=0.1)
# Of the forward and the backward pass. patch_dropout sorts twice and gathers, and multi_sample_dropout has four samples.
MOST_KERNELS = {"drop_block": 6, "drop_connect": 3, "gaussian_noise": 3, "patch_dropout": 7, "multi_sample_dropout": 6}
MORE_EXTRA = ("patch_dropout", "multi_sample_dropout")


def dropout(words, x):
    return jdrop.dropout(jax.random.wrap_key_data(words), x, 0.1, train=True)


def value_and_gradient(words, x, dy):
    y, pull = jax.vjp(lambda x: dropout(words, x), x)
    return y, pull(dy)


def program(target, f, *arguments):
    return _aot.compile_for(_aot.mesh(target), f, *arguments)


# ---------------------------------------------------------------------------------- masks


def transformer(form, drop, key):
    return check_compiled.model_facts(_aot.mesh("h100"), drop, key, form, 2, jnp.dtype("float32"), MODEL)


def longest_life(facts):
    """Return that of the masks of attention probabilities."""
    return max((stored.life for stored in facts.stored if stored.type == "pred[8,12,512,512]"), default=0.0)


@pytest.mark.parametrize("form", FORMS)
def test_no_mask_of_attention_probabilities_is_kept_for_the_backward_pass(form):
    drop = lambda key, x: jdrop.dropout(key, x, 0.1, train=True)
    none, fast = transformer(form, lambda key, x: x, None), transformer(form, drop, jax.random.key(0))
    assert fast.temporary_bytes <= 1.04 * none.temporary_bytes  # 1.020 and 1.028, or 1.082 and 1.081 with shared masks
    assert longest_life(fast) < 0.3  # 0.21 and 0.08, or 0.69 and 0.37
    others = [stored for stored in fast.stored if stored.type == "pred[8,512,768]"]
    assert len(others) <= (form[0] == "unrolled")  # of the input, which both passes drop


def test_the_mask_of_bernoulli_is_kept():
    """Otherwise the test above would compare nothing."""
    facts = transformer(("unrolled", "plain"), _bench.contenders(0.1)["where(bernoulli)"], jax.random.key(0))
    assert longest_life(facts) > 0.6


# ---------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "kernels"), [((4096, 1024), 2), ((8, 512, 768), 2), ((64, 128), 1), ((2048,), 1)])
def test_a_dropout_takes_one_extra_kernel_and_a_small_one_none(shape, kernels, dtype):
    x = jax.ShapeDtypeStruct(shape, dtype)
    assert _aot.facts(program("h100", dropout, WORDS, x), 1).kernels == kernels
    assert _aot.facts(program("h100", value_and_gradient, WORDS, x, x), 1).kernels == kernels


def test_members_take_few_kernels():
    rows = list(check_compiled.member_rows(_aot.mesh("h100"), "forward+backward", jnp.dtype("float32")))
    assert {row["name"] for row in rows} > {"dropout", "drop_connect", "alpha_dropout"}
    assert not [row for row in rows if row["launches"] > MOST_KERNELS.get(row["name"], 2)]
    assert not [row for row in rows if row["extra"] > 1 and row["name"] not in MORE_EXTRA]


@pytest.mark.parametrize("target", ["h100", "v5e"])
def test_a_derived_key_takes_few_kernels_and_no_loop(target):
    derive = lambda words: jax.random.key_data(jdrop.keys.derive(jax.random.wrap_key_data(words), "block", 3, "mlp"))
    compiled = program(target, derive, WORDS)
    assert _aot.facts(compiled, 1).kernels <= 3
    assert " while(" not in compiled.as_text()


@pytest.mark.parametrize("shape", [(4096, 1024), (64, 128)])
def test_a_tpu_hashes_no_key_one_word_at_a_time(shape):
    text = program("v5e", dropout, WORDS, jax.ShapeDtypeStruct(shape, "float32")).as_text()
    entry = text[text.index("\nENTRY") :]
    assert "u32[" in entry and "xor(" not in entry


# ---------------------------------------------------------------------------------- attention


def attention(dtype, causal):
    attend = functools.partial(jdrop.dot_product_attention, train=True, is_causal=causal)
    return check_compiled.attention_program(_aot.mesh("h100"), attend, 0.1, (4, 512, 16, 64), jnp.dtype(dtype))


@pytest.mark.parametrize(("dtype", "moved"), [("bfloat16", 44), ("float32", 75)])
def test_attention_moves_few_bytes_in_few_launches(dtype, moved):
    """In bfloat16, 43 bytes per score, or 51 without rounded exponentials; at this length, 13 are for operands."""
    facts = _aot.facts(attention(dtype, False), 1)
    assert facts.moved_bytes <= moved * 4 * 16 * 512**2
    assert facts.launches <= 28


def test_products_of_attention_end_with_exponentials():
    """So no scores in float32 are written."""
    text = attention("bfloat16", False).as_text()
    assert re.search(r"gemm_fusion\S* = bf16\[64,512,512\]", text)
    assert not re.search(r"fusion\S* = f32\[64,512,512\]", text)


@pytest.mark.parametrize(("dtype", "megabytes"), [("bfloat16", 200), ("float32", 300)])
def test_layers_hold_no_scores_for_the_backward_pass_on_a_gpu(dtype, megabytes):
    """Four layers take 192 MB in bfloat16 and 279 in float32, or 223 and 539 with shared scores."""

    def loss(q, words):
        for i in range(4):
            key = jax.random.fold_in(jax.random.wrap_key_data(words), i)
            q = q + jdrop.dot_product_attention(key, q, q, jnp.tanh(q), 0.1, train=True)
        return q.astype("float32").sum()

    q = jax.ShapeDtypeStruct((4, 512, 16, 64), dtype)
    assert program("h100", jax.grad(loss), q, WORDS).memory_analysis().temp_size_in_bytes <= megabytes * 1e6


# ---------------------------------------------------------------------------------- machine code


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("dtype", "load", "instructions"), [("float32", 16, 24), ("bfloat16", 8, 28)])
def test_the_kernel_of_dropout_spills_nothing_loads_four_elements_at_once_and_is_short(
    dtype, load, instructions, direction
):
    """22.5 and 26 instructions per element, as many as ``x * c`` loads at once, and the ratio is that of the memory."""
    drops = check_compiled.machine_contenders(0.1)
    floor, ours = (
        check_compiled.machine_kernels(_aot.mesh("h100"), drops[name], (4096, 1024), direction, jnp.dtype(dtype))
        for name in ("scale", "jdrop fast")
    )
    main = ours[-1]
    assert main.spills == 0
    assert main.loads[0] == floor[-1].loads[0] == load
    assert main.threads == floor[-1].threads == 2**20
    assert len(main.instructions) <= 4 * instructions
    assert _machine_code.seconds(ours) < 1.02 * _machine_code.seconds(floor)


# ---------------------------------------------------------------------------------- attention kernels


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [64, 128])
def test_the_kernel_of_attention_spills_nothing_and_its_mask_takes_fifteen_instructions_or_nine(width, causal):
    pytest.importorskip("absl", reason="Mosaic GPU needs absl-py on jax 0.10")
    rows = check_kernels_gpu.rows_of("forward", width, causal)
    without, fast, packed = rows
    assert all(row["spills"] == 0 for row in rows)
    assert without["instructions"] < 10 and fast["mask"] < 15.5 and packed["mask"] < 9.5


@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_the_kernels_of_attention_on_a_tpu_store_no_scores(target):
    attend = functools.partial(jdrop.dot_product_attention, train=True, is_causal=True, implementation="mosaic_tpu")
    shape = (4, 4096, 8, 64)
    compiled = check_compiled.attention_program(_aot.mesh(target), attend, 0.1, shape, jnp.dtype("bfloat16"))
    text, scores = compiled.as_text(), 4 * 8 * 4096**2
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert _aot.facts(compiled, 1).temporary_bytes < scores / 2


@pytest.mark.parametrize("kernel", ["gradient of queries", "gradients of keys"])
@pytest.mark.parametrize("width", [64, 128])
def test_the_kernels_of_the_gradients_spill_little_and_their_mask_takes_few_instructions(width, kernel):
    pytest.importorskip("absl", reason="Mosaic GPU needs absl-py on jax 0.10")
    rows = check_kernels_gpu.rows_of(kernel, width, causal=True)
    without, fast, packed = rows
    most = 160 if (width, kernel) == (128, "gradients of keys") else 0
    assert all(row["spills"] <= most for row in rows)
    assert without["instructions"] < 14 and fast["mask"] < 18 and packed["mask"] < 11


# ---------------------------------------------------------------------------------- examples


@pytest.mark.parametrize(("contender", "hashes"), [("scale", False), ("jdrop fast", True), ("jdrop jax", True)])
def test_a_recorded_step_is_compiled_with_its_key_and_with_each_contender(contender, hashes):
    arguments = jax.tree.map(_examples.type_of, (jnp.ones((64, 128)), jax.random.key(0)))
    step = _examples.Step(
        lambda w, key: w - jdrop.dropout(key, w, 0.5, train=True), {"donate_argnums": 0}, arguments, {}
    )
    jax.clear_caches()
    with check_compiled.PATCHES[contender]:
        text = _examples.compile_for("h100", step).as_text()
    assert (" xor(" in text) == hashes
    jax.clear_caches()


# ---------------------------------------------------------------------------------- devices


@pytest.mark.parametrize("target", ["h100", "v5e"])
@pytest.mark.parametrize("spec", [PartitionSpec("data"), PartitionSpec(None, "data")], ids=str)
def test_devices_exchange_nothing_for_a_mask(target, spec):
    mesh = _aot.mesh(target, 4)
    x = jax.ShapeDtypeStruct((4096, 1024), "bfloat16", sharding=NamedSharding(mesh, spec))
    facts = _aot.facts(_aot.compile_for(mesh, value_and_gradient, WORDS, x, x), 1024)
    assert facts.collectives == 0 and facts.temporary_bytes < 2**16


@pytest.mark.parametrize("target", ["h100", "v5e"])
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_devices_exchange_nothing_for_attention(target, implementation):
    attend = functools.partial(jdrop.dot_product_attention, train=True, implementation=implementation)
    mesh, shape = _aot.mesh(target, 4), (4, 512, 8, 64)
    compiled = check_compiled.attention_program(mesh, attend, 0.1, shape, jnp.dtype("bfloat16"))
    assert check_compiled.attention_facts(mesh, compiled, shape).collectives == 0


# ---------------------------------------------------------------------------------- layers that skip units


def test_thin_layers_do_half_of_the_operations_in_less_memory():
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    arrays = of((8192, 1024)), of((1024, 4096)), of((4096, 1024))
    full, thinned = (
        check_thin.row(name, _aot.mesh("h100"), _thin.BLOCKS[name][0], *arrays)
        for name in ("no dropout", "thin.mlp, blocks of 64")
    )
    assert thinned["gflops"] < 0.51 * full["gflops"]
    assert thinned["moved_mb"] < 0.7 * full["moved_mb"]
    assert thinned["temporary_mb"] < full["temporary_mb"]
    assert thinned["launches"] <= full["launches"] + 10
