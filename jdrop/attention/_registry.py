"""The implementations of attention, and the choice between them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array, lax

from jdrop._checks import check_choice
from jdrop._prepare import Arguments
from jdrop.attention import _blockwise, _mosaic_gpu, _mosaic_tpu, _reference


class Implementation(NamedTuple):
    """One way to compute attention."""

    refusal: Callable[..., str | None]
    """``(arguments, query, key, value, over_scores) ->`` the reason why it cannot serve the call, or ``None``.

    ``over_scores`` are the names of the arrays over scores that are passed: of ``bias`` and ``mask``.
    """
    attend: Callable[..., Array]
    """``(spec, query, key, value, bias, inputs) ->`` the output [B, T, N, H]."""


IMPLEMENTATIONS = {
    "reference": Implementation(_reference.refusal, _reference.attend),
    "chunked": Implementation(_blockwise.refusal, _blockwise.attend),
    "mosaic_tpu": Implementation(_mosaic_tpu.refusal, _mosaic_tpu.attend),
    "mosaic_gpu": Implementation(_mosaic_gpu.refusal, _mosaic_gpu.attend),
}
# For each platform, the implementations in order of preference, each with a minimum number of scores per head. On CPU,
# "chunked" is no slower from 2**16 scores on (scripts/bench_attention.py, jax 0.10.2). If platforms preferred different
# implementations, gradients of a jitted function outside of jit would hold the residuals of all of them, with scores
# even on a CPU. So "chunked" also serves GPUs, where its blocks are as large as their budget (_platform/gpu.py).
PREFERENCES = {"cpu": (("chunked", 2**16), ("reference", 0))}
DEFAULT_PREFERENCE = (("chunked", 2**16), ("reference", 0))


def choose(
    arguments: Arguments, implementation: str | None, *arrays: Array, over_scores: tuple[str, ...] = ()
) -> Callable[..., Array]:
    """Return the function of the implementation that serves a call.

    An implementation chosen by name raises if it cannot serve the call. Otherwise, each platform uses the first one in
    its order that can, which is decided when the program is lowered.
    """
    if implementation is not None:
        check_choice(arguments.function, "implementation", implementation, tuple(IMPLEMENTATIONS))
        reason = IMPLEMENTATIONS[implementation].refusal(arguments, *arrays, over_scores)
        if reason:
            raise NotImplementedError(
                f'{arguments.function}: implementation must be "reference" for {reason}, got {implementation!r}; '
                'pass "reference"'
            )
        return IMPLEMENTATIONS[implementation].attend
    preferred = functools.partial(_preferred, arguments, (*arrays, over_scores))
    default, by_platform = preferred(DEFAULT_PREFERENCE), {p: preferred(order) for p, order in PREFERENCES.items()}
    if set(by_platform.values()) == {default}:
        return IMPLEMENTATIONS[default].attend
    functions = {platform: IMPLEMENTATIONS[name].attend for platform, name in by_platform.items()}
    return functools.partial(_attend_by_platform, functions, IMPLEMENTATIONS[default].attend)


def _preferred(arguments: Arguments, call: tuple[Any, ...], order: tuple[tuple[str, int], ...]) -> str:
    """Return the name of the first implementation that can serve a call."""
    *_, queries, keys = arguments.shape
    for name, least in order:
        refusal = IMPLEMENTATIONS[name].refusal(arguments, *call)
        if refusal is None and (least == 0 or queries * keys >= least):
            return name
    raise AssertionError("the last implementation serves all calls")


def _attend_by_platform(
    functions: dict[str, Callable[..., Array]], default: Callable[..., Array], spec: Any, *operands: Any
) -> Array:
    bound = {platform: functools.partial(f, spec) for platform, f in functions.items()}
    return lax.platform_dependent(*operands, default=functools.partial(default, spec), **bound)
