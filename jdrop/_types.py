"""Types of public arguments, and the dtypes that they may have."""

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

RateLike = float | np.ndarray | Array  # an argument
Rate = np.ndarray | Array  # a checked argument
Generator = Literal["fast", "packed", "jax"]
Shard = PartitionSpec | None
Window = Sequence[tuple[int | Array, int]]

GENERATORS = ("fast", "packed", "jax")
FLOATS = ("float16", "bfloat16", "float32", "float64")
# Those with a zero: all but float8_e8m0fnu.
FLOAT8 = tuple(f"float8_{name}" for name in ("e3m4", "e4m3", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz"))
REAL = (*FLOAT8, *FLOATS)
INEXACT = (*REAL, "complex64", "complex128")
RATE_DTYPES = FLOATS


def real_dtype(x: Array) -> Any:
    """Return the dtype that x is scaled in: float64 for float64 and complex128, else float32."""
    return jnp.float64 if x.dtype in (jnp.float64, jnp.complex128) else jnp.float32
