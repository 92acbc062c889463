"""Damaged, hostile and downloaded archives."""

import io
import json
import runpy
import shutil
import sys
import tarfile
import threading
import zipfile
from collections import namedtuple
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from originals import (
    SCRIPT,
    make_cifar,
    make_flowers,
    make_tar,
    make_ucm,
    no_check,
    tree,
    trust_cifar,
)
from torchvision.datasets import CIFAR100, Flowers102
from torchvision.datasets.utils import calculate_md5

import kka.prepare
from kka.archives import unpack
from kka.datasets import flower
from kka.datasets.layout import read_class_folder
from kka.errors import UserError
from kka.prepare import prepare


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch):
    monkeypatch.setattr("kka.files.os.fsync", lambda descriptor: None)


# Archives ---------------------------------------------------------------------------------------------------


def test_wrong_md5_unpacks_nothing(tmp_path):
    archive = make_cifar(tmp_path / "in")
    content = archive.read_bytes()
    with pytest.raises(UserError, match=f"{calculate_md5(archive)}, the original has {CIFAR100.tgz_md5}"):
        prepare("cifar100", tmp_path / "out", archive)
    assert archive.read_bytes() == content
    assert list(tree(tmp_path / "out")) == ["prepared.partial.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html></html>", "no tar or zip archive but a web page"),
        (b"", "no tar or zip archive; get"),
        (b"Rar!\x1a\x07\x00", "rar archive, which is not supported"),
    ],
)
def test_other_files_are_no_archive(tmp_path, content, message):
    (tmp_path / "a.tgz").write_bytes(content)
    with pytest.raises(UserError, match=message):
        unpack(tmp_path / "a.tgz", tmp_path / "work")
    assert not any((tmp_path / "work").iterdir())


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_cut_archive_leaves_nothing(tmp_path, kind):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "noise").write_bytes(np.random.default_rng(0).bytes(50_000))
    whole = make_tar(tmp_path / "a.tgz", folder).read_bytes()
    if kind == "zip":
        whole = bytearray(Path(shutil.make_archive(str(tmp_path / "a"), "zip", folder)).read_bytes())
        whole[20_000] ^= 1
    (tmp_path / "cut").write_bytes(whole[:40_000] if kind == "tar" else whole)
    with pytest.raises(UserError, match="is damaged"):
        unpack(tmp_path / "cut", tmp_path / "work")
    assert not any((tmp_path / "work").iterdir())


def evil_member(name: str, link: str = "") -> tuple[tarfile.TarInfo, io.BytesIO]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = (tarfile.SYMTYPE, link) if link else (tarfile.REGTYPE, "")
    member.size = 0 if link else 4
    return member, io.BytesIO(b"evil")


@pytest.mark.parametrize("link", ["", "../../evil", "/etc"])
def test_tar_that_leads_outside_is_refused(tmp_path, link):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(*evil_member("good"))
        tar.addfile(*evil_member("link", link) if link else evil_member("../../evil"))
    with pytest.raises(UserError, match="not safe to unpack"):
        unpack(tmp_path / "a.tar", tmp_path / "work")
    assert list(tree(tmp_path)) == ["a.tar"]


def test_harmless_links_of_a_tar_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(*evil_member("good"))
        tar.addfile(*evil_member("link", "good"))
    assert [path.name for path in unpack(tmp_path / "a.tar", tmp_path / "work").iterdir()] == ["good"]


@pytest.mark.parametrize("name", ["../evil", "/evil", "..\\evil", "link"])
def test_zip_that_leads_outside_is_refused(tmp_path, name):
    member = zipfile.ZipInfo(name)
    if name == "link":
        member.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(member, "/etc")
    with pytest.raises(UserError, match="not safe to unpack"):
        unpack(tmp_path / "a.zip", tmp_path / "work")
    assert list(tree(tmp_path)) == ["a.zip"]


def test_full_disk_is_noticed_before_unpacking(tmp_path, monkeypatch):
    archive = make_cifar(tmp_path / "in")
    usage = namedtuple("usage", "free")(3 * archive.stat().st_size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"MB free, .* MB are needed"):
        no_check("cifar100", tmp_path / "out", archive)
    assert list(tree(tmp_path / "out")) == ["prepared.partial.json"]


# Downloads --------------------------------------------------------------------------------------------------


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """(folder that is served, its URL)."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_cifar_is_downloaded_and_checked(tmp_path, site, monkeypatch):
    folder, url = site
    archive = make_cifar(folder)
    trust_cifar(monkeypatch, archive)
    monkeypatch.setattr(CIFAR100, "url", url + archive.name)
    monkeypatch.setattr(kka.prepare, "Original", partial_size(kka.prepare.Original))
    prepare("cifar100", tmp_path / "out")
    prepare("cifar100", tmp_path / "given", archive)
    assert tree(tmp_path / "out") == tree(tmp_path / "given")


def partial_size(original):
    """The same without asking the disk for the size of the real archive."""
    return lambda *fields, size=0: original(*fields)


def test_flowers_are_downloaded_and_checked(tmp_path, site, monkeypatch):
    folder, url = site
    make_flowers(folder)
    files = {key: (name, name) for key, (name, _) in Flowers102._file_dict.items()}
    for key in ("image", "label"):
        files[key] = (files[key][0], calculate_md5(folder / files[key][0]))
    monkeypatch.setattr(Flowers102, "_file_dict", files)
    monkeypatch.setattr(Flowers102, "_download_url_prefix", url)
    monkeypatch.setattr(kka.prepare, "Original", partial_size(kka.prepare.Original))
    prepare("flower", tmp_path / "out")
    assert len(read_class_folder(tmp_path / "out" / "57", "train", 0, flower.SPEC)) == 51


def test_web_page_instead_of_the_archive(tmp_path, site, monkeypatch):
    folder, url = site
    (folder / "cifar-100-python.tar.gz").write_text("<html>please log in</html>")
    monkeypatch.setattr(CIFAR100, "url", url + "cifar-100-python.tar.gz")
    monkeypatch.setattr(kka.prepare, "Original", partial_size(kka.prepare.Original))
    with pytest.raises(
        UserError, match=rf"{url}\S+ gave a file with MD5 .* the original has {CIFAR100.tgz_md5}"
    ):
        prepare("cifar100", tmp_path / "out")
    assert list(tree(tmp_path / "out")) == ["prepared.partial.json"]


def test_half_download_is_started_again(tmp_path, site, monkeypatch):
    folder, url = site
    archive = make_cifar(folder)
    trust_cifar(monkeypatch, archive)
    monkeypatch.setattr(CIFAR100, "url", url + archive.name)
    monkeypatch.setattr(kka.prepare, "Original", partial_size(kka.prepare.Original))

    def cut(url: str, folder: Path, name: str, md5: str) -> None:
        folder.mkdir(parents=True)
        (folder / name).write_bytes(archive.read_bytes()[:100])
        raise ConnectionResetError("cut")

    with monkeypatch.context() as patch:
        patch.setattr("kka.archives.download_url", cut)
        with pytest.raises(UserError, match=r"cannot download .*cut"):
            prepare("cifar100", tmp_path / "out")
    assert not list((tmp_path / "out").glob(f".source/{archive.name}"))
    prepare("cifar100", tmp_path / "out")
    assert (tmp_path / "out" / "prepared.json").exists()


def test_unreachable_server_is_explained(tmp_path, site, monkeypatch):
    monkeypatch.setattr(CIFAR100, "url", site[1] + "missing.tar.gz")
    monkeypatch.setattr(kka.prepare, "Original", partial_size(kka.prepare.Original))
    with pytest.raises(UserError, match=r"cannot download .*404.*--source"):
        prepare("cifar100", tmp_path / "out")


# Arguments and the script -----------------------------------------------------------------------------------


def test_bad_arguments_are_explained(tmp_path):
    out, nowhere = tmp_path / "out", tmp_path / "nowhere"
    with pytest.raises(UserError, match="no data set 'mnist'"):
        prepare("mnist", out)
    with pytest.raises(UserError, match=r"--source .*nowhere does not exist"):
        prepare("flower", out, nowhere)
    with pytest.raises(UserError, match=r"--captions .*nowhere does not exist"):
        prepare("flower", out, captions=nowhere)
    with pytest.raises(UserError, match="--captions is for flower"):
        prepare("cifar100", out, captions=tmp_path)
    with pytest.raises(UserError, match="--seed must be 0 or larger"):
        prepare("cifar100", out, seed=-1)
    assert not out.exists()
    with pytest.raises(UserError, match=r"--source is missing.*UCM_captions"):
        prepare("ucm_caption", out)


def run_script(monkeypatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, flags)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_script_prepares(tmp_path, monkeypatch, capsys):
    source = make_ucm(tmp_path / "in")
    run_script(
        monkeypatch, "ucm_caption", "--source", source, "--out", tmp_path / "out", "--seed", 3, "--no_check"
    )
    assert "12 training and 3 test images" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "prepared.json").read_text())["seed"] == 3


def test_script_reports_bad_input_in_one_sentence(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_script(monkeypatch, "ucm_caption", "--out", tmp_path / "out")
    assert capsys.readouterr().err.startswith("error: --source is missing")
