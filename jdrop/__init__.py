"""Functional dropout for JAX: explicit keys, the same mask everywhere, and no mask in memory."""

from jdrop import keys as keys
from jdrop import schedules as schedules
from jdrop.attention import dot_product_attention as dot_product_attention
from jdrop.bits import MASK_VERSION as MASK_VERSION
from jdrop.blocks import drop_block as drop_block
from jdrop.blocks import drop_block_mask as drop_block_mask
from jdrop.channels import channel_dropout as channel_dropout
from jdrop.composed import bias_dropout_add as bias_dropout_add
from jdrop.composed import multi_sample_dropout as multi_sample_dropout
from jdrop.elementwise import alpha_dropout as alpha_dropout
from jdrop.elementwise import dropout as dropout
from jdrop.masks import dropout_mask as dropout_mask
from jdrop.noise import gaussian_dropout as gaussian_dropout
from jdrop.noise import gaussian_noise as gaussian_noise
from jdrop.paths import drop_path as drop_path
from jdrop.paths import stochastic_depth as stochastic_depth
from jdrop.recurrent import locked_dropout as locked_dropout
from jdrop.recurrent import zoneout as zoneout
from jdrop.tokens import patch_dropout as patch_dropout
from jdrop.tokens import token_dropout as token_dropout
from jdrop.weights import drop_connect as drop_connect
from jdrop.weights import embedding_dropout as embedding_dropout
