"""Read the machine code of a program for an H100: registers, spills, and the instructions that its kernels take.

Needs the extra ``accelerators``. XLA writes assembly code; NVIDIA's tools translate it to machine code and print it.
"""

import importlib.util
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import _aot
from jax.sharding import Mesh

SM = "sm_90a"
CYCLES = 132 * 1.755e9  # per second, on all multiprocessors
BANDWIDTH = 3.0e12  # bytes per second, as measured for a copy
LANES = {"alu": 64, "imad": 64, "fp32": 128, "mufu": 16}  # of a multiprocessor; IMAD also occupies lanes of FP32
ISSUE = 128  # instructions of threads that a multiprocessor issues per cycle: four warps of 32 threads
OPCODES = {
    "alu": "LOP3 PLOP3 SHF IADD3 VIADD LEA IABS ISETP VIMNMX SEL FSEL FSETP FMNMX HSETP2 HMNMX2 PRMT MOV I2FP F2FP",
    "imad": "IMAD",
    "fp32": "FADD FMUL FFMA HADD2 HMUL2 HFMA2",
    "mufu": "MUFU F2F F2I I2F FRND POPC FLO BREV",
    "memory": "LDG STG LDC LDS STS LDL STL",
    "other": "S2R S2UR CS2R R2UR ACQBULK NOP EXIT",
}
PIPES = {opcode: pipe for pipe, opcodes in OPCODES.items() for opcode in opcodes.split()}


class Kernel(NamedTuple):
    """One launch of a kernel."""

    name: str
    threads: int
    """Of all blocks."""
    bytes: int
    """Of operands and results, each once."""
    registers: int
    """Of a thread."""
    spills: int
    """Bytes that a thread stores and loads because it has too few registers."""
    instructions: tuple[str, ...]
    """That a thread executes, with their modifiers but without operands, such as ``LDG.E.128``."""

    @property
    def loads(self) -> tuple[int, ...]:
        """Bytes of each load from global memory, the widest first."""
        return tuple(sorted((width(i) for i in self.instructions if i.startswith("LDG")), reverse=True))

    @property
    def pipes(self) -> dict[str, int]:
        """The number of instructions of each pipe."""
        counts = Counter(pipe(instruction) for instruction in self.instructions)
        return {name: counts[name] for name in OPCODES}

    @property
    def limits(self) -> dict[str, float]:
        """The seconds that the kernel takes at least, by what limits it."""
        cycles = {name: self.pipes[name] / lanes for name, lanes in LANES.items()}
        cycles["fp32"] += self.pipes["imad"] / LANES["fp32"]
        cycles["issue"] = len(self.instructions) / ISSUE
        return {"memory": self.bytes / BANDWIDTH} | {name: self.threads * c / CYCLES for name, c in cycles.items()}


def seconds(kernels: list[Kernel], gap: float = 0.0) -> float:
    """Predict the time of a program, with a gap before each launch."""
    return sum(gap + max(kernel.limits.values()) for kernel in kernels)


def kernels(mesh: Mesh, f: Any, *arguments: Any) -> list[Kernel]:
    """Compile ``jit(f)`` and return its kernels in the order of their launches; the last one writes the result.

    Raises:
      ValueError: a kernel has a loop or a branch, or the program does more than launch kernels.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = _aot.compile_for(mesh, f, *arguments, options=options)
        (sequence,) = Path(folder).glob("*thunk_sequence.txt")
        launched = list(launches(sequence.read_text()))
        code = {}
        for ptx in Path(folder).glob("*.ptx"):
            if ".entry" in ptx.read_text():
                log, listing = assemble(ptx)
                of_file = executed(listing)
                code |= {name: (*used, of_file[name]) for name, used in resources(log).items()}
    program = _aot.Program(compiled.as_text())
    lines = program.parts[program.entry]
    moved = {re.sub(r"\W", "_", line.name): program.moved(line) for line in lines if line.is_kernel}
    return [Kernel(name, threads, moved[name], *code[name]) for name, threads in launched]


# ---------------------------------------------------------------------------------- tools


def tool(name: str) -> str:
    """Return the path of one of NVIDIA's tools, of the packages that pip installs."""
    (folder,) = importlib.util.find_spec("nvidia.cu13").submodule_search_locations
    return str(Path(folder, "bin", name))


def assemble(ptx: Path) -> tuple[str, str]:
    """Translate a file of assembly code, and return the assembler's log and a listing of the machine code."""
    cubin = ptx.with_suffix(".cubin")

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, check=True)

    log = run(tool("ptxas"), "-v", f"-arch={SM}", str(ptx), "-o", str(cubin)).stderr
    return log, run(tool("nvdisasm"), "-c", str(cubin)).stdout


# ---------------------------------------------------------------------------------- parsers


def launches(sequence: str) -> Iterator[tuple[str, int]]:
    """Return the name and the number of threads of each launch, from XLA's list of what a program does."""
    for line in filter(str.strip, sequence.splitlines()):
        found = re.search(r"\] (\S+) +grid: \[([\d, ]+)\] threads: \[([\d, ]+)\]", line)
        if not found:
            raise ValueError(f"not the launch of a kernel: {line}")
        yield found[1], math.prod(map(int, f"{found[2]}, {found[3]}".split(", ")))


def resources(log: str) -> dict[str, tuple[int, int]]:
    """Return the registers and the spilled bytes of each kernel, from the assembler's log."""
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    return {
        name: (int(registers), int(stores) + int(loads))
        for name, stores, loads, registers in re.findall(pattern, log, re.DOTALL)
    }


def executed(listing: str) -> dict[str, tuple[str, ...]]:
    """Return the instructions that a thread of each kernel executes, if it does not exit early."""
    sections = re.split(r"^//-+ \.text\.(\S+) +-+$", listing, flags=re.MULTILINE)
    return {name: tuple(straight(name, text)) for name, text in zip(sections[1::2], sections[2::2])}


def straight(name: str, text: str) -> Iterator[str]:
    """Return the instructions up to the end of a kernel without loops and branches."""
    for predicate, instruction in re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(@!?U?P\d\s+)?([A-Z][\w.]*)", text, re.MULTILINE):
        if instruction.startswith(("BRA", "BRX", "JMP", "JMX", "CALL", "RET")):
            raise ValueError(f"{name} has a loop or a branch: its instructions cannot be counted")
        yield instruction
        if instruction == "EXIT" and not predicate:
            return
    raise ValueError(f"{name} has no end")


def pipe(instruction: str) -> str:
    """Return the unit that executes an instruction.

    Raises:
      ValueError: the instruction is not one of those that dropout takes, such as a matrix product.
    """
    opcode = instruction.split(".")[0]
    if opcode.startswith("U"):  # executed once for all threads of a warp, by a separate unit
        return "other"
    if opcode not in PIPES:
        raise ValueError(f"the pipe of {instruction} is not known")
    return PIPES[opcode]


def width(instruction: str) -> int:
    """Return the bytes of a load or store: of 4, if the instruction has no modifier for them."""
    found = re.search(r"\.[US]?(8|16|64|128)\b", instruction)
    return int(found[1]) // 8 if found else 4
