"""One device or many processes, killed and resumed: the same masks, and on the same layout, the same bits."""

import importlib.util
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from xla_flags import QUICK

from jdrop import dropout_mask
from jdrop.keys import derive, per_example

pytestmark = pytest.mark.long  # with -n, use --dist loadfile to share runs between tests
EXAMPLE = Path(__file__).parents[1] / "examples" / "distributed_lm.py"
STEPS = 6
LAYOUTS = [(1, 1), (1, 4), (2, 2), (4, 1)]  # processes, devices of each
LIMIT = 300  # seconds: a run that takes longer hangs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for package in ("matplotlib", "optax", "orbax.checkpoint", "tqdm"):
        pytest.importorskip(package)
    return tmp_path_factory.mktemp("scale")


def start(layout, out, cache, *options, **environment):
    """Start the trainer in its own session, so that all of its processes can be killed at once."""
    processes, devices = map(str, layout)
    command = [sys.executable, str(EXAMPLE), "--processes", processes, "--devices", devices, "--out", str(out)]
    command += ["--steps", str(STEPS), "--dump-masks", *map(str, options)]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(QUICK),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **environment,
    }
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def kill(run):
    """Kill all processes of a run, and wait for them."""
    os.killpg(run.pid, signal.SIGKILL)
    return run.communicate()


def finish(run):
    """Wait for a run, and return its output, including the progress bar."""
    try:
        printed, errors = run.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the run hangs: {kill(run)}") from None
    assert run.returncode == 0, errors
    return printed + errors


def weights(printed):
    return re.search(r"SHA-256 of weights *\| (\w+)", printed)[1]


def losses(out):
    steps, values = np.loadtxt(out / "losses.csv", delimiter=",", ndmin=2).T
    return steps.astype(int).tolist(), values


def masks(out):
    return {path.name: dict(np.load(path)) for path in sorted(out.glob("masks-*.npz"))}


def assert_same_masks(actual, expected):
    for name in actual:
        assert actual[name].keys() == expected[name].keys() == {"ids", "embed", "attention", "out", "up", "down"}
        for place, mask in actual[name].items():
            np.testing.assert_array_equal(mask, expected[name][place], f"{name}, {place}")


def wait_until(ready, run):
    deadline = time.monotonic() + LIMIT
    while not ready():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def steps_done(out):
    return len((out / "losses.csv").read_text().splitlines()) if (out / "losses.csv").exists() else 0


@pytest.fixture(scope="module")
def undisturbed(folder):
    """Run the trainer on each layout; return the outputs."""
    return {
        layout: finish(start(layout, folder / "{}x{}".format(*layout), folder / "cache", "--every", 1))
        for layout in LAYOUTS
    }


def test_layouts_agree(undisturbed, folder):
    outs = [folder / "{}x{}".format(*layout) for layout in LAYOUTS]
    expected = masks(outs[0])
    assert len(expected) == STEPS
    for t, step in enumerate(expected.values()):
        for place in step.keys() - {"ids"}:
            kept = step[place]
            kept = kept[..., np.tril(np.ones(kept.shape[-2:], bool))] if place == "attention" else kept
            assert abs(kept.mean() - 0.9) < 5 * (0.9 * 0.1 / kept.size) ** 0.5, f"5 standard errors, {place}"
            assert t == 0 or (step[place] != expected["masks-00000000.npz"][place]).any(), "a mask for each step"
        keys = per_example(derive(jax.random.key(0), "dropout", t), step["ids"])  # by example id, not by position
        mask = dropout_mask(derive(keys[3], "embed"), step["embed"].shape[1:], 0.1)
        np.testing.assert_array_equal(step["embed"][3], mask)
    steps, curve = losses(outs[0])
    assert steps == list(range(STEPS))
    # A sum of n terms in any order has an error of at most n eps, relative to the sum of their sizes. The longest sums
    # are over the positions of a batch, in the loss and in gradients. Each step adds its own error to that of the others.
    terms = expected["masks-00000000.npz"]["embed"][..., 0].size
    bound = terms * np.finfo(np.float32).eps * (1 + np.arange(STEPS))
    for out in outs[1:]:
        assert_same_masks(masks(out), expected)
        assert masks(out).keys() == expected.keys()
        assert losses(out)[0] == steps
        assert (np.abs(losses(out)[1] - curve) <= bound * curve).all(), (losses(out)[1] - curve) / curve
    assert all(printed.count("validation loss") == 1 for printed in undisturbed.values()), "only by process 0"


FIRST_PORT = 65536 - 4096  # JAX derives the port from the job id: one of the last 4096


def free_port():
    while True:
        with socket.socket() as server:
            try:
                server.bind(("127.0.0.1", random.randrange(FIRST_PORT, 65536)))
            except OSError:
                continue
            return server.getsockname()[1]


def test_jax_detects_a_cluster(undisturbed, folder):
    """Two processes as a Slurm job step starts them, without the launcher."""
    out = folder / "cluster"
    job = {"SLURM_JOB_ID": str(free_port() - FIRST_PORT), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
    runs = [
        start((1, 2), out, folder / "cache", "--every", 1, "--cluster", SLURM_PROCID=i, SLURM_LOCALID=i, **job)
        for i in ("0", "1")
    ]
    printed = [finish(run) for run in runs]
    for line in ("characters/s", "validation loss"):
        assert line in printed[0] and line not in printed[1], "only process 0 shows progress"
    assert weights(printed[0]) == weights(undisturbed[2, 2])
    assert_same_masks(masks(out), masks(folder / "1x1"))


def example():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of other libraries
        spec = importlib.util.spec_from_file_location("distributed_lm", EXAMPLE)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def newest(folder):
    return example().newest(folder)


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "corrupt": lambda step: flip(largest_file(step)),
    "truncated": lambda step: truncate(largest_file(step)),
    "a file is missing": lambda step: largest_file(step).unlink(),
    "a file too many": lambda step: (step / "other").write_text("not of this run"),
    "missing": lambda step: shutil.rmtree(step),
    "empty": lambda step: (shutil.rmtree(step), step.mkdir()),
    "no sums": lambda step: step.with_suffix(".sha256").unlink(),
    "corrupt sums": lambda step: flip(step.with_suffix(".sha256")),
    "truncated sums": lambda step: truncate(step.with_suffix(".sha256")),
    "empty sums": lambda step: step.with_suffix(".sha256").write_text(""),
}
ANOTHER = 2  # other number of devices to resume on


def checkpoint(folder, step):
    return folder / f"step-{step:08}"


@pytest.fixture(scope="module")
def killed(folder, undisturbed):
    """Kill the trainer at a random moment, resume it, and kill it during a write; return its folders."""
    out, cache, saved = folder / "killed", folder / "cache", folder / "saved"
    options = ("--every", 1, "--checkpoints", saved)
    rng = random.Random(6)
    done = lambda: max((int(path.stem.removeprefix("step-")) for path in saved.glob("*.sha256")), default=0)
    at = rng.randrange(1, STEPS - 2)
    run = start((1, 4), out, cache, *options)
    wait_until(lambda: done() >= at, run)
    time.sleep(rng.random() * 0.1)
    kill(run)
    before = done()
    assert at <= before < STEPS - 1
    run = start((1, 4), out, cache, *options)
    wait_until(lambda: done() > before and list(saved.glob("*tmp*")), run)
    assert f"resumes at step {before}" in kill(run)[0]
    assert list(saved.glob("*tmp*")), "killed in the middle of writing"
    return out, saved


@pytest.fixture(scope="module")
def resumed(killed, folder):
    """Resume the killed run on the same number of devices and on another; return outputs, folders, and checkpoints."""
    runs = {}
    for layout in ((1, 4), (1, ANOTHER)):
        out, saved = (Path(shutil.copytree(path, folder / f"{path.name} {layout[1]}")) for path in killed)
        options = ("--every", 1, "--checkpoints", saved)
        runs[layout] = finish(start(layout, out, folder / "cache", *options)), out, saved
    return runs


def test_a_killed_and_resumed_run_equals_an_undisturbed_one(resumed, undisturbed, folder):
    """Bit for bit on the same number of devices; on another, with the same masks."""
    for layout, (printed, out, _) in resumed.items():
        assert re.search(r"resumes at step [1-9]", printed)
        assert_same_masks(masks(out), masks(folder / "1x4"))
        assert masks(out).keys() == masks(folder / "1x4").keys()
        assert losses(out)[0] == list(range(STEPS))
        if layout == (1, 4):
            assert weights(printed) == weights(undisturbed[layout])
            np.testing.assert_array_equal(losses(out)[1], losses(folder / "1x4")[1])


def test_only_the_newest_checkpoints_are_kept(resumed):
    for _, _, saved in resumed.values():
        kept = [checkpoint(saved, step) for step in range(STEPS - 2, STEPS + 1)]
        assert sorted(saved.iterdir()) == sorted([*kept, *(path.with_suffix(".sha256") for path in kept)])


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_skipped(damage, resumed, tmp_path, capsys):
    saved = Path(shutil.copytree(resumed[1, 4][2], tmp_path / "saved"))
    assert newest(saved) == STEPS and not capsys.readouterr().out
    for step in (STEPS, STEPS - 1):
        damage(checkpoint(saved, step))
        assert newest(saved) == step - 1
        printed = capsys.readouterr().out
        assert f"checkpoint {checkpoint(saved, step)}: " in printed


def test_new_checkpoints_are_kept_if_all_later_ones_are_damaged(resumed, tmp_path, capsys):
    saved = Path(shutil.copytree(resumed[1, 4][2], tmp_path / "saved"))
    for step in range(STEPS - 2, STEPS + 1):
        flip(largest_file(checkpoint(saved, step)))
    assert newest(saved) == 0
    module = example()
    for step in (1, 2):
        module.save(saved, step, {"params": np.ones(3)}, keep=1)
        assert newest(saved) == step and checkpoint(saved, step - 1).exists() is False
    assert "bad: " in capsys.readouterr().out


def test_a_finished_run_has_nothing_to_do(resumed, folder, tmp_path):
    """Even if its losses are lost. A checkpoint of more steps than requested is an error."""
    saved = Path(shutil.copytree(resumed[1, 4][2], tmp_path / "saved"))
    printed = finish(start((1, 4), tmp_path / "out", folder / "cache", "--checkpoints", saved))
    assert weights(printed) == weights(resumed[1, 4][0]) and "no step is left" in printed
    run = start((1, 4), tmp_path / "out", folder / "cache", "--checkpoints", saved, "--steps", STEPS - 1)
    assert f"has made {STEPS} steps" in run.communicate(timeout=LIMIT)[1] and run.returncode == 1


def test_devices_that_cannot_share_the_batch():
    size = example().size_of_model
    assert [size(n, None) for n in (1, 2, 4, 8, 16, 32, 64)] == [1, 2, 2, 2, 2, 2, 4]
    for devices, wanted in ((3, None), (8, 3), (128, None), (2, 4)):
        with pytest.raises(SystemExit, match=f"^{devices} devices.* cannot share"):
            size(devices, wanted)


def test_a_flipped_bit_resumes_from_the_previous_checkpoint(resumed, undisturbed, folder, tmp_path):
    out, saved = (Path(shutil.copytree(path, tmp_path / path.name)) for path in resumed[1, 4][1:])
    flip(largest_file(checkpoint(saved, STEPS)))
    options = ("--every", 1, "--checkpoints", saved)
    printed = finish(start((1, 4), out, folder / "cache", *options))
    assert f"{checkpoint(saved, STEPS)}: bad: " in printed and f"resumes at step {STEPS - 1}" in printed
    assert weights(printed) == weights(undisturbed[1, 4])


def children(pid):
    """Return the child processes of a process by their process numbers."""
    numbered = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        arguments = Path(f"/proc/{child}/cmdline").read_text().split("\0")
        if "--process" in arguments:
            numbered[int(arguments[arguments.index("--process") + 1])] = int(child)
    return numbered


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find a process")
def test_either_process_of_two_dies(undisturbed, folder):
    """The other one ends within the heartbeat, the launcher reports it, and the same command resumes."""
    out, heartbeat = folder / "dies", 10
    options = ("--every", 1, "--checkpoints", folder / "saved of dies", "--heartbeat", heartbeat)
    for victim in (0, 1):
        before = max(1, steps_done(out))
        run = start((2, 2), out, folder / "cache", *options)
        wait_until(lambda before=before: steps_done(out) > before, run)
        both = children(run.pid)
        os.kill(both[victim], signal.SIGKILL)
        printed, errors = run.communicate(timeout=3 * heartbeat)  # a heartbeat, and time to notice it on a busy machine
        assert run.returncode == 1
        assert bool(re.search(r"resumes at step [1-9]", printed)) == (victim > 0)
        assert f"process {victim} of 2 was ended by SIGKILL; " in errors.splitlines()[-1], errors
        assert not any(Path(f"/proc/{pid}").exists() for pid in both.values())
    printed = finish(start((2, 2), out, folder / "cache", *options))
    assert re.search(r"resumes at step [1-9]", printed)
    assert weights(printed) == weights(undisturbed[2, 2])
    assert_same_masks(masks(out), masks(folder / "1x1"))
