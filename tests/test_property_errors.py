"""Whatever stands in place of an argument, a call works, or raises one error in the project's form and uses no key."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from strategies import cases

import jdrop

pytestmark = pytest.mark.property
KEY = jax.random.key(7)
X = jnp.ones((2, 4, 3))
IDS = jnp.arange(8).reshape(2, 4)

CALLS = {
    "dropout": (jdrop.dropout, (KEY, X, 0.5), dict(train=True, shared_axes=(), scale_at="train", generator="fast", shard=None)),
    "dropout_mask": (
        jdrop.dropout_mask,
        (KEY, (2, 3), 0.5),
        dict(shared_axes=(), generator="fast", window=[(0, 1), (1, 2)], out_sharding=None),
    ),
    "channel_dropout": (jdrop.channel_dropout, (KEY, X, 0.5), dict(train=True, channel_axis=-1, batch_axes=(0,))),
    "locked_dropout": (jdrop.locked_dropout, (KEY, X, 0.5), dict(train=True, time_axis=1)),
    "drop_path": (jdrop.drop_path, (KEY, X, 0.5), dict(train=True, batch_axes=(0,))),
    "drop_block": (
        jdrop.drop_block,
        (KEY, X, 0.5, 2),
        dict(train=True, spatial_axes=1, channel_axis=-1, batch_axes=(0,), couple_channels=False),
    ),
    "drop_block_mask": (jdrop.drop_block_mask, (jnp.zeros((3, 3), bool), 2), {}),
    "stochastic_depth": (jdrop.stochastic_depth, (KEY, X, 0.5, jnp.sin), dict(train=True, generator="fast")),
    "skip_path": (jdrop.skip_path, (KEY, X, 0.5, jnp.sin), dict(train=True, operands=(), num_shards=1, shard=None)),
    "kept_units": (jdrop.thin.kept_units, (KEY, 8, 0.5), dict(block_size=2, groups=None, num_shards=1, shard=None)),
    "take": (jdrop.thin.take, (X, jnp.arange(2)), dict(axis=1, block_size=1, num_shards=1)),
    "put": (jdrop.thin.put, (X, jnp.arange(2), X[:, :2]), dict(axis=1, block_size=1, num_shards=1)),
    "mlp": (
        jdrop.thin.mlp,
        (KEY, X, 0.5, [jnp.ones((3, 8)), jnp.ones((8, 3))]),
        dict(train=True, activation=jnp.sin, block_size=1, groups=1, num_shards=1, layouts="in_out", shard=None),
    ),
    "gated_mlp": (
        jdrop.thin.gated_mlp,
        (KEY, X, 0.5, jnp.ones((3, 8)), jnp.ones((3, 8)), jnp.ones((8, 3))),
        dict(train=True, activation=jnp.sin, block_size=1, groups=1, num_shards=1, layouts="in_out", shard=None),
    ),
    "multi_head_attention": (
        jdrop.thin.multi_head_attention,
        (KEY, X, 0.5, *[jnp.ones((3, 4, 8))] * 3, jnp.ones((4, 8, 3))),
        dict(train=True, context=None, groups=1, num_shards=1, shard=None),
    ),
    "zoneout": (jdrop.zoneout, (KEY, X, 0.5, X), dict(train=True)),
    "embedding_dropout": (jdrop.embedding_dropout, (KEY, X, 0.5), dict(train=True, ids=IDS, vocab_size=9)),
    "token_dropout": (jdrop.token_dropout, (KEY, IDS, 0.5, 1), dict(train=True, protect=IDS == 2)),
    "patch_dropout": (jdrop.patch_dropout, (KEY, X, 0.5), dict(train=True, num_prefix=1, token_axis=1)),
    "drop_connect": (jdrop.drop_connect, (KEY, {"w": X}, 0.5), dict(train=True, where=None, shard=None)),
    "alpha_dropout": (jdrop.alpha_dropout, (KEY, X, 0.5), dict(train=True, shared_axes=1)),
    "gaussian_dropout": (jdrop.gaussian_dropout, (KEY, X, 0.5), dict(train=True, shared_axes=1)),
    "gaussian_noise": (jdrop.gaussian_noise, (KEY, X, 0.5), dict(train=True, shared_axes=1)),
    "multi_sample_dropout": (jdrop.multi_sample_dropout, (KEY, X, 0.5, jnp.sin, 2), dict(train=True)),
    "bias_dropout_add": (jdrop.bias_dropout_add, (KEY, X, 0.5, X[0, 0], X), dict(train=True)),
    "dot_product_attention": (
        jdrop.dot_product_attention,
        (KEY, X[None], X[None], X[None], 0.5),
        dict(
            train=True, shared_axes=(), bias=None, mask=None, is_causal=False, scale=None, query_seq_lengths=None,
            key_value_seq_lengths=None, local_window_size=None, implementation=None,
        ),
    ),
    "derive": (jdrop.keys.derive, (KEY, "a", 3), {}),
    "per_example": (jdrop.keys.per_example, (KEY, IDS), {}),
    "early": (jdrop.schedules.early, (0.5, 3), {}),
    "late": (jdrop.schedules.late, (0.5, 3), {}),
    "curriculum": (jdrop.schedules.curriculum, (0.5, 0.1), {}),
    "plateau_decay": (jdrop.schedules.plateau_decay, (0.5, 3, 4), {}),
    "depth_rates": (jdrop.schedules.depth_rates, (0.5, 3, "i/n"), {}),
}  # fmt: skip


class Odd:
    def __repr__(self):
        return "Odd()"


class Shaped(Odd):
    """Looks like an array from afar."""

    shape, dtype, ndim = (2, 4, 3), np.dtype("float32"), 3


BAD = [
    None, True, False, 0, 1, -1, 2, 10**30, -(10**400), 0.0, 1.5, -0.5, float("nan"), float("inf"), 1j, "", "x", "fast", b"x",
    (), [], {}, set(), {1}, (1,), [0.5], (0, 0), (5,), (-4,), (1.0,), ("a",), (None,), [[1, 2], [3]], [(0, 1)], [(0, 1), (0, 9)],
    ((0, 1), (True, 1)), range(2), slice(None), Ellipsis, NotImplemented, object, Odd(), Shaped(), len, jnp.sin, lambda: 1, P(), P("a"), P(None, None, None, "b"),
    np.bool_(True), np.int64(1), np.uint8(3), np.float64(0.25), np.float16(2), np.complex64(1), np.str_("x"), np.datetime64("2020"),
    np.timedelta64(1, "s"), np.array(0.5), np.array([0.5, 2.0]), np.array(["a"]), np.array([None]), np.array([], np.float32),
    np.array(Odd(), object), np.ma.ones(3), np.ones((2, 4, 3), ">f4"), np.ones(3, [("a", "f4")]), np.zeros((2, 4), "M8[s]"),
    np.ones((2, 4, 3), np.longdouble), np.float32(-0.0), np.array(2**63, np.uint64), np.arange(8).reshape(2, 4), np.full((2, 4), -(2**40)),
    jnp.ones(()), jnp.ones((2, 4, 3), jnp.bfloat16), jnp.ones((2, 4, 3), jnp.int8), jnp.ones((2, 4, 3), bool),
    jnp.ones((2, 4, 3), ml_dtypes.float8_e4m3fn), jnp.ones((2, 4, 3), jnp.complex64), jnp.ones((1, 2, 4, 3)), jnp.zeros((0, 4, 3)),
    jnp.float32(jnp.nan), jnp.int32(1), jnp.uint32(3), jnp.ones((2, 1, 1)), jnp.ones((2, 4), jnp.int4), jnp.array([1, 2], jnp.uint32),
    KEY, jax.random.split(KEY, 2), jax.random.key(0, impl="rbg"), jax.random.PRNGKey(0), jnp.zeros(3, jnp.uint32), jnp.zeros((2, 2), jnp.uint32),
    jax.random.key_data(jax.random.key(0, impl="rbg")), jax.ShapeDtypeStruct((2, 4, 3), "float32"), [X], {"w": X}, (X, X), jax.lax,
]  # fmt: skip


def described(name, error):
    return re.match(rf"^{name}: [\w \[\]]+ .*\bgot .*; .+$", str(error), re.DOTALL)


@pytest.mark.parametrize("name", CALLS)
@cases(25)
@given(st.data())
def test_odd_arguments_get_one_error_of_this_package(name, data):
    f, given_args, options = CALLS[name]
    args, options = list(given_args), dict(options)
    places = data.draw(st.lists(st.sampled_from([*range(len(args)), *options]), min_size=1, max_size=2, unique=True))
    for place in places:
        at = data.draw(st.integers(0, len(BAD) - 1))
        bad = BAD[at]
        assume(not (callable(bad) and callable(options.get(place, args[place] if isinstance(place, int) else None))))
        if place in options:
            options[place] = bad
        else:
            args[place] = bad
    try:
        f(*args, **options)
    except (TypeError, ValueError, NotImplementedError) as error:
        assert described(name, error), f"{type(error).__name__}: {error}"
        assert error.__cause__ is None


RATES_THAT_RAISE = (-1.0, float("nan"), float("inf"), "0.5", None, 1j, True, np.float32(-1e-30), np.array([0.5, 7]))


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, (_, args, _) in CALLS.items()
        if 0.5 in [a for a in args if isinstance(a, float)] and args[0] is KEY
    ],
)
@cases(3)
@given(st.data())
def test_an_error_uses_no_key(name, data):
    """``jax.debug_key_reuse`` would see it: the key is good for a use after the error."""
    f, args, options = CALLS[name]
    bad = data.draw(st.sampled_from(RATES_THAT_RAISE))
    key = jax.random.clone(KEY)
    args = [key, *(bad if isinstance(a, float) else a for a in args[1:])]
    with jax.debug_key_reuse(True):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: .*, got .*; "):
            f(*args, **options)
        jax.random.bits(key)
