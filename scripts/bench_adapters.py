"""Claim: layers from jdrop.adapters give Flax, Equinox, and Haiku models the speed and memory of jdrop.

The model is a small transformer built from the layers of each library, with ``1 + 3 * layers`` dropouts: on the input
and, in each layer, on the attention probabilities and on both residual branches. Its train step (loss, gradient, SGD)
is compiled without dropout, with the library's own dropout, and with jdrop's. Each ratio compares with the step without
dropout in the same round. The tables show medians and quartiles of the ratios, and the temporary bytes of the step as
reported by XLA.
"""

import argparse
import importlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import _bench
import jax
import jax.numpy as jnp
from jax import Array

THEIRS, FAST, JAX = "its own", "jdrop fast", "jdrop jax"
CONTENDERS = (_bench.NONE, THEIRS, FAST, JAX)
LIBRARIES = {"linen": "flax.linen", "nnx": "flax.nnx", "equinox": "equinox", "haiku": "haiku"}
Step = Callable[[Any, Array, Array], Any]  # (params, key, x) -> params

# ---------------------------------------------------------------------------------- the model in each library


def forward(
    x: Array, dense: Callable[[int], Any], norm: Callable[[], Any], drop: Callable[[Array], Array], options: Any
) -> Array:
    """Apply a transformer to ``[..., time, width]``; each call of ``dense`` or ``norm`` returns the next layer."""
    width = x.shape[-1]
    x = drop(x)
    for _ in range(options.layers):
        q, k, v = jnp.split(dense(3 * width)(norm()(x)).reshape(*x.shape[:-1], options.heads, -1), 3, axis=-1)
        probability = drop(jax.nn.softmax(jnp.einsum("...the,...she->...hts", q, k) / math.sqrt(q.shape[-1])))
        mixed = jnp.einsum("...hts,...she->...the", probability, v).reshape(x.shape)
        x = x + drop(dense(width)(mixed))
        hidden = jax.nn.gelu(dense(4 * width)(norm()(x)))
        x = x + drop(dense(width)(hidden))
    return x


def sizes(width: int, layers: int) -> list[tuple[int, int]]:
    """Return the input and output sizes of the dense layers, in the order in which :func:`forward` uses them."""
    return [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] * layers


def layer_of(library: str, contender: str, name: str) -> Any:
    """Return the layer class of a contender (for Haiku, the function), with its options but without the rate."""
    if contender == THEIRS:
        return getattr(importlib.import_module({"equinox": "equinox.nn"}.get(library, LIBRARIES[library])), name)
    layer = getattr(importlib.import_module(f"jdrop.adapters.{library}"), name)
    return lambda *args, **kwargs: layer(*args, **kwargs, generator="fast" if contender == FAST else "jax")


def linen(contender: str, x: Array, options: Any) -> tuple[Any, Any]:
    from flax import linen

    def drop(x: Array) -> Array:
        if contender == _bench.NONE:
            return x
        return layer_of("linen", contender, "Dropout")(options.rate, deterministic=False)(x)

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x: Array) -> Array:
            return forward(x, linen.Dense, linen.LayerNorm, drop, options)

    params = Model().init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, x)
    return params, lambda params, key, x: Model().apply(params, x, rngs={"dropout": key})


def nnx(contender: str, x: Array, options: Any) -> tuple[Any, Any]:
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            width = x.shape[-1]
            self.dense = nnx.List([nnx.Linear(*size, rngs=rngs) for size in sizes(width, options.layers)])
            self.norm = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2 * options.layers)])
            enabled = contender != _bench.NONE
            self.drop = layer_of("nnx", contender, "Dropout")(options.rate) if enabled else lambda x, rngs: x

        def __call__(self, x: Array, rngs: nnx.Rngs) -> Array:
            dense, norm = iter(self.dense), iter(self.norm)
            drop = lambda x: self.drop(x, rngs=rngs)
            return forward(x, lambda size: next(dense), lambda: next(norm), drop, options)

    graph, params = nnx.split(Model(nnx.Rngs(0)))
    return params, lambda params, key, x: nnx.merge(graph, params)(x, nnx.Rngs(dropout=key))


def equinox(contender: str, x: Array, options: Any) -> tuple[Any, Any]:
    import equinox

    class Model(equinox.Module):
        dense: list[Any]
        norm: list[Any]
        drop: Any

        def __init__(self, key: Array) -> None:
            width = x.shape[-1]
            shapes = sizes(width, options.layers)
            keys = jax.random.split(key, len(shapes))
            self.dense = [equinox.nn.Linear(*size, key=key) for size, key in zip(shapes, keys, strict=True)]
            self.norm = [equinox.nn.LayerNorm(width) for _ in range(2 * options.layers)]
            enabled = contender != _bench.NONE
            self.drop = layer_of("equinox", contender, "Dropout")(options.rate) if enabled else lambda x, key: x

        def __call__(self, x: Array, key: Array) -> Array:
            each = lambda layers: (jax.vmap(layer) for layer in layers)
            dense, norm = each(self.dense), each(self.norm)
            keys: Iterator[Array] = iter(jax.random.split(key, 1 + 3 * options.layers))
            drop = lambda x: self.drop(x, key=next(keys))
            return forward(x, lambda size: next(dense), lambda: next(norm), drop, options)

    params, rest = equinox.partition(Model(jax.random.key(0)), equinox.is_inexact_array)

    def apply(params: Any, key: Array, x: Array) -> Array:
        return jax.vmap(equinox.combine(params, rest))(x, jax.random.split(key, len(x)))

    return params, apply


def haiku(contender: str, x: Array, options: Any) -> tuple[Any, Any]:
    import haiku

    def drop(x: Array) -> Array:
        if contender == _bench.NONE:
            return x
        return layer_of("haiku", contender, "dropout")(haiku.next_rng_key(), options.rate, x)

    norm = lambda: haiku.LayerNorm(axis=-1, create_scale=True, create_offset=True)
    model = haiku.transform(lambda x: forward(x, haiku.Linear, norm, drop, options))
    return model.init(jax.random.key(0), x), model.apply


MODELS = {"linen": linen, "nnx": nnx, "equinox": equinox, "haiku": haiku}

# ---------------------------------------------------------------------------------- measuring


def train_step(library: str, contender: str, x: Array, options: Any) -> tuple[Any, Any]:
    """Return the parameters and the compiled train step of a model."""
    params, apply = MODELS[library](contender, x, options)

    def step(params: Any, key: Array, x: Array) -> tuple[Any, Array]:
        value, grads = jax.value_and_grad(lambda p: (apply(p, key, x) ** 2).mean())(params)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), value

    return params, jax.jit(step).lower(params, jax.random.key(1), x).compile()


def clock(step: Any, params: Any, x: Array) -> Callable[[], float]:
    key = jax.random.key(1)

    def seconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready(step(params, key, x))
        return time.perf_counter() - start

    seconds()
    return seconds


def measure(library: str, options: Any) -> list[dict[str, Any]]:
    """Measure the contenders in one library, and print a table."""
    try:
        importlib.import_module(LIBRARIES[library])
    except ImportError:
        _bench.table(f"{library}: {_bench.MISSING}", (), ())
        return [{"library": library, "missing": _bench.MISSING}]
    x = jax.random.normal(jax.random.key(2), tuple(map(int, options.size.split("x"))))
    compiled = {name: train_step(library, name, x, options) for name in CONTENDERS}
    clocks = {name: clock(step, params, x) for name, (params, step) in compiled.items()}
    times = _bench.interleave([clocks], options.rounds)
    rows: list[dict[str, Any]] = []
    for name, (_, step) in compiled.items():
        ratio, low, high = _bench.ratios(times[name], times[_bench.NONE])
        size = int(step.memory_analysis().temp_size_in_bytes)
        rows.append({"library": library, "contender": name, "milliseconds": _bench.median(times[name]) * 1e3})
        rows[-1] |= {"ratio": ratio, "ratio_25": low, "ratio_75": high, "bytes": size}
        rows[-1]["bytes_ratio"] = size / rows[0]["bytes"]
    columns = ("dropout", "ms", "x none", "25%", "75%", "temporary bytes", "x none")
    _bench.table(f"train step, {library}", columns, [list(r.values())[1:] for r in rows])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", nargs="+", default=tuple(MODELS), choices=tuple(MODELS))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--size", default="8x128x128", metavar="8x128x128", help="batch, time, and width of x")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rate", type=float, default=0.1, help="drop rate")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", metavar="PATH", help="write the results to this file")
    options = parser.parse_args()
    warm = _bench.keep_buffers_warm()
    head = _bench.report(__doc__, options.libraries, warm_buffers=warm or jax.default_backend() != "cpu")
    rows = [row for library in options.libraries for row in measure(library, options)]
    facts = {"layers": options.layers, "size": options.size, "heads": options.heads, "rate": options.rate}
    _bench.write_json(options.json, {**head, **facts, "rows": rows})


if __name__ == "__main__":
    main()
