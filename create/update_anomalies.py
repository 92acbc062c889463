"""The next anomaly set (Eq. 8): hard ones of the new images are added, or replace easy ones.

python create/update_anomalies.py --dataset_name flower --run log/flower/RUN --anomaly_path data/flower/0 \
    --fresh fresh --out next --mode rep
"""

import logging

from kka.errors import run_script
from kka.judge import UpdateSettings, update_anomalies
from kka.settings import build_parser, make_settings


def main() -> None:
    """Parse the flags, judge, update, say what came of it."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    parser = build_parser("Judge new images and write the next anomaly set.", UpdateSettings)
    settings = make_settings(UpdateSettings, vars(parser.parse_args()))
    updated, share = update_anomalies(settings)
    print(f"{100 * share:.1f} % of the images in {settings.fresh} are hard")
    print(f"{settings.out}: {updated.added} added, {updated.replaced} left, {updated.size} images")
    if settings.mode == "rep" and settings.per_round and share and not updated.added:
        print("no hard image came in: there are no easy ones that could leave, or the set had these before")


if __name__ == "__main__":
    run_script(main)
