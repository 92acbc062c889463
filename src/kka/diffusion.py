"""Drawer with a diffusion model (Eq. 4's theta_S): any text-to-image pipeline of diffusers."""

import inspect
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image

from kka.datasets.layout import DataSetSpec
from kka.drawers import PRESETS, DrawerSettings, Preset, is_black, style, styled
from kka.errors import UserError
from kka.experiment import find_device
from kka.files import sha256
from kka.runs import fingerprint

log = logging.getLogger(__name__)


class Diffusers:
    """Any text-to-image pipeline of diffusers; one CPU generator per image, so that batches do not matter."""

    attempts = 4
    one_at_a_time = False

    def __init__(self, settings: DrawerSettings, spec: DataSetSpec) -> None:
        preset = PRESETS[settings.preset]
        model = settings.model or preset.model
        if model is None:
            raise UserError("--preset own draws with the model of --model; give its hub id or folder")
        device = find_device(settings.device, strict=False)
        dtype = settings.dtype
        if dtype == "auto":
            dtype = "float16" if device.type == "cuda" else "float32"
        self.failures, self.limit = Counter[str](), 1 << 20
        self.pipe = load_pipeline(model, preset, getattr(torch, dtype), device, settings.safety_checker)
        self.id = model_id(model)
        self.suffix, self.size = style(settings, spec), settings.size
        self.steps = _first(settings.steps, preset.steps, self._default("num_inference_steps"))
        self.guidance = _first(settings.guidance, preset.guidance, self._default("guidance_scale"))
        self.settings: dict[str, Any] = {
            "scheduler": type(self.pipe.scheduler).__name__, "steps": self.steps, "guidance": self.guidance,
            "lora": preset.lora, "size": settings.size, "suffix": self.suffix, "dtype": dtype,
            "safety_checker": settings.safety_checker,
        }  # fmt: skip

    def _default(self, name: str) -> Any:
        return inspect.signature(self.pipe.__call__).parameters[name].default

    def draw(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Image.Image | None]:
        """See `Drawer`; halves the batch when the GPU's memory is full, and keeps to that."""
        images: list[Image.Image | None] = []
        while len(images) < len(captions):
            part = slice(len(images), len(images) + self.limit)
            drawn = None
            try:
                drawn = self._draw(captions[part], seeds[part])
            except torch.OutOfMemoryError:
                n = len(captions[part])  # memory is freed outside, when the error lets go of it
            if drawn is None:
                self._halve(n)
            else:
                images += drawn
        return images

    def _draw(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Image.Image | None]:
        output = self.pipe(
            prompt=[styled(caption, self.suffix) for caption in captions],
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            **({"height": self.size, "width": self.size} if self.size else {}),
        )
        flags = getattr(output, "nsfw_content_detected", None) or [False] * len(captions)
        return [self._check(image, flag) for image, flag in zip(output.images, flags, strict=True)]

    def _check(self, image: Image.Image, flag: bool) -> Image.Image | None:
        if flag or is_black(image):
            self.failures["safety checker" if flag else "black image"] += 1
            return None
        return image

    def _halve(self, n: int) -> None:
        if n == 1:
            raise UserError(
                f"the GPU's memory is too small for one image of {self.id}; free it, lower --size, "
                "or take a smaller --model or --device cpu"
            )
        self.limit = n // 2
        log.warning("the GPU's memory is full with %d images at once; going on with %d", n, self.limit)
        torch.cuda.empty_cache()


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def model_id(model: str) -> str:
    """A hub id as it is; for a folder its name and a hash of its files, which follow it wherever it lies."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digest = fingerprint([(path.relative_to(folder).as_posix(), sha256(path)) for path in files])
    return f"{folder.resolve().name}@{digest}"


def load_pipeline(
    model: str, preset: Preset, dtype: torch.dtype, device: torch.device, safety_checker: bool
) -> Any:
    """A text-to-image pipeline of diffusers on the device, with the preset's scheduler and LoRA.

    Raises UserError naming the model if it is not there or damaged, or is of another kind than the preset.
    """
    if not sys.stderr.isatty():  # as the bars of this project
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    unchecked = {} if safety_checker else {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipe = diffusers.AutoPipelineForText2Image.from_pretrained(model, dtype=dtype, **unchecked)
        if preset.lora:
            pipe.load_lora_weights(preset.lora)
    except Exception as error:  # the libraries raise many kinds for what is missing, gated or damaged
        names = " or ".join(filter(None, (model, preset.lora)))
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}" if str(error) else repr(error)
        raise UserError(
            f"the text-to-image model {names} cannot be loaded ({reason}); check its name, log in with "
            "`hf auth login` if it is gated, or give a folder with --model PATH"
        ) from None
    pipe.scheduler = _scheduler(pipe, preset, model)
    pipe.set_progress_bar_config(disable=True)
    try:
        return pipe.to(device)
    except torch.OutOfMemoryError:
        raise UserError(
            f"{model} does not fit into the GPU's memory; free it, or give --dtype float16, a smaller "
            "--model or --device cpu"
        ) from None


def _scheduler(pipe: Any, preset: Preset, model: str) -> Any:
    if preset.scheduler is None:
        return pipe.scheduler
    # Flow matching and other ways to denoise are not what the presets' schedulers solve.
    if diffusers.DPMSolverMultistepScheduler not in pipe.scheduler.compatibles:
        raise UserError(
            f"{model} brings {type(pipe.scheduler).__name__}, which the preset's {preset.scheduler} cannot "
            "replace; add --preset own"
        )
    return getattr(diffusers, preset.scheduler).from_config(pipe.scheduler.config)
