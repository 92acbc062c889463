"""create/train_tiny_models.py in this process, with small models."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from toy import Outcome, call_script

SCRIPT = Path(__file__).parent.parent / "create" / "train_tiny_models.py"
SMALL = {
    "glm": {"hidden": 32, "layers": 1, "steps": 60, "batch_size": 8, "n_measured": 8},
    "diffusion": {
        "side": 16, "pool": 24, "vae_widths": [8, 16], "vae_batch_size": 8, "latent_channels": 2,
        "widths": [8, 16], "batch_size": 8, "vae_steps": 60, "steps": 60, "n_measured": 4,
    },
    "reader": {"steps": 26, "pool": 64, "n_measured": 32},
}  # fmt: skip


def train(model: str, out: Path | None, **flags: object) -> Outcome:
    """Run the script; a flag of None is left out, a list gives several words."""
    chosen: dict[str, object] = {"out": out, "checkpoint_every": 0.0, **SMALL.get(model, {}), **flags}
    words = [model]
    for name, value in chosen.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return call(words)


def call(words: list[str]) -> Outcome:
    """Run the script with these words."""
    spec = importlib.util.spec_from_file_location("train_tiny_models", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kka.tiny_diffusion.PREVIEWS", 1)  # at the end
        outcome = call_script(script.main, [str(SCRIPT), *words])
    lines = outcome.stderr.splitlines(keepends=True)
    return replace(outcome, stderr="".join(line for line in lines if "|" not in line))  # no progress bars


def losses(work: Path, phase: str) -> list[float]:
    """The recorded losses of one phase."""
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["phase"] == phase]


def interrupt(patch: pytest.MonkeyPatch, module: object, after: int) -> None:
    """Ctrl-C in the step after so many steps of a training."""
    true, calls = module.descend, iter(range(after))

    def descend(*arguments):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return true(*arguments)

    patch.setattr(module, "descend", descend)
