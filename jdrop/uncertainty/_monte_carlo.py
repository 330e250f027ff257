"""Samples of a network, one per key, and their mean and variance."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jdrop._checks import as_count, check_key
from jdrop._errors import describe
from jdrop._types import real_dtype
from jdrop.keys import per_example


def mc_samples(fn: Callable[..., Any], key: Array, num_samples: int, *args: Any, chunk_size: int | None = None) -> Any:
    """Stack samples of a network: ``fn(key_i, *args)`` with ``key_i = jdrop.keys.derive(key, i)``.

    Sample ``i`` does not depend on the number of samples, nor on ``chunk_size``.

    Args:
      fn: function ``(key, *args) -> outputs``, such as a network that drops with ``train=True``. Outputs are a pytree
        of arrays.
      key: one PRNG key, used once.
      num_samples: number of samples, at least 1.
      *args: passed to each call, the same for all samples.
      chunk_size: number of samples that are computed at once, by ``jax.vmap``. Chunks follow each other in a loop,
        which bounds the memory of ``fn``. ``None`` computes all at once.

    Returns:
      The outputs, with a new first axis of ``num_samples``.

    Raises:
      TypeError: ``fn`` is not callable, ``key`` is not a key, or a number is not an int.
      ValueError: ``key`` is a batch of keys, or a number is less than 1.

    References:
      Gal, Ghahramani (2016), Dropout as a Bayesian Approximation, ICML.

    Limits:
      Under ``jax.vmap``, ``jax.random`` and ``generator="jax"`` draw other bits from ``rbg`` keys. With them, samples
      depend on ``chunk_size``.

      Outside of ``jax.jit``, every call with chunks compiles ``fn`` again.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> def network(key, w, x):
      ...     return jdrop.dropout(key, x, 0.5, train=True, shared_axes=0) @ w
      >>> w, x = jnp.ones([8, 2]), jnp.ones([5, 8])
      >>> y = jdrop.uncertainty.mc_samples(network, jax.random.key(0), 20, w, x)
      >>> y.shape, bool((y[:, 0] == y[:, 1]).all())
      ((20, 5, 2), True)
    """
    keys, chunk = _sample_keys("mc_samples", fn, key, num_samples, chunk_size)

    def sample(key: Array) -> Any:
        return fn(key, *args)

    return jax.vmap(sample)(keys) if chunk == num_samples else lax.map(sample, keys, batch_size=chunk)


def mc_moments(
    fn: Callable[..., Any], key: Array, num_samples: int, *args: Any, chunk_size: int | None = None
) -> tuple[Any, Any]:
    """Return mean and variance over the samples of :func:`mc_samples`, without holding them all.

    ``mean = sum(y_i) / n`` and ``variance = sum(abs(y_i - mean)^2) / n``, as ``jnp.mean`` and ``jnp.var`` return them.
    Chunks are merged by the update of Chan, Golub and LeVeque, which keeps digits that ``E[y^2] - E[y]^2`` cancels.

    Args:
      fn: as in :func:`mc_samples`.
      key: one PRNG key, used once.
      num_samples: number of samples ``n``, at least 1. For an unbiased variance, multiply by ``n / (n - 1)``.
      *args: as in :func:`mc_samples`.
      chunk_size: number of samples that are held at once, whatever ``num_samples`` is. ``None`` holds all.

    Returns:
      ``(mean, variance)``, each with the structure and the shapes of the outputs of ``fn``, in float32 or the dtype of
      the outputs if that is wider; of integers, in the default dtype of floats. Variances are real.

    Raises:
      TypeError: as in :func:`mc_samples`.
      ValueError: as in :func:`mc_samples`.

    References:
      Gal, Ghahramani (2016), Dropout as a Bayesian Approximation, ICML.
      Chan, Golub, LeVeque (1983), Algorithms for Computing the Sample Variance, The American Statistician.

    Limits:
      As for :func:`mc_samples`.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> drop = lambda key, x: jdrop.dropout(key, x, 0.5, train=True)
      >>> mean, variance = jdrop.uncertainty.mc_moments(drop, jax.random.key(0), 4000, jnp.ones(3), chunk_size=100)
      >>> bool((abs(mean - 1) < 0.1).all() and (abs(variance - 1) < 0.1).all())
      True
    """
    keys, chunk = _sample_keys("mc_moments", fn, key, num_samples, chunk_size)
    num_samples = keys.shape[0]

    def of_chunk(keys: Array) -> _Moments:
        outputs = jax.vmap(lambda key: fn(key, *args))(keys)
        outputs = jax.tree.map(_widened, outputs)
        mean = jax.tree.map(lambda y: y.mean(0), outputs)
        squares = jax.tree.map(lambda y, m: _square(y - m[None]).sum(0), outputs, mean)
        return _Moments(jnp.int32(keys.shape[0]), mean, squares)

    if chunk < num_samples:
        of_chunk = jax.jit(of_chunk)  # traced once for all chunks

    def merge(total: _Moments, keys: Array) -> tuple[_Moments, None]:
        return _merged(total, of_chunk(keys)), None

    num_chunks = num_samples // chunk
    total = of_chunk(keys[:chunk])
    if num_chunks > 1:
        whole = keys[chunk : num_chunks * chunk]
        total, _ = lax.scan(merge, total, whole.reshape(num_chunks - 1, chunk, *whole.shape[1:]))
    if num_samples % chunk:
        total, _ = merge(total, keys[num_chunks * chunk :])
    return total.mean, jax.tree.map(lambda squares: squares / num_samples, total.squares)


class _Moments(NamedTuple):
    """The number of samples, their mean, and the sum of squared differences from it."""

    number: Array
    mean: Any
    squares: Any


def _merged(a: _Moments, b: _Moments) -> _Moments:
    number = a.number + b.number

    def share(d: Array) -> Array:
        return b.number.astype(d.real.dtype) / number.astype(d.real.dtype)

    difference = jax.tree.map(lambda x, y: y - x, a.mean, b.mean)
    mean = jax.tree.map(lambda x, d: x + d * share(d).astype(d.dtype), a.mean, difference)
    between = jax.tree.map(lambda d: _square(d) * (a.number.astype(d.real.dtype) * share(d)), difference)
    return _Moments(number, mean, jax.tree.map(lambda x, y, z: x + y + z, a.squares, b.squares, between))


def _sample_keys(function: str, fn: Any, key: Array, num_samples: int, chunk_size: int | None) -> tuple[Array, int]:
    """Return one key per sample, and the number of samples in a chunk."""
    if not callable(fn):
        raise TypeError(f"{function}: fn must be callable, got {describe(fn)}; pass a function (key, *args) -> outputs")
    check_key(function, key)
    num_samples = as_count(function, "num_samples", num_samples)
    chunk = num_samples if chunk_size is None else as_count(function, "chunk_size", chunk_size)
    return per_example(key, jnp.arange(num_samples)), min(chunk, num_samples)


def _widened(x: Any) -> Array:
    """Return an array in float32, or in its own dtype if that is wider; integers in the default dtype of floats."""
    x = jnp.asarray(x)
    if jnp.iscomplexobj(x):
        return x
    return x.astype(real_dtype(x) if jnp.issubdtype(x.dtype, jnp.floating) else float)


def _square(x: Array) -> Array:
    return x.real**2 + x.imag**2 if jnp.iscomplexobj(x) else x**2
