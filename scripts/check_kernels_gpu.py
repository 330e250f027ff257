"""Claim: compiled for an H100, attention kernels keep the mask out of memory at 15 instructions per score, or 9 packed.

NVIDIA's own assembler makes the programs, without a device; nothing was run, and no time was measured. Install it with
``pip install -e '.[accelerators]'``.

Rows: each kernel in bfloat16, without dropout and with that of two generators, by width, with and without causal
attention. The kernels are the forward pass, the gradient of queries, and the gradients of keys and values.

Columns: ``registers`` and ``spills`` are those of a thread when the kernel starts, and the bytes that threads store and
load because they have too few. ``instructions`` are machine instructions per score in the main loop, with both sides of
its branches, and the others those of a unit: ``alu`` for integers and comparisons, ``imad`` for integer products,
``fp32``, ``mufu`` for exponentials. ``mask`` is how many more there are than without dropout.

The others are a model, not a measurement. ``tensor`` is the cycles per score of a multiprocessor for matrix products at
4096 operations per cycle, ``others`` those of the busiest other unit, and ``limit`` its name. ``overlapped`` and
``serial`` are milliseconds at batch 4, 16 heads, and length 4096, if both overlap, and if they do not; causal kernels
take half of the scores. ``..._ratio`` is relative to the kernel without dropout.
"""

import argparse
import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of this process
os.environ.setdefault("MOSAIC_GPU_DUMP_TO", tempfile.mkdtemp())
os.environ.setdefault("MOSAIC_GPU_DUMP_PTX", "1")

import _aot
import _bench
import _machine_code
import jax
import jax.numpy as jnp

from jdrop._bits import WORD_BITS, FastBits
from jdrop.attention._mosaic_gpu import backward as backward
from jdrop.attention._mosaic_gpu import forward as forward
from jdrop.attention._mosaic_gpu.parts import ROWS, Operands, Options
from jdrop.attention._spec import AttentionSpec

DUMPS = os.environ["MOSAIC_GPU_DUMP_TO"]
KERNELS = {  # the function, the columns of its tiles, and its operations of matrix products per score and width
    "forward": (forward.forward, 128, 4),
    "gradient of queries": (backward.gradient_of_queries, 64, 6),
    "gradients of keys": (backward.gradients_of_keys, 64, 8),
}
TENSOR = 4096  # operations per cycle of a multiprocessor, as specified for dense products in 16 bits
TIMES = ("overlapped", "serial")
GENERATORS: dict[str, FastBits | None] = {"no dropout": None, **WORD_BITS}
THREADS = 128  # of a warpgroup, which computes a tile
LENGTH, SCORES = 1024, 4 * 16 * 4096**2  # of the compiled program, whose loops have any length; and of the model


def operands(width: int, drops: bool, dtype: Any) -> Operands:
    """Describe the operands of a kernel, at any length."""
    of = jax.ShapeDtypeStruct
    x, rows = of((2, LENGTH, 4, width), dtype), (2, 4, 2, LENGTH)
    return Operands(
        query=x,
        key=x,
        value=x,
        numbers=of((2, 3), jnp.int32),
        factors=of((4,), jnp.float32),
        threshold=of((1,), jnp.uint32) if drops else None,
        row_keys=of(rows, jnp.uint32) if drops else None,
        do=x,
        sums=of(rows, jnp.float32),
    )


def compile_kernel(name: str, width: int, causal: bool, generator: str, dtype: Any = jnp.bfloat16) -> tuple[str, str]:
    """Compile a kernel; return the log of the assembler, and the machine code."""
    for path in Path(DUMPS).iterdir():
        path.unlink()
    bits = GENERATORS[generator]
    arrays = operands(width, bits is not None, dtype)
    if name == "forward":
        arrays = arrays._replace(do=None, sums=None)
    options = Options(AttentionSpec(causal, None, False), LENGTH, limits_queries=False, limits_keys=False, bits=bits)
    _aot.compile_for(_aot.mesh("h100"), lambda arrays: KERNELS[name][0](options, arrays), arrays)
    (ptx,) = Path(DUMPS).glob("*.ptx")
    return _machine_code.assemble(ptx)


def main_loop(listing: str) -> list[str]:
    """Return the instructions of the shortest loop that has all matrix products of a kernel."""
    found = re.findall(
        r"^\s*(\.L_x_\d+):|^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z][\w.]*)(.*)", listing, re.MULTILINE
    )
    labels = {label: i for i, (label, _, _) in enumerate(found) if label}
    products = sum(operation.startswith("HGMMA") for _, operation, _ in found)
    loops = []
    for i, (_, operation, rest) in enumerate(found):
        target = re.search(r"\.L_x_\d+", rest)
        if operation.startswith("BRA") and target and labels[target[0]] < i:
            body = [operation for _, operation, _ in found[labels[target[0]] : i + 1] if operation]
            if sum(operation.startswith("HGMMA") for operation in body) == products:
                loops.append(body)
    return min(loops, key=len)


def pipes(loop: list[str]) -> Counter[str]:
    """Return the number of instructions of each unit."""
    return Counter(_machine_code.PIPES.get(operation.split(".")[0], "other") for operation in loop)


def row(name: str, width: int, causal: bool, generator: str) -> dict[str, Any]:
    """Compile a kernel, count its instructions per score, and model its time."""
    log, listing = compile_kernel(name, width, causal, generator)
    ((registers, spills),) = _machine_code.resources(log).values()
    _, columns, products = KERNELS[name]
    loop, each = main_loop(listing), ROWS * columns / THREADS
    of = {unit: count / each for unit, count in pipes(loop).items()}
    cycles = {unit: of.get(unit, 0.0) / lanes for unit, lanes in _machine_code.LANES.items()}
    cycles["fp32"] += of.get("imad", 0.0) / _machine_code.LANES["fp32"]
    cycles["issue"] = len(loop) / each / _machine_code.ISSUE
    tensor, others = products * width / TENSOR, max(cycles.values())
    milliseconds = 1e3 * SCORES * (0.5 if causal else 1.0) / _machine_code.CYCLES
    return {
        "name": name,
        "width": width,
        "causal": causal,
        "generator": generator,
        "registers": registers,
        "spills": spills,
        "instructions": len(loop) / each,
        **{unit: of.get(unit, 0.0) for unit in ("alu", "imad", "fp32", "mufu")},
        "tensor": tensor,
        "others": others,
        "limit": max(cycles, key=lambda unit: cycles[unit]),
        "overlapped": milliseconds * max(tensor, others),
        "serial": milliseconds * (tensor + others),
    }


def rows_of(name: str, width: int, causal: bool) -> list[dict[str, Any]]:
    """Return the rows of a kernel, one per generator."""
    without, *dropping = (row(name, width, causal, generator) for generator in GENERATORS)
    for drops in dropping:
        drops["mask"] = drops["instructions"] - without["instructions"]
        drops |= {f"{time}_ratio": drops[time] / without[time] for time in TIMES}
    return [without, *dropping]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--kernel", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--json", metavar="PATH", help="write the results to this file")
    options = parser.parse_args()
    head, results = _bench.report(__doc__, ()), []
    for width in options.width:
        for causal in (False, True):
            rows = [r for name in options.kernel for r in rows_of(name, width, causal)]
            columns = list(rows[-1])[3:]
            cells = [[r["name"], *map(r.get, columns)] for r in rows]
            _bench.table(f"width {width}, causal {causal}", ("", *columns), cells)
            for time in TIMES:
                total = {name: sum(r[time] for r in rows if r["generator"] == name) for name in GENERATORS}
                print(f"all kernels, {time}:", *(f"{name} {ms:.2f} ms" for name, ms in total.items()), sep="  ")
            results += rows
    _bench.write_json(options.json, {**head, "compiled_for": ["h100"], "rows": results})


if __name__ == "__main__":
    main()
