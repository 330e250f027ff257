"""Forms for XLA on TPUs. Bytes and cycles are of programs compiled for a TPU, not run on one."""

from collections.abc import Sequence

from jax import Array

from jdrop._platform import generic
from jdrop._random.threefry import U64, Pair


class Tpu(generic.Platform):
    """Operations in the best forms for XLA on TPUs."""

    # Symptom: the backward pass of attention in 16 bits reads its scores twice, as in gpu.py. Gain: attention, forward
    # and backward (bfloat16, batch 4, 16 heads of 64), on a v5e at length 1024: 6.1 to 5.0 million estimated cycles and
    # 27 to 2 MB; causal 5.5 to 4.6. Seen: jax 0.10.2. Test: as in gpu.py.
    reuses_rounded_outputs = True

    # Symptom: larger blocks do not fit in fast memory, and smaller ones have more steps. Gain: attention with blocks of
    # 2**25 (2**24, 2**23) scores: 6.1 (4.4, 5.1) million estimated cycles and 134 (1, 2) MB at length 1024, 24.6
    # (17.1, 17.5) and 204 (103, 53) MB at 2048. Causal, the largest blocks are the fastest, 4.5 (4.5, 4.6) and 13.1
    # (14.8, 16.6). All scores at once take 5.8 and 537 MB, 22.7 and 2,149 MB, and are faster only at length 512: 0.7
    # instead of 1.4. Seen: jax 0.10.2. Test: test_attention_blocking.py, test_platforms_differ_in_their_blocks.
    block_sizes = generic.BlockSizes(target_scores=2**24)

    def unshared_index(self, x: Array, index: Sequence[U64], *, hashed: bool) -> Sequence[U64]:
        """Make masks depend on their data, as in ``gpu.py``, unless each decision takes a whole hash.

        Symptom: as in ``gpu.py``. Gain: temporary bytes of the same gradient (unrolled) on a v5e from 1.004 to 1.003
        times those of no dropout in float32, and from 1.023 to 1.006 in bfloat16, for 1.2% more estimated cycles of a
        dropout on [4096, 1024]. With ``generator="jax"`` it would lose: from 1.016 to 1.265, and from 1.032 to 1.464.
        Seen: jax 0.10.2. Test: test_platform.py,
        test_masks_depend_on_cotangents_so_that_passes_do_not_share_them; the bytes by scripts/check_compiled.py.
        """
        return index if hashed else generic.index_of_data(x, index)

    def row_key(self, words: Array, row: Pair, col: Array) -> Pair:
        """Hash the key of a mask again for each row, or for each element of a small array.

        Symptom: XLA hashes the key of a mask in 121 operations on scalars, one after another. Gain: none of them, for
        0.3% more estimated cycles of a dropout on [4096, 1024] on a v5e, and 0.45 times the cycles on [64, 128]. On
        [8, 8, 512], a hash for each element takes 1.2 times the cycles of a hash for each row, and 1.4 times with the
        gradient. Seen: jax 0.10.2. Test: as in ``gpu.py``.
        """
        return generic.row_key_of_elements(words, row, col, small=2**14)
