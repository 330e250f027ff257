"""Claim: a trainer killed many times, at random steps and during writes, ends bit for bit like an undisturbed run.

Starts ``examples/distributed_lm.py``, kills all of its processes with SIGKILL at a random moment (with a fixed seed;
every second time while a checkpoint is being written), and resumes it with the same command. After the requested number
of kills, the run may finish. Its weights and losses must equal those of an undisturbed run on the same layout. Needs
the packages of the extra ``examples``.

    python scripts/check_faults.py --kills 20
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TRAINER = Path(__file__).parents[1] / "examples" / "distributed_lm.py"


def start(options: Any, folder: Path, cache: Path) -> subprocess.Popen[str]:
    """Start the trainer in its own session, so that all of its processes can be killed at once."""
    command = [sys.executable, str(TRAINER), "--steps", str(options.steps), "--every", "1"]
    command += ["--processes", str(options.processes), "--devices", str(options.devices)]
    command += ["--out", str(folder), "--checkpoints", str(folder / "checkpoints")]
    environment = {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **os.environ}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **quiet)


def kill(run: subprocess.Popen[str]) -> str:
    os.killpg(run.pid, signal.SIGKILL)
    return run.communicate()[0]


def finish(run: subprocess.Popen[str], limit: float) -> str:
    """Wait for a run to finish, and return the digest of its weights."""
    try:
        printed, _ = run.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        sys.exit(f"a run hangs\n{kill(run)}")
    if run.returncode:
        sys.exit(f"a run failed\n{printed}")
    return re.search(r"SHA-256 of weights *\| (\w+)", printed)[1]


def newest(folder: Path) -> int:
    """Return the step of the newest checkpoint that has checksums."""
    return max((int(path.stem.removeprefix("step-")) for path in (folder / "checkpoints").glob("*.sha256")), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a run counts as hanging")
    options = parser.parse_args()
    if options.steps <= options.kills:
        parser.error("--steps must exceed --kills: each run makes at least one step before it is killed")

    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        cache, undisturbed, killed = (Path(name) / part for part in ("cache", "undisturbed", "killed"))
        expected = finish(start(options, undisturbed, cache), options.limit)
        during_writes = 0
        for number in range(1, options.kills + 1):
            run, started, before = start(options, killed, cache), time.monotonic(), newest(killed)
            writing = number % 2 == 0
            while newest(killed) <= before or (writing and not list((killed / "checkpoints").glob("*tmp*"))):
                if time.monotonic() - started > options.limit:
                    sys.exit(f"a run hangs\n{kill(run)}")
                if run.poll() is not None:
                    break
                time.sleep(0.001)
            time.sleep(rng.random() * (0.02 if writing else 0.3))
            if run.poll() is not None:
                print(f"kill {number}: the run had already finished: pass more --steps")
                print(run.communicate()[0])
                return 1
            kill(run)
            unfinished = bool(list((killed / "checkpoints").glob("*tmp*")))
            during_writes += unfinished
            where = "in the middle of writing a checkpoint" if unfinished else "between checkpoints"
            print(f"kill {number} of {options.kills}: after step {newest(killed)}, {where}", flush=True)
        weights = finish(start(options, killed, cache), options.limit)
        same = (undisturbed / "losses.csv").read_bytes() == (killed / "losses.csv").read_bytes()
    ok = weights == expected and same and (during_writes > 0 or options.kills < 2)
    print(f"weights {weights} after {options.kills} kills, {during_writes} of them during a write; ", end="")
    print(f"undisturbed {expected}; ", end="")
    print(f"losses {'equal' if same else 'DIFFER'}: {'ok' if ok else 'FAILED'}")
    return int(not ok)


if __name__ == "__main__":
    sys.exit(main())
