"""One self-contained HTML page out of paragraphs, tables and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Paragraph", "Picture", "Section", "Table"]


@dataclass
class Paragraph:
    """A paragraph of plain text."""

    text: str


@dataclass
class Picture:
    """A picture as encoded bytes.

    Args:
        data: a PNG file or an SVG document.
        caption: what it shows; also the text for those who cannot see it.
        media_type: ``image/png`` or ``image/svg+xml``.
        width_pixels: largest width on the page; ``None`` for the full width.
    """

    data: bytes
    caption: str
    media_type: str = "image/png"
    width_pixels: int | None = None


@dataclass
class Table:
    """A table of text and numbers.

    Args:
        header: column titles.
        rows: cells; numbers are aligned to the right and shown with four digits.
        caption: what it shows.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str | int | float | None]]
    caption: str = ""


@dataclass
class Section:
    """A titled part of a page."""

    title: str
    parts: list[Paragraph | Picture | Table] = field(
        default_factory=list[Paragraph | Picture | Table]
    )
