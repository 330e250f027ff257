"""Residual branches: checked, scaled, and added."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from jdrop._checks import is_array
from jdrop._errors import describe
from jdrop._platform.generic import multiply
from jdrop._sharding import check_sharded_as


def add_branch(function: str, argument: str, x: Array, y: Array, keep_probability: Array | None = None) -> Array:
    """Return ``x + y / keep_probability``, or ``x + y``; require a y like x. ``argument`` names what returned y."""
    return x + scaled_branch(function, argument, x, y, keep_probability)


def scaled_branch(function: str, argument: str, x: Array, y: Any, keep_probability: Array | None) -> Array:
    """Return ``y / keep_probability``, or y; require a y like x."""
    if not is_array(y) or (y.shape, y.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"{function}: {argument} must return {describe(x)}, like x, got {describe(y)}; "
            "add a projection to the branch"
        )
    check_sharded_as(function, f"the result of {argument}", y, x, "x")
    y = jnp.asarray(y)
    if keep_probability is None:
        return y
    return multiply(y, 1 / keep_probability, where=jnp.ones_like(keep_probability, dtype=bool))
