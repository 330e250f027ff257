"""Does a network with Monte Carlo dropout know which digits it does not know?

Trains MLPs on 500 of scikit-learn's 1,797 digits. Each of 10 seeds leaves out another digit: its images are the unknown
ones. Compared are no dropout, an ensemble of 5 networks, and Monte Carlo dropout with 50 samples, at fixed rates and at
rates that concrete dropout learned. Test images are rejected in the order of predictive entropy or mutual information
(MI), where unknown images count as errors. Known ones are also rotated. The methods of a seed share the split, initial
weights, and minibatches, so differences are paired. Rates and the prior length scale were chosen with ``--seed 1``.

    python examples/digits_uncertain.py

Expect, after 90 seconds (2-core CPU, jax 0.10.2), means over 10 seeds, their paired difference from no dropout, and its
standard error. AUROC is that of unknown against known images. A single network has no MI, and is compared by entropy:

                         | no dropout           | ensemble of 5        | fixed rates          | learned rates
    accuracy (%)         | 96.500  +0.000 ±0.000 | 96.675  +0.175 ±0.155 | 96.812  +0.312 ±0.197 | 96.912  +0.412 ±0.207
    log loss             |  0.128  +0.000 ±0.000 |  0.115  -0.013 ±0.004 |  0.113  -0.015 ±0.005 |  0.120  -0.008 ±0.005
    Brier score          |  0.055  +0.000 ±0.000 |  0.050  -0.005 ±0.001 |  0.050  -0.005 ±0.002 |  0.052  -0.003 ±0.002
    ECE (%)              |  1.623  +0.000 ±0.000 |  1.496  -0.127 ±0.157 |  2.843  +1.220 ±0.237 |  3.800  +2.177 ±0.300
    AUROC by entropy     |  0.903  +0.000 ±0.000 |  0.924  +0.020 ±0.006 |  0.922  +0.018 ±0.003 |  0.927  +0.024 ±0.005
    AUROC by MI          |  0.903  +0.000 ±0.000 |  0.933  +0.030 ±0.009 |  0.916  +0.013 ±0.004 |  0.925  +0.022 ±0.006
    20% rejected         | 92.101  +0.000 ±0.000 | 93.235  +1.134 ±0.254 | 93.441  +1.340 ±0.132 | 93.492  +1.392 ±0.191
    20% rejected by MI   | 92.101  +0.000 ±0.000 | 93.570  +1.469 ±0.356 | 92.977  +0.876 ±0.225 | 93.196  +1.095 ±0.231
    30 degrees: accuracy | 44.600  +0.000 ±0.000 | 46.050  +1.450 ±1.076 | 46.450  +1.850 ±0.975 | 46.800  +2.200 ±1.153
    30 degrees: confid.  | 80.769  +0.000 ±0.000 | 76.643  -4.127 ±0.565 | 71.415  -9.355 ±0.272 | 68.432 -12.337 ±0.331
    rates of layers      | 0.059 ±0.001 | 0.181 ±0.003 | 0.214 ±0.002

Monte Carlo dropout rejects better than no dropout, as an ensemble does, but unlike these it is not confident enough.

Reference: Gal, Hron, Kendall (2017), Concrete Dropout, NeurIPS. For Monte Carlo dropout, see mc_regression.py.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax import Array
from scipy.ndimage import rotate
from scipy.stats import sem
from sklearn.datasets import load_digits
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from tqdm import tqdm

import jdrop
from jdrop.keys import derive, per_example
from jdrop.learned import concrete_dropout, concrete_regularizer
from jdrop.uncertainty import mc_samples, mutual_information, predictive_entropy

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_SEEDS = 10  # one per class that is left out
NUM_TRAIN, NUM_TEST, NUM_UNKNOWN, NUM_ROTATED = 500, 800, 170, 200  # images; some of the test set are rotated
SIZES, LENGTH_SCALE = (64, 128, 128, 10), 0.1  # of the layers, and of the prior of concrete dropout
BATCH, LEARNING_RATE, STEPS = 50, 3e-3, 800  # Adam with cosine decay to 0, and no weight decay
SAMPLES, MEMBERS, BINS = 50, 5, 15  # of Monte Carlo dropout, of the ensemble, and of ECE
ANGLES, REJECTED = (15, 30, 45, 60, 75, 90), np.arange(31)  # degrees, percent


class Method(NamedTuple):
    """How many networks a method trains, and how. Networks with rates are sampled."""

    rates: tuple[float, ...] = (0.0, 0.0, 0.0)  # of the inputs of the three layers; where concrete dropout starts
    learned: bool = False
    members: int = 1


METHODS = {
    "no dropout": Method(),
    "ensemble of 5": Method(members=MEMBERS),
    "fixed rates": Method((0.05, 0.1, 0.1)),
    "learned rates": Method((0.1, 0.1, 0.1), learned=True),
}


def forward(method: Method, params: Any, x: Array, key: Array | None) -> Array:
    """Map images [batch, 64] to log probabilities [batch, 10]; without a key, nothing is dropped."""
    for i, ((w, b, logit), rate) in enumerate(zip(params, method.rates, strict=True)):
        drop = partial(concrete_dropout, logit=logit) if method.learned else partial(jdrop.dropout, rate=rate)
        x = drop(derive(key, i), x, train=key is not None) @ w + b
        x = jax.nn.relu(x) if i < len(params) - 1 else jax.nn.log_softmax(x)
    return x


def loss_fn(method: Method, params: Any, key: Array, ids: Array, x: Array, y: Array) -> Array:
    """Return the cross-entropy, and with learned rates also the divergence from the prior."""
    loss = -jnp.take_along_axis(forward(method, params, x[ids], key), y[ids, None], axis=1).mean()
    for w, _, logit in params:
        if method.learned:
            loss += concrete_regularizer(logit, w, num_examples=NUM_TRAIN, length_scale=LENGTH_SCALE)
    return loss


def train(method: Method, key: Array, x: Array, y: Array, steps: int) -> Any:
    """Train all members and seeds at once, on x [seed, n, 64] and y [seed, n]; return params [member, seed, ...]."""
    shape, optimizer = (method.members, len(x)), optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    gradient = jax.vmap(jax.vmap(jax.grad(partial(loss_fn, method))), in_axes=(0, None, 0, None, None))

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: Any, key: Array, x: Array, y: Array, t: Array) -> Any:
        params, opt_state = state
        ids = jax.random.randint(derive(key, "batch", t), (MEMBERS, len(x), BATCH), 0, NUM_TRAIN)[: method.members]
        grads = gradient(params, per_example(derive(key, "drop", t), jnp.arange(len(x))), ids, x, y)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    params = []
    for i, (m, n, rate) in enumerate(zip(SIZES[:-1], SIZES[1:], method.rates, strict=True)):
        w = jax.random.normal(derive(key, "init", i), (MEMBERS, len(x), m, n)) * (2 / m) ** 0.5
        logit = np.log(rate / (1 - rate)) if method.learned else 0.0
        params.append((w[: method.members], jnp.zeros((*shape, n)), jnp.full(shape, logit, jnp.float32)))
    state = params, optimizer.init(params)
    for t in tqdm(range(steps), desc=", ".join(f"{rate:g}" for rate in method.rates)):
        state = train_step(state, key, x, y, jnp.uint32(t))
    return state[0]


def predict(method: Method, params: Any, key: Array, x: Array) -> tuple[np.ndarray, ...]:
    """Return probabilities [seed, n, class], entropy, and mutual information [seed, n]; x is [seed, n, 64]."""

    def of_seed(params: Any, key: Array, x: Array) -> tuple[Array, ...]:
        networks = partial(jax.vmap(partial(forward, method), in_axes=(0, None, None)), params, x)  # of all members
        log_probs = mc_samples(networks, key, SAMPLES, chunk_size=10)[:, 0] if any(method.rates) else networks(None)
        return jnp.exp(log_probs).mean(0), predictive_entropy(log_probs), mutual_information(log_probs)

    keys = per_example(derive(key, "sample"), jnp.arange(len(x)))
    outputs = jax.jit(jax.vmap(of_seed, in_axes=(1, 0, 0)))(params, keys, x)
    return tuple(np.asarray(values, float) for values in outputs)


def score(p: np.ndarray, entropy: np.ndarray, mi: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """Score the predictions of one seed, for known images, unknown images, and rotated images in this order."""
    tested, p = NUM_TEST + NUM_UNKNOWN, p / p.sum(1, keepdims=True)
    correct, confidence = 100.0 * (p.argmax(1) == y), 100 * p.max(1)
    correct[NUM_TEST:tested] = 0
    known, unknown = (y[:NUM_TEST], p[:NUM_TEST]), np.arange(tested) >= NUM_TEST
    errors = (correct - confidence)[:NUM_TEST]  # of calibration: their sums over bins of confidence should be 0
    mi = mi if mi.max() > 1e-5 else entropy  # one network has no mutual information
    accepted, orders = tested - tested * REJECTED // 100, (np.argsort(u[:tested], kind="stable") for u in (entropy, mi))
    by_entropy, by_mi = (np.cumsum(correct[order])[accepted - 1] / accepted for order in orders)
    rotated = np.stack([correct[tested:], confidence[tested:]]).reshape(2, len(ANGLES), -1).mean(-1)
    return {
        "accuracy (%)": correct[:NUM_TEST].mean(),
        "log loss": log_loss(*known, labels=range(10)),
        "Brier score": brier_score_loss(*known, labels=range(10)),
        "ECE (%)": abs(np.histogram(confidence[:NUM_TEST], BINS, (0, 100), weights=errors)[0]).sum() / NUM_TEST,
        "AUROC by entropy": roc_auc_score(unknown, entropy[:tested]),
        "AUROC by MI": roc_auc_score(unknown, mi[:tested]),
        "20% rejected": by_entropy[20],
        "20% rejected by MI": by_mi[20],
        "30 degrees: accuracy": rotated[0, 1],
        "30 degrees: confid.": rotated[1, 1],
        "rejected by entropy": by_entropy,
        "rejected by MI": by_mi,
        "rotated": rotated,
    }


def plot(path: Path, data: dict[str, Any]) -> None:
    """Plot accuracy after rejection, and accuracy and confidence of rotated digits."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for i, (name, scores) in enumerate(data["scores"].items()):
        left.plot(REJECTED, scores["rejected by entropy"].mean(0), color=f"C{i}", label=name)
        left.plot(REJECTED, scores["rejected by MI"].mean(0), "--", color=f"C{i}")
        accuracy, confidence = scores["rotated"].mean(0)
        right.plot(ANGLES, accuracy, "-", ANGLES, confidence, "--", color=f"C{i}")
    left.set(xlabel="rejected by entropy, or by MI (dashed) (%)", ylabel="accuracy of the others (%)")
    right.set(xlabel="rotation (degrees)", title="rotated digits: accuracy, and confidence (dashed) (%)")
    left.legend()
    fig.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Uncertainty of classifiers about digits.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plot and its data")
    args = parser.parse_args()

    key, (images, y) = jax.random.key(args.seed), load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8) / 16
    pixels = np.stack([rotate(images, angle, (2, 1), reshape=False, order=1).reshape(-1, 64) for angle in (0, *ANGLES)])
    train_ids, test_ids = [], []
    for seed in range(NUM_SEEDS):
        ids = np.asarray(jax.random.permutation(derive(key, "split", seed), len(y)))
        known, unknown = ids[y[ids] != seed % 10], ids[y[ids] == seed % 10][:NUM_UNKNOWN]
        train_ids.append(known[:NUM_TRAIN])
        known = known[NUM_TRAIN : NUM_TRAIN + NUM_TEST]
        test_ids.append(np.concatenate([known, unknown, *[known[:NUM_ROTATED]] * len(ANGLES)]))
    turned = np.repeat(range(len(pixels)), [NUM_TEST + NUM_UNKNOWN, *[NUM_ROTATED] * len(ANGLES)])
    train_x, test_x = (jnp.asarray(pixels[at], jnp.float32) for at in ((0, train_ids), (turned, test_ids)))

    results: dict[str, Any] = {}
    for name, method in METHODS.items():
        params = train(method, key, train_x, jnp.asarray(y[np.stack(train_ids)]), args.steps)
        outputs = predict(method, params, key, test_x)
        scores = [score(*of_seed, y[ids]) for *of_seed, ids in zip(*outputs, test_ids, strict=True)]
        results[name] = {metric: np.array([values[metric] for values in scores]) for metric in scores[0]}
    rates = np.stack([np.asarray(jax.nn.sigmoid(logit[0]), float) for *_, logit in params], -1)  # learned ones
    print(" " * 21 + "| " + " | ".join(f"{name:20}" for name in METHODS))
    for metric, reference in results["no dropout"].items():
        if reference.ndim == 1:
            pairs = [(scores[metric], scores[metric] - reference) for scores in results.values()]
            print(f"{metric:21}| " + " | ".join(f"{v.mean():6.3f} {d.mean():+7.3f} ±{sem(d):.3f}" for v, d in pairs))
    print(f"{'rates of layers':21}| " + " | ".join(f"{rate.mean():.3f} ±{sem(rate):.3f}" for rate in rates.T))

    args.out.mkdir(parents=True, exist_ok=True)
    data = {"jax": jax.__version__, "rejected": REJECTED, "angles": ANGLES, "learned rates": rates, "scores": results}
    (args.out / "digits_uncertain.json").write_text(json.dumps(data, default=lambda v: v.round(4).tolist()))
    plot(args.out / "digits_uncertain.png", data)


if __name__ == "__main__":
    main()
