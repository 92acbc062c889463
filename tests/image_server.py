"""A local HTTP server with OpenAI's image endpoint that misbehaves as told."""

import base64
import io
import json
import threading
import time
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

SIDE = 26  # of its images, px: a watermark crop takes 2 rows
HTML = b"<!DOCTYPE html><html><body>Bad gateway</body></html>"


def picture(prompt):
    """The image that the server draws: noise that the prompt decides."""
    rng = np.random.default_rng(zlib.crc32(prompt.encode()))
    return Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8))


def encoded(image):
    """PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


class ImageServer(ThreadingHTTPServer):
    """Answers each request as the next word of `script` says, and "b64" when it is at its end."""

    daemon_threads = True

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.bodies, self.headers, self.downloads = list(script), [], [], []
        self.address = f"http://127.0.0.1:{self.server_port}"

    @property
    def prompts(self):
        """What was asked for, in order."""
        return [body["prompt"] for body in self.bodies]


@contextmanager
def serving(*script):
    """A running server."""
    server = ImageServer(script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def error(status, code, message="no", **headers):
    """An answer as OpenAI's and Zhipu's errors are."""
    return status, json.dumps({"error": {"code": code, "message": message}}).encode(), headers


def answer(**entry):
    """A good answer."""
    return 200, json.dumps({"created": 1, "data": [entry]}).encode(), {}


def b64(data):
    """A good answer with an image in it."""
    return answer(b64_json=base64.b64encode(data).decode())


POSTS = {
    "b64": lambda ask: b64(encoded(picture(ask["prompt"]))),
    "black": lambda ask: b64(encoded(Image.new("RGB", (SIDE, SIDE)))),
    "truncated": lambda ask: b64(encoded(picture(ask["prompt"]))[:-200]),
    "no base64": lambda ask: answer(b64_json="@@@"),
    "url": lambda ask: answer(url=f"{ask['address']}/good/{ask['prompt'].replace(' ', '_')}.png"),
    "url busy": lambda ask: answer(url=f"{ask['address']}/busy/{ask['prompt'].replace(' ', '_')}.png"),
    "url expired": lambda ask: answer(url=f"{ask['address']}/expired"),
    "url html": lambda ask: answer(url=f"{ask['address']}/html"),
    "url truncated": lambda ask: answer(url=f"{ask['address']}/truncated"),
    "url of a file": lambda ask: answer(url="file:///etc/hostname"),
    "url of brackets": lambda ask: answer(url="http://[bad"),
    "url of spaces": lambda ask: answer(url="http://127.0.0.1/a b"),
    "number": lambda ask: answer(b64_json=5),
    "object": lambda ask: (200, b'{"data": {"a": 1}}', {}),
    "no image": lambda ask: (200, b'{"data": []}', {}),
    "html": lambda ask: (200, HTML, {"Content-Type": "text/html"}),
    "truncated json": lambda ask: (200, b'{"data": [{"b64_json": "iVBO', {}),
    "429": lambda ask: error(429, "rate_limit", **{"Retry-After": "0.3"}),
    "429 for an hour": lambda ask: error(429, "rate_limit", **{"Retry-After": "3600"}),
    "500": lambda ask: (500, HTML, {"Content-Type": "text/html"}),
    "503": lambda ask: error(503, "overloaded"),
    "401": lambda ask: error(401, "invalid_api_key", f"wrong key {ask['key']}"),
    "400": lambda ask: error(400, "1210", "size must be a multiple of 16"),
    "filter": lambda ask: error(400, "content_policy_violation"),
    "zhipu filter": lambda ask: error(400, "1301"),
    "filter in answer": lambda ask: (200, b'{"data": [], "content_filter": [{"level": 0}]}', {}),
    "no credit": lambda ask: error(429, "insufficient_quota"),
}  # fmt: skip
GETS = {"expired": (404, b"gone", {}), "html": (200, HTML, {"Content-Type": "text/html"})}


class Handler(BaseHTTPRequestHandler):
    """One request."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/images/generations"
        self.server.bodies.append(body)
        self.server.headers.append(self.headers)
        word = self.server.script.pop(0) if self.server.script else "b64"
        if word == "slow":
            time.sleep(1.0)
            word = "500"
        key = self.headers["Authorization"].removeprefix("Bearer ")
        self.reply(*POSTS[word]({**body, "address": self.server.address, "key": key}))

    def do_GET(self):
        _, kind, *rest = self.path.split("/")
        assert "Authorization" not in self.headers
        self.server.downloads.append(kind)
        data = (
            encoded(picture(rest[0].removesuffix(".png").replace("_", " "))) if rest else encoded(picture(""))
        )
        if kind == "busy" and self.server.downloads.count("busy") == 1:
            self.reply(503, b"later", {"Retry-After": "0"})
        else:
            good = (200, data[:-200] if kind == "truncated" else data, {"Content-Type": "image/png"})
            self.reply(*GETS.get(kind, good))

    def reply(self, status, data, headers):
        try:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except ConnectionError:
            pass  # the client has not waited

    def log_message(self, *words):
        """Say nothing."""
