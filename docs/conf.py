"""The documentation site: ``sphinx-build -W docs site``. No network is needed."""

import sys
from importlib.util import find_spec
from pathlib import Path

import equinox

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "extensions"), str(HERE.parent / "benchmarks")]


def uncompiled(function=None, **settings):
    """Leave functions as they are: the reference shows their own signatures."""
    return uncompiled if function is None else function


equinox.filter_jit = uncompiled

project = "jaxrefine"
author = "The jaxrefine developers"
project_copyright = "the jaxrefine developers, BSD 3-Clause licence"
html_title = "jaxrefine"
smartquotes_action = "D"  # dashes, not quotes

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "commands",
    "measurements",
    "names",
    "notebooks",
    "reference",
]

# Pages are Markdown; notebooks are shown with the output that they have.
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"

# MathJax comes from a Python package, in the one file that needs no fonts beside it.
_mathjax = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax"
mathjax_path = "tex-svg.js"
html_static_path = ["assets", str(_mathjax / mathjax_path)]

# Docstrings have their types in the signatures, with shapes. Single backticks are names
# of the package (see extensions/names.py), or no link.
default_role = "py:obj"
add_module_names = False
autodoc_default_options = {"no-value": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

# Every reference to the public part of the package must resolve.
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    ("py:.*", r"(?!jaxrefine\.).*"),
    ("py:.*", r".*\._.*"),
]

html_theme = "furo"
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#1f5a8c",
        "color-brand-content": "#1f5a8c",
    },
    "dark_css_variables": {
        "color-brand-primary": "#8fc1ea",
        "color-brand-content": "#8fc1ea",
    },
}
