"""Check that some page documents every public name, and write ``llms.txt`` for language models.

A public function or class without a page is a warning, which ``scripts/docs`` turns into an error. ``llms.txt`` has a
link to every page, with the first sentence of the page, and the signature of every public function and class, with the
first line of its docstring.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import public
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import jdrop

logger = logging.getLogger(__name__)


def check(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn about public names that no page documents."""
    names = public.public_names(public.public_modules(jdrop))
    for name in public.undocumented(names, env.domains.python_domain.objects):
        logger.warning("%s is public, but no page documents it", name, type="llms")


def pages(env: BuildEnvironment, page: str) -> Iterator[str]:
    """Yield the pages below a page, in the order of the tables of contents."""
    for child in env.toctree_includes.get(page, []):
        yield child
        yield from pages(env, child)


def write(app: Sphinx, error: Exception | None) -> None:
    """Write ``llms.txt`` into the folder of the pages."""
    if error is not None or app.builder.format != "html":
        return
    env, root, objects = app.env, app.config.root_doc, app.env.domains.python_domain.objects

    def url(page: str) -> str:
        return app.config.html_baseurl + app.builder.get_target_uri(page)

    def link(page: str) -> public.Link:
        paragraphs = env.get_doctree(page).findall(nodes.paragraph)
        text = next((paragraph.astext() for paragraph in paragraphs), "")
        return public.Link(env.titles[page].astext(), url(page), public.first_sentence(text))

    sections = {"Start": [link(root)]}
    for toctree in env.get_doctree(root).findall(addnodes.toctree):
        listed = [page for _, page in toctree["entries"] if page in env.found_docs]
        below = [page for start in listed for page in (start, *pages(env, start))]
        sections[toctree.get("caption") or "Pages"] = [link(page) for page in below]
    sections["Functions and layers"] = [
        public.Link(
            name,
            f"{url(objects[name].docname)}#{objects[name].node_id}" if name in objects else url(root),
            f"`{name.rpartition('.')[2]}{public.signature(value)}`. {public.first_line(value)}",
        )
        for name, value in public.public_names(public.public_modules(jdrop)).items()
    ]
    summary = (jdrop.__doc__ or "").partition("\n")[0]
    Path(app.outdir, "llms.txt").write_text(public.llms_text(app.config.project, summary, sections))


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("env-check-consistency", check)
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
