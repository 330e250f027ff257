"""Clocks for single calls, with warm buffers and with inputs from memory instead of cache."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import _bench
import jax
import jax.numpy as jnp
import numpy as np

DIRECTIONS = ("forward", "forward+backward")
MIN_INPUTS, MIN_INPUT_BYTES, MAX_INPUTS = 6, 1 << 27, 32  # number and total size of the input arrays


class Clock:
    """Time calls on a cycle of inputs, which all contenders of a dtype share."""

    def __init__(self, f: Callable[..., Any], inputs: Iterator[Any], calls: int, wait: Callable[[Any], Any]):
        self.f, self.inputs, self.calls, self.wait = f, inputs, calls, wait

    def __call__(self) -> float:
        """Return the seconds per call."""
        arguments = [next(self.inputs) for _ in range(self.calls)]
        start = time.perf_counter()
        for args in arguments:
            y = self.f(*args)
        self.wait(y)
        return (time.perf_counter() - start) / self.calls


def jax_step(drop: Callable[..., Any], direction: str) -> Callable[..., Any]:
    """Return the jitted function of ``(key, x, dy, *operands)`` to time, which returns y, or y and dx."""
    if direction == "forward":
        return jax.jit(lambda key, x, dy, *operands: drop(key, x, *operands))

    def both(key: Any, x: jax.Array, dy: jax.Array, *operands: Any) -> tuple[jax.Array, jax.Array]:
        y, pull = jax.vjp(lambda x: drop(key, x, *operands), x)
        return y, pull(dy)[0]

    return jax.jit(both)


def random_arrays(shape: tuple[int, ...], itemsize: int) -> list[np.ndarray]:
    """Return standard normal arrays, enough that together they exceed the cache."""
    count = min(max(MIN_INPUTS, math.ceil(MIN_INPUT_BYTES / (math.prod(shape) * itemsize))), MAX_INPUTS)
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32) for _ in range(count)]


def jax_inputs(data: list[np.ndarray], dtype: str) -> Iterator[Any]:
    """Return a cycle of ``(key, x, cotangent)``, so that consecutive calls use different arrays."""
    keys = list(jax.random.split(jax.random.key(0), len(data)))
    xs = [jnp.asarray(x, dtype) for x in data]
    dys = [jnp.ones(x.shape, dtype) for x in data]
    return itertools.cycle(jax.block_until_ready(list(zip(keys, xs, dys, strict=True))))


def torch_clock(
    drop: Callable[[Any, Any], Any], data: list[np.ndarray], dtype: str, direction: str, calls: int
) -> Clock | str:
    """Return a clock for PyTorch as its users call it, or the reason why it cannot run."""
    try:
        import torch
    except ImportError:
        return _bench.MISSING
    torch.set_num_threads(_bench.cores())
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        return "no build for this device"
    both = direction != "forward"
    xs = [torch.from_numpy(x).to(device, getattr(torch, dtype)).requires_grad_(both) for x in data]

    def step(x: Any, dy: Any) -> Any:
        y = drop(torch.nn.functional, x)
        if not both:
            return y
        y.backward(dy)
        dx, x.grad = x.grad, None
        return y, dx

    def wait(y: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    return Clock(step, itertools.cycle([(x, torch.ones_like(x, requires_grad=False)) for x in xs]), calls, wait)
