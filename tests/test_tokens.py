"""token_dropout and patch_dropout: replaced ids, and tokens that are left out."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jdrop
from jdrop._mask import draw_mask

KEY = jax.random.key(61)


def same(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("dtype", ["int32", "uint8", "int16", "uint32"])
@pytest.mark.parametrize("generator", ["fast", "jax"])
def test_tokens_are_replaced_where_the_mask_drops(dtype, generator):
    ids = (jnp.arange(50 * 200).reshape(50, 200) % 100 + 5).astype(dtype)
    y = jdrop.token_dropout(KEY, ids, 0.3, 3, train=True, generator=generator)
    mask = jdrop.dropout_mask(KEY, ids.shape, 0.3, generator=generator)
    same(y, np.where(mask, ids, 3))
    assert y.dtype == ids.dtype
    assert abs(float((y == 3).mean()) - 0.3) < 5 * np.sqrt(0.21 / ids.size)


def test_protected_tokens_stay():
    ids = jnp.arange(40 * 30, dtype=jnp.int32).reshape(40, 30)
    y = jdrop.token_dropout(KEY, ids, 0.9, -1, train=True, protect=ids % 3 == 0)
    same(y[ids % 3 == 0], ids[ids % 3 == 0])
    free = jdrop.token_dropout(KEY, ids, 0.9, -1, train=True)
    same(y[ids % 3 != 0], free[ids % 3 != 0])
    first = jdrop.token_dropout(KEY, ids, 1.0, -1, train=True, protect=np.arange(30) == 0)
    same(first[:, 0], ids[:, 0])
    same(first[:, 1:], -jnp.ones_like(ids[:, 1:]))


def test_replacements_may_differ_and_rates_may_be_traced():
    ids = jnp.zeros((4, 100), jnp.int32)
    y = jdrop.token_dropout(KEY, ids, 1.0, jnp.arange(100), train=True)
    same(y, jnp.broadcast_to(jnp.arange(100)[None], y.shape))
    same(jdrop.token_dropout(KEY, ids, jnp.float32(jnp.nan), 7, train=True), ids)
    assert jdrop.token_dropout(None, ids, 0.5, 7, train=False) is ids
    f = jax.jit(lambda r: jdrop.token_dropout(KEY, ids, r, 7, train=True))
    same(f(0.25), jdrop.token_dropout(KEY, ids, 0.25, 7, train=True))


@pytest.mark.compiled
@pytest.mark.parametrize("devices", [*(pytest.param(n, marks=pytest.mark.long) for n in (1, 2, 4)), 8])
def test_token_tiles_and_meshes(devices):
    ids = jnp.arange(64 * 16, dtype=jnp.int32).reshape(64, 16)
    whole = jdrop.token_dropout(KEY, ids, 0.5, -1, train=True)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((devices,), ("d",), axis_types=(kind,), devices=jax.devices()[:devices])
        with jax.set_mesh(mesh):
            sharded = jax.device_put(ids, jax.NamedSharding(mesh, P("d")))
            f = jax.jit(lambda k, i: jdrop.token_dropout(k, i, 0.5, -1, train=True))
            same(f(KEY, sharded), whole)
            text = f.lower(KEY, sharded).compile().as_text()
            assert "all-" not in text and ("[64,16]" in text) == (devices == 1)
            tiled = jax.shard_map(
                lambda k, i: jdrop.token_dropout(k, i, 0.5, -1, train=True, shard=P("d")),
                in_specs=(P(), P("d")),
                out_specs=P("d"),
            )
            same(tiled(KEY, sharded), whole)


def test_token_errors():
    ids = jnp.zeros((2, 3), jnp.uint8)
    f = lambda ids=ids, r=0.5, new=0, **o: jdrop.token_dropout(KEY, ids, r, new, train=True, **o)
    for call, error, text in [
        (lambda: f(jnp.ones(3)), TypeError, r"token_dropout: ids must be an integer array, got float32\[3\]"),
        (lambda: f(new=256), ValueError, "token_dropout: replacement must fit the dtype of ids, uint8, got 256"),
        (lambda: f(new=-1), ValueError, "token_dropout: replacement must fit"),
        (lambda: f(new=2**70), ValueError, "token_dropout: replacement must fit"),
        (lambda: f(new=True), TypeError, "token_dropout: replacement must be an integer array"),
        (lambda: f(new=jnp.zeros(2, int)), ValueError, r"token_dropout: replacement must broadcast to shape \(2, 3\)"),
        (lambda: f(protect=jnp.zeros(3, int)), TypeError, "token_dropout: protect must be a bool array"),
        (lambda: f(protect=jnp.zeros(2, bool)), ValueError, "token_dropout: protect must broadcast"),
        (lambda: f(protect=[True]), TypeError, "token_dropout: protect must be an array"),
    ]:
        with pytest.raises(error, match=text):
            call()


# ------------------------------------------------------------------------------------ patches


@pytest.mark.parametrize(
    "n,rate,kept",
    [
        (10, 0.5, 5),
        (5, 0.5, 3),
        (7, 0.5, 4),
        (10, 0.95, 1),
        (10, 1.0, 1),
        (10, 0.04, 10),
        (196, 0.3, 137),
        (3, 0.5, 2),
        (15, 0.9, 2),
        (25, 0.34, 17),
    ],
)
def test_the_number_of_tokens_rounds_half_up(n, rate, kept):
    x = jnp.arange(2.0 * (n + 2) * 3).reshape(2, n + 2, 3)
    y, indices = jdrop.patch_dropout(KEY, x, rate, train=True, num_prefix=2)
    assert y.shape == (2, kept + 2, 3) and indices.shape == (2, kept + 2) and indices.dtype == jnp.int32
    assert bool((jnp.diff(indices) > 0).all())
    same(indices[:, :2], [[0, 1]] * 2)
    same(y, jnp.take_along_axis(x, indices[..., None], axis=1))


@pytest.mark.parametrize("shape,axis,prefix", [((3, 40, 5), 1, 0), ((3, 40, 5), 1, 2), ((200, 3), 0, 1)])
def test_the_tokens_with_the_largest_words_stay(shape, axis, prefix):
    """The words are those of a mask of shape [*batch, tokens]."""
    decided = (*shape[:axis], shape[axis] - prefix)
    mask = draw_mask("test", jax.random.clone(KEY), np.asarray(0.5), decided)
    word = np.asarray(jnp.broadcast_to(mask.word_at(mask.index(decided)), decided))
    _, indices = jdrop.patch_dropout(KEY, jnp.ones(shape), 0.25, train=True, token_axis=axis, num_prefix=prefix)
    kept = math.floor(0.75 * decided[-1] + 0.5)
    largest = np.sort(np.argsort(word, axis=-1)[..., -kept:], axis=-1) + prefix
    same(indices[..., prefix:], largest)


def test_every_subset_is_equally_likely():
    """4 of 6 tokens: 15 subsets, each within 5 standard errors of 1/15, over independent examples."""
    count = 30_000
    _, indices = jdrop.patch_dropout(KEY, jnp.zeros((count, 6, 1)), 1 / 3, train=True)
    subsets, counts = np.unique(np.asarray(indices), axis=0, return_counts=True)
    assert [tuple(s) for s in subsets] == list(itertools.combinations(range(6), 4))
    assert np.abs(counts - count / 15).max() < 5 * np.sqrt(count * (1 / 15) * (14 / 15))


def test_axes_before_the_tokens_have_their_own_subsets():
    x = jnp.ones((3, 4, 20, 2, 5))
    y, indices = jdrop.patch_dropout(KEY, x, 0.5, train=True, token_axis=2)
    assert y.shape == (3, 4, 10, 2, 5) and indices.shape == (3, 4, 10)
    assert len(np.unique(np.asarray(indices).reshape(12, 10), axis=0)) == 12
    y, indices = jdrop.patch_dropout(KEY, x[0, 0], 0.5, train=True, token_axis=0)
    assert y.shape == (10, 2, 5) and indices.shape == (10,)


def test_evaluation_keeps_all_tokens():
    x = jnp.ones((3, 8, 2))
    for train, rate in ((False, 0.5), (True, 0.0)):
        y, indices = jdrop.patch_dropout(None, x, rate, train=train)
        assert y is x
        same(indices, np.broadcast_to(np.arange(8), (3, 8)))


def test_gradients_go_to_the_kept_tokens():
    x = jnp.ones((2, 10, 3))
    _, indices = jdrop.patch_dropout(KEY, x, 0.5, train=True)
    g = jax.grad(lambda x: jdrop.patch_dropout(KEY, x, 0.5, train=True)[0].sum())(x)
    expected = np.zeros((2, 10, 3))
    for b in range(2):
        expected[b, np.asarray(indices[b])] = 1
    same(g, expected)


def test_patch_errors():
    x = jnp.ones((2, 10, 3))
    f = lambda rate=0.5, **o: jdrop.patch_dropout(KEY, x, rate, train=True, **o)
    for call, error, text in [
        (lambda: f(jnp.float32(0.5)), TypeError, "patch_dropout: rate must be a number"),
        (lambda: f(1.5), ValueError, r"patch_dropout: rate must lie in \[0, 1\]"),
        (
            lambda: f(num_prefix=10),
            ValueError,
            "patch_dropout: num_prefix must be below the number of tokens, 10, got 10",
        ),
        (lambda: f(num_prefix=-1), ValueError, "patch_dropout: num_prefix must be at least 0"),
        (lambda: f(token_axis=(0, 1)), TypeError, "patch_dropout: token_axis must be an axis"),
        (lambda: f(token_axis=3), ValueError, "patch_dropout: token_axis must be axes of an array with 3 axes"),
    ]:
        with pytest.raises(error, match=text):
            call()


def test_shard_must_not_split_the_tokens():
    f = jax.shard_map(
        lambda k, x: jdrop.patch_dropout(k, x, 0.5, train=True, shard=P(None, "d"))[0],
        mesh=jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P(None, "d")),
        out_specs=P(None, "d"),
    )
    with pytest.raises(NotImplementedError, match="patch_dropout: shard must not split token_axis"):
        f(KEY, jnp.ones((2, 16, 3)))
