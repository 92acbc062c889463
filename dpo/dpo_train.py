"""Tune the LLM to prefer captions of hard anomalies (Eq. 7): a LoRA adapter by DPO.

python dpo/dpo_train.py --run log/flower/NAME --out adapter_1
python dpo/dpo_train.py --run log/flower/NAME --out adapter_2 --adapter adapter_1     # the next round
python dpo/dpo_train.py --pairs pairs.json --model PATH --out adapter
accelerate launch dpo/dpo_train.py ...                                                # several GPUs
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kka.datasets import get_spec
from kka.datasets.layout import ANOMALY_FOLDER
from kka.errors import UserError, run_script
from kka.evaluator import judging_run
from kka.files import read_json, user_path
from kka.language_models import DEFAULT_MODEL
from kka.pairs import Pairs, PairSettings, build_pairs, read_pairs
from kka.preference_trainer import TuneSettings
from kka.results import HARD
from kka.runs import CONFIG, ROOT
from kka.settings import build_parser, make_settings, option
from kka.tune import tune

# A file of pairs has prompts and captions of its own.
ONLY_WITH_RUN = ("anomaly_path", "dataset_name", "prompt", "pairs_per_hard")
ONLY_WITH_PAIRS = ("validation_pairs",)

log = logging.getLogger("dpo_train")


@dataclass(frozen=True)
class Settings:
    """LLM, preference pairs and folders."""

    model: str = option(DEFAULT_MODEL["transformers"], "folder or hub id of the LLM")
    adapter: str | None = option(None, "adapter of the round before, to continue; None: a new one")
    out: str | None = option(None, "folder of the adapter to write")
    overwrite: bool = option(False, "begin anew: remove the adapter that --out holds, finished or not")
    run: str | None = option(None, "run folder of a detector that has split the generated anomalies")
    anomaly_path: str | None = option(
        None, "folder of these anomalies; None: the one in the run's config.json"
    )
    dataset_name: str | None = option(
        None, "data set, for the prompt; None: the one in the run's config.json"
    )
    prompt: str | None = option(None, "prompt of the captions; None: read from the manifest of the anomalies")
    pairs: str | None = option(
        None, "pairs.json, or a list as the official training_data.json, without --run"
    )
    validation_pairs: str | None = option(None, "a second such list; None: a part of the first is held out")


def main() -> None:
    """Parse the flags, make or read the pairs, tune."""
    is_first = int(os.environ.get("RANK", 0)) == 0
    logging.basicConfig(format="%(message)s", level=logging.INFO if is_first else logging.ERROR)
    parser = build_parser("Tune the LLM to prefer hard anomalies.", Settings, PairSettings, TuneSettings)
    flags = vars(parser.parse_args())
    settings, tune_settings = make_settings(Settings, flags), make_settings(TuneSettings, flags)
    if not settings.out or bool(settings.run) == bool(settings.pairs):
        raise UserError("--out DIR and either --run DIR or --pairs FILE are needed; see --help")
    check_source(settings, flags)
    pairs = load_pairs(settings, make_settings(PairSettings, flags), tune_settings.seed)
    log.info("pairs: %s", ", ".join(f"{key} {n}" for key, n in pairs.counts.items()))
    adapter = user_path(settings.adapter) if settings.adapter else None
    out = user_path(settings.out)
    report(out, tune(settings.model, pairs, out, tune_settings, adapter, settings.overwrite))


def check_source(settings: Settings, flags: Mapping[str, Any]) -> None:
    """Raises UserError for a --run without a split, and for flags without effect on the chosen source."""
    source, idle = ("pairs", ONLY_WITH_RUN) if settings.pairs else ("run", ONLY_WITH_PAIRS)
    for name in idle:
        if name in flags:
            raise UserError(f"--{name} has no effect on the pairs of --{source}; leave it out")
    if settings.run and not ((run := judging_run(user_path(settings.run))) / HARD).is_file():
        raise UserError(
            f"--run {run} is no finished run ({HARD} is missing); give the folder of one that has "
            "split generated anomalies, by src/main.py"
        )


def load_pairs(settings: Settings, pair_settings: PairSettings, seed: int) -> Pairs:
    """The pairs of a file or of a run."""
    if settings.pairs:
        held = Path(settings.validation_pairs) if settings.validation_pairs else None
        return read_pairs(Path(settings.pairs), pair_settings, seed, held)
    run = judging_run(user_path(settings.run or ""))
    name, folder = settings.dataset_name, settings.anomaly_path and Path(settings.anomaly_path)
    if (run / CONFIG).exists():
        recorded = read_json(run / CONFIG)["settings"]
        name = name or recorded["dataset_name"]
        folder = folder or recorded_folder(recorded, get_spec(name).name)
    spec = get_spec(name) if name else None
    return build_pairs(run, folder or None, pair_settings, seed, settings.prompt, spec)


def recorded_folder(recorded: dict[str, Any], name: str) -> Path:
    """The anomaly folder that a run used, from its settings."""
    data_path = recorded["data_path"] or ROOT / "data" / name
    return Path(recorded["anomaly_path"] or Path(data_path) / str(ANOMALY_FOLDER)).expanduser()


def report(out: Path, results: dict[str, Any]) -> None:
    """Say what came of it."""
    log.info("%d pairs, %d steps, %.0f s: %s", *(results[k] for k in ("n_train", "steps", "seconds")), out)
    if results["n_validation"]:
        log.info(
            "%d held-out pairs: reward margin %.4f to %.4f, accuracy %.2f to %.2f",
            results["n_validation"],
            *(results[f"{name}_{when}"] for name in ("margin", "accuracy") for when in ("before", "after")),
        )
    else:
        log.warning("too few captions to hold any out, so there is no margin on unseen pairs")


if __name__ == "__main__":
    run_script(main)
