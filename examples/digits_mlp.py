"""Does dropout help a wide network trained on few images?

Trains the same MLP on 300 of scikit-learn's 1,797 digits, with and without dropout, and tests it on the other 1,497.
All runs of both arms train at once under two nested vmaps, because the rates are traced arguments. Each seed has its
own split. The two arms of a seed share split, initial weights, and minibatches, so differences are paired. The settings
were chosen with ``--seed 1``. The accuracy is that of the last step, not of the best one.

    python examples/digits_mlp.py

Expect, after 40 seconds (2-core CPU, jax 0.10.2), test accuracy in percent with its standard error over 16 seeds.
Dropout is better on all of them:

    no dropout        | 95.10 | 0.13
    dropout           | 95.96 | 0.15
    paired difference | +0.86 | 0.15

References:
  Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov (2014), Dropout: A Simple Way to Prevent Neural Networks from
  Overfitting, JMLR.
"""

import argparse
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax import Array
from sklearn.datasets import load_digits
from tqdm import tqdm

import jdrop
from jdrop.keys import derive, per_example

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_SEEDS = 16
NUM_TRAIN = 300  # images; the others are the test set
SIZES = (64, 256, 256, 10)
INPUT_RATE, HIDDEN_RATE = 0.1, 0.5
BATCH = 50
LEARNING_RATE = 3e-3  # Adam with cosine decay to 0
STEPS = 1000
EVAL_EVERY = 100

Params = list[tuple[Array, Array]]


def init(key: Array) -> Params:
    """Return He-initialized parameters, with one derived key per layer."""
    layers = enumerate(pairwise(SIZES))
    return [(jax.random.normal(derive(key, i), (m, n)) * (2 / m) ** 0.5, jnp.zeros(n)) for i, (m, n) in layers]


def forward(params: Params, x: Array, key: Array | None, rates: Array, train: bool) -> Array:
    """Map images [batch, 64] to logits [batch, 10]; ``rates`` has one drop rate per layer."""
    for i, (w, b) in enumerate(params):
        layer_key = derive(key, i) if key is not None else None
        x = jdrop.dropout(layer_key, x, rates[i], train=train) @ w + b
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    return x


def make_train_step(optimizer: optax.GradientTransformation, images: Array, labels: Array) -> Callable[..., Any]:
    """Return the train step for all runs at once, with an outer vmap over arms and an inner vmap over seeds."""

    def loss_fn(params: Params, x: Array, y: Array, key: Array, rates: Array) -> Array:
        logits = forward(params, x, key, rates, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(
        params: Params, opt_state: optax.OptState, rates: Array, key: Array, ids: Array, t: Array
    ) -> tuple[Params, optax.OptState]:
        batch = jax.random.choice(derive(key, "batch", t), ids, (BATCH,), replace=False)
        grads = jax.grad(loss_fn)(params, images[batch], labels[batch], derive(key, "drop", t), rates)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    seeds = jax.vmap(step, in_axes=(0, 0, None, 0, 0, None))
    return jax.jit(jax.vmap(seeds, in_axes=(0, 0, 0, None, None, None)), donate_argnums=(0, 1))


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Return the mean over seeds and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def plot(path: Path, steps: list[int], curves: np.ndarray, arms: dict[str, list[float]]) -> None:
    """Plot test accuracy [time, arm, seed] against steps, with a band of two standard errors."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", width_ratios=(2, 1))
    for i, name in enumerate(arms):
        mean, error = curves[:, i].mean(1), curves[:, i].std(1, ddof=1) / NUM_SEEDS**0.5
        left.plot(steps, mean, label=name)
        left.fill_between(steps, mean - 2 * error, mean + 2 * error, alpha=0.25)
    left.set(xlabel="step", ylabel="test accuracy (%)", ylim=(max(0.0, curves[-1].min() - 3), None))
    left.set_title(f"{NUM_TRAIN} training images: mean and two standard errors")
    left.legend(loc="lower right")
    right.plot([0, 1], curves[-1], color="gray", alpha=0.6, marker="o", markersize=4)
    right.set(xticks=[0, 1], xticklabels=list(arms), xlim=(-0.3, 1.3), ylabel="test accuracy (%)")
    right.set_title("the last step, one line per seed")
    fig.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Dropout with few training images.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plot and its data")
    args = parser.parse_args()

    digits = load_digits()
    images, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
    hidden = [HIDDEN_RATE] * (len(SIZES) - 2)
    arms = {"no dropout": [0.0] * (len(SIZES) - 1), "dropout": [INPUT_RATE, *hidden]}
    rates = jnp.array(list(arms.values()))

    keys = per_example(jax.random.key(args.seed), jnp.arange(NUM_SEEDS))  # one key per seed, shared by both arms
    splits = jax.vmap(lambda key: jax.random.permutation(derive(key, "split"), len(images)))(keys)
    train_ids, test_ids = splits[:, :NUM_TRAIN], splits[:, NUM_TRAIN:]

    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, args.steps))
    params = jax.vmap(lambda key: init(derive(key, "init")))(keys)
    params = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(arms)), params)
    opt_state = jax.jit(jax.vmap(jax.vmap(optimizer.init)))(params)
    train_step = make_train_step(optimizer, images, labels)

    @jax.jit
    def evaluate(params: Params) -> Array:
        def accuracy(params: Params, ids: Array) -> Array:
            logits = forward(params, images[ids], None, rates[0], train=False)
            return 100 * jnp.mean(logits.argmax(-1) == labels[ids])

        return jax.vmap(jax.vmap(accuracy), in_axes=(0, None))(params, test_ids)

    steps, curves = [], []
    bar = tqdm(range(args.steps))
    for t in bar:
        params, opt_state = train_step(params, opt_state, rates, keys, train_ids, jnp.uint32(t))
        if (t + 1) % EVAL_EVERY == 0 or t + 1 == args.steps:
            steps.append(t + 1)
            curves.append(np.asarray(evaluate(params)))
            bar.set_postfix_str(" ".join(f"{name}: {a:.1f}%" for name, a in zip(arms, curves[-1].mean(1), strict=True)))

    last = curves[-1]
    print(f"{'test accuracy':18}| mean  | standard error")
    for name, values in zip(arms, last, strict=True):
        print("{:18}| {:5.2f} | {:.2f}".format(name, *mean_and_error(values)))
    gain, error = mean_and_error(last[1] - last[0])
    print(f"{'paired difference':18}| {gain:+5.2f} | {error:.2f}")
    print(f"Dropout is better on {int((last[1] > last[0]).sum())} of {NUM_SEEDS} seeds.")

    args.out.mkdir(parents=True, exist_ok=True)
    data = {"jax": jax.__version__, "steps": steps, "accuracy": dict(zip(arms, np.stack(curves, 1), strict=True))}
    (args.out / "digits_mlp.json").write_text(json.dumps(data, default=lambda v: v.astype(float).round(4).tolist()))
    plot(args.out / "digits_mlp.png", steps, np.stack(curves), arms)


if __name__ == "__main__":
    main()
