"""What Algorithm 1 is asked for: its own settings, and those of its parts behind a prefix."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from kka.detectors.frozen import FrozenSettings
from kka.drawers import DrawerSettings
from kka.language_models import LanguageModelSettings
from kka.options import DETECTOR, EVALUATOR, FROZEN, WHO_JUDGES
from kka.pairs import PairSettings
from kka.preference_trainer import TuneSettings
from kka.settings import option, prefixed_flags
from kka.tracking import HELP as REPORT_TO
from kka.update import MODES, PER_ROUND

REPRESENTATIVES, RANDOM = "representatives", "random"
FRESH = "fresh"
# Settings of the parts of a loop by the beginning of their flags.
PREFIXED: dict[str, type[Any]] = {
    "llm": LanguageModelSettings,
    "drawer": DrawerSettings,
    "tune": TuneSettings,
    "pairs": PairSettings,
    EVALUATOR: FrozenSettings,
}


@dataclass(frozen=True)
class LoopSettings:
    """Algorithm 1."""

    dataset_name: str = option(
        "flower", "flower, cifar100 (mycifar), ucm_caption, garden, or folder (also for a class of MVTec AD)"
    )
    data_path: str | None = option(None, "folder of the data set; None: data/<name>, made if it can be")
    xp_path: str | None = option(None, "folder of the loop; None: log/<data set>/<name>")
    name: str | None = option(None, "its name in log/<data set>; None: made from the settings")
    overwrite: bool = option(False, "begin anew: remove the loop that the folder holds, finished or not")
    normal_class: tuple[int, ...] = option((), "folders taken as normal; none: the data set's own")
    mode: str = option("rep", "rep: hard anomalies replace easy ones; add: they are added", MODES)
    rounds: int | None = option(None, "updates; None: 3 for CIFAR-100, else 2 (paper)")
    n_initial: int | None = option(None, "anomalies of round 0; None: 1,000 for CIFAR-100, else 200 (paper)")
    n_fresh: int = option(200, "captions that the tuned LLM writes in each later round")
    per_round: int = option(PER_ROUND, "hard ones of these, at most, that come into the set")
    examples: tuple[str, ...] = option(
        (REPRESENTATIVES,),
        f"captions shown to the LLM: {REPRESENTATIVES} (Eq. 2), {RANDOM}, or captions given here",
    )
    repeats: int | None = option(
        None,
        "times that one caption may come in a round, each as another image; None: 10 for CIFAR-100, else 1",
    )
    n_clusters: int | None = option(None, "K of Eq. (2); None: number of normal folders")
    n_untuned: int = option(
        100, "captions by the untuned LLM, drawn and judged in each round for comparison, never trained on"
    )
    split: str = option(
        "crossfit",
        "who judges the set in Eq. (6): own or crossfit as in main.py, or fresh: each image is judged once, "
        "by the evaluator of the round before it came in, those of round 0 by the one without anomalies",
        ("own", "crossfit", FRESH),
    )
    threshold_quantile: float = option(1.0, "of the normal scores, for Eq. (6); 1 is their maximum")
    n_evaluators: int = option(
        3,
        "detectors trained on each set, seeds from --seed on; the first judges, all count in the table",
    )
    evaluator: str = option(DETECTOR, WHO_JUDGES, (DETECTOR, FROZEN))
    draw_batch: int = option(8, "images drawn at once")
    seed: int = option(0, "of every random draw")
    device: str = option("cuda", "of the detector; without a GPU the CPU is taken")
    report_to: tuple[str, ...] = option((), REPORT_TO)

    @property
    def own_examples(self) -> list[str]:
        """Captions that were given by hand."""
        return [] if self.examples[:1] in ((REPRESENTATIVES,), (RANDOM,)) else list(self.examples)


def flags_of(part: str) -> AbstractContextManager[None]:
    """Within, errors of a part name its flags as this command has them."""
    return prefixed_flags(part, PREFIXED[part])
