"""Train the stand-ins for GLM-4 and Stable Diffusion on a CPU; run again to continue.

python create/train_tiny_models.py glm --out models/glm                 # on the garden's captions
python create/train_tiny_models.py glm --captions flower.txt --dataset_name flower --out models/glm
python create/train_tiny_models.py diffusion --out models/diffusion     # on drawn flowers
python create/train_tiny_models.py reader --out models/reader           # judges pictures of flowers
"""

import logging
import sys

from kka.attributes import ReaderSettings, train_reader
from kka.errors import UserError, run_script
from kka.settings import build_parser, make_settings
from kka.tiny_diffusion import TinyDiffusionSettings, train_diffusion
from kka.tiny_glm import TinyGlmSettings, train_glm
from kka.tiny_training import OutputSettings

MODELS = {
    "glm": ("Train a tiny GLM on captions.", TinyGlmSettings, train_glm),
    "diffusion": (
        "Train a tiny Stable Diffusion on captioned images.",
        TinyDiffusionSettings,
        train_diffusion,
    ),
    "reader": ("Train a reader of the garden's attributes.", ReaderSettings, train_reader),
}


def main() -> None:
    """Parse the flags and train."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    name, words = (sys.argv[1:2] or ["-h"])[0], sys.argv[2:]
    if name in ("-h", "--help"):
        print(f"{__doc__}\nFlags: {sys.argv[0]} {{{'|'.join(MODELS)}}} --help")
        return
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; it is one of {', '.join(MODELS)}")
    description, settings_class, train = MODELS[name]
    parser = build_parser(description, settings_class, OutputSettings)
    parser.prog += f" {name}"
    flags = vars(parser.parse_args(words))
    train(make_settings(settings_class, flags), make_settings(OutputSettings, flags))


if __name__ == "__main__":
    run_script(main)
