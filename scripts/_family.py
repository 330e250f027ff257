"""The members of the family, each compared with its own floor, for ``bench_dropout.py --family``."""

import functools
import os
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

import _bench
import _clocks
import jax
import jax.numpy as jnp

import jdrop

RATE = 0.1
SCALE = 1 / (1 - RATE)


class Case(NamedTuple):
    """One row of the table."""

    member: str
    direction: str
    contender: str


class Member(NamedTuple):
    """A member, its floor and limit, and its equivalents in other libraries."""

    name: str
    shape: tuple[int, ...]
    limit: float
    floor_name: str
    floor: _bench.Drop
    drop: _bench.Drop
    torch: Callable[[Any, Any], Any] | None = None  # (torch.nn.functional, x) -> y
    timm: Callable[[Any, Any], Any] | None = None  # (timm.layers.drop, x) -> y
    keras: Callable[[Any], Any] | None = None  # keras.layers -> layer
    linen_broadcast: tuple[int, ...] | None = None  # broadcast_dims of Flax's Dropout


def scale(key: Any, x: jax.Array) -> jax.Array:
    return x * SCALE


def members(small: bool) -> list[Member]:
    """Return the members, with 4 M float32 elements each, or with tiny arrays."""
    flat = (64, 128) if small else (4096, 1024)
    steps = (4, 8, 64) if small else (64, 64, 1024)
    image = (2, 16, 16, 8) if small else (32, 32, 64, 64)
    channels_first = (image[0], image[3], *image[1:3])
    vector, matrix = jnp.ones(flat[-1:]), jnp.ones(flat)
    ids = jnp.arange(steps[0] * steps[1]).reshape(steps[:2]) % 1000
    train = {"train": True}

    def plain(
        name: str, f: Callable[..., Any], shape: tuple[int, ...] = flat, limit: float = 1.2, **peers: Any
    ) -> Member:
        drop = lambda key, x: f(key, x, RATE, **train)
        return Member(name, shape, limit, "x * c", scale, drop, **peers)

    def pool(key: Any, x: jax.Array) -> jax.Array:
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 7, 7, 1), (1, 1, 1, 1), "SAME")

    tokens = lambda key, x: jdrop.token_dropout(key, jax.lax.bitcast_convert_type(x, jnp.int32), RATE, 3, **train)
    return [
        plain("dropout", jdrop.dropout, torch=lambda f, x: f.dropout(x, RATE), keras=lambda k: k.Dropout(RATE)),
        plain(
            "alpha_dropout",
            jdrop.alpha_dropout,
            torch=lambda f, x: f.alpha_dropout(x, RATE, training=True),
            keras=lambda k: k.AlphaDropout(RATE),
        ),
        plain("gaussian_dropout", jdrop.gaussian_dropout, limit=3.0, keras=lambda k: k.GaussianDropout(RATE)),
        plain("gaussian_noise", jdrop.gaussian_noise, limit=3.0, keras=lambda k: k.GaussianNoise(RATE)),
        plain(
            "channel_dropout",
            jdrop.channel_dropout,
            image,
            keras=lambda k: k.SpatialDropout2D(RATE),
            linen_broadcast=(1, 2),
        ),
        plain(
            "drop_path", jdrop.drop_path, linen_broadcast=(1,), timm=lambda d, x: d.drop_path(x, RATE, training=True)
        ),
        plain("drop_connect", jdrop.drop_connect),
        plain("embedding_dropout", jdrop.embedding_dropout, linen_broadcast=(1,)),
        plain("embedding_dropout, ids", functools.partial(jdrop.embedding_dropout, ids=ids), steps),
        plain("locked_dropout", functools.partial(jdrop.locked_dropout, time_axis=1), steps, linen_broadcast=(1,)),
        Member("token_dropout", flat, 1.2, "x + 1", lambda k, x: x + 1, tokens),
        Member(
            "zoneout",
            flat,
            1.2,
            "c x + d old",
            lambda k, x: (1 - RATE) * x + RATE * matrix,
            lambda k, x: jdrop.zoneout(k, x, RATE, matrix, **train),
        ),
        Member(
            "bias_dropout_add",
            flat,
            1.2,
            "c (x + b) + r",
            lambda k, x: (x + vector[None]) * SCALE + matrix,
            lambda k, x: jdrop.bias_dropout_add(k, x, RATE, vector, matrix, **train),
        ),
        Member(
            "drop_block",
            image,
            1.5,
            "7 x 7 max-pool",
            pool,
            lambda k, x: jdrop.drop_block(k, x, RATE, 7, spatial_axes=(1, 2), **train),
            timm=lambda d, x: d.drop_block_2d(x.view(channels_first), RATE, 7, couple_channels=False).view_as(x),
        ),
    ]


def peers_of(member: Member, peers: Sequence[str]) -> dict[str, _bench.Drop]:
    """Return the equivalents of a member in other JAX libraries."""
    found: dict[str, _bench.Drop] = {}
    if member.linen_broadcast is not None and "linen" in peers and find_spec("flax"):
        from flax import linen

        layer = linen.Dropout(RATE, broadcast_dims=member.linen_broadcast, deterministic=False)
        found["linen"] = lambda key, x: layer.apply({}, x, rngs={"dropout": key})
    if member.keras is not None and "keras" in peers and find_spec("keras"):
        os.environ["KERAS_BACKEND"] = "jax"
        import keras

        def stateless(key: Any, x: jax.Array) -> Any:
            layer = member.keras(keras.layers)
            state = [jax.random.key_data(key)]
            return layer.stateless_call([], state, x, training=True)[0]

        found["keras"] = stateless
    return found


def torch_peers_of(member: Member, peers: Sequence[str]) -> dict[str, Callable[[Any, Any], Any]]:
    """Return the equivalents of a member in PyTorch and timm."""
    found: dict[str, Callable[[Any, Any], Any]] = {}
    if member.torch and "torch" in peers:
        found["torch"] = member.torch
    if member.timm and "timm" in peers and (layers := timm_layers()):
        found["timm"] = lambda f, x: member.timm(layers, x)
    return found


def timm_layers() -> Any:
    """Import only the file ``timm.layers.drop``, which needs torch but not torchvision as the package does; or None."""
    package = find_spec("timm")
    if package is None or find_spec("torch") is None:
        return None
    file = Path(package.submodule_search_locations[0], "layers", "drop.py")
    spec = spec_from_file_location("timm_drop", file)
    layers = module_from_spec(spec)
    spec.loader.exec_module(layers)
    return layers


def clocks(member: Member, peers: Sequence[str], calls: int) -> dict[Case, _clocks.Clock]:
    """Return the clocks of a member, forward only for integers, which have no gradient."""
    directions = _clocks.DIRECTIONS[:1] if member.name == "token_dropout" else _clocks.DIRECTIONS
    data = _clocks.draws(member.shape, 4)
    inputs = _clocks.jax_inputs(data, "float32")
    found: dict[Case, _clocks.Clock] = {}
    for direction in directions:
        drops = {member.floor_name: member.floor, "jdrop": member.drop, **peers_of(member, peers)}
        for name, drop in drops.items():
            step = _clocks.jax_step(drop, direction)
            found[Case(member.name, direction, name)] = _clocks.Clock(step, inputs, calls, jax.block_until_ready)
        for name, drop in torch_peers_of(member, peers).items():
            clock = _clocks.torch_clock(drop, data, "float32", direction, calls)
            if isinstance(clock, _clocks.Clock):
                found[Case(member.name, direction, name)] = clock
    return found


def measure(peers: Sequence[str], rounds: int, calls: int, *, small: bool) -> list[dict[str, Any]]:
    """Time all members, and print a table."""
    rows: list[dict[str, Any]] = []
    for member in members(small):
        block = clocks(member, peers, calls)
        for clock in block.values():
            clock(), clock()
        times = _bench.interleave([block], rounds)
        for case, values in times.items():
            floor = times[case._replace(contender=member.floor_name)]
            ratio, low, high = _bench.ratios(values, floor)
            limit = member.limit if case.contender == "jdrop" else None
            line = {"milliseconds": 1e3 * _bench.median(values), "ratio": ratio, "ratio_25": low, "ratio_75": high}
            rows.append({**case._asdict(), **line, "limit": limit})
    rows += depth(rounds, small=small)
    columns = ("member", "direction", "contender", "ms", "x floor", "25%", "75%", "limit")
    _bench.table("the family, float32, rate 0.1", columns, [list(r.values()) for r in rows])
    return rows


def depth(rounds: int, *, small: bool) -> list[dict[str, Any]]:
    """Measure the mean time of a layer under stochastic_depth relative to a layer that always runs."""
    width = 64 if small else 1024
    w = jnp.ones((width, width)) / width
    x = jnp.ones((width, width))

    def step(drop: Callable[[Any, Any], Any]) -> Any:
        return jax.jit(jax.value_and_grad(lambda w, k: drop(k, lambda x: jnp.tanh(x @ w) @ w).sum()))

    steps = {
        "x + fn(x)": step(lambda k, fn: x + fn(x)),
        "jdrop": step(lambda k, fn: jdrop.stochastic_depth(k, x, 0.5, fn, train=True)),
    }
    keys = list(jax.random.split(jax.random.key(0), 20))

    def clock(f: Any) -> float:
        start = time.perf_counter()
        for key in keys:
            jax.block_until_ready(f(w, key))
        return (time.perf_counter() - start) / len(keys)

    cases = {Case("stochastic_depth 0.5", "forward+backward", n): functools.partial(clock, f) for n, f in steps.items()}
    for f in steps.values():
        jax.block_until_ready(f(w, keys[0]))
    kept = sum(bool(jdrop.dropout_mask(jax.random.clone(key), (), 0.5)) for key in keys) / len(keys)
    times = _bench.interleave([cases], max(2, rounds // 10))
    rows = []
    for case, values in times.items():
        ratio, low, high = _bench.ratios(values, times[case._replace(contender="x + fn(x)")])
        line = {"milliseconds": 1e3 * _bench.median(values), "ratio": ratio, "ratio_25": low, "ratio_75": high}
        rows.append({**case._asdict(), **line, "limit": kept if case.contender == "jdrop" else None})
    return rows
