"""Pictures of what each function of jdrop does to small arrays. Every value in them comes from a call of jdrop."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _canvas import LIMIT, MINUS, TIMES, Canvas, Theme
from jax import Array

import jdrop
from jdrop.keys import derive, per_example
from jdrop.schedules import depth_rates

RATE = 0.3
WIDTH, SMALL = 525, 450  # of a picture in points: 700 and 600 pixels

Maps = Sequence[Any]  # one matrix of 12 x 12, or four of 6 x 6


def key_of(name: str, number: int = 0) -> Array:
    """Return the key of a picture. The numbers were chosen so that few decisions show what is typical."""
    return derive(jax.random.key(0), "pictures", name, number)


def pattern(height: int, width: int) -> Array:
    """Return two smooth hills, from 0.2 to 1."""
    row, column = np.mgrid[0.5:height, 0.5:width] / np.array([height, width]).reshape(2, 1, 1)

    def hill(r: float, c: float, size: float) -> np.ndarray:
        return np.exp(-((row - r) ** 2 + (column - c) ** 2) / size)

    y = hill(0.3, 0.32, 0.06) + 0.8 * hill(0.72, 0.7, 0.05)
    return jnp.asarray(0.2 + 0.8 * y / y.max(), jnp.float32)


def attention(key: Array | None, size: int = 12) -> np.ndarray:
    """Return causal attention probabilities [size, size], after dropout if there is a key; hidden ones are NaN."""
    q, k = 0.3 * jax.random.normal(key_of("attention data"), [2, 1, size, 1, size])
    v = jnp.eye(size)[None, :, None]  # so that the output is the probabilities
    near = -0.25 * jnp.abs(jnp.arange(size)[:, None] - jnp.arange(size))[None, None]
    options = {"is_causal": True, "bias": near.astype(jnp.float32), "train": key is not None}
    y = jdrop.dot_product_attention(key, q, k, v, RATE, **options)
    return np.where(np.tri(size, dtype=bool), np.asarray(y[0, :, 0]), np.nan)


def as_image(tokens: Array, kept: Array, number: int) -> np.ndarray:
    """Lay tokens [kept, size**2] out as patches of an image with number**2 of them; those that are gone stay empty."""
    size = round(tokens.shape[1] ** 0.5)
    image = np.full([number * number, size, size], np.nan)
    image[np.asarray(kept)] = np.asarray(tokens).reshape(-1, size, size)
    return image.reshape(number, number, size, size).swapaxes(1, 2).reshape(number * size, number * size)


def as_tokens(image: Array, number: int) -> Array:
    """Cut an image into number**2 patches, and return them as tokens."""
    size = len(image) // number
    return image.reshape(number, size, number, size).swapaxes(1, 2).reshape(number * number, size * size)


# ---------------------------------------------------------------------------------- every function on one map


@functools.cache
def family_maps() -> dict[str, tuple[str, Maps]]:
    """Return what each function makes of one map, and in a few words what it drops."""
    x, small, train = pattern(12, 12), pattern(6, 6), {"train": True}
    old, four = -jnp.rot90(x, 2), jnp.stack([small] * 4)
    words = jnp.array([0, 1, 2, 3, 0, 4, 1, 5, 3, 0, 2, 4])
    ids = jnp.round(9 * x).astype(int)

    def one(function: Callable[..., Any], *arguments: Any, number: int = 0, **options: Any) -> Maps:
        return [function(key_of(function.__name__, number), x, *arguments, **options, **train)]

    def replaced() -> np.ndarray:
        y = np.asarray(jdrop.token_dropout(key_of("token_dropout"), ids, RATE, 0, **train))
        return np.where(y == 0, -1, y / 9)

    def channels() -> np.ndarray:
        return jdrop.channel_dropout(key_of("channels", 1), jnp.moveaxis(four, 0, -1)[None], RATE, **train)[0]

    def blocks() -> Array:
        options = {"block_size": 3, "spatial_axes": (1, 2), **train}
        return jdrop.drop_block(key_of("drop_block", 1), x[None, :, :, None], RATE, **options)[0, ..., 0]

    def layer(i: int) -> Array:
        return jdrop.stochastic_depth(key_of("layer", i + 1), small, RATE, lambda h: h, **train) - small

    noisy = {"gaussian_dropout": one(jdrop.gaussian_dropout, RATE), "gaussian_noise": one(jdrop.gaussian_noise, RATE)}
    embedded = jdrop.embedding_dropout(key_of("words", 1), x[::2][words], RATE, ids=words, **train)
    patches, kept = jdrop.patch_dropout(key_of("patches", 2), as_tokens(x, 4), RATE, **train)
    bias, residual = jnp.full(12, 0.2), 0.5 * old
    return {
        "x": ("the input", [x]),
        "dropout": ("single elements", one(jdrop.dropout, RATE)),
        "dropout, shared_axes=1": ("rows, or any axes", one(jdrop.dropout, RATE, shared_axes=1, number=1)),
        "channel_dropout": ("whole channels", np.moveaxis(channels(), -1, 0)),
        "drop_block": ("blocks of a map", [blocks()]),
        "drop_path": ("whole examples", jdrop.drop_path(key_of("drop_path"), four, RATE, **train)),
        "stochastic_depth": ("branches of layers", [layer(i) for i in range(4)]),
        "locked_dropout": ("units, at all steps", one(jdrop.locked_dropout, RATE, time_axis=0)),
        "zoneout": ("keeps an old state", one(jdrop.zoneout, RATE, old)),
        "embedding_dropout": ("all uses of a word", [embedded]),
        "token_dropout": ("replaces ids", [replaced()]),
        "patch_dropout": ("removes patches", [as_image(patches, kept, 4)]),
        "drop_connect": ("single weights", one(jdrop.drop_connect, RATE)),
        "alpha_dropout": ("to the limit of SELU", one(jdrop.alpha_dropout, RATE)),
        "gaussian_dropout": ("multiplies by noise", noisy["gaussian_dropout"]),
        "gaussian_noise": ("adds noise", noisy["gaussian_noise"]),
        "multi_sample_dropout": ("mean over 4 masks", one(jdrop.multi_sample_dropout, RATE, lambda h: h, 4)),
        "bias_dropout_add": ("keeps the residual", one(jdrop.bias_dropout_add, RATE, bias, residual)),
        "dot_product_attention": ("drops probabilities", [2 * attention(key_of("attention"))]),
    }


def family(theme: Theme) -> Canvas:
    """Draw one feature map under every function of the family."""
    c = Canvas(theme, WIDTH, 460)
    for i, (name, (note, maps)) in enumerate(family_maps().items()):
        x, y = 105 * (i % 5) + 16.5, 115 * (i // 5) + 34
        c.text(x + 36, y - 23, name)
        c.soft_text(x + 36, y - 10.5, note)
        for k, values in enumerate(maps):
            pitch = 6 if len(maps) == 1 else 5.5
            c.cells(x + 39 * (k % 2), y + 39 * (k // 2), values, pitch)
    x, y = 105 * 4 + 16.5, 115 * 3 + 34
    c.soft_text(x + 36, y - 23, "rate 0.3")
    c.cells(x, y, np.zeros([1, 12]), 6)
    c.soft_text(x + 36, y + 15, "dropped")
    scale = np.concatenate([np.linspace(-LIMIT, -0.2, 6), np.linspace(0.2, LIMIT, 6)])
    c.cells(x, y + 32, scale[None], 6)
    for at, text in zip((0, 36, 72), (f"{MINUS}1.4", "0", "1.4"), strict=True):
        c.soft_text(x + at, y + 47, text)
    return c


# ---------------------------------------------------------------------------------- one picture a function


class Panel(NamedTuple):
    """A matrix with its title and the name of its columns."""

    title: str
    values: Any
    columns: str = ""


class Group(NamedTuple):
    """A part of a panel that is outlined: what shares one decision."""

    panel: int
    row: int
    column: int
    rows: int
    columns: int


def strip(
    theme: Theme,
    panels: Sequence[Panel],
    *groups: Group,
    pitch: float = 9,
    rows: str | Sequence[str] = "",
    signs: Sequence[str] = (),
    legend: str = "one decision",
    **options: Any,
) -> Canvas:
    """Draw matrices from left to right, with signs between them, and explain the outlines below."""
    sizes = [np.shape(panel.values) for panel in panels]
    width = pitch * sum(size[1] for size in sizes)
    gap = min(40, (SMALL - 30 - width) / max(len(panels) - 1, 1))
    left = (SMALL - width - gap * (len(panels) - 1)) / 2 + 9 * bool(rows)
    height = pitch * max(size[0] for size in sizes)
    top, bottom = 24, 10 + 12 * any(panel.columns for panel in panels) + 8 * bool(groups)
    c, x, starts = Canvas(theme, SMALL, top + height + bottom), float(left), []
    for panel, (_, columns) in zip(panels, sizes, strict=True):
        c.panel(x, top, panel.values, pitch, title=panel.title, columns=panel.columns, **options)
        starts.append(x)
        x += columns * pitch + gap
    for sign, start in zip(signs, starts[1:], strict=False):
        c.text(start - gap / 2, top + height / 2, sign, fontsize=12)
    names = [rows] if isinstance(rows, str) else rows
    for i, name in enumerate(names):
        c.soft_text(left - 12, top + height * (i + 0.5) / len(names), name, rotation=90)
    for at, row, column, r, k in groups:
        c.outline(starts[at] + column * pitch, top + row * pitch, r, k, pitch)
    if groups:
        c.legend(left, top + height + bottom - 9, legend)
    return c


def stacked(maps: Sequence[Any]) -> np.ndarray:
    """Stack maps of one width, with an empty row between them."""
    empty = np.full([1, np.shape(maps[0])[1]], np.nan)
    return np.concatenate([part for y in maps for part in (empty, np.asarray(y))][1:])


def dropout(theme: Theme) -> Canvas:
    x, key = pattern(8, 12), key_of("dropout")
    mask, y = jdrop.dropout_mask(key, x.shape, RATE), jdrop.dropout(key, x, RATE, train=True)
    panels = [Panel("x", x), Panel("mask", mask), Panel(f"y = x {TIMES} mask / 0.7", y)]
    panels = [panel._replace(columns="feature") for panel in panels]
    return strip(theme, panels, Group(1, 0, 0, 1, 1), rows="batch", signs=(TIMES, "="))


def dropout_mask(theme: Theme) -> Canvas:
    key, shape, window = key_of("mask"), (12, 32), ((4, 5), (18, 11))
    whole = jdrop.dropout_mask(key, shape, RATE)
    part = jdrop.dropout_mask(key, shape, RATE, window=window)
    assert (part == whole[4:9, 18:29]).all()
    around = np.ma.masked_all([12, 11], bool)
    around[4:9] = part
    panels = [Panel("dropout_mask(key, (12, 32), 0.3)", whole), Panel(f"window={window}", around)]
    return strip(theme, panels, Group(0, 4, 18, 5, 11), Group(1, 4, 0, 5, 11), legend="the same bits", signs="→")


def channel_dropout(theme: Theme) -> Canvas:
    x = jnp.broadcast_to(pattern(6, 6)[None, :, :, None], (2, 6, 6, 6))
    y = jdrop.channel_dropout(key_of("channel_dropout"), x, RATE, train=True)
    panels = [Panel(f"channel {i}", stacked(y[..., i])) for i in range(6)]
    return strip(theme, panels, Group(0, 0, 0, 6, 6), rows=("example 0", "example 1"))


def drop_block(theme: Theme) -> Canvas:
    x = jnp.broadcast_to(pattern(12, 12)[None, :, :, None], (1, 12, 12, 4))
    y = jdrop.drop_block(key_of("drop_block", 3), x, 0.2, 3, train=True, spatial_axes=(1, 2))[0]
    row, column = np.argwhere(jax.lax.reduce_window(y[..., 0], 0.0, jax.lax.add, (3, 3), (1, 1), "VALID") == 0)[0]
    panels = [Panel(f"channel {i}", y[..., i], "width") for i in range(4)]
    group = Group(0, int(row), int(column), 3, 3)
    return strip(theme, panels, group, pitch=8, rows="height", legend="a block, dropped as a whole")


def drop_path(theme: Theme) -> Canvas:
    y = jdrop.drop_path(key_of("drop_path", 1), jnp.stack([pattern(6, 6)] * 6), RATE, train=True)
    panels = [Panel(f"example {i}", y[i]) for i in range(6)]
    return strip(theme, panels, Group(0, 0, 0, 6, 6))


def stochastic_depth(theme: Theme) -> Canvas:
    steps, layers = 8, 30
    rates = jnp.asarray(depth_rates(0.5, layers, "(i+1)/n"), jnp.float32)
    keys = per_example(key_of("stochastic_depth"), jnp.arange(steps * layers).reshape(steps, layers))
    drop = functools.partial(jdrop.stochastic_depth, train=True)
    row = jax.vmap(lambda key, rate: drop(key, jnp.ones([]), rate, lambda x: x) != 1)
    ran = jax.vmap(row, in_axes=(0, None))(keys, rates)
    panels = [Panel("layer 0 to 29, with rates from 0.02 to 0.5: the branches that are computed", ran, "layer")]
    return strip(theme, panels, Group(0, 0, 0, 1, 1), pitch=14, rows="step", legend="one decision for the whole batch")


def skip_path(theme: Theme) -> Canvas:
    steps, batch = 8, 30
    keys = per_example(key_of("skip_path"), jnp.arange(steps))
    drop = functools.partial(jdrop.skip_path, train=True, num_shards=3)
    ran = jax.vmap(lambda key: drop(key, jnp.ones([batch]), 0.4, lambda x: x) != 1)(keys)
    assert (ran.reshape(steps, 3, 10).sum(-1) == 6).all()
    panels = [Panel("examples 0 to 29, on three devices: those for which the branch is computed", ran, "example")]
    return strip(theme, panels, Group(0, 0, 0, 1, 10), pitch=14, rows="step", legend="six of ten on each device")


def thin(theme: Theme) -> Canvas:
    steps, units = 8, 24
    keys = per_example(key_of("thin"), jnp.arange(steps))

    def kept(block_size: int) -> jax.Array:
        draw = functools.partial(jdrop.thin.kept_units, num_units=units, rate=0.5, block_size=block_size)
        return jax.vmap(lambda key: jnp.zeros(units, bool).at[draw(key)].set(True))(keys)

    panels = [Panel("units, block_size=1", kept(1), "unit"), Panel("units, block_size=4", kept(4), "unit")]
    return strip(theme, panels, Group(1, 0, 0, 1, 4), pitch=10, rows="step", legend="a block, for the whole minibatch")


def locked_dropout(theme: Theme) -> Canvas:
    x = jnp.stack([pattern(8, 12)] * 3)
    y = jdrop.locked_dropout(key_of("locked_dropout", 0), x, RATE, train=True, time_axis=1)
    panels = [Panel(f"example {i}", y[i], "feature") for i in range(3)]
    return strip(theme, panels, Group(0, 0, 0, 8, 1), rows="time")


def zoneout(theme: Theme) -> Canvas:
    new = pattern(8, 12)
    old = -jnp.rot90(new, 2)
    y = jdrop.zoneout(key_of("zoneout"), new, RATE, old, train=True)
    panels = [Panel("old state", old, "unit"), Panel("new state", new, "unit"), Panel("zoneout", y, "unit")]
    return strip(theme, panels, Group(2, 0, 0, 1, 1), rows="batch", signs=("", "→"))


def alpha_dropout(theme: Theme) -> Canvas:
    key, x = key_of("alpha_dropout"), jax.nn.selu(jax.random.normal(key_of("activations"), [8, 12]))
    mask, y = jdrop.dropout_mask(key, x.shape, RATE), jdrop.alpha_dropout(key, x, RATE, train=True)
    panels = [Panel("activations of SELU", x), Panel("mask", mask), Panel("alpha_dropout", y)]
    panels = [panel._replace(columns="feature") for panel in panels]
    return strip(theme, panels, Group(1, 0, 0, 1, 1), rows="batch", limit=2)


def gaussian_dropout(theme: Theme) -> Canvas:
    key, x = key_of("gaussian_dropout"), pattern(8, 12)
    noise, y = (jdrop.gaussian_dropout(key, data, RATE, train=True) for data in (jnp.ones([8, 12]), x))
    assert np.allclose(y, x * noise)
    panels = [Panel("x", x), Panel("1 + 0.65 z", noise), Panel("y", y)]
    panels = [panel._replace(columns="feature") for panel in panels]
    return strip(
        theme, panels, Group(1, 0, 0, 1, 1), rows="batch", signs=(TIMES, "="), limit=2, legend="one noise value"
    )


def gaussian_noise(theme: Theme) -> Canvas:
    key, x = key_of("gaussian_noise"), pattern(8, 12)
    noise, y = (jdrop.gaussian_noise(key, data, 0.3, train=True) for data in (jnp.zeros([8, 12]), x))
    assert np.allclose(y, x + noise)
    panels = [Panel("x", x), Panel("0.3 z", noise), Panel("y", y)]
    panels = [panel._replace(columns="feature") for panel in panels]
    return strip(theme, panels, Group(1, 0, 0, 1, 1), rows="batch", signs="+=", limit=1.2, legend="one noise value")


def multi_sample_dropout(theme: Theme) -> Canvas:
    key, x = key_of("multi_sample_dropout"), pattern(8, 8)
    samples: list[Any] = []
    y = jdrop.multi_sample_dropout(key, x, RATE, lambda h: h, 4, train=True)
    for i in range(4):
        samples.append(jdrop.dropout(derive(key, "multi_sample_dropout", i), x, RATE, train=True))
    assert np.allclose(y, sum(samples) / 4)
    panels = [*(Panel(f"sample {i}", sample) for i, sample in enumerate(samples)), Panel("mean", y)]
    return strip(theme, panels, Group(0, 0, 0, 1, 1), signs="+++→")


def bias_dropout_add(theme: Theme) -> Canvas:
    key, x = key_of("bias_dropout_add"), pattern(8, 8)
    bias, residual = jnp.linspace(0.1, 0.5, 8), -0.6 * jnp.rot90(x, 2)
    mask = jdrop.dropout_mask(key, x.shape, RATE)
    y = jdrop.bias_dropout_add(key, x, RATE, bias, residual, train=True)
    assert np.allclose(y, residual + jnp.where(mask, (x + bias) / 0.7, 0))
    row = np.full([8, 8], np.nan)
    row[3] = bias
    panels = [Panel("residual", residual), Panel("x", x), Panel("bias", row), Panel("mask / 0.7", mask), Panel("y", y)]
    return strip(theme, panels, Group(3, 0, 0, 1, 1), pitch=8, signs=("+ (", "+", f") {TIMES}", "="))


def dot_product_attention(theme: Theme) -> Canvas:
    key, before = key_of("attention"), attention(None)
    after, mask = attention(key), jdrop.dropout_mask(key, (1, 1, 12, 12), RATE)[0, 0]
    shown = np.isfinite(before)
    assert np.allclose(after[shown], np.where(mask, before / 0.7, 0)[shown])
    panels = [
        Panel("softmax", before),
        Panel("mask", np.ma.array(mask, mask=~shown)),
        Panel(f"softmax {TIMES} mask / 0.7", after),
    ]
    panels = [panel._replace(columns="key") for panel in panels]
    return strip(theme, panels, Group(1, 0, 0, 1, 1), rows="query", signs=(TIMES, "="), limit=0.8)


def drop_block_mask(theme: Theme) -> Canvas:
    seeds = ~jdrop.dropout_mask(key_of("seeds", 7), (8, 14), 0.06)
    mask = jdrop.drop_block_mask(seeds, 3)
    row, column = map(int, np.argwhere(seeds)[0])
    groups = Group(0, row, column, 1, 1), Group(1, row, column, 3, 3)
    panels = [Panel("seeds", seeds), Panel("drop_block_mask(seeds, 3)", mask)]
    return strip(theme, panels, *groups, signs="→", legend="a seed and its block")


# ---------------------------------------------------------------------------------- words, patches, weights

SENTENCE = "the cat sat on the mat and the dog lay on it".split()


def embedding_dropout(theme: Theme) -> Canvas:
    vocabulary = list(dict.fromkeys(SENTENCE))
    ids = jnp.array([vocabulary.index(word) for word in SENTENCE])
    table = jnp.tile(pattern(6, len(vocabulary)).T, 2)
    y = jdrop.embedding_dropout(key_of("embedding_dropout", 3), table[ids], RATE, train=True, ids=ids)
    c, step = Canvas(theme, SMALL, 116), 35
    c.soft_text(13, 62, "features", rotation=90)
    for i, (word, row) in enumerate(zip(SENTENCE, y, strict=True)):
        x = 28 + step * i
        c.text(x + 11, 14, word, color=theme.ink if row.any() else theme.lines[5])
        c.cells(x, 28, row.reshape(2, 6).T, 11)
        if word == "the":
            c.box(x - 3, 5, 28, 92, edgecolor=theme.lines[1], linewidth=1.6)
    c.legend(28, 106, "one decision per word of the vocabulary")
    return c


def token_dropout(theme: Theme) -> Canvas:
    words = ["[MASK]", "[CLS]", *dict.fromkeys(SENTENCE)]
    ids = jnp.array([words.index(word) for word in ["[CLS]", *SENTENCE[:9]]])
    options = {"replacement": 0, "protect": ids == 1, "train": True}
    y = jdrop.token_dropout(key_of("token_dropout", 7), ids, RATE, **options)
    c = Canvas(theme, SMALL, 106)
    for i, (before, after) in enumerate(zip(ids.tolist(), y.tolist(), strict=True)):
        x = 4 + 44.5 * i
        color = theme.lines[1] if after != before else theme.soft
        for top, word in ((6, words[before]), (64, words[after])):
            c.box(x, top, 42, 20, edgecolor=color if top > 6 else theme.soft)
            c.text(x + 21, top + 10, word, color=theme.lines[1] if word == "[MASK]" else theme.ink)
        c.arrow((x + 21, 29), (x + 21, 61), color)
    c.soft_text(4, 96, "[CLS] is protected", ha="left")
    return c


def patch_dropout(theme: Theme) -> Canvas:
    x = pattern(12, 12)
    y, kept = jdrop.patch_dropout(key_of("patch_dropout"), as_tokens(x, 4), 0.5, train=True)
    c = Canvas(theme, SMALL, 146)
    c.panel(6, 24, x, 9, title="16 patches")
    c.panel(148, 24, as_image(y, kept, 4), 9, title="rate 0.5: 8 are kept")
    c.text(368, 15, "8 tokens and their indices")
    for i, (token, index) in enumerate(zip(y, kept.tolist(), strict=True)):
        left, top = 296 + 39 * (i % 4), 30 + 58 * (i // 4)
        c.cells(left, top, token.reshape(3, 3), 9)
        c.soft_text(left + 13.5, top + 36, str(index))
    for x in (131, 275):
        c.text(x, 78, "→", fontsize=12)
    return c


def drop_connect(theme: Theme) -> Canvas:
    w = pattern(6, 8)
    y = jdrop.drop_connect(key_of("drop_connect", 1), w, RATE, train=True)
    c = Canvas(theme, SMALL, 124)
    c.panel(24, 24, w, 13, title="w", columns="output")
    c.panel(160, 24, y, 13, title="drop_connect", columns="output")
    c.soft_text(13, 63, "input", rotation=90)
    c.text(144, 63, "→", fontsize=12)
    at = lambda i, number: 300 + (i + 0.5) * 144 / number
    for i, row in enumerate(np.asarray(y)):
        for j, weight in enumerate(row):
            if weight:
                c.line([at(i, 6), at(j, 8)], [32, 96], theme.positive[1], linewidth=1.2 * weight)
    for number, y in ((6, 32), (8, 96)):
        c.line([at(i, number) for i in range(number)], [y] * number, theme.ink, marker="o", linestyle="", markersize=5)
    c.soft_text(372, 17, "inputs")
    c.soft_text(372, 110, "outputs")
    return c
