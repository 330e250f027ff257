"""Every example runs, writes its plot, and prints the table that its docstring shows."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from xla_flags import QUICK

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
RESULTS = Path(__file__).parents[1] / "scripts" / "results"  # curves_NAME.json is what an example once wrote
PACKAGES = ("matplotlib", "mlxtend", "optax", "orbax.checkpoint", "scoringrules", "sklearn", "tqdm")
LINES = {"distributed_lm": 350}  # with its checkpoints and its launcher, which would not work apart
OPTIONS = {path: [()] for path in EXAMPLES}
OPTIONS |= {path: [(), ("--bf16",)] for path in EXAMPLES if path.stem == "char_gpt"}
# What only repeats the same program, as of seeds, of test images (all but NUM_TRAIN), or of sampled characters.
SMALL = {
    "char_gpt": {"NUM_EVAL": 8, "NUM_SAMPLED": 8},
    "digits_cnn": {"NUM_SEEDS": 2, "NUM_TRAIN": 4900},
    "digits_uncertain": {"NUM_SEEDS": 2, "SAMPLES": 3, "NUM_TEST": 300},
    "ensemble_of_subnets": {"NUM_SEEDS": 2, "NUM_TRAIN": 330},
    "layer_dropout": {"NUM_SEEDS": 2, "NUM_EVAL": 8},
    "lstm_words": {"NUM_SEEDS": 2, "VOCABULARY": 100},
    "mc_regression": {"NUM_SEEDS": 2, "SAMPLES": 4, "NUM_TRAIN": 400},
    "one_mask_or_many": {"NUM_SEEDS": 2, "NUM_TRAIN": 4900},
    "simcse": {"NUM_SEEDS": 2},
    "thin_mlp": {"NUM_SEEDS": 2, "NUM_TEST": 200},
}
RUN_SMALL = """
import importlib.util, json, sys
path, small = sys.argv[1], json.loads(sys.argv[2])
spec = importlib.util.spec_from_file_location("example", path)
spec.loader.exec_module(example := importlib.util.module_from_spec(spec))
assert small.keys() <= vars(example).keys(), "a constant is gone"
vars(example).update(small)
sys.argv[:3] = [path]
example.main()
"""
example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


def case(value):
    return value.stem if isinstance(value, Path) else " ".join(value)


def docstring(path):
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def row_labels(text):
    """What stands before the first ``|`` of each line of a table."""
    return [line.split("|")[0].strip() for line in text.splitlines() if "|" in line]


def test_there_are_examples():
    assert EXAMPLES


@example
def test_docstring_says_how_to_run_and_what_to_expect(path):
    text = docstring(path)
    lines = [line.strip() for line in text.splitlines()]
    assert f"python examples/{path.name}" in lines
    assert "?" in text.splitlines()[0], "the first line asks a question"
    assert len(row_labels(text)) >= 2, "the docstring shows the table that is printed"
    assert any(unit in text for unit in ("second", "minute"))
    assert "jax 0." in text, "the docstring says what the numbers were measured on"


@example
def test_is_one_short_self_contained_file(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LINES.get(path.stem, 220)
    others = {other.stem for other in EXAMPLES} | {"examples"}
    imported, tree = set(), ast.parse(source)
    if path.stem in SMALL:  # where test_runs calls main
        assert ast.unparse(tree.body[-1]) == "if __name__ == '__main__':\n    main()"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert not imported & others


@pytest.mark.examples
@pytest.mark.parametrize(("path", "options"), [(p, o) for p in EXAMPLES for o in OPTIONS[p]], ids=case)
def test_runs(path, options, tmp_path):
    for package in PACKAGES:
        pytest.importorskip(package)
    small = SMALL.get(path.stem)
    program = [str(path)] if small is None else ["-c", RUN_SMALL, str(path), json.dumps(small)]
    command = [sys.executable, *program, "--steps", "2", "--out", str(tmp_path), *options]
    environment = {"JAX_PLATFORMS": "cpu", **os.environ, "XLA_FLAGS": " ".join(QUICK)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=600)
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr, run.stderr
    plots = [plot.read_bytes() for plot in tmp_path.glob("*.png")]
    assert plots
    assert all(plot.startswith(b"\x89PNG\r\n\x1a\n") for plot in plots)
    kept = RESULTS / f"curves_{path.stem}.json"
    if kept.exists():
        written = json.loads((tmp_path / f"{path.stem}.json").read_text())
        assert written.keys() == json.loads(kept.read_text()).keys()
    printed, expected = row_labels(run.stdout), row_labels(docstring(path))
    assert len(set(expected)) == len(expected)
    assert [label for label in expected if label not in printed] == []
