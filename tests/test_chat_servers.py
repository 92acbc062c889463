"""Language models on servers: one that behaves, one that does not, and `transformers serve`."""

import importlib.util
import logging
import re
import socket
import time

import misbehaving_server as server
import pytest
import tenacity
from tiny_models import tiny_glm

from kka import chat_servers, servers
from kka.describe import describe
from kka.errors import UserError
from kka.language_models import LanguageModelSettings, load_language_model

PROMPT = "Describe one flower of another kind : this flower has pink petals"
KEY = "sk-secret-0123456789"


@pytest.fixture(scope="module")
def glm(tmp_path_factory):
    return tiny_glm(tmp_path_factory.mktemp("glm") / "tiny-glm")


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(chat_servers, "BACK_OFF", tenacity.wait_fixed(0.01))


def chat(running, **options):
    settings = {"backend": "openai", "base_url": running.url, "model": "m", "timeout": 5.0, "parallel": 1}
    return load_language_model(LanguageModelSettings(**{**settings, **options}))


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
    assert servers.retry_after(header) == seconds


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
    host = servers.check_url(url)
    assert servers.read_key(host) == KEY
    for name in servers.KEYS.get(host, [variable]):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match=f"{host} needs a key; set the environment variable .*{variable}"):
        load_language_model(LanguageModelSettings(backend="openai", base_url=url))
    assert servers.read_key("localhost")


@pytest.mark.parametrize("key", ["sk-\u2026", "sk-1\nsk-2"])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="characters that no key has") as caught:
        servers.read_key("host")
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://host/v1", "http://", "http://[1/v1", "http://h:x/v1"]
)
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(UserError, match="must be an address"):
        servers.check_url(url)


def test_a_password_in_the_address_is_refused():
    with pytest.raises(UserError, match="must not hold a password") as caught:
        servers.check_url("https://me:hunter2@host/v1")
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
    local = LanguageModelSettings(model=str(glm), device="cpu", greedy=True, max_new_tokens=60)
    assert greedy.complete(PROMPT, 2, 0) == load_language_model(local).complete(PROMPT, 2, 0)
