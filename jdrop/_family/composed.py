"""Dropout fused with neighboring operations: bias and residual, or the average of a head over several masks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jdrop._checks import as_count, check_array, check_broadcastable, check_function, expand_rank, is_array
from jdrop._errors import describe
from jdrop._mask import Mask
from jdrop._ops import SCALE
from jdrop._prepare import check_arguments, prepare, require_key
from jdrop._primitive import masked_op
from jdrop._random.key_words import mark_used
from jdrop._sharding import check_sharded_as
from jdrop._types import INEXACT, Generator, RateLike, Shard, real_dtype
from jdrop.keys import derive


def bias_dropout_add(
    key: Array | None,
    x: Array,
    rate: RateLike,
    bias: Array | None,
    residual: Array,
    *,
    train: bool,
    generator: Generator = "fast",
    shard: Shard = None,
) -> Array:
    """Add a bias, apply dropout, and add the residual in one fusion.

    ``y[i] = residual[i] + (x[i] + bias) * m[i] / (1 - rate)`` with ``m[i] ~ Bernoulli(1 - rate)``. This is the end of
    each branch of a transformer.

    Args:
      key: one PRNG key, used once; may be ``None`` if ``train`` is false or ``rate`` is a Python or NumPy 0.
      x: floating or complex array of any shape, such as ``[batch, time, feature]``: a matrix product before its bias is
        added. Floats of 8 and 16 bits are added and scaled in float32 and rounded once.
      rate: drop rate, or an array of rates that broadcasts to x, as in :func:`jdrop.dropout`.
      bias: array with the dtype of x that broadcasts to x, such as ``[feature]``; or ``None``.
      residual: array with the shape and dtype of x.
      train: ``True`` draws a mask; ``False`` only adds.
      generator: as in :func:`jdrop.dropout`.
      shard: as in :func:`jdrop.dropout`; the PartitionSpec of x.

    Returns:
      An array with the shape and dtype of x, exactly equal to ``residual`` where x is dropped.

    Raises:
      ValueError: a rate or an option is out of range, or a shape or a dtype does not match.
      TypeError: an argument has the wrong type, ``key`` is missing, or ``train`` is traced.

    References:
      Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin (2017), Attention Is All You Need, NeurIPS,
      section 5.4.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> x, bias, residual = jnp.ones([2, 8]), jnp.ones([8]), jnp.zeros([2, 8])
      >>> y = jdrop.bias_dropout_add(jax.random.key(0), x, 0.5, bias, residual, train=True)
      >>> sorted(set(y.ravel().tolist()))
      [0.0, 4.0]
    """
    name = "bias_dropout_add"
    check_array(name, "x", x)
    check_array(name, "residual", residual)
    x, residual = jnp.asarray(x), jnp.asarray(residual)
    if (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"{name}: residual must be {describe(x)}, like x, got {describe(residual)}; pass the input of the branch"
        )
    check_sharded_as(name, "residual", residual, x)
    if bias is not None:
        check_array(name, "bias", bias)
        check_broadcastable(name, "bias", bias, x.shape)
        bias = jnp.asarray(bias)
        if bias.dtype != x.dtype:
            raise ValueError(f"{name}: bias must have the dtype of x, {x.dtype}, got {bias.dtype}; cast it")
        check_sharded_as(name, "bias", bias, x)
    arguments = check_arguments(
        name, key, (x, residual), rate, shape=x.shape, train=train, generator=generator, shard=shard
    )
    return _bias_dropout_add(x, bias, residual, None if arguments.is_identity else arguments.draw())


@jax.jit
def _bias_dropout_add(x: Array, bias: Array | None, residual: Array, mask: Mask | None) -> Array:
    """Compute everything in one compiled call: in float32, rounded once, with equal results eagerly and under jit."""
    wide = x.dtype if jnp.iscomplexobj(x) else real_dtype(x)
    y = x.astype(wide)
    if bias is not None:
        y = y + expand_rank(bias, x.ndim).astype(wide)
    if mask is not None:
        y = masked_op(SCALE, mask, y)
    return (residual.astype(wide) + y).astype(x.dtype)


def multi_sample_dropout(
    key: Array | None,
    x: Array,
    rate: RateLike,
    head: Callable[[Array], Any],
    num_samples: int,
    *,
    train: bool,
    generator: Generator = "fast",
    shard: Shard = None,
) -> Any:
    """Average the output of a head over several masks of its input.

    ``y = mean over s of head(x * m_s / (1 - rate))`` with ``m_s[i] ~ Bernoulli(1 - rate)``. If ``head`` returns a loss,
    the result is the mean loss of Inoue (2019); if it returns logits, the mean logits.

    Args:
      key: one PRNG key, used once; may be ``None`` if ``train`` is false or ``rate`` is a Python or NumPy 0. One key
        per sample is derived from it.
      x: floating or complex array of any shape.
      rate: drop rate, or an array of rates that broadcasts to x, as in :func:`jdrop.dropout`.
      head: function to average, ``x -> pytree of floating or complex arrays``. ``jax.vmap`` maps it over the samples.
      num_samples: number of masks.
      train: ``True`` draws masks; ``False`` returns ``head(x)``.
      generator: as in :func:`jdrop.dropout`.
      shard: as in :func:`jdrop.dropout`; the PartitionSpec of x.

    Returns:
      A pytree like the output of ``head``.

    Raises:
      ValueError: a rate, an option, or ``num_samples`` is out of range, or ``key`` is a batch of keys.
      TypeError: an argument has the wrong type, ``head`` returns other leaves, ``key`` is missing, or ``train`` is
        traced.

    References:
      Inoue (2019), Multi-Sample Dropout for Accelerated Training and Better Generalization, arXiv:1905.09788.

    Limits:
      ``head`` runs inside ``jax.vmap``, so it must be a pure function. Layers that change their state or take keys from
      it, such as BatchNorm or Dropout of Flax nnx, and BatchNorm of Flax linen or Haiku, raise there, and so may the
      ``init`` of a layer. For these call the head in a Python loop over samples, each on :func:`jdrop.dropout` with its
      own key, and take the mean.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> w = jnp.ones([16, 2])
      >>> y = jdrop.multi_sample_dropout(jax.random.key(0), jnp.ones([4, 16]), 0.5, lambda h: h @ w, 8, train=True)
      >>> y.shape
      (4, 2)
    """
    name = "multi_sample_dropout"
    check_array(name, "x", x)
    check_function(name, "head", head, "pass the head")
    number = as_count(name, "num_samples", num_samples)
    arguments = check_arguments(name, key, x, rate, train=train, generator=generator, shard=shard)
    if arguments.is_identity:
        return _with_mean(name, head(x))
    base_key = mark_used(require_key(name, key))

    def sample(index: Array) -> Any:
        sample_key = derive(base_key, name, index)
        mask = prepare(name, sample_key, x, rate, train=train, generator=generator, shard=shard)
        return _with_mean(name, head(x if mask is None else masked_op(SCALE, mask, x)))

    outputs = jax.vmap(sample)(jnp.arange(number, dtype=jnp.uint32))
    return jax.tree.map(lambda y: jnp.mean(y, axis=0), outputs)


def _with_mean(function: str, outputs: Any) -> Any:
    """Require outputs whose dtype a mean preserves."""
    for y in jax.tree.leaves(outputs):
        if not is_array(y) or y.dtype.name not in INEXACT:
            raise TypeError(
                f"{function}: head must return floating point arrays, got {describe(y)}; "
                "return only outputs that have a mean"
            )
    return outputs
