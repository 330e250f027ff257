"""Schedules of the drop rate: closures ``step -> rate`` as in Optax, and rates by depth.

Optax provides constant, linear, cosine, and joined schedules; this module adds those that Optax lacks. Pass the rate
from a schedule to :func:`jdrop.dropout` like any other rate. It may be traced, so changing it does not recompile.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop._checks import as_count, as_number, check_choice

Schedule = Callable[[Any], Array]
Convention = Literal["i/(n-1)", "i/n", "(i+1)/n"]


def early(rate: float, until: int) -> Schedule:
    """Return the early dropout schedule: ``rate`` while ``step < until``, then 0. It helps models that underfit.

    Args:
      rate: drop rate, from 0 to 1.
      until: number of steps with dropout, at least 0.

    Returns:
      A schedule, from a step (an int or an integer array) to a float32 rate.

    Raises:
      ValueError: an argument is out of range.
      TypeError: ``rate`` is not a number, or the number of steps is not an int.

    References:
      Liu, Xu, Jin, Shen, Darrell (2023), Dropout Reduces Underfitting, ICML.

    Example:
      >>> from jdrop import schedules
      >>> [float(schedules.early(0.5, 100)(step)) for step in (0, 99, 100)]
      [0.5, 0.5, 0.0]
    """
    as_number("early", "rate", rate, 0, 1)
    until = as_count("early", "until", until, low=0)
    return lambda step: jnp.where(_before(step, until), jnp.float32(rate), jnp.float32(0))


def late(rate: float, start: int) -> Schedule:
    """Return the late dropout schedule: 0 while ``step < start``, then ``rate``. It helps models that overfit late.

    Args:
      rate: drop rate, from 0 to 1.
      start: number of steps without dropout, at least 0.

    Returns:
      A schedule, from a step (an int or an integer array) to a float32 rate.

    Raises:
      ValueError: an argument is out of range.
      TypeError: ``rate`` is not a number, or the number of steps is not an int.

    References:
      Liu, Xu, Jin, Shen, Darrell (2023), Dropout Reduces Underfitting, ICML.

    Example:
      >>> from jdrop import schedules
      >>> [float(schedules.late(0.5, 100)(step)) for step in (0, 99, 100)]
      [0.0, 0.0, 0.5]
    """
    as_number("late", "rate", rate, 0, 1)
    start = as_count("late", "start", start, low=0)
    return lambda step: jnp.where(_before(step, start), jnp.float32(0), jnp.float32(rate))


def _before(step: Any, limit: int) -> Array:
    """Return ``step < limit``, even if the limit exceeds the range of the dtype of the step."""
    step = jnp.asarray(step)
    if jnp.issubdtype(step.dtype, jnp.integer) and limit > jnp.iinfo(step.dtype).max:
        return jnp.ones_like(step, bool)
    return step < np.asarray(limit).astype(step.dtype)


def curriculum(rate: float, gamma: float) -> Schedule:
    """Return the curriculum dropout schedule: ``rate * (1 - exp(-gamma * step))``, from 0 up to ``rate``.

    Args:
      rate: drop rate in the limit, from 0 to 1.
      gamma: rate of convergence to the limit, per step; finite and at least 0. The paper uses 10 / (number of steps).

    Returns:
      A schedule, from a step (a number or an array) to a float32 rate.

    Raises:
      ValueError: an argument is out of range.
      TypeError: an argument is not a number.

    References:
      Morerio, Cavazza, Volpi, Vidal, Murino (2017), Curriculum Dropout, ICCV.

    Example:
      >>> from jdrop import schedules
      >>> [round(float(schedules.curriculum(0.5, 0.01)(step)), 3) for step in (0, 100, 1000)]
      [0.0, 0.316, 0.5]
    """
    as_number("curriculum", "rate", rate, 0, 1)
    as_number("curriculum", "gamma", gamma, 0, math.inf)
    return lambda step: -jnp.float32(rate) * jnp.expm1(-jnp.float32(gamma) * jnp.asarray(step, jnp.float32))


def plateau_decay(rate: float, plateau: int, decay: int) -> Schedule:
    """Return the schedule of layer dropout: ``rate`` on a plateau, a linear decay to 0, and recovery without dropout.

    Args:
      rate: drop rate on the plateau, from 0 to 1.
      plateau: number of steps at ``rate``, at least 0.
      decay: number of steps of the decay, at least 0. With 0, the plateau ends at once, as in :func:`early`.

    Returns:
      A schedule, from a step (an int or an integer array) to a float32 rate. Steps after plateau and decay recover: the
      network trains with all of its layers, as it will be used.

    Raises:
      ValueError: an argument is out of range.
      TypeError: ``rate`` is not a number, or a number of steps is not an int.

    References:
      Elhoushi, Pretko, Dey, Zhang, Gray, Gosal, Mahmoud, Bergsma, Hestness (2026), Don't Drop Dropout: Optimizing Layer
      Sparsity for Efficient LLM Training and Inference, ICML.

    Example:
      >>> from jdrop import schedules
      >>> [float(schedules.plateau_decay(0.5, 100, 50)(step)) for step in (0, 100, 125, 150, 200)]
      [0.5, 0.5, 0.25, 0.0, 0.0]
    """
    as_number("plateau_decay", "rate", rate, 0, 1)
    plateau = as_count("plateau_decay", "plateau", plateau, low=0)
    decay = as_count("plateau_decay", "decay", decay, low=0)

    def schedule(step: Any) -> Array:
        step = jnp.asarray(step)
        if not jnp.issubdtype(step.dtype, jnp.integer):
            step = step.astype(jnp.float32)
        elif plateau > jnp.iinfo(step.dtype).max:
            return jnp.full_like(step, rate, jnp.float32)
        first = np.asarray(plateau).astype(step.dtype)
        fallen = (jnp.maximum(step, first) - first).astype(jnp.float32) / np.float32(max(decay, 1))
        return jnp.where(_before(step, plateau + decay), jnp.float32(rate) * jnp.maximum(1 - fallen, 0), jnp.float32(0))

    return schedule


def depth_rates(rate: float, num_layers: int, convention: Convention) -> tuple[float, ...]:
    """Return one drop rate per layer, increasing linearly with depth, for stochastic depth.

    Libraries use different first and last rates. With ``i`` from 0 to ``n - 1``:

    - ``"i/(n-1)"``: from 0 in the first layer to ``rate`` in the last (timm). A single layer gets 0.
    - ``"i/n"``: from 0 in the first layer to just below ``rate`` in the last (AXLearn).
    - ``"(i+1)/n"``: from above 0 in the first layer to ``rate`` in the last (the paper, NeMo).

    Args:
      rate: largest drop rate, from 0 to 1.
      num_layers: ``n``, at least 1.
      convention: one of the above.

    Returns:
      A tuple of ``num_layers`` floats. Use ``jnp.asarray`` to scan over them.

    Raises:
      ValueError: an argument is out of range, or the convention is unknown.
      TypeError: an argument is not a number.

    References:
      Huang, Sun, Liu, Sedra, Weinberger (2016), Deep Networks with Stochastic Depth, ECCV, equation 4.

    Example:
      >>> from jdrop import schedules
      >>> schedules.depth_rates(0.25, 3, "i/(n-1)")
      (0.0, 0.125, 0.25)
    """
    rate = as_number("depth_rates", "rate", rate, 0, 1)
    n = as_count("depth_rates", "num_layers", num_layers)
    lines = {"i/(n-1)": (0, max(n - 1, 1)), "i/n": (0, n), "(i+1)/n": (1, n)}
    check_choice("depth_rates", "convention", convention, tuple(lines))
    first, last = lines[convention]
    return tuple(rate * ((i + first) / last) for i in range(n))
