"""Do detectors tell generated images by traces of the autoencoder instead of by what they show?

    python benchmarks/autoencoder_traces.py RUN [RUN ...]     # finished runs on the garden

Normal test images are sent through the autoencoder of a Stable Diffusion, which adds nothing but its traces,
and scored beside themselves. An AUC of 50 % says that a detector does not see them.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kka.attributes import to_tensor
from kka.datasets.garden import NORMAL, SPEC
from kka.datasets.images import read_image
from kka.datasets.layout import NAME_LIST
from kka.datasets.sources import data_root
from kka.errors import UserError, run_script
from kka.metrics import auroc, format_interval
from kka.run import load_detector
from kka.runs import RESULTS, ROOT
from kka.tiny_autoencoder import to_unit

MODEL = ROOT / "src" / "kka" / "garden_models" / "diffusion"


def main() -> None:
    runs = [Path(word) for word in sys.argv[1:]]
    missing = [run for run in runs if not (run / RESULTS).exists()]
    if missing or not runs:
        raise UserError(f"{missing[0]} is no finished run" if missing else "give finished runs on the garden")
    folder = data_root(SPEC, None) / str(NORMAL)
    names = json.loads((folder / NAME_LIST["test"]).read_text())
    pictures = [read_image(folder / name) for name in names]
    normals, sent = to_tensor(pictures), to_tensor(through_autoencoder(pictures))
    labels, aucs = np.r_[np.zeros(len(normals)), np.ones(len(sent))], []
    for run in runs:
        auc = auroc(labels, load_detector(run, torch.device("cpu")).score(torch.cat([normals, sent])).numpy())
        print(f"{run}: {100 * auc:.1f} %" if auc is not None else f"{run}: n/a")
        aucs += [auc] if auc is not None else []
    print(f"autoencoded normals against normals: {format_interval(aucs, unit=' %')}")


@torch.no_grad()
def through_autoencoder(pictures: list[Image.Image]) -> list[Image.Image]:
    """The pictures as the autoencoder gives them back."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(MODEL / "vae", dtype=torch.float32)
    images: Tensor = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])
    back = vae.decode(vae.encode(to_unit(images)).latent_dist.mode()).sample
    pixels = ((back + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(each) for each in pixels.numpy()]


if __name__ == "__main__":
    run_script(main)
