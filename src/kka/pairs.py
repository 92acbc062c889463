"""Preference pairs for Eq. (7): the caption of a hard anomaly is chosen, that of an easy one rejected."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from kka.anomalies import Item, read_items
from kka.datasets.layout import NAME_LIST, DataSetSpec
from kka.errors import UserError
from kka.files import read_json, write_json
from kka.prompts import generation_prompt, prompt_digest
from kka.results import EASY, HARD, read_rows
from kka.seeds import derive_seed
from kka.settings import option

KEYS = ("prompt", "chosen", "rejected")
Pair = dict[str, str]  # with these keys


class NothingToPreferError(UserError):
    """There are no hard or no easy anomalies: a round ends here without tuning."""


@dataclass(frozen=True)
class PairSettings:
    """How preference pairs are made."""

    pairs_per_hard: int = option(4, "pairs of each hard caption, each with another easy one")
    validation_share: float = option(0.15, "share of the captions held out for validation (official: 0.145)")
    min_pairs: int = option(4, "stop if fewer training pairs than this are left")


@dataclass(frozen=True)
class Pairs:
    """Training and validation pairs; no chosen caption is in both."""

    prompt: str
    """what the LLM was asked; of the first pair, if there are several prompts"""
    train: list[Pair]
    validation: list[Pair]
    counts: dict[str, int]
    """captions and pairs that were taken, and what was dropped for which reason"""


def build_pairs(
    run: Path,
    anomaly_path: Path | None,
    settings: PairSettings,
    seed: int,
    prompt: str | None = None,
    spec: DataSetSpec | None = None,
) -> Pairs:
    """Pairs from the hard and easy anomalies of a run.

    Args:
        run: run folder with d_samples.json and e_samples.json.
        anomaly_path: folder 0 that the run scored; without it the captions in those two files are taken.
        settings: number of pairs, held-out share, minimum.
        seed: of the order of captions and so of the pairing and of the split.
        prompt: the generation prompt; None: made of the examples in the manifest and the data set's request.
        spec: the data set, where `prompt` is None.

    Raises NothingToPreferError without hard or without easy captions, UserError if fewer than the minimum
    are left, if the folder is not the one that was scored or its images were asked for with another prompt.
    """
    check_pair_settings(settings)
    names, manifest = _read_anomalies(anomaly_path)
    hard, easy = (_read_side(run / listing, names, manifest) for listing in (HARD, EASY))
    counts: Counter[str] = Counter(hard_images=len(hard), easy_images=len(easy))
    chosen, rejected = _distinct(hard.values(), counts), _distinct(easy.values(), counts)
    lead = _lead(hard.values(), easy.values())
    preferred = [text for key, text in chosen.items() if lead[key] > 0]
    other = [text for key, text in rejected.items() if lead[key] < 0]
    both = chosen.keys() & rejected.keys()
    counts["dropped_both_sides"] += sum(lead[key] == 0 for key in both)
    counts["dropped_outvoted"] += sum(lead[key] != 0 for key in both)  # on the side that they are not on
    for captions, listing in ((preferred, HARD), (other, EASY)):
        if not captions:
            raise NothingToPreferError(
                f"{run / listing} gives no caption ({_describe(counts)}), so there is nothing to prefer; "
                "go on without tuning, or make more anomalies"
            )
    used = [manifest[name] for name in (*hard, *easy) if name in manifest]
    prompt = find_prompt(prompt, spec, used)
    train, validation = _split_and_pair(preferred, other, settings, seed)
    return _finish(_rows(prompt, train), _rows(prompt, validation), counts, settings, run)


def read_pairs(path: Path, settings: PairSettings, seed: int, validation: Path | None = None) -> Pairs:
    """Pairs of a pairs.json, or of a list of {prompt, chosen, rejected} as the official training_data.json.

    Rows that cannot teach anything are dropped and counted. A plain list is split by chosen caption, unless
    `validation` names a second list. Raises UserError if fewer than the minimum are left.
    """
    check_pair_settings(settings)
    value = read_json(path)
    if isinstance(value, dict):
        rows, held = value.get("train"), value.get("validation", [])
    else:
        rows, held = value, None
    if not isinstance(rows, list) or not isinstance(held, list | None):
        raise UserError(f'{path} must hold {{"train": [pairs], "validation": [pairs]}} or a list of pairs')
    if validation is not None:
        held = read_json(validation)
        if not isinstance(held, list):
            raise UserError(f"--validation_pairs {validation} must hold a list of pairs")
    counts: Counter[str] = Counter()
    train = _clean(rows, counts)
    if held is None:
        train, held_rows = _hold_out(train, settings.validation_share, seed)
    else:
        seen = {_key(row["chosen"]) for row in train}
        cleaned = _clean(held, counts)
        held_rows = [row for row in cleaned if _key(row["chosen"]) not in seen]
        counts["dropped_in_both_splits"] += len(cleaned) - len(held_rows)
    return _finish(train, held_rows, counts, settings, path)


def write_pairs(path: Path, pairs: Pairs) -> None:
    """Write pairs.json."""
    write_json(path, asdict(pairs), indent=1)


def check_pair_settings(settings: PairSettings) -> None:
    """Raises UserError naming the flag of the first value that makes no sense."""
    if settings.pairs_per_hard < 1:
        raise UserError(f"--pairs_per_hard must be at least 1, it is {settings.pairs_per_hard}")
    if not 0 <= settings.validation_share < 1:
        raise UserError(f"--validation_share must lie in [0, 1), it is {settings.validation_share}")
    if settings.min_pairs < 1:
        raise UserError(f"--min_pairs must be at least 1, it is {settings.min_pairs}")


def find_prompt(prompt: str | None, spec: DataSetSpec | None, items: Sequence[Item]) -> str:
    """The prompt that these images were asked for with: the one given, or the data set's with their examples.

    Raises UserError if there is none, or if the manifest says that it was another.
    """
    if prompt is None:
        examples = {tuple(item.examples) for item in items}
        if spec is None or len(examples) != 1:
            raise UserError(
                f"the prompt cannot be read from the manifest ({len(examples)} sets of examples, data set "
                f"{spec.name if spec else 'not given'}); give it with --prompt"
            )
        prompt = generation_prompt(spec, examples.pop())
    if not prompt.strip():
        raise UserError("the prompt is empty; give the one that the captions were generated with")
    others = [item.file for item in items if item.prompt_sha256 not in (None, prompt_digest(prompt))]
    if others:
        raise UserError(
            f"{len(others)} of {len(items)} images ({others[0]}, ...) were asked for with another prompt "
            f"than {_shorten(prompt)!r}; give that one with --prompt"
        )
    return prompt


def _read_anomalies(folder: Path | None) -> tuple[list[str], dict[str, Item]]:
    if folder is None:
        return [], {}
    names = read_json(folder / NAME_LIST["train"])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder / NAME_LIST['train']} must hold a list of file names")
    return [PurePosixPath(name).name for name in names], {item.file: item for item in read_items(folder)}


def _read_side(path: Path, names: Sequence[str], manifest: dict[str, Item]) -> dict[str, Any]:
    """One list of a split: the caption of each image by its file name, or by its number without names."""
    captions = {}
    for place, (index, _score, texts) in enumerate(read_rows(path)):
        where = f"{path}: item {place}"
        if names and index >= len(names):
            raise UserError(
                f"{where} is image {index}, but the anomaly folder lists {len(names)} images; "
                "give the folder that the run scored with --anomaly_path"
            )
        name = names[index] if names else str(index)
        captions[name] = _caption_of(texts, manifest.get(name), where)
    return captions


def _caption_of(texts: list[Any], item: Item | None, where: str) -> Any:
    """The caption of an image: the manifest's, which must be among the listed ones; else the first listed."""
    if item is None:
        return texts[0] if texts else None
    if texts and item.caption not in texts:
        raise UserError(
            f"{where} has the caption {_shorten(texts[0])!r}, the manifest has {_shorten(item.caption)!r}; "
            "give the folder that the run scored with --anomaly_path"
        )
    return item.caption


def _distinct(captions: Iterable[Any], counts: Counter[str]) -> dict[str, str]:
    """Valid captions by what their spellings have in common."""
    kept: dict[str, str] = {}
    for caption in captions:
        fault = _text_fault(caption) or ("duplicate" if _key(caption) in kept else None)
        if fault:
            counts[f"dropped_{fault}"] += 1
        else:
            kept[_key(caption)] = " ".join(caption.split())
    return kept


def _lead(hard: Iterable[Any], easy: Iterable[Any]) -> dict[str, int]:
    """By how much the share of hard images of each caption is above that of all (> 0), times a number.

    So a caption of one image is on the side that Eq. (6) gives it, and one of several images, some of which
    are hard, is preferred to those of which fewer are.
    """
    n_hard, n_easy = (Counter(_key(text) for text in side if not _text_fault(text)) for side in (hard, easy))
    all_hard, all_easy = n_hard.total() or 1, n_easy.total() or 1
    return {key: n_hard[key] * all_easy - n_easy[key] * all_hard for key in n_hard | n_easy}


def _split_and_pair(
    hard: list[str], easy: list[str], settings: PairSettings, seed: int
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Hold out hard and easy captions, then pair within each part: validation pairs are new on both sides."""
    hard_train, hard_held = _divide(hard, settings.validation_share, seed)
    easy_train, easy_held = _divide(easy, settings.validation_share, seed)
    n = settings.pairs_per_hard
    return pair_up(hard_train, easy_train, n), pair_up(hard_held, easy_held, n)


def pair_up(hard: Sequence[str], easy: Sequence[str], pairs_per_hard: int) -> list[tuple[str, str]]:
    """Each hard caption with that many different easy ones, going round, so that all serve equally often."""
    n = min(pairs_per_hard, len(easy))
    return [(text, easy[(i * n + j) % len(easy)]) for i, text in enumerate(hard) for j in range(n)]


def _clean(rows: Iterable[Any], counts: Counter[str]) -> list[Pair]:
    """Valid, distinct rows; a row with a caption that others have on the other side is dropped."""
    pairs: dict[tuple[str, ...], Pair] = {}
    for row in rows:
        pair, fault = _read_row(row)
        key = tuple(map(_key, pair.values()))
        if fault or key in pairs:
            counts[f"dropped_{fault or 'duplicate'}"] += 1
        else:
            pairs[key] = pair
    both = {key[1] for key in pairs} & {key[2] for key in pairs}
    kept = [pair for key, pair in pairs.items() if key[1] not in both and key[2] not in both]
    counts["dropped_both_sides"] += len(pairs) - len(kept)
    return kept


def _read_row(row: Any) -> tuple[Pair, str | None]:
    """A pair and None, or {} and why it is none."""
    texts: list[Any] = [row.get(key) for key in KEYS] if isinstance(row, dict) else [None]
    if isinstance(texts[0], list) and len(texts[0]) == 1:
        texts[0] = texts[0][0]  # the official shape
    faults = [fault for fault in map(_text_fault, texts) if fault]
    if not faults and _key(texts[1]) == _key(texts[2]):
        faults = ["equal"]
    return ({}, faults[0]) if faults else (dict(zip(KEYS, texts, strict=True)), None)


def _text_fault(value: Any) -> str | None:
    if not isinstance(value, str):
        return "not_text"
    return None if value.strip() else "empty"


def _hold_out(rows: list[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Split by chosen caption."""
    chosen = list(dict.fromkeys(_key(row["chosen"]) for row in rows))
    held = set(_divide(chosen, share, seed)[1])
    train = [row for row in rows if _key(row["chosen"]) not in held]
    return train, [row for row in rows if _key(row["chosen"]) in held]


def _divide(captions: Sequence[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Training and held-out captions, in random order; at least one of each if that can be.

    A caption's side follows from seed and text alone: what is held out in one round of Algorithm 1 was not
    trained on in an earlier one, whichever side of a pair it was on.
    """
    place = {text: derive_seed(seed, "held out", _key(text)) for text in captions}
    order = sorted(captions, key=place.__getitem__)
    n_held = sum(value < share * 2**63 for value in place.values())
    n_held = min(max(1, n_held), len(order) - 1) if share > 0 and len(order) > 1 else 0
    return order[n_held:], order[:n_held]


def _rows(prompt: str, captions: list[tuple[str, str]]) -> list[Pair]:
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for chosen, rejected in captions]


def _finish(
    train: list[Pair], validation: list[Pair], counts: Counter[str], settings: PairSettings, where: Path
) -> Pairs:
    if len(train) < settings.min_pairs:
        raise NothingToPreferError(
            f"{where} gives {len(train)} valid training pairs ({_describe(counts)}), at least --min_pairs "
            f"{settings.min_pairs} are needed; make more anomalies or lower it"
        )
    kept = {key: n for key, n in counts.items() if n}
    return Pairs(
        train[0]["prompt"], train, validation, {**kept, "train": len(train), "validation": len(validation)}
    )


def _describe(counts: Counter[str]) -> str:
    return ", ".join(f"{key} {n}" for key, n in counts.items() if n) or "no rows"


def _key(text: str) -> str:
    """What two spellings of one caption have in common."""
    return " ".join(text.split()).casefold()


def _shorten(text: Any) -> str:
    return text if isinstance(text, str) and len(text) <= 60 else f"{str(text)[:57]}..."
