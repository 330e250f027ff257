"""The public names of the package, and the text of ``llms.txt``. Needs no Sphinx."""

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from types import ModuleType
from typing import Any, NamedTuple


class Link(NamedTuple):
    """An entry of ``llms.txt``."""

    name: str
    url: str
    notes: str = ""


def public_modules(package: ModuleType) -> list[ModuleType]:
    """Import a package and its modules without an underscore in their path."""
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return [package, *(importlib.import_module(name) for _, name, _ in found if "._" not in name)]


def exported(module: ModuleType) -> set[str]:
    """Return the names that a module defines, or imports as themselves (``import name as name``)."""
    nodes = ast.parse(inspect.getsource(module)).body
    imported = [alias for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return {name for name in defined if name[0] != "_"} | {a.asname for a in imported if a.asname == a.name}


def public_names(modules: Iterable[ModuleType]) -> dict[str, Callable[..., Any]]:
    """Return the public functions and classes by their full name; what an earlier package has, counts there only."""
    names: dict[str, Callable[..., Any]] = {}
    top: set[int] = set()
    for i, module in enumerate(modules):
        values = {name: getattr(module, name) for name in sorted(exported(module))}
        values = {name: value for name, value in values.items() if inspect.isfunction(value) or inspect.isclass(value)}
        names |= {f"{module.__name__}.{name}": value for name, value in values.items() if id(value) not in top}
        top |= {id(value) for value in values.values()} if i == 0 else set()
    return names


def undocumented(names: Iterable[str], documented: Collection[str]) -> list[str]:
    """Return the names that no page documents."""
    return [name for name in names if name not in documented]


def signature(function: Callable[..., Any]) -> str:
    """Return the parameters of a function, or of the constructor of a class, with defaults and without types."""
    found = inspect.signature(function.__init__ if inspect.isclass(function) else function)
    bare = [p.replace(annotation=p.empty) for p in found.parameters.values() if p.name != "self"]
    return re.sub(r"<[^>]*>", "...", str(found.replace(parameters=bare, return_annotation=found.empty)))


def first_line(function: Callable[..., Any]) -> str:
    """Return the first line of the docstring, as Markdown."""
    return re.sub(r":\w+:`|``", "`", (inspect.getdoc(function) or "").partition("\n")[0])


def first_sentence(text: str) -> str:
    """Return the first sentence of a paragraph, on one line."""
    return re.split(r"(?<=[.?!])\s", " ".join(text.split()), maxsplit=1)[0]


def llms_text(title: str, summary: str, sections: Mapping[str, Iterable[Link]]) -> str:
    """Return a page in the format of https://llmstxt.org: title, summary, and a list of links in each section."""
    lines = [f"# {title}", "", f"> {summary}"]
    for heading, links in sections.items():
        lines += ["", f"## {heading}", ""]
        lines += [f"- [{link.name}]({link.url})" + (f": {link.notes}" if link.notes else "") for link in links]
    return "\n".join(lines) + "\n"
