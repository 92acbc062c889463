"""The tiny GLM: what it learns from, resuming, the checkpoint, and the one that comes with the project."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from stand_ins import call, interrupt, losses, train
from toy import read_json, refused, snapshot, write_toy_set

import kka.tiny_glm
from kka.captioned import CaptionKinds, read_kinds
from kka.datasets import garden, get_spec
from kka.language_models import LanguageModelSettings, load_language_model
from kka.prompts import generation_prompt
from kka.seeds import generator
from kka.tiny_glm import (
    CHAT_TEMPLATE,
    IGNORED,
    TinyGlmSettings,
    build_model,
    build_tokenizer,
    draw_request,
    encode,
    is_garden_caption,
    measure,
)

COMMITTED = Path(kka.tiny_glm.__file__).parent / "garden_models" / "glm"
SPEC = garden.SPEC


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """A text file of forty captions."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("captions") / "captions.txt"
    lines = [garden.captions(garden.SPECIES[k], rng, 1)[0] for k in range(1, 41)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def trained(captions, tmp_path_factory):
    """A finished checkpoint; its training is beside it."""
    out = tmp_path_factory.mktemp("trained") / "glm"
    outcome = train("glm", out, captions=captions)
    assert outcome.code == 0, outcome
    return out


@pytest.fixture(scope="module")
def tokenizer(captions):
    return build_tokenizer([*captions.read_text().splitlines(), generation_prompt(SPEC, ["-"])])


@pytest.fixture(scope="module")
def garden_kinds():
    return read_kinds(SPEC)


def test_training_reduces_the_loss(trained):
    values = losses(trained.with_name("glm.training"), "glm")
    assert len(values) == 3
    assert values[-1] < 0.8 * values[0]
    assert values[0] < 1.1 * math.log(100)  # begins near chance


def test_checkpoint_is_one_of_transformers(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    assert type(model).__name__ == "GlmForCausalLM"
    assert model.dtype == torch.float32
    assert (trained / "model.safetensors").stat().st_size < 2.5 * sum(p.numel() for p in model.parameters())
    assert tokenizer.padding_side == "left"
    ends = tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id)
    assert ends == ["<|endoftext|>", "<|user|>", "<|observation|>"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "[gMASK]<sop><|user|>\nHi"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "flower"}], add_generation_prompt=True, return_dict=True
    )
    tokens = tokenizer.convert_ids_to_tokens(prompt["input_ids"])
    assert tokens == ["[gMASK]", "<sop>", "<|user|>", "flower", "<|assistant|>"]


def test_checkpoint_answers_through_the_back_end(trained):
    model = load_language_model(LanguageModelSettings(model=str(trained), device="cpu", max_new_tokens=24))
    prompt = generation_prompt(SPEC, ["this flower has few thin small pink petals and a yellow center"])
    answers = model.complete(prompt, 4, seed=0)
    assert len(answers) + sum(model.failures.values()) == 4
    assert answers == model.complete(prompt, 4, seed=0)


def test_record_and_card(trained):
    record = read_json(trained / "training.json")
    assert record["identity"]["steps"] == 60
    assert record["figures"]["captions sampled at temperature 1, top-p 1"] == 8
    card = (trained / "README.md").read_text()
    assert card.startswith("# Tiny GLM of Garden")
    assert "stand-in" in card
    assert "glm --out" in card
    assert "| in the garden's grammar |" in card


def test_tokenizer_gives_text_back(tokenizer):
    text = "a small, pink flower: petals."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) != text  # unknown words are unknown
    known = "this flower has several large round red petals and a black center."
    ids = tokenizer(known.capitalize())["input_ids"]
    assert tokenizer.decode(ids) == known
    assert tokenizer.unk_token_id not in ids
    request = generation_prompt(SPEC, [known])
    assert tokenizer.unk_token_id not in tokenizer(request)["input_ids"]
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_only_answers_are_learnt(tokenizer):
    answers = ["this flower has several large round red petals and a black center", "the red center"]
    batch = encode([(f"describe {'one ' * k}flower", answer) for k, answer in enumerate(answers)], tokenizer)
    assert {part.shape for part in batch.values()} == {batch["labels"].shape}
    for row, answer in enumerate(answers):
        learnt = batch["labels"][row] != IGNORED
        assert tokenizer.decode(batch["labels"][row][learnt]) == answer + " <|endoftext|>"
        assert torch.equal(batch["labels"][row][learnt], batch["input_ids"][row][learnt])
        read = batch["input_ids"][row][batch["attention_mask"][row] == 1]
        assert tokenizer.decode(read).startswith(
            f"[gMASK] <sop> <|user|> describe {'one ' * row}flower <|ass"
        )
    settings = TinyGlmSettings(hidden=32, layers=1)
    assert torch.isfinite(build_model(len(tokenizer), settings, tokenizer)(**batch).loss)


def test_request_shows_one_kind_and_is_answered_by_another():
    kinds = CaptionKinds((("a1", "a2", "a3", "a4"), ("b1", "b2"), ("c1",)), normal=(1,))
    shown, answered = set(), set()
    for k in range(200):
        request, answer = draw_request(kinds, SPEC, 0.5, generator(0, k))
        examples = [line[2:] for line in request.splitlines() if line.startswith("- ")]
        assert 1 <= len(examples) <= 3
        assert len(set(examples)) == len(examples)
        assert {example[0] for example in examples} == {examples[0][0]}
        assert answer[0] != examples[0][0]
        shown.add(examples[0][0])
        answered.add(answer)
    assert shown == {"a", "b", "c"}
    assert answered == {caption for kind in kinds.kinds for caption in kind}
    only_normal = [draw_request(kinds, SPEC, 1.0, generator(1, k))[0] for k in range(20)]
    assert all("- b" in request for request in only_normal)


def test_request_of_a_plain_list_is_answered_by_a_caption_not_shown():
    kinds = CaptionKinds((("one", "two", "three"),), normal=(0,))
    for k in range(50):
        request, answer = draw_request(kinds, SPEC, 0.5, generator(0, k))
        assert f"- {answer}" not in request.splitlines()
    two = CaptionKinds((("one", "two"),), normal=(0,))
    assert {draw_request(two, SPEC, 0.5, generator(0, k))[1] for k in range(20)} == {"one", "two"}


def test_kinds_of_a_data_set_are_its_classes(tmp_path):
    kinds = read_kinds(get_spec("ucm_caption"), str(write_toy_set(tmp_path / "set", classes=(19, 20, 21))))
    assert len(kinds.kinds) == 3
    assert kinds.normal == (1, 2)
    assert all(len(kind) == 50 for kind in kinds.kinds)


def test_kinds_of_the_garden(garden_kinds):
    kinds = garden_kinds
    assert len(kinds.kinds) == 2400
    assert all(is_garden_caption(caption) for kind in kinds.kinds[::100] for caption in kind)
    normal = [garden.parse_caption(caption) for caption in kinds.kinds[kinds.normal[0]]]
    assert all(found.items() <= vars(garden.SPECIES[garden.NORMAL]).items() for found in normal)
    whole = [len(garden.parse_caption(caption)) == 5 for kind in kinds.kinds[::20] for caption in kind]
    assert np.mean(whole) > 0.7


@pytest.mark.parametrize(
    ("sentence", "valid"),
    [
        ("this flower has few small thin pink petals and a yellow center", True),
        ("There are several pointy petals in red on this big flower.", True),
        ("this flower has few small thin pink petals and a yellow", False),
        ("this flower has pink small thin few petals and a yellow center", False),
        ("pink flower", False),
    ],
)
def test_grammar(sentence, valid):
    assert is_garden_caption(sentence) is valid


@pytest.mark.parametrize("after", [3, 45])
def test_interrupted_training_ends_the_same(captions, trained, tmp_path, after):
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, kka.tiny_glm, after)
        outcome = train("glm", tmp_path / "glm", captions=captions)
    assert outcome.code == 130
    assert not (tmp_path / "glm").exists()
    outcome = train("glm", tmp_path / "glm", captions=captions)
    assert outcome.code == 0, outcome
    assert ("continuing" in outcome.log) == (after >= 20)
    weights = "model.safetensors"
    assert (tmp_path / "glm" / weights).read_bytes() == (trained / weights).read_bytes()
    assert losses(tmp_path / "glm.training", "glm") == losses(trained.with_name("glm.training"), "glm")


def test_finished_checkpoint_is_left_alone(captions, trained):
    before = snapshot(trained)
    outcome = train("glm", trained, captions=captions)
    assert outcome.code == 0
    assert "is finished" in outcome.log
    refused(
        train("glm", trained, captions=captions, steps=80), trained, "steps 60 there, 80 now", "--overwrite"
    )
    assert snapshot(trained) == before


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"hidden": 33}, ["--hidden", "multiple of 32", "33"]),
        ({"steps": 0}, ["--steps", "above 0"]),
        ({"lr": -1.0}, ["--lr", "above 0"]),
        ({"normal_share": 1.5}, ["--normal_share", "[0, 1]"]),
        ({"seed": -1}, ["--seed"]),
        ({"captions": "nowhere.txt"}, ["nowhere.txt", "does not exist"]),
        ({"dataset_name": "lawn"}, ["lawn", "known are"]),
        ({"data_path": "/nowhere"}, ["--data_path /nowhere has no effect", "omit it"]),
        ({"data_path": "/nowhere", "dataset_name": "ucm_caption"}, ["/nowhere", "--data_path"]),
    ],
)
def test_bad_input(tmp_path, flags, parts):
    refused(train("glm", tmp_path / "out", **flags), *parts)
    assert not (tmp_path / "out").exists()


def test_bad_captions(tmp_path):
    single, empty = tmp_path / "single.txt", tmp_path / "empty.txt"
    single.write_text("a red flower\na red flower\n")
    empty.write_text("\n")
    refused(train("glm", tmp_path / "out", captions=single), "single.txt", "two different")
    refused(train("glm", tmp_path / "out", captions=empty), "empty.txt", "no caption")


def test_bad_folders(captions, tmp_path):
    refused(train("glm", None, captions=captions), "--out")
    (tmp_path / "file").write_text("x")
    refused(train("glm", tmp_path / "file", captions=captions), "file", "is a file")
    refused(train("glm", tmp_path / "file" / "deeper", captions=captions), "deeper", "cannot be written")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("x")
    refused(train("glm", tmp_path / "mine", captions=captions), "mine", "other files")
    refused(train("glm", tmp_path / "a", work=tmp_path / "a", captions=captions), "--work", "same folder")
    refused(train("glm", tmp_path / "a", work=tmp_path / "mine", captions=captions), "mine", "other files")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "x"


def test_diverging_training_says_so(captions, tmp_path):
    refused(train("glm", tmp_path / "out", captions=captions, lr=1e30), "loss is", "learning rate", code=1)


def test_script_without_model_or_with_an_unknown_one(capsys):
    refused(call(["opus"]), "opus", "glm, diffusion, reader")
    assert call([]).code == 0
    assert "glm" in capsys.readouterr().out


@pytest.mark.skipif(not COMMITTED.exists(), reason="there is no committed checkpoint")
def test_committed_checkpoint_writes_valid_captions(garden_kinds):
    figures = measure(COMMITTED, garden_kinds, SPEC, 200, seed=5)
    assert float(figures["in the garden's grammar"]) >= 0.9
    assert float(figures["different from each other"]) >= 0.9
    assert float(figures["describe the normal species"]) <= 0.02
    assert sum(path.stat().st_size for path in COMMITTED.iterdir()) < 2e6
