"""The blocks of attention: every score is in exactly one block, and every block knows the index of its scores."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import visible

import jdrop
from jdrop._mask import draw_mask
from jdrop._platform import GENERIC, PLATFORMS, BlockSizes
from jdrop.attention import _blocking
from jdrop.attention._blocking import Block, Segment, make_plan, split, split_scores
from jdrop.attention._spec import AttentionSpec

CPU = PLATFORMS["cpu"]
DEFAULT = CPU.block_sizes
HIDDEN_KEYS = [
    {"causal": False, "window": None},
    {"causal": True, "window": None},
    {"causal": False, "window": (5, 9)},
    {"causal": False, "window": (0, 300)},
    {"causal": True, "window": (40, 0)},
    {"causal": False, "window": (0, 0)},
]


def plan(
    queries,
    keys,
    *,
    batch=1,
    heads=1,
    key_heads=None,
    causal=False,
    window=None,
    tiled=False,
    platform=CPU,
    sizes=DEFAULT,
    devices=1,
):
    key_heads = heads if key_heads is None else key_heads
    q = jax.ShapeDtypeStruct((batch, queries, heads, 8), jnp.float32)
    k = jax.ShapeDtypeStruct((batch, keys, key_heads, 8), jnp.float32)
    return make_plan(AttentionSpec(causal, window, tiled), q, k, platform, sizes, devices)


# ---------------------------------------------------------------------------------- segments


@pytest.mark.parametrize("hidden", HIDDEN_KEYS, ids=str)
@pytest.mark.parametrize("rows", [16, 512])
def test_segments_have_every_query_once_and_all_keys_that_it_sees(hidden, rows):
    sizes = DEFAULT._replace(queries=rows, scores=2**15)
    for queries, keys, groups in itertools.product((1, 97, 128, 257, 1025), (1, 100, 257, 1025), (1, 4)):
        segments = plan(queries, keys, heads=groups, key_heads=1, sizes=sizes, **hidden).segments
        seen = visible((1, 1, queries, keys), is_causal=hidden["causal"], local_window_size=hidden["window"])[0, 0]
        covered = np.zeros((queries, keys), int)
        count = np.zeros(queries, int)
        for s in segments:
            assert s.blocks > 0 and 0 < s.rows <= max(rows // groups, 2**15 // keys // groups, 16)
            assert 0 <= s.low < s.high <= keys
            covered[s.first : s.first + s.blocks * s.rows, s.low : s.high] += 1
            count[s.first : s.first + s.blocks * s.rows] += 1
        assert (count == 1).all() and [s.first for s in segments] == sorted(s.first for s in segments)
        assert (covered[seen] == 1).all() and covered.max() == 1


@pytest.mark.parametrize("hidden", HIDDEN_KEYS, ids=str)
def test_a_tile_of_queries_sees_all_keys(hidden):
    """In a tile of shard_map, whose first query may have any position."""
    (segment,) = plan(300, 200, tiled=True, **hidden).segments
    assert segment == Segment(first=0, blocks=1, rows=300, low=0, high=200)


LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


def test_default_blocks_on_a_cpu():
    """A block has 512 queries, or more if they have at most 2**22 scores."""
    segments = {n: plan(n, n).segments for n in LENGTHS}
    assert all(len(s) == 1 for s in segments.values())
    assert {n: (s[0].rows, s[0].blocks) for n, s in segments.items()} == {
        512: (512, 1),
        1024: (1024, 1),
        2048: (2048, 1),
        4096: (1024, 4),
        8192: (512, 16),
        16384: (512, 32),
    }


def test_default_segments_on_a_cpu():
    """Segments in flight have at most 2**22 scores."""
    causal = {n: plan(n, n, causal=True) for n in LENGTHS}
    assert {n: (len(p.segments), p.max_in_flight) for n, p in causal.items()} == {
        512: (2, 32),
        1024: (4, 16),
        2048: (4, 4),
        4096: (8, 2),
        8192: (16, 1),
        16384: (16, 1),
    }
    grouped = plan(2048, 2048, heads=4, key_heads=1, causal=True)
    assert grouped.max_in_flight == 1
    # A segment has 2**18 scores per head, and a block takes heads up to 2**20 scores.
    windows = {heads: plan(4096, 4096, heads=heads, window=(0, 0)) for heads in (1, 2, 8)}
    assert {n: (p.heads[0], p.max_in_flight) for n, p in windows.items()} == {1: (1, 16), 2: (2, 8), 8: (4, 4)}


def test_platforms_differ_in_their_blocks():
    assert GENERIC.block_sizes == BlockSizes()
    assert PLATFORMS["cuda"].block_sizes == BlockSizes(scores=2**28, segment=512, segments=8, target_scores=2**28)
    assert DEFAULT == BlockSizes(target_scores=2**21)
    assert PLATFORMS["tpu"].block_sizes == BlockSizes(target_scores=2**24)
    p = plan(2048, 2048, batch=2, heads=8, platform=GENERIC, sizes=GENERIC.block_sizes)
    assert p.heads == (8, 1) and p.batch == (1, 2)
    assert plan(2048, 2048, batch=2, heads=8).heads == (1, 8)


def test_gpus_have_one_block_up_to_their_budget():
    gpu = PLATFORMS["cuda"]
    of = functools.partial(plan, batch=4, heads=16, platform=gpu, sizes=gpu.block_sizes)
    plans = {n: of(n, n) for n in (512, 2048, 4096, 8192, 32768)}
    steps = {n: p.batch[1] * p.heads[1] * p.segments[0].blocks for n, p in plans.items()}
    assert steps == {512: 1, 2048: 1, 4096: 4, 8192: 16, 32768: 256}
    assert all(p.batch[0] * p.heads[0] * p.segments[0].rows * n <= 2**28 for n, p in plans.items())
    causal = {n: of(n, n, causal=True) for n in (512, 1024, 4096, 8192, 16384)}
    assert {n: len(p.segments) for n, p in causal.items()} == {512: 1, 1024: 2, 4096: 8, 8192: 8, 16384: 16}
    assert {n: p.batch[1] * p.heads[1] for n, p in causal.items()} == {512: 1, 1024: 1, 4096: 1, 8192: 4, 16384: 8}


@pytest.mark.parametrize("length", [1024, 2048, 4096, 8192, 16384])
def test_most_hidden_keys_cost_no_work(length):
    def area(**hidden):
        return sum(s.blocks * s.rows * (s.high - s.low) for s in plan(length, length, **hidden).segments)

    assert area() == length**2
    causal = {1024: 256, 16384: 1024}.get(length, 512)
    assert area(causal=True) == (length + causal) / 2 * length
    window = 256 if length == 2048 else causal
    assert area(window=(128, 0)) <= (128 + window) * length


# ---------------------------------------------------------------------------------- batch and heads

ONE_HEAD = DEFAULT._replace(target_scores=1)
"""A block has no more heads than necessary."""


def test_blocks_on_a_mesh_have_a_part_of_every_device():
    for batch, key_heads in itertools.product((1, 2, 3, 6, 8, 16), repeat=2):
        p = plan(4, 4, batch=batch, heads=2 * key_heads, key_heads=key_heads, sizes=ONE_HEAD, devices=8)
        parts = [int(np.gcd(n, 8)) for n in (batch, key_heads)]
        assert (p.batch, p.heads) == tuple((part, n // part) for part, n in zip(parts, (batch, key_heads)))


def test_blocks_of_many_heads_have_few_queries():
    """A block spans all devices, so with more heads it has fewer queries of each head."""
    sizes = itertools.product((1, 2, 8), repeat=2)
    rows = {(b, k): plan(2048, 2048, batch=b, heads=k, devices=8).segments[0].rows for b, k in sizes}
    assert rows == {(1, 1): 2048, (1, 2): 1024, (2, 1): 1024, (2, 2): 512} | {
        (b, k): 512 for b, k in ((1, 8), (8, 1), (2, 8), (8, 2), (8, 8))
    }


@pytest.mark.parametrize(("room", "heads"), [(1, 1), (2, 2), (7, 4), (24, 24), (100, 24)])
def test_blocks_have_as_many_heads_as_fit(room, heads):
    p = plan(20, 30, batch=6, heads=4, sizes=DEFAULT._replace(target_scores=room * 20 * 30))
    assert p.batch[0] * p.batch[1] == 6 and p.heads[0] * p.heads[1] == 4
    assert p.batch[0] * p.heads[0] == heads


# ---------------------------------------------------------------------------------- parts of arrays


SIZES = [  # batch, heads, key heads
    (1, 2, 2),
    (6, 12, 6),
    (3, 6, 3),
    (16, 3, 1),
    (6, 12, 12),
]


@pytest.mark.parametrize(("batch", "heads", "key_heads"), SIZES)
def test_join_is_the_inverse_of_split(batch, heads, key_heads):
    p = plan(4, 5, batch=batch, heads=heads, key_heads=key_heads, sizes=ONE_HEAD, devices=8)
    for n in (heads, key_heads):
        x = np.arange(batch * 4 * n * 8).reshape(batch, 4, n, 8)
        groups = n // key_heads
        assert split(x, p).shape[1:] == (p.batch[0], p.heads[0], groups, 4, 8)
        if groups == p.groups:
            np.testing.assert_array_equal(_blocking.join(split(x, p), p), x)


@pytest.mark.parametrize("platform", [CPU, GENERIC], ids=["cpu", "generic"])
@pytest.mark.parametrize(("batch", "heads", "key_heads"), SIZES)
def test_all_parts_of_a_block_belong_to_the_same_scores(batch, heads, key_heads, platform):
    """Operands contain their own flat index, on which split, slice_scores, and index must agree for each block."""
    queries, keys = 4, 5
    sizes = {"platform": platform, "sizes": ONE_HEAD, "devices": 8}
    p = plan(queries, keys, batch=batch, heads=heads, key_heads=key_heads, **sizes)
    shape = batch, heads, queries, keys
    scores = jnp.arange(np.prod(shape), dtype=jnp.int32).reshape(shape)
    segment = Segment(first=0, blocks=2, rows=2, low=1, high=keys)

    @jax.jit
    def parts(batch, head, first, q):
        block = Block(p, segment, batch, head, first)
        scores_of_block = split_scores(scores, p)
        starts, lengths = block.window(scores_of_block.shape)
        part = block.slice_scores(scores_of_block)
        assert np.prod(lengths) == part.size and len(starts) == 7
        return part, block.queries(q), [i.lo for i in block.index(None)], block.positions()

    results = []
    slices = split(jnp.moveaxis(scores[..., :1], 1, 2), p)
    for (*indices, q), first in itertools.product(zip(*_blocking.loop_indices(p), slices), (0, 2)):
        part, q, index, positions = jax.tree.map(np.asarray, parts(*indices, np.int32(first), q))
        np.testing.assert_array_equal(part[..., :1], q + 1)
        np.testing.assert_array_equal(part, np.ravel_multi_index(np.broadcast_arrays(*index), shape))
        np.testing.assert_array_equal(np.broadcast_arrays(*positions), np.broadcast_arrays(*index[2:]))
        results.append(part.ravel())
    np.testing.assert_array_equal(np.sort(np.concatenate(results)), np.asarray(scores[..., 1:]).ravel())


@pytest.mark.parametrize("shape", list(itertools.product((1, 6), (1, 4), (1, 4), (1, 5))), ids=str)
def test_arrays_that_broadcast_are_sliced_in_the_same_way(shape):
    p = plan(4, 5, batch=6, heads=4, key_heads=2, sizes=ONE_HEAD, devices=2)
    assert p.batch == (2, 3) and p.heads == (2, 1)
    x = jnp.arange(np.prod(shape)).reshape(shape)

    @jax.jit
    def parts(x):
        block = Block(p, Segment(first=0, blocks=1, rows=2, low=1, high=4), jnp.int32(2), jnp.int32(0), jnp.int32(1))
        return [block.slice_scores(split_scores(y, p)) for y in (x, jnp.broadcast_to(x, (6, 4, 4, 5)))]

    a, b = parts(x)
    assert a.ndim == b.ndim == 5 and all(n in (1, m) for n, m in zip(a.shape, b.shape))
    np.testing.assert_array_equal(jnp.broadcast_to(a, b.shape), b)


def test_operands_without_four_axes_are_not_sliced():
    p = plan(4, 5, batch=6, heads=4)
    block = Block(p, Segment(first=0, blocks=1, rows=2, low=1, high=4), *map(jnp.int32, (0, 0, 1)))
    assert split_scores((jnp.float32(3), None), p) == (3, None) and block.slice_scores(jnp.float32(3)) == 3


@pytest.mark.parametrize("start", [None, (3, 4, 7, 0)])
@pytest.mark.parametrize(("tile", "whole"), [((6, 12, 20, 30), (12, 24, 40, 30)), ((3, 4, 6, 200), (9, 8, 60, 200))])
def test_a_block_has_the_decisions_of_a_window_of_the_mask(tile, whole, start):
    batch, heads, queries, keys = tile
    sizes = ONE_HEAD._replace(queries=8)
    p = plan(queries, keys, batch=batch, heads=heads, key_heads=heads // 2, sizes=sizes, devices=8)
    key = jax.random.key(3)
    mask = draw_mask("test", key, np.float32(0.5), whole)
    first = (0, 0, 0, 0) if start is None else start
    start = None if start is None else jnp.array([(0, n) for n in start], jnp.uint32)
    expected = jdrop.dropout_mask(key, whole, 0.5, window=list(zip(first, tile)))
    segment = Segment(first=0, blocks=1, rows=4, low=3, high=keys - 2)

    @jax.jit
    def both(batch, head, expected):
        block = Block(p, segment, batch, head, jnp.int32(2))
        return mask.keep_at(block.index(start)), block.slice_scores(split_scores(expected, p))

    for indices in zip(*_blocking.loop_indices(p)):
        np.testing.assert_array_equal(*both(*indices, expected))


def test_axes_of_one_element_are_squeezed_on_a_cpu():
    """On [1, 1, 1, T, S], XLA for CPU does not reuse the buffer of an operand for the result."""
    for batch, key_heads, groups in itertools.product((1, 2), repeat=3):
        for platform in (CPU, GENERIC):
            sizes = {"heads": key_heads * groups, "key_heads": key_heads, "platform": platform}
            p = plan(12, 20, batch=batch, **sizes)
            q = jax.ShapeDtypeStruct((batch, 12, key_heads * groups, 8), jnp.float32)
            k = jax.ShapeDtypeStruct((batch, 20, key_heads, 8), jnp.float32)

            def parts(q, k, p=p):
                block = Block(p, Segment(first=0, blocks=1, rows=12, low=0, high=20), *map(jnp.int32, (0, 0, 0)))
                return block.queries(split(q, p)[0]), block.keys(split(k, p)[0]), [i.lo for i in block.index(None)]

            q, k, index = jax.eval_shape(parts, q, k)
            left = [n for n in (batch, key_heads, groups) if n > 1 or platform is GENERIC]
            assert q.shape == (*left, 12, 8)
            assert k.shape == (*[n for n in (batch, key_heads) if n > 1 or platform is GENERIC], 20, 8)
            assert {i.ndim for i in index} == {len(left) + 2}
