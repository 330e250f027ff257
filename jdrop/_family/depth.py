"""Stochastic depth: residual branches that are not computed when they are dropped."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import jet

from jdrop._branch import add_branch
from jdrop._checks import check_array, check_function
from jdrop._errors import describe
from jdrop._lowering import at_lowering
from jdrop._mask import Mask
from jdrop._platform import Target
from jdrop._prepare import Arguments, Shape, check_arguments
from jdrop._sharding import vary_like, vary_together
from jdrop._types import Generator, RateLike, Shard, real_dtype

T = TypeVar("T")


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
    """Add a residual branch, or skip its computation, with one decision for the whole array.

    ``y = x + fn(x) * m / (1 - rate)`` with ``m ~ Bernoulli(1 - rate)``. If m is 0, ``fn`` is computed neither in the
    forward nor in the backward pass (``lax.cond``). In a scan over layers with one rate per layer, this is LayerDrop,
    except that LayerDrop does not divide by the keep probability. Under ``jax.vmap`` over keys, the conditional becomes
    a select, so both branches are computed.

    Args:
      key: one PRNG key, used once; may be ``None`` if ``train`` is false or ``rate`` is a Python or NumPy 0.
      x: floating or complex array of any shape.
      rate: scalar drop rate of the branch, as in :func:`jdrop.dropout`.
      fn: the branch, ``x -> array with the shape and dtype of x``. It can be differentiated with respect to the
        variables it closes over.
      train: ``True`` draws the decision; ``False`` returns ``x + fn(x)``.
      generator: as in :func:`jdrop.dropout`.
      shard: as in :func:`jdrop.dropout`. All tiles share one decision.

    Returns:
      An array with the shape and dtype of x.

    Raises:
      ValueError: a rate or an option is out of range, or ``fn`` does not return an array with the shape
        and dtype of x.
      TypeError: an argument has the wrong type, ``key`` is missing, or ``train`` is traced.

    References:
      Huang, Sun, Liu, Sedra, Weinberger (2016), Deep Networks with Stochastic Depth, ECCV; Fan, Grave, Joulin (2020),
      Reducing Transformer Depth on Demand with Structured Dropout, ICLR.

    Limits:
      ``fn`` runs inside ``lax.cond``, so it must be a pure function. Layers that change their state or take keys from
      it, such as BatchNorm or Dropout of Flax nnx, and BatchNorm of Flax linen or Haiku, raise there, and so does the
      ``init`` of a layer. For these use ``StochasticDepth`` of ``jdrop.adapters.linen``, ``nnx``, or ``equinox``, or
      ``stochastic_depth`` of ``jdrop.adapters.haiku``.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> y = jdrop.stochastic_depth(jax.random.key(0), jnp.ones([4]), 0.5, jnp.sin, train=False)
      >>> bool((y == 1 + jnp.sin(jnp.ones([4]))).all())
      True
    """
    name = "stochastic_depth"
    check_array(name, "x", x)
    check_function(name, "fn", fn, "pass the branch")
    arguments = check_arguments(
        name, key, x, rate, train=train, mask_shape=one_decision, generator=generator, shard=shard
    )
    x = jnp.asarray(x)
    if arguments.is_identity:
        return add_branch(name, "fn", x, fn(x))
    x, kept, keep_probability = decide(arguments, x)

    def added(x: Array) -> Array:
        return add_branch(name, "fn", x, fn(x), keep_probability)

    if not isinstance(kept, jax.core.Tracer):  # lax.cond would compile new functions at every call
        return added(x) if jax.device_get(kept) else x
    return run_or_skip(kept, added, x)


def run_or_skip(kept: bool | Array, run: Callable[..., T], operands: T) -> T:
    """Return ``run(operands)`` if kept, else the operands, and compute only that. Both have the same types."""
    types = jax.tree.map(jax.typeof, operands)
    if jax.sharding.get_abstract_mesh().manual_axes:  # in shard_map, run may vary over more axes than its operands
        types = jax.tree.unflatten(jax.tree.structure(types), jax.make_jaxpr(run)(operands).out_avals)
    return lax.cond(kept, run, lambda skipped: jax.tree.map(vary_like, skipped, types), operands)


def one_decision(shape: Shape) -> Shape:
    """Return the shape of the decision about a branch, whatever that of x."""
    del shape
    return ()


def decide(arguments: Arguments, x: Array) -> tuple[Array, Array, Array]:
    """Use the key up, and return x, whether its branch is kept, and the probability of that.

    Inside ``jax.shard_map``, all of them vary over the same mesh axes.
    """
    if isinstance(x, jet.JetTracer):
        raise NotImplementedError(
            f"{arguments.function}: x must not be traced by jax.experimental.jet, which has no rule for lax.cond, "
            f"got {describe(x)}; use x + jdrop.drop_path(key, fn(x), rate, train=train, batch_axes=())"
        )
    mask = arguments.draw(one_for_all_tiles=True)
    mask = dataclasses.replace(mask, rate=lax.stop_gradient(mask.rate))
    x, kept, keep_probability = vary_together(x, *_decide(mask, dtype=real_dtype(x)))
    return x, kept, keep_probability


@functools.partial(jax.jit, static_argnames="dtype")
def _decide(mask: Mask, *, dtype: Any) -> tuple[Array, Array]:
    """Return whether the branch is kept, and the probability of that."""
    return at_lowering(_keep, mask), mask.keep_probability(dtype)


def _keep(target: Target, mask: Mask) -> Array:
    return mask.keep((), platform=target.platform)
