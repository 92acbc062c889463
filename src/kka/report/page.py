"""One HTML page with everything inside: no file, script, style or font is loaded from elsewhere."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from kka.report.catalogue import Figure, LeftOut
from kka.report.gallery import Picture, Thumbnails, data_uri
from kka.report.html import Html, content_hash, element, embed_json, image, join

GENERATOR = "KKA report"
SECTIONS = {
    "results": "Results", "figures": "Figures", "settings": "Settings", "gallery": "Generated anomalies",
}  # fmt: skip
MAX_NAMED = 20  # problems in the note at the top


@dataclass(frozen=True)
class Grid:
    """A table of text."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    """a cell may be Html; the first cell of a row is its name"""


@dataclass(frozen=True)
class Page:
    """What is on a page."""

    title: str
    kicker: str
    """what it is a report of"""
    facts: Mapping[str, str]
    problems: Sequence[str]
    """what is missing or broken, a sentence each"""
    grids: Sequence[Grid]
    notes: Sequence[str]
    figures: Sequence[Figure]
    left_out: Sequence[LeftOut]
    settings: Sequence[tuple[str, Mapping[str, Any]]]
    """title and values of each block"""
    commands: Sequence[str]
    footer: str


def render(page: Page, folder: Path, pictures: Sequence[Picture], thumbnails: Thumbnails) -> str:
    """The page as text; its figures are read from `folder`."""
    sections = {
        "results": _results(page),
        "figures": _figures(page, folder),
        "settings": _settings(page),
        "gallery": _gallery(pictures, thumbnails) if pictures else None,
    }
    shown = {name: content for name, content in sections.items() if content}
    links = [element("a", SECTIONS[name], href=f"#{name}") for name in shown]
    body = [
        element("section", element("h2", SECTIONS[name], id=f"{name}-title"), content, id=name,
                aria_labelledby=f"{name}-title")
        for name, content in shown.items()
    ]  # fmt: skip
    style, script = (_resource(f"page.{kind}") for kind in ("css", "js"))
    values = {
        "title": join(page.title), "kicker": join(page.kicker), "generator": GENERATOR,
        "style": style, "style_hash": content_hash(style), "script": script,
        "script_hash": content_hash(script), "navigation": join(*links), "footer": join(page.footer),
        "body": join(_facts(page.facts), _problems(page.problems), *body),
        "data": _data(pictures, thumbnails) if pictures else "",
    }  # fmt: skip
    return Template(_resource("page.html")).substitute(values)


def _resource(name: str) -> str:
    return files("kka.report").joinpath(name).read_text(encoding="utf-8")


def _facts(facts: Mapping[str, str]) -> Html:
    pairs = [
        element("div", element("dt", name), element("dd", _with_small(value)))
        for name, value in facts.items()
    ]
    return element("dl", *pairs, class_="facts")


def _with_small(text: str) -> Html:
    """What stands in a second line is said more quietly."""
    first, _, rest = text.partition("\n")
    return join(first, element("small", rest)) if rest else join(first)


def _problems(problems: Sequence[str]) -> Html:
    if not problems:
        return Html()
    shown = [*problems[:MAX_NAMED]]
    if len(problems) > MAX_NAMED:
        shown.append(f"and {len(problems) - MAX_NAMED} more")
    items = element("ul", *(element("li", text) for text in shown))
    return element("div", element("h3", "Missing or broken"), items, class_="note", role="note")


def _results(page: Page) -> Html:
    notes = element("ul", *(element("li", note) for note in page.notes), class_="about")
    return join(*(_table(grid) for grid in page.grids), notes if page.notes else Html())


def _table(grid: Grid) -> Html:
    head = element("tr", *(element("th", title, scope="col") for title in grid.head))
    rows = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:]))
        for row in grid.rows
    ]
    table = element("table", element("thead", head), element("tbody", *rows), class_="numbers")
    return join(element("p", grid.title, class_="about"), _scrolling(table, grid.title))


def _scrolling(content: Html, label: str) -> Html:
    """Content that is scrolled sideways on a phone, also with the keys."""
    return element("div", content, class_="scroll", role="region", aria_label=label, tabindex=0)


def _figures(page: Page, folder: Path) -> Html:
    drawn = [_figure(figure, folder / f"{figure.stem}.png") for figure in page.figures]
    left = [element("li", element("b", each.title), f": {each.reason}") for each in page.left_out]
    parts = [element("div", *drawn, class_="figures")]
    if left:
        content = [element("h3", "Left out"), element("ul", *left)]
        parts.append(element("div", *content, class_="left-out"))
    return join(*parts)


def _figure(figure: Figure, path: Path) -> Html:
    with Image.open(path) as picture:
        file, size = io.BytesIO(), picture.size
        # Lines stay sharp; photographs would be several times as large.
        lossy = {"quality": 85} if figure.stem == "anomalies" else {"lossless": True}
        picture.convert("RGB").save(file, "webp", method=4, **lossy)
    shown = image(data_uri(file.getvalue()), f"{figure.title}. {figure.summary}", *size)
    sheet = element("div", shown, class_="sheet", tabindex=0 if figure.shape == "wide" else None)
    files_ = join(
        "Files: ", element("code", f"{figure.stem}.png"), ", ", element("code", f"{figure.stem}.pdf")
    )
    caption = element("figcaption", f"{figure.description} ", files_)
    return element("figure", element("h3", figure.title), sheet, caption, class_=figure.shape or None)


def _settings(page: Page) -> Html:
    blocks = []
    for title, values in page.settings:
        rows = [
            element("tr", element("th", key, scope="row"), element("td", _plain(value)))
            for key, value in sorted(values.items())
        ]
        table = element("table", element("tbody", *rows), class_="keys")
        blocks.append(element("details", element("summary", title), _scrolling(table, title)))
    commands = [element("pre", command) for command in page.commands]
    return join(*commands, *blocks) if blocks else Html()


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return "none" if value is None else str(value)


def _gallery(pictures: Sequence[Picture], thumbnails: Thumbnails) -> Html:
    rounds = list(dict.fromkeys(picture.round for picture in pictures if picture.round))
    statuses = sorted({picture.status for picture in pictures})
    search = Html('<input type="search" id="search" autocomplete="off" placeholder="petals white …">')
    form = element(
        "form",
        element("label", "Search the captions", search),
        element("label", "Round", _select("round", "all rounds", rounds)),
        element("label", "Hard or easy", _select("status", "all", statuses)),
        id="filters", class_="filters", role="search", aria_label="Filter the generated anomalies",
    )  # fmt: skip
    about = (
        "Hard anomalies are closer to the normals than the farthest normal, Eq. (6). The evaluator changes "
        "from round to round, and with it the scale of the scores. "
        f"Pictures are at most {thumbnails.side} px."
    )
    return join(
        element("p", about),
        form,
        element("p", f"{len(pictures):,} images", id="count", role="status", aria_live="polite"),
        element("ul", id="cards", class_="cards"),
        element("button", "Show more", type="button", id="more", hidden=""),
        element("noscript", element("p", "The gallery needs JavaScript, the rest of the page does not.")),
        _dialog(),
    )


def _select(name: str, everything: str, values: Sequence[str]) -> Html:
    options = [element("option", everything, value=""), *(element("option", v, value=v) for v in values)]
    return element("select", *options, id=name)


def _dialog() -> Html:
    buttons = [
        element("button", text, type="button", id=name)
        for name, text in (("previous", "Previous"), ("next", "Next"), ("close", "Close"))
    ]
    words = [element("p", id="words"), element("dl", id="known"), element("div", *buttons, class_="row")]
    content = [
        element("div", id="large"),
        element("div", *words, class_="inside"),
    ]
    return element("dialog", *content, id="detail", aria_labelledby="words")


def _data(pictures: Sequence[Picture], thumbnails: Thumbnails) -> Html:
    rows = [
        [p.caption, p.round, p.status, None if p.score is None else float(f"{p.score:.5g}"), p.fate, uri]
        for p, uri in zip(pictures, thumbnails.uris, strict=True)
    ]
    return embed_json(rows, "items")
