"""The back ends: the real diffusers library on a tiny pipeline, the bank, the garden's painter."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_diffusion import SIDE, tiny_diffusion
from toy import image_path, write_toy_set

from kka.datasets import garden, get_spec
from kka.datasets.layout import write_class_folder
from kka.diffusion import model_id
from kka.drawers import PRESETS, STYLES, DrawerSettings, build_drawer, is_black, styled
from kka.errors import UserError

FLOWER, GARDEN, UCM = get_spec("flower"), get_spec("garden"), get_spec("ucm_caption")
CAPTIONS = ("red petals", "blue petals", "a large white flower", "thin petals, yellow", "pink")
SEEDS = (5, 6, 7, 8, 9)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_diffusion(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def drawer(checkpoint):
    return diffusers(checkpoint)


def diffusers(checkpoint, spec=FLOWER, **settings):
    return build_drawer(DrawerSettings(model=checkpoint, steps=2, device="cpu", **settings), spec)


def pixels(images):
    return np.stack([np.asarray(image, dtype=int) for image in images])


class SmallMemory:
    """A pipeline on a GPU that holds no more than `most` images."""

    def __init__(self, pipe, most):
        self.pipe, self.most, self.batches = pipe, most, []

    def __call__(self, prompt, **settings):
        self.batches.append(len(prompt))
        if len(prompt) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.pipe(prompt=prompt, **settings)


def test_batch_and_single_images_agree(drawer):
    together = pixels(drawer.draw(CAPTIONS, SEEDS))
    alone = pixels([drawer.draw([c], [s])[0] for c, s in zip(CAPTIONS, SEEDS, strict=True)])
    assert together.shape == (5, SIDE, SIDE, 3)
    assert abs(together - alone).max() <= 1  # a rounding error of 1e-6 may fall on either side of a half
    assert (together != alone).mean() < 0.01


def test_batch_and_single_latents_agree(drawer):
    def run(prompts, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return drawer.pipe(
            prompt=prompts, generator=generators, num_inference_steps=2, output_type="np"
        ).images

    together = run(list(CAPTIONS), SEEDS)
    alone = np.concatenate([run([c], [s]) for c, s in zip(CAPTIONS, SEEDS, strict=True)])
    assert abs(together - alone).max() < 1e-4


def test_seed_and_caption_decide_the_image(drawer):
    one, same, other_seed = pixels(drawer.draw(["red petals"] * 3, [5, 5, 6]))
    assert abs(one - same).max() <= 1
    assert (one != other_seed).mean() > 0.5
    (other_caption,) = pixels(drawer.draw(["a large white flower"], [5]))
    assert (one != other_caption).any()


def test_settings_are_recorded(drawer, checkpoint):
    assert re.fullmatch(r"checkpoint0@[0-9a-f]{12}", drawer.id)
    assert drawer.settings == {
        "scheduler": "DPMSolverMultistepScheduler", "steps": 2, "guidance": 7.5, "lora": None, "size": None,
        "suffix": STYLES["flower"], "dtype": "float32", "safety_checker": True,
    }  # fmt: skip


def test_model_is_named_by_its_content(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy" / "checkpoint0")
    assert model_id(str(copy)) == model_id(checkpoint)
    (copy / "unet" / "config.json").write_text("{}")
    assert model_id(str(copy)) != model_id(checkpoint)
    assert model_id("stabilityai/sd-turbo") == "stabilityai/sd-turbo"


@pytest.mark.parametrize(
    "flags", [{"steps": 0}, {"size": 20}, {"size": 0}, {"guidance": -1.0}, {"max_requests": 0}]
)
def test_values_without_sense_are_one_sentence(flags):
    with pytest.raises(UserError, match=f"--{next(iter(flags))} must"):
        build_drawer(DrawerSettings(**flags), FLOWER)


def test_presets_and_flags_decide_scheduler_steps_and_guidance(checkpoint):
    def settings(**flags):
        own = build_drawer(DrawerSettings(model=checkpoint, device="cpu", **flags), GARDEN)
        return own.settings["scheduler"], own.settings["steps"], own.settings["guidance"]

    assert settings() == ("DPMSolverMultistepScheduler", 25, 7.5)
    assert settings(preset="sd-turbo") == ("DDIMScheduler", 4, 0.0)  # the model's own
    assert settings(preset="own") == ("DDIMScheduler", 50, 7.5)  # and the pipeline's own
    assert settings(preset="sdxl-turbo", steps=1, guidance=0.5) == ("DDIMScheduler", 1, 0.5)


def test_other_steps_size_and_style_give_other_images(drawer, checkpoint):
    (image,) = pixels(drawer.draw(["red petals"], [5]))
    for other in (diffusers(checkpoint, guidance=1.0), diffusers(checkpoint, suffix="")):
        assert (pixels(other.draw(["red petals"], [5]))[0] != image).any()
    assert diffusers(checkpoint, size=32).draw(["red petals"], [5])[0].size == (32, 32)


def test_styles_say_what_kind_of_picture_a_data_set_has(checkpoint):
    assert diffusers(checkpoint, UCM).settings["suffix"] == STYLES["ucm_caption"]
    assert diffusers(checkpoint, GARDEN).settings["suffix"] == ""
    assert styled("two tennis courts", STYLES["ucm_caption"]) == (
        "two tennis courts, aerial photograph from straight above"
    )
    assert styled("two tennis courts", "") == "two tennis courts"


def test_latent_consistency_preset_loads_its_adapter(checkpoint, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        "diffusers.StableDiffusionPipeline.load_lora_weights", lambda self, name: loaded.append(name)
    )
    own = build_drawer(DrawerSettings(model=checkpoint, preset="lcm", device="cpu"), FLOWER)
    assert loaded == [PRESETS["lcm"].lora] == [own.settings["lora"]]
    assert own.settings["scheduler"] == "LCMScheduler"
    (image,) = own.draw(["red petals"], [5])
    assert image.size == (SIDE, SIDE)


def test_full_memory_halves_the_batch_and_changes_no_image(checkpoint, drawer):
    own = diffusers(checkpoint)
    own.pipe = SmallMemory(own.pipe, 2)
    images = own.draw(CAPTIONS, SEEDS)
    assert own.pipe.batches == [5, 2, 2, 1]
    assert abs(pixels(images) - pixels(drawer.draw(CAPTIONS, SEEDS))).max() <= 1
    own.draw(CAPTIONS, SEEDS)
    assert own.pipe.batches[4:] == [2, 2, 1]  # it has learnt


def test_memory_too_small_for_one_image_is_one_sentence(checkpoint):
    own = diffusers(checkpoint)
    own.pipe = SmallMemory(own.pipe, 0)
    with pytest.raises(UserError, match=r"memory is too small for one image of .*--size"):
        own.draw(CAPTIONS, SEEDS)
    assert own.pipe.batches == [5, 2, 1]


def test_model_too_large_for_the_memory_is_one_sentence(checkpoint, monkeypatch):
    def full(self, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("diffusers.DiffusionPipeline.to", full)
    with pytest.raises(UserError, match=r"does not fit into the GPU's memory; .*--dtype float16"):
        diffusers(checkpoint)


def test_images_of_the_safety_checker_are_left_out(tmp_path):
    checkpoint = str(tiny_diffusion(tmp_path / "checked", flagged=0.12))
    own = diffusers(checkpoint)
    images = own.draw(["a flower"] * 8, range(8))
    n_blocked = images.count(None)
    assert 0 < n_blocked < 8
    assert own.failures == {"safety checker": n_blocked}
    assert not any(is_black(image) for image in images if image)
    free = diffusers(checkpoint, safety_checker=False)
    assert None not in free.draw(["a flower"] * 8, range(8))
    assert free.settings["safety_checker"] is False


def test_black_images_are_left_out_without_a_checker_too(checkpoint):
    own = diffusers(checkpoint)
    with torch.no_grad():
        own.pipe.vae.decoder.conv_out.weight.zero_()
        own.pipe.vae.decoder.conv_out.bias.fill_(-5.0)
    assert own.draw(["a", "b"], [1, 2]) == [None, None]
    assert own.failures == {"black image": 2}


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "RGBA"])
def test_black_is_without_any_light(mode):
    image = Image.new(mode, (4, 4))
    assert is_black(image)
    image.putpixel((1, 2), {"RGB": (0, 0, 1), "RGBA": (0, 1, 0, 255)}.get(mode, 1))
    assert not is_black(image)


@pytest.mark.parametrize("damage", ["missing", "no model", "truncated", "other kind"])
def test_model_that_cannot_be_loaded_is_one_sentence(damage, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = tmp_path / "model"
    if damage in ("truncated", "other kind"):
        model = tiny_diffusion(tmp_path / "model")
        file = {"truncated": "unet/diffusion_pytorch_model.safetensors", "other kind": "model_index.json"}[
            damage
        ]
        data = (model / file).read_bytes()
        (model / file).write_bytes(data[:-100] if damage == "truncated" else data.replace(b"Pipeline", b"X"))
    elif damage == "no model":
        model.mkdir()
    with pytest.raises(UserError) as error:
        diffusers(str(model))
    assert str(model) in str(error.value)
    assert "--model PATH" in str(error.value)
    assert "\n" not in str(error.value)


def test_hub_model_without_network_is_named_with_its_adapter(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"stable-diffusion-v1-5/\S+ or latent-consistency/\S+ cannot be loaded"
    ):
        build_drawer(DrawerSettings(preset="lcm", device="cpu"), FLOWER)


def test_preset_that_does_not_fit_the_model_is_refused(checkpoint, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    model = tiny_diffusion(tmp_path / "flow")
    FlowMatchEulerDiscreteScheduler().save_pretrained(model / "scheduler")
    index = (model / "model_index.json").read_text()
    (model / "model_index.json").write_text(index.replace("DDIMScheduler", "FlowMatchEulerDiscreteScheduler"))
    with pytest.raises(UserError, match=r"FlowMatchEulerDiscreteScheduler.*add --preset own"):
        diffusers(str(model))
    assert diffusers(str(model), preset="own").settings["scheduler"] == "FlowMatchEulerDiscreteScheduler"


def test_own_preset_needs_a_model():
    with pytest.raises(UserError, match="--model"):
        build_drawer(DrawerSettings(preset="own"), FLOWER)


@pytest.fixture(scope="module")
def bank_root(tmp_path_factory):
    """Classes 1 to 4 with captions that name their image; 1 is normal, 0 holds anomalies."""
    return write_toy_set(tmp_path_factory.mktemp("bank"), n_train=5)


def bank(root, used=(), **settings):
    settings = {"bank": str(root), "bank_exclude": (1,), **settings}
    return build_drawer(DrawerSettings(backend="bank", **settings), UCM, used)


def test_bank_takes_the_nearest_image_and_none_twice(bank_root):
    own = bank(bank_root)
    caption = "caption 0 of train_07.png"  # of the second image of each class
    images = own.draw([caption] * 4, [0] * 4)
    sources = [image.info["source"] for image in images]
    assert sources[:3] == ["2/train_07.png", "3/train_07.png", "4/train_07.png"]
    assert sources[3] not in sources[:3]
    with Image.open(image_path(bank_root, 2, 1)) as expected:
        assert np.array_equal(np.asarray(images[0]), np.asarray(expected))
    assert own.id == "bank"
    assert own.settings["images"] == 15


def test_bank_goes_on_where_it_stopped(bank_root):
    captions = [f"caption 0 of train_{7 * k % 31:02d}.png" for k in (1, 2, 1, 1, 3, 1)]
    whole = [image.info["source"] for image in bank(bank_root).draw(captions, [0] * 6)]
    rest = bank(bank_root, used=whole[:4]).draw(captions[4:], [0] * 2)
    assert [image.info["source"] for image in rest] == whole[4:]
    assert len(set(whole)) == 6


def test_bank_leaves_out_normal_classes_anomalies_and_test_images(bank_root):
    own = bank(bank_root)
    images = own.draw(["caption"] * 15, [0] * 15)
    sources = [image.info["source"] for image in images]
    assert len(set(sources)) == 15
    assert {source.split("/")[0] for source in sources} == {"2", "3", "4"}
    assert all("/train_" in source for source in sources)
    with pytest.raises(UserError, match=r"all 15 images of the bank .* are used"):
        own.draw(["caption"], [0])


def test_bank_can_be_one_class_folder(bank_root):
    own = bank(bank_root / "1")
    assert own.draw(["caption 3 of train_14.png"], [0])[0].info["source"] == "train_14.png"


def test_bank_in_another_format_is_told_what_it_lacks(tmp_path):
    (tmp_path / "train" / "good").mkdir(parents=True)
    with pytest.raises(UserError, match=r"--bank .* put images, image.json and caption_sentence"):
        bank(tmp_path)


def test_bank_gives_nothing_for_a_caption_of_unknown_words(bank_root):
    own = bank(bank_root)
    images = own.draw(["nothing alike", "train_07"], [0, 1])
    assert images[0] is None
    assert images[1] is not None
    assert own.failures == {"no caption of the bank has a word in common": 1}


def test_bank_prefers_rare_words(tmp_path):
    texts = ["a red boat", "a green boat", "a red car"]
    for number in range(3):
        (tmp_path / "5").mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (number, 9, 9)).save(tmp_path / "5" / f"image_{number}.png")
    names = [f"image_{number}.png" for number in range(3)]
    write_class_folder(tmp_path / "5", "train", names, [[text] * 5 for text in texts], UCM)
    images = bank(tmp_path).draw(["one car that is red", "a boat", "red"], [0] * 3)
    assert [image and image.getpixel((0, 0))[0] for image in images] == [2, 0, None]


@pytest.mark.parametrize("kind", ["not given", "missing", "empty", "without captions"])
def test_bad_bank_is_one_sentence(kind, tmp_path):
    if kind in ("empty", "without captions"):
        (tmp_path / "bank" / "2").mkdir(parents=True)
    if kind == "without captions":
        write_class_folder(tmp_path / "bank" / "2", "train", [], [], UCM)
    with pytest.raises(UserError, match="--bank"):
        bank(tmp_path / "bank", **({"bank": None} if kind == "not given" else {}))


def test_garden_is_drawn_exactly():
    own = build_drawer(DrawerSettings(backend="garden"), GARDEN)
    caption = garden.captions(garden.SPECIES[3], np.random.default_rng(0), 1)[0]
    images = own.draw([caption, caption], [4, 5])
    assert np.array_equal(images[0], garden.draw_caption(caption, np.random.default_rng(4)))
    assert not np.array_equal(images[0], images[1])
    with pytest.raises(UserError, match="garden's captions only, not those of Oxford-102"):
        build_drawer(DrawerSettings(backend="garden"), FLOWER)
