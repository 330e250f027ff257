"""Mode, keys, and the conditional of the layers for Equinox."""

import warnings
from collections.abc import Callable
from typing import Any

from jax import Array

import jdrop
from jdrop._checks import check_key
from jdrop._family import depth
from jdrop.adapters import _layer
from jdrop.adapters._depth import Decision

NAMES = _layer.Names(
    data="x",
    rate="p",
    key="key",
    make_key="pass key=jax.random.key(seed)",
    map_keys="use jax.vmap over x and keys",
)


def renamed(inference: Any, deterministic: bool | None) -> Any:
    """Return ``inference``, or its deprecated name with a warning."""
    if deterministic is None:
        return inference
    warnings.warn("deterministic is deprecated, as in Equinox; pass inference", stacklevel=3)
    return deterministic


def require_key(function: str, key: Array | None) -> Array:
    """Require a key, because something is dropped; ``None`` is a RuntimeError, as in Equinox."""
    if key is None:
        raise RuntimeError(
            f"{function}: key must be a PRNG key when something is dropped, got None; "
            "pass key=jax.random.key(seed), or inference=True, or p=0."
        )
    return key


def two_keys(function: str, key: Array | None, branch_key: Array | None) -> tuple[Array | None, Array | None]:
    """Return the keys of the decision and of the branch: that of the branch is derived, if it is not passed."""
    if key is None or branch_key is not None:
        return key, branch_key
    check_key(function, key, make_key=NAMES.make_key, map_keys=NAMES.map_keys)
    return key, jdrop.keys.derive(key, function)


def run_or_skip(decision: Decision, add: Callable[[Array, Any], tuple[Array, Any]], x: Array, state: Any) -> Any:
    """Return ``add(x, state)`` if the branch is kept, and ``(x, state)`` otherwise."""
    if decision.is_known:
        return add(x, state) if decision.kept else (x, state)
    y, new = depth.run_or_skip(decision.kept, lambda operands: add(*operands), (x, state))
    return y, None if state is None else state.update(new)  # this marks the old state as used, as Equinox does
