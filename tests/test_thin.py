"""Thin layers: random subsets of units against NumPy, and layers against dense ones under the same shared mask.

Subsets are compared bit for bit with words of the specification; frequencies only confirm what these words give.
"""

import functools
import itertools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from members import COLLECTIVES

import jdrop
from jdrop import thin
from jdrop.keys import derive

KEY = jax.random.key(5)
BATCH, FEATURES, UNITS = 16, 6, 64


def same(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def close(a, b, tolerance=2e-5):
    """Require equal numbers, up to rounding relative to the largest of each array."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max()), a, b)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


# ---------------------------------------------------------------------------------- kept units


@pytest.mark.parametrize(
    "block_size, groups, num_shards", [(1, None, 1), (4, None, 1), (4, 3, 1), (2, 2, 4), (1, 1, 8)]
)
def test_the_blocks_with_the_largest_words_are_kept(block_size, groups, num_shards):
    units = thin.kept_units(KEY, 64, 0.25, block_size=block_size, groups=groups, num_shards=num_shards)
    shape = (groups or 1, num_shards, 64 // block_size // num_shards)
    blocks = np.argsort(reference.words((0, 5), shape), axis=-1)[..., shape[2] // 4 :]
    blocks = np.sort(blocks + np.arange(num_shards)[:, None] * shape[2], axis=-1)
    expected = (blocks[..., None] * block_size + np.arange(block_size)).reshape(shape[0], -1)
    same(units, expected if groups else expected[0])
    assert units.dtype == jnp.int32


@pytest.mark.parametrize("num_shards", [1, 2])
def test_units_and_pairs_are_kept_as_often_as_in_a_uniform_subset(num_shards):
    number, kept, draws = 12, 8 // num_shards, 20_000
    keys = jdrop.keys.per_example(KEY, jnp.arange(draws))
    units = jax.vmap(lambda k: thin.kept_units(k, number, 1 / 3, num_shards=num_shards))(keys)
    masks = np.zeros((draws, number))
    np.put_along_axis(masks, np.asarray(units), 1, axis=1)
    pairs, per_shard = masks.T @ masks / draws, number // num_shards
    for i, j in itertools.product(range(number), repeat=2):
        together = i // per_shard == j // per_shard
        p = kept / per_shard * ((kept - 1) / (per_shard - 1) if together else kept / per_shard)
        p = kept / per_shard if i == j else p
        assert abs(pairs[i, j] - p) < 5 * np.sqrt(p * (1 - p) / draws), (i, j)


def test_subsets_of_groups_are_independent():
    keys = jdrop.keys.per_example(KEY, jnp.arange(5000))
    units = jax.vmap(lambda k: thin.kept_units(k, 4, 0.5, groups=2))(keys)
    both = (units[:, 0] == units[:, 1]).all(-1).mean()  # 1 of 6 subsets
    assert abs(both - 1 / 6) < 5 * np.sqrt(1 / 6 * 5 / 6 / 5000)


def test_a_rate_of_0_keeps_all_and_a_rounded_fraction_is_accepted():
    same(thin.kept_units(KEY, 6, 0), np.arange(6))
    assert thin.kept_units(KEY, 6, 0.3333333).shape == (4,)
    assert thin.kept_units(KEY, 6, np.float32(1 / 3)).shape == (4,)
    assert thin.kept_units(KEY, 10_000, np.float32(0.1)).shape == (9000,)
    assert thin.kept_units(KEY, 10, 0.7).shape == (3,)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("block_size, num_shards", [(1, 1), (4, 1), (2, 4)])
def test_take_and_put_are_indexing(axis, block_size, num_shards):
    shape = [3, 5, 7]
    shape[axis] = 32
    w, how = normal(0, *shape), {"block_size": block_size, "num_shards": num_shards}
    units = thin.kept_units(KEY, 32, 0.5, **how)
    index = [slice(None)] * 3
    index[axis] = units
    index = tuple(index)
    part = thin.take(w, units, axis, **how)
    same(part, w[index])
    same(thin.put(w, units, -part, axis, **how), w.at[index].set(-part))
    grads = jax.grad(lambda w: jnp.vdot(thin.take(w, units, axis, **how), part))(w)
    same(grads, jnp.zeros_like(w).at[index].set(part))
    tangent = jax.jvp(lambda w: thin.take(w, units, axis, **how), (w,), (2 * w,))[1]
    same(tangent, 2 * part)


def test_gradients_of_overlapping_subsets_are_summed():
    """Under vmap over keys, two subsets may keep the same unit."""
    w, keys = normal(0, 8, 3), jax.random.split(KEY, 50)
    units = jax.vmap(lambda k: thin.kept_units(k, 8, 0.5))(keys)
    grads = jax.jit(jax.grad(lambda w: jax.vmap(lambda u: thin.take(w, u))(units).sum()))(w)
    same(grads[:, 0], np.bincount(np.asarray(units).ravel(), minlength=8))


# ---------------------------------------------------------------------------------- layers


def mask_of(key, groups, how, units=UNITS, batch=BATCH, rate=0.5):
    """Return the scaled mask of each example, ``[batch, units]``."""
    kept = np.asarray(thin.kept_units(key, units, rate, groups=groups, **how))
    mask = np.zeros((groups, units), np.float32)
    np.put_along_axis(mask, kept, 1 / (1 - rate), axis=1)
    return jnp.repeat(jnp.asarray(mask), batch // groups, axis=0)


HOW = [{}, {"block_size": 8}, {"block_size": 4, "num_shards": 4}]
CASES = [(HOW[0], 1), (HOW[1], 4), (HOW[2], 1), (HOW[2], BATCH)]


def dense(x, kernel, bias, layout="in_out"):
    y = x @ (kernel if layout == "in_out" else kernel.T)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


@pytest.mark.parametrize(
    "how, groups, layouts",
    [
        *((how, groups, "in_out") for how, groups in CASES),
        (HOW[2], 4, "out_in"),
        (HOW[1], 1, ("out_in", "in_out", "in_out")),
    ],
    ids=str,
)
def test_mlp_is_the_dense_stack_under_shared_masks(how, groups, layouts):
    sizes = (FEATURES, UNITS, 32, 5)
    each = (layouts,) * 3 if isinstance(layouts, str) else layouts
    shapes = [(m, n) if layout == "in_out" else (n, m) for m, n, layout in zip(sizes, sizes[1:], each)]
    layers = [(normal(i, *s) / s[0] ** 0.5, normal(9 + i, n)) for i, (s, n) in enumerate(zip(shapes, sizes[1:]))]
    x = normal(20, BATCH, 3, FEATURES)
    rates = (0.25, 0.5)
    masks = [
        mask_of(derive(KEY, "mlp", i), groups, how, n, rate=rate)[:, None]
        for i, (n, rate) in enumerate(zip(sizes[1:3], rates))
    ]

    def thinned(x, layers):
        options = {"activation": jnp.tanh, "groups": groups, "layouts": layouts}
        return thin.mlp(KEY, x, rates, layers, train=True, **options, **how)

    def reference(x, layers):
        for (kernel, bias), mask, layout in zip(layers, masks, each):
            x = jnp.tanh(dense(x, kernel, bias, layout)) * mask
        return dense(x, *layers[-1], each[-1])

    check_equal(thinned, reference, x, layers)


@pytest.mark.parametrize("how, groups", CASES, ids=str)
def test_gated_mlp_is_the_dense_block_under_a_shared_mask(how, groups):
    x, down = normal(20, BATCH, FEATURES), normal(3, UNITS, FEATURES) / 8
    gate, up = (normal(1, FEATURES, UNITS), normal(4, UNITS)), (normal(2, FEATURES, UNITS), None)
    mask = mask_of(derive(KEY, "gated_mlp", 0), groups, how)

    def thinned(x, gate, up, down):
        return thin.gated_mlp(KEY, x, 0.5, gate, up, down, train=True, groups=groups, **how)

    def reference(x, gate, up, down):
        return (jax.nn.silu(dense(x, *gate)) * dense(x, *up) * mask) @ down

    check_equal(thinned, reference, x, gate, up, down)


@pytest.mark.parametrize(
    "query_heads, has_context, num_shards, groups",
    [(4, False, 1, 1), (8, False, 2, 1), (4, True, 1, 4), (8, True, 2, 4)],
)
def test_attention_is_that_of_all_heads_under_a_shared_mask(query_heads, has_context, num_shards, groups):
    x, width = normal(20, 8, 5, FEATURES), 16
    context = normal(21, 8, 7, FEATURES) if has_context else None
    query = normal(1, FEATURES, query_heads, width), normal(2, query_heads, width)
    keys, values = normal(3, FEATURES, 4, width), (normal(4, FEATURES, 4, width), normal(5, 4, width))
    out = normal(6, query_heads, width, 3), normal(7, 3)
    slopes = normal(8, query_heads)

    def attend(q, k, v, heads):
        distance = jnp.abs(jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])[None]).astype(jnp.float32)
        return jax.nn.dot_product_attention(q, k, v, bias=(slopes[heads][:, None, None] * distance[None])[None])

    def thinned(x, context, *layers):
        options = {"context": context, "attend": attend, "num_shards": num_shards, "groups": groups}
        return thin.multi_head_attention(KEY, x, 0.5, *layers, train=True, **options)

    mask = jnp.repeat(mask_of(KEY, groups, {"num_shards": num_shards}, 4, 8), query_heads // 4, axis=1)

    def reference(x, context, query, keys, values, out):
        c = x if context is None else context
        q, k, v = (
            jnp.einsum("btd,dhc->bthc", data, w) + (0 if b is None else b[None, None])
            for data, (w, b) in ((x, query), (c, (keys, None)), (c, values))
        )
        y = attend(q, k, v, jnp.arange(query_heads)) * mask[:, None, :, None]
        return jnp.einsum("bthc,hcd->btd", y, out[0]) + out[1][None, None]

    check_equal(thinned, reference, x, context, query, keys, values, out)


def check_equal(thinned, reference, *args):
    """Require equal values, gradients, and directional derivatives."""
    tangents = jax.tree.map(jnp.cos, args)

    def derivatives(f):
        def loss(args):
            y = f(*args)
            return jnp.vdot(jnp.sin(y), jnp.cos(jnp.arange(1.0, 1 + y.size)).reshape(y.shape))

        return jax.value_and_grad(loss)(args), jax.jvp(f, args, tangents)

    close(*(jax.jit(lambda f=f: derivatives(f))() for f in (thinned, reference)), 1e-4)


LAYERS = [normal(1, FEATURES, UNITS) / FEATURES**0.5, normal(2, UNITS, FEATURES) / 8]
CALLS = {
    "mlp": lambda key, x, rate=0.5, **o: thin.mlp(key, x, rate, LAYERS, activation=jnp.tanh, **o),
    "gated_mlp": lambda key, x, rate=0.5, **o: thin.gated_mlp(key, x, rate, LAYERS[0], LAYERS[0] / 2, LAYERS[1], **o),
    "multi_head_attention": lambda key, x, rate=0.5, **o: thin.multi_head_attention(
        key, x, rate, *[LAYERS[0].reshape(FEATURES, 8, 8)] * 3, LAYERS[1].reshape(8, 8, FEATURES), **o
    ),
}
X = normal(0, 8, 5, FEATURES)
BY_NAME = pytest.mark.parametrize("name", CALLS)


@BY_NAME
def test_evaluation_and_a_rate_of_0_compute_the_full_layer(name):
    full = CALLS[name](None, X, train=False)
    same(CALLS[name](None, X, 0, train=True), full)
    assert full.shape == X.shape
    close(full, CALLS[name](KEY, X, 0.0, train=True, groups=8))
    close(full[:3], CALLS[name](None, X[:3], train=False, groups=8))
    if name == "mlp":
        close(full, jnp.tanh(X @ LAYERS[0]) @ LAYERS[1])


@BY_NAME
def test_the_mean_over_keys_is_the_full_layer(name):
    keys = jdrop.keys.per_example(KEY, jnp.arange(2000))
    y = jax.vmap(lambda k: CALLS[name](k, X, train=True))(keys)
    error = (y.mean(0) - CALLS[name](None, X, train=False)) / (y.std(0) / np.sqrt(len(keys)))
    assert float(jnp.abs(error).max()) < 5  # of 240 numbers


@BY_NAME
def test_every_transform_gives_the_values_of_a_loop(name):
    f = lambda key, x: CALLS[name](key, x, train=True)
    grad = jax.grad(lambda x, key: jnp.sum(jnp.sin(f(key, x))))
    keys = jax.random.split(KEY, 3)
    close(jax.jit(f)(KEY, X), f(KEY, X))
    close(jax.vmap(f, (0, None))(keys, X), jnp.stack([f(k, X) for k in keys]))
    close(jax.vmap(grad, (None, 0))(X, keys), jnp.stack([grad(X, k) for k in keys]))
    close(jax.grad(lambda x: jax.checkpoint(f)(KEY, x).sum())(X), jax.grad(lambda x: f(KEY, x).sum())(X))

    def stack(x):
        return jax.lax.scan(lambda h, i: (h + f(derive(KEY, i), h), None), x, jnp.arange(3))[0]

    def loop(x):
        return functools.reduce(lambda h, i: h + f(derive(KEY, i), h), range(3), x)

    close(jax.jit(stack)(X), loop(X))
    close(jax.jit(jax.grad(lambda x: stack(x).sum()))(X), jax.grad(lambda x: loop(x).sum())(X), 1e-4)


@BY_NAME
def test_the_key_is_used_once(name):
    with jax.debug_key_reuse(True):
        key = jax.random.key(1)
        f = jax.jit(lambda key: jax.grad(lambda x: CALLS[name](key, x, train=True).sum())(X))
        f(key)
        with pytest.raises(jax.errors.KeyReuseError):
            f(key)


def test_layers_without_dropout_in_a_stack_use_no_key_and_compute_all_units():
    layers = [normal(i, *shape) / 4 for i, shape in enumerate([(FEATURES, 32), (32, 16), (16, 4)])]
    with jax.debug_key_reuse(True):
        key = jax.random.clone(KEY)
        thin.mlp(key, X, (0, 0), layers, train=True)
        y = thin.mlp(key, X, (0, 0.5), layers, train=True, activation=jnp.tanh)
        with pytest.raises(jax.errors.KeyReuseError):
            jax.random.bits(key)
    mask = mask_of(derive(KEY, "mlp", 1), 1, {}, 16, 1)
    close(y, (jnp.tanh(jnp.tanh(X @ layers[0]) @ layers[1]) * mask[None]) @ layers[2])


@BY_NAME
def test_every_kind_of_key_works(name):
    full = CALLS[name](None, X, train=False)
    for key in (jax.random.PRNGKey(3), jax.random.key(3, impl="rbg")):
        assert not np.allclose(CALLS[name](key, np.asarray(X), train=True), full, atol=1e-2)
    assert CALLS[name](KEY, X[:0], train=True).shape == (0, *X.shape[1:])


def test_without_jit():
    with jax.disable_jit():
        y = CALLS["mlp"](KEY, X, train=True)
    close(y, CALLS["mlp"](KEY, X, train=True))


@BY_NAME
def test_results_and_gradients_of_bfloat16_are_bfloat16(name):
    up, down = (normal(i, *s).astype("bfloat16") / 8 for i, s in enumerate([(FEATURES, UNITS), (UNITS, FEATURES)]))
    layers = {"mlp": ([up, down],), "gated_mlp": (up, up, down)}.get(
        name, (*[up.reshape(FEATURES, 8, 8)] * 3, down.reshape(8, 8, FEATURES))
    )
    loss = lambda x, layers: getattr(thin, name)(KEY, x, 0.5, *layers, train=True).sum()
    with jax.numpy_dtype_promotion("standard"):  # for jax.nn.dot_product_attention
        results = jax.value_and_grad(loss, (0, 1))(X.astype("bfloat16"), layers)
    assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {jnp.dtype("bfloat16")}


def test_scaling_in_bfloat16_rounds_once():
    up, down = jnp.eye(4, dtype=jnp.bfloat16), jnp.eye(4, dtype=jnp.bfloat16)
    x = jnp.asarray([[1.1, 2.3, 3.7, 5.9]], jnp.bfloat16)
    y = thin.mlp(KEY, x, 0.25, [up, down], train=True, activation=lambda x: x)
    kept = thin.kept_units(derive(KEY, "mlp", 0), 4, 0.25)
    same(y[0, kept], (x[0, kept].astype(jnp.float32) * (1 / 0.75)).astype(jnp.bfloat16))


# ---------------------------------------------------------------------------------- meshes


OTHERS = [(2, 1, 8), (4, 1, 8), (8, 1, 8), (1, 2, 1), (1, 4, 1), (1, 8, 8), (4, 2, 1)]


@pytest.mark.compiled
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "name, data, model, groups",
    [
        ("mlp", 2, 4, 8),
        ("gated_mlp", 2, 4, 1),
        ("multi_head_attention", 2, 4, 1),
        *(pytest.param("mlp", *sizes, marks=pytest.mark.long) for sizes in OTHERS),
    ],
)
def test_a_mesh_computes_the_same_with_the_collectives_of_the_full_layer(name, kind, data, model, groups):
    mesh = jax.make_mesh((data, model), ("d", "m"), axis_types=(kind,) * 2, devices=jax.devices()[: data * model])
    if name == "multi_head_attention":
        weights = [normal(i, FEATURES, 16, 8) for i in range(3)] + [normal(3, 16, 8, FEATURES)]
        specs = [P(None, "m", None)] * 3 + [P("m", None, None)]
    else:
        weights = [normal(1, FEATURES, UNITS), normal(2, FEATURES, UNITS), normal(3, UNITS, FEATURES)]
        weights = weights[1:] if name == "mlp" else weights
        specs = [P(None, "m")] * (len(weights) - 1) + [P("m", None)]
    x, function = normal(0, BATCH, 5, FEATURES), getattr(thin, name)

    def attend(q, k, v, heads):
        scores = jnp.einsum("bthc,bshc->bhts", q, k)
        return jnp.einsum("bhts,bshc->bthc", jax.nn.softmax(scores), v)

    options = {"attend": attend} if name == "multi_head_attention" else {}

    def loss(x, weights, train, groups):
        layers = (weights,) if name == "mlp" else weights
        y = function(KEY, x, 0.5, *layers, train=train, groups=groups, num_shards=8, **options)
        return jnp.sum(jnp.sin(y))

    step = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnames=("train", "groups"))
    expected = step(x, weights, train=True, groups=groups)
    with jax.set_mesh(mesh):
        put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
        args = put(x, P("d", None, None)), [put(w, spec) for w, spec in zip(weights, specs)]
        programs = [step.lower(*args, train=train, groups=groups).compile() for train in (True, False)]
        close(programs[0](*args), expected, 1e-4)
    thinned, full = (Counter(re.findall(COLLECTIVES + r"\(", program.as_text())) for program in programs)
    assert thinned <= full  # of each kind


@BY_NAME
@pytest.mark.parametrize("devices", [2, 8])
def test_tiles_of_shard_map_compute_the_same_as_one_device(name, devices):
    mesh = jax.make_mesh((devices,), ("m",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    if name == "multi_head_attention":
        weights = [normal(i, FEATURES, 16, 8) for i in range(3)] + [normal(3, 16, 8, FEATURES)]
        specs = [P(None, "m")] * 3 + [P("m")]
    else:
        weights = [normal(1, FEATURES, UNITS)] * (1 if name == "mlp" else 2) + [normal(3, UNITS, FEATURES)]
        specs = [P(None, "m")] * (len(weights) - 1) + [P("m")]

    def run(x, weights, **options):
        layers = (weights,) if name == "mlp" else weights
        return getattr(thin, name)(KEY, x, 0.5, *layers, train=True, **options)

    def derivatives(f):
        loss = lambda x, weights: jnp.sum(jnp.sin(f(x, weights)))
        return jax.jit(lambda x, weights: (f(x, weights), jax.grad(loss, (0, 1))(x, weights)))(X, weights)

    def tile(x, weights):
        return jax.lax.psum(run(x, weights, shard=P(None, "m")), "m")

    f = jax.shard_map(tile, mesh=mesh, in_specs=(P(), specs), out_specs=P())
    close(derivatives(f), derivatives(functools.partial(run, num_shards=devices)), 1e-4)

    each = lambda x, weights: run(x, weights, shard=P("m"))  # a group per device
    f = jax.shard_map(each, mesh=mesh, in_specs=(P("m"), P()), out_specs=P("m"))
    close(derivatives(f), derivatives(functools.partial(run, groups=devices)), 1e-4)


@BY_NAME
def test_weights_that_vary_over_a_mesh_need_a_key_that_does(name):
    mesh = jax.make_mesh((2,), ("m",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    up, down = LAYERS
    layers = {"mlp": lambda u: ([u, down],), "gated_mlp": lambda u: (u, u, down)}.get(
        name, lambda u: (*[u.reshape(FEATURES, 8, 8)] * 3, down.reshape(8, 8, FEATURES))
    )
    call = lambda u: getattr(thin, name)(KEY, X, 0.5, *layers(u[0]), train=True)
    with pytest.raises(ValueError, match=f"{name}: key must vary over the manual mesh axes"):
        jax.shard_map(call, mesh=mesh, in_specs=P("m"), out_specs=P("m"))(jnp.stack([up, up]))


def test_kept_units_of_tiles_differ_in_type_and_value():
    mesh = jax.make_mesh((2,), ("m",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    tile = lambda: thin.kept_units(KEY, 32, 0.5, shard=P(None, "m"))
    units = jax.shard_map(tile, mesh=mesh, in_specs=(), out_specs=P("m"))().reshape(2, 16)
    same(units + np.array([[0], [32]]), thin.kept_units(KEY, 64, 0.5, num_shards=2).reshape(2, 16))
    with pytest.raises(ValueError, match="out_specs"):
        jax.shard_map(tile, mesh=mesh, in_specs=(), out_specs=P())()


# ---------------------------------------------------------------------------------- what is saved


@pytest.mark.compiled
@BY_NAME
def test_dropped_units_cost_no_operations(name):
    weights = [normal(1, 64, 512), normal(2, 512, 64)]

    def loss(x, weights, train):
        up, down = weights
        layers = {"mlp": ([up, down],), "gated_mlp": (up, up, down)}.get(
            name, (*[up.reshape(64, 8, 64)] * 3, down.reshape(8, 64, 64))
        )
        return jnp.sum(jnp.sin(getattr(thin, name)(KEY, x, 0.5, *layers, train=train)))

    step = jax.jit(jax.grad(loss, (0, 1)), static_argnames="train")
    x = normal(0, 8, 128, 64)
    thinned, full = (step.lower(x, weights, train=t).compile().cost_analysis()["flops"] for t in (True, False))
    assert thinned < 0.54 * full


# ---------------------------------------------------------------------------------- errors


def test_errors():
    units, w = jnp.arange(4), jnp.ones((8, 3))
    up, down = LAYERS
    call = lambda x=X, rate=0.5, layers=(up, down), **o: thin.mlp(KEY, x, rate, layers, **{"train": True, **o})
    attention = lambda *layers, **o: thin.multi_head_attention(KEY, X, 0.5, *layers, train=True, **o)
    head, out = jnp.ones((FEATURES, 4, 8)), jnp.ones((4, 8, 3))
    kept = functools.partial(thin.kept_units, KEY)
    for function, error, text in [
        (lambda: kept(12, 0.3), ValueError, "kept_units: rate must drop a whole number of the 12 units, and keep at "
         "least one, got 0.3; pass 1/4 or 1/3"),
        (lambda: kept(12, 1.0), ValueError, "kept_units: rate must .* got 1.0; pass 11/12$"),
        (lambda: kept(12, 0.5, block_size=4), ValueError, "of the 3 blocks of 4 units, .* got 0.5; pass 1/3 or 2/3"),
        (lambda: kept(12, 0.5, num_shards=4), ValueError, "of the 3 units in each of 4 shards, .*; pass 1/3 or 2/3"),
        (lambda: kept(12, 0.5, block_size=5), ValueError, "block_size must divide the number of units, 12, got 5; pass "
         "4 or 6"),
        (lambda: kept(12, 0.5, num_shards=24), ValueError, "num_shards must divide .*, 12, got 24; pass 12$"),
        (lambda: kept(0, 0.5), ValueError, "kept_units: num_units must be at least 1"),
        (lambda: kept(12, jnp.float32(0.5)), TypeError, "kept_units: rate must be a number, got float32"),
        (lambda: kept(12, 0.5, groups=0), ValueError, "kept_units: groups must be at least 1"),
        (lambda: thin.kept_units(None, 12, 0.5), TypeError, "kept_units: key must be a PRNG key, got None; make"),
        (lambda: thin.kept_units(None, 12, 0), TypeError, "kept_units: key must be a PRNG key, got None; make"),
        (lambda: thin.take(w, units, 2), ValueError, "take: axis must"),
        (lambda: thin.take([1.0], units), TypeError, "take: weights must be an array"),
        (lambda: thin.take(w, units[None]), ValueError, "take: units must be ascending indices of units"),
        (lambda: thin.take(w, units[:3], block_size=2), ValueError, "take: units must be .* of blocks of 2 units"),
        *(
            (lambda u=u, o=o: thin.take(w, np.array(u), **o), ValueError, "take: units must be ascending")
            for u, o in [([0, 9], {}), ([-1, 1], {}), ([2, 1], {}), ([1, 1], {}), ([0, 3, 4, 6], {"block_size": 2}),
                         ([0, 1, 2, 6], {"num_shards": 2})]
        ),
        (lambda: thin.take(w, jnp.ones(4)), TypeError, "take: units must be an integer array"),
        (lambda: thin.put(w, units, w), ValueError, r"put: kept must have shape \(4, 3\)"),
        (lambda: thin.put(w, units, w[:4].astype(int)), TypeError, "put: kept must be float32"),
        (lambda: call(layers=[up]), ValueError, "mlp: layers must be a list of two or more"),
        (lambda: call(layers=[up, up]), ValueError, r"mlp: layers\[1\] must have 64 inputs, for layers\[0\], got 6"),
        (lambda: call(layers=[down, up]), ValueError, r"mlp: layers\[0\] must have 6 inputs, for x, got 64"),
        (lambda: call(layers=[up, X]), ValueError, r"mlp: layers\[1\] must be a kernel \[inputs, outputs\]"),
        (lambda: call(layers=[(up, up), down]), ValueError, r"mlp: layers\[0\] must have a bias of shape \(64,\)"),
        (lambda: call(layers=[up, down.astype(jnp.bfloat16)]), TypeError, r"mlp: layers\[1\] must be float32"),
        (lambda: call(layouts="oi"), ValueError, "mlp: layouts must be 'in_out' or 'out_in', got 'oi'"),
        (lambda: call(layouts=["in_out"]), ValueError, "mlp: layouts must be one, or one for each of 2 layers"),
        (lambda: call(rate=(0.5, 0.5)), ValueError, "mlp: rate must be one number, or one for each of 1 hidden layers"),
        (lambda: call(groups=3), ValueError, "mlp: groups must divide the number of examples, 8, got 3; pass 2 or 4"),
        (lambda: call(x=X[0, 0], groups=2), ValueError, r"mlp: x must be \[batch, ..., features\]"),
        (lambda: call(train=1), TypeError, "mlp: train must be a bool, got 1"),
        (lambda: call(x=[1.0]), TypeError, "mlp: x must be an array"),
        (lambda: call(layers=[up[:, :0], down[:0]]), ValueError, "mlp: the number of units must be at least 1, got 0"),
        (lambda: call(activation=3), TypeError, "mlp: activation must be a function, got 3"),
        (lambda: call(activation=jax.nn.glu), ValueError, r"mlp: activation must return float32\[8,5,32\], got float32"),
        (lambda: call(activation=lambda h: h.astype("bfloat16")), ValueError, "mlp: activation must return float32"),
        (lambda: jax.jit(lambda t: call(train=t))(True), TypeError, "mlp: train must be static, got a traced value; list"),
        (lambda: call(shard=P("m")), ValueError, "mlp: shard must name manual mesh axes"),
        (lambda: thin.mlp(None, X, 0.5, LAYERS, train=True), TypeError, "mlp: key must be a PRNG key when something"),
        (lambda: thin.gated_mlp(KEY, X, 0.5, up, up[:, :8], down, train=True), ValueError, "gated_mlp: up must have the "
         "units of gate, 64, got 8"),
        (lambda: thin.gated_mlp(KEY, X, 0.5, up, up, up, train=True), ValueError, "gated_mlp: down must have 64 inputs"),
        (lambda: attention(head, head, head, down), ValueError, "multi_head_attention: out must be a kernel"),
        (lambda: attention(up, head, head, out), ValueError, r"attention: query must be a kernel \[6, heads, width\]"),
        (lambda: attention(head, head[:, :3], head[:, :3], out), ValueError, "keys must have the heads of values and "),
        (lambda: attention(head, head, head, out[:2]), ValueError, "out must have 4 heads of width 8"),
        (lambda: attention(head, head, head, out, context=X[0]), ValueError, r"context must be \[batch, time, features\]"),
        (lambda: attention(head, head, head, out, attend=lambda q, *_: q[:, :1]), ValueError, r"attend must return float32\[8,5,2,8\], got"),
    ]:  # fmt: skip
        with pytest.raises(error, match=text):
            function()


def test_the_biases_and_stacks_that_a_split_over_units_cannot_serve():
    mesh = jax.make_mesh((2,), ("m",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    up, down = LAYERS
    kernels = [up.reshape(FEATURES, 8, 8)] * 3
    for text, call in {
        "mlp: shard must not split units": lambda x, b: thin.mlp(
            KEY, x, 0.5, [up, (down, b)], train=True, shard=P(None, "m")
        ),
        "mlp: shard must not split units .* more than two": lambda x, b: thin.mlp(
            KEY, x, 0.5, [up, down, up], train=True, shard=P(None, "m")
        ),
        "multi_head_attention: shard must not split heads": lambda x, b: thin.multi_head_attention(
            KEY, x, 0.5, *kernels, (down.reshape(8, 8, FEATURES), b), train=True, shard=P(None, "m")
        ),
    }.items():
        with pytest.raises(NotImplementedError, match=text):
            jax.shard_map(call, mesh=mesh, in_specs=P(), out_specs=P("m"))(X, jnp.ones(FEATURES))
