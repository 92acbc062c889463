"""Benchmarks are run by hand: here they are only loaded, so that they keep fitting the program."""

import json
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_loads_and_says_how_it_is_used(path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    names = runpy.run_path(str(path))
    for name in set(sys.modules) - before:
        if name in {each.stem for each in FOLDER.glob("*.py")}:
            del sys.modules[name]  # names as common as "export"
    assert names["__doc__"]
    if "main" in names and "build_parser" in names:
        monkeypatch.setattr(sys, "argv", [str(path), "--help"])
        with pytest.raises(SystemExit) as ended:
            names["main"]()
        assert ended.value.code == 0
        assert "usage: " in capsys.readouterr().out


def test_loops_of_one_seed_are_no_repetitions_and_untuned_ones_are_counted(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    names = runpy.run_path(str(FOLDER / "loops.py"))
    sys.modules.pop("deep_sad", None)
    for table, modes in (("loop_garden", ["add", "rep"]), ("loop_ucm_bank", ["add", "rep"])):
        report = json.loads((FOLDER / "results" / f"{table}.json").read_text())
        text = names["to_markdown"](report, modes)
        assert text == (FOLDER / "results" / f"{table}.md").read_text()
        both = names["looks"](report["loops"]).splitlines()
        one = names["looks"]([loop for loop in report["loops"] if loop["mode"] == "add"]).splitlines()
        same = 4 if table == "loop_garden" else 3  # head, untuned, round 0, in the garden also round 1
        assert both[:same] == one[:same]
    assert "-0.32 ± 1.69 (n = 4)" in text
