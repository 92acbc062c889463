"""What an epoch of AHL costs by the number of clusters: its tasks are all ordered pairs of them.

    python benchmarks/ahl.py

Its table of results is made by `python src/reproduce.py ahl`.
"""

import time
from pathlib import Path

import torch
from deep_sad import processor, table

from kka.detectors.ahl import AHL, AHLSettings, Collaboration
from kka.detectors.ahl_tasks import FeatureBank, bank_labels, make_tasks
from kka.detectors.deviation import Groups, find_groups
from kka.errors import run_script
from kka.files import write_bytes
from kka.train_set import TrainSet

OUT = Path(__file__).parent / "results" / "ahl_episodes.md"


def main() -> None:
    """Seconds of an epoch of AHL at its CPU preset by clusters; they grow with the tasks, C (C - 1)."""
    rows = []
    for base_model in ("dra", "devnet"):
        preset = {**AHLSettings.PRESETS["cpu"], "base_model": base_model, "backbone_init": "random"}
        detector = AHL(AHLSettings(**preset))
        train = random_images(60, 10, detector.image_size)
        groups = find_groups(train, False)
        bank = detector._fill_bank(train, groups, None)
        for n_clusters in (2, 3, 4, 5):
            rows.append([base_model, str(n_clusters), *seconds_of(detector, groups, bank, n_clusters)])
    header = "base model|clusters|tasks|an epoch, s|a task, s"
    text = f"{processor()}, {torch.get_num_threads()} threads\n{table(header, rows)}"
    write_bytes(OUT, text.encode())
    print(text)


def random_images(n_normal: int, n_known: int, side: int) -> TrainSet:
    """Noise: what an epoch costs does not depend on the images."""
    stream = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n_normal + n_known, 3, side, side), generator=stream, dtype=torch.uint8)
    targets = (torch.arange(n_normal + n_known) >= n_normal).long()
    return TrainSet(images, torch.full((len(images), 2), side), images, targets, -targets)


def seconds_of(detector: AHL, groups: Groups, bank: FeatureBank, n_clusters: int) -> list[str]:
    """Tasks, seconds of an epoch (the best of two after one to warm up), and of a task."""
    clusters = [k % n_clusters for k in range(len(groups.normals))]
    n_kinds = len(detector.settings.pseudo)
    tasks = make_tasks(clusters, groups, n_kinds, True, True, seed=0)
    learning = Collaboration(detector.settings, detector.base, tasks, bank_labels(groups, n_kinds), 0)
    taken = []
    for epoch in range(3):
        began = time.perf_counter()
        learning.run_epoch(bank, epoch)
        taken.append(time.perf_counter() - began)
    best = min(taken[1:])
    return [str(len(tasks)), f"{best:.2f}", f"{best / len(tasks):.2f}"]


if __name__ == "__main__":
    run_script(main)
