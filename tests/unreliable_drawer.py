"""A drawer that fails and stops as told, and captions of the garden to draw."""

from collections import Counter

from kka.datasets import get_spec
from kka.draw import draw_captions
from kka.drawers import DrawerSettings, build_drawer

GARDEN = get_spec("garden")
CAPTIONS = [
    f"this flower has {count} {size} thin {colour} petals and a {centre} center"
    for count in ("sparse", "many", "dense")
    for size in ("small", "large")
    for colour in ("red", "blue")
    for centre in ("black", "white")
]
RECORDS = [
    {
        "caption": caption,
        "prompt_sha256": "ab",
        "examples": ["pink"],
        "llm": "glm",
        "adapter": None,
        "round": 2,
    }
    for caption in CAPTIONS
]


def painter():
    return build_drawer(DrawerSettings(backend="garden"), GARDEN)


class Unreliable:
    """The garden's painter, which fails for some captions and may be stopped; it counts what it draws."""

    id, settings, one_at_a_time = "unreliable", {"version": 1}, False

    def __init__(self, fails=(), attempts=1, stops_after=10**6):
        self.fails, self.attempts, self.stops_after = fails, attempts, stops_after
        self.painter, self.failures, self.drawn = painter(), Counter(), []

    def draw(self, captions, seeds):
        if len(self.drawn) >= self.stops_after:
            raise KeyboardInterrupt
        images = self.painter.draw(captions, seeds)
        for k, (caption, seed) in enumerate(zip(captions, seeds, strict=True)):
            self.drawn.append((caption, seed))
            if caption in self.fails:
                images[k] = None
                self.failures["content filter"] += 1
        return images


class Stopping:
    """The painter, stopped from outside after `n` images."""

    def __init__(self, n):
        self.painter, self.n = painter(), n
        for name in ("id", "settings", "attempts", "one_at_a_time", "failures"):
            setattr(self, name, getattr(self.painter, name))

    def draw(self, captions, seeds):
        if self.n <= 0:
            raise KeyboardInterrupt
        self.n -= len(captions)
        return self.painter.draw(captions, seeds)


def draw(folder, drawer=None, records=RECORDS, **settings):
    return draw_captions(drawer or painter(), records, folder, GARDEN, **settings)
