"""Threefry-2x32, and 64-bit integers as pairs of uint32 words.

Everything is plain ``jnp`` on uint32: it works without x64, and inside Pallas kernels.

References:
  Salmon, Moraes, Dror, Shaw (2011), Parallel Random Numbers: As Easy as 1, 2, 3, SC.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

WORD = 2**32
Pair = tuple[Any, Any]  # two uint32 arrays or scalars, such as a Threefry key

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


class U64(NamedTuple):
    """Integers modulo 2**64: arrays or scalars of their high and low uint32 words."""

    hi: Any
    lo: Any

    @classmethod
    def of(cls, value: Any) -> "U64":
        """Return the words of an integer or of an array of integers, modulo 2**64: negative ones are sign-extended."""
        if not isinstance(value, Array):
            exact = np.asarray(value, object) if isinstance(value, int) else np.asarray(value).astype(object)
            hi, lo = exact // WORD % WORD, exact % WORD
            return cls(np.asarray(hi).astype(np.uint32)[()], np.asarray(lo).astype(np.uint32)[()])
        if value.dtype.itemsize == 8:
            return cls((value >> value.dtype.type(32)).astype(jnp.uint32), value.astype(jnp.uint32))
        if jnp.issubdtype(value.dtype, jnp.unsignedinteger):
            return cls(jnp.zeros_like(value, jnp.uint32), value.astype(jnp.uint32))
        wide = value.astype(jnp.int32)
        return cls((wide >> np.int32(31)).astype(jnp.uint32), wide.astype(jnp.uint32))

    def __add__(self, other: Pair) -> "U64":  # type: ignore[override]
        """Return the sum modulo 2**64."""
        lo = self.lo + other[1]
        return U64(self.hi + other[0] + (lo < other[1]).astype(jnp.uint32), lo)

    def __mul__(self, factor: Any) -> "U64":
        """Return the product modulo 2**64 with a Python integer, or with a symbolic size below 2**31."""
        symbolic = not isinstance(factor, int)
        hi, lo = U64(np.uint32(0), jnp.asarray(factor).astype(jnp.uint32)) if symbolic else U64.of(factor)
        half, low = np.uint32(16), np.uint32(0xFFFF)
        a0, a1, b0, b1 = self.lo & low, self.lo >> half, lo & low, lo >> half
        cross = a0 * b1
        middle = (a0 * b0 >> half) + (cross & low) + a1 * b0
        carry = a1 * b1 + (cross >> half) + (middle >> half)
        return U64(self.hi * lo + self.lo * hi + carry, self.lo * lo)


ZERO = U64(np.uint32(0), np.uint32(0))


def threefry2x32(key: Pair, counter: Pair) -> Pair:
    """Encrypt a 64-bit counter under a 64-bit key with Threefry-2x32, 20 rounds.

    The 119 operations are functions of ``lax``, because JAX traces operators half as fast.
    """
    a, b = jnp.asarray(key[0]), jnp.asarray(key[1])
    keys = (a, b, lax.bitwise_xor(lax.bitwise_xor(a, b), _PARITY))
    x, y = lax.add(counter[0], a), lax.add(counter[1], b)
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            x = lax.add(x, y)
            y = lax.bitwise_xor(x, _rotate(y, r))
        x, y = lax.add(x, keys[(i + 1) % 3]), lax.add(lax.add(y, keys[(i + 2) % 3]), np.uint32(i + 1))
    return x, y


def _rotate(x: Any, r: int) -> Any:
    return lax.bitwise_or(lax.shift_left(x, np.uint32(r)), lax.shift_right_logical(x, np.uint32(32 - r)))
