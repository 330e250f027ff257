"""Claim: the raw words of the library pass external test suites, which this script feeds at 200 MB/s or more.

Writes an endless stream of little-endian uint32 words of mask version 1, ``word(seed, row, col)``, to standard output,
row by row from row 0. It exits quietly when the pipe is closed. Examples for the shell:

    python scripts/emit_bits.py | RNG_test stdin32 -multithreaded                        # PractRand
    python scripts/emit_bits.py --columns 16 --order columns | dieharder -a -g 200        # Debian's dieharder
    python scripts/emit_bits.py --mask-rate 0.5 | RNG_test stdin8                         # the bits of masks

With ``--generator packed``, the stream has the uint16 numbers that decide, instead of words.
"""

import argparse
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop._bits import WORD_BITS
from jdrop._platform import PLATFORMS
from jdrop._random.threefry import U64, WORD

BLOCK = 2**22  # elements per computation: 16 MB of words
BAND = 1024  # minimum number of rows in a band that is written column by column


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=1024, help="words per row, 1 to 2**32 (default 1024)")
    parser.add_argument(
        "--order",
        choices=("rows", "columns"),
        default="rows",
        help=f"row by row, or column by column in bands of {BAND} rows (more rows below {BLOCK // BAND} columns)",
    )
    parser.add_argument("--key-seed", type=int, default=0, help="write the words of jax.random.key(KEY_SEED)")
    parser.add_argument("--generator", choices=WORD_BITS, default="fast")
    parser.add_argument(
        "--mask-rate",
        type=float,
        help="write keep decisions at this drop rate, below 1, instead of words: eight per byte, the first in the "
        "lowest bit. COLUMNS must be a multiple of 8. At rate 0.5 the stream is uniform",
    )
    arguments = parser.parse_args()
    if not 1 <= arguments.columns <= WORD:
        parser.error(f"--columns must lie in [1, 2**32], got {arguments.columns}")
    rate = arguments.mask_rate
    if rate is not None and (not 0 <= np.float32(rate) < 1 or arguments.columns % 8):
        parser.error(f"--mask-rate must lie in [0, 1), with --columns a multiple of 8, got {rate}, {arguments.columns}")
    return arguments


def blocks(columns: int, order: str) -> Iterator[tuple[int, int, int, int]]:
    """Yield ``(row, rows, col, cols)`` of each part, in the order of writing."""
    rows = max(1, BLOCK // columns) if order == "rows" else max(BAND, BLOCK // columns // 8 * 8)
    cols = min(columns, max(1, BLOCK // rows))
    row = 0
    while True:
        for col in range(0, columns, cols):
            yield row, rows, col, min(cols, columns - col)
        row += rows


@functools.partial(jax.jit, static_argnames=("generator", "rows", "cols", "order", "group"))
def words(
    key: Array, row: U64, col: Array, *, generator: str, rows: int, cols: int, order: str, group: int = 1
) -> Array:
    """Return part of the words: ``[rows, group, cols / group]``, or columns first if written column by column.

    The words of one group, which are adjacent in the order of writing, lie along axis 1.
    """
    down, across = jnp.arange(rows, dtype=jnp.uint32), jnp.arange(cols, dtype=jnp.uint32) + col
    outer, inner = (down, across) if order == "rows" else (across, down)
    outer, inner = outer[:, None, None], inner.reshape(-1, group).T[None]
    down, across = (outer, inner) if order == "rows" else (inner, outer)
    row_key = PLATFORMS["cpu"].row_key(key, row + U64(np.uint32(0), down), across)  # once per row
    return WORD_BITS[generator].mix(row_key, across)


@functools.partial(jax.jit, static_argnames=("generator", "rows", "cols", "order"))
def mask_bytes(key: Array, row: U64, col: Array, threshold: Array, **options: Any) -> Array:
    """Return part of the keep decisions, ``word >= threshold``, eight per byte, the first in the lowest bit.

    The eight decisions of a byte do not lie along the last axis, because packing would not vectorize.
    """
    keep = words(key, row, col, **options, group=8) >= threshold
    return jnp.packbits(keep, axis=1, bitorder="little")


def numbers(*at: Any, generator: str, **options: Any) -> Array:
    """Return part of the numbers that decide: all bits of words, or 16."""
    part = words(*at, generator=generator, **options)
    return part if generator == "fast" else (part >> np.uint32(16)).astype(jnp.uint16)


def stream(columns: int, order: str, key_seed: int, mask_rate: float | None, generator: str) -> Iterator[np.ndarray]:
    """Yield the output in parts, computing each one while the reader processes the previous one."""
    key = jax.random.key_data(jax.random.key(key_seed))
    pending: Array | None = None
    for row, rows, col, cols in blocks(columns, order):
        at, options = (key, U64.of(row), np.uint32(col)), dict(generator=generator, rows=rows, cols=cols, order=order)
        if mask_rate is None:
            part = numbers(*at, **options)
        else:
            part = mask_bytes(*at, threshold(mask_rate, generator), **options)
        if pending is not None:
            yield np.asarray(pending)
        pending = part


def threshold(rate: float, generator: str) -> np.uint32:
    """Return the smallest word of kept elements, as the library computes it for rates below 1."""
    return np.uint32(round(float(WORD_BITS[generator].rate(np.asarray(rate))) * WORD))


def main() -> int:
    """Write until the reader closes the pipe."""
    arguments = parse()
    try:
        for block in stream(
            arguments.columns, arguments.order, arguments.key_seed, arguments.mask_rate, arguments.generator
        ):
            sys.stdout.buffer.write(block.astype(block.dtype.newbyteorder("<"), copy=False).data)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise the flush at exit prints an error
    return 0


if __name__ == "__main__":
    sys.exit(main())
