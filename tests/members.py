"""One row for every member of the family: how to call it, what it is exempt from, its benchmark, its row in the docs.

All tests that walk the API read this table, and so does ``scripts/bench_dropout.py --family``. A new member needs one
row here, and a line in the table of ``docs/functions/index.md``, which a test derives from the row.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

import jdrop

SHAPE = (8, 6, 10, 40)  # [batch, height, width, channel]
RATE = 0.1  # of the benchmarks
SCALE = 1 / (1 - RATE)
# Names of collectives in compiled text.
COLLECTIVES = r"(all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter)"


@dataclass(frozen=True)
class Exempt:
    """Why a member cannot pass a check, and how the check fails for it."""

    why: str
    fails: str
    """A pattern of the error message. Every assertion of a check has its own message."""
    error: type[Exception] = AssertionError


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The benchmark of a member: its floor, and its equivalents in other libraries."""

    floor_name: str = "x * c"
    floor: Callable[..., Any] = lambda key, x, *operands: x * SCALE
    drop: Callable[..., Any] | None = None
    """``(key, x, *operands) -> y``; by default, the member's call at ``RATE``."""
    operands: Callable[..., tuple[Any, ...]] = lambda shape: ()
    """Further operands of floor and member, from the shape of x."""
    shape: str = "flat"
    """Shape of x: ``flat`` [batch, feature], ``steps`` [batch, time, feature] or ``image`` [batch, height, width, channel]."""
    limit: float = 1.2
    """Largest accepted time, as a multiple of the floor's."""
    directions: tuple[str, ...] = ("forward", "forward+backward")
    torch: Callable[[Any, Any], Any] | None = None  # (torch.nn.functional, x) -> y
    timm: Callable[[Any, Any], Any] | None = None  # (timm.layers.drop, x) -> y
    keras: Callable[[Any], Any] | None = None  # keras.layers -> layer
    linen_broadcast: tuple[int, ...] | None = None  # broadcast_dims of Flax's Dropout


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table of the family in the docs."""

    shares: str
    equation: str
    paper: str
    also_in: str = ""


@dataclass(frozen=True, kw_only=True)
class Member:
    """What tests and benchmarks need to know about a member."""

    call: Callable[..., Any]
    """``(key, x, rate, **options) -> y`` for floating-point x of shape ``SHAPE``."""
    one: Callable[..., Any] | None = None
    """The call for one example [height, width, channel], if it differs."""
    bench: Bench | str
    """The benchmark, or why there is none."""
    row: Row | None
    """None for a second entry of a function that already has a row."""
    exempt: Mapping[str, Exempt] = field(default_factory=dict)
    """Exemptions by name of a check in test_members.py."""
    by_channel: bool = False
    """Whether decisions along channels are independent too."""
    rounds: str = ""
    """Why two programs may round differently; empty if they may not."""
    first: tuple[str, ...] = ("key", "x", "rate")
    """The first parameters of the signature."""
    positional_only: bool = False
    """Whether the parameters before ``train`` are positional-only."""
    generator: bool = True
    """Whether it accepts ``generator=``, as members that draw a mask do."""

    def __call__(self, key, x, rate, **options):
        return self.call(key, x, rate, **options)


def ids_like(x):
    return jnp.arange(x.size, dtype=jnp.int32).reshape(x.shape)


def words(x, count=17):
    """Return ids for embeddings [batch, time, ...], with repeated words."""
    return jnp.arange(x.shape[0] * x.shape[1], dtype=jnp.int32).reshape(x.shape[:2]) % count


def bias_dropout_add(key, x, rate, **options):
    bias = jnp.linspace(0, 1, x.shape[-1]).astype(x.dtype)
    return jdrop.bias_dropout_add(key, x, rate, bias, jnp.full_like(x, 2), **options)


def attention(key, x, rate, **options):
    """Use x as query, key, and value [batch, time, heads, width]."""
    return jdrop.dot_product_attention(key, x, jnp.cos(x), x, rate, **options)


def max_pool(key, x):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 7, 7, 1), (1, 1, 1, 1), "SAME")


def timm_drop_block(layers, x):
    batch, height, width, channels = x.shape
    return layers.drop_block_2d(x.view(batch, channels, height, width), RATE, 7, couple_channels=False).view_as(x)


# Messages of the assertions that an exempt member fails.
X_ITSELF, ZERO_AT_ONE, SAME_TYPE = (
    "evaluation returns x itself",
    "nothing is left at rate 1",
    "dtype and shape are preserved",
)
DROPPED_IS_ZERO, NOTHING_LEAKS = "about half of the results are 0", "no NaN or Inf leaks from dropped elements"
SEED_AND_RATE, NOT_STACKED = "the residuals are a seed and a rate", "a scan stacks no array of the size of x"
HAS_SLOPE, ON_ONE_DEVICE = "the derivative is not 0", "the result equals that of one device"
NO_COLLECTIVE = "devices do not communicate"

NO_COMPLEX = Exempt("integers stay integers", SAME_TYPE)
FEWER_TOKENS = Exempt("the number of tokens changes", SAME_TYPE)
STATIC = Exempt("the rate sets a shape", "patch_dropout: rate must be", TypeError)
SKIP_STATIC = Exempt("the rate sets a shape", "skip_path: rate must be", TypeError)
NOTHING_DROPPED = Exempt("noise drops nothing", DROPPED_IS_ZERO)

MEMBERS = {
    "dropout": Member(
        call=jdrop.dropout,
        by_channel=True,
        bench=Bench(torch=lambda f, x: f.dropout(x, RATE), keras=lambda k: k.Dropout(RATE)),
        row=Row(
            shares="nothing, or `shared_axes`",
            equation="`x m / q`",
            paper="Srivastava et al. 2014",
            also_in="PyTorch, Keras, Flax, Equinox, Haiku",
        ),
    ),
    "channel_dropout": Member(
        call=jdrop.channel_dropout,
        one=lambda key, x, rate, **o: jdrop.channel_dropout(key, x, rate, batch_axes=(), **o),
        by_channel=True,
        bench=Bench(shape="image", keras=lambda k: k.SpatialDropout2D(RATE), linen_broadcast=(1, 2)),
        row=Row(
            shares="a feature map",
            equation="`x m / q`",
            paper="Tompson et al. 2015",
            also_in="PyTorch, Keras; Flax and Haiku by `broadcast_dims`",
        ),
    ),
    "drop_block": Member(
        call=lambda key, x, rate, **o: jdrop.drop_block(key, x, rate, (3, 2), spatial_axes=(1, 2), **o),
        one=lambda key, x, rate, **o: jdrop.drop_block(key, x, rate, (3, 2), spatial_axes=(0, 1), batch_axes=(), **o),
        bench=Bench(
            floor_name="7 x 7 max-pool",
            floor=max_pool,
            drop=lambda key, x: jdrop.drop_block(key, x, RATE, 7, spatial_axes=(1, 2), train=True),
            shape="image",
            limit=1.5,
            timm=timm_drop_block,
        ),
        row=Row(
            shares="blocks of a feature map",
            equation="`x m size(m) / sum(m)`",
            paper="Ghiasi et al. 2018",
            also_in="timm",
        ),
    ),
    "drop_path": Member(
        call=jdrop.drop_path,
        one=lambda key, x, rate, **o: jdrop.drop_path(key, x, rate, batch_axes=(), **o),
        bench=Bench(linen_broadcast=(1,), timm=lambda layers, x: layers.drop_path(x, RATE, training=True)),
        row=Row(
            shares="an example",
            equation="`x m / q`",
            paper="Huang et al. 2016",
            also_in="timm; Keras by `noise_shape`, Flax and Haiku by `broadcast_dims`",
        ),
    ),
    "stochastic_depth": Member(
        call=lambda key, x, rate, **o: jdrop.stochastic_depth(key, x, rate, lambda v: v * v, **o),
        exempt={
            "identity": Exempt("evaluation adds the branch", X_ITSELF),
            "traced at one": Exempt("a dropped branch leaves x", ZERO_AT_ONE),
            "contained": Exempt("a dropped branch leaves x", DROPPED_IS_ZERO),
            "residuals": Exempt("the branch keeps what its derivative needs", NOT_STACKED),
            "taylor": Exempt(
                "jet has no rule for its condition", "traced by jax.experimental.jet", NotImplementedError
            ),
        },
        bench="its cost depends on the branch: see depth() in scripts/_family.py",
        row=Row(
            shares="everything; a dropped branch is not computed",
            equation="`x + fn(x) m / q`",
            paper="Huang et al. 2016, Fan et al. 2020",
        ),
    ),
    "skip_path": Member(
        call=lambda key, x, rate, **o: jdrop.skip_path(key, x, rate, lambda v: v * v, **o),
        generator=False,
        exempt={
            "identity": Exempt("evaluation adds the branch", X_ITSELF),
            "traced": SKIP_STATIC,
            "traced at one": SKIP_STATIC,
            "contained": Exempt("a dropped branch leaves x", DROPPED_IS_ZERO),
            "residuals": Exempt("the branch keeps what its derivative needs", SEED_AND_RATE),
            "tiles": Exempt("a device needs two examples", "rate must drop at least one of 1 examples", ValueError),
            "meshes": Exempt("num_shards is 1 here; test_skip.py has the other cases", NO_COLLECTIVE),
        },
        bench="its cost depends on the branch: see scripts/bench_thin.py",
        row=Row(
            shares="an example; dropped branches are not computed",
            equation="`x + fn(x) m / q`",
            paper="Oquab et al. 2024",
            also_in="DINOv2",
        ),
    ),
    "locked_dropout": Member(
        call=lambda key, x, rate, **o: jdrop.locked_dropout(key, x, rate, time_axis=1, **o),
        one=lambda key, x, rate, **o: jdrop.locked_dropout(key, x, rate, time_axis=0, **o),
        by_channel=True,
        bench=Bench(shape="steps", linen_broadcast=(1,)),
        row=Row(
            shares="time steps",
            equation="`x m / q`",
            paper="Gal and Ghahramani 2016",
            also_in="Keras in its RNN layers and by `noise_shape`, Flax and Haiku by `broadcast_dims`",
        ),
    ),
    "zoneout": Member(
        call=lambda key, x, rate, **o: jdrop.zoneout(key, x, rate, jnp.full_like(x, 3), **o),
        by_channel=True,
        first=("key", "new", "rate"),
        exempt={
            "identity": Exempt("evaluation returns the expectation", X_ITSELF),
            "traced at one": Exempt("the old state remains", ZERO_AT_ONE),
            "contained": Exempt("the old state remains; its gradient is tested in test_recurrent", DROPPED_IS_ZERO),
        },
        bench=Bench(
            floor_name="c x + d old",
            floor=lambda key, x, old: (1 - RATE) * x + RATE * old,
            drop=lambda key, x, old: jdrop.zoneout(key, x, RATE, old, train=True),
            operands=lambda shape: (jnp.ones(shape),),
        ),
        row=Row(shares="nothing", equation="`new m + old (1 - m)`", paper="Krueger et al. 2017"),
    ),
    "embedding_dropout": Member(
        call=jdrop.embedding_dropout,
        bench=Bench(linen_broadcast=(1,)),
        row=Row(
            shares="a word",
            equation="`x m[id] / q`",
            paper="Gal and Ghahramani 2016",
            also_in="of a table: Keras by `noise_shape`, Flax and Haiku by `broadcast_dims`",
        ),
    ),
    "embedding_dropout of ids": Member(
        call=lambda key, x, rate, **o: jdrop.embedding_dropout(key, x, rate, ids=words(x), **o),
        exempt={
            "residuals": Exempt("the ids remain, which the gradient of the embedding needs too", SEED_AND_RATE),
            "tiles": Exempt("the check derives ids from a tile; tested in test_weights", ON_ONE_DEVICE),
        },
        bench=Bench(
            drop=lambda key, x, ids: jdrop.embedding_dropout(key, x, RATE, ids=ids, train=True),
            floor=lambda key, x, ids: x * SCALE,
            operands=lambda shape: (jnp.arange(shape[0] * shape[1]).reshape(shape[:2]) % 1000,),
            shape="steps",
        ),
        row=None,
    ),
    "token_dropout": Member(
        call=lambda key, x, rate, **o: jdrop.token_dropout(key, ids_like(x), rate, -1, **o),
        first=("key", "ids", "rate"),
        exempt={
            "identity": Exempt("the check derives new ids from x", X_ITSELF),
            "dtypes": NO_COMPLEX,
            "complex": NO_COMPLEX,
            "traced at one": Exempt("tokens are replaced by an id", ZERO_AT_ONE),
            "taylor": Exempt("integers have no derivative", HAS_SLOPE),
            "contained": Exempt("integers cannot be NaN", DROPPED_IS_ZERO),
            "derivatives": Exempt("integers have no derivative", HAS_SLOPE),
            "tiles": Exempt("the check derives ids from a tile; tested in test_tokens", ON_ONE_DEVICE),
            "meshes": Exempt("integers have no derivative; tested in test_tokens", "index out of range", IndexError),
        },
        bench=Bench(
            floor_name="x + 1",
            floor=lambda key, x: x + 1,
            drop=lambda key, x: jdrop.token_dropout(
                key, jax.lax.bitcast_convert_type(x, f"int{8 * x.dtype.itemsize}"), RATE, 3, train=True
            ),
            directions=("forward",),  # integers have no gradient
        ),
        row=Row(shares="nothing", equation="`ids` or `replacement`", paper="Bowman et al. 2016"),
    ),
    "patch_dropout": Member(
        call=lambda key, x, rate, **o: jdrop.patch_dropout(key, x, rate, token_axis=1, num_prefix=1, **o)[0],
        one=lambda key, x, rate, **o: jdrop.patch_dropout(key, x, rate, token_axis=0, num_prefix=1, **o)[0],
        generator=False,
        exempt={
            "dtypes": FEWER_TOKENS,
            "complex": FEWER_TOKENS,
            "traced": STATIC,
            "traced at one": STATIC,
            "contained": Exempt("dropped tokens are not in the result", DROPPED_IS_ZERO),
            "residuals": Exempt("the indices of the kept tokens remain", SEED_AND_RATE),
        },
        bench="it writes fewer elements than x has: no floor is comparable",
        row=Row(
            shares="the features of a token",
            equation="a random subset of tokens",
            paper="Liu et al. 2023",
            also_in="timm",
        ),
    ),
    "drop_connect": Member(
        call=lambda key, x, rate, **o: jdrop.drop_connect(key, {"w": x}, rate, **o)["w"],
        by_channel=True,
        first=("key", "params", "rate"),
        bench=Bench(drop=lambda key, x: jdrop.drop_connect(key, x, RATE, train=True)),
        row=Row(shares="nothing: single weights", equation="`w m / q`", paper="Wan et al. 2013"),
    ),
    "alpha_dropout": Member(
        call=jdrop.alpha_dropout,
        by_channel=True,
        exempt={
            "complex": Exempt("SELU is real", "alpha_dropout: x must be", TypeError),
            "contained": Exempt(
                "dropped elements get the limit of SELU; their gradient is tested in test_elementwise",
                DROPPED_IS_ZERO,
            ),
        },
        bench=Bench(torch=lambda f, x: f.alpha_dropout(x, RATE, training=True), keras=lambda k: k.AlphaDropout(RATE)),
        row=Row(
            shares="nothing, or `shared_axes`",
            equation="`a (x m + s (1 - m)) + b`",
            paper="Klambauer et al. 2017",
            also_in="PyTorch, Keras",
        ),
    ),
    "gaussian_dropout": Member(
        call=jdrop.gaussian_dropout,
        by_channel=True,
        generator=False,
        exempt={
            "traced at one": Exempt("the variance is infinite, so the rate is clipped just below", ZERO_AT_ONE),
            "contained": NOTHING_DROPPED,
        },
        bench=Bench(limit=3.0, keras=lambda k: k.GaussianDropout(RATE)),
        row=Row(
            shares="nothing, or `shared_axes`",
            equation="`x (1 + sqrt(rate / q) z)`",
            paper="Srivastava et al. 2014",
            also_in="Keras",
        ),
    ),
    "gaussian_noise": Member(
        call=jdrop.gaussian_noise,
        by_channel=True,
        first=("key", "x", "stddev"),
        generator=False,
        exempt={
            "complex": Exempt("there is no standard noise for complex numbers", "gaussian_noise: x must be", TypeError),
            "traced at one": Exempt("a standard deviation is not a rate", ZERO_AT_ONE),
            "contained": NOTHING_DROPPED,
        },
        bench=Bench(limit=3.0, keras=lambda k: k.GaussianNoise(RATE)),
        row=Row(shares="nothing, or `shared_axes`", equation="`x + stddev z`", paper="Bishop 1995", also_in="Keras"),
    ),
    "multi_sample_dropout": Member(
        call=lambda key, x, rate, **o: jdrop.multi_sample_dropout(key, x, rate, lambda h: h, 3, **o),
        by_channel=True,
        exempt={"contained": Exempt("it averages over masks", DROPPED_IS_ZERO)},
        bench="its cost is that of its head, several times",
        row=Row(shares="nothing", equation="mean of `head(x m / q)` over masks", paper="Inoue 2019"),
    ),
    "bias_dropout_add": Member(
        call=bias_dropout_add,
        exempt={
            "identity": Exempt("evaluation adds bias and residual", X_ITSELF),
            "traced at one": Exempt("the residual remains", ZERO_AT_ONE),
            "contained": Exempt("the residual remains", DROPPED_IS_ZERO),
        },
        bench=Bench(
            floor_name="c (x + b) + r",
            floor=lambda key, x, bias, residual: (x + bias[None]) * SCALE + residual,
            drop=lambda key, x, bias, residual: jdrop.bias_dropout_add(key, x, RATE, bias, residual, train=True),
            operands=lambda shape: (jnp.ones(shape[-1:]), jnp.ones(shape)),
        ),
        row=Row(shares="nothing", equation="`residual + (x + bias) m / q`", paper="Vaswani et al. 2017"),
    ),
    "dot_product_attention": Member(
        call=attention,
        first=("prng_key", "query", "key", "value", "rate"),
        positional_only=True,
        rounds="matrix products round differently by shape: sums of 40 and of 6 terms, each by at most eps",
        exempt={
            "identity": Exempt("evaluation still attends", X_ITSELF),
            "complex": Exempt("a softmax needs real numbers", "dot_product_attention: query must be", TypeError),
            "contained": Exempt("it drops probabilities, not elements of x", DROPPED_IS_ZERO),
            "residuals": Exempt(
                "query, key, and value remain, as without dropout; counted in test_attention_blockwise", SEED_AND_RATE
            ),
        },
        bench="it has its own benchmark: scripts/bench_attention.py",
        row=Row(
            shares="nothing, or `shared_axes`",
            equation="`(softmax(...) m / q) value`",
            paper="Vaswani et al. 2017",
            also_in="PyTorch, Keras, timm, Flax, Equinox, in their attention",
        ),
    ),
}


def function_of(name):
    """Return the name of the function that a member calls."""
    return name.split(" of ")[0]


def table_line(name):
    """Return the line of a member in the table of the family."""
    row = MEMBERS[name].row
    cells = (f"`{name}`", row.shares, row.equation, row.paper, row.also_in)
    return re.sub(" +", " ", f"| {' | '.join(cells)} |")


FUNCTIONS = {name: value for name, value in vars(jdrop).items() if inspect.isfunction(value) and name[0] != "_"}
PUBLIC = FUNCTIONS | {
    "keys.derive": jdrop.keys.derive,
    "keys.per_example": jdrop.keys.per_example,
    "schedules.early": jdrop.schedules.early,
    "schedules.late": jdrop.schedules.late,
    "schedules.curriculum": jdrop.schedules.curriculum,
    "schedules.plateau_decay": jdrop.schedules.plateau_decay,
    "schedules.depth_rates": jdrop.schedules.depth_rates,
    **{
        f"{module.__name__.removeprefix('jdrop.')}.{name}": getattr(module, name)
        for module in (jdrop.consistency, jdrop.learned, jdrop.thin, jdrop.uncertainty)
        for name in module.__all__
    },
}
