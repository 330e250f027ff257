"""The train steps of the examples, compiled for GPUs and TPUs."""

import contextlib
import dataclasses
import functools
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import _aot
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

FOLDER = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


class Step(NamedTuple):
    """A function that an example compiles, and what it passes to it."""

    f: Callable[..., Any]
    options: dict[str, Any]
    """Of ``jax.jit``."""
    arguments: tuple[Any, ...]
    """The types of arrays, with their shardings. Static arguments are values."""
    keywords: dict[str, Any]


def train_steps(name: str) -> list[Step]:
    """Run an example for one step, and return its different train steps."""
    steps: list[Step] = []
    jit = jax.jit

    def recording(f: Any, **options: Any) -> Any:
        compiled = jit(f, **options)
        if "step" not in getattr(f, "__name__", ""):
            return compiled

        @functools.wraps(f)
        def call(*arguments: Any, **keywords: Any) -> Any:
            step = Step(f, options, *jax.tree.map(type_of, (arguments, keywords)))
            if step not in steps:
                steps.append(step)
            return compiled(*arguments, **keywords)

        return call

    with mock.patch.object(jax, "jit", recording), tempfile.TemporaryDirectory() as out, quiet():
        with mock.patch.object(sys, "argv", [name, "--steps", "1", "--out", out]), contextlib.suppress(SystemExit):
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    if not steps:
        raise ValueError(f"{name} compiles no function whose name contains 'step'")
    return steps


def type_of(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with open("/dev/null", "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        yield


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Words:
    """The words of a key, because a key cannot be described for a device."""

    of_key: jax.ShapeDtypeStruct


def compile_for(target: str, step: Step) -> Any:
    """Compile a train step for as many devices as the example uses, with its mesh."""
    types = [x for x in jax.tree.leaves((step.arguments, step.keywords)) if isinstance(x, jax.ShapeDtypeStruct)]
    meshes = [x.sharding.mesh for x in types if isinstance(x.sharding, NamedSharding)]
    host = meshes[0] if meshes else _aot.mesh(target)
    devices = _aot.mesh(target, host.size).devices.reshape(host.devices.shape)
    mesh = Mesh(devices, host.axis_names, axis_types=host.axis_types)

    def moved(sharding: Any) -> NamedSharding:
        return NamedSharding(mesh, sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec())

    def described(x: Any) -> Any:
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return Words(jax.eval_shape(jax.random.key_data, x).update(sharding=moved(None)))
        return x.update(sharding=moved(x.sharding))

    @functools.wraps(step.f)
    def f(*arguments: Any, **keywords: Any) -> Any:
        key_of = lambda x: jax.random.wrap_key_data(x.of_key) if isinstance(x, Words) else x
        arguments, keywords = jax.tree.map(key_of, (arguments, keywords), is_leaf=lambda x: isinstance(x, Words))
        return step.f(*arguments, **keywords)

    options = jax.tree.map(lambda x: moved(x) if isinstance(x, NamedSharding) else x, step.options)
    arguments, keywords = jax.tree.map(described, (step.arguments, step.keywords))
    # Without a device to tune for, the compiler finds no tile for the odd sizes of some matrix products.
    flags = {"xla_gpu_enable_triton_gemm": False} if target in _aot.GPUS else None
    return jax.jit(f, **options).lower(*arguments, **keywords).compile(flags)
