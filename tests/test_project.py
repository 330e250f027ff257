"""The files around the package: they agree on versions and extras, and name only tiers, modules, and scripts that exist.

``scripts/check_package`` also runs these tests in an unpacked sdist, on an installed wheel.
"""

import os
import pathlib
import re
import tomllib

import jax
import pytest
import yaml
from test_package import FAMILY, LAYERS, module_of

import jdrop

ROOT = pathlib.Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = [path for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]
SCRIPTS = [path for path in sorted((ROOT / "scripts").iterdir()) if path.is_file()]
COMMANDS = [ROOT / ".ci" / "run", *(path for path in SCRIPTS if not path.suffix)]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


def text_of(name):
    return (ROOT / name).read_text()


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.mark.skipif("JDROP_INSTALLED" not in os.environ, reason="the checkout is tested, not an installed package")
def test_the_package_under_test_is_not_the_checkout():
    assert pathlib.Path(jdrop.__file__).parent != ROOT / "jdrop"


# ------------------------------------------------------------------------------------ versions


def test_citations_have_the_version_of_the_package():
    assert CITATION["version"] == jdrop.__version__
    (version,) = re.findall(r"^ *version += \{(.*)\},?$", text_of("docs/project/citing.md"), re.MULTILINE)
    assert version == jdrop.__version__


def test_the_citation_says_what_the_metadata_say():
    assert CITATION["authors"] == PROJECT["authors"]
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["url"] == PROJECT["urls"]["Documentation"]
    assert CITATION["repository-code"] == PROJECT["urls"]["Source"]
    assert CITATION["keywords"] == PROJECT["keywords"]


def test_the_newest_section_of_the_changelog_is_that_of_this_version():
    headings = re.findall(r"^## (.*)$", text_of("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == jdrop.__version__
    assert len(set(headings)) == len(headings)


def test_the_oldest_versions_are_the_same_everywhere():
    names = [re.match(r"\w+", dependency).group() for dependency in PROJECT["dependencies"]]
    oldest = dict(re.findall(r"^(jax|jaxlib)==(.*)$", text_of(".ci/oldest.txt"), re.MULTILINE))
    assert PROJECT["dependencies"] == [f"{name}>={oldest[name]}" for name in names]
    versions = text_of("docs/project/versions.md")
    assert f"| JAX | {oldest['jax']} |" in versions
    python = PROJECT["requires-python"].removeprefix(">=")
    assert f"| Python | {python} |" in versions
    assert PYPROJECT["tool"]["mypy"]["python_version"] == python
    for page in ("README.md", "CONTRIBUTING.md"):
        assert set(re.findall(r"Python (3\.\d+) or later", text_of(page))) <= {python}, page
    tests = text_of(".github/workflows/test.yml")
    assert f"matrix.jax == 'oldest' && '{python}'" in tests


def test_jax_is_a_supported_version():
    assert jax.__version_info__ >= tuple(map(int, PROJECT["dependencies"][0].removeprefix("jax>=").split(".")))


# ------------------------------------------------------------------------------------ extras, tiers, modules, scripts


@pytest.mark.parametrize("path", [*PAGES, *WORKFLOWS, *COMMANDS, ROOT / "pyproject.toml"], ids=relative)
def test_extras_exist(path):
    text = path.read_text()
    named = re.findall(r"(?:\bjdrop|['\"]\.|\.whl\))\[([a-z][a-z,]*)\]", text)
    named += re.findall(r"\bEXTRAS(?:=|:-)([a-z][\w,]*)", text)
    named += re.findall(r"^ *(?:environment|EXTRAS:) ([a-z][\w,]*)", text, re.MULTILINE)
    for names in named:
        assert set(names.split(",")) <= set(PROJECT["optional-dependencies"]), names


def test_the_guide_for_contributors_has_every_extra_and_every_tier():
    text = text_of("CONTRIBUTING.md")
    extras = re.findall(r"^\| `(\w+)` \|", text.split("| extra |")[1].split("\n\n")[0], re.MULTILINE)
    assert extras == list(PROJECT["optional-dependencies"])
    tiers = re.findall(r"^\| `(\w+)` \|", text.split("| tier |")[1].split("\n\n")[0], re.MULTILINE)
    assert tiers == [marker.split(":")[0] for marker in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]]


def test_the_layout_names_every_module_and_every_script():
    text = text_of("docs/project/layout.md")
    for path in (ROOT / "jdrop").rglob("*.py"):
        if path.name != "__init__.py":
            assert f"`{relative(path)}`" in text or f"`{path.name}`" in text, f"the layout lacks {relative(path)}"
    for path in SCRIPTS:
        if not path.name.startswith("_"):
            assert f"`{relative(path)}`" in text, f"the layout lacks {relative(path)}"


def test_the_table_of_layers_is_the_one_that_is_tested():
    """From the bottom up, one row per layer, and ``_family.*`` for the files of the family."""
    rows = re.findall(r"^\| \d+ \| (.*) \|$", text_of("docs/project/layout.md"), re.MULTILINE)
    layers = [re.findall(r"`([^`]+)`", row) for row in rows]
    family = [f"_family.{name}" for name in FAMILY]
    layers = [[name for item in row for name in (family if item == "_family.*" else [item])] for row in layers]
    assert layers == [[name or "jdrop" for name in names] for names in LAYERS]
    assert module_of(ROOT / "jdrop" / "__init__.py") == ""


# ------------------------------------------------------------------------------------ automation


def steps_of(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_scripts_that_exist(path):
    commands = "\n".join(step["run"] for step in steps_of(yaml.safe_load(path.read_text())) if "run" in step)
    for name in re.findall(r"(?:scripts|examples|tests|\.ci)/[\w./]*\w", commands + path.read_text()):
        assert (ROOT / name).exists(), name
    called = re.findall(r"(?:^|&& )((?:scripts|\.ci)/[\w./]*\w)", commands, re.MULTILINE)
    for name in called:
        assert os.access(ROOT / name, os.X_OK), f"{name} is not executable"
    sources = [*(ROOT / "tests").glob("*.py"), ROOT / "docs" / "conf.py"]
    known = {name for source in sources for name in re.findall(r"\bJDROP_\w+", source.read_text())}
    assert set(re.findall(r"\bJDROP_\w+", path.read_text())) <= known


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_have_few_rights_and_fixed_actions(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] in ({}, {"contents": "read"}), "rights belong to the job that needs them"
    assert "concurrency" in workflow
    for name, job in workflow["jobs"].items():
        assert "timeout-minutes" in job, name
    for step in steps_of(workflow):
        if "uses" in step:
            assert re.search(r"@[0-9a-f]{40}$", step["uses"]), f"{step['uses']} is not a commit"
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_workflows_select_tiers_that_exist():
    markers = PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]
    commands = [step.get("run", "") for path in WORKFLOWS for step in steps_of(yaml.safe_load(path.read_text()))]
    selected = [re.search(r" -m (?:'([^']*)'|(\w+)) tests", command) for command in commands if " pytest " in command]
    assert len(selected) >= 2
    for match in selected:
        tiers = (match.group(1) or match.group(2)).split(" or ")
        assert set(tiers) <= {marker.split(":")[0] for marker in markers}, tiers


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_forms_ask_for_something(path):
    form = yaml.safe_load(path.read_text())
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) >= 3
    assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_links_of_issues_lead_to_this_project():
    for link in yaml.safe_load(text_of(".github/ISSUE_TEMPLATE/config.yml"))["contact_links"]:
        assert link["url"].startswith((PROJECT["urls"]["Source"], PROJECT["urls"]["Documentation"])), link["url"]
        if link["url"].startswith(PROJECT["urls"]["Documentation"]):
            page = link["url"].removeprefix(PROJECT["urls"]["Documentation"]).strip("/").removesuffix(".html")
            assert (ROOT / "docs" / f"{page}.md").exists(), link["url"]


def test_hooks_run_tools_of_the_extra_dev():
    extras = PROJECT["optional-dependencies"]
    for repository in yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"]:
        for hook in repository["hooks"]:
            tool = re.match(r"\.venv/bin/(\w+)", hook["entry"]).group(1)
            assert tool in extras["dev"], tool


def test_paths_of_the_sdist_exist():
    for path in PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]:
        assert (ROOT / path.strip("/")).exists(), path
