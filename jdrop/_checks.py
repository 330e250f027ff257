"""Argument rules and the wording of every error: ``function: argument rule, got value; fix``."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

FLOATS = ("float16", "bfloat16", "float32", "float64")
INEXACT = (*FLOATS, "complex64", "complex128")
KEY_WORDS = (1, 2, 4)  # lengths of the key data of JAX's PRNG implementations


def text(function: str, argument: str, rule: str, got: Any, fix: str) -> str:
    """Word an error."""
    return f"{function}: {argument} {rule}, got {got}; {fix}"


def describe(value: Any) -> str:
    """Name a value for an error: arrays by dtype and shape (those of JAX are never read), what holds some by type."""
    if isinstance(value, jax.Array) or (isinstance(value, np.ndarray) and value.ndim):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if any(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(value)):
        return f"a {type(value).__name__} of arrays"
    return repr(value)


def is_typed_key(value: Any) -> bool:
    """Whether a value is an array of typed PRNG keys."""
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def key(function: str, value: Any, argument: str = "key") -> None:
    """Require one PRNG key: typed, or legacy uint32."""
    if is_typed_key(value):
        batch = value.shape
    elif isinstance(value, (jax.Array, np.ndarray)) and value.dtype == np.uint32 and value.ndim:
        if value.shape[-1] not in KEY_WORDS:
            fix = "make one with jax.random.key"
            raise ValueError(text(function, argument, "must hold the words of one PRNG key", describe(value), fix))
        batch = value.shape[:-1]
    else:
        fix = "make one with jax.random.key, and pass it before the data"
        raise TypeError(text(function, argument, "must be a PRNG key", describe(value), fix))
    if batch:
        fix = "use jax.vmap over keys"
        raise ValueError(text(function, argument, "must be one key", f"a batch of shape {batch}", fix))


def is_array(value: Any) -> bool:
    """Whether a value is an array, of JAX or NumPy, or a NumPy scalar."""
    return isinstance(value, (jax.Array, np.ndarray, np.generic))


def array(function: str, argument: str, value: Any, dtypes: Sequence[str] = INEXACT) -> None:
    """Require an array of real or complex floating point numbers."""
    if not is_array(value):
        fix = "convert it with jnp.asarray"
        raise TypeError(text(function, argument, "must be an array", describe(value), fix))
    if is_typed_key(value) or value.dtype.name not in dtypes:
        fix = "pass key first, then a float array"
        rule = f"must be float16, bfloat16, float32, float64{' or complex' if dtypes == INEXACT else ''}"
        raise TypeError(text(function, argument, rule, describe(value), fix))


def is_integers(value: Any) -> bool:
    """Whether a value is an array of integers, or a NumPy scalar; a span of time is none."""
    known = is_array(value) and not is_typed_key(value)
    return known and jnp.issubdtype(value.dtype, jnp.integer) and value.dtype.kind != "m"


def integers(function: str, argument: str, value: Any) -> None:
    """Require an array of integers."""
    if not is_integers(value):
        fix = "convert it to int32"
        raise TypeError(text(function, argument, "must be an integer array", describe(value), fix))


def flag(function: str, argument: str, value: Any) -> bool:
    """Require a static bool."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, jax.core.Tracer):
        fix = f"list {argument} in static_argnames"
        if argument == "train":
            fix = f"pass rate=jnp.where(train, rate, 0.), or {fix}"
        raise TypeError(text(function, argument, "must be static", "a traced value", fix))
    raise TypeError(text(function, argument, "must be a bool", describe(value), f"pass {argument}=True or False"))


def rate(
    function: str, value: Any, shape: Sequence[int], argument: str = "rate", high: float = 1.0
) -> np.ndarray | Array:
    """Require a drop probability, or an array of them that broadcasts to a mask's shape.

    Python and NumPy values come back as NumPy arrays, checked to lie in [0, high]; arrays of JAX are never
    read. What is no scalar comes back with the mask's number of axes. Another ``argument`` in the place of a
    rate may have another upper limit.
    """
    meaning = "the probability of dropping" if high <= 1 else "a number of at least 0"
    if is_typed_key(value) or not isinstance(value, (int, float, np.ndarray, np.generic, jax.Array)):
        fix = f"pass a float, {meaning}"
        raise TypeError(text(function, argument, "must be a number or an array", describe(value), fix))
    concrete = not isinstance(value, jax.Array)
    number = isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))
    probability: Any = np.asarray(_float(value) if number else value) if concrete else value
    if probability.dtype.name not in FLOATS:
        fix = "convert it to float32"
        raise TypeError(text(function, argument, "must be a real floating point number", describe(value), fix))
    if concrete and not np.all((probability >= 0) & (probability <= high) & np.isfinite(probability)):
        rule = f"must lie in [0, {high:g}]"
        raise ValueError(text(function, argument, rule, describe(value), f"pass {meaning}"))
    broadcasts(function, argument, probability, shape, "the mask's shape")
    return ranked(probability, len(shape))


def index(value: Any) -> int:
    """``operator.index``, which takes a bool for an integer."""
    if isinstance(value, bool):
        raise TypeError("a bool")
    return operator.index(value)


def axes(function: str, argument: str, value: Any, ndim: int) -> tuple[int, ...]:
    """Require distinct axes of an array, negative ones allowed, and return them counted from 0, in the order given."""
    try:
        found = [index(a) for a in (value if isinstance(value, Iterable) else (value,))]
    except TypeError:
        fix = "pass an int or a sequence of ints"
        raise TypeError(text(function, argument, "must be axes", describe(value), fix)) from None
    if any(not -ndim <= a < ndim for a in found):
        fix = f"use axes from {-ndim} to {ndim - 1}" if ndim else "an array without axes takes none"
        raise ValueError(text(function, argument, f"must be axes of an array with {ndim} axes", describe(value), fix))
    canonical = tuple(a % ndim for a in found)
    if len(set(canonical)) != len(canonical):
        raise ValueError(text(function, argument, "must not repeat an axis", describe(value), "name each axis once"))
    return canonical


def axis(function: str, argument: str, value: Any, ndim: int) -> int:
    """Require one axis of an array, and return it counted from 0."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, (bool, np.bool_)):
        raise TypeError(text(function, argument, "must be an axis", describe(value), "pass an int"))
    return axes(function, argument, value, ndim)[0]


def different_axes(function: str, ndim: int, **named: Any) -> tuple[int, ...]:
    """Require axes that are all different, and return them in the order given."""
    owner: dict[int, str] = {}
    for argument, value in named.items():
        for one in axes(function, argument, value, ndim):
            if one in owner:
                rule = f"must be none of {owner[one]}"
                raise ValueError(text(function, argument, rule, value, "name each axis once"))
            owner[one] = argument
    return tuple(owner)


def choice(function: str, argument: str, value: Any, choices: Sequence[str]) -> None:
    """Require one of a few strings."""
    if not isinstance(value, str) or value not in choices:
        options = " or ".join(map(repr, choices))
        raise ValueError(text(function, argument, f"must be {options}", describe(value), "pick one of them"))


def sizes(function: str, argument: str, value: Any) -> tuple[Any, ...]:
    """Require a shape: a sequence of sizes, symbolic ones allowed."""
    fix = "pass a tuple of sizes, such as x.shape"
    try:
        found = tuple(n if jax.export.is_symbolic_dim(n) else index(n) for n in value)
    except TypeError:
        raise TypeError(text(function, argument, "must be a sequence of sizes", describe(value), fix)) from None
    if any(isinstance(n, int) and n < 0 for n in found):
        raise ValueError(text(function, argument, "must not be negative", describe(value), fix))
    return found


def number(function: str, argument: str, value: Any, low: float, high: float) -> float:
    """Require a finite Python or NumPy number within limits."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(text(function, argument, "must be a number", describe(value), "pass a Python float"))
    found = _float(value)
    if not low <= found <= high or np.isinf(found):
        limits = f"must lie in [{low:g}, {high:g}]" if np.isfinite(high) else f"must be finite and at least {low:g}"
        limits = "must be finite" if low == -np.inf else limits
        raise ValueError(text(function, argument, limits, describe(value), "pass a number within the limits"))
    return found


def _float(value: Any) -> float:
    """``float``, and infinity for what is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return np.inf if value > 0 else -np.inf


def count(function: str, argument: str, value: Any, low: int = 1) -> int:
    """Require a Python or NumPy integer of at least ``low``."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(text(function, argument, "must be an integer", describe(value), "pass a Python int"))
    if value < low:
        raise ValueError(text(function, argument, f"must be at least {low}", value, "pass a larger int"))
    return int(value)


def broadcasts(function: str, argument: str, value: Any, shape: Sequence[Any], of: str = "shape") -> None:
    """Require an array that broadcasts to a shape."""
    if not is_array(value):
        raise TypeError(text(function, argument, "must be an array", describe(value), "convert it with jnp.asarray"))
    sizes = tuple(value.shape)
    if len(sizes) > len(shape) or any(n not in (1, m) for n, m in zip(sizes[::-1], tuple(shape)[::-1])):
        rule = f"must broadcast to {of} {tuple(shape)}"
        raise ValueError(text(function, argument, rule, f"shape {sizes}", "give it these sizes or 1"))


def ranked(value: Array, ndim: int) -> Array:
    """Give an array that broadcasts leading axes of size 1, as many as it lacks; a scalar stays one."""
    return value.reshape((1,) * (ndim - value.ndim) + value.shape) if value.ndim else value
