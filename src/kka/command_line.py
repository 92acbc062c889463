"""The command line of everything that trains a detector: --detector decides which flags there are."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kka.detectors import DETECTORS
from kka.detectors.contract import DetectorSettings
from kka.errors import UserError
from kka.files import read_json
from kka.settings import build_parser, check_keys, format_flags, make_settings, option

DEFAULT_DETECTOR = "deep_sad"


@dataclass(frozen=True)
class DetectorChoice:
    """Which detector; its own flags are below."""

    detector: str = option(DEFAULT_DETECTOR, "what is trained and tested", tuple(DETECTORS))
    preset: str | None = option(None, "named settings of the detector, e.g. small; flags given beside it win")


def parse_command(
    description: str, *settings_classes: type, **prefixed: type
) -> tuple[dict[str, Any], DetectorSettings]:
    """The values of all flags, those of --load_config where no flag is given, and the detector's settings.

    Raises UserError for what `build_parser` refuses, and for a flag or a value of another detector.
    """
    words = sys.argv[1:]
    early = _early(words)
    config = read_config(early.get("load_config"))
    with _naming(early.get("load_config")):
        make_settings(DetectorChoice, {key: value for key, value in config.items() if key not in early})
    choice = make_settings(DetectorChoice, {**config, **early})
    if choice.detector != config.get("detector", choice.detector):
        raise UserError(
            f"--load_config {early['load_config']} is for --detector {config['detector']}, "
            f"not for {choice.detector}; leave out one of the two flags"
        )
    name = choice.detector
    settings_class = DETECTORS[name][0]
    known = (*settings_classes, DetectorChoice, settings_class)
    parser = build_parser(description, *known, **prefixed)
    others = [cls for cls, _ in DETECTORS.values() if cls is not settings_class]
    parser.appendix = "".join(f"\n{format_flags(cls)}" for cls in others)
    flags, rest = parser.parse_known_args(words)
    unknown = [word.removeprefix("--").partition("=")[0] for word in rest if word.startswith("--")]
    _refuse_foreign(unknown, "--", name, known)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    with _naming(early.get("load_config")):
        _refuse_foreign(config, "", name, known)
        check_keys(config, *known, **prefixed)
        for cls in known:  # a value that a flag replaces may be anything
            make_settings(cls, {key: value for key, value in config.items() if key not in vars(flags)})
    own = preset_values(name, config.get("preset"))
    values = {**own, **config, **preset_values(name, early.get("preset")), **vars(flags)}
    return values, make_settings(settings_class, values)


def read_config(path: str | None) -> dict[str, Any]:
    """Settings of a config.json, ours or the official code's, less the folder it wrote to."""
    if path is None:
        return {}
    try:
        config = read_json(Path(path))
    except UserError as error:
        raise UserError(f"--load_config: {error}") from None
    settings = config.get("settings", config) if isinstance(config, dict) else None
    if not isinstance(settings, dict):
        raise UserError(f"--load_config {path} must hold an object of settings")
    return {key: value for key, value in settings.items() if key not in ("xp_path", "name", "overwrite")}


@contextmanager
def _naming(path: str | None) -> Iterator[None]:
    """Say of bad settings which --load_config they are from."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--load_config {path}: {error}") from None


def preset_values(name: str, preset: str | None) -> dict[str, Any]:
    """The values that a preset of a detector gives; raises UserError listing what there is."""
    presets: Mapping[str, dict[str, Any]] = getattr(DETECTORS[name][0], "PRESETS", {})
    if preset is None:
        return {}
    if preset not in presets:
        raise UserError(
            f"--detector {name} has no --preset {preset!r}; it has {', '.join(presets) or 'none'}"
        )
    return presets[preset]


def _early(words: Sequence[str]) -> dict[str, Any]:
    """The flags that decide what the other words mean."""
    parser = build_parser("", DetectorChoice)
    parser.add_argument("--load_config")
    return vars(parser.parse_known_args([word for word in words if word not in ("-h", "--help")])[0])


def _refuse_foreign(names: Iterable[str], mark: str, chosen: str, known: Sequence[type]) -> None:
    """Raises UserError for the first name that is a setting of other detectors only."""
    ours = {field.name for cls in known for field in fields(cls)}
    for name in names:
        owners = [key for key, (cls, _) in DETECTORS.items() if name in {f.name for f in fields(cls)} - ours]
        if owners:
            raise UserError(f"{mark}{name} belongs to --detector {' or '.join(owners)}, not to {chosen}")
