"""The eight conversions to MVTec's format, each on a small copy of the original's layout."""

import numpy as np
import pytest
from PIL import Image
from toy import call_script, read_json, refused, run_main, toy_flags

import prepare
from kka import conversions
from kka.conversions import CONVERSIONS, Piece, convert, divide
from kka.errors import UserError, run_script


def picture(path, size=(20, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(60, 160, (size[1], size[0], 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def mask(path, size, box=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0]), np.uint8)
    if box:
        pixels[box[1] : box[3], box[0] : box[2]] = 255
    Image.fromarray(pixels).save(path)


def aitex(root):
    for k in range(4):
        picture(root / "NODefect_images" / f"fabric{k % 2}" / f"000{k}_000_0{k}.png", (1024, 16))
    for code, box in (("002", (300, 2, 310, 8)), ("036", (500, 0, 520, 4))):
        picture(root / "Defect_images" / f"0001_{code}_00.png", (1024, 16))
        mask(root / "Mask_images" / f"0001_{code}_00_mask.png", (1024, 16), box)
    return {"good": 16, "Broken_end": 1, "Weft_crack": 2}


def sdd(root):
    for k, box in enumerate([None, None, None, (2, 25, 6, 28)]):
        picture(root / f"kos0{k}" / "Part0.jpg", (10, 30))
        mask(root / f"kos0{k}" / "Part0_label.bmp", (10, 30), box)
    return {"good": 11, "defect": 1}


def elpv(root):
    cells = [("0.0", "mono")] * 5 + [("0.3333", "mono"), ("1.0", "poly"), ("1.0", "mono")]
    for k in range(len(cells)):
        picture(root / "images" / f"cell{k:04d}.png")
    lines = [f"images/cell{k:04d}.png  {share}    {kind}" for k, (share, kind) in enumerate(cells)]
    (root / "labels.csv").write_text("\n".join(lines))
    return {"good": 5, "poly": 1, "mono": 1}


def optical(root):
    for folder, anomalous in (("Class1/Train", 1), ("Class1/Test", 0), ("Class10/Train", 1)):
        lines = ["1"]
        for k in range(3):
            label = f"{k:04d}_label.PNG" if k < anomalous else "0"
            picture(root / folder / f"{k:04d}.PNG")
            if k < anomalous:
                mask(root / folder / "Label" / label, (20, 12), (1, 1, 3, 3))
            lines.append(f"{k}\t{int(k < anomalous)}\t{k:04d}.PNG\t0\t{label}")
        (root / folder / "Label").mkdir(exist_ok=True)
        (root / folder / "Label" / "Labels.txt").write_text("\n".join(lines))
    return {"good": 7, "Class0": 1, "Class9": 1}


def mastcam(root):
    for k in range(4):
        picture(root / "train_typical" / f"{k}.png")
    (root / "test_typical").mkdir()
    np.save(root / "test_typical" / "9.npy", np.full((8, 8, 6), 100, np.uint8))
    for kind in ("all", "veins"):
        picture(root / "test_novel" / kind / "v1.png")
    picture(root / "test_novel" / "drt" / "d1.png")
    return {"good": 5, "veins": 1, "drt": 1}


def brainmri(root):
    for k in range(4):
        picture(root / "no" / f"{k} no.jpg")
    picture(root / "no" / "0 no.png")
    picture(root / "yes" / "Y1.JPG")
    return {"good": 5, "defect": 1}


def headct(root):
    for k in range(6):
        picture(root / "head_ct" / f"{k:03d}.png")
    rows = ["id, hemorrhage", *(f"{k}, {int(k >= 4)}" for k in range(6))]
    (root / "labels.csv").write_text("\n".join(rows))
    return {"good": 4, "defect": 2}


def hyperkvasir(root):
    tract = root / "labeled-images" / "upper-gi-tract"
    for place in ("pylorus", "z-line"):
        for k in range(2):
            picture(tract / "anatomical-landmarks" / place / f"{k}.jpg")
    picture(tract / "pathological-findings" / "barretts" / "0.jpg")
    return {"good": 4, "barretts": 1}


LAYOUTS = {f.__name__: f for f in (aitex, sdd, elpv, optical, mastcam, brainmri, headct, hyperkvasir)}


def counts(out):
    found = {}
    for path in out.glob("t*/*/*.png"):
        found[path.parent.name] = found.get(path.parent.name, 0) + 1
    return found


def test_parts_of_a_single_image_cannot_be_divided(tmp_path):
    path = tmp_path / "a.png"
    pieces = [Piece("good", "a_0", path), Piece("good", "a_1", path), Piece("defect", "a_2", path)]
    with pytest.raises(UserError, match="fewer than two normal images"):
        divide(pieces, tmp_path)


def test_every_conversion_is_tested():
    assert set(LAYOUTS) == set(CONVERSIONS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_kinds_split_and_masks(tmp_path, name):
    expected, out = LAYOUTS[name](tmp_path / "source"), tmp_path / "out"
    convert(name, tmp_path / "source", out)
    assert counts(out) == expected
    assert 0 < len(list((out / "test" / "good").iterdir())) < expected["good"]
    assert [folder.name for folder in (out / "train").iterdir()] == ["good"]
    masks = list(out.glob("ground_truth/*/*.png"))
    for path in masks:
        image = Image.open(out / "test" / path.parent.name / path.name.replace("_mask", ""))
        assert Image.open(path).size == image.size
        assert Image.open(path).getbbox()
    if name in ("aitex", "sdd", "optical"):
        assert len(masks) == sum(n for kind, n in expected.items() if kind != "good")


def test_parts_of_one_image_stay_on_one_side(tmp_path):
    aitex(tmp_path / "source")
    convert("aitex", tmp_path / "source", tmp_path / "out")
    folders = [tmp_path / "out" / side / "good" for side in ("train", "test")]
    sides = [{path.stem.rpartition("_")[0] for path in folder.iterdir()} for folder in folders]
    assert not sides[0] & sides[1]
    assert Image.open(next(folders[0].iterdir())).size == (256, 16)


def test_interrupted_conversion_continues_and_a_finished_one_is_left_alone(tmp_path, monkeypatch, capsys):
    brainmri(tmp_path / "source")
    out, write = tmp_path / "out", conversions._write

    def stop(path, image):
        if len(list(out.rglob("*.png"))) == 3:
            raise KeyboardInterrupt
        write(path, image)

    monkeypatch.setattr(conversions, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        convert("brainmri", tmp_path / "source", out)
    monkeypatch.undo()
    convert("brainmri", tmp_path / "source", out)
    assert sum(counts(out).values()) == sum(read_json(out / "converted.json")["counts"].values()) == 6
    convert("brainmri", tmp_path / "source", out)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds brainmri; choose another --out"):
        convert("headct", tmp_path / "source", out)


def put(name, data):
    return lambda root: (root / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def array(values):
    return lambda root: np.save(root / "test_typical" / "9.npy", values)


def rename_defect(root):
    (root / "Defect_images" / "0001_002_00.png").rename(root / "Defect_images" / "0001_001_00.png")


@pytest.mark.parametrize(
    ("name", "spoil", "part"),
    [
        ("aitex", lambda root: (root / "Mask_images" / "0001_002_00_mask.png").unlink(), "has no mask"),
        ("aitex", rename_defect, "'001', is no known defect"),
        ("sdd", lambda root: (root / "kos00" / "Part0_label.bmp").unlink(), "which does not exist"),
        ("elpv", put("labels.csv", "a b"), "line 1 must be a file"),
        ("elpv", lambda root: (root / "images" / "cell0000.png").write_bytes(b"x"), "cannot be read"),
        ("optical", lambda root: (root / "Class1/Train/Label/Labels.txt").unlink(), "which does not exist"),
        ("headct", lambda root: (root / "head_ct" / "003.png").unlink(), "003.png, which does not exist"),
        ("brainmri", lambda root: (root / "yes" / "Y1.JPG").unlink(), "there are no images at"),
        ("brainmri", put("yes/Y2.heic", ""), "holds 'Y2.heic', whose type is not read"),
        ("elpv", put("labels.csv", "images/cell0000.png 1.0 ../../evil"), "line 1 must be .* mono or poly"),
        ("elpv", put("labels.csv", "images/cell0000.png ² mono"), "line 1 must be"),
        ("elpv", put("labels.csv", b"images/cell0000.png 1.0 m\xf6no"), "labels.csv is no UTF-8 text"),
        ("elpv", put("labels.csv", "../source/images/cell0000.png 0 mono"), "is not in"),
        ("optical", lambda root: (root / "Class1").rename(root / "ClassX"), "ClassX must be called Class"),
        ("optical", put("Class1/Train/Label/Labels.txt", b"1\n\xff"), "no UTF-8 text"),
        ("headct", put("labels.csv", b"\xff"), "no UTF-8 text"),
        ("headct", put("labels.csv", "id, x\n², 0"), "must be a number and 0 or 1"),
        ("mastcam", put("test_typical/9.npy", b""), "cannot be read"),
        ("mastcam", array(np.ones((8, 8), np.uint8)), "its shape is"),
        ("mastcam", array(np.ones((8, 8, 1), np.uint8)), "its shape is"),
        ("mastcam", array(np.full((8, 8, 3), 0.5)), "lie in 0 to 1"),
        ("mastcam", array(np.full((8, 8, 3), 999)), "do not lie in 0 to 255"),
    ],
)  # fmt: skip
def test_bad_sources_are_one_sentence(tmp_path, name, spoil, part):
    LAYOUTS[name](tmp_path / "source")
    spoil(tmp_path / "source")
    with pytest.raises(UserError, match=part):
        convert(name, tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("text", ["[]", "{}"])
def test_a_record_of_something_else_is_refused(tmp_path, text):
    brainmri(tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "converted.json").write_text(text)
    with pytest.raises(UserError, match="is no record of a conversion"):
        convert("brainmri", tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--out", "{}/file/out"], "is a file"),
        (["--out", "{}/file"], "is a file; name a folder"),
        (["--out", "~nosuchuser/out"], "no home folder"),
        (["--seed", "3"], "--seed has no effect for brainmri"),
        (["--captions", "x"], "--captions has no effect"),
        (["--no_check"], "--no_check has no effect"),
    ],
)
def test_flags_that_make_no_sense_are_refused(tmp_path, words, part):
    brainmri(tmp_path / "source")
    (tmp_path / "file").write_text("mine")
    given = [word.format(tmp_path) for word in words]
    base = ["prepare.py", "brainmri", "--source", str(tmp_path / "source"), "--out", str(tmp_path / "out")]
    refused(call_script(prepare.main, [*base, *given]), part)
    assert not (tmp_path / "out").exists()


def test_command_and_training_on_its_result(tmp_path, monkeypatch, capsys):
    brainmri(tmp_path / "source")
    words = ["prepare.py", "brainmri", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stop:
        run_script(prepare.main)
    assert stop.value.code == 2
    assert "give --source" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*words, "--source", str(tmp_path / "source")])
    run_script(prepare.main)
    flags = {"dataset_name": "folder", "user_dict": None, "n_anomalies": 0}
    outcome = run_main(toy_flags(tmp_path / "out", tmp_path / "run", **flags))
    assert outcome.code == 0, outcome.stderr
    refused(run_main(toy_flags(tmp_path / "source", tmp_path / "other", **flags)), "has no folder train/good")
