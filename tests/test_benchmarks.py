"""The benchmarks run on tiny sizes and write their results; no test here asserts a time."""

import json
import os
import pathlib
import subprocess
import sys

import peers
import pytest
from members import MEMBERS, Bench
from xla_flags import QUICK

SCRIPTS = pathlib.Path(__file__).parent.parent / "scripts"
VARIANTS = ("unrolled, plain, one key", "scan, plain, one key", "scan, checkpoint, per-example keys")
OUR_ATTENTION = {"jdrop chunked", "jdrop chunked, causal", "jdrop reference"}
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


def test_plot(reports, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "bench.png"
    command = [sys.executable, str(SCRIPTS / "plot_bench.py"), "--time", str(reports[0]), "--memory", str(reports[1])]
    subprocess.run([*command, "--size", "64x128", "--out", str(picture)], check=True, capture_output=True)
    assert picture.read_bytes().startswith(b"\x89PNG")


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
