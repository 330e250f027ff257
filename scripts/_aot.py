"""Compile programs for GPUs and TPUs with their own compilers, without a device, and count what is in them.

Needs the extra ``accelerators``.
"""

import math
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

GPUS = {
    "h100": """
    gpu_device_info {
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
      core_count: 132 fpus_per_core: 128 registers_per_core_limit: 65536 registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
      cuda_compute_capability { major: 9 minor: 0 }
    }
    platform_name: "CUDA"
    dnn_version_info { major: 9 minor: 8 patch: 0 }
    device_description_str: "NVIDIA H100 80GB HBM3"
    """
}
TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
TARGETS = (*GPUS, *TPUS)

# Operations that a GPU launches as kernels, and that a TPU runs one after another.
KERNELS = ("fusion", "custom-call", "copy", "sort", "convolution", "dot", "reduce", "scatter", "gather")


class Stored(NamedTuple):
    """An array of decisions or words that a program writes to memory."""

    type: str
    """As in HLO, such as ``pred[8,512]``."""
    life: float
    """From its computation to its last use, as a share of the instructions of the program, or of the loop's body."""


class Facts(NamedTuple):
    """What is counted in a compiled program."""

    temporary_bytes: int
    kernels: int
    """Those of a loop count once."""
    stored: tuple[Stored, ...]
    """Arrays of bool, uint8 or uint32 with at least as many elements as asked for."""


def device(target: str) -> Any:
    """Return the description of a device for the compiler."""
    if target in GPUS:
        options: Any = {"topology": "1x1x1", "target_config": GPUS[target]}
        topology = topologies.get_topology_desc(platform="cuda", topology_name=target, **options)
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[target])
    return topology.devices[0]


def compile_for(target: str, f: Any, *arguments: Any) -> Any:
    """Compile ``jit(f)`` for one device; arguments are of type ``jax.ShapeDtypeStruct``."""
    sharding = SingleDeviceSharding(device(target))
    return jax.jit(f, in_shardings=sharding, out_shardings=sharding).lower(*arguments).compile()


def facts(compiled: Any, elements: int) -> Facts:
    """Count what is in a program. ``elements`` is the minimum size of stored arrays."""
    kernels, stored = 0, []
    for lines in _computations(compiled.as_text()):
        for i, line in enumerate(lines):
            if line.operation not in KERNELS:
                continue
            kernels += 1
            for dtype, shape in re.findall(r"(pred|u8|u32)\[([\d,]+)\]", line.result):
                if math.prod(map(int, shape.split(","))) >= elements:
                    stored.append(Stored(f"{dtype}[{shape}]", (_last_use(lines, i) - i) / len(lines)))
    return Facts(int(compiled.memory_analysis().temp_size_in_bytes), kernels, tuple(stored))


class _Line(NamedTuple):
    """An instruction of HLO."""

    name: str
    result: str
    operation: str
    operands: str


def _computations(text: str) -> list[list[_Line]]:
    """Return the instructions of each computation that is not part of a kernel, in the order of their schedule."""
    inside = set(re.findall(r"(?:calls|to_apply)=%([\w.\-]+)", text))
    found = []
    for block in text.split("\n\n"):
        head, _, body = block.partition("\n")
        name = re.match(r"(?:ENTRY )?%([\w.\-]+) ", head)
        if name is not None and name[1] not in inside:
            # Attributes follow the operands and may name other instructions, such as control predecessors.
            parts = re.findall(r"^ +(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*?)\)(?:,|$)", body, re.M)
            found.append([_Line(*part) for part in parts])
    return found


def _last_use(lines: list[_Line], first: int) -> int:
    """Return the position of the last use of a result, or of a part of it."""
    names, last = {lines[first].name}, first
    for i, line in enumerate(lines[first + 1 :], first + 1):
        if names & set(re.findall(r"%([\w.\-]+)", line.operands)):
            last = i
            if line.operation in ("get-tuple-element", "bitcast", "tuple"):
                names.add(line.name)
    return last
