"""Standard normal numbers from uint32 words."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# The quantile of |z| as a function of l = -log2(its tail probability): |z| = l * P(l) / Q(l) for 0 <= l <= 32, within
# 6e-7 of its value; and log2(1 + f) = f + f * (1 - f) * G(f) for 0 <= f <= 1, within 5e-7.
_P = (0.868730653, 0.889600427, 0.21859531, 0.0124690131, 8.80280327e-05, -1.83493107e-07)
_Q = (1.0, 1.37056879, 0.520976108, 0.056791107, 0.00127495326)
_G = (0.442656509, -0.277746862, 0.194768754, -0.128317284, 0.0620254748, -0.0147599605)


def normal(word: Array) -> Array:
    """Turn uint32 words into standard normal numbers, float32: a sign bit, and 31 bits for the quantile of ``|z|``."""
    tail = (word >> np.uint32(1)).astype(jnp.int32).astype(jnp.float32) + np.float32(0.5)  # tail probability * 2**31
    bits = lax.bitcast_convert_type(tail, jnp.int32)
    f = lax.bitcast_convert_type((bits & np.int32(0x007FFFFF)) | np.int32(0x3F800000), jnp.float32) - np.float32(1)
    exponent = (np.int32(127 + 31) - (bits >> np.int32(23))).astype(jnp.float32)
    length = exponent - f * (1 + (1 - f) * _polynomial(_G, f))  # -log2 of the tail
    size = length * _polynomial(_P, length) / _polynomial(_Q, length)
    return lax.bitcast_convert_type(lax.bitcast_convert_type(size, jnp.uint32) | (word << np.uint32(31)), jnp.float32)


def _polynomial(coefficients: Sequence[float], x: Array) -> Array:
    y = jnp.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        y = y * x + np.float32(c)
    return y
