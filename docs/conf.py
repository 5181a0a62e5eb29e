"""How Sphinx builds this documentation: `make docs` writes it to docs/_build/html."""

import runpy
from pathlib import Path

_VERSION_FILE = Path(__file__).parents[1] / "src" / "eanet" / "_version.py"

project = "eanet"
author = "The eanet developers"
copyright = author
version = release = runpy.run_path(str(_VERSION_FILE))["__version__"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
# a part of the documentation that holds no page yet is not a mistake
suppress_warnings = ["toc.empty_glob"]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"eanet {release}"
html_show_copyright = False
html_show_sphinx = False
