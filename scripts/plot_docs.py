"""Draw the pictures of the README and the site into docs/pictures, each in a light and a dark version.

    python scripts/plot_docs.py
    python scripts/plot_docs.py --only time_and_memory training_char_gpt

Masks and numbers come from calls of jdrop. Measured figures come from scripts/results: from the reports of the
benchmarks, and from curves_NAME.json, which is NAME.json as written by ``python examples/NAME.py``.
"""

import argparse
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _pictures
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from _canvas import THEMES, TIMES, Canvas, Theme, save, settings
from matplotlib.figure import Figure

import jdrop
from jdrop import schedules
from jdrop._random import fast

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results"
WIDTH = _pictures.WIDTH


# ---------------------------------------------------------------------------------- how it works


def tiles(theme: Theme) -> Canvas:
    """Draw the mask of one device, and the tiles of four devices that make the same mask."""
    key, shape, pitch = _pictures.key_of("tiles"), (12, 24), 9
    whole = jdrop.dropout_mask(key, shape, 0.3)
    c = Canvas(theme, WIDTH, 168)
    c.panel(10, 30, whole, pitch, title=f"one device: dropout_mask(key, {shape}, 0.3)")
    c.text(261, 84, "=", fontsize=13)
    c.text(402, 21, "four devices: one key, no communication")
    for i in range(4):
        rows, columns = (6 * (i // 2), 6), (12 * (i % 2), 12)
        tile = jdrop.dropout_mask(key, shape, 0.3, window=(rows, columns))
        assert (tile == whole[rows[0] : sum(rows), columns[0] : sum(columns)]).all()
        x, y = 288 + (12 * pitch + 12) * (i % 2), 30 + (6 * pitch + 6) * (i // 2)
        c.cells(x, y, tile, pitch, color=theme.lines[i])
        c.text(312 + 60 * i, 156, f"device {i}", color=theme.lines[i])
    return c


def forward_backward(theme: Theme) -> Canvas:
    """Draw dropout and its gradient: both multiply by one mask, and only the key is stored in between."""
    key, x = _pictures.key_of("forward_backward"), _pictures.pattern(8, 12)
    mask = jdrop.dropout_mask(key, x.shape, 0.3)
    y, backward = jax.vjp(lambda x: jdrop.dropout(key, x, 0.3, train=True), x)
    dy = 0.6 * jax.random.normal(_pictures.key_of("cotangent"), x.shape)
    (dx,), (ones,) = backward(dy), backward(jnp.ones_like(x))
    assert ((ones != 0) == mask).all()
    c, pitch, left, top, bottom = Canvas(theme, WIDTH, 268), 9, (46, 208, 370), 26, 164
    for row, names, values, signs in (
        (top, ("x", "mask", f"y = x {TIMES} mask / 0.7"), (x, mask, y), (TIMES, "=")),
        (bottom, ("", "", ""), (dx, ones != 0, dy), ("=", TIMES)),
    ):
        for start, name, value in zip(left, names, values, strict=True):
            c.panel(start, row, value, pitch, title=name)
        for start, sign in zip(left, signs, strict=False):
            c.text(start + 135, row + 36, sign, fontsize=12)
    for start, name in zip(left, (f"dx = dy {TIMES} mask / 0.7", "the same mask", "dy"), strict=True):
        c.text(start + 54, bottom + 81, name)
    c.soft_text(18, top + 36, "forward  →", rotation=90)
    c.soft_text(18, bottom + 36, "←  backward", rotation=90)
    c.box(182, 119, 160, 24, edgecolor=theme.lines[0], linewidth=1.4)
    c.text(262, 131, "stored: the key, 8 bytes")
    c.arrow((262, 101), (262, 118), theme.lines[0])
    c.arrow((262, 144), (262, 161), theme.lines[0])
    c.soft_text(352, 131, "no mask, and no copy of x", ha="left")
    return c


def seed(theme: Theme) -> Canvas:
    """Draw the way from a key to the decision about one element, with the numbers of a key."""
    shape, row, column, rate = (8, 128), 2, 5, 0.3
    key = jax.random.key(42)
    of_key = fast.seed(jax.random.key_data(key))
    of_row = fast.row_key(of_key, (np.uint32(0), np.uint32(row)))
    words = np.asarray(fast.mix(of_row, jnp.arange(16, dtype=jnp.uint32)))
    limit = int(fast.threshold(jnp.float32(rate))[0])
    mask = np.asarray(jdrop.dropout_mask(key, shape, rate))[:, :16]
    assert (mask[row] == (words >= limit)).all()

    def two(pair: Any) -> str:
        return " ".join(f"{int(word):08x}" for word in pair)

    word = int(words[column])
    boxes = (
        ("jax.random.key(42)", two(jax.random.key_data(key))),
        ("seed", two(of_key)),
        (f"key of row {row}", two(of_row)),
        (f"word of column {column}", f"{word:08x}"),
        ("kept" if word >= limit else "dropped", f"{word:08x} {'≥' if word >= limit else '<'} {limit:08x}"),
    )
    steps = (
        "Threefry, once per key",
        "Threefry of the row, once per row",
        "13 integer operations per element",
        f"threshold: {rate} {TIMES} 2³² = {limit:08x}",
    )
    c = Canvas(theme, WIDTH, 290)
    for i, (name, value) in enumerate(boxes):
        y = 8 + 60 * i
        c.box(6, y, 216, 24, edgecolor=theme.lines[1] if i in (3, 4) else theme.soft, linewidth=1.3)
        c.text(14, y + 12, name, ha="left")
        c.text(214, y + 12, value, ha="right", family="DejaVu Sans Mono")
    for i, step in enumerate(steps):
        c.arrow((24, 34 + 60 * i), (24, 66 + 60 * i))
        c.soft_text(36, 50 + 60 * i, step, ha="left")
    left, top, pitch = 285, 26, 14
    c.panel(left, top, mask, pitch, title=f"the mask of an array {list(shape)}: first columns")
    c.outline(left + column * pitch, top + row * pitch, 1, 1, pitch)
    for i in range(8):
        c.soft_text(left - 8, top + (i + 0.5) * pitch, str(i))
    base, height = 262, 96
    c.text(left + 112, base - height - 12, f"words of row {row}, as parts of 2³²")
    for i, value in enumerate(words / 2**32):
        color = theme.lines[0] if value * 2**32 >= limit else theme.faint
        c.line([left + (i + 0.5) * pitch] * 2, [base, base - height * value], color, linewidth=9, solid_capstyle="butt")
        c.soft_text(left + (i + 0.5) * pitch, base + 9, str(i))
    y = base - height * limit / 2**32
    c.line([left - 2, left + 16 * pitch + 2], [y, y], theme.lines[1], linewidth=1.2)
    c.text(left - 5, y, "0.3", ha="right", color=theme.lines[1])
    c.box(left + column * pitch, base - height, pitch, height + 16, edgecolor=theme.lines[1], linewidth=1.4)
    return c


def plots(height: float, *columns: float, **options: Any) -> tuple[Figure, Any]:
    """Return a figure and its axes, side by side; heights are in points."""
    size = (WIDTH / 72, height / 72)
    return plt.subplots(1, len(columns), figsize=size, layout="constrained", width_ratios=columns, **options)


def rates(theme: Theme) -> Figure:
    """Plot the schedules over steps, and the conventions of rates over layers."""
    figure, (left, right) = plots(215, 1.2, 1)
    step = np.sort([*range(0, 1001, 10), 399, 599])
    for name, schedule, style in (
        ("early(0.3, 400)", schedules.early(0.3, 400), "-"),
        ("late(0.3, 600)", schedules.late(0.3, 600), "--"),
        ("curriculum(0.3, 0.01)", schedules.curriculum(0.3, 0.01), ":"),
        ("plateau_decay(0.2, 300, 200)", schedules.plateau_decay(0.2, 300, 200), "-."),
    ):
        left.plot(step, np.asarray(schedule(step)), style, linewidth=2, label=name)
    left.set(xlabel="step", ylabel="rate", ylim=(-0.01, 0.55), title="over steps")
    left.legend(loc="upper left", borderaxespad=0)
    for convention, marker in (("i/(n-1)", "o"), ("i/n", "s"), ("(i+1)/n", "^")):
        values = schedules.depth_rates(0.3, 6, convention)
        right.plot(values, marker=marker, markersize=5, label=f'"{convention}"')
    right.set(xlabel="layer", ylim=(-0.01, 0.55), title="over layers: depth_rates(0.3, 6, …)")
    right.legend(loc="upper left", borderaxespad=0)
    return figure


# ---------------------------------------------------------------------------------- measured


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def caption(*reports: dict[str, Any]) -> str:
    """Return the machine and the versions of reports as text, once if they agree."""
    lines = {}
    for report in reports:
        machine, versions = report["machine"], report["versions"]
        where = f"{machine['cpu']}, {machine['cores']} cores"
        lines[where] = lines.get(where, {}) | versions
    texts = (f"{where}; " + ", ".join(f"{name} {version}" for name, version in v.items()) for where, v in lines.items())
    return "\n".join(textwrap.fill(text, 96) for text in texts)


CONTENDERS = {
    "no dropout": "no dropout",
    "scale": f"{TIMES} a constant",
    "fixed mask": "a fixed mask",
    "jdrop fast": "jdrop",
    "jdrop jax": 'jdrop, "jax"',
    "where(bernoulli)": "where(bernoulli)",
    "linen": "Flax linen",
    "nnx": "Flax nnx",
    "equinox": "Equinox",
    "haiku": "Haiku",
    "torch": "PyTorch",
}


def time_and_memory(theme: Theme) -> Figure:
    """Plot time relative to a multiplication by a constant, and bytes relative to no dropout."""
    time, memory = read("dropout"), read("memory")
    size = "4096x1024"
    figure, panels = plots(345, 1, 1, 1, sharey=True)
    for axes, direction in zip(panels, ("forward", "forward+backward"), strict=False):
        rows = [r for r in time["rows"] if r["shape"] == size and r["direction"] == direction and "ratio" in r]
        of = lambda dtype, rows=rows: {r["contender"]: r["ratio"] for r in rows if r["dtype"] == dtype}
        bars(axes, theme, {dtype: of(dtype) for dtype in ("float32", "bfloat16")}, "{:#.3g}")
        axes.set_xscale("log")
        axes.set(xlim=(0.8, 150), xticks=[1, 10, 100], xticklabels=["1", "10", "100"])
        axes.set_title(f"{direction.replace('+', ' + ')}: time,\n{TIMES} that of a multiplication")
    of = lambda how: {
        r["contender"]: r["ratio"] for r in memory["rows"] if r["variant"] == f"{how}, plain, one key" and "ratio" in r
    }
    bars(panels[2], theme, {how: of(how) for how in ("unrolled", "scan")}, "{:.2f}")
    panels[2].set(xlim=(0.86, 1.45))
    panels[2].set_title(f"transformer: temporary\nbytes, {TIMES} no dropout")
    panels[0].set_yticks(range(len(CONTENDERS)), list(CONTENDERS.values()))
    panels[0].invert_yaxis()
    figure.supxlabel(caption(time, memory), fontsize=9, color=theme.soft)
    return figure


def bars(axes: Any, theme: Theme, values: dict[str, dict[str, float]], form: str) -> None:
    """Draw two thin bars from 1 on per contender, blue for jdrop, and the second one lighter."""
    for i, (name, of) in enumerate(values.items()):
        for contender, value in of.items():
            y = list(CONTENDERS).index(contender) + 0.4 * i - 0.2
            color = theme.lines[0] if "jdrop" in contender else theme.lines[5]
            axes.barh(y, value - 1, 0.36, left=1, color=color, alpha=1 - 0.45 * i)
            axes.text(max(value, 1), y, " " + form.format(value), va="center")
        axes.barh(0, 0, color=theme.lines[5], alpha=1 - 0.45 * i, label=name)
    axes.axvline(1, color=theme.soft, linewidth=1)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="upper right", handlelength=1, borderaxespad=0, labelspacing=0.3)


def attention_memory(theme: Theme) -> Figure:
    """Plot the temporary bytes of attention with dropout against its length."""
    reports = read("attention"), read("attention_8192")
    figure, axes = plots(270, 1)
    for contender, rate, name, style in (
        ("linen", 0.1, "Flax, dropout", "-o"),
        ("jax.nn", 0.0, "jax.nn, no dropout", "-s"),
        ("jdrop chunked", 0.1, "jdrop, dropout", "-o"),
        ("jdrop chunked, causal", 0.1, "jdrop, dropout, causal", "--^"),
    ):
        rows = [r for report in reports for r in report["rows"] if r["direction"] == "forward+backward"]
        rows = [r for r in rows if (r["contender"], r["rate"]) == (contender, rate) and r["temporary_bytes"]]
        color = theme.lines[{"linen": 1, "jax.nn": 5}.get(contender, 0)]
        x, y = [r["length"] for r in rows], [r["temporary_bytes"] / 1e6 for r in rows]
        axes.loglog(x, y, style, color=color, linewidth=1.8, markersize=5, label=name)
    lengths = sorted({r["length"] for report in reports for r in report["rows"]})
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.set_yticks([10, 100, 1000, 10000], ["10 MB", "100 MB", "1 GB", "10 GB"])
    first = reports[0]
    axes.set(xlabel="length", ylabel="temporary memory", ylim=(10, 20000))
    title = f"forward and backward, batch {first['batch']}, {first['heads']} heads of width {first['width']}, float32"
    axes.set_title(title)
    axes.legend(loc="upper left")
    figure.supxlabel(caption(*reports), fontsize=9, color=theme.soft)
    return figure


# ---------------------------------------------------------------------------------- examples


def error_of(values: np.ndarray) -> Any:
    """Return twice the standard error over the last axis."""
    return 2 * values.std(axis=-1, ddof=1) / values.shape[-1] ** 0.5


def band(axes: Any, steps: Any, values: Any, **options: Any) -> None:
    """Plot the mean of curves [time, seed], with a band of two standard errors."""
    values = np.asarray(values)
    mean, error = values.mean(-1), error_of(values)
    (line,) = axes.plot(steps, mean, linewidth=1.8, **options)
    axes.fill_between(steps, mean - error, mean + error, color=line.get_color(), alpha=0.22, linewidth=0)


def dots(axes: Any, theme: Theme, values: dict[str, list[float]], colors: Any = None) -> None:
    """Plot the values of the seeds, and below them their mean with two standard errors."""
    for row, of in enumerate(map(np.asarray, values.values())):
        axes.plot(of, np.full(len(of), row - 0.22), ".", color=theme.lines[5], alpha=0.7, markeredgewidth=0)
        color = colors[row] if colors else theme.lines[0]
        axes.errorbar(of.mean(), row + 0.08, xerr=error_of(of), fmt="o", markersize=5, capsize=3, color=color)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.6)


def digits_mlp(theme: Theme, data: Any) -> Figure:
    figure, (left, right) = plots(225, 1.5, 1)
    for (name, values), color in zip(data["accuracy"].items(), (theme.lines[1], theme.lines[0]), strict=True):
        band(left, data["steps"], values, label=name, color=color)
    last = np.array([values[-1] for values in data["accuracy"].values()])
    left.set(xlabel="step", ylabel="test accuracy (%)", title="mean and two standard errors", ylim=(92, None))
    left.legend(loc="lower right")
    right.plot([0, 1], last, color=theme.lines[5], alpha=0.7, marker="o", markersize=4, linewidth=1)
    right.set(xlim=(-0.3, 1.3), title="last step, one line per seed")
    right.set_xticks([0, 1], list(data["accuracy"]))
    return figure


def one_mask_or_many(theme: Theme, data: Any) -> Figure:
    figure, (left, right) = plots(215, 1, 1, sharey=True)
    best = max(max(values) for values in data["accuracy"].values())
    for axes in (left, right):
        dots(axes, theme, data["accuracy"])
    left.set(xlabel="test accuracy (%)")
    right.set(xlim=(best - 3, best + 0.2), xlabel="test accuracy (%), zoomed in")
    return figure


def thin_mlp(theme: Theme, data: Any) -> Figure:
    figure, (left, right) = plots(270, 1.3, 1, sharey=True)
    seconds = {name: np.median(values) for name, values in data["seconds"].items()}
    styles = zip(
        data["accuracy"].items(), (*theme.lines, theme.ink, theme.soft, theme.faint), "os^Dv<>PX", strict=False
    )
    for (name, values), color, marker in styles:
        at = seconds[name] * np.arange(1, len(values) + 1) / len(values)
        style = {"color": color, "marker": marker, "markersize": 4}
        left.plot(at, np.mean(values, axis=-1), linewidth=1.4, label=name, **style)
        ends = np.array(values[-1])
        right.errorbar(at[-1], ends.mean(), yerr=error_of(ends), capsize=3, linestyle="", **style)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
        axes.minorticks_off()
    left.set(xlabel="seconds of training", ylabel="test accuracy (%)", ylim=(84, None), title="along the training")
    right.set(xlabel="seconds of training", title="at the end, two standard errors")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def ensemble_of_subnets(theme: Theme, data: Any) -> Figure:
    figure, (left, right) = plots(250, 1, 1.15)
    left.plot([0, 1], [0, 1], color=theme.soft, linewidth=0.8)
    left.set(xlabel="average of all 4,096 networks", ylabel="weight scaling", title="probabilities from 0.02 to 0.98")
    for scale_at, color, marker in (("train", theme.lines[0], "o"), ("eval", theme.lines[1], "^")):
        x, y = (np.ravel(data[scale_at][name]) for name in ("ensemble", "scaled"))
        doubtful = (x > 0.02) & (x < 0.98)
        left.plot(x[doubtful], y[doubtful], marker, color=color, markersize=4, markeredgewidth=0, alpha=0.6)
        result = {name: np.mean(data[scale_at][name], axis=0) for name in ("rms", "predicted")}
        right.loglog(data["draws"], result["rms"][3:], marker, color=color, label=f'Monte Carlo, "{scale_at}"')
        right.loglog(data["draws"], result["predicted"], color=theme.lines[5], linewidth=0.8)
        right.axhline(
            result["rms"][1], color=color, linestyle="--", linewidth=1.2, label=f'weight scaling, "{scale_at}"'
        )
    right.set(xlabel="draws", title="rms difference from that average")
    right.set_xticks(data["draws"], [f"{n:,}" for n in data["draws"]])
    right.set_yticks([0.001, 0.003, 0.01, 0.03], ["0.001", "0.003", "0.01", "0.03"])
    right.minorticks_off()
    right.legend(loc="lower left")
    return figure


def mc_regression(theme: Theme, data: Any) -> Figure:
    figure, (left, right) = plots(265, 1.15, 1)
    along = {name: np.asarray(values) for name, values in data["view"].items() if name != "spread"}
    x, mean, blue = along["x"], along["mean"], theme.lines[0]
    for name, label, alpha in (("sd", "network and noise", 0.2), ("sd of the network", "network", 0.4)):
        low, high = (mean + sign * 2 * along[name] for sign in (-1, 1))
        left.fill_between(x, low, high, color=blue, alpha=alpha, linewidth=0, label=f"2 sd, {label}")
    left.plot(x, mean, color=blue, linewidth=1.5)
    left.plot(*along["patients"], ".", color=theme.ink, markersize=3, markeredgewidth=0, label="patients")
    left.plot(*along["left out"], "x", color=theme.lines[1], markersize=3.5, label="left out")
    left.set(xlabel="body mass index (sd)", ylabel="progression (sd)", ylim=(-4.5, 9))
    left.legend(loc="upper left", borderaxespad=0)
    right.plot([0, 1], [0, 1], color=theme.soft, linewidth=0.8)
    styles = ("-", "--", "-", "--", ":", "-")
    colors = (theme.lines[1], theme.lines[3], theme.lines[5], theme.lines[2], theme.lines[4], blue)
    for (name, scores), style, color in zip(data["scores"].items(), styles, colors, strict=True):
        coverage = np.mean(scores["coverage"], axis=0)
        right.plot(data["levels"], coverage, style, color=color, linewidth=1.6, label=name)
    right.set(xlabel="probability of the interval", title="share of test patients in it", ylim=(0, 1))
    right.legend(loc="upper left", borderaxespad=0, labelspacing=0.2, fontsize=8)
    return figure


def uncertainty_samples(theme: Theme) -> Figure:
    """Plot samples of one regression network: the same network for all inputs, and a mask per input."""
    along = read("curves_mc_regression")["view"]
    figure, (left, right) = plots(215, 1, 1, sharey=True)
    for axes, name, style in ((left, "one network", "-"), (right, "a mask per input", ".")):
        for values, color in zip(along[name], theme.lines, strict=False):
            axes.plot(along["x"], values, style, color=color, linewidth=1.6, markersize=4, markeredgewidth=0)
        axes.set(xlabel="body mass index (sd)")
    left.set(title="one sampled network for all inputs: shared_axes=0", ylabel="prediction")
    right.set(title="a mask per input: shared_axes=()")
    return figure


def digits_uncertain(theme: Theme, data: Any) -> Figure:
    figure, (left, middle, right) = plots(250, 1.15, 1.15, 0.9)
    colors = (theme.lines[5], theme.lines[2], theme.lines[1], theme.lines[0])
    for (name, scores), color in zip(data["scores"].items(), colors, strict=True):
        left.plot(data["rejected"], np.mean(scores["rejected by entropy"], axis=0), color=color, label=name)
        accuracy, confidence = np.mean(scores["rotated"], axis=0)
        middle.plot(data["angles"], accuracy, "o-", markersize=3.5, color=color)
        middle.plot(data["angles"], confidence, "^--", markersize=3.5, color=color)
    left.set(xlabel="rejected by entropy (%)", title="accuracy of accepted (%)")
    left.legend(loc="lower right", borderaxespad=0)
    middle.set(xlabel="rotation (degrees)", ylim=(0, 100), title="accuracy (dots), confidence (triangles)")
    middle.set_xticks(data["angles"])
    right.plot(np.transpose(data["learned rates"]), "o-", color=theme.lines[0], markersize=3.5, linewidth=1)
    right.set(xlim=(-0.3, 2.3), ylim=(0, None), title="learned rates")
    right.set_xticks(range(3), ["inputs", "hidden 1", "hidden 2"])
    return figure


def simcse(theme: Theme, data: Any) -> Figure:
    figure, (left, right) = plots(225, 1, 1)
    colors = [theme.ink, *theme.lines]
    dots(left, theme, data["accuracy"], colors)
    left.set(xlabel="accuracy with 100 labels (%)")
    for (_, values), color in zip(data["loss"].items(), colors[1:], strict=True):
        right.semilogy(values, color=color, linewidth=1.5)
    right.set(xlabel="step", title="contrastive loss (nats), same colors")
    right.set_yticks([0.03, 0.1, 0.3, 1, 3], ["0.03", "0.1", "0.3", "1", "3"])
    right.minorticks_off()
    return figure


def digits_cnn(theme: Theme, data: Any) -> Figure:
    figure, axes = plots(190, 1)
    dots(axes, theme, data["accuracy"])
    axes.set(xlabel="test accuracy (%)", title="seeds (gray), mean and two standard errors")
    return figure


def lstm_words(theme: Theme, data: Any) -> Figure:
    figure, axes = plots(260, 1)
    colors = (theme.lines[5], *theme.lines[:5])
    for (name, values), color in zip(data["loss"].items(), colors, strict=True):
        band(axes, data["steps"], values, label=name, color=color)
    axes.set(xlabel="step", ylabel="validation loss (nats per word)", title="mean and two standard errors")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return figure


def char_gpt(theme: Theme, data: Any) -> Figure:
    figure, axes = plots(250, 1)
    for (arm, losses), color in zip(data["loss"].items(), (theme.lines[1], theme.lines[0]), strict=True):
        for values, style, text in zip(
            zip(*losses, strict=True), ("--", "-"), ("training text", "held out"), strict=True
        ):
            axes.plot(data["steps"], values, style, color=color, linewidth=1.8, label=f"{arm}, {text}")
    axes.set(xlabel="step", ylabel="loss (nats per character)", ylim=(0, None))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return figure


def layer_dropout(theme: Theme, data: Any) -> Figure:
    figure, axes = plots(250, 1)
    for (arm, of), color in zip(data["results"].items(), (theme.lines[1], theme.lines[5], theme.lines[0]), strict=True):
        band(axes, np.mean(of["blocks"], axis=0), np.transpose(of["held out"]), label=arm, color=color, marker="o")
    axes.set(xlabel="computed blocks, relative to no dropout", ylabel="held-out loss (nats per character)")
    axes.legend()
    return figure


# ---------------------------------------------------------------------------------- all

Draw = Callable[[Theme], Canvas | Figure]
MEMBERS = (
    *("dropout", "channel_dropout", "drop_block", "drop_path", "stochastic_depth", "skip_path", "locked_dropout"),
    *("embedding_dropout", "token_dropout", "patch_dropout", "drop_connect", "alpha_dropout", "gaussian_dropout"),
    *("gaussian_noise", "multi_sample_dropout", "bias_dropout_add", "dot_product_attention", "dropout_mask"),
    *("drop_block_mask", "zoneout", "thin"),
)
EXAMPLES = (
    *(digits_mlp, one_mask_or_many, thin_mlp, ensemble_of_subnets, mc_regression, digits_uncertain, simcse, digits_cnn),
    *(lstm_words, char_gpt, layer_dropout),
)


def training(draw: Callable[[Theme, Any], Figure]) -> Draw:
    return lambda theme: draw(theme, read(f"curves_{draw.__name__}"))


PICTURES: dict[str, Draw] = {
    "family": _pictures.family,
    "tiles": tiles,
    "forward_backward": forward_backward,
    "seed": seed,
    "schedules": rates,
    "time_and_memory": time_and_memory,
    "attention_memory": attention_memory,
    "uncertainty_samples": uncertainty_samples,
    **{f"mask_{name}": getattr(_pictures, name) for name in MEMBERS},
    **{f"training_{draw.__name__}": training(draw) for draw in EXAMPLES},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=PICTURES, metavar="NAME", help="of: %(choices)s")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", help="folder for the SVGs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        for theme in THEMES:
            with matplotlib.rc_context(settings(theme)):
                drawn = PICTURES[name](theme)
                save(drawn.figure if isinstance(drawn, Canvas) else drawn, options.out / f"{name}-{theme.name}.svg")


if __name__ == "__main__":
    main()
