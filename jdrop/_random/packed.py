"""``generator="packed"``: two decisions of 16 bits per word of ``generator="fast"``, with its own mask version.

Of the columns j and j + 8, where j // 8 is even, the first takes the upper half of the word of j, and the second the
lower half. In kernels of matrix products, one thread of a GPU and one lane of a TPU has both, so the word is computed
once for two decisions.
"""

import numpy as np
from jax import Array

from jdrop._random import fast
from jdrop._random.threefry import Pair

PACKED_MASK_VERSION = 1
"""Version of the bits that ``generator="packed"`` draws; a version never changes its masks."""

STEPS = 2**16
"""Drop rates are multiples of ``1 / STEPS``."""
_HALF = np.uint32(8)  # the bit of a column that says which half of a word it takes


def mix(key: Pair, col: Array) -> Array:
    """Mix the key of a row and a column into a word whose upper half decides; the lower half is left over.

    Compared with a threshold of ``generator="fast"`` for a rate in whole steps, the lower half does not matter.
    ``fast.key_from`` applies if its columns lack the bit that says which half.
    """
    return fast.mix(key, col & ~_HALF) << ((col & _HALF) << np.uint32(1))
