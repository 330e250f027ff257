"""Checks and noise that learned dropout shares."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop._checks import as_bool, as_number, check_array, check_broadcastable, expand_rank, is_integer
from jdrop._mask import Mask
from jdrop._ops import IDENTITY
from jdrop._prepare import prepare
from jdrop._primitive import MaskedOp, MaskView
from jdrop._types import FLOATS, Shard


def as_parameter(function: str, argument: str, value: Any, shape: tuple[int, ...]) -> Array:
    """Require a finite number, or a real floating array that broadcasts to a shape."""
    if is_integer(value) or isinstance(value, float):
        value = jnp.asarray(as_number(function, argument, value, -np.inf, np.inf))
    check_array(function, argument, value, FLOATS, cast="convert it to float32")
    check_broadcastable(function, argument, value, shape)
    return expand_rank(jnp.asarray(value), len(shape))


def draw_noise(
    function: str, key: Array | None, data: Array, *, train: bool, shared_axes: Any = (), shard: Shard = None
) -> Mask | None:
    """Check the arguments, and return the mask whose words become noise, or ``None`` in evaluation."""
    if as_bool(function, "train", train, None) and key is None:
        raise TypeError(f"{function}: key must be a PRNG key when train is true, got None; pass a key, or train=False")
    return prepare(function, key, data, 0.5, train=train, shared_axes=shared_axes, shard=shard)


def _add_logistic(view: MaskView, x: Array) -> Array:
    """Add ``log(u / (1 - u))``: with words ``w``, ``u = (w + 0.5) / 2^32``, and ``~w`` for ``1 - u``."""
    word, half = view.word(), np.float32(0.5)
    low, high = (jnp.log(w.astype(jnp.float32) + half) for w in (word, ~word))
    return x + (low - high).astype(x.dtype)


def _add_normal(view: MaskView, x: Array) -> Array:
    return x + view.normal(x.dtype)


ADD_LOGISTIC = MaskedOp(_add_logistic, (IDENTITY,))
ADD_NORMAL = MaskedOp(_add_normal, (IDENTITY,))
