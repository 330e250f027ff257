"""What the pictures of ``plot_docs.py`` are made of: the colors of both themes, and a canvas for small arrays."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LIMIT = 1 / 0.7  # the value with the strongest color: 1, scaled at rate 0.3
LEVELS = 10  # of each color scale; few, so that files are small
TIMES, MINUS = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"


class Theme(NamedTuple):
    """Colors on one background. Neighbors differ in lightness too, so that color-blind readers can tell them apart."""

    name: str
    ink: str  # text
    soft: str  # less important text, axes, masks
    faint: str  # dropped elements, grids
    positive: tuple[str, str, str]  # from small to large values
    negative: tuple[str, str, str]
    lines: tuple[str, ...]  # blue, orange, green, purple, yellow, gray


THEMES = (
    Theme(
        *("light", "#1f2328", "#57606a", "#b4bbc4"),
        positive=("#cde1f6", "#4b90d8", "#083d7a"),
        negative=("#fde0bf", "#ee8a3e", "#a53a00"),
        lines=("#0a5fb4", "#d05a00", "#00845e", "#a5448f", "#a87b00", "#7a828c"),
    ),
    Theme(
        *("dark", "#e6edf3", "#a3adb8", "#59626d"),
        positive=("#17395c", "#3d8dd6", "#c3e2ff"),
        negative=("#5b3210", "#d87a2c", "#ffcb96"),
        lines=("#63b3f5", "#ff9d4d", "#35c796", "#e296cd", "#e8d24a", "#98a2ad"),
    ),
)


def settings(theme: Theme) -> dict[str, Any]:
    """Return the settings of matplotlib for a theme, with which a picture has the same bytes whenever it is drawn."""
    ink = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor")
    soft = ("axes.edgecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(ink, theme.ink),
        **dict.fromkeys(soft, theme.soft),
        "axes.prop_cycle": cycler(color=theme.lines),
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 9.5,
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "font.size": 9,
        "grid.alpha": 0.4,
        "grid.color": theme.faint,
        "grid.linewidth": 0.6,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "path.simplify": False,
        "svg.fonttype": "path",  # so that text has the same size everywhere
        "svg.hashsalt": "jdrop",
    }


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, without the date, and with horizontal strokes in their short form."""
    figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = re.sub(r"M (\S+) (\S+) \nL (\S+) \2 \n", r"M\1 \2H\3", path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8")


class Canvas:
    """A figure that is measured in points from its upper left corner."""

    def __init__(self, theme: Theme, width: float, height: float):
        self.theme = theme
        self.figure = plt.figure(figsize=(width / 72, height / 72))
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        self.axes.set_axis_off()

    def text(self, x: float, y: float, text: str, *, color: str = "", **options: Any) -> None:
        options = {"ha": "center", "va": "center", "color": color or self.theme.ink} | options
        self.axes.text(x, y, text, **options)

    def soft_text(self, x: float, y: float, text: str, **options: Any) -> None:
        self.text(x, y, text, color=self.theme.soft, **options)

    def line(self, x: Any, y: Any, color: str, **options: Any) -> None:
        self.axes.plot(x, y, color=color, clip_on=False, **options)

    def box(self, x: float, y: float, width: float, height: float, **options: Any) -> None:
        options = {"linewidth": 1, "edgecolor": self.theme.soft, "facecolor": "none", "clip_on": False} | options
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=2.5", **options))

    def arrow(self, start: tuple[float, float], end: tuple[float, float], color: str = "") -> None:
        options = {"arrowstyle": "->", "mutation_scale": 8, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
        self.axes.add_patch(FancyArrowPatch(start, end, color=color or self.theme.soft, **options))

    def cells(self, x: float, y: float, values: Any, pitch: float, *, limit: float = LIMIT, color: str = "") -> None:
        """Draw a matrix as squares, blue for positive and orange for negative values, or all in one color.

        Zeros, which are dropped, are small dots; NaN and what is masked is empty. Booleans are drawn in one color.
        """
        values = np.ma.asarray(values)
        color = color or (self.theme.soft if values.dtype == bool else "")
        values = values.astype(float).filled(np.nan)
        present = ~np.isnan(values)
        levels = np.ceil(np.abs(np.where(present, values, 0)) / limit * LEVELS - 1e-3).clip(0, LEVELS)
        levels = np.maximum(levels, values != 0) * np.where(values < 0, -1, 1)
        for level in np.unique(levels[present & (values != 0)]):
            scale = LinearSegmentedColormap.from_list("", self.theme.positive if level > 0 else self.theme.negative)
            shade = color or scale((abs(level) - 1) / (LEVELS - 1))
            self._squares(x, y, (levels == level) & present, pitch, pitch - 1, shade)
        self._squares(x, y, values == 0, pitch, 2, self.theme.faint)

    def _squares(self, x: float, y: float, where: np.ndarray, pitch: float, size: float, color: Any) -> None:
        """Draw squares as one path of short, thick strokes, which takes few bytes."""
        rows, columns = np.nonzero(where)
        centers = np.stack([x + (columns + 0.5) * pitch, y + (rows + 0.5) * pitch], axis=1)
        half = np.array([size / 2, 0])
        ends = np.stack([centers - half, centers + half], axis=1).reshape(-1, 2)
        if len(ends):
            codes = [Curve.MOVETO, Curve.LINETO] * len(centers)
            options = {"linewidth": size, "fill": False, "capstyle": "butt", "clip_on": False}
            self.axes.add_patch(PathPatch(Curve(ends, codes), edgecolor=color, **options))

    def panel(
        self, x: float, y: float, values: Any, pitch: float, *, title: str = "", columns: str = "", **options: Any
    ) -> None:
        """Draw a matrix with a title above, and the name of its columns below."""
        self.cells(x, y, values, pitch, **options)
        height, width = (size * pitch for size in np.shape(values))
        self.text(x + width / 2, y - 9, title)
        self.soft_text(x + width / 2, y + height + 9, columns)

    def outline(self, x: float, y: float, rows: int, columns: int, pitch: float) -> None:
        """Outline a part of a matrix."""
        color = self.theme.lines[1]
        self.box(x - 1.5, y - 1.5, columns * pitch + 2, rows * pitch + 2, edgecolor=color, linewidth=1.6)

    def legend(self, x: float, y: float, text: str) -> None:
        """Explain an outline."""
        self.outline(x, y - 4, 1, 1, 9)
        self.soft_text(x + 14, y, text, ha="left")
