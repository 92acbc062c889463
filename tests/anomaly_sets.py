"""Small anomaly sets, drawn and judged."""

from types import SimpleNamespace

import numpy as np
from toy import read_json

from kka.anomalies import (
    Item,
    file_name,
    live,
    read_items,
    record_split,
)
from kka.datasets import get_spec
from kka.draw import draw_captions
from kka.drawers import DrawerSettings, build_drawer

GARDEN = get_spec("garden")
COLOURS = ("red", "white", "blue", "orange", "purple", "yellow", "magenta", "lavender")


def item(number, status="new", replaced=None, **fields):
    """An item without an image."""
    record = {
        "file": file_name(number), "sha256": f"{number:064d}", "caption": f"caption {number}",
        "prompt_sha256": None, "examples": [], "llm": None, "adapter": None, "drawer": "d",
        "drawer_settings": {}, "seed": number, "round": 0, "status": status, "replaced": replaced,
    }  # fmt: skip
    return Item(**{**record, **fields})


def items(n, status, start=1):
    return [item(number, status) for number in range(start, start + n)]


def draw_set(folder, n, seed=0, round=0):
    """A folder that the garden's painter filled."""
    drawer = build_drawer(DrawerSettings(backend="garden"), GARDEN)
    captions = [f"a flower with {COLOURS[(k + seed) % 8]} petals, {seed}" for k in range(n)]
    records = [{"caption": caption, "llm": "glm", "examples": ["x"], "round": round} for caption in captions]
    draw_captions(drawer, records, folder, GARDEN, seed)
    return folder


def judge(folder, hard, easy=None, scores=None):
    """Record a split of all live images; `hard` and `easy` are places."""
    current = live(read_items(folder))
    n = len(current)
    easy = [k for k in range(n) if k not in hard] if easy is None else easy
    is_hard = np.isin(np.arange(n), list(hard))
    scores = np.arange(n, dtype=float) if scores is None else scores
    split = SimpleNamespace(
        index=tuple(range(n)), captions=tuple((it.caption,) for it in current), scores=scores, hard=is_hard,
        easy=np.array(easy, dtype=int),
    )  # fmt: skip
    record_split(folder, split)


def names(folder):
    return read_json(folder / "image.json")
