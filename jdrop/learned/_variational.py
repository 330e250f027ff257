"""Variational dropout: Gaussian noise on weights, whose variance has a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop._checks import as_bool, as_number, check_array
from jdrop._errors import describe
from jdrop._prepare import check_arguments
from jdrop._primitive import masked_op
from jdrop._types import FLOATS, Shard, real_dtype
from jdrop.learned._parts import ADD_NORMAL, as_parameter

_TINY = 1e-30  # the square root has a finite gradient there


def variational_dense(
    key: Array | None,
    x: Array,
    kernel: Array,
    log_alpha: Array,
    *,
    train: bool,
    threshold: float = 3.0,
    shard: Shard = None,
) -> Array:
    """Multiply by a kernel whose weights have Gaussian noise of learned variance (variational dropout).

    Each weight is ``kernel * (1 + sqrt(alpha) * z)`` with ``alpha = exp(log_alpha)`` and ``z ~ N(0, 1)``, drawn anew
    for each example. The outputs are drawn instead of the weights (local reparametrization), which has less variance:
    ``y = x @ kernel + sqrt(x^2 @ (alpha * kernel^2)) * z``. Gaussian dropout at ``rate`` has
    ``alpha = rate / (1 - rate)``. Add :func:`variational_kl` to the loss.

    Args:
      key: one PRNG key, used once; may be ``None`` if ``train`` is false.
      x: inputs ``[..., features]``, real floating.
      kernel: means of the weights, ``[features, outputs]``, of the dtype of x.
      log_alpha: logarithms of the relative variances; broadcasts to the kernel. Train
        ``log_alpha = log_sigma2 - log(kernel^2 + 1e-8)`` with ``log_sigma2`` as the parameter, started near -10: its
        gradients have less noise (Molchanov et al., section 4.1). Decay the learning rate to 0, or steps of the
        optimizer keep superfluous weights from 0.
      train: ``True`` draws noise; ``False`` uses the weights that :func:`variational_keep` keeps, without noise.
      threshold: as in :func:`variational_keep`.
      shard: as in :func:`jdrop.dropout`, for the outputs.

    Returns:
      Outputs ``[..., outputs]`` with the dtype of x.

    Raises:
      ValueError: shapes do not fit, or ``threshold`` is not finite.
      TypeError: an argument has the wrong type, ``key`` is missing, or ``train`` is traced.

    References:
      Kingma, Salimans, Welling (2015), Variational Dropout and the Local Reparameterization Trick, NeurIPS.
      Molchanov, Ashukha, Vetrov (2017), Variational Dropout Sparsifies Deep Neural Networks, ICML.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> kernel, log_alpha = jnp.ones([3, 2]), jnp.array([[-8.0], [-8.0], [5.0]])
      >>> jdrop.learned.variational_dense(None, jnp.ones([1, 3]), kernel, log_alpha, train=False)
      Array([[2., 2.]], dtype=float32)
    """
    name = "variational_dense"
    check_array(name, "x", x, FLOATS)
    check_array(name, "kernel", kernel, FLOATS, cast="convert it to the dtype of x")
    if not x.ndim or kernel.ndim != 2 or kernel.shape[0] != x.shape[-1] or kernel.dtype != x.dtype:
        raise ValueError(
            f"{name}: kernel must be [features, outputs] with the features and the dtype of x, {describe(x)}, "
            f"got {describe(kernel)}; reshape or convert it"
        )
    log_alpha = as_parameter(name, "log_alpha", log_alpha, kernel.shape)
    keep = variational_keep(log_alpha, threshold)
    if not as_bool(name, "train", train):
        return x @ jnp.where(keep, kernel, 0)
    dtype = real_dtype(x)
    mean = x @ kernel
    weight_variance = jnp.exp(log_alpha.astype(dtype)) * kernel.astype(dtype) ** 2
    variance = x.astype(dtype) ** 2 @ weight_variance
    mask = check_arguments(name, key, mean, 0.5, train=train, shard=shard).draw()

    @jax.checkpoint
    def add_noise(mean: Array, variance: Array) -> Array:
        noise = masked_op(ADD_NORMAL, mask, jnp.zeros_like(variance))
        return (mean.astype(dtype) + jnp.sqrt(jnp.maximum(variance, _TINY)) * noise).astype(x.dtype)

    return add_noise(mean, variance)


def variational_kl(log_alpha: Array) -> Array:
    """Return the divergence of weights with variational dropout from the log-uniform prior, in nats: a scalar.

    The sum over weights of ``0.5 log(1 + 1 / alpha) + 0.63576 (1 - sigmoid(1.87320 + 1.48695 log_alpha))``, an
    approximation of the exact integral. It is 0 where ``alpha`` is infinite. Divide it by the number of training
    examples before you add it to a mean loss, and raise its weight from 0 to 1 in the first epochs.

    Args:
      log_alpha: one per weight, as in :func:`variational_dense`. Broadcast it to the kernel first if it has fewer.

    Returns:
      A scalar of at least 0, in float32 or the dtype of ``log_alpha`` if that is wider.

    Raises:
      TypeError: ``log_alpha`` is not a real floating array.

    References:
      Molchanov, Ashukha, Vetrov (2017), Variational Dropout Sparsifies Deep Neural Networks, ICML, equation 14.

    Limits:
      The approximation differs from the exact divergence by less than 0.01 per weight.

    Example:
      >>> import jax.numpy as jnp, jdrop
      >>> [round(float(jdrop.learned.variational_kl(jnp.full(2, x))), 3) for x in (0.0, 99.0)]
      [0.862, 0.0]
    """
    check_array("variational_kl", "log_alpha", log_alpha, FLOATS, cast="convert it to float32")
    log_alpha = log_alpha.astype(real_dtype(log_alpha))
    return (jax.nn.softplus(-log_alpha) / 2 + 0.63576 * jax.nn.sigmoid(-1.87320 - 1.48695 * log_alpha)).sum()


def variational_keep(log_alpha: Array, threshold: float = 3.0) -> Array:
    """Return which weights are kept: ``log_alpha < threshold``. The noise of the others drowns them.

    Args:
      log_alpha: as in :func:`variational_dense`.
      threshold: a finite Python number; 3 drops weights whose equivalent drop rate exceeds 0.95.

    Returns:
      A bool array with the shape of ``log_alpha``.

    Raises:
      ValueError: ``threshold`` is not finite.
      TypeError: ``log_alpha`` is not a real floating array, or ``threshold`` is not a number.

    References:
      Molchanov, Ashukha, Vetrov (2017), Variational Dropout Sparsifies Deep Neural Networks, ICML, section 5.

    Example:
      >>> import jax.numpy as jnp, jdrop
      >>> jdrop.learned.variational_keep(jnp.array([-8.0, 5.0])).tolist()
      [True, False]
    """
    check_array("variational_keep", "log_alpha", log_alpha, FLOATS, cast="convert it to float32")
    return log_alpha < as_number("variational_keep", "threshold", threshold, -np.inf, np.inf)
