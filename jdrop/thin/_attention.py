"""Multi-head attention that computes only the kept heads."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jdrop._checks import check_array, check_function
from jdrop._errors import describe
from jdrop._subsets import as_blocks
from jdrop._types import Shard
from jdrop.thin._dense import Dense, Layer, as_bias, as_data, as_pair, check_result, scaled
from jdrop.thin._groups import as_groups, run_groups
from jdrop.thin._units import Kept, as_kept, check_subset, draw_kept, splits_units

Attend = Callable[[Array, Array, Array, Array], Array]


def _attend(query: Array, key: Array, value: Array, heads: Array) -> Array:
    del heads
    return jax.nn.dot_product_attention(query, key, value)


def multi_head_attention(
    key: Array | None,
    x: Array,
    rate: float,
    query: Layer,
    keys: Layer,
    values: Layer,
    out: Layer,
    *,
    train: bool,
    context: Array | None = None,
    attend: Attend = _attend,
    groups: int = 1,
    num_shards: int = 1,
    shard: Shard = None,
) -> Array:
    """Run multi-head attention, and compute only the heads that are kept (DropHead).

    ``y = sum over h of m[h] / (1 - rate) * attend(x @ query[h], c @ keys[h], c @ values[h]) @ out[h]``, where m is 1
    for the kept heads of each group of examples and 0 for the others. Dropped heads cost no time, neither in the
    projections nor in attention. Where several query heads share keys and values, they are kept or dropped together.

    Args:
      key: one PRNG key, used once, that of :func:`kept_units`; may be ``None`` if ``train`` is false or ``rate`` is 0.
      x: real floating array ``[batch, time, features]``.
      rate: fraction of the heads of keys to drop. It determines a shape, so it must be a Python or NumPy number, and
        drop a whole number of heads.
      query: kernel ``[features, query heads, width]`` of the dtype of x, as in Flax, or a pair of it and a bias
        ``[query heads, width]`` or ``None``.
      keys: kernel ``[context features, heads, width]``, or a pair of it and a bias ``[heads, width]``. The number of
        heads must divide that of the query.
      values: kernel ``[context features, heads, value width]``, or a pair, as ``keys``.
      out: kernel ``[query heads, value width, outputs]``, or a pair of it and a bias ``[outputs]``.
      train: ``True`` draws the heads to keep; ``False`` computes all of them.
      context: array ``[batch, context time, context features]`` of the dtype of x for keys and values (cross
        attention); ``None`` takes x.
      attend: attention, ``(query, key, value, heads) -> array [batch, time, query heads, value width]`` of the dtype of
        x, on arrays ``[batch, time, heads, width]`` of the kept heads. ``heads``, int32 ``[query heads]``, are the
        indices of the kept query heads, for example to select biases; inside ``jax.shard_map``, of those of this
        device. The default is ``jax.nn.dot_product_attention``.
      groups: as in :func:`mlp`.
      num_shards: as in :func:`kept_units`, for the heads of keys.
      shard: inside ``jax.shard_map``, the PartitionSpec of an array ``[groups, heads]``, as in :func:`kept_units`. If
        it splits heads, ``out`` must not have a bias, and the sum of the results over these devices is y.

    Returns:
      An array ``[batch, time, outputs]`` with the dtype of x.

    Raises:
      ValueError: a number or a shape does not fit, or ``rate`` does not drop a whole number of heads; the error names
        the nearest rates that do.
      TypeError: an argument has the wrong type, ``key`` is missing, or ``train`` is traced.

    References:
      Zhou, Ge, Wei, Zhou, Xu (2020), Scheduled DropHead: A Regularization Method for Transformer Models, Findings of
      EMNLP; Ainslie, Lee-Thorp, de Jong, Zemlyanskiy, Lebron, Sanghai (2023), GQA: Training Generalized Multi-Query
      Transformer Models from Multi-Head Checkpoints, EMNLP.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jdrop import thin
      >>> qkv, out = jnp.ones([16, 4, 8]) / 16, jnp.ones([4, 8, 16]) / 32
      >>> x = jnp.ones([2, 5, 16])
      >>> y = thin.multi_head_attention(jax.random.key(0), x, 0.5, qkv, qkv, qkv, out, train=True)
      >>> y.shape, float(y[0, 0, 0])
      ((2, 5, 16), 1.0)
    """
    name = "multi_head_attention"
    x = as_data(name, x)
    check_function(name, "attend", attend, "pass attention")
    if x.ndim != 3:
        raise ValueError(f"{name}: x must be [batch, time, features], got {describe(x)}; reshape it, or use jax.vmap")
    source = x if context is None else _as_context(name, context, x)
    parts = {"query": (query, x), "keys": (keys, source), "values": (values, source)}
    projections = [_as_projection(name, argument, layer, data) for argument, (layer, data) in parts.items()]
    output = _as_output(name, out, x)
    shapes = [projection.shape for projection in projections]
    _check_heads(name, shapes[0], shapes[1], shapes[2], output.shape)
    groups = as_groups(name, groups, x, train)
    heads = as_blocks(name, shapes[1][0], "heads", num_shards=num_shards)
    data = [x, source, *(array for layer in (*projections, output) for array in layer.dense.arrays)]
    arguments = check_subset(name, key, data, rate, heads, groups, train=train, shard=shard)
    if splits_units(arguments) and output.dense.bias is not None:
        raise NotImplementedError(
            f"{name}: shard must not split heads if out has a bias, got {shard}; "
            "sum the results over the devices, then add the bias"
        )
    units = None if arguments.is_identity else draw_kept(arguments, heads)
    per_head = shapes[0][0] // shapes[1][0]

    def run(data: list[Array], units: list[Array | None]) -> Array:
        kept = as_kept(units[0], heads)
        kept_queries = None if kept is None else kept.of_parts(per_head)
        q, k, v = (
            projection.to_heads(x, kept_heads)
            for projection, x, kept_heads in zip(projections, (data[0], data[-1], data[-1]), (kept_queries, kept, kept))
        )
        indices = jnp.arange(shapes[0][0], dtype=jnp.int32) if kept_queries is None else kept_queries.units
        y = check_result(name, "attend", attend(q, k, v, indices), (*q.shape[:-1], v.shape[-1]), x.dtype)
        return output.from_heads(scaled(y, kept), kept_queries)

    return run_groups(run, groups, [x] if context is None else [x, source], [units])


class _Projection(NamedTuple):
    """A dense layer whose outputs, or inputs, are heads."""

    dense: Dense
    shape: tuple[int, int]
    """Number of heads, and their width."""

    def to_heads(self, x: Array, kept: Kept | None) -> Array:
        """Map ``[batch, time, features]`` to the kept heads ``[batch, time, heads, width]``."""
        y = self.dense(x, None, None if kept is None else kept.of_parts(self.shape[1]))
        heads = self.shape[0] if kept is None else kept.units.shape[0]
        return y.reshape(*y.shape[:-1], heads, self.shape[1])

    def from_heads(self, x: Array, kept: Kept | None) -> Array:
        """Map the kept heads ``[batch, time, heads, width]`` to ``[batch, time, outputs]``."""
        return self.dense(
            x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1]),
            None if kept is None else kept.of_parts(self.shape[1]),
            None,
        )


def _as_context(function: str, context: Array, x: Array) -> Array:
    check_array(function, "context", context, (x.dtype.name,), cast="convert it to the dtype of x")
    if context.ndim != 3 or context.shape[0] != x.shape[0]:
        raise ValueError(
            f"{function}: context must be [batch, time, features] with the batch of x, {x.shape[0]}, "
            f"got {describe(context)}; reshape it"
        )
    return jnp.asarray(context)


def _as_projection(function: str, argument: str, layer: Any, x: Array) -> _Projection:
    """Require a kernel ``[features, heads, width]``, or a pair of it and a bias ``[heads, width]``."""
    kernel, bias = as_pair(layer)
    check_array(function, argument, kernel, (x.dtype.name,), cast="convert it to the dtype of x")
    if kernel.ndim != 3 or kernel.shape[0] != x.shape[-1]:
        raise ValueError(
            f"{function}: {argument} must be a kernel [{x.shape[-1]}, heads, width], or a pair of it and a bias, "
            f"got {describe(kernel)}; reshape it"
        )
    shape = kernel.shape[1:]
    bias = as_bias(function, argument, bias, shape, x)
    kernel = jnp.asarray(kernel).reshape(kernel.shape[0], shape[0] * shape[1])
    return _Projection(Dense(kernel, None if bias is None else bias.reshape(-1), (0, 1)), shape)


def _as_output(function: str, layer: Any, x: Array) -> _Projection:
    """Require a kernel ``[heads, width, outputs]``, or a pair of it and a bias ``[outputs]``."""
    kernel, bias = as_pair(layer)
    check_array(function, "out", kernel, (x.dtype.name,), cast="convert it to the dtype of x")
    if kernel.ndim != 3:
        raise ValueError(
            f"{function}: out must be a kernel [heads, width, outputs], or a pair of it and a bias, "
            f"got {describe(kernel)}; reshape it"
        )
    bias = as_bias(function, "out", bias, kernel.shape[2:], x)
    return _Projection(
        Dense(jnp.asarray(kernel).reshape(kernel.shape[0] * kernel.shape[1], kernel.shape[2]), bias, (0, 1)),
        kernel.shape[:2],
    )


def _check_heads(
    function: str, query: tuple[int, ...], keys: tuple[int, ...], values: tuple[int, ...], out: tuple[int, ...]
) -> None:
    """Require numbers of heads, and widths, that fit."""
    if values[0] != keys[0] or query[1] != keys[1] or query[0] % keys[0]:
        raise ValueError(
            f"{function}: keys must have the heads of values and the width of query, and divide its heads, "
            f"got (heads, width) {query} of query, {keys} of keys and {values} of values; reshape the kernels"
        )
    if out != (query[0], values[1]):
        raise ValueError(f"{function}: out must have {query[0]} heads of width {values[1]}, got {out}; reshape it")
