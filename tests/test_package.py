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

import jdrop

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = [
    ["_checks", "bits"],
    ["schedules", "_shards"],
    ["keys"],
    ["decisions"],
    ["masks", "_linear"],
    ["elementwise"],
    ["__init__"],
]
PUBLIC = {
    "dropout": jdrop.dropout,
    "dropout_mask": jdrop.dropout_mask,
    "keys.derive": jdrop.keys.derive,
    "keys.per_example": jdrop.keys.per_example,
    "schedules.early": jdrop.schedules.early,
    "schedules.late": jdrop.schedules.late,
    "schedules.curriculum": jdrop.schedules.curriculum,
    "schedules.depth_rates": jdrop.schedules.depth_rates,
}


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
        "print({m.split('.')[0] for m in set(sys.modules) - before} - {'jdrop', 'jax', 'hashlib', '_hashlib', '_blake2'})"
    )
    out = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()", out.stdout


def test_every_public_name_is_listed_here():
    found = {n for n, v in vars(jdrop).items() if callable(v) and not n.startswith("_")}
    for module in ("keys", "schedules"):
        for name, value in vars(getattr(jdrop, module)).items():
            if inspect.isfunction(value) and value.__module__ == f"jdrop.{module}" and not name.startswith("_"):
                found.add(f"{module}.{name}")
    plumbing = {"keys.consume", "keys.seed"}  # for the other files of the package
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


# ------------------------------------------------------------------------------------ what every member keeps

MEMBERS = {"dropout": lambda key, x, rate, **options: jdrop.dropout(key, x, rate, **options)}


def test_the_walk_covers_every_function_with_a_train_argument():
    takes_train = {n for n, f in PUBLIC.items() if "train" in inspect.signature(f).parameters}
    assert takes_train == set(MEMBERS)


@pytest.mark.parametrize("name", MEMBERS)
def test_signatures_follow_the_grammar(name):
    parameters = list(inspect.signature(PUBLIC[name]).parameters.values())
    assert [p.name for p in parameters[:3]] == ["key", "x", "rate"]
    assert all(p.kind == p.KEYWORD_ONLY for p in parameters[3:])
    train = next(p for p in parameters if p.name == "train")
    assert train.default is train.empty


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
def test_members_keep_the_rules(name, dtype, x64):
    f, key = MEMBERS[name], jax.random.key(3)
    x = (jnp.arange(1.0, 1 + 4 * 5 * 30).reshape(4, 5, 30) / 64).astype(dtype)
    y = f(key, x, 0.5, train=True)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    np.testing.assert_array_equal(jax.jit(lambda k, x: f(k, x, 0.5, train=True))(key, x), y)
    assert f(None, x, 0.5, train=False) is x
    pull = jax.vjp(lambda x: f(key, x, 0.5, train=True), x)[1]
    np.testing.assert_array_equal(pull(x)[0], y)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pull) if hasattr(leaf, "nbytes")) < 32
    keys = jax.random.split(key, 4)
    loop = jnp.stack([f(k, v, 0.5, train=True) for k, v in zip(keys, x, strict=True)])
    np.testing.assert_array_equal(jax.vmap(lambda k, v: f(k, v, 0.5, train=True))(keys, x), loop)


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
