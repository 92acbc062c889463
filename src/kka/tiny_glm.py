"""A tiny GLM, trained on captions to answer the request of Eq. (3): a stand-in for GLM-4.

Shown captions of one kind, it answers with a caption of another kind. It is saved as any checkpoint of
transformers is, with a vocabulary of whole words and GLM-4's chat format.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from kka.captioned import CaptionKinds, read_kinds
from kka.datasets import garden, get_spec
from kka.datasets.layout import DataSetSpec
from kka.errors import UserError
from kka.files import read_json, write_json
from kka.journal import Journal
from kka.language_models import LanguageModelSettings, TransformersModel
from kka.prompts import generation_prompt
from kka.runs import fingerprint
from kka.seeds import derive_seed, generator, seeded
from kka.settings import option
from kka.tiny_training import OutputSettings, check_positive, descend, train_into

UNKNOWN, END = "<unk>", "<|endoftext|>"
# GLM-4's special tokens; it ends an answer with one of the three in ENDS, this one with the first.
SPECIAL = (UNKNOWN, END, "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
ENDS = (END, "<|user|>", "<|observation|>")
CHAT_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MAX_WORDS = 8000  # in the vocabulary
MAX_EXAMPLES = 3  # captions shown in one request
CHUNK = 20  # steps between two records
IGNORED = -100  # label of a token that is not learnt


@dataclass(frozen=True)
class TinyGlmSettings:
    """A tiny GLM."""

    dataset_name: str = option("garden", "whose request is learnt, and whose captions without --captions")
    data_path: str | None = option(None, "folder of the data set; None: data/<name>")
    captions: str | None = option(
        None, "captions.jsonl, or text with one caption per line; None: those of all classes of the data set"
    )
    steps: int = option(2000, "optimiser steps")
    batch_size: int = option(32, "requests per step")
    lr: float = option(3e-3, "highest learning rate of AdamW")
    hidden: int = option(128, "width; a multiple of 32")
    layers: int = option(3, "depth")
    normal_share: float = option(0.7, "share of the requests that show captions of the normal classes")
    n_measured: int = option(1000, "captions sampled at the end to see what it has learnt")
    seed: int = option(0, "of the weights and of the requests")


def train_glm(settings: TinyGlmSettings, output: OutputSettings) -> None:
    """Train a tiny GLM into a folder; raises UserError for bad input."""
    check_settings(settings)
    spec = get_spec(settings.dataset_name)
    kinds = read_kinds(spec, settings.data_path, settings.captions, settings.seed)
    data = fingerprint([kinds.kinds, kinds.normal, spec.prompt])
    kept = {key: value for key, value in asdict(settings).items() if key not in ("data_path", "captions")}
    identity = {"title": f"Tiny GLM of {spec.title}", **kept, "data": data}

    def train(journal: Journal, folder: Path) -> dict[str, Any]:
        model, tokenizer = fit(kinds, spec, settings, journal)
        save(model, tokenizer, folder)
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "loss of the last steps, nats per word": round(journal.rows[-1]["loss"], 3),
            **measure(folder, kinds, spec, settings.n_measured, settings.seed),
        }

    train_into(output, identity, train)


def check_settings(settings: TinyGlmSettings) -> None:
    """Raises UserError naming the first flag that makes no sense."""
    check_positive(settings, "steps", "batch_size", "lr", "hidden", "layers", "n_measured")
    if settings.hidden % 32:
        raise UserError(f"--hidden must be a multiple of 32, it is {settings.hidden}")
    if not 0 <= settings.normal_share <= 1:
        raise UserError(f"--normal_share must lie in [0, 1], it is {settings.normal_share}")
    if settings.seed < 0:
        raise UserError(f"--seed must be at least 0, it is {settings.seed}")


def fit(kinds: CaptionKinds, spec: DataSetSpec, settings: TinyGlmSettings, journal: Journal) -> Any:
    """Train; returns (GlmForCausalLM, tokenizer)."""
    tokenizer = build_tokenizer([*kinds.captions, generation_prompt(spec, ["-"])])
    with seeded(settings.seed, "tiny_glm"):
        model = build_model(len(tokenizer), settings, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr, betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    chunks = [range(k, min(k + CHUNK, settings.steps)) for k in range(0, settings.steps, CHUNK)]
    for chunk in journal.epochs("glm", len(chunks), {"model": model, "optimizer": optimizer}):
        stream, losses = generator(settings.seed, "glm", chunk), []
        for step in chunks[chunk]:
            batch = encode(
                [
                    draw_request(kinds, spec, settings.normal_share, stream)
                    for _ in range(settings.batch_size)
                ],
                tokenizer,
            )
            losses.append(descend(model(**batch).loss, optimizer, step, settings.steps, settings.lr))
        journal.record("glm", chunk, loss=sum(losses) / len(losses))
    return model.eval(), tokenizer


def draw_request(
    kinds: CaptionKinds, spec: DataSetSpec, normal_share: float, stream: Generator
) -> tuple[str, str]:
    """(request, answer): captions of one kind are shown, one of another kind is the answer.

    Where there is one kind only, the answer is a caption that is not shown.
    """
    normal = float(torch.rand((), generator=stream)) < normal_share
    shown = kinds.normal[_below(len(kinds.normal), stream)] if normal else _below(len(kinds.kinds), stream)
    captions = kinds.kinds[shown]
    n = min(1 + _below(MAX_EXAMPLES, stream), max(1, len(captions) - 1))
    order = torch.randperm(len(captions), generator=stream).tolist()
    examples = [captions[i] for i in order[:n]]
    if len(kinds.kinds) == 1:
        return generation_prompt(spec, examples), captions[order[n]]
    other = (shown + 1 + _below(len(kinds.kinds) - 1, stream)) % len(kinds.kinds)
    return generation_prompt(spec, examples), kinds.kinds[other][_below(len(kinds.kinds[other]), stream)]


def encode(requests: Sequence[tuple[str, str]], tokenizer: Any) -> dict[str, Tensor]:
    """A batch of chats, padded on the right; only the answers and their ends are labelled. (B, T) each."""
    chats = [[{"role": "user", "content": request}] for request, _ in requests]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
    answers = [[*ids, tokenizer.eos_token_id] for ids in tokenizer([a for _, a in requests])["input_ids"]]
    rows = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    labels = [torch.tensor([IGNORED] * len(p) + a) for p, a in zip(prompts, answers, strict=True)]

    def pad(parts: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)

    return {
        "input_ids": pad(rows, tokenizer.pad_token_id),
        "attention_mask": pad([torch.ones_like(row) for row in rows], 0),
        "labels": pad(labels, IGNORED),
    }


def build_tokenizer(texts: Iterable[str]) -> Any:
    """A fast tokenizer of the words and punctuation in the texts, in lower case, with GLM-4's chat format."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=learn_words(texts, SPECIAL), unk_token=UNKNOWN, eos_token=END, pad_token=END,
        extra_special_tokens=list(SPECIAL[2:]), padding_side="left", model_max_length=1024,
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def learn_words(texts: Iterable[str], special: Sequence[str]) -> Any:
    """A tokenizer of the tokenizers library whose tokens are the words and punctuation of the texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    punctuation = pre_tokenizers.Split(Regex(r"""[.,:;!?()"]"""), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), punctuation])
    tokenizer.decoder = decoders.WordPiece(cleanup=True)  # no blanks before punctuation
    trainer = trainers.WordLevelTrainer(
        vocab_size=MAX_WORDS, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_model(n_words: int, settings: TinyGlmSettings, tokenizer: Any) -> Any:
    """A GlmForCausalLM with random weights and heads of width 32, half as many for keys and values."""
    from transformers import GlmConfig, GlmForCausalLM

    heads = settings.hidden // 32
    config = GlmConfig(
        vocab_size=n_words, hidden_size=settings.hidden, intermediate_size=5 * settings.hidden // 2,
        num_hidden_layers=settings.layers, num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads, head_dim=32,
        max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(list(ENDS)),
    )  # fmt: skip
    return GlmForCausalLM(config)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a checkpoint of half-precision weights that is computed in single precision."""
    model.generation_config.update(do_sample=True, temperature=1.0, top_p=0.95)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "dtype": "float32"}, indent=2)  # CPUs are slow at half
    model.float()


def measure(folder: Path, kinds: CaptionKinds, spec: DataSetSpec, n: int, seed: int = 0) -> dict[str, Any]:
    """Sample `n` captions of anomalies as the loop does, and see what they are; figures by name.

    In the garden a caption is valid if it is a sentence of the garden's grammar.
    """
    captions, copies, stream = [], 0, generator(seed, "measure")
    settings = LanguageModelSettings(model=str(folder), device="cpu", top_p=1.0, max_new_tokens=64)
    model = TransformersModel(settings)
    rows = 50
    for k in range(0, n, rows):
        normal = kinds.kinds[kinds.normal[_below(len(kinds.normal), stream)]]
        order = torch.randperm(len(normal), generator=stream)[: 1 + _below(MAX_EXAMPLES, stream)].tolist()
        examples = [normal[i] for i in order]
        request = generation_prompt(spec, examples)
        answers = model.complete(request, min(rows, n - k), derive_seed(seed, "measure", k))
        captions += answers
        copies += sum(answer in examples for answer in answers)
    figures = {
        "captions sampled at temperature 1, top-p 1": n,
        "finished": _share(len(captions), n),
        "different from each other": _share(len(set(captions)), n),
        "copies of an example": _share(copies, n),
    }
    return figures | (_garden_figures(captions, n) if spec.name == garden.SPEC.name else {})


def _garden_figures(captions: Sequence[str], n: int) -> dict[str, str]:
    normal = asdict(garden.SPECIES[garden.NORMAL])
    valid = [caption for caption in captions if is_garden_caption(caption)]
    found = [garden.parse_caption(caption) for caption in valid]
    shared = [sum(flower.get(key) == value for key, value in normal.items()) for flower in found]
    return {
        "in the garden's grammar": _share(len(valid), n),
        "and name all five attributes": _share(sum(len(flower) == 5 for flower in found), n),
        "describe the normal species": _share(sum(flower.items() <= normal.items() for flower in found), n),
        "attributes shared with the normal species, mean": f"{sum(shared) / max(1, len(shared)):.2f}",
    }


def is_garden_caption(caption: str) -> bool:
    """Whether a sentence is one that the garden's templates and words can make."""
    return _grammar().fullmatch(caption.strip().rstrip(".").lower()) is not None


@cache
def _grammar() -> re.Pattern[str]:
    slots = {
        name: "(?:"
        + "|".join(re.escape(word) for value in values for word in garden.words(name, value))
        + ")"
        for name, values in garden.ATTRIBUTES.items()
    }
    sentences = [re.escape(t).replace(r"\{", "{").replace(r"\}", "}") for t in garden.TEMPLATES]
    return re.compile("|".join(sentence.format(**slots) for sentence in sentences))


def _below(n: int, stream: Generator) -> int:
    return int(torch.randint(n, (), generator=stream))


def _share(count: int, n: int) -> str:
    return f"{count / n:.3f}"
