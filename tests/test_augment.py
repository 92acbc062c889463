"""The batch augmentation draws from the same distribution as torchvision's transforms on PIL images."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import functional as TF

from kka.augment import (
    BRIGHTNESS,
    CONTRAST,
    IMAGENET_MEAN,
    IMAGENET_STD,
    SATURATION,
    augment,
    blend_step,
    color_jitter,
    draw_jitter,
    luma,
    normalize,
    random_crops,
    resize_crops,
    shift_hue,
    to_unit,
)

N = 4000
OFFICIAL = T.Compose(
    [
        T.RandomResizedCrop(32, scale=(0.2, 1.0)),
        T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        T.RandomGrayscale(p=0.2),
        T.ToTensor(),
    ]
)


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(height=48, width=64):
    """A smooth colourful picture without symmetry."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    channels = [0.5 + 0.4 * np.sin(3 * x + y), 0.2 + 0.7 * y * x, 0.8 - 0.6 * x**2]
    return Image.fromarray((255 * np.stack(channels, -1)).astype(np.uint8))


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def features(images):
    """(N, 3, 32, 32) -> (N, 11) statistics that crop, flip, each colour step and gray move."""
    means = images.mean((2, 3))
    halves = images[..., :16].mean((1, 2, 3)) - images[..., 16:].mean((1, 2, 3))
    vertical = images[:, :, :16].mean((1, 2, 3)) - images[:, :, 16:].mean((1, 2, 3))
    saturation = (images.amax(1) - images.amin(1)).mean((1, 2))
    spread = images.std((2, 3))
    gray = (saturation < 0.02).float()
    return torch.cat([means, spread, torch.stack([halves, vertical, saturation, gray, halves.abs()], 1)], 1)


def test_whole_transform_has_the_distribution_of_torchvision():
    """Means and deviations of eleven statistics agree within four standard errors."""
    torch.manual_seed(0)
    image = picture()
    expected = features(torch.stack([OFFICIAL(image) for _ in range(N)]))
    square = as_tensor(image.resize((64, 64), Image.Resampling.LANCZOS))
    sizes = torch.tensor([[48, 64]]).expand(N, 2)
    ours = features(augment(square.expand(N, 3, 64, 64), sizes, 32, stream()))
    error = (ours.var(0) / N + expected.var(0) / N).sqrt()
    assert ((ours.mean(0) - expected.mean(0)).abs() < 4 * error + 1e-3).all()
    torch.testing.assert_close(ours.std(0), expected.std(0), rtol=0.08, atol=2e-3)


@pytest.mark.parametrize("size", [(48, 64), (100, 20), (32, 32)])
def test_crops_have_the_distribution_of_torchvision(size):
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    drawn = [T.RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(N)]
    expected = torch.tensor(drawn, dtype=torch.float64) / torch.tensor([*size, *size])
    ours = random_crops(torch.tensor([size]).expand(N, 2), stream())
    error = (ours.var(0) / N + expected.var(0) / N).sqrt()
    assert ((ours.mean(0) - expected.mean(0)).abs() < 4 * error + 1e-9).all()
    torch.testing.assert_close(ours.std(0), expected.std(0), rtol=0.08, atol=2e-3)


@pytest.mark.parametrize("box", [(0, 0, 48, 48), (5, 10, 30, 22), (20, 3, 8, 12)])
def test_resizing_equals_pillow(box):
    top, left, height, width = box
    image = picture(48, 48)
    boxes = torch.tensor([box], dtype=torch.float64) / 48
    ours = resize_crops(as_tensor(image), boxes, torch.tensor([False]), 32)[0]
    cropped = image.crop((left, top, left + width, top + height)).resize((32, 32), Image.Resampling.BILINEAR)
    assert (ours - TF.to_tensor(cropped)).abs().max() < 1.01 / 255  # Pillow rounds to integers, twice


def test_flip_mirrors_the_crop():
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.6]] * 2, dtype=torch.float64)
    pair = resize_crops(as_tensor(picture(64, 64)).repeat(2, 1, 1, 1), boxes, torch.tensor([False, True]), 32)
    torch.testing.assert_close(pair[0], pair[1].flip(-1))


@pytest.mark.parametrize(
    ("kind", "adjust"),
    [(BRIGHTNESS, TF.adjust_brightness), (CONTRAST, TF.adjust_contrast), (SATURATION, TF.adjust_saturation)],
)
@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_color_steps_equal_torchvision(kind, adjust, factor):
    images = torch.rand(2, 3, 32, 32, generator=stream())
    ours = blend_step(images, torch.full((2,), kind), torch.full((2, 3), factor))
    torch.testing.assert_close(ours, adjust(images, factor), atol=2e-3, rtol=0)


@pytest.mark.parametrize("shift", [-0.1, 0.0, 0.07])
def test_hue_equals_torchvision(shift):
    images = torch.rand(2, 3, 32, 32, generator=stream())
    images[0, :, :4] = 0.5  # gray has no hue
    ours = shift_hue(images, torch.full((2,), shift))
    torch.testing.assert_close(ours, TF.adjust_hue(images, shift), atol=1e-5, rtol=0)


def test_four_fifths_are_jittered_and_a_fifth_is_gray():
    images = torch.rand(1, 3, 8, 8, generator=stream()).expand(N, 3, 8, 8)
    jittered = color_jitter(images, *draw_jitter(len(images), stream(1)))
    changed = (jittered - images).abs().amax((1, 2, 3)) > 1e-4
    assert float(changed.float().mean()) == pytest.approx(0.8, abs=0.03)
    whole = augment((255 * images).byte(), torch.full((N, 2), 8), 8, stream(2))
    gray = (whole.amax(1) - whole.amin(1)).amax((1, 2)) < 1e-6
    assert float(gray.float().mean()) == pytest.approx(0.2, abs=0.03)


def test_images_of_a_batch_are_drawn_independently_and_by_the_seed_only():
    square = as_tensor(picture(64, 64)).repeat(8, 1, 1, 1)
    sizes = torch.full((8, 2), 64)
    first, again = augment(square, sizes, 32, stream(5)), augment(square, sizes, 32, stream(5))
    assert torch.equal(first, again)
    assert len({float(image.sum()) for image in first}) == 8
    assert not torch.equal(first, augment(square, sizes, 32, stream(6)))


def test_working_size_loses_little():
    """Crops of the squeezed 128 px copy against crops of a 375 x 500 px original."""
    original = picture(375, 500)
    square = as_tensor(original.resize((128, 128), Image.Resampling.LANCZOS))
    boxes = random_crops(torch.tensor([[375, 500]]).expand(50, 2), stream())
    ours = resize_crops(square.expand(50, 3, 128, 128), boxes, torch.zeros(50, dtype=torch.bool), 32)
    for box, crop in zip(boxes, ours, strict=True):
        top, left, height, width = (box * torch.tensor([375, 500, 375, 500])).round().int().tolist()
        cropped = original.crop((left, top, left + width, top + height))
        direct = TF.to_tensor(cropped.resize((32, 32), Image.Resampling.BILINEAR))
        assert (crop - direct).abs().mean() < 0.5 / 255


def test_normalize_is_imagenet():
    images = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(normalize(images), TF.normalize(images, IMAGENET_MEAN, IMAGENET_STD))
    assert normalize(luma(images)).shape == (2, 1, 4, 4)
    assert torch.equal(to_unit(torch.tensor([0, 255], dtype=torch.uint8)), torch.tensor([0.0, 1.0]))
