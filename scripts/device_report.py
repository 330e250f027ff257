"""Claim: an accelerator gives the masks of a CPU, and dropout runs there at the speed of a copy.

One command for the first minutes on a new device: ``python scripts/device_report.py --json report.json``. The parts,
the most important first: known answers, the checks of ``check_reproducibility.py``, dropout and the other members
relative to a copy, the gradient of a transformer, blocks that skip units, the attention kernels against the formula,
attention, a core of the tests, and a trainer.
``--only`` selects parts, and ``--small`` rehearses them on tiny sizes.

A part or a case that fails ends nothing else, and the file is written after each row. A case that would start after
``--seconds`` is skipped. The exit code is 1 if a check failed or anything raised an exception; what the machine lacks
is missing, not failed. ``ratio`` compares within a round: with ``x * c``, the floor of a member, no dropout, or
attention at rate 0. ``temporary_MB`` and ``peak_MB`` are those of the compiled program, as reported by XLA.
"""

import argparse
import functools
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch and the tests use the same device

import _report
import _thin

sys.path.insert(0, str(_report.ROOT))

import _bench
import _clocks
import _family
import _kernel_checks
import bench_attention
import check_reproducibility
import jax
import jax.numpy as jnp
import numpy as np
from _report import Maker, Plan, Row, Timed, UnavailableError, attempt, run_program, time_block

import jdrop

RATE = _family.RATE
ABSENT = "not installed, or not for this device"
DTYPES = ("float32", "bfloat16")
FORWARD, BOTH = _clocks.DIRECTIONS
COPIES = ("jax copy", "torch copy")
SHAPES = {"flat": (2**16, 1024), "steps": (2**10, 64, 1024), "image": (2**9, 32, 64, 64)}  # 2**26 elements each
LAYERS, MODEL, HEADS = 4, (8, 512, 768), 12  # of the transformer, as in check_compiled.py
LENGTHS, WIDTHS, TOKENS = (1024, 4096, 8192), (64, 128), 16384  # of attention; tokens are batch x length
LIMIT = 20e9  # largest temporary bytes to run
RESERVED = {
    "members": 0.45,
    "transformer": 0.3,
    "thin": 0.25,
    "kernels": 0.2,
    "attention": 0.15,
}  # shares of time, for what follows
TESTS = ("tests/test_known_answers.py", "tests/test_elementwise.py", "tests/test_masks.py")
TEST_WORKERS, TRAINER_STEPS = 8, 1000
BLOCK_TOKENS = 8192  # of the blocks that skip units

# ---------------------------------------------------------------------------------- the same bits as on CPU


def known_answers(plan: Plan) -> Iterator[Row]:
    """Check the frozen answers in the tests, and masks of large arrays against those of the CPU."""
    try:
        import test_known_answers as frozen  # needs pytest
    except ModuleNotFoundError as error:
        yield from masks_of_reference(f"the frozen answers need {error.name}")
    else:
        tables = [
            ("masks", frozen.test_small_masks_are_frozen, frozen.MASKS),
            ("large masks", frozen.test_large_masks_are_frozen, frozen.DIGESTS),
            ("derived keys", frozen.test_derived_keys_are_frozen, frozen.DERIVED),
            ("seeds", frozen.test_seeds_are_frozen, frozen.SEEDS),
            ("words", frozen.test_words_are_frozen, frozen.WORDS),
        ]
        for name, check, cases in tables[:1] if plan.small else tables:
            wrong = [case for case in cases if not passes(check, case)]
            yield {
                "name": name,
                "ok": not wrong,
                "detail": f"{len(cases)} frozen answers, wrong: {wrong[:3] or 'none'}",
            }
    for shape in [(64, 128)] if plan.small else [(3, 129), (2**24,), SHAPES["flat"]]:
        yield from (masks_of_cpu(shape, dtype) for dtype in DTYPES)


def passes(check: Callable[..., None], case: Sequence[Any]) -> bool:
    try:
        check(*case)
    except AssertionError:
        return False
    return True


def masks_of_reference(reason: str) -> Iterator[Row]:
    """Compare with the NumPy version of the masks."""
    import reference

    for impl, words in check_reproducibility.KEY_WORDS.items():
        key = jax.random.wrap_key_data(jnp.asarray(words, jnp.uint32), impl=impl)
        masks = [(reference.mask(words, (7, 3, 50), r), jdrop.dropout_mask(key, (7, 3, 50), r)) for r in (0.1, 0.5)]
        yield check_reproducibility.same(f"NumPy, {impl}", masks, reason)._asdict()


def masks_of_cpu(shape: tuple[int, ...], dtype: str) -> Row:
    """Compare a mask, and those of dropout and of its gradient, with the same program on the CPU."""

    @jax.jit
    def draw(key: jax.Array, x: jax.Array) -> list[jax.Array]:
        y, pull = jax.vjp(lambda x: jdrop.dropout(key, x, RATE, train=True), x)
        return [jdrop.dropout_mask(key, shape, RATE), y != 0, pull(x)[0] != 0]

    arguments = jax.random.key(5), jnp.ones(shape, dtype)
    here, there = draw(*arguments), draw(*jax.device_put(arguments, jax.devices("cpu")[0]))
    name = f"{'x'.join(map(str, shape))} {dtype}"
    return check_reproducibility.same(name, list(zip(here, there, strict=True)), "mask, dropout, gradient")._asdict()


def reproducibility(plan: Plan) -> Iterator[Row]:
    """Run the checks of check_reproducibility.py."""
    for check in check_reproducibility.CHECKS[::6] if plan.small else check_reproducibility.CHECKS:
        yield check_reproducibility.run(check)._asdict()


# ---------------------------------------------------------------------------------- dropout and members


@functools.cache
def random_data(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Return two arrays, which at full size do not fit in the cache of a GPU."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32) for _ in range(2)]


@functools.cache
def device_data(shape: tuple[int, ...], dtype: str) -> list[jax.Array]:
    return [jnp.asarray(x, dtype) for x in random_data(shape)]


def jax_clock(
    drop: Callable[..., Any], direction: str, shape: tuple[int, ...], dtype: str, operands: Sequence[Any] = ()
) -> Timed:
    """Return a clock of ``drop(key, x, *operands)``. Operands are arguments, because XLA folds constants."""
    x, dy = device_data(shape, dtype)
    inputs = itertools.cycle([(jax.random.key(0), x, dy, *operands), (jax.random.key(1), dy, x, *operands)])
    return _clocks.Clock(_clocks.jax_step(drop, direction), inputs, 1, jax.block_until_ready), {}


def torch_clock(drop: Callable[[Any, Any], Any] | None, direction: str, shape: tuple[int, ...], dtype: str) -> Timed:
    if drop is None:
        raise UnavailableError(ABSENT)
    clock = _clocks.torch_clock(drop, random_data(shape), dtype, direction, 1)
    if isinstance(clock, str):
        raise UnavailableError(clock)
    return clock, {}


def with_bandwidth(plan: Plan, rows: list[Row], dtype: str, size: int) -> list[Row]:
    """Add the bandwidth of programs that must move ``size`` bytes, and its share of that of a copy."""
    for row in rows:
        if "milliseconds" in row:
            row["GB_per_second"] = size / row["milliseconds"] / 1e6
            if row["contender"] in COPIES:
                plan.copy[dtype] = max(plan.copy.get(dtype, 0.0), row["GB_per_second"])
    for row in rows:
        if "GB_per_second" in row and dtype in plan.copy:
            row["copy_percent"] = 100 * row["GB_per_second"] / plan.copy[dtype]
    return rows


def dropout(plan: Plan) -> Iterator[Row]:
    """Time a copy, ``x * c``, dropout, and the dropout of other libraries."""
    for dtype, direction in itertools.product(dtypes(plan), _clocks.DIRECTIONS):
        block = functools.partial(dropout_block, plan, dtype, direction)
        yield from attempt(plan, {"dtype": dtype, "direction": direction}, block)


def dropout_block(plan: Plan, dtype: str, direction: str) -> list[Row]:
    case = direction, shapes(plan)["flat"], dtype
    makers: dict[str, Maker] = {}
    if direction == FORWARD:
        makers["jax copy"] = functools.partial(jax_clock, lambda key, x: jnp.copy(x), *case)
        makers["torch copy"] = functools.partial(torch_clock, lambda f, x: x.clone(), *case)
    for name, drop in _bench.contenders(RATE).items():
        makers[name] = functools.partial(jax_clock, drop, *case)
    for name in ("linen", "nnx", "equinox"):
        makers[name] = lambda name=name: jax_clock(_bench.peer(name, RATE), *case)
    makers["torch"] = functools.partial(torch_clock, lambda f, x: f.dropout(x, RATE, training=True), *case)
    arrays = 2 if direction == FORWARD else 4
    size = arrays * int(np.prod(case[1])) * jnp.dtype(dtype).itemsize
    return with_bandwidth(plan, time_block(plan, makers, _bench.SCALE), dtype, size)


def shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    return _family.shapes(small=True) if plan.small else SHAPES


def dtypes(plan: Plan) -> Sequence[str]:
    return DTYPES[1:] if plan.small else DTYPES


def members(plan: Plan) -> Iterator[Row]:
    """Time each other member, its floor, and its equivalents in other libraries."""
    for dtype, (name, member) in itertools.product(dtypes(plan), _family.MEMBERS.items()):
        if name == "dropout" or not isinstance(member.bench, _family.Bench):
            continue
        for direction in member.bench.directions[-1:] if plan.small else member.bench.directions:
            block = functools.partial(member_block, plan, name, dtype, direction)
            yield from attempt(plan, {"member": name, "dtype": dtype, "direction": direction}, block)


def member_block(plan: Plan, name: str, dtype: str, direction: str) -> list[Row]:
    bench = _family.MEMBERS[name].bench
    shape = shapes(plan)[bench.shape]
    cast = lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a
    operands = jax.tree.map(cast, bench.operands(shape))
    floor, ours = _family.calls_of(name)
    case = direction, shape, dtype
    makers: dict[str, Maker] = {
        bench.floor_name: functools.partial(jax_clock, floor, *case, operands),
        "jdrop": functools.partial(jax_clock, ours, *case, operands),
    }
    for peer, drop in _family.peers_of(bench, ["linen"]).items():
        makers[peer] = functools.partial(jax_clock, drop, *case)
    for peer in [peer for peer in ("torch", "timm") if getattr(bench, peer)]:
        makers[peer] = lambda peer=peer: torch_clock(_family.torch_peers_of(bench, [peer]).get(peer), *case)
    x = jax.ShapeDtypeStruct(shape, dtype)
    out = jax.eval_shape(ours, jax.random.key(0), x, *operands)
    moved = [x, *operands, out] + ([x, out] if direction == BOTH else [])
    size = sum(array.size * array.dtype.itemsize for array in moved)
    return with_bandwidth(plan, time_block(plan, makers, bench.floor_name), dtype, size)


# ---------------------------------------------------------------------------------- models


def compiled_clock(f: Callable[..., Any], arguments: tuple[Any, ...]) -> Timed:
    """Compile a program; return its clock and its memory."""
    program = jax.jit(f).lower(*arguments).compile()
    memory = program.memory_analysis()
    if memory.temp_size_in_bytes > LIMIT:
        raise UnavailableError(f"needs {memory.temp_size_in_bytes / 1e9:.1f} GB of temporary memory")
    facts = {"temporary_MB": memory.temp_size_in_bytes / 1e6, "peak_MB": memory.peak_memory_in_bytes / 1e6}
    return _clocks.Clock(program, itertools.repeat(arguments), 1, jax.block_until_ready), facts


def transformer(plan: Plan) -> Iterator[Row]:
    """Time the gradient of the transformer of the other benchmarks, in bfloat16, with each contender."""
    layers, shape, heads = (1, (2, 16, 32), 2) if plan.small else (LAYERS, MODEL, HEADS)
    weights, tree = jax.tree.flatten(_bench.transformer_weights(layers, shape[-1], stacked=False))
    keys = jax.random.split(jax.random.key(1), len(weights))
    arrays = [0.02 * jax.random.normal(key, w.shape, "bfloat16") for key, w in zip(keys, weights, strict=True)]
    params, x = jax.tree.unflatten(tree, arrays), jax.random.normal(jax.random.key(2), shape, "bfloat16")

    def make(drop: _bench.Drop | None, key: Any) -> Timed:
        if drop is None:
            raise UnavailableError(ABSENT)
        loss = lambda params, key, x: _bench.transformer(params, key, x, drop, heads=heads)
        return compiled_clock(jax.grad(loss), (params, key, x))

    peers = _bench.peers([] if plan.small else ["linen", "equinox"], RATE)
    contenders = _bench.model_contenders(_bench.contenders(RATE) | peers)
    makers = {name: functools.partial(make, *contender) for name, contender in contenders.items()}
    yield from time_block(plan, makers, _bench.NONE)


def thin(plan: Plan) -> Iterator[Row]:
    """Time blocks that skip dropped units, forward and backward, in bfloat16."""
    tokens, scale = (32, 16) if plan.small else (BLOCK_TOKENS, 1)
    features, units = _thin.FEATURES // scale, _thin.UNITS // scale
    x, up, down = (
        device_data((tokens, features), "bfloat16")[0],
        *(
            0.02 * jax.random.normal(jax.random.key(i), shape, "bfloat16")
            for i, shape in enumerate([(features, units), (units, features)])
        ),
    )

    def make(name: str) -> Timed:
        block, units_first = _thin.BLOCKS[name]
        loss = lambda x, up, down, key: block(key, x, up, down).astype("float32").sum()
        return compiled_clock(jax.grad(loss, (0, 1, 2)), (x, down if units_first else up, down, jax.random.key(1)))

    names = [*_thin.BLOCKS][:: 4 if plan.small else 1]
    yield from time_block(plan, {name: functools.partial(make, name) for name in names}, _bench.NONE)


def kernels(plan: Plan) -> Iterator[Row]:
    """Compare the attention kernels with the dense formula; on a CPU, blockwise attention stands in for them."""
    yield from _kernel_checks.rows(plan)


def attention(plan: Plan) -> Iterator[Row]:
    """Time forward+backward of attention, in bfloat16, beside dense Flax, cuDNN without dropout, and fused PyTorch."""
    lengths, widths = ((32,), (16,)) if plan.small else (LENGTHS, WIDTHS)
    for width, causal, length in itertools.product(widths, (False, True), lengths):
        batch, heads = (2, 2) if plan.small else (TOKENS // length, 16)
        case = {"length": length, "width": width, "causal": causal}
        block = functools.partial(attention_block, plan, (batch, length, heads, width), causal)
        yield from attempt(plan, case, block)


def attention_block(plan: Plan, shape: tuple[int, ...], causal: bool) -> list[Row]:
    rng = np.random.default_rng(0)
    data = [rng.standard_normal(shape, np.float32) for _ in range(4)]
    arrays = jax.random.key(0), *(jnp.asarray(x, "bfloat16") for x in data)
    ours = functools.partial(jdrop.dot_product_attention, train=True, is_causal=causal, implementation="chunked")
    cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
    on_gpu = jax.default_backend() == "gpu"
    kernel = functools.partial(ours, implementation=_kernel_checks.implementation())

    def make(attend: bench_attention.Attention | None, rate: float) -> Timed:
        if attend is None:
            raise UnavailableError(ABSENT)
        return compiled_clock(bench_attention.step(attend, rate, BOTH), arrays)

    makers: dict[str, Maker] = {
        "jdrop, rate 0": lambda: make(ours, 0.0),
        f"jdrop, rate {RATE}": lambda: make(ours, RATE),
        "kernel, rate 0": lambda: make(kernel, 0.0),
        f"kernel, rate {RATE}": lambda: make(kernel, RATE),
        f"kernel, packed, rate {RATE}": lambda: make(functools.partial(kernel, generator="packed"), RATE),
        f"torch, rate {RATE}": lambda: torch_attention(data, RATE, causal),
        "torch, rate 0": lambda: torch_attention(data, 0.0, causal),
        "cuDNN, rate 0": lambda: make((lambda key, q, k, v, rate: cudnn(q, k, v)) if on_gpu else None, 0.0),
        f"linen, rate {RATE}": lambda: make(bench_attention.flax_attention("linen", causal=causal), RATE),
    }
    return time_block(plan, makers, "jdrop, rate 0")


def torch_attention(data: list[np.ndarray], rate: float, causal: bool) -> Timed:
    """Return the clock of PyTorch's attention; on a GPU, only a fused kernel may run it."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    step = bench_attention.torch_step(rate, BOTH, causal=causal)
    if jax.default_backend() != "cpu":
        if not torch.cuda.is_available():
            raise UnavailableError(ABSENT)
        fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
        step = sdpa_kernel(fused)(step)
    inputs = itertools.repeat(tuple(bench_attention.torch_inputs(data, "bfloat16")))
    return _clocks.Clock(step, inputs, 1, bench_attention.torch_wait), {}


# ---------------------------------------------------------------------------------- programs


def tests(plan: Plan) -> Iterator[Row]:
    """Run a core of the tests, compiled as for users on an accelerator."""
    if importlib.util.find_spec("pytest") is None:
        yield {"name": "pytest", "missing": "not available: pytest"}
        return
    on_cpu = jax.default_backend() == "cpu"
    parallel = importlib.util.find_spec("xdist") is not None and not on_cpu
    workers = ["-n", str(TEST_WORKERS)] if parallel else ["-p", "no:xdist"]
    flags = os.environ.get("XLA_FLAGS", "") + ("" if on_cpu else " --xla_backend_optimization_level=3")
    selected = [TESTS[0], "-k", "small_masks"] if plan.small else TESTS
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", *workers, *selected]
    code, output = run_program(command, plan.seconds_left(), XLA_FLAGS=flags)
    yield {"name": "pytest", **outcome(code, output)}
    failures = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    yield from ({"name": "failure", "detail": line[:200]} for line in failures[:20])


def trainer(plan: Plan) -> Iterator[Row]:
    """Train the main example."""
    missing = [name for name in ("sklearn", "optax", "tqdm", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        yield {"name": "digits_mlp", "missing": f"not available: {', '.join(missing)}"}
        return
    steps = 2 if plan.small else TRAINER_STEPS
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "examples/digits_mlp.py", "--steps", str(steps), "--out", out]
        code, output = run_program(command, plan.seconds_left())
    yield {"name": "digits_mlp", **outcome(code, output), "steps": steps, "seconds": time.monotonic() - start}
    yield from ({"name": "output", "detail": line} for line in output.splitlines()[-5:])


def outcome(code: int | None, output: str) -> Row:
    """Return whether a program succeeded, and the last line of its output."""
    if code is None:
        return {"missing": _report.STOPPED}
    return {"ok": code == 0, "exit_code": code, "detail": (output.strip().splitlines() or [""])[-1][:200]}


PARTS = (known_answers, reproducibility, dropout, members, transformer, thin, kernels, attention, tests, trainer)


def commit() -> str:
    command = ["git", "-C", str(_report.ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> int:
    """Run the parts, and print and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.__name__ for part in PARTS]
    parser.add_argument("--only", nargs="+", default=names, choices=names, help="the parts to run")
    parser.add_argument("--seconds", type=float, default=400.0, help="no part and no case starts later")
    parser.add_argument("--small", action="store_true", help="tiny sizes, as a rehearsal on CPU")
    parser.add_argument("--json", metavar="PATH", help="write the results to this file")
    options = parser.parse_args()
    plan = Plan(options.small, time.monotonic() + options.seconds)
    facts = {"commit": commit(), "platform": " ".join(jax.devices()[0].client.platform_version.split())}
    entries: list[Row] = []
    report = {**_bench.report(__doc__, ("linen", "equinox", "torch", "timm"), **facts), "small": options.small}
    report |= {"budget_seconds": options.seconds, "parts": entries}
    parts = [part for part in PARTS if part.__name__ in options.only]
    for part in parts:
        reserved = 0.0 if part is parts[-1] else options.seconds * RESERVED.get(part.__name__, 0.0)
        entries.append({})
        _report.run_part(
            part, plan.reserving(reserved), entries[-1], lambda: _report.replace_json(options.json, report)
        )
    summary = [(e["part"], e["status"], e["seconds"], len(e["rows"]), e.get("error")) for e in entries]
    _bench.table("parts", ("part", "status", "seconds", "rows", "error"), summary)
    return int(any(entry["status"] in ("failed", "raised") for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
