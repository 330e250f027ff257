"""The whole package: layers, public names, and documentation that runs."""

import ast
import doctest
import inspect
import operator
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import MEMBERS, SHAPE, Bench, function_of, readme_line

import jdrop

ROOT = pathlib.Path(__file__).parent.parent
FAMILY = [path.stem for path in sorted((ROOT / "jdrop" / "_family").glob("*.py")) if path.stem != "__init__"]
LAYERS = [
    ["_errors", "_types", "_random.threefry", "_random.normal"],
    ["_checks", "_axes", "_random.indexing", "_random.fast", "_random.jax_bits", "_sharding"],
    ["_random.key_words", "_platform.generic", "schedules"],
    ["_platform.cpu", "_platform.gpu", "_platform.tpu"],
    ["_platform"],
    ["_bits", "_lowering"],
    ["_mask", "keys"],
    ["_prepare", "_primitive", "attention._spec"],
    ["_ops", "attention._checks", "attention._blocking"],
    ["attention._reference", "attention._blockwise"],
    ["attention._registry"],
    ["attention", *(f"_family.{name}" for name in FAMILY)],
    ["", "_family", "_random", "adapters"],
    ["adapters._layer", "adapters._attention"],
    ["adapters._depth"],
    ["adapters._nnx", "adapters._equinox"],
    ["adapters.linen", "adapters.nnx", "adapters.equinox", "adapters.haiku"],
]
LIBRARY_OF = {
    **{f"adapters.{name}": ["flax"] for name in ("linen", "nnx", "_nnx")},
    "adapters.equinox": ["equinox"],
    "adapters.haiku": ["haiku"],
}
PUBLIC = {name: value for name, value in vars(jdrop).items() if inspect.isfunction(value)} | {
    "keys.derive": jdrop.keys.derive,
    "keys.per_example": jdrop.keys.per_example,
    "schedules.early": jdrop.schedules.early,
    "schedules.late": jdrop.schedules.late,
    "schedules.curriculum": jdrop.schedules.curriculum,
    "schedules.depth_rates": jdrop.schedules.depth_rates,
}
NO_MODE = {  # public functions that are not members, and where their rules are tested
    "dropout_mask": "test_masks, test_sharding",
    "drop_block_mask": "test_blocks",
    "keys.derive": "test_keys, test_known_answers",
    "keys.per_example": "test_keys, test_known_answers",
    "schedules.early": "test_schedules",
    "schedules.late": "test_schedules",
    "schedules.curriculum": "test_schedules",
    "schedules.depth_rates": "test_schedules",
}


def module_of(path):
    """Return the name of a module inside the package, or "" for the package itself."""
    return ".".join(path.relative_to(ROOT / "jdrop").with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def test_imports_go_strictly_downwards():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    paths = list((ROOT / "jdrop").glob("**/*.py"))
    assert {module_of(path) for path in paths} == set(level)
    for path in paths:
        module = module_of(path)
        known = {"jax", "numpy", "jdrop", *LIBRARY_OF.get(module, ())} | set(sys.stdlib_module_names)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jdrop":
                parent = node.module.removeprefix("jdrop").removeprefix(".")
                for alias in node.names:
                    child = f"{parent}.{alias.name}".removeprefix(".")
                    used = child if child in level else parent
                    assert level[used] < level[module], f"{path} imports {used}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                roots = {name.split(".")[0] for name in names}
                assert roots <= known, f"{path}: {roots}"
                assert not any("_src" in name for name in names), f"{path} imports private parts of jax"


def test_names_of_modules_say_public_or_private():
    """A module is public if no part of its path has a leading underscore; then it lists its public names."""
    public = [
        module_of(path) for path in (ROOT / "jdrop").glob("**/*.py") if "/_" not in str(path).replace("__init__", "")
    ]
    assert sorted(public) == ["", "adapters", "adapters.equinox", "adapters.haiku", "adapters.linen", "adapters.nnx",
                              "attention", "keys", "schedules"]  # fmt: skip
    assert jdrop.keys.__all__ == ["derive", "per_example"] and jdrop.attention.__all__ == ["dot_product_attention"]


def test_the_package_imports_nothing_but_jax():
    code = (
        "import sys, jax, jax.numpy, jax.export; before = set(sys.modules); import jdrop;"
        "print({m.split('.')[0] for m in set(sys.modules) - before} - {'jdrop', 'jax', *sys.stdlib_module_names})"
    )
    out = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()", out.stdout


def test_every_public_name_is_listed_here():
    names = {n for n, v in vars(jdrop).items() if callable(v) and not n.startswith("_")}
    for module in ("keys", "schedules"):
        for name, value in vars(getattr(jdrop, module)).items():
            if inspect.isfunction(value) and value.__module__ == f"jdrop.{module}" and not name.startswith("_"):
                names.add(f"{module}.{name}")
    assert names == set(PUBLIC)
    assert jdrop.MASK_VERSION == 1


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_are_complete(name):
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


def test_the_table_of_members_has_every_function_with_a_train_argument():
    assert {function_of(name) for name in MEMBERS} == set(TAKES_TRAIN) == set(PUBLIC) - set(NO_MODE)
    assert {name for name, member in MEMBERS.items() if member.readme} == set(TAKES_TRAIN)


@pytest.mark.parametrize("name", TAKES_TRAIN)
def test_signatures_follow_the_grammar(name):
    member, parameters = MEMBERS[name], inspect.signature(PUBLIC[name]).parameters
    names = list(parameters)
    assert tuple(names[: len(member.first)]) == member.first
    options = names[names.index("train") :]
    assert all(parameters[n].kind == inspect.Parameter.KEYWORD_ONLY for n in options)
    kind = "POSITIONAL_ONLY" if member.positional_only else "POSITIONAL_OR_KEYWORD"
    assert all(parameters[n].kind.name == kind for n in names[: names.index("train")])
    assert parameters["train"].default is inspect.Parameter.empty
    assert "shard" in options and ("generator" in options) == member.generator


@pytest.mark.parametrize("name", TAKES_TRAIN)
def test_errors_name_the_function_and_the_argument(name):
    f, x = MEMBERS[name], jnp.ones(SHAPE)
    key, rate = MEMBERS[name].first[0], MEMBERS[name].first[-1]
    cases = [
        (lambda: f(jax.random.key(0), x, -0.5, train=True), ValueError, f"{name}: {rate} must "),
        (lambda: f(jax.random.key(0), x, np.nan, train=False), ValueError, f"{name}: {rate} must "),
        (lambda: f(jax.random.key(0), x, "0.5", train=True), TypeError, f"{name}: {rate} must "),
        (lambda: f(jax.random.key(0), x, 0.5, train=1), TypeError, f"{name}: train must be a bool, got 1"),
        (
            lambda: f(jax.random.split(jax.random.key(0)), x, 0.5, train=True),
            ValueError,
            f"{name}: {key} must be one key",
        ),
        (lambda: f(3, x, 0.5, train=True), TypeError, f"{name}: {key} must be a PRNG key, got 3"),
        (lambda: f(None, x, 0.5, train=True), TypeError, f"{name}: {key} must be a PRNG key when something is dropped"),
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


def imported(code):
    """Return the libraries that a snippet imports."""
    nodes = [n for n in ast.walk(ast.parse(code)) if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    return {n.split(".")[0] for n in [*names, *(n.module for n in nodes if isinstance(n, ast.ImportFrom))]}


@pytest.mark.parametrize("number", range(len(snippets())))
def test_readme_snippets_run(number, need):
    """As written, and with the import that the comment "before" gives."""
    code = snippets()[number]
    before = re.sub(r"^from jdrop\.adapters\..* import .*  # before: ", "", code, flags=re.MULTILINE)
    peers = imported(before) & {"flax", "equinox", "haiku"}
    for library in peers:
        need(library)
    for text in dict.fromkeys([code, before]):
        promotion = "standard" if peers else "strict"
        with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion(promotion):
            exec(compile(text, f"README snippet {number}", "exec"), {"__name__": "readme"})


def test_readme_has_a_before_and_after_for_every_library():
    text = (ROOT / "README.md").read_text()
    for module, name in (("linen", "Dropout"), ("nnx", "Dropout"), ("equinox", "Dropout"), ("haiku", "dropout")):
        assert re.search(rf"^from jdrop.adapters.{module} import {name}  # before: from .* import {name}$", text, re.M)


def test_the_family_table_of_the_readme_matches_the_members():
    text = (ROOT / "README.md").read_text().split("| function | what shares a decision |")[1].split("\n\n")[0]
    assert text.splitlines()[2:] == [readme_line(name) for name, member in MEMBERS.items() if member.readme]


@pytest.mark.parametrize("name", [name for name, member in MEMBERS.items() if member.readme])
def test_papers_and_peers_in_the_readme_match_docstring_and_benchmark(name):
    member, references = MEMBERS[name], inspect.getdoc(PUBLIC[name]).split("References:")[1]
    for author, year in re.findall(r"(\w+)[^,]* (\d{4})", member.readme.paper):
        assert author in references and f"({year})" in references
    if isinstance(member.bench, Bench):
        for library, field in (("PyTorch", "torch"), ("timm", "timm"), ("Keras", "keras"), ("Flax", "linen_broadcast")):
            assert getattr(member.bench, field) is None or library in member.readme.also_in


def names_table():
    """Return the code in the columns PyTorch, Keras, and jdrop of each row of the table of names."""
    text = (ROOT / "README.md").read_text().split("### What you called it there")[1].split("\n## ")[0]
    rows = [line.split("|")[1:4] for line in text.splitlines() if line.startswith("|")][2:]
    return [[re.findall(r"`([^`]*)`", cell) for cell in row] for row in rows]


@pytest.mark.parametrize("row", names_table(), ids=lambda row: row[2][0].split("(")[0])
def test_readme_table_of_names_runs(row):
    x = jnp.linspace(1, 2, 8 * 8 * 8 * 16).reshape(8, 8, 8, 16)
    names = {**vars(jdrop), "jax": jax, "key": jax.random.key(0), "x": x, "s": x[:, 0]}
    (call,) = row[2]
    on = jax.tree.leaves(eval(call, names))[0]
    off = jax.tree.leaves(eval(call.replace("train=True", "train=False"), names))[0]
    same = on.shape == off.shape and bool((on == off).all())
    assert same == ("train=True" not in call)


def test_names_of_other_libraries_in_the_readme_exist(need):
    """Names of timm and torchvision have no prefix, so they are not checked."""
    need("torch")
    need("keras")
    import keras
    import torch

    roots = {"nn": torch.nn, "F": torch.nn.functional, "torch": torch, "layers": keras.layers, "random": keras.random}
    count = 0
    for in_torch, in_keras, _ in names_table():
        for name in (*in_torch, *in_keras):
            root, _, rest = name.partition(".")
            if root in roots:
                operator.attrgetter(rest)(roots[root])
                count += 1
    assert count >= 25


def test_paths_and_functions_in_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"`((?:scripts|examples|jdrop|tests)/[\w./]+)`", text):
        assert (ROOT / path.split(" ")[0]).exists(), path
    for command in ("scripts/demo", "scripts/test"):
        assert command in text and (ROOT / command).exists()
    for name in PUBLIC:
        assert name.split(".")[-1] in text, f"the README does not mention {name}"


def test_files_stay_small():
    """Blockwise attention is one file on purpose: block, loops, and derivative belong together."""
    longer = {"attention._blockwise": 400}
    for path in (ROOT / "jdrop").glob("**/*.py"):
        assert len(path.read_text().splitlines()) <= longer.get(module_of(path), 250), path


def error_texts():
    """Yield the error messages of the package, with {} for each value."""
    for path in (ROOT / "jdrop").glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(call, ast.Call) and call.args:
                text = call.args[0]
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                yield path, "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in parts)


def test_every_error_has_one_form():
    """``function: argument rule, got value; fix``. Messages without a function are internal."""
    texts = [(path, text) for path, text in error_texts() if ":" in text]
    assert len(texts) >= 60
    for path, text in texts:
        assert re.fullmatch(r"(\{\}|\w+): .+, got .+; .+", text), (path, text)
