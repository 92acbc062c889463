"""Reports on tables of src/reproduce.py."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from anomaly_sets import draw_set
from fabricated import change, write_loop, write_run
from test_report import figures_of, make_report, page_of
from toy import refused

from kka import tables
from kka.report.data import Share, share_series, size_series, table_sizes
from kka.report.sources import Group, LoopRecord
from kka.report.tables import read_table

CELL = {
    "text": "70.00 ± 1.00 (n = 2)",
    "aucs": [0.69, 0.71],
    "paper": "72.33 ± 2.06",
    "runs": ["log/a", "log/b"],
}
EMPTY = {"text": "", "aucs": [], "paper": "", "runs": 0}
TABLE = {
    "title": "Table III <garden>", "notes": ["stand-ins & no reproduction"], "columns": ["none", "KKA(0)"],
    "rows": [{"name": "UCM", "cells": [CELL, EMPTY]}],
}  # fmt: skip


def test_table_stands_beside_the_paper(tmp_path):
    path = tmp_path / "table3.json"
    path.write_text(json.dumps(TABLE))
    assert make_report(path).code == 0
    text = page_of(tmp_path / "table3_report")
    for part in (
        "Table III &lt;garden&gt;", "stand-ins &amp; no reproduction", "70.00 ± 1.00 (n = 2)",
        "paper: 72.33 ± 2.06", "log/a, log/b", '<th scope="row">UCM</th>', "1 of 2",
    ):  # fmt: skip
        assert part in text
    assert figures_of(tmp_path / "table3_report") == {"table"}
    (tmp_path / "table4.json").write_text(json.dumps({**TABLE, "title": "Table IV"}))
    assert make_report(tmp_path, "--out", tmp_path / "all").code == 0  # a folder of tables
    assert "Table IV" in page_of(tmp_path / "all" / "table4")


def test_figure_4_of_a_table_is_drawn_over_the_number_of_anomalies(tmp_path):
    cells = []
    for n in (50, 100):
        jobs = [write_run(tmp_path / f"{n}_{k}", 0.7 + k / 100, seed=k) for k in range(2)]
        jobs = tuple(change(job, "results.json", n_generated=n) for job in jobs)
        cells.append(tables.Cell(f"initial, {n}", "Oxford-102", jobs, counted=True))
    loops = tuple(write_loop(tmp_path / f"loop_{k}", [0.5], [0.7], [0.8 + k / 50]) for k in range(2))
    rounds = [{"test_aucs": [0.8], "size": size} for size in (200, 231)]
    loops = (loops[0], change(loops[1], "results.json", rounds=rounds))
    cells += [tables.Cell(f"KKA({k}), add", "Oxford-102", loops, str(k), counted=True) for k in (0, 1)]
    tables.write_table(tables.tabulate("Fig. 4", cells), tmp_path / "t")
    series = table_sizes(read_table(tmp_path / "t.json"))
    assert {name: [(p.n, p.aucs, p.label) for p in points] for name, points in series.items()} == {
        "initial anomalies only": [(50, (0.7, 0.71), ""), (100, (0.7, 0.71), "")],
        "KKA, add": [(200, (0.7, 0.8), "KKA(0)"), (216, (0.8, 0.8), "KKA(1)")],
    }
    assert make_report(tmp_path / "t.json").code == 0
    assert figures_of(tmp_path / "t_report") == {"sizes"}


def test_a_table_that_reproduce_writes_is_read_with_what_its_runs_cost(tmp_path):
    jobs = tuple(write_run(tmp_path / str(k), 0.8 + k / 100, seed=k) for k in range(2))
    loop = write_loop(tmp_path / "loop", [0.6], [0.8])
    cells = [tables.Cell("SAD", "Oxford-102", jobs), tables.Cell("loop", "Oxford-102", (loop,), "none")]
    tables.write_table(tables.tabulate("T", cells), tmp_path / "t")
    (_, (first,)), (_, (second,)) = read_table(tmp_path / "t.json").rows
    assert (first.aucs, first.cost["MiB"], second.cost) == ((0.8, 0.81), 901.0, {})
    assert make_report(tmp_path / "t.json").code == 0
    text = page_of(tmp_path / "t_report")
    for part in ("Oxford-102: images/s", "<td>901</td>"):
        assert part in text


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"rows": [{"name": "UCM", "cells": [CELL, {**EMPTY, "cost": {"MiB": "x"}}]}]}, "cost must be"),
        ({"rows": []}, "no rows"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"title": None}, "title must be a string"),
        ({"columns": ["none"]}, "2 cells for 1 columns"),
        ({"rows": [{"name": "UCM", "cells": [CELL, {**CELL, "aucs": [70.0]}]}]}, "from 0 to 1"),
        ({"rows": [{"name": "UCM", "cells": [CELL, {**CELL, "aucs": [float("nan")]}]}]}, "'KKA(0)'"),
        ({"rows": [{"name": "UCM", "cells": [CELL, {"text": ""}]}]}, "lacks 'aucs'"),
        ({"rows": [{"name": "UCM", "cells": 3}]}, "row 0"),
    ],
)
def test_malformed_table_is_refused(tmp_path, change, part):
    (tmp_path / "t.json").write_text(json.dumps({**TABLE, **change}))
    refused(make_report(tmp_path / "t.json"), part, tmp_path / "t.json")
    assert not (tmp_path / "t_report").exists()


def test_detectors_are_not_joined_to_one_line():
    def group(detector, n, auc, **settings):
        run = SimpleNamespace(
            detector=detector, auc=auc, newest_round=0, results={"n_generated": n}, settings=settings
        )
        return Group(detector, Path(), (run,))

    groups = [
        group("deep_sad", 0, 0.6),
        group("deep_sad", 9, 0.8),
        group("ssd", 0, 0.5),
        group("ssd", 9, 0.7),
    ]
    series = size_series([], groups)
    assert {name: [(point.n, point.aucs) for point in points] for name, points in series.items()} == {
        "deep_sad, initial anomalies only": [(0, [0.6]), (9, [0.8])],
        "ssd, initial anomalies only": [(0, [0.5]), (9, [0.7])],
    }
    assert list(size_series([], groups[:2])) == ["initial anomalies only"]
    others = [
        group("deep_sad", n, 0.5, lr=rate, normal_class=[20, 21])
        for n, rate in ((0, 0.1), (9, 0.1), (9, 0.2))
    ]
    assert list(size_series([], others)) == [
        "lr 0.1, initial anomalies only",
        "lr 0.2, initial anomalies only",
    ]
    others += [group("ssd", 9, 0.5, lr=0.3, normal_class=[7])]
    assert list(size_series([], others))[1:] == [
        "deep_sad, normal 20 21, lr 0.2, initial anomalies only",
        "ssd, normal 7, lr 0.3, initial anomalies only",
    ]


def test_shares_are_of_images_and_captions_without_one_do_not_count(tmp_path):
    draw_set(tmp_path / "round_1" / "fresh", 5)
    rows = [{"round": k, "captions": 7, "hard": 0.4, "hard_untuned": None} for k in (0, 1)]
    series = share_series([LoopRecord("loop", tmp_path, {}, {"rounds": rows})])
    assert series == {"tuned LLM": [Share(1, 2, 5)]}
