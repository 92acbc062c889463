"""Language models on servers that speak OpenAI's protocol, through the SDK of OpenAI or of ZhipuAI.

vLLM, SGLang, Ollama, `transformers serve`, OpenAI, Zhipu and Z.ai do. The key comes from the environment and
is written nowhere.
"""

import importlib
import logging
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import tenacity

from kka.errors import UserError
from kka.language_models import DEFAULT_MODEL, LanguageModelSettings, whole_lines
from kka.seeds import derive_seed
from kka.servers import (
    ATTEMPTS,
    BACK_OFF,
    FILTERED,
    LONGEST_WAIT,
    NO_CREDIT,
    check_url,
    read_key,
    retry_after,
)

# Back end: package, client, address that it asks by default.
SDKS = {
    "openai": ("openai", "OpenAI", "https://api.openai.com/v1"),
    "zhipuai": ("zhipuai", "ZhipuAI", "https://open.bigmodel.cn/api/paas/v4"),
}
FILTERED_ANSWER = ("content_filter", "sensitive")  # reasons to finish an answer

log = logging.getLogger(__name__)


class MalformedReplyError(Exception):
    """The server answered something that is no completion; another reply may be one."""


class LostAnswerError(Exception):
    """There is no answer, and trying again would cost as much as another one; the message says why."""


class StoppedError(Exception):
    """Another request met an error that this one would meet too."""


class ChatServer:
    """A model on a server; several requests are under way at the same time."""

    def __init__(self, settings: LanguageModelSettings) -> None:
        package, client, default_url = SDKS[settings.backend]
        url = settings.base_url or default_url
        self.id = settings.model or DEFAULT_MODEL[settings.backend]
        self.adapter: str | None = None
        self.failures: Counter[str] = Counter()
        self.host = check_url(url)
        self._settings = settings
        self._key = read_key(self.host)
        sdk = import_sdk(package)
        self._client = getattr(sdk, client)(
            api_key=self._key, base_url=url, timeout=settings.timeout, max_retries=0
        )
        self._errors = tuple(
            getattr(sdk, name) for name in ("OpenAIError", "ZhipuAIError") if hasattr(sdk, name)
        )
        self._requests = 0
        self._lock = threading.Lock()

    def complete(self, prompt: str, n: int, seed: int) -> list[str]:
        """One request for each of the `n` answers (one in all if greedy).

        An error that would come again, such as a refused key or a server that stays out of order, ends them.
        What has been answered by then is returned, so that nothing is paid for in vain; if there is nothing,
        UserError is raised.
        """
        stop = threading.Event()
        with ThreadPoolExecutor(self._settings.parallel) as pool:
            seeds = [derive_seed(seed, i) >> 32 for i in range(1 if self._settings.greedy else n)]
            futures = [pool.submit(self._patiently, prompt, each, stop) for each in seeds]
            try:
                wait(futures)
            finally:  # Ctrl-C: the others do not start, and do not wait to try again
                stop.set()
        answers = [future.result() for future in futures if future.exception() is None]
        for error in filter(None, (future.exception() for future in futures)):
            if not any(answers) or not isinstance(error, UserError):
                raise error
            log.warning("%s", error)
        return [answer for answer in answers if answer is not None]

    def _patiently(self, prompt: str, seed: int, stop: threading.Event) -> str | None:
        """An answer, waiting and trying again where that can help; None if it came to nothing.

        Sets `stop` on an error that the next request would meet too.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_transient),
            wait=_seconds_to_wait,
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            sleep=tenacity.sleep_using_event(stop),
            before_sleep=self._announce,
            reraise=True,
        )
        try:
            return retrying(self._ask, prompt, seed, stop)
        except StoppedError:
            return None
        except LostAnswerError as lost:
            reason = str(lost)
        except (MalformedReplyError, ValueError, *self._errors) as error:
            if error_code(error) not in FILTERED:
                stop.set()
                raise UserError(self._explain(error)) from None
            reason = "content filter"
        except UserError:
            stop.set()
            raise
        with self._lock:
            self.failures[reason] += 1
        return None

    def _ask(self, prompt: str, seed: int, stop: threading.Event) -> str:
        s = self._settings
        if stop.is_set():
            raise StoppedError
        with self._lock:
            if s.max_requests is not None and self._requests >= s.max_requests:
                raise UserError(f"--max_requests {s.max_requests} is reached")
            self._requests += 1
        sampling = {"temperature": 0.0} if s.greedy else {"temperature": s.temperature, "top_p": s.top_p}
        reply = self._client.chat.completions.create(
            model=self.id,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=s.max_new_tokens,
            seed=seed,
            **sampling,
        )
        return read_reply(reply)

    def _announce(self, state: tenacity.RetryCallState) -> None:
        what = self._shorten(state.outcome.exception())  # type: ignore[union-attr]
        seconds = state.next_action.sleep  # type: ignore[union-attr]
        log.warning("%s: %s; trying again in %.1f s", self.host, what, seconds)

    def _explain(self, error: BaseException) -> str:
        """One sentence on an error that trying again does not mend."""
        status, said = getattr(error, "status_code", None), self._shorten(error)
        if error_code(error) in NO_CREDIT or status == 402:
            return f"the account at {self.host} has no credit ({said}); top it up"
        if is_transient(error):
            return f"{self.host} failed {ATTEMPTS} times ({said}); check --base_url, or try again later"
        advice: dict[int | None, str] = {
            401: "check the key in the environment",
            403: "check the key in the environment",
            404: "check --model and --base_url, which often ends in /v1",
            429: "try again later",
        }
        todo = advice.get(status, "check --model and the other flags")
        return f"{self.host} refuses the request ({said}); {todo}"

    def _shorten(self, error: BaseException | None) -> str:
        """What a server said, in one short line and without the key."""
        status = getattr(error, "status_code", None)
        text = re.sub(r"<[^>]*>", " ", str(error).replace(self._key, "***"))
        text = re.sub(r"^Error code: \d+(?: - |, with error text )", "", text)
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())[:160]
        return f"HTTP {status}, {text}" if status else text or type(error).__name__


def read_reply(reply: Any) -> str:
    """The text of a reply, which may be a web page or anything else.

    Raises LostAnswerError, or MalformedReplyError if it is no completion.
    """
    choices = getattr(reply, "choices", None)
    if not isinstance(choices, list) or not choices or not getattr(choices[0], "message", None):
        raise MalformedReplyError("no completion in the reply")
    message, reason = choices[0].message, getattr(choices[0], "finish_reason", None)
    if reason in FILTERED_ANSWER:
        raise LostAnswerError("content filter")
    text = getattr(message, "content", None) or getattr(message, "refusal", None)
    text = text if isinstance(text, str) else ""
    if reason == "length":
        text = whole_lines(text) or ""
        if not text:
            raise LostAnswerError("cut off at --max_new_tokens")
    return text


def import_sdk(package: str) -> Any:
    """openai or zhipuai; raises UserError naming the extra if it is not installed."""
    for name in ("httpx", "httpx2"):  # a line of log for every request says nothing new
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"--backend {package} needs the package {package} ({error}); "
            f"install it with pip install -e '.[{package}]'"
        ) from None


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    status = getattr(error, "status_code", None)
    if error_code(error) in NO_CREDIT or (asked_to_wait(error) or 0) > LONGEST_WAIT:
        return False
    if status is None or status < 400:  # no connection, no answer in time, or no JSON
        names = [parent.__name__ for parent in type(error).__mro__]
        return bool(
            {"APIConnectionError", "MalformedReplyError", "JSONDecodeError", "APIResponseError"} & {*names}
        )
    return status in (408, 409, 425, 429) or status >= 500


def error_code(error: BaseException) -> str | None:
    """The server's own code of an error; the two SDKs keep it in different places."""
    code = getattr(error, "code", None)
    response = getattr(error, "response", None)
    if code is None and response is not None:
        try:
            code = response.json()["error"]["code"]
        except (ValueError, KeyError, TypeError):
            return None
    return None if code is None else str(code)


def asked_to_wait(error: BaseException) -> float | None:
    """Seconds that the server asks to wait; None if it says nothing."""
    response = getattr(error, "response", None)
    return None if response is None else retry_after(response.headers.get("retry-after"))


def _seconds_to_wait(state: tenacity.RetryCallState) -> float:
    asked = asked_to_wait(state.outcome.exception())  # type: ignore[union-attr, arg-type]
    return BACK_OFF(state) if asked is None else asked
