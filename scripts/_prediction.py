"""Predict the time of a program that was compiled for an H100: a model, not a measurement.

A kernel takes as long as its slowest part, and all other parts overlap with it. Kernels run one after another, with a
gap of 2.5 microseconds before each: CUDA graphs, which shorten it, are not in the model. The parts are:

- memory: operands and results, each once, at 3.0 TB/s, as measured for a copy;
- L2: those that stay in the L2 cache, at 5.5 TB/s. An array does if it and all that was read or written since its last
  use take at most 40 of the 50 MB. Results that are in the cache from an earlier step of a loop are not written to
  memory;
- matrix products at 500 TFLOP/s;
- operations on elements, as in HLO, on 132 multiprocessors at 1.755 GHz. Lanes per cycle: 92 for integers, comparisons,
  selections, and conversions, 128 for floating-point numbers, 16 for exponentials, logarithms, and divisions, and 128
  for all together. A rotation counts once. The assembler spreads integer operations over two pipes: 92 is what 64 lanes
  make of the 54.75 of 79.25 that it leaves to one of them in ``where(bernoulli)``.

Latency, partly filled multiprocessors, and the choice of tiles are not in the model.
"""

import math
import re
from collections import OrderedDict
from typing import Any, NamedTuple

import _aot
import _machine_code

GAP = 2.5e-6  # seconds before each launch
L2_BANDWIDTH, L2_BYTES = 5.5e12, 40e6
FLOPS = 500e12  # per second, of products of matrices of bfloat16
LANES = {"integer": 92, "float": 128, "special": 16}
FREE = """parameter constant broadcast iota bitcast bitcast-convert reshape transpose copy tuple get-tuple-element slice
dynamic-slice dynamic-update-slice concatenate pad dot call fusion reverse gather optimization-barrier while""".split()
SPECIAL = ("exponential", "log", "divide", "rsqrt", "sqrt", "tanh", "power", "exponential-minus-one", "log-plus-one")
SELECTING = ("compare", "select", "convert", "maximum", "minimum", "abs", "clamp")
SHIFTS = ("shift-left", "shift-right-logical")


class Prediction(NamedTuple):
    """The predicted time of a program, and what it is made of."""

    seconds: float
    l2_share: float
    """Of the moved bytes, those that stay in the L2 cache."""
    limits: dict[str, float]
    """The seconds that each part limits, and those of the gaps."""


class Cache:
    """Which arrays are in the L2 cache: the last ones used, up to its size."""

    def __init__(self) -> None:
        self.sizes: OrderedDict[str, int] = OrderedDict()

    def use(self, name: str, size: int) -> bool:
        """Use an array, and return whether it was in the cache."""
        total, hit = size, False
        for other in reversed(self.sizes):
            if other == name:
                hit = total <= L2_BYTES
                break
            total += self.sizes[other]
            if total > L2_BYTES:
                break
        self.sizes[name] = size
        self.sizes.move_to_end(name)
        while len(self.sizes) > 4096:
            self.sizes.popitem(last=False)
        return hit


class Model:
    """The time of one program."""

    def __init__(self, text: str):
        self.program = _aot.Program(text)
        self.cache = Cache()
        lines = ((part, x) for part, lines in self.program.parts.items() for x in lines if x.operation == "bitcast")
        self.views = {(part, x.name): _aot.names_in(x.operands)[0] for part, x in lines}
        self.moved = self.cached = 0
        self.limits = dict.fromkeys(("memory", "L2", "products", *LANES, "all operations", "gaps"), 0.0)

    def run(self, part: str) -> None:
        """Run the lines of a computation, each loop for all of its steps."""
        for line in self.program.parts[part]:
            if line.operation == "while":
                for _ in range(self.program.steps(line)):
                    self.run(line.called("body"))
            elif line.is_kernel:
                self.launch(part, line)

    def launch(self, part: str, line: _aot.Line) -> None:
        """Add the time of a kernel."""
        moved = self.program.moved(line)
        arrays = [(name, self.program.sizes[name]) for name in dict.fromkeys(_aot.names_in(line.operands))]
        arrays.append((line.name, self.program.sizes[line.name]))
        cached = sum(size for name, size in arrays if self.cache.use(f"{part} {self.origin(part, name)}", size))
        cached = min(cached, moved)
        self.moved, self.cached = self.moved + moved, self.cached + cached
        seconds = {"memory": (moved - cached) / _machine_code.BANDWIDTH, "L2": cached / L2_BANDWIDTH}
        seconds |= operations(self.program, line)
        slowest = max(seconds, key=seconds.__getitem__)
        if slowest in ("memory", "L2"):  # both take their time
            self.limits["memory"] += seconds["memory"]
            self.limits["L2"] += seconds["L2"]
        else:
            self.limits[slowest] += max(seconds[slowest], seconds["memory"] + seconds["L2"])
        self.limits["gaps"] += GAP

    def origin(self, part: str, name: str) -> str:
        """Return the name of the array that a line is another view of."""
        while (part, name) in self.views:
            name = self.views[part, name]
        return name


def predict(compiled: Any) -> Prediction:
    """Predict the time of a compiled program."""
    model = Model(compiled.as_text())
    model.run(model.program.entry)
    return Prediction(sum(model.limits.values()), model.cached / max(model.moved, 1), model.limits)


def operations(program: _aot.Program, line: _aot.Line) -> dict[str, float]:
    """Return the seconds of the products of a kernel, and of its operations on elements."""
    seconds = dict.fromkeys(("products", *LANES), 0.0)
    for name in computations(program, line):
        lines = program.lines(program.texts[name])
        by_name = {x.name: x for x in lines}
        rotated = {n for x in lines if x.operation == "or" for n in shifts(x, by_name)}
        for x in lines:
            count = elements(x.result)
            if x.operation == "dot":
                seconds["products"] += 2 * count * contracted(x, by_name) / FLOPS
            elif x.operation not in FREE and x.name not in rotated:
                if x.operation == "reduce":
                    count = elements(by_name[_aot.names_in(x.operands)[0]].result)
                floats = x.result.startswith(("f", "bf", "(f")) and x.operation not in SELECTING
                kind = "special" if x.operation in SPECIAL else "float" if floats else "integer"
                seconds[kind] += count / LANES[kind] / _machine_code.CYCLES
    seconds["all operations"] = sum(seconds[kind] * lanes for kind, lanes in LANES.items()) / _machine_code.ISSUE
    return seconds


def computations(program: _aot.Program, line: _aot.Line) -> list[str]:
    """Return the names of the computations that a kernel consists of."""
    names = []
    waiting = re.findall(r"\bcalls=%([\w.\-]+)", line.attributes)
    while waiting:
        names.append(waiting.pop())
        for x in program.lines(program.texts[names[-1]]):
            if x.operation in ("fusion", "call"):
                waiting += re.findall(r"\b(?:calls|to_apply)=%([\w.\-]+)", x.attributes)
    return names


def shifts(line: _aot.Line, by_name: dict[str, _aot.Line]) -> list[str]:
    """Return the two shifts of a rotation: together with the ``or``, one instruction."""
    names = _aot.names_in(line.operands)
    return names if {by_name[n].operation for n in names} == set(SHIFTS) else []


def elements(result: str) -> int:
    """Return the number of elements of an array, by its type in HLO."""
    found = re.search(r"\[([\d,]*)\]", result)
    return math.prod(map(int, filter(None, found[1].split(",")))) if found else 0


def contracted(line: _aot.Line, by_name: dict[str, _aot.Line]) -> int:
    """Return the number of products that each element of a matrix product sums."""
    shape = re.search(r"\[([\d,]*)\]", by_name[_aot.names_in(line.operands)[0]].result)[1].split(",")
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.attributes)[1]
    return math.prod(int(shape[int(axis)]) for axis in axes.split(","))
