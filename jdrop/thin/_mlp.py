"""Stacks of dense layers that compute only the kept hidden units."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array

from jdrop._checks import check_function
from jdrop._errors import describe
from jdrop._prepare import require_key
from jdrop._random.key_words import mark_used
from jdrop._subsets import Blocks, as_blocks
from jdrop._types import Shard
from jdrop.keys import derive
from jdrop.thin._dense import (
    Activation,
    Dense,
    Layer,
    Layout,
    activated,
    as_data,
    as_dense,
    as_layouts,
    check_size,
    scaled,
)
from jdrop.thin._groups import as_groups, run_groups
from jdrop.thin._units import as_kept, check_subset, draw_kept, splits_units


def mlp(
    key: Array | None,
    x: Array,
    rate: float | Sequence[float],
    layers: Sequence[Layer],
    *,
    train: bool,
    activation: Activation = jax.nn.gelu,
    block_size: int = 1,
    groups: int = 1,
    num_shards: int = 1,
    layouts: Layout | Sequence[Layout] = "in_out",
    shard: Shard = None,
) -> Array:
    """Run a stack of dense layers, and compute only the hidden units that are kept.

    For two layers, ``y = (activation(x @ w1 + b1) * m / (1 - rate)) @ w2 + b2``, where m is 1 for the kept units of
    each group of examples and 0 for the others. Dropped units cost no time: the layers multiply by the kept columns of
    ``w1`` and rows of ``w2``. In a deeper stack, the kept outputs of one layer are the kept inputs of the next.

    Args:
      key: one PRNG key, used once; may be ``None`` if ``train`` is false or ``rate`` is 0. One key per hidden layer is
        derived from it: ``derive(key, "mlp", i)`` is that of :func:`kept_units` for hidden layer i.
      x: real floating array ``[batch, ..., features]``.
      rate: fraction of the hidden units to drop, or one for each hidden layer. It determines a shape, so it must be a
        Python or NumPy number, and drop a whole number of blocks.
      layers: two or more kernels ``[inputs, outputs]``, or pairs of a kernel and a bias ``[outputs]`` or ``None``, with
        the dtype of x.
      train: ``True`` draws the units to keep; ``False`` computes all of them.
      activation: elementwise function of all layers but the last; it keeps the dtype.
      block_size: number of adjacent units that are kept or dropped together, as in :func:`kept_units`.
      groups: number of subsets of units. The batch, the first axis of x, is split into as many groups of consecutive
        examples. With 1, all examples share a subset. The layers copy the kept weights for each group, and keep the
        copies for the backward pass.
      num_shards: as in :func:`kept_units`; of all hidden layers.
      layouts: ``"out_in"`` for kernels ``[outputs, inputs]``, as in PyTorch and Equinox; or one layout per layer.
      shard: inside ``jax.shard_map``, the PartitionSpec of an array ``[groups, units]``, as in :func:`kept_units`. If
        it splits units, there must be two layers, the second without a bias, and the sum of the results over these
        devices is y.

    Returns:
      An array ``[batch, ..., outputs]`` with the dtype of x.

    Raises:
      ValueError: a number or a shape does not fit, or ``rate`` does not drop a whole number of blocks; the error names
        the nearest rates that do.
      TypeError: an argument has the wrong type, ``key`` is missing, or ``train`` is traced.

    References:
      Graham, Reizenstein, Robinson (2015), Efficient Batchwise Dropout Training Using Submatrices, arXiv:1502.02478.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jdrop import thin
      >>> up, down = jnp.ones([16, 64]), jnp.ones([64, 16])
      >>> y = thin.mlp(jax.random.key(0), jnp.ones([8, 16]), 0.5, [up, down], train=True, activation=jax.nn.relu)
      >>> y.shape, float(y[0, 0])
      ((8, 16), 1024.0)
    """
    name = "mlp"
    x = as_data(name, x)
    check_function(name, "activation", activation, "pass one of jax.nn")
    stack = _as_stack(name, x, layers, layouts)
    rates: list[Any] = list(rate) if isinstance(rate, (tuple, list)) else [rate] * (len(stack) - 1)
    if len(rates) != len(stack) - 1:
        raise ValueError(
            f"{name}: rate must be one number, or one for each of {len(stack) - 1} hidden layers, got {rate}; "
            "leave out those of inputs and outputs"
        )
    hidden = [
        as_blocks(name, layer.sizes[1], "units", block_size=block_size, num_shards=num_shards) for layer in stack[:-1]
    ]
    groups = as_groups(name, groups, x, train)
    units = _draw(name, key, x, stack, rates, hidden, groups, train=train, shard=shard)

    def run(h: Array, units: list[Array | None]) -> Array:
        inputs = None
        for layer, chosen, blocks in zip(stack, units, hidden):
            outputs = as_kept(chosen, blocks)
            h = scaled(activated(name, activation, layer(h, inputs, outputs)), outputs)
            inputs = outputs
        return stack[-1](h, inputs, None)

    return run_groups(run, groups, x, units)


def gated_mlp(
    key: Array | None,
    x: Array,
    rate: float,
    gate: Layer,
    up: Layer,
    down: Layer,
    *,
    train: bool,
    activation: Activation = jax.nn.silu,
    block_size: int = 1,
    groups: int = 1,
    num_shards: int = 1,
    layouts: Layout | Sequence[Layout] = "in_out",
    shard: Shard = None,
) -> Array:
    """Run a gated block, such as SwiGLU, and compute only the hidden units that are kept.

    ``y = (activation(x @ gate) * (x @ up) * m / (1 - rate)) @ down``, where m is 1 for the kept units of each group of
    examples and 0 for the others. Dropped units cost no time, as in :func:`mlp`.

    Args:
      key: one PRNG key, used once; may be ``None`` if ``train`` is false or ``rate`` is 0. The key of
        :func:`kept_units` is ``derive(key, "gated_mlp", 0)``.
      x: real floating array ``[batch, ..., features]``.
      rate: fraction of the hidden units to drop. It determines a shape, so it must be a Python or NumPy number, and
        drop a whole number of blocks.
      gate: kernel ``[features, units]`` of the dtype of x, or a pair of it and a bias ``[units]`` or ``None``.
      up: as ``gate``.
      down: kernel ``[units, outputs]``, or a pair of it and a bias ``[outputs]`` or ``None``.
      train: ``True`` draws the units to keep; ``False`` computes all of them.
      activation: elementwise function of the gate: ``jax.nn.silu`` for SwiGLU, ``jax.nn.gelu`` for GEGLU.
      block_size: as in :func:`mlp`.
      groups: as in :func:`mlp`.
      num_shards: as in :func:`mlp`.
      layouts: as in :func:`mlp`, for ``(gate, up, down)``.
      shard: as in :func:`mlp`.

    Returns:
      An array ``[batch, ..., outputs]`` with the dtype of x.

    Raises:
      ValueError: a number or a shape does not fit, or ``rate`` does not drop a whole number of blocks; the error names
        the nearest rates that do.
      TypeError: an argument has the wrong type, ``key`` is missing, or ``train`` is traced.

    References:
      Shazeer (2020), GLU Variants Improve Transformer, arXiv:2002.05202; Graham, Reizenstein, Robinson (2015),
      Efficient Batchwise Dropout Training Using Submatrices, arXiv:1502.02478.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jdrop import thin
      >>> gate, up, down = jnp.ones([16, 64]), jnp.ones([16, 64]), jnp.ones([64, 16])
      >>> y = thin.gated_mlp(jax.random.key(0), jnp.ones([8, 16]), 0.5, gate, up, down, train=True, block_size=16)
      >>> y.shape
      (8, 16)
    """
    name = "gated_mlp"
    x = as_data(name, x)
    check_function(name, "activation", activation, "pass one of jax.nn")
    gating, upward, downward = (
        as_dense(name, argument, layer, layout, x)
        for argument, layer, layout in zip(("gate", "up", "down"), (gate, up, down), as_layouts(name, layouts, 3))
    )
    check_size(name, "gate", gating, x.shape[-1], "x")
    check_size(name, "up", upward, x.shape[-1], "x")
    if upward.sizes[1] != gating.sizes[1]:
        raise ValueError(
            f"{name}: up must have the units of gate, {gating.sizes[1]}, got {upward.sizes[1]}; reshape it"
        )
    check_size(name, "down", downward, upward.sizes[1], "up")
    blocks = as_blocks(name, upward.sizes[1], "units", block_size=block_size, num_shards=num_shards)
    groups = as_groups(name, groups, x, train)
    units = _draw(name, key, x, [gating, upward, downward], [rate], [blocks], groups, train=train, shard=shard)

    def run(x: Array, units: list[Array | None]) -> Array:
        kept = as_kept(units[0], blocks)
        h = activated(name, activation, gating(x, None, kept)) * upward(x, None, kept)
        return downward(scaled(h, kept), kept, None)

    return run_groups(run, groups, x, units)


def _as_stack(function: str, x: Array, layers: Any, layouts: Any) -> list[Dense]:
    """Require two or more layers whose sizes fit."""
    if not isinstance(layers, (tuple, list)) or len(layers) < 2:
        raise ValueError(f"{function}: layers must be a list of two or more, got {describe(layers)}; list the kernels")
    stack, size, source = [], x.shape[-1], "x"
    for i, (layer, layout) in enumerate(zip(layers, as_layouts(function, layouts, len(layers)))):
        stack.append(as_dense(function, f"layers[{i}]", layer, layout, x))
        check_size(function, f"layers[{i}]", stack[-1], size, source)
        size, source = stack[-1].sizes[1], f"layers[{i}]"
    return stack


def _draw(
    function: str,
    key: Array | None,
    x: Array,
    layers: Sequence[Dense],
    rates: Sequence[float],
    hidden: Sequence[Blocks],
    groups: int,
    *,
    train: bool,
    shard: Shard,
) -> list[Array | None]:
    """Return the kept units of each hidden layer, int32 ``[groups, kept]``; ``None`` if it keeps all."""
    data = [x, *(array for layer in layers for array in layer.arrays)]
    checked = [
        check_subset(function, key, data, rate, blocks, groups, train=train, shard=shard)
        for rate, blocks in zip(rates, hidden)
    ]
    if splits_units(checked[0]) and (len(hidden) > 1 or layers[-1].bias is not None):
        raise NotImplementedError(
            f"{function}: shard must not split units if there are more than two layers, or if the last has a bias, "
            f"got {shard}; sum the results over the devices, then add the bias"
        )
    if all(arguments.is_identity for arguments in checked):
        return [None] * len(checked)
    base_key = mark_used(require_key(function, key))
    return [
        None if arguments.is_identity else draw_kept(arguments._replace(key=derive(base_key, function, i)), blocks)
        for i, (arguments, blocks) in enumerate(zip(checked, hidden))
    ]
