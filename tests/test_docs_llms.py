"""The check that every public name has a page, and the text of llms.txt. Sphinx is not needed."""

import sys

from members import PUBLIC
from test_docs_results import load_extension

import jdrop

public = load_extension("public")
CORE = [
    jdrop,
    jdrop.attention,
    jdrop.consistency,
    jdrop.keys,
    jdrop.learned,
    jdrop.schedules,
    jdrop.thin,
    jdrop.uncertainty,
]


def test_public_names_are_those_of_the_tests():
    names = public.public_names(CORE)
    assert names == {f"jdrop.{name}": value for name, value in PUBLIC.items()}


def test_public_names_of_adapters_are_defined_there_or_imported_as_themselves(need):
    for library in ("flax", "equinox", "haiku"):
        need(library)
    modules = public.public_modules(jdrop)
    names = public.public_names(modules)
    assert {module.__name__ for module in modules} >= {"jdrop", "jdrop.keys", "jdrop.adapters.nnx"}
    assert not any("._" in name for name in names)
    assert {name for name in names if name.startswith("jdrop.adapters.nnx.")} == {
        f"jdrop.adapters.nnx.{name}" for name in ("Dropout", "DropPath", "StochasticDepth", "dot_product_attention")
    }
    assert "jdrop.attention.dot_product_attention" not in names  # the same function as jdrop.dot_product_attention


def test_a_name_without_a_page_is_found():
    names = public.public_names(CORE)
    assert public.undocumented(names, set(names)) == []
    assert public.undocumented(names, set(names) - {"jdrop.zoneout"}) == ["jdrop.zoneout"]


def test_a_new_function_and_a_new_module_are_public(tmp_path, monkeypatch):
    package = tmp_path / "new_package"
    (package / "_private").mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import math\nfrom os.path import join as join\n\ndef one(x): ...\ndef _two(): ...\n"
    )
    (package / "more.py").write_text("from os.path import split\nLIMIT = 3\n\nclass Three: ...\n")
    (package / "_private" / "__init__.py").write_text("def four(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    import new_package

    names = public.public_names(public.public_modules(new_package))
    assert list(names) == ["new_package.join", "new_package.one", "new_package.more.Three"]
    for name in [name for name in sys.modules if name.startswith("new_package")]:
        monkeypatch.delitem(sys.modules, name)


def test_signatures_have_defaults_and_no_types():
    def f(key: int | None, x, rate=0.5, *, train: bool, where=jdrop.dropout) -> int:
        """Do it with ``x``, as :func:`g` does.

        More.
        """

    class Layer:
        def __init__(self, rate: float = 0.5): ...

    assert public.signature(f) == "(key, x, rate=0.5, *, train, where=...)"
    assert public.signature(Layer) == "(rate=0.5)"
    assert public.first_line(f) == "Do it with `x`, as `g` does."


def test_llms_text_has_a_title_a_summary_and_lists_of_links():
    link = public.Link("Keys", "https://x.org/keys.html", public.first_sentence("One key,\none use. More."))
    assert public.llms_text("jdrop", "Dropout.", {"Learn": [link], "Use": [public.Link("A", "a.html")]}) == (
        "# jdrop\n\n> Dropout.\n\n## Learn\n\n- [Keys](https://x.org/keys.html): One key, one use.\n\n"
        "## Use\n\n- [A](a.html)\n"
    )
