"""Language models through transformers: a tiny GLM."""

import importlib.util
import json
import re
import shutil
import time

import pytest
import torch
from tiny_models import tiny_adapter, tiny_glm

from kka.errors import UserError
from kka.language_models import LanguageModelSettings, TransformersModel, load_language_model, whole_lines

PROMPT = "Describe one flower of another kind : this flower has pink petals"
KEY = "sk-secret-0123456789"


@pytest.fixture(scope="module")
def glm(tmp_path_factory):
    return tiny_glm(tmp_path_factory.mktemp("glm") / "tiny-glm")


@pytest.fixture(scope="module")
def adapter(glm, tmp_path_factory):
    return tiny_adapter(tmp_path_factory.mktemp("adapter") / "adapter", glm)


def load(glm, **options) -> TransformersModel:
    return load_language_model(
        LanguageModelSettings(**{"model": str(glm), "device": "cpu", "max_new_tokens": 30, **options})
    )


def test_samples_follow_the_seed(glm):
    model = load(glm)
    first = model.complete(PROMPT, 6, 1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert model.complete(PROMPT, 6, 1) == first == load(glm).complete(PROMPT, 6, 1)
    assert torch.equal(state, torch.get_rng_state())
    assert len(set(first)) == len(first) > 2
    assert model.complete(PROMPT, 6, 2) != first
    assert model.complete(PROMPT + " green", 6, 1) != first


def test_unfinished_answers_are_counted(glm):
    model = load(glm, max_new_tokens=8)
    answers = model.complete(PROMPT, 20, 0)
    assert 0 < len(answers) < 20
    assert len(answers) + model.failures["cut off at --max_new_tokens"] == 20
    assert all(len(answer.split()) < 8 for answer in answers)


@pytest.mark.parametrize(
    ("text", "kept"),
    [("one", None), ("one\ntwo", "one"), ("one\ntwo\n", "one\ntwo"), ("", None), ("\n", None)],
)
def test_whole_lines(text, kept):
    assert whole_lines(text) == kept


def test_greedy_gives_the_likeliest_answer_once(glm):
    model = load(glm, greedy=True, max_new_tokens=64)
    assert model.complete(PROMPT, 9, 0) == model.complete(PROMPT, 9, 1)
    assert len(model.complete(PROMPT, 9, 0)) + model.failures["cut off at --max_new_tokens"] // 3 == 1
    cold = load(glm, temperature=1e-4, max_new_tokens=64)
    assert cold.complete(PROMPT, 1, 7) == model.complete(PROMPT, 1, 0)


def test_temperature_and_top_p_replace_the_defaults_of_the_model(glm):
    config = load(glm, temperature=0.5, top_p=0.9)._network.generation_config
    assert (config.temperature, config.top_p, config.top_k, config.do_sample) == (0.5, 0.9, 0, True)
    assert len(config.eos_token_id) == 2


def test_greedy_equals_the_loop_of_the_official_code(glm):
    """Token by token with the whole text and no cache."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, network = AutoTokenizer.from_pretrained(glm), AutoModelForCausalLM.from_pretrained(glm).eval()
    turns = [{"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = []
    with torch.inference_mode():
        while not answer or answer[-1] not in network.generation_config.eos_token_id:
            answer.append(int(network(torch.tensor([ids + answer])).logits[0, -1].argmax()))
            assert len(answer) < 200
    model = load(glm, greedy=True, max_new_tokens=200)
    assert model.complete(PROMPT, 1, 0) == [tokenizer.decode(answer, skip_special_tokens=True)]


def test_without_a_chat_template_the_prompt_is_plain(glm, tmp_path):
    plain = tiny_glm(tmp_path / "plain", chat_template=False)
    templated, bare = load(glm)._encode(PROMPT)["input_ids"], load(plain)._encode(PROMPT)["input_ids"]
    assert bare.shape[1] == len(re.findall(r"[\w-]+|:", PROMPT))
    assert templated.shape[1] == bare.shape[1] + 4  # [gMASK] <sop> <|user|> ... <|assistant|>
    assert load(plain).complete(PROMPT, 4, 0) != load(glm).complete(PROMPT, 4, 0)


def test_an_adapter_changes_the_answers(glm, adapter):
    tuned = load(glm, adapter=str(adapter))
    assert tuned.complete(PROMPT, 4, 0) != load(glm).complete(PROMPT, 4, 0)
    assert re.fullmatch(r"adapter@[0-9a-f]{12}", tuned.adapter)


def test_an_adapter_names_its_model_by_hub_id_or_folder(glm, tmp_path):
    named = tiny_adapter(tmp_path / "named", glm, base_name="someone/tiny-glm")
    assert load(glm, adapter=str(named)).adapter


@pytest.mark.parametrize(
    ("missing", "says"),
    [("", "does not exist"), ("adapter_config.json", "adapter_config.json does not exist"),
     ("adapter_model.safetensors", "adapter_model.safetensors does not exist")],
)  # fmt: skip
def test_an_incomplete_adapter_is_refused(glm, adapter, tmp_path, missing, says):
    copy = shutil.copytree(adapter, tmp_path / "copy")
    shutil.rmtree(copy) if not missing else (copy / missing).unlink()
    with pytest.raises(UserError, match=says):
        load(glm, adapter=str(copy))


def test_an_adapter_of_another_model_is_refused_before_weights_are_read(glm, tmp_path):
    other = tiny_adapter(tmp_path / "other", glm, base_name="zai-org/glm-4-9b-chat-hf")
    weightless = shutil.copytree(glm, tmp_path / "weightless")
    (weightless / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"was trained for zai-org/glm-4-9b-chat-hf, not for .*weightless"):
        load(weightless, adapter=str(other))


def test_an_adapter_that_does_not_fit_is_refused(glm, adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "copy")
    card = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**card, "target_modules": ["query_key_value"]}))
    with pytest.raises(UserError, match=r"copy does not fit the model \(.*query_key_value"):
        load(glm, adapter=str(copy)).complete(PROMPT, 1, 0)


def test_a_model_that_is_nowhere_is_refused_quickly(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"nobody/nothing is not on this machine.* --model PATH"):
        load("nobody/nothing")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("GatedRepoError", "is gated; accept its licence .* HF_TOKEN"),
        ("RepositoryNotFoundError", "no model of the hub"),
    ],
)
def test_what_the_hub_refuses_is_explained(monkeypatch, error, says):
    import httpx2
    import huggingface_hub

    def refuse(*_, **__):
        response = httpx2.Response(403, request=httpx2.Request("HEAD", "https://host"))
        raise getattr(huggingface_hub.errors, error)("no", response=response)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    with pytest.raises(UserError, match=f"someone/model .*{says}"):
        load("someone/model")


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "~/missing/model", "a/b/c"])
def test_a_folder_that_is_missing_is_refused(name):
    with pytest.raises(UserError, match=f"{name} does not exist"):
        load(name)


@pytest.mark.parametrize("content", ["", '{"model_type": "unheard_of"}', "not JSON"])
def test_a_folder_without_a_model_is_refused(tmp_path, content):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="cannot be loaded"):
        load(tmp_path)


def test_code_of_a_checkpoint_is_never_run(glm, tmp_path):
    copy = shutil.copytree(glm, tmp_path / "copy")
    (copy / "evil.py").write_text("raise SystemExit('executed')")
    (copy / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "evil.Config"}})
    )
    with pytest.raises(UserError, match=r"cannot be loaded .*needs no code of its own"):
        load(copy)


def test_damaged_weights_are_refused(glm, tmp_path):
    copy = shutil.copytree(glm, tmp_path / "copy")
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="copy cannot be loaded"):
        load(copy).complete(PROMPT, 1, 0)


def test_a_prompt_longer_than_the_model_reads_is_refused(glm):
    with pytest.raises(UserError, match="reads 512 in all"):
        load(glm).complete("flower " * 500, 1, 0)


def test_full_memory_halves_the_batch(glm, caplog):
    model = load(glm)
    generate, sizes = model._network.generate, []

    def small(num_return_sequences, **inputs):
        sizes.append(num_return_sequences)
        if num_return_sequences > 3:
            raise torch.OutOfMemoryError("full")
        return generate(num_return_sequences=num_return_sequences, **inputs)

    model._network.generate = small
    answers = model.complete(PROMPT, 8, 0)
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert len(answers) + model.failures["cut off at --max_new_tokens"] == 8
    assert "going on with 2" in caplog.text
    model._network.generate = lambda **_: small(num_return_sequences=9)
    with pytest.raises(UserError, match="too small"):
        model.complete(PROMPT, 1, 0)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="it is installed")
def test_four_bits_without_the_package_name_the_extra(glm):
    with pytest.raises(UserError, match=re.escape("pip install -e '.[quantization]'")):
        load(glm, four_bit=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": 0.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"top_p": 0.0}, "--top_p"),
        ({"top_p": 1.5}, "--top_p"),
        ({"max_new_tokens": 0}, "--max_new_tokens"),
        ({"timeout": 0.0}, "--timeout"),
        ({"parallel": 0}, "--parallel"),
        ({"max_requests": 0}, "--max_requests"),
        ({"model": ""}, "--model"),
        ({"base_url": "http://x"}, "--base_url"),
        ({"backend": "openai", "adapter": "a"}, "--adapter"),
        ({"backend": "zhipuai", "four_bit": True}, "--four_bit"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        load_language_model(LanguageModelSettings(**options))
