"""External attention for visual tasks (arXiv 2105.02358)."""

from eanet._version import __version__

__all__ = ["__version__"]
