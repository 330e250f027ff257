"""``generator="jax"``: the bits of ``jax.random.bernoulli(key, 1 - rate, shape)``, by index if JAX draws them by index.

``bernoulli`` keeps elements with ``uniform(key) < p``, and ``uniform`` makes its numbers from as many bits as the
mantissa of p has. It therefore keeps elements whose n bits, as an integer, are below ``ceil(p * 2**n)``. The realized
drop rate, ``1 - ceil(p * 2**n) / 2**n``, is exact in the dtype of p.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop._random.threefry import Pair, threefry2x32
from jdrop._types import Rate


def has_random_access(implementation: str) -> bool:
    """Tell whether ``jax.random`` draws a bit of such a key only from the index of its element."""
    config: Any = jax.config
    return implementation == "threefry2x32" and config.jax_threefry_partitionable


def realized_rate(rate: Rate) -> Rate:
    """Return the drop rate that ``bernoulli(key, 1 - rate)`` realizes, in the dtype that JAX gives ``1 - rate``.

    ``1 - rate`` is formed in the rate's own dtype, as a user would. Rates below 0 and above 1 act as 0 and 1.
    """
    concrete = isinstance(rate, np.ndarray)
    xp: Any = np if concrete else jnp
    p = xp.asarray(1 - rate, jax.dtypes.canonicalize_dtype(rate.dtype) if concrete else None)
    steps = p.dtype.type(2.0 ** jnp.finfo(p.dtype).nmant)
    clipped = xp.minimum(xp.maximum(p, p.dtype.type(0)), p.dtype.type(1))
    return xp.where(xp.isnan(p), p, p.dtype.type(1) - xp.ceil(clipped * steps) / steps)


def keep(bits: Array, rate: Array) -> Array:
    """Decide for each integer of :func:`bits_at` whether its element is kept, by a realized rate."""
    keep_all = jnp.isnan(rate)
    p = jnp.where(keep_all, jnp.ones_like(rate), 1 - rate)
    return bits < (p * rate.dtype.type(2.0 ** jnp.finfo(rate.dtype).nmant)).astype(bits.dtype)


def keep_probability(rate: Array, dtype: Any) -> Array:
    """Return the exact probability that an element is kept; NaN for NaN."""
    return (1 - rate).astype(dtype)


def bits_at(words: Pair, index: Pair, dtype: Any) -> Array:
    """Return the integer at a flat index from which ``jax.random.uniform`` makes a number of ``dtype``."""
    info = jnp.finfo(dtype)
    high, low = threefry2x32(words, index)
    if info.bits == 64:
        return ((high.astype(jnp.uint64) << np.uint64(32)) | low.astype(jnp.uint64)) >> np.uint64(64 - info.nmant)
    drawn = 8 if info.nmant < 8 else info.bits
    return ((high ^ low) & np.uint32(2**drawn - 1)) >> np.uint32(drawn - info.nmant)
