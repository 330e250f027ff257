"""Count the instruction bundles of Pallas kernels in programs for TPUs, as scheduled by the TPU's own compiler."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(tempfile.gettempdir(), f"llo-{os.getpid()}")
FLAGS = f"--xla_jf_dump_to={FOLDER} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
"""The value of ``LIBTPU_INIT_ARGS`` that this module needs, set before the first program is compiled."""


class Kernel(NamedTuple):
    """A kernel: a bundle is what a core starts in one cycle."""

    tiles: list[int]
    """Bundles of each part without branches that has matrix products: one for full tiles, and one for cut ones."""
    rest: int
    """All other bundles: what a step of the loop needs in any case, and what only some steps do."""


def kernels_of(compile_program: Callable[[], Any]) -> tuple[Any, list[Kernel]]:
    """Compile a program, and return it with its kernels in the order in which they were compiled."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    compiled = compile_program()
    analyses = [p for p in sorted(FOLDER.glob("*schedule-analysis*")) if "tpu_custom_call" in p.read_text()]
    analyses = [p for p in analyses if "-TLP-" not in p.name]  # the whole program
    kernels = []
    for path in analyses:
        time, name = path.name.split("-")[:2]
        (bundles,) = [p for p in FOLDER.glob(f"{time}-{name}-*") if "schedule-analysis" not in p.name]
        kernels.append(read(bundles.read_text()))
    shutil.rmtree(FOLDER, ignore_errors=True)
    return compiled, kernels


def read(text: str) -> Kernel:
    """Count the bundles of a kernel between its branches."""
    parts, bundles, multiplies = [], 0, False
    for line in text.splitlines():
        if not re.match(r"\s*(0x[0-9a-f]+|0)\s.*:.*\{", line):
            continue
        bundles += 1
        multiplies |= "vmatmul" in line
        if re.search(r"sbr\.rel| (PF|LB|LH|LE|CT):", line):
            parts.append((bundles, multiplies))
            bundles, multiplies = 0, False
    parts.append((bundles, multiplies))
    return Kernel([n for n, multiplies in parts if multiplies], sum(n for n, multiplies in parts if not multiplies))
