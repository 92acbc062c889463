"""A tiny Stable Diffusion, trained on captioned images: a stand-in for Stable Diffusion 1.5.

First the autoencoder, then text encoder and denoiser together on its latents. It is saved as any pipeline of
diffusers is, with a vocabulary of whole words.
"""

import copy
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor, nn

from kka.attributes import SIDE, agreement, load_reader, to_tensor
from kka.captioned import CaptionedImages, draw_pool, read_images
from kka.datasets import get_spec
from kka.datasets.images import content_digest
from kka.errors import UserError
from kka.files import read_json, write_atomically, write_json
from kka.journal import Journal
from kka.runs import fingerprint
from kka.seeds import derive_seed, generator, seeded
from kka.settings import option
from kka.tiny_autoencoder import CHUNK, build_vae, encode_images, fit_vae, reconstruction
from kka.tiny_denoiser import (
    build_denoiser,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    tokenize,
)
from kka.tiny_training import OutputSettings, check_positive, descend, train_into

PREVIEWS = 20  # unfinished pipelines and sheets of pictures during the training
SAMPLING = {"num_inference_steps": 15, "guidance_scale": 4.5}  # of previews and figures
SHEET = (8, 4)  # pictures across and down

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TinyDiffusionSettings:
    """A tiny Stable Diffusion."""

    dataset_name: str = option("garden", "whose captioned training images are learnt, of all classes")
    data_path: str | None = option(None, "folder of the data set; None: data/<name>")
    side: int = option(64, "of the images, px")
    pool: int = option(20_000, "drawn flowers (garden)")
    vae_widths: tuple[int, ...] = option(
        (16, 32, 48), "channels of the autoencoder, from full size down to the latents'; each halves the side"
    )
    vae_steps: int = option(10_000, "optimiser steps of the autoencoder")
    vae_batch_size: int = option(8, "images per step of it")
    vae_lr: float = option(2e-3, "its highest learning rate")
    kl_weight: float = option(1e-5, "how strongly the latents are drawn to a normal distribution")
    latent_channels: int = option(8, "channels of the latents")
    widths: tuple[int, ...] = option((32, 64, 96), "channels of the denoiser, from the latents' size down")
    steps: int = option(12_000, "optimiser steps of text encoder and denoiser")
    batch_size: int = option(48, "images per step")
    lr: float = option(1.5e-3, "their highest learning rate")
    no_caption: float = option(0.1, "share of the images that are shown without their caption, for guidance")
    ema: float = option(0.999, "decay of the average of the weights that is saved")
    start: str | None = option(
        None, "folder of a pipeline that is trained on, its autoencoder as it is; None: random weights"
    )
    new_text: bool = option(False, "with --start: the text encoder begins anew")
    reader: str | None = option(
        None, "folder of the reader of attributes that judges the result (garden); None: it is not judged"
    )
    n_measured: int = option(500, "images drawn for that")
    seed: int = option(0, "of weights, drawn flowers and noise")


def train_diffusion(settings: TinyDiffusionSettings, output: OutputSettings) -> None:
    """Train a tiny Stable Diffusion into a folder; raises UserError for bad input."""
    check_settings(settings)
    spec = get_spec(settings.dataset_name)
    reader = load_reader(Path(settings.reader)) if settings.reader is not None else None
    pool = read_images(spec, settings.data_path, settings.side, settings.pool, settings.seed)
    data = fingerprint([pool.captions, pool.images.float().mean((1, 2, 3)).tolist()])
    kept = {k: v for k, v in asdict(settings).items() if k not in ("data_path", "reader", "n_measured")}
    identity = {"title": f"Tiny Stable Diffusion of {spec.title}", **kept, "data": data}
    if settings.start is not None:
        identity["start"] = content_digest(sorted(Path(settings.start).rglob("*.safetensors")))
    identity |= {name: list(identity[name]) for name in ("widths", "vae_widths")}  # as JSON has them

    def train(journal: Journal, folder: Path) -> dict[str, Any]:
        pipe = fit(pool, settings, journal)
        save(pipe, folder)
        figures = {"parameters": count_parameters(pipe), **journal.facts["vae"]}
        figures["loss of the last steps"] = round(journal.rows[-1]["loss"], 4)
        if reader is not None:
            figures |= judge(pipe, reader, settings.n_measured, settings.seed)
        return figures

    train_into(output, identity, train)


def check_settings(settings: TinyDiffusionSettings) -> None:
    """Raises UserError naming the first flag that makes no sense."""
    s = settings
    check_positive(s, "pool", "vae_steps", "vae_batch_size", "vae_lr", "latent_channels", "steps")
    check_positive(s, "batch_size", "lr", "side", "n_measured")
    smallest = 2 ** (len(s.widths) + len(s.vae_widths) - 2)
    wrong = {
        "--widths must be multiples of 8": not s.widths or any(w < 8 or w % 8 for w in s.widths),
        "--vae_widths must be multiples of 8": not s.vae_widths or any(w < 8 or w % 8 for w in s.vae_widths),
        f"--side must be a multiple of {smallest}, with as many --widths and --vae_widths": s.side % smallest,
        "--kl_weight must be at least 0": s.kl_weight < 0,
        "--no_caption must lie in [0, 1)": not 0 <= s.no_caption < 1,
        "--ema must lie in [0, 1)": not 0 <= s.ema < 1,
        "--seed must be at least 0": s.seed < 0,
        "--reader reads the garden's attributes only": s.reader is not None and s.dataset_name != "garden",
    }
    for sentence, is_wrong in wrong.items():
        if is_wrong:
            raise UserError(sentence)


def fit(pool: CaptionedImages, settings: TinyDiffusionSettings, journal: Journal) -> Any:
    """Train all parts; returns a StableDiffusionPipeline in single precision."""
    if settings.start is not None:
        pipe = load_start(Path(settings.start), settings)
        with seeded(settings.seed, "text_encoder"):
            text = build_text_encoder(pipe.tokenizer) if settings.new_text else pipe.text_encoder
        denoiser = nn.ModuleDict({"unet": pipe.unet, "text": text}).requires_grad_(True)
        vae = pipe.vae.eval().requires_grad_(False)
        return fit_denoiser(vae, denoiser.train(), pipe.tokenizer, pool, settings, journal)
    tokenizer = build_tokenizer([caption for captions in pool.captions for caption in captions])
    with seeded(settings.seed, "tiny_diffusion"):
        vae, denoiser = build_vae(settings), build_denoiser(settings, tokenizer)
    fit_vae(vae, pool.images, settings, journal)
    return fit_denoiser(vae, denoiser, tokenizer, pool, settings, journal)


def load_start(folder: Path, settings: TinyDiffusionSettings) -> Any:
    """The pipeline that is trained on; raises UserError if it is none, or one of other sizes."""
    from kka.diffusion import load_pipeline
    from kka.drawers import PRESETS

    if not (folder / "model_index.json").is_file():
        raise UserError(f"--start {folder} is no folder with a pipeline of diffusers: no model_index.json")
    pipe = load_pipeline(str(folder), PRESETS["own"], torch.float32, torch.device("cpu"), True)
    there = {
        "widths": tuple(pipe.unet.config.block_out_channels),
        "vae_widths": tuple(pipe.vae.config.block_out_channels),
        "latent_channels": pipe.vae.config.latent_channels,
        "side": pipe.vae.config.sample_size,
    }
    for name, value in there.items():
        if value != getattr(settings, name):
            raise UserError(f"--start {folder} has --{name} {value}; give the same, or another folder")
    return pipe


def fit_denoiser(
    vae: Any,
    denoiser: nn.ModuleDict,
    tokenizer: Any,
    pool: CaptionedImages,
    settings: TinyDiffusionSettings,
    journal: Journal,
) -> Any:
    """Train text encoder and denoiser on latents; returns the pipeline with their averaged weights."""
    average = copy.deepcopy(denoiser).requires_grad_(False)
    optimizer = torch.optim.AdamW(denoiser.parameters(), settings.lr, betas=(0.9, 0.99), weight_decay=0.01)
    parts = {"vae": vae, "model": denoiser, "average": average, "optimizer": optimizer}
    n_chunks = -(-settings.steps // CHUNK)
    batches: Batches | None = None
    for chunk in journal.epochs("denoiser", n_chunks, parts):
        if batches is None:  # not before a resumed training has its autoencoder back
            batches = Batches(vae, tokenizer, pool, settings)
            journal.facts["vae"] = batches.facts
        stream, losses = generator(settings.seed, "denoiser", chunk), []
        for step in range(chunk * CHUNK, min(settings.steps, (chunk + 1) * CHUNK)):
            loss = batches.loss(denoiser, stream)
            losses.append(descend(loss, optimizer, step, settings.steps, settings.lr))
            follow(average, denoiser, min(settings.ema, (1 + step) / (10 + step)))
        journal.record("denoiser", chunk, loss=sum(losses) / len(losses))
        if journal.folder is not None and (chunk + 1) % max(1, n_chunks // PREVIEWS) == 0:
            preview(assemble(vae, average, tokenizer, journal.facts["vae"]), pool, journal.folder)
    return assemble(vae, average, tokenizer, journal.facts["vae"])


class Batches:
    """Noised latents with captions, and the loss on them."""

    def __init__(
        self, vae: Any, tokenizer: Any, pool: CaptionedImages, settings: TinyDiffusionSettings
    ) -> None:
        self.latents, factor = encode_images(vae, pool.images)
        self.facts = {
            "scaling_factor": factor,
            "autoencoder PSNR, dB": reconstruction(vae, pool.images[:200]),
        }
        self.captions = [tokenize(tokenizer, captions) for captions in pool.captions]
        self.empty = tokenize(tokenizer, [""])[0]
        self.scheduler, self.settings = build_scheduler(), settings

    def loss(self, denoiser: nn.ModuleDict, stream: Generator) -> Tensor:
        """Squared error of the predicted velocity on a random batch."""
        s = self.settings
        rows = torch.randint(len(self.latents), (s.batch_size,), generator=stream)
        latents = self.latents[rows].float()
        noise = torch.randn(latents.shape, generator=stream)
        times = torch.randint(self.scheduler.config.num_train_timesteps, (s.batch_size,), generator=stream)
        tokens = torch.stack([self._caption(i, stream) for i in rows.tolist()])
        context = denoiser["text"](tokens).last_hidden_state
        noisy = self.scheduler.add_noise(latents, noise, times)
        predicted = denoiser["unet"](noisy, times, context).sample
        return F.mse_loss(predicted, self.scheduler.get_velocity(latents, noise, times))

    def _caption(self, row: int, stream: Generator) -> Tensor:
        dropped, chosen = torch.rand(2, generator=stream).tolist()
        captions = self.captions[row % len(self.captions)]
        return self.empty if dropped < self.settings.no_caption else captions[int(chosen * len(captions))]


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the average of the weights towards the newest ones."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def assemble(vae: Any, denoiser: nn.ModuleDict, tokenizer: Any, facts: dict[str, float]) -> Any:
    """The pipeline; in the scheduler are the settings to sample with."""
    from diffusers import StableDiffusionPipeline

    vae.register_to_config(scaling_factor=facts["scaling_factor"])
    pipe: Any = StableDiffusionPipeline(
        vae, denoiser["text"].eval(), tokenizer, denoiser["unet"].eval(), build_scheduler(), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(pipe: Any, folder: Path) -> None:
    """Write half-precision weights that are computed in single precision unless asked otherwise."""
    pipe.to(torch.float16).save_pretrained(folder)
    pipe.to(torch.float32)
    for card in folder.glob("*/config.json"):
        config = {**read_json(card), **({"dtype": "float32"} if card.parent.name == "text_encoder" else {})}
        config.pop("_name_or_path", None)  # published: no word of the folder that it was trained on from
        write_json(card, config, indent=2)


def count_parameters(pipe: Any) -> int:
    """Of all its networks."""
    return sum(p.numel() for part in (pipe.vae, pipe.unet, pipe.text_encoder) for p in part.parameters())


def preview(pipe: Any, pool: CaptionedImages, folder: Path) -> None:
    """Save the unfinished pipeline, and a sheet of pictures of the pool's first captions."""
    fresh, place = folder / "pipeline.partial", folder / "pipeline"
    shutil.rmtree(fresh, ignore_errors=True)
    pipe.save_pretrained(fresh)
    shutil.rmtree(place, ignore_errors=True)
    os.replace(fresh, place)
    across, down = SHEET
    pictures = draw(pipe, [captions[0] for captions in pool.captions[: across * down]], seed=0)
    side = 2 * pictures[0].width
    sheet = Image.new("RGB", (across * side, down * side))
    for k, picture in enumerate(pictures):
        sheet.paste(
            picture.resize((side, side), Image.Resampling.NEAREST), (k % across * side, k // across * side)
        )
    write_atomically(folder / "preview.png", lambda file: sheet.save(file, format="png"))


def draw(pipe: Any, captions: Sequence[str], seed: int, batch: int = 50) -> list[Image.Image]:
    """One picture for each caption, each with a random stream of its own."""
    pictures: list[Image.Image] = []
    for first in range(0, len(captions), batch):
        part = list(captions[first : first + batch])
        streams = [generator(seed, "picture", first + k) for k in range(len(part))]
        pictures += pipe(part, generator=streams, **SAMPLING).images
    return pictures


def judge(pipe: Any, reader: Any, n: int, seed: int) -> dict[str, str]:
    """How often a reader finds what captions say, in generated pictures and in drawn ones of the same."""
    drawn = draw_pool(n, derive_seed(seed, "judge") % 2**32, SIDE)
    captions = [block[0] for block in drawn.captions]
    found = agreement(reader, to_tensor(draw(pipe, captions, seed)), captions)
    best = agreement(reader, drawn.images, captions)
    return {
        f"{name} as the caption says": f"{found[name]:.3f} (drawn images: {best[name]:.3f})" for name in found
    }
