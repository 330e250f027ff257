"""Losses between two outputs of one network on the same data, under two dropout masks."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from jdrop._checks import as_positive, check_array
from jdrop._errors import describe
from jdrop._sharding import explicit_sharding
from jdrop._types import FLOATS, real_dtype

__all__ = ["r_drop_loss", "simcse_loss"]


def r_drop_loss(logits_a: Array, logits_b: Array) -> Array:
    """Return how much two predictions differ, in nats: the mean of both Kullback-Leibler divergences (R-Drop).

    ``(KL[p_a || p_b] + KL[p_b || p_a]) / 2 = sum_c((p_a - p_b) * (log p_a - log p_b)) / 2``. The paper minimizes the
    sum of both cross-entropies plus ``alpha`` times this loss, with ``alpha`` from 0.1 to 5 by task. Logits of
    ``-inf`` in both predictions, such as masked classes, count as equal.

    Args:
      logits_a: logits ``[..., classes]`` under one mask: real floating.
      logits_b: logits of the same shape and dtype under another mask, from another key.

    Returns:
      Losses ``[...]``, in float32 or the dtype of the logits if that is wider.

    Raises:
      ValueError: the shapes or dtypes differ, or there is no axis of classes.
      TypeError: an argument is not a real floating array.

    References:
      Liang, Wu, Li, Wang, Meng, Qin, Chen, Zhang, Liu (2021), R-Drop: Regularized Dropout for Neural Networks, NeurIPS.

    Example:
      >>> import jax.numpy as jnp, jdrop
      >>> a, b = jnp.array([0.0, 0.0]), jnp.array([0.0, 1.0])
      >>> float(jdrop.consistency.r_drop_loss(a, a)), round(float(jdrop.consistency.r_drop_loss(a, b)), 4)
      (0.0, 0.1155)
    """
    _check_pair("r_drop_loss", ("logits_a", "logits_b"), (logits_a, logits_b), "[..., classes]")
    a, b = (x.astype(real_dtype(x)) for x in map(jnp.asarray, (logits_a, logits_b)))
    both_never = jnp.isneginf(a) & jnp.isneginf(b)
    lowest = jnp.finfo(a.dtype).min  # has gradients of 0 even if all classes are masked
    log_a, log_b = (jax.nn.log_softmax(jnp.where(both_never, lowest, x)) for x in (a, b))
    log_a, log_b = (jnp.where(both_never, 0, log_p) for log_p in (log_a, log_b))
    return ((jnp.exp(log_a) - jnp.exp(log_b)) * (log_a - log_b)).sum(-1) / 2


def simcse_loss(a: Array, b: Array, temperature: float | Array = 0.05) -> Array:
    """Return the cross-entropy of finding the twin of each example among all examples of the batch, in nats.

    ``loss[i] = -log(exp(s[i, i]) / sum_j(exp(s[i, j])))`` with ``s[i, j] = cos(a[i], b[j]) / temperature``, where a and
    b are embeddings of one batch under two dropout masks. An embedding of zeros has a cosine of 0 to all others.

    Args:
      a: embeddings ``[batch, feature]`` under one mask: real floating, of any norm.
      b: embeddings of the same shape under another mask, from another key.
      temperature: a number above 0, or a scalar array, which may be traced.

    Returns:
      Losses ``[batch]``, in float32 or the dtype of the embeddings if that is wider. The loss of random embeddings is
      near ``log(batch)``.

    Raises:
      ValueError: the shapes or dtypes differ, the arrays do not have two axes, or ``temperature`` is out of range.
      TypeError: an argument has the wrong type.

    References:
      Gao, Yao, Chen (2021), SimCSE: Simple Contrastive Learning of Sentence Embeddings, EMNLP.

    Limits:
      On a mesh, under ``jax.jit``, examples are compared with those of all devices. Inside ``jax.shard_map``, they are
      compared only with those of their own device.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> x = jax.random.normal(jax.random.key(0), [8, 128])
      >>> drop = lambda i: jdrop.dropout(jdrop.keys.derive(jax.random.key(1), i), x, 0.1, train=True)
      >>> bool((jdrop.consistency.simcse_loss(drop(0), drop(1)) < 0.01).all())
      True
    """
    _check_pair("simcse_loss", ("a", "b"), (a, b), "[batch, feature]", ndim=2)
    if not isinstance(temperature, jax.Array) or temperature.ndim:
        temperature = as_positive("simcse_loss", "temperature", temperature)
    else:
        check_array("simcse_loss", "temperature", temperature, FLOATS, cast="convert it to float32")
    a, b = (_unit(x.astype(real_dtype(x))) for x in map(jnp.asarray, (a, b)))
    sharding = explicit_sharding(jax.typeof(a).sharding)
    if sharding is not None:
        sharding = sharding.update(spec=PartitionSpec(sharding.spec[0], None))
    similarities = jnp.matmul(a, b.T, precision=lax.Precision.HIGHEST, out_sharding=sharding)
    similarities = similarities / jnp.asarray(temperature, a.dtype)
    rows, columns = (lax.broadcasted_iota(jnp.int32, similarities.shape, i, out_sharding=sharding) for i in (0, 1))
    return -jnp.where(rows == columns, jax.nn.log_softmax(similarities), 0).sum(-1)


def _check_pair(
    function: str, names: tuple[str, str], values: tuple[Any, Any], axes: str, *, ndim: int | None = None
) -> None:
    """Require two real arrays of one shape and dtype, with the number of axes, or with at least one."""
    for name, value in zip(names, values):
        check_array(function, name, value, FLOATS, cast="convert it to float32")
    first, second = values
    if first.ndim != (ndim or max(first.ndim, 1)):
        raise ValueError(f"{function}: {names[0]} must have axes {axes}, got {describe(first)}; reshape it")
    if first.shape != second.shape or first.dtype != second.dtype:
        raise ValueError(
            f"{function}: {names[1]} must have the shape and dtype of {names[0]}, {describe(first)}, "
            f"got {describe(second)}; pass two outputs of one network on the same data"
        )


def _unit(x: Array) -> Array:
    """Return x divided by its norm over the last axis; zeros, with gradients of 0, where the norm is 0."""
    largest = lax.stop_gradient(abs(x).max(-1, keepdims=True, initial=0))
    x = x / jnp.where(largest == 0, 1, largest)  # otherwise, squares overflow
    square = (x**2).sum(-1, keepdims=True)
    return jnp.where(square == 0, 0, x * lax.rsqrt(jnp.where(square == 0, 1, square)))
