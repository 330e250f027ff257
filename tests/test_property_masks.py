"""Masks of any shape, rate, window and sharing are those of ``reference.py``, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from strategies import FOLDED, HUGE, Rate, axes, cases, decisions, keys, rates, same, settings_of, shapes, with_ones

import jdrop

pytestmark = pytest.mark.property


SHORT = st.lists(st.sampled_from((2, 3, 1, 5)), min_size=2, max_size=4)
COLUMNS = st.sampled_from(((128,), (129,), (2, 64), (3, 127), (5, 26), (300,)))
ROWS = st.builds(lambda rows, columns: (*rows, *columns), SHORT, COLUMNS)  # several axes of rows


@cases(60)
@given(st.data())
def test_masks_are_those_of_the_design(data):
    x64, key, shape = data.draw(st.booleans()), data.draw(keys()), data.draw(st.one_of(ROWS, shapes()))
    shared = data.draw(axes(len(shape)))
    decided = with_ones(shape, shared)
    rate = data.draw(rates(decided, x64=x64))
    expected = np.broadcast_to(decisions(key, decided, rate.float32), shape)
    with settings_of(x64):
        same(jdrop.dropout_mask(key(), shape, rate(), shared_axes=shared), expected)


@cases(5)
@given(st.data())
def test_x_of_one_long_axis(data):
    """On a CPU its loop is in rows, with keys of their own."""
    key, shape = data.draw(keys()), (data.draw(st.sampled_from(FOLDED)),)
    rate = data.draw(st.one_of(rates(), rates(shape), st.builds(Rate, st.just("jax"), st.just(np.float32(0.4)))))
    expected = decisions(key, shape, rate.float32)
    y = jdrop.dropout(key(), jnp.ones(shape), rate(), train=True, scale_at="eval")
    same(np.isnan(y) | (np.asarray(y) == 1), expected)
    same(jdrop.dropout_mask(key(), shape, rate()), expected)


@cases(10)
@given(st.data())
def test_rates_at_the_border_of_a_word(data):
    """The threshold is rounded to even, and its own word is kept."""
    key = data.draw(keys())
    shape = data.draw(st.sampled_from(((2000,), (3, 700), (40, 10, 5), (17, 129))))
    words = reference.words(key.words, shape)
    near = int(words.min()) + np.array([-0.5, 0, 0.5, 1, 1.5])
    for rate in (Rate("numpy", r) for r in np.clip(near * 2.0**-32, 0, 1).astype(np.float32)):
        same(jdrop.dropout_mask(key(), shape, rate()), decisions(key, shape, rate.float32))


@st.composite
def windows(draw, shape):
    """A few elements of each axis, from a border of it or of 32 bits."""
    window = []
    for n in shape:
        size = draw(st.sampled_from([s for s in (4, 3, 2, 1, 4, 3, 2, 0) if s <= n]))
        starts = [
            s for s in (0, 1, 126, 2**16 - 1, 2**31 - 2, *[2**32 - 2, 2**32 - 1] * 3, 2**32, n - size) if s + size <= n
        ]
        window.append((draw(st.sampled_from(starts)), size))
    return window


@cases(50)
@given(st.data())
def test_windows_of_arrays_of_any_size(data):
    """Starts are ints, NumPy integers or arrays of JAX; sizes go beyond 2**32."""
    key = data.draw(keys())
    sizes = st.sampled_from((1, 2, 3, 127, 128, 129, 1000, *HUGE))
    shape = tuple(data.draw(st.lists(sizes, max_size=4)))
    window = data.draw(windows(shape))
    shared = data.draw(axes(len(shape)))
    decided = with_ones(shape, shared)
    places = [(0, min(size, 1)) if d == 1 else (start, size) for d, (start, size) in zip(decided, window, strict=True)]
    rate = data.draw(rates(tuple(1 if d == 1 else size for d, (_, size) in zip(decided, places, strict=True))))
    passed = []
    for start, size in window:
        make = data.draw(st.sampled_from([int, np.int64, lambda s: jnp.asarray(np.uint32(s)) if s < 2**32 else s]))
        passed.append((make(start), size))
    mask = jdrop.dropout_mask(key(), shape, rate(), shared_axes=shared, window=passed)
    expected = decisions(key, decided, rate.float32, places)
    same(mask, np.broadcast_to(expected, [size for _, size in window]))


@cases(20)
@given(st.data())
def test_generator_jax_is_bernoulli(data):
    """For every dtype of the rate, which is the dtype that ``bernoulli`` draws in."""
    x64, key, shape = data.draw(st.booleans()), data.draw(keys()), data.draw(shapes())
    key = key._replace(legacy=False)
    shared = data.draw(axes(len(shape)))
    rate = data.draw(rates(with_ones(shape, shared), x64=x64, beyond=()))
    with settings_of(x64):
        own = rate.values.astype(np.float64) if rate.kind == "python" else rate.values
        p = 1 - (jnp.asarray(own) if rate.kind == "jax" else own)
        p = jnp.asarray(p).reshape((1,) * (len(shape) - p.ndim) + p.shape if p.ndim else ())
        expected = jax.random.bernoulli(key(), p, with_ones(shape, shared))
        mask = jdrop.dropout_mask(key(), shape, rate(), shared_axes=shared, generator="jax")
        same(mask, np.broadcast_to(expected, shape))


PATH = st.one_of(st.text(max_size=20), st.integers(0, 2**64 - 1), st.sampled_from((0, 2**32 - 1, 2**32, 2**63)))


@cases(12)
@given(st.data())
def test_derived_keys_are_those_of_the_design(data):
    key, path = data.draw(keys()), data.draw(st.lists(PATH, min_size=1, max_size=5))
    with settings_of(data.draw(st.booleans())):
        try:
            "".join(p for p in path if isinstance(p, str)).encode()
        except UnicodeEncodeError:
            with pytest.raises(ValueError, match="derive: path must hold valid text"):
                jdrop.keys.derive(key(), *path)
            return
        own = jdrop.keys.derive(key(), *path)
        words = own if key.legacy else jax.random.key_data(own)
        same(words, np.array(reference.derive(key.words, *path), np.uint32))


@cases(12)
@given(st.data())
def test_keys_per_example_are_derived_keys(data):
    key, shape = data.draw(keys()), data.draw(shapes(most=3, elements=6))
    dtype = data.draw(st.sampled_from(("int8", "uint8", "int16", "int32", "uint32", "int64", "uint64")))
    info = np.iinfo(dtype)
    number = int(np.prod(shape))
    ids = data.draw(st.lists(st.integers(info.min, info.max), min_size=number, max_size=number))
    ids = np.array(ids, dtype).reshape(shape)
    x64 = data.draw(st.booleans())
    with settings_of(x64):
        given_ids = jnp.asarray(ids) if data.draw(st.booleans()) and (x64 or info.bits < 64) else ids
        own = jdrop.keys.per_example(key(), given_ids)
        words = own if key.legacy else jax.random.key_data(own)
        expected = [reference.derive(key.words, i) for i in ids.ravel().tolist()]
        same(words, np.array(expected, np.uint32).reshape(*shape, len(key.words)))
