"""Checks and noise that learned dropout shares."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop._checks import as_number, check_array, check_broadcastable, expand_rank
from jdrop._errors import describe
from jdrop._primitive import MaskedOp, MaskView
from jdrop._types import FLOATS


def as_positive(function: str, argument: str, value: Any) -> float:
    """Require a finite Python or NumPy number above 0."""
    number = as_number(function, argument, value, 0, np.inf)
    if not number:
        raise ValueError(f"{function}: {argument} must be above 0, got {describe(value)}; pass a positive number")
    return number


def as_parameter(function: str, argument: str, value: Any, shape: tuple[int, ...]) -> Array:
    """Require a real floating number, or an array of them that broadcasts to a shape."""
    value = (
        jnp.asarray(value, jnp.float32) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
    )
    check_array(function, argument, value, FLOATS, cast="convert it to float32")
    check_broadcastable(function, argument, value, shape)
    return expand_rank(jnp.asarray(value), len(shape))


def _identity(view: MaskView, x: Array) -> Array:
    del view
    return x


def _add_logistic(view: MaskView, x: Array) -> Array:
    """Add ``log(u / (1 - u))``: with words ``w``, ``u = (w + 0.5) / 2^32``, and ``~w`` for ``1 - u``."""
    word, half = view.word(), np.float32(0.5)
    low, high = (jnp.log(w.astype(jnp.float32) + half) for w in (word, ~word))
    return x + (low - high).astype(x.dtype)


def _add_normal(view: MaskView, x: Array) -> Array:
    return x + view.normal(x.dtype)


ADD_LOGISTIC = MaskedOp(_add_logistic, (MaskedOp(_identity),))
ADD_NORMAL = MaskedOp(_add_normal, (MaskedOp(_identity),))
