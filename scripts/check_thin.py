"""Claim: compiled for an H100 or a TPU, layers that skip dropped units do half of the operations at rate 0.5.

XLA's own compilers make the programs, without a device; no time was measured. Install them with
``pip install -e '.[accelerators]'``.

Tables: forward and backward pass of a block ``1024 -> 4096 -> 1024`` in bfloat16 at rate 0.5, by the number of examples
times time; and of a model of residual blocks at rate 0.4, whose branches are skipped for a part of the batch.

Columns: ``gflops`` are the floating-point operations of the program in billions, as XLA counts them before it optimizes
the program. ``moved_mb`` are the megabytes that launches read and write, each operand once, and ``temporary_mb`` those
of temporary arrays. ``cycles`` are estimated by the compiler, only for TPUs. ``predicted_ms``, only for GPUs, is a
model, not a measurement: the longer of the operations at 500 TFLOP/s and the moved bytes at 3.0 TB/s, and 2
microseconds for each launch. ``gain`` is the predicted time, or the cycles, of the first row, divided by that of the
row.
"""

import argparse
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of this process
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # otherwise, libtpu asks a cloud machine for its metadata
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import _aot
import _bench
import _machine_code
import _thin
import jax
import jax.numpy as jnp

WORDS = jax.ShapeDtypeStruct((2,), jnp.uint32)  # of a key, because a key cannot be described for a device
FLOPS, GAP = 500e12, 2e-6  # of the model of the time: operations per second, and seconds for each launch


def row(name: str, mesh: Any, f: Callable[..., jax.Array], *arrays: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """Compile value and gradients of a function of a key and arrays, and count."""

    def step(words: jax.Array, dy: jax.Array, *arrays: jax.Array) -> Any:
        y, pull = jax.vjp(functools.partial(f, jax.random.wrap_key_data(words)), *arrays)
        return y, pull(dy)

    ours = _aot.facts(_aot.compile_for(mesh, step, WORDS, arrays[0], *arrays), elements=1 << 20)
    flops = jax.jit(step).lower(WORDS, arrays[0], *arrays).cost_analysis()["flops"]
    seconds = max(flops / FLOPS, ours.moved_bytes / _machine_code.BANDWIDTH) + ours.launches * GAP
    return {
        "name": name,
        "gflops": flops / 1e9,
        "moved_mb": ours.moved_bytes / 1e6,
        "temporary_mb": ours.temporary_bytes / 1e6,
        "launches": ours.launches,
        "cycles": ours.cycles or None,
        "predicted_ms": None if ours.cycles else 1e3 * seconds,
    }


def tables(options: Any) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Return the title and the rows of each table."""
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    up, down = of((_thin.FEATURES, _thin.UNITS)), of((_thin.UNITS, _thin.FEATURES))
    for target in options.target:
        mesh = _aot.mesh(target)
        for tokens in options.tokens:
            x = of((tokens, _thin.FEATURES))
            rows = [row(name, mesh, f, x, down if first else up, down) for name, (f, first) in _thin.BLOCKS.items()]
            yield f"{target}, block of {_thin.FEATURES} -> {_thin.UNITS} -> {_thin.FEATURES}, {tokens} tokens", rows
            x = of((tokens // 256, 256, _thin.FEATURES))
            forms = ("no dropout", "drop_path", "skip_path")
            rows = [row(form, mesh, _thin.residual(form), x, *[up, down] * _thin.BRANCHES) for form in forms]
            yield f"{target}, {_thin.BRANCHES} residual branches, {tokens} tokens", rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", default=["h100"], choices=_aot.TARGETS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="examples times time")
    parser.add_argument("--json", metavar="PATH", help="write the results to this file")
    options = parser.parse_args()
    head = _bench.report(__doc__, ())
    results = []
    for title, rows in tables(options):
        time = "predicted_ms" if rows[0]["cycles"] is None else "cycles"
        rows = [{"table": title, **r, "gain": rows[0][time] / r[time]} for r in rows]
        columns = [column for column in rows[0] if column not in ("name", "table")]
        _bench.table(title, ("", *columns), [[r["name"], *map(r.get, columns)] for r in rows])
        results += rows
    _bench.write_json(options.json, {**head, "rate": _thin.RATE, "skip_rate": _thin.SKIP_RATE, "rows": results})


if __name__ == "__main__":
    main()
