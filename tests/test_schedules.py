"""schedules: values, tracing, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdrop import dropout, schedules


def test_early_and_late_switch_at_the_step():
    steps = jnp.arange(5)
    np.testing.assert_array_equal(schedules.early(0.5, 3)(steps), np.float32([0.5, 0.5, 0.5, 0, 0]))
    np.testing.assert_array_equal(schedules.late(0.5, 3)(steps), np.float32([0, 0, 0, 0.5, 0.5]))


def test_plateau_decay_holds_falls_linearly_and_recovers():
    schedule = schedules.plateau_decay(0.4, 10, 4)
    rates = np.float32([0.4, 0.4, 0.4, 0.3, 0.2, 0.1, 0, 0])
    for dtype in ("int32", "uint32", "float32"):
        steps = jnp.array([0, 9, 10, 11, 12, 13, 14, 10**9], dtype)
        np.testing.assert_allclose(schedule(steps), rates, atol=1e-7)
    np.testing.assert_array_equal(schedules.plateau_decay(0.4, 10, 0)(jnp.array([9, 10])), np.float32([0.4, 0]))
    long = schedules.plateau_decay(0.5, 2**28, 4)  # float32 cannot tell these steps apart
    np.testing.assert_allclose(long(jnp.array([2**28 - 1, 2**28 + 1, 2**28 + 3])), [0.5, 0.375, 0.125])
    assert schedules.plateau_decay(0.5, 2**40, 4)(jnp.uint32(7)) == 0.5
    assert schedules.plateau_decay(0.5, 2, 4)(3) == 0.375


def test_curriculum_is_the_formula():
    steps = np.array([0, 1, 10, 1000, 10**7])
    rates = schedules.curriculum(0.4, 0.01)(steps)
    np.testing.assert_allclose(rates, 0.4 * -np.expm1(-0.01 * steps), rtol=1e-6)
    assert rates[0] == 0.0 and rates.dtype == jnp.float32
    tiny = schedules.curriculum(0.4, 1e-9)(1)  # no cancellation
    np.testing.assert_allclose(tiny, 0.4e-9, rtol=1e-5)


@pytest.mark.parametrize(
    "schedule", [schedules.early(0.5, 3), schedules.late(0.5, 3), schedules.curriculum(0.5, 0.1), schedules.plateau_decay(0.5, 2, 4), optax.linear_schedule(0, 0.5, 5)]
)  # fmt: skip
def test_a_traced_step_drives_dropout_without_recompiling(schedule):
    traces = 0

    @jax.jit
    def f(step):
        nonlocal traces
        traces += 1
        rate = schedule(step)
        assert rate.dtype == jnp.float32 and rate.shape == ()
        return rate, dropout(jax.random.key(0), jnp.ones((4, 256)), rate, train=True)

    for step in (0, 2, 3, 100):
        rate, y = f(step)
        expected = dropout(jax.random.key(0), jnp.ones((4, 256)), jnp.float32(schedule(step)), train=True)
        np.testing.assert_allclose(y, expected, rtol=1e-6)
        np.testing.assert_allclose(rate, schedule(step), rtol=1e-6)
    assert traces == 1


@pytest.mark.parametrize(
    ("convention", "rates"),
    [("i/(n-1)", (0, 0.1, 0.2, 0.3)), ("i/n", (0, 0.075, 0.15, 0.225)), ("(i+1)/n", (0.075, 0.15, 0.225, 0.3))],
)
def test_depth_rates(convention, rates):
    result = schedules.depth_rates(0.3, 4, convention)
    assert isinstance(result, tuple) and all(type(r) is float for r in result)
    np.testing.assert_allclose(result, rates, rtol=1e-12)
    one = schedules.depth_rates(0.3, 1, convention)
    assert one == ((0.3,) if convention == "(i+1)/n" else (0.0,))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: schedules.early(1.5, 3), ValueError, r"early: rate must lie in \[0, 1\], got 1.5"),
        (lambda: schedules.early(float("nan"), 3), ValueError, r"early: rate must lie in \[0, 1\], got nan"),
        (lambda: schedules.early(0.5, -1), ValueError, "early: until must be at least 0, got -1"),
        (lambda: schedules.late("a", 1), TypeError, "late: rate must be a number, got 'a'"),
        (lambda: schedules.early(0.5, 3.5), TypeError, "early: until must be an integer, got 3.5"),
        (lambda: schedules.plateau_decay(1.5, 3, 3), ValueError, r"plateau_decay: rate must lie in \[0, 1\]"),
        (lambda: schedules.plateau_decay(0.5, -1, 3), ValueError, "plateau_decay: plateau must be at least 0, got -1"),
        (lambda: schedules.plateau_decay(0.5, 3, 0.5), TypeError, "plateau_decay: decay must be an integer, got 0.5"),
        (lambda: schedules.late(0.5, -1), ValueError, "late: start must be at least 0"),
        (lambda: schedules.curriculum(0.5, -0.1), ValueError, "curriculum: gamma must be finite and at least 0"),
        (lambda: schedules.curriculum(0.5, float("inf")), ValueError, "curriculum: gamma must be finite"),
        (lambda: schedules.curriculum(0.5, 10**400), ValueError, "curriculum: gamma must be finite"),
        (lambda: schedules.curriculum(0.5, True), TypeError, "curriculum: gamma must be a number, got True"),
        (lambda: schedules.depth_rates(0.5, 0, "i/n"), ValueError, "depth_rates: num_layers must be at least 1"),
        (lambda: schedules.depth_rates(0.5, 2.0, "i/n"), TypeError, "depth_rates: num_layers must be an integer"),
        (lambda: schedules.depth_rates(0.5, 2, "linear"), ValueError, r"depth_rates: convention must be 'i/\(n-1\)'"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
@pytest.mark.parametrize(
    ("name", "f"),
    [
        ("early", lambda r: schedules.early(r, 3)),
        ("late", lambda r: schedules.late(r, 3)),
        ("curriculum", lambda r: schedules.curriculum(r, 0.1)),
        ("depth_rates", lambda r: schedules.depth_rates(r, 3, "i/n")),
    ],
)
def test_rates_out_of_range(name, f, rate):
    with pytest.raises(ValueError, match=rf"{name}: rate must lie in \[0, 1\], got {rate}"):
        f(rate)


@pytest.mark.parametrize("limit", [10**10, np.int32(10), np.uint8(10)])
@pytest.mark.parametrize("dtype", ["int32", "uint32", "int8"])
def test_limits_and_steps_of_other_types(limit, dtype):
    steps = jnp.array([0, 9, 10, 127], dtype)
    before = np.array([0, 9, 10, 127]) < int(limit)
    np.testing.assert_array_equal(schedules.early(0.5, limit)(steps), 0.5 * before)
    np.testing.assert_array_equal(schedules.late(0.5, limit)(steps), 0.5 * ~before)


@pytest.mark.parametrize("convention", ["i/(n-1)", "(i+1)/n"])
def test_the_last_layer_has_the_rate_itself(convention):
    for rate in (0.1, 0.3, 0.7, np.float16(0.3)):
        for layers in (2, 3, 4, 7, 49):
            rates = schedules.depth_rates(rate, layers, convention)
            assert rates[-1] == max(rates) == rate
            assert all(type(r) is float for r in rates)


@pytest.mark.parametrize("dtype", ["uint32", "int32", "int8", "float32"])
def test_limits_from_2_to_the_31_on(dtype):
    for limit in (2**31, 2**32 - 1, 2**40):
        assert float(schedules.early(0.5, limit)(jnp.asarray(5, dtype))) == 0.5
        assert float(schedules.late(0.5, limit)(jnp.asarray(5, dtype))) == 0
    assert float(schedules.early(0.5, 2**31)(jnp.uint32(2**31))) == 0
