"""Prepare a data set once: official archive -> class folders.

python src/prepare.py cifar100
python src/prepare.py flower --captions cvpr2016_flowers.tar.gz
python src/prepare.py ucm_caption --source UCM_captions
python src/prepare.py sdd --source KolektorSDD --out data/sdd      # and seven others, to MVTec's format
"""

from dataclasses import dataclass
from pathlib import Path

from kka.conversions import CONVERSIONS, convert
from kka.errors import UserError, run_script
from kka.files import check_writable, user_path
from kka.prepare import SPECS, prepare
from kka.settings import build_parser, make_settings, option

DATA = Path(__file__).resolve().parents[1] / "data"


@dataclass(frozen=True)
class Settings:
    """Flags of this script."""

    source: str | None = option(
        None, "archive or folder of the original; without it torchvision downloads it"
    )
    out: str | None = option(None, "folder to write; data/<name> of this repository if not given")
    captions: str | None = option(None, "Reed's captions for flower, archive or folder; may be added later")
    seed: int = option(0, "seed of the training/test split (flower, ucm_caption)")


def main() -> None:
    """Parse the flags and prepare."""
    parser = build_parser("Turn an official archive into class folders; run again to continue.", Settings)
    parser.add_argument("name", choices=(*SPECS, *CONVERSIONS), help="the data set")
    parser.add_argument(
        "--no_check", action="store_true", help="accept a source that is not the published one"
    )
    flags = vars(parser.parse_args())
    name, no_check = flags.pop("name"), flags.pop("no_check", False)
    settings = make_settings(Settings, flags)
    out = user_path(settings.out) if settings.out else DATA / name
    source = user_path(settings.source) if settings.source else None
    check_writable(out, "--out", folder=True)
    if name in CONVERSIONS:
        given = {"captions": settings.captions, "seed": settings.seed, "no_check": no_check}
        unused = [flag for flag, value in given.items() if value]
        if unused:
            raise UserError(f"--{unused[0]} has no effect for {name}; leave it out")
        if source is None:
            raise UserError(f"{name} cannot be downloaded; give --source with its unpacked folder")
        convert(name, source, out)
        return
    captions = user_path(settings.captions) if settings.captions else None
    prepare(name, out, source, captions, settings.seed, check=not no_check)


if __name__ == "__main__":
    run_script(main)
