"""dot_product_attention on meshes: the same mask, each device its own part of it, and nothing exchanged for it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_formula import IMPLEMENTATIONS, QUICK, close, formula, normal, quick, use_plan, visible
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_sharding import COLLECTIVES, largest

import jdrop
from jdrop import _chunked

KEY = jax.random.key(41)
SHAPE = B, N, T, S = 4, 8, 24, 144  # scores; four key heads
OVER_BATCH = P("a")
SPREADS = {"batch": (("a", "b"), None), "heads": (None, "a"), "both": ("a", "b")}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


def mesh(kind, *sizes):
    names = ("a", "b", "c")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))


def revealing(batch=B):
    """Zero logits, identity values, and a gradient that shows the mask: as attention_formula.reveal."""
    eye = np.eye(S, dtype=np.float32)
    digit = 2.0 ** (np.arange(N) % 2)
    q, k = np.zeros((batch, T, N, S), np.float32), np.zeros((batch, S, N // 2, S), np.float32)
    do = np.broadcast_to(eye[:T, None] * digit[:, None], q.shape) * np.float32(S / 2)
    return q, k, np.broadcast_to(eye[:, None], k.shape), do


def masks(out, dv):
    digits = np.rint(np.asarray(dv)[..., :T]).astype(int)
    backward = np.stack([digits & 1, digits >> 1], -1)  # [B, S, K, T, 2]
    return np.asarray(out).swapaxes(1, 2) != 0, np.moveaxis(backward, (2, 4, 3, 1), (1, 2, 3, 4)).reshape(-1, N, T, S)


def step(key, q, k, v, do, rate=0.5, **options):
    f = lambda v: jdrop.dot_product_attention(key, q, k, v, rate, train=True, **options)
    out, pull = jax.vjp(f, v)
    return out, pull(do)[0]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spread", SPREADS)
def test_jit_over_a_mesh(implementation, kind, spread):
    batch, heads = SPREADS[spread]
    arrays = revealing(8)
    expected = np.asarray(jdrop.dropout_mask(KEY, (8, *SHAPE[1:]), 0.5))
    there = mesh(kind, 4, 2)
    with jax.set_mesh(there):
        placed = [jax.device_put(x, NamedSharding(there, P(batch, None, heads))) for x in arrays]
        f = jax.jit(lambda key, *x: step(key, *x, implementation=implementation))
        compiled = f.lower(KEY, *placed).compile(compiler_options=QUICK)
        out, dv = compiled(KEY, *placed)
        for found in masks(out, dv):
            np.testing.assert_array_equal(found, expected)
        assert out.sharding.is_equivalent_to(placed[0].sharding, 4)
        parts = {"a": 4, "b": 2, None: 1, ("a", "b"): 8}
        text = compiled.as_text()
        assert not re.search(COLLECTIVES, text)
        assert largest(text) <= placed[0].size // parts[batch] // parts[heads] * S // T  # the size of its values


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_segments_that_wait_for_others_exchange_nothing(kind, monkeypatch):
    arrays = [normal(i, 4, 40, n, 16) for i, n in enumerate((8, 4, 4, 8))]
    there = mesh(kind, 4, 2)
    with jax.set_mesh(there), monkeypatch.context() as patch:
        use_plan(patch, 8, segment=8, scores=1)
        placed = [jax.device_put(x, NamedSharding(there, P("a", None, "b"))) for x in arrays]

        def step(key, q, k, v, do):
            options = {"train": True, "is_causal": True, "implementation": "chunked"}
            out, pull = jax.vjp(lambda *x: jdrop.dot_product_attention(key, *x, 0.5, **options), q, k, v)
            return out, *pull(do)

        compiled = jax.jit(step).lower(KEY, *placed).compile(compiler_options=QUICK)
        assert not re.search(COLLECTIVES, compiled.as_text())
        factor = np.asarray(jdrop.dropout_mask(KEY, (4, 8, 40, 40), 0.5)) / 0.5
        close(
            compiled(KEY, *placed), formula(*arrays[:3], factor, seen=visible((4, 8, 40, 40), None, True), do=arrays[3])
        )
    _chunked.attend.clear_cache()


@pytest.mark.parametrize("spec", [P(None, "a"), P("b", "a")], ids=str)
def test_spread_queries_on_an_auto_mesh(implementation, spec):
    arrays = revealing()
    expected = np.asarray(jdrop.dropout_mask(KEY, SHAPE, 0.5))
    there = mesh(AxisType.Auto, 4, 2)
    with jax.set_mesh(there):
        specs = [spec, P(spec[0]), P(spec[0]), spec]
        placed = [jax.device_put(x, NamedSharding(there, s)) for x, s in zip(arrays, specs)]
        for found in masks(*quick(lambda *x: step(KEY, *x, implementation=implementation))(*placed)):
            np.testing.assert_array_equal(found, expected)


def everything(batch=B, width=16):
    """Arrays of a call with all options, and what they are made of: (arrays, over scores, lengths)."""
    q, do = (normal(i, batch, T, N, width) for i in (0, 3))
    k, v = (normal(i, batch, S, N // 2, width) for i in (1, 2))
    bias, mask = normal(4, 1, N, 1, S), normal(5, batch, 1, T, S) > -1
    rate = np.linspace(0.1, 0.9, batch * T, dtype=np.float32).reshape(batch, 1, T, 1)
    lengths = np.arange(batch) % 3 * 9 + 5, np.arange(batch) % 3 * 60 + 20
    return (q, k, v, do, bias), (mask, rate), tuple(x.astype(np.int32) for x in lengths)


def truth(arrays, over_scores, lengths):
    (q, k, v, do, bias), (mask, rate) = arrays, over_scores
    shape = q.shape[0], N, T, S
    kept = np.asarray(jdrop.dropout_mask(KEY, shape, rate)) / (1 - rate)
    seen = visible(shape, mask, True, 9, *lengths)
    return formula(q, k, v, kept, seen=seen, bias=bias, do=do)


def full_step(key, q, k, v, do, bias, mask, rate, query_lengths, key_lengths, **options):
    options |= {"mask": mask, "query_seq_lengths": query_lengths, "key_value_seq_lengths": key_lengths}
    options |= {"is_causal": True, "local_window_size": 9}
    f = lambda q, k, v, b: jdrop.dot_product_attention(key, q, k, v, rate, train=True, bias=b, **options)
    out, pull = jax.vjp(f, q, k, v, bias)
    return out, *pull(do)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_values_and_gradients_over_a_mesh(implementation, kind):
    operands = everything(8)
    there = mesh(kind, 4, 2)
    with jax.set_mesh(there):
        place = lambda x, *spec: jax.device_put(x, NamedSharding(there, P(*spec)))
        arrays = [place(x, "a", None, "b") for x in operands[0][:4]]
        mask, rate = (place(x, "a") for x in operands[1])
        lengths = [place(x, "a") for x in operands[2]]
        f = quick(lambda *x: full_step(*x, implementation=implementation))
        found = f(KEY, *arrays, place(operands[0][4], None, "b"), mask, jnp.asarray(rate), *lengths)
    close(found, truth(*operands))


@pytest.mark.parametrize(
    "spec", [P("a", "b"), P(None, None, "c"), P("a", "b", "c"), P(None, None, ("c", "a"))], ids=str
)
def test_shard_map_with_shard(implementation, spec):
    """Batch, heads and queries are spread; positions count from the first query of the whole array."""
    (q, k, v, do, bias), (mask, rate), lengths = operands = everything()
    b, n, t = (*spec, None)[:3]
    specs = (P(), P(b, t, n), P(b, None, n), P(b, None, n), P(b, t, n), P(None, n), P(b, None, t), P(b, None, t), P(b))

    def attend(key, q, k, v, bias, mask, rate, query_lengths, key_lengths):
        lengths = {"query_seq_lengths": query_lengths, "key_value_seq_lengths": key_lengths}
        options = {"shard": spec, "is_causal": True, "local_window_size": 9, "implementation": implementation}
        return jdrop.dot_product_attention(key, q, k, v, rate, train=True, bias=bias, mask=mask, **lengths, **options)

    for check_vma in (True, False)[: 2 if spec == P("a", "b", "c") else 1]:
        tiled = jax.shard_map(
            attend,
            mesh=mesh(AxisType.Auto, 2, 2, 2),
            in_specs=(*specs[:4], *specs[5:], P(b)),
            out_specs=specs[1],
            check_vma=check_vma,
        )

        @quick
        def both(q, k, v, do, bias, tiled=tiled):
            out, pull = jax.vjp(lambda q, k, v, b: tiled(KEY, q, k, v, b, mask, rate, *lengths), q, k, v, bias)
            return out, *pull(do)

        close(both(q, k, v, do, bias), truth(*operands))


@pytest.mark.parametrize("options", [{"shared_axes": 0}, {"generator": "jax"}], ids=str)
def test_shard_map_draws_the_mask_of_the_whole(implementation, options):
    expected = np.asarray(jdrop.dropout_mask(KEY, SHAPE, 0.5, **options))
    *arrays, do = revealing()
    specs = (P("a", "c", "b"), P("a", None, "b"), P("a", None, "b"), P("a", "c", "b"))

    def tile(key, q, k, v, do):
        out, dv = step(key, q, k, v, do, shard=P("a", "b", "c"), implementation=implementation, **options)
        return out, jax.lax.psum(dv, "c")

    tiled = jax.shard_map(
        tile, mesh=mesh(AxisType.Auto, 2, 2, 2), in_specs=(P(), *specs), out_specs=(specs[0], specs[1]), check_vma=False
    )
    for found in masks(*quick(tiled)(KEY, *arrays, do)):
        np.testing.assert_array_equal(found, expected)


def test_evaluation_in_shard_map_counts_from_the_whole_too(implementation):
    q, k, v, _ = everything()[0][:4]
    lengths = np.array([3, 9, 20, 24], np.int32)
    expected = formula(q, k, v, seen=visible(SHAPE, None, True, None, lengths))
    options = {"shard": P(None, None, "a"), "is_causal": True, "implementation": implementation}
    f = lambda q, k, v, n: jdrop.dot_product_attention(None, q, k, v, 0.5, train=False, query_seq_lengths=n, **options)
    tiled = jax.shard_map(
        f, mesh=mesh(AxisType.Auto, 8), in_specs=(P(None, "a"), P(), P(), P()), out_specs=P(None, "a")
    )
    close([quick(tiled)(q, k, v, lengths)], [expected])


def in_shard_map(spec=OVER_BATCH, key=KEY, **options):
    q, k, v, _ = everything(8)[0][:4]
    f = lambda key, q, k, v: jdrop.dot_product_attention(key, q, k, v, 0.5, train=True, **options)
    tiled = jax.shard_map(f, mesh=mesh(AxisType.Auto, 8), in_specs=(P(), spec, spec, spec), out_specs=spec)
    return jax.eval_shape(tiled, key, q, k, v)


def test_keys_must_be_whole():
    rule = r"dot_product_attention: shard must not spread the keys, got .*; gather keys and values first: a softmax"
    with pytest.raises(ValueError, match=rule):
        in_shard_map(P(None, "a"), shard=P(None, None, None, "a"))


@pytest.mark.parametrize(
    ("shard", "error", "text"),
    [
        (
            None,
            ValueError,
            r"prng_key must vary over the manual mesh axes \('a',\) when shard is None, got the same key",
        ),
        ("a", TypeError, "shard must be a PartitionSpec, got 'a'"),
        (P("b"), ValueError, r"shard must name manual mesh axes, here \('a',\)"),
        (P("a", "a"), ValueError, "shard must name each mesh axis once, over the 4 axes"),
    ],
)
def test_bad_shards(shard, error, text):
    with pytest.raises(error, match="dot_product_attention: " + text):
        in_shard_map(shard=shard)


def test_tiles_of_bits_that_do_not_go_by_index(implementation):
    argument = "implementation" if implementation == "chunked" else "generator"
    with pytest.raises(NotImplementedError, match=f"dot_product_attention: {argument} must be"):
        in_shard_map(key=jax.random.key(0, impl="rbg"), shard=P("a"), generator="jax", implementation=implementation)


@pytest.mark.parametrize("specs", [(P(None, "a"), P()), (P(), P("a"))], ids=str)
def test_explicit_meshes_that_chunked_cannot_serve(specs):
    q, k, v = (normal(i, 8, 256, 8, 8) for i in range(3))
    there = mesh(AxisType.Explicit, 8)
    with jax.set_mesh(there):
        q, k, v = (jax.device_put(x, NamedSharding(there, s)) for x, s in zip((q, k, v), (specs[0], *specs[1:] * 2)))
        rule = (
            'implementation must be "reference" on an explicit mesh that spreads more than batch and heads, or not all'
        )
        with pytest.raises(NotImplementedError, match=rule):
            jdrop.dot_product_attention(KEY, q, k, v, 0.5, train=True, implementation="chunked")


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
@pytest.mark.parametrize(
    ("specs", "text"),
    [
        ((P(), P(None, "a"), P(None, "a")), "key must be whole along keys and width"),
        ((P(), P(), P(None, "a")), "value must be whole along keys and width"),
        ((P(None, None, None, "a"),) * 3, "query must be whole along width"),
    ],
    ids=str,
)
def test_keys_and_width_are_whole_on_an_explicit_mesh(implementation, specs, text):
    there = mesh(AxisType.Explicit, 8)
    with jax.set_mesh(there):
        q, k, v = (jax.device_put(normal(i, 8, 256, 8, 8), NamedSharding(there, s)) for i, s in enumerate(specs))
        with pytest.raises(ValueError, match=rf"^dot_product_attention: {text}, got float32\["):
            jdrop.dot_product_attention(KEY, q, k, v, 0.5, train=True, implementation=implementation)


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_queries_spread_on_an_explicit_mesh(implementation):
    q, k, v = (normal(i, 2, 256, 2, 8) for i in range(3))
    kept = np.asarray(jdrop.dropout_mask(KEY, (2, 2, 256, 256), 0.5)) * 2
    there = mesh(AxisType.Explicit, 8)
    with jax.set_mesh(there):
        placed = [jax.device_put(x, NamedSharding(there, s)) for x, s in zip((q, k, v), (P(None, "a"), P(), P()))]
        f = lambda *x: jdrop.dot_product_attention(KEY, *x, 0.5, train=True, implementation=implementation)
        out = quick(f)(*placed)
        assert out.sharding.spec[1] == "a"
    close([out], [formula(q, k, v, kept)])
