"""Claim: at rate 0.5 and batch 512 or more, thin layers make a forward and backward on a CPU 1.6 times as fast.

That is relative to no dropout. The claim is also 1.4 times at batch 256, 1.2 times at rate 0.25, and, for ``skip_path``
at rate 0.4, 1.4 times in a model whose time is in its branches. Every round times every contender once, in a new random
order. A speedup divides the time without dropout by that of the contender in the same round; the tables show medians
and quartiles. Beside them are the temporary bytes, and the total: temporary bytes, arguments, and results, without the
arguments whose memory results reuse, as reported by XLA. ``x none`` compares the total with that of no dropout.

- ``blocks``: two dense layers with dropout between them, and all gradients. ``transposed`` stores the first kernel as
  [outputs, inputs], so that the weights of a unit are contiguous in both kernels.
- ``branches``: residual blocks, with whole branches dropped for some examples. The time of ``stochastic_depth``, which
  drops branches for all examples at once, depends on the key, and the keys differ from round to round.
- ``steps``: a train step of the first block of ``--sizes``. A dense update of the optimizer takes as long as without
  dropout. A lazy update takes the kept weights and their moments, differentiates with respect to these weights only,
  updates them, and puts them back. Lazy Adam leaves the moments of dropped units as they are, so it is not Adam.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import _bench
import _clocks
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import jdrop
from jdrop import thin
from jdrop.keys import derive

NONE, EACH, SHARED = _bench.NONE, "jdrop, a mask per example", "jdrop, one shared mask"
TRANSPOSED = ", transposed"
OUT_IN = ("out_in", "in_out")
RATE, LOW_RATE, SKIP_RATE = 0.5, 0.25, 0.4
Block = Callable[[Any, dict[str, Array], Array], Array]  # (key, weights, x) -> y
Contenders = dict[tuple[str, float], Block]

# ---------------------------------------------------------------------------------- models


def weights_of(width: int, units: int, seed: int = 0) -> dict[str, Array]:
    """Return two layers, the first of them in both layouts."""
    rng = np.random.default_rng(seed)
    up, down = (rng.standard_normal(shape, np.float32) / shape[0] ** 0.5 for shape in ((width, units), (units, width)))
    arrays = {"up": up, "up.T": up.T.copy(), "up_bias": np.zeros(units), "down": down, "down_bias": np.zeros(width)}
    return {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}


def used(weights: dict[str, Array], out_in: bool) -> dict[str, Array]:
    """Leave out the first kernel in the other layout."""
    return {name: w for name, w in weights.items() if name != ("up" if out_in else "up.T")}


def dense(drop: _bench.Drop) -> Block:
    """Return two dense layers with dropout between them."""

    def block(key: Any, w: dict[str, Array], x: Array) -> Array:
        h = jax.nn.gelu((x @ w["up"] if "up" in w else x @ w["up.T"].T) + w["up_bias"])
        return drop(key, h) @ w["down"] + w["down_bias"]

    return block


def thin_block(rate: float, **how: Any) -> Block:
    """Return the same by ``thin.mlp``."""

    def block(key: Any, w: dict[str, Array], x: Array) -> Array:
        layouts, up = ("in_out", w["up"]) if "up" in w else (OUT_IN, w["up.T"])
        layers = [(up, w["up_bias"]), (w["down"], w["down_bias"])]
        return thin.mlp(key, x, rate, layers, train=True, layouts=layouts, **how)

    return block


def block_contenders(options: argparse.Namespace) -> Contenders:
    """Return the contenders with their rates; names with ``transposed`` get that layout."""
    drops: dict[str, _bench.Drop | None] = {
        SHARED: lambda key, h: jdrop.dropout(key, h, RATE, train=True, shared_axes=(0,)),
        EACH: lambda key, h: jdrop.dropout(key, h, RATE, train=True),
    }
    drops |= _bench.peers(options.peers, RATE)
    contenders: Contenders = {(NONE, 0.0): dense(lambda key, h: h)}
    contenders |= {(name, RATE): dense(drop) for name, drop in drops.items() if drop}
    for rate, size, layout in itertools.product((RATE, LOW_RATE), options.block_sizes, ("", TRANSPOSED)):
        contenders[f"thin, blocks of {size}{layout}", rate] = thin_block(rate, block_size=size)
    size, groups = options.block_sizes[-1], options.groups
    contenders[f"thin, blocks of {size}{TRANSPOSED}, {groups} groups", RATE] = thin_block(
        RATE, block_size=size, groups=groups
    )
    return contenders


def branch_contenders() -> Contenders:
    """Return models of residual blocks; the weights are stacked, one block after the other."""

    def model(add: Callable[[Any, Array, Callable[[Array], Array]], Array]) -> Block:
        block = dense(lambda key, h: h)

        def forward(key: Any, w: dict[str, Array], x: Array) -> Array:
            for i in range(w["up"].shape[0]):
                layer = {name: stacked[i] for name, stacked in w.items()}
                x = add(derive(key, i), x, lambda x, layer=layer: block(None, layer, jax.nn.standardize(x)))
            return x

        return forward

    rate = SKIP_RATE
    return {
        (NONE, 0.0): model(lambda key, x, fn: x + fn(x)),
        ("drop_path", rate): model(lambda key, x, fn: x + jdrop.drop_path(key, fn(x), rate, train=True)),
        ("skip_path", rate): model(lambda key, x, fn: jdrop.skip_path(key, x, rate, fn, train=True)),
        ("stochastic_depth", rate): model(lambda key, x, fn: jdrop.stochastic_depth(key, x, rate, fn, train=True)),
    }


# ---------------------------------------------------------------------------------- train steps

State = tuple[dict[str, Array], optax.OptState]
Step = Callable[[State, Any, Array, Array], State]
OPTIMIZERS = {"SGD": optax.sgd(1e-3), "Adam": optax.adam(1e-3)}


def updated(optimizer: optax.GradientTransformation, block: Block, state: State, *data: Any) -> State:
    """Return the next weights and the next state of the optimizer; data are a key, x, and a target."""
    (w, opt_state), (key, x, target) = state, data
    grads = jax.grad(lambda w: jnp.mean((block(key, w, x) - target) ** 2))(w)
    updates, opt_state = optimizer.update(grads, opt_state, w)
    return optax.apply_updates(w, updates), opt_state


def dense_step(block: Block, optimizer: optax.GradientTransformation) -> Step:
    """Return a train step that updates all weights."""
    return lambda state, *data: updated(optimizer, block, state, *data)


def lazy_step(optimizer: optax.GradientTransformation, size: int) -> Step:
    """Return a train step that reads and updates only the weights of kept units; a user can write it like this."""
    block = dense(lambda key, h: h * (1 / (1 - RATE)))

    def step(state: State, key: Any, x: Array, target: Array) -> State:
        number = state[0]["down"].shape[0]
        units = thin.kept_units(key, number, RATE, block_size=size)

        def of_units(a: Array) -> bool:  # for weights and moments, not for the bias of the outputs and the step count
            return a.shape[:1] == (number,)

        kept = jax.tree.map(lambda a: thin.take(a, units, block_size=size) if of_units(a) else a, state)
        new = updated(optimizer, block, kept, None, x, target)
        return jax.tree.map(lambda a, b: thin.put(a, units, b, block_size=size) if of_units(a) else b, state, new)

    return step


def step_contenders(options: argparse.Namespace, optimizer: Any) -> dict[tuple[str, float], Step]:
    """Return the train steps, all with the first kernel as [outputs, inputs]."""
    each = dense(lambda key, h: jdrop.dropout(key, h, RATE, train=True))
    steps = {(NONE, 0.0): dense_step(dense(lambda key, h: h), optimizer), (EACH, RATE): dense_step(each, optimizer)}
    for size in options.block_sizes:
        steps[f"thin, blocks of {size}", RATE] = dense_step(thin_block(RATE, block_size=size), optimizer)
    for size in options.block_sizes:
        steps[f"thin, blocks of {size}, lazy update", RATE] = lazy_step(optimizer, size)
    return steps


class StepClock:
    """Time steps that consume a state and return the next one."""

    def __init__(self, step: Any, state: Any, inputs: Iterator[Any]):
        self.step, self.state, self.inputs = step, state, inputs

    def __call__(self) -> float:
        """Return the seconds of one step."""

        def run() -> Any:
            self.state = self.step(self.state, *next(self.inputs))
            return self.state

        return _clocks.Clock(run, itertools.repeat(()), 1, jax.block_until_ready)()


# ---------------------------------------------------------------------------------- measuring


def random_data(batch: int, width: int, number: int) -> Iterator[tuple[Array, Array, Array]]:
    """Return a cycle of a key, x, and a cotangent or a target."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal((batch, width), np.float32)) for _ in range(2))
    return itertools.cycle([(key, x, y) for key in jax.random.split(jax.random.key(0), number)])


def compiled_gradient(block: Block, *arguments: Any) -> Any:
    """Compile y and the gradients with respect to weights and x."""

    def both(key: Any, w: dict[str, Array], x: Array, dy: Array) -> Any:
        y, pull = jax.vjp(lambda w, x: block(key, w, x), w, x)
        return y, pull(dy)

    return jax.jit(both).lower(*arguments).compile()


def bytes_of(compiled: Any) -> dict[str, int | None]:
    """Return what XLA reports about the memory of a program."""
    m = compiled.memory_analysis()
    total = m.temp_size_in_bytes + m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    peak = getattr(m, "peak_memory_in_bytes", None)
    return {"temporary_bytes": int(m.temp_size_in_bytes), "total_bytes": int(total), "peak_bytes": peak}


def measure(
    facts: dict[str, Any], clocks: dict[Any, Callable[[], float]], sizes: dict[Any, dict[str, int | None]], rounds: int
) -> list[dict[str, Any]]:
    """Time all contenders, print a table, and return its rows."""
    for clock in clocks.values():
        clock()
    times, rows = _bench.interleave([clocks], rounds), []
    none = times[NONE, 0.0]
    for (name, rate), seconds in times.items():
        speedup, low, high = _bench.ratios(none, seconds)
        row = {**facts, "contender": name, "rate": rate, "milliseconds": 1e3 * _bench.median(seconds)}
        row |= {"speedup": speedup, "speedup_25": low, "speedup_75": high, **sizes[name, rate]}
        rows.append(row | {"total_ratio": row["total_bytes"] / sizes[NONE, 0.0]["total_bytes"]})
    columns = ("dropout", "rate", "ms", "speedup", "25%", "75%", "temporary bytes", "total", "peak", "x none")
    title = ", ".join(map(str, facts.values()))
    _bench.table(title, columns, [list(row.values())[len(facts) :] for row in rows])
    return rows


def measure_gradients(
    facts: dict[str, Any], contenders: Contenders, weights: Any, data: Iterator[Any], rounds: int
) -> list[dict[str, Any]]:
    """Compile and time the gradients of blocks or models."""
    clocks, sizes = {}, {}
    for (name, rate), block in contenders.items():
        w = used(weights, TRANSPOSED in name)
        key, x, dy = next(data)
        compiled = compiled_gradient(block, key, w, x, dy)
        inputs = map(lambda item, w=w: (item[0], w, *item[1:]), data)
        clocks[name, rate] = _clocks.Clock(compiled, inputs, 1, jax.block_until_ready)
        sizes[name, rate] = bytes_of(compiled)
    return measure(facts, clocks, sizes, rounds)


def measure_blocks(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for size, batch in itertools.product(options.sizes, options.batches):
        width, units = map(int, size.split("x"))
        facts = {"part": "blocks", "sizes": f"{width} -> {units} -> {width}", "batch": batch}
        data = random_data(batch, width, options.rounds + 1)
        contenders = block_contenders(options)
        rows += measure_gradients(facts, contenders, weights_of(width, units), data, options.rounds)
    return rows


def measure_branches(options: argparse.Namespace) -> list[dict[str, Any]]:
    width, units = map(int, options.branch_size.split("x"))
    layers = [weights_of(width, units, seed) for seed in range(options.branches)]
    weights = {name: jnp.stack([layer[name] for layer in layers]) for name in layers[0]}
    facts = {"part": "branches", "sizes": f"{options.branches} of {width} -> {units} -> {width}"}
    facts["batch"] = options.branch_batch
    data = random_data(options.branch_batch, width, 3 * options.rounds + 1)
    return measure_gradients(facts, branch_contenders(), weights, data, 3 * options.rounds)


def measure_steps(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    width, units = map(int, options.sizes[0].split("x"))
    for batch, (name, optimizer) in itertools.product(options.step_batches, OPTIMIZERS.items()):
        clocks, sizes = {}, {}
        data = random_data(batch, width, 16)
        for case, step in step_contenders(options, optimizer).items():
            w = used(weights_of(width, units), out_in=True)
            state = w, optimizer.init(w)
            compiled = jax.jit(step, donate_argnums=0).lower(state, *next(data)).compile()
            clocks[case], sizes[case] = StepClock(compiled, state, data), bytes_of(compiled)
        facts = {"part": "steps", "sizes": f"{width} -> {units} -> {width}", "batch": batch, "optimizer": name}
        rows += measure(facts, clocks, sizes, options.rounds)
    return rows


PARTS = {"blocks": measure_blocks, "branches": measure_branches, "steps": measure_steps}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=tuple(PARTS), choices=tuple(PARTS), help="parts to measure")
    parser.add_argument("--sizes", nargs="+", default=("1024x4096", "768x3072"), help="features x units of the blocks")
    parser.add_argument("--batches", nargs="+", type=int, default=(256, 512, 1024))
    parser.add_argument("--step-batches", nargs="+", type=int, default=(64, 256), help="of the train steps")
    parser.add_argument("--block-sizes", nargs="+", type=int, default=(1, 64))
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--branches", type=int, default=5, help="number of residual blocks")
    parser.add_argument("--branch-size", default="512x2048", help="features x units of the residual blocks")
    parser.add_argument("--branch-batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5, help="of branches, 3 times as many")
    parser.add_argument("--peers", nargs="+", default=("linen",), choices=(*_bench.JAX_PEERS, "none"))
    parser.add_argument("--json", metavar="PATH", help="write the results to this file")
    options = parser.parse_args(arguments)
    options.peers = _bench.peer_names(options.peers)
    warm = _bench.keep_buffers_warm()
    head = _bench.report(__doc__, options.peers, warm_buffers=warm or jax.default_backend() != "cpu")
    rows = [row for part in options.only for row in PARTS[part](options)]
    facts = {"rounds": options.rounds, "block_sizes": list(options.block_sizes), "groups": options.groups}
    _bench.write_json(options.json, {**head, **facts, "rows": rows})


if __name__ == "__main__":
    main()
