"""Compile for GPUs and TPUs with their own compilers, without a device, and read what they made of a program.

Needs the extra ``accelerators``. Facts are those of compiled programs: nothing is run.
"""

import math
import os
import re
from collections import Counter
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the host needs no device either
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # otherwise, libtpu asks a cloud machine for its metadata
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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

# Operations that a device runs one after another. On TPUs, a fusion or a copy is no launch, but takes a turn as well.
LAUNCHED = ("fusion", "custom-call", "copy", "sort", "convolution", "dot", "reduce", "scatter", "gather", "all-reduce")


class Stored(NamedTuple):
    """An array of decisions or words that a program writes to memory."""

    type: str
    """As in HLO, such as ``pred[8,512]``."""
    life: float
    """From its first to its last use, as a share of the instructions of its computation."""


class Facts(NamedTuple):
    """What is known of a compiled program."""

    temporary_bytes: int
    kernels: int
    """Operations that are launched; those of a loop count once."""
    loops: int
    stored: tuple[Stored, ...]
    """Arrays of bool, or of unsigned integers of 8 or 32 bits, with at least as many elements as asked for."""
    collectives: int


def mesh(target: str, devices: int = 1) -> Mesh:
    """Return a mesh of devices that are not there."""
    if target in GPUS:
        options: Any = {"topology": f"1x1x{devices}", "target_config": GPUS[target]}
        topology = topologies.get_topology_desc(platform="cuda", topology_name=target, **options)
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[target])
    return Mesh(np.array(topology.devices[:devices]), ("devices",))


def compile_for(target: str, f: Any, *arguments: Any) -> Any:
    """Compile ``jit(f)`` for one device and arguments of ``jax.ShapeDtypeStruct``.

    Keys have no type of this kind: pass their words, and wrap them in f with ``jax.random.wrap_key_data``.
    """
    whole = NamedSharding(mesh(target), PartitionSpec())
    return jax.jit(f, in_shardings=whole, out_shardings=whole).lower(*arguments).compile()


def facts(compiled: Any, elements: int) -> Facts:
    """Read a program. ``elements`` is the least size of stored arrays that are of interest."""
    text = compiled.as_text()
    kinds: Counter[str] = Counter()
    stored: list[Stored] = []
    for lines in _computations(text):
        for i, (name, result, kind, _) in enumerate(lines):
            kinds[kind] += 1
            if kind not in LAUNCHED:
                continue
            for found in re.findall(r"(?:pred|u8|u32)\[[\d,]+\]", result):
                if math.prod(map(int, found[found.index("[") + 1 : -1].split(","))) >= elements:
                    stored.append(Stored(found, _last_use(lines, name) / len(lines) - i / len(lines)))
    collectives = sum(n for kind, n in kinds.items() if kind.startswith(("all-", "collective", "reduce-scatter")))
    kernels = sum(kinds[kind] for kind in LAUNCHED)
    temporary = int(compiled.memory_analysis().temp_size_in_bytes)
    return Facts(temporary, kernels, kinds["while"], tuple(stored), collectives)


Line = tuple[str, str, str, str]  # name, type of the result, operation, the rest


def _computations(text: str) -> list[list[Line]]:
    """Return the instructions of each computation that is not part of a fusion, in the order of their schedule."""
    inside = set(re.findall(r"(?:calls|to_apply)=%([\w.\-]+)", text))
    found = []
    for block in text.split("\n\n"):
        head, *lines = block.splitlines() or [""]
        name = re.match(r"(?:ENTRY )?%([\w.\-]+) ", head)
        if name is None or name[1] in inside:
            continue
        parsed = [re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)", line) for line in lines]
        found.append([(*match.groups()[:3], match[4].partition("), ")[0] + ")") for match in parsed if match])
    return found  # type: ignore[return-value]


def _last_use(lines: list[Line], name: str) -> int:
    """Return the line of the last use of a result, or of a part of it."""
    names, last = {name}, next(i for i, line in enumerate(lines) if line[0] == name)
    for i, (other, _, kind, rest) in enumerate(lines):
        if any(re.search(rf"%{re.escape(n)}[,)]", rest) for n in names):
            last = max(last, i)
            if kind in ("get-tuple-element", "bitcast", "tuple"):
                names.add(other)
    return last
