"""Claim: the CPU forms in ``jdrop/_platform/cpu.py`` make programs faster or smaller, by the ratios in this table.

For each form, the benchmark compiles a program that uses it twice: with all CPU forms, and with this one replaced by
the plain form. Both programs run once per round, in a random order. The table shows medians and quartiles of the time
with the form relative to the time without it, and the temporary memory of both programs.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import _bench
import _clocks
import jax
import jax.numpy as jnp

import jdrop
from jdrop import _platform
from jdrop._platform import cpu
from jdrop._platform.generic import Platform

WITH, WITHOUT = "with", "without"


class Form(NamedTuple):
    """A form, and a program that uses it."""

    name: str
    program: str
    step: Callable[..., Any]
    shape: tuple[int, ...]
    dtype: str = "float32"


def gradient(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``(key, x, dy) -> (y, dx)``."""

    def both(key: Any, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pull = jax.vjp(lambda x: f(key, x), x)
        return y, pull(dy)[0]

    return both


def attend(key: Any, x: jax.Array, **options: Any) -> jax.Array:
    return jdrop.dot_product_attention(key, x, x, x, 0.1, train=True, implementation="chunked", **options)


def forms(small: bool) -> list[Form]:
    """Return the forms to measure."""
    rows, length = (64, 256) if small else (4096, 2048)
    matrix, axis = (rows, 1024), (rows * 1024,)
    drop = gradient(lambda key, x: jdrop.dropout(key, x, 0.1, train=True))
    locked = gradient(lambda key, x: jdrop.locked_dropout(key, x, 0.1, train=True, time_axis=1))
    zone = gradient(lambda key, x: jdrop.zoneout(key, x, 0.1, -x, train=True))
    heads, scores = gradient(attend), gradient(lambda key, x: attend(key, x, is_causal=True))
    return [
        Form("row_key", "dropout", drop, matrix),
        Form("multiply", "dropout", drop, matrix),
        Form("multiply", "dropout", drop, matrix, "bfloat16"),
        Form("_round_to_bfloat16", "dropout", drop, matrix, "bfloat16"),
        Form("select", "zoneout", zone, matrix),
        Form("materialize", "locked_dropout", locked, (rows // 16, 16, 1024)),
        Form("fold", "dropout", drop, axis),
        Form("squeezes_blocks", "attention", heads, (1, length, 2, 64)),
        Form("order_after", "causal attention", scores, (1, length, 2, 64)),
        Form("order_after", "attention", heads, (1, length // 4, 8, 64)),
        Form("separate", "attention", heads, (1, length, 2, 64)),
        Form("sum_of_products", "attention", heads, (1, length, 8, 64)),
    ]


def without(form: str) -> Platform:
    """Return the CPU platform with one form replaced by the plain form."""
    return type(f"Without_{form}", (cpu.Cpu,), {form: getattr(Platform, form)})()


def compile_pair(form: Form) -> dict[str, Any]:
    """Compile the program of a form with it and without it."""
    arguments = jax.random.key(0), jnp.ones(form.shape, form.dtype), jnp.ones(form.shape, form.dtype)
    compiled = {}
    ours, rounding = _platform.PLATFORMS["cpu"], cpu._round_to_bfloat16
    for which in (WITH, WITHOUT):
        jax.clear_caches()
        if which == WITHOUT and form.name == "_round_to_bfloat16":
            cpu._round_to_bfloat16 = lambda x: x.astype(jnp.bfloat16)
        elif which == WITHOUT:
            _platform.PLATFORMS["cpu"] = without(form.name)
        try:
            compiled[which] = jax.jit(form.step).lower(*arguments).compile()
        finally:
            _platform.PLATFORMS["cpu"], cpu._round_to_bfloat16 = ours, rounding
    return compiled


def measure(form: Form, rounds: int, calls: int) -> dict[str, Any]:
    """Time both programs of a form."""
    data = _clocks.random_arrays(form.shape, jnp.dtype(form.dtype).itemsize)
    inputs = _clocks.jax_inputs(data, form.dtype)
    compiled = compile_pair(form)
    clocks = {which: _clocks.Clock(f, inputs, calls, jax.block_until_ready) for which, f in compiled.items()}
    for clock in clocks.values():
        clock()
    times = _bench.interleave([clocks], rounds)
    ratio, low, high = _bench.ratios(times[WITH], times[WITHOUT])
    bytes_of = {which: f.memory_analysis().temp_size_in_bytes for which, f in compiled.items()}
    return {
        "form": form.name,
        "program": f"{form.program} {'x'.join(map(str, form.shape))} {form.dtype}",
        "milliseconds": _bench.median(times[WITH]) * 1e3,
        "ratio": ratio,
        "ratio_25": low,
        "ratio_75": high,
        "megabytes": bytes_of[WITH] / 1e6,
        "megabytes_without": bytes_of[WITHOUT] / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, help="rounds per form")
    parser.add_argument("--small", action="store_true", help="tiny arrays, as a smoke test")
    parser.add_argument("--json", metavar="PATH", help="write the results to this file")
    options = parser.parse_args()
    _bench.keep_buffers_warm()
    head = _bench.report(__doc__, [])
    rows = [measure(form, options.rounds, 1) for form in forms(options.small)]
    columns = ("form", "program", "ms", "x without", "25%", "75%", "MB", "MB without")
    _bench.table("with each form, compared with the plain form", columns, [list(row.values()) for row in rows])
    _bench.write_json(options.json, {**head, "rows": rows})


if __name__ == "__main__":
    main()
