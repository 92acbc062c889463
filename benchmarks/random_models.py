"""Language and diffusion models of full size with random weights, saved as checkpoints, to time them."""

from pathlib import Path

import numpy as np
import torch

from kka.datasets import garden
from kka.tiny_denoiser import build_scheduler, build_tokenizer
from kka.tiny_glm import CHAT_TEMPLATE, END, SPECIAL, UNKNOWN, learn_words


def save_glm(folder: Path, dtype: torch.dtype, device: str) -> Path:
    """GLM-4-9B (the defaults of transformers' GlmConfig) with a word-level tokenizer; some 18 GB."""
    from transformers import GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast

    words = learn_words([text for texts in some_captions() for text in texts] + [garden.SPEC.prompt], SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token=UNKNOWN, eos_token=END, pad_token=END,
        additional_special_tokens=list(SPECIAL[2:]),
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    config = GlmConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, dtype=dtype)
    with torch.device(device):
        model = GlmForCausalLM._from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_diffusion(folder: Path, dtype: torch.dtype, device: str) -> Path:
    """A pipeline with the sizes of Stable Diffusion 1.5 (the defaults of diffusers, but for the VAE)."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = build_tokenizer([text for texts in some_captions() for text in texts])
    tokenizer.model_max_length = 77
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        text = CLIPTextModel(CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ))  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae, text, tokenizer, unet, build_scheduler(), None, None, requires_safety_checker=False
    )
    pipe.to(dtype).save_pretrained(folder)
    return folder


def some_captions(n: int = 200) -> list[list[str]]:
    """Captions of the garden's species."""
    rng = np.random.default_rng(0)
    flowers = list(garden.SPECIES.values())
    return [garden.captions(flowers[i % len(flowers)], rng, 2) for i in range(n)]
