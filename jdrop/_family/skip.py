"""Stochastic depth per example: a residual branch that is computed for the kept examples only."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from jdrop._branch import add_branch, scaled_branch
from jdrop._checks import as_bool, as_count, as_number, check_array, check_function, is_array
from jdrop._errors import describe
from jdrop._gather import add_blocks, take_blocks
from jdrop._prepare import check_arguments
from jdrop._sharding import tile_axes
from jdrop._subsets import Blocks, as_blocks, draw_units, rounded_kept
from jdrop._types import Shard, real_dtype


def skip_path(
    key: Array | None,
    x: Array,
    rate: float,
    fn: Callable[..., Array],
    *,
    train: bool,
    operands: Any = (),
    num_shards: int = 1,
    shard: Shard = None,
) -> Array:
    """Add a residual branch for a random part of the batch, and compute it for these examples only.

    ``y[b] = x[b] + fn(x)[b] * m[b] * batch / kept``, where m is 1 for a uniformly random subset of
    ``kept = max(1, floor(batch * (1 - rate) + 1/2))`` examples and 0 for the others. With several shards, this holds
    for each of them. :func:`jdrop.drop_path` decides for each example on its own, and computes the branch for all of
    them.

    Args:
      key: one PRNG key, used once; may be ``None`` if ``train`` is false or ``rate`` is 0.
      x: floating or complex array ``[batch, ...]``.
      rate: fraction of the examples that skip the branch. It determines a shape, so it must be a Python or NumPy
        number.
      fn: the branch, ``fn(x, *operands) -> array with the shape and dtype of x``, on the kept examples in their
        original order. It treats each example on its own. It can be differentiated with respect to the variables it
        closes over.
      train: ``True`` draws the subset; ``False`` returns ``x + fn(x, *operands)``.
      operands: a tuple of further arguments of ``fn``: pytrees of arrays ``[batch, ...]``, such as masks of padding. Of
        these, too, ``fn`` gets the kept examples. Keys for dropout inside ``fn`` are such operands: derive one per
        example.
      num_shards: number of equal parts of the batch of which the same number of examples is kept. Use the number of
        devices that share the batch, or a multiple of it, so that all of them have the same work, and no example moves.
      shard: as in :func:`jdrop.dropout`; the PartitionSpec of x, or of its first axis. ``num_shards`` and ``kept``
        are then those of this device.

    Returns:
      An array with the shape and dtype of x, equal to x for the examples that skip the branch.

    Raises:
      ValueError: a number is out of range, the rounded ``rate`` drops no example, ``num_shards`` does not divide the
        batch, ``key`` is a batch of keys, or ``fn`` or an operand has another shape.
      TypeError: an argument has the wrong type, ``key`` is missing, or ``train`` is traced.

    References:
      Oquab et al. (2024), DINOv2: Learning Robust Visual Features without Supervision, TMLR, section 5 (efficient
      stochastic depth); Huang, Sun, Liu, Sedra, Weinberger (2016), Deep Networks with Stochastic Depth, ECCV.

    Limits:
      The batch that ``fn`` sees is smaller, so statistics of BatchNorm are those of the kept examples.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> y = jdrop.skip_path(jax.random.key(0), jnp.ones([8, 4]), 0.5, lambda x: 10 * x, train=True)
      >>> sorted(y[:, 0].tolist())
      [1.0, 1.0, 1.0, 1.0, 21.0, 21.0, 21.0, 21.0]
    """
    name = "skip_path"
    check_array(name, "x", x)
    check_function(name, "fn", fn, "pass the branch")
    if not x.ndim:
        raise ValueError(f"{name}: x must be [batch, ...], got {describe(x)}; add an axis of examples")
    if not isinstance(operands, tuple):
        raise TypeError(f"{name}: operands must be a tuple, got {describe(operands)}; add a comma")
    for leaf in jax.tree.leaves(operands):
        if not is_array(leaf) or leaf.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"{name}: operands must be arrays [batch, ...] with the batch of x, {x.shape[0]}, "
                f"got {describe(leaf)}; let fn close over the others"
            )
    share = as_number(name, "rate", rate, 0.0, 1.0)
    as_count(name, "num_shards", num_shards)
    if as_bool(name, "train", train, None) and share:
        blocks = as_blocks(name, x.shape[0], "examples", num_shards=num_shards)
        _check_drops(name, rate, rounded_kept(share, blocks.per_shard), blocks)
    else:  # takes a batch of any size
        blocks = Blocks(1, x.shape[0], 1, "examples")
    tile_axes(name, x.shape, shard)  # checks it
    arguments = check_arguments(
        name,
        key,
        (x, operands),
        share,
        shape=(blocks.shards, blocks.per_shard),
        train=train,
        static_rate=True,
        shard=shard if shard is None else PartitionSpec(*shard[:1]),
    )
    x, operands = jnp.asarray(x), jax.tree.map(jnp.asarray, operands)
    if arguments.is_identity:
        return add_branch(name, "fn", x, fn(x, *operands))
    kept = draw_units(arguments, blocks, rounded_kept(share, blocks.per_shard))
    part, *others = (jax.tree.map(lambda a: take_blocks(a, kept, 0, blocks), data) for data in (x, *operands))
    keep_probability = jnp.asarray(kept.shape[0] / x.shape[0], real_dtype(x))
    y = scaled_branch(name, "fn", part, fn(part, *others), keep_probability)
    return add_blocks(x, kept, y, 0, blocks)


def _check_drops(function: str, rate: float, kept: int, blocks: Blocks) -> None:
    """Require a rate that drops at least one example of each shard."""
    if kept == blocks.per_shard:
        where = f" in each of {blocks.shards} shards" if blocks.shards > 1 else ""
        raise ValueError(
            f"{function}: rate must drop at least one of {blocks.per_shard} examples{where}, got {describe(rate)}; "
            "pass 0, or a larger batch"
        )
