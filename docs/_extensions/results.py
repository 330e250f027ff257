"""Directives and a role that show the results in ``scripts/results``, and what examples should print.

A table with a line for each value of ``rows``, and a column for each value of ``columns``:

    ```{results} memory.json
    :rows: contender
    :columns: variant
    :values: ratio:.3f
    :base: MB=bytes:M
    :where: variant~one key
    ```

Below a table stand its command, machine, and versions, unless ``same-source`` says that they stand below a neighboring
table. The options ``columns``, ``base``, and ``where`` may be missing; ``tables.py`` describes values and conditions. A
figure in a sentence is {result}`memory.json; variant=scan, plain, one key; contender=jdrop fast; ratio:.3f`. The
command and the expected output in the docstring of an example are

    ```{example} digits_mlp
    ```
"""

import ast
from pathlib import Path
from typing import Any, ClassVar

import tables
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

logger = logging.getLogger(__name__)


def report_of(env: BuildEnvironment, file: str) -> tables.Report:
    """Read a report, and build the page again when it changes."""
    path = Path(env.srcdir).parent / "scripts" / "results" / file
    env.note_dependency(str(path))
    return tables.load(path)


def values_of(text: str | None) -> list[tables.Value]:
    return [tables.Value.parse(part) for part in text.split(";")] if text else []


class Results(SphinxDirective):
    """A table of results from one or more files."""

    required_arguments = 1
    optional_arguments = 9
    option_spec: ClassVar[dict[str, Any]] = {
        **dict.fromkeys(("rows", "columns", "values", "base", "where"), directives.unchanged_required),
        "same-source": directives.flag,
    }

    def run(self) -> list[nodes.Node]:
        try:
            table, source = self.markdown()
        except tables.ResultError as error:
            raise self.error(str(error)) from error
        parts = [(text, name) for text, name in ((table, "results"), (source, "source")) if text]
        return [nodes.container("", *self.parse_text_to_nodes(text), classes=[name]) for text, name in parts]

    def markdown(self) -> tuple[str, str]:
        """Return the table, and what stands below it."""
        options = self.options
        for name in ("rows", "values"):
            if name not in options:
                raise tables.ResultError(f"no option {name}")
        reports = [report_of(self.env, file) for file in self.arguments]
        conditions = [part for part in options.get("where", "").split(";") if part.strip()]
        rows = tables.select([row for report in reports for row in report["rows"]], conditions)
        down, across, values = options["rows"].split(), options.get("columns", "").split(), values_of(options["values"])
        table = tables.pivot(rows, down, across, values, values_of(options.get("base")))
        fields = [value.field for value in values]
        sources = [] if "same-source" in options else [tables.source(report, fields) for report in reports]
        return table, "\n\n".join(sources)


class Result(SphinxRole):
    """One figure of a report."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        try:
            text = tables.figure(self.text, lambda file: report_of(self.env, file))
        except tables.ResultError as error:
            logger.error("%s", error, location=self.get_location())
            text = "?"
        return [nodes.Text(text)], []


class Example(SphinxDirective):
    """The command of an example, and what it should print."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = Path(self.env.srcdir).parent / "examples" / f"{self.arguments[0]}.py"
        self.env.note_dependency(str(path))
        try:
            docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
            return self.parse_text_to_nodes(tables.expected(docstring))
        except (OSError, tables.ResultError) as error:
            raise self.error(f"example {path.name}: {error}") from error


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_css_file("results.css")
    app.add_directive("results", Results)
    app.add_directive("example", Example)
    app.add_role("result", Result())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
