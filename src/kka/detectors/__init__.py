"""Detectors: `fit(train)`, `score(images)` with higher = more anomalous, `state_dict()`, `load_state_dict()`.

They know nothing of files, data-set names or rounds; a train set may have generated anomalies or none.
"""

from collections.abc import Callable
from typing import Any

import torch

from kka.detectors.ahl import AHL, AHLSettings
from kka.detectors.cmda import CMDA, CMDASettings
from kka.detectors.contract import Detector, DetectorSettings
from kka.detectors.deep_sad import DeepSAD, DeepSADSettings
from kka.detectors.devnet import DevNet, DevNetSettings
from kka.detectors.dra import DRA, DRASettings
from kka.detectors.frozen import Frozen, FrozenSettings
from kka.detectors.recontrast import ReContrast, ReContrastSettings
from kka.detectors.simplenet import SimpleNet, SimpleNetSettings
from kka.detectors.ssd import SSD, SSDSettings

DETECTORS: dict[str, tuple[type[Any], Callable[..., Detector]]] = {
    "deep_sad": (DeepSADSettings, DeepSAD),
    "ssd": (SSDSettings, SSD),
    "cmda": (CMDASettings, CMDA),
    "simplenet": (SimpleNetSettings, SimpleNet),
    "recontrast": (ReContrastSettings, ReContrast),
    "frozen": (FrozenSettings, Frozen),
    "devnet": (DevNetSettings, DevNet),
    "dra": (DRASettings, DRA),
    "ahl": (AHLSettings, AHL),
}


def build_detector(settings: DetectorSettings, seed: int = 0, device: str | torch.device = "cpu") -> Detector:
    """The detector that the settings belong to; raises UserError if they make no sense."""
    return DETECTORS[detector_name(settings)][1](settings, seed, device)


def detector_name(settings: DetectorSettings) -> str:
    """The name under which a detector's settings stand in DETECTORS."""
    return next(name for name, (kind, _) in DETECTORS.items() if kind is type(settings))
