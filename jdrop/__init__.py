"""Functional dropout for JAX: explicit keys, the same mask everywhere, and no mask in memory."""

from jdrop import keys as keys
from jdrop import schedules as schedules
from jdrop.bits import MASK_VERSION as MASK_VERSION
from jdrop.elementwise import dropout as dropout
from jdrop.masks import dropout_mask as dropout_mask
