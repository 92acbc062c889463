"""HTML that is safe by construction: whatever is not marked as HTML already is escaped."""

import base64
import hashlib
import html
import json
from typing import Any


class Html(str):
    """Text that is HTML already."""


def element(name: str, *children: str, **attributes: str | int | None) -> Html:
    """<name attributes>children</name>; strings are escaped, `class_` is class, None is left out."""
    words = [
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    ]
    return Html(f"<{name}{''.join(words)}>{join(*children)}</{name}>")


def join(*children: str) -> Html:
    """Children in a row; those that are not HTML are escaped."""
    return Html("".join(each if isinstance(each, Html) else html.escape(each) for each in children))


def image(source: str, alt: str, width: int, height: int) -> Html:
    """An image with its size, so that nothing moves when it is there."""
    words = f'src="{html.escape(source)}" alt="{html.escape(alt)}" width="{width}" height="{height}"'
    return Html(f"<img {words}>")


def embed_json(value: Any, name: str) -> Html:
    """Data for the page's script; no text in it can end the element or begin another."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Html(f'<script type="application/json" id="{name}">{text}</script>')


def content_hash(text: str) -> str:
    """What a Content-Security-Policy calls an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
