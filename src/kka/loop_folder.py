"""The folder of a loop, and the table at its end."""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kka.detectors import detector_name
from kka.drawers import Bank, Drawer, build_drawer, check_drawer
from kka.errors import UserError
from kka.figures.charts import score_unit
from kka.figures.images import Row, Shown
from kka.files import read_json, sha256, user_path, write_bytes, write_json
from kka.language_models import load_language_model
from kka.loop import DESCRIBED, TIMES, Loop
from kka.loop_settings import RANDOM, REPRESENTATIVES, flags_of
from kka.metrics import format_interval
from kka.networks.backbones import content_of_weights
from kka.pairs import check_pair_settings
from kka.picture import draw_loop, split_rows
from kka.preference_trainer import WEIGHTS, check_continuable
from kka.preference_trainer import check_settings as check_tuning
from kka.prompts import generation_prompt
from kka.runs import CONFIG, RESULTS, ROOT, claim, fingerprint, locked, write_config

# Settings of a loop that decide where or how fast it runs, not its numbers.
PLACE = frozenset(
    {
        "data_path",
        "xp_path",
        "name",
        "overwrite",
        "device",
        "llm_device",
        "drawer_device",
        "draw_batch",
        "report_to",
        "tune_report_to",
    }
)

log = logging.getLogger(__name__)


def identity_of(loop: Loop) -> dict[str, Any]:
    """All that decides the numbers: settings, and weights by their content."""
    settings = describe_settings(loop) | content_of_weights(loop.detector)
    evaluator = content_of_weights(loop.evaluator)
    settings |= {f"evaluator_{key}": value for key, value in evaluator.items()}
    if not loop.settings.own_examples:
        settings["examples"] = loop.settings.examples[0]  # as before captions could be given: loops go on
    if settings["repeats"] is None:
        del settings["repeats"]  # as before captions could come again
    adapter = user_path(loop.llm.adapter or "") / WEIGHTS
    if adapter.is_file():
        settings["llm_adapter"] = sha256(adapter)
    return {key: value for key, value in settings.items() if key not in PLACE and not key.endswith("_device")}


def describe_settings(loop: Loop) -> dict[str, Any]:
    """All settings of a loop as JSON values, for its config.json."""
    prefixed: dict[str, Any] = {"detector": detector_name(loop.detector)}
    parts: dict[str, Any] = {"llm": loop.llm, "drawer": loop.drawer, "tune": loop.tuning, "pairs": loop.pairs}
    if loop.evaluator:
        parts["evaluator"] = loop.evaluator
    for name, part in parts.items():
        prefixed |= {f"{name}_{key}": value for key, value in asdict(part).items()}
    return {**asdict(loop.settings), **asdict(loop.detector), **prefixed}


def default_folder(loop: Loop) -> Path:
    """log/<data set>/<name>, where the name says mode and seed and holds a hash of the settings."""
    s = loop.settings
    digest = fingerprint(identity_of(loop))[:6]
    return ROOT / "log" / loop.spec.name / (s.name or f"kka_{s.mode}_seed{s.seed}_{digest}")


@contextmanager
def opened(loop: Loop) -> Iterator[None]:
    """Hold the loop's folder; raises UserError if it belongs to other settings or another process has it."""
    settings = describe_settings(loop)
    with locked(loop.folder):
        claim(loop.folder, identity_of(loop), loop.settings.overwrite)
        write_config(loop.folder, identity_of(loop), settings)
        yield


def write_table(loop: Loop, rows: list[dict[str, Any]]) -> str:
    """Write table.md of the rounds so far: a loop that ends early has it, too. Returns the table."""
    table = to_table(read_json(loop.folder / "none.json"), rows)
    write_bytes(loop.folder / "table.md", table.encode())
    return table


def report_loop(loop: Loop, rows: list[dict[str, Any]]) -> str:
    """Write results.json, table.md and, where matplotlib is installed, loop.png; return the table."""
    none = read_json(loop.folder / "none.json")
    results = {"none": none, "rounds": rows, "seconds_beside": seconds_beside(loop.folder)}
    write_json(loop.folder / RESULTS, results, indent=1)
    table = write_table(loop, rows)
    try:
        picture(loop)
    except UserError as error:
        log.warning("no picture: %s", error)
    return table


def seconds_beside(folder: Path) -> float:
    """What a loop took besides its rounds: detectors without anomalies, images of the untuned LLM."""
    files = [path for path in (folder / TIMES, folder / "untuned" / TIMES) if path.exists()]
    return sum(seconds for path in files for seconds in read_json(path).values())


def picture(loop: Loop) -> None:
    """Write loop.png: the anomalies of each round, and the scores without them and after the last round."""
    last = loop.n_rounds
    rows: list[Row] = [("normal\n(training)", [Shown(path) for path in loop.normals.paths])]
    for k in range(last + 1):
        rows += split_rows(loop.place(k, "fresh" if k else "0"), f"round {k}")
    runs = {"no anomalies": loop.folder / "none", f"KKA({last})": loop.place(last, "detector")}
    draw_loop(
        loop.folder / "loop.png",
        rows,
        [(name, read_json(run / RESULTS)) for name, run in runs.items()],
        score_unit(detector_name(loop.detector)),
    )


def to_table(none: Sequence[float | None], rows: Sequence[Mapping[str, Any]]) -> str:
    """`to_cells` as a markdown table."""
    head, *lines = to_cells(none, rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines]) + "\n"


def to_cells(none: Sequence[float | None], rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A head, a line without anomalies, then one per round; AUCs are means over evaluators.

    In round 0 the share of hard anomalies is that of the set, later that of the fresh images, each judged by
    an evaluator that has not seen it, beside that of fresh images of the untuned LLM.
    """
    stages = ("describe", "draw", "tune", "build", "detect")
    head = [
        "",
        "fresh captions",
        "hard",
        "hard, untuned LLM",
        "set",
        "DPO margin",
        "test AUC",
        *(f"{s}, s" for s in stages),
    ]
    lines = [head, ["none", "", "", "", "0", "", _mean(none), *[""] * len(stages)]]
    for row in rows:
        margin = "" if row["margin"] is None else f"{row['margin']:+z.3f}"
        seconds = [f"{row['seconds'].get(stage, 0):.0f}" for stage in stages]
        cells = [
            f"KKA({row['round']})",
            str(row["captions"]),
            _percent(row["hard"]),
            "" if row["hard_untuned"] is None else _percent(row["hard_untuned"]),
            str(row["size"]),
            margin,
        ]
        lines.append([*cells, _mean(row["test_aucs"]), *seconds])
    return lines


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _mean(aucs: Sequence[float | None]) -> str:
    known = [auc for auc in aucs if auc is not None]
    return format_interval(known, unit=" %") if known else "n/a"


# What the mode of a loop does not change: the part without anomalies, round 0, and in round 1 the tuned LLM
# and its images.
COMMON = ("none*", "untuned", "round_0", TIMES)
COMMON_NEXT = ("captions*", DESCRIBED, "fresh", "adapter")


def share_common(done: Path, folder: Path, mode: str) -> None:
    """Give the loop in `folder` what the finished one of another mode has and the mode does not change."""
    config = read_json(done / CONFIG)
    config["identity"]["mode"] = mode
    write_json(folder / CONFIG, config, indent=2)  # first, as a folder of files without it is nobody's
    for pattern, part in [*((p, "") for p in COMMON), *((p, "round_1") for p in COMMON_NEXT)]:
        for path in (done / part).glob(pattern):
            target = folder / path.relative_to(done)
            partial = target.with_name(f".{target.name}.partial")
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(partial, ignore_errors=True)
                (shutil.copytree if path.is_dir() else shutil.copy)(path, partial)
                os.replace(partial, target)


def check_loop(loop: Loop) -> None:
    """Raises UserError naming the flag of the first setting that makes no sense."""
    s = loop.settings
    for name in ("n_fresh", "n_initial", "n_untuned", "repeats", "n_clusters", "n_evaluators", "draw_batch"):
        if (getattr(s, name) or 1) < 1 or getattr(s, name) == 0:
            raise UserError(f"--{name} must be at least 1, it is {getattr(s, name)}")
    if loop.n_rounds < 0 or s.per_round < 0 or s.seed < 0:
        raise UserError("--rounds, --per_round and --seed must not be negative")
    if not 0 < s.threshold_quantile <= 1:
        raise UserError(f"--threshold_quantile must lie in (0, 1], it is {s.threshold_quantile}")
    own = s.own_examples
    if not s.examples or not all(map(str.strip, own)):
        raise UserError("one of --examples is empty")
    if len(own) == 1 and " " not in own[0].strip():
        raise UserError(
            f"--examples {own[0]} is neither {REPRESENTATIVES} nor {RANDOM}, nor a caption of several words"
        )
    if loop.n_rounds and loop.llm.backend != "transformers":
        raise UserError("a tuned LLM needs --llm_backend transformers; with a server give --rounds 0")


def check_parts(loop: Loop) -> None:
    """The same for LLM, drawer and tuning, as far as it can be told without loading a large model.

    So a loop does not train for an hour before it finds that something is missing.
    """
    s, normals = loop.settings, loop.normals
    if not s.own_examples:
        generation_prompt(loop.spec, [caption for texts in normals.captions for caption in texts])
    if (s.n_clusters or 0) > len(normals):
        raise UserError(
            f"--n_clusters {s.n_clusters} is more than the {len(normals)} normal images; lower it"
        )
    with flags_of("llm"):
        load_language_model(loop.llm)  # its tokenizer, not yet its weights
        if loop.llm.adapter and loop.n_rounds:
            check_continuable(user_path(loop.llm.adapter), loop.llm_name)
    with flags_of("drawer"):
        check_drawer(loop.drawer)
        if loop.drawer.backend != "diffusers":
            _check_bank(loop, build_drawer(loop.own_drawer, loop.spec))
    with flags_of("tune"):
        check_tuning(loop.tuning)
    with flags_of("pairs"):
        check_pair_settings(loop.pairs)


def _check_bank(loop: Loop, drawer: Drawer) -> None:
    """A bank gives each image once, so all rounds must find enough of them."""
    s = loop.settings
    wanted = loop.n_initial + (s.n_untuned + loop.n_rounds * s.n_fresh if loop.n_rounds else 0)
    if isinstance(drawer, Bank) and len(drawer.paths) < wanted:
        raise UserError(
            f"--bank {drawer.root} has {len(drawer.paths)} images, and the loop asks for {wanted}; give a "
            "larger one, or lower --n_initial, --n_untuned, --n_fresh or --rounds"
        )
