"""How Sphinx builds this documentation: `make docs` writes it to docs/_build/html.

Pages ask for nothing from other servers: formulas become MathML while they are built.
"""

import runpy
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

_VERSION_FILE = Path(__file__).parents[1] / "src" / "eanet" / "_version.py"

project = "eanet"
author = "The eanet developers"
version = release = runpy.run_path(str(_VERSION_FILE))["__version__"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"eanet {release}"
html_show_copyright = False
html_show_sphinx = False
html_math_renderer = "mathml"


def _write_inline(translator: Any, node: Any) -> None:
    translator.body.append(convert(node.astext()))
    raise SkipNode  # its text is written already


def _write_display(translator: Any, node: Any) -> None:
    translator.body.append(convert(node.astext(), display="block"))
    raise SkipNode


def _generate(app: Any) -> None:
    runpy.run_path(str(Path(__file__).with_name("generate.py")))["generate"]()


def setup(app: Any) -> None:
    """Name the way in which formulas are written; make the generated pages before all are read."""
    app.connect("builder-inited", _generate)
    app.add_html_math_renderer("mathml", (_write_inline, None), (_write_display, None))
