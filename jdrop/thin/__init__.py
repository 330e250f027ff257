"""Thinner layers: units that are dropped for a whole minibatch, or a group of examples, are not computed."""

from jdrop.thin._attention import multi_head_attention as multi_head_attention
from jdrop.thin._mlp import gated_mlp as gated_mlp
from jdrop.thin._mlp import mlp as mlp
from jdrop.thin._units import kept_units as kept_units
from jdrop.thin._weights import put as put
from jdrop.thin._weights import take as take

__all__ = ["gated_mlp", "kept_units", "mlp", "multi_head_attention", "put", "take"]
