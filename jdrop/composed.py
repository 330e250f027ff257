"""Dropout together with what stands around it: a bias and a residual, or a head that is averaged."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jdrop import _checks, _linear, _loops, _member, decisions, keys
from jdrop._shards import Shard
from jdrop.decisions import Generator, RateLike


def bias_dropout_add(
    key: Array | None,
    x: Array,
    rate: RateLike,
    bias: Array | None,
    residual: Array,
    *,
    train: bool,
    generator: Generator = "fast",
    shard: Shard = None,
) -> Array:
    """Add a bias, drop, and add to the residual stream: the end of each branch of a transformer, in one fusion.

    ``y[i] = residual[i] + (x[i] + bias) * m[i] / (1 - rate)`` with ``m[i] ~ Bernoulli(1 - rate)``.

    Args:
      key: one PRNG key, used once. ``None`` is fine if ``train`` is false or ``rate`` is the number 0.
      x: floating or complex array of any shape, such as ``[batch, time, feature]``: a product without its bias. 16-bit
        floats are added and scaled in float32, and rounded once.
      rate: probability of dropping, or an array of it that broadcasts to x, as for :func:`jdrop.dropout`.
      bias: array that broadcasts to x, of its dtype, such as ``[feature]``; or ``None``.
      residual: array of the shape and dtype of x.
      train: ``True`` draws a mask; ``False`` adds only.
      generator: as for :func:`jdrop.dropout`.
      shard: as for :func:`jdrop.dropout`, of x.

    Returns:
      An array of the shape and dtype of x: exactly ``residual`` where x is dropped.

    Raises:
      ValueError: a rate or an option is out of range, or a shape or a dtype does not match.
      TypeError: an argument is of the wrong type, ``key`` is missing, or ``train`` is traced.

    References:
      Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin (2017), Attention Is All You Need, NeurIPS,
      section 5.4.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> x, bias, residual = jnp.ones([2, 8]), jnp.ones([8]), jnp.zeros([2, 8])
      >>> y = jdrop.bias_dropout_add(jax.random.key(0), x, 0.5, bias, residual, train=True)
      >>> sorted(set(y.ravel().tolist()))
      [0.0, 4.0]
    """
    name = "bias_dropout_add"
    _checks.array(name, "x", x)
    _checks.array(name, "residual", residual)
    x, residual = jnp.asarray(x), jnp.asarray(residual)
    if (residual.shape, residual.dtype) != (x.shape, x.dtype):
        rule, got = f"must be {_checks.describe(x)}, as x is", _checks.describe(residual)
        raise ValueError(_checks.text(name, "residual", rule, got, "pass the input of the branch"))
    if bias is not None:
        _checks.array(name, "bias", bias)
        _checks.broadcasts(name, "bias", bias, x.shape)
        bias = jnp.asarray(bias)
        if bias.dtype != x.dtype:
            rule = f"must be of the dtype of x, {x.dtype}"
            raise ValueError(_checks.text(name, "bias", rule, bias.dtype, "cast it"))
    call = _member.check(name, key, x.shape, rate, train=train, generator=generator, shard=shard)
    *draw, layout = (None,) if call.idle else call.operands()
    return _bias_dropout_add(x, bias, residual, draw, layout=layout)


@functools.partial(jax.jit, static_argnames="layout")
def _bias_dropout_add(x: Array, bias: Array | None, residual: Array, draw: Any, *, layout: Any) -> Array:
    """One compiled call, so that all of it is computed in float32 and rounded once, in a jit or not."""
    wide = x.dtype if jnp.iscomplexobj(x) else _loops.real_dtype(x)
    y = x.astype(wide)
    if bias is not None:
        y = y + _checks.ranked(bias, x.ndim).astype(wide)
    if layout is not None:
        words, rate, places = draw
        y = _linear.apply(_member.SCALED, (y,), words, rate, places, layout)
    return (residual.astype(wide) + y).astype(x.dtype)


def multi_sample_dropout(
    key: Array | None,
    x: Array,
    rate: RateLike,
    head: Callable[[Array], Any],
    num_samples: int,
    *,
    train: bool,
    generator: Generator = "fast",
    shard: Shard = None,
) -> Any:
    """Average the output of a head over several masks of its input.

    ``y = mean over s of head(x * m_s / (1 - rate))`` with ``m_s[i] ~ Bernoulli(1 - rate)``: a loss as ``head`` gives
    the mean loss of Inoue, logits give the mean logits.

    Args:
      key: one PRNG key, used once; a key a sample is derived from it. ``None`` is fine if ``train`` is false or
        ``rate`` is the number 0.
      x: floating or complex array of any shape.
      rate: probability of dropping, or an array of it that broadcasts to x, as for :func:`jdrop.dropout`.
      head: what is averaged, ``x -> pytree of floating or complex arrays``; ``jax.vmap`` maps it over the samples.
      num_samples: how many masks.
      train: ``True`` draws masks; ``False`` returns ``head(x)``.
      generator: as for :func:`jdrop.dropout`.
      shard: as for :func:`jdrop.dropout`, of x.

    Returns:
      What ``head`` returns.

    Raises:
      ValueError: a rate, an option or ``num_samples`` is out of range, or ``key`` is a batch of keys.
      TypeError: an argument is of the wrong type, ``head`` returns anything else, ``key`` is missing, or ``train`` is
        traced.

    References:
      Inoue (2019), Multi-Sample Dropout for Accelerated Training and Better Generalization, arXiv:1905.09788.

    Example:
      >>> import jax, jax.numpy as jnp, jdrop
      >>> w = jnp.ones([16, 2])
      >>> y = jdrop.multi_sample_dropout(jax.random.key(0), jnp.ones([4, 16]), 0.5, lambda h: h @ w, 8, train=True)
      >>> y.shape
      (4, 2)
    """
    name = "multi_sample_dropout"
    _checks.array(name, "x", x)
    if not callable(head):
        raise TypeError(_checks.text(name, "head", "must be a function", _checks.describe(head), "pass the head"))
    number = _checks.count(name, "num_samples", num_samples)
    call = _member.check(name, key, x.shape, rate, train=train, generator=generator, shard=shard)
    if call.idle:
        return _with_mean(name, head(x))
    own = keys.spend(decisions.needed(name, key))

    def sample(index: Array) -> Any:
        place = keys.derive(own, name, index)
        thinned = _member.scaled(name, place, x, rate, train=train, generator=generator, shard=shard)
        return _with_mean(name, head(thinned))

    outputs = jax.vmap(sample)(jnp.arange(number, dtype=jnp.uint32))
    return jax.tree.map(lambda y: jnp.mean(y, axis=0), outputs)


def _with_mean(function: str, outputs: Any) -> Any:
    """Require outputs that a mean leaves in their dtype."""
    for y in jax.tree.leaves(outputs):
        if not _checks.is_array(y) or y.dtype.name not in _checks.INEXACT:
            rule, fix = "must return floating point arrays", "leave out what has no mean"
            raise TypeError(_checks.text(function, "head", rule, _checks.describe(y), fix))
    return outputs
