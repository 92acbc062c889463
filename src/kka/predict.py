"""New images before a trained detector: scores, decisions by Eq. (6), anomaly maps."""

import csv
import glob
import io
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kka.datasets.images import read_like, test_view
from kka.datasets.layout import is_side_file
from kka.errors import UserError
from kka.files import check_writable, user_path, write_bytes, write_json
from kka.settings import option
from kka.trained import Trained

# Images in memory at a time: a multiple of every detector's own batch, so that batches are those of the test.
CHUNK = 256
SHOWN = 20  # rows of the printed table
COLUMNS = ("path", "score", "threshold", "decision")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictSettings:
    """Score new images with a trained detector, or export it."""

    model: str | None = option(None, "finished run folder, or a loop's folder, whose last round is taken")
    out: str | None = option(None, "FILE.csv or FILE.json with a line for each image")
    maps: str | None = option(None, "folder for anomaly maps (simplenet, recontrast): pictures and arrays")
    threshold: float | None = option(None, "images below are normal; None: the model's own, Eq. (6)")
    generated: bool = option(
        False, "the images were generated: first make them like the normals, as in training"
    )
    export: str | None = option(None, "FILE.pt2 or FILE.onnx, to score elsewhere without this program")
    overwrite: bool = option(False, "replace --out, --maps and --export if they exist")
    device: str = option("cuda", "cpu, cuda or cuda:N; without a GPU the CPU is taken")
    num_threads: int = option(0, "threads of PyTorch; 0: its default")
    n_jobs_dataloader: int = option(0, "threads that decode images; 0: one per core")


@dataclass(frozen=True)
class Prediction:
    """The score of one image."""

    path: Path
    score: float
    threshold: float

    @property
    def decision(self) -> str:
        """Eq. (6): normal strictly below the threshold."""
        return "normal" if self.score < self.threshold else "anomalous"

    def row(self) -> dict[str, Any]:
        """For CSV and JSON."""
        return {
            "path": printable(self.path),
            "score": self.score,
            "threshold": self.threshold,
            "decision": self.decision,
        }


Skipped = list[tuple[Path, str]]
"""Images that cannot be read, and why"""


def check_settings(settings: PredictSettings) -> None:
    """Raises UserError naming the first flag that makes no sense, or whose file exists already."""
    s = settings
    if not s.model:
        raise UserError("--model RUN is needed, the folder of a finished run; see --help")
    for name in ("num_threads", "n_jobs_dataloader"):
        if getattr(s, name) < 0:
            raise UserError(f"--{name} must not be negative, it is {getattr(s, name)}")
    for name, endings in (("out", (".csv", ".json")), ("export", (".pt2", ".onnx"))):
        value = getattr(s, name)
        if value is not None and not value.lower().endswith(endings):
            raise UserError(f"--{name} must end in {' or '.join(endings)}, it is {value!r}")
        if value is not None:
            check_writable(user_path(value), f"--{name}")
            if user_path(value).exists() and not s.overwrite:
                raise UserError(f"--{name} {value} exists; choose another name or give --overwrite")


def find_images(words: Sequence[str]) -> list[Path]:
    """Files, those below folders (hidden ones and text are passed over), and what patterns match; each once.

    A file that is named is taken whatever it is called. Raises UserError for a word without any image.
    """
    paths: dict[Path, None] = {}
    for word in words:
        if not word:  # which Path takes for the current folder
            raise UserError("one of IMAGES is an empty word; name image files, folders or patterns")
        place = Path(word) if os.path.lexists(word) else user_path(word)
        matches = [place] if os.path.lexists(place) else map(Path, glob.glob(str(place), recursive=True))
        found = [path for match in sorted(matches) for path in _images_at(match)]
        if not found:
            raise UserError(f"there is no image at {word}; name image files, folders or patterns")
        paths |= dict.fromkeys(found)
    return list(paths)


def _images_at(place: Path) -> list[Path]:
    """The file itself, or the files below a folder in order of their paths.

    All but known side files: an image type that cannot be read must be named as skipped.
    """
    if not place.is_dir():
        return [place]
    found = []
    for folder, folders, names in os.walk(place, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [path for path in (Path(folder, name) for name in names) if not is_side_file(path)]
    return sorted(found)


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None


def score_files(
    trained: Trained, paths: Sequence[Path], threshold: float, generated: bool = False, threads: int = 0
) -> Iterator[tuple[list[Prediction], Tensor, Skipped]]:
    """Predictions of the images that can be read, their tensors (N, 3, S, S), and the others, part by part.

    Images are prepared exactly as test images. Raises UserError if a score is not finite.
    """
    with (
        ThreadPoolExecutor(threads or os.cpu_count()) as pool,
        tqdm(total=len(paths), desc="scoring", unit="image", disable=None, leave=False) as bar,
    ):
        for start in range(0, len(paths), CHUNK):
            part = paths[start : start + CHUNK]
            views = list(pool.map(lambda path: _read(path, trained, generated), part))
            good = {path: view for path, view in zip(part, views, strict=True) if isinstance(view, Tensor)}
            bad = [(path, why) for path, why in zip(part, views, strict=True) if isinstance(why, str)]
            images = torch.stack(list(good.values())) if good else torch.empty(0, 3, 0, 0)
            scores = trained.detector.score(images) if good else torch.empty(0)
            if not scores.isfinite().all():
                raise UserError(f"scores of --model {trained.run} are not finite; train it anew")
            pairs = zip(good, scores.tolist(), strict=True)
            bar.update(len(part))
            yield [Prediction(path, score, threshold) for path, score in pairs], images, bad


def _read(path: Path, trained: Trained, generated: bool) -> Tensor | str:
    """The test view of an image, (3, S, S) uint8, or why it cannot be read."""
    try:
        picture = read_like(path, trained.native if generated else None)
        view = test_view(picture, trained.detector.image_size)
        return view.flip(0) if trained.bgr else view
    except UserError as error:  # what, then advice that is not for this program
        return str(error).rpartition(";")[0].removeprefix(f"{path} ")
    except Exception as error:  # Pillow raises many kinds for a damaged file
        return f"is damaged ({type(error).__name__}: {error})"


def write_predictions(
    path: Path, trained: Trained, predictions: Sequence[Prediction], skipped: Skipped
) -> None:
    """CSV with one line per prediction, or JSON that says also which model it was and what was skipped."""
    rows = [prediction.row() for prediction in predictions]
    if path.suffix.lower() == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_bytes(path, text.getvalue().encode())
        return
    report = {
        "model": printable(trained.run),
        "detector": trained.name,
        "images": rows,
        "skipped": [{"path": printable(file), "reason": reason} for file, reason in skipped],
    }
    write_json(path, report, indent=1)


def to_table(predictions: Sequence[Prediction]) -> str:
    """The highest scores first, and how many are anomalous."""
    ranked = sorted(predictions, key=lambda prediction: -prediction.score)
    lines = [f"{'score':>12}  decision   image"]
    lines += [f"{p.score:12.6g}  {p.decision:<9}  {one_line(p.path)}" for p in ranked[:SHOWN]]
    if len(ranked) > SHOWN:
        lines.append(f"{'...':>12}  and {len(ranked) - SHOWN} more, which --out writes all")
    n = sum(p.decision == "anomalous" for p in ranked)
    threshold = ranked[0].threshold
    return "\n".join(
        [*lines, f"{n} of {len(ranked)} are anomalous: their score is not below {threshold:.6g}"]
    )


def printable(path: Path) -> str:
    """A path as valid text, whatever bytes its name has."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def one_line(path: Path) -> str:
    """The same without line breaks and what else would change the screen."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in printable(path))
