"""Forms for XLA on GPUs. Bytes and kernels are of programs compiled for an H100, not run on one."""

from collections.abc import Sequence

from jax import Array

from jdrop._platform import generic
from jdrop._random.threefry import U64, Pair


class Gpu(generic.Platform):
    """Operations in the best forms for XLA on GPUs."""

    # Symptom: the backward pass of attention in 16 bits reads its scores twice: for the sum over keys of p times its
    # gradient, and for the gradient of the logits. Gain: that sum from the output, as in FlashAttention-2: attention at
    # length 4096 (forward and backward, bfloat16, batch 4, 16 heads of 64) moves 51.5 instead of 62.2 GB, and causal
    # 37.6 instead of 43.3. The gradient of the query loses accuracy, because the output is rounded: an error of 0.3% of
    # its norm becomes 0.4% to 0.65%. Seen: jax 0.10.2. Test: test_attention_values.py,
    # test_gradients_from_rounded_outputs_are_almost_as_accurate.
    reuses_rounded_outputs = True

    rounds_probabilities = True
    block_sizes = generic.BlockSizes(scores=2**28, segment=512, segments=8, target_scores=2**28)

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
