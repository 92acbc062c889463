"""Score new images with a trained detector, or export it to score them elsewhere.

    python src/predict.py photo.jpg more/ 'shots/*.png' --model log/flower/RUN --out scores.csv
    python src/predict.py shots/ --model RUN --maps maps/        # simplenet and recontrast
    python src/predict.py --model RUN --export model.pt2         # or model.onnx

Exit code 0: all images were scored; 3: some could not be read and were skipped, each is named; 2: bad input,
or not one image could be read. docs/predict.md says what the numbers mean.
"""

import logging
import sys
from pathlib import Path

import torch

from kka.errors import SKIPPED, UserError, run_script
from kka.experiment import find_device
from kka.export import export
from kka.files import user_path
from kka.overlays import check_folder, map_function, remove_older, write_arrays, write_pictures
from kka.predict import (
    Prediction,
    PredictSettings,
    Skipped,
    check_settings,
    find_images,
    one_line,
    score_files,
    to_table,
    write_predictions,
)
from kka.settings import build_parser, make_settings
from kka.trained import Trained, open_model


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    torch.set_flush_denormal(True)  # as in training, before there are threads, which inherit it
    parser = build_parser("Score new images with a trained detector.", PredictSettings)
    parser.add_argument("images", nargs="*", default=[], metavar="IMAGES", help="files, folders or patterns")
    values = vars(parser.parse_args())
    words = values.pop("images")
    settings = make_settings(PredictSettings, values)
    check_settings(settings)
    if not words and not settings.export:
        raise UserError("IMAGES are needed: files, folders or patterns; see --help")
    paths = find_images(words)
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    maps = user_path(settings.maps) if settings.maps is not None else None
    if maps is not None:
        check_folder(maps, paths, settings.overwrite)
    trained = open_model(user_path(settings.model or ""), find_device(settings.device, strict=False))
    skipped = predict(trained, paths, settings, maps) if paths else []
    if settings.export:
        file = user_path(settings.export)
        print(export(trained.run, file, settings.threshold, paths))
    if skipped:
        sys.exit(SKIPPED)


def predict(trained: Trained, paths: list[Path], settings: PredictSettings, maps: Path | None) -> Skipped:
    """Score, print and write everything that was asked for; returns what could not be read."""
    threshold = trained.threshold if settings.threshold is None else settings.threshold
    make_maps = map_function(trained) if maps else None
    predictions: list[Prediction] = []
    skipped: Skipped = []
    parts = score_files(trained, paths, threshold, settings.generated, settings.n_jobs_dataloader)
    for scored, images, bad in parts:
        if make_maps and maps and scored:
            write_arrays(maps, len(predictions), [each.path for each in scored], make_maps(images))
        predictions += scored
        skipped += bad
    for path, reason in skipped:
        print(f"skipped {one_line(path)}: {reason}", file=sys.stderr)
    if not predictions:
        raise UserError(f"not one of the {len(paths)} images can be read; give others")
    if settings.out:
        write_predictions(user_path(settings.out), trained, predictions, skipped)
    print(to_table(predictions))
    if maps:
        mapped = [each.path for each in predictions]
        low, high = write_pictures(maps, mapped, threshold)
        remove_older(maps, mapped)
        print(f"maps from {low:.4g} (as the image) to {high:.4g} (brightest) are in {maps}")
    return skipped


if __name__ == "__main__":
    run_script(main, "the same command starts again")
