"""Compare the attention kernels with the dense formula on a device, for ``device_report.py``."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _report import Plan, Row, attempt

import jdrop
from jdrop._bits import WORD_BITS

NAME, STAND_IN = "mosaic_gpu", "chunked"
RATE = 0.3
BOUNDS = {"float16": 4e-3, "bfloat16": 2e-2}  # errors, times the largest element of the formula
SIZES = {"batch": 2, "heads": 4, "key_heads": 4, "queries": 256, "keys": 384, "width": 64}
CASES: dict[str, tuple[Row, Row]] = {  # sizes, and options of the call
    "plain": ({}, {}),
    "no dropout": ({}, {"train": False}),
    "wide": ({"width": 128}, {}),
    "one key more than a block": ({"queries": 257, "keys": 385}, {}),
    "few": ({"queries": 1, "keys": 128}, {}),
    "long": ({"batch": 1, "queries": 2048, "keys": 2048, "width": 128}, {"is_causal": True}),
    "causal": ({"queries": 384}, {"is_causal": True}),
    "causal, wide, ragged": ({"queries": 300, "keys": 300, "width": 128}, {"is_causal": True}),
    "causal, more queries than keys": ({"queries": 500, "keys": 200}, {"is_causal": True}),
    "grouped": ({"key_heads": 2}, {"is_causal": True}),
    "one key head": ({"key_heads": 1, "width": 128}, {}),
    "window": ({"queries": 400, "keys": 400}, {"local_window_size": (50, 70)}),
    "causal window": ({"queries": 400, "keys": 400, "width": 128}, {"is_causal": True, "local_window_size": 90}),
    "lengths": ({}, {"query_seq_lengths": (256, 70), "key_value_seq_lengths": (0, 131)}),
    "causal lengths, wide": ({"width": 128}, {"is_causal": True, "key_value_seq_lengths": (384, 131)}),
    "scale": ({}, {"scale": -0.2}),
    "shared by batch and heads": ({}, {"shared_axes": (0, 1)}),
    "shared by queries": ({}, {"shared_axes": 2}),
    "packed": ({"queries": 300, "keys": 300, "width": 128}, {"is_causal": True, "generator": "packed"}),
}


def implementation() -> str:
    """Return the name of the kernels on a GPU, and of what stands in for them elsewhere."""
    return NAME if jax.default_backend() == "gpu" else STAND_IN


def arrays(sizes: Row, dtype: str) -> list[jax.Array]:
    """Return query, key, value, and a gradient of the output."""
    n = SIZES | sizes
    rng, shapes = np.random.default_rng(0), [(n["queries"], n["heads"]), *[(n["keys"], n["key_heads"])] * 2]
    data = [rng.standard_normal((n["batch"], *shape, n["width"]), np.float32) for shape in (*shapes, shapes[0])]
    return [jnp.asarray(x, dtype) for x in data]


def results(name: str, options: Row, data: list[jax.Array]) -> list[np.ndarray]:
    """Return the output and the gradients of query, key, and value."""
    options = {"train": True, **options}
    lengths = {name: jnp.asarray(options.pop(name)) for name in list(options) if name.endswith("_lengths")}

    @jax.jit
    def step(key: jax.Array, rate: jax.Array, q: Any, k: Any, v: Any, do: Any) -> Any:
        attend = lambda *x: jdrop.dot_product_attention(key, *x, rate, implementation=name, **lengths, **options)
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(do)

    with jax.default_matmul_precision("highest"):
        return [np.asarray(x, np.float64) for x in step(jax.random.key(5), jnp.float32(RATE), *data)]


def compare(name: str, case: str, dtype: str) -> Iterator[Row]:
    """Compare an implementation in 16 bits with the dense one in float32, on the same values."""
    sizes, options = CASES[case]
    data = arrays(sizes, dtype)
    ours, exact = results(name, options, data), results("reference", options, [x.astype("float32") for x in data])
    pairs = zip(("out", "dq", "dk", "dv"), ours, exact, strict=True)
    errors = {part: float(np.abs(x - y).max() / max(1.0, np.abs(y).max())) for part, x, y in pairs}
    yield {"ok": all(error <= BOUNDS[dtype] for error in errors.values()), **errors}  # not so for NaN


def decisions(name: str, generator: Any, queries: int = 200, keys: int = 256) -> Iterator[Row]:
    """Read every decision from the output, by equal probabilities and one-hot values."""
    shape, width, key = (2, 3, queries, keys), 64, jax.random.key(6)
    q, k = (jnp.zeros((2, n, 3, width), "bfloat16") for n in (queries, keys))
    parts = []
    for first in range(0, keys, width):
        v = jnp.broadcast_to(jnp.eye(keys, dtype="bfloat16")[None, :, None, first : first + width], (2, keys, 3, width))
        out = jdrop.dot_product_attention(key, q, k, v, RATE, train=True, generator=generator, implementation=name)
        parts.append(np.asarray(out, np.float32).swapaxes(1, 2) != 0)
    mask = np.asarray(jdrop.dropout_mask(key, shape, RATE, generator=generator))
    wrong = int((np.concatenate(parts, axis=-1) != mask).sum())
    yield {"ok": wrong == 0, "detail": f"{wrong} of {np.prod(shape)} decisions differ from dropout_mask"}


def rows(plan: Plan) -> Iterator[Row]:
    """Compare masks, and then each case."""
    name = implementation()
    for generator in WORD_BITS:
        row = {"implementation": name, "case": f"mask, {generator}"}
        yield from attempt(plan, row, functools.partial(decisions, name, generator))
    cases = [*CASES][:: 6 if plan.small else 1]
    for case in cases:
        for dtype in [*BOUNDS][1:] if plan.small else BOUNDS:
            row = {"implementation": name, "case": case, "dtype": dtype}
            yield from attempt(plan, row, functools.partial(compare, name, case, dtype))
