"""Claim: compiled for an H100 or a TPU, a gradient with jdrop's own bits keeps no mask for its backward pass.

XLA's own compilers make the programs, and need no device: bytes, kernels and stored arrays are facts of compiled
programs, which were not run. There is one table for the gradient of the transformer of ``bench_memory.py`` in each of
its forms, and one for the members of the family on float32[4096,1024] or an image of as many elements.

Install the compilers with ``pip install -e '.[accelerators]'``. Large programs take up to a minute on an H100, and
minutes on a TPU.
"""

import argparse
import itertools
from typing import Any

import _aot  # first: it sets the environment of the compilers
import _bench
import _family
import jax
import jax.numpy as jnp

FORMS = tuple(itertools.product(("unrolled", "scan"), ("plain", "checkpoint")))
WORDS = jax.ShapeDtypeStruct((2,), jnp.uint32)


def contenders(rate: float) -> dict[str, _bench.Drop]:
    """Return dropout in the dtype of x, from none on. Those of ``_bench`` rely on promotion."""
    drops = _bench.contenders(rate)
    return {
        _bench.NONE: lambda key, x: x,
        _bench.SCALE: lambda key, x: x * jnp.asarray(1 / (1 - rate), x.dtype),
        **{name: drops[name] for name in ("jdrop fast", "jdrop jax", "where(bernoulli)")},
    }


def row(facts: _aot.Facts, none: _aot.Facts) -> dict[str, Any]:
    """Return what a table shows of a program beside that without dropout."""
    longest = max((stored.life for stored in facts.stored), default=0.0)
    return {
        "bytes": facts.temporary_bytes,
        "ratio": facts.temporary_bytes / none.temporary_bytes if none.temporary_bytes else None,
        "kernels": facts.kernels,
        "extra kernels": facts.kernels - none.kernels,
        "stored": len(facts.stored),
        "longest life": longest,
        "types": sorted({stored.type for stored in facts.stored}),
    }


def model_facts(target: str, drop: _bench.Drop, form: tuple[str, str], dtype: Any, options: Any) -> _aot.Facts:
    """Compile the gradient of the transformer."""
    shape = tuple(map(int, options.size.split("x")))
    weights = _bench.transformer_weights(options.layers, shape[-1], stacked=form[0] == "scan")
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), weights)

    def loss(params: Any, words: jax.Array, x: jax.Array) -> jax.Array:
        key, checkpoint = jax.random.wrap_key_data(words), form[1] == "checkpoint"
        return _bench.transformer(params, key, x, drop, heads=options.heads, checkpoint=checkpoint).astype("float32")

    compiled = _aot.compile_for(target, jax.grad(loss), params, WORDS, jax.ShapeDtypeStruct(shape, dtype))
    scores = shape[0] * options.heads * shape[1] ** 2
    return _aot.facts(compiled, min(scores, shape[0] * shape[1] * shape[2]))


def model_rows(target: str, options: Any) -> list[dict[str, Any]]:
    """Compile the transformer in its forms, and print a table for each."""
    rows = []
    for form, dtype in itertools.product(FORMS, options.dtypes):
        label = f"{', '.join(form)}, {dtype}"
        if not any(part in label for part in options.only):
            continue
        of_form: list[dict[str, Any]] = []
        none = None
        for name, drop in contenders(options.rate).items():
            facts = model_facts(target, drop, form, jnp.dtype(dtype), options)
            none = none or facts
            of_form.append({"target": target, "form": label, "contender": name, **row(facts, none)})
        print_rows(f"{target}, gradient of {options.layers} layers of [{options.size}], {label}", "contender", of_form)
        rows += of_form
    return rows


def member_rows(target: str, options: Any) -> list[dict[str, Any]]:
    """Compile each member and its gradient, and print a table for each dtype."""
    rows = []
    shapes = _family.shapes(small=False)
    for dtype, direction in itertools.product(options.dtypes, ("forward", "forward+backward")):
        of_table: list[dict[str, Any]] = []
        for name, member in _family.MEMBERS.items():
            if not isinstance(member.bench, _family.Bench):
                continue
            shape = shapes[member.bench.shape]
            floor, ours = _family.drops(name, shape)
            pair = [member_facts(target, f, shape, jnp.dtype(dtype), direction) for f in (floor, ours)]
            of_table.append({"target": target, "member": name, "dtype": dtype, "direction": direction})
            of_table[-1] |= row(pair[1], pair[0])
        print_rows(f"{target}, members, {direction}, {dtype}; ratios are to the floor of a member", "member", of_table)
        rows += of_table
    return rows


def member_facts(target: str, f: Any, shape: tuple[int, ...], dtype: Any, direction: str) -> _aot.Facts:
    """Compile one call, or its value and gradient."""

    def forward(words: jax.Array, x: jax.Array) -> jax.Array:
        return f(jax.random.wrap_key_data(words), x)

    def both(words: jax.Array, x: jax.Array, dy: jax.Array) -> Any:
        y, pull = jax.vjp(lambda x: forward(words, x), x)
        return y, pull(dy.astype(y.dtype))

    x = jax.ShapeDtypeStruct(shape, dtype)
    if direction == "forward":
        compiled = _aot.compile_for(target, forward, WORDS, x)
    else:
        compiled = _aot.compile_for(target, both, WORDS, x, jax.eval_shape(forward, WORDS, x))
    return _aot.facts(compiled, x.size // 64)


def print_rows(title: str, first: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table."""
    names = ("bytes", "ratio", "kernels", "extra kernels", "stored", "longest life")
    text = {float: lambda value: f"{value:.3f}", type(None): lambda value: "-"}
    cells = [[r[first], *(text.get(type(r[n]), lambda value: value)(r[n]) for n in names)] for r in rows]
    _bench.table(title, (first, "temporary bytes", "ratio", "kernels", "extra", "stored", "longest life"), cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", default=["h100"], choices=_aot.TARGETS)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--size", default="8x512x768", metavar="8x512x768", help="batch, time, and width of x")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--rate", type=float, default=0.1, help="drop rate")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="+", default=("",), metavar="PART", help="forms whose names contain a PART")
    parser.add_argument("--members", action="store_true", help="the members in place of the transformer")
    parser.add_argument("--json", metavar="PATH", help="write the results to this file")
    options = parser.parse_args()
    head = _bench.report(__doc__, ())
    rows = []
    for target in options.target:
        rows += member_rows(target, options) if options.members else model_rows(target, options)
    details = {"layers": options.layers, "size": options.size, "heads": options.heads, "rate": options.rate}
    _bench.write_json(options.json, {**head, **details, "compiled for, not run on": options.target, "rows": rows})


if __name__ == "__main__":
    main()
