"""Eq. (7): tune the LLM by DPO to prefer captions of hard anomalies, as a LoRA adapter.

trl's trainer does the work (preference_trainer.py); `dpo_loss` is the equation itself, against which the
tests check it.
"""

import contextlib
import gc
import json
import logging
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kka.errors import TrainingError, UserError
from kka.files import read_json, sha256, write_bytes, write_json
from kka.language_models import load_pretrained
from kka.pairs import Pairs, write_pairs
from kka.preference_trainer import (
    CARD,
    WEIGHTS,
    TuneSettings,
    build_trainer,
    check_continuable,
    check_settings,
    prepare_rows,
    trainer_config,
)
from kka.runs import CONFIG, RESULTS, claim, compare, fingerprint, locked, write_config
from kka.tracking import Tracker

RECORD = "tuning"  # apart from the adapter, as transformers takes a config.json for a model's
METRICS, CHECKPOINTS, PAIRS = "metrics.jsonl", "checkpoints", "pairs.json"
PLACE = frozenset(
    {"device", "gradient_checkpointing", "save_every", "report_to"}
)  # settings that decide no number
FIGURES = {"loss": "eval_loss", "margin": "eval_rewards/margins", "accuracy": "eval_rewards/accuracies"}

log = logging.getLogger(__name__)


# Eq. (7)
def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """-E log sigmoid(beta log[p'(x_ha)/p(x_ha)] - beta log[p'(x_ea)/p(x_ea)]), given the prompt.

    Args:
        policy_chosen: (N,) log-probabilities of hard captions under the tuned LLM p', summed over tokens.
        policy_rejected: (N,) the same of easy captions.
        reference_chosen: (N,) of the hard captions under the reference p.
        reference_rejected: (N,) of the easy captions under the reference p.
        beta: > 0.
    """
    hard = policy_chosen - reference_chosen
    easy = policy_rejected - reference_rejected
    return -F.logsigmoid(beta * hard - beta * easy).mean()


def tune(
    model: str,
    pairs: Pairs,
    out: Path,
    settings: TuneSettings,
    adapter: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Tune an LLM on preference pairs and save its adapter in `out`; an interrupted call is continued.

    Args:
        model: folder or hub id of the LLM.
        pairs: see `kka.pairs`.
        out: gets the adapter and, in tuning/, metrics.jsonl, pairs.json, config.json and last results.json.
        settings: hyperparameters.
        adapter: the adapter of the round before, to continue; None: a new one.
        overwrite: replace what other settings left in `out`.

    Returns results.json: steps, seconds, numbers of pairs, and loss, reward margin and accuracy on the
    validation pairs before and after. Raises UserError for bad input, before the LLM is loaded wherever it
    can be told, and TrainingError if a number is not finite. Every process of `accelerate launch` calls it.
    """
    check_settings(settings)
    check_out(out, adapter)
    with _calm_libraries():
        if adapter is not None:
            check_continuable(adapter, model)
        try:
            results = _tune(model, pairs, out, settings, adapter, overwrite)
        except torch.OutOfMemoryError:
            raise UserError(
                f"the memory of the GPU is too small for {model}; lower --batch_size and raise "
                "--accumulation, or give --four_bit"
            ) from None
    gc.collect()  # the parts of a trainer refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return results


def _tune(
    model: str, pairs: Pairs, out: Path, settings: TuneSettings, adapter: Path | None, overwrite: bool
) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer, model)
    train, validation, n_long = prepare_rows(pairs, tokenizer, settings)
    record = out / RECORD
    config = trainer_config(record / CHECKPOINTS, settings, evaluate=bool(validation))
    is_first = config.process_index == 0
    identity = _identity(model, pairs, settings, adapter, config.world_size)
    with locked(record) if is_first else contextlib.nullcontext():
        with config.main_process_first(local=False):
            if is_first and not overwrite:
                _refuse_other_settings(record, identity)
            finished = claim(record, identity, overwrite) if is_first else (record / RESULTS).exists()
        if finished:
            log.info("%s is finished; give --overwrite to repeat it", out)
            return read_json(record / RESULTS)
        if is_first:
            write_config(record, identity, asdict(settings))
        began = time.monotonic()
        trainer = build_trainer(model, tokenizer, train, validation, config, settings, adapter)
        if is_first:  # only now, as a folder that holds more than settings has begun
            write_pairs(record / PAIRS, pairs)
        counts = {"n_train": len(train), "n_validation": len(validation), "n_too_long": n_long}
        results = {
            **_train(trainer, record, Tracker(record, settings.report_to, identity)),
            **counts,
            "seconds": time.monotonic() - began,
        }
        if is_first:
            _save(trainer, out, results)
    return results


def check_out(out: Path, adapter: Path | None) -> None:
    """Raises UserError if an adapter in `out` that must stay would be replaced."""
    if adapter is not None and adapter.resolve() == out.resolve():
        raise UserError(f"--out {out} is the adapter to continue; choose another folder for the new one")
    if (out / WEIGHTS).exists() and not (out / RECORD / CONFIG).exists():
        raise UserError(f"{out} holds an adapter from elsewhere; choose another folder with --out")


def _refuse_other_settings(record: Path, identity: dict[str, Any]) -> None:
    """Raises UserError if checkpoints of an unfinished tuning of other settings would be lost."""
    if (record / CHECKPOINTS).exists():
        difference = compare(read_json(record / CONFIG)["identity"], json.loads(json.dumps(identity)))
        if difference:
            raise UserError(
                f"{record} holds an unfinished tuning with other settings ({difference}); "
                "choose another folder with --out or give --overwrite to replace it"
            )


def _train(trainer: Any, record: Path, tracker: Tracker) -> dict[str, Any]:
    """Train, from the last checkpoint on if there is one; the figures for results.json."""
    checkpoint = last_checkpoint(record / CHECKPOINTS, trainer.args.max_steps)
    if checkpoint:
        log.info("continuing from %s", checkpoint)
    evaluates = trainer.eval_dataset is not None
    trainer.args.eval_on_start = evaluates and checkpoint is None
    trainer.add_callback(_recorder(record / METRICS, tracker))
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    state = trainer.state
    results: dict[str, Any] = {"steps": state.global_step}
    if evaluates:
        evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
        if evaluations[-1]["step"] < state.global_step:
            trainer.evaluate()
            evaluations.append(state.log_history[-1])
        for when, entry in (("before", evaluations[0]), ("after", evaluations[-1])):
            results |= {f"{name}_{when}": entry[key] for name, key in FIGURES.items()}
    tracker.close()
    return results


def last_checkpoint(folder: Path, max_steps: int) -> Path | None:
    """The newest checkpoint that was written to its end: the trainer writes its state last.

    That of the last step is passed over, as the trainer would go one step beyond it.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(found):
        with contextlib.suppress(UserError):
            if read_json(path / "trainer_state.json")["global_step"] < max_steps:
                return path
    return None


def _recorder(path: Path, tracker: Tracker) -> Any:
    """A callback of the trainer: keeps metrics.jsonl, shows it, stops at a number that is not finite."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:  # a resumed run repeats what came after its checkpoint
                write_bytes(path, "".join(map(_metrics_line, state.log_history)).encode())

        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            entry = state.log_history[-1]
            bad = [key for key, value in entry.items() if not math.isfinite(value)]
            if bad:
                raise TrainingError(f"{bad[0]} of DPO is not finite at step {state.global_step}; lower --lr")
            if state.is_world_process_zero and "train_runtime" not in entry:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(_metrics_line(entry))
                tracker.follow([_metrics_row(each) for each in state.log_history])

    return Recorder()


def _metrics_line(entry: dict[str, float]) -> str:
    return json.dumps(_lasting(entry), allow_nan=False, sort_keys=True) + "\n"


def _lasting(entry: dict[str, float]) -> dict[str, float]:
    """An entry without times and counters that start anew when a run is resumed."""
    return {k: v for k, v in entry.items() if not k.endswith(("_runtime", "_per_second", "num_tokens"))}


def _metrics_row(entry: dict[str, float]) -> dict[str, Any]:
    """As a tracker takes it, by step."""
    values = {key: value for key, value in _lasting(entry).items() if key not in ("epoch", "step")}
    return {**values, "phase": "dpo", "epoch": entry["step"]}


def _save(trainer: Any, out: Path, results: dict[str, Any]) -> None:
    """Move the adapter into place, its card last, and mark the run as finished."""
    record, partial = out / RECORD, out / RECORD / ".adapter"
    trainer.model.save_pretrained(partial, selected_adapters=["default"], save_embedding_layers=False)
    for name in (WEIGHTS, CARD):
        os.replace(partial / name, out / name)
    write_json(record / RESULTS, results, indent=2)
    shutil.rmtree(partial)
    shutil.rmtree(record / CHECKPOINTS)  # nothing is left to resume


def _identity(
    model: str, pairs: Pairs, settings: TuneSettings, adapter: Path | None, n_processes: int
) -> dict[str, Any]:
    """Everything that decides the numbers, as JSON values."""
    chosen = {key: value for key, value in asdict(settings).items() if key not in PLACE}
    return {
        "model": model,
        "adapter": sha256(adapter / WEIGHTS) if adapter else None,
        "pairs": fingerprint([pairs.train, pairs.validation]),
        "processes": n_processes,
        **chosen,
    }


@contextlib.contextmanager
def _calm_libraries() -> Iterator[None]:
    """No report to the hub, no progress bars without a terminal, no warnings that only trl could act on."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # trl uses names that transformers has renamed
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
