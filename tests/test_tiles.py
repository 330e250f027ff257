"""How chunked attention is cut: every score is in one block, and has its own index."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_formula import visible
from jdrop._scores import Problem
from jdrop.bits import indices, place

import jdrop
from jdrop import _tiles, decisions, keys

SEEING = [(False, None), (True, None), (False, (5, 9)), (False, (0, 300)), (True, (40, 0)), (False, (0, 0))]


def plan_of(sizes, causal=False, window=None, spread=False, layout=None):
    batch, queries, num_keys, heads, key_heads = sizes
    q, k = jnp.zeros((batch, queries, heads, 8)), jnp.zeros((batch, num_keys, key_heads, 8))
    return _tiles.plan(Problem(1.0, causal, window, spread, layout), q, k)


@pytest.mark.parametrize(("causal", "window"), SEEING)
@pytest.mark.parametrize("rows", [16, 512])
def test_segments_hold_every_query_once_and_all_that_it_sees(causal, window, rows, monkeypatch):
    monkeypatch.setattr(_tiles, "ROWS", rows)
    monkeypatch.setattr(_tiles, "BLOCK", 2**15)
    for queries, num_keys, groups in itertools.product((1, 97, 128, 257, 1025), (1, 100, 257, 1025), (1, 4)):
        plan = plan_of((1, queries, num_keys, groups, 1), causal, window)
        seen = visible((1, 1, queries, num_keys), None, causal, window)[0, 0]
        covered = np.zeros((queries, num_keys), int)
        count = np.zeros(queries, int)
        for s in plan.segments:
            assert s.blocks > 0 and 0 < s.rows <= max(rows // groups, 2**15 // num_keys // groups, 16)
            assert 0 <= s.low < s.high <= num_keys
            covered[s.first : s.first + s.blocks * s.rows, s.low : s.high] += 1
            count[s.first : s.first + s.blocks * s.rows] += 1
        assert (count == 1).all() and [s.first for s in plan.segments] == sorted(s.first for s in plan.segments)
        assert (covered[seen] == 1).all() and covered.max() == 1


def test_all_keys_are_there_where_positions_do_not_tell():
    """In a tile of shard_map, where the first query may be any."""
    for causal, window in SEEING:
        (segment,) = plan_of((1, 300, 200, 1, 1), causal, window, spread=True).segments
        assert segment == (0, 1, 300, 0, 200)


def test_blocks_and_turns_by_default(monkeypatch):
    """A block has 512 queries, or as many as have 2^22 scores, which is also the most that segments have abreast."""
    blocks = {n: plan_of((1, n, n, 1, 1)).segments for n in (512, 1024, 2048, 4096, 8192, 16384)}
    assert {n: (s[0].rows, s[0].blocks) for n, s in blocks.items()} == {
        512: (512, 1),
        1024: (1024, 1),
        2048: (2048, 1),
        4096: (1024, 4),
        8192: (512, 16),
        16384: (512, 32),
    }
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    causal = {n: plan_of((1, n, n, 1, 1), causal=True) for n in (512, 1024, 2048, 4096, 8192, 16384)}
    assert {n: (len(p.segments), p.abreast) for n, p in causal.items()} == {
        512: (2, 32),
        1024: (4, 16),
        2048: (4, 4),
        4096: (8, 2),
        8192: (16, 1),
        16384: (16, 1),
    }
    assert plan_of((1, 2048, 2048, 4, 1), causal=True).abreast == 1  # four query heads of a key head
    windows = {heads: plan_of((1, 4096, 4096, heads, heads), window=(0, 0)) for heads in (1, 2, 8)}
    # A segment has 2^18 scores of a head, and a block takes in heads up to 2^20.
    assert {n: (w.heads[0], w.abreast) for n, w in windows.items()} == {1: (1, 16), 2: (2, 8), 8: (4, 4)}


@pytest.mark.parametrize("length", [1024, 2048, 4096, 8192, 16384])
def test_work_is_left_out_where_positions_hide_keys(length):
    def area(**options):
        segments = plan_of((1, length, length, 1, 1), **options).segments
        return sum(s.blocks * s.rows * (s.high - s.low) for s in segments)

    assert area() == length**2
    causal = {1024: 256, 16384: 1024}.get(length, 512)
    assert area(causal=True) == (length + causal) / 2 * length
    window = 256 if length == 2048 else causal
    assert area(window=(128, 0)) <= (128 + window) * length


def test_blocks_of_a_mesh_hold_a_part_of_every_device(monkeypatch):
    monkeypatch.setattr(_tiles, "CPU_SCORES", 1)
    assert jax.device_count() == 8
    for batch, key_heads in itertools.product((1, 2, 3, 6, 8, 16), repeat=2):
        plan = plan_of((batch, 4, 4, 2 * key_heads, key_heads))
        assert (plan.batch, plan.heads) == tuple((g := int(np.gcd(n, 8)), n // g) for n in (batch, key_heads))


def test_blocks_of_many_heads_have_few_queries():
    """What devices share out is in every block, so a block has fewer queries of each head."""
    sizes = {(b, k): plan_of((b, 2048, 2048, k, k)).segments[0].rows for b in (1, 2, 8) for k in (1, 2, 8)}
    assert sizes == {(1, 1): 2048, (1, 2): 1024, (2, 1): 1024, (2, 2): 512} | {
        (b, k): 512 for b, k in ((1, 8), (8, 1), (2, 8), (8, 2), (8, 8))
    }


@pytest.mark.parametrize("room", [1, 2, 7, 24, 100])
def test_blocks_hold_as_many_heads_as_have_room(room, monkeypatch):
    monkeypatch.setattr(_tiles, "CPU_SCORES", room * 20 * 30)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    plan = plan_of((6, 20, 30, 4, 4))
    assert plan.batch[0] * plan.batch[1] == 6 and plan.heads[0] * plan.heads[1] == 4
    assert plan.batch[0] * plan.heads[0] == {1: 1, 2: 2, 7: 4, 24: 24, 100: 24}[room]


SIZES = [(1, 4, 5, 2, 2), (6, 4, 5, 12, 6), (3, 4, 5, 6, 3), (16, 4, 5, 3, 1), (6, 4, 5, 12, 12)]


@pytest.mark.parametrize("sizes", SIZES)
def test_join_is_the_inverse_of_split(sizes, monkeypatch):
    monkeypatch.setattr(_tiles, "CPU_SCORES", 1)
    plan = plan_of(sizes)
    batch, queries, _, heads, key_heads = sizes
    for n in (heads, key_heads):
        x = jnp.arange(batch * queries * n * 8).reshape(batch, queries, n, 8)
        groups = n // key_heads
        assert _tiles.split(x, plan).shape[1:] == (plan.batch[0], plan.heads[0], groups, queries, 8)
        if groups == plan.groups:
            np.testing.assert_array_equal(_tiles.join(_tiles.split(x, plan), plan), x)


@pytest.mark.parametrize("sizes", SIZES)
def test_all_parts_of_a_block_are_of_the_same_scores(sizes, monkeypatch):
    """Operands hold their own flat index: what split, cut and index give for each block has to agree."""
    monkeypatch.setattr(_tiles, "CPU_SCORES", 1)
    monkeypatch.setattr(_tiles, "ROWS", 1)
    plan = plan_of(sizes)
    batch, queries, num_keys, heads, _ = sizes
    shape = batch, heads, queries, num_keys
    scores = jnp.arange(np.prod(shape)).reshape(shape)
    q = jnp.moveaxis(scores[..., :1], 1, 2)
    minor, slices = _tiles.minor(plan), _tiles.split(q, plan)
    segment = _tiles.Segment(0, 2, 2, 1, num_keys)
    found = []
    for turn, first in itertools.product(range(len(slices)), (0, 2)):
        at = _tiles.At(minor[0][turn], minor[1][turn], jnp.int32(first))
        block = _tiles.cut(_tiles.fine(scores, plan), plan, at, segment)
        np.testing.assert_array_equal(block[..., :1], _tiles.queries(slices[turn], plan, at, segment) + 1)
        index = [i for _, i in _tiles.index(plan, at, segment, None)]
        flat = np.ravel_multi_index(np.broadcast_arrays(*map(np.asarray, index)), shape)
        np.testing.assert_array_equal(block, flat)
        starts, lengths = _tiles.window(_tiles.fine(scores, plan).shape, at, segment)
        assert np.prod(lengths) == block.size and len(starts) == 7
        found.append(np.asarray(block).ravel())
    np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.asarray(scores[..., 1:]).ravel())


@pytest.mark.parametrize("shape", list(itertools.product((1, 6), (1, 4), (1, 4), (1, 5))))
def test_operands_that_broadcast_are_cut_alike(shape):
    sizes = (6, 4, 5, 4, 2)
    plan = plan_of(sizes)
    x = jnp.arange(np.prod(shape)).reshape(shape)
    at, segment = _tiles.At(jnp.int32(0), jnp.int32(0), jnp.int32(1)), _tiles.Segment(0, 1, 2, 1, 4)
    whole = jnp.broadcast_to(x, (6, 4, 4, 5))
    a, b = (_tiles.cut(_tiles.fine(y, plan), plan, at, segment) for y in (x, whole))
    assert a.ndim == b.ndim == 5 and all(n == m or n == 1 for n, m in zip(a.shape, b.shape))
    np.testing.assert_array_equal(jnp.broadcast_to(a, b.shape), b)
    assert _tiles.fine((jnp.float32(3), None), plan) == (3, None) and _tiles.cut(jnp.float32(3), plan, at, segment) == 3


@pytest.mark.parametrize("offset", [None, (3, 4, 7, 0)])
@pytest.mark.parametrize(("tile", "whole"), [((6, 12, 20, 30), (12, 24, 40, 30)), ((3, 4, 6, 200), (9, 8, 60, 200))])
def test_a_block_has_the_bits_of_a_window_of_the_mask(tile, whole, offset, monkeypatch):
    monkeypatch.setattr(_tiles, "CPU_SCORES", 1)
    monkeypatch.setattr(_tiles, "ROWS", 8)
    batch, heads, queries, num_keys = tile
    plan = plan_of((batch, queries, num_keys, heads, heads // 2))
    key = jax.random.key(3)
    layout = decisions.Layout(whole, "fast")
    starts = (0, 0, 0, 0) if offset is None else offset
    place_of = None if offset is None else jnp.array([(0, n) for n in offset], jnp.uint32)
    mask = np.asarray(jdrop.dropout_mask(key, whole, 0.5, window=list(zip(starts, tile))))
    fine = _tiles.fine(jnp.asarray(mask), plan)
    segment = _tiles.Segment(0, 1, 4, 3, num_keys - 2)
    for turn in range(plan.batch[1] * plan.heads[1]):
        at = _tiles.At(*(m[turn] for m in _tiles.minor(plan)), jnp.int32(2))
        index = _tiles.index(plan, at, segment, place_of)
        kept = decisions.keep_at(layout, keys.seed(jax.random.key_data(key)), jnp.float32(0.5), index)
        np.testing.assert_array_equal(kept, _tiles.cut(fine, plan, at, segment))


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 3, 200), (5, 127), (300,), (2**33, 3), (2**20, 2**20, 200)])
def test_place_agrees_with_indices(shape, columns):
    """One element of an array at a time, in any order."""
    rng = np.random.default_rng(0)
    at = [[int(rng.integers(n)) for n in shape] for _ in range(4)]
    at[0], at[1] = [0 for _ in shape], [n - 1 for n in shape]
    axes = [
        (np.array([i >> 32 for i in axis], np.uint32), np.array([i % 2**32 for i in axis], np.uint32))
        for axis in zip(*at)
    ]
    (hi, lo), col = place(shape, [(jnp.asarray(h), jnp.asarray(x)) for h, x in axes], columns=columns)
    for k, where in enumerate(at):
        start = [(np.uint32(i >> 32), np.uint32(i % 2**32)) for i in where]
        (one_hi, one_lo), one_col = indices(shape, [1] * len(shape), start, columns=columns)
        found = [np.broadcast_to(np.asarray(x), (4,))[k] for x in (hi, lo, col)]
        assert found == [np.asarray(x).item() for x in (one_hi, one_lo, one_col)]
