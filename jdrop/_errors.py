"""The wording of every error: ``function: argument rule, got value; fix``."""

from typing import Any

import jax
import numpy as np


def message(function: str, argument: str, rule: str, got: Any, fix: str) -> str:
    """Word an error."""
    return f"{function}: {argument} {rule}, got {got}; {fix}"


def value_error(function: str, argument: str, rule: str, got: Any, fix: str) -> ValueError:
    """Return the error for a value that breaks a rule."""
    return ValueError(message(function, argument, rule, got, fix))


def type_error(function: str, argument: str, rule: str, got: Any, fix: str) -> TypeError:
    """Return the error for a value of the wrong type."""
    return TypeError(message(function, argument, rule, got, fix))


def unsupported(function: str, argument: str, rule: str, got: Any, fix: str) -> NotImplementedError:
    """Return the error for an explicit option that cannot serve the other arguments."""
    return NotImplementedError(message(function, argument, rule, got, fix))


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
