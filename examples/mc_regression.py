"""Does Monte Carlo dropout give better error bars than one network that learns its noise level?

Trains networks on 300 of scikit-learn's 442 diabetes patients, and scores their predictive distributions on the others.
A network predicts a mean, and learns one noise level. Monte Carlo dropout averages 100 sampled networks, and an
ensemble 5 networks with other initial weights and minibatches. The predictors of a seed share the split, so differences
are paired. Rate and weight decays were chosen with ``--seed 1``. A second training along one feature leaves a gap.

    python examples/mc_regression.py

Expect, after a minute (2-core CPU, jax 0.10.2), test scores over 16 seeds in units of the target's standard deviation,
their paired difference from no dropout, and its standard error:

                        |     log-likelihood     |          CRPS          |          RMSE
    no dropout, no decay| -2.286  -1.203 ±0.110 |  0.546  +0.139 ±0.011 |  0.894  +0.183 ±0.015
    sampled, no decay   | -1.106  -0.022 ±0.008 |  0.411  +0.004 ±0.002 |  0.718  +0.007 ±0.004
    no dropout          | -1.083  +0.000 ±0.000 |  0.407  +0.000 ±0.000 |  0.711  +0.000 ±0.000
    ensemble of 5       | -1.080  +0.003 ±0.002 |  0.406  -0.001 ±0.001 |  0.710  -0.001 ±0.001
    dropout, not sampled| -1.078  +0.005 ±0.002 |  0.404  -0.003 ±0.001 |  0.708  -0.004 ±0.001
    Monte Carlo dropout | -1.078  +0.005 ±0.002 |  0.405  -0.003 ±0.001 |  0.708  -0.003 ±0.001
    sd: Monte Carlo dropout | data 0.078 ±0.006 | gap 0.105 ±0.005 | beyond 0.651 ±0.035
    sd: ensemble of 5       | data 0.013 ±0.001 | gap 0.019 ±0.001 | beyond 0.098 ±0.007

With weight decay, dropout gains a little, sampled or not, as an ensemble does. Without decay, it prevents most of the
overfitting. The last rows are along body mass index: they grow away from the data, but hardly in the gap.

Reference: Gal, Ghahramani (2016), Dropout as a Bayesian Approximation, ICML.
"""

import argparse
import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import scoringrules
from jax import Array
from scipy.stats import norm, sem
from sklearn.datasets import load_diabetes
from tqdm import tqdm

import jdrop
from jdrop.keys import derive, per_example
from jdrop.uncertainty import mc_samples, variance_split

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_SEEDS, NUM_TRAIN = 16, 300  # the other patients are the test set
HIDDEN, BATCH, LEARNING_RATE, STEPS = (50, 50), 50, 3e-3, 600  # Adam with cosine decay to 0
SAMPLES, MEMBERS = 100, 5  # of Monte Carlo dropout, and of the ensemble
LEVELS = np.linspace(0.05, 0.95, 19)  # of central intervals
BMI, PLACES = 2, {"data": (-1.5, 0.4), "gap": (0.4, 1.4), "beyond": (4.5, 6.0)}  # column, and places along it
DATA = np.column_stack(load_diabetes(return_X_y=True))  # patients; the last column is the target

# Networks that are trained on each split: rate, decay (times the sum of squared weights), and number in the ensemble.
ARMS = [*((0.0, 0.1, i) for i in range(MEMBERS)), (0.0, 0.0, 0), (0.3, 0.0, 0), (0.1, 0.06, 0)]
VIEW = [*((0.0, 1e-3, i) for i in range(MEMBERS)), (0.1, 1e-3, 0)]
REFERENCE, ENSEMBLE, SAMPLED = "no dropout", "ensemble of 5", "Monte Carlo dropout"
PREDICTORS = {  # the arms that they average, and whether these are sampled
    "no dropout, no decay": (slice(5, 6), False),
    "sampled, no decay": (slice(6, 7), True),
    REFERENCE: (slice(0, 1), False),
    ENSEMBLE: (slice(0, 5), False),
    "dropout, not sampled": (slice(7, 8), False),
    SAMPLED: (slice(7, 8), True),
}


def forward(params: Any, x: Array, key: Array | None, rate: Array, train: bool, shared_axes: Any = ()) -> Array:
    """Map patients [batch, feature] to means [batch], with dropout on each hidden layer."""
    for i, (w, b) in enumerate(params["layers"]):
        if i > 0:
            x = jdrop.dropout(derive(key, i), jax.nn.relu(x), rate, train=train, shared_axes=shared_axes)
        x = x @ w + b
    return x[..., 0]


def loss_fn(params: Any, rate: Array, decay: Array, key: Array, ids: Array, x: Array, y: Array) -> Array:
    """Return the negative log-likelihood without its constant, and the penalty of weight decay."""
    error = (y[ids] - forward(params, x[ids], key, rate, train=True)) * jnp.exp(-params["log_sd"])
    return (error**2).mean() / 2 + params["log_sd"] + decay * sum((w**2).sum() for w, _ in params["layers"])


def of_arms_and_seeds(f: Any, axes: str) -> Any:
    """Map f; its arguments have an axis of arms ("a"), of seeds ("s"), or both ("b")."""
    arms, seeds = ([0 if axis in both else None for axis in axes] for both in ("ab", "sb"))
    return jax.vmap(jax.vmap(f, in_axes=seeds), in_axes=arms)


def train(arms: Any, key: Array, x: Array, y: Array, steps: int) -> Any:
    """Train all arms on all seeds at once, on x [seed, n, feature] and y [seed, n]; members differ in their draws."""
    rates, decays, members = (jnp.array(values) for values in zip(*arms, strict=True))
    (seeds, n, features), optimizer = x.shape, optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: Any, key: Array, x: Array, y: Array, t: Array) -> Any:
        params, opt_state = state
        ids = jax.random.randint(derive(key, "batch", t), (MEMBERS, seeds, BATCH), 0, n)[members]
        keys = per_example(derive(key, "drop", t), jnp.arange(seeds))
        grads = of_arms_and_seeds(jax.grad(loss_fn), "baasbss")(params, rates, decays, keys, ids, x, y)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    params: Any = {"layers": [], "log_sd": jnp.zeros((len(arms), seeds))}
    for i, (fan_in, fan_out) in enumerate(pairwise((features, *HIDDEN, 1))):
        w = jax.random.normal(derive(key, "init", i), (MEMBERS, seeds, fan_in, fan_out)) * (2 / fan_in) ** 0.5
        params["layers"].append((w[members], jnp.zeros((len(arms), seeds, fan_out))))
    state = params, optimizer.init(params)
    for t in tqdm(range(steps), desc=f"{features} features"):
        state = train_step(state, key, x, y, jnp.uint32(t))
    return state[0]


def predict(arms: Any, params: Any, key: Array, x: Array) -> tuple[np.ndarray, ...]:
    """Return means [arm, seed, n] without dropout, and samples [arm, seed, sample, n]: networks, masks per input."""

    def of_one(params: Any, rate: Array, key: Array, x: Array) -> tuple[Array, ...]:
        sample = partial(forward, params, x, rate=rate, train=True)
        samples = (mc_samples(partial(sample, shared_axes=axes), key, SAMPLES) for axes in (0, ()))
        return forward(params, x, None, rate, train=False), *samples

    rates, keys = jnp.array([rate for rate, *_ in arms]), per_example(derive(key, "sample"), jnp.arange(len(x)))
    outputs = jax.jit(of_arms_and_seeds(of_one, "bass"))(params, rates, keys, x)
    return tuple(np.asarray(values, float) for values in outputs)


def score(y: np.ndarray, means: np.ndarray, sds: np.ndarray) -> dict[str, Any]:
    """Score a mixture of normal distributions, with means [component, n] and standard deviations [component]."""
    m, s = means.T, np.broadcast_to(sds, means.T.shape)
    place = norm.cdf(y[:, None], m, s).mean(1)  # of y in its predictive distribution, from 0 to 1
    return {
        "log-likelihood": -scoringrules.logs_mixnorm(y, m, s).mean(),
        "CRPS": scoringrules.crps_mixnorm(y, m, s).mean(),
        "RMSE": ((y - m.mean(1)) ** 2).mean() ** 0.5,
        "coverage": (abs(2 * place - 1) <= LEVELS[:, None]).mean(1),
    }


def compare(key: Array, steps: int) -> dict[str, dict[str, np.ndarray]]:
    """Train on the splits of all seeds, and return the scores of each predictor, with a leading axis of seeds."""
    keys = per_example(derive(key, "split"), jnp.arange(NUM_SEEDS))
    order = np.asarray(jax.vmap(lambda key: jax.random.permutation(key, len(DATA)))(keys))
    mean, sd = (f(DATA[order[:, :NUM_TRAIN]], axis=1, keepdims=True) for f in (np.mean, np.std))
    data = (DATA[order] - mean) / sd
    x, y = (jnp.asarray(values, jnp.float32) for values in (data[..., :-1], data[..., -1]))
    params = train(ARMS, key, x[:, :NUM_TRAIN], y[:, :NUM_TRAIN], steps)
    plain, sampled, _ = predict(ARMS, params, key, x[:, NUM_TRAIN:])
    noise, results = np.exp(np.asarray(params["log_sd"], float)), {}
    for name, (arms, is_sampled) in PREDICTORS.items():
        means = sampled[arms][0] if is_sampled else plain[arms].swapaxes(0, 1)  # [seed, component, n]
        sds = np.broadcast_to(noise[arms].T, means.shape[:2])
        scores = [score(*of_seed) for of_seed in zip(data[:, NUM_TRAIN:, -1], means, sds, strict=True)]
        results[name] = {metric: np.array([values[metric] for values in scores]) for metric in scores[0]}
    return results


def view(key: Array, steps: int) -> dict[str, Any]:
    """Train on one feature, with a gap, and return what sampled networks and ensembles predict along it."""
    patients, grid = ((DATA - DATA.mean(0)) / DATA.std(0))[:, [BMI, -1]], np.linspace(-4, 7, 111)
    gap = (patients[:, 0] >= PLACES["gap"][0]) & (patients[:, 0] <= PLACES["gap"][1])
    arrays = (patients[~gap, :1], patients[~gap, 1], grid[:, None])
    x, y, at = (jnp.stack([jnp.asarray(values, jnp.float32)] * NUM_SEEDS) for values in arrays)  # all seeds share them
    params = train(VIEW, key, x, y, steps)
    plain, one_network, mask_per_input = predict(VIEW, params, key, at)
    curves = jnp.asarray(one_network[-1, 0], jnp.float32)
    aleatoric, epistemic = variance_split(curves, jnp.full(curves.shape, jnp.exp(2 * params["log_sd"][-1, 0])))
    spreads = {SAMPLED: one_network[-1].std(1), ENSEMBLE: plain[:-1].std(0)}  # [seed, n]
    parts = {place: (grid >= low) & (grid <= high) for place, (low, high) in PLACES.items()}
    spread = {name: {place: sd[:, part].mean(1) for place, part in parts.items()} for name, sd in spreads.items()}
    sds = {"sd of the network": jnp.sqrt(epistemic), "sd": jnp.sqrt(aleatoric + epistemic)}
    samples = {"one network": one_network[-1, 0, :4], "a mask per input": mask_per_input[-1, 0, :4]}
    data = {"x": grid, "patients": patients[~gap].T, "left out": patients[gap].T, "mean": curves.mean(0)}
    return data | sds | samples | {"spread": spread}


def plot(path: Path, along: dict[str, Any], results: dict[str, Any]) -> None:
    """Plot bands along one feature, and the coverage of central intervals."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for sd in (along["sd"], along["sd of the network"]):
        left.fill_between(along["x"], along["mean"] - 2 * sd, along["mean"] + 2 * sd, alpha=0.3, color="C0")
    left.plot(*along["patients"], ".", *along["left out"], "x", color="gray", markersize=4)
    left.set(xlabel="body mass index (sd)", title="two sds: of the network, and with the noise")
    right.plot(LEVELS, np.mean([scores["coverage"] for scores in results.values()], axis=1).T, label=list(results))
    right.set(xlabel="probability of the interval", ylabel="test patients in it")
    right.legend()
    fig.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Error bars of Monte Carlo dropout in regression.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plot and its data")
    args = parser.parse_args()

    key = jax.random.key(args.seed)
    results, along = compare(derive(key, "compare"), args.steps), view(derive(key, "view"), args.steps)
    metrics = ("log-likelihood", "CRPS", "RMSE")
    print(" " * 20 + "|" + "|".join(f"{metric:^24}" for metric in metrics))
    for name, scores in results.items():
        pairs = [(scores[metric], scores[metric] - results[REFERENCE][metric]) for metric in metrics]
        print(f"{name:20}| " + " | ".join(f"{v.mean():6.3f}  {d.mean():+.3f} ±{sem(d):.3f}" for v, d in pairs))
    for name, sds in along["spread"].items():
        print(f"{'sd: ' + name:23} | " + " | ".join(f"{at} {sd.mean():.3f} ±{sem(sd):.3f}" for at, sd in sds.items()))

    args.out.mkdir(parents=True, exist_ok=True)
    data = {"jax": jax.__version__, "levels": LEVELS, "scores": results, "view": along}
    text = json.dumps(data, default=lambda v: np.asarray(v, float).round(4).tolist())
    (args.out / "mc_regression.json").write_text(text)
    plot(args.out / "mc_regression.png", along, results)


if __name__ == "__main__":
    main()
