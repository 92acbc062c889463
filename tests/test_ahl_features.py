"""AHL's features, kept on disk, of turned images; and the batches that are drawn of them."""

from dataclasses import replace

import pytest
import torch
from test_ahl import TINY, two_kinds
from toy_tensors import toy_images

from kka.detectors.ahl import AHL
from kka.detectors.ahl_tasks import FeatureBank, Part
from kka.detectors.deviation import find_groups


def test_features_on_disk_are_continued_where_they_stopped(tmp_path):
    model = AHL(TINY).base.model.eval()
    images = toy_images(40, True, 64).float() / 255
    asked = []

    def some(first, n):
        asked.append(first)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return images[first : first + n]

    with pytest.raises(KeyboardInterrupt):
        FeatureBank(model, some, 20, 2, tmp_path / "features")
    bank = FeatureBank(model, some, 20, 2, tmp_path / "features")
    assert asked == [0, 16, 16, 32]
    rows = torch.tensor([19, 0, 7])
    device = torch.device("cpu")
    memory = FeatureBank(model, lambda first, n: images[first : first + n], 20, 2, None)
    for on_disk, in_memory, wanted in zip(
        bank.take(rows, device), memory.take(rows, device), model.pyramid(images[rows]), strict=True
    ):
        assert torch.equal(on_disk, in_memory)
        torch.testing.assert_close(on_disk, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("turned", [True, False])
def test_features_are_of_turned_images_or_of_images_as_they_are(turned):
    train = two_kinds()
    detector = AHL(replace(TINY, turned=turned))
    bank = detector._fill_bank(train, find_groups(train, False), None)
    with torch.no_grad():
        plain = detector.base.model.pyramid(train.resized)[0]
    kept = torch.from_numpy(bank.arrays[0][: len(train)]).float()
    assert torch.allclose(kept, plain, rtol=2e-3, atol=2e-3) is not turned


def test_features_of_other_views_are_not_continued(tmp_path):
    model = AHL(TINY).base.model.eval()
    images = toy_images(20, True, 64).float() / 255
    FeatureBank(model, lambda first, n: images[first : first + n], 20, 1, tmp_path / "features")
    doubled = torch.cat([images, images])
    bank = FeatureBank(model, lambda first, n: doubled[first : first + n], 20, 2, tmp_path / "features")
    assert len(bank.arrays[0]) == 40
    first, second = torch.from_numpy(bank.arrays[0]).float().split(20)
    torch.testing.assert_close(first, second, rtol=2e-3, atol=2e-3)


def test_each_image_is_taken_in_all_its_views():
    model = AHL(TINY).base.model.eval()
    images = toy_images(9, True, 64).float() / 255
    bank = FeatureBank(model, lambda first, n: images[first : first + n], 3, 3, None)
    views = torch.from_numpy(bank.arrays[0]).float().view(3, 3, -1)
    stream = torch.Generator().manual_seed(0)
    taken = bank.take(torch.ones(60, dtype=torch.long), torch.device("cpu"), stream)[0].flatten(1)
    seen = {tuple((row == views[:, 1]).all(1).tolist()) for row in taken}
    assert seen == {(True, False, False), (False, True, False), (False, False, True)}
    first = bank.take(torch.tensor([1]), torch.device("cpu"))[0].flatten()
    assert torch.equal(first, views[0, 1])


def test_batches_have_equal_parts():
    part = Part(torch.arange(5), torch.arange(5, 10), torch.arange(10, 11))
    for rows in part.batches(9, 4, torch.Generator().manual_seed(0)):
        assert torch.equal(rows // 5, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]))
