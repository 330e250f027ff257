"""Benchmarks of the family members in tests/members.py, each against its own floor (``bench_dropout.py --family``)."""

import functools
import os
import sys
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

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from members import MEMBERS, RATE, Bench


class Case(NamedTuple):
    """One line of the table."""

    member: str
    direction: str
    contender: str


def shapes(small: bool) -> dict[str, tuple[int, ...]]:
    """Return shapes of 4 M float32 elements each, or tiny ones."""
    if small:
        return {"flat": (64, 128), "steps": (4, 8, 64), "image": (2, 16, 16, 8)}
    return {"flat": (4096, 1024), "steps": (64, 64, 1024), "image": (32, 32, 64, 64)}


def calls_of(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the floor and the member as functions of a key, x, and the operands of the benchmark."""
    member, bench = MEMBERS[name], MEMBERS[name].bench
    return bench.floor, bench.drop or (lambda key, x: member(key, x, RATE, train=True))


def peers_of(member: Bench, peers: Sequence[str]) -> dict[str, _bench.Drop]:
    """Return the equivalents of a member in other JAX libraries."""
    drops_by_peer: dict[str, _bench.Drop] = {}
    if member.linen_broadcast is not None and "linen" in peers and find_spec("flax"):
        from flax import linen

        layer = linen.Dropout(RATE, broadcast_dims=member.linen_broadcast, deterministic=False)
        drops_by_peer["linen"] = lambda key, x: layer.apply({}, x, rngs={"dropout": key})
    if member.keras is not None and "keras" in peers and find_spec("keras"):
        os.environ["KERAS_BACKEND"] = "jax"
        import keras

        def stateless(key: Any, x: jax.Array) -> Any:
            layer = member.keras(keras.layers)
            state = [jax.random.key_data(key)]
            return layer.stateless_call([], state, x, training=True)[0]

        drops_by_peer["keras"] = stateless
    return drops_by_peer


def torch_peers_of(member: Bench, peers: Sequence[str]) -> dict[str, Callable[[Any, Any], Any]]:
    """Return the equivalents of a member in PyTorch and timm."""
    drops_by_peer: dict[str, Callable[[Any, Any], Any]] = {}
    if member.torch and "torch" in peers:
        drops_by_peer["torch"] = member.torch
    if member.timm and "timm" in peers and (layers := timm_layers()):
        drops_by_peer["timm"] = lambda f, x: member.timm(layers, x)
    return drops_by_peer


def timm_layers() -> Any:
    """Load only the file ``timm/layers/drop.py``, which needs torch but not torchvision; None if not installed."""
    package = find_spec("timm")
    if package is None or find_spec("torch") is None:
        return None
    file = Path(package.submodule_search_locations[0], "layers", "drop.py")
    spec = spec_from_file_location("timm_drop", file)
    layers = module_from_spec(spec)
    spec.loader.exec_module(layers)
    return layers


def clocks(name: str, peers: Sequence[str], calls: int, *, small: bool) -> dict[Case, _clocks.Clock]:
    """Return the clocks of a member and its peers."""
    bench = MEMBERS[name].bench
    shape = shapes(small)[bench.shape]
    data = _clocks.random_arrays(shape, 4)
    inputs = _clocks.jax_inputs(data, "float32")
    operands = bench.operands(shape)
    with_operands = (call + operands for call in inputs)  # as arguments, because XLA folds constants
    floor, ours = calls_of(name)
    clock_of: dict[Case, _clocks.Clock] = {}
    for direction in bench.directions:
        for contender, drop in {bench.floor_name: floor, "jdrop": ours}.items():
            step = _clocks.jax_step(drop, direction)
            clock_of[Case(name, direction, contender)] = _clocks.Clock(
                step, with_operands, calls, jax.block_until_ready
            )
        for contender, drop in peers_of(bench, peers).items():
            step = _clocks.jax_step(drop, direction)
            clock_of[Case(name, direction, contender)] = _clocks.Clock(step, inputs, calls, jax.block_until_ready)
        for contender, drop in torch_peers_of(bench, peers).items():
            clock = _clocks.torch_clock(drop, data, "float32", direction, calls)
            if isinstance(clock, _clocks.Clock):
                clock_of[Case(name, direction, contender)] = clock
    return clock_of


def measure(peers: Sequence[str], rounds: int, calls: int, *, small: bool) -> list[dict[str, Any]]:
    """Time all members, and print a table."""
    rows: list[dict[str, Any]] = []
    for name, bench in ((name, member.bench) for name, member in MEMBERS.items() if isinstance(member.bench, Bench)):
        block = clocks(name, peers, calls, small=small)
        for clock in block.values():
            clock(), clock()
        times = _bench.interleave([block], rounds)
        for case, values in times.items():
            floor = times[case._replace(contender=bench.floor_name)]
            ratio, low, high = _bench.ratios(values, floor)
            limit = bench.limit if case.contender == "jdrop" else None
            line = {"milliseconds": 1e3 * _bench.median(values), "ratio": ratio, "ratio_25": low, "ratio_75": high}
            rows.append({**case._asdict(), **line, "limit": limit})
    rows += depth(rounds, small=small)
    columns = ("member", "direction", "contender", "ms", "x floor", "25%", "75%", "limit")
    _bench.table("the family, float32, rate 0.1", columns, [list(r.values()) for r in rows])
    return rows


def depth(rounds: int, *, small: bool) -> list[dict[str, Any]]:
    """Time a layer under stochastic_depth, relative to a layer that always runs."""
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
