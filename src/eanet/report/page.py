"""One self-contained HTML page out of paragraphs, tables and pictures.

The page asks for nothing from anywhere: pictures are data URIs, the style is inside, there is no
script, and its content security policy forbids the browser everything else.
"""

import base64
import contextlib
import html
import math
import numbers
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from eanet.errors import UserError

__all__ = ["Paragraph", "Picture", "Section", "Table", "render_page", "write_page"]


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


_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def render_page(
    title: str,
    sections: Sequence[Section],
    *,
    facts: Mapping[str, str] | None = None,
    footer: str = "",
) -> str:
    """Return a page as one HTML document.

    All text is plain: it is escaped, never read as HTML.

    Args:
        title: heading of the page.
        sections: in order; from three on the page begins with links to them.
        facts: the few things to see first, such as the accuracy and the model, by name.
        footer: a last line, such as how the page was made.

    Raises:
        ValueError: a table's row is not as long as its header, or a picture is neither PNG nor SVG.
    """
    names = _anchor_names(sections)
    body = [f"<header>\n<h1>{html.escape(title)}</h1>"]
    if facts:
        body.append(_render_facts(facts))
    if len(sections) >= 3:
        body.append(_render_contents(sections, names))
    body.append("</header>\n<main>")
    body += [_render_section(section, name) for section, name in zip(sections, names, strict=True)]
    body.append("</main>")
    if footer:
        body.append(f"<footer><p>{html.escape(footer)}</p></footer>")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{html.escape(title)}</title>",
            f"<style>\n{_style()}</style>",
            "</head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )


def write_page(
    path: str | os.PathLike[str],
    title: str,
    sections: Sequence[Section],
    *,
    facts: Mapping[str, str] | None = None,
    footer: str = "",
) -> Path:
    """Write a page; the file appears complete or not at all, and an older one stays until then.

    Args:
        path: of the file; missing folders are made.
        title: see :func:`render_page`, as the other arguments.
        sections: see :func:`render_page`.
        facts: see :func:`render_page`.
        footer: see :func:`render_page`.

    Returns:
        The path.

    Raises:
        UserError: the file cannot be written.
        ValueError: see :func:`render_page`.
    """
    path = Path(path)
    content = render_page(title, sections, facts=facts, footer=footer).encode()
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise UserError(f"cannot write the page {path}: {error.strerror or error}") from error
    return path


def _style() -> str:
    return resources.files("eanet.report").joinpath("page.css").read_text(encoding="utf-8")


def _anchor_names(sections: Sequence[Section]) -> list[str]:
    """Return a name for each section that no other has and that holds letters and digits only."""
    names: list[str] = []
    for number, section in enumerate(sections, start=1):
        words = re.findall(r"[a-z0-9]+", section.title.lower())
        name = "-".join(words) or f"section-{number}"
        while name in names:
            name += f"-{number}"
        names.append(name)
    return names


def _render_facts(facts: Mapping[str, str]) -> str:
    cells = "\n".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd></div>"
        for name, value in facts.items()
    )
    return f'<dl class="facts">\n{cells}\n</dl>'


def _render_contents(sections: Sequence[Section], names: Sequence[str]) -> str:
    links = "\n".join(
        f'<li><a href="#{name}">{html.escape(section.title)}</a></li>'
        for section, name in zip(sections, names, strict=True)
    )
    return f'<nav aria-label="Contents"><ul>\n{links}\n</ul></nav>'


def _render_section(section: Section, name: str) -> str:
    parts: list[str] = []
    for part in section.parts:
        match part:
            case Paragraph():
                parts.append(f"<p>{html.escape(part.text)}</p>")
            case Picture():
                parts.append(_render_picture(part))
            case Table():
                parts.append(_render_table(part))
    title = html.escape(section.title)
    return "\n".join(
        [
            f'<section id="{name}" aria-labelledby="{name}-title">',
            f'<h2 id="{name}-title">{title}</h2>',
            *parts,
            "</section>",
        ]
    )


def _render_picture(picture: Picture) -> str:
    size = ""
    match picture.media_type:
        case "image/png":
            if not picture.data.startswith(_PNG_SIGNATURE) or len(picture.data) < 24:
                raise ValueError(f"the picture {picture.caption!r} is not a PNG file")
            # Width and height stand in the first chunk; the browser keeps the place free by them.
            width, height = (int.from_bytes(picture.data[at : at + 4]) for at in (16, 20))
            size = f' width="{width}" height="{height}"'
        case "image/svg+xml":
            if b"<svg" not in picture.data:
                raise ValueError(f"the picture {picture.caption!r} is not an SVG document")
        case other:
            raise ValueError(f"media_type must be image/png or image/svg+xml, got {other!r}")
    if picture.width_pixels is None:
        size += ' class="wide"'
    else:
        size += f' style="max-width: {int(picture.width_pixels)}px"'
    address = f"data:{picture.media_type};base64,{base64.b64encode(picture.data).decode()}"
    caption = html.escape(picture.caption)
    # The caption is the alternative text already; reading it out twice helps nobody.
    return (
        f'<figure>\n<div class="plate"><img src="{address}" alt="{caption}"{size}></div>\n'
        f'<figcaption aria-hidden="true">{caption}</figcaption>\n</figure>'
    )


def _render_table(table: Table) -> str:
    for row in table.rows:
        if len(row) != len(table.header):
            raise ValueError(f"a row of {len(row)} cells for {len(table.header)} columns: {row!r}")
    columns = [[row[index] for row in table.rows] for index in range(len(table.header))]
    numeric = [_is_numeric(column) for column in columns]
    texts = [_format_column(column) for column in columns]
    head = "".join(
        f'<th scope="col"{_NUMBER if is_number else ""}>{html.escape(name)}</th>'
        for name, is_number in zip(table.header, numeric, strict=True)
    )
    body = "\n".join(
        "<tr>"
        + "".join(
            _render_cell(texts[index][number], is_number=numeric[index], is_title=index == 0)
            for index in range(len(row))
        )
        + "</tr>"
        for number, row in enumerate(table.rows)
    )
    caption = html.escape(table.caption)
    label = caption or "Table"
    return (
        # the wide table scrolls within itself, by keyboard too
        f'<div class="table" role="region" aria-label="{label}" tabindex="0">\n<table>\n'
        + (f"<caption>{caption}</caption>\n" if caption else "")
        + f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


_NUMBER = ' class="number"'


def _render_cell(text: str, *, is_number: bool, is_title: bool) -> str:
    """Write a cell; the first one of a row is its title where the column holds text."""
    if is_number:
        return f'<td class="number">{html.escape(text)}</td>'
    if is_title:
        return f'<th scope="row">{html.escape(text)}</th>'
    return f"<td>{html.escape(text)}</td>"


def _is_number(value: object) -> bool:
    """Whether a value is a real number, of Python or of NumPy; truth values are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_numeric(column: Sequence[object]) -> bool:
    """Whether a column holds numbers and nothing else."""
    values = [value for value in column if value is not None]
    return bool(values) and all(_is_number(value) for value in values)


def _format_column(column: Sequence[str | int | float | None]) -> list[str]:
    """Write the cells of a column.

    Fractions get four significant digits. Where those of a column lie close enough together all
    get the same number of decimals, by the largest one, so that the points stand in a line.
    """
    return [_format_value(value, _decimals(column)) for value in column]


def _decimals(column: Sequence[object]) -> int | None:
    """Return the decimals that suit all fractions of a column, or ``None`` where none do."""
    if not _is_numeric(column):
        return None
    sizes = [
        abs(float(value))
        for value in column
        if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral)
    ]
    sizes = [size for size in sizes if math.isfinite(size)]
    if not sizes:
        return None
    # Below 10 four decimals, so that losses of 2.3 do not cost the accuracies beside them a digit.
    digits_before_point = math.floor(math.log10(max(sizes))) + 1 if max(sizes) >= 10 else 0
    decimals = max(0, 4 - digits_before_point)
    smallest = min((size for size in sizes if size), default=1.0)
    # the smallest must keep two digits of its own, and the largest must stay readable
    return decimals if smallest >= 10.0 ** (1 - decimals) and digits_before_point <= 7 else None


def _format_value(value: object, decimals: int | None) -> str:
    """Write one cell; ``decimals`` is for fractions, ``None`` gives them four digits each."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral):
        text = f"{int(value):,}"
    elif isinstance(value, numbers.Real):
        number = float(value)
        if not math.isfinite(number):
            return str(number)
        text = f"{number:.4g}" if decimals is None else f"{number:,.{decimals}f}"
    else:
        return str(value)
    return text.replace("-", "\N{MINUS SIGN}")
