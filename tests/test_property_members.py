"""Every member is the formula of its mask, value and derivatives, for any shape, dtype, rate and shared axes.

The masks are those of ``reference.py``. Formulas are in NumPy, in the order of operations that the design states, so
most results are the same bit for bit.
"""

import math
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import scipy.stats
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import (
    BEYOND,
    COMPLEX,
    Key,
    Rate,
    arrays,
    axes,
    cases,
    decisions,
    dtypes,
    keep_probability,
    keys,
    rates,
    real_dtype,
    same,
    settings_of,
    shapes,
    subsets,
    thresholds,
    with_ones,
)

import jdrop

pytestmark = pytest.mark.property
TRACED = ("jax",)


class Case(NamedTuple):
    x64: bool
    key: Key
    shape: tuple[int, ...]
    dtype: str
    x: np.ndarray

    @property
    def real(self):
        return real_dtype(self.dtype)


@st.composite
def inputs(draw, least=0, most=5, *, complex_=True, low=0, elements=600):
    x64, shape = draw(st.booleans()), draw(shapes(least, most, elements=elements, low=low))
    dtype = draw(dtypes(x64, complex_=complex_))
    return Case(x64, draw(keys()), shape, dtype, draw(arrays(shape, dtype)))


def scaled(x, keep, factor, dtype):
    """``x * factor`` in the factor's dtype, rounded once, and exactly 0 where nothing is kept."""
    wide = x if dtype in COMPLEX else x.astype(factor.dtype)
    with np.errstate(all="ignore"):
        product = np.where(keep, wide.real * factor, 0)
        if dtype in COMPLEX:
            product = product + 1j * np.where(keep, wide.imag * factor, 0)
        return product.astype(dtype)


def mask_factor(rate, real):
    with np.errstate(divide="ignore", invalid="ignore"):
        return (1 / keep_probability(rate, real)).astype(real)


def is_linear(f, x, other, expected):
    """Require the value, and that forward mode, reverse mode and the transpose are the same map."""
    same(f(x), expected(x), "value")
    y, tangent = jax.jvp(f, (x,), (other,))
    same(y, expected(x), "value under jvp")
    same(tangent, expected(other), "jvp")
    same(jax.vjp(f, x)[1](other)[0], expected(other), "vjp")
    same(jax.linear_transpose(f, x)(other)[0], expected(other), "transpose")


# ---------------------------------------------------------------------------------- scaled masks


def _dropout(draw, case):
    shared = draw(axes(len(case.shape)))
    return with_ones(case.shape, shared), lambda k, x, r: jdrop.dropout(k, x, r, train=True, shared_axes=shared)


def _channel_dropout(draw, case):
    assume(case.shape)
    n = len(case.shape)
    channel = draw(st.integers(-n, n - 1))
    batch = draw(subsets(set(range(n)) - {channel % n}))
    decided = with_ones(case.shape, set(range(n)) - {channel % n, *batch})
    return decided, lambda k, x, r: jdrop.channel_dropout(k, x, r, train=True, channel_axis=channel, batch_axes=batch)


def _locked_dropout(draw, case):
    time = draw(axes(len(case.shape)))
    return with_ones(case.shape, time), lambda k, x, r: jdrop.locked_dropout(k, x, r, train=True, time_axis=time)


def _drop_path(draw, case):
    n = len(case.shape)
    batch = draw(axes(n))
    decided = with_ones(case.shape, set(range(n)) - {axis % n for axis in batch})
    return decided, lambda k, x, r: jdrop.drop_path(k, x, r, train=True, batch_axes=batch)


def _embedding_dropout(draw, case):
    assume(case.shape)
    decided = with_ones(case.shape, range(1, len(case.shape)))
    return decided, lambda k, x, r: jdrop.embedding_dropout(k, x, r, train=True)


SCALED = {
    f.__name__.strip("_"): f for f in (_dropout, _channel_dropout, _locked_dropout, _drop_path, _embedding_dropout)
}


@pytest.mark.parametrize("name", SCALED)
@cases(10)
@given(st.data())
def test_scaled_masks(name, data):
    case = data.draw(inputs())
    decided, call = SCALED[name](data.draw, case)
    rate = data.draw(rates(decided, x64=case.x64))
    other = data.draw(arrays(case.shape, case.dtype))
    keep, factor = decisions(case.key, decided, rate.float32), mask_factor(rate.float32, case.real)
    with settings_of(case.x64):
        key, r = case.key(), rate()
        is_linear(
            lambda x: call(key, x, r), jnp.asarray(case.x), jnp.asarray(other),
            lambda x: scaled(np.asarray(x), keep, factor, case.dtype),
        )  # fmt: skip


@cases(6)
@given(st.data())
def test_dropout_that_is_scaled_in_evaluation(data):
    case = data.draw(inputs(complex_=False))
    shared = data.draw(axes(len(case.shape)))
    decided = with_ones(case.shape, shared)
    rate = data.draw(rates(decided, x64=case.x64))
    keep, q = decisions(case.key, decided, rate.float32), keep_probability(rate.float32, case.real)
    with settings_of(case.x64):
        call = lambda train: jdrop.dropout(
            case.key(), jnp.asarray(case.x), rate(), train=train, shared_axes=shared, scale_at="eval"
        )
        same(call(True), scaled(case.x, keep, np.where(np.isnan(q), q, np.ones_like(q)), case.dtype))
        same(call(False), scaled(case.x, q != 0, q, case.dtype))


@cases(7)
@given(st.data())
def test_embedding_dropout_of_ids(data):
    """The decision of an id is that of its row in a table of 2**64 rows."""
    case = data.draw(inputs(1, 4, complex_=False, elements=300))
    of_ids = case.shape[: data.draw(st.integers(0, len(case.shape)))]
    wide = len(case.shape) - len(of_ids)
    dtype = data.draw(st.sampled_from(("uint8", "int16", "int32", "uint32", "int64", "uint64")))
    vocab = data.draw(st.one_of(st.none(), st.sampled_from((1, 2, 127, 128, 2**31, 2**33))))
    low = np.iinfo(dtype).min if vocab else 0
    some = data.draw(
        st.lists(st.one_of(st.integers(-4, 4), st.integers(low, np.iinfo(dtype).max)), min_size=1, max_size=6)
    )
    some = [max(low, i) for i in some]
    ids = np.array([some[i % len(some)] for i in range(math.prod(of_ids))], dtype).reshape(of_ids)
    rows = [int(i) for i in ids.ravel()]
    if vocab:
        rows = [min(max(i + vocab if i < 0 else i, 0), vocab - 1) for i in rows]
    rate = data.draw(rates((*of_ids, *[1] * wide), x64=case.x64))
    words = [int(reference.words(case.key.words, (2**64, 1), [(i, 1), (0, 1)])[0, 0]) for i in rows]
    words = np.array(words, np.uint64).reshape(*of_ids, *[1] * wide)
    keep, factor = words >= thresholds(rate.float32), mask_factor(rate.float32, case.real)
    with settings_of(case.x64):
        as_jax = data.draw(st.booleans()) and (case.x64 or ids.dtype.itemsize < 8)
        given_ids = jnp.asarray(ids) if as_jax else ids
        y = jdrop.embedding_dropout(
            case.key(), jnp.asarray(case.x), rate(), train=True, ids=given_ids, vocab_size=vocab
        )
    same(y, scaled(case.x, keep, factor, case.dtype))


NAMES = st.one_of(st.text(st.characters(codec="utf-8"), max_size=5), st.integers(0, 9))


@cases(6)
@given(st.data())
def test_drop_connect(data):
    """A leaf has the key of its path, whatever else is in the tree."""
    case = data.draw(inputs())
    rate = data.draw(rates((), x64=case.x64))
    outer, inner = data.draw(NAMES), data.draw(st.integers(0, 3))
    params = {outer: [case.x] * (inner + 1)}
    own = Key("", tuple(reference.derive(case.key.words, "drop_connect", outer, inner)), False)
    keep, factor = decisions(own, case.shape, rate.float32), mask_factor(rate.float32, case.real)
    with settings_of(case.x64):
        y = jdrop.drop_connect(case.key(), jax.tree.map(jnp.asarray, params), rate(), train=True)[outer][inner]
    same(y, scaled(case.x, keep, factor, case.dtype))


@cases(5)
@given(st.data())
def test_multi_sample_dropout(data):
    case, number = data.draw(inputs()), data.draw(st.integers(1, 4))
    rate = data.draw(rates(case.shape, x64=case.x64))
    factor = mask_factor(rate.float32, case.real)
    samples = []
    for i in range(number):
        own = Key("", tuple(reference.derive(case.key.words, "multi_sample_dropout", i)), False)
        samples.append(scaled(case.x, decisions(own, case.shape, rate.float32), factor, case.dtype))
    with settings_of(case.x64):
        seen = jdrop.multi_sample_dropout(
            case.key(), jnp.asarray(case.x), rate(), lambda h: (h, jnp.zeros((), case.dtype)), number, train=True
        )[0]
        same(seen, np.asarray(jnp.mean(jnp.stack(samples), axis=0)).astype(case.dtype))


@cases(7)
@given(st.data())
def test_bias_dropout_add(data):
    """In float32 (float64), rounded once. A compiler may fuse a product and a sum: one rounding less."""
    case = data.draw(inputs())
    at = with_ones(case.shape, data.draw(subsets(range(len(case.shape)))))[data.draw(st.integers(0, len(case.shape))) :]
    x, bias = (data.draw(arrays(s, case.dtype, extreme=False)) for s in (case.shape, at))
    residual = data.draw(arrays(case.shape, case.dtype, extreme=False))
    rate = data.draw(rates(case.shape, x64=case.x64))
    keep, factor = decisions(case.key, case.shape, rate.float32), mask_factor(rate.float32, np.float64)
    wide = np.complex128 if case.dtype in COMPLEX else np.float64
    expected = residual.astype(wide) + scaled(x.astype(wide) + bias.astype(wide), keep, factor, np.dtype(wide).name)
    largest = abs(residual.astype(wide)) + np.where(keep, abs(x.astype(wide)) + abs(bias.astype(wide)), 0) * np.where(
        keep, factor, 0
    )
    with settings_of(case.x64):
        f = lambda x, b, r: jdrop.bias_dropout_add(case.key(), x, rate(), b, r, train=True)
        y = f(*map(jnp.asarray, (x, bias, residual)))
    near(y, expected, largest, case.dtype, case.real)
    dropped = np.broadcast_to(~keep, case.shape)
    np.testing.assert_array_equal(np.asarray(y)[dropped], residual[dropped], err_msg="dropped slots")


def near(got, expected, largest, dtype, real, roundings=6):
    """Require results within some roundings of the largest intermediate value, and of the type."""
    got = np.asarray(got)
    assert (got.dtype, got.shape) == (np.dtype(dtype), expected.shape)
    wide = np.complex128 if dtype in COMPLEX else np.float64
    got, eps = got.astype(wide), np.finfo(real).eps
    storage = 2.0 ** -{"float16": 11, "bfloat16": 8}.get(dtype, 60)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    finite = np.isfinite(expected)
    error = abs(np.where(finite, got - np.where(finite, expected, 0), 0))
    bound = (
        roundings * eps * np.where(finite, largest, 0)
        + 1.001 * storage * np.where(finite, abs(expected), 0)
        + 1e-7 * (dtype == "float16")
        + 1e-37
    )
    over = np.isinf(got) & finite & (abs(np.where(finite, expected, 0)) > 0.99 * float(jnp.finfo(dtype).max))
    assert np.all((error <= bound) | over), (got, expected)


# ---------------------------------------------------------------------------------- selections


@cases(8)
@given(st.data())
def test_zoneout(data):
    case = data.draw(inputs())
    old = data.draw(arrays(case.shape, case.dtype))
    rate = data.draw(rates(case.shape, x64=case.x64))
    keep, nan = decisions(case.key, case.shape, rate.float32), np.isnan(rate.float32)
    cotangent = data.draw(arrays(case.shape, case.dtype, extreme=False))
    one = np.where(nan, np.nan, np.ones(nan.shape)).astype(case.real)
    with settings_of(case.x64):
        f = lambda new, old: jdrop.zoneout(case.key(), new, rate(), old, train=True)
        y, pull = jax.vjp(f, jnp.asarray(case.x), jnp.asarray(old))
        of_new, of_old = pull(jnp.asarray(cotangent))
    same(y, np.where(nan, np.nan, np.where(keep, case.x, old)).astype(case.dtype))
    if not nan.any():
        same(of_new, scaled(cotangent, keep, one, case.dtype))
        same(of_old, scaled(cotangent, ~keep, one, case.dtype))


@cases(7)
@given(st.data())
def test_token_dropout(data):
    x64, key, shape = data.draw(st.booleans()), data.draw(keys()), data.draw(shapes(most=4, elements=600))
    dtype = data.draw(st.sampled_from(("int8", "uint8", "int16", "int32", "uint32") + ("int64", "uint64") * x64))
    info = np.iinfo(dtype)
    any_id = st.sampled_from((info.min, info.max, 0, 1, 5))
    ids = (np.arange(math.prod(shape)) % 11).astype(dtype).reshape(shape)
    replacement = data.draw(any_id)
    of_new = with_ones(shape, data.draw(subsets(range(len(shape)))))[data.draw(st.integers(0, len(shape))) :]
    as_array = data.draw(st.booleans())
    protect = (ids == 3) if data.draw(st.booleans()) else None
    rate = data.draw(rates(shape, x64=x64, beyond=tuple(r for r in BEYOND if r == r)))
    keep = decisions(key, shape, rate.float32) | (False if protect is None else protect)
    with settings_of(x64):
        new = jnp.full(of_new, replacement, dtype) if as_array else replacement
        y = jdrop.token_dropout(key(), jnp.asarray(ids), rate(), new, train=True, protect=protect)
    same(y, np.where(keep, ids, np.array(replacement, dtype)))


@cases(10)
@given(st.data())
def test_stochastic_depth(data):
    case = data.draw(inputs())
    x = data.draw(arrays(case.shape, case.dtype, extreme=False))
    rate = data.draw(rates((), x64=case.x64))
    keep, factor = bool(decisions(case.key, (), rate.float32)), mask_factor(rate.float32, case.real)
    with settings_of(case.x64):
        y = jdrop.stochastic_depth(case.key(), jnp.asarray(x), rate(), lambda v: -v, train=True)
        expected = jnp.asarray(x) + jnp.asarray(scaled(-x, True, factor, case.dtype)) if keep else x
        same(y, np.asarray(expected))


@cases(7)
@given(st.data())
def test_patch_dropout(data):
    case = data.draw(inputs(1, 4, low=0))
    axis = data.draw(st.integers(0, len(case.shape) - 1))
    assume(case.shape[axis])
    prefix = data.draw(st.integers(0, min(3, case.shape[axis] - 1)))
    share = data.draw(
        st.one_of(st.sampled_from((0.0, 1.0, 0.5, 0.25, 0.1, 0.3, 5e-324, 1 - 2.0**-53)), st.floats(0, 1))
    )
    n = case.shape[axis] - prefix
    keep = max(1, math.floor(n * (1 - Fraction(repr(share))) + Fraction(1, 2)))
    words = reference.words(case.key.words, (*case.shape[:axis], n))
    kept = np.sort(np.argsort(words, axis=-1, kind="stable")[..., n - (n if share == 0 else keep) :], axis=-1)
    indices = np.concatenate(
        [np.broadcast_to(np.arange(prefix), (*case.shape[:axis], prefix)), kept + prefix], axis=-1
    ).astype(np.int32)
    with settings_of(case.x64):
        y, seen = jdrop.patch_dropout(
            case.key(), jnp.asarray(case.x), share, train=True, token_axis=axis, num_prefix=prefix
        )
    same(seen, indices)
    wide = indices.reshape(indices.shape + (1,) * (len(case.shape) - axis - 1)).astype(np.int64)
    same(y, np.take_along_axis(case.x, np.broadcast_to(wide, (*indices.shape, *case.shape[axis + 1 :])), axis=axis))


# ---------------------------------------------------------------------------------- blocks


def dilated(seeds, space, block):
    """Every seed extended to its block, one seed at a time."""
    shape = list(seeds.shape)
    for axis, b in zip(space, block, strict=True):
        shape[axis] += b - 1
    out = np.zeros(shape, bool)
    for at in np.argwhere(seeds):
        out[tuple(slice(i, i + (block[space.index(k)] if k in space else 1)) for k, i in enumerate(at))] = True
    return out


@st.composite
def maps(draw):
    """Axes of space, their order in ``block_size``, and sizes of blocks that fit."""
    case = draw(inputs(2, 5, elements=300, low=1))
    n = len(case.shape)
    order = draw(st.permutations(range(n)))
    space = tuple(order[: draw(st.integers(1, min(3, n - 1)))])
    channel, batch = order[len(space)], tuple(order[len(space) + 1 :])
    block = tuple(draw(st.integers(1, min(case.shape[axis], 4))) for axis in space)
    return case, space, channel, batch, block


@cases(7)
@given(st.data())
def test_drop_block(data):
    case, space, channel, batch, block = data.draw(maps())
    coupled = data.draw(st.booleans())
    starts = list(with_ones(case.shape, [channel] if coupled else []))
    for axis, b in zip(space, block, strict=True):
        starts[axis] -= b - 1
    rate = data.draw(rates(tuple(starts), kinds=("python", "numpy"), x64=case.x64))
    share = math.prod(case.shape[a] for a in space) / math.prod(
        b * (case.shape[a] - b + 1) for a, b in zip(space, block, strict=True)
    )
    exact = rate.values.astype(np.float64)
    gamma = Rate("numpy", np.where(exact == 1, 1, exact * share)).float32
    kept = np.broadcast_to(~dilated(~decisions(case.key, tuple(starts), gamma), space, block), case.shape)
    example = (*space, channel)
    size = math.prod(case.shape[a] for a in example)
    with np.errstate(divide="ignore"):
        factor = (np.array(size, case.real) / kept.sum(example, keepdims=True).astype(case.real)).astype(case.real)
    if not np.any(exact):
        kept, factor = np.ones_like(kept), np.ones_like(factor)
    other = data.draw(arrays(case.shape, case.dtype))
    with settings_of(case.x64):
        key, r = case.key(), rate()
        is_linear(
            lambda x: jdrop.drop_block(
                key, x, r, block, train=True, spatial_axes=space, channel_axis=channel, batch_axes=batch,
                couple_channels=coupled,
            ),
            jnp.asarray(case.x), jnp.asarray(other), lambda x: scaled(np.asarray(x), kept, factor, case.dtype),
        )  # fmt: skip


@cases(6)
@given(st.data())
def test_drop_block_mask(data):
    shape = data.draw(shapes(1, 3, elements=300, low=0))
    seeds = np.random.default_rng(data.draw(st.integers(0, 99))).random(shape) < 0.2
    block = data.draw(st.lists(st.integers(1, 5), min_size=len(shape), max_size=len(shape)))
    same(jdrop.drop_block_mask(jnp.asarray(seeds), block), ~dilated(seeds, tuple(range(len(shape))), block))


# ---------------------------------------------------------------------------------- noise


def normal(key, shape):
    """The quantile of the word's upper 31 bits, with its last bit as the sign."""
    words = reference.words(key.words, shape)
    tail = ((words >> np.uint32(1)).astype(np.float64) + 0.5) / 2**31
    return np.where(words & np.uint32(1), -1.0, 1.0) * scipy.stats.norm.isf(tail / 2)


NORMAL = (
    8  # the quantile is within 6e-7 of its value: about 5 times the eps of float32, and the formula's own roundings
)


@cases(7)
@given(st.data())
def test_gaussian_dropout(data):
    case = data.draw(inputs())
    shared = data.draw(axes(len(case.shape)))
    decided = with_ones(case.shape, shared)
    x, other = (data.draw(arrays(case.shape, case.dtype, extreme=False)) for _ in range(2))
    rate = data.draw(rates(decided, x64=case.x64, ends=(0.0,)))
    assume(rate.kind == "jax" or not np.any(rate.values.astype(np.float64) == 1))
    r = np.clip(rate.float32, 0, np.float32(1 - 2.0**-24)).astype(np.float64)
    s = np.sqrt(r / (1 - r))
    z = s * normal(case.key, decided)
    wide = np.complex128 if case.dtype in COMPLEX else np.float64
    with settings_of(case.x64):
        f = lambda x: jdrop.gaussian_dropout(case.key(), x, rate(), train=True, shared_axes=shared)
        y, pull = jax.vjp(f, jnp.asarray(x))
        for got, value in ((y, x), (pull(jnp.asarray(other))[0], other)):
            value = value.astype(wide)
            near(got, value * (1 + z), abs(value) * (1 + abs(z) + s), case.dtype, np.float32, NORMAL)


@cases(7)
@given(st.data())
def test_gaussian_noise(data):
    case = data.draw(inputs(complex_=False))
    shared = data.draw(axes(len(case.shape)))
    decided = with_ones(case.shape, shared)
    x = data.draw(arrays(case.shape, case.dtype, extreme=False))
    stddev = data.draw(rates(decided, x64=case.x64, beyond=(math.nan, -1.0)))
    s = np.maximum(stddev.values.astype(np.float32), 0).astype(np.float64)
    z, wide = s * normal(case.key, decided), x.astype(np.float64)
    with settings_of(case.x64):
        f = lambda x: jdrop.gaussian_noise(case.key(), x, stddev(), train=True, shared_axes=shared)
        y, pull = jax.vjp(f, jnp.asarray(x))
        near(y, wide + z, abs(wide) + abs(z) + abs(s), case.dtype, np.float32, NORMAL)
        same(pull(jnp.asarray(x))[0], x)


@cases(8)
@given(st.data())
def test_alpha_dropout(data):
    case = data.draw(inputs(complex_=False))
    shared = data.draw(axes(len(case.shape)))
    decided = with_ones(case.shape, shared)
    x, other = (data.draw(arrays(case.shape, case.dtype, extreme=False)) for _ in range(2))
    rate = data.draw(rates(decided, x64=case.x64))
    keep, q = decisions(case.key, decided, rate.float32), keep_probability(rate.float32, np.float64)
    limit = -1.7580993408473766
    some = np.where(q == 0, 1, q)
    a = np.where(some == 1, 1, (some + limit**2 * some * (1 - some)) ** -0.5)
    b, wide = -a * (1 - q) * limit, x.astype(np.float64)
    expected = np.where(q == 0, 0, np.where(keep, a * wide + b, a * limit + b))
    largest = abs(a * wide) + 2 * abs(a * limit)
    with settings_of(case.x64):
        f = lambda x: jdrop.alpha_dropout(case.key(), x, rate(), train=True, shared_axes=shared)
        y, pull = jax.vjp(f, jnp.asarray(x))
        near(y, expected, largest, case.dtype, case.real, 12)
        gradient = np.where(keep & (q != 0), a * other.astype(np.float64), 0)
        near(pull(jnp.asarray(other))[0], gradient, abs(a * other.astype(np.float64)), case.dtype, case.real, 12)


# ---------------------------------------------------------------------------------- evaluation


def evaluated() -> dict[str, Any]:
    return {
        "dropout": lambda x, r: jdrop.dropout(None, x, r, train=False),
        "drop_path": lambda x, r: jdrop.drop_path(None, x, r, train=False, batch_axes=()),
        "locked_dropout": lambda x, r: jdrop.locked_dropout(None, x, r, train=False, time_axis=()),
        "gaussian_noise": lambda x, r: jdrop.gaussian_noise(None, x, r, train=False),
        "drop_connect": lambda x, r: jdrop.drop_connect(None, x, r, train=False),
    }


@cases(8)
@given(st.data())
def test_evaluation_returns_x_itself(data):
    case = data.draw(inputs(complex_=False))
    rate, name = data.draw(rates((), x64=case.x64)), data.draw(st.sampled_from(sorted(evaluated())))
    with settings_of(case.x64):
        x = jnp.asarray(case.x)
        assert evaluated()[name](x, rate()) is x
