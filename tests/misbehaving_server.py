"""A local server of OpenAI's chat protocol that misbehaves as it is told."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text: str | None, finish_reason: str = "stop") -> dict[str, object]:
    """A reply as the protocol wants it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}


def failure(message: str, code: str | None = None) -> dict[str, object]:
    """The body of an error."""
    return {"error": {"message": message, "type": "error", "code": code}}


def reply(text: str, finish_reason: str = "stop"):
    """Answer well."""
    return lambda handler: handler.send(200, completion(text, finish_reason))


def status(code: int, message: str = "no", reason: str | None = None, **headers: str):
    """Answer with an error."""
    return lambda handler: handler.send(code, failure(message, reason), **headers)


def refuse_key(handler: "Handler") -> None:
    """401 with the key in the message, as some servers do."""
    handler.send(401, failure(f"wrong key {handler.headers['Authorization']}"))


def page(handler: "Handler") -> None:
    """A web page with status 200."""
    handler.send_bytes(200, b"<!DOCTYPE html><html><body>Welcome</body></html>", "text/html")


def truncated(handler: "Handler") -> None:
    """JSON that ends in the middle."""
    handler.send_bytes(200, json.dumps(completion("this flower has")).encode()[:60], "application/json")


def hang_up(handler: "Handler") -> None:
    """Close the connection in the middle of the body."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def no_choices(handler: "Handler") -> None:
    """A completion without any answer."""
    handler.send(200, {**completion(""), "choices": []})


def sleep(handler: "Handler") -> None:
    """Longer than a client with a timeout of a tenth of a second waits."""
    time.sleep(0.4)
    handler.close_connection = True


class Handler(BaseHTTPRequestHandler):
    """Does what the server's script says, the last line of it for ever."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """One request."""
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.requests)
            server.requests.append({"path": self.path, "key": self.headers["Authorization"], **body})
        server.script[min(number, len(server.script) - 1)](self)

    def send(self, code: int, value: object, **headers: str) -> None:
        """JSON."""
        self.send_bytes(code, json.dumps(value).encode(), "application/json", **headers)

    def send_bytes(self, code: int, data: bytes, kind: str, **headers: str) -> None:
        """Anything."""
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Silence."""


@contextmanager
def serve(*script) -> Iterator[ThreadingHTTPServer]:
    """A server that answers request k with `script[k]`; it has `url` and, as they come, `requests`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.script, server.requests, server.lock = script, [], threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
