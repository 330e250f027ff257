"""Does backprop multiply by 0s and 2s, or by 0s and 1s? A NumPy network with a hand-written backward pass answers.

Backprop multiplies by the same factors as the forward pass. The gradient of a masked unit is 0. The factor of a kept
unit is 1 / (1 - rate), which is 2 at rate 0.5, with ``scale_at="train"``, and 1 with ``scale_at="eval"``. With masks
from ``jdrop.dropout_mask``, the NumPy gradients equal ``jax.grad`` through ``jdrop.dropout``. The gradients per example
add up to that of the batch, although each example uses its own thinned network.

Dropout on inputs and on weights (DropConnect, Wan et al. 2013) give the input of a unit the same variance. A dropped
input also drops a row of weights, which correlates the units for the same example. A dropped weight has its own
decision, once per minibatch, which correlates the examples at the same unit. The exit status is 1 if a check fails.

    python examples/gradients_by_hand.py

Expect, after 20 seconds (2-core CPU, jax 0.10.2):

    0s and 1 / (1 - rate), scale_at="train"       |  2.1e-07 | up to 1e-05     | ok
    0s and 1s, scale_at="eval"                    |  1.4e-07 | up to 1e-05     | ok
    2s forward, but 1s backward: wrong by half    |      0.5 | 0.40 to 0.60    | ok
    per-example gradients, summed                 |  1.8e-07 | up to 1e-05     | ok
    masked inputs and units: their gradients      |        0 | 0               | ok
    dropped weights: their gradient               |        0 | 0               | ok
    dropped weights: rows without any gradient    |        0 | 0               | ok
    dropout on inputs: variance                   |        1 | 0.95 to 1.05    | ok
    dropout on inputs: two units                  |    -0.77 | -0.82 to -0.70  | ok
    dropout on inputs: two examples               |  -0.0027 | -0.04 to 0.04   | ok
    dropout on weights: variance                  |        1 | 0.95 to 1.05    | ok
    dropout on weights: two units                 |   -0.019 | -0.05 to 0.05   | ok
    dropout on weights: two examples              |     0.98 | 0.92 to 1.02    | ok
    training: difference of losses, worst step    |  3.6e-07 | up to 0.001     | ok
"""

import argparse
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

jax.config.update("jax_default_matmul_precision", "highest")  # float32 products, even where TF32 is the default

SIZES = (64, 128, 10)
RATES = (0.2, 0.5)  # inputs, hidden units
BATCH = 64
LEARNING_RATE = 0.1  # plain gradient descent
STEPS = 500
DRAWS = 20_000  # to estimate variances and covariances
TOLERANCE = 1e-5  # relative to the largest gradient of an array; float32 resolves 6e-8

Params = dict[str, Any]  # NumPy or JAX arrays
Masks = list[np.ndarray]
failed: list[str] = []


def check(name: str, value: float, low: float, high: float) -> None:
    """Print a row of the table, and record a failure."""
    expected = "0" if high == 0 else f"up to {high:g}" if low == 0 else f"{low:.2f} to {high:.2f}"
    print(f"{name:46}| {value:8.2g} | {expected:15} | {'ok' if low <= value <= high else 'FAILED'}")
    if not low <= value <= high:
        failed.append(name)


def init(key: Array) -> Params:
    shapes = {"w1": SIZES[:2], "b1": SIZES[1:2], "w2": SIZES[1:], "b2": SIZES[2:]}
    return {name: np.asarray(0.1 * jax.random.normal(derive(key, name), shape)) for name, shape in shapes.items()}


def jax_losses(params: Params, x: Array, y: Array, key: Array, scale_at: Any = "train", rates: Any = RATES) -> Array:
    """Return the losses [batch] of a network with dropout on inputs and hidden units."""
    x = jdrop.dropout(derive(key, "input"), x, rates[0], train=True, scale_at=scale_at)
    h = jax.nn.relu(x @ params["w1"] + params["b1"])
    h = jdrop.dropout(derive(key, "hidden"), h, rates[1], train=True, scale_at=scale_at)
    return optax.softmax_cross_entropy_with_integer_labels(h @ params["w2"] + params["b2"], y)


def draw_masks(key: Array) -> tuple[Masks, Masks]:
    """Return the masks of ``jax_losses`` with this key, as 0s and 1s and as 0s and 1 / (1 - rate)."""
    shapes, keys = ((BATCH, SIZES[0]), (BATCH, SIZES[1])), (derive(key, "input"), derive(key, "hidden"))
    ones = [np.array(jdrop.dropout_mask(*args), np.float32) for args in zip(keys, shapes, RATES, strict=True)]
    return ones, [mask / np.float32(1 - rate) for mask, rate in zip(ones, RATES, strict=True)]


def numpy_grad(params: Params, x: np.ndarray, y: np.ndarray, forward: Masks, backward: Masks) -> tuple[float, Params]:
    """Return the mean loss and its hand-written gradient, with separate masks for the forward and backward pass."""
    x = x * forward[0]
    a = x @ params["w1"] + params["b1"]
    h = np.maximum(a, 0) * forward[1]
    logits = h @ params["w2"] + params["b2"]
    logits -= logits.max(1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    one_hot = np.eye(SIZES[2], dtype=np.float32)[y]
    d_logits = (np.exp(log_p) - one_hot) / np.float32(len(x))
    d_h = d_logits @ params["w2"].T * backward[1]  # the gradient of a masked unit is 0
    d_a = d_h * (a > 0)
    grads = {"w1": x.T @ d_a, "b1": d_a.sum(0), "w2": h.T @ d_logits, "b2": d_logits.sum(0)}
    return float(-(log_p * one_hot).sum(1).mean()), grads


def check_gradients(params: Params, x: Any, y: Any, key: Array) -> np.ndarray:
    """Compare gradients; return the gradient of ``w1`` for one example."""
    one, two = draw_masks(key)

    def distance(forward: Masks, backward: Masks, by_jax: Params) -> float:  # maximum, relative to the largest gradient
        by_hand = numpy_grad(params, x, y, forward, backward)[1]
        return max(float(np.abs(by_hand[name] - g).max() / np.abs(g).max()) for name, g in by_jax.items())

    batch, batch_eval = (jax.grad(lambda p, s=s: jax_losses(p, x, y, key, s).mean())(params) for s in ("train", "eval"))
    each = jax.tree.map(np.asarray, jax.jacrev(jax_losses)(params, x, y, key))  # [batch, ...]
    check('0s and 1 / (1 - rate), scale_at="train"', distance(two, two, batch), 0, TOLERANCE)
    check('0s and 1s, scale_at="eval"', distance(one, one, batch_eval), 0, TOLERANCE)
    check("2s forward, but 1s backward: wrong by half", distance(two, one, batch), 0.4, 0.6)
    check("per-example gradients, summed", distance(two, two, {k: g.mean(0) for k, g in each.items()}), 0, TOLERANCE)

    pixels, units = one[0] == 0, one[1] == 0
    gradients = each["w1"][pixels], each["w1"].swapaxes(1, 2)[units], each["w2"][units]
    check("masked inputs and units: their gradients", max(float(np.abs(g).max()) for g in gradients), 0, 0)
    return each["w1"][0]


def check_dropconnect(params: Params, x: Array, y: Array, key: Array) -> np.ndarray:
    """Check the network with dropout on ``w1`` instead; return the gradient of ``w1`` for one example."""

    def loss(w1: Array) -> Array:
        w1 = jdrop.dropout(key, w1, RATES[1], train=True)
        return jax_losses(params | {"w1": w1}, x[None], y[None], key, rates=(0.0, 0.0)).mean()

    grad = np.asarray(jax.grad(loss)(params["w1"]))
    dropped = ~np.asarray(jdrop.dropout_mask(jax.random.clone(key), grad.shape, RATES[1]))
    seen = grad[:, np.abs(grad).max(0) > 0][x > 0]  # only nonzero inputs and active units
    check("dropped weights: their gradient", float(np.abs(grad * dropped).max()), 0, 0)
    check("dropped weights: rows without any gradient", float((seen == 0).all(1).sum()), 0, 0)
    return grad


def check_moments(params: Params, x: Array, key: Array) -> None:
    """Check moments of the inputs of two units for two examples, relative to the variance, to 5 standard errors."""
    rate, w = RATES[1], params["w1"][:, :2]
    term = x[:, :, None] * w  # [example, input, unit]
    variance, units, examples = (float(term[0, :, 0] @ t) for t in (term[0, :, 0], term[0, :, 1], term[1, :, 0]))
    draws: dict[str, Any] = {
        "inputs": (lambda key: jdrop.dropout(key, x, rate, train=True) @ w, (1, units / variance, 0)),
        "weights": (lambda key: x @ jdrop.dropout(key, jnp.asarray(w), rate, train=True), (1, 0, examples / variance)),
    }
    for kind, (draw, formulas) in draws.items():
        z = jax.jit(jax.vmap(draw))(per_example(derive(key, kind), jnp.arange(DRAWS))) - x @ w
        others = {"variance": z[:, 0, 0], "two units": z[:, 0, 1], "two examples": z[:, 1, 0]}
        for (name, other), formula in zip(others.items(), formulas, strict=True):
            products = z[:, 0, 0] * other * (1 - rate) / rate / variance
            error = 5 * float(products.std()) / DRAWS**0.5
            check(f"dropout on {kind}: {name}", float(products.mean()), formula - error, formula + error)


def train(params: Params, x: np.ndarray, y: np.ndarray, key: Array, num_steps: int) -> np.ndarray:
    """Train both networks with the same keys; return their losses [step, 2]."""
    optimizer = optax.sgd(LEARNING_RATE)

    @jax.jit
    def train_step(params: Params, opt_state: optax.OptState, x: Array, y: Array, key: Array) -> tuple[Any, ...]:
        loss, grads = jax.value_and_grad(lambda p: jax_losses(p, x, y, key).mean())(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    by_hand, by_jax, opt_state, losses = params, params, optimizer.init(params), []
    for t in tqdm(range(num_steps)):
        batch = np.asarray(jax.random.choice(derive(key, "batch", t), len(x), (BATCH,), replace=False))
        drop_key = derive(key, "drop", t)
        by_jax, opt_state, jax_loss = train_step(by_jax, opt_state, x[batch], y[batch], drop_key)
        _, masks = draw_masks(drop_key)
        loss, grads = numpy_grad(by_hand, x[batch], y[batch], masks, masks)
        by_hand = {name: value - np.float32(LEARNING_RATE) * grads[name] for name, value in by_hand.items()}
        losses.append((loss, float(jax_loss)))
    return np.array(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description="Backprop through dropout by hand.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plot")
    args = parser.parse_args()

    digits, key = load_digits(), jax.random.key(args.seed)
    x, y = (digits.data / 16).astype(np.float32), digits.target
    params = init(derive(key, "init"))
    losses = train(params, x, y, derive(key, "train"), args.steps)

    print(f"{'check':46}| {'value':8} | {'expected':15} | verdict")
    by_input = check_gradients(params, x[:BATCH], y[:BATCH], derive(key, "gradients"))
    by_weight = check_dropconnect(params, jnp.asarray(x[0]), jnp.asarray(y[0]), derive(key, "dropconnect"))
    check_moments(params, jnp.asarray(x[[0, 10]]), derive(key, "moments"))  # two zeros
    worst = np.abs(losses[:, 0] / losses[:, 1] - 1).max()
    check("training: difference of losses, worst step", float(worst), 0, 1e-3)

    fig, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    axes[0].plot(losses[:, 1], label="jax.grad", linewidth=3, alpha=0.4)
    axes[0].plot(losses[:, 0], label="NumPy by hand", linewidth=0.8, color="black")
    axes[0].set(xlabel="step", ylabel="loss", title="the same training")
    axes[0].legend()
    for ax, name, grad in zip(axes[1:], ("inputs", "weights"), (by_input, by_weight), strict=True):
        ax.imshow(grad[:, np.abs(grad).max(0) > 0] != 0, cmap="Greys", aspect="auto", interpolation="nearest")
        ax.set(title=f"dropout on {name}: nonzero gradient", xlabel="active units", ylabel="inputs")
    args.out.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out / "gradients_by_hand.png", dpi=120)
    if failed:
        raise SystemExit(f"These checks failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
