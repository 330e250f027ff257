"""Tables and figures of the site, made from the reports in scripts/results. Sphinx is not needed."""

import ast
import importlib.util
import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def load_extension(name):
    """Import a module of docs/_extensions by its path."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / "_extensions" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = load_extension("tables")
HEAD = {
    "command": "python scripts/bench_x.py --json x.json",
    "machine": {"cpu": "Intel(R) Xeon(R) Processor", "cores": 2, "backend": "cpu", "device": "cpu"},
    "versions": {"python": "3.11.7", "jax": "0.10.2"},
    "rate": 0.1,
}
ROWS = [
    {"variant": "scan, one key", "contender": "no dropout", "bytes": 41_472_000, "ratio": 1.0},
    {"variant": "scan, one key", "contender": "jdrop fast", "bytes": 43_078_080, "ratio": 1.0387},
    {"variant": "scan, two keys", "contender": "no dropout", "bytes": 80_000_000, "ratio": 1.0},
    {"variant": "scan, two keys", "contender": "jdrop fast", "bytes": 160_000_000, "ratio": 2.0},
]


@pytest.fixture
def report(tmp_path):
    """Return a function that writes a report and loads it."""

    def make(rows=ROWS, **facts):
        path = tmp_path / "x.json"
        path.write_text(json.dumps({**HEAD, **facts, "rows": rows}))
        return tables.load(path)

    return make


def values(*texts):
    return [tables.Value.parse(text) for text in texts]


def test_a_table_has_a_line_and_a_column_for_each_combination(report):
    rows = report()["rows"]
    assert tables.pivot(rows, ["contender"], ["variant"], values("ratio:.3f"), values("MB=bytes:M")).splitlines() == [
        "|  | one key | two keys |",
        "| --- | ---: | ---: |",
        "| no dropout | 1 (41.5 MB) | 1 (80.0 MB) |",
        "| jdrop | 1.039 | 2.000 |",
    ]


def test_new_rows_appear_without_a_change(report):
    new = {"variant": "scan, one key", "contender": "some_function", "bytes": 1, "ratio": 1.5}
    table = tables.pivot(report([*ROWS, new])["rows"], ["contender"], ["variant"], values("time=ratio", "bytes"))
    assert table.splitlines()[0] == "|  | one key, time | one key | two keys, time | two keys |"
    assert table.splitlines()[-1] == "| `some_function` | 1.50 | 1 |  |  |"


def test_a_table_of_one_report_needs_no_columns(report):
    rows = tables.select(report()["rows"], ["variant~one"])
    assert tables.pivot(rows, ["contender"], [], values("time=ratio", "MB=bytes:M")).splitlines() == [
        "|  | time | MB |",
        "| --- | ---: | ---: |",
        "| no dropout | 1.00 | 41.5 |",
        "| jdrop | 1.04 | 43.1 |",
    ]


def test_missing_results_name_the_file_and_the_key(report, tmp_path):
    with pytest.raises(tables.ResultError, match=r"gone\.json: no such file"):
        tables.load(tmp_path / "gone.json")
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(tables.ResultError, match=r"empty\.json: no command"):
        tables.load(tmp_path / "empty.json")
    rows = report()["rows"]
    with pytest.raises(tables.ResultError, match=r"x\.json: no seconds in the row scan, one key, no dropout"):
        tables.pivot(rows, ["contender"], ["variant"], values("seconds"))
    with pytest.raises(tables.ResultError, match=r"x\.json: no row with contender=haiku"):
        tables.select(rows, ["contender=haiku"])
    with pytest.raises(tables.ResultError, match=r"x\.json: no row with lane=1"):
        tables.select(rows, ["lane=1"])
    with pytest.raises(tables.ResultError, match="not a condition: contender"):
        tables.select(rows, ["contender"])
    with pytest.raises(tables.ResultError, match=r"x\.json: more than one result for \('jdrop fast',\)"):
        tables.pivot(tables.select(rows, ["contender=jdrop fast"]), ["contender"], [], values("ratio"))
    with pytest.raises(tables.ResultError, match=r"x\.json: 1 bases for 2 values"):
        tables.pivot(rows, ["contender"], ["variant"], values("ratio", "bytes"), values("bytes"))


@pytest.mark.parametrize(
    ("request_", "figure"),
    [
        ("x.json; rate:g", "0.1"),
        ("x.json; variant~one; contender=jdrop fast; ratio", "1.04"),
        ("x.json; variant~one; contender=jdrop fast; ratio:.3f", "1.039"),
        ("x.json; variant~two; contender!=no dropout; bytes", "160,000,000"),
        ("x.json; contender=jdrop fast; max ratio", "2.00"),
        ("x.json; contender=jdrop fast; min ratio", "1.04"),
        ("x.json; variant~two; contender=jdrop fast; bytes:.1f; / contender=no dropout", "2.0"),
    ],
)
def test_figures(report, request_, figure):
    files = {"x.json": report()}
    assert tables.figure(request_, files.__getitem__) == figure


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ("x.json; layers", r"x\.json: no layers"),
        ("x.json; contender=haiku; ratio", r"x\.json: no row with contender=haiku"),
        ("x.json; contender=jdrop fast; ratio", r"x\.json: 2 rows match"),
        ("x.json; contender=jdrop fast; variant~one; seconds", r"x\.json: no seconds in the row scan, one key"),
        ("x.json; contender=jdrop fast; variant~one; ratio:?", r"not a format for 1\.0387: \?"),
        ("x.json", r"x\.json: no field"),
    ],
)
def test_figures_that_are_missing_or_ambiguous(report, request_, error):
    files = {"x.json": report()}
    with pytest.raises(tables.ResultError, match=error):
        tables.figure(request_, files.__getitem__)


def test_names_of_compiled_programs_lose_their_device_and_their_step(report):
    rows = [
        {"table": "1 x h100, attention of 1024, bfloat16", "name": "chunked"},
        {"table": "1 x h100, attention of 1024, causal, bfloat16", "name": "chunked"},
        {"table": "h100, train step of a.py", "name": "step 1 of 2, scale"},
    ]
    loaded = report(rows, compiled_for=["h100"])["rows"]
    assert [row["program"] for row in loaded] == [
        "attention of 1024, bfloat16",
        "attention of 1024, causal, bfloat16",
        "a.py, step 1 of 2",
    ]
    assert loaded[2]["contender"] == "all kept"
    short = tables.distinct([row["program"] for row in loaded[:2]])
    assert list(short.values()) == ["attention of 1024", "attention of 1024, causal"]


def test_a_source_says_what_was_run_compiled_or_predicted(report):
    timed = report([{"contender": "a", "milliseconds": 1.0}], layers=2)
    assert tables.source(timed, ["ratio"]) == (
        "**Run on Intel Xeon, 2 cores:** `python scripts/bench_x.py --json x.json`. "
        "Python 3.11.7, jax 0.10.2; rate 0.1, layers 2."
    )
    assert tables.source(report(), ["ratio"]).startswith("**Compiled on Intel Xeon, 2 cores; not timed:**")
    compiled = report(compiled_for=["h100"])
    assert tables.source(compiled, ["ratio"]).startswith("**Compiled for an H100 on Intel Xeon, 2 cores; not run:**")
    assert tables.source(compiled, ["predicted_ms"]).startswith("**Predicted for an H100 by a model, not measured;")
    assert "TPU v6e" in tables.source(report(compiled_for=["v6e"]), ["cycles"])
    assert "cycles are estimated by the compiler" in tables.source(report(compiled_for=["v6e"]), ["cycles"])


def test_results_that_were_not_installed_are_left_out(report):
    loaded = report([*ROWS, {"variant": "scan, one key", "contender": "haiku", "missing": "not installed"}])
    assert len(loaded["rows"]) == len(ROWS)


REPORTS = sorted(path for path in (ROOT / "scripts" / "results").glob("*.json") if not path.name.startswith("curves_"))


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_every_report_can_be_loaded_and_names_its_source(path):
    report = tables.load(path)
    assert report["rows"] and report["command"] in tables.source(report, [])


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_every_example_is_on_its_page_with_what_it_should_print(path):
    page = (ROOT / "docs" / "examples.md").read_text()
    assert f"`{path.name}`" in page and f"```{{example}} {path.stem}\n" in page
    text = tables.expected(ast.get_docstring(ast.parse(path.read_text())))
    assert text.startswith(f"```sh\npython examples/{path.name}\n```\n\nExpect, after ")
    assert re.search(r"```text\n.*\|", text) and "Reference" not in text


def test_an_example_without_a_command_is_an_error():
    with pytest.raises(tables.ResultError, match="no command in What is it"):
        tables.expected("What is it?\n\nNothing.")
