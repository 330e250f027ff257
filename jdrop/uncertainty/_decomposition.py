"""Uncertainty of predictions, split into that of the data and that of the network."""

import jax.numpy as jnp
from jax import Array, lax

from jdrop._axes import as_axis
from jdrop._checks import check_array
from jdrop._errors import describe
from jdrop._types import REAL, real_dtype


def predictive_entropy(log_probs: Array, *, sample_axis: int = 0) -> Array:
    """Return the entropy of the mean prediction, in nats: the total uncertainty.

    ``H[p]`` with ``p[c] = mean_i(exp(log_probs[i, c]))``. Values and gradients are finite at probabilities of exactly 0
    (``log_probs`` of ``-inf``), where ``p log p`` is 0.

    Args:
      log_probs: log probabilities ``[samples, ..., classes]``, such as ``jax.nn.log_softmax`` of logits.
      sample_axis: the axis of samples; classes are on the last of the other axes.

    Returns:
      Entropies ``[...]``, from 0 to ``log(classes)``, in float32 or the dtype of ``log_probs`` if that is wider.

    Raises:
      ValueError: ``sample_axis`` is out of range, or there are fewer than two axes.
      TypeError: ``log_probs`` is not a real floating array, or ``sample_axis`` is not an int.

    References:
      Gal, Islam, Ghahramani (2017), Deep Bayesian Active Learning with Image Data, ICML.

    Example:
      >>> import jax.numpy as jnp, jdrop
      >>> log_probs = jnp.log(jnp.array([[1.0, 0.0], [0.0, 1.0]]))  # two samples that disagree
      >>> round(float(jdrop.uncertainty.predictive_entropy(log_probs)), 4)  # log(2)
      0.6931
    """
    log_probs = _samples_first("predictive_entropy", log_probs, sample_axis)
    return _entropy(_log_mean(log_probs))


def expected_entropy(log_probs: Array, *, sample_axis: int = 0) -> Array:
    """Return the mean entropy of the samples, in nats: the uncertainty of the data (aleatoric).

    ``mean_i(H[p_i])`` with ``p_i = exp(log_probs[i])``. Values and gradients are finite at probabilities of exactly 0.

    Args:
      log_probs: as in :func:`predictive_entropy`.
      sample_axis: as in :func:`predictive_entropy`.

    Returns:
      Entropies ``[...]``, as from :func:`predictive_entropy`.

    Raises:
      ValueError: as in :func:`predictive_entropy`.
      TypeError: as in :func:`predictive_entropy`.

    References:
      Houlsby, Huszar, Ghahramani, Lengyel (2011), Bayesian Active Learning for Classification and Preference Learning,
      arXiv:1112.5745.

    Example:
      >>> import jax.numpy as jnp, jdrop
      >>> log_probs = jnp.log(jnp.array([[1.0, 0.0], [0.0, 1.0]]))  # each sample is certain
      >>> float(jdrop.uncertainty.expected_entropy(log_probs))
      0.0
    """
    return _entropy(_samples_first("expected_entropy", log_probs, sample_axis)).mean(0)


def mutual_information(log_probs: Array, *, sample_axis: int = 0) -> Array:
    """Return what the samples disagree about, in nats: the uncertainty of the network (epistemic; BALD).

    ``mean_i(KL[p_i || mean_j(p_j)])``, which is :func:`predictive_entropy` minus :func:`expected_entropy`, but keeps
    the digits that this difference cancels. Values and gradients are finite at probabilities of exactly 0.

    Args:
      log_probs: as in :func:`predictive_entropy`.
      sample_axis: as in :func:`predictive_entropy`.

    Returns:
      Mutual information ``[...]``, from 0 to ``log(samples)`` and ``log(classes)``, in float32 or the dtype of
      ``log_probs`` if that is wider.

    Raises:
      ValueError: as in :func:`predictive_entropy`.
      TypeError: as in :func:`predictive_entropy`.

    References:
      Houlsby, Huszar, Ghahramani, Lengyel (2011), Bayesian Active Learning for Classification and Preference Learning,
      arXiv:1112.5745.

    Example:
      >>> import jax.numpy as jnp, jdrop
      >>> log_probs = jnp.log(jnp.array([[1.0, 0.0], [0.0, 1.0]]))
      >>> round(float(jdrop.uncertainty.mutual_information(log_probs)), 4)
      0.6931
    """
    log_probs = _samples_first("mutual_information", log_probs, sample_axis)
    positive = log_probs > -jnp.inf
    mean, log_mean = (x[None] for x in _without_zeros(_log_mean(log_probs)))
    ratio = jnp.where(positive, log_probs - log_mean, 0)
    # KL[p || q] = sum_c(p log(p / q) - p + q): no term is negative, so small ones do not cancel. With r = log(p / q):
    terms = mean * jnp.where(positive, ratio * jnp.exp(ratio) - jnp.expm1(ratio), 1)
    return jnp.maximum(terms.sum(-1).mean(0), 0)


def _samples_first(function: str, log_probs: Array, sample_axis: int) -> Array:
    """Check log probabilities, and return them as [samples, ..., classes] in at least float32."""
    check_array(function, "log_probs", log_probs, REAL, cast="pass the log_softmax of logits")
    axis = as_axis(function, "sample_axis", sample_axis, log_probs.ndim)
    if log_probs.ndim < 2:
        raise ValueError(
            f"{function}: log_probs must have an axis of samples and one of classes, got {describe(log_probs)}; "
            "pass [samples, ..., classes]"
        )
    return jnp.moveaxis(log_probs.astype(real_dtype(log_probs)), axis, 0)


def _without_zeros(log_p: Array) -> tuple[Array, Array]:
    """Return probabilities and their logarithms, with the logarithm of 0 replaced by 0, and gradients of 0 there."""
    positive = log_p > -jnp.inf
    log_p = jnp.where(positive, log_p, 0)
    return jnp.where(positive, jnp.exp(log_p), 0), log_p


def _entropy(log_p: Array) -> Array:
    p, log_p = _without_zeros(log_p)
    return -(p * log_p).sum(-1)


def _log_mean(log_p: Array) -> Array:
    """Return the logarithm of the mean over samples of probabilities; gradients are finite where all are 0."""
    largest = lax.stop_gradient(jnp.maximum(log_p.max(0), jnp.finfo(log_p.dtype).min))
    positive = log_p > -jnp.inf
    scaled = jnp.exp(jnp.where(positive, log_p, largest[None]) - largest[None])
    mean = jnp.where(positive, scaled, 0).mean(0)
    some = mean > 0
    return jnp.where(some, jnp.log(jnp.where(some, mean, 1)) + largest, -jnp.inf)


def variance_split(means: Array, variances: Array, *, sample_axis: int = 0) -> tuple[Array, Array]:
    """Split the variance of a mixture of predictions into that of the data and that of the network.

    ``aleatoric = mean_i(variances[i])`` and ``epistemic = var_i(means[i])``, divided by the number of samples. Their
    sum is the variance of the mixture, by the law of total variance.

    Args:
      means: predicted means ``[samples, ...]``, one per sampled network.
      variances: predicted variances of the data, of the same shape.
      sample_axis: the axis of samples.

    Returns:
      ``(aleatoric, epistemic)``, each ``[...]``, in float32 or the dtype of the arguments if that is wider.

    Raises:
      ValueError: ``sample_axis`` is out of range, or the shapes differ.
      TypeError: an argument is not a real floating array, or ``sample_axis`` is not an int.

    References:
      Kendall, Gal (2017), What Uncertainties Do We Need in Bayesian Deep Learning for Computer Vision?, NeurIPS.

    Example:
      >>> import jax.numpy as jnp, jdrop
      >>> means, variances = jnp.array([1.0, 3.0]), jnp.array([0.5, 0.7])
      >>> aleatoric, epistemic = jdrop.uncertainty.variance_split(means, variances)
      >>> round(float(aleatoric), 4), float(epistemic)
      (0.6, 1.0)
    """
    function, cast = "variance_split", "convert it to float32"
    check_array(function, "means", means, REAL, cast=cast)
    check_array(function, "variances", variances, REAL, cast=cast)
    if means.shape != variances.shape:
        raise ValueError(
            f"{function}: variances must have the shape of means, {means.shape}, got {describe(variances)}; "
            "predict both for each sample"
        )
    axis = as_axis(function, "sample_axis", sample_axis, means.ndim)
    means, variances = (x.astype(real_dtype(x)) for x in (means, variances))
    return variances.mean(axis), means.var(axis)
