"""Dense layers, and the part of them that kept units need."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from jdrop._checks import check_array, check_choice, expand_rank, is_array
from jdrop._errors import describe
from jdrop._gather import take_blocks
from jdrop._sharding import explicit_sharding
from jdrop._types import FLOATS, real_dtype
from jdrop.thin._units import Kept

Layer = Array | tuple[Array, Array | None]  # a kernel, or a kernel and its bias
Layout = Literal["in_out", "out_in"]
Activation = Callable[[Array], Array]
LAYOUTS = ("in_out", "out_in")


class Dense(NamedTuple):
    """The weights of one layer."""

    kernel: Array
    bias: Array | None
    axes: tuple[int, int]
    """The axes of inputs and of outputs of the kernel."""

    @property
    def arrays(self) -> list[Array]:
        """The kernel, and the bias if there is one."""
        return [self.kernel] if self.bias is None else [self.kernel, self.bias]

    @property
    def sizes(self) -> tuple[int, int]:
        """The numbers of inputs and of outputs."""
        return self.kernel.shape[self.axes[0]], self.kernel.shape[self.axes[1]]

    def __call__(self, x: Array, inputs: Kept | None, outputs: Kept | None) -> Array:
        """Map kept inputs ``[..., inputs]`` to kept outputs ``[..., outputs]``; ``None`` stands for all of them."""
        kernel, bias = self.kernel, self.bias
        for kept, axis in zip((inputs, outputs), self.axes):
            if kept is not None:
                kernel = take_blocks(kernel, kept.units, axis, kept.blocks)
        if bias is not None and outputs is not None:
            bias = take_blocks(bias, outputs.units, 0, outputs.blocks)
        y = _contract(x, kernel if self.axes == (0, 1) else kernel.T)
        return y if bias is None else y + expand_rank(bias, y.ndim)


def as_data(function: str, x: Any) -> Array:
    """Require real floating data with an axis of features."""
    check_array(function, "x", x, FLOATS)
    if not x.ndim:
        raise ValueError(f"{function}: x must be [batch, ..., features], got {describe(x)}; add axes")
    return jnp.asarray(x)


def as_dense(function: str, argument: str, layer: Any, layout: str, x: Array) -> Dense:
    """Require a kernel, or a pair of a kernel and a bias, of the dtype of x."""
    kernel, bias = as_pair(layer)
    check_array(function, argument, kernel, (x.dtype.name,), cast="convert it to the dtype of x")
    if kernel.ndim != 2:
        raise ValueError(
            f"{function}: {argument} must be a kernel [inputs, outputs], or a pair of a kernel and a bias, "
            f"got {describe(kernel)}; reshape it"
        )
    axes = (0, 1) if layout == "in_out" else (1, 0)
    bias = as_bias(function, argument, bias, (kernel.shape[axes[1]],), x)
    return Dense(jnp.asarray(kernel), bias, axes)


def as_layouts(function: str, layouts: Any, number: int) -> list[str]:
    """Return one layout per layer."""
    each = list(layouts) if isinstance(layouts, (tuple, list)) else [layouts] * number
    if len(each) != number:
        raise ValueError(
            f"{function}: layouts must be one, or one for each of {number} layers, got {layouts}; pass as many"
        )
    for layout in each:
        check_choice(function, "layouts", layout, LAYOUTS)
    return each


def as_pair(layer: Any) -> Any:
    """Return the kernel of a layer, and its bias or ``None``."""
    return layer if isinstance(layer, (tuple, list)) and len(layer) == 2 else (layer, None)


def as_bias(function: str, argument: str, bias: Any, shape: tuple[int, ...], x: Array) -> Array | None:
    """Require a bias of a shape, and of the dtype of x, or ``None``."""
    if bias is None:
        return None
    check_array(function, argument, bias, (x.dtype.name,), cast="convert it to the dtype of x")
    if bias.shape != shape:
        raise ValueError(f"{function}: {argument} must have a bias of shape {shape}, got {describe(bias)}; reshape it")
    return jnp.asarray(bias)


def _contract(x: Array, kernel: Array) -> Array:
    """Return ``x @ kernel``, summed over the devices that share the features on an explicit mesh."""
    sharding = explicit_sharding(jax.typeof(kernel).sharding)
    if sharding is not None and sharding.spec[0] is None:
        sharding = None  # that of the operands
    if sharding is not None:
        sharding = sharding.update(spec=PartitionSpec(*jax.typeof(x).sharding.spec[:-1], sharding.spec[1]))
    return jnp.einsum("...i,io->...o", x, kernel, out_sharding=sharding)


def check_size(function: str, argument: str, layer: Dense, size: int, source: str) -> None:
    """Require a layer with as many inputs as its source has outputs."""
    if layer.sizes[0] != size:
        raise ValueError(
            f"{function}: {argument} must have {size} inputs, for {source}, got {layer.sizes[0]}; "
            "reshape it, or check layouts"
        )


def check_result(function: str, argument: str, y: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """Require what a function of the user has to return."""
    if not is_array(y) or (y.shape, y.dtype) != (shape, dtype):
        expected = f"{jnp.dtype(dtype).name}[{','.join(map(str, shape))}]"
        raise ValueError(f"{function}: {argument} must return {expected}, got {describe(y)}; keep shape and dtype")
    return jnp.asarray(y)


def activated(function: str, activation: Activation, h: Array) -> Array:
    """Return the activations of h; require an array like it."""
    return check_result(function, "activation", activation(h), h.shape, h.dtype)


def scaled(x: Array, kept: Kept | None) -> Array:
    """Divide by the keep probability, in float32 for floats of 16 bits."""
    return x if kept is None else (x.astype(real_dtype(x)) * (1 / kept.keep_probability)).astype(x.dtype)
