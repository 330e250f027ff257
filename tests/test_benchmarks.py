"""The benchmarks run on tiny sizes and write their results; no test here asserts a time."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
from members import MEMBERS, Bench
from xla_flags import QUICK

from jdrop import thin

SCRIPTS = pathlib.Path(__file__).parent.parent / "scripts"
VARIANTS = ("unrolled, plain, one key", "scan, plain, one key", "scan, checkpoint, per-example keys")
OUR_ATTENTION = {"jdrop chunked", "jdrop chunked, causal", "jdrop reference"}
PARTS_OF_THIN = ("blocks", "branches", "steps")
DEPTH = "stochastic_depth 0.5"  # which has its own measurement
OURS = {"scale", "jdrop fast", "jdrop jax", "where(bernoulli)"}
pytestmark = pytest.mark.benchmarks


def run(script, *options, out, path=()):
    command = [sys.executable, "-W", "error", str(SCRIPTS / script), *options]
    env = {
        **os.environ,
        "XLA_FLAGS": " ".join(QUICK),
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
    }
    env["PYTHONPATH"] = os.pathsep.join([*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout, json.loads(out.read_text())


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    speed, memory = folder / "speed.json", folder / "memory.json"
    options = ("--sizes", "64x128", "--rounds", "2", "--peers", "none", "--json", str(speed))
    speed_report = run("bench_dropout.py", *options, out=speed)
    options = ("--layers", "1", "--size", "4x64x128", "--only", *VARIANTS, "--peers", "none", "--json", str(memory))
    return speed, memory, speed_report, run("bench_memory.py", *options, out=memory)


def test_bench_dropout(reports):
    printed, report = reports[2]
    assert report["claim"] in printed and report["claim"].startswith("Claim: ")
    assert {"cpu", "cores", "device"} <= set(report["machine"]) and {"jax", "python"} <= set(report["versions"])
    for dtype in ("float32", "bfloat16"):
        for direction in ("forward", "forward+backward"):
            rows = [r for r in report["rows"] if (r["dtype"], r["direction"]) == (dtype, direction)]
            assert {r["contender"] for r in rows} == OURS
            assert all(r["ratio"] > 0 and r["rounds"] >= 1 for r in rows)


def test_bench_family(need, tmp_path):
    for library in ("flax", "keras", "torch"):
        need(library)
    peers.require_file("timm", "layers/drop.py")
    path = tmp_path / "family.json"
    _, report = run("bench_dropout.py", "--family", "--small", "--rounds", "2", "--json", str(path), out=path)
    rows = report["rows"]
    measured = {r["member"] for r in rows if r["contender"] == "jdrop"}
    assert measured == {name for name, member in MEMBERS.items() if isinstance(member.bench, Bench)} | {DEPTH}
    assert {"torch", "keras", "linen", "timm"} <= {r["contender"] for r in rows}
    assert all(r["ratio"] > 0 and (r["limit"] is not None) == (r["contender"] == "jdrop") for r in rows)


def test_bench_memory(reports):
    printed, report = reports[3]
    assert "no dropout" in printed
    assert {r["variant"] for r in report["rows"]} == set(VARIANTS)
    assert all(r["ratio"] < 1.005 for r in report["rows"] if r["contender"].startswith("jdrop"))
    residuals = {r["contender"]: r["bytes"] for r in report["closures"]}
    assert residuals["jdrop fast"] == residuals["jdrop jax"] == 8  # a seed
    assert residuals["where(bernoulli)"] >= 4 * 64 * 128


def test_bench_attention(need, tmp_path):
    need("flax")
    path = tmp_path / "attention.json"
    options = ("--lengths", "64", "--heads", "2", "--width", "16", "--rounds", "1", "--json", str(path))
    _, report = run("bench_attention.py", *options, "--peers", "linen", "nnx", out=path)
    rows = {(r["direction"], r["contender"], r["rate"]): r for r in report["rows"]}
    assert {name for _, name, _ in rows} == {*OUR_ATTENTION, "jax.nn", "linen", "nnx"}
    for direction in ("forward", "forward+backward"):
        for name in OUR_ATTENTION:
            row = rows[direction, name, 0.1]
            assert row["to_none"] > 0 and row["to_full"] > 0 and row["temporary_bytes"] > 0


def test_bench_thin(need, tmp_path):
    need("flax")
    path = tmp_path / "thin.json"
    options = ("--sizes", "8x16", "--batches", "4", "--block-sizes", "1", "4", "--groups", "2", "--step-batches", "4")
    options = (*options, "--branches", "2", "--branch-size", "8x16", "--branch-batch", "5", "--rounds", "1")
    printed, report = run("bench_thin.py", *options, "--json", str(path), out=path)
    assert report["claim"] in printed and report["claim"].startswith("Claim: ")
    cases = {part: {(r["contender"], r["rate"]) for r in report["rows"] if r["part"] == part} for part in PARTS_OF_THIN}
    for rate in (0.5, 0.25):
        names = {f"thin, blocks of {size}{layout}" for size in (1, 4) for layout in ("", ", transposed")}
        assert {(name, rate) for name in names} <= cases["blocks"]
    assert cases["blocks"] >= {("no dropout", 0.0), ("linen", 0.5), ("thin, blocks of 4, transposed, 2 groups", 0.5)}
    assert {name for name, _ in cases["branches"]} == {"no dropout", "drop_path", "skip_path", "stochastic_depth"}
    assert {"no dropout", "thin, blocks of 1", "thin, blocks of 1, lazy update"} <= {name for name, _ in cases["steps"]}
    assert {r.get("optimizer") for r in report["rows"]} == {None, "SGD", "Adam"}
    assert all(r["speedup"] > 0 and r["total_bytes"] >= r["temporary_bytes"] > 0 for r in report["rows"])


def test_the_lazy_update_of_bench_thin_is_the_dense_one_for_kept_units(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    bench = importlib.import_module("bench_thin")
    w = bench.used(bench.weights_of(8, 16), out_in=True)
    key, x, target = next(bench.random_data(4, 8, 1))
    for optimizer in bench.OPTIMIZERS.values():
        state = w, optimizer.init(w)
        units = thin.kept_units(key, 16, 0.5, block_size=4)
        kept = jnp.zeros(16).at[units].set(2.0)
        masked = bench.dense(lambda key, h, kept=kept: h * kept)
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            dense = bench.dense_step(masked, optimizer)(state, key, x, target)
            lazy = bench.lazy_step(optimizer, 4)(state, key, x, target)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), dense, lazy)


def test_bench_uncertainty(need, tmp_path):
    need("torch")
    path = tmp_path / "uncertainty.json"
    options = ("--sizes", "8", "16", "4", "--batch", "4", "--samples", "5", "--numbers", "20", "200", "--rounds", "1")
    printed, report = run("bench_uncertainty.py", *options, "--json", str(path), out=path)
    assert report["claim"] in printed and report["claim"].startswith("Claim: ")
    timed = {r["contender"]: r for r in report["rows"] if "ratio" in r}
    assert list(timed) == [
        *("no dropout", "jdrop, mc_samples", "jdrop, a loop", "PyTorch, a loop", "PyTorch, vmap"),
    ]
    assert all(r["ratio"] > 0 for r in timed.values()) and timed["no dropout"]["ratio"] == 1
    memory = {(r["contender"], r["samples"]): r for r in report["rows"] if "temporary_bytes" in r}
    few, many = (memory["mc_moments, in chunks", n]["temporary_bytes"] for n in (20, 200))
    assert many - few < 200 * 4 * 4 * 4  # only the keys of samples grow, not the samples
    assert memory["mc_samples", 200]["temporary_bytes"] > 5 * memory["mc_samples", 20]["temporary_bytes"]
    assert memory["mc_samples", 200]["output_bytes"] == 200 * 4 * 4 * 4


def test_bench_compile(tmp_path):
    path = tmp_path / "compile.json"
    options = ("--layers", "1", "--size", "2x16x32", "--heads", "2", "--rounds", "1", "--json", str(path))
    options = (*options, "--norms", "one-pass")
    _, report = run("bench_compile.py", *options, out=path)
    rows = {r["contender"]: r for r in report["rows"]}
    assert {*OURS, "no dropout"} == set(rows)
    assert all(r["compile_ratio"] > 0 and r["fusions"] > 0 for r in rows.values())


def test_bench_adapters(need, tmp_path):
    for library in ("flax", "equinox", "haiku"):
        need(library)
    path = tmp_path / "adapters.json"
    options = ("--layers", "1", "--size", "4x64x64", "--heads", "2", "--rounds", "1", "--json", str(path))
    printed, report = run("bench_adapters.py", *options, out=path)
    assert report["claim"] in printed
    for library in ("linen", "nnx", "equinox", "haiku"):
        rows = {r["contender"]: r for r in report["rows"] if r["library"] == library}
        assert list(rows) == ["no dropout", "its own", "jdrop fast", "jdrop jax"]
        assert all(r["ratio"] > 0 for r in rows.values())
        assert rows["jdrop fast"]["bytes"] < rows["its own"]["bytes"]


def test_bench_sharding(need, tmp_path):
    need("flax")
    path = tmp_path / "sharding.json"
    options = ("--layers", "1", "--size", "4x32x64", "--heads", "2", "--rounds", "1", "--devices", "1", "2")
    printed, report = run("bench_sharding.py", *options, "--json", str(path), out=path)
    assert report["claim"] in printed and report["claim"].startswith("Claim: ")
    for devices in (1, 2):
        rows = {r["contender"]: r for r in report["rows"] if r["devices"] == devices}
        assert list(rows) == ["no dropout", "jdrop fast", "linen"]
        assert all(r["ratio"] > 0 and r["bytes"] > 0 for r in rows.values())
        assert rows["jdrop fast"]["collectives"] == rows["no dropout"]["collectives"]
        assert bool(rows["no dropout"]["collectives"]) == (devices > 1)
        assert rows["jdrop fast"]["bytes"] < rows["linen"]["bytes"]


def test_peers_are_measured(need, tmp_path):
    for library in ("flax", "equinox", "haiku", "torch"):
        need(library)
    path = tmp_path / "peers.json"
    options = ("--sizes", "32x128", "--rounds", "1", "--dtypes", "float32", "--json", str(path))
    _, report = run("bench_dropout.py", *options, out=path)
    measured = {r["contender"] for r in report["rows"] if "ratio" in r}
    assert {"linen", "nnx", "equinox", "haiku", "torch"} <= measured


def test_a_missing_peer_is_named_as_missing(tmp_path):
    (tmp_path / "haiku.py").write_text("raise ImportError")
    path = tmp_path / "missing.json"
    options = ("--sizes", "32x128", "--rounds", "1", "--dtypes", "float32", "--peers", "haiku", "--json", str(path))
    printed, report = run("bench_dropout.py", *options, out=path, path=[tmp_path])
    assert [r["missing"] for r in report["rows"] if r["contender"] == "haiku"] == ["not installed"] * 2
    assert "not installed" in printed


@pytest.fixture
def device_report(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("device_report")


def test_device_report(tmp_path):
    path = tmp_path / "device.json"
    printed, report = run("device_report.py", "--small", "--json", str(path), out=path)
    assert report["claim"] in printed and {"commit", "device", "platform"} <= set(report["machine"])
    assert {part["part"]: part["status"] for part in report["parts"]} == dict.fromkeys(
        (
            "known_answers",
            "reproducibility",
            "dropout",
            "members",
            "transformer",
            "thin",
            "kernels",
            "attention",
            "tests",
            "trainer",
        ),
        "passed",
    )
    rows = {part["part"]: part["rows"] for part in report["parts"]}
    assert all(row["ok"] for name in ("known_answers", "reproducibility", "kernels", "tests") for row in rows[name])
    measured = {name: {r["contender"] for r in rows[name] if r.get("milliseconds", 0) > 0} for name in rows}
    assert {"jax copy", *OURS} <= measured["dropout"] and {"no dropout", *OURS} <= measured["transformer"]
    assert {"jdrop, rate 0", "jdrop, rate 0.1"} <= measured["attention"]
    assert {r["contender"] for r in rows["attention"]} >= {"cuDNN, rate 0", "linen, rate 0.1", "torch, rate 0.1"}
    of_members = {r["member"] for r in rows["members"] if r["contender"] == "jdrop" and r["copy_percent"] > 0}
    assert of_members == {name for name, m in MEMBERS.items() if isinstance(m.bench, Bench)} - {"dropout"}


def test_device_report_names_what_is_broken(device_report, monkeypatch, tmp_path, capsys):
    def broken(plan):
        yield {"name": "first", "ok": True}
        raise ValueError("no device")

    def with_a_broken_case(plan):
        yield from device_report.attempt(plan, {"name": "case"}, lambda: [1 / 0])

    def wrong(plan):
        yield {"name": "mask", "ok": False}

    def fine(plan):
        yield from device_report.attempt(plan, {"name": "peer"}, lambda: [importlib.import_module("no_such_peer")])

    path = tmp_path / "device.json"
    monkeypatch.setattr(device_report, "PARTS", (broken, with_a_broken_case, wrong, fine))
    monkeypatch.setattr(sys, "argv", ["device_report.py", "--json", str(path)])
    assert device_report.main() == 1
    parts = json.loads(path.read_text())["parts"]
    assert [part["status"] for part in parts] == ["raised", "failed", "failed", "passed"]
    assert parts[0]["rows"] == [{"name": "first", "ok": True}] and parts[0]["error"] == "ValueError: no device"
    assert parts[1]["rows"] == [{"name": "case", "error": "ZeroDivisionError: division by zero"}]
    assert parts[3]["rows"] == [{"name": "peer", "missing": "not available: No module named 'no_such_peer'"}]
    assert "no device" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["device_report.py", "--json", str(path), "--seconds", "0"])
    assert device_report.main() == 0
    assert {part["status"] for part in json.loads(path.read_text())["parts"]} == {"skipped: out of time"}


def test_device_report_without_pytest_compares_with_the_reference(device_report, monkeypatch):
    monkeypatch.setitem(sys.modules, "test_known_answers", None)
    rows = list(device_report.known_answers(device_report.Plan(small=True, deadline=0.0)))
    assert len([row for row in rows if row["name"].startswith("NumPy")]) == 6 and all(row["ok"] for row in rows)


def test_device_report_stops_a_program_that_hangs(device_report):
    code = "import time; print('started', flush=True); time.sleep(600)"
    assert device_report.run_program([sys.executable, "-c", code], 5.0) == (None, "started\n")
    assert device_report.outcome(None, "") == {"missing": "stopped: out of time"}
