"""Figures and one self-contained HTML page from finished runs, loops and tables.

python src/report.py log/garden/demo                 # a loop of iterate.py, or a run of main.py
python src/report.py RUN_WITHOUT RUN_WITH --out DIR  # several runs on one page, compared
python src/report.py log/tables/table3.json          # a table of reproduce.py
"""

import logging

from kka.errors import run_script
from kka.files import check_writable, user_path
from kka.report.build import ReportSettings, make_reports
from kka.settings import build_parser, make_settings


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    parser = build_parser("Figures and one HTML page from finished runs.", ReportSettings)
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="folder of a run, of its seeds, of a loop; or a table"
    )
    values = vars(parser.parse_args())
    paths = [user_path(path) for path in values.pop("runs")]
    settings = make_settings(ReportSettings, values)
    if settings.out:
        check_writable(user_path(settings.out), "--out", folder=True)
    make_reports(paths, settings)


if __name__ == "__main__":
    run_script(main)
