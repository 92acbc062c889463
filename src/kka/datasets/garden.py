"""Garden: a procedural world of drawn flowers in a hundred species, ten captions each; one species is normal.

It stands in for Oxford-102 where there is no data: the pictures are drawn (garden_drawing.py), the captions
are templates in the style of Reed et al. (2016), and the same seed gives the same files.
"""

import io
import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from kka.datasets.garden_drawing import ATTRIBUTES, Flower, draw
from kka.datasets.layout import ANOMALY_FOLDER, NAME_LIST, DataSetSpec, UserDict, write_class_folder
from kka.errors import UserError
from kka.files import read_json, write_bytes, write_json

VERSION = 1  # of the pictures and captions; another version is another data set
NORMAL = 57  # the paper's Gaura in the official numbering of Oxford-102
N_SPECIES = 100
N_NEAR = 50  # species that share two or three attributes with the normal one
N_IMAGES = {"normal": {"train": 51, "test": 100}, "other": {"train": 4, "test": 12}}

# {0: training folders, 1: test folders}; folder 0 holds the generated anomalies.
user_dict: UserDict = {0: [NORMAL, 0], 1: [NORMAL, *(i for i in range(1, N_SPECIES + 1) if i != NORMAL)]}
# Test on the generated anomalies instead, to see which of them are hard (--iterate).
iterating_user_dict: UserDict = {0: [NORMAL, 0], 1: [NORMAL, 0]}

SPEC = DataSetSpec(
    name="garden",
    title="Garden (drawn flowers)",
    normal_classes=(NORMAL,),
    user_dict=user_dict,
    iterating_user_dict=iterating_user_dict,
    caption_stem="text_caption",
    captions_per_image=10,
    prompt=(
        "Describe one flower of another kind than the ones below. Answer with one sentence only, in "
        "exactly the structure and style of these descriptions:\n{examples}"
    ),
    n_epochs=200,
)

# The first template names every attribute and opens the block of each image.
TEMPLATES = (
    "this flower has {count} {size} {shape} {colour} petals and a {centre} center",
    "a {size} flower with {count} {shape} petals that are {colour} around a {centre} center",
    "the petals of this {size} flower are {colour} and {shape}, and the center is {centre}",
    "{count} {shape} {colour} petals surround the {centre} middle of this {size} flower",
    "this flower is {colour} in color, with {count} petals that are {size} and {shape}",
    "the {size} flower has {colour} petals and a {centre} center",
    "there are {count} {shape} petals in {colour} on this {size} flower",
    "the center of this flower is {centre} and its {count} petals are {shape} and {colour}",
)
# The words a caption may use for an attribute, the attribute's own name first.
SYNONYMS: dict[str, dict[str, tuple[str, ...]]] = {
    "colour": {"purple": ("violet",), "yellow": ("golden",), "magenta": ("fuchsia",), "lavender": ("lilac",)},
    "count": {"sparse": ("few",), "many": ("numerous",), "dense": ("crowded",)},
    "shape": {
        "thin": ("narrow",),
        "pointed": ("pointy",),
        "round": ("rounded",),
        "heart-shaped": ("notched",),
    },
    "size": {"small": ("tiny",), "medium": ("medium-sized",), "large": ("big",)},
    "centre": {"black": ("dark",), "yellow": ("golden",)},
}


def words(attribute: str, value: str) -> tuple[str, ...]:
    """The words that mean a value of an attribute."""
    return (value, *SYNONYMS[attribute].get(value, ()))


_MEANING = {
    attribute: {word: value for value in values for word in words(attribute, value)}
    for attribute, values in ATTRIBUTES.items()
}


def _any_word(attribute: str) -> str:
    longest_first = sorted(_MEANING[attribute], key=len, reverse=True)
    return rf"\b({'|'.join(map(re.escape, longest_first))})\b(?!-)"


_WORD = {attribute: re.compile(_any_word(attribute)) for attribute in ATTRIBUTES}
_MIDDLE = r"(?:center|centre|middle|disc|disk|stamens?)\b"
_BEFORE = rf"{_any_word('centre')}(?: colou?red)? {_MIDDLE}"
_AFTER = (
    rf"{_MIDDLE}(?: of (?:this|the) flower)?(?: (?:that|which))?(?: (?:is|are|in))? {_any_word('centre')}"
)
_CENTRE = re.compile(f"{_BEFORE}|{_AFTER}")


def captions(flower: Flower, rng: np.random.Generator, n: int) -> list[str]:
    """`n` sentences about a flower; the first names all five attributes, the others three to five."""
    order = [0, *rng.integers(len(TEMPLATES), size=n - 1)] if n else []
    return [_fill(TEMPLATES[k], flower, rng) for k in order]


def _fill(template: str, flower: Flower, rng: np.random.Generator) -> str:
    chosen = {}
    for attribute, value in asdict(flower).items():
        options = words(attribute, value)
        chosen[attribute] = options[rng.integers(len(options))]
    return template.format(**chosen)


def parse_caption(text: str) -> dict[str, str]:
    """The attributes that a caption names, as {attribute: value}; what it leaves open is absent.

    Understands the templates and free sentences that use their words, in any order and case.
    """
    text = text.lower()
    found = {}
    centre = _CENTRE.search(text)
    if centre:
        found["centre"] = _MEANING["centre"][centre[1] or centre[2]]
        text = text[: centre.start()] + text[centre.end() :]
    for attribute in ("colour", "count", "shape", "size"):
        match = _WORD[attribute].search(text)
        if match:
            found[attribute] = _MEANING[attribute][match[1]]
    return found


def draw_caption(caption: str, rng: np.random.Generator) -> Image.Image:
    """Draw what a caption says, RGB, 64 x 64 px; attributes it leaves open are random."""
    return draw(Flower(**{**asdict(_random_flower(rng)), **parse_caption(caption)}), rng)


def shared_attributes(a: Flower, b: Flower) -> int:
    """Number of attributes, 0 to 5, in which two flowers agree."""
    return sum(asdict(a)[name] == asdict(b)[name] for name in ATTRIBUTES)


def _random_flower(rng: np.random.Generator) -> Flower:
    return Flower(**{name: values[rng.integers(len(values))] for name, values in ATTRIBUTES.items()})


def _choose_species() -> dict[int, Flower]:
    """The species are part of the world: the same for every seed of the pictures."""
    normal = Flower(colour="pink", count="sparse", shape="thin", size="small", centre="yellow")
    flowers = [Flower(*values) for values in itertools.product(*ATTRIBUTES.values())]
    random.Random(NORMAL).shuffle(flowers)
    near = [flower for flower in flowers if shared_attributes(flower, normal) in (2, 3)][:N_NEAR]
    far = [flower for flower in flowers if shared_attributes(flower, normal) < 2][: N_SPECIES - 1 - N_NEAR]
    others = [*near, *far]
    random.Random(NORMAL).shuffle(others)
    return {NORMAL: normal, **dict(zip(user_dict[1][1:], others, strict=True))}


SPECIES: dict[int, Flower] = _choose_species()


def make_garden(out: Path, seed: int = 0, n_anomalies: int = 200) -> None:
    """Write the data set in the official layout; a finished one is left alone, an interrupted one continued.

    Folder 0 gets `n_anomalies` pictures of random flowers that are no species of the garden: the test
    species stay unseen. Raises UserError if `out` holds something else or another garden.
    """
    settings = {"version": VERSION, "seed": seed, "n_anomalies": n_anomalies}
    if _is_finished(out, settings):
        return
    write_json(out / "garden.partial.json", settings)
    plan = list(_plan(n_anomalies))
    with tqdm(
        total=sum(count for *_, count in plan), desc=f"drawing {out}", unit="image", disable=None
    ) as bar:
        for class_id, split, first, count in plan:
            _write_split(out, seed, class_id, split, first, count)
            bar.update(count)
    n_images = sum(count for *_, count in plan)
    write_json(out / "garden.json", {**settings, "n_species": N_SPECIES, "n_images": n_images}, indent=2)
    (out / "garden.partial.json").unlink(missing_ok=True)  # another process may have drawn the same


def draw_anomalies(out: Path, seed: int, n: int) -> None:
    """Write `n` pictures of flowers that are no species of the garden into `<out>/0`; done once."""
    _write_split(out, seed, ANOMALY_FOLDER, "train", 1, n)


def _is_finished(out: Path, settings: dict[str, int]) -> bool:
    for record in (out / "garden.json", out / "garden.partial.json"):
        if record.exists():
            made = read_json(record)
            different = [name for name in settings if made.get(name) != settings[name]]
            if different:
                name = different[0]
                raise UserError(
                    f"{out} is a garden with {name} {made.get(name)}, not {settings[name]}; "
                    "choose another folder or remove this one"
                )
            return record.name == "garden.json"
    if out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise UserError(f"{out} is not empty and no garden; choose a new folder for the garden")
    return False


def _plan(n_anomalies: int) -> Iterator[tuple[int, str, int, int]]:
    """(class id, split, number of the first image, number of images) of each list to write."""
    for class_id in SPECIES:
        counts = N_IMAGES["normal" if class_id == NORMAL else "other"]
        yield class_id, "train", 1, counts["train"]
        yield class_id, "test", 1 + counts["train"], counts["test"]
    yield ANOMALY_FOLDER, "train", 1, n_anomalies


def _write_split(out: Path, seed: int, class_id: int, split: str, first: int, count: int) -> None:
    folder = out / str(class_id)
    if (folder / NAME_LIST[split]).exists():
        return
    names, texts = [], []
    for number in range(first, first + count):
        # One stream for each image: the files do not depend on the order in which they are written.
        rng = np.random.default_rng([seed, class_id, number])
        flower = _unseen_flower(rng) if class_id == ANOMALY_FOLDER else SPECIES[class_id]
        names.append(f"image_{number:05d}.png")
        write_bytes(folder / names[-1], _png(draw(flower, rng)))
        texts.append(captions(flower, rng, SPEC.captions_per_image))
    write_class_folder(folder, split, names, texts, SPEC)


def _unseen_flower(rng: np.random.Generator) -> Flower:
    while (flower := _random_flower(rng)) in SPECIES.values():
        pass
    return flower


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()
