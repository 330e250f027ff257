"""The ops that several functions share: multiplication by a mask, and the identity."""

import jax.numpy as jnp
from jax import Array

from jdrop._primitive import MaskedOp, MaskView
from jdrop._types import real_dtype


def _scale(view: MaskView, x: Array) -> Array:
    keep_probability = view.mask.keep_probability(real_dtype(x))
    return view.multiply(x, 1 / keep_probability, where=view.keep())  # 1 / 0 where nothing is kept


def _select(view: MaskView, x: Array) -> Array:
    return view.multiply(x, _one_or_nan(view, x), where=view.keep())


def _select_dropped(view: MaskView, x: Array) -> Array:
    factor = _one_or_nan(view, x)
    return view.multiply(x, factor, where=~view.keep() | jnp.isnan(factor))


def _one_or_nan(view: MaskView, x: Array) -> Array:
    """Return the factor of values that are not scaled: 1, or NaN where the rate is NaN."""
    keep_probability = view.mask.keep_probability(real_dtype(x))
    return jnp.where(jnp.isnan(keep_probability), keep_probability, jnp.ones_like(keep_probability))


def _identity(view: MaskView, x: Array) -> Array:
    del view
    return x


SCALE = MaskedOp(_scale)
"""Divide kept values by the keep probability; 0 where dropped."""
SELECT = MaskedOp(_select)
"""Leave kept values as they are; 0 where dropped."""
SELECT_DROPPED = MaskedOp(_select_dropped)
"""Leave dropped values as they are; 0 where kept."""
IDENTITY = MaskedOp(_identity)
"""The derivative of adding noise."""
