"""Zoneout: randomly preserve units of a recurrent state."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop._bits import expected_keep
from jdrop._checks import check_array, is_zero
from jdrop._errors import describe
from jdrop._ops import SELECT, SELECT_DROPPED
from jdrop._platform.generic import multiply
from jdrop._prepare import check_arguments
from jdrop._primitive import MaskedOp, MaskView, masked_op
from jdrop._sharding import check_sharded_as, explicit_sharding
from jdrop._types import Generator, RateLike, Shard, real_dtype


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

    In training, ``y[i] = new[i] if m[i] else old[i]`` with ``m[i] ~ Bernoulli(1 - rate)``; in evaluation, the
    expectation ``y = (1 - rate) * new + rate * old``. Use a separate key for each time step and each state.

    Args:
      key: one PRNG key, used once; may be ``None`` if ``train`` is false or ``rate`` is a Python or NumPy 0.
      new: floating or complex array of any shape: the state after a step.
      rate: probability of keeping the old value, or an array of probabilities that broadcasts to the state, as in
        :func:`jdrop.dropout`. The expectation uses the exact keep probability as well.
      old: array with the shape and dtype of ``new``: the state before the step.
      train: ``True`` draws a mask; ``False`` returns the expectation.
      generator: as in :func:`jdrop.dropout`.
      shard: as in :func:`jdrop.dropout`; the PartitionSpec of the state.

    Returns:
      An array with the shape and dtype of ``new``.

    Raises:
      ValueError: a rate or an option is out of range, or ``old`` differs from ``new`` in shape or dtype.
      TypeError: an argument has the wrong type, ``key`` is missing, or ``train`` is traced.

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
    check_array(name, "new", new)
    check_array(name, "old", old)
    after, before = jnp.asarray(new), jnp.asarray(old)
    if (before.shape, before.dtype) != (after.shape, after.dtype):
        raise ValueError(
            f"{name}: old must be {describe(after)}, like new, got {describe(before)}; pass the state before the step"
        )
    check_sharded_as(name, "old", before, after, "new")
    sharding = explicit_sharding(jax.typeof(after).sharding)
    if sharding is not None:  # a replicated state is allowed; the arrays of an op have one sharding
        before = jax.sharding.reshard(before, sharding.spec)
    arguments = check_arguments(name, key, new, rate, train=train, generator=generator, shard=shard)
    if is_zero(arguments.rate):
        return new
    if arguments.train:
        return masked_op(_ZONEOUT, arguments.draw(), after, before)
    return _expectation(after, before, expected_keep(arguments.rate, generator, real_dtype(after)))


@jax.jit
def _expectation(new: Array, old: Array, keep: Array) -> Array:
    """Return ``keep * new + (1 - keep) * old``, rounded once; compiled, so that jit and eager calls agree."""
    terms = []
    for x, share in ((new, keep), (old, 1 - keep)):
        wide = x if jnp.iscomplexobj(x) else x.astype(share.dtype)
        terms.append(multiply(wide, share, where=share != 0))
    return (terms[0] + terms[1]).astype(new.dtype)


def _zoneout(view: MaskView, new: Array, old: Array) -> Array:
    nan = jnp.isnan(view.mask.keep_probability(np.float32))
    return jnp.where(nan, jnp.full((), jnp.nan, new.dtype), view.select(view.keep(), new, old))


_ZONEOUT = MaskedOp(_zoneout, (SELECT, SELECT_DROPPED), num_inputs=2)
