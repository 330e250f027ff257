"""Groups of examples, each with its own kept units."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec

from jdrop._checks import as_bool, as_count
from jdrop._errors import describe
from jdrop._sharding import explicit_sharding
from jdrop._subsets import check_divides


def as_groups(function: str, groups: int, x: Array, train: bool) -> int:
    """Require a number of groups that divides the batch; evaluation takes a batch of any size, as one group."""
    groups = as_count(function, "groups", groups)
    if not as_bool(function, "train", train, None):
        return 1
    if groups > 1:
        if x.ndim < 2:
            raise ValueError(
                f"{function}: x must be [batch, ..., features] with groups, got {describe(x)}; use groups=1"
            )
        check_divides(function, "groups", groups, x.shape[0], "examples")
    return groups


def run_groups(run: Callable[..., Array], groups: int, data: Any, units: Sequence[Array | None]) -> Array:
    """Return ``run(data, units)``, mapped over groups of consecutive examples.

    ``data`` is a pytree of arrays ``[batch, ...]``; ``units`` are int32 ``[groups, kept]``, or ``None`` for all.
    """
    if groups == 1:
        return run(data, [None if u is None else u[0] for u in units])
    grouped = jax.tree.map(functools.partial(_split, groups), data)
    first = jax.tree.leaves(grouped)[0]
    y = jax.vmap(run)(grouped, [None if u is None else _sharded_as(first, u) for u in units])
    sharding = explicit_sharding(jax.typeof(y).sharding)
    if sharding is not None:
        sharding = sharding.update(spec=PartitionSpec(sharding.spec[0], *sharding.spec[2:]))
    return jax.lax.reshape(y, (y.shape[0] * y.shape[1], *y.shape[2:]), out_sharding=sharding)


def _split(groups: int, x: Array) -> Array:
    sharding = explicit_sharding(jax.typeof(x).sharding)
    if sharding is not None:
        sharding = sharding.update(spec=PartitionSpec(sharding.spec[0], None, *sharding.spec[1:]))
    return jax.lax.reshape(x, (groups, x.shape[0] // groups, *x.shape[1:]), out_sharding=sharding)


def _sharded_as(x: Array, units: Array) -> Array:
    sharding = explicit_sharding(jax.typeof(x).sharding)
    if sharding is None:
        return units
    return jax.sharding.reshard(units, sharding.update(spec=PartitionSpec(sharding.spec[0], None)))
