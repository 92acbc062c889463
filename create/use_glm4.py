"""Ask an LLM for captions of anomalies (Eq. 3).

python create/use_glm4.py --dataset_name flower --n 200 --out captions.jsonl --text flower.txt
python create/use_glm4.py --backend openai --base_url http://localhost:8000/v1 --model glm-4 ...
"""

import logging

from kka.describe import CaptionSettings, write_captions
from kka.errors import run_script
from kka.language_models import LanguageModelSettings
from kka.settings import build_parser, make_settings


def main() -> None:
    """Parse the flags and ask; run again to continue."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    description = "Ask an LLM for captions of anomalies; run again to continue."
    flags = vars(build_parser(description, CaptionSettings, LanguageModelSettings).parse_args())
    write_captions(make_settings(CaptionSettings, flags), make_settings(LanguageModelSettings, flags))


if __name__ == "__main__":
    run_script(main)
