"""Claim: compiled for a TPU, the kernels of attention spend most of their time on what attention needs without dropout.

The TPU's own compiler makes the programs, without a device; no time was measured. Install it with
``pip install -e '.[accelerators]'``.

The first table is of one tile of 512 x 512 scores in bfloat16: ``forward`` and ``backward`` are the bundles of
instructions that the compiler schedules for it; a core starts one in each cycle. ``x splash`` is their sum, relative to
JAX's splash attention without dropout, with tiles of the same size and a fused backward pass.

The other tables are of whole programs, forward and backward. ``mcycles`` are millions of cycles: of XLA's operations,
as estimated by the compiler; and of kernels, the bundles of visible tiles, and all other bundles of the kernel once for
each row of tiles, because most of them start or end such a row. ``temporary_mb`` are the megabytes of temporary arrays.
All scores at once are compiled only up to length 2,048, because larger programs take long to compile.
"""

import argparse
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import _llo

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of this process
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # otherwise, libtpu asks a cloud machine for its metadata
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {_llo.FLAGS}"

import _aot
import _bench
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

import jdrop

TILE = 512
WORDS = jax.ShapeDtypeStruct((2,), jnp.uint32)  # of a key, because a key cannot be described for a device
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]  # of the words of a key, query, key, value


def of_jdrop(implementation: str, rate: float, causal: bool, generator: Any = "fast") -> Attend:
    def attend(words: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(words)
        return jdrop.dot_product_attention(
            key, q, k, v, rate, train=True, is_causal=causal, generator=generator, implementation=implementation
        )

    return attend


def of_splash(length: int, heads: int, causal: bool) -> Attend:
    """Return JAX's splash attention, which has no dropout and does not scale, and takes heads before positions."""
    tile = min(TILE, length)
    sizes = splash_kernel.BlockSizes(
        block_q=tile,
        block_kv=tile,
        block_kv_compute=tile,
        block_q_dkv=tile,
        block_kv_dkv=tile,
        block_kv_dkv_compute=tile,
        use_fused_bwd_kernel=True,
    )
    seen = splash_mask.CausalMask if causal else splash_mask.FullMask
    kernel = splash_kernel.make_splash_mha(
        splash_mask.MultiHeadMask([seen((length, length)) for _ in range(heads)]),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
    )

    def attend(words: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        del words
        return jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)

    return attend


def compiled(mesh: Any, attend: Attend, shape: tuple[int, ...]) -> tuple[_aot.Facts, list[_llo.Kernel]]:
    """Compile value and gradients of attention on ``[batch, length, heads, width]``."""

    def step(words: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Any:
        out, pull = jax.vjp(functools.partial(attend, words), q, k, v)
        return out, pull(do)

    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    program, kernels = _llo.kernels_of(lambda: _aot.compile_for(mesh, step, WORDS, x, x, x, x))
    return _aot.facts(program, elements=1 << 20), kernels


def of_tiles(mesh: Any, width: int, rate: float) -> Iterator[dict[str, Any]]:
    """Yield the bundles of a tile of each kernel."""
    shape = (1, 4 * TILE, 2, width)
    forms = {
        "splash, no dropout": of_splash(shape[1], shape[2], False),
        "mosaic_tpu, no dropout": of_jdrop("mosaic_tpu", 0.0, False),
        "mosaic_tpu": of_jdrop("mosaic_tpu", rate, False),
        "mosaic_tpu, packed": of_jdrop("mosaic_tpu", rate, False, "packed"),
    }
    floor = 0
    for name, attend in forms.items():
        forward, backward = (max(kernel.tiles) for kernel in compiled(mesh, attend, shape)[1])
        floor = floor or forward + backward
        yield {"name": name, "forward": forward, "backward": backward, "x splash": (forward + backward) / floor}


def of_programs(mesh: Any, shape: tuple[int, ...], causal: bool, rate: float) -> Iterator[dict[str, Any]]:
    """Yield the cycles and bytes of whole programs."""
    batch, length, heads, _ = shape
    across = -(-length // TILE)
    full, cut = (across * (across - 1) // 2, across) if causal else (across * across, 0)
    forms = {
        "splash, no dropout": of_splash(length, heads, causal),
        "mosaic_tpu, no dropout": of_jdrop("mosaic_tpu", 0.0, causal),
        "mosaic_tpu": of_jdrop("mosaic_tpu", rate, causal),
        "mosaic_tpu, packed": of_jdrop("mosaic_tpu", rate, causal, "packed"),
        "chunked": of_jdrop("chunked", rate, causal),
    }
    if length <= 2048:
        forms["reference"] = of_jdrop("reference", rate, causal)
    for name, attend in forms.items():
        facts, kernels = compiled(mesh, attend, shape)
        cycles = facts.cycles
        for kernel in kernels:
            tile = full * min(kernel.tiles) + cut * max(kernel.tiles) + across * kernel.rest
            cycles += batch * heads * tile
        yield {"name": name, "mcycles": cycles / 1e6, "temporary_mb": facts.temporary_bytes / 1e6}


def tables(options: Any) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for target in options.target:
        mesh = _aot.mesh(target)
        for width in options.widths:
            yield (
                f"{target}, a tile of {TILE} x {TILE} scores, width {width}",
                list(of_tiles(mesh, width, options.rate)),
            )
        for length in options.lengths:
            for causal in (False, True):
                shape = (options.batch, length, options.heads, options.widths[0])
                title = f"{target}, attention of {length}{', causal' * causal}, width {shape[3]}, forward+backward"
                yield title, list(of_programs(mesh, shape, causal, options.rate))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=_aot.TPUS, default=["v5e", "v6e"])
    parser.add_argument("--widths", nargs="+", type=int, default=[128, 64])
    parser.add_argument("--lengths", nargs="*", type=int, default=[1024, 4096])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--json", metavar="PATH", help="write the results to this file")
    options = parser.parse_args()
    head = _bench.report(__doc__, ())
    results = []
    for title, rows in tables(options):
        columns = [column for column in rows[0] if column != "name"]
        _bench.table(title, ("", *columns), [[r["name"], *map(r.get, columns)] for r in rows])
        results += [{"table": title, **r} for r in rows]
        _bench.write_json(options.json, {**head, "compiled_for": options.target, "rate": options.rate, "rows": results})


if __name__ == "__main__":
    main()
