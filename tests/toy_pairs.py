"""Preference pairs of pink and blue flowers, and run folders that pairs are made of."""

import json
from dataclasses import replace

from kka.anomalies import Item, file_name, write_set
from kka.datasets import flower
from kka.pairs import Pairs
from kka.preference_trainer import TuneSettings, build_trainer, prepare_rows, trainer_config
from kka.prompts import generation_prompt, prompt_digest

EXAMPLES = ["this flower is pink", "thin petals, sparse"]
PROMPT = generation_prompt(flower.SPEC, EXAMPLES)
SIZES = ("small", "large", "tiny", "big")
SHAPES = ("round", "thin", "pointed", "long", "wide", "curled")
WEIGHTS = "adapter_model.safetensors"
SMALL = replace(
    TuneSettings(lr=5e-3, warmup_steps=1, max_steps=6, accumulation=1, device="cpu"),
    eval_batch_size=4, eval_every=4, save_every=2,
)  # fmt: skip


def pink_pairs(n_train=16, n_validation=8):
    """Pink flowers are preferred to blue ones of the same size and shape; held-out ones have other shapes."""
    flowers = [f"a {size} {{}} flower with {shape} petals" for shape in SHAPES for size in SIZES]
    rows = [{"prompt": PROMPT, "chosen": f.format("pink"), "rejected": f.format("blue")} for f in flowers]
    return Pairs(PROMPT, rows[:n_train], rows[n_train:][:n_validation], {})


def tokenizer_of(glm):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(glm)


def make_trainer(glm, folder, settings=SMALL, adapter=None):
    """trl's trainer on the pink pairs."""
    tokenizer = tokenizer_of(glm)
    train, validation, _ = prepare_rows(pink_pairs(), tokenizer, settings)
    config = trainer_config(folder, settings, evaluate=True)
    return build_trainer(glm, tokenizer, train, validation, config, settings, adapter)


def load_policy(glm, adapter=None):
    """The LLM by transformers and peft alone, without dropout; the adapter's weights can be trained."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(glm, dtype=torch.float32)
    return (PeftModel.from_pretrained(model, adapter, is_trainable=True) if adapter else model).eval()


def hard_captions(n):
    return [f"hard flower number {i}" for i in range(n)]


def easy_captions(n):
    return [f"easy flower number {i}" for i in range(n)]


def write_run(folder, hard, easy, copies=10):
    """d_samples.json and e_samples.json of a folder 0 that lists the hard ones first."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, first, captions in (("d_samples.json", 0, hard), ("e_samples.json", len(hard), easy)):
        rows = [[[first + i, 1, 0.5], [caption] * copies] for i, caption in enumerate(captions)]
        write_list(folder / name, rows)
    return folder


def write_folder0(folder, captions, prompt=PROMPT, examples=EXAMPLES):
    """The manifest and the lists that go with it; no image is opened."""
    folder.mkdir()
    digest = prompt and prompt_digest(prompt)
    items = [
        Item(file_name(i), "0" * 64, caption, digest, list(examples), "glm", None, "sd", {}, i, 0)
        for i, caption in enumerate(captions, 1)
    ]
    write_set(folder, items, flower.SPEC)
    return folder


def write_list(path, rows):
    path.write_text(json.dumps(rows))
    return path
