"""Back ends that draw captions: their settings, and the two that are no generators, bank and garden."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from kka.datasets import garden
from kka.datasets.images import read_image
from kka.datasets.layout import ANOMALY_FOLDER, NAME_LIST, DataSetSpec, Images, read_class_folder
from kka.errors import UserError
from kka.runs import fingerprint
from kka.settings import option

# Added to each caption, as captions do not say what kind of picture they describe.
STYLES = {
    "flower": "close-up photograph of a flower",
    "ucm_caption": "aerial photograph from straight above",
    "cifar100": "photograph",
}


@dataclass(frozen=True)
class Preset:
    """How a diffusion model is best sampled."""

    model: str | None
    scheduler: str | None
    """class in diffusers; None: the model's own"""
    steps: int | None
    """None: the pipeline's own, as for guidance"""
    guidance: float | None
    lora: str | None = None


SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PRESETS = {
    "sd15": Preset(SD15, "DPMSolverMultistepScheduler", 25, 7.5),
    "sd-turbo": Preset("stabilityai/sd-turbo", None, 4, 0.0),
    "sdxl-turbo": Preset("stabilityai/sdxl-turbo", None, 4, 0.0),
    "lcm": Preset(SD15, "LCMScheduler", 6, 1.5, lora="latent-consistency/lcm-lora-sdv1-5"),
    "own": Preset(None, None, None, None),
}


@dataclass(frozen=True)
class DrawerSettings:
    """The text-to-image model theta_S."""

    backend: str = option(
        "diffusers",
        "diffusion model, image API (OpenAI's wire format), captioned images, or the garden's painter",
        ("diffusers", "api", "bank", "garden"),
    )
    model: str | None = option(
        None, "diffusers: hub id or folder, None: the preset's; api: model name, None: cogview-4-250304"
    )
    preset: str = option(
        "sd15",
        "diffusers: model, scheduler, steps and guidance that go together; own: what --model brings",
        tuple(PRESETS),
    )
    steps: int | None = option(None, "diffusers: denoising steps; None: the preset's")
    guidance: float | None = option(None, "diffusers: guidance scale; None: the preset's")
    size: int | None = option(None, "side of the images in pixels; None: the model's own")
    suffix: str | None = option(None, 'style added to each caption; None: the data set\'s, "": none')
    safety_checker: bool = option(True, "diffusers: keep the safety checker of Stable Diffusion 1")
    dtype: str = option(
        "auto",
        "diffusers: precision; auto: float16 on a GPU, else float32",
        ("auto", "float32", "float16", "bfloat16"),
    )
    device: str = option("cuda", "diffusers: cpu, cuda or cuda:N; without a GPU the CPU is taken")
    base_url: str = option("https://open.bigmodel.cn/api/paas/v4/", "api: address of the server")
    crop_watermark: bool | None = option(
        None, "api: cut off the bottom int(height / 13) rows; None: for Zhipu's and Z.ai's servers"
    )
    max_requests: int | None = option(None, "api: stop after so many requests for an image")
    bank: str | None = option(None, "bank: data set of captioned images, or one class folder of it")
    bank_exclude: tuple[int, ...] = option(
        (), "bank: folders not to take images from; none: the data set's normal classes"
    )


class Drawer(Protocol):
    """A text-to-image model."""

    id: str
    """of the model, for the manifest"""
    settings: dict[str, Any]
    """what else decides the images, as JSON values"""
    attempts: int
    """how often a caption is tried, each time with another seed"""
    one_at_a_time: bool
    """True where an image costs money: each is stored before the next is asked for"""
    failures: Counter[str]
    """attempts that gave no image, by reason"""

    def draw(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Image.Image | None]:
        """One image for each caption and seed; None where that failed, counted in `failures`."""
        ...


def build_drawer(settings: DrawerSettings, spec: DataSetSpec, used: Collection[str] = ()) -> Drawer:
    """The drawer of the settings; raises UserError if it cannot work.

    Args:
        settings: which, and how.
        spec: the data set that is drawn for.
        used: `source` of the images that the bank has given before.
    """
    check_drawer(settings)
    if settings.backend == "bank":
        return Bank(settings, spec, used)
    if settings.backend == "garden":
        return Garden(settings, spec)
    if settings.backend == "api":
        from kka.image_api import Api

        return Api(settings, spec)
    from kka.diffusion import Diffusers

    return Diffusers(settings, spec)


def check_drawer(settings: DrawerSettings) -> None:
    """Raises UserError naming the flag of the first value that makes no sense."""
    for name in ("steps", "max_requests"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, it is {value}")
    if settings.size is not None and (settings.size < 8 or settings.size % 8):
        raise UserError(f"--size must be a multiple of 8 pixels, it is {settings.size}")
    if settings.guidance is not None and settings.guidance < 0:
        raise UserError(f"--guidance must be at least 0, it is {settings.guidance}")


def style(settings: DrawerSettings, spec: DataSetSpec) -> str:
    """What is added to each caption, "" for nothing."""
    return STYLES.get(spec.name, "") if settings.suffix is None else settings.suffix


def styled(caption: str, suffix: str) -> str:
    """The text that is drawn."""
    return f"{caption}, {suffix}" if suffix else caption


def is_black(image: Image.Image) -> bool:
    """True for an image without any light, as safety checkers return it."""
    return all(high == 0 for _, high in np.atleast_2d(image.convert("RGB").getextrema()))


class Bank:
    """Takes the captioned image whose captions are nearest by TF-IDF cosine; each image once.

    It stands in for a generator: its images are real, so it tells what perfect drawings would give.
    """

    attempts = 1
    one_at_a_time = False

    def __init__(self, settings: DrawerSettings, spec: DataSetSpec, used: Collection[str] = ()) -> None:
        if settings.bank is None:
            raise UserError("--backend bank takes captioned images; give their folder with --bank DIR")
        self.root = Path(settings.bank)
        images = read_bank(self.root, spec, settings.bank_exclude or spec.normal_classes)
        self.paths, self.failures = images.paths, Counter[str]()
        self.sources = [path.relative_to(self.root).as_posix() for path in images.paths]
        self.free = ~np.isin(self.sources, list(used))
        from sklearn.feature_extraction.text import TfidfVectorizer

        texts = [" ".join(captions) for captions in images.captions]
        self.vectorizer = TfidfVectorizer(sublinear_tf=True)
        self.vectors = self.vectorizer.fit_transform(texts)
        self.id = "bank"
        self.settings: dict[str, Any] = {"images": len(texts), "digest": fingerprint([self.sources, texts])}

    def draw(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Image.Image | None]:
        """See `Drawer`; the seeds decide nothing. Raises UserError when all images are used."""
        similarity = (self.vectorizer.transform(captions) @ self.vectors.T).toarray()
        return [self._take(row) for row in similarity]

    def _take(self, similarity: np.ndarray) -> Image.Image | None:
        if not self.free.any():
            raise UserError(
                f"all {len(self.paths)} images of the bank {self.root} are used; give a larger one"
            )
        k = int(np.argmax(np.where(self.free, similarity, -1.0)))
        if similarity[k] == 0:
            self.failures["no caption of the bank has a word in common"] += 1
            return None
        self.free[k] = False
        image = read_image(self.paths[k])
        image.info["source"] = self.sources[k]
        return image


def read_bank(root: Path, spec: DataSetSpec, exclude: Collection[int]) -> Images:
    """Captioned training images of a class folder, or of all class folders of a data set but `exclude`.

    Raises UserError if there are none.
    """
    if not root.is_dir():
        raise UserError(f"--bank {root} does not exist; give a data set, or a class folder of one")
    without = {ANOMALY_FOLDER, *exclude}
    numbers = {int(p.parent.name) for p in root.glob(f"*/{NAME_LIST['train']}") if p.parent.name.isdigit()}
    single = (root / NAME_LIST["train"]).exists()
    images = Images()
    for folder in [root] if single else [root / str(i) for i in sorted(numbers - without)]:
        images += read_class_folder(folder, "train", 1, spec)
    captioned = images.take([i for i, captions in enumerate(images.captions) if captions])
    if not len(captioned):
        raise UserError(
            f"--bank {root} holds no captioned images in the format of {spec.title}; put images, "
            f"{NAME_LIST['train']} and {spec.caption_stem}.json into it, or into numbered folders there"
        )
    return captioned


class Garden:
    """Draws the garden's captions as it draws its own flowers: a perfect generator, for ablations."""

    attempts = 1
    one_at_a_time = False
    id = "garden"

    def __init__(self, settings: DrawerSettings, spec: DataSetSpec) -> None:
        if spec.name != garden.SPEC.name:
            raise UserError(f"--backend garden draws the garden's captions only, not those of {spec.title}")
        self.settings: dict[str, Any] = {"version": garden.VERSION}
        self.failures = Counter[str]()

    def draw(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Image.Image | None]:
        """See `Drawer`; what a caption leaves open is random."""
        return [
            garden.draw_caption(caption, np.random.default_rng(seed))
            for caption, seed in zip(captions, seeds, strict=True)
        ]
