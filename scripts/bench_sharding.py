"""Claim: on a mesh, jdrop adds no collectives to a step, and at most 6% to its time and its bytes per device.

The benchmark compiles the gradient of a transformer with the batch sharded over 1, 2, 4, and 8 devices and replicated
weights. It measures the time of a step, the temporary bytes per device as reported by XLA, and the number of
collectives of each kind in the compiled program. The global batch is constant, so more devices mean a smaller batch per
device. CPU devices share the cores of the machine: with several of them, the benchmark shows communication and memory,
and the time of a step measures the total work of all devices.
"""

import argparse
import functools
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import _bench
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

COLLECTIVES = (
    r"\b(all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter)(?:-start)?\("
)


def compiled_step(drop: _bench.Drop, key: Any, devices: int, shape: tuple[int, ...], options: Any) -> tuple[Any, Any]:
    """Return the compiled gradient over a mesh, and its sharded arguments."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: rng.normal(0, s.shape[0] ** -0.5, s.shape).astype(s.dtype),
        _bench.transformer_weights(options.layers, shape[-1], stacked=False),
    )
    x = rng.normal(0, 1, shape).astype(np.float32)
    replicated = NamedSharding(mesh, P())
    args = (*jax.device_put((params, key), replicated), jax.device_put(x, NamedSharding(mesh, P("data"))))
    step = jax.jit(
        jax.grad(functools.partial(_bench.transformer, drop=drop, heads=options.heads)), out_shardings=replicated
    )
    return step.lower(*args).compile(), args


def timed(compiled: Any, args: Any) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        return time.perf_counter() - start

    measure()
    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--size", default="16x128x128", help="batch x time x width")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--peers", nargs="+", default=["linen"], choices=[*_bench.JAX_PEERS, "none"])
    parser.add_argument("--json", help="write the results to this file")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(options.devices))
    _bench.keep_buffers_warm()

    peers = _bench.peer_names(options.peers)
    shape = tuple(int(n) for n in options.size.split("x"))
    drops = {"jdrop fast": _bench.contenders(options.rate)["jdrop fast"]} | _bench.peers(peers, options.rate)
    contenders = _bench.model_contenders(drops)
    content = _bench.report(__doc__, peers, model=f"{options.layers} layers of {options.size}, {options.heads} heads")
    rows: list[dict[str, Any]] = []
    blocks = []
    for devices in options.devices:
        device_rows = []
        for name, (drop, key) in contenders.items():
            device_rows.append({"devices": devices, "contender": name})
            if drop is None:
                device_rows[-1]["missing"] = _bench.MISSING
                continue
            compiled, args = compiled_step(drop, key, devices, shape, options)
            size = int(compiled.memory_analysis().temp_size_in_bytes)
            device_rows[-1] |= {"bytes": size, "bytes_ratio": size / device_rows[0].get("bytes", size)}
            device_rows[-1]["collectives"] = dict(Counter(re.findall(COLLECTIVES, compiled.as_text())))
            blocks.append(((devices, name), timed(compiled, args)))
        rows += device_rows
    by_devices = [dict(b for b in blocks if b[0][0] == devices) for devices in options.devices]
    times = _bench.interleave(by_devices, options.rounds)
    for row in rows:
        if "missing" in row:
            continue
        seconds, floor = times[row["devices"], row["contender"]], times[row["devices"], _bench.NONE]
        row["milliseconds"] = 1e3 * _bench.median(seconds)
        row["ratio"], row["low"], row["high"] = _bench.ratios(seconds, floor)
    columns = ("contender", "ms", "x none", "bytes per device", "x none", "collectives")
    for devices in options.devices:
        lines = []
        for row in [row for row in rows if row["devices"] == devices]:
            if "missing" in row:
                lines.append([row["contender"], row["missing"]])
                continue
            numbers = [row[k] for k in ("milliseconds", "ratio", "bytes", "bytes_ratio")]
            lines.append([row["contender"], *numbers, sum(row["collectives"].values())])
        _bench.table(f"{devices} devices", columns, lines)
    _bench.write_json(options.json, content | {"rows": rows})


if __name__ == "__main__":
    main()
