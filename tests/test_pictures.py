"""The pictures of the README and the site exist in both themes, are small, and are what scripts/plot_docs.py draws."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from members import MEMBERS

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "pictures"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
THEMES = ("light", "dark")
CHEAP = ("schedules", "time_and_memory", "tiles")


@pytest.fixture
def pictures(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("plot_docs").PICTURES


def named_pictures(text):
    """Return the pictures that a page names, by the directive or by their files."""
    return {
        *re.findall(r"^ *[`:]{3,}\{picture\} *(\S+)", text, re.M),
        *re.findall(r"pictures/(\w+)-(?:light|dark)", text),
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pictures_of_a_page_exist(page):
    files = [FOLDER / f"{name}-{theme}.svg" for name in named_pictures(page.read_text()) for theme in THEMES]
    assert [file.name for file in files if not file.exists()] == []


def test_pictures_are_named():
    text = "```{picture} family\n::: {picture} x\n    ```{picture} seed\n<img src=docs/pictures/tiles-dark.svg>"
    assert named_pictures(text.replace("::: ", ":::")) == {"family", "x", "seed", "tiles"}


def test_every_picture_is_drawn_in_both_themes(pictures):
    assert {file.name for file in FOLDER.iterdir()} == {f"{name}-{theme}.svg" for name in pictures for theme in THEMES}
    assert {f"mask_{name.split()[0]}" for name in MEMBERS} <= pictures.keys()


@pytest.mark.parametrize("theme", THEMES)
def test_pictures_are_small_and_show_their_text_everywhere(theme):
    for file in FOLDER.glob(f"*-{theme}.svg"):
        text = file.read_text(encoding="utf-8")
        assert len(text) < 150_000, file.name
        assert "Matplotlib v" in text, f"{file.name} was not drawn by scripts/plot_docs.py"
        assert "<text" not in text, f"{file.name} has text that another font would move"


def test_pictures_are_what_the_script_draws(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    files = [f"{name}-{theme}.svg" for name in CHEAP for theme in THEMES]
    command = [sys.executable, "-W", "error", str(ROOT / "scripts" / "plot_docs.py"), "--only", *CHEAP]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, capture_output=True, timeout=300)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(files)
    for name in files:
        expected = (FOLDER / name).read_text(encoding="utf-8")
        if f"Matplotlib v{matplotlib.__version__}," in expected:  # another version may place text elsewhere
            assert_same_drawing((tmp_path / name).read_text(encoding="utf-8"), expected, name)


def assert_same_drawing(drawn, expected, name):
    """Compare two pictures; another version of JAX may round their numbers in another way."""
    number = r"(?<![\w#.])-?\d+(?:\.\d+)?(?![\w.])"
    assert re.sub(number, "", drawn) == re.sub(number, "", expected), f"draw {name} again"
    numbers = [np.array(re.findall(number, text), float) for text in (drawn, expected)]
    np.testing.assert_allclose(*numbers, atol=1e-3, err_msg=f"draw {name} again")
