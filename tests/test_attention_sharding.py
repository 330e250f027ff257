"""Attention on meshes: the same mask, of which each device draws its own part, without communication."""

import functools
import re

import attention_suite
import jax
import numpy as np
import pytest
from attention_suite import KEY, close, data, gradients, largest, normal, quick, truth
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from members import COLLECTIVES

import jdrop

implementation = attention_suite.implementation
B, N, T, S = 8, 4, 24, 36  # scores; two key heads
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def mesh(kind, *sizes):
    names = ("a", "b", "c")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))


def put(on, x, *spec):
    return jax.device_put(x, NamedSharding(on, P(*spec)))


ARRAYS = data(batch=B, queries=T, keys=S, heads=N, key_heads=2, width=8)
OVER_SCORES = {
    "rate": np.linspace(0.1, 0.9, B * T, dtype=np.float32).reshape(B, 1, T, 1),
    "mask": normal(5, B, 1, T, S) > -1,
    "query_seq_lengths": (np.arange(B) % 3 * 9 + 5).astype(np.int32),
    "key_value_seq_lengths": (np.arange(B) % 3 * 12 + 9).astype(np.int32),
}
STATIC = {"is_causal": True, "local_window_size": 9}


def everything(implementation, key, q, k, v, do, bias, over_scores, **options):
    """Return the output and the gradients of a call with all options."""
    attend = lambda q, k, v, b: implementation.attend(key, q, k, v, bias=b, **over_scores, **options)
    return gradients(attend, q, k, v, do, bias)


# ---------------------------------------------------------------------------------- jit over a mesh


LAYOUTS = {  # kind of mesh, axes of batch and of heads, options
    "auto, batch and heads": (AUTO, "a", "b", STATIC),
    "explicit, batch and heads": (EXPLICIT, "a", "b", STATIC),
    "auto, batch": (AUTO, ("a", "b"), None, {}),
}


@functools.cache
def program(implementation, layout):
    """Return the compiled program with all options, its results, and the sharding of query.

    The bias has a value per example, head and key, so its gradient sums only over unsharded axes.
    """
    kind, batch, heads, options = LAYOUTS[layout]
    the_mesh = mesh(kind, 4, 2)
    with jax.set_mesh(the_mesh):
        arrays = [put(the_mesh, x, batch, None, heads) for x in ARRAYS]
        bias = put(the_mesh, normal(4, B, N, 1, S), batch, heads)
        over_scores = {name: put(the_mesh, x, batch) for name, x in OVER_SCORES.items()}
        f = quick(lambda *x: everything(implementation, *x, **options))
        compiled = f.lower(KEY, *arrays, bias, over_scores).compile()
        return compiled, compiled(KEY, *arrays, bias, over_scores), arrays[0].sharding


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_gradients_and_mask_over_a_mesh(implementation, layout):
    _, results, sharding = program(implementation, layout)
    close(results, truth(KEY, *ARRAYS, bias=normal(4, B, N, 1, S), **OVER_SCORES, **LAYOUTS[layout][3]))
    assert results[0].sharding.is_equivalent_to(sharding, 4)


@pytest.mark.compiled
@pytest.mark.parametrize("layout", LAYOUTS)
def test_devices_exchange_nothing_and_store_only_their_part(implementation, layout):
    compiled, _, _ = program(implementation, layout)
    parts = {"a": 4, "b": 2, None: 1, ("a", "b"): 8}
    _, batch, heads, _ = LAYOUTS[layout]
    text = compiled.as_text()
    assert not re.search(COLLECTIVES, text)
    assert largest(text) <= B * N * T * S // parts[batch] // parts[heads]


def test_a_bias_that_broadcasts_on_an_explicit_mesh(implementation):
    """Its gradient is summed over devices."""
    the_mesh, bias = mesh(EXPLICIT, 4, 2), normal(4, 1, N, 1, S)
    with jax.set_mesh(the_mesh):
        arrays = [put(the_mesh, x, "a", None, "b") for x in ARRAYS]
        f = quick(lambda *x: everything(implementation, *x))
        results = f(KEY, *arrays, put(the_mesh, bias, None, "b"), {"rate": np.float32(0.5)})
    close(results, truth(KEY, *ARRAYS, bias=bias))


def test_operands_that_are_sharded_differently_on_an_explicit_mesh(implementation):
    """They are first resharded like the scores."""
    the_mesh, bias, seen = mesh(EXPLICIT, 4, 2), normal(4, B, N, T, S), normal(5, B, 1, T, S) > -1
    lengths, rate = np.arange(B, dtype=np.int32) + S - B, np.linspace(0, 0.5, B, dtype=np.float32).reshape(B, 1, 1, 1)

    def attend(q, k, v, bias, seen, lengths, rate):
        return implementation.attend(KEY, q, k, v, rate, bias=bias, mask=seen, key_value_seq_lengths=lengths)

    expected = quick(attend)(*ARRAYS[:3], bias, seen, lengths, rate)
    with jax.set_mesh(the_mesh):
        arrays = [put(the_mesh, x, "a", None, "b") for x in ARRAYS[:3]]
        others = [put(the_mesh, bias, None, "a", None, "b"), put(the_mesh, seen, None, None, "b")]
        others += [put(the_mesh, lengths, "b"), put(the_mesh, rate, "b")]
        close([quick(attend)(*arrays, *others)], [expected])


def test_sharded_queries_on_an_auto_mesh(implementation):
    the_mesh = mesh(AUTO, 4, 2)
    with jax.set_mesh(the_mesh):
        specs = [("b", "a"), ("b",), ("b",), ("b", "a")]
        arrays = [put(the_mesh, x, *spec) for x, spec in zip(ARRAYS, specs)]
        f = quick(lambda *x: gradients(lambda q, k, v, _: implementation.attend(KEY, q, k, v), *x))
        close(f(*arrays), truth(KEY, *ARRAYS))


# ---------------------------------------------------------------------------------- shard_map


@pytest.mark.parametrize(
    ("spec", "check_vma", "options"),
    [
        (P("a", "b"), True, {"shared_axes": 0, "rate": 0.4}),
        (P("a", "b", "c"), True, {"generator": "jax", **STATIC, **OVER_SCORES}),
        (P(None, None, ("c", "a")), False, {**STATIC, **OVER_SCORES}),
    ],
    ids=["batch and heads", "batch, heads and queries", "queries"],
)
def test_shard_map_with_shard(implementation, spec, check_vma, options):
    """Positions count from the first query of the whole array, and so does the mask."""
    static = {name: x for name, x in options.items() if not isinstance(x, np.ndarray)}
    over_scores = {name: x for name, x in options.items() if isinstance(x, np.ndarray)}
    b, n, t = (*spec, None)[:3]
    bias = normal(4, 1, N, 1, S)
    in_specs = {"rate": P(b, None, t), "mask": P(b, None, t), "query_seq_lengths": P(b), "key_value_seq_lengths": P(b)}
    tiled = jax.shard_map(
        lambda q, k, v, bias, over: implementation.attend(KEY, q, k, v, shard=spec, bias=bias, **over, **static),
        mesh=mesh(AUTO, 2, 2, 2),
        in_specs=(P(b, t, n), P(b, None, n), P(b, None, n), P(None, n), {name: in_specs[name] for name in over_scores}),
        out_specs=P(b, t, n),
        check_vma=check_vma,
    )
    f = quick(lambda over, *x: gradients(lambda q, k, v, b: tiled(q, k, v, b, over), *x))
    close(f(over_scores, *ARRAYS, bias), truth(KEY, *ARRAYS, bias=bias, **options))


def test_evaluation_in_shard_map_counts_from_the_whole_array(implementation):
    """Over one axis of the mesh; the compiler handles the other one."""
    q, k, v, _ = ARRAYS
    options = {"is_causal": True, "query_seq_lengths": OVER_SCORES["query_seq_lengths"]}

    def f(q, k, v):
        return implementation.attend(None, q, k, v, train=False, shard=P(None, None, "a"), **options)

    the_mesh = mesh(AUTO, 4, 2)
    specs = {"in_specs": (P(None, "a"), P(), P()), "out_specs": P(None, "a")}
    out = quick(jax.shard_map(f, mesh=the_mesh, axis_names={"a"}, **specs))(q, k, v)
    close([out], truth(None, q, k, v, train=False, **options))


OVER_BATCH = P("a")


def in_shard_map(spec=OVER_BATCH, key=KEY, attend=jdrop.dot_product_attention, **options):
    q, k, v, _ = ARRAYS
    f = lambda key, q, k, v: attend(key, q, k, v, 0.5, train=True, **options)
    tiled = jax.shard_map(f, mesh=mesh(AUTO, 4), in_specs=(P(), spec, spec, spec), out_specs=spec)
    return jax.eval_shape(tiled, key, q, k, v)


def test_shard_must_not_split_the_keys():
    rule = r"dot_product_attention: shard must not split the keys, got .*; gather keys and values first: a softmax"
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


def test_tiles_of_bits_without_random_access(implementation):
    argument = "generator" if implementation.keys_without_random_access else "implementation"
    options = {"shard": P("a"), "generator": "jax", "attend": implementation.attend}
    with pytest.raises(NotImplementedError, match=f"dot_product_attention: {argument} must be"):
        in_shard_map(key=jax.random.key(0, impl="rbg"), **options)


# ---------------------------------------------------------------------------------- explicit meshes


@pytest.mark.parametrize("specs", [(P(None, "a"), P()), (P(), P("a"))], ids=str)
def test_explicit_meshes_that_some_implementations_refuse(implementation, specs):
    """Sharded queries, or query and key sharded differently. Calls without ``implementation=`` fall back."""
    the_mesh, q, k, v = mesh(EXPLICIT, 8), *(normal(i, 8, 256, 8, 8) for i in range(3))
    with jax.set_mesh(the_mesh):
        q, k, v = (put(the_mesh, x, *spec) for x, spec in zip((q, k, v), (specs[0], specs[1], specs[1])))
        if not implementation.any_explicit_sharding:
            rule = 'implementation must be "reference" for an explicit mesh that shards more than batch and heads, or'
            with pytest.raises(NotImplementedError, match=rule):
                implementation.attend(KEY, q, k, v)
        elif specs[1] == P():
            for attend in (implementation.attend, jdrop.dot_product_attention):
                out = jax.eval_shape(lambda q, k, v, f=attend: f(KEY, q, k, v, 0.5, train=True), q, k, v)
                assert out.sharding.spec[1] == "a"


def test_sharded_queries_on_an_explicit_mesh(implementation):
    if implementation.any_explicit_sharding:
        the_mesh = mesh(EXPLICIT, 4)
        with jax.set_mesh(the_mesh):
            q, k, v = (put(the_mesh, x, *spec) for x, spec in zip(ARRAYS, [(None, "a"), (), ()]))
            out = quick(lambda *x: implementation.attend(KEY, *x))(q, k, v)
            assert out.sharding.spec[1] == "a"
        close([out], truth(KEY, *ARRAYS[:3]))


@pytest.mark.parametrize(
    ("specs", "text"),
    [
        ((P(), P(None, "a"), P(None, "a")), "key must not be sharded along keys and width"),
        ((P(), P(), P(None, "a")), "value must not be sharded along keys and width"),
        ((P(None, None, None, "a"),) * 3, "query must not be sharded along width"),
    ],
    ids=str,
)
def test_keys_and_width_must_not_be_sharded_on_an_explicit_mesh(implementation, specs, text):
    the_mesh = mesh(EXPLICIT, 4)
    with jax.set_mesh(the_mesh):
        q, k, v = (put(the_mesh, x, *spec) for x, spec in zip(ARRAYS, specs))
        for attend in (implementation.attend, jdrop.dot_product_attention):
            with pytest.raises(ValueError, match=rf"^dot_product_attention: {text}, got float32\["):
                attend(KEY, q, k, v, 0.5, train=True)
