"""Descriptions of values in errors. Every error has the form ``function: argument rule, got value; fix``."""

from typing import Any

import jax
import numpy as np


def describe(value: Any) -> str:
    """Describe a value in an error: dtype and shape of arrays, the type of pytrees of arrays, ``repr`` of the rest.

    Arrays of JAX are never read.
    """
    if isinstance(value, np.ma.MaskedArray):
        return "a masked array"
    if isinstance(value, jax.Array) or (isinstance(value, np.ndarray) and value.ndim):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if any(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(value)):
        return f"a {type(value).__name__} of arrays"
    return repr(value)
