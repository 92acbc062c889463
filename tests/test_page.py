"""The page: safe whatever a caption holds, and working in a real browser with 2,000 images."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import CHROMIUM, browsing
from PIL import Image

from kka.report.catalogue import Figure, LeftOut
from kka.report.gallery import BUDGET, Picture, Thumbnails, make_thumbnails
from kka.report.html import content_hash, element, embed_json, join
from kka.report.page import Grid, Page, render

HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    '"><img src=x onerror="window.hacked = 3">',
    "<!--<script>",
    "' onmouseover='window.hacked = 4",
    "$title ${title} &lt;b&gt; \\u003c",
    "\u2028 花 \U0001f33a",
    "<img src=https://example.org/a.png>",
)
N = 2000
ROUNDS = ("round 0", "round 1", "untuned LLM")
needs_browser = pytest.mark.skipif(
    not CHROMIUM, reason="Chromium is not installed (apt-get install chromium)"
)


def make_page(folder, text="a report"):
    Image.new("RGB", (700, 400), "white").save(folder / "sizes.png")
    return Page(
        title=text, kicker=text, facts={text: f"{text}\n{text}"}, problems=[text], notes=[text],
        grids=[Grid(text, [text, "AUC"], [[text, "90 %"]])], figures=[Figure("sizes", text, text, text)],
        left_out=[LeftOut(text, text)], settings=[(text, {text: [text, None]})], commands=[text], footer=text,
    )  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A page of 2,000 images, hostile texts wherever a text may be: its path, its pictures."""
    folder = tmp_path_factory.mktemp("page")
    rng = np.random.default_rng(0)
    for k in range(40):  # noise on a gradient: no photograph is larger as WebP
        pixels = np.linspace(0, 200, 160)[:, None, None] + rng.integers(0, 55, (160, 160, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k}.png")
    pictures = [
        Picture(
            folder / f"{k % 40}.png",
            HOSTILE[k] if k < len(HOSTILE) else f"flower {k} with {('White', 'red')[k % 2]} petals",
            ROUNDS[k % 3],
            ("hard", "easy")[k % 5 > 0],
            k / 7,
            HOSTILE[0],
        )
        for k in range(N)
    ]
    few = make_thumbnails([picture.path for picture in pictures[:40]], BUDGET * 40 // N)
    thumbnails = Thumbnails(few.uris * (N // 40), few.side)
    text = render(make_page(folder, " ".join(HOSTILE)), folder, pictures, thumbnails)
    (folder / "index.html").write_text(text, encoding="utf-8")
    return folder / "index.html", pictures


@pytest.fixture(scope="module")
def browser():
    with browsing() as each:
        yield each


@pytest.fixture
def opened(browser, large):
    browser.errors.clear()
    browser.requests.clear()
    browser.resize(1280, 800)
    browser.prefer("light")
    browser.open(large[0])
    return browser


class Reader(HTMLParser):
    """Elements, and the text outside of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.inside = [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.text += data


def test_text_is_escaped_and_html_is_not():
    inner = element("b", "1 < 2 & 'x'")
    assert inner == "<b>1 &lt; 2 &amp; &#x27;x&#x27;</b>"
    assert element("p", inner, "<i>", class_='a"b', id=None) == f'<p class="a&quot;b">{inner}&lt;i&gt;</p>'
    assert join("a", inner) == f"a{inner}"


def test_embedded_json_ends_no_script_and_reads_back():
    text = embed_json(list(HOSTILE), "items")
    inside = re.fullmatch(r'<script type="application/json" id="items">(.*)</script>', text, re.DOTALL)[1]
    assert not re.search("[<>&\u2028\u2029]", inside)
    assert json.loads(inside) == list(HOSTILE)


def test_hostile_texts_add_no_element(large, tmp_path):
    page, pictures = large
    plain = render(make_page(tmp_path, "x"), tmp_path, pictures[:1], Thumbnails((None,), 160))
    hostile = Reader(page.read_text(encoding="utf-8"))
    tags = [[tag for tag, _ in each.elements if tag != "option"] for each in (hostile, Reader(plain))]
    assert tags[0] == tags[1]
    assert not [name for _, attributes in hostile.elements for name in attributes if name.startswith("on")]


def test_page_loads_nothing_and_its_policy_names_its_script_and_style(large):
    text = large[0].read_text(encoding="utf-8")
    reader = Reader(text)
    for tag, attributes in reader.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:image/webp;base64,"))
    policy = next(a["content"] for tag, a in reader.elements if a.get("http-equiv"))
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    style = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert f"script-src {content_hash(script[-1])};" in policy
    assert f"style-src {content_hash(style[0])};" in policy
    assert "unsafe" not in policy
    assert not [a for _, a in reader.elements if "style" in a]


def test_two_thousand_images_keep_to_15_mb(large):
    assert large[0].stat().st_size <= 15_000_000


def test_thumbnails_shrink_to_the_budget(large):
    paths = [picture.path for picture in large[1][:40]]
    full, small = make_thumbnails(paths, BUDGET), make_thumbnails(paths, 80_000)
    assert full.side == 160 > small.side
    assert sum(map(len, small.uris)) <= 80_000


def test_every_control_has_a_label_and_every_image_a_text(large):
    elements = Reader(large[0].read_text(encoding="utf-8")).elements
    assert [a for tag, a in elements if tag == "img" and not a.get("alt")] == []
    assert {a["scope"] for tag, a in elements if tag == "th"} == {"col", "row"}
    assert dict(elements)["html"]["lang"] == "en"
    text = large[0].read_text(encoding="utf-8")
    assert len(re.findall(r"<label>[^<]+<(?:input|select)", text)) == 3
    live = next(a for _, a in elements if a.get("id") == "count")
    assert (live["role"], live["aria-live"]) == ("status", "polite")


COUNT = "document.getElementById('count').textContent"
CARDS = "document.querySelectorAll('#cards li').length"


def choose(browser, name, value):
    """Give a control a value as a person does, and return what is counted then."""
    node = f"document.getElementById({json.dumps(name)})"
    browser.run(f"{node}.value = {json.dumps(value)}")
    browser.run(f"{node}.dispatchEvent(new Event('input', {{bubbles: true}}))")
    return browser.run(COUNT)


def counted(pictures, word="", round="", status=""):
    n = sum(
        all(w in p.caption.lower() for w in word.split())
        and round in ("", p.round)
        and status in ("", p.status)
        for p in pictures
    )
    return f"{n:,} of {N:,} images"


@needs_browser
def test_browser_has_no_error_and_asks_for_nothing(opened):
    assert opened.run(COUNT) == "2,000 of 2,000 images"
    assert opened.errors == []
    assert [url for url in opened.requests if not url.startswith(("file:", "data:"))] == []
    assert opened.run("window.hacked") is None


@needs_browser
def test_search_and_filters_work(opened, large):
    pictures = large[1]
    assert choose(opened, "search", "white PETALS") == counted(pictures, "white petals")
    assert choose(opened, "round", "round 1") == counted(pictures, "white petals", "round 1")
    assert choose(opened, "status", "hard") == counted(pictures, "white petals", "round 1", "hard")
    shown = opened.run("[...document.querySelectorAll('#cards .tag')].map((node) => node.textContent)")
    assert set(shown) == {"hard · round 1"}
    assert choose(opened, "search", "no such words") == f"0 of {N:,} images"
    assert opened.run(CARDS) == 0
    choose(opened, "round", "")
    assert choose(opened, "search", "flower 1234 ") == f"0 of {N:,} images"  # it is easy
    choose(opened, "status", "")
    assert choose(opened, "search", "flower 1234 ") == f"1 of {N:,} images"


@needs_browser
def test_hostile_captions_are_found_and_shown_as_text(opened):
    for text in HOSTILE[:6]:
        assert choose(opened, "search", text).startswith("1 of")
        assert opened.run("document.querySelector('#cards .caption').textContent") == text
        assert opened.run("document.querySelector('#cards img').alt") == text
        opened.run("document.querySelector('#cards button').click()")
        assert opened.run("document.getElementById('words').textContent") == text
        opened.run("document.getElementById('close').click()")
    assert opened.run("window.hacked") is None
    assert opened.run("document.querySelectorAll('#gallery script, #gallery [onerror]').length") == 0
    assert opened.errors == []


@needs_browser
def test_few_cards_are_made_until_they_are_wanted(opened):
    assert opened.run(CARDS) == 60
    opened.run("document.getElementById('more').scrollIntoView()")
    opened.wait_for(f"{CARDS} > 60")
    before = opened.run(CARDS)
    opened.run("document.getElementById('more').click()")
    assert opened.run(CARDS) >= before + 60
    assert opened.run("document.activeElement.tagName") == "BUTTON"


@needs_browser
def test_gallery_works_with_the_keys_alone(opened):
    opened.run("document.getElementById('status').focus()")
    opened.press("Tab", 9)
    assert opened.run("document.activeElement.closest('li') === document.querySelector('#cards li')")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert opened.run(outline) == "solid"
    opened.run("document.activeElement.click()")
    assert opened.run("document.getElementById('detail').open")
    opened.press("ArrowRight", 39)
    assert opened.run("document.getElementById('words').textContent") == HOSTILE[1]
    opened.press("Escape", 27)
    opened.wait_for("!document.getElementById('detail').open")
    assert opened.run("document.activeElement.closest('li') === document.querySelector('#cards li')")


@needs_browser
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_window(opened, width):
    opened.resize(width, 800, phone=width < 500)
    assert opened.run("document.documentElement.scrollWidth") == width


@needs_browser
def test_dark_scheme_follows_the_system_and_the_button(opened, large):
    colour = "getComputedStyle(document.body).backgroundColor"
    opened.prefer("light")
    light = opened.run(colour)
    opened.prefer("dark")
    dark = opened.run(colour)
    assert light != dark
    opened.open(large[0])
    opened.run("document.getElementById('scheme').click()")
    assert opened.run(colour) == light
    opened.run("document.getElementById('scheme').click()")
    assert opened.run(colour) == dark
