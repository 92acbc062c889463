"""The autoencoder of the tiny Stable Diffusion: images to small latents and back."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from kka.journal import Journal
from kka.seeds import generator
from kka.tiny_training import descend

if TYPE_CHECKING:
    from kka.tiny_diffusion import TinyDiffusionSettings

CHUNK = 20  # steps between two records


def build_vae(settings: "TinyDiffusionSettings") -> Any:
    """An AutoencoderKL with random weights."""
    from diffusers import AutoencoderKL

    widths = settings.vae_widths
    return AutoencoderKL(
        block_out_channels=widths, layers_per_block=1, norm_num_groups=8, sample_size=settings.side,
        latent_channels=settings.latent_channels, mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
    )  # fmt: skip


def fit_vae(vae: Any, images: Tensor, settings: "TinyDiffusionSettings", journal: Journal) -> None:
    """Train the autoencoder on pixels and their differences, so that edges stay sharp."""
    optimizer = torch.optim.AdamW(vae.parameters(), settings.vae_lr, betas=(0.9, 0.99), weight_decay=0.01)
    n_chunks = -(-settings.vae_steps // CHUNK)
    for chunk in journal.epochs("autoencoder", n_chunks, {"vae": vae, "optimizer": optimizer}):
        stream, losses = generator(settings.seed, "vae", chunk), []
        for step in range(chunk * CHUNK, min(settings.vae_steps, (chunk + 1) * CHUNK)):
            rows = torch.randint(len(images), (settings.vae_batch_size,), generator=stream)
            loss = vae_loss(vae, to_unit(images[rows]), settings.kl_weight, stream)
            losses.append(descend(loss, optimizer, step, settings.vae_steps, settings.vae_lr))
        journal.record("autoencoder", chunk, loss=sum(losses) / len(losses))
    vae.eval().requires_grad_(False)


def vae_loss(vae: Any, images: Tensor, kl_weight: float, stream: Generator) -> Tensor:
    """Error of the pixels, error of their differences, and the weighted KL divergence per latent.

    Absolute errors, of the differences above all, keep edges sharp; the squared one cares for rare colours,
    which the absolute one gives up.
    """
    posterior = vae.encode(images).latent_dist
    error = vae.decode(posterior.sample(stream)).sample - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    divergence = posterior.kl().mean() / posterior.mean[0].numel()
    return error.abs().mean() + 5 * error.square().mean() + edges + kl_weight * divergence


def to_unit(images: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def encode_images(vae: Any, images: Tensor) -> tuple[Tensor, float]:
    """Latents of the images and then of their mirror images, scaled to deviation 1, and the factor; half."""
    both = torch.cat([images, images.flip(-1)])
    parts = [
        vae.encode(to_unit(part)).latent_dist.mode().half()
        for part in tqdm(both.split(256), desc="encoding images", unit="batch", disable=None, leave=False)
    ]
    latents = torch.cat(parts)
    factor = 1 / float(latents.float().std())
    return latents.mul_(factor), factor


@torch.no_grad()
def reconstruction(vae: Any, images: Tensor) -> float:
    """Peak signal-to-noise ratio of the autoencoder, dB."""
    images = to_unit(images)
    error = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1) - images
    return float(10 * torch.log10(4 / error.square().mean()))
