"""What the property tests draw: keys, shapes around the borders, data of every dtype, and rates of every kind.

A case is drawn as NumPy arrays and plain values, so that a failing one prints itself; :func:`settings_of` sets up x64,
and only then are arrays of JAX made from it.
"""

import contextlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import reference
from hypothesis import settings
from hypothesis import strategies as st

np.set_printoptions(threshold=20)  # or a failing case fills pages

BORDERS = (0, 1, 2, 3, 5, 127, 128, 129)
LONG = (255, 256, 257, 1000, 1023, 1024, 1025)
FOLDED = (2**14 - 1, 2**14, 2**14 + 128, 2**14 + 384)  # one axis of these sizes is computed in rows on a CPU
HUGE = (2**16, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**40)
FLOATS = ("float32", "float16", "bfloat16", "float64")
COMPLEX = ("complex64", "complex128")


def cases(number):
    """Run a test on this many cases, and on proportionally more in the profile ``hunt``."""
    return settings(max_examples=max(1, number * settings.default.max_examples // 100))


# ---------------------------------------------------------------------------------- keys


class Key(NamedTuple):
    """A PRNG key by its words."""

    implementation: str
    words: tuple[int, ...]
    legacy: bool

    def __call__(self):
        words = jnp.asarray(np.array(self.words, np.uint32))
        return words if self.legacy else jax.random.wrap_key_data(words, impl=self.implementation)


@st.composite
def keys(draw, implementations=("threefry2x32", "rbg", "unsafe_rbg")):
    implementation = draw(st.sampled_from(implementations))
    number = 2 if implementation == "threefry2x32" else 4
    words = draw(st.lists(st.integers(0, 2**32 - 1), min_size=number, max_size=number))
    return Key(implementation, tuple(words), draw(st.booleans()) and number == 2)


# ---------------------------------------------------------------------------------- shapes


@st.composite
def shapes(draw, least=0, most=6, elements=2500, sizes=BORDERS, low=0):
    """Shapes of few elements whose axes are around the borders; now and then with a long last axis."""
    number = draw(st.integers(least, most))
    shape, room = [], elements
    if number and draw(st.integers(0, 4)) == 0:
        shape.append(draw(st.sampled_from(LONG)))
        room //= shape[0]
    while len(shape) < number:
        shape.insert(0, draw(st.sampled_from([n for n in sizes if low <= n <= max(room, low)])))
        room //= max(shape[0], 1)
    return tuple(draw(st.permutations(shape)) if draw(st.booleans()) else shape)


def subsets(items):
    """Any of the items, in any order."""
    items = list(items)
    return st.lists(st.sampled_from(items), unique=True) if items else st.just([])


@st.composite
def axes(draw, ndim):
    """Distinct axes of an array, some of them negative."""
    return tuple(axis - ndim * draw(st.booleans()) for axis in draw(subsets(range(ndim))))


def with_ones(shape, at):
    """A shape with 1 on some axes, counted from either end."""
    at = {axis % len(shape) for axis in at}
    return tuple(1 if axis in at else n for axis, n in enumerate(shape))


# ---------------------------------------------------------------------------------- rates


CERTAIN = (0.0, 1.0)
USUAL = (0.5, 0.3, 0.9)
SPECIAL = (0.1, 2.0**-24, 1 - 2.0**-24, 1 - 2.0**-25, 2.0**-32, 2.0**-33, 3 * 2.0**-33, 5e-324, 1e-45, 0.999)
BEYOND = (math.nan, math.inf, -math.inf, -1.0, -1e-45, 1.0 + 2.0**-23, 2.0)


class Rate(NamedTuple):
    """A rate, and how it is passed."""

    kind: str
    """``python``, ``numpy`` or ``jax``."""
    values: np.ndarray

    def __call__(self):
        if self.kind == "python":
            value = float(self.values)
            return (
                int(value) if value in CERTAIN and np.signbit(self.values) == 0 and self.values.itemsize < 8 else value
            )
        return self.values[()] if self.kind == "numpy" else jnp.asarray(self.values)

    @property
    def float32(self):
        """What the design says of it: made float32 first; traced ones outside of [0, 1] act as the nearer end."""
        with np.errstate(over="ignore", under="ignore"):
            return np.clip(self.values.astype(np.float32), 0, 1)


@st.composite
def rates(draw, shape=(), kinds=("python", "numpy", "jax"), x64=False, ends=CERTAIN, beyond=BEYOND):
    """Rates that broadcast to a shape."""
    kind = draw(st.sampled_from(kinds))
    dtype = "float64" if kind == "python" else draw(st.sampled_from(FLOATS if x64 or kind == "numpy" else FLOATS[:3]))
    dtype = draw(st.sampled_from(("float32", "float64"))) if kind == "python" else dtype  # float32: 0 and 1 as ints
    one = st.one_of(
        st.sampled_from(USUAL),
        st.floats(0, 1),
        st.sampled_from(SPECIAL + tuple(ends) + (beyond if kind == "jax" else ())),
    )
    if kind == "python" or draw(st.booleans()):
        value = draw(one)
        return Rate(kind, _cast(value, dtype))
    at = with_ones(shape, draw(subsets(range(len(shape)))))[draw(st.integers(0, len(shape))) :]
    few = np.array(draw(st.lists(one, min_size=1, max_size=5)))
    return Rate(kind, _cast(few[np.arange(math.prod(at)) % few.size].reshape(at), dtype))


def _cast(values, dtype):
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return np.asarray(values, np.float64).astype(dtype)


def thresholds(rate):
    """The threshold of each rate, as :func:`reference.threshold`; NaN drops nothing."""
    return np.vectorize(lambda r: 0 if np.isnan(r) else reference.threshold(r), otypes=[np.uint64])(rate)


def decisions(key, shape, rate, window=None):
    """The mask of float32 rates that broadcast to the shape, or to the window."""
    words = reference.words(key.words, shape, window).astype(np.uint64)
    return words >= thresholds(rate)


def keep_probability(rate, dtype):
    """The probability that is really used, rounded once to a dtype; NaN where the rate is."""
    exact = (2.0**32 - thresholds(rate).astype(np.float64)) / 2.0**32
    return np.where(np.isnan(rate), np.nan, exact).astype(dtype)


# ---------------------------------------------------------------------------------- data


def real_dtype(dtype):
    """What x of a dtype is scaled in."""
    return np.float64 if dtype in ("float64", "complex128") else np.float32


def dtypes(x64, *, complex_=True):
    return st.sampled_from([d for d in FLOATS + COMPLEX * complex_ if x64 or d not in ("float64", "complex128")])


EXTREME = (0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0)


@st.composite
def arrays(draw, shape, dtype, extreme=True):
    """Normal numbers, with a few special ones among them. Complex ones stay finite."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal(shape)
    if dtype in COMPLEX:
        return (x + 1j * rng.standard_normal(shape)).astype(dtype)
    x = np.asarray(x).astype(dtype)
    if extreme and x.size and draw(st.booleans()):
        largest = float(ml_dtypes.finfo(dtype).max)
        special = np.array([*EXTREME, largest, -largest]).astype(dtype)
        at = rng.random(shape) < 0.2
        x = np.where(at, special[rng.integers(0, special.size, shape)], x).astype(dtype)
    return x


@contextlib.contextmanager
def settings_of(x64):
    with jax.enable_x64(x64), np.errstate(all="ignore"):
        yield


def same(got: Any, expected: Any, claim: str = ""):
    """Require an array bit for bit, its type included, but for the payload of NaN."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), (claim, got.shape, got.dtype, expected.dtype)
    parts = [(got.real, expected.real), (got.imag, expected.imag)] if np.iscomplexobj(got) else [(got, expected)]
    for a, b in parts:
        if a.dtype.kind not in "biu":
            a, b = a.astype(np.float64), b.astype(np.float64)
            known = ~np.isnan(b)
            np.testing.assert_array_equal(np.signbit(a[known]), np.signbit(b[known]), err_msg=f"{claim}: signs")
        np.testing.assert_array_equal(a, b, err_msg=claim)
