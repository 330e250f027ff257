"""What the implementations of attention share: the problem, and the logits of scores that may be seen.

Scores have the axes [batch, head, query, key], or finer ones that split batch and head, with 1 where they broadcast.
"""

import functools
import operator
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jdrop.decisions import Layout


class Problem(NamedTuple):
    """What is static about a call."""

    scale: float
    causal: bool
    window: tuple[int, int] | None
    """How many keys a query sees to its left and to its right."""
    spread: bool
    """Whether the queries are a tile of the whole array's, and their positions count from an offset."""
    layout: Layout | None
    """The mask's, if there is one."""


class Drawn(NamedTuple):
    """The operands of a mask, see :func:`jdrop.decisions.operands`."""

    words: Array
    rate: Array
    """A scalar, or over scores."""


class Given(NamedTuple):
    """The operands that no gradient flows to; what is over scores has four axes."""

    mask: Array | None = None
    query_lengths: Array | None = None
    key_lengths: Array | None = None
    offset: Array | None = None
    """Where a tile of ``jax.shard_map`` starts, ``(hi, lo)`` for each of the four axes."""
    drawn: Drawn | None = None
    """``None`` where nothing is dropped."""


def first_query(problem: Problem, given: Given) -> Array | int:
    """The position of the first query in the whole array, int32."""
    return given.offset[2, 1].astype(jnp.int32) if problem.spread and given.offset is not None else 0


def logits(
    problem: Problem, products: Array, bias: Array | None, given: Given, queries: Array, keys: Array
) -> tuple[Array, bool]:
    """Return ``products * scale + bias`` with -inf for what is not seen, and whether a query may see nothing.

    ``queries`` and ``keys`` are positions; ``bias`` and what is given fit the products.
    """
    s = products * problem.scale
    if bias is not None:
        s = s + bias.astype(s.dtype)
    seen = [] if given.mask is None else [given.mask]
    if problem.causal:
        seen.append(keys <= queries)
    if problem.window is not None:
        left, right = problem.window
        seen += [queries - keys <= left, keys - queries <= right]
    if given.query_lengths is not None:
        seen.append(queries < given.query_lengths)
    if given.key_lengths is not None:
        seen.append(keys < given.key_lengths)
    if seen:
        s = jnp.where(functools.reduce(operator.and_, seen), s, -jnp.inf)
    return s, bool(seen) or bias is not None
