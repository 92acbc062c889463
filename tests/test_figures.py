"""Figures from plain data: files that hold what they were given."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from kka.errors import UserError
from kka.figures import charts, images
from kka.figures.charts import Curve, Scores, Share, Size
from kka.figures.images import Shown
from kka.figures.style import COLUMN, DPI, PAGE, new_figure, styled, write_figure
from kka.picture import draw_loop
from kka.report.data import NoDataError, embed_2d

RNG = np.random.default_rng(0)
HOSTILE = "$\\frac{1}{ costs $5 <script> 花 \\n"


@pytest.fixture
def shown(tmp_path):
    Image.fromarray(RNG.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    return [Shown(tmp_path / "a.png", HOSTILE, "hard"), Shown(tmp_path / "gone.png", "gone", "easy")]


def scores(**kinds):
    return Scores("run", {name.replace("_", " "): np.array(values) for name, values in kinds.items()}, 1.0)


def draw(name, path, shown):
    """One call of each figure."""
    spread, points = RNG.lognormal(size=50), RNG.normal(size=(9, 2))
    aucs = {f"class {k}": [0.4 + k / 200, 0.5] for k in range(99)}
    calls = {
        "anomalies": lambda: images.draw_anomalies(path, [("round 0", shown), ("round 1", shown[:1])]),
        "scores": lambda: charts.draw_scores(path, [scores(normal=spread, hard_generated=[0.5])]),
        "sizes": lambda: charts.draw_sizes(path, {"none": [Size(0, [0.5]), Size(9, [0.7, 0.8], "KKA(1)")]}),
        "latent": lambda: charts.draw_latent(path, [("a", {"normal": points, "real anomaly": points})] * 2),
        "convergence": lambda: charts.draw_convergence(path, {"a": [Curve({1: 2.0, 2: 1.0}, {2: 0.7})] * 2}),
        "shares": lambda: charts.draw_shares(path, {"tuned LLM": [Share(1, 3, 9), Share(2, 0, 9)]}),
        "classes": lambda: charts.draw_classes(path, {"none": aucs, "KKA": aucs}),
        "margins": lambda: charts.draw_margins(path, {"round 1": {"validation": [(0, 0.0), (5, 0.4)]}}),
        "table": lambda: charts.draw_table(path, {"UCM": [("SAD", [0.7, 0.8], 72.3), ("CMDA", [], None)]}),
    }  # fmt: skip
    calls[name]()


FIGURES = ("anomalies", "scores", "sizes", "latent", "convergence", "shares", "classes", "margins", "table")


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_written_as_png_and_pdf(name, tmp_path, shown):
    draw(name, tmp_path / "out" / name, shown)
    with Image.open(tmp_path / "out" / f"{name}.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert COLUMN * DPI <= pixels.shape[1] <= PAGE * DPI + 1  # of one or two columns of a paper
    assert (pixels < 128).mean() > 0.001
    assert (tmp_path / "out" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"{name}.pdf", f"{name}.png"]


def test_same_data_give_the_same_bytes(tmp_path):
    digests = []
    for name in "ab":
        charts.draw_shares(tmp_path / name, {"tuned LLM": [Share(1, 3, 9)]})
        digests.append(
            [hashlib.sha256((tmp_path / f"{name}.{k}").read_bytes()).digest() for k in ("png", "pdf")]
        )
    assert digests[0] == digests[1]


def axis_of(panel):
    with styled():
        axis = new_figure(3, 3).subplots()
        charts.fill_scores(axis, panel)
    return axis


def test_histogram_shows_shares_of_each_kind_and_the_threshold():
    axis = axis_of(scores(normal=[0.0, 1.0, 2.0, 3.0], easy_generated=[3.0]))
    legend = axis.get_legend_handles_labels()[1]
    assert legend == ["normal (4)", "easy generated (1)", "threshold, Eq. (6)"]
    heights = [patch.get_path().vertices[:, 1].max() for patch in axis.patches]
    assert heights == [25.0, 100.0]
    assert list(axis.lines[0].get_xdata()) == [1.0, 1.0]
    assert axis.get_xscale() == "linear"


def test_wide_range_of_positive_scores_has_a_logarithmic_axis():
    assert axis_of(scores(normal=np.geomspace(0.01, 100, 50))).get_xscale() == "log"
    assert axis_of(scores(normal=np.linspace(-1, 100, 50))).get_xscale() == "linear"


def test_equal_scores_are_drawn():
    assert axis_of(scores(normal=[2.0, 2.0])).patches


def test_lowest_and_highest_classes_are_chosen():
    aucs = {str(k): [k / 100, k / 100] for k in range(100)}
    chosen = charts.choose_classes({"none": aucs | {"only here": [0.1]}, "KKA": aucs})
    assert chosen == [str(k) for k in (*range(30), *range(90, 100))]


def test_sets_of_one_size_share_a_label(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(charts, "write_figure", lambda figure, path: drawn.append(figure))
    same = [Size(200, [0.7], "KKA(1)"), Size(200, [0.7], "KKA(2)"), Size(100, [0.6], "KKA(0)")]
    charts.draw_sizes(tmp_path, {"rep": same})
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["KKA(0)", "KKA(1), KKA(2)"]


def test_titles_of_a_table_do_not_run_together(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(charts, "write_figure", lambda figure, path: drawn.append(figure))
    titles = ("AUC, %", "minus add/rep random", "minus add/rep hard", "minus base set")
    charts.draw_table(tmp_path, {title: [("UCM-Caption, 50: hard", [0.01], None)] for title in titles})
    drawn[0].canvas.draw()
    boxes = [axis.title.get_window_extent() for axis in drawn[0].axes]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert [axis.get_xlabel() for axis in drawn[0].axes] == ["percent", *["points"] * 3]


@pytest.mark.parametrize("n", [1, 2])
def test_figure_of_few_classes_cuts_no_label_off(tmp_path, n):
    aucs = {f"defect {k}": [0.4, 0.6] for k in range(n)}
    charts.draw_classes(tmp_path / "classes", {"none": aucs, "KKA(0)": aucs})
    with Image.open(tmp_path / "classes.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.min() < 128
    assert (pixels[[0, -1]] == 255).all()


def test_tsne_of_few_images_lowers_the_perplexity_and_repeats_itself():
    features = RNG.normal(size=(5, 8)).astype(np.float32)
    first, second = embed_2d(features), embed_2d(features)
    assert first.shape == (5, 2)
    assert np.isfinite(first).all()
    assert (first == second).all()


@pytest.mark.parametrize(
    ("features", "part"),
    [
        (RNG.normal(size=(3, 8)), "at least four"),
        (np.ones((9, 8)), "the same"),
        (np.full((9, 8), np.nan), "finite"),
    ],
)
def test_tsne_of_nothing_is_no_figure(features, part):
    with pytest.raises(NoDataError, match=part):
        embed_2d(features)


def test_failed_figure_leaves_the_old_one(tmp_path, monkeypatch):
    charts.draw_shares(tmp_path / "a", {"tuned LLM": [Share(1, 3, 9)]})
    before = (tmp_path / "a.png").read_bytes()
    with styled():
        figure = new_figure(3, 3)

    def fail(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="No space"):
        write_figure(figure, tmp_path / "a")
    assert (tmp_path / "a.png").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"\[plot\]"), styled():
        pass


def test_picture_of_a_loop_whose_test_set_has_one_class(tmp_path, shown):
    results = {"test_auc": None, "threshold": 1.0, "test_scores": [[0, 0, 0.5], [1, 0, 1.5]]}
    draw_loop(tmp_path / "loop.png", [("normal", shown)], [("no anomalies", results)])
    with Image.open(tmp_path / "loop.png") as picture:
        assert (np.asarray(picture.convert("L")) < 128).mean() > 0.001
