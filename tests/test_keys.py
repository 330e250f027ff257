"""keys: derive and per_example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdrop.keys import derive, per_example

IMPLS = ["threefry2x32", "rbg", "unsafe_rbg", "threefry4x32", "philox2x32", "philox4x32"]
KEY = jax.random.key(0)


def words(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


@pytest.mark.parametrize("impl", IMPLS)
def test_the_type_of_the_key_is_kept(impl):
    key = jax.random.key(1, impl=impl)
    derived = derive(key, "a", 1)
    assert derived.dtype == key.dtype and derived.shape == ()
    assert words(derived) != words(key)
    assert per_example(key, jnp.arange(6).reshape(2, 3)).shape == (2, 3)


def test_legacy_keys_stay_legacy():
    key = jax.random.PRNGKey(1)
    derived = derive(key, "a")
    assert derived.dtype == jnp.uint32 and derived.shape == key.shape
    assert words(derived) == words(derive(jax.random.wrap_key_data(key), "a"))
    assert per_example(key, jnp.arange(3)).shape == (3, 2)


def test_paths_that_differ_give_different_keys():
    paths = [
        ("a",), ("b",), ("a", "b"), ("b", "a"), ("ab",), ("3",), (3,), (4,), (3, 4), (4, 3), (2**32,), (2**32 + 3,),
        (2**64 - 1,), (0,), (0, 0), ("",), ("", ""), ("é",), (np.int32(-3),),
    ]  # fmt: skip
    distinct = {words(derive(KEY, *path)) for path in paths}
    distinct |= {words(derive(derive(KEY, "a"), "b")), words(derive(jax.random.key(1), "a"))}
    distinct |= {words(k) for k in jax.random.split(KEY, 5)} | {words(jax.random.fold_in(KEY, i)) for i in range(5)}
    assert len(distinct) == len(paths) + 2 + 5  # split(key, n)[i] == fold_in(key, i)


def test_ten_thousand_steps_and_keys_do_not_collide():
    keys = jax.random.key_data(per_example(KEY, jnp.arange(10_000)))
    assert len(np.unique(np.asarray(keys), axis=0)) == 10_000


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32", "int64", "uint64"])
def test_integers_are_identified_by_value(dtype, x64):
    for value in {0, 3, 127} | ({-1, -128} if dtype.startswith("i") else {200}):
        traced = jax.jit(lambda i: derive(KEY, i))(jnp.asarray(value, dtype))
        same = derive(KEY, value) if value >= 0 else derive(KEY, np.uint64(value % 2**64))
        assert words(traced) == words(same) == words(derive(KEY, np.asarray(value, dtype)[()]))
    if dtype.endswith("64"):
        big = 2**40 + 5
        assert words(derive(KEY, jnp.asarray(big, dtype))) == words(derive(KEY, big))


def test_per_example_is_derive_of_each_id():
    ids = jnp.array([[5, 0], [2**31 - 1, -4]])
    keys = per_example(KEY, ids)
    for index in np.ndindex(2, 2):
        assert words(keys[index]) == words(derive(KEY, ids[index]))
    assert per_example(KEY, np.arange(0)).shape == (0,)


def test_transforms_agree_with_eager():
    ids = jnp.arange(4)
    eager = [words(derive(KEY, "layer", i, "x")) for i in range(4)]
    mapped = jax.vmap(lambda i: derive(KEY, "layer", i, "x"))(ids)
    scanned = jax.lax.scan(lambda c, i: (c, jax.random.key_data(derive(KEY, "layer", i, "x"))), 0, ids)[1]
    jitted = [words(jax.jit(lambda i: derive(KEY, "layer", i, "x"))(i)) for i in ids]
    assert [words(k) for k in mapped] == eager == jitted == [tuple(w.tolist()) for w in np.asarray(scanned)]
    keys = jax.random.split(KEY, 3)
    over_keys = jax.vmap(lambda k: derive(k, "a"))(keys)
    assert [words(k) for k in over_keys] == [words(derive(k, "a")) for k in keys]


def test_derived_keys_are_fresh_and_the_base_key_is_not_consumed():
    with jax.debug_key_reuse(True):
        key = jax.random.key(9)
        a, b = derive(key, "a"), derive(key, "b")
        jax.random.bits(a)
        jax.random.bits(b)
        with pytest.raises(jax.errors.KeyReuseError):
            jax.random.bits(a)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ((), ValueError, "derive: path must not be empty"),
        ((-1,), ValueError, "derive: path must hold ints from 0 to"),
        ((2**64,), ValueError, "derive: path must hold ints from 0 to"),
        ((True,), TypeError, "derive: path must hold str, int or integer scalars, got True"),
        ((np.bool_(True),), TypeError, "derive: path must hold str"),
        ((1.0,), TypeError, "derive: path must hold str, int or integer scalars, got 1.0"),
        ((None,), TypeError, "derive: path must hold str"),
        ((np.arange(3),), TypeError, r"derive: path must hold str.*int64\[3\]"),
        ((b"a",), TypeError, "derive: path must hold str"),
        ((np.timedelta64(3, "s"),), TypeError, "derive: path must hold str"),
        (("\ud800",), ValueError, "derive: path must hold valid text, got '.ud800'; replace lone surrogates"),
    ],
)
def test_bad_paths(path, error, message):
    with pytest.raises(error, match=message):
        derive(KEY, *path)


def test_bad_keys_and_ids():
    with pytest.raises(TypeError, match="derive: key must be a PRNG key"):
        derive(0, "a")
    with pytest.raises(ValueError, match=r"per_example: key must be one key, got a batch of shape \(2,\)"):
        per_example(jax.random.split(KEY), jnp.arange(3))
    for ids in (3, jnp.ones(3), [1, 2], jnp.array([True])):
        with pytest.raises(TypeError, match="per_example: ids must be an integer array"):
            per_example(KEY, ids)


def test_integers_on_the_device_stay_there():
    """As with fold_in. NumPy and Python numbers must be transferred, there as here."""
    step, ids = jnp.int32(3), jnp.arange(4)
    expected = derive(KEY, 3), per_example(KEY, np.arange(4))
    with jax.transfer_guard("disallow"):
        jax.random.fold_in(KEY, step)
        results = derive(KEY, step), per_example(KEY, ids)
    assert (results[0] == expected[0]).all() and (results[1] == expected[1]).all()


def test_without_a_key_there_is_none_to_derive():
    """So a model derives its keys in evaluation, too. The other arguments are checked all the same."""
    assert derive(None, "block", 3) is None and per_example(None, jnp.arange(3)) is None
    with pytest.raises(ValueError, match=r"^derive: path must not be empty"):
        derive(None)
    with pytest.raises(TypeError, match=r"^per_example: ids must be an integer array"):
        per_example(None, jnp.zeros(3))
