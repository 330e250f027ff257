"""Shared code of the benchmarks: contenders, a model, a timing loop on warm buffers, tables, and JSON."""

import ctypes
import importlib.metadata
import json
import math
import os
import platform
import random
import shlex
import statistics
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import jdrop

Drop = Callable[[Any, Array], Array]  # (key, x) -> y
DISTRIBUTIONS = {
    "linen": "flax",
    "nnx": "flax",
    "equinox": "equinox",
    "haiku": "dm-haiku",
    "torch": "torch",
    "keras": "keras",
    "timm": "timm",
}
JAX_PEERS = ("linen", "nnx", "equinox", "haiku")
NONE, SCALE = "no dropout", "scale"
MISSING = "not installed"

# ---------------------------------------------------------------------------------- contenders


def contenders(rate: float) -> dict[str, Drop]:
    """Return the contenders that need only JAX and jdrop; ``scale`` is the floor."""
    return {
        SCALE: lambda key, x: x * (1 / (1 - rate)),
        "jdrop fast": lambda key, x: jdrop.dropout(key, x, rate, train=True),
        "jdrop jax": lambda key, x: jdrop.dropout(key, x, rate, train=True, generator="jax"),
        "where(bernoulli)": lambda key, x: jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0),
    }


def peer(name: str, rate: float) -> Drop:
    """Return dropout of another JAX library as its users call it, as a function of a key and x.

    Raises:
      ImportError: the library is not installed.
    """
    if name == "linen":
        from flax import linen

        return lambda key, x: linen.Dropout(rate, deterministic=False).apply({}, x, rngs={"dropout": key})
    if name == "nnx":
        from flax import nnx

        return lambda key, x: nnx.Dropout(rate, deterministic=False, rngs=nnx.Rngs(dropout=key))(x)
    if name == "equinox":
        import equinox

        return lambda key, x: equinox.nn.Dropout(rate)(x, key=key)
    import haiku

    return lambda key, x: haiku.dropout(key, rate, x)


def peers(names: Sequence[str], rate: float) -> dict[str, Drop | None]:
    """Return the JAX peers with these names, and ``None`` for peers that are not installed."""
    drops: dict[str, Drop | None] = {}
    for name in names:
        try:
            drops[name] = peer(name, rate)
        except ImportError:
            drops[name] = None
    return drops


def model_contenders(drops: Mapping[str, Drop | None]) -> dict[str, tuple[Drop | None, Array | None]]:
    """Return the contenders for a model, starting with no dropout, each with the key that the model splits."""
    none: dict[str, tuple[Drop | None, Array | None]] = {NONE: (lambda key, x: x, None)}
    return none | {name: (drop, None if name == SCALE else jax.random.key(0)) for name, drop in drops.items()}


def peer_names(chosen: Sequence[str]) -> list[str]:
    """Return the peers that an option selects; ``none`` selects no peer."""
    return [name for name in chosen if name != "none"]


# ---------------------------------------------------------------------------------- a model

Params = dict[str, Array]


def transformer_weights(layers: int, width: int, stacked: bool) -> Any:
    """Return the weight shapes of a transformer: a list of layers, or one dict of stacked arrays to scan over.

    Shapes are enough to compile the model.
    """
    sizes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    sizes |= {f"{name}_bias": size[1:] for name, size in sizes.items()}
    sizes |= {name: (width,) for name in ("norm1", "norm1_bias", "norm2", "norm2_bias")}

    def shapes_of(*stack: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct((*stack, *size), jnp.float32) for name, size in sizes.items()}

    return shapes_of(layers) if stacked else [shapes_of() for _ in range(layers)]


Norm = Callable[[Array], Array]


def one_pass(x: Array) -> Array:
    """Standardize by ``E[x^2] - E[x]^2``, as ``jax.nn.standardize`` and the layer norm of Flax do."""
    return jax.nn.standardize(x, epsilon=1e-6)


def two_pass(x: Array) -> Array:
    """Standardize by ``E[(x - E[x])^2]``, as hand-written models do."""
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


def transformer(
    params: Any,
    key: Array | None,
    x: Array,
    drop: Drop,
    *,
    heads: int,
    standardize: Norm = one_pass,
    checkpoint: bool = False,
) -> Array:
    """Return the loss of a transformer on ``[..., time, width]`` with ``1 + 3 * layers`` dropouts.

    Dropout is applied to the input and, in each layer, to the attention probabilities ``[..., heads, time, time]`` and
    to both residual branches. All keys come from one split, if ``key`` is not ``None``.
    """
    layers = jax.tree.leaves(params)[0].shape[0] if isinstance(params, dict) else len(params)
    keys = [None] * (1 + 3 * layers) if key is None else jax.random.split(key, 1 + 3 * layers)

    def norm(p: Params, name: str, x: Array) -> Array:
        return standardize(x) * p[name] + p[name + "_bias"]

    def dense(p: Params, name: str, x: Array) -> Array:
        return x @ p[name] + p[name + "_bias"]

    def layer(p: Params, keys: Any, x: Array) -> Array:
        q, k, v = jnp.split(dense(p, "qkv", norm(p, "norm1", x)).reshape(*x.shape[:-1], heads, -1), 3, axis=-1)
        probability = jax.nn.softmax(jnp.einsum("...the,...she->...hts", q, k) / math.sqrt(q.shape[-1]))
        mixed = jnp.einsum("...hts,...she->...the", drop(keys[0], probability), v)
        x = x + drop(keys[1], dense(p, "out", mixed.reshape(x.shape)))
        return x + drop(keys[2], dense(p, "down", jax.nn.gelu(dense(p, "up", norm(p, "norm2", x)))))

    if checkpoint:
        layer = jax.checkpoint(layer)
    x = drop(keys[0], x)
    if isinstance(params, dict):
        stacked = [None] * 3 if key is None else keys[1:].reshape(layers, 3)
        x, _ = jax.lax.scan(lambda x, scanned: (layer(*scanned, x), None), x, (params, stacked))
        return (x**2).mean()
    for i, p in enumerate(params):
        x = layer(p, keys[3 * i + 1 : 3 * i + 4], x)
    return (x**2).mean()


# ---------------------------------------------------------------------------------- timing


def keep_buffers_warm() -> bool:
    """Make glibc reuse the memory of freed large arrays, which otherwise costs new page faults.

    Call this function before creating the first array. It returns whether it succeeded, which requires glibc.
    """
    mmap_threshold, trim_threshold, arena_max = -3, -1, -8
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all([mallopt(mmap_threshold, 1 << 30), mallopt(trim_threshold, 1 << 30), mallopt(arena_max, 1)])


Case = Hashable


def interleave(
    blocks: Sequence[Mapping[Case, Callable[[], Any]]], rounds: int, every: Mapping[Case, int] | None = None
) -> dict[Case, list[Any]]:
    """Measure each case once per round, in a new random order in each round.

    Args:
      blocks: groups of cases to compare, each case with its measuring function. A group finishes before the next one
        starts.
      rounds: number of rounds.
      every: cases that run only in every n-th round, with n.

    Returns:
      For each case, one measurement per round; ``None`` for skipped rounds.
    """
    rng = random.Random(0)
    measured: dict[Case, list[Any]] = {case: [] for block in blocks for case in block}
    for i in range(rounds):
        for block in rng.sample(list(blocks), len(blocks)):
            for case, measure in rng.sample(list(block.items()), len(block)):
                measured[case].append(None if i % (every or {}).get(case, 1) else measure())
    return measured


def median(values: Sequence[float | None]) -> float:
    return statistics.median(v for v in values if v is not None)


def ratios(values: Sequence[float | None], floor: Sequence[float | None]) -> tuple[float, float, float]:
    """Return the median and quartiles of the ratios, each formed within one round."""
    by_round = [v / f for v, f in zip(values, floor, strict=True) if v is not None and f is not None]
    low, middle, high = statistics.quantiles(by_round, n=4, method="inclusive") if len(by_round) > 1 else by_round * 3
    return middle, low, high


# ---------------------------------------------------------------------------------- reports


def machine() -> dict[str, Any]:
    """Return a description of this machine."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].strip() if names else cpu
    device = jax.devices()[0]
    return {"cpu": cpu, "cores": cores(), "backend": device.platform, "device": device.device_kind}


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(peers: Sequence[str]) -> dict[str, str]:
    """Return the versions of Python, JAX, and the peers."""
    result = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", *sorted({DISTRIBUTIONS[p] for p in peers})):
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            result[name] = "not installed"
    return result


def report(claim: str | None, peers: Sequence[str], **facts: Any) -> dict[str, Any]:
    """Print and return the head of a report: claim, command, machine, and versions."""
    command = shlex.join(["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    head = {
        "claim": (claim or "").splitlines()[0],
        "command": command,
        "machine": {**machine(), **facts},
        "versions": versions(peers),
    }
    for name, value in head.items():
        print(f"{name}: {', '.join(f'{k} {v}' for k, v in value.items()) if isinstance(value, dict) else value}")
    return head


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table, with three decimals for floats, nothing for ``None``, and a left-aligned first column."""
    cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(len(columns))]
    print(f"\n{title}")
    for row in cells:
        print("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=False))]))
    sys.stdout.flush()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_json(path: str | None, content: Mapping[str, Any]) -> None:
    """Write a report to ``path``, unless it is ``None``."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content, indent=1) + "\n")
