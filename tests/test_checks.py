"""Bad input raises a clear error of one form, before any computation."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jdrop import _axes, _checks, dropout, dropout_mask

KEY = jax.random.key(0)
X = jnp.ones((2, 3))
FORM = re.compile(r"^\w+: \w+ .+, got .+; .+$", re.DOTALL)


def d(key=KEY, x=X, rate=0.5, train=True, **options):
    return dropout(key, x, rate, train=train, **options)


def m(key=KEY, shape=(2, 3), rate=0.5, **options):
    return dropout_mask(key, shape, rate, **options)


BAD = {
    "key missing": (lambda: d(key=None), TypeError, "dropout: key must be a PRNG key when something is dropped, got None"),
    "key missing, rate traced": (lambda: d(key=None, rate=jnp.float32(0)), TypeError, "dropout: key must be a PRNG key"),
    "key int": (lambda: d(key=0), TypeError, "dropout: key must be a PRNG key, got 0; make one with jax.random.key"),
    "swapped": (lambda: d(key=X, x=KEY), TypeError, "dropout: x must be .*got key<fry>.*; pass key first"),
    "key float": (lambda: d(key=X), TypeError, r"dropout: key must be a PRNG key, got float32\[2,3\]"),
    "keys": (
        lambda: d(key=jax.random.split(KEY, 4)),
        ValueError,
        r"dropout: key must be one key, got a batch of shape \(4,\); use jax.vmap",
    ),
    "legacy keys": (lambda: d(key=jnp.zeros((4, 2), jnp.uint32)), ValueError, r"key must be one key, got a batch of shape \(4,\)"),
    "not key words": (lambda: d(key=jnp.zeros(3, jnp.uint32)), ValueError, "dropout: key must hold the words of one PRNG key"),
    "key checked in evaluation": (lambda: d(key=0, train=False), TypeError, "dropout: key must be a PRNG key"),
    "legacy rbg, generator jax": (
        lambda: d(key=jnp.zeros(4, jnp.uint32), generator="jax"),
        ValueError,
        "dropout: key must have the words of the default implementation",
    ),
    "x list": (lambda: d(x=[1.0]), TypeError, r"dropout: x must be an array, got \[1.0\]; convert it with jnp.asarray"),
    "x float": (lambda: d(x=1.0), TypeError, "dropout: x must be an array, got 1.0"),
    "x int": (lambda: d(x=jnp.arange(3)), TypeError, r"dropout: x must be float8, .*, got int32\[3\]"),
    "x bool": (lambda: d(x=np.array(True)), TypeError, "dropout: x must be float8"),
    "x float8": (lambda: d(x=jnp.ones(3, ml_dtypes.float8_e8m0fnu)), TypeError, "dropout: x must be .*float8_e8m0fnu"),
    "x checked in evaluation": (lambda: d(x=jnp.arange(3), train=False), TypeError, "dropout: x must be"),
    "rate negative": (lambda: d(rate=-0.5), ValueError, r"dropout: rate must lie in \[0, 1\], got -0.5; pass the probability"),
    "rate above one": (lambda: d(rate=1.5), ValueError, r"dropout: rate must lie in \[0, 1\], got 1.5"),
    "rate nan": (lambda: d(rate=float("nan")), ValueError, r"dropout: rate must lie in \[0, 1\], got nan"),
    "rate numpy": (lambda: d(rate=np.array([0.1, 0.2, -1.0])), ValueError, r"dropout: rate must lie in \[0, 1\], got float64\[3\]"),
    "rate timedelta": (lambda: d(rate=np.timedelta64(0, "s")), TypeError, r"dropout: rate must be a number .*timedelta64"),
    "rate masked": (lambda: d(rate=np.ma.ones(3)), TypeError, "dropout: rate must be a number or an array, got a masked array"),
    "rate of other bytes": (lambda: d(rate=np.array(0.5, ">f4")), TypeError, "dropout: rate must have the byte order of this"),
    "x masked": (lambda: d(x=np.ma.ones(3)), TypeError, "dropout: x must be an array, got a masked array"),
    "x of other bytes": (
        lambda: d(x=np.ones(3, ">f4")),
        TypeError,
        "dropout: x must have the byte order of this machine, got '>f4'; convert it with",
    ),
    "rate str": (lambda: d(rate="0.5"), TypeError, "dropout: rate must be a number or an array, got '0.5'"),
    "rate complex": (lambda: d(rate=0.5j), TypeError, "dropout: rate must be a number or an array"),
    "rate bool": (lambda: d(rate=True), TypeError, "dropout: rate must be a real floating point number, got True"),
    "rate int array": (lambda: d(rate=jnp.array([0, 1, 0])), TypeError, r"dropout: rate must be a real .*int32\[3\]"),
    "rate shape": (lambda: d(rate=jnp.ones(2)), ValueError, r"dropout: rate must broadcast to the mask's shape \(2, 3\), got shape \(2,\)"),
    "rate too many axes": (lambda: d(rate=np.ones((1, 1, 1))), ValueError, r"rate must broadcast .*shape \(1, 1, 1\)"),
    "rate varies on a shared axis": (
        lambda: d(rate=jnp.ones((2, 3)), shared_axes=1),
        ValueError,
        r"rate must broadcast to the mask's shape \(2, 1\)",
    ),
    "rate checked in evaluation": (lambda: d(rate=2.0, train=False), ValueError, "dropout: rate must lie"),
    "train int": (lambda: d(train=1), TypeError, "dropout: train must be a bool, got 1"),
    "train array": (lambda: d(train=jnp.array(True)), TypeError, "dropout: train must be a bool"),
    "axis out of range": (lambda: d(shared_axes=2), ValueError, "dropout: shared_axes must be axes of an array with 2 axes, got 2"),
    "axis negative": (lambda: d(shared_axes=(-3,)), ValueError, r"shared_axes must be axes of an array with 2 axes, got \(-3,\)"),
    "axis of a scalar": (lambda: d(x=jnp.float32(1), shared_axes=0), ValueError, "an array with 0 axes"),
    "axis twice": (lambda: d(shared_axes=(1, -1)), ValueError, r"dropout: shared_axes must not repeat an axis, got \(1, -1\)"),
    "axis float": (lambda: d(shared_axes=(1.0,)), TypeError, r"dropout: shared_axes must be axes, got \(1.0,\)"),
    "scale_at": (lambda: d(scale_at="test"), ValueError, "dropout: scale_at must be 'train' or 'eval', got 'test'"),
    "generator": (lambda: d(generator="slow"), ValueError, "dropout: generator must be 'fast' or 'packed' or 'jax', got 'slow'"),
    "mask: key": (lambda: m(key=None), TypeError, "dropout_mask: key must be a PRNG key when something is dropped"),
    "mask: shape int": (lambda: m(shape=3), TypeError, "dropout_mask: shape must be a sequence of sizes, got 3"),
    "mask: shape float": (lambda: m(shape=(2.0,)), TypeError, r"dropout_mask: shape must be a sequence of sizes, got \(2.0,\)"),
    "mask: shape negative": (lambda: m(shape=(2, -1)), ValueError, "dropout_mask: shape must not be negative"),
    "mask: rate": (lambda: m(rate=7), ValueError, r"dropout_mask: rate must lie in \[0, 1\], got 7"),
    "mask: axes": (lambda: m(shared_axes=5), ValueError, "dropout_mask: shared_axes must be axes"),
    "mask: generator": (lambda: m(generator=None), ValueError, "dropout_mask: generator must be"),
    "window: too few": (lambda: m(window=((0, 1),)), ValueError, r"dropout_mask: window must hold 2 pairs for shape \(2, 3\), got 1"),
    "window: outside": (lambda: m(window=((0, 1), (2, 2))), ValueError, r"dropout_mask: window must lie inside shape \(2, 3\), got \(2, 2\)"),
    "window: negative": (lambda: m(window=((-1, 1), (0, 1))), ValueError, r"window must lie inside shape \(2, 3\), got \(-1, 1\)"),
    "window: too long": (lambda: m(window=((jnp.int32(0), 3), (0, 1))), ValueError, r"must lie inside shape .*got \(int32\[\], 3\)"),
    "window: size": (lambda: m(window=((1, -1), (0, 1))), ValueError, r"window must lie inside shape \(2, 3\), got \(1, -1\)"),
    "window: starts": (lambda: m(window=((jnp.zeros(2, int), 1), (0, 1))), TypeError, r"window must start at integer scalars, got int"),
    "window: three": (lambda: m(window=((0, 1, 1), (0, 1))), TypeError, "dropout_mask: window must hold pairs"),
    "window: bool": (lambda: m(window=((True, 1), (0, 1))), TypeError, "dropout_mask: window must hold pairs"),
    "mask: bool size": (lambda: m(shape=(True, 3)), TypeError, "dropout_mask: shape must be a sequence of sizes"),
    "mask: rate on a shared axis": (
        lambda: m(rate=np.full((1, 3), 0.5), shared_axes=1), ValueError, r"rate must broadcast to the mask's shape \(2, 1\)"
    ),
    "rate huge": (lambda: d(rate=10**400), ValueError, r"dropout: rate must lie in \[0, 1\], got 1000"),
    "axes bool": (lambda: d(shared_axes=True), TypeError, "dropout: shared_axes must be axes, got True"),
    "pytree as key": (lambda: d(key={"w": X}), TypeError, "dropout: key must be a PRNG key, got a dict of arrays; make one"),
    "window: no pair": (lambda: m(window=(0, 1)), TypeError, "dropout_mask: window must hold pairs"),
    "window: float": (lambda: m(window=((0.0, 1), (0, 1))), TypeError, "dropout_mask: window must hold pairs"),
    "window: float array": (lambda: m(window=((jnp.float32(0), 1), (0, 1))), TypeError, "window must start at integer scalars"),
    "window: rate shape": (lambda: m(window=((0, 1), (0, 2)), rate=np.ones(3)), ValueError, r"rate must broadcast .*\(1, 2\)"),
    "window: rbg bits": (
        lambda: m(key=jax.random.key(0, impl="rbg"), window=((0, 1), (0, 1)), generator="jax"),
        NotImplementedError,
        "dropout_mask: generator must be \"fast\" for a part of a mask, .*got 'jax' with key<rbg> key; use",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message) as caught:
        call()
    assert FORM.match(str(caught.value)), str(caught.value)


def test_train_traced_says_what_to_do():
    with pytest.raises(TypeError, match=r"pass rate=jnp.where\(train, rate, 0.\), or list train in static_argnames"):
        jax.jit(lambda t: d(train=t))(True)
    y = jax.jit(lambda t: d(rate=jnp.where(t, 0.5, 0.0)))(False)
    np.testing.assert_array_equal(y, X)


def test_concrete_arrays_of_jax_are_never_read(monkeypatch):
    """They count as traced: out of range is not an error, and no value is read."""

    def fail(self):
        raise AssertionError("a value was read")

    rate = jnp.float32(-3)
    with monkeypatch.context() as patched:
        patched.setattr(type(rate), "_value", property(fail))
        y = d(rate=rate)
        with pytest.raises(TypeError, match=r"got int32\[\]"):
            d(rate=jnp.int32(1))
    np.testing.assert_array_equal(y, X)


def test_errors_come_before_any_computation(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("something was computed")

    monkeypatch.setattr("jdrop._mask.key_words", fail)
    monkeypatch.setattr("jdrop._family.elementwise.masked_op", fail)
    for case in ("rate negative", "axis twice", "keys", "generator", "rate shape", "x int"):
        with pytest.raises((TypeError, ValueError), match="dropout: "):
            BAD[case][0]()


def test_bools_and_time_spans_are_neither_counts_nor_axes_nor_numbers():
    for value in (True, np.bool_(True), np.timedelta64(1, "s")):
        with pytest.raises(TypeError, match="f: n must be an integer, got "):
            _checks.as_count("f", "n", value)
        with pytest.raises(TypeError, match="f: a must be an axis, got "):
            _axes.as_axis("f", "a", value, 2)
        with pytest.raises(TypeError, match="f: x must be a number, got "):
            _checks.as_number("f", "x", value, 0, 1)


def test_numpy_integers_are_valid_rates():
    assert d(rate=np.int64(0)) is X
    np.testing.assert_array_equal(d(rate=np.uint8(1)), 0 * X)
