"""Dropout for recurrent networks: one mask for all steps, and states that stay."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop import _checks, _loops, _member, decisions
from jdrop._linear import Draw, Rule
from jdrop._shards import Shard
from jdrop.decisions import Generator, RateLike


def locked_dropout(
    key: Array | None,
    x: Array,
    rate: RateLike,
    *,
    train: bool,
    time_axis: int | Sequence[int],
    generator: Generator = "fast",
    shard: Shard = None,
) -> Array:
    """Drop elements by one mask for all time steps (variational dropout).

    ``y[b, t, f] = x[b, t, f] * m[b, f] / (1 - rate)`` with ``m[b, f] ~ Bernoulli(1 - rate)``. Inside a scan over time,
    apply :func:`jdrop.dropout` at each step with ``jax.random.clone(key)`` instead: the mask is the same at each.

    Args:
      key: one PRNG key, used once. ``None`` is fine if ``train`` is false or ``rate`` is the number 0.
      x: floating or complex array with a time axis, such as ``[batch, time, feature]``.
      rate: probability of dropping, or an array of it that broadcasts to the mask, with 1 on ``time_axis``, as for
        :func:`jdrop.dropout`.
      train: ``True`` draws a mask; ``False`` returns x itself.
      time_axis: the axis of time steps.
      generator: as for :func:`jdrop.dropout`.
      shard: as for :func:`jdrop.dropout`.

    Returns:
      An array of the shape and dtype of x.

    Raises:
      ValueError: a rate, an axis or an option is out of range, or ``key`` is a batch of keys.
      TypeError: an argument is of the wrong type, ``key`` is missing, or ``train`` is traced.

    References:
      Gal, Ghahramani (2016), A Theoretically Grounded Application of Dropout in Recurrent Neural Networks, NeurIPS.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> y = jdrop.locked_dropout(jax.random.key(0), jnp.ones([4, 10, 8]), 0.5, train=True, time_axis=1)
      >>> bool((y == y[:, :1]).all())
      True
    """
    name = "locked_dropout"
    _checks.array(name, "x", x)
    shared = _checks.axes(name, "time_axis", time_axis, x.ndim)
    options: Any = {"shared_axes": shared, "generator": generator, "shard": shard}
    return _member.scaled(name, key, x, rate, train=train, **options)


def zoneout(
    key: Array | None,
    new: Array,
    rate: RateLike,
    old: Array,
    *,
    train: bool,
    generator: Generator = "fast",
    shard: Shard = None,
) -> Array:
    """Keep the old value of each state unit with probability ``rate``.

    ``y[i] = new[i] if m[i] else old[i]`` with ``m[i] ~ Bernoulli(1 - rate)`` in training, and the expectation
    ``y = (1 - rate) * new + rate * old`` in evaluation. Use a key of its own for each time step and each state.

    Args:
      key: one PRNG key, used once. ``None`` is fine if ``train`` is false or ``rate`` is the number 0.
      new: floating or complex array of any shape: the state after a step.
      rate: probability of keeping the old value, or an array of it that broadcasts to the state, as for
        :func:`jdrop.dropout`. The probability really used stands in the expectation too.
      old: array of the shape and dtype of ``new``: the state before the step.
      train: ``True`` draws a mask; ``False`` gives the expectation.
      generator: as for :func:`jdrop.dropout`.
      shard: as for :func:`jdrop.dropout`, of the state.

    Returns:
      An array of the shape and dtype of ``new``.

    Raises:
      ValueError: a rate or an option is out of range, or ``old`` differs from ``new`` in shape or dtype.
      TypeError: an argument is of the wrong type, ``key`` is missing, or ``train`` is traced.

    References:
      Krueger, Maharaj, Kramar, Pezeshki, Ballas, Ke, Goyal, Bengio, Courville, Pal (2017), Zoneout: Regularizing RNNs
      by Randomly Preserving Hidden Activations, ICLR.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> new, old = jnp.ones([2, 8]), jnp.zeros([2, 8])
      >>> jdrop.zoneout(None, new, 0.25, old, train=False)[0, 0].item()
      0.75
    """
    name = "zoneout"
    _checks.array(name, "new", new)
    _checks.array(name, "old", old)
    after, before = jnp.asarray(new), jnp.asarray(old)
    if (before.shape, before.dtype) != (after.shape, after.dtype):
        rule = f"must be {_checks.describe(after)}, as new is"
        raise ValueError(_checks.text(name, "old", rule, _checks.describe(before), "pass the state before"))
    call = _member.check(name, key, new.shape, rate, train=train, generator=generator, shard=shard)
    if decisions.is_zero(call.rate):
        return new
    if call.train:
        return call.apply(_ZONEOUT, after, before)
    return _mix(after, before, decisions.expectation(call.rate, generator, _loops.real_dtype(after)))


@jax.jit
def _mix(new: Array, old: Array, keep: Array) -> Array:
    """Return ``keep * new + (1 - keep) * old``, rounded once, and compiled so that it is the same in a jit or not."""
    terms = []
    for x, share in ((new, keep), (old, 1 - keep)):
        wide = x if jnp.iscomplexobj(x) else x.astype(share.dtype)
        terms.append(_loops.multiply(wide, share, where=share != 0))
    return (terms[0] + terms[1]).astype(new.dtype)


def _choose(draw: Draw, new: Array, old: Array) -> Array:
    nan = jnp.isnan(draw.probability(np.float32))
    return jnp.where(nan, jnp.full((), jnp.nan, new.dtype), _loops.choose(draw.kept(), new, old, draw.words))


_ZONEOUT = Rule(_choose, (_member.KEPT, _member.DROPPED))
