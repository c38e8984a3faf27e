"""Sphinx configuration. `make docs` builds; every warning is an error."""

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
autodoc_type_aliases = {"Array": "Array"}
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = True
napoleon_custom_sections = [("Attributes", "params_style")]  # takes several names on one line
myst_heading_anchors = 3
python_maximum_signature_line_length = 100
