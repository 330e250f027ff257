"""Timing of single calls, with warm buffers and with inputs from memory instead of cache."""

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
POOL, POOL_BYTES, POOL_MOST = 6, 1 << 27, 32  # input arrays: least number, least total bytes, largest number


class Clock:
    """Times calls on a cycle of inputs, the same cycle for all contenders of a dtype."""

    def __init__(self, f: Callable[..., Any], inputs: Iterator[Any], calls: int, wait: Callable[[Any], Any]):
        self.f, self.inputs, self.calls, self.wait = f, inputs, calls, wait

    def __call__(self) -> float:
        """Return the seconds per call."""
        arguments = [next(self.inputs) for _ in range(self.calls)]
        start = time.perf_counter()
        for one in arguments:
            y = self.f(*one)
        self.wait(y)
        return (time.perf_counter() - start) / self.calls


def jax_step(drop: _bench.Drop, direction: str) -> Callable[..., Any]:
    """Return the jitted function to time, which returns y, or y and dx."""
    if direction == "forward":
        return jax.jit(lambda key, x, dy: drop(key, x))

    def both(key: Any, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pull = jax.vjp(lambda x: drop(key, x), x)
        return y, pull(dy)[0]

    return jax.jit(both)


def draws(shape: tuple[int, ...], itemsize: int) -> list[np.ndarray]:
    """Return normal numbers for enough inputs that they do not fit into the cache together."""
    count = min(max(POOL, math.ceil(POOL_BYTES / (math.prod(shape) * itemsize))), POOL_MOST)
    draw = np.random.default_rng(0)
    return [draw.standard_normal(shape, np.float32) for _ in range(count)]


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
