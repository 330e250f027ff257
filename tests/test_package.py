"""The whole package: layers, public names, and documentation that runs."""

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
from members import MEMBERS, PUBLIC, SHAPE, function_of

import jdrop

ROOT = pathlib.Path(__file__).parent.parent
FAMILY = [path.stem for path in sorted((ROOT / "jdrop" / "_family").glob("*.py")) if path.stem != "__init__"]
ATTENTION = ("_checks", "_blocking", "_derivative", "_tile", "_mosaic_tpu.grid")
PARTS = ("_scores", "_mosaic_tpu.tiles", "_mosaic_gpu.parts")
METHODS = ("_blockwise", *(f"_mosaic_{device}.{name}" for device in ("tpu", "gpu") for name in ("forward", "backward")))
LEARNED = ("learned._concrete", "learned._variational")
LAYERS = [
    ["_errors", "_types", "_random.threefry", "_random.normal"],
    ["_checks", "_axes", "_random.indexing", "_random.fast", "_random.jax_bits", "_sharding"],
    [
        "_random.key_words",
        "_random.packed",
        "_platform.generic",
        "schedules",
        "consistency",
        "uncertainty._decomposition",
    ],
    ["_platform.cpu", "_platform.gpu", "_platform.tpu"],
    ["_platform"],
    ["_bits", "_lowering"],
    ["_mask", "keys"],
    ["_prepare", "_primitive", "attention._spec", "uncertainty._monte_carlo"],
    ["_branch", "_ops", "_subsets", *(f"attention.{name}" for name in ATTENTION)],
    ["_gather", "attention._reference", *(f"attention.{name}" for name in PARTS), "learned._parts"],
    ["thin._units", "thin._weights", *LEARNED, *(f"attention.{name}" for name in METHODS)],
    ["thin._dense", "thin._groups", "attention._mosaic_tpu", "attention._mosaic_gpu"],
    ["thin._mlp", "thin._attention", "attention._registry"],
    ["attention", "learned", "thin", "uncertainty", *(f"_family.{name}" for name in FAMILY)],
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
MODULES = ("consistency", "learned", "thin", "uncertainty")
NO_MODE = {  # public functions outside of the family, and where their rules are tested
    "dropout_mask": "test_masks, test_sharding",
    "drop_block_mask": "test_blocks",
    "keys.derive": "test_keys, test_known_answers",
    "keys.per_example": "test_keys, test_known_answers",
    **{f"{module}.{name}": f"test_{module}" for module in MODULES for name in getattr(jdrop, module).__all__},
    "schedules.early": "test_schedules",
    "schedules.late": "test_schedules",
    "schedules.curriculum": "test_schedules",
    "schedules.plateau_decay": "test_schedules",
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
                              "attention", "consistency", "keys", "learned", "schedules", "thin", "uncertainty"]  # fmt: skip
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
    names |= {f"{module}.{name}" for module in MODULES for name in getattr(jdrop, module).__all__}
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

TAKES_TRAIN = [n for n, f in PUBLIC.items() if "train" in inspect.signature(f).parameters and n not in NO_MODE]


def test_the_table_of_members_has_every_function_with_a_train_argument():
    assert {function_of(name) for name in MEMBERS} == set(TAKES_TRAIN) == set(PUBLIC) - set(NO_MODE)
    assert {name for name, member in MEMBERS.items() if member.row} == set(TAKES_TRAIN)


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


def test_files_stay_small():
    for path in (ROOT / "jdrop").glob("**/*.py"):
        assert len(path.read_text().splitlines()) <= 250, path


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
