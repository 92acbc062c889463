"""Drawer over HTTP: servers with OpenAI's image endpoint, Zhipu's and Z.ai's among them."""

import base64
import http.client
import io
import logging
import urllib.error
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import openai
import tenacity
from PIL import Image

from kka.datasets.images import MAX_PIXELS
from kka.datasets.layout import DataSetSpec
from kka.drawers import DrawerSettings, is_black, style, styled
from kka.errors import UserError
from kka.servers import (
    ATTEMPTS,
    BACK_OFF,
    FILTERED,
    KEYS,
    LONGEST_WAIT,
    NO_CREDIT,
    check_url,
    read_key,
    retry_after,
)

MODEL = "cogview-4-250304"  # the paper's code asks for cogview-3-plus, which is no longer served
TRIES = 3  # images asked for when the answers hold none that can be used; each may cost
MAX_BYTES = 64 * 2**20
TIMEOUT = 180.0  # seconds
T = TypeVar("T")
log = logging.getLogger(__name__)


class BusyError(Exception):
    """The server may do it later."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait
        """seconds that the server asks to wait"""


class UnusableError(Exception):
    """The answer holds no usable image; another answer may."""


class FilteredError(Exception):
    """The server refuses to draw this caption."""


class Api:
    """POST <base_url>/images/generations; the key is read from the environment and kept nowhere else."""

    attempts = 1
    one_at_a_time = True

    def __init__(self, settings: DrawerSettings, spec: DataSetSpec) -> None:
        self.host = check_url(settings.base_url)
        if settings.model is None and self.host not in KEYS:
            raise UserError(f"--base_url {settings.base_url} needs the name of its image model with --model")
        self.id, self.failures = settings.model or MODEL, Counter[str]()
        self.crop = self.host in KEYS if settings.crop_watermark is None else settings.crop_watermark
        self.size = f"{settings.size}x{settings.size}" if settings.size else None
        self.suffix, self.left = style(settings, spec), settings.max_requests
        self.settings: dict[str, Any] = {
            "server": self.host, "size": self.size, "suffix": self.suffix, "crop_watermark": self.crop,
        }  # fmt: skip
        self._key = read_key(self.host)
        self._client = openai.OpenAI(
            api_key=self._key, base_url=settings.base_url, max_retries=0, timeout=TIMEOUT
        )

    def draw(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Image.Image | None]:
        """See `Drawer`; such servers take no seed.

        Raises UserError if the server refuses key or request, or stays busy; nothing that was drawn is lost.
        """
        return [self._draw(styled(caption, self.suffix)) for caption in captions]

    def _draw(self, prompt: str) -> Image.Image | None:
        for _ in range(TRIES):
            try:
                image = self._fetch(self._patiently(lambda: self._ask(prompt)))
                return crop_watermark(image) if self.crop else image
            except UnusableError as error:
                log.warning("the image API gave no usable image (%s)", error)
                self.failures[str(error)] += 1
            except FilteredError:
                self.failures["content filter"] += 1
                break
        return None

    def _patiently(self, work: Callable[[], T]) -> T:
        """Do it, waiting and trying again while the server is busy."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(BusyError), wait=_wait, reraise=True,
            stop=tenacity.stop_after_attempt(ATTEMPTS), before_sleep=_tell,
        )  # fmt: skip
        try:
            return retrying(work)
        except BusyError as error:
            raise UserError(
                f"the image API at {self.host} failed {ATTEMPTS} times ({error}); run the same command later"
            ) from None

    def _ask(self, prompt: str) -> Any:
        """One request: the entry of the answer that holds the image."""
        if self.left == 0:
            raise UserError("--max_requests is reached; the same command continues")
        if self.left is not None:
            self.left -= 1
        try:
            answer = self._client.images.generate(
                model=self.id, prompt=prompt, n=1, size=self.size or openai.omit
            )
        except openai.APIStatusError as error:
            self._judge(error)
        except openai.APIConnectionError as error:
            raise BusyError(type(error).__name__) from None
        except (openai.OpenAIError, ValueError):
            raise UnusableError("no JSON") from None
        entries = getattr(answer, "data", None)
        if not isinstance(entries, list) or not entries:
            raise (
                FilteredError
                if getattr(answer, "content_filter", None)
                else UnusableError("no image in the answer")
            )
        return entries[0]

    def _judge(self, error: openai.APIStatusError) -> NoReturn:
        code, status = str(error.code), error.status_code
        if code in FILTERED:
            raise FilteredError from None
        if status in (408, 409, 429) or status >= 500:
            wait = retry_after(error.response.headers.get("retry-after"))
            if code not in NO_CREDIT and (wait or 0) <= LONGEST_WAIT:
                raise BusyError(f"HTTP {status}", wait) from None
        said = " ".join(str(error.message).replace(self._key, "***").split())
        raise UserError(
            f"the image API at {self.host} refuses with HTTP {status} ({said[:200]}); "
            "check key, credit, --model and --size, then run the same command"
        ) from None

    def _fetch(self, entry: Any) -> Image.Image:
        encoded, url = getattr(entry, "b64_json", None), getattr(entry, "url", None)
        try:
            data = base64.b64decode(encoded, validate=True) if encoded else None
        except (TypeError, ValueError):
            raise UnusableError("damaged base64") from None
        if data is None:
            if not isinstance(url, str) or not url.startswith(("http://", "https://")):
                raise UnusableError("no address of an image")
            data = self._patiently(lambda: download(url))
        return decode_image(data)


def download(url: str) -> bytes:
    """Content of an address; raises BusyError or UnusableError."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            data = response.read(MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        if error.code == 429 or error.code >= 500:
            raise BusyError(f"HTTP {error.code}", retry_after(error.headers.get("retry-after"))) from None
        raise UnusableError(f"expired address (HTTP {error.code})") from None
    except (ValueError, http.client.InvalidURL):
        raise UnusableError("no address of an image") from None
    except (OSError, http.client.HTTPException) as error:
        raise BusyError(type(error).__name__) from None
    if len(data) > MAX_BYTES:
        raise UnusableError("too large an image")
    return data


def decode_image(data: bytes) -> Image.Image:
    """An image from bytes, as RGB; raises UnusableError for anything else, and for a black one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            image: Image.Image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise UnusableError("too large an image")
        image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise UnusableError("no whole image") from None
    if is_black(image):
        raise UnusableError("black image")
    return image


def crop_watermark(image: Image.Image) -> Image.Image:
    """Cut off the bottom int(height / 13) rows, as the official code."""
    return image.crop((0, 0, image.width, image.height - int(image.height / 13)))


def _wait(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.wait if isinstance(error, BusyError) else None
    return BACK_OFF(state) if asked is None else asked


def _tell(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning("the image API is busy (%s); trying again in %.0f s", error, state.upcoming_sleep)
