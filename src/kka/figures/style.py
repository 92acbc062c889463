"""How all figures look: colours that colour-blind readers tell apart, fonts for a page of paper."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from kka.errors import UserError
from kka.files import write_atomically

COLUMN, PAGE = 3.5, 7.16  # inches: one and two columns of an IEEE paper
INK, MUTED, GRID = "#1f2430", "#5b6472", "#d9dde3"
NORMAL, ANOMALY, HARD, EASY = "#0072b2", "#d55e00", "#cc79a7", "#009e73"  # Okabe and Ito (2008)
SERIES = (NORMAL, ANOMALY, EASY, HARD, "#e69f00", "#56b4e9", INK)
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
DPI = 200
STYLE: dict[str, Any] = {
    "font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8, "legend.fontsize": 7,
    "xtick.labelsize": 7, "ytick.labelsize": 7, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.titlecolor": INK, "text.color": INK,
    "xtick.color": MUTED, "ytick.color": MUTED, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": GRID, "grid.linewidth": 0.6, "lines.linewidth": 1.4, "lines.markersize": 4,
    "axes.linewidth": 0.7, "legend.frameon": False, "pdf.fonttype": 42, "figure.facecolor": "white",
    "text.parse_math": False,  # a caption may hold dollars
}  # fmt: skip


@contextmanager
def styled() -> Iterator[None]:
    """Draw within the block as all figures look; raises UserError naming the extra without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib; install it with pip install -e '.[plot]'") from None
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it tells of every glyph in a PDF
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # captions come in any script
        yield


def new_figure(width: float, height: float, layout: Any = "constrained") -> Any:
    """An empty matplotlib Figure of that size in inches, which needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def write_figure(figure: Any, path: Path) -> None:
    """Write path.png for screens and path.pdf for papers; the same figure gives the same bytes."""
    notes: Mapping[str, Mapping[str, None]] = {
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    }
    for kind, metadata in notes.items():
        save = partial(figure.savefig, format=kind, dpi=DPI, metadata=metadata)
        write_atomically(path.with_name(f"{path.name}.{kind}"), save)


def look(k: int) -> dict[str, Any]:
    """Colour, marker and dash of series k: each tells it apart without the others."""
    return {
        "color": SERIES[k % len(SERIES)],
        "marker": MARKERS[k % len(MARKERS)],
        "linestyle": DASHES[k % len(DASHES)],
    }


def percent_axis(axis: Any, name: str = "test AUC (%)") -> None:
    """Label a y axis of percentages; it shows nothing beyond 100."""
    axis.set_ylabel(name)
    axis.set_ylim(top=min(100.5, axis.get_ylim()[1]))
