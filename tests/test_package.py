"""The package as a whole: layers, public names, documentation that runs."""

import ast
import doctest
import inspect
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import MEMBERS, SHAPE

import jdrop

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = [
    ["_checks", "bits"],
    ["schedules", "_shards"],
    ["keys"],
    ["decisions"],
    ["masks", "_linear"],
    ["_member"],
    ["elementwise", "noise", "channels", "blocks", "paths", "weights", "tokens", "recurrent", "composed"],
    ["__init__"],
]
PUBLIC = {name: value for name, value in vars(jdrop).items() if inspect.isfunction(value)} | {
    "keys.derive": jdrop.keys.derive,
    "keys.per_example": jdrop.keys.per_example,
    "schedules.early": jdrop.schedules.early,
    "schedules.late": jdrop.schedules.late,
    "schedules.curriculum": jdrop.schedules.curriculum,
    "schedules.depth_rates": jdrop.schedules.depth_rates,
}
FIRST = {  # what stands in the place of key, x, rate: the exceptions to the grammar
    "drop_connect": ["key", "params", "rate"],
    "gaussian_noise": ["key", "x", "stddev"],
    "token_dropout": ["key", "ids", "rate"],
    "zoneout": ["key", "new", "rate"],
}
NO_MASK = {"gaussian_dropout", "gaussian_noise", "patch_dropout"}  # nothing that generator= could draw


def test_imports_go_strictly_downwards():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    for path in (ROOT / "jdrop").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jdrop":
                parts = node.module.split(".")[1:]
                for used in parts[:1] or [alias.name for alias in node.names]:
                    assert level[used] < level[path.stem], f"{path.name} imports {used}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                roots = {name.split(".")[0] for name in names}
                assert roots <= {"jax", "numpy", "jdrop"} | set(sys.stdlib_module_names), f"{path.name}: {roots}"
                assert not any("_src" in name for name in names), f"{path.name} imports private parts of jax"


def test_import_brings_in_nothing_but_jax():
    code = (
        "import sys, jax, jax.numpy, jax.export; before = set(sys.modules); import jdrop;"
        "print({m.split('.')[0] for m in set(sys.modules) - before} - {'jdrop', 'jax', *sys.stdlib_module_names})"
    )
    out = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()", out.stdout


def test_every_public_name_is_listed_here():
    found = {n for n, v in vars(jdrop).items() if callable(v) and not n.startswith("_")}
    for module in ("keys", "schedules"):
        for name, value in vars(getattr(jdrop, module)).items():
            if inspect.isfunction(value) and value.__module__ == f"jdrop.{module}" and not name.startswith("_"):
                found.add(f"{module}.{name}")
    plumbing = {"keys.consume", "keys.seed", "keys.spend"}  # for the other files of the package
    assert found - plumbing == set(PUBLIC)
    assert jdrop.MASK_VERSION == 1


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_are_whole(name):
    doc = inspect.getdoc(PUBLIC[name])
    first = doc.splitlines()[0]
    assert first.endswith(".") and len(first) <= 120
    for section in ("Args:", "Returns:", "Raises:", "Example:"):
        assert section in doc, f"{name} lacks {section}"
    for parameter in inspect.signature(PUBLIC[name]).parameters:
        assert re.search(rf"^\s+\**{parameter}: ", doc, re.MULTILINE), f"{name} does not document {parameter}"
    if not name.startswith("keys."):
        assert re.search(r"\((19|20)\d\d\)", doc.split("References:")[1]), f"{name} cites no paper"
    assert doctest.DocTestFinder().find(PUBLIC[name])[0].examples, f"{name} has no example"


# ------------------------------------------------------------------------------------ the grammar

TAKES_TRAIN = [name for name, f in PUBLIC.items() if "train" in inspect.signature(f).parameters]


def test_the_walk_covers_every_function_with_a_train_argument():
    assert {name.split(" of ")[0] for name in MEMBERS} == set(TAKES_TRAIN)


@pytest.mark.parametrize("name", TAKES_TRAIN)
def test_signatures_follow_the_grammar(name):
    parameters = inspect.signature(PUBLIC[name]).parameters
    names = list(parameters)
    assert names[:3] == FIRST.get(name, ["key", "x", "rate"])
    options = names[names.index("train") :]
    assert all(parameters[n].kind == inspect.Parameter.KEYWORD_ONLY for n in options)
    assert all(parameters[n].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD for n in names[: names.index("train")])
    assert parameters["train"].default is inspect.Parameter.empty
    assert options[-1] == "shard" and ("generator" in options) == (name not in NO_MASK)


@pytest.mark.parametrize("name", TAKES_TRAIN)
def test_errors_name_the_function_and_the_argument(name):
    f, x = MEMBERS[name], jnp.ones(SHAPE)
    rate = FIRST.get(name, ["rate"])[-1]
    cases = [
        (lambda: f(jax.random.key(0), x, -0.5, train=True), ValueError, f"{name}: {rate} must "),
        (lambda: f(jax.random.key(0), x, np.nan, train=False), ValueError, f"{name}: {rate} must "),
        (lambda: f(jax.random.key(0), x, "0.5", train=True), TypeError, f"{name}: {rate} must "),
        (lambda: f(jax.random.key(0), x, 0.5, train=1), TypeError, f"{name}: train must be a bool, got 1"),
        (
            lambda: f(jax.random.split(jax.random.key(0)), x, 0.5, train=True),
            ValueError,
            f"{name}: key must be one key",
        ),
        (lambda: f(3, x, 0.5, train=True), TypeError, f"{name}: key must be a PRNG key, got 3"),
        (lambda: f(None, x, 0.5, train=True), TypeError, f"{name}: key must be a PRNG key when something is dropped"),
        (
            lambda: f(jax.random.key(0), x, 0.5, train=True, shard="data"),
            (TypeError, ValueError),
            f"{name}: shard must",
        ),
    ]
    for call, error, text in cases:
        with pytest.raises(error, match="^" + re.escape(text)):
            call()


# ------------------------------------------------------------------------------------ README


def snippets():
    text = (ROOT / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("number", range(len(snippets())))
def test_readme_snippets_run(number):
    code = snippets()[number]
    with jax.numpy_rank_promotion("raise"):
        exec(compile(code, f"README snippet {number}", "exec"), {"__name__": "readme"})


def test_readme_names_what_exists():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"`((?:scripts|examples|jdrop|tests)/[\w./]+)`", text):
        assert (ROOT / path.split(" ")[0]).exists(), path
    for command in ("scripts/demo", "scripts/test"):
        assert command in text and (ROOT / command).exists()
    for name in PUBLIC:
        assert name.split(".")[-1] in text, f"the README does not mention {name}"


def test_files_stay_small():
    for path in (ROOT / "jdrop").glob("**/*.py"):
        assert len(path.read_text().splitlines()) <= 250, path
