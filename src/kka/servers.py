"""What servers of captions and of images have in common: addresses, keys, and when to try again."""

import math
import os
import time
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import tenacity

from kka.errors import UserError

# A key is sent to the hosts it is for; OPENAI_API_KEY to any other that the user names.
KEYS = {
    "open.bigmodel.cn": ("ZHIPUAI_API_KEY", "ZAI_API_KEY"),
    "api.z.ai": ("ZAI_API_KEY", "ZHIPUAI_API_KEY"),
}
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")  # need no key
ATTEMPTS = 6  # at a server that is busy or out of order
BACK_OFF = tenacity.wait_random_exponential(multiplier=1, max=60)
LONGEST_WAIT = 600.0  # seconds; a server that asks for more is left alone
NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached", "1113")  # codes, with status 429
FILTERED = ("content_filter", "content_policy_violation", "moderation_blocked", "1301")  # codes, with 400


def check_url(url: str) -> str:
    """The host of a server's address; raises UserError if it is no address or has a password in it."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"--base_url {url!r} must be an address such as http://localhost:8000/v1")
    if parts.username or parts.password:
        raise UserError("--base_url must not hold a password; the key comes from the environment")
    return host


def read_key(host: str) -> str:
    """The key for a server from the environment; raises UserError naming the variable that is not set."""
    names = KEYS.get(host, ("OPENAI_API_KEY",))
    for name in names:
        key = os.environ.get(name, "").strip()
        if key and not (key.isascii() and key.isprintable()):
            raise UserError(f"the key in the environment variable {name} has characters that no key has")
        if key:
            return key
    if host in LOCAL_HOSTS:
        return "no-key"
    raise UserError(f"{host} needs a key; set the environment variable {' or '.join(names)}")


def retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks to wait, a number or a date; None if it says nothing."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return None if math.isnan(seconds) else max(0.0, seconds)
