"""The code that exists only because of compilers, chosen by platform when a program is lowered.

``generic.py`` has the plain form of each operation, and the file of a platform has its own forms. GPUs and TPUs use the
plain forms until a measurement shows a gain.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jdrop._platform.cpu import Cpu
from jdrop._platform.generic import GENERIC, BlockSizes, Platform
from jdrop._platform.gpu import Gpu
from jdrop._platform.tpu import Tpu

__all__ = ["GENERIC", "PLATFORMS", "BlockSizes", "Platform", "Target", "register_lowerings"]

PLATFORMS: dict[str, Platform] = {"cpu": Cpu(), "cuda": Gpu(), "rocm": Gpu(), "tpu": Tpu()}


class Target(NamedTuple):
    """The platform and the devices that a program is lowered for."""

    name: str | None = None
    """JAX's name of the platform; ``None`` if ``PLATFORMS`` has no entry for it."""
    devices: int = 1
    """Number of devices that may share each array; inside ``jax.shard_map``, those along auto axes of the mesh."""

    @property
    def platform(self) -> Platform:
        """The forms of operations on this platform."""
        return PLATFORMS.get(self.name, GENERIC) if self.name else GENERIC


def register_lowerings(primitive: Primitive, f: Callable[..., Any], *, multiple_results: bool) -> None:
    """Lower a primitive as ``f(*operands, target=target, **params)``, traced for the target."""

    def lower(context: Any, *operands: Any, name: str | None, **params: Any) -> Any:
        traced = functools.partial(f, target=Target(name, _num_devices(context)), **params)
        return mlir.lower_fun(traced, multiple_results=multiple_results)(context, *operands)

    mlir.register_lowering(primitive, functools.partial(lower, name=None))
    for name in PLATFORMS:
        mlir.register_lowering(primitive, functools.partial(lower, name=name), platform=name)


def _num_devices(context: Any) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:
        return math.prod(n for name, n in mesh.shape.items() if name not in mesh.manual_axes)
    return getattr(getattr(context.module_context, "axis_context", None), "num_devices", 1)
