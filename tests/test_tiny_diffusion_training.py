"""The tiny Stable Diffusion and the reader that judges it: training, resuming, the checkpoint."""

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import SMALL, interrupt, losses, train
from toy import read_json, refused, snapshot, write_toy_set

import kka.captioned
import kka.tiny_autoencoder
import kka.tiny_diffusion
from kka.attributes import ATTRIBUTES, SIDE, agreement, ceiling, label, load_reader, read, to_tensor
from kka.captioned import draw_pool, read_images
from kka.datasets import garden, get_spec
from kka.datasets.images import content_digest
from kka.diffusion import Diffusers
from kka.drawers import DrawerSettings
from kka.tiny_autoencoder import build_vae, encode_images, to_unit, vae_loss
from kka.tiny_denoiser import build_scheduler, build_text_encoder, build_tokenizer, tokenize
from kka.tiny_diffusion import TinyDiffusionSettings, draw, follow

CAPTION = "this flower has several large round red petals and a black center"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished pipeline; its training is beside it."""
    out = tmp_path_factory.mktemp("trained") / "diffusion"
    outcome = train("diffusion", out)
    assert outcome.code == 0, outcome
    return out


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The folder of a reader that has hardly learnt anything."""
    out = tmp_path_factory.mktemp("reader") / "reader"
    outcome = train("reader", out)
    assert outcome.code == 0, outcome
    return out


def small_settings(**others):
    lists = {name: tuple(SMALL["diffusion"][name]) for name in ("widths", "vae_widths")}
    return TinyDiffusionSettings(**{**SMALL["diffusion"], **lists, **others})


def test_training_reduces_both_losses(trained):
    work = trained.with_name("diffusion.training")
    for phase, factor in (("autoencoder", 0.8), ("denoiser", 0.9)):
        values = losses(work, phase)
        assert len(values) == 3
        assert values[-1] < factor * values[0]


def test_checkpoint_is_one_of_diffusers(trained):
    from diffusers import AutoPipelineForText2Image

    pipe = AutoPipelineForText2Image.from_pretrained(trained)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert pipe.safety_checker is None
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    pipe.set_progress_bar_config(disable=True)
    pictures = draw(pipe, [CAPTION, "a small flower"], seed=0)
    assert [picture.size for picture in pictures] == [(16, 16)] * 2
    alone = np.asarray(draw(pipe, [CAPTION], seed=0)[0], int)
    assert abs(np.asarray(pictures[0], int) - alone).max() <= 1  # processors round a batch in their own ways
    n_bytes = sum(path.stat().st_size for path in trained.rglob("*.safetensors"))
    parameters = read_json(trained / "training.json")["figures"]["parameters"]
    assert n_bytes < 2.2 * parameters + 100_000


def test_checkpoint_draws_through_the_back_end(trained):
    settings = DrawerSettings(model=str(trained), preset="own", steps=4, guidance=3.0, device="cpu")
    images = Diffusers(settings, garden.SPEC).draw([CAPTION, "a small flower"], [1, 2])
    assert [image.size for image in images] == [(16, 16)] * 2


def test_unfinished_pipeline_can_be_looked_at(trained):
    from diffusers import AutoPipelineForText2Image

    work = trained.with_name("diffusion.training")
    with Image.open(work / "preview.png") as sheet:
        assert sheet.size == (8 * 32, 4 * 32)
    AutoPipelineForText2Image.from_pretrained(work / "pipeline")


def test_record_and_card(trained):
    record = read_json(trained / "training.json")
    assert record["identity"]["widths"] == [8, 16]
    assert record["figures"]["autoencoder PSNR, dB"] > 5
    assert set(record["minutes"]) == {"autoencoder", "denoiser"}
    assert "stand-in" in (trained / "README.md").read_text()


def test_interrupted_training_ends_the_same(trained, tmp_path):
    out = tmp_path / "diffusion"
    for module, after in ((kka.tiny_autoencoder, 45), (kka.tiny_diffusion, 5), (kka.tiny_diffusion, 45)):
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, module, after)
            assert train("diffusion", out).code == 130
    assert not out.exists()
    outcome = train("diffusion", out)
    assert outcome.code == 0, outcome
    assert "continuing after epoch 2 of denoiser" in outcome.log
    for path in trained.rglob("*.safetensors"):
        assert (out / path.relative_to(trained)).read_bytes() == path.read_bytes(), path
    works = [folder.with_name("diffusion.training") for folder in (out, trained)]
    assert (works[0] / "metrics.jsonl").read_text() == (works[1] / "metrics.jsonl").read_text()


def test_training_on_keeps_the_autoencoder(trained, tmp_path):
    outcome = train("diffusion", tmp_path / "more", start=trained, steps=20)
    assert outcome.code == 0, outcome
    before, after = (
        {path.parent.name: path.read_bytes() for path in folder.rglob("*.safetensors")}
        for folder in (trained, tmp_path / "more")
    )
    assert [name for name in before if before[name] == after[name]] == ["vae"]
    texts = [path.read_text() for path in (tmp_path / "more").rglob("*.json")]
    assert not any(str(trained.parent) in text for text in texts)
    assert (
        losses(tmp_path / "more.training", "denoiser")[0]
        < losses(trained.with_name("diffusion.training"), "denoiser")[0]
    )
    assert not losses(tmp_path / "more.training", "autoencoder")
    again = train("diffusion", tmp_path / "text", start=trained, new_text=True, steps=20)
    assert again.code == 0, again
    assert losses(tmp_path / "text.training", "denoiser") != losses(tmp_path / "more.training", "denoiser")
    record = read_json(tmp_path / "more" / "training.json")
    assert record["identity"]["start"] == content_digest(sorted(trained.rglob("*.safetensors")))


def test_finished_pipeline_is_left_alone(trained):
    before = snapshot(trained)
    assert "is finished" in train("diffusion", trained).log
    refused(train("diffusion", trained, steps=80), trained, "steps 60 there, 80 now")
    assert snapshot(trained) == before


def test_learns_any_captioned_images(tmp_path):
    root = write_toy_set(tmp_path / "set", classes=(1, 2), n_anomalies=0)
    flags = {"dataset_name": "ucm_caption", "data_path": root, "pool": None, "steps": 20, "vae_steps": 20}
    outcome = train("diffusion", tmp_path / "out", **flags)
    assert outcome.code == 0, outcome
    assert "UCM-Caption" in (tmp_path / "out" / "README.md").read_text()


def test_images_of_a_data_set_come_with_their_captions(tmp_path):
    root = write_toy_set(tmp_path / "set", classes=(1, 2), n_anomalies=3)
    pool = read_images(get_spec("ucm_caption"), str(root), 16, 0, 0)
    assert pool.images.shape == (20, 3, 16, 16)
    names = [name for k in (1, 2) for name in read_json(root / str(k) / "image.json")]
    assert [block[2] for block in pool.captions] == [f"caption 2 of {name}" for name in names]
    bright = pool.images.float().mean((1, 2, 3)) > 128
    assert bright[10:].double().mean() > bright[:10].double().mean()


def test_drawn_pool_is_kept_and_seeded(monkeypatch):
    first = draw_pool(5, 3, 16)
    assert torch.equal(first.images, draw_pool(5, 3, 16).images)
    assert not torch.equal(first.images, draw_pool(5, 4, 16).images)
    for captions in first.captions:
        assert len(captions) == 10
        assert len(garden.parse_caption(captions[0])) == 5
        whole = garden.parse_caption(captions[0]).items()
        assert all(garden.parse_caption(caption).items() <= whole for caption in captions)

    def refuse(*_):
        raise AssertionError("drawn again")

    monkeypatch.setattr(kka.captioned, "_draw_one", refuse)
    assert torch.equal(first.images, draw_pool(5, 3, 16).images)
    monkeypatch.setenv("KKA_CACHE", "off")
    with pytest.raises(AssertionError):
        draw_pool(5, 3, 16)


def test_tokens_are_those_of_the_pipeline():
    tokenizer = build_tokenizer([CAPTION, "a flower"])
    tokens = tokenize(tokenizer, [CAPTION, "", "an unknown Flower " * 30])
    assert tokens.shape == (3, 16)
    assert tokens[0, 0] == tokenizer.bos_token_id
    assert (tokens[1, 1:] == tokenizer.eos_token_id).all()
    assert tokenizer.unk_token_id in tokens[2]
    assert tokenizer.convert_tokens_to_ids("flower") in tokens[2]


def test_new_text_encoder_tells_last_words_apart():
    tokenizer = build_tokenizer([CAPTION, CAPTION.replace("black", "white")])
    torch.manual_seed(0)
    text = build_text_encoder(tokenizer)
    captions = [CAPTION, CAPTION.replace("black", "white"), CAPTION.replace("large", "black")]
    with torch.no_grad():
        black, white, large = text(tokenize(tokenizer, captions)).last_hidden_state
    place = tokenize(tokenizer, [CAPTION])[0].tolist().index(tokenizer.convert_tokens_to_ids("black"))
    assert (black - white)[place].norm() > 0.5 * black[place].norm()
    assert (black - white)[:place].norm() < 1e-4
    assert (black - large)[place].norm() > 1e-2  # it reads what stands before


def test_last_timestep_is_pure_noise():
    scheduler = build_scheduler()
    assert scheduler.alphas_cumprod[-1] == 0
    scheduler.set_timesteps(15)
    assert scheduler.timesteps[0] == 999


def test_autoencoder_halves_the_side_and_latents_have_deviation_1():
    vae = build_vae(small_settings())
    images = draw_pool(5, 3, 16).images
    latents, factor = encode_images(vae, images)
    assert latents.shape == (10, 2, 8, 8)
    assert latents.float().std() == pytest.approx(1, abs=1e-2)
    with torch.no_grad():
        mirrored = vae.encode(to_unit(images.flip(-1))).latent_dist.mode() * factor
    assert torch.allclose(latents[5:].float(), mirrored, atol=1e-2)


def test_autoencoder_loss_counts_edges():
    vae, images = build_vae(small_settings()).requires_grad_(False), torch.zeros(2, 3, 16, 16)
    vae.decode = lambda _: type("Output", (), {"sample": decoded})
    decoded = torch.full_like(images, 0.5)
    flat = vae_loss(vae, images, 0.0, torch.Generator())
    assert float(flat) == pytest.approx(0.5 + 5 * 0.25)
    decoded[..., ::2] = -0.5
    striped = vae_loss(vae, images, 0.0, torch.Generator())
    assert float(striped) == pytest.approx(0.5 + 5 * 0.25 + 1.0)
    assert vae_loss(vae, images, 1.0, torch.Generator()) > striped


def test_average_follows_the_model():
    average, model = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    expected = 0.9 * average.weight + 0.1 * model.weight
    follow(average, model, 0.9)
    assert torch.allclose(average.weight, expected)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"side": 18}, ["--side", "multiple of 4"]),
        ({"widths": [12]}, ["--widths", "multiples of 8"]),
        ({"vae_widths": [12]}, ["--vae_widths", "multiples of 8"]),
        ({"steps": 0}, ["--steps", "above 0"]),
        ({"no_caption": 1.0}, ["--no_caption", "[0, 1)"]),
        ({"ema": 1.0}, ["--ema"]),
        ({"kl_weight": -1.0}, ["--kl_weight"]),
        ({"start": "nowhere"}, ["--start nowhere", "model_index.json"]),
        ({"reader": "nowhere"}, ["nowhere", "does not exist", "reader --out"]),
        ({"reader": "nowhere", "dataset_name": "flower"}, ["--reader", "garden's attributes only"]),
        ({"dataset_name": "lawn"}, ["lawn", "known are"]),
        ({"out": None}, ["--out"]),
    ],
)
def test_bad_input(tmp_path, flags, parts):
    refused(train("diffusion", **{"out": tmp_path / "out", **flags}), *parts)
    assert not (tmp_path / "out").exists()


def test_start_of_another_size_is_refused(trained, tmp_path):
    outcome = train("diffusion", tmp_path / "out", start=trained, latent_channels=4)
    refused(outcome, trained, "--latent_channels 2")


def test_data_set_without_captions(tmp_path):
    root = write_toy_set(tmp_path / "set", classes=(1,), n_anomalies=0)
    (root / "1" / "caption_sentence.json").unlink()
    flags = {"dataset_name": "ucm_caption", "data_path": root}
    refused(train("diffusion", tmp_path / "out", **flags), root, "no captioned training images")
    refused(train("glm", tmp_path / "out", **flags), root, "no captioned training images")


def test_reader_learns(reader):
    values = losses(reader.with_name("reader.training"), "reader")
    assert values[-1] < values[0]
    figures = read_json(reader / "training.json")["figures"]
    assert len(figures) == len(ATTRIBUTES)


def test_pipeline_is_judged_by_the_reader(reader, tmp_path):
    outcome = train("diffusion", tmp_path / "out", reader=reader, steps=20, vae_steps=20)
    assert outcome.code == 0, outcome
    figures = read_json(tmp_path / "out" / "training.json")["figures"]
    assert "drawn images" in figures["colour as the caption says"]


def test_labels_of_captions():
    rows = label([CAPTION, "the small flower has pink petals and a yellow center"])
    values = [list(ATTRIBUTES[name]) for name in ATTRIBUTES]
    assert [values[k][i] for k, i in enumerate(rows[0].tolist())] == [
        "red", "several", "round", "large", "black",
    ]  # fmt: skip
    names = list(ATTRIBUTES)
    assert [names[k] for k, i in enumerate(rows[1].tolist()) if i < 0] == ["count", "shape"]


def test_agreement_counts_only_what_captions_name(reader):
    judge = load_reader(reader)
    images = draw_pool(6, 5, SIDE).images
    found = read(judge, images)
    words = {name: [ATTRIBUTES[name][i] for i in found[:, k].tolist()] for k, name in enumerate(ATTRIBUTES)}
    captions = [
        f"{colour} petals, {size}" for colour, size in zip(words["colour"], words["size"], strict=True)
    ]
    captions[0] = f"{words['colour'][0]} petals"
    shares = agreement(judge, images, captions)
    assert shares["colour"] == shares["size"] == 1
    assert np.isnan(shares["count"])
    assert set(ceiling(judge, 8, seed=0)) == set(ATTRIBUTES)


def test_pictures_are_read_as_a_detector_sees_them():
    picture = garden.draw(garden.SPECIES[1], np.random.default_rng(0))
    tensor = to_tensor([picture, picture.convert("RGBA")])
    assert tensor.shape == (2, 3, 32, 32)
    small = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(tensor[0].permute(1, 2, 0).numpy(), small)


def test_damaged_reader(reader, tmp_path):
    (tmp_path / "reader.safetensors").write_bytes((reader / "reader.safetensors").read_bytes()[:-50])
    refused(train("diffusion", tmp_path / "out", reader=tmp_path), tmp_path, "no reader of attributes")
    assert train("reader", tmp_path / "r", steps=0).code == 2
    refused(train("reader", tmp_path / "r", seed=-1), "--seed")
