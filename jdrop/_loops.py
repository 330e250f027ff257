"""Operations on elements in the forms that XLA for CPU makes the fastest loops of, and what it does to plain ones."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jdrop.bits import MIN_COLUMNS, WORD, made_once

_LONG, _WIDEST = 2**14, 1024  # elements of an axis that is looped over in rows, and of the rows


def real_dtype(x: Array) -> Any:
    """The dtype that x is scaled in."""
    return jnp.float64 if x.dtype in (jnp.float64, jnp.complex128) else jnp.float32


def multiply(x: Array, factor: Array, *, where: Array, words: Array | None = None) -> Array:
    """Multiply by a real factor in float32 (float64 for float64 x), rounded once; exactly 0 elsewhere.

    With ``words`` the form is the one for a CPU: a multiplication and an addition of what the compiler does not know to
    be 1 and 0. A single operation LLVM makes one masked instruction with load and selection: the load then waits for
    the mask, and dropout takes twice as long as it takes to read x.
    """
    if jnp.iscomplexobj(x):
        return jnp.where(where, lax.complex(x.real * factor, x.imag * factor), jnp.zeros((), x.dtype))
    product = x.astype(factor.dtype)
    if words is None:
        product = product * factor
    else:
        word = lax.optimization_barrier(words)[0]  # or what the words were made from would join the loop
        one, minus_zero = (hidden(word, bits).astype(factor.dtype) for bits in (0x3F800000, 0x80000000))
        product = product * (factor * one) + minus_zero  # -0.0 changes no number, not even a zero's sign
    product = jnp.where(where, product, jnp.zeros((), factor.dtype))
    return _round_to_bfloat16(product) if words is not None and x.dtype == jnp.bfloat16 else product.astype(x.dtype)


def choose(kept: Array, x: Array, y: Array, words: Array) -> Array:
    """Return ``where(kept, x, y)``, bit by bit, so that loads do not wait for the mask (see :func:`multiply`)."""
    if jnp.iscomplexobj(x):
        return jnp.where(kept, x, y)
    bits = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    a, b = lax.bitcast_convert_type(x, bits), lax.bitcast_convert_type(y, bits)
    zero = _hidden_zero(lax.optimization_barrier(words)[0])
    mask = jnp.where(kept, ~zero.astype(bits), jnp.zeros((), bits))
    return lax.bitcast_convert_type(((a ^ b) & mask) ^ b, x.dtype)


def stored(x: Array) -> Array:
    """Return x, bools or float32, kept out of the loop that reads it, which would make it again for each element."""
    bits = x if x.dtype == bool else lax.bitcast_convert_type(x, jnp.uint32)
    bits, inverse = made_once((bits, ~bits))
    bits = bits & ~inverse  # both are read
    return bits if x.dtype == bool else lax.bitcast_convert_type(bits, x.dtype)


def row_width(n: int) -> int:
    """Return the width of the rows in which to loop over one axis of n elements: a power of two that divides n, or 0.

    In a loop over all of a long axis LLVM counts in 64 bits, in vectors twice as wide as the others, which slows down
    all of them; over rows it counts in 32 bits.
    """
    width = min(n & -n, _WIDEST)  # n & -n is the largest power of two that divides n
    return width if _LONG <= n <= WORD and width >= MIN_COLUMNS else 0


def hidden(word: Array, bits: int) -> Array:
    """Return the float32 of these bits, in the shape of a uint32 word, so that no compiler knows it."""
    return lax.bitcast_convert_type(_hidden_zero(word) | np.uint32(bits), jnp.float32)


def later(x: Array) -> Array:
    """Return -0.0 made from x, in its shape: added to something, it makes that wait for x and changes no number.

    Where subnormal numbers count as 0, as for XLA on CPU, they do here.
    """
    return hidden(lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32), 0x80000000)


def _hidden_zero(word: Array) -> Array:
    """Return 0, uint32: ``w * (w + 1)`` is even, which no compiler knows."""
    return word * (word + np.uint32(1)) & np.uint32(1)


def _round_to_bfloat16(x: Array) -> Array:
    """Round float32 to nearest even in five integer operations, where XLA's own form on CPU takes eight.

    It leaves out the case of a NaN whose payload lies in the lower half alone, which no product with a bfloat16 has.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    half = np.uint32(16)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> half) & np.uint32(1))) >> half
    return lax.bitcast_convert_type(rounded.astype(jnp.uint16), jnp.bfloat16)
