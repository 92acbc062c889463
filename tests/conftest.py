"""Every test keeps away from the user's cache, data and run folders."""

import os

# The test processes share the cores: one thread each. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Numbers are compared to the last digit: a machine with a GPU must not compute some of them there.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
from tiny_models import tiny_adapter, tiny_glm
from toy import run_toy, write_toy_set
from unreliable_drawer import draw

import kka.datasets.sources
import kka.run
import kka.tracking


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KKA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_event_files():
    """Tests of files do not depend on whether tensorboard is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kka.tracking, "DEFAULT", ())
        yield


@pytest.fixture(autouse=True)
def checkout(tmp_path, monkeypatch):
    """What main.py takes for its checkout: default data and run folders are in here."""
    folder = tmp_path / "checkout"
    monkeypatch.setattr(kka.run, "ROOT", folder)
    monkeypatch.setattr(kka.datasets.sources, "ROOT", folder)
    return folder


@pytest.fixture(scope="session")
def toy_set(tmp_path_factory):
    """A data set that tests only read."""
    return write_toy_set(tmp_path_factory.mktemp("toy_set"))


@pytest.fixture(scope="session")
def finished(toy_set, tmp_path_factory):
    """The folder of a finished run on `toy_set`; tests copy it before they change anything."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    outcome = run_toy(toy_set, folder)
    assert outcome.code == 0, outcome.stderr
    return folder


@pytest.fixture(scope="session")
def glm(tmp_path_factory):
    """A tiny LLM that tests only read."""
    return str(tiny_glm(tmp_path_factory.mktemp("llm") / "glm"))


@pytest.fixture(scope="session")
def random_adapter(glm, tmp_path_factory):
    """An adapter that changes it a lot."""
    return tiny_adapter(tmp_path_factory.mktemp("adapter"), glm)


@pytest.fixture(scope="session")
def painted(tmp_path_factory):
    """What an undisturbed run of the painter leaves."""
    folder = tmp_path_factory.mktemp("painted") / "0"
    draw(folder)
    return folder
