"""Does a detector score by contrast? Its test scores against the deviation of the pixels of each image.

python benchmarks/contrast.py RUN ...     # run folders of src/main.py
"""

import sys
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from kka.datasets import get_spec
from kka.datasets.images import content_digest, decode
from kka.datasets.sources import data_root
from kka.datasets.task import Choice, read_task
from kka.errors import UserError, run_script
from kka.files import read_json
from kka.metrics import auroc
from kka.results import MODEL_CARD
from kka.runs import CONFIG, RESULTS


def main() -> None:
    if len(sys.argv) < 2:
        raise UserError("give one run folder or more")
    for run in map(Path, sys.argv[1:]):
        settings = read_json(run / CONFIG)["settings"]
        spec = get_spec(settings["dataset_name"])
        choice = Choice(normal_classes=tuple(settings["normal_class"]), n_anomalies=0)
        test = read_task(spec, data_root(spec, settings["data_path"]), choice).test
        size = read_json(run / MODEL_CARD)["image_size"]
        pixels = decode(test.paths, content_digest(test.paths), 0, size, name="test images").resized
        contrast = pixels.float().flatten(1).std(1).numpy()
        scores = np.array([row[2] for row in read_json(run / RESULTS)["test_scores"]])
        aucs = [100 * (auroc(test.targets, values) or 0) for values in (scores, contrast)]
        print(
            f"{run}: AUC of the scores {aucs[0]:.1f} %, of the contrast {aucs[1]:.1f} %, "
            f"rank correlation {spearmanr(scores, contrast)[0]:.2f}"
        )


if __name__ == "__main__":
    run_script(main)
