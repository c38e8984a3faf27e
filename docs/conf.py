"""Sphinx configuration. `make docs` builds; every warning is an error."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import xccl

project = "xccl"
author = "the xccl authors"
release = version = xccl.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "options_table"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"xccl {version}"

default_role = "code"  # docstrings write `name` for code
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_type_aliases = {name: name for name in ("Array", "ArrayLike", "Counts", "DTypeLike", "Quant")}
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]  # takes several names on one line
myst_heading_anchors = 3
python_maximum_signature_line_length = 100

SHORTER_TYPES = {
    r"~?\b(numpy|typing)\.": "",
    r"TypeAliasForwardRef\('(\w+)'\)": r"\1",
    r"ndarray\[Any, Any\]": "Array",
    r"ndarray\[tuple\[Any, \.\.\.\], dtype\[(\w+)\]\]": r"NDArray[\1]",
}


def shorten(text):
    for long, short in SHORTER_TYPES.items():
        text = re.sub(long, short, text)
    return text


def shorten_types(app, what, name, obj, options, signature, returns):
    """Shows the aliases that the sources use instead of what they stand for."""
    return signature and shorten(signature), returns and shorten(returns)


def setup(app):
    app.connect("autodoc-process-signature", shorten_types)
