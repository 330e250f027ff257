"""Forms of operations that make XLA for CPU produce faster and smaller programs.

Each form states its symptom, its gain, the JAX version where this was last seen, and the test that fails without it.
Gains depend on the processor. Gains "on an EPYC" are ratios of the time with the form to the time without it, on two
idle cores of an AMD EPYC (``scripts/bench_platform.py``, ``scripts/results/platform.json``). The others were measured
when the form was written, on an Intel Xeon with AVX-512 or on an EPYC.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jdrop._platform import generic
from jdrop._random import fast
from jdrop._random.indexing import MIN_COLUMNS
from jdrop._random.threefry import WORD, ZERO, Pair

_SHARING = 16  # minimum number of elements per byte that materialize stores
_LONG, _WIDEST = 2**14, 1024  # minimum length of a folded axis, maximum length of its rows
_ONE, _MINUS_ZERO = 0x3F800000, 0x80000000  # bits of float32


class Cpu(generic.Platform):
    """Operations in the best forms for XLA on CPU."""

    # Symptom: an operation on a block [1, 1, 1, T, S] never reuses its operand's buffer for its result.
    # Gain: dropout adds no array of scores (before: one forward and two backward); 5 to 24% of the time at length 4096.
    # Seen: jax 0.10.2, 0.12.0. Test: test_attention_blockwise.py, test_dropout_takes_no_memory.
    squeezes_blocks = True
    # The best of a search over lengths 256 to 8192 and 1 to 8 heads. Seen: jax 0.10.2.
    block_sizes = generic.BlockSizes(target_scores=2**21)
    # Symptom: LLVM takes seconds for long straight-line code. Gain: 0.3 instead of 2.2 s to compile a key of five names
    # on an EPYC, which takes 75 instead of 62 us to run. Seen: jax 0.10.2, 0.12.0. Test: test_platform.py,
    # test_a_path_of_names_is_a_loop_only_on_a_cpu.
    unrolls_hashes = False

    def recomputed(self, x: Any) -> Any:
        """Return x behind a barrier.

        Symptom: XLA merges the equal computations of the forward and the backward pass, and stores the mask from one to
        the other. Gain: one byte per element and dropout. Seen: jax 0.10.2, 0.12.0. Test: test_primitive.py,
        test_temporary_bytes_are_those_of_a_plain_scale.
        """
        return lax.optimization_barrier(x)

    def row_key(self, words: Array, row: Pair, col: Array) -> Pair:
        """Hash rows outside the loop over columns.

        Symptom: XLA fuses the 20 rounds of Threefry into the loop over elements and repeats them for each one. Gain:
        none in time on an EPYC (1.00, 0.88 to 1.09), where XLA leaves the hash outside by itself. Seen: jax 0.10.2,
        0.12.0. Test: test_primitive.py, test_forward_is_one_loop_over_elements_with_the_row_hash_outside.
        """
        return _out_of_loops(fast.row_key(fast.seed(words), row))

    def materialize(self, x: Array, shape: tuple[Any, ...]) -> Array:
        """Store decisions or noise, if enough elements share them, except along the last axis.

        Symptom: XLA computes a shared decision again for each element that shares it; along the last axis, LLVM moves
        it out of the loop. Gain: locked_dropout from 1.20 to 1.48 times ``x * c`` to 0.95 to 1.07; on an EPYC 0.82.
        Seen: jax 0.10.2, 0.12.0. Test: test_primitive.py, test_shared_decisions_are_drawn_once_on_a_cpu.
        """
        size = math.prod(shape)
        if not isinstance(size, int) or not shape or x.shape[-1] != shape[-1]:  # unknown if symbolic
            return x
        few = x.size * x.dtype.itemsize * _SHARING <= size
        return _stored(x) if few else x

    def multiply(self, x: Array, factor: Array, *, where: Array, words: Array) -> Array:
        """Multiply by the factor times 1, and add -0.0, both opaque to the compiler.

        Symptom: LLVM fuses load, single operation, and selection into one masked load, which waits for the mask. Gain:
        half of the time if memory is fast; on an EPYC 0.77 in bfloat16, and none in float32 (0.97). Seen: jax 0.10.2,
        0.12.0. Test: test_platform_cpu.py, test_a_product_hides_its_factor; the time by scripts/bench_platform.py.
        """
        if jnp.iscomplexobj(x):
            return generic.multiply(x, factor, where=where)
        word = lax.optimization_barrier(words)[0]  # otherwise, the computation of the key would be fused into the loop
        one = _opaque_constant(word, _ONE).astype(factor.dtype)
        minus_zero = _opaque_constant(word, _MINUS_ZERO).astype(factor.dtype)  # changes no number, nor the sign of 0
        product = x.astype(factor.dtype) * (factor * one) + minus_zero
        product = jnp.where(where, product, jnp.zeros((), factor.dtype))
        return _round_to_bfloat16(product) if x.dtype == jnp.bfloat16 else product.astype(x.dtype)

    def select(self, kept: Array, x: Array, y: Array, *, words: Array) -> Array:
        """Select bit by bit.

        Symptom and gain: as for :meth:`multiply`, if there is only a selection; none on an EPYC (1.03).
        Seen: jax 0.10.2, 0.12.0. Test: test_platform_cpu.py, test_a_selection_is_made_of_bits; the time by
        scripts/bench_platform.py.
        """
        if jnp.iscomplexobj(x):
            return jnp.where(kept, x, y)
        bits = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        a, b = lax.bitcast_convert_type(x, bits), lax.bitcast_convert_type(y, bits)
        zero = _opaque_zero(lax.optimization_barrier(words)[0])
        mask = jnp.where(kept, ~zero.astype(bits), jnp.zeros((), bits))
        return lax.bitcast_convert_type(((a ^ b) & mask) ^ b, x.dtype)

    def fold(self, size: int, devices: int) -> generic.Fold | None:
        """Loop over a long axis in rows: a power of two of columns that divides its size.

        Symptom: in a loop over a whole long axis, LLVM counts in 64 bits, with vectors twice as wide as the others,
        which slows down all of them; over rows, it counts in 32 bits. Gain: 2.05 to 1.46 times ``x * c`` on a Xeon; on
        an EPYC 0.83. On a mesh, no device can fold its part of an axis without the others. Seen: jax 0.10.2. Test:
        test_primitive.py, test_a_long_axis_is_folded_on_one_cpu_and_keeps_its_bits.
        """
        width = min(size & -size, _WIDEST)  # size & -size is the largest power of two that divides size
        fits = devices == 1 and _LONG <= size <= WORD and width >= MIN_COLUMNS
        return generic.Fold(width, _Folded(width)) if fits else None

    def order_after(self, x: Array, dependency: Array | None) -> Array:
        """Add a -0.0 computed from the dependency, which changes no number.

        Symptom: XLA orders only operations that depend on each other; it runs all segments of causal attention
        at once and keeps their blocks, or computes the probabilities of the backward pass in the forward pass.
        Gain: 11 instead of 68 MB at 8192 with a window; 3.2 instead of 7.4 MB per layer at 512, for 1.10 times
        the time on an EPYC. Seen: jax 0.10.2, 0.12.0. Test: test_attention_blockwise.py,
        test_segments_take_turns_in_memory and test_layers_hold_no_scores_for_the_backward_pass.

        XLA on CPU flushes subnormal numbers to 0, and so does this.
        """
        if dependency is None:
            return x
        word = lax.bitcast_convert_type(dependency.astype(jnp.float32), jnp.uint32)
        return x + _opaque_constant(word, _MINUS_ZERO).astype(x.dtype)

    def separate(self, *arrays: Array) -> tuple[Array, ...]:
        """Keep transposes out of matrix products.

        Symptom: XLA has no fast kernel for a product with a fused transpose of an operand. Gain: 10 to 15% of
        the products for the gradients of keys and values. Seen: jax 0.10.2. Test: test_attention_blockwise.py,
        test_transposes_stay_out_of_products_on_a_cpu; the time by scripts/bench_attention.py.
        """
        return lax.optimization_barrier(arrays)

    def sum_of_products(self, x: Array, y: Array) -> Array:
        """Contract by einsum.

        Symptom: ``jnp.sum(x * y, -1)`` takes up to 30 times as long with a batch of one (YNNPACK's reduction). Gain: 24
        of 740 ms at length 4096. Seen: jax 0.10.2. Test: test_attention_blockwise.py,
        test_the_sums_for_gradients_are_one_exact_product_on_a_cpu.
        """
        return jnp.einsum("...h,...h->...", x, y, precision="highest")


class _Folded(Cpu):
    """The forms for a single axis that is folded in rows."""

    def __init__(self, width: int):
        self.width = width

    def row_key(self, words: Array, row: Pair, col: Array) -> Pair:
        """Compute a key for each part of the single row. Without keys to read, XLA would loop over one axis."""
        first = row[1] * np.uint32(self.width)
        return _out_of_loops(fast.key_from(fast.row_key(fast.seed(words), ZERO), first))


def _out_of_loops(pair: Pair) -> Pair:
    """Return two arrays of one shape, such that XLA does not fuse their computation into a loop that reads both.

    XLA for CPU removes barriers before fusion, but does not fuse a stacked pair. The barrier keeps it from splitting
    the pair earlier.
    """
    both = lax.optimization_barrier(jnp.stack(pair))
    return both[0], both[1]


def _stored(x: Array) -> Array:
    """Return x, bool or float32, such that a loop that reads it does not recompute it for each element."""
    bits = x if x.dtype == bool else lax.bitcast_convert_type(x, jnp.uint32)
    bits, inverse = _out_of_loops((bits, ~bits))
    bits = bits & ~inverse  # reads both halves, which otherwise would be separated
    return bits if x.dtype == bool else lax.bitcast_convert_type(bits, x.dtype)


def _opaque_zero(word: Array) -> Array:
    """Return a uint32 0 that is opaque to the compiler: ``w * (w + 1)`` is even."""
    return word * (word + np.uint32(1)) & np.uint32(1)


def _opaque_constant(word: Array, bits: int) -> Array:
    """Return the float32 with these bits, opaque to the compiler, in the shape of a uint32 word."""
    return lax.bitcast_convert_type(_opaque_zero(word) | np.uint32(bits), jnp.float32)


def _round_to_bfloat16(x: Array) -> Array:
    """Round float32 to the nearest bfloat16, ties to even, in five integer operations.

    Symptom: XLA's own form takes eight. Gain: 0.79 of the time on an EPYC. Seen: jax 0.10.2. Test:
    test_platform_cpu.py, test_bfloat16_is_rounded_as_xla_does_for_every_value; the time by scripts/bench_platform.py.

    It does not handle NaN with a payload only in the lower half, which no product with a bfloat16 has.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    half = np.uint32(16)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> half) & np.uint32(1))) >> half
    return lax.bitcast_convert_type(rounded.astype(jnp.uint16), jnp.bfloat16)
