"""The argument errors of attention, and the choice of implementation."""

import attention_suite
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import KEY, data

import jdrop
from jdrop.attention import _registry
from jdrop.attention._registry import IMPLEMENTATIONS, Implementation

implementation = attention_suite.implementation


# ---------------------------------------------------------------------------------- errors


def attend(key, q, k, v, rate=0.5, *, train=True, **options):
    return jdrop.dot_product_attention(key, q, k, v, rate, train=train, **options)


Q, K = jnp.ones([2, 8, 4, 16]), jnp.ones([2, 10, 2, 16])
CHOICE = 'implementation must be "reference" for '


def call(q=Q, k=K, v=None, rate=0.5, key=KEY, **options):
    return lambda: attend(key, q, k, k if v is None else v, rate, **options)


@pytest.mark.parametrize(
    ("f", "error", "text"),
    [
        (call(q=[1.0]), TypeError, "query must be an array, got [1.0]; convert it with jnp.asarray"),
        (call(q=KEY), TypeError, "query must be float16, bfloat16, float32 or float64, got key<fry>[]; pass key first"),
        (call(k=K.astype(int)), TypeError, "key must be float16, bfloat16, float32 or float64, got int32[2,10,2,16];"),
        (call(v=K.astype(complex)), TypeError, "value must be float16, bfloat16, float32 or float64, got complex64["),
        (
            call(q=Q[0, 0]),
            ValueError,
            "query must be [batch, length, heads, width] or [length, heads, width], got float32[4,16]; reshape it",
        ),
        (call(k=K[None]), ValueError, "key must be [batch, length, heads, width] or [length, heads, width], got"),
        (
            call(v=K.astype("bfloat16")),
            TypeError,
            "query, key and value must have one dtype, got float32, float32 and bfloat16; convert them",
        ),
        (call(q=Q.astype("bfloat16")), TypeError, "query, key and value must have one dtype, got bfloat16, float32"),
        (
            call(v=K[..., :8]),
            ValueError,
            "value must have the shape of key, (2, 10, 2, 16), got (2, 10, 2, 8); give each key a value of the same",
        ),
        (
            call(k=K[:1]),
            ValueError,
            "key must have batch and width of query, (2, 8, 4, 16), got (1, 10, 2, 16); give them the same batch and width",
        ),
        (call(k=K[..., :8]), ValueError, "key must have batch and width of query, (2, 8, 4, 16), got (2, 10, 2, 8);"),
        (call(q=Q[0]), ValueError, "key must have batch and width of query, (8, 4, 16), got (2, 10, 2, 16);"),
        (
            call(q=Q[:, :, :3]),
            ValueError,
            "key must have a number of heads that divides query's, got 2 for 3; group query heads evenly",
        ),
        (call(k=K[:, :, :0]), ValueError, "key must have a number of heads that divides query's, got 0 for 4;"),
        (
            call(bias=jnp.ones([10, 8])),
            ValueError,
            "bias must broadcast to [batch, heads, queries, keys] = (2, 4, 8, 10), got shape (10, 8); give it these",
        ),
        (call(bias=1.0), TypeError, "bias must be an array, got 1.0; convert it with jnp.asarray"),
        (call(bias=jnp.ones(10, int)), TypeError, "bias must be floating, got int32[10]; convert it"),
        (
            call(mask=jnp.ones([1, 2, 4, 8, 10], bool)),
            ValueError,
            "mask must broadcast to [batch, heads, queries, keys] = (2, 4, 8, 10), got shape (1, 2, 4, 8, 10);",
        ),
        (call(mask=jnp.ones(10)), TypeError, "mask must be bool, got float32[10]; pass x != 0"),
        (call(query_seq_lengths=jnp.ones(2)), TypeError, "query_seq_lengths must be an integer array, got float32[2];"),
        (call(query_seq_lengths=[1, 2]), TypeError, "query_seq_lengths must be an integer array, got [1, 2]; convert"),
        (
            call(key_value_seq_lengths=jnp.ones(3, int)),
            ValueError,
            "key_value_seq_lengths must have shape (2,), got (3,); pass one per example",
        ),
        (call(key_value_seq_lengths=KEY), TypeError, "key_value_seq_lengths must be an integer array, got key<fry>[]"),
        (call(is_causal=1), TypeError, "is_causal must be a bool, got 1; pass is_causal=True or False"),
        (
            lambda: jax.jit(lambda c: call(is_causal=c)())(True),
            TypeError,
            "is_causal must be static, got a traced value; list is_causal in static_argnames",
        ),
        (call(local_window_size=-1), ValueError, "local_window_size must be at least 0, got -1; pass a larger int"),
        (call(local_window_size=(3, -2)), ValueError, "local_window_size must be at least 0, got -2;"),
        (call(local_window_size=2.0), TypeError, "local_window_size must be an integer, got 2.0; pass a Python int"),
        (call(local_window_size=(1, 2, 3)), TypeError, "local_window_size must be an integer, got (1, 2, 3);"),
        (call(scale="1"), TypeError, "scale must be a number, got '1'; pass a Python float"),
        (call(scale=True), TypeError, "scale must be a number, got True; pass a Python float"),
        (call(scale=jnp.ones(2)), ValueError, "scale must broadcast to shape (), got shape (2,);"),
        (call(scale=jnp.int32(2)), TypeError, "scale must be float16, bfloat16, float32 or float64, got int32[]"),
        (call(scale=np.nan), ValueError, "scale must be finite, got nan; pass a number within the limits"),
        (call(scale=-np.inf), ValueError, "scale must be finite, got -inf; pass a number within the limits"),
        (
            call(implementation="flash"),
            ValueError,
            "implementation must be 'reference' or 'chunked' or 'mosaic_tpu' or 'mosaic_gpu', got 'flash'; pick one of them",
        ),
        (call(key=None), TypeError, "prng_key must be a PRNG key when something is dropped, got None; pass a key, or"),
        (call(key=jax.random.split(KEY)), ValueError, "prng_key must be one key, got a batch of shape (2,); use jax.v"),
        (call(key=Q), TypeError, "prng_key must be a PRNG key, got float32[2,8,4,16]; make one with jax.random.key"),
        (call(key=K, train=False), TypeError, "prng_key must be a PRNG key, got float32[2,10,2,16]"),
        (call(rate=1.5), ValueError, "rate must lie in [0, 1], got 1.5; pass the probability of dropping"),
        (call(rate=jnp.ones([8])), ValueError, "rate must broadcast to the mask's shape (2, 4, 8, 10), got shape (8,)"),
        (
            call(rate=np.ones([4, 1, 1]), shared_axes=1),
            ValueError,
            "rate must broadcast to the mask's shape (2, 1, 8, 10), got shape (4, 1, 1); give it these sizes or 1",
        ),
        (call(shared_axes=4), ValueError, "shared_axes must be axes of an array with 4 axes, got 4; use axes from -4"),
        (
            call(generator="torch"),
            ValueError,
            "generator must be 'fast' or 'packed' or 'jax', got 'torch'; pick one of them",
        ),
        (call(train=1), TypeError, "train must be a bool, got 1; pass train=True or False"),
        (
            call(rate=np.full([10], 0.5), implementation="chunked"),
            NotImplementedError,
            CHOICE + "a rate that varies along the keys, got 'chunked'; pass \"reference\"",
        ),
        (
            call(key=jax.random.key(0, impl="rbg"), generator="jax", implementation="chunked"),
            NotImplementedError,
            CHOICE + "a PRNG key whose bits lack random access, got 'chunked'; pass \"reference\"",
        ),
        (
            call(q=Q[:, :0], implementation="chunked", train=False),
            NotImplementedError,
            CHOICE + "sizes that are 0 or symbolic, got 'chunked'; pass \"reference\"",
        ),
    ],
)
def test_errors(f, error, text):
    with pytest.raises(error) as raised:
        f()
    assert str(raised.value).startswith("dot_product_attention: " + text)


def test_the_first_five_arguments_are_positional_only():
    with pytest.raises(TypeError, match="positional-only"):
        jdrop.dot_product_attention(KEY, Q, key=K, value=K, rate=0.5, train=True)
    with pytest.raises(TypeError, match="train"):
        jdrop.dot_product_attention(KEY, Q, K, K, 0.5)


# ---------------------------------------------------------------------------------- which implementation


def constant(value):
    """Return an implementation of all calls, with a constant that shows in lowered text."""
    return Implementation(lambda *arguments: None, lambda spec, query, *operands: query * value)


CONSTANTS = {"reference": 1111.5, "chunked": 2222.5, "fake": 3333.5}


@pytest.fixture
def constants(monkeypatch):
    """Make each implementation return the query times its constant; refusals stay as they are."""
    for name in ("reference", "chunked"):
        monkeypatch.setitem(
            IMPLEMENTATIONS, name, IMPLEMENTATIONS[name]._replace(attend=constant(CONSTANTS[name]).attend)
        )
    monkeypatch.setitem(IMPLEMENTATIONS, "fake", constant(CONSTANTS["fake"]))


def lowered(platform, queries=256, keys=256, key=KEY, rate=0.5, train=True, **options):
    q, k, v, _ = data(batch=1, queries=queries, keys=keys, heads=1, key_heads=1, width=2)
    f = lambda q, k, v: attend(key, q, k, v, rate, train=train, **options)
    return jax.jit(f).trace(q, k, v).lower(lowering_platforms=(platform,)).as_text()


def chosen(*sizes, platform="cpu", **options):
    """Return the names of the implementations in a program."""
    text = lowered(platform, *sizes, **options)
    return [name for name, x in CONSTANTS.items() if f"{x:e}" in text]


def test_the_choice_depends_on_the_number_of_scores(constants):
    assert chosen(256, 256) == ["chunked"] and chosen(256, 255) == ["reference"]
    assert chosen(1, 65536) == ["chunked"] and chosen(1, 65535) == ["reference"]
    assert chosen(256, 256, key=None, train=False) == ["chunked"]
    assert chosen(256, 256, platform="cuda") == ["chunked"] and chosen(256, 255, platform="cuda") == ["reference"]


def test_a_named_implementation_is_used_at_any_size(constants):
    for name in CONSTANTS:
        assert chosen(256, 256, implementation=name) == chosen(2, 2, implementation=name) == [name]
        assert chosen(2, 2, implementation=name, platform="tpu") == [name]


def test_the_choice_serves_every_call(constants):
    rbg = jax.random.key(0, impl="rbg")
    for options, name in (
        ({"rate": np.full([256], 0.5)}, "reference"),
        ({"rate": np.full([256, 1], 0.5)}, "chunked"),
        ({"rate": np.zeros([256])}, "chunked"),
        ({"key": rbg}, "chunked"),
        ({"key": rbg, "generator": "jax"}, "reference"),
        ({"key": rbg, "generator": "jax", "train": False}, "chunked"),
        ({"generator": "jax"}, "chunked"),
    ):
        assert chosen(**options) == [name], options


def test_a_platform_may_have_its_own_order(constants, monkeypatch):
    """The choice follows the platform that a program is lowered for."""
    monkeypatch.setitem(_registry.PREFERENCES, "cuda", (("fake", 2**10), ("reference", 0)))
    assert chosen(32, 32, platform="cuda") == ["fake"] and chosen(32, 31, platform="cuda") == ["reference"]
    assert chosen(32, 32) == ["reference"] and chosen(32, 32, platform="tpu") == ["reference"]
    assert chosen(256, 256, platform="cuda") == ["fake"] and chosen(256, 256) == ["chunked"]
    assert chosen(256, 256, implementation="reference", platform="cuda") == ["reference"]


def test_an_implementation_that_refuses_is_skipped_or_if_named_gives_its_reason(constants, monkeypatch):
    refusing = Implementation(
        lambda arguments, query, key, value, over_scores: "an odd width" if query.shape[-1] % 2 else None,
        IMPLEMENTATIONS["fake"].attend,
    )
    monkeypatch.setitem(IMPLEMENTATIONS, "fake", refusing)
    monkeypatch.setitem(_registry.PREFERENCES, "cuda", (("fake", 0), ("chunked", 2**16), ("reference", 0)))
    q, k, v, _ = data(batch=1, queries=256, keys=256, heads=1, key_heads=1, width=3)
    f = jax.jit(lambda q, k, v: attend(KEY, q, k, v))
    text = f.trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert f"{CONSTANTS['chunked']:e}" in text and f"{CONSTANTS['fake']:e}" not in text
    assert chosen(256, 256, platform="cuda") == ["fake"]
    reason = 'implementation must be "reference" for an odd width, got \'fake\'; pass "reference"'
    with pytest.raises(NotImplementedError, match=f"^dot_product_attention: {reason}$"):
        attend(KEY, q, k, v, implementation="fake")


def test_gradients_go_to_the_implementation_of_the_platform(monkeypatch):
    """With real implementations: another order gives the same values and gradients."""
    monkeypatch.setitem(_registry.PREFERENCES, "cpu", (("chunked", 0),))
    arrays = data(queries=5)
    f = lambda q, k, v, b: jdrop.dot_product_attention(KEY, q, k, v, 0.5, train=True, bias=b)
    results = attention_suite.quick(lambda *x: attention_suite.gradients(f, *x))(*arrays)
    attention_suite.close(results, attention_suite.truth(KEY, *arrays))
    assert "platform_index" in str(jax.make_jaxpr(lambda *x: f(*x, None))(*arrays[:3]))


def test_every_order_ends_with_an_implementation_of_all_calls():
    for order in (_registry.DEFAULT_PREFERENCE, *_registry.PREFERENCES.values()):
        assert order[-1] == ("reference", 0) and {name for name, _ in order} <= set(IMPLEMENTATIONS)
    assert _registry.IMPLEMENTATIONS["reference"].refusal(None) is None
