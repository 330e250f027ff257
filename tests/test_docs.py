"""README and site: all code runs, tables match the code, figures match the results, and links lead somewhere."""

import ast
import inspect
import json
import operator
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from members import MEMBERS, PUBLIC, Bench, table_line

import jdrop

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
PEERS = {"flax", "equinox", "haiku", "keras", "torch"}


def text_of(name):
    return (ROOT / name).read_text()


# ------------------------------------------------------------------------------------ code


def blocks(name):
    return re.findall(r"^```python\n(.*?)^```", text_of(name), re.DOTALL | re.MULTILINE)


def imported(code):
    """Return the libraries that a block imports."""
    nodes = [n for n in ast.walk(ast.parse(code)) if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    return {n.split(".")[0] for n in [*names, *(n.module for n in nodes if isinstance(n, ast.ImportFrom))]}


def cases():
    """Yield the number of each block on its page. Some blocks read a compiled program."""
    for name in NAMES:
        for i, code in enumerate(blocks(name)):
            yield pytest.param(name, i, marks=pytest.mark.compiled if "memory_analysis(" in code else pytest.mark.docs)


@pytest.mark.parametrize("page, number", list(cases()))
def test_code_runs(page, number, need):
    """As written, and with the import that the comment "before" gives."""
    code = blocks(page)[number]
    before = re.sub(r"^from jdrop\.adapters\..* import .*  # before: ", "", code, flags=re.MULTILINE)
    peers = imported(before) & PEERS
    for library in peers:
        need(library)
    for text in dict.fromkeys([code, before]):
        promotion = "standard" if peers else "strict"
        with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion(promotion):
            exec(compile(text, f"{page}, block {number}", "exec"), {"__name__": "docs"})


def test_no_code_is_hidden_from_the_test_above():
    for name in NAMES:
        fences = re.findall(r"^ *(?:`{3,}|~{3,}) *(?:\{code-block\} *)?(?:python|py)\b.*$", text_of(name), re.MULTILINE)
        assert len(fences) == len(blocks(name)), f"{name}: write code as ```python, without indentation"


# ------------------------------------------------------------------------------------ tables


def test_the_guide_of_the_adapters_has_a_before_and_after_for_every_library():
    text = text_of("docs/adapters.md")
    for module, name in (("linen", "Dropout"), ("nnx", "Dropout"), ("equinox", "Dropout"), ("haiku", "dropout")):
        assert re.search(rf"^from jdrop.adapters.{module} import {name}  # before: from .* import {name}$", text, re.M)


def test_the_table_of_the_family_matches_the_members():
    text = text_of("docs/functions/index.md").split("| function | what shares a decision |")[1].split("\n\n")[0]
    assert text.splitlines()[2:] == [table_line(name) for name, member in MEMBERS.items() if member.row]


@pytest.mark.parametrize("name", [name for name, member in MEMBERS.items() if member.row])
def test_papers_and_peers_in_the_table_match_docstring_and_benchmark(name):
    member, references = MEMBERS[name], inspect.getdoc(PUBLIC[name]).split("References:")[1]
    for author, year in re.findall(r"(\w+)[^,]* (\d{4})", member.row.paper):
        assert author in references and f"({year})" in references
    if isinstance(member.bench, Bench):
        for library, field in (("PyTorch", "torch"), ("timm", "timm"), ("Keras", "keras"), ("Flax", "linen_broadcast")):
            assert getattr(member.bench, field) is None or library in member.row.also_in


def names_table():
    """Return the code in the columns PyTorch, Keras, and jdrop of each row of the table of names."""
    text = text_of("docs/coming_from.md").split("## Coming from PyTorch or Keras")[1].split("\n## ")[0]
    rows = [line.split("|")[1:4] for line in text.splitlines() if line.startswith("|")][2:]
    return [[re.findall(r"`([^`]*)`", cell) for cell in row] for row in rows]


@pytest.mark.parametrize("row", names_table(), ids=lambda row: row[2][0].split("(")[0])
def test_the_table_of_names_runs(row):
    x = jnp.linspace(1, 2, 8 * 8 * 8 * 16).reshape(8, 8, 8, 16)
    names = {**vars(jdrop), "jax": jax, "key": jax.random.key(0), "x": x, "s": x[:, 0]}
    (call,) = row[2]
    on = jax.tree.leaves(eval(call, names))[0]
    off = jax.tree.leaves(eval(call.replace("train=True", "train=False"), names))[0]
    same = on.shape == off.shape and bool((on == off).all())
    assert same == ("train=True" not in call)


def test_names_of_other_libraries_exist(need):
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


# ------------------------------------------------------------------------------------ README


def test_the_readme_is_short_and_names_every_function():
    text = text_of("README.md")
    assert len(text.splitlines()) <= 200
    for name in PUBLIC:
        assert f"`{name}`" in text, f"the README does not mention {name}"
    for command in ("scripts/demo", "scripts/test"):
        assert command in text and (ROOT / command).exists()


def only(file, /, **values):
    """Return the row of a file of results that has these values."""
    rows = json.loads(text_of(f"scripts/results/{file}.json"))["rows"]
    (row,) = [row for row in rows if all(row[key] == value for key, value in values.items())]
    return row


def test_figures_of_the_readme_are_those_of_the_results():
    readme = text_of("README.md")
    peers = ("jdrop fast", "linen", "torch")

    def line(start, *figures):
        assert re.search(rf"^\| {re.escape(start)}.* \| {' . '.join(map(re.escape, figures))} \|", readme, re.MULTILINE)

    for start, direction in (("time of dropout", "forward"), ("with its gradient", "forward+backward")):
        times = {"shape": "4096x1024", "dtype": "float32", "direction": direction}
        found = [only("dropout_xeon", contender=peer, **times)["ratio"] for peer in peers]
        line(start, *(f"{ratio:.3g}" for ratio in found))
    for start, variant in (("temporary bytes", "unrolled, plain"), ("the same in a scan", "scan, checkpoint")):
        found = [only("memory", contender=peer, variant=f"{variant}, one key")["ratio"] for peer in peers[:2]]
        line(start, *(f"{ratio:.3f}" for ratio in found))
    attention = {"length": 4096, "dtype": "float32", "direction": "forward+backward", "rate": 0.1}
    ours, linen, torch = (only("attention", contender=c, **attention) for c in ("jdrop chunked", *peers[1:]))
    line("time of attention of length 4096", "1", *(f"{x['to_full'] / ours['to_full']:.3g}" for x in (linen, torch)))
    line("temporary megabytes", *(f"{x['temporary_bytes'] / 1e6:,.0f}" for x in (ours, linen)))
    table = "1 x h100, gradient of 4 layers of [8x512x768], unrolled, plain, float32"
    for name, text in (("jdrop fast", "takes {:.3f} times"), ("where(bernoulli)", "{:.3f} times with `where")):
        assert text.format(only("compiled_h100", table=table, name=name)["ratio"]) in readme.replace("\n", " ")


# ------------------------------------------------------------------------------------ links


@pytest.mark.parametrize("name", NAMES)
def test_links_and_paths_exist(name):
    text = re.sub(r"^```.*?^```", "", text_of(name), flags=re.DOTALL | re.MULTILINE)
    for path in re.findall(r"`((?:scripts|examples|jdrop|tests|docs)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text):
        path, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name} links to {link}"
        if anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{name} links to {link}"


def test_every_public_function_has_a_page():
    pages = "\n".join(page.read_text() for page in DOCS.glob("functions/*.md"))
    for name in PUBLIC:
        assert re.search(rf"autofunction(?:\}}|::) jdrop\.{re.escape(name)}\b", pages), f"{name} has no page"
