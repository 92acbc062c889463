"""The drawer over HTTP, against a real server that misbehaves."""

import logging
import time

import numpy as np
import pytest
import tenacity
from image_server import SIDE, picture, serving

from kka import image_api
from kka.datasets import get_spec
from kka.drawers import DrawerSettings, build_drawer
from kka.errors import UserError
from kka.image_api import TRIES
from kka.servers import ATTEMPTS, KEYS

KEY = "sk-very-secret-1234"
GARDEN = get_spec("garden")  # no style is added to its captions


@pytest.fixture(autouse=True)
def _key(monkeypatch, caplog):
    """A key in the environment, short waits, and no key in the log, whatever happens."""
    for names in KEYS.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(image_api, "BACK_OFF", tenacity.wait_none())
    caplog.set_level(logging.DEBUG)
    yield
    assert KEY not in caplog.text


def drawer(server, **settings):
    settings = {"backend": "api", "base_url": f"{server.address}/v1", "model": "painter", **settings}
    return build_drawer(DrawerSettings(**settings), GARDEN)


def draw(server, captions=("a flower",), **settings):
    own = drawer(server, **settings)
    return own.draw(captions, range(len(captions))), own


def is_picture(image, prompt):
    return image is not None and np.array_equal(np.asarray(image), np.asarray(picture(prompt)))


@pytest.mark.parametrize("word", ["b64", "url", "url busy"])
def test_image_in_the_answer_or_behind_an_address(word):
    with serving(word) as server:
        (image,), own = draw(server)
        assert is_picture(image, "a flower")
        assert server.bodies == [{"model": "painter", "prompt": "a flower", "n": 1}]
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        assert not own.failures


def test_size_style_and_watermark_crop():
    with serving() as server:
        (image,), own = draw(server, size=512, suffix="photograph", crop_watermark=True)
        assert server.bodies[0]["size"] == "512x512"
        assert server.prompts == ["a flower, photograph"]
        assert image.size == (SIDE, SIDE - 2)
        whole = np.asarray(picture("a flower, photograph"))
        assert np.array_equal(np.asarray(image), whole[: SIDE - 2])
        assert own.settings == {
            "server": "127.0.0.1", "size": "512x512", "suffix": "photograph", "crop_watermark": True
        }  # fmt: skip


def test_watermark_is_cut_off_by_default_only_where_there_is_one(monkeypatch):
    monkeypatch.setenv("ZHIPUAI_API_KEY", KEY)
    own = build_drawer(DrawerSettings(backend="api"), GARDEN)
    assert own.settings["crop_watermark"] is True
    assert own.id == image_api.MODEL
    own = build_drawer(DrawerSettings(backend="api", crop_watermark=False), GARDEN)
    assert own.settings["crop_watermark"] is False
    with serving() as server:
        assert drawer(server).settings["crop_watermark"] is False


@pytest.mark.parametrize("fault", ["429", "500", "503", "slow"])
def test_busy_server_is_asked_again(fault, monkeypatch):
    monkeypatch.setattr(image_api, "TIMEOUT", 0.3)
    started = time.monotonic()
    with serving(fault, fault) as server:
        (image,), own = draw(server)
        assert is_picture(image, "a flower")
        assert len(server.prompts) == 3
        assert not own.failures
    if fault == "429":
        assert time.monotonic() - started >= 2 * 0.3  # Retry-After


@pytest.mark.parametrize("fault", ["429", "503"])
def test_server_that_stays_busy_stops_the_work(fault, monkeypatch):
    monkeypatch.setattr(image_api, "_wait", lambda state: 0)
    with serving(*[fault] * 10) as server:
        with pytest.raises(UserError, match=f"failed {ATTEMPTS} times .HTTP {fault}.; run the same command"):
            draw(server)
        assert len(server.prompts) == ATTEMPTS


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        ("401", "HTTP 401"), ("400", "size must be a multiple of 16"), ("no credit", "HTTP 429"),
        ("429 for an hour", "HTTP 429"),
    ],
)  # fmt: skip
def test_refusal_stops_at_once_and_never_shows_the_key(fault, part):
    with serving("b64", fault) as server:
        with pytest.raises(UserError) as error:
            draw(server, ["one", "two", "three"])
        assert server.prompts == ["one", "two"]
    assert part in str(error.value)
    assert KEY not in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__


@pytest.mark.parametrize("fault", ["filter", "zhipu filter", "filter in answer"])
def test_filtered_caption_is_skipped_and_counted(fault):
    with serving("b64", fault) as server:
        images, own = draw(server, ["one", "two", "three"])
        assert server.prompts == ["one", "two", "three"]
    assert [image is None for image in images] == [False, True, False]
    assert own.failures == {"content filter": 1}


FAULTS = {
    "url expired": "expired address (HTTP 404)",
    "url html": "no whole image",
    "url truncated": "no whole image",
    "url of a file": "no address of an image",
    "url of brackets": "no address of an image",
    "url of spaces": "no address of an image",
    "number": "damaged base64",
    "object": "no image in the answer",
    "truncated": "no whole image",
    "no base64": "damaged base64",
    "black": "black image",
    "html": "no image in the answer",
    "no image": "no image in the answer",
    "truncated json": "no JSON",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_unusable_answer_is_asked_for_again_then_given_up(fault):
    with serving(fault, "b64", *[fault] * TRIES) as server:
        images, own = draw(server, ["one", "two", "three"])
        assert server.prompts == ["one", "one", *["two"] * TRIES, "three"]
    assert is_picture(images[0], "one")
    assert images[1] is None
    assert is_picture(images[2], "three")
    assert own.failures == {FAULTS[fault]: 1 + TRIES}


def test_unreachable_server_is_one_sentence(monkeypatch):
    with serving() as server:
        own = drawer(server)
    with pytest.raises(UserError, match=r"127\.0\.0\.1 failed 6 times .APIConnectionError"):
        own.draw(["a"], [0])


def test_requests_are_limited():
    with serving("black", "b64", "429") as server:
        own = drawer(server, max_requests=4)
        assert None not in own.draw(["one", "two"][:1], [0])
        with pytest.raises(UserError, match="--max_requests"):
            own.draw(["two", "three"], [0, 1])
        assert server.prompts == ["one", "one", "two", "two"]


def test_key_is_needed_before_the_work(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="environment variable OPENAI_API_KEY"):
        build_drawer(DrawerSettings(backend="api", base_url="https://host/v1", model="m"), GARDEN)
    with pytest.raises(UserError, match="ZHIPUAI_API_KEY or ZAI_API_KEY"):
        build_drawer(DrawerSettings(backend="api"), GARDEN)


def test_spaces_around_the_key_do_no_harm(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    with serving() as server:
        assert None not in draw(server)[0]
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    ("settings", "part"),
    [({"base_url": "localhost:1/v1"}, "--base_url"), ({"base_url": "http://localhost/v1"}, "--model")],
)
def test_bad_address_or_no_model_is_one_sentence(settings, part):
    with pytest.raises(UserError, match=part):
        build_drawer(DrawerSettings(backend="api", **settings), GARDEN)


def test_key_in_the_address_is_refused_without_showing_it():
    with pytest.raises(UserError, match="--base_url must not hold a password") as error:
        build_drawer(
            DrawerSettings(backend="api", base_url=f"http://me:{KEY}@127.0.0.1:9/v1", model="m"), GARDEN
        )
    assert KEY not in str(error.value)
