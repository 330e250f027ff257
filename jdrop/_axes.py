"""Checks of shapes and axes."""

import operator
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jdrop._errors import describe


def as_index(value: Any) -> int:
    """Return ``operator.index(value)``, but refuse a bool."""
    if isinstance(value, bool):
        raise TypeError("a bool")
    return operator.index(value)


def as_shape(function: str, argument: str, value: Any) -> tuple[Any, ...]:
    """Require a shape: a sequence of sizes, which may be symbolic."""
    fix = "pass a tuple of sizes, such as x.shape"
    try:
        sizes = tuple(n if jax.export.is_symbolic_dim(n) else as_index(n) for n in value)
    except TypeError:
        raise TypeError(f"{function}: {argument} must be a sequence of sizes, got {describe(value)}; {fix}") from None
    if any(isinstance(n, int) and n < 0 for n in sizes):
        raise ValueError(f"{function}: {argument} must not be negative, got {describe(value)}; {fix}")
    return sizes


def as_axes(function: str, argument: str, value: Any, ndim: int) -> tuple[int, ...]:
    """Require distinct axes of an array, and return them in the same order, counted from 0."""
    try:
        axes = [as_index(a) for a in (value if isinstance(value, Iterable) else (value,))]
    except TypeError:
        raise TypeError(
            f"{function}: {argument} must be axes, got {describe(value)}; pass an int or a sequence of ints"
        ) from None
    if any(not -ndim <= a < ndim for a in axes):
        fix = f"use axes from {-ndim} to {ndim - 1}" if ndim else "an array without axes takes none"
        raise ValueError(
            f"{function}: {argument} must be axes of an array with {ndim} axes, got {describe(value)}; {fix}"
        )
    canonical = tuple(a % ndim for a in axes)
    if len(set(canonical)) != len(canonical):
        raise ValueError(f"{function}: {argument} must not repeat an axis, got {describe(value)}; name each axis once")
    return canonical


def as_axis(function: str, argument: str, value: Any, ndim: int) -> int:
    """Require one axis of an array, and return it counted from 0."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, (bool, np.timedelta64)):
        raise TypeError(f"{function}: {argument} must be an axis, got {describe(value)}; pass an int")
    return as_axes(function, argument, value, ndim)[0]


def as_different_axes(function: str, ndim: int, **named: Any) -> tuple[int, ...]:
    """Require axes that all differ, and return them in the same order, counted from 0."""
    owner: dict[int, str] = {}
    for argument, value in named.items():
        for axis in as_axes(function, argument, value, ndim):
            if axis in owner:
                raise ValueError(
                    f"{function}: {argument} must be none of {owner[axis]}, got {value}; name each axis once"
                )
            owner[axis] = argument
    return tuple(owner)


def all_axes_but(axes: Iterable[int], ndim: int) -> tuple[int, ...]:
    """Return the other axes of an array."""
    excluded = set(axes)
    return tuple(axis for axis in range(ndim) if axis not in excluded)
