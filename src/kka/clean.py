"""From an LLM's answers to captions. What is rejected is counted by reason.

An answer is untrusted text: it may hold several captions, numbered, quoted, in JSON, or none at all.
"""

import html
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

MIN_WORDS = 3
MAX_WORDS = 55  # CLIP reads 77 tokens, start and end included
MAX_CHARACTERS = 500
NEAR = 0.9  # Jaccard similarity from which two captions count as the same

_HAN_OR_KANA = r"\u3040-\u30ff\u3400-\u9fff"  # written without blanks: each sign counts as a word
_WORD = re.compile(rf"[{_HAN_OR_KANA}]|[^\W_{_HAN_OR_KANA}]+(?:['-][^\W_]+)*")
_STRAIGHT = str.maketrans({
    **dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\u300c\u300d\u300e\u300f", '"'),
    **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032", "'"),
    **dict.fromkeys("\u2010\u2011\u2012\u2013", "-"),
    **dict.fromkeys("\u2014\u2015", " - "),
})  # fmt: skip
_LABEL = (
    "answer|caption|description|sentence|output|response|result|reply|text|example|option|variation|image|"
    "photo|picture|flower|assistant|a|no\\."
)
# What may stand before a caption; taken away until nothing more fits.
_LEADERS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"^(?:[-*+•·▪◦‣~]+\s+|[#>]+\s*|\[[ x]\]\s*)",
        r"^[(\[]?\d{1,4}[.):\]]+\s*(?=\D)",
        r"^\(?[a-z][.)]\s+",
        rf"^(?:{_LABEL})s? ?#?\d{{1,4}}\s*[-.)]\s*",
        r"^(?:sure|certainly|of course|okay|ok|absolutely|great|yes|alright)\s*[!,.:]+\s*",
        r"^here(?:'s| is| are)\b[^:]{0,120}:\s*",
        rf"^[\"']?(?:[a-z]+ ){{0,2}}?(?:{_LABEL})s?\s*(?:#?\d{{1,4}}|[a-z])?[\"']?\s*[:=]\s*",
    )
)
_EMPHASIS = re.compile(r"(\*\*|__|\*|`)(?=\S)(.+?)(?<=\S)\1")
_REFUSAL = re.compile(
    r"\b(?:sorry|apologi[sz]e|as an ai|language model|content policy|inappropriate|against (?:my|the) \w+|"
    r"(?:can ?not|can't|could not|won't|will not|unable to|not able to|not allowed to|must not) "
    r"(?:help|assist|provide|generate|create|comply|fulfil+|describe|answer|do|continue|write|give)\w*)\b",
    re.IGNORECASE,
)
_CHAT = re.compile(r"\bI(?:'[a-z]+)?\b|\b(?i:my|me|we|you|your|let's|let us|feel free|note that)\b|:$")
_MARKUP = re.compile(r"[{}\[\]<>|\\=_*#~`]|https?://|^\W*$")


class SimilarTexts:
    """Texts that can be asked whether they hold the same words, or nearly, in the same order."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._texts: set[tuple[str, ...]] = set()
        self._by_pair: defaultdict[tuple[str, str], list[tuple[str, ...]]] = defaultdict(list)
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Remember a text."""
        words = tuple(split_words(text))
        if words not in self._texts:
            self._texts.add(words)
            for pair in set(pairwise(words)):
                self._by_pair[pair].append(words)

    def has_same(self, text: str) -> bool:
        """Whether a text has these words, whatever its case and punctuation."""
        return tuple(split_words(text)) in self._texts

    def has_near(self, text: str) -> bool:
        """Whether a text is the same or near; see `is_near`."""
        words = tuple(split_words(text))
        # Adding or removing a word breaks two pairs of neighbours at most, so that of any 2 * edits + 1
        # pairs a near text has one: only texts with one of the rarest are compared.
        pairs = sorted(set(pairwise(words)), key=lambda pair: len(self._by_pair.get(pair, ())))
        rarest = pairs[: 2 * _edits(len(words)) + 1]
        candidates = {other for pair in rarest for other in self._by_pair.get(pair, ())}
        return words in self._texts or any(is_near(words, other) for other in candidates)


class Cleaner:
    """Turns answers into captions, none of which it gives out more than `repeats` times.

    Args:
        examples: captions shown to the LLM; copies of them are rejected. Where they are written in Latin
            letters, so must the answers be.
        is_normal: whether a caption describes the normal class.
        known: captions of earlier requests, not given out at all.
        repeats: times that one caption may be given out, at least 1.
    """

    def __init__(
        self,
        examples: Sequence[str],
        is_normal: Callable[[str], bool] | None = None,
        known: Iterable[str] = (),
        repeats: int = 1,
    ) -> None:
        self.rejected: Counter[str] = Counter()
        self._given: Counter[tuple[str, ...]] = Counter()
        self._repeats = repeats
        self._examples = SimilarTexts(examples)
        self._known = SimilarTexts(known)
        self._is_normal = is_normal
        self._latin_only = all(map(is_latin, examples))

    def clean(self, answer: str) -> list[str]:
        """The new captions of one answer; every other line is counted in `rejected`."""
        lines = split_answer(answer)
        if not lines:
            self.rejected["empty"] += 1
        accepted = []
        for line in lines:
            caption = strip_decoration(line) if len(line) <= 4 * MAX_CHARACTERS else line
            reason = self._reason(caption)
            if reason:
                self.rejected[reason] += 1
            else:
                self._known.add(caption)
                self._given[tuple(split_words(caption))] += 1
                accepted.append(caption)
        return accepted

    def _reason(self, caption: str) -> str | None:
        """Why a caption is rejected, or None."""
        reason = malformed(caption)
        if reason:
            return reason
        if self._latin_only and not is_latin(caption):
            return "other language"
        if self._examples.has_near(caption):
            return "copy of an example"
        again = 0 < self._given[tuple(split_words(caption))] < self._repeats
        if not again and self._known.has_same(caption):
            return "duplicate"
        if not again and self._known.has_near(caption):
            return "near duplicate"
        if self._is_normal is not None and self._is_normal(caption):
            return "normal class"
        return None


def split_words(text: str) -> list[str]:
    """Lower-case words; heart-shaped and don't are one."""
    return _WORD.findall(text.lower())


def is_near(a: Sequence[str], b: Sequence[str]) -> bool:
    """Whether the Jaccard similarity of two sequences of words is at least NEAR.

    It is the number of words they share in order over the number of all their words. The order matters:
    white petals around a yellow centre are no yellow petals around a white one.
    """
    if len(set(a) ^ set(b)) > _edits(min(len(a), len(b))):  # saves the slow part
        return False
    shared = _longest_common_subsequence(a, b)
    return shared >= NEAR * (len(a) + len(b) - shared)


def is_latin(text: str) -> bool:
    """Whether all letters are Latin ones, with or without accents."""
    return all(unicodedata.name(c, "").startswith("LATIN") for c in set(text) if c.isalpha())


def split_answer(answer: str) -> list[str]:
    """The lines of an answer that are not blank; no thoughts, tokens, fences, emoji, JSON."""
    text = unicodedata.normalize("NFKC", answer)
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    text = re.sub(r"^\s*```\w*\s*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"<\|[^|<>\n]{1,40}\|>|<br ?/?>", "\n", text)
    text = html.unescape(text).translate(_STRAIGHT)
    text = "".join(_replace_symbol(c) for c in text)
    return [line.strip() for line in _unpack_json(text).splitlines() if line.strip()]


def strip_decoration(line: str) -> str:
    """A line without numbering, bullets, labels, emphasis, quotes and needless blanks."""
    for _ in range(8):  # layers of decoration
        for leader in _LEADERS:
            line = leader.sub("", line, count=1)
        line = _EMPHASIS.sub(r"\2", line)
        line = _unquote(re.sub(r"(?<=[\"'`])\s*[,;]$", "", line.strip()))
    line = re.sub(r"\s+", " ", line)
    return re.sub(r" (?=[,;:!?]|\.(?!\d))", "", line)


def malformed(caption: str) -> str | None:
    """What is wrong with the form of a caption, or None."""
    words = split_words(caption)
    tests: dict[str, Callable[[], object]] = {
        "empty": lambda: not caption,
        "too long": lambda: len(caption) > MAX_CHARACTERS or len(words) > MAX_WORDS,
        "control characters": lambda: any(map(_is_control, caption)),
        "markup": lambda: _MARKUP.search(caption),
        "refusal": lambda: _REFUSAL.search(caption),
        "question": lambda: caption.rstrip(" \"')").endswith("?"),
        "chat": lambda: _CHAT.search(caption),
        "too short": lambda: sum(any(map(str.isalpha, word)) for word in words) < MIN_WORDS,
        "repetition": lambda: len(words) > 2 * len(set(words)),
    }
    return next((reason for reason, test in tests.items() if test()), None)


def _edits(n_words: int) -> int:
    """Words that may be added to or removed from a near text."""
    return int(n_words * (1 - NEAR) / NEAR + 1e-9)


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if x == y else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def _replace_symbol(c: str) -> str:
    """Emoji become blanks, invisible marks nothing."""
    if c.isascii():
        return c
    category = unicodedata.category(c)
    if category == "Cf" or "\ufe00" <= c <= "\ufe0f":
        return ""
    return " " if category in ("So", "Sk") and c != "\ufffd" else c


def _is_control(c: str) -> bool:
    return unicodedata.category(c) in ("Cc", "Co", "Cs", "Cn") or c == "\ufffd"


def _unpack_json(text: str) -> str:
    """The text with every list or object of JSON replaced by its strings, one a line."""
    decoder, done, at = json.JSONDecoder(), "", 0
    while start := re.compile(r"[\[{]\s*[\"\[{]").search(text, at):
        try:
            value, end = decoder.raw_decode(text, start.start())
            strings = list(_strings(value))
        except (ValueError, RecursionError):
            break
        done += "\n".join([text[at : start.start()], *strings, ""])
        at = end
    return done + text[at:]


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _unquote(line: str) -> str:
    """Without the quotes around the whole line, or one that has no partner."""
    for quote in "\"'`":
        inner = line[1:-1]
        if len(line) > 1 and line[0] == line[-1] == quote and (quote == "'" or quote not in inner):
            return inner
        if quote != "'" and line.count(quote) == 1:
            return line.strip(quote)
    return line
