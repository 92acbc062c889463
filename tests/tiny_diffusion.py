"""A Stable Diffusion pipeline of a few thousand random weights, saved as any checkpoint of diffusers is."""

import string
from pathlib import Path

import torch

from kka.seeds import seeded

SIDE = 16  # of its images, px


def tiny_diffusion(folder: Path, flagged: float | None = None) -> Path:
    """Save the pipeline; returns the folder.

    With `flagged` it has a safety checker: images whose (random) score is above that number come out black.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with seeded(0, "tiny_diffusion"):
        unet = UNet2DConditionModel(
            sample_size=SIDE // 2, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2, cross_attention_dim=8,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=[4, 8], norm_num_groups=2, sample_size=SIDE,
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        )  # fmt: skip
        text_encoder = CLIPTextModel(CLIPTextConfig(
            vocab_size=100, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            bos_token_id=0, eos_token_id=1, pad_token_id=1,
        ))  # fmt: skip
        checker = None if flagged is None else _safety_checker(flagged)
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = StableDiffusionPipeline(
        vae, text_encoder, _tokenizer(), unet, scheduler, checker, _extractor() if checker else None,
        requires_safety_checker=checker is not None,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def _tokenizer():
    """CLIP's, of letters: it knows no longer pieces of words."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + ",.-"
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer({piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def _extractor():
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def _safety_checker(threshold: float):
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    vision = {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": 8,
    }  # fmt: skip
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8))
    with torch.no_grad():
        checker.concept_embeds.normal_()
        checker.concept_embeds_weights.fill_(2.0)  # a cosine never reaches it
        checker.special_care_embeds_weights.fill_(2.0)
        checker.concept_embeds_weights[0] = threshold
    return checker
