"""Claim: 100 samples of a small network under vmap cost little more than 100 forwards; moments take constant memory.

The network is an MLP with dropout on its hidden layers. The first table compares 100 samples: ``mc_samples`` under
``jax.jit``, a Python loop of a jitted call, and PyTorch, in a loop of forwards in training mode and under
``torch.func.vmap``. The floor is 100 forwards without dropout, under ``vmap`` over copies of the inputs. Every
contender runs once per round, in a new random order, and ratios are formed within a round. All of them return all
outputs.

The second table shows the temporary bytes of ``mc_moments`` with chunks, and of ``mc_samples``, as the number of
samples grows, as reported by XLA. ``mc_samples`` also returns its samples, whose bytes are in another column.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import pairwise, repeat
from typing import Any

import _bench
import _clocks
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jdrop
from jdrop.keys import derive
from jdrop.uncertainty import mc_moments, mc_samples

FLOOR = _bench.NONE


def network(key: Array | None, weights: list[Array], x: Array, rate: float) -> Array:
    """Return the outputs [batch, classes]; without a key, nothing is dropped."""
    for i, w in enumerate(weights):
        if i > 0:
            x = jdrop.dropout(derive(key, i), jax.nn.relu(x), rate, train=key is not None)
        x = x @ w
    return x


def jax_contenders(weights: list[Array], x: Array, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Return functions of no arguments, which return all samples."""
    key, keys = jax.random.key(0), jax.random.split(jax.random.key(0), options.samples)
    drop = partial(network, rate=options.rate)
    one, copies = jax.jit(drop), jnp.stack([x] * options.samples)
    under_vmap = jax.jit(lambda key, weights, x: mc_samples(drop, key, options.samples, weights, x))
    none = jax.jit(jax.vmap(partial(drop, None), in_axes=(None, 0)))
    return {
        FLOOR: lambda: none(weights, copies),
        "jdrop, mc_samples": lambda: under_vmap(key, weights, x),
        "jdrop, a loop": lambda: [one(key, weights, x) for key in keys],
    }


def torch_contenders(
    weights: list[np.ndarray], x: np.ndarray, options: argparse.Namespace
) -> dict[str, Callable[[], Any]]:
    """Return the same of PyTorch.

    Raises:
      ImportError: PyTorch is not installed.
    """
    import torch

    torch.set_num_threads(_bench.cores())
    layers: list[Any] = []
    for i, w in enumerate(weights):
        layers += [torch.nn.ReLU(), torch.nn.Dropout(options.rate)] if i > 0 else []
        layers.append(torch.nn.Linear(*w.shape, bias=False))
        layers[-1].weight = torch.nn.Parameter(torch.from_numpy(w.T.copy()))
    model, inputs = torch.nn.Sequential(*layers).train(), torch.from_numpy(x)

    def loop() -> Any:
        with torch.no_grad():
            return [model(inputs) for _ in range(options.samples)]

    def under_vmap() -> Any:
        with torch.no_grad():
            sample = torch.func.vmap(lambda _: model(inputs), randomness="different")
            return sample(torch.empty(options.samples))

    return {"PyTorch, a loop": loop, "PyTorch, vmap": under_vmap}


def time_rows(weights: list[np.ndarray], x: np.ndarray, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all contenders, and print a table."""
    contenders = jax_contenders([jnp.asarray(w) for w in weights], jnp.asarray(x), options)
    missing = []
    if "torch" in options.peers:
        try:
            contenders |= torch_contenders(weights, x, options)
        except ImportError:
            missing.append({"contender": "PyTorch", "missing": _bench.MISSING})
    clocks = {name: _clocks.Clock(f, repeat(()), 1, jax.block_until_ready) for name, f in contenders.items()}
    for clock in clocks.values():
        clock()
    times, rows = _bench.interleave([clocks], options.rounds), []
    for name in clocks:
        ratio, low, high = _bench.ratios(times[name], times[FLOOR])
        milliseconds = 1e3 * _bench.median(times[name])
        row = {"samples": options.samples, "contender": name, "milliseconds": milliseconds, "ratio": ratio}
        rows.append(row | {"ratio_25": low, "ratio_75": high})
    lines = [list(row.values())[1:] for row in rows] + [list(row.values()) for row in missing]
    _bench.table(f"{options.samples} samples", ("contender", "ms", "x none", "25%", "75%"), lines)
    return [*rows, *missing]


def memory_rows(weights: list[np.ndarray], x: np.ndarray, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compile for each number of samples, and print a table of bytes."""
    drop, rows = partial(network, rate=options.rate), []
    contenders: dict[str, Callable[..., Any]] = {
        "mc_moments, in chunks": partial(mc_moments, chunk_size=options.chunk_size),
        "mc_samples, in chunks": partial(mc_samples, chunk_size=options.chunk_size),
        "mc_samples": mc_samples,
    }
    for samples in options.numbers:
        for name, f in contenders.items():
            compiled = jax.jit(lambda key, w, x, f=f, n=samples: f(drop, key, n, w, x)).lower(
                jax.random.key(0), weights, x
            )
            analysis = compiled.compile().memory_analysis()
            row = {"samples": samples, "contender": name, "temporary_bytes": int(analysis.temp_size_in_bytes)}
            rows.append(row | {"output_bytes": int(analysis.output_size_in_bytes)})
    columns = ("samples", "contender", "temporary bytes", "bytes of the result")
    _bench.table(f"memory, chunk_size={options.chunk_size}", columns, [[str(v) for v in r.values()] for r in rows])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=(64, 128, 128, 10), help="widths of the layers")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--samples", type=int, default=100, help="to time")
    parser.add_argument("--numbers", nargs="+", type=int, default=(10, 100, 1000, 10000), help="of samples, for memory")
    parser.add_argument("--chunk-size", type=int, default=10)
    parser.add_argument("--rate", type=float, default=0.1, help="drop rate")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--peers", nargs="+", default=("torch",), choices=("torch", "none"), help="other libraries")
    parser.add_argument("--json", metavar="PATH", help="write the results to this file")
    options = parser.parse_args()
    warm = _bench.keep_buffers_warm()
    head = _bench.report(__doc__, _bench.peer_names(options.peers), warm_buffers=warm)
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape, np.float32) / shape[0] ** 0.5 for shape in pairwise(options.sizes)]
    x = rng.standard_normal((options.batch, options.sizes[0]), np.float32)
    rows = [*time_rows(weights, x, options), *memory_rows(weights, x, options)]
    facts = {name: getattr(options, name) for name in ("batch", "chunk_size", "rate", "rounds")}
    facts["sizes"] = list(options.sizes)
    _bench.write_json(options.json, {**head, **facts, "rows": rows})


if __name__ == "__main__":
    main()
