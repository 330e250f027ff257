"""Compile programs for GPUs and TPUs with their own compilers, without a device, and count what is in them.

Needs the extra ``accelerators``.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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

# Operations that a GPU launches as kernels, and that a TPU runs one after another.
KERNELS = ("fusion", "custom-call", "copy", "sort", "convolution", "dot", "reduce", "scatter", "gather")
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute", "ragged-all-to-all")


class Stored(NamedTuple):
    """An array of decisions or words that a program writes to memory."""

    type: str
    """As in HLO, such as ``pred[8,512]``."""
    life: float
    """From its computation to its last use, as a share of the instructions of the program, or of the loop's body."""


class Facts(NamedTuple):
    """What is counted in a compiled program for one of its devices."""

    temporary_bytes: int
    kernels: int
    """Those of a loop count once."""
    launches: int
    """Those of a loop count once for each of its steps."""
    collectives: int
    """Those of a loop count once."""
    moved_bytes: int
    """Operands and results of all launches, each once; of slices, only what a launch reads and writes."""
    cycles: int
    """Estimated by the compiler, with the steps of loops; 0 for GPUs, for which it estimates none."""
    stored: tuple[Stored, ...]
    """Arrays of bool, uint8 or uint32 with at least as many elements as asked for."""


def mesh(target: str, devices: int = 1) -> Mesh:
    """Return the description of up to four devices for the compiler."""
    if target in GPUS:
        options: Any = {"topology": f"1x1x{devices}", "target_config": GPUS[target]}
        topology = topologies.get_topology_desc(platform="cuda", topology_name=target, **options)
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[target])
    return Mesh(np.array(topology.devices[:devices]), ("data",))


def compile_for(mesh: Mesh, f: Any, *arguments: Any, options: dict[str, Any] | None = None) -> Any:
    """Compile ``jit(f)``; arguments are of type ``jax.ShapeDtypeStruct``, replicated if they have no sharding."""
    replicated = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda x: x if x.sharding else x.update(sharding=replicated), arguments)
    return jax.jit(f).lower(*placed).compile(compiler_options=options)


def facts(compiled: Any, elements: int) -> Facts:
    """Count what is in a program. ``elements`` is the minimum size of stored arrays."""
    program = Program(compiled.as_text())
    lines = [line for part in program.parts.values() for line in part]
    return Facts(
        int(compiled.memory_analysis().temp_size_in_bytes),
        kernels=sum(line.is_kernel for line in lines),
        launches=program.total(lambda line: line.is_kernel),
        collectives=sum(line.is_collective for line in lines),
        moved_bytes=program.total(program.moved),
        cycles=program.total(lambda line: line.cycles),
        stored=tuple(program.stored(elements)),
    )


class Line(NamedTuple):
    """An instruction of HLO."""

    name: str
    result: str
    operation: str
    operands: str
    attributes: str

    @property
    def is_kernel(self) -> bool:
        return self.operation in KERNELS

    @property
    def is_collective(self) -> bool:
        return self.operation.removesuffix("-start") in COLLECTIVES

    @property
    def cycles(self) -> int:
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else 0

    def called(self, role: str) -> str:
        """Return the name of a computation that the instruction calls."""
        return re.search(rf"\b{role}=%([\w.\-]+)", self.attributes)[1]


class Program:
    """A compiled program."""

    def __init__(self, text: str):
        blocks = [(self.head(block), block) for block in re.split(r"\n\n+", text)]
        self.texts = {name: block for name, block in blocks if name}
        self.entry = next(name for name, block in self.texts.items() if block.startswith("ENTRY"))
        inside = set(re.findall(r"(?:calls|to_apply)=%([\w.\-]+)", text))
        self.parts = {name: self.lines(block) for name, block in self.texts.items() if name not in inside}
        """The instructions of each computation that is not part of a kernel, in the order of their schedule."""
        self.sizes = {line.name: bytes_of(line.result) for part in self.parts.values() for line in part}

    @staticmethod
    def head(block: str) -> str | None:
        """Return the name of a computation."""
        name = re.match(r"(?:ENTRY )?%([\w.\-]+) ", block)
        return name[1] if name else None

    @staticmethod
    def lines(block: str) -> list[Line]:
        # Attributes follow the operands and may name other instructions, such as control predecessors.
        found = re.findall(r"^ +(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*?)\)(,.*|)$", block, re.M)
        return [Line(*parts) for parts in found]

    def total(self, count: Callable[[Line], int], name: str | None = None) -> int:
        """Return the sum over all instructions, those of a loop once for each of its steps."""
        sum_of_lines = 0
        for line in self.parts[name or self.entry]:
            sum_of_lines += count(line)
            if line.operation == "while":
                sum_of_lines += self.steps(line) * self.total(count, line.called("body"))
        return sum_of_lines

    def moved(self, line: Line) -> int:
        """Return the bytes that a kernel reads and writes, if it reads each operand once."""
        if not line.is_kernel:
            return 0
        operands = names_in(line.operands)
        inside = self.lines(self.texts[line.called("calls")]) if line.operation == "fusion" else []
        sizes = {x.name: bytes_of(x.result) for x in inside}
        if not inside:
            return self.sizes[line.name] + sum(self.sizes[name] for name in set(operands))
        by_name, root = {x.name: x for x in inside}, inside[-1]
        results = [by_name[name] for name in names_in(root.operands)] if root.operation == "tuple" else [root]
        moved = 0
        for x in results:  # an update writes only a part
            moved += sizes[names_in(x.operands)[1]] if x.operation == "dynamic-update-slice" else sizes[x.name]
        for x in inside:
            if x.operation == "parameter":
                uses = [y for y in inside if x.name in names_in(y.operands)]
                sliced = (("dynamic-slice", x.name), ("dynamic-update-slice", x.name))
                if uses and all((y.operation, names_in(y.operands)[0]) in sliced for y in uses):
                    moved += sum(sizes[y.name] for y in uses if y.operation == "dynamic-slice")
                else:
                    moved += sizes[x.name]
        return moved

    def steps(self, line: Line) -> int:
        """Return the number of steps of a loop: noted by the compiler, or the only constant of the condition."""
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', line.attributes)
        if noted:
            return int(noted[1])
        text = self.texts[line.called("condition")]
        text += "".join(self.texts[name] for name in re.findall(r"calls=%([\w.\-]+)", text))
        (steps,) = re.findall(r"s32\[\]\S* constant\((\d+)\)", text)
        return int(steps)

    def stored(self, elements: int) -> Iterator[Stored]:
        """Return the large arrays of bool, uint8, or uint32 that kernels write."""
        for lines in self.parts.values():
            for i, line in ((i, line) for i, line in enumerate(lines) if line.is_kernel):
                for dtype, shape in re.findall(r"(pred|u8|u32)\[([\d,]+)\]", line.result):
                    if math.prod(map(int, shape.split(","))) >= elements:
                        yield Stored(f"{dtype}[{shape}]", (last_use(lines, i) - i) / len(lines))


def names_in(operands: str) -> list[str]:
    """Return the names of instructions."""
    return re.findall(r"%([\w.\-]+)", operands)


def bytes_of(result: str) -> int:
    """Return the size of an array, or of a tuple of arrays, by its type in HLO."""
    found = re.findall(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", result)
    return sum(int(bits or 8) * math.prod(map(int, filter(None, shape.split(",")))) // 8 for bits, shape in found)


def last_use(lines: list[Line], first: int) -> int:
    """Return the position of the last use of a result, or of a part of it."""
    names, last = {lines[first].name}, first
    for i, line in enumerate(lines[first + 1 :], first + 1):
        if names & set(names_in(line.operands)):
            last = i
            if line.operation in ("get-tuple-element", "bitcast", "tuple"):
                names.add(line.name)
    return last
