"""Functional dropout for JAX: explicit keys, the same mask everywhere, and no mask in memory."""

from jdrop import consistency as consistency
from jdrop import keys as keys
from jdrop import learned as learned
from jdrop import schedules as schedules
from jdrop import thin as thin
from jdrop import uncertainty as uncertainty
from jdrop._family.blocks import drop_block as drop_block
from jdrop._family.blocks import drop_block_mask as drop_block_mask
from jdrop._family.composed import bias_dropout_add as bias_dropout_add
from jdrop._family.composed import multi_sample_dropout as multi_sample_dropout
from jdrop._family.depth import stochastic_depth as stochastic_depth
from jdrop._family.elementwise import alpha_dropout as alpha_dropout
from jdrop._family.elementwise import dropout as dropout
from jdrop._family.masks import dropout_mask as dropout_mask
from jdrop._family.noise import gaussian_dropout as gaussian_dropout
from jdrop._family.noise import gaussian_noise as gaussian_noise
from jdrop._family.recurrent import zoneout as zoneout
from jdrop._family.shared import channel_dropout as channel_dropout
from jdrop._family.shared import drop_path as drop_path
from jdrop._family.shared import locked_dropout as locked_dropout
from jdrop._family.skip import skip_path as skip_path
from jdrop._family.tokens import patch_dropout as patch_dropout
from jdrop._family.tokens import token_dropout as token_dropout
from jdrop._family.weights import drop_connect as drop_connect
from jdrop._family.weights import embedding_dropout as embedding_dropout
from jdrop._random.fast import MASK_VERSION as MASK_VERSION
from jdrop._random.packed import PACKED_MASK_VERSION as PACKED_MASK_VERSION
from jdrop.attention import dot_product_attention as dot_product_attention

__version__ = "0.1.0"
