"""One block of attention, without the loops: against the formula, whichever axes it leaves out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_formula import close, formula, normal, visible
from jdrop._scores import Drawn, Given, Problem

import jdrop
from jdrop import _chunk, _tiles, decisions, keys

KEY = jax.random.key(61)
T, S, H = 12, 20, 16
RATE, SCALE = 0.25, 0.3


def one_block(batch, key_heads, groups, rate):
    """The plan, operands as they are split, and what is given, of a block that holds all scores."""
    heads = key_heads * groups
    shape = (batch, heads, T, S)
    q, do = (normal(i, batch, T, heads, H) for i in (0, 1))
    k, v = (normal(i, batch, S, key_heads, H) for i in (2, 3))
    layout = decisions.Layout(shape, "fast") if rate else None
    plan = _tiles.Plan(Problem(SCALE, True, None, False, layout), (batch, 1), (key_heads, 1), groups, (), 1)
    drawn = Drawn(keys.seed(jax.random.key_data(KEY)), jnp.float32(rate)) if rate else None
    return shape, plan, (q, k, v, do), Given(drawn=drawn)


@pytest.mark.parametrize("rate", [0.0, RATE])
@pytest.mark.parametrize("sizes", list(itertools.product((1, 2), repeat=3)), ids=str)
def test_a_block_agrees_with_the_formula(sizes, rate):
    """Queries 3 to 8 see keys up to their own place, of which the block holds those from 1 to 16."""
    shape, plan, arrays, given = one_block(*sizes, rate)
    first, rows, low, high = 3, 6, 1, 17
    at, segment = _tiles.At(*map(jnp.int32, (0, 0, first))), _tiles.Segment(first, 1, rows, low, high)
    seen = visible(shape, causal=True)
    seen[..., :low] = False
    factor = np.asarray(jdrop.dropout_mask(KEY, shape, rate)) / (1 - rate) if rate else 1.0
    do = np.zeros_like(arrays[3])
    do[:, first : first + rows] = arrays[3][:, first : first + rows]
    out, dq, dk, dv, ds = formula(*arrays[:3], factor, seen=seen, scale=SCALE, do=do, bias=np.zeros(shape))

    q, k, v, d = (_tiles.split(jnp.asarray(x), plan)[0] for x in (*arrays[:3], do))
    fine = _tiles.fine((None, given), plan)
    found, *sums = jax.jit(lambda *x: _chunk.forward(plan, x, *fine, at, segment))(q, k, v)
    assert sums[0].shape == sums[1].shape == (*found.shape[:-1], 1)
    of_block = lambda x: _tiles.split(jnp.asarray(x), plan)[0][:, :, :, first : first + rows]
    close([found], [np.asarray(of_block(out))])

    nothing = jnp.full((*q.shape[:4], 1), jnp.nan)  # others are not read
    sums = [nothing.at[:, :, :, first : first + rows].set(x) for x in sums]
    delta = _tiles.split(jnp.asarray((do * out).sum(-1, keepdims=True)), plan)[0]
    for extra in ((), (delta,)):
        operands = (q, k, v, d, *sums, *extra)
        gradients = jax.jit(lambda *x: _chunk.backward(plan, x, *fine, at, segment))(*operands)
        of_keys = [np.asarray(_tiles.split(jnp.asarray(x), plan)[0])[:, :, 0, low:high] for x in (dk, dv)]
        expected = [of_block(dq) / SCALE, of_keys[0].swapaxes(-1, -2) / SCALE, of_keys[1].swapaxes(-1, -2)]
        close(gradients[:3], [np.asarray(x) for x in expected])
        of_scores = ds.reshape(*q.shape[:3], T, S)[:, :, :, first : first + rows, low:high]
        close(gradients[3:], [of_scores])


def test_axes_of_one_element_are_left_out():
    """So that an operation's result may take its operand's place; on [1, 1, 1, T, S] XLA for CPU lets none."""
    for batch, key_heads, groups in itertools.product((1, 2), repeat=3):
        _, plan, (q, k, _, _), _ = one_block(batch, key_heads, groups, RATE)
        at, segment = _tiles.At(*map(jnp.int32, (0, 0, 0))), _tiles.Segment(0, 1, T, 0, S)
        left = [n for n in (batch, key_heads, groups) if n > 1]
        queries = _tiles.queries(_tiles.split(jnp.asarray(q), plan)[0], plan, at, segment)
        assert queries.shape == (*left, T, H)
        found = _tiles.keys(_tiles.split(jnp.asarray(k), plan)[0], plan, segment)
        assert found.shape == (*[n for n in (batch, key_heads) if n > 1], S, H)
        assert {i.ndim for _, i in _tiles.index(plan, at, segment, None)} == {len(left) + 2}
