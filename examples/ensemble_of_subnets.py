"""What does dropout average over? Enumerates every thinned network of a small net, with its probability.

A net with n units, each dropped with probability p, contains 2^n thinned networks. For the linear net
z = w1 x + w2 y with dropout on x and y, the average over its four networks is E[z] = (1 - p)(w1 x + w2 y) if kept
values are not scaled (``scale_at="eval"``), and w1 x + w2 y if they are divided by 1 - p (``scale_at="train"``). The
net without dropout computes exactly this average: weight scaling. For a nonlinear net, weight scaling is only an
approximation. Here, nets with 12 hidden units learn to distinguish scikit-learn's 3s from 8s under dropout. All 4,096
networks of each net are then evaluated on the test images. Their average probability is compared with weight scaling,
with the normalized geometric mean, and with Monte Carlo averages by jdrop, whose error should be (standard deviation
over the networks) / sqrt(draws).

    python examples/ensemble_of_subnets.py

Expect, after 20 seconds (2-core CPU, jax 0.10.2), for each ``scale_at`` the root-mean-square difference from the
average of all networks, its standard error over 10 nets, the theory, and the test accuracy in percent:

    all 4,096 networks       |     0.0000 | 0.0000 |        | 99.43 |     0.0000 | 0.0000 |        | 99.43
    weight scaling           |     0.0096 | 0.0009 |        | 99.43 |     0.0105 | 0.0006 |        | 99.43
    geometric mean           |     0.0092 | 0.0008 |        | 99.43 |     0.0101 | 0.0005 |        | 99.43
    Monte Carlo, draws: 1    |     0.0389 | 0.0022 | 0.0383 | 99.17 |     0.0394 | 0.0014 | 0.0388 | 99.24
    Monte Carlo, draws: 10   |     0.0125 | 0.0006 | 0.0121 | 99.36 |     0.0124 | 0.0004 | 0.0123 | 99.41
    Monte Carlo, draws: 100  |     0.0038 | 0.0002 | 0.0038 | 99.40 |     0.0039 | 0.0001 | 0.0039 | 99.43
    Monte Carlo, draws: 1000 |     0.0012 | 0.0001 | 0.0012 | 99.43 |     0.0012 | 0.0000 | 0.0012 | 99.43

Weight scaling is as accurate as about 15 draws. Before this table come E[z], the formula, and weight scaling for the
linear net:

    scale_at=train          | -2.6051 | -2.6051 | -2.6051
    scale_at=eval           | -1.8235 | -1.8235 | -1.8235

Reference: Baldi, Sadowski (2013), Understanding Dropout, NeurIPS.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

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

CLASSES = (3, 8)
SIZES = (64, 7, 5, 1)  # 12 hidden units: 4,096 networks
RATE = 0.3
NUM_SEEDS = 10
NUM_TRAIN = 200  # images, all in one batch; the others are the test set
LEARNING_RATE = 1e-2  # Adam
STEPS = 500
DRAWS = (1, 10, 100, 1000)  # of Monte Carlo dropout
REPEATS = 16  # of each Monte Carlo average, to estimate its rms error

Params = list[tuple[Array, Array]]
Drop = Callable[[int, Array], Array]
ScaleAt = Literal["train", "eval"]
KEPT_VALUE: dict[ScaleAt, float] = {"train": 1 / (1 - RATE), "eval": 1.0}  # factor of kept values in training


def enumerate_masks(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all masks of n units, [2^n, n] of 0s and 1s, and the probability of each mask."""
    masks = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    return masks.astype(np.float32), np.prod(np.where(masks == 1, 1 - RATE, RATE), axis=1)


def check_linear(key: Array, scale_at: ScaleAt) -> tuple[float, float, float]:
    """Return E[z] over the four networks, from the formula, and from the net without dropout."""
    x, w = (np.asarray(jax.random.normal(derive(key, name), (2,))) for name in ("inputs", "weights"))
    masks, probabilities = enumerate_masks(2)
    average = probabilities @ (masks * x * KEPT_VALUE[scale_at] @ w)
    formula = (1 - RATE) * KEPT_VALUE[scale_at] * (w[0] * x[0] + w[1] * x[1])
    scaled = jdrop.dropout(None, jnp.asarray(x), RATE, train=False, scale_at=scale_at) @ w
    return float(average), float(formula), float(scaled)


def init(key: Array) -> Params:
    layers = enumerate(pairwise(SIZES))
    return [(jax.random.normal(derive(key, i), (m, n)) * m**-0.5, jnp.zeros(n)) for i, (m, n) in layers]


def forward(params: Params, x: Array, drop: Drop) -> Array:
    """Map images [..., 64] to logits [...]; ``drop`` is applied to each hidden layer."""
    for i, (w, b) in enumerate(params[:-1]):
        x = drop(i, jnp.tanh(x @ w + b))
    return (x @ params[-1][0] + params[-1][1])[..., 0]


def by_jdrop(key: Array | None, scale_at: ScaleAt, train: bool = True) -> Drop:
    """Return dropout by jdrop, with a separate key for each layer."""

    def drop(i: int, h: Array) -> Array:
        return jdrop.dropout(derive(key, i) if key is not None else None, h, RATE, train=train, scale_at=scale_at)

    return drop


def train(params: Params, keys: Array, x: Array, y: Array, scale_at: ScaleAt, steps: int) -> Params:
    """Train all nets at once; parameters, keys, images, and labels have a leading axis of nets."""
    optimizer = optax.adam(LEARNING_RATE)

    def loss_fn(params: Params, x: Array, y: Array, key: Array) -> Array:
        return optax.sigmoid_binary_cross_entropy(forward(params, x, by_jdrop(key, scale_at)), y).mean()

    def step(params: Params, state: optax.OptState, key: Array, x: Array, y: Array, t: Array) -> tuple[Any, Any]:
        grads = jax.grad(loss_fn)(params, x, y, derive(key, "drop", t))
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    train_step = jax.jit(jax.vmap(step, in_axes=(0, 0, 0, 0, 0, None)))
    state = jax.vmap(optimizer.init)(params)
    for t in tqdm(range(steps), desc=f"scale_at={scale_at}"):
        params, state = train_step(params, state, keys, x, y, jnp.uint32(t))
    return params


def evaluate(scale_at: ScaleAt, params: Params, key: Array, x: Array, y: Array) -> dict[str, Array]:
    """Compare the exact ensemble of one net with its approximations, on the images x [n, 64]."""
    masks, weights = (jnp.asarray(a, jnp.float32) for a in enumerate_masks(sum(SIZES[1:-1])))
    parts = jnp.split(masks[:, None], [SIZES[1]], axis=-1)  # [2^units, 1, units of a layer]
    logits = forward(params, x, lambda i, h: h * parts[i] * KEPT_VALUE[scale_at])  # [2^units, n]
    ensemble = weights @ jax.nn.sigmoid(logits)
    variance = weights @ (jax.nn.sigmoid(logits) - ensemble) ** 2

    def repeat(key: Array) -> Array:
        drops = jax.vmap(lambda key: forward(params, x, by_jdrop(key, scale_at)))
        samples = jax.nn.sigmoid(drops(per_example(key, jnp.arange(DRAWS[-1]))))
        return jnp.stack([samples[:n].mean(0) for n in DRAWS])

    sampled = jax.lax.map(repeat, per_example(derive(key, "monte carlo"), jnp.arange(REPEATS)))  # [repeat, draws, n]
    scaled = jax.nn.sigmoid(forward(params, x, by_jdrop(None, scale_at, train=False)))
    geometric = jax.nn.sigmoid(weights @ logits)
    means = jnp.concatenate([jnp.stack([ensemble, scaled, geometric])[None].repeat(REPEATS, 0), sampled], axis=1)
    return {
        "ensemble": ensemble,
        "scaled": scaled,
        "rms": jnp.sqrt(((means - ensemble) ** 2).mean((0, 2))),
        "accuracy": 100 * jnp.mean((means > 0.5) == (y > 0.5), axis=(0, 2)),
        "predicted": jnp.sqrt(variance.mean() / jnp.array(DRAWS)),
    }


def plot(path: Path, results: dict[ScaleAt, dict[str, np.ndarray]]) -> None:
    """Plot weight scaling against the ensemble, and the Monte Carlo error against the number of draws."""
    fig, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for ax, (scale_at, result) in zip(axes, results.items(), strict=False):
        ax.plot([0, 1], [0, 1], color="gray", linewidth=0.8)
        ax.plot(result["ensemble"].ravel(), result["scaled"].ravel(), ".", markersize=4, alpha=0.4)
        ax.set(xlabel="average of all thinned networks", ylabel="weight scaling", title=f'scale_at="{scale_at}"')
        dots = axes[2].loglog(DRAWS, result["rms"].mean(0)[3:], "o", label=f'Monte Carlo, scale_at="{scale_at}"')[0]
        axes[2].axhline(result["rms"].mean(0)[1], color=dots.get_color(), linestyle="--", label="weight scaling")
        axes[2].loglog(DRAWS, result["predicted"].mean(0), color="gray", linewidth=0.8)
    axes[2].set(xlabel="draws", ylabel="rms difference from that average", title="gray lines: theory")
    axes[2].legend(loc="lower left", fontsize="small")
    fig.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Dropout as an average of thinned networks.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plot and its data")
    args = parser.parse_args()

    print(f"{'linear net':24}| E[z]    | formula | weight scaling")
    key = jax.random.key(args.seed)
    for scale_at in KEPT_VALUE:
        values = check_linear(derive(key, "linear"), scale_at)
        print(f"{f'scale_at={scale_at}':24}| " + " | ".join(f"{value:7.4f}" for value in values))
        if max(values) - min(values) > 1e-5:
            raise SystemExit("These do not agree.")

    digits = load_digits()
    ours = np.isin(digits.target, CLASSES)
    images, labels = jnp.asarray(digits.data[ours] / 16, jnp.float32), jnp.asarray(digits.target[ours] == CLASSES[1])
    keys = per_example(derive(key, "nets"), jnp.arange(NUM_SEEDS))
    ids = jax.vmap(lambda key: jax.random.permutation(derive(key, "split"), len(images)))(keys)
    (train_x, test_x), (train_y, test_y) = ((a[ids[:, :NUM_TRAIN]], a[ids[:, NUM_TRAIN:]]) for a in (images, labels))
    start = jax.vmap(lambda key: init(derive(key, "init")))(keys)
    results: dict[ScaleAt, dict[str, np.ndarray]] = {}
    for scale_at in KEPT_VALUE:
        params = train(start, keys, train_x, train_y, scale_at, args.steps)
        compare = partial(evaluate, scale_at)
        result = jax.lax.map(lambda run, compare=compare: compare(*run), (params, keys, test_x, test_y))
        results[scale_at] = jax.tree.map(np.asarray, result)

    names = ["all 4,096 networks", "weight scaling", "geometric mean", *(f"Monte Carlo, draws: {n}" for n in DRAWS)]
    print(
        f"\n{'rms difference from all':25}" + "".join(f"| {s + ': rms':10} | error  | theory | right " for s in results)
    )
    for i, name in enumerate(names):
        cells = ""
        for result in results.values():
            rms, right = result["rms"][:, i], result["accuracy"][:, i].mean()
            theory = f"{result['predicted'].mean(0)[i - 3]:.4f}" if i > 2 else ""
            cells += f"| {rms.mean():10.4f} | {rms.std(ddof=1) / NUM_SEEDS**0.5:.4f} | {theory:6} | {right:5.2f} "
        print(f"{name:25}{cells}".rstrip())

    args.out.mkdir(parents=True, exist_ok=True)
    data = {"jax": jax.__version__, "draws": DRAWS, **results}
    (args.out / "ensemble_of_subnets.json").write_text(
        json.dumps(data, default=lambda v: v.astype(float).round(5).tolist())
    )
    plot(args.out / "ensemble_of_subnets.png", results)


if __name__ == "__main__":
    main()
