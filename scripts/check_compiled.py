"""Claim: compiled for an H100, a gradient with dropout keeps no mask for its backward pass (default generator).

XLA's own compilers make the programs, without a device: bytes, kernels and stored masks are counted in programs that
were not run. Install them with ``pip install -e '.[accelerators]'``. A large program takes up to a minute for an H100,
and minutes for a TPU.

There is a table for each form of the gradient of the transformer of ``bench_memory.py``, beside no dropout, and tables
of the members of the family, beside their floors, on ``[4096, 1024]`` or images of as many elements. ``life`` is how
long a stored mask is in use: the longest, as a share of the program or of the body of its loop.
"""

import argparse
import functools
import itertools
import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of this process
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # otherwise, libtpu asks a cloud machine for its metadata
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import _aot
import _bench
import _family
import jax
import jax.numpy as jnp

FORMS = tuple(itertools.product(("unrolled", "scan"), ("plain", "checkpoint")))
DIRECTIONS = ("forward", "forward+backward")
WORDS = jax.ShapeDtypeStruct((2,), jnp.uint32)  # of a key, because a key cannot be described for a device
COLUMNS = ("temporary_bytes", "ratio", "kernels", "extra_kernels", "stored", "life")


def row(name: str, ours: _aot.Facts, base: _aot.Facts) -> dict[str, Any]:
    """Return the row of a program, with its bytes and kernels relative to those of a base."""
    return {
        "name": name,
        "temporary_bytes": ours.temporary_bytes,
        "ratio": ours.temporary_bytes / base.temporary_bytes if base.temporary_bytes else None,
        "kernels": ours.kernels,
        "extra_kernels": ours.kernels - base.kernels,
        "stored": len(ours.stored),
        "life": max((stored.life for stored in ours.stored), default=0.0),
        "types": sorted({stored.type for stored in ours.stored}),
    }


def model_facts(target: str, drop: _bench.Drop, key: Any, form: tuple[str, str], dtype: Any, options: Any) -> Any:
    """Compile the gradient of the transformer."""
    shape = tuple(map(int, options.size.split("x")))
    weights = _bench.transformer_weights(options.layers, shape[-1], stacked=form[0] == "scan")
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), weights)
    settings = {"heads": options.heads, "checkpoint": form[1] == "checkpoint"}

    def loss(params: Any, words: jax.Array, x: jax.Array) -> jax.Array:
        typed = None if key is None else jax.random.wrap_key_data(words)
        return _bench.transformer(params, typed, x, drop, **settings).astype("float32")

    compiled = _aot.compile_for(target, jax.grad(loss), params, WORDS, jax.ShapeDtypeStruct(shape, dtype))
    batch, time, width = shape
    return _aot.facts(compiled, elements=batch * time * min(width, options.heads * time))


def model_rows(target: str, form: tuple[str, str], dtype: Any, options: Any) -> Iterator[dict[str, Any]]:
    """Compile the transformer with each contender."""
    none = None
    for name, (drop, key) in _bench.model_contenders(_bench.contenders(options.rate)).items():
        ours = model_facts(target, drop, key, form, dtype, options)
        none = none or ours
        yield row(name, ours, none)


def member_facts(target: str, f: Any, x: jax.ShapeDtypeStruct, operands: Any, direction: str) -> _aot.Facts:
    """Compile one call, or its value and gradient by x."""

    def forward(words: jax.Array, x: jax.Array, *operands: Any) -> jax.Array:
        return f(jax.random.wrap_key_data(words), x, *operands)

    def both(words: jax.Array, x: jax.Array, operands: Any, dy: jax.Array) -> Any:
        y, pull = jax.vjp(lambda x: forward(words, x, *operands), x)
        return y, pull(dy)

    if direction == "forward":
        compiled = _aot.compile_for(target, forward, WORDS, x, *operands)
    else:
        compiled = _aot.compile_for(target, both, WORDS, x, operands, jax.eval_shape(forward, WORDS, x, *operands))
    return _aot.facts(compiled, elements=x.size // 64)  # some masks are smaller than the data


def member_rows(target: str, direction: str, dtype: Any) -> Iterator[dict[str, Any]]:
    """Compile each member and its floor."""
    for name, member in _family.MEMBERS.items():
        if isinstance(member.bench, _family.Bench) and direction in member.bench.directions:
            shape = _family.shapes(small=False)[member.bench.shape]
            operands = jax.tree.map(functools.partial(described, dtype=dtype), member.bench.operands(shape))
            x = jax.ShapeDtypeStruct(shape, dtype)
            floor, ours = (member_facts(target, f, x, operands, direction) for f in _family.calls(name))
            yield row(name, ours, floor)


def described(array: jax.Array, dtype: Any) -> jax.ShapeDtypeStruct:
    """Return the type of an array for the compiler, with another dtype for floating-point numbers."""
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(array.shape, dtype if floating else array.dtype)


def tables(options: Any) -> Iterator[tuple[str, Iterator[dict[str, Any]]]]:
    """Return the title and the rows of each table."""
    for target, dtype in itertools.product(options.target, options.dtypes):
        for form in FORMS:
            title = f"{target}, gradient of {options.layers} layers of [{options.size}], {', '.join(form)}, {dtype}"
            yield title, model_rows(target, form, jnp.dtype(dtype), options)
        for direction in DIRECTIONS:
            yield f"{target}, members, {direction}, {dtype}", member_rows(target, direction, jnp.dtype(dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", default=["h100"], choices=_aot.TARGETS)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--size", default="8x512x768", metavar="8x512x768", help="batch, time, and width of x")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--rate", type=float, default=0.1, help="drop rate of the transformer")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="+", default=("",), metavar="PART", help="tables whose titles contain a PART")
    parser.add_argument("--json", metavar="PATH", help="write the results to this file")
    options = parser.parse_args()
    head = _bench.report(__doc__, ())
    rows = []
    for title, lazy_rows in tables(options):
        if any(part in title for part in options.only):
            of_table = list(lazy_rows)
            _bench.table(title, ("", *COLUMNS), [[r["name"], *(r[c] for c in COLUMNS)] for r in of_table])
            rows += [{"table": title, **r} for r in of_table]
    facts = {"layers": options.layers, "size": options.size, "heads": options.heads, "rate": options.rate}
    _bench.write_json(options.json, {**head, **facts, "compiled_for": options.target, "rows": rows})


if __name__ == "__main__":
    main()
