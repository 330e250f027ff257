"""Claim: dropout in 37 places makes the gradient of a 12-layer transformer at most 1.8 x slower to compile.

The model is unrolled, its keys come from one ``jax.random.split``. Contenders are traced, lowered and compiled from
scratch in every round, in an order drawn anew; a ratio is formed to the same model without dropout of the same round.
"""

import argparse
import functools
import time
from typing import Any

import _bench
import jax
import jax.numpy as jnp


def compile_once(drop: _bench.Drop, params: Any, key: Any, x: Any, heads: int) -> dict[str, float]:
    """Trace, lower and compile the gradient, and count what came out."""
    jax.clear_caches()
    gradient = jax.grad(lambda params, key, x: _bench.transformer(params, key, x, drop, heads=heads))
    start = time.perf_counter()
    lowered = jax.jit(gradient).lower(params, key, x)
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    text = compiled.as_text() or ""
    seconds = {"lower": middle - start, "compile": end - middle, "total": end - start}
    return {**seconds, "fusions": text.count(" fusion("), "whiles": text.count(" while("), "lines": text.count("\n")}


def row(runs: list[dict[str, float]], floor: list[dict[str, float]]) -> dict[str, float]:
    """Medians of the seconds and of the ratios to no dropout."""
    times = {kind: ([r[kind] for r in runs], [r[kind] for r in floor]) for kind in ("lower", "compile", "total")}
    ratio, low, high = _bench.ratios(*times["compile"])
    return {
        "lower_seconds": _bench.median(times["lower"][0]),
        "compile_seconds": _bench.median(times["compile"][0]),
        "compile_ratio": ratio,
        "compile_ratio_25": low,
        "compile_ratio_75": high,
        "total_ratio": _bench.ratios(*times["total"])[0],
        **{kind: runs[-1][kind] for kind in ("fusions", "whiles", "lines")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="layers; dropouts are three times as many and one")
    parser.add_argument("--size", default="4x64x128", metavar="4x64x128", help="batch, time and width of x")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rate", type=float, default=0.1, help="probability of dropping")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="PATH", help="write the numbers there")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    head = _bench.report(__doc__, [])
    x = jnp.ones(tuple(map(int, options.size.split("x"))))
    params = _bench.init_transformer(options.layers, x.shape[-1], stacked=False)

    placed = _bench.placed(_bench.contenders(options.rate))
    cases = {
        name: functools.partial(compile_once, drop, params, key, x, options.heads)
        for name, (drop, key) in placed.items()
    }
    cases[_bench.NONE]()  # the first compilation of a process is slower
    runs = _bench.interleave([cases], options.rounds)
    rows = [{"contender": name, **row(runs[name], runs[_bench.NONE])} for name in cases]
    columns = ("contender", "trace+lower s", "compile s", "x none", "25%", "75%", "x none, total", *list(rows[0])[7:])
    title = f"gradient of {options.layers} layers, {1 + 3 * options.layers} dropouts, {options.size}"
    _bench.table(title, columns, [tuple(r.values()) for r in rows])
    _bench.write_json(options.json, {**head, "layers": options.layers, "size": options.size, "rows": rows})


if __name__ == "__main__":
    main()
