"""Configuration of the site, see https://www.sphinx-doc.org/en/master/usage/configuration.html."""

import importlib.metadata
import os
import sys
from pathlib import Path

import jdrop

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS / "_extensions"))

metadata = importlib.metadata.metadata("jdrop")
urls = dict(url.split(", ") for url in metadata.get_all("Project-URL"))

project = "jdrop"
author = metadata["Author"]
project_copyright = f"%Y, {author}"
release = jdrop.__version__
version = release

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "myst_parser",
    "sphinx_copybutton",
    "sphinx_design",
    "picture",
    "layer_signatures",
    "results",
    "llms",
]
exclude_patterns = ["_build", "_extensions", "pictures"]

autodoc_typehints = "none"  # docstrings describe types, with shapes
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Limits", "notes_style")]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

intersphinx_mapping = {
    "python": ("https://docs.python.org/3", None),
    "jax": ("https://docs.jax.dev/en/latest", None),
    "flax": ("https://flax.readthedocs.io/en/latest", None),
    "optax": ("https://optax.readthedocs.io/en/latest", None),
    "equinox": ("https://docs.kidger.site/equinox", None),
}
nitpick_ignore_regex = []
if os.environ.get("JDROP_OFFLINE"):
    intersphinx_mapping = {}
    nitpick_ignore_regex = [(r"py:.*", r"(jax|flax|optax|equinox|haiku|numpy)\..*")]

html_theme = "sphinx_book_theme"
html_baseurl = urls["Documentation"]
html_title = "jdrop"
html_theme_options = {
    "repository_url": urls["Source"],
    "use_repository_button": True,
    "path_to_docs": "docs",
    "show_toc_level": 2,
    "home_page_in_toc": True,
}
html_context = {"default_mode": "auto"}  # otherwise, the theme logs an error
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
