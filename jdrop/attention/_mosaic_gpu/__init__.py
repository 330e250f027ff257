"""Attention with dropout in one kernel for Hopper GPUs: refusals, and the operands of the kernels.

This is the method of FlashAttention-2 (Dao 2024, ICLR) with the mask of ``jdrop.dropout_mask``, computed in registers.
The kernels are imported when they are used: on jax 0.10, they need absl-py.
"""

import dataclasses
import functools
import importlib
from typing import Any

import jax.numpy as jnp
from jax import Array

from jdrop._mask import Mask
from jdrop._platform import Target
from jdrop._prepare import Arguments
from jdrop._random import fast
from jdrop._random.indexing import MIN_COLUMNS
from jdrop.attention import _blockwise, _checks, _derivative
from jdrop.attention._spec import AttentionInputs, AttentionSpec, first_query
from jdrop.attention._tile import LOG2E

NAME = "mosaic_gpu"
DTYPES = ("float16", "bfloat16")
WIDTHS = (64, 128)


def refusal(arguments: Arguments, query: Array, key: Array, value: Array, over_scores: tuple[str, ...]) -> str | None:
    """Return why this implementation cannot serve a call, or ``None``."""
    if over_scores:
        return over_scores[0]
    if query.dtype.name not in DTYPES:
        return f"{query.dtype} arrays"
    if query.shape[-1] not in WIDTHS:
        return f"a width of {query.shape[-1]}"
    if (reason := _blockwise.refusal(arguments, query, key, value, over_scores)) is not None:
        return reason
    if key.shape[-3] < MIN_COLUMNS:
        return f"fewer than {MIN_COLUMNS} keys"
    if not arguments.is_identity:
        if arguments.generator == "jax":
            return f"generator={arguments.generator!r}"
        if arguments.rate.size != 1:
            return "more than one rate"
        if arguments.mask_shape(arguments.shape)[3] == 1:
            return "keys that share decisions"
    return _missing()


@functools.cache
def _missing() -> str | None:
    """Return what is missing to import the kernels."""
    try:
        _module("parts")
    except ImportError as error:
        return f"a JAX whose kernels for GPUs cannot be imported ({error})"
    return None


def _module(name: str) -> Any:
    """Import the parts, the forward pass, or the backward pass."""
    return importlib.import_module(f"jdrop.attention._mosaic_gpu.{name}")


# ---------------------------------------------------------------------------------- operands


def row_keys(target: Target, mask: Mask, size: tuple[int, int, int], start: Array | None) -> Array:
    """Return the keys of the rows of scores, uint32 [B, N, 2, T]. ``start`` is that of a tile of the scores."""
    words, _ = mask.row_keys((*size, 1), start, platform=target.platform)
    return jnp.stack([jnp.broadcast_to(word, (*size, 1))[..., 0] for word in words], axis=2)


def _pad(x: Array, axis: int, value: float = 0) -> Array:
    """Pad an axis to whole blocks."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % _module("parts").BLOCK)
    return jnp.pad(x, widths, constant_values=value) if widths[axis][1] else x


def _operands(
    target: Target, spec: AttentionSpec, query: Array, key: Array, value: Array, inputs: AttentionInputs
) -> tuple[Any, Any]:
    """Return the options and the operands of the kernels."""
    parts = _module("parts")
    batch, num_queries, heads, _ = query.shape
    num_keys, first = key.shape[1], jnp.int32(first_query(spec, inputs))
    see = seen = None
    if inputs.query_lengths is not None:
        see = jnp.clip(inputs.query_lengths[:, 0, 0, 0] - first, 0, num_queries)
    if inputs.key_lengths is not None:
        seen = jnp.clip(inputs.key_lengths[:, 0, 0, 0], 0, num_keys)
    numbers = [num_queries if see is None else see, num_keys if seen is None else seen, first]
    scale = jnp.float32(1) if inputs.scale is None else inputs.scale.astype(jnp.float32)
    inverse, mask = jnp.float32(1), inputs.dropout
    threshold = words = None
    if mask is not None:
        inverse = mask.inverse_keep_probability(jnp.float32).reshape(())
        threshold = fast.threshold(jnp.asarray(mask.rate))[0].reshape(1)
        words = _pad(row_keys(target, mask, (batch, heads, num_queries), inputs.start), 3)
    # A scale of 0 becomes a tiny one, because -inf times 0 is NaN.
    factor = jnp.maximum(jnp.abs(scale) * LOG2E, 1e-30)
    options = parts.Options(
        spec,
        num_keys,
        limits_queries=inputs.query_lengths is not None,
        limits_keys=inputs.key_lengths is not None or num_keys % parts.BLOCK > 0,
        bits=None if mask is None else mask.word_bits,
    )
    operands = parts.Operands(
        query=_pad(query, 1),
        key=_pad(key, 1),
        value=_pad(value, 1),
        numbers=jnp.stack([jnp.broadcast_to(n, (batch,)) for n in numbers], axis=1).astype(jnp.int32),
        factors=jnp.stack([factor, jnp.where(scale < 0, -1.0, 1.0), scale, inverse]),
        threshold=threshold,
        row_keys=words,
    )
    return options, operands


# ---------------------------------------------------------------------------------- forward and backward pass


@dataclasses.dataclass(frozen=True)
class MosaicGpu:
    """The method of these kernels, see :class:`jdrop.attention._derivative.Method`."""

    @property
    def differentiable(self) -> _blockwise.Blockwise:
        return _blockwise.Blockwise()

    def forward(
        self,
        target: Target,
        spec: AttentionSpec,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None,
        inputs: AttentionInputs,
    ) -> tuple[Array, ...]:
        del bias  # refused
        _checks.check_target(target, NAME, ("cuda",))
        out, peak, total = _module("forward").forward(*_operands(target, spec, query, key, value, inputs))
        peak, total = (x[:, :, : query.shape[1]].swapaxes(1, 2)[..., None] for x in (peak, total))
        blind = total == 0
        log_sum = jnp.where(blind, jnp.inf, jnp.log(jnp.where(blind, 1.0, total)))
        return out[:, : query.shape[1]], jnp.where(blind, 0.0, peak / LOG2E), log_sum

    def backward(self, target: Target, spec: AttentionSpec, residuals: tuple[Any, ...], do: Array) -> tuple[Any, ...]:
        _checks.check_target(target, NAME, ("cuda",))
        query, key, value, _, inputs, peak, log_sum, out = residuals
        kernels = _module("backward")
        options, operands = _operands(target, spec, query, key, value, inputs)
        if spec.window is not None or inputs.query_lengths is not None or inputs.key_lengths is not None:
            do = jnp.where(log_sum == jnp.inf, 0, do)  # queries that see no key have no gradient, whatever do is
        delta = jnp.sum(do.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
        if inputs.dropout is not None:
            delta = delta * inputs.dropout.keep_probability(jnp.float32).reshape(())
        rows = [(((peak + log_sum) * LOG2E)[..., 0], jnp.inf), (delta, 0.0)]
        sums = jnp.stack([_pad(x.swapaxes(1, 2), 2, value) for x, value in rows], axis=2)
        operands = operands._replace(do=_pad(do, 1), sums=sums)
        dq = kernels.gradient_of_queries(options, operands)
        dk, dv = kernels.gradients_of_keys(options, operands)
        return dq[:, : query.shape[1]], dk[:, : key.shape[1]], dv[:, : key.shape[1]], None


attend = functools.partial(_derivative.attend, MosaicGpu())
