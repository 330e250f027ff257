"""Claim: compiled for an H100, a gradient with dropout keeps no mask of attention probabilities for its backward pass.

XLA's own compilers make the programs, without a device: bytes, kernels and stored masks are counted in programs that
were not run. Install them with ``pip install -e '.[accelerators]'``. A large program takes up to a minute for an H100,
and minutes for a TPU.

Tables: the gradient of the transformer of ``bench_memory.py`` in four forms, relative to no dropout; the members of the
family on ``[4096, 1024]``, or on images of as many elements, relative to their floors; attention, relative to
``jax.nn`` without dropout; and the train steps of the examples, relative to the same steps with all elements kept. The
transformer and attention are also compiled for four devices that share the batch, and ``distributed_lm.py`` for a mesh
of four. The tables of examples need the extra ``examples``.

Columns: ``kernels`` and ``collectives`` count those of a loop once, ``launches`` and ``cycles`` once for each step.
``extra`` is the number of launches more than in the first row. ``cycles`` is estimated by the compiler, only for TPUs.
``life`` is how long a stored mask is in use: the longest, as a share of the program or of the body of its loop.
``moved_bytes`` are those that launches read and write, each operand once. ``predicted_ms``, only for GPUs, is a model,
not a measurement: moved bytes at 3.0 TB/s, and 2 microseconds for each launch. Caches and the time of matrix products
that exceeds that of their operands are not in the model; workspaces of cuBLAS are counted as written. For attention, it
is the model of ``_prediction.py``, which also has the L2 cache, matrix products, and operations on elements;
``of_bytes_ms`` is the part of moved bytes and launches in it, if all bytes come from memory. The last row of a table of
attention is a lower limit for a fused kernel without dropout: seven matrix products of the scores (two forward, five
backward) at 500 TFLOP/s.

The tables of machine code, only for GPUs, are about the kernel that writes the result, for x of ``[4096, 1024]``:
registers, spilled bytes, the bytes of each load from global memory by one thread, and instructions per element, in all
and by pipe. ``small`` and ``large`` are predictions, not measurements: the time relative to ``x * c`` for that x, with
2 microseconds before each launch, and for x of ``[65536, 1024]``, without. The model: a kernel takes as long as its
slowest part, and all other parts overlap with it. The parts are memory (operands and results once, at 3.0 TB/s) and,
on 132 multiprocessors at 1.755 GHz, the instructions of each pipe (lanes per cycle: integers and comparisons 64, IMAD
64, FP32 and IMAD together 128, MUFU 16) and of all pipes (128 per cycle). Latency, caches, and partly filled
multiprocessors are not in the model. ``limit`` is the slowest part for the large x.
"""

import argparse
import contextlib
import functools
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of this process
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # otherwise, libtpu asks a cloud machine for its metadata
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import _aot
import _bench
import _examples
import _family
import _machine_code
import _prediction
import bench_attention
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jdrop
from jdrop import _bits, _mask

FORMS = tuple(itertools.product(("unrolled", "scan"), ("plain", "checkpoint")))
DIRECTIONS = ("forward", "forward+backward")
WORDS = jax.ShapeDtypeStruct((2,), jnp.uint32)  # of a key, because a key cannot be described for a device
DEVICES = 4
SMALL, LARGE = (4096, 1024), (65536, 1024)  # of the tables of machine code
GAP = 2e-6  # seconds before each launch
FLOPS = 500e12  # per second, of products of matrices of bfloat16
Rows = Iterator[dict[str, Any]]


def milliseconds(ours: _aot.Facts) -> float:
    """Predict the time of a program on an H100."""
    return 1e3 * (ours.moved_bytes / _machine_code.BANDWIDTH + ours.launches * GAP)


def row(name: str, ours: _aot.Facts, base: _aot.Facts) -> dict[str, Any]:
    """Return the row of a program, with its bytes and launches relative to those of a base."""
    return {
        "name": name,
        "temporary_bytes": ours.temporary_bytes,
        "ratio": ours.temporary_bytes / base.temporary_bytes if base.temporary_bytes else None,
        "kernels": ours.kernels,
        "launches": ours.launches,
        "extra": ours.launches - base.launches,
        "collectives": ours.collectives,
        "moved_bytes": ours.moved_bytes,
        "predicted_ms": None if ours.cycles else milliseconds(ours),
        "cycles": ours.cycles,
        "stored": len(ours.stored),
        "life": max((stored.life for stored in ours.stored), default=0.0),
        "types": sorted({stored.type for stored in ours.stored}),
    }


def rows_of(facts: Iterable[tuple[str, _aot.Facts]]) -> Rows:
    """Return the rows of programs, relative to the first."""
    base = None
    for name, ours in facts:
        base = base or ours
        yield row(name, ours, base)


# ---------------------------------------------------------------------------------- the transformer


def model_facts(
    mesh: Mesh, drop: _bench.Drop, key: Any, form: tuple[str, str], layers: int, dtype: Any, options: Any
) -> _aot.Facts:
    """Compile the gradient of the transformer, with the batch sharded over the devices."""
    shape = tuple(map(int, options.size.split("x")))
    weights = _bench.transformer_weights(layers, shape[-1], stacked=form[0] == "scan")
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), weights)
    settings = {"heads": options.heads, "checkpoint": form[1] == "checkpoint"}

    def loss(params: Any, words: jax.Array, x: jax.Array) -> jax.Array:
        typed = None if key is None else jax.random.wrap_key_data(words)
        return _bench.transformer(params, typed, x, drop, **settings).astype("float32")

    x = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec("data")))
    compiled = _aot.compile_for(mesh, jax.grad(loss), params, WORDS, x)
    batch, time, width = shape
    return _aot.facts(compiled, elements=batch * time * min(width, options.heads * time) // mesh.size)


def model_rows(mesh: Mesh, form: tuple[str, str], layers: int, dtype: Any, options: Any) -> Rows:
    """Compile the transformer with each contender."""
    contenders = _bench.model_contenders(_bench.contenders(options.rate))
    return rows_of(
        (name, model_facts(mesh, drop, key, form, layers, dtype, options)) for name, (drop, key) in contenders.items()
    )


# ---------------------------------------------------------------------------------- members


def member_facts(mesh: Mesh, f: Any, x: jax.ShapeDtypeStruct, operands: Any, direction: str) -> _aot.Facts:
    """Compile one call, or its value and gradient by x."""

    def forward(words: jax.Array, x: jax.Array, *operands: Any) -> jax.Array:
        return f(jax.random.wrap_key_data(words), x, *operands)

    def both(words: jax.Array, x: jax.Array, operands: Any, dy: jax.Array) -> Any:
        y, pull = jax.vjp(lambda x: forward(words, x, *operands), x)
        return y, pull(dy)

    if direction == "forward":
        compiled = _aot.compile_for(mesh, forward, WORDS, x, *operands)
    else:
        compiled = _aot.compile_for(mesh, both, WORDS, x, operands, jax.eval_shape(forward, WORDS, x, *operands))
    return _aot.facts(compiled, elements=x.size // 64 // mesh.size)  # some masks are smaller than the data


COMPILED_ONLY = {  # members without a benchmark of their time
    "patch_dropout": _family.Bench(
        floor_name="x[:, kept]",
        floor=lambda key, x: x[:, jnp.arange(x.shape[1] // 2)],
        drop=lambda key, x: jdrop.patch_dropout(key, x, 0.5, token_axis=1, train=True)[0],
        shape="steps",
    ),
    "multi_sample_dropout": _family.Bench(
        floor_name="mean of tanh(c x)",
        floor=lambda key, x: sum(jnp.tanh(x * c) for c in (1.1, 1.2, 1.3, 1.4)) / 4,
        drop=lambda key, x: jdrop.multi_sample_dropout(key, x, _family.RATE, jnp.tanh, 4, train=True),
    ),
}


def member_rows(mesh: Mesh, direction: str, dtype: Any) -> Rows:
    """Compile each member and its floor."""
    timed = {name: member.bench for name, member in _family.MEMBERS.items() if isinstance(member.bench, _family.Bench)}
    for name, bench in (timed | COMPILED_ONLY).items():
        if direction in bench.directions:
            shape = _family.shapes(small=False)[bench.shape]
            operands = jax.tree.map(functools.partial(described, dtype=dtype), bench.operands(shape))
            x = jax.ShapeDtypeStruct(shape, dtype)
            calls = _family.calls_of(name) if name in timed else (bench.floor, bench.drop)
            floor, ours = (member_facts(mesh, f, x, operands, direction) for f in calls)
            yield row(name, ours, floor)


# ---------------------------------------------------------------------------------- attention


def attention_program(
    mesh: Mesh, attend: bench_attention.Attention, rate: float, shape: tuple[int, ...], dtype: Any
) -> Any:
    """Compile attention on ``[batch, length, heads, width]``, forward and backward, with the batch sharded."""
    step = bench_attention.step(attend, rate, DIRECTIONS[1])
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec("data")))
    return _aot.compile_for(mesh, lambda words, *x: step(jax.random.wrap_key_data(words), *x), WORDS, x, x, x, x)


def attention_facts(mesh: Mesh, program: Any, shape: tuple[int, ...]) -> _aot.Facts:
    """Count what is in a program of attention."""
    batch, length, heads, _ = shape
    return _aot.facts(program, elements=batch * heads * length * length // mesh.size)


def attention_times(program: Any, ours: _aot.Facts) -> dict[str, float]:
    """Predict the milliseconds of a program of attention on an H100."""
    of_bytes = ours.moved_bytes / _machine_code.BANDWIDTH + ours.launches * _prediction.GAP
    return {"predicted_ms": 1e3 * _prediction.predict(program).seconds, "of_bytes_ms": 1e3 * of_bytes}


def attention_rows(mesh: Mesh, length: int, causal: bool, dtype: Any, options: Any) -> Rows:
    """Compile the implementations of attention, with and without dropout."""
    batch, heads, width = options.attention
    shape = (batch, length, heads, width)
    of_jax = functools.partial(jax.nn.dot_product_attention, is_causal=causal)
    forms: dict[str, tuple[bench_attention.Attention, float]] = {
        "jax.nn, no dropout": (lambda key, q, k, v, rate: of_jax(q, k, v), 0.0)
    }
    for implementation in ("reference", "chunked"):
        settings: Any = {"train": True, "is_causal": causal, "implementation": implementation}
        ours = functools.partial(jdrop.dot_product_attention, **settings)
        forms |= {f"{implementation}, rate 0": (ours, 0.0), implementation: (ours, options.rate)}
    flax = bench_attention.flax_attention("linen", causal=causal)
    forms |= {"linen": (flax, options.rate)} if flax else {}
    on_tpu, base = mesh.devices.flat[0].platform == "tpu", None
    for name, form in forms.items():
        program = attention_program(mesh, *form, shape, dtype)
        ours = attention_facts(mesh, program, shape)
        base = base or ours
        yield row(name, ours, base) | ({} if on_tpu else attention_times(program, ours))
    if not on_tpu:
        products = 7 * 2 * batch * heads * length**2 * width / mesh.size / (2 if causal else 1)
        yield {"name": "limit, no dropout", "predicted_ms": 1e3 * products / FLOPS}


# ---------------------------------------------------------------------------------- machine code


def machine_contenders(rate: float) -> dict[str, _bench.Drop]:
    """Return dropout and noise, starting with ``x * c``."""
    drops = _bench.contenders(rate)
    drops["jdrop packed"] = lambda key, x: jdrop.dropout(key, x, rate, train=True, generator="packed")
    drops |= {name: _family.calls_of(name)[1] for name in ("alpha_dropout", "gaussian_dropout")}
    return drops | {"x * normal": lambda key, x: x * jax.random.normal(key, x.shape, x.dtype)}


def machine_kernels(mesh: Mesh, drop: _bench.Drop, shape: tuple[int, ...], direction: str, dtype: Any) -> Any:
    """Return the kernels of one call, or of its gradient without its value."""

    def forward(words: jax.Array, x: jax.Array) -> jax.Array:
        return drop(jax.random.wrap_key_data(words), x)

    def backward(words: jax.Array, x: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: forward(words, x), x)[1](dy)[0]

    x = jax.ShapeDtypeStruct(shape, dtype)
    if direction == "forward":
        return _machine_code.kernels(mesh, forward, WORDS, x)
    return _machine_code.kernels(mesh, backward, WORDS, x, x)


def machine_rows(mesh: Mesh, direction: str, dtype: Any, rate: float) -> Rows:
    """Count the instructions of each contender, and predict its time relative to the first."""
    floor = None
    for name, drop in machine_contenders(rate).items():
        small, large = (machine_kernels(mesh, drop, shape, direction, dtype) for shape in (SMALL, LARGE))
        times = _machine_code.seconds(small, GAP), _machine_code.seconds(large)
        floor = floor or times
        main = small[-1]
        elements = math.prod(SMALL) / main.threads
        yield {
            "name": name,
            "kernels": len(small),
            "registers": main.registers,
            "spills": main.spills,
            "loads": "+".join(map(str, main.loads)),
            "instructions": len(main.instructions) / elements,
            **{pipe: count / elements for pipe, count in main.pipes.items()},
            "limit": max(large[-1].limits, key=large[-1].limits.get),
            "small": times[0] / floor[0],
            "large": times[1] / floor[1],
        }


# ---------------------------------------------------------------------------------- examples


def all_kept(bits: Any, words: jax.Array, rate: Any, shape: Any, index: Any, platform: Any) -> jax.Array:
    return jnp.ones(jnp.broadcast_shapes(*(at.lo.shape for at in index)), bool)


def bits_of_jax(function: str, key: jax.Array, generator: str, argument: str) -> Any:
    return _bits.bits_for(function, key, "jax", argument)


PATCHES: dict[str, Any] = {
    _bench.SCALE: mock.patch.object(_bits.FastBits, "keep_at", all_kept),
    "jdrop fast": contextlib.nullcontext(),
    "jdrop jax": mock.patch.object(_mask, "bits_for", bits_of_jax),
}


def example_rows(target: str, example: str) -> Rows:
    """Compile the train steps of an example with each contender."""

    def facts(step: _examples.Step, patch: Any) -> _aot.Facts:
        jax.clear_caches()  # they have traces of other contenders
        with patch:
            return _aot.facts(_examples.compile_for(target, step), elements=1024)

    steps = _examples.train_steps(example)
    for i, step in enumerate(steps, 1):
        number = f"step {i} of {len(steps)}, " if len(steps) > 1 else ""
        yield from rows_of((number + name, facts(step, patch)) for name, patch in PATCHES.items())


def described(array: jax.Array, dtype: Any) -> jax.ShapeDtypeStruct:
    """Return the type of an array for the compiler, with another dtype for floating-point numbers."""
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(array.shape, dtype if floating else array.dtype)


def tables(options: Any) -> Iterator[tuple[str, Rows]]:
    """Return the title and the rows of each table."""
    for target, devices, name in itertools.product(options.target, (1, DEVICES), options.dtypes):
        mesh, dtype, on = _aot.mesh(target, devices), jnp.dtype(name), f"{devices} x {target}"
        for layers, form in itertools.product(options.layers, FORMS if devices == 1 else FORMS[:1]):
            title = f"{on}, gradient of {layers} layers of [{options.size}], {', '.join(form)}, {name}"
            yield title, model_rows(mesh, form, layers, dtype, options)
        for direction in DIRECTIONS if devices == 1 else ():
            yield f"{on}, members, {direction}, {name}", member_rows(mesh, direction, dtype)
        for direction in ("forward", "backward") if target in _aot.GPUS and devices == 1 else ():
            yield f"{on}, machine code, {direction}, {name}", machine_rows(mesh, direction, dtype, options.rate)
        for length, causal in itertools.product(options.lengths, (False, True)) if name == "bfloat16" else ():
            title = f"{on}, attention of {length}{', causal' * causal}, forward+backward, {name}"
            yield title, attention_rows(mesh, length, causal, dtype, options)
    for target, example in itertools.product(options.target, _examples.NAMES):
        yield f"{target}, train step of {example}.py", example_rows(target, example)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", default=["h100"], choices=_aot.TARGETS)
    parser.add_argument("--layers", type=int, nargs="+", default=[4])
    parser.add_argument("--size", default="8x512x768", metavar="8x512x768", help="batch, time, and width of x")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192], help="lengths of attention")
    parser.add_argument("--attention", type=int, nargs=3, default=[4, 16, 64], metavar=("BATCH", "HEADS", "WIDTH"))
    parser.add_argument("--rate", type=float, default=0.1, help="drop rate of the transformer and of attention")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="+", default=("",), metavar="PART", help="tables whose titles contain a PART")
    parser.add_argument("--json", metavar="PATH", help="write the results to this file")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)  # for the mesh of an example
    head = _bench.report(__doc__, ())
    rows = []
    for title, lazy_rows in tables(options):
        if any(part in title for part in options.only):
            of_table = list(lazy_rows)
            columns = [column for column in of_table[0] if column not in ("name", "types")]
            _bench.table(title, ("", *columns), [[r["name"], *(r.get(c) for c in columns)] for r in of_table])
            rows += [{"table": title, **r} for r in of_table]
    settings = {name: getattr(options, name) for name in ("heads", "attention", "rate")}
    _bench.write_json(options.json, {**head, **settings, "compiled_for": options.target, "rows": rows})


if __name__ == "__main__":
    main()
