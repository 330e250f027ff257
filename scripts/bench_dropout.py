"""Claim: dropout costs as much as multiplying by a constant, forward and backward.

Every round times every contender, in a new random order, with warm buffers and with inputs from memory instead of
cache. Ratios compare with plain ``x * c``, the floor, in the same round; the tables show their medians and quartiles.
``x fast`` and ``x jax`` compare with the two generators of jdrop, ``x float32`` with the float32 call of the same
shape. Slow contenders run only in every fourth round. GB/s counts the arrays that must be read and written: x and y,
and for forward+backward also the cotangent and dx.

``--family`` times the other members instead, each compared with its own floor and with equivalents in other libraries.

On a GPU, a call at the default sizes takes less time than its dispatch, so pass larger ``--sizes``.
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import _bench
import _clocks
import _family
import jax
import jax.numpy as jnp

FLOOR, FAST, JAX = _bench.SCALE, "jdrop fast", "jdrop jax"
SIZES = ("4096x1024", "1048576x4", "4194304", "64x128x128x3")
SLOW, SLOW_EVERY = 10, 4  # contenders above 10 x the floor run in every fourth round


class Case(NamedTuple):
    """One row of a table."""

    dtype: str
    direction: str
    contender: str


def clocks(
    shape: tuple[int, ...], dtypes: Sequence[str], peers: Sequence[str], rate: float, calls: int
) -> tuple[list[dict[Case, _clocks.Clock]], dict[Case, str]]:
    """Return a group of clocks for each dtype and direction, and the missing contenders with the reason."""
    drops = _bench.contenders(rate) | _bench.peers([p for p in peers if p in _bench.JAX_PEERS], rate)
    blocks: list[dict[Case, _clocks.Clock]] = []
    missing: dict[Case, str] = {}
    for dtype in dtypes:
        data = _clocks.random_arrays(shape, jnp.dtype(dtype).itemsize)
        inputs = _clocks.jax_inputs(data, dtype)
        for direction in _clocks.DIRECTIONS:
            entries: dict[str, _clocks.Clock | str] = {
                name: _clocks.Clock(_clocks.jax_step(drop, direction), inputs, calls, jax.block_until_ready)
                if drop
                else _bench.MISSING
                for name, drop in drops.items()
            }
            if "torch" in peers:
                entries["torch"] = _clocks.torch_clock(
                    lambda f, x: f.dropout(x, rate, training=True), data, dtype, direction, calls
                )
            cases = {Case(dtype, direction, name): clock for name, clock in entries.items()}
            blocks.append({case: clock for case, clock in cases.items() if isinstance(clock, _clocks.Clock)})
            missing |= {case: reason for case, reason in cases.items() if isinstance(reason, str)}
    return blocks, missing


def slow(block: dict[Case, _clocks.Clock]) -> dict[Case, int]:
    """Compile and warm up a group; return its slow cases with n, to run them only in every n-th round."""
    seconds = {}
    for case, clock in block.items():
        clock()
        seconds[case] = min(clock(), clock())
    floor = next(s for case, s in seconds.items() if case.contender == FLOOR)
    return {case: SLOW_EVERY for case, s in seconds.items() if s > SLOW * floor}


def row(shape: tuple[int, ...], case: Case, times: dict[Any, list[float | None]]) -> dict[str, Any]:
    """Return the numbers of one row."""
    ratio, low, high = _bench.ratios(times[case], times[case._replace(contender=FLOOR)])
    seconds = _bench.median(times[case])
    arrays = 2 if case.direction == "forward" else 4
    moved = arrays * math.prod(shape) * jnp.dtype(case.dtype).itemsize
    single = case._replace(dtype="float32")
    return {
        "milliseconds": seconds * 1e3,
        "ratio": ratio,
        "ratio_25": low,
        "ratio_75": high,
        "to_fast": _bench.ratios(times[case], times[case._replace(contender=FAST)])[0],
        "to_jax": _bench.ratios(times[case], times[case._replace(contender=JAX)])[0],
        "to_float32": _bench.ratios(times[case], times[single])[0] if single in times else None,
        "gigabytes_per_second": moved / seconds / 1e9,
        "share_of_floor": 1 / ratio,
        "rounds": sum(t is not None for t in times[case]),
    }


def measure(
    shape: tuple[int, ...], dtypes: Sequence[str], peers: Sequence[str], rate: float, rounds: int, calls: int
) -> list[dict[str, Any]]:
    """Time all contenders on one shape, and print a table for each dtype and direction."""
    blocks, missing = clocks(shape, dtypes, peers, rate, calls)
    every = {case: n for block in blocks for case, n in slow(block).items()}
    times = _bench.interleave(blocks, rounds, every)
    label = "x".join(map(str, shape))
    rows = []
    for dtype, direction in itertools.product(dtypes, _clocks.DIRECTIONS):
        cases = [c for c in (*times, *missing) if c[:2] == (dtype, direction)]
        results = [row(shape, c, times) if c in times else {"missing": missing[c]} for c in cases]
        rows += [{"shape": label, **c._asdict(), **f} for c, f in zip(cases, results, strict=True)]
        columns = ("contender", "ms", "x floor", "25%", "75%", "x fast", "x jax", "x float32", "GB/s", "of floor")
        lines = [(c.contender, *list(f.values())[: len(columns) - 1]) for c, f in zip(cases, results, strict=True)]
        _bench.table(f"{label} {dtype} {direction}", columns, lines)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="4096x1024", help="shapes of x")
    parser.add_argument("--dtypes", nargs="+", default=("float32", "bfloat16"), help="dtypes of x")
    names = (*_bench.JAX_PEERS, "torch", "keras", "timm")
    parser.add_argument(
        "--peers", nargs="+", default=names, choices=(*names, "none"), help="other libraries (keras, timm: --family)"
    )
    parser.add_argument("--rate", type=float, default=0.1, help="drop rate")
    parser.add_argument("--rounds", type=int, default=60, help="rounds for each shape")
    parser.add_argument("--calls", type=int, help="calls per measurement (default 1, on a GPU 20)")
    parser.add_argument("--family", action="store_true", help="time the other members of the family, in float32")
    parser.add_argument("--small", action="store_true", help="with --family: tiny arrays, as a smoke test")
    parser.add_argument("--json", metavar="PATH", help="write the results to this file")
    options = parser.parse_args()
    warm = _bench.keep_buffers_warm()
    peers = _bench.peer_names(options.peers)
    head = _bench.report(__doc__, peers, warm_buffers=warm or jax.default_backend() != "cpu")
    calls = options.calls or (1 if jax.default_backend() == "cpu" else 20)
    rows = _family.measure(peers, options.rounds, calls, small=options.small) if options.family else []
    for size in () if options.family else options.sizes:
        shape = tuple(map(int, size.split("x")))
        rows += measure(shape, options.dtypes, peers, options.rate, options.rounds, calls)
    _bench.write_json(options.json, {**head, "rate": options.rate, "rows": rows})


if __name__ == "__main__":
    main()
