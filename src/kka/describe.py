"""Eq. (3): an LLM describes anomalies, shown captions of normal images, until there are as many as wanted.

Two files grow together: <name>.answers.jsonl gets every answer as it came, so that none is asked for twice,
and captions.jsonl the captions that came out of them.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from kka.clean import Cleaner, SimilarTexts
from kka.datasets import garden, get_spec, sources
from kka.datasets.layout import DataSetSpec, Images
from kka.datasets.task import Choice, read_task
from kka.draw import read_captions
from kka.errors import UserError
from kka.files import check_writable, user_path, write_bytes
from kka.language_models import LanguageModel, LanguageModelSettings, load_language_model
from kka.prompts import generation_prompt, prompt_digest
from kka.records import append, appending, read_records
from kka.seeds import derive_seed
from kka.settings import option

PATIENCE = 5  # requests in a row without a new caption, after which the LLM is taken to have no more

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionSettings:
    """Captions of anomalies."""

    dataset_name: str = option(
        "flower", "flower, cifar100 (mycifar), ucm_caption, garden, or folder (also for a class of MVTec AD)"
    )
    data_path: str | None = option(None, "folder of the data set; None: data/<name>, made if it can be")
    normal_class: tuple[int, ...] = option((), "folders taken as normal; none: the data set's own")
    n: int = option(200, "captions wanted")
    out: str = option("captions.jsonl", "file of captions; what it holds is kept, and goes on from there")
    text: str | None = option(None, "also write them here, one per line (the official flower.txt)")
    examples: tuple[str, ...] = option((), "captions to show the LLM; none: of random normal training images")
    run: str | None = option(
        None, "run folder of a detector whose features choose representative ones instead, Eq. (1)-(2)"
    )
    n_examples: int | None = option(None, "how many of those; None: one for each normal folder")
    known: tuple[str, ...] = option((), "captions.jsonl of other rounds, whose captions are not repeated")
    keep_normal_captions: bool = option(False, "keep captions that describe the normal class")
    repeats: int | None = option(
        None,
        "times that one caption may be kept, each for another image; None: 10 for CIFAR-100, whose captions "
        "only name a class, else 1",
    )
    ask: int = option(16, "answers per request to the LLM")
    seed: int = option(0, "of the choice of examples and of sampling")
    round: int = option(0, "round of Algorithm 1, for the record")


@dataclass
class Described:
    """What came of asking."""

    captions: list[str] = field(default_factory=list)
    """at most as many as were wanted"""
    rejected: Counter[str] = field(default_factory=Counter)
    """lines and answers that gave no caption, by reason"""
    requests: int = 0
    """requests answered, now or before an interruption"""

    def reasons(self) -> str:
        """The rejected ones, e.g. "41 duplicate, 3 refusal"."""
        return ", ".join(f"{count} {reason}" for reason, count in self.rejected.most_common()) or "none"


def describe(
    model: LanguageModel,
    prompt: str,
    examples: Sequence[str],
    n: int,
    seed: int,
    path: Path,
    *,
    round: int = 0,
    is_normal: Callable[[str], bool] | None = None,
    known: Iterable[str] = (),
    repeats: int = 1,
    ask: int = 16,
) -> Described:
    """Ask the LLM until there are `n` captions of anomalies, and append them to a file.

    The same call continues an interrupted one, and one with a larger `n` a finished one. Other prompts,
    models, seeds and rounds may share the file; their captions do not come again.

    Args:
        model: who is asked.
        prompt: what is asked, `generation_prompt(spec, examples)`.
        examples: captions in the prompt, not accepted as answers.
        n: captions wanted, at least 1.
        seed: of sampling; request k has a seed of its own.
        path: captions.jsonl.
        round: round of Algorithm 1, for the record.
        is_normal: whether a caption describes the normal class; such are rejected.
        known: captions of other files, not to be repeated.
        repeats: times that one caption is kept.
        ask: answers per request.

    Returns fewer than `n` captions when PATIENCE requests in a row gave no new one.
    Raises UserError if the model cannot go on; what has been answered is kept.
    """
    source: dict[str, Any] = {
        "prompt_sha256": prompt_digest(prompt),
        "llm": model.id,
        "adapter": model.adapter,
    }
    source |= {"seed": seed, "round": round}
    with (
        appending(path, "caption", str) as captions,
        appending(answers_path(path), "answers", list) as answers,
    ):
        collector = _Collector(source, examples, n, captions, path, is_normal, known, repeats)
        described = collector.described
        for record in read_records(answers_path(path), "answers", list):
            if _is_from(source, record) and not collector.full:
                collector.take(record)
        collector.idle %= PATIENCE  # a call that gave up is given another chance
        with tqdm(total=n, initial=len(described.captions), unit="caption", disable=None) as bar:
            while not collector.full and collector.idle < PATIENCE:
                each = derive_seed(seed, "describe", round, described.requests)
                record = {**source, "request": described.requests, **_request(model, prompt, ask, each, path)}
                append(answers, [record])
                bar.update(collector.take(record))
    return described


class _Collector:
    """Cleans the answers of one source and writes their captions."""

    def __init__(
        self,
        source: dict[str, Any],
        examples: Sequence[str],
        n: int,
        file: BinaryIO,
        path: Path,
        is_normal: Callable[[str], bool] | None,
        known: Iterable[str],
        repeats: int,
    ) -> None:
        self.source, self.examples, self.n, self.file = source, list(examples), n, file
        records = read_records(path, "caption", str)
        self.written = Counter(record["caption"] for record in records if _is_from(source, record))
        others = [record["caption"] for record in records if record["caption"] not in self.written]
        self.cleaner = Cleaner(examples, is_normal, [*known, *others], repeats)
        self.described = Described(rejected=self.cleaner.rejected)
        self.idle = 0

    @property
    def full(self) -> bool:
        """Whether there are enough captions."""
        return len(self.described.captions) >= self.n

    def take(self, record: dict[str, Any]) -> int:
        """Write the new captions of a request that are still wanted; returns how many there were."""
        fresh = [caption for answer in record["answers"] for caption in self.cleaner.clean(answer)]
        self.cleaner.rejected.update(record.get("failures", {}))
        fresh = fresh[: self.n - len(self.described.captions)]
        unwritten = []
        for caption in fresh:  # those that an interrupted call has written come first
            self.written[caption] -= 1
            unwritten += [caption] * (self.written[caption] < 0)
        append(self.file, [{"caption": c, **self.source, "examples": self.examples} for c in unwritten])
        self.described.captions += fresh
        self.described.requests += 1
        self.idle = 0 if fresh else self.idle + 1
        return len(fresh)


def _request(model: LanguageModel, prompt: str, ask: int, seed: int, path: Path) -> dict[str, Any]:
    """Answers to one request and what became of the others."""
    before = Counter(model.failures)
    try:
        answers = model.complete(prompt, ask, seed)
    except UserError as error:
        raise UserError(f"{error}; the same command goes on from what {path} holds") from None
    return {"prompt": prompt, "answers": answers, "failures": dict(model.failures - before)}


def write_captions(settings: CaptionSettings, model_settings: LanguageModelSettings) -> Described:
    """create/use_glm4.py: captions of anomalies for a data set.

    Raises UserError for bad input, and if there are fewer captions than wanted once they are written.
    """
    described = ask_for_captions(settings, model_settings)
    if settings.text is not None:
        write_bytes(Path(settings.text), "".join(f"{line}\n" for line in described.captions).encode())
    found, reasons = len(described.captions), described.reasons()
    log.info("%d captions in %s; %d requests; rejected: %s", found, settings.out, described.requests, reasons)
    if found < settings.n:
        raise UserError(
            f"only {found} of {settings.n} captions are in {settings.out}: {PATIENCE} requests in a row gave "
            f"no new one (rejected: {reasons}); raise --temperature, leave out --greedy, "
            "give other --examples, or let captions come again with --repeats"
        )
    return described


def ask_for_captions(settings: CaptionSettings, model_settings: LanguageModelSettings) -> Described:
    """Captions in `settings.out`, fewer than wanted if the LLM has no more. Raises UserError."""
    check_settings(settings)
    spec = get_spec(settings.dataset_name)
    normals = read_normals(settings, spec)
    examples = settings.examples or find_examples(settings, normals, "--n_examples")
    prompt = generation_prompt(spec, examples)
    log.info("%s", prompt)
    is_normal = normal_test(spec, normals, settings.normal_class or spec.normal_classes)
    known = [record["caption"] for path in settings.known for record in read_captions(Path(path), "--known")]
    return describe(
        load_language_model(model_settings),
        prompt,
        examples,
        settings.n,
        settings.seed,
        Path(settings.out),
        round=settings.round,
        is_normal=None if settings.keep_normal_captions else is_normal,
        known=known,
        repeats=settings.repeats or spec.caption_repeats,
        ask=settings.ask,
    )


def find_examples(settings: CaptionSettings, normals: Images, flag: str = "--n_clusters") -> list[str]:
    """Captions of representative normal images (Eq. 1-2) with --run, of random ones without.

    `flag` gave their number, for messages.
    """
    n = settings.n_examples or max(1, len(set(normals.classes)))
    if settings.run is None:
        return choose_examples(normals.captions, n, settings.seed)
    from kka.evaluator import judging_run
    from kka.represent import representatives

    chosen = representatives(judging_run(user_path(settings.run)), normals, n, settings.seed, flag)
    return choose_examples([normals.captions[i] for i in chosen], n, settings.seed)


def check_settings(settings: CaptionSettings) -> None:
    """Raises UserError naming the first flag that makes no sense."""
    for name in ("n", "ask", "n_examples", "repeats"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, it is {value}")
    for name in ("seed", "round"):
        if getattr(settings, name) < 0:
            raise UserError(f"--{name} must be at least 0, it is {getattr(settings, name)}")
    if not all(map(str.strip, settings.examples)):
        raise UserError("one of --examples is empty")
    if Path(settings.out).suffix != ".jsonl":
        raise UserError(f"--out {settings.out} must end in .jsonl; --text writes plain lines")
    if settings.text is not None:
        check_writable(Path(settings.text), "--text")


def read_normals(settings: CaptionSettings, spec: DataSetSpec) -> Images:
    """Normal training images; none if there are --examples and no data set on this machine."""
    if settings.normal_class and not spec.normal_classes:
        raise UserError(
            f"--normal_class does not go with --dataset_name {spec.name}, which has no numbered classes"
        )
    if settings.examples and settings.data_path is None and not sources.is_here(spec):
        log.warning("%s is not here: only the examples tell what a normal caption is", spec.title)
        return Images()
    root = sources.data_root(spec, settings.data_path)
    folders = {0: list(settings.normal_class or spec.normal_classes), 1: []}
    return read_task(spec, root, Choice(user_dict=folders, n_anomalies=0)).normals


def choose_examples(captions: Sequence[Sequence[str]], n: int, seed: int) -> list[str]:
    """A random caption of each of `n` random images, all different; fewer if there are not so many.

    The paper's introduction does it so; Eq. (2) chooses representatives instead.
    """
    rng = np.random.default_rng(derive_seed(seed, "examples"))
    chosen: list[str] = []
    for i in rng.permutation(len(captions)):
        block = [caption for caption in captions[i] if caption.strip() and caption not in chosen]
        if block and len(chosen) < n:
            chosen.append(block[rng.integers(len(block))])
    return chosen


def normal_test(spec: DataSetSpec, normals: Images, classes: Sequence[int]) -> Callable[[str], bool]:
    """Whether a caption describes the normal class: it is near one of a normal image.

    In the garden, where captions can be read, so does one that names all attributes of a normal species.
    """
    texts = SimilarTexts(caption for block in normals.captions for caption in block)
    species = [asdict(garden.SPECIES[i]) for i in classes] if spec.name == garden.SPEC.name else []
    return lambda caption: (
        texts.has_near(caption) or (bool(species) and garden.parse_caption(caption) in species)
    )


def answers_path(path: Path) -> Path:
    """Where the answers behind a file of captions are."""
    return path.with_suffix(".answers.jsonl")


def _is_from(source: dict[str, Any], record: dict[str, Any]) -> bool:
    return all(record.get(key) == value for key, value in source.items())
