"""Tiny language models with random weights, saved as any checkpoint of transformers is."""

import re
from pathlib import Path

import torch

from kka.datasets import DATASETS, garden
from kka.datasets.garden_drawing import ATTRIBUTES
from kka.seeds import seeded

END, USER, ASSISTANT, UNKNOWN = "<|endoftext|>", "<|user|>", "<|assistant|>", "<unk>"
SPECIAL = (UNKNOWN, END, "[gMASK]", "<sop>", "<|system|>", USER, ASSISTANT)
# The template of GLM-4, for plain messages.
CHAT_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
FLOWER_WORDS = (
    "a an the this that these those flower flowers blossom bloom petal petals stamen stamens pistil "
    "pistils stem leaf leaves sepal sepals anther filament center centre middle has have is are with "
    "and or of in on its it around at by from to very many several few sparse thin wide broad long "
    "short small large big tiny smooth rough round rounded pointed pointy spiky bell shaped star cup "
    "tubular layered overlapping curled ruffled spotted striped veined bright dark pale light deep soft "
    "pink red orange yellow white purple violet blue green brown black cream magenta lavender maroon "
    "one two three four five six seven eight color colored edges tips top bottom base outer inner ring "
    "row rows surround surrounded grow growing there seen"
)


def tiny_glm(folder: Path, chat_template: bool = True) -> Path:
    """Save a GLM of 30 thousand random weights with a tokenizer of flower captions; returns the folder.

    It answers with some ten random words of `vocabulary()`, which depend on the prompt. End and padding
    token are the same, as GLM-4's.
    """
    from transformers import GlmConfig, GlmForCausalLM

    tokenizer = word_tokenizer(vocabulary(), chat_template)
    config = GlmConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(USER)],
    )  # fmt: skip
    with seeded(0, "tiny_glm"):
        model = GlmForCausalLM(config)
    _make_talkative(model, tokenizer.eos_token_id)
    model.generation_config.update(do_sample=True, temperature=0.8, top_p=0.8)  # as GLM-4's
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def _make_talkative(model, end: int) -> None:
    """Larger weights, so that the prompt matters; a constant first dimension makes the end likelier."""
    for parameter in model.parameters():
        parameter.mul_(4 if parameter.dim() > 1 else 1)
    model.model.embed_tokens.weight[:, 0] = 0.2
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    model.lm_head.weight.mul_(4)
    model.lm_head.weight[:, 0] = 0
    model.lm_head.weight[end] = 0
    model.lm_head.weight[end, 0] = 4.5


def word_tokenizer(words: list[str], chat_template: bool = True):
    """A fast tokenizer whose tokens are words, commas and full stops."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[,.:]"), "isolated")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, eos_token=END, pad_token=END,
        extra_special_tokens=list(SPECIAL[2:]), padding_side="left",
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE if chat_template else None
    return fast


def vocabulary() -> list[str]:
    """Words of flower captions, of the garden's captions and of the requests."""
    texts = [FLOWER_WORDS, *garden.TEMPLATES, *(spec.prompt for spec in DATASETS.values())]
    values = [word for name in ATTRIBUTES for value in ATTRIBUTES[name] for word in garden.words(name, value)]
    return sorted({*re.findall(r"\w[\w-]*|,", re.sub(r"{\w+}", " ", " ".join(texts))), *values})


def tiny_adapter(folder: Path, base: Path, base_name: str | None = None) -> Path:
    """Save a LoRA adapter with random weights for the model in `base`, which it calls `base_name`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    with seeded(0, "tiny_adapter"):  # some random ones hardly ever end a caption
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    if base_name is not None:
        model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder
