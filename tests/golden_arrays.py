"""Inputs and outputs of the official codes, kept in tests/golden (see its README)."""

from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    """The arrays of one fixture, e.g. golden("deep_sad/losses")."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def tensors(name):
    """The same as tensors."""
    return {key: torch.from_numpy(np.array(value)) for key, value in golden(name).items()}


def unit(images):
    """uint8 images as the official code saw them in these fixtures: in [0, 1], not normalised."""
    return torch.as_tensor(images).float() / 255
