"""Blocks with and without layers that skip dropped units, which scripts compile and time."""

import functools
from collections.abc import Callable
from typing import Any

import jax

import jdrop
from jdrop import thin
from jdrop.keys import derive

FEATURES, UNITS, RATE = 1024, 4096, 0.5
SKIP_RATE, BRANCHES = 0.4, 4
IN_OUT, UNITS_FIRST = ("in_out", "in_out"), ("out_in", "in_out")
Block = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]  # (key, x, up, down) -> y


def dense(shared_axes: tuple[int, ...] | None) -> Block:
    """Return the block that computes all units: without dropout, or with masks that are shared along axes."""

    def block(key: jax.Array, x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        h = jax.nn.gelu(x @ up)
        if shared_axes is not None:
            h = jdrop.dropout(key, h, RATE, train=True, shared_axes=shared_axes)
        return h @ down

    return block


def thinned(layouts: tuple[str, str], **options: Any) -> Block:
    """Return the block that computes the kept units."""

    def block(key: jax.Array, x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return thin.mlp(key, x, RATE, [up, down], train=True, layouts=layouts, **options)

    return block


BLOCKS: dict[str, tuple[Block, bool]] = {  # and whether the units of the first layer are first
    "no dropout": (dense(None), False),
    "dropout": (dense(()), False),
    "dropout, shared": (dense((0,)), False),
    **{f"thin.mlp, blocks of {n}": (thinned(IN_OUT, block_size=n), False) for n in (1, 64, 128)},
    **{f"thin.mlp, units first, blocks of {n}": (thinned(UNITS_FIRST, block_size=n), True) for n in (1, 64, 128)},
    "thin.mlp, blocks of 128, 4 groups": (thinned(IN_OUT, block_size=128, groups=4), False),
}


def residual(form: str) -> Callable[..., jax.Array]:
    """Return a model of residual branches under a form of stochastic depth per example."""

    def model(key: jax.Array, x: jax.Array, *weights: jax.Array) -> jax.Array:
        for i in range(BRANCHES):
            branch = functools.partial(dense(None), key, up=weights[2 * i], down=weights[2 * i + 1])
            if form == "skip_path":
                x = jdrop.skip_path(derive(key, i), x, SKIP_RATE, branch, train=True)
            elif form == "drop_path":
                x = x + jdrop.drop_path(derive(key, i), branch(x), SKIP_RATE, train=True)
            else:
                x = x + branch(x)
        return x

    return model
