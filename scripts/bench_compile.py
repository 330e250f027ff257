"""Claim: 37 dropouts make the gradient of a 12-layer transformer at most 1.8 x slower to compile.

The model is unrolled, and its keys come from one ``jax.random.split``. Every round traces, lowers, and compiles each
contender from scratch, in a new random order. Ratios compare with the same model without dropout in the same round.

The ratio depends on the model, so there are two, which differ in the layer norm. With one-pass moments (``standardize``
of ``jax.nn``, Flax), all layers share kernels, which XLA compiles once. With two-pass moments, as in hand-written
models, XLA for CPU repeats long chains of operations in its kernels, and dropout breaks these chains. ``ms each`` is
the additional time over no dropout, divided by the number of dropouts.
"""

import argparse
import functools
import time
from typing import Any

import _bench
import jax
import jax.numpy as jnp

NORMS = {"one-pass": _bench.one_pass, "two-pass": _bench.two_pass}


def compile_once(
    drop: _bench.Drop, params: Any, key: Any, x: Any, heads: int, standardize: _bench.Norm
) -> dict[str, float]:
    """Trace, lower, and compile the gradient; return the seconds and the size of the compiled text."""
    jax.clear_caches()
    model = functools.partial(_bench.transformer, drop=drop, heads=heads, standardize=standardize)
    start = time.perf_counter()
    lowered = jax.jit(jax.grad(model)).lower(params, key, x)
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    text = compiled.as_text() or ""
    seconds = {"lower": middle - start, "compile": end - middle, "total": end - start}
    return {**seconds, "fusions": text.count(" fusion("), "whiles": text.count(" while("), "lines": text.count("\n")}


def row(runs: list[dict[str, float]], floor: list[dict[str, float]], count: int) -> dict[str, float]:
    """Return medians of the seconds and of the ratios to no dropout."""
    times = {kind: ([r[kind] for r in runs], [r[kind] for r in floor]) for kind in ("lower", "compile", "total")}
    ratio, low, high = _bench.ratios(*times["compile"])
    return {
        "lower_seconds": _bench.median(times["lower"][0]),
        "compile_seconds": _bench.median(times["compile"][0]),
        "compile_ratio": ratio,
        "compile_ratio_25": low,
        "compile_ratio_75": high,
        "total_ratio": _bench.ratios(*times["total"])[0],
        "milliseconds_each": 1e3 * _bench.median([a - b for a, b in zip(*times["total"], strict=True)]) / count,
        **{kind: runs[-1][kind] for kind in ("fusions", "whiles", "lines")},
    }


def measure(norm: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compile all contenders in one model, and print a table."""
    x = jax.ShapeDtypeStruct(tuple(map(int, options.size.split("x"))), jnp.float32)
    params = _bench.transformer_weights(options.layers, x.shape[-1], stacked=False)
    count = 1 + 3 * options.layers
    cases = {
        name: functools.partial(compile_once, drop, params, key, x, options.heads, NORMS[norm])
        for name, (drop, key) in _bench.model_contenders(_bench.contenders(options.rate)).items()
    }
    cases[_bench.NONE]()  # the first compilation of a process is slower
    runs = _bench.interleave([cases], options.rounds)
    rows = [{"contender": name, **row(runs[name], runs[_bench.NONE], count)} for name in cases]
    columns = ("contender", "trace+lower s", "compile s", "x none", "25%", "75%", "total x none", "ms each")
    title = f"gradient of {options.layers} layers with {norm} layer norm, {count} dropouts, {options.size}"
    _bench.table(title, (*columns, "fusions", "whiles", "lines"), [tuple(r.values()) for r in rows])
    return [{"norm": norm, **r} for r in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="number of layers; dropouts are 1 + 3 * layers")
    parser.add_argument("--size", default="4x64x128", metavar="4x64x128", help="batch, time, and width of x")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--norms", nargs="+", default=tuple(NORMS), choices=tuple(NORMS), help="layer norms")
    parser.add_argument("--rate", type=float, default=0.1, help="drop rate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="PATH", help="write the results to this file")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    head = _bench.report(__doc__, [])
    rows = [row for norm in options.norms for row in measure(norm, options)]
    facts = {"layers": options.layers, "size": options.size, "heads": options.heads, "rate": options.rate}
    _bench.write_json(options.json, {**head, **facts, "rows": rows})


if __name__ == "__main__":
    main()
