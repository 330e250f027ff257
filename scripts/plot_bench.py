"""Plot the results of bench_dropout.py and bench_memory.py relative to a plain scale and to no dropout."""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def bars(axes: Any, names: list[str], values: list[float], title: str) -> None:
    """Draw one panel, with one labeled horizontal bar per contender."""
    axes.barh(names, values, color=["tab:blue" if "jdrop" in name else "silver" for name in names])
    axes.bar_label(axes.containers[0], [f"{value:.3g}" for value in values], padding=2, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(0.5, 3 * max(values))
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.set_title(title, fontsize=9)


def caption(report: dict[str, Any]) -> str:
    """Return the machine and the versions of a report as text."""
    machine = report["machine"]
    versions = (f"{name} {version}" for name, version in report["versions"].items())
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['device']}; {', '.join(versions)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time", required=True, metavar="PATH", help="JSON of bench_dropout.py")
    parser.add_argument("--memory", required=True, metavar="PATH", help="JSON of bench_memory.py")
    parser.add_argument("--size", default="4096x1024", help="the shape to show")
    parser.add_argument("--out", required=True, metavar="PATH", help="the PNG to write")
    options = parser.parse_args()
    time, memory = (json.loads(Path(path).read_text()) for path in (options.time, options.memory))

    figure, panels = plt.subplots(2, 3, figsize=(13, 6.4), layout="constrained")
    for line, dtype in zip(panels, ("float32", "bfloat16"), strict=True):
        for axes, direction in zip(line, ("forward", "forward+backward"), strict=False):
            wanted = {"shape": options.size, "dtype": dtype, "direction": direction}
            rows = [r for r in time["rows"] if wanted.items() <= r.items() and "ratio" in r]
            title = f"time, {direction}, {dtype}, {options.size}\n(x plain scale)"
            bars(axes, [r["contender"] for r in rows], [r["ratio"] for r in rows], title)
    for axes, how in zip(panels[:, 2], ("unrolled", "scan"), strict=True):
        rows = [r for r in memory["rows"] if r["variant"] == f"{how}, plain, one key" and "ratio" in r]
        title = f"temporary bytes, gradient of a transformer, {how}\n(x no dropout)"
        bars(axes, [r["contender"] for r in rows], [r["ratio"] for r in rows], title)
    lines = dict.fromkeys(caption(report) for report in (time, memory))  # once per machine
    figure.supxlabel("\n".join([f"{time['command']}; {memory['command']}", *lines]), fontsize=7)
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
