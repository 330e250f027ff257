"""Concrete dropout: a smooth mask, whose rate has a gradient."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jdrop._axes import as_axes, as_axis
from jdrop._checks import as_count, as_positive, check_array
from jdrop._prepare import shared_shape
from jdrop._primitive import masked_op
from jdrop._types import FLOATS, REAL, Shard, real_dtype
from jdrop.learned._parts import ADD_LOGISTIC, as_parameter, draw_noise


def concrete_dropout(
    key: Array | None,
    x: Array,
    logit: float | Array,
    *,
    train: bool,
    temperature: float = 0.1,
    shared_axes: int | Sequence[int] = (),
    shard: Shard = None,
) -> Array:
    """Drop elements smoothly, at a rate that gradients can learn: ``rate = sigmoid(logit)``.

    ``y[i] = x[i] * (1 - z[i]) / (1 - rate)``, where ``z[i] = sigmoid((logit - log(u[i] / (1 - u[i]))) / temperature)``
    and ``u[i] ~ U(0, 1)``. As the temperature goes to 0, this becomes :func:`jdrop.dropout` with the same mask. Add
    :func:`concrete_regularizer` to the loss, or the rate goes to 0. The backward pass recomputes the noise, and keeps
    only x, the logit, and the key.

    Args:
      key: one PRNG key, used once; may be ``None`` if ``train`` is false.
      x: real floating array of any shape.
      logit: ``log(rate / (1 - rate))``, finite; a trainable number or array that broadcasts to the decisions. -2.2 is
        a rate of 0.1.
      train: ``True`` draws noise; ``False`` returns x itself.
      temperature: a Python number above 0. Smaller values drop more sharply, with larger gradients.
      shared_axes: axes along which elements share one decision.
      shard: as in :func:`jdrop.dropout`.

    Returns:
      An array with the shape and dtype of x.

    Raises:
      ValueError: ``temperature`` or an axis is out of range, or ``logit`` is an infinite number, or an array that does
        not broadcast to the decisions.
      TypeError: an argument has the wrong type, ``key`` is missing, or ``train`` is traced.

    References:
      Gal, Hron, Kendall (2017), Concrete Dropout, NeurIPS.

    Limits:
      The mean of ``1 - z`` is not exactly ``1 - rate``: at temperature 0.1, it differs by less than 0.002.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> def loss(logit):
      ...     y = jdrop.learned.concrete_dropout(jax.random.key(0), jnp.ones([1000]), logit, train=True)
      ...     return (y**2).mean()
      >>> bool(jax.grad(loss)(0.0) > 0)  # a higher rate has more variance
      True
    """
    name = "concrete_dropout"
    check_array(name, "x", x, REAL)
    temperature = as_positive(name, "temperature", temperature)
    of_mask = shared_shape(as_axes(name, "shared_axes", shared_axes, x.ndim))
    logit = as_parameter(name, "logit", logit, of_mask(x.shape))
    mask = draw_noise(name, key, x, train=train, shared_axes=shared_axes, shard=shard)
    if mask is None:
        return x
    x = jnp.asarray(x)
    dtype = real_dtype(x)

    @jax.checkpoint
    def drop(x: Array, logit: Array) -> Array:
        logit = logit.astype(dtype)
        noisy = masked_op(ADD_LOGISTIC, mask, jnp.broadcast_to(-logit, of_mask(x.shape)))
        log_factor = jax.nn.log_sigmoid(noisy / temperature) - jax.nn.log_sigmoid(-logit)
        return (x.astype(dtype) * jnp.exp(log_factor)).astype(x.dtype)

    return drop(x, logit)


def concrete_regularizer(
    logit: float | Array,
    kernel: Array,
    *,
    num_examples: int,
    length_scale: float,
    precision: float = 1.0,
    feature_axis: int = -2,
) -> Array:
    """Return what :func:`concrete_dropout` before a layer adds to a mean loss: a scalar.

    ``(length_scale^2 * sum(kernel^2 / (1 - rate)) / 2 - sum(H(rate))) / (num_examples * precision)``, where ``H(rate)``
    is the entropy of a decision in nats and the second sum is over the dropped features. It is the divergence from the
    prior, which pulls rates to 0.5, against the weights. Set it like this:

    ============================================================ ====================================================
    mean loss                                                    ``precision``
    ============================================================ ====================================================
    classification: cross-entropy                                1
    regression: ``(y - mean)^2 / (2 var) + log(var) / 2``        1, with ``var`` predicted or learned
    regression: ``(y - mean)^2``                                 ``tau / 2``, for noise of variance ``1 / tau``
    ============================================================ ====================================================

    ``num_examples`` is the number of training examples, not the size of a batch. ``length_scale`` is the prior length
    scale: the larger, the smaller weights are. Choose it by validation; the authors' code has ``1e-4``.

    Args:
      logit: as in :func:`concrete_dropout`: a scalar, or one per feature, ``[features]``.
      kernel: weights of the layer that takes the dropped features, such as ``[features, outputs]`` or
        ``[height, width, features, outputs]``.
      num_examples: number of training examples, at least 1.
      length_scale: prior length scale, above 0.
      precision: see above; above 0.
      feature_axis: the axis of the kernel along which features are dropped.

    Returns:
      A scalar, in float32 or the dtype of the kernel if that is wider. It may be negative.

    Raises:
      ValueError: a number or the axis is out of range, or ``logit`` is neither a scalar nor one per feature.
      TypeError: an argument has the wrong type.

    References:
      Gal, Hron, Kendall (2017), Concrete Dropout, NeurIPS, equations 3 and 4.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> options = {"num_examples": 100, "length_scale": 0.1}
      >>> gradient = jax.grad(jdrop.learned.concrete_regularizer)(-2.0, jnp.ones([8, 4]), **options)
      >>> bool(gradient < 0)  # its descent raises the rate
      True
    """
    name = "concrete_regularizer"
    check_array(name, "kernel", kernel, FLOATS, cast="convert it to float32")
    num_examples = as_count(name, "num_examples", num_examples)
    length_scale = as_positive(name, "length_scale", length_scale)
    precision = as_positive(name, "precision", precision)
    kernel = jnp.asarray(kernel)
    axis, dtype = as_axis(name, "feature_axis", feature_axis, kernel.ndim), real_dtype(kernel)
    features = kernel.shape[axis]
    logit = as_parameter(name, "logit", logit, (features,)).astype(dtype)
    log_rate, log_keep = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
    entropies = -(jnp.exp(log_rate) * log_rate + jnp.exp(log_keep) * log_keep)
    squares = (kernel.astype(dtype) ** 2).sum([i for i in range(kernel.ndim) if i != axis])
    weights = length_scale**2 / 2 * (squares * jnp.exp(-log_keep)).sum()
    return (weights - jnp.broadcast_to(entropies, features).sum()) / (num_examples * precision)
