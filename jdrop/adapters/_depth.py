"""Common part of stochastic depth in all layers: decide about a branch, which each library runs in its own cond."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jdrop._branch import add_branch
from jdrop._checks import check_array
from jdrop._errors import describe
from jdrop._family.depth import decide, one_decision
from jdrop._types import Generator, RateLike, Shard
from jdrop.adapters._layer import Names, check_layer, is_one, take_key


class Decision(NamedTuple):
    """Whether a branch runs, and how it is scaled."""

    function: str
    kept: bool | Array
    keep_probability: Array | None

    @property
    def is_known(self) -> bool:
        """Whether no conditional is needed: lax.cond would compile new functions at every eager call."""
        return not isinstance(self.kept, jax.core.Tracer)

    def add(self, x: Array, y: Array) -> Array:
        """Add the scaled output of the branch."""
        return add_branch(self.function, "branch", x, y, self.keep_probability)


def decide_layer(
    function: str,
    get_key: Callable[[], Any],
    x: Array,
    rate: RateLike,
    branch: Any,
    *,
    train: bool,
    generator: Generator,
    shard: Shard,
    names: Names,
    initializes: bool = False,
) -> tuple[Array, Decision]:
    """Return x, and the decision about its branch.

    Args:
      function: the layer, for errors.
      get_key: function that returns the key, as in :func:`jdrop.adapters._layer.take_key`.
      x: the data.
      rate: scalar drop rate.
      branch: the branch, to check it.
      train: whether to draw the decision.
      generator: as in :func:`jdrop.dropout`.
      shard: as in :func:`jdrop.adapters._layer.check_layer`.
      names: names of the library, for errors.
      initializes: whether the library creates its variables in this call. The branch then runs whatever the rate.
    """
    check_array(function, names.data, x, cast=names.cast)
    if not callable(branch):
        raise TypeError(f"{function}: branch must be a module or a function, got {describe(branch)}; pass the branch")
    arguments = check_layer(function, x, rate, one_decision, train, generator, shard, names)
    x = jnp.asarray(x)
    if initializes or arguments.is_identity:
        return x, Decision(function, True, None)
    if is_one(arguments.rate):
        return x, Decision(function, False, None)
    x, kept, keep_probability = decide(take_key(arguments, get_key, names), x)
    return x, Decision(function, kept, keep_probability)
