"""Claim: a gradient with dropout stores no mask: it needs as much temporary memory as with a fixed mask.

The tables show the temporary bytes of the compiled gradient of a transformer, as reported by XLA. There is one table
per variant: unrolled or scanned over layers, plain or with ``jax.checkpoint`` around each layer, with one key or with
per-example keys under ``jax.vmap``. The last table shows the residuals of ``jax.vjp`` of a single call.

``fixed mask`` multiplies by a constant array, without random numbers and without a mask in temporary memory. Its extra
memory over no dropout comes from how XLA schedules a model with these multiplications. ``scale`` has no such cost,
because XLA moves a multiplication by a scalar elsewhere.
"""

import argparse
import itertools
from typing import Any

import _bench
import jax
import jax.numpy as jnp
import numpy as np

VARIANTS = tuple(itertools.product(("unrolled", "scan"), ("plain", "checkpoint"), ("one key", "per-example keys")))


def fixed_mask(rate: float) -> _bench.Drop:
    """Return dropout that multiplies by a constant array, the same for all inputs of one shape."""
    return lambda key, x: x * ((np.random.default_rng(0).random(x.shape) >= rate) / np.float32(1 - rate))


def temporary_bytes(
    drop: _bench.Drop, key: jax.Array | None, variant: tuple[str, str, str], shape: tuple[int, ...], options: Any
) -> int:
    """Return the temporary bytes of the compiled gradient of the model."""
    loop, remat, keys = variant
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    params = _bench.transformer_weights(options.layers, shape[-1], stacked=loop == "scan")

    def model(params: Any, key: Any, x: jax.Array) -> jax.Array:
        return _bench.transformer(params, key, x, drop, heads=options.heads, checkpoint=remat == "checkpoint")

    def each(params: Any, key: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(model, in_axes=(None, 0, 0))(params, key, x).mean()

    one = keys == "one key"
    batch = key if one or key is None else jax.random.split(key, shape[0])
    compiled = jax.jit(jax.grad(model if one else each)).lower(params, batch, x).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def residuals(drop: _bench.Drop, key: jax.Array | None, shape: tuple[int, ...]) -> list[jax.Array]:
    """Return the residual arrays in the vjp closure of one call."""
    pull = jax.vjp(lambda x: drop(key, x), jnp.ones(shape))[1]
    return [leaf for leaf in jax.tree.leaves(pull) if isinstance(leaf, jax.Array)]


def model_rows(contenders: dict[str, Any], shape: tuple[int, ...], options: Any) -> list[dict[str, Any]]:
    """Measure the variants of the model, and print a table for each."""
    rows = []
    for variant in VARIANTS:
        label = ", ".join(variant)
        if not any(part in label for part in options.only):
            continue
        variant_rows: list[dict[str, Any]] = []
        for name, (drop, key) in contenders.items():
            variant_rows.append({"variant": label, "contender": name})
            if drop is None:
                variant_rows[-1]["missing"] = _bench.MISSING
                continue
            size = temporary_bytes(drop, key, variant, shape, options)
            variant_rows[-1] |= {"bytes": size, "ratio": size / variant_rows[0].get("bytes", size)}
        columns = ("contender", "temporary bytes", "x none")
        _bench.table(f"gradient, {label}", columns, [list(r.values())[1:] for r in variant_rows])
        rows += variant_rows
    return rows


def closure_rows(contenders: dict[str, Any], shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """Measure the residuals for the backward pass of one call, and print a table."""
    rows: list[dict[str, Any]] = []
    for name, (drop, key) in contenders.items():
        rows.append({"contender": name})
        if drop is None:
            rows[-1]["missing"] = _bench.MISSING
            continue
        arrays = residuals(drop, key, shape)
        named = ", ".join(f"{a.dtype.name}[{','.join(map(str, a.shape))}]" for a in arrays)
        rows[-1] |= {"bytes": sum(a.nbytes for a in arrays), "arrays": named}
    title = f"residuals of jax.vjp for one call on float32[{','.join(map(str, shape))}]"
    _bench.table(title, ("contender", "bytes", "arrays"), [list(r.values()) for r in rows])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--size", default="8x128x256", metavar="8x128x256", help="batch, time, and width of x")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rate", type=float, default=0.1, help="drop rate")
    names = _bench.JAX_PEERS
    parser.add_argument("--peers", nargs="+", default=names, choices=(*names, "none"), help="other libraries")
    parser.add_argument("--only", nargs="+", default=("",), metavar="PART", help="variants whose names contain a PART")
    parser.add_argument("--json", metavar="PATH", help="write the results to this file")
    options = parser.parse_args()
    peers = _bench.peer_names(options.peers)
    head = _bench.report(__doc__, peers)
    shape = tuple(map(int, options.size.split("x")))
    drops = _bench.contenders(options.rate) | {"fixed mask": fixed_mask(options.rate)}
    contenders = _bench.model_contenders(drops | _bench.peers(peers, options.rate))
    rows = model_rows(contenders, shape, options)
    closures = closure_rows({name: contender for name, contender in contenders.items() if name != _bench.NONE}, shape)
    facts = {"layers": options.layers, "size": options.size, "heads": options.heads, "rate": options.rate}
    _bench.write_json(options.json, {**head, **facts, "rows": rows, "closures": closures})


if __name__ == "__main__":
    main()
