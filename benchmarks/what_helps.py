"""Which anomalies help the garden's detector? One round of Algorithm 1, taken apart.

    python benchmarks/what_helps.py                              # the garden draws: every picture is right
    python benchmarks/what_helps.py --drawer DIR --reader DIR    # a Stable Diffusion draws

A base set of anomalies and a pool of further ones come from the untuned LLM. A Deep SAD trained on the base
set says which of the pool are hard, Eq. (6). Then others, which share no seed with it, are trained on the
base set with some of the pool added, or in the place of random ones, chosen in different ways. Trainings that
are done stay in the folder and are not repeated.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deep_sad import processor, table
from tqdm import tqdm

from kka.attributes import label, load_reader, read, to_tensor
from kka.data import Data, build_train_set, digest_task, load_data
from kka.datasets.garden import NORMAL, SPEC, SPECIES, TEMPLATES, shared_attributes
from kka.datasets.images import read_image
from kka.datasets.sources import data_root
from kka.datasets.task import Choice, read_task
from kka.describe import CaptionSettings, ask_for_captions
from kka.detectors.deep_sad import DeepSAD, DeepSADSettings
from kka.draw import draw_captions, read_captions
from kka.drawers import DrawerSettings, build_drawer
from kka.errors import run_script
from kka.files import read_json, write_bytes, write_json
from kka.hardness import RULES, Pool, some
from kka.language_models import LanguageModelSettings
from kka.metrics import auroc, format_interval
from kka.options import ExperimentSettings
from kka.runs import ROOT, git_commit
from kka.seeds import derive_seed
from kka.settings import build_parser, make_settings, option
from kka.split import hardness_threshold

log = logging.getLogger("what_helps")


@dataclass(frozen=True)
class HelpSettings:
    """Options of the study."""

    draws: int = option(5, "base sets and pools, each of other captions and pictures")
    evaluators: int = option(3, "detectors trained on each set")
    n_base: int = option(100, "anomalies of the base set")
    n_pool: int = option(400, "further ones to choose from")
    n_chosen: int = option(60, "of these, at most, that are added")
    n_epochs: int = option(50, "training epochs")
    lr: float = option(3e-4, "learning rate, a tenth of it in the last quarter of the epochs")
    precision: str = option("float32", "of the training steps", ("float32", "bfloat16"))
    drawer: str | None = option(None, "folder of a Stable Diffusion; None: the garden draws")
    reader: str | None = option(None, "folder of the reader of attributes, for the last rows")
    rows: tuple[str, ...] = option((), "names of the rows to make; none: all")
    num_threads: int = option(0, "threads of PyTorch; 0: its default")
    folder: str = option(str(ROOT / "log" / "what_helps"), "folder of images and finished trainings")
    out: str = option(str(Path(__file__).parent / "results" / "what_helps"), "table without suffix")


@dataclass(frozen=True)
class GardenPool(Pool):
    """Fresh anomalies, none of which a detector was trained on; the first axis is the image."""

    shared: np.ndarray
    """(N,) attributes in which the caption agrees with the normal flower"""
    follows: np.ndarray
    """(N,) whether the reader sees in the picture all that the caption says"""


Chooser = Callable[[GardenPool, np.random.Generator, int], np.ndarray]


def rule(name: str) -> Chooser:
    """One of the rules of kka.hardness."""
    return lambda pool, rng, n: RULES[name](pool, n, 1, rng)


# Name of a row: (how the new anomalies are chosen, whether they replace random ones of the base set).
ROWS: dict[str, tuple[Chooser, bool]] = {
    "base set": (lambda pool, rng, n: np.zeros(0, int), False),
    "add random": (rule("random"), False),
    "add hard": (rule("hard"), False),
    "add hardest": (rule("hardest"), False),
    "add semi-hard": (rule("semi-hard"), False),
    "add near": (lambda pool, rng, n: some(pool.shared >= 2, n, rng), False),
    "add far": (lambda pool, rng, n: some(pool.shared == 0, n, rng), False),
    "replace by random": (rule("random"), True),
    "replace by hard": (rule("hard"), True),
    "add hard that follow": (lambda pool, rng, n: some(pool.hard & pool.follows, n, rng), False),
    "add hard that do not": (lambda pool, rng, n: some(pool.hard & ~pool.follows, n, rng), False),
}
NEED_READER = ("add hard that follow", "add hard that do not")


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    torch.set_flush_denormal(True)
    s = make_settings(HelpSettings, vars(build_parser("Which anomalies help?", HelpSettings).parse_args()))
    if s.num_threads:
        torch.set_num_threads(s.num_threads)
    rows = [name for name in ROWS if name in (s.rows or ROWS) and (s.reader or name not in NEED_READER)]
    draws = [study(draw, rows, s) for draw in range(s.draws)]
    flags = ("n_base", "n_pool", "n_chosen", "n_epochs", "lr", "precision", "evaluators")
    report = {
        "flags": {name: getattr(s, name) for name in flags},
        "drawer": "diffusers" if s.drawer else "garden",
        "processor": processor(),
        "git_commit": git_commit(),
        "draws": draws,
    }
    write_json(Path(f"{s.out}.json"), report, indent=1)
    write_bytes(Path(f"{s.out}.md"), to_markdown(report, rows).encode())
    print(to_markdown(report, rows))


def study(draw: int, rows: list[str], s: HelpSettings) -> dict[str, Any]:
    """All rows on one base set and pool; under "aucs" three AUCs of each detector, see `test`."""
    folder = Path(s.folder) / f"{'diffusion' if s.drawer else 'garden'}_{draw}"
    data = load(folder, draw, s)
    pool = judge(data, folder, draw, s)
    finished = folder / f"aucs_{s.n_base}_{s.n_chosen}_{s.n_epochs}_{s.lr}_{s.precision}.json"
    result: dict[str, Any] = read_json(finished) if finished.exists() else {"aucs": {}, "chosen": {}}
    result |= {"hard": float(pool.hard.mean()), "follows": float(pool.follows.mean())}
    for name in tqdm(rows, desc=f"draw {draw}", unit="row", disable=None):
        if len(result["aucs"].get(name, ())) >= s.evaluators:
            continue
        chosen = choose(name, pool, draw, s)
        result["aucs"][name] = [
            test(train(data, chosen, 1000 * (draw + 1) + k, s), data) for k in range(s.evaluators)
        ]
        result["chosen"][name] = int((chosen >= s.n_base).sum())
        write_json(finished, result)
    return result


def load(folder: Path, draw: int, s: HelpSettings) -> Data:
    """The garden with the base set and, behind it, the pool as generated anomalies."""
    root = data_root(SPEC, None)
    captions, images = folder / "captions.jsonl", folder / "0"
    asked = CaptionSettings(
        dataset_name=SPEC.name, data_path=str(root), n=s.n_base + s.n_pool, out=str(captions),
        seed=derive_seed(draw, "what_helps") % 2**31,
    )  # fmt: skip
    glm = str(ROOT / "src" / "kka" / "garden_models" / "glm")
    ask_for_captions(asked, LanguageModelSettings(model=glm, device="cpu"))
    own = {"model": s.drawer, "preset": "own", "device": "cpu"} if s.drawer else {"backend": "garden"}
    drawer = build_drawer(make_settings(DrawerSettings, own), SPEC)
    draw_captions(drawer, read_captions(captions), images, SPEC, draw, batch_size=40)
    task = read_task(SPEC, root, Choice(anomaly_path=images))
    return load_data(task, digest_task(task), 32, False, 1, False)


def judge(data: Data, folder: Path, draw: int, s: HelpSettings) -> GardenPool:
    """What the evaluator of the base set, the captions and the reader say of the pool."""
    pool = slice(s.n_base, None)
    evaluator = train(data, np.arange(s.n_base), draw, s)
    captions = [texts[0] for texts in data.task.generated.captions][pool]
    pictures = [read_image(path) for path in data.task.generated.paths[pool]]
    named, normal = label(captions), label([TEMPLATES[0].format(**asdict(SPECIES[NORMAL]))])
    follows = torch.ones(len(captions), dtype=torch.bool)
    if s.reader:
        found = read(load_reader(Path(s.reader)), to_tensor(pictures))
        follows = ((found == named) | (named < 0)).all(1)
    images = data.generated.resized[pool]
    return GardenPool(
        evaluator.score(images).numpy(),
        hardness_threshold(evaluator.score(data.normals.resized).numpy()),
        evaluator.embed(images).numpy(),
        (named == normal).sum(1).numpy(),
        follows.numpy(),
    )


def choose(name: str, pool: GardenPool, draw: int, s: HelpSettings) -> np.ndarray:
    """Anomalies that a row of the table is trained on; those of the pool are numbered behind the base's."""
    chooser, replaces = ROWS[name]
    rng = np.random.default_rng(derive_seed(draw, name))
    new = chooser(pool, rng, s.n_chosen)
    base = rng.permutation(s.n_base)[len(new) :] if replaces else np.arange(s.n_base)
    return np.r_[np.sort(base), s.n_base + np.sort(new)]


def train(data: Data, anomalies: np.ndarray, seed: int, s: HelpSettings) -> DeepSAD:
    """A Deep SAD of the normals and these generated anomalies."""
    rows, g = torch.from_numpy(anomalies), data.generated
    normals = build_train_set(data, ExperimentSettings(), seed)[0]
    normals = normals.take(torch.nonzero(normals.targets == 0).squeeze(1))
    settings = DeepSADSettings(
        n_epochs=s.n_epochs, lr=s.lr, lr_milestone=(3 * s.n_epochs // 4,), pretrain=False,
        precision=s.precision,
    )  # fmt: skip
    detector = DeepSAD(settings, derive_seed(seed, "what_helps"))
    detector.fit(normals.append_anomalies(g.images[rows], g.native_sizes[rows], g.resized[rows]))
    return detector


def test(detector: DeepSAD, data: Data) -> list[float | None]:
    """Test AUC on all species, on those that share two or three attributes with the normal, on the others."""
    task, scores = data.task.test, detector.score(data.test.resized).numpy()
    targets = np.array(task.targets)
    shared = np.array([shared_attributes(SPECIES[int(name)], SPECIES[NORMAL]) for name in task.classes])
    parts = [np.ones(len(targets), bool), (targets == 0) | (shared >= 2), (targets == 0) | (shared < 2)]
    return [auroc(targets[part], scores[part]) for part in parts]


def to_markdown(report: dict[str, Any], rows: list[str]) -> str:
    """Means over the draws, each the mean of its detectors, with 95 % t-intervals; differences in pairs."""
    draws, flags = report["draws"], report["flags"]
    aucs = {row: np.array([np.mean(d["aucs"][row], axis=0) for d in draws]) for row in rows}
    against = "add random" if "add random" in rows else rows[0]
    lines = [
        [
            row,
            f"{np.mean([d['chosen'][row] for d in draws]):.0f}",
            *(format_interval(aucs[row][:, k]).partition(" (")[0] for k in range(3)),
            format_interval(aucs[row][:, 0] - aucs[against][:, 0]).partition(" (")[0],
        ]
        for row in rows
    ]
    hard, follows = (format_interval([d[key] for d in draws]) for key in ("hard", "follows"))
    return (
        f"{report['processor']}, commit {report['git_commit']}, drawer: {report['drawer']}; "
        + ", ".join(f"{key} {value}" for key, value in flags.items())
        + f"\n\nHard among the pool: {hard} %. Pictures that follow their captions: {follows} %.\n"
        + table(f"set|new|AUC, %|near species|far species|against {against}", lines)
    )


if __name__ == "__main__":
    run_script(main)
