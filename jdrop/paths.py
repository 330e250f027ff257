"""Dropout of whole branches of residual networks."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jdrop import _checks, _loops, _member, decisions
from jdrop._shards import Shard, vary_like, vary_together
from jdrop.decisions import Generator, RateLike


def drop_path(
    key: Array | None,
    x: Array,
    rate: RateLike,
    *,
    train: bool,
    batch_axes: int | Sequence[int] = (0,),
    generator: Generator = "fast",
    shard: Shard = None,
) -> Array:
    """Drop a residual branch for whole examples (stochastic depth of a branch that is computed anyway).

    ``y[b, ...] = x[b, ...] * m[b] / (1 - rate)`` with ``m[b] ~ Bernoulli(1 - rate)``; use it as
    ``x + drop_path(key, branch(x), rate, train=train)``.

    Args:
      key: one PRNG key, used once. ``None`` is fine if ``train`` is false or ``rate`` is the number 0.
      x: floating or complex array ``[batch, ...]``, the output of the branch.
      rate: probability of dropping, or an array of it that broadcasts to ``[batch, 1, ...]``, as for
        :func:`jdrop.dropout`.
      train: ``True`` draws a mask; ``False`` returns x itself.
      batch_axes: axes with decisions of their own; ``()`` for one decision for the whole array.
      generator: as for :func:`jdrop.dropout`.
      shard: as for :func:`jdrop.dropout`.

    Returns:
      An array of the shape and dtype of x.

    Raises:
      ValueError: a rate, an axis or an option is out of range, or ``key`` is a batch of keys.
      TypeError: an argument is of the wrong type, ``key`` is missing, or ``train`` is traced.

    References:
      Huang, Sun, Liu, Sedra, Weinberger (2016), Deep Networks with Stochastic Depth, ECCV; per example as in Larsson,
      Maire, Shakhnarovich (2017), FractalNet, ICLR.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> y = jdrop.drop_path(jax.random.key(0), jnp.ones([8, 16]), 0.5, train=True)
      >>> bool((y == y[:, :1]).all())
      True
    """
    name = "drop_path"
    _checks.array(name, "x", x)
    own = _checks.axes(name, "batch_axes", batch_axes, x.ndim)
    shared = [axis for axis in range(x.ndim) if axis not in own]
    options: Any = {"shared_axes": shared, "generator": generator, "shard": shard}
    return _member.scaled(name, key, x, rate, train=train, **options)


def stochastic_depth(
    key: Array | None,
    x: Array,
    rate: RateLike,
    fn: Callable[[Array], Array],
    *,
    train: bool,
    generator: Generator = "fast",
    shard: Shard = None,
) -> Array:
    """Add a residual branch or skip its computation, by one decision for the whole array.

    ``y = x + fn(x) * m / (1 - rate)`` with ``m ~ Bernoulli(1 - rate)``; where m is 0, ``fn`` is not computed, neither
    forward nor backward (``lax.cond``). In a scan over layers with a rate a layer this is LayerDrop. Under ``jax.vmap``
    over keys, the condition becomes a select: both sides are computed then.

    Args:
      key: one PRNG key, used once. ``None`` is fine if ``train`` is false or ``rate`` is the number 0.
      x: floating or complex array of any shape.
      rate: probability of dropping the branch, a scalar, as for :func:`jdrop.dropout`.
      fn: the branch, ``x -> array of the shape and dtype of x``. It may be differentiated with respect to what it
        closes over.
      train: ``True`` decides; ``False`` returns ``x + fn(x)``.
      generator: as for :func:`jdrop.dropout`.
      shard: as for :func:`jdrop.dropout`. One decision stands for all tiles.

    Returns:
      An array of the shape and dtype of x.

    Raises:
      ValueError: a rate or an option is out of range, or ``fn`` returns anything else.
      TypeError: an argument is of the wrong type, ``key`` is missing, or ``train`` is traced.

    References:
      Huang, Sun, Liu, Sedra, Weinberger (2016), Deep Networks with Stochastic Depth, ECCV; Fan, Grave, Joulin (2020),
      Reducing Transformer Depth on Demand with Structured Dropout, ICLR.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> y = jdrop.stochastic_depth(jax.random.key(0), jnp.ones([4]), 0.5, jnp.sin, train=False)
      >>> bool((y == 1 + jnp.sin(jnp.ones([4]))).all())
      True
    """
    name = "stochastic_depth"
    _checks.array(name, "x", x)
    if not callable(fn):
        raise TypeError(_checks.text(name, "fn", "must be a function", _checks.describe(fn), "pass the branch"))
    call = _member.check(name, key, x.shape, rate, train=train, decided=lambda _: (), generator=generator, shard=shard)

    def branch(x: Array) -> Array:
        y = fn(x)
        if not _checks.is_array(y) or (y.shape, y.dtype) != (x.shape, x.dtype):
            rule = f"must return {_checks.describe(x)}, as x is"
            raise ValueError(_checks.text(name, "fn", rule, _checks.describe(y), "add a projection to the branch"))
        return jnp.asarray(y)

    x = jnp.asarray(x)
    if call.idle:
        return x + branch(x)
    words, traced, _, layout = call._replace(names=()).operands()  # one decision: no tile is a part of it
    kept = decisions.keep(layout, words, lax.stop_gradient(traced), ())
    keep = decisions.keep_probability(layout.source, lax.stop_gradient(traced), _loops.real_dtype(x))
    x, kept, keep = vary_together(x, kept, keep)

    def added(x: Array) -> Array:
        return x + _loops.multiply(branch(x), 1 / keep, where=jnp.ones_like(kept))

    out = jax.typeof(x)
    if jax.sharding.get_abstract_mesh().manual_axes:  # in shard_map, fn may vary over more axes than x
        out = jax.make_jaxpr(added)(x).out_avals[0]
    return lax.cond(kept, added, lambda x: vary_like(x, out), x)
