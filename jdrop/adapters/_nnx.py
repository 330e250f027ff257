"""Mode, keys, and the conditional of the layers for Flax nnx."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import Array

from jdrop._checks import as_bool
from jdrop.adapters import _layer
from jdrop.adapters._depth import Decision

NAMES = _layer.Names(
    data="inputs",
    rate="rate",
    key="rngs",
    make_key="pass nnx.Rngs(dropout=seed), or a key of jax.random.key",
    map_keys="pass one key; nnx.vmap under nnx.split_rngs gives each example its own",
)
Rngs = nnx.Rngs | nnx.RngStream | None


def is_training(function: str, layer: nnx.Dropout, deterministic: bool | None) -> bool:
    """Tell the mode: that of the call goes first."""
    inactive = layer.deterministic if deterministic is None else deterministic
    if inactive is None:
        raise ValueError(
            f"{function}: deterministic must be passed, got None; "
            "pass it to the constructor or to the call, or set it with nnx.view"
        )
    return not as_bool(function, "deterministic", inactive)


def key_getter(function: str, layer: nnx.Dropout, rngs: Rngs | Array) -> Callable[[], Any]:
    """Return a function that takes the next key: rngs of the call go first."""
    stream: Any = layer.rngs if rngs is None else rngs

    def get_key() -> Any:
        if isinstance(stream, jax.Array):
            return stream
        if isinstance(stream, nnx.RngStream):
            return stream()
        collection = layer.rng_collection
        if not isinstance(stream, nnx.Rngs):
            wrong = ValueError if stream is None else TypeError
            raise wrong(
                f"{function}: rngs must be nnx.Rngs, a stream or a key, got {stream!r}; "
                f"pass rngs=nnx.Rngs({collection}=seed) to the constructor or to the call"
            )
        try:
            return stream[collection]()
        except KeyError:
            raise ValueError(
                f"{function}: rngs must have the stream {collection!r}, or a default, got {list(stream)}; "
                f"pass nnx.Rngs({collection}=seed)"
            ) from None

    return get_key


def rngs_of_branch(branch: Any, rngs: Rngs | Array) -> dict[str, Any]:
    """Return the keyword argument ``rngs`` of a branch that takes it, as ``nnx.Sequential`` does.

    A key does not go there, because the decision has used it.
    """
    takes = isinstance(rngs, (nnx.Rngs, nnx.RngStream)) and "rngs" in inspect.signature(branch).parameters
    return {"rngs": rngs} if takes else {}


def run_or_skip(decision: Decision, add: Callable[..., Array], branch: Any, rngs: dict[str, Any], x: Array) -> Array:
    """Return ``add(branch, rngs, x)`` if the branch is kept, and x otherwise."""
    if decision.is_known:
        return add(branch, rngs, x) if decision.kept else x
    if isinstance(branch, nnx.Module):
        return nnx.cond(decision.kept, add, lambda branch, rngs, x: x, branch, rngs, x)
    return nnx.cond(decision.kept, lambda rngs, x: add(branch, rngs, x), lambda rngs, x: x, rngs, x)
