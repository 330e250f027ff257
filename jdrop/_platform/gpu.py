"""Forms for XLA on GPUs. Bytes and kernels are of programs compiled for an H100, not run on one."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from jdrop._platform import generic
from jdrop._random.threefry import U64, Pair

SCORES_IN_MEMORY = 2**28
"""Number of scores of attention in memory at a time, per device.

With the 8 bytes that the backward pass needs for each in bfloat16, they take 2 GiB, which is 1/40 of an H100's memory.
In float32, it needs 16 bytes.
"""


class Gpu(generic.Platform):
    """Operations in the best forms for XLA on GPUs."""

    # Symptom: the backward pass of attention in 16 bits reads its scores twice: for the sum over keys of p times its
    # gradient, and for the gradient of the logits. Gain: that sum from the output, as in FlashAttention-2: attention at
    # length 4096 (forward and backward, bfloat16, batch 4, 16 heads of 64) moves 51.5 instead of 62.2 GB, and causal
    # 37.6 instead of 43.3. The gradient of the query loses accuracy, because the output is rounded: an error of 0.3% of
    # its norm becomes 0.4% to 0.65%. Seen: jax 0.10.2. Test: test_attention_values.py,
    # test_gradients_from_rounded_outputs_are_almost_as_accurate.
    reuses_rounded_outputs = True

    # Symptom: attention in bfloat16 writes and reads scores in float32, because only a function of the products can be
    # the end of a matrix product's kernel, and a softmax is none: it subtracts the maximum of a row. Gain: with the
    # maximum in columns of the query, that kernel ends with the exponentials, rounded to bfloat16. The forward pass
    # takes the maximum of rounded logits, and the backward pass gets differences of gradients in the same way.
    # Attention at length 4096 moves 35.5 instead of 47.5 GB, in 1,275 instead of 3,385 MB; 12.2 instead of 16.2 ms are
    # predicted. The error of the query's gradient, up to 0.6% of its norm, stays the same. Seen: jax 0.10.2. Test:
    # test_accelerators.py, test_attention_moves_few_bytes_in_few_launches.
    rounds_probabilities = True

    # Symptom: each step of a loop over blocks launches some 35 kernels. With blocks that stay in the L2 cache, the gaps
    # before launches cost more than the cache saves. Gain: at length 4096 with blocks of 2**28 (2**27, 2**25, 2**23)
    # scores, 12.2 (12.8, 17.2, 25.4) ms are predicted, and 1,275 (738, 322, 210) MB are needed. Up to 2**28 scores,
    # such as 4 examples with 16 heads of length 2048, there is no loop. Causal attention has fewer segments: 8 instead
    # of 16 at length 8192. Seen: jax 0.10.2. Test: as above, and test_attention_blocking.py,
    # test_gpus_have_one_block_up_to_their_budget.
    block_sizes = generic.BlockSizes(scores=SCORES_IN_MEMORY, segment=512, segments=8, target_scores=SCORES_IN_MEMORY)

    def unshared_index(self, x: Array, index: Sequence[U64], *, hashed: bool) -> Sequence[U64]:
        """Make masks depend on their data: those of backward passes, and all of blockwise attention.

        Symptom: XLA computes a mask once for the forward and the backward pass, and stores it in between; it merges the
        barriers of both passes. Gain: temporary bytes of the gradient of a transformer (4 layers, [8, 512, 768],
        float32) from 1.072 to 1.010 times those of no dropout, and with ``jax.checkpoint`` from 1.114 to 1.057. No
        instruction more, because LLVM removes the dependence. Seen: jax 0.10.2. Test: test_platform.py,
        test_masks_depend_on_cotangents_so_that_passes_do_not_share_them; the bytes by scripts/check_compiled.py.

        In a forward pass, a mask that depends on its data would follow the softmax before it, which then takes several
        kernels instead of one: that gradient would move 14.5 GB instead of 13.0 (12.0 without dropout). The gradient
        of a softmax reads the dropped gradient twice. XLA stores the mask from the first to the second time.
        """
        del hashed
        return generic.index_of_data(x, index)

    def row_key(self, words: Array, row: Pair, col: Array) -> Pair:
        """Hash the key of a mask again for each row, or for each element of a small array.

        Symptom: a dropout takes three kernels before that of its data: of one thread for the seed, and of two for the
        words of row keys. Gain: one kernel before that of the data, for the forward and the backward pass together, and
        none for small arrays. The gradient of that transformer got 228 instead of 246 kernels (201 without dropout),
        and with ``jax.checkpoint`` 300 instead of 334 (253), while all masks depended on their data. Seen: jax 0.10.2.
        Test: test_platform.py, test_the_key_is_hashed_for_each_row_so_that_one_kernel_makes_row_keys; the kernels by
        scripts/check_compiled.py.
        """
        return generic.row_key_of_elements(words, row, col, small=2**17)

    def unshared_query(self, query: Array, do: Array) -> Array:
        """Add a dependence on ``do`` to the bits of the query, which changes none of them.

        Symptom: without a loop over blocks, XLA computes scores once for both passes, and stores them in between. Gain:
        up to four bytes per score and layer: four layers (batch 4, length 512, 16 heads) take 279 instead of 539 MB in
        float32, and 192 instead of 223 MB in bfloat16. Seen: jax 0.10.2. Test: test_accelerators.py,
        test_layers_hold_no_scores_for_the_backward_pass_on_a_gpu.
        """
        bits = jnp.dtype(f"uint{8 * query.dtype.itemsize}")
        words, zero = (lax.bitcast_convert_type(x, bits) for x in (query, do))
        return lax.bitcast_convert_type(words ^ generic.opaque_zero(zero), query.dtype)
