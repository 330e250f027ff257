"""Time budget, error handling, and timing for ``device_report.py``."""

import dataclasses
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import _bench
import _clocks

Row = dict[str, Any]
Timed = tuple[_clocks.Clock, Row]  # a clock, and facts that are known before it runs
Maker = Callable[[], Timed]

ROOT = Path(__file__).parents[1]
LATE, STOPPED = "skipped: out of time", "stopped: out of time"
NOT_PRINTED = ("setup_seconds", "ratio_25", "ratio_75")
ROUNDS = 7
IN_FLIGHT_SECONDS, MAX_CALLS = 0.02, 20  # calls per measurement, so that the device never waits for the next call


class UnavailableError(Exception):
    """Why a case cannot run on this machine."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes and time of a report, and the bandwidth that its parts compare with."""

    small: bool
    deadline: float  # of time.monotonic()
    copy: dict[str, float] = dataclasses.field(default_factory=dict)
    """Gigabytes per second of a copy, by dtype."""

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def reserving(self, seconds: float) -> "Plan":
        """Return the plan with less time, to leave some for the parts that follow."""
        return dataclasses.replace(self, deadline=self.deadline - seconds)


def attempt(plan: Plan, case: Row, rows: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """Yield the rows of a case, or a row that says why there are none; an exception ends only this case."""
    if plan.seconds_left() <= 0:
        yield {**case, "missing": LATE}
        return
    try:
        for row in rows():
            yield case | row
    except (ModuleNotFoundError, UnavailableError) as reason:
        yield {**case, "missing": f"not available: {reason}"}
    except Exception as error:  # the report must be complete
        yield {**case, "error": describe(error)}


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# ---------------------------------------------------------------------------------- timing


def time_block(plan: Plan, makers: Mapping[str, Maker], floor: str) -> list[Row]:
    """Set up each contender and run it once; then time those that run, interleaved, relative to the floor."""
    clocks: dict[str, _clocks.Clock] = {}
    rows: list[Row] = []
    for name, make in makers.items():

        def set_up(name: str = name, make: Maker = make) -> Iterator[Row]:
            start = time.monotonic()
            clock, facts = make()
            warm_up(clock, plan.small)
            clocks[name] = clock
            yield {**facts, "setup_seconds": time.monotonic() - start}

        rows += attempt(plan, {"contender": name}, set_up)
    times = _bench.interleave([clocks], 2 if plan.small else ROUNDS)
    for row in rows:
        if row["contender"] in times:
            row |= numbers(times[row["contender"]], times.get(floor))
    return rows


def warm_up(clock: _clocks.Clock, small: bool) -> None:
    """Compile, and choose the number of calls in flight."""
    clock.calls = 1
    clock(), clock()
    clock.calls = 1 if small else max(1, min(MAX_CALLS, round(IN_FLIGHT_SECONDS / clock())))


def numbers(seconds: Sequence[float], floor: Sequence[float] | None) -> Row:
    ratio, low, high = _bench.ratios(seconds, floor) if floor else (None, None, None)
    return {"milliseconds": 1e3 * _bench.median(seconds), "ratio": ratio, "ratio_25": low, "ratio_75": high}


# ---------------------------------------------------------------------------------- parts and programs

Part = Callable[[Plan], Iterator[Row]]


def run_part(part: Part, plan: Plan, entry: Row, save: Callable[[], None]) -> None:
    """Fill the entry of a part: rows, status, and seconds. Save after each row; an exception ends only this part."""
    start = time.monotonic()
    entry |= {"part": part.__name__, "status": "running", "rows": []}
    try:
        if plan.seconds_left() <= 0:
            entry["status"] = LATE
        else:
            for row in part(plan):
                entry["rows"].append(row)
                save()
            entry["status"] = status(entry["rows"])
    except Exception as error:  # the other parts must run
        entry |= {"status": "raised", "error": describe(error), "traceback": traceback.format_exc()[-2000:]}
        print(entry["traceback"])
    entry["seconds"] = time.monotonic() - start
    save()
    print_part(entry)


def replace_json(path: str | None, report: Row) -> None:
    """Replace the file of the report, which stays whole if this process is killed."""
    if path:
        _bench.write_json(f"{path}.part", report)
        os.replace(f"{path}.part", path)


def status(rows: Sequence[Row]) -> str:
    if any(row.get("ok") is False or "error" in row for row in rows):
        return "failed"
    return "incomplete" if any(row.get("missing") in (LATE, STOPPED) for row in rows) else "passed"


def print_part(entry: Row) -> None:
    """Print the rows of a part, with a column for each name."""
    names = dict.fromkeys(name for row in entry["rows"] for name in row)
    columns = [name for name in names if name not in NOT_PRINTED]
    lines = [[str(v) if isinstance(v := row.get(name), bool) else v for name in columns] for row in entry["rows"]]
    _bench.table(f"{entry['part']}: {entry['status']}, {entry['seconds']:.0f} s", columns or [""], lines)


def run_program(command: Sequence[str], seconds: float, **environment: str) -> tuple[int | None, str]:
    """Run a program in the root of the repository; return its exit code, None if it ran out of time, and its output."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that its workers can be killed with it
    )
    try:
        output = process.communicate(timeout=seconds)[0]
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
