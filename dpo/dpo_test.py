"""Sample the tuned and the untuned LLM with the same seed: still valid, and nearer to the normal captions?

python dpo/dpo_test.py --adapter adapter_1 --pairs adapter_1/tuning/pairs.json --dataset_name flower --n 50
"""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from sklearn.feature_extraction.text import TfidfVectorizer

from kka.clean import Cleaner
from kka.datasets import get_spec
from kka.describe import CaptionSettings, read_normals
from kka.errors import UserError, run_script
from kka.files import check_writable, read_json, user_path, write_json
from kka.language_models import (
    DEFAULT_MODEL,
    LanguageModelSettings,
    check_adapter,
    load_language_model,
)
from kka.metrics import mean_interval
from kka.pairs import Pairs, PairSettings, read_pairs
from kka.settings import build_parser, make_settings, option

REPEATED = ("duplicate", "near duplicate", "copy of an example")  # valid, but nothing new

log = logging.getLogger("dpo_test")


@dataclass(frozen=True)
class Settings:
    """What to ask and what to compare with."""

    prompt: str | None = option(None, "prompt; None: that of --pairs")
    pairs: str | None = option(None, "pairs.json; its captions do not count as new")
    n: int = option(50, "answers of each LLM")
    seed: int = option(0, "of the samples")
    normals: tuple[str, ...] = option((), "caption lists (JSON) of normal images; none: the data set's")
    dataset_name: str | None = option(None, "data set whose normal captions are taken")
    data_path: str | None = option(None, "its folder; None: data/<name>")
    normal_class: tuple[int, ...] = option((), "its folders taken as normal; none: the data set's own")
    out: str | None = option(None, "JSON file to write; None: dpo_test.json beside the adapter's weights")


def main() -> None:
    """Parse the flags, sample both LLMs, compare, write."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    parser = build_parser("Compare the tuned LLM with the untuned one.", Settings, LanguageModelSettings)
    flags = vars(parser.parse_args())
    settings, llm = make_settings(Settings, flags), make_settings(LanguageModelSettings, flags)
    if llm.adapter is None or settings.n < 1:
        raise UserError("--adapter DIR and --n of at least 1 are needed; see --help")
    pairs = read_pairs(Path(settings.pairs), PairSettings(min_pairs=1), 0) if settings.pairs else None
    prompt = settings.prompt or (pairs.prompt if pairs else None)
    if prompt is None:
        raise UserError("--prompt TEXT or --pairs FILE is needed; see --help")
    out = user_path(settings.out or Path(llm.adapter) / "dpo_test.json")
    check_writable(out, "--out")
    normals = normal_captions(settings)
    answers = {}
    if llm.backend == "transformers":  # a wrong adapter is named before a large model is loaded for nothing
        check_adapter(Path(llm.adapter), llm.model or DEFAULT_MODEL["transformers"])
    for name, each in (("untuned", replace(llm, adapter=None)), ("tuned", llm)):
        answers[name] = load_language_model(each).complete(prompt, settings.n, settings.seed)
    report = compare(answers, normals, known_captions(pairs))
    print(table(report))
    asked = {"prompt": prompt, "n": settings.n, "seed": settings.seed, "llm": asdict(llm)}
    write_json(out, {**asked, **report}, indent=1)
    log.info("written to %s", out)


def normal_captions(settings: Settings) -> list[str]:
    """Captions of normal images from files, or from the training normals of the data set."""
    if settings.normal_class and (settings.normals or not settings.dataset_name):
        raise UserError(
            "--normal_class needs --dataset_name and no --normals: it names folders of a data set"
        )
    captions: list[Any] = []
    for path in settings.normals:
        value = read_json(Path(path))
        captions += value if isinstance(value, list) else [value]
    if not settings.normals and settings.dataset_name:
        spec, s = get_spec(settings.dataset_name), settings
        chosen = CaptionSettings(spec.name, data_path=s.data_path, normal_class=s.normal_class)
        captions = [caption for block in read_normals(chosen, spec).captions for caption in block]
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise UserError(
            "there are no captions of normal images to compare with; give lists of strings with --normals, "
            "or --dataset_name of a data set that has captions"
        )
    return captions


def known_captions(pairs: Pairs | None) -> list[str]:
    """All captions of the pairs."""
    rows = [*pairs.train, *pairs.validation] if pairs else []
    return sorted({row[side] for row in rows for side in ("chosen", "rejected")})


def compare(answers: dict[str, list[str]], normals: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    """What became of the answers of each LLM, and how near their new captions come to the normal ones.

    `similarity` is the TF-IDF cosine to the nearest normal caption, 0 to 1, as mean and half width of its
    95 % interval; `nearer` counts captions above the untuned mean.
    """
    report: dict[str, Any] = {}
    captions = {}
    for name, texts in answers.items():
        cleaner = Cleaner(normals, known=known)
        captions[name] = [caption for text in texts for caption in cleaner.clean(text)]
        n_valid = len(captions[name]) + sum(cleaner.rejected[reason] for reason in REPEATED)
        report[name] = {
            "answers": len(texts),
            "valid": n_valid,
            "new": len(captions[name]),
            "rejected": dict(cleaner.rejected),
        }
    values = similarities(captions, normals)
    mean_before = float(np.mean(values["untuned"])) if len(values["untuned"]) else None
    for name, value in values.items():
        mean, half = mean_interval(value) if len(value) else (None, None)
        nearer = None if mean_before is None else int((value > mean_before).sum())
        report[name] |= {"similarity": mean, "interval95": half, "nearer": nearer, "captions": captions[name]}
    return {**report, "difference": difference(values["untuned"], values["tuned"])}


def similarities(captions: dict[str, list[str]], normals: Sequence[str]) -> dict[str, np.ndarray]:
    """TF-IDF cosine of each caption to the nearest normal one, (N,) for each LLM."""
    vectorizer = TfidfVectorizer(token_pattern=r"\w+").fit([*normals, *itertools.chain(*captions.values())])
    reference = vectorizer.transform(normals).T
    values = {name: np.zeros(0) for name in captions}
    for name, texts in captions.items():
        if texts:
            values[name] = (vectorizer.transform(texts) @ reference).max(axis=1).toarray().ravel()
    return values


def difference(before: np.ndarray, after: np.ndarray) -> dict[str, float] | None:
    """Mean similarity after less before with Welch's 95 % interval; None for too few or constant values."""
    if min(len(before), len(after)) < 2 or before.var() + after.var() == 0:
        return None
    interval = scipy.stats.ttest_ind(after, before, equal_var=False).confidence_interval(0.95)
    return {
        "mean": float(after.mean() - before.mean()),
        "low": float(interval.low),
        "high": float(interval.high),
    }


def table(report: dict[str, Any]) -> str:
    """The comparison for people."""
    lines = [f"{'':28}{'untuned':>18}{'tuned':>18}"]
    for label, key in (("answers", "answers"), ("valid captions", "valid"), ("new ones", "new")):
        lines.append(f"{label:28}{report['untuned'][key]:18}{report['tuned'][key]:18}")
    nearer = [report[name]["nearer"] for name in ("untuned", "tuned")]
    lines.append(f"{'nearer than untuned mean':28}{nearer[0]!s:>18}{nearer[1]!s:>18}")
    cells = [_cell(report[name]["similarity"], report[name]["interval95"]) for name in ("untuned", "tuned")]
    lines.append(f"{'similarity to normal':28}{cells[0]:>18}{cells[1]:>18}")
    if report["difference"]:
        d = report["difference"]
        lines.append(f"difference {d['mean']:+.3f}, 95 % interval {d['low']:+.3f} to {d['high']:+.3f}")
    return "\n".join(lines)


def _cell(mean: float | None, half: float | None) -> str:
    if mean is None:
        return "n/a"
    return f"{mean:.3f}" + (f" ± {half:.3f}" if half is not None else "")


if __name__ == "__main__":
    run_script(main)
