"""Checks of the arguments of attention."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop._checks import as_count, as_number, check_array, check_broadcastable, check_integers
from jdrop._errors import describe
from jdrop._platform import Target
from jdrop._prepare import Arguments
from jdrop._sharding import explicit_sharding
from jdrop._types import FLOATS

NAME = "dot_product_attention"


def check_data(query: Array, key: Array, value: Array) -> None:
    for argument, x in (("query", query), ("key", key), ("value", value)):
        check_array(NAME, argument, x, FLOATS)
        if x.ndim not in (3, 4):
            raise ValueError(
                f"{NAME}: {argument} must be [batch, length, heads, width] or [length, heads, width], "
                f"got {describe(x)}; reshape it"
            )
    if key.dtype != query.dtype or value.dtype != query.dtype:
        raise TypeError(
            f"{NAME}: query, key and value must have one dtype, got {query.dtype}, {key.dtype} and {value.dtype}; "
            "convert them"
        )
    if value.shape != key.shape:
        raise ValueError(
            f"{NAME}: value must have the shape of key, {key.shape}, got {value.shape}; "
            "give each key a value of the same width"
        )
    if query.ndim != key.ndim or query.shape[:-3] != key.shape[:-3] or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"{NAME}: key must have batch and width of query, {query.shape}, got {key.shape}; "
            "give them the same batch and width"
        )
    if key.shape[-2] == 0 or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"{NAME}: key must have a number of heads that divides query's, got {key.shape[-2]} for {query.shape[-2]}; "
            "group query heads evenly"
        )


def check_sharding(query: Array, key: Array, value: Array) -> None:
    """On an explicit mesh, require unsharded keys and width: sums over them would need communication."""
    for argument, x, axes in (("query", query, (3,)), ("key", key, (1, 3)), ("value", value, (1, 3))):
        sharding = explicit_sharding(jax.typeof(x).sharding)
        if sharding is not None and any(sharding.spec[axis] for axis in axes):
            raise ValueError(
                f"{NAME}: {argument} must not be sharded along {'width' if argument == 'query' else 'keys and width'}, "
                f"got {jax.typeof(x)}; use jax.sharding.reshard first"
            )


def as_scores(argument: str, x: Array | None, shape: tuple[int, ...], dtypes: Sequence[str]) -> Array | None:
    """Require an array that broadcasts to [B, N, T, S], and give it four axes."""
    if x is None:
        return None
    check_broadcastable(NAME, argument, x, shape, "[batch, heads, queries, keys] =")
    if x.dtype.name not in dtypes:
        kind, fix = ("bool", "pass x != 0") if dtypes == ("bool",) else ("floating", "convert it")
        raise TypeError(f"{NAME}: {argument} must be {kind}, got {describe(x)}; {fix}")
    return jnp.reshape(x, (1,) * (4 - x.ndim) + x.shape)


def as_lengths(argument: str, x: Array | None, batch: int) -> Array | None:
    """Require one length per example, and reshape them to four axes."""
    if x is None:
        return None
    check_integers(NAME, argument, x)
    if x.shape != (batch,):
        raise ValueError(f"{NAME}: {argument} must have shape {(batch,)}, got {x.shape}; pass one per example")
    most = np.iinfo(np.int32).max  # longer lengths also mean everything
    if np.iinfo(x.dtype).max > most:
        clip = jnp if isinstance(x, Array) else np
        x = clip.clip(x, max(-most, np.iinfo(x.dtype).min), most)
    return jnp.reshape(jnp.asarray(x.astype(np.int32)), (batch, 1, 1, 1))


def as_window(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = size if isinstance(size, tuple) and len(size) == 2 else (size, size)
    left, right = (min(as_count(NAME, "local_window_size", n, low=0), 2**31 - 1) for n in pair)
    return left, right


def as_scale(query: Array, scale: Any) -> float | Array:
    """Require a number, or a scalar array. ``None`` means ``1 / sqrt(H)``."""
    if scale is None:
        return float(max(query.shape[-1], 1) ** -0.5)
    if isinstance(scale, Array):
        check_array(NAME, "scale", scale, FLOATS)
        check_broadcastable(NAME, "scale", scale, ())
        return scale
    return as_number(NAME, "scale", scale, -np.inf, np.inf)


def check_whole_keys(arguments: Arguments) -> None:
    """Require ``shard=`` not to split the keys."""
    if any(arguments.tile_axes[3:]):
        raise ValueError(
            f"{NAME}: shard must not split the keys, got {arguments.shard}; "
            "gather keys and values first: a softmax needs all of them"
        )


def check_target(target: Target, implementation: str, platforms: tuple[str, ...]) -> None:
    """Require a platform that can run the kernels of an implementation, and no mesh that would partition them."""
    if target.name not in platforms:
        raise NotImplementedError(
            f"{NAME}: implementation must be one for the platform {target.name}, got {implementation!r}; pass None"
        )
    if target.devices > 1:
        raise NotImplementedError(
            f"{NAME}: implementation must be another one on an automatic mesh of {target.devices} devices, "
            f"got {implementation!r}; use jax.shard_map, or an explicit mesh"
        )
