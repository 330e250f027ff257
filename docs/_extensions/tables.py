"""Tables and single figures from the reports in ``scripts/results``, as Markdown. Needs no Sphinx.

A report is what a benchmark writes with ``--json``: facts (command, machine, versions, settings) and ``rows``, one
flat dict per result. Every function here takes what it finds there, so new rows appear without a change.
"""

import json
import operator
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
Report = dict[str, Any]
LABELS = {
    "scale": "`x * c`",
    "jdrop fast": "jdrop",
    "jdrop jax": '`generator="jax"`',
    "jdrop packed": '`generator="packed"`',
    "jdrop chunked": "jdrop",
    "jdrop chunked, causal": "jdrop, causal",
    "jdrop reference": "jdrop, reference",
    "fixed mask": "a fixed mask",
    "its own": "the library's own",
    "linen": "Flax linen",
    "nnx": "Flax nnx",
    "equinox": "Equinox",
    "haiku": "Haiku",
    "torch": "PyTorch",
    "keras": "Keras",
}
HEADINGS = {"contender": "", "program": "", "member": "function"}  # of columns with names; others keep their key
DEVICES = {"h100": "an H100", **{name: f"a TPU {name}" for name in ("v4", "v5e", "v5p", "v6e")}}
PREDICTIONS = {
    "predicted_ms",
    "of_bytes_ms",
    "small",
    "large",
    "overlapped_ratio",
    "serial_ratio",
}  # fields that a model computes
TIMES = {"milliseconds", "compile_seconds"}  # fields that only a run gives
NOT_SETTINGS = {"file", "claim", "command", "compiled_for", "rows", "closures"}


class ResultError(ValueError):
    """A result that a page asks for is missing or ambiguous."""


class Value(NamedTuple):
    """One field of a row, with a label and a format: ``label=field:format``."""

    label: str
    field: str
    format: str

    @classmethod
    def parse(cls, text: str) -> "Value":
        label, equals, rest = text.strip().rpartition("=")
        field, _, format_ = rest.partition(":")
        return cls(label if equals else "", field.strip(), format_)

    def of(self, row: Row) -> str:
        """Return the formatted field of a row; empty if the field is null."""
        if self.field not in row:
            raise ResultError(f"{row['file']}: no {self.field} in the row {title(row)}")
        return format_value(row[self.field], self.format)


# ---------------------------------------------------------------------------------- reading


def load(path: Path) -> Report:
    """Read a report, and give every row its file, its machine, and the parts of its name."""
    if not path.is_file():
        raise ResultError(f"{path.name}: no such file in {path.parent.name}")
    report = json.loads(path.read_text())
    for key in ("command", "machine", "versions", "rows"):
        if key not in report:
            raise ResultError(f"{path.name}: no {key}")
    rows = [*report["rows"], *({"table": "closures", **row} for row in report.get("closures", ()))]
    report["file"] = path.name
    report["rows"] = [row for row in rows if "missing" not in row]  # a library that was not installed
    targets = rf"^(\d+ x )?({'|'.join(report.get('compiled_for', ()))}), (train step of )?"
    floors: dict[str, str] = {}
    for row in report["rows"]:
        row |= {"file": path.name, "machine": machine(report)}
        row.setdefault("contender", row.get("name"))
        if "member" in row:
            floor = floors.setdefault(row["member"], row["contender"])
            row |= {"floor": floor, "peer": row["contender"] not in ("jdrop", floor)}
        if step := re.fullmatch(r"(step \d+ of \d+), (.*)", str(row["contender"])):
            row["contender"] = step[2]
        if "train step" in row.get("table", "") and row["contender"] == "scale":
            row["contender"] = "all kept"  # dropout that keeps every element, in place of x * c
        if "table" in row:
            program = re.sub(targets, "", row["table"])
            row["program"] = f"{program}, {step[1]}" if step else program
    return report


def machine(report: Report) -> str:
    """Return the name of the machine: its processor or its accelerator."""
    facts = report["machine"]
    name = facts["cpu"] if facts["backend"] == "cpu" else facts["device"]
    return " ".join(re.sub(r"\((R|TM)\)|Processor", "", name).split())


CONDITION = re.compile(r"\s*(\w+)\s*(!=|=|~)\s*(.*?)\s*")
TESTS: dict[str, Callable[[str, str], bool]] = {"=": operator.eq, "!=": operator.ne, "~": operator.contains}


def select(rows: Sequence[Row], conditions: Sequence[str]) -> list[Row]:
    """Return the rows that meet all conditions: ``key=value``, ``key!=value``, or ``key~part of the value``."""
    selected = list(rows)
    for condition in conditions:
        match = CONDITION.fullmatch(condition)
        if not match:
            raise ResultError(f"not a condition: {condition}")
        key, sign, value = match.groups()
        selected = [row for row in selected if key in row and TESTS[sign](str(row[key]), value)]
    if not selected:
        files = " ".join(dict.fromkeys(row["file"] for row in rows))
        raise ResultError(f"{files}: no row with {'; '.join(conditions)}")
    return selected


# ---------------------------------------------------------------------------------- formatting


def format_value(value: Any, format_: str = "") -> str:
    """Format a value; a format that begins with ``k`` or ``M`` divides it by a thousand or a million first."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items())
    if scale := {"k": 1e3, "M": 1e6}.get(format_[:1]):
        value, format_ = value / scale, format_[1:] or (".1f" if value < 100 * scale else ",.0f")
    try:
        return format(value, format_ or ("," if isinstance(value, int) else ".2f" if abs(value) < 9.995 else ",.0f"))
    except ValueError as error:
        raise ResultError(f"not a format for {value}: {format_}") from error


def title(row: Row) -> str:
    """Return the text fields of a row, to name it in errors."""
    return ", ".join(value for value in row.values() if isinstance(value, str))


def label(value: Any) -> str:
    """Return a name as Markdown: known names in words, code as code."""
    text = str(value).replace("forward+backward", "forward and backward")
    if text in LABELS or not re.search(r"_| [*+] |\(|^(dropout|zoneout)$", text):
        return LABELS.get(text, re.sub(r"(?<=\d)x(?=\d)", " x ", text))
    return f"`{text}`"


def distinct(labels: Sequence[str]) -> dict[str, str]:
    """Shorten labels by the parts, separated by commas, that all of them share, but keep one part of each label."""
    parts = {text: text.split(", ") for text in labels}
    shared = set.intersection(*map(set, parts.values())) if len(parts) > 1 else set()
    if any(shared.issuperset(split) for split in parts.values()):
        shared.discard(next(iter(parts.values()))[0])
    return {text: ", ".join(part for part in split if part not in shared) for text, split in parts.items()}


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], left: int) -> str:
    """Return a Markdown table, with its first columns aligned to the left and the others to the right."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


# ---------------------------------------------------------------------------------- tables and figures


def pivot(
    rows: Sequence[Row], down: Sequence[str], across: Sequence[str], values: Sequence[Value], base: Sequence[Value] = ()
) -> str:
    """Return a table with a line for each combination of the keys ``down``, and a column for each one of ``across``.

    Args:
      rows: the results. Each belongs to one cell, for each of the values.
      down: keys whose values name the lines, in the order of the rows.
      across: keys whose values name the columns.
      values: what to show.
      base: for each value, what to show in parentheses after it for the first contender; may be empty.
    """
    if base and len(base) != len(values):
        raise ResultError(f"{rows[0]['file']}: {len(base)} bases for {len(values)} values")
    cells: dict[tuple[Any, ...], str] = {}
    lines = dict.fromkeys(tuple(row.get(key) for key in down) for row in rows)
    columns = dict.fromkeys(tuple(row.get(key) for key in across) for row in rows)
    for row in rows:
        for i, value in enumerate(values):
            place = (*(row.get(key) for key in (*down, *across)), i)
            if place in cells:
                raise ResultError(f"{row['file']}: more than one result for {place[:-1]}; add conditions")
            cells[place] = value.of(row)
            if base and base[i].field and row["contender"] == rows[0]["contender"]:
                ratio = "1" if row[value.field] == 1 else cells[place]
                cells[place] = f"{ratio} ({base[i].of(row)} {base[i].label})"
    short = [distinct(list(dict.fromkeys(str(line[i]) for line in lines))) for i in range(len(down))]
    names = [", ".join(label(part) for part in column) for column in columns]
    heads = [distinct(names)[name] for name in names]
    if len(heads) == 1 and all(value.label for value in values):
        heads = [""]  # labels of values are enough
    header = [HEADINGS.get(key, key) for key in down]
    header += [", ".join(filter(None, [head, value.label])) for head in heads for value in values]
    body = [[label(short[i][str(part)]) for i, part in enumerate(line)] for line in lines]
    for cells_of_line, line in zip(body, lines):
        cells_of_line += [cells.get((*line, *column, i), "") for column in columns for i in range(len(values))]
    return markdown(header, body, left=len(down))


def figure(text: str, reports: Callable[[str], Report]) -> str:
    """Return one figure: ``file; conditions; field:format``, where a semicolon separates the parts.

    The field may begin with ``min`` or ``max``, over all selected rows. A last part ``/ condition`` divides by the same
    field of another row, which differs in that condition.

    Args:
      text: the request.
      reports: returns the report of a file.
    """
    file, *conditions = (" ".join(part.split()) for part in text.split(";"))
    other = conditions.pop()[1:].strip() if conditions and conditions[-1].startswith("/") else ""
    if not conditions:
        raise ResultError(f"{file}: no field in {text}")
    value, report = Value.parse(conditions.pop()), reports(file)
    choose, _, field = value.field.rpartition(" ")
    if not conditions:
        return value.of({"file": file, **report})
    found = [one(select(report["rows"], conditions), field, bool(choose))]
    if other:
        key = re.split(r"[!=~]", other)[0]
        rest = [condition for condition in conditions if re.split(r"[!=~]", condition)[0] != key]
        found.append(one(select(report["rows"], [*rest, other]), field, bool(choose)))
    numbers = [{"min": min, "max": max, "": min}[choose](values) for values in found]
    return format_value(numbers[0] / numbers[1] if other else numbers[0], value.format)


def one(rows: Sequence[Row], field: str, many: bool) -> list[Any]:
    """Return the field of all rows; there must be one row, unless many may match."""
    if len(rows) > 1 and not many:
        raise ResultError(f"{rows[0]['file']}: {len(rows)} rows match, such as {title(rows[0])}; add conditions")
    for row in rows:
        if row.get(field) is None:
            raise ResultError(f"{row['file']}: no {field} in the row {title(row)}")
    return [row[field] for row in rows]


def source(report: Report, fields: Iterable[str]) -> str:
    """Return where results come from, as one Markdown paragraph: run, compiled or predicted, by what, with what.

    Args:
      report: the report.
      fields: the fields that are shown.
    """
    on, shown = f"{machine(report)}, {report['machine']['cores']} cores", set(fields)
    if "compiled_for" in report:
        target = " and ".join(DEVICES.get(name, name) for name in report["compiled_for"])
        how = f"Compiled for {target} on {on}; not run"
        if shown & PREDICTIONS:
            how = f"Predicted for {target} by a model, not measured; compiled on {on}"
        elif shown & {"cycles", "mcycles"}:
            how += "; cycles are estimated by the compiler"
    else:
        how = f"Run on {on}" if any(TIMES & row.keys() for row in report["rows"]) else f"Compiled on {on}; not timed"
    versions = ", ".join(f"{name.replace('python', 'Python')} {v}" for name, v in report["versions"].items())
    settings = {k: v for k, v in report.items() if not isinstance(v, dict) and k not in NOT_SETTINGS}
    options = ", ".join(f"{name} {value}" for name, value in settings.items())
    return f"**{how}:** `{report['command']}`. {versions}{'; ' + options if options else ''}."


def expected(docstring: str) -> str:
    """Return what the docstring of an example says from its command on, as Markdown, without references."""
    paragraphs = docstring.split("\n\n")
    start = next((i for i, text in enumerate(paragraphs) if text.lstrip().startswith("python examples/")), None)
    if start is None:
        raise ResultError(f"no command in {docstring.splitlines()[0]}")
    command, *others = (text for text in paragraphs[start:] if not text.startswith("Reference"))
    output = [f"```text\n{textwrap.dedent(text)}\n```" if text.startswith("    ") else text for text in others]
    return "\n\n".join([f"```sh\n{command.strip()}\n```", *output])
