"""Claim: dropout adds about a tenth to the forward plus backward time of attention; memory is linear in length.

For each length, the benchmark times attention on ``[1, T, heads, width]``, forward and forward+backward, in float32 or
``--dtypes``. Every contender runs once per round, in a new random order, and ratios are formed within a round.
``x none`` compares with the same function at rate 0, and ``x full`` with jdrop's chunked attention at the same rate and
without a causal mask. Temporary bytes are those of the compiled program, as reported by XLA; PyTorch reports none.

Flax uses a separate mask for each head here (``broadcast_dropout=False``), as jdrop and PyTorch do. ``jax.nn`` has no
dropout. Contenders that would need more than ``--limit`` gigabytes of memory are skipped.

On a GPU, pass ``--batch 8 --dtypes bfloat16``. On GPUs and TPUs, kernels are contenders, too.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import _bench
import _clocks
import jax
import jax.numpy as jnp
import numpy as np

import jdrop

Attention = Callable[..., Any]  # (key, query, key, value, rate) -> out
PEERS = ("linen", "nnx", "torch")


class Case(NamedTuple):
    """One row of a table."""

    direction: str
    contender: str
    rate: float


FULL = "jdrop chunked"
KERNELS = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}
"""The implementation by kernels on each backend; those for GPUs need 16 bits."""


def contenders(peers: list[str]) -> dict[str, Attention | None]:
    """Return attention functions of ``(prng_key, q, k, v, rate)``; ``None`` for peers that are not installed."""

    def ours(**options: Any) -> Attention:
        return functools.partial(jdrop.dot_product_attention, train=True, **options)

    attention_of: dict[str, Attention | None] = {
        FULL: ours(implementation="chunked"),
        "jdrop chunked, causal": ours(implementation="chunked", is_causal=True),
        "jdrop reference": ours(implementation="reference"),
        "jax.nn": lambda key, q, k, v, rate: jax.nn.dot_product_attention(q, k, v),
    }
    if kernels := KERNELS.get(jax.default_backend()):
        for causal in (False, True):
            attention_of[f"jdrop {kernels}{', causal' * causal}"] = ours(implementation=kernels, is_causal=causal)
    for name in peers:
        if name != "torch":
            attention_of[name] = flax_attention(name)
    return attention_of


def flax_attention(name: str, *, causal: bool = False) -> Attention | None:
    """Return the attention of linen or nnx, with a separate mask for each head."""
    try:
        from flax import linen, nnx
    except ImportError:
        return None
    attend = {"linen": linen.dot_product_attention, "nnx": nnx.dot_product_attention}[name]

    def call(key: Any, q: Any, k: Any, v: Any, rate: float) -> Any:
        options = {"dropout_rng": key, "dropout_rate": rate, "deterministic": rate == 0, "broadcast_dropout": False}
        mask = jnp.tri(q.shape[-3], dtype=bool)[None, None] if causal else None
        return attend(q, k, v, mask=mask, **options)

    return call


def step(attend: Attention, rate: float, direction: str) -> Callable[..., Any]:
    """Return the function to time, which returns out, or out and the gradients of q, k, and v."""

    def forward(key: Any, q: Any, k: Any, v: Any, do: Any) -> Any:
        return attend(key, q, k, v, rate)

    def both(key: Any, q: Any, k: Any, v: Any, do: Any) -> Any:
        out, pull = jax.vjp(lambda *x: attend(key, *x, rate), q, k, v)
        return out, pull(do)

    return forward if direction == "forward" else both


def torch_step(rate: float, direction: str, *, causal: bool = False) -> Callable[..., Any]:
    """Return the fused attention of PyTorch, on ``[batch, heads, T, width]``."""
    import torch

    torch.set_num_threads(_bench.cores())

    def run(q: Any, k: Any, v: Any, do: Any) -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=causal)
        return torch.autograd.grad(out, (q, k, v), do) if direction != "forward" else out

    return run


def torch_inputs(data: list[np.ndarray], dtype: str) -> list[Any]:
    import torch

    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    arrays = [torch.from_numpy(x.swapaxes(1, 2).copy()).to(device, getattr(torch, dtype)) for x in data]
    return [x.requires_grad_() if i < 3 else x for i, x in enumerate(arrays)]


def torch_wait(value: Any) -> None:
    if jax.default_backend() != "cpu":
        import torch

        torch.cuda.synchronize()


def clocks(
    length: int, dtype: str, peers: list[str], options: argparse.Namespace
) -> tuple[dict[Case, _clocks.Clock], dict[Case, int], list[str]]:
    """Return the clock and the temporary bytes of each case, and the missing peers."""
    rng = np.random.default_rng(0)
    shape = (options.batch, length, options.heads, options.width)
    data = [rng.standard_normal(shape, np.float32) for _ in range(4)]
    arrays = (jax.random.key(0), *(jnp.asarray(x, dtype) for x in data))
    calls = 1 if jax.default_backend() == "cpu" else 10
    clock_of: dict[Case, _clocks.Clock] = {}
    temporary: dict[Case, int] = {}
    missing = []

    def forever(x: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        while True:
            yield x

    for name, attend in contenders(peers).items():
        if attend is None:
            missing.append(name)
            continue
        for direction in _clocks.DIRECTIONS:
            for rate in (0.0,) if name == "jax.nn" else (0.0, options.rate):
                case = Case(direction, name, rate)
                compiled = jax.jit(step(attend, rate, direction)).lower(*arrays).compile()
                temporary[case] = int(compiled.memory_analysis().temp_size_in_bytes)
                if temporary[case] <= options.limit * 1e9:
                    clock_of[case] = _clocks.Clock(compiled, forever(arrays), calls, jax.block_until_ready)
    if "torch" in peers:
        try:
            tensors = tuple(torch_inputs(data, dtype))
        except ImportError:
            missing.append("torch")
        else:
            for direction in _clocks.DIRECTIONS:
                for rate in (0.0, options.rate):
                    clock = _clocks.Clock(torch_step(rate, direction), forever(tensors), calls, torch_wait)
                    clock_of[Case(direction, "torch", rate)] = clock
    return clock_of, temporary, missing


def measure(length: int, dtype: str, peers: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all contenders at one length, and print a table for each direction."""
    clock_of, temporary, missing = clocks(length, dtype, peers, options)
    for clock in clock_of.values():
        clock()
    times = _bench.interleave([clock_of], options.rounds)
    rows = []
    for direction in _clocks.DIRECTIONS:
        measured = []
        for case in [c for c in (*temporary, *(c for c in clock_of if c not in temporary)) if c.direction == direction]:
            full = case._replace(contender=FULL)
            row: dict[str, Any] = {"temporary_bytes": temporary.get(case), "milliseconds": None}
            row |= dict.fromkeys(("to_none", "to_full", "to_none_25", "to_none_75"))
            if case in clock_of:
                row["milliseconds"] = 1e3 * _bench.median(times[case])
                row["to_none"], row["to_none_25"], row["to_none_75"] = _bench.ratios(
                    times[case], times[case._replace(rate=0.0)]
                )
                row["to_full"] = _bench.ratios(times[case], times[full])[0]
            measured.append({"length": length, "dtype": dtype, **case._asdict(), **row})
        numbers = ("milliseconds", "to_none", "to_none_25", "to_none_75", "to_full", "temporary_bytes")
        lines = [(f"{r['contender']}, rate {r['rate']:g}", *(r[n] for n in numbers)) for r in measured]
        columns = ("contender", "ms", "x none", "25%", "75%", "x full", "temporary bytes")
        _bench.table(f"T {length} {dtype} {direction}", columns, [*lines, *((name, "missing") for name in missing)])
        rows += measured
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=(512, 1024, 2048, 4096, 8192), help="queries and keys"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64, help="width of each head")
    parser.add_argument("--dtypes", nargs="+", default=("float32",))
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=(*PEERS, "none"), help="other libraries")
    parser.add_argument("--rate", type=float, default=0.1, help="drop rate")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--limit", type=float, default=6.0, metavar="GB", help="largest temporary memory to run")
    parser.add_argument("--json", metavar="PATH", help="write the results to this file")
    options = parser.parse_args()
    warm = _bench.keep_buffers_warm()
    peers = _bench.peer_names(options.peers)
    head = _bench.report(__doc__, peers, warm_buffers=warm or jax.default_backend() != "cpu")
    rows = [r for length in options.lengths for dtype in options.dtypes for r in measure(length, dtype, peers, options)]
    facts = {"batch": options.batch, "heads": options.heads, "width": options.width, "rate": options.rate}
    _bench.write_json(options.json, {**head, **facts, "rows": rows})


if __name__ == "__main__":
    main()
