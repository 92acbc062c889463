"""Files to tensors: exact resizing, every mode, damaged files, and the cache."""

import math
import os
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import Resize
from toy import DAMAGED, draw, write_damaged

from kka.augment import RATIO, SCALE
from kka.datasets import images
from kka.datasets.images import cache_folder, content_digest, decode, read_image, read_native, working_side
from kka.errors import UserError
from kka.report.gallery import encode

SIZES = [(20, 20), (33, 27), (200, 150), (1, 1)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of this test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("KKA_CACHE", str(folder))
    return folder


@pytest.fixture
def files(tmp_path):
    """Images of several sizes."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{k}.png" for k in range(len(SIZES))]
    for path, size in zip(paths, SIZES, strict=True):
        draw(rng, bright=False, size=size).save(path)
    return paths


def read(paths, side=24, size=32, **options):
    return decode(paths, content_digest(paths), side, size, **options)


def pixels(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


@pytest.fixture
def opened(monkeypatch):
    """The files that Pillow opens."""
    paths, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: paths.append(path) or real(path))
    return paths


def test_resized_is_what_torchvision_makes(files):
    for path, resized in zip(files, read(files).resized, strict=True):
        assert torch.equal(resized, pixels(Resize((32, 32))(Image.open(path))))


def test_working_copies_are_lanczos_squares(files):
    decoded = read(files)
    for path, image in zip(files, decoded.images, strict=True):
        assert torch.equal(image, pixels(Image.open(path).resize((24, 24), Image.Resampling.LANCZOS)))
    assert decoded.native_sizes.tolist() == [[height, width] for width, height in SIZES]
    assert decoded.good.tolist() == [True] * 4
    assert decoded.good.all()


def test_without_working_copies_and_without_images(files):
    assert read(files, side=0).images.shape == (4, 3, 0, 0)
    empty = read([])
    assert (empty.images.shape, empty.resized.shape) == ((0, 3, 24, 24), (0, 3, 32, 32))
    assert (empty.native_sizes.shape, empty.good.shape) == ((0, 2), (0,))


def test_working_side_is_the_largest_side_up_to_128(files):
    sides = [read_native(part)[1] for part in (files[:1], files[:2], files, [])]
    assert sides == [20, 33, 200, 1]
    assert [working_side(side, size=32) for side in sides] == [20, 33, 128, 1]


@pytest.mark.parametrize("size", [28, 32, 49, 64, 224, 288])
def test_smallest_crop_of_a_working_copy_is_never_enlarged(size):
    side = working_side(10_000, size)
    assert side >= 128
    assert side * math.sqrt(SCALE[0] * RATIO[0]) >= size


def test_threads_do_not_matter(files, monkeypatch):
    monkeypatch.setenv("KKA_CACHE", "off")
    assert equal(read(files * 8, threads=1), read(files * 8, threads=4))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    picture = draw(np.random.default_rng(1), bright=False, size=(30, 22))
    picture = picture.convert("L").convert("LA") if mode == "LA" else picture.convert(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    picture.save(path)
    assert Image.open(path).mode == mode
    expected = np.asarray(picture.convert("RGB"))
    assert np.array_equal(np.asarray(read_image(path)), expected)
    assert read([path]).resized.shape == (1, 3, 32, 32)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_transparent_palette_becomes_rgb(tmp_path):
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    picture.save(tmp_path / "image.png", transparency=b"\x80\x40")
    assert read_image(tmp_path / "image.png").getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_refused_where_they_would_become_white(tmp_path, suffix):
    path, shallow = tmp_path / f"deep.{suffix}", tmp_path / f"shallow.{suffix}"
    Image.fromarray(np.array([[5, 300, 65535]], np.uint16)).save(path)
    Image.fromarray(np.array([[5, 200, 255]], np.uint16)).save(shallow)
    with pytest.raises(UserError, match=f"{path} has 16 bits per channel"):
        read_image(path)
    assert np.asarray(read_image(shallow))[0, :, 0].tolist() == [5, 200, 255]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_32_bits_are_refused(tmp_path, dtype):
    path = tmp_path / "deep.tif"
    Image.fromarray(np.array([[0, 1]], dtype)).save(path)
    with pytest.raises(UserError, match=f"{path} has 32 bits per channel"):
        read_image(path)


HEADER = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    "data",
    [HEADER + b"\0\0\0\5IHDR12345", b"P6\n-3 x\n", b"P6\n4 4\n255000000000\n"],
    ids=["header", "word", "depth"],
)  # fmt: skip
def test_whatever_pillow_raises_is_one_sentence(tmp_path, data):
    path = tmp_path / "bad.png"
    path.write_bytes(data)
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_image(path)
    assert encode(path, 64, 50) is None


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    for reading in (read_image, lambda path: content_digest([path])):
        with pytest.raises(UserError, match="no regular file"):
            reading(tmp_path / "x.png")


def test_one_pixel_fills_the_image(tmp_path):
    path = tmp_path / "one.png"
    Image.new("RGB", (1, 1), (1, 2, 3)).save(path)
    decoded = read([path])
    assert decoded.resized[0].flatten(1).unique(dim=1).flatten().tolist() == [1, 2, 3]
    assert decoded.images[0].flatten(1).unique(dim=1).flatten().tolist() == [1, 2, 3]


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    picture = draw(np.random.default_rng(2), bright=False, size=(30, 20))
    picture.save(tmp_path / "turned.png", exif=exif)
    expected = np.asarray(picture.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(np.asarray(read_image(tmp_path / "turned.png")), expected)
    assert read([tmp_path / "turned.png"]).native_sizes.tolist() == [[30, 20]]


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_file_is_named(tmp_path, files, kind):
    bad = write_damaged(tmp_path / "bad.jpg", kind)
    with pytest.raises(UserError, match=r"bad\.jpg is .*; restore it$"):
        read([*files, bad])


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_are_skipped(tmp_path, files, kind):
    bad = write_damaged(tmp_path / "bad.jpg", kind)
    decoded = read([files[0], bad, files[1]], skip_bad=True)
    assert decoded.good.tolist() == [True, False, True]
    assert decoded.good.tolist().count(False) == 1
    whole = read(files[:2], skip_bad=True)
    for name in ("images", "resized", "native_sizes"):
        assert torch.equal(getattr(decoded, name), getattr(whole, name))


def test_all_files_damaged(tmp_path):
    bad = write_damaged(tmp_path / "bad.jpg", "empty")
    decoded = read([bad], skip_bad=True)
    assert decoded.images.shape == (0, 3, 24, 24)
    assert decoded.good.tolist().count(False) == 1


def write_bomb(path, side):
    """A PNG of 100 bytes that says it has side x side pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize("side", [8_001, 9_500, 60_000])  # ours, Pillow's warning, Pillow's error
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, side):
    bomb = write_bomb(tmp_path / "bomb.png", side)
    with pytest.raises(UserError, match=r"bomb\.png .*pixels"):
        read([bomb])
    assert not read([bomb], skip_bad=True).good.any()


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.png"):
        content_digest([tmp_path / "gone.png"])
    with pytest.raises(UserError, match=r"gone\.png"):
        read_image(tmp_path / "gone.png")


def test_digest_is_of_contents_in_their_order(tmp_path, files):
    copy = tmp_path / "copy.png"
    copy.write_bytes(files[0].read_bytes())
    digest = content_digest(files)
    assert content_digest([copy, *files[1:]]) == digest
    assert content_digest(files[::-1]) != digest
    assert content_digest(files[:-1]) != digest


def test_second_decode_reads_the_cache(files, opened):
    first = read(files)
    assert len(opened) == len(files)
    assert equal(read(files), first)
    assert len(opened) == len(files)


def test_skipped_files_are_remembered_by_the_cache(tmp_path, files, opened):
    bad = write_damaged(tmp_path / "bad.jpg", "html")
    first = read([bad, *files], skip_bad=True)
    del opened[:]
    assert equal(read([bad, *files], skip_bad=True), first)
    assert opened == []
    with pytest.raises(UserError):
        read([bad, *files])


def test_changed_file_is_decoded_anew(files, opened):
    first = read(files)
    draw(np.random.default_rng(9), bright=True, size=SIZES[0]).save(files[0])
    second = read(files)
    assert len(opened) == 2 * len(files)
    assert not torch.equal(first.resized[0], second.resized[0])
    assert torch.equal(first.resized[1:], second.resized[1:])


@pytest.mark.parametrize("options", [{"side": 0}, {"side": 23}, {"size": 28}])
def test_other_sizes_are_decoded_anew(files, opened, options):
    read(files)
    decoded = read(files, **options)
    assert len(opened) == 2 * len(files)
    assert decoded.images.shape[-1] == options.get("side", 24)
    assert decoded.resized.shape[-1] == options.get("size", 32)


@pytest.mark.parametrize("damage", [lambda data: data[:-50], lambda data: b"", lambda data: b"\0" * 100])
def test_damaged_cache_is_made_anew(files, cache, opened, caplog, damage):
    first = read(files)
    (cached,) = cache.iterdir()
    good = cached.read_bytes()
    cached.write_bytes(damage(good))
    assert equal(read(files), first)
    assert len(opened) == 2 * len(files)
    assert f"{cached} is damaged" in caplog.text
    assert cached.read_bytes() == good


def test_cache_that_cannot_be_written_only_warns(files, tmp_path, monkeypatch, caplog):
    expected = read(files)
    (tmp_path / "file").touch()
    monkeypatch.setenv("KKA_CACHE", str(tmp_path / "file" / "cache"))
    assert equal(read(files), expected)
    assert "not cached" in caplog.text


def test_too_large_copies_are_not_kept_on_disk(files, cache, monkeypatch):
    monkeypatch.setattr(images, "MAX_CACHED", 4 * 3 * (24**2 + 32**2))
    read(files)
    assert len(list(cache.iterdir())) == 1
    read(files, size=33)
    assert len(list(cache.iterdir())) == 1


def test_cache_can_be_off_and_lies_in_the_users_cache_folder(files, cache, opened, monkeypatch, tmp_path):
    monkeypatch.setenv("KKA_CACHE", "off")
    read(files)
    read(files)
    assert len(opened) == 2 * len(files)
    assert not cache.exists()
    monkeypatch.delenv("KKA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "kka"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "kka"
