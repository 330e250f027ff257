"""Claim: a dropout costs what multiplying by a constant costs, forward and backward.

Every contender is timed in every round, in an order drawn anew, on warm buffers and on inputs that come from memory
and not from cache. A ratio is formed to plain ``x * c``, the floor, of the same round; the tables show medians and
quartiles of these ratios. ``x fast`` and ``x jax`` are the same for the time of jdrop's two generators, ``x float32``
for the float32 call of the same shape. Slow contenders run in every fourth round. GB/s counts the arrays that must
be read and written: x and y, and for forward+backward the cotangent and dx as well.

On a GPU a call of the default sizes takes less time than its dispatch: give larger ``--sizes`` there.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import _bench
import jax
import jax.numpy as jnp
import numpy as np

FLOOR, FAST, JAX = _bench.SCALE, "jdrop fast", "jdrop jax"
DIRECTIONS = ("forward", "forward+backward")
SIZES = ("4096x1024", "1048576x4", "4194304", "64x128x128x3")
POOL, POOL_BYTES, POOL_MOST = 6, 1 << 27, 32  # input arrays: so many, or so many bytes of them if that is more
SLOW, SLOW_EVERY = 10, 4  # more than 10 x the floor: every fourth round


class Case(NamedTuple):
    """One line of a table."""

    dtype: str
    direction: str
    contender: str


class Clock:
    """Times calls on inputs that come round in a cycle, the same cycle for all contenders of a dtype."""

    def __init__(self, f: Callable[..., Any], inputs: Iterator[Any], calls: int, wait: Callable[[Any], Any]):
        self.f, self.inputs, self.calls, self.wait = f, inputs, calls, wait

    def __call__(self) -> float:
        """Return the seconds of a call."""
        arguments = [next(self.inputs) for _ in range(self.calls)]
        start = time.perf_counter()
        for one in arguments:
            y = self.f(*one)
        self.wait(y)
        return (time.perf_counter() - start) / self.calls


def jax_step(drop: _bench.Drop, direction: str) -> Callable[..., Any]:
    """One jitted call: y, or y and dx."""
    if direction == "forward":
        return jax.jit(lambda key, x, dy: drop(key, x))

    def both(key: Any, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pull = jax.vjp(lambda x: drop(key, x), x)
        return y, pull(dy)[0]

    return jax.jit(both)


def jax_inputs(data: list[np.ndarray], dtype: str) -> Iterator[Any]:
    """``(key, x, cotangent)`` in a cycle; all keys, inputs and cotangents differ from call to call."""
    keys = list(jax.random.split(jax.random.key(0), len(data)))
    xs = [jnp.asarray(x, dtype) for x in data]
    dys = [jnp.ones(x.shape, dtype) for x in data]
    return itertools.cycle(jax.block_until_ready(list(zip(keys, xs, dys, strict=True))))


def torch_clock(data: list[np.ndarray], dtype: str, direction: str, rate: float, calls: int) -> Clock | str:
    """PyTorch as its users call it, ``F.dropout`` and ``backward``; or the reason why not."""
    try:
        import torch
    except ImportError:
        return _bench.MISSING
    torch.set_num_threads(_bench.cores())
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        return "no build for this device"
    both = direction != "forward"
    xs = [torch.from_numpy(x).to(device, getattr(torch, dtype)).requires_grad_(both) for x in data]

    def step(x: Any, dy: Any) -> Any:
        y = torch.nn.functional.dropout(x, rate, training=True)
        if not both:
            return y
        y.backward(dy)
        dx, x.grad = x.grad, None
        return y, dx

    def wait(y: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    return Clock(step, itertools.cycle([(x, torch.ones_like(x, requires_grad=False)) for x in xs]), calls, wait)


def clocks(
    shape: tuple[int, ...], dtypes: Sequence[str], peers: Sequence[str], rate: float, calls: int
) -> tuple[list[dict[Case, Clock]], dict[Case, str]]:
    """A block of clocks for each dtype and direction, and the contenders that are missing with the reason."""
    drops = _bench.contenders(rate) | _bench.peers([p for p in peers if p != "torch"], rate)
    blocks: list[dict[Case, Clock]] = []
    missing: dict[Case, str] = {}
    for dtype in dtypes:
        size = math.prod(shape) * jnp.dtype(dtype).itemsize
        draw = np.random.default_rng(0)
        count = min(max(POOL, math.ceil(POOL_BYTES / size)), POOL_MOST)
        data = [draw.standard_normal(shape, np.float32) for _ in range(count)]
        inputs = jax_inputs(data, dtype)
        for direction in DIRECTIONS:
            made: dict[str, Clock | str] = {
                name: Clock(jax_step(drop, direction), inputs, calls, jax.block_until_ready) if drop else _bench.MISSING
                for name, drop in drops.items()
            }
            if "torch" in peers:
                made["torch"] = torch_clock(data, dtype, direction, rate, calls)
            cases = {Case(dtype, direction, name): clock for name, clock in made.items()}
            blocks.append({case: clock for case, clock in cases.items() if isinstance(clock, Clock)})
            missing |= {case: reason for case, reason in cases.items() if isinstance(reason, str)}
    return blocks, missing


def slow(block: dict[Case, Clock]) -> dict[Case, int]:
    """Compile and warm up all of a block; return the cases that shall run in every n-th round alone."""
    seconds = {}
    for case, clock in block.items():
        clock()
        seconds[case] = min(clock(), clock())
    floor = next(s for case, s in seconds.items() if case.contender == FLOOR)
    return {case: SLOW_EVERY for case, s in seconds.items() if s > SLOW * floor}


def row(shape: tuple[int, ...], case: Case, times: dict[Any, list[float | None]]) -> dict[str, Any]:
    """The numbers of one line."""
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
    for dtype, direction in itertools.product(dtypes, DIRECTIONS):
        cases = [c for c in (*times, *missing) if c[:2] == (dtype, direction)]
        found = [row(shape, c, times) if c in times else {"missing": missing[c]} for c in cases]
        rows += [{"shape": label, **c._asdict(), **f} for c, f in zip(cases, found, strict=True)]
        columns = ("contender", "ms", "x floor", "25%", "75%", "x fast", "x jax", "x float32", "GB/s", "of floor")
        lines = [(c.contender, *list(f.values())[: len(columns) - 1]) for c, f in zip(cases, found, strict=True)]
        _bench.table(f"{label} {dtype} {direction}", columns, lines)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="4096x1024", help="shapes of x")
    parser.add_argument("--dtypes", nargs="+", default=("float32", "bfloat16"), help="dtypes of x")
    names = (*_bench.JAX_PEERS, "torch")
    parser.add_argument("--peers", nargs="+", default=names, choices=(*names, "none"), help="other libraries")
    parser.add_argument("--rate", type=float, default=0.1, help="probability of dropping")
    parser.add_argument("--rounds", type=int, default=60, help="rounds for each shape")
    parser.add_argument("--calls", type=int, help="calls between two looks at the clock: 1, on a GPU 20")
    parser.add_argument("--json", metavar="PATH", help="write the numbers there")
    options = parser.parse_args()
    warm = _bench.keep_buffers_warm()
    peers = _bench.peer_names(options.peers)
    head = _bench.report(__doc__, peers, warm_buffers=warm or jax.default_backend() != "cpu")
    calls = options.calls or (1 if jax.default_backend() == "cpu" else 20)
    rows = []
    for size in options.sizes:
        shape = tuple(map(int, size.split("x")))
        rows += measure(shape, options.dtypes, peers, options.rate, options.rounds, calls)
    _bench.write_json(options.json, {**head, "rate": options.rate, "rows": rows})


if __name__ == "__main__":
    main()
