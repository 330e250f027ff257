"""Schedules of the drop rate: closures ``step -> rate`` in optax's convention, and rates by depth.

Optax supplies constant, linear, cosine and joined schedules; here is what it lacks. Pass a rate that a schedule
returned to :func:`jdrop.dropout` like any other: it may be traced, and changing it recompiles nothing.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from jdrop import _checks

Schedule = Callable[[Any], Array]
Convention = Literal["i/(n-1)", "i/n", "(i+1)/n"]


def early(rate: float, until: int) -> Schedule:
    """Early dropout: the rate while ``step < until``, then 0. It helps models that underfit.

    Args:
      rate: probability of dropping, from 0 to 1.
      until: number of steps with dropout, at least 0.

    Returns:
      A schedule: a step (an int or an integer array) to a float32 rate.

    Raises:
      ValueError: an argument is out of range.
      TypeError: the rate is no number, or the number of steps no int.

    References:
      Liu, Xu, Jin, Shen, Darrell (2023), Dropout Reduces Underfitting, ICML.

    Example:
      >>> from jdrop import schedules
      >>> [float(schedules.early(0.5, 100)(step)) for step in (0, 99, 100)]
      [0.5, 0.5, 0.0]
    """
    _checks.number("early", "rate", rate, 0, 1)
    until = _checks.count("early", "until", until, low=0)
    return lambda step: jnp.where(_before(step, until), jnp.float32(rate), jnp.float32(0))


def late(rate: float, start: int) -> Schedule:
    """Late dropout: 0 while ``step < start``, then the rate. It helps models that overfit late.

    Args:
      rate: probability of dropping, from 0 to 1.
      start: number of steps without dropout, at least 0.

    Returns:
      A schedule: a step (an int or an integer array) to a float32 rate.

    Raises:
      ValueError: an argument is out of range.
      TypeError: the rate is no number, or the number of steps no int.

    References:
      Liu, Xu, Jin, Shen, Darrell (2023), Dropout Reduces Underfitting, ICML.

    Example:
      >>> from jdrop import schedules
      >>> [float(schedules.late(0.5, 100)(step)) for step in (0, 99, 100)]
      [0.0, 0.0, 0.5]
    """
    _checks.number("late", "rate", rate, 0, 1)
    start = _checks.count("late", "start", start, low=0)
    return lambda step: jnp.where(_before(step, start), jnp.float32(0), jnp.float32(rate))


def _before(step: Any, limit: int) -> Array:
    """``step < limit``, also for a limit that no step of its dtype reaches."""
    step = jnp.asarray(step)
    if jnp.issubdtype(step.dtype, jnp.integer) and limit > jnp.iinfo(step.dtype).max:
        return jnp.ones_like(step, bool)
    return step < limit


def curriculum(rate: float, gamma: float) -> Schedule:
    """Curriculum dropout: ``rate * (1 - exp(-gamma * step))``, from 0 at the first step up to the rate.

    Args:
      rate: probability of dropping in the limit, from 0 to 1.
      gamma: how fast the limit is neared, per step, at least 0 and finite. The paper takes 10 / (number of steps).

    Returns:
      A schedule: a step (a number or an array) to a float32 rate.

    Raises:
      ValueError: an argument is out of range.
      TypeError: an argument is no number.

    References:
      Morerio, Cavazza, Volpi, Vidal, Murino (2017), Curriculum Dropout, ICCV.

    Example:
      >>> from jdrop import schedules
      >>> [round(float(schedules.curriculum(0.5, 0.01)(step)), 3) for step in (0, 100, 1000)]
      [0.0, 0.316, 0.5]
    """
    _checks.number("curriculum", "rate", rate, 0, 1)
    _checks.number("curriculum", "gamma", gamma, 0, math.inf)
    return lambda step: -jnp.float32(rate) * jnp.expm1(-jnp.float32(gamma) * jnp.asarray(step, jnp.float32))


def depth_rates(rate: float, num_layers: int, convention: Convention) -> tuple[float, ...]:
    """Return a rate for each layer, growing linearly with depth, as stochastic depth wants it.

    The conventions in use disagree on where the line starts and ends; ``i`` runs from 0 to ``n - 1``:

    - ``"i/(n-1)"``: from 0 at the first layer to the rate at the last (timm). One layer alone gets 0.
    - ``"i/n"``: from 0 at the first layer to just below the rate (AXLearn).
    - ``"(i+1)/n"``: above 0 at the first layer, the rate at the last (the paper, NeMo).

    Args:
      rate: probability of dropping at the end of the line, from 0 to 1.
      num_layers: ``n``, at least 1.
      convention: one of the above.

    Returns:
      ``num_layers`` floats; ``jnp.asarray`` of them can be scanned over.

    Raises:
      ValueError: an argument is out of range or the convention is unknown.
      TypeError: an argument is no number.

    References:
      Huang, Sun, Liu, Sedra, Weinberger (2016), Deep Networks with Stochastic Depth, ECCV, equation 4.

    Example:
      >>> from jdrop import schedules
      >>> schedules.depth_rates(0.25, 3, "i/(n-1)")
      (0.0, 0.125, 0.25)
    """
    rate = _checks.number("depth_rates", "rate", rate, 0, 1)
    n = _checks.count("depth_rates", "num_layers", num_layers)
    lines = {"i/(n-1)": (0, max(n - 1, 1)), "i/n": (0, n), "(i+1)/n": (1, n)}
    _checks.choice("depth_rates", "convention", convention, tuple(lines))
    first, last = lines[convention]
    return tuple(rate * ((i + first) / last) for i in range(n))
