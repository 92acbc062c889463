"""Language models: a tiny GLM through transformers, and servers that behave and that do not."""

import importlib.util
import json
import logging
import re
import shutil
import socket
import time

import misbehaving_server as server
import pytest
import tenacity
import torch
from tiny_models import tiny_adapter, tiny_glm

from kka import chat_servers
from kka.describe import describe
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


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(chat_servers, "BACK_OFF", tenacity.wait_fixed(0.01))


def load(glm, **options) -> TransformersModel:
    return load_language_model(
        LanguageModelSettings(**{"model": str(glm), "device": "cpu", "max_new_tokens": 30, **options})
    )


def chat(running, **options):
    settings = {"backend": "openai", "base_url": running.url, "model": "m", "timeout": 5.0, "parallel": 1}
    return load_language_model(LanguageModelSettings(**{**settings, **options}))


# transformers


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


# servers


def test_a_request_says_what_the_settings_say():
    with server.serve(server.reply("a"), server.reply("b")) as running:
        assert chat(running, temperature=0.5, top_p=0.25, max_new_tokens=9).complete(PROMPT, 2, 3) == [
            "a",
            "b",
        ]
        chat(running, greedy=True).complete(PROMPT, 2, 3)
    first, second, greedy = running.requests
    assert first["path"] == "/v1/chat/completions"
    assert first["key"] == f"Bearer {KEY}"
    assert first["messages"] == [{"role": "user", "content": PROMPT}]
    assert (first["model"], first["temperature"], first["top_p"], first["max_tokens"]) == ("m", 0.5, 0.25, 9)
    assert first["seed"] != second["seed"]
    assert greedy["temperature"] == 0


def test_answers_keep_their_order():
    script = [
        lambda handler, k=k: (time.sleep(0.05 * (4 - k)), server.reply(str(k))(handler)) for k in range(4)
    ]
    with server.serve(*script) as running:
        model = chat(running, parallel=4)
        answers = model.complete(PROMPT, 4, 0)
        by_seed = {request["seed"]: str(k) for k, request in enumerate(running.requests)}
    assert answers == [by_seed[chat_servers.derive_seed(0, i) >> 32] for i in range(4)]


@pytest.mark.parametrize(
    "trouble",
    [
        server.status(429, Retry_After="0.2"), server.status(500), server.status(503), server.status(408),
        server.page, server.truncated, server.hang_up, server.no_choices,
    ],
)  # fmt: skip
def test_trouble_that_passes_is_waited_for(trouble, caplog):
    with server.serve(trouble, trouble, server.reply("a flower")) as running:
        model = chat(running)
        assert model.complete(PROMPT, 1, 0) == ["a flower"]
        assert len(running.requests) == 3
    assert not model.failures
    assert caplog.text.count("trying again in") == 2


def test_a_timeout_is_tried_again():
    with server.serve(server.sleep, server.reply("a flower")) as running:
        assert chat(running, timeout=0.1).complete(PROMPT, 1, 0) == ["a flower"]
        assert len(running.requests) == 2


def test_the_server_says_how_long_to_wait():
    with server.serve(server.status(429, Retry_After="0.4"), server.reply("a flower")) as running:
        began = time.monotonic()
        chat(running).complete(PROMPT, 1, 0)
        assert time.monotonic() - began > 0.4


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("2", 2.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("soon", None),
        ("nan", None),
    ],
)
def test_retry_after(header, seconds):
    class Error(Exception):
        class response:  # noqa: N801
            headers = {"retry-after": header}  # noqa: RUF012

    assert chat_servers.retry_after(Error()) == seconds


@pytest.mark.parametrize(
    ("trouble", "n_requests", "says"),
    [
        (server.refuse_key, 1, "HTTP 401.*check the key"),
        (server.status(403), 1, "HTTP 403.*check the key"),
        (server.status(400, "temperature\nmust be 1"), 1, "HTTP 400, temperature must be 1"),
        (server.status(404), 1, "check --model and --base_url"),
        (server.status(402), 1, "no credit"),
        (server.status(429, "pay", "insufficient_quota"), 1, "no credit"),
        (server.status(429, Retry_After="86400"), 1, "try again later"),
        (server.status(500), 6, "failed 6 times .HTTP 500"),
        (server.page, 6, "failed 6 times .*check --base_url"),
    ],
)
def test_trouble_that_stays_ends_it(trouble, n_requests, says):
    with server.serve(trouble) as running:
        with pytest.raises(UserError, match=says) as caught:
            chat(running).complete(PROMPT, 5, 0)
        assert len(running.requests) == n_requests
    assert "\n" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)


def test_a_server_that_is_not_there_is_named():
    with server.serve(server.page) as running:
        pass
    with pytest.raises(UserError, match=r"127.0.0.1 failed 6 times .Connection error"):
        chat(running).complete(PROMPT, 1, 0)


@pytest.mark.parametrize(
    "trouble",
    [
        server.reply("", "content_filter"),
        server.reply("", "sensitive"),
        server.status(400, "no", "1301"),
        server.status(400, "no", "content_filter"),
    ],
)
def test_filtered_answers_are_counted(trouble):
    with server.serve(server.reply("a"), trouble, server.reply("b")) as running:
        model = chat(running)
        assert model.complete(PROMPT, 3, 0) == ["a", "b"]
    assert model.failures == {"content filter": 1}


def test_cut_off_and_empty_answers():
    script = [server.reply("a\nb", "length"), server.reply("a", "length"), server.reply(None)]
    with server.serve(*script) as running:
        model = chat(running)
        assert model.complete(PROMPT, 3, 0) == ["a", ""]
    assert model.failures == {"cut off at --max_new_tokens": 1}


def test_answers_that_are_paid_for_are_kept(tmp_path, caplog):
    script = [
        server.reply("the first white flower"),
        server.reply("the second white flower"),
        server.status(401),
    ]
    with server.serve(*script) as running:
        with pytest.raises(UserError, match=r"check the key .*; the same command goes on"):
            describe(chat(running), PROMPT, [], 5, 0, tmp_path / "captions.jsonl", ask=4)
        assert len(running.requests) == 4
    assert "check the key" in caplog.text
    with server.serve(*(server.reply(f"number {k} of the flowers") for k in "3456")) as running:
        described = describe(chat(running), PROMPT, [], 5, 0, tmp_path / "captions.jsonl", ask=3)
        assert len(running.requests) == 3
    assert described.captions[:3] == [
        "the first white flower",
        "the second white flower",
        "number 3 of the flowers",
    ]


def test_requests_are_capped():
    with server.serve(server.status(500), server.reply("a")) as running:
        model = chat(running, max_requests=4)
        assert model.complete(PROMPT, 5, 0) == ["a", "a", "a"]
        with pytest.raises(UserError, match="--max_requests 4 is reached"):
            model.complete(PROMPT, 5, 0)
        assert len(running.requests) == 4


def test_the_key_is_written_nowhere(tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    for trouble in (server.refuse_key, server.status(500, f"you sent {KEY}"), server.hang_up):
        with server.serve(server.reply("a white flower blooms"), trouble) as running:
            with pytest.raises(UserError) as caught:
                describe(chat(running), PROMPT, [], 5, 0, tmp_path / "captions.jsonl", ask=4)
            assert any(KEY in request["key"] for request in running.requests)
        assert KEY not in str(caught.getrepr(chain=True, showlocals=False))
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"a white flower" in written
    assert KEY not in caplog.text + "".join(capfd.readouterr()) + written.decode()


@pytest.mark.parametrize(
    ("url", "variable"),
    [
        ("https://api.example.org/v1", "OPENAI_API_KEY"),
        ("https://open.bigmodel.cn/api/paas/v4/", "ZHIPUAI_API_KEY"),
        ("https://api.z.ai/api/paas/v4", "ZAI_API_KEY"),
    ],
)
def test_each_host_gets_its_own_key(monkeypatch, url, variable):
    for name in ("OPENAI_API_KEY", "ZHIPUAI_API_KEY", "ZAI_API_KEY"):
        monkeypatch.setenv(name, "key of another host")
    monkeypatch.setenv(variable, KEY)
    host = chat_servers.check_url(url)
    assert chat_servers.read_key(host) == KEY
    for name in chat_servers.KEYS.get(host, [variable]):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match=f"{host} needs a key; set the environment variable .*{variable}"):
        load_language_model(LanguageModelSettings(backend="openai", base_url=url))
    assert chat_servers.read_key("localhost")


@pytest.mark.parametrize("key", ["sk-\u2026", "sk-1\nsk-2"])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="characters that no key has") as caught:
        chat_servers.read_key("host")
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://host/v1", "http://", "http://[1/v1", "http://h:x/v1"]
)
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(UserError, match="must be an address"):
        chat_servers.check_url(url)


def test_a_password_in_the_address_is_refused():
    with pytest.raises(UserError, match="must not hold a password") as caught:
        chat_servers.check_url("https://me:hunter2@host/v1")
    assert "hunter2" not in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("zhipuai") is not None, reason="it is installed")
def test_a_missing_sdk_names_the_extra():
    with pytest.raises(UserError, match=re.escape("pip install -e '.[zhipuai]'")):
        load_language_model(LanguageModelSettings(backend="zhipuai", base_url="http://localhost:1/v1"))


@pytest.mark.skipif(importlib.util.find_spec("zhipuai") is None, reason="an extra")
def test_the_sdk_of_zhipuai():
    script = [server.status(429, Retry_After="0.1"), server.truncated, server.reply("a"),
              server.reply("", "sensitive"), server.reply("b"), server.refuse_key]  # fmt: skip
    with server.serve(*script) as running:
        model = chat(running, backend="zhipuai")
        assert model.complete(PROMPT, 3, 0) == ["a", "b"]
        assert model.failures == {"content filter": 1}
        with pytest.raises(UserError, match=r"HTTP 401.*check the key") as caught:
            model.complete(PROMPT, 3, 0)
    assert KEY not in str(caught.value)
    assert running.requests[0]["messages"] == [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def transformers_serve(glm):
    """Address of `transformers serve` with the tiny GLM, in a thread of this process."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    from transformers.cli.serve import Serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serving = Serve(str(glm), device="cpu", port=port, non_blocking=True)
    began = time.monotonic()
    while not serving.server.started:
        assert time.monotonic() < began + 60
        time.sleep(0.02)
    yield f"http://localhost:{port}/v1"
    serving.kill_server()


def test_a_real_server(transformers_serve, glm, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    settings = LanguageModelSettings(
        backend="openai", base_url=transformers_serve, model=str(glm), max_new_tokens=30, parallel=1
    )
    model = load_language_model(settings)
    assert model.complete(PROMPT, 4, 0) == load_language_model(settings).complete(PROMPT, 4, 0)
    described = describe(model, PROMPT, [], 10, 0, tmp_path / "captions.jsonl", ask=4)
    assert len(described.captions) == 10
    greedy = load_language_model(
        LanguageModelSettings(**{**settings.__dict__, "greedy": True, "max_new_tokens": 60})
    )
    assert greedy.complete(PROMPT, 2, 0) == load(glm, greedy=True, max_new_tokens=60).complete(PROMPT, 2, 0)
