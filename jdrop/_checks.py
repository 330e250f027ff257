"""Checks of arguments: each function returns the argument in one form, or raises before any computation."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop._errors import describe
from jdrop._types import FLOAT8, INEXACT, RATE_DTYPES, Rate

KEY_WORDS = (1, 2, 4)  # lengths of the key data of JAX's PRNG implementations


def is_typed_key(value: Any) -> bool:
    """Tell whether a value is an array of typed PRNG keys."""
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def is_array(value: Any) -> bool:
    """Tell whether a value is an array of JAX or NumPy, or a NumPy scalar. Masked arrays are not."""
    return isinstance(value, (jax.Array, np.ndarray, np.generic)) and not isinstance(value, np.ma.MaskedArray)


def is_integer(value: Any) -> bool:
    """Tell whether a value is a Python or NumPy integer. Bools and time spans are not."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.timedelta64))


def is_integer_array(value: Any) -> bool:
    """Tell whether a value is an array of integers or a NumPy integer. Time spans are not."""
    known = is_array(value) and not is_typed_key(value)
    return known and jnp.issubdtype(value.dtype, jnp.integer) and value.dtype.kind != "m"


# ---------------------------------------------------------------------------------- arrays


MAKE_KEY = "make one with jax.random.key, and pass it before the data"
MAP_KEYS = "use jax.vmap over keys"
CAST = "pass key first, then a float array"


def check_key(
    function: str, value: Any, argument: str = "key", *, make_key: str = MAKE_KEY, map_keys: str = MAP_KEYS
) -> None:
    """Require one PRNG key: typed, or legacy uint32. ``make_key`` and ``map_keys`` say how to get one."""
    if is_typed_key(value):
        batch = value.shape
    elif isinstance(value, (jax.Array, np.ndarray)) and value.dtype == np.uint32 and value.ndim:
        if value.shape[-1] not in KEY_WORDS:
            raise ValueError(
                f"{function}: {argument} must hold the words of one PRNG key, got {describe(value)}; "
                "make one with jax.random.key"
            )
        batch = value.shape[:-1]
    else:
        raise TypeError(f"{function}: {argument} must be a PRNG key, got {describe(value)}; {make_key}")
    if batch:
        raise ValueError(f"{function}: {argument} must be one key, got a batch of shape {batch}; {map_keys}")


def check_array(function: str, argument: str, value: Any, dtypes: Sequence[str] = INEXACT, *, cast: str = CAST) -> None:
    """Require an array of real or complex floating-point numbers. ``cast`` says what to do with another one."""
    if not is_array(value):
        raise TypeError(f"{function}: {argument} must be an array, got {describe(value)}; convert it with jnp.asarray")
    check_byte_order(function, argument, value)
    if is_typed_key(value) or value.dtype.name not in dtypes:
        raise TypeError(f"{function}: {argument} must be {names_of(dtypes)}, got {describe(value)}; {cast}")


def names_of(dtypes: Sequence[str]) -> str:
    """Name dtypes for an error, all kinds of float8 and of complex by one name."""
    kinds = (
        "float8" if name in FLOAT8 else name.rstrip("0123456789") if "complex" in name else name for name in dtypes
    )
    *first, last = dict.fromkeys(kinds)
    return f"{', '.join(first)} or {last}" if first else last


def check_byte_order(function: str, argument: str, value: Any) -> None:
    """Require an array in the byte order of this machine, which JAX does not check by name."""
    if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.isnative:
        raise TypeError(
            f"{function}: {argument} must have the byte order of this machine, got {value.dtype.str!r}; "
            "convert it with x.astype(x.dtype.newbyteorder('='))"
        )


def check_integers(function: str, argument: str, value: Any) -> None:
    """Require an array of integers."""
    if not is_integer_array(value):
        raise TypeError(f"{function}: {argument} must be an integer array, got {describe(value)}; convert it to int32")
    check_byte_order(function, argument, value)


def check_broadcastable(
    function: str, argument: str, value: Any, shape: Sequence[Any], shape_name: str = "shape"
) -> None:
    """Require an array that broadcasts to a shape."""
    if not is_array(value):
        raise TypeError(f"{function}: {argument} must be an array, got {describe(value)}; convert it with jnp.asarray")
    sizes = tuple(value.shape)
    if len(sizes) > len(shape) or any(n not in (1, m) for n, m in zip(sizes[::-1], tuple(shape)[::-1])):
        raise ValueError(
            f"{function}: {argument} must broadcast to {shape_name} {tuple(shape)}, got shape {sizes}; "
            "give it these sizes or 1"
        )


def expand_rank(value: Array, ndim: int) -> Array:
    """Prepend axes of size 1 to an array that broadcasts, up to ``ndim``. A scalar stays a scalar."""
    return value.reshape((1,) * (ndim - value.ndim) + value.shape) if value.ndim else value


# ---------------------------------------------------------------------------------- rates and numbers


def as_rate(function: str, value: Any, shape: Sequence[int], argument: str = "rate", high: float = 1.0) -> Rate:
    """Require a drop probability, or an array of them that broadcasts to the mask's shape.

    Python and NumPy values are checked to lie in [0, high] and returned as NumPy arrays. Arrays of JAX are never read.
    Arrays that are not scalars are expanded to the rank of the mask. ``argument`` and ``high`` let other parameters of
    a distribution use the same rules.
    """
    meaning = "the probability of dropping" if high <= 1 else "a number of at least 0"
    number_like = isinstance(value, (int, float, np.ndarray, np.generic, jax.Array))
    if is_typed_key(value) or not number_like or isinstance(value, (np.ma.MaskedArray, np.timedelta64)):
        raise TypeError(
            f"{function}: {argument} must be a number or an array, got {describe(value)}; pass a float, {meaning}"
        )
    concrete = not isinstance(value, jax.Array)
    rate: Any = np.asarray(_as_float(value) if is_integer(value) else value) if concrete else value
    check_byte_order(function, argument, rate)
    if rate.dtype.name not in RATE_DTYPES:
        raise TypeError(
            f"{function}: {argument} must be a real floating point number, got {describe(value)}; convert it to float32"
        )
    if concrete and not ((rate >= 0) & (rate <= high) & np.isfinite(rate)).all():
        raise ValueError(f"{function}: {argument} must lie in [0, {high:g}], got {describe(value)}; pass {meaning}")
    check_broadcastable(function, argument, rate, shape, "the mask's shape")
    return expand_rank(rate, len(shape))


def is_zero(rate: Rate) -> bool:
    """Tell whether a checked rate drops nothing for certain: a concrete 0."""
    return isinstance(rate, np.ndarray) and not rate.any()


def as_number(function: str, argument: str, value: Any, low: float, high: float) -> float:
    """Require a finite Python or NumPy number within limits."""
    if not is_integer(value) and not isinstance(value, (float, np.floating)):
        raise TypeError(f"{function}: {argument} must be a number, got {describe(value)}; pass a Python float")
    number = _as_float(value)
    if not low <= number <= high or np.isinf(number):
        limits = f"lie in [{low:g}, {high:g}]" if np.isfinite(high) else f"be finite and at least {low:g}"
        limits = "be finite" if low == -np.inf else limits
        raise ValueError(
            f"{function}: {argument} must {limits}, got {describe(value)}; pass a number within the limits"
        )
    return number


def as_positive(function: str, argument: str, value: Any) -> float:
    """Require a finite Python or NumPy number above 0."""
    number = as_number(function, argument, value, 0, np.inf)
    if not number:
        raise ValueError(f"{function}: {argument} must be above 0, got {describe(value)}; pass a positive number")
    return number


def _as_float(value: Any) -> float:
    """Return ``float(value)``, and infinity for an int that is too large for a float."""
    try:
        return float(value)
    except OverflowError:
        return np.inf if value > 0 else -np.inf


def as_count(function: str, argument: str, value: Any, low: int = 1) -> int:
    """Require a Python or NumPy integer of at least ``low``."""
    if not is_integer(value):
        raise TypeError(f"{function}: {argument} must be an integer, got {describe(value)}; pass a Python int")
    if value < low:
        raise ValueError(f"{function}: {argument} must be at least {low}, got {value}; pass a larger int")
    return int(value)


# ---------------------------------------------------------------------------------- static options


def as_bool(function: str, argument: str, value: Any, rate_argument: str | None = "rate") -> bool:
    """Require a static bool. Where it is a mode of a function with a rate, the error offers a traced rate instead."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, jax.core.Tracer):
        switched = f"train, {rate_argument}, 0." if argument == "train" else f"{argument}, 0., {rate_argument}"
        is_mode = rate_argument and argument in ("train", "deterministic", "inference")
        hint = f"pass {rate_argument}=jnp.where({switched}), or " if is_mode else ""
        raise TypeError(
            f"{function}: {argument} must be static, got a traced value; {hint}list {argument} in static_argnames"
        )
    raise TypeError(f"{function}: {argument} must be a bool, got {describe(value)}; pass {argument}=True or False")


def check_function(function: str, argument: str, value: Any, fix: str) -> None:
    """Require something that can be called."""
    if not callable(value):
        raise TypeError(f"{function}: {argument} must be a function, got {describe(value)}; {fix}")


def check_choice(function: str, argument: str, value: Any, choices: Sequence[str]) -> None:
    """Require one of a few strings."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{function}: {argument} must be {' or '.join(map(repr, choices))}, got {describe(value)}; pick one of them"
        )
