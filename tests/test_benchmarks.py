"""Benchmarks are run by hand: here they are only loaded, so that they keep fitting the program."""

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
