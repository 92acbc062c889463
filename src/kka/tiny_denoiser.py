"""The parts of the tiny Stable Diffusion but its autoencoder: tokenizer, text encoder, UNet, scheduler."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from kka.tiny_glm import UNKNOWN, learn_words

if TYPE_CHECKING:
    from kka.tiny_diffusion import TinyDiffusionSettings

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 77  # Stable Diffusion's
TEXT_WIDTH = 64


def build_tokenizer(captions: Sequence[str]) -> Any:
    """A fast tokenizer of the captions' words that starts, ends and pads texts as CLIP's does."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = learn_words(captions, (UNKNOWN, START, END))
    ends = [(token, words.token_to_id(token)) for token in (START, END)]
    words.post_processor = TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
    longest = max(len(words.encode(caption).ids) for caption in captions)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token=UNKNOWN, bos_token=START, eos_token=END, pad_token=END,
        model_max_length=min(MAX_TOKENS, 8 * (longest // 8 + 1)),
    )  # fmt: skip


def build_denoiser(settings: "TinyDiffusionSettings", tokenizer: Any) -> nn.ModuleDict:
    """UNet and CLIP text encoder with random weights; captions are read below the highest resolution."""
    from diffusers import UNet2DConditionModel

    n, side = len(settings.widths) - 1, settings.side // 2 ** (len(settings.vae_widths) - 1)
    unet: Any = UNet2DConditionModel(
        sample_size=side, block_out_channels=settings.widths, layers_per_block=1,
        in_channels=settings.latent_channels, out_channels=settings.latent_channels, norm_num_groups=8,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * n,
        up_block_types=("CrossAttnUpBlock2D",) * n + ("UpBlock2D",),
        attention_head_dim=4, cross_attention_dim=TEXT_WIDTH,
    )  # fmt: skip
    return nn.ModuleDict({"unet": unet, "text": build_text_encoder(tokenizer)})


def build_text_encoder(tokenizer: Any) -> nn.Module:
    """CLIP's with random weights, in which every word keeps its identity.

    CLIP's own embeddings begin fifty times smaller than what attention adds to them, the mean of all words
    before: that of the last word drowns, and a tiny encoder never learns what a caption ends with.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    text: Any = CLIPTextModel(config)
    nn.init.normal_(text.embeddings.token_embedding.weight)
    nn.init.normal_(text.embeddings.position_embedding.weight, std=0.3)
    return text


def build_scheduler() -> Any:
    """v-prediction from pure noise on: SNR 0 at the last timestep (Lin et al., 2024)."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", rescale_betas_zero_snr=True,
        timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True,
        steps_offset=1,  # which trailing timesteps ignore, and the pipeline warns of another value
    )  # fmt: skip


def tokenize(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """(N, T) token ids, padded as the pipeline pads them."""
    length = {"max_length": tokenizer.model_max_length, "truncation": True}
    return tokenizer(list(captions), padding="max_length", return_tensors="pt", **length)["input_ids"]
