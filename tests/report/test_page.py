"""The page of a run: well formed, complete in itself, safe with any text."""

import base64
import re
import threading
from html.parser import HTMLParser

import numpy as np
import pytest

from eanet.errors import UserError
from eanet.report.page import Paragraph, Picture, Section, Table, render_page, write_page

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"><circle r="1"/></svg>'
#: elements that have no end tag
VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} stands twice"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text_of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


@pytest.fixture
def sections() -> list[Section]:
    return [
        Section(
            "Result",
            [
                Paragraph("One paragraph."),
                Table(["Method", "Accuracy"], [["ours", 0.98765], ["theirs", None]], "Test split"),
            ],
        ),
        Section("Curves", [Picture(PNG, "a point", width_pixels=320)]),
        Section("Curves", [Picture(SVG, "a circle", media_type="image/svg+xml")]),
    ]


def test_page_is_well_formed_and_structured(sections):
    page = Page(render_page("Title", sections, facts={"Accuracy": "0.99"}, footer="made by hand"))
    assert page.text_of("h1") == page.text_of("title") == ["Title"]
    assert page.text_of("h2") == ["Result", "Curves", "Curves"]
    assert page.text_of("dt") == ["Accuracy"]
    assert page.text_of("dd") == ["0.99"]
    assert page.text_of("caption") == ["Test split"]
    assert page.text_of("p") == ["One paragraph.", "made by hand"]
    assert page.all("html") == [{"lang": "en"}]
    assert all(cell["scope"] in ("col", "row") for cell in page.all("th"))


def test_links_lead_to_sections_that_exist_once(sections):
    page = Page(render_page("Title", sections))
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    links = [link["href"] for link in page.all("a")]
    assert len(links) == len(sections)
    assert {link.removeprefix("#") for link in links} <= set(identifiers)


@pytest.mark.parametrize(
    "titles", [["x", "x", "x-2", "x"], ["", "!", "\u6570\u5b57"], ["a b", "A-B", "a/b"]]
)
def test_anchors_stay_unique(titles):
    page = Page(render_page("Title", [Section(title) for title in titles]))
    names = [section["id"] for section in page.all("section")]
    assert len(set(names)) == len(titles)
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in names)


def test_nothing_is_fetched_from_anywhere(sections):
    text = render_page("Title", sections, facts={"a": "b"}, footer="c")
    page = Page(text)
    assert not page.all("script")
    assert not page.all("link")
    assert "@import" not in text
    assert "url(" not in text
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "data", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:image/"))
    policy = next(meta for meta in page.all("meta") if "http-equiv" in meta)["content"]
    assert policy.startswith("default-src 'none'; img-src data:;")


HOSTILE = "<script>alert(1)</script> & \"quoted\" 'single' </style></title><img src=x onerror=y>"


def test_text_is_never_read_as_html():
    page = Page(
        render_page(
            HOSTILE,
            [
                Section(HOSTILE, [Paragraph(HOSTILE), Picture(PNG, HOSTILE)]),
                Section("t", [Table([HOSTILE, "n"], [[HOSTILE, 1]], HOSTILE)]),
                Section("u"),
            ],
            facts={HOSTILE: HOSTILE},
            footer=HOSTILE,
        )
    )
    assert not page.all("script")
    assert [image["alt"] for image in page.all("img")] == [HOSTILE]
    for tag in ("h1", "h2", "p", "figcaption", "caption", "dt", "dd", "th", "a"):
        assert "".join(page.text_of(tag)).startswith(HOSTILE)


def test_pictures_come_back_byte_for_byte(sections):
    images = Page(render_page("Title", sections)).all("img")
    heads, bodies = zip(*(image["src"].split(",", 1) for image in images), strict=True)
    assert heads == ("data:image/png;base64", "data:image/svg+xml;base64")
    assert [base64.b64decode(body) for body in bodies] == [PNG, SVG]
    assert (images[0]["width"], images[0]["height"]) == ("1", "1")
    assert images[0]["style"] == "max-width: 320px"
    assert [image["alt"] for image in images] == ["a point", "a circle"]


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Picture(b"GIF89a", "c"), "not a PNG"),
        (Picture(PNG[:10], "c"), "not a PNG"),
        (Picture(b"hello", "c", media_type="image/svg+xml"), "not an SVG"),
        (Picture(PNG, "c", media_type="text/html"), "media_type must be"),
    ],
)
def test_other_pictures_are_refused(picture, message):
    with pytest.raises(ValueError, match=message):
        render_page("Title", [Section("s", [picture])])


def test_rows_must_fit_the_header():
    with pytest.raises(ValueError, match="a row of 1 cells for 2 columns"):
        render_page("Title", [Section("s", [Table(["a", "b"], [["x"]])])])


def cells(column: list) -> list[str]:
    page = Page(render_page("t", [Section("s", [Table(["c"], [[value] for value in column])])]))
    return page.text_of("td") + page.text_of("th")[1:]


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        ([0.98765, 0.5, None], ["0.9877", "0.5000", "\N{EN DASH}"]),
        ([1.0, 0.5], ["1.0000", "0.5000"]),
        ([2.3076, 0.98765, 9.99], ["2.3076", "0.9877", "9.9900"]),
        ([12.3456, 1.0], ["12.35", "1.00"]),
        ([123456.7, 10.0], ["123,457", "10"]),
        ([0.5, 1e-6], ["0.5", "1e\N{MINUS SIGN}06"]),  # too far apart for common decimals
        ([-0.25, 0.5], ["\N{MINUS SIGN}0.2500", "0.5000"]),
        ([1234567, -5], ["1,234,567", "\N{MINUS SIGN}5"]),
        ([float("nan"), float("inf"), 0.5], ["nan", "inf", "0.5000"]),
        ([0.0, 0], ["0.0000", "0"]),
        ([np.float32(0.25), np.int64(7000)], ["0.2500", "7,000"]),
        ([], []),
    ],
)
def test_numbers(column, texts):
    assert cells(column) == texts


def test_text_columns_keep_words_and_full_precision():
    assert sorted(cells(["adamw", 0.001, True, None, 1.5e-7])) == sorted(
        ["adamw", "0.001", "yes", "\N{EN DASH}", "1.5e\N{MINUS SIGN}07"]
    )


def test_numeric_columns_are_aligned_to_the_right():
    table = Table(["name", "value"], [["a", 1.5], ["b", None]])
    page = Page(render_page("t", [Section("s", [table])]))
    assert [cell.get("class") for cell in page.all("td")] == ["number", "number"]
    assert [cell.get("class") for cell in page.all("th")] == [None, "number", None, None]


def test_write_replaces_only_by_a_complete_page(tmp_path, sections):
    path = tmp_path / "deep" / "page.html"
    assert write_page(path, "First", sections) == path
    first = path.read_bytes()
    assert first.decode() == render_page("First", sections)
    with pytest.raises(ValueError, match="not a PNG"):
        write_page(path, "Second", [Section("s", [Picture(b"", "c")])])
    assert path.read_bytes() == first
    write_page(path, "Third", sections)
    assert "Third" in path.read_text(encoding="utf-8")
    assert [entry.name for entry in path.parent.iterdir()] == ["page.html"]


def test_a_failed_write_keeps_the_old_page(tmp_path, sections, monkeypatch):
    path = write_page(tmp_path / "page.html", "First", sections)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"page\.html: No space left on device"):
        write_page(path, "Second", sections)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(UserError, match="cannot write the page"):
        write_page(tmp_path / "file" / "page.html", "Title", [])


def test_threads_write_the_same_file_without_mixing(tmp_path, sections):
    path = tmp_path / "page.html"
    titles = [f"Title {number}" for number in range(8)]
    threads = [threading.Thread(target=write_page, args=(path, t, sections)) for t in titles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Page(path.read_text(encoding="utf-8")).text_of("h1")[0] in titles
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]
