"""What a layer does in every library: check, then mode, then rate, and only then ask the library for a key."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jdrop import _checks, _member, _shards
from jdrop.decisions import Generator, RateLike


def missing(module: str, library: str, distribution: str, error: ImportError) -> ImportError:
    """Word the error of an adapter whose library cannot be imported."""
    fix = f"run pip install {distribution}"
    return ImportError(_checks.text(module, library, "must be installed", f"{error!r}", fix), name=library)


def drop(
    function: str,
    ask: Callable[[], Any],
    x: Array,
    rate: RateLike,
    *,
    train: bool,
    generator: Generator,
    names: tuple[str, str, str],
    broadcast_dims: Sequence[int] = (),
    batch_axes: int | Sequence[int] | None = None,
    in_jax: bool = False,
) -> Array:
    """Multiply by a mask over the keep probability, with a key from the library.

    Args:
      function: the layer, for errors.
      ask: returns the key. It is called only if something random happens: not in evaluation, nor at a Python or NumPy
        rate of 0 or 1. Where the library draws a key from a stream, later layers then get the same keys as theirs.
      x: the data.
      rate: probability of dropping.
      train: whether a mask is drawn.
      generator: as for :func:`jdrop.dropout`.
      names: what the layer calls x, the rate and the key, for errors.
      broadcast_dims: axes along which one decision is shared.
      batch_axes: instead of them, axes with decisions of their own.
      in_jax: whether the library subtracts this Python or NumPy rate from 1 as an array of JAX, which rounds it first.
        ``generator="jax"`` does the same.
    """
    data, probability, source = names
    _checks.array(function, data, x)
    if batch_axes is None:
        shared = _checks.axes(function, "broadcast_dims", broadcast_dims, x.ndim)
    else:
        own = _checks.axes(function, "batch_axes", batch_axes, x.ndim)
        shared = tuple(axis for axis in range(x.ndim) if axis not in own)
    options: Any = {"shared_axes": shared, "generator": generator, "limit": (probability, 1.0)}
    options["key_argument"] = source
    call = _member.check(function, None, x.shape, rate, train=train, **options)
    if call.idle:
        return x
    if isinstance(call.rate, np.ndarray) and np.all(call.rate == 1):
        return jnp.zeros_like(x)
    key = ask()
    _checks.key(function, key, source)
    _shards.check_key_varies(function, key, None, source, "call jdrop.dropout with")
    return call._replace(key=key, rate=jnp.asarray(call.rate) if in_jax else call.rate).apply(_member.SCALED, x)
