"""Preference tuning on a tiny GLM: what is learnt and left behind, rounds, resuming, bad input."""

import json
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from toy import read_json, snapshot
from toy_pairs import SMALL, WEIGHTS, load_policy, pink_pairs, tokenizer_of

import kka.preference_trainer
import kka.tune
from kka.errors import TrainingError, UserError
from kka.files import sha256
from kka.preference_trainer import build_trainer
from kka.tune import dpo_loss, last_checkpoint, tune

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # trl uses names that transformers renames


@pytest.fixture(scope="module")
def first_round(glm, tmp_path_factory):
    """Folder and results of a finished tuning, and what had it in memory; tests only read it."""
    seen = []

    def watch(*arguments):
        trainer = build_trainer(*arguments)
        for thing in (trainer, trainer.model, trainer.model.get_base_model()):
            seen.append(weakref.ref(thing))
        return trainer

    out = tmp_path_factory.mktemp("rounds") / "round_1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kka.tune, "build_trainer", watch)
        results = tune(glm, pink_pairs(), out, SMALL)
    alive = [reference() for reference in seen]
    return out, results, alive


def test_loss_by_hand():
    zero = torch.zeros(3)
    assert dpo_loss(zero, zero, zero, zero).item() == pytest.approx(0.693147, abs=1e-6)
    # Margins 0.1 * ((1 - -1) - (-3 - 0)) = 0.5 and 0.1 * ((0 - 2) - (0 - 0)) = -0.2.
    policy, reference = (
        (torch.tensor([1.0, 0.0]), torch.tensor([-3.0, 0.0])),
        (torch.tensor([-1.0, 2.0]), torch.zeros(2)),
    )
    assert dpo_loss(*policy, *reference).item() == pytest.approx((0.474077 + 0.798139) / 2, abs=1e-6)


def test_preference_is_learnt(first_round):
    results = first_round[1]
    assert results["margin_before"] == 0
    assert results["margin_after"] > 0.05
    assert results["accuracy_after"] == 1
    assert results["loss_after"] < results["loss_before"] == pytest.approx(0.693147, abs=1e-5)
    assert (results["n_train"], results["n_validation"], results["steps"]) == (16, 8, 6)


def test_what_is_left_behind(first_round, glm):
    out, results, _ = first_round
    assert sorted(p.name for p in out.iterdir()) == ["adapter_config.json", WEIGHTS, "tuning"]
    record = out / "tuning"
    files = ["config.json", "metrics.jsonl", "pairs.json", "results.json", "run.lock"]
    assert sorted(p.name for p in record.iterdir()) == files
    assert read_json(record / "results.json") == results
    lines = [json.loads(line) for line in (record / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "eval_loss" in line] == [
        0,
        4,
        6,
    ]  # the last one is always there
    assert {"rewards/margins", "rewards/accuracies", "grad_norm", "learning_rate"} <= lines[1].keys()
    assert lines[-1]["eval_rewards/margins"] == results["margin_after"]


def test_the_adapter_is_an_ordinary_one(first_round, glm):
    from transformers import AutoModelForCausalLM

    out = first_round[0]
    tokenizer = tokenizer_of(glm)
    inputs = tokenizer(pink_pairs().validation[0]["chosen"], return_tensors="pt")
    ours, untuned = load_policy(glm, out)(**inputs).logits, load_policy(glm)(**inputs).logits
    theirs = AutoModelForCausalLM.from_pretrained(out)(**inputs).logits
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, untuned)


def test_rounds(first_round, glm, tmp_path):
    """Against the original LLM a round starts where the last ended, against the previous one from zero."""
    (out, results, _), short = first_round, replace(SMALL, max_steps=3)
    original = tune(glm, pink_pairs(), tmp_path / "a", short, adapter=out)
    assert original["margin_before"] == pytest.approx(results["margin_after"], abs=1e-5)
    assert original["margin_after"] > original["margin_before"]
    previous = tune(glm, pink_pairs(), tmp_path / "b", replace(short, reference="previous"), adapter=out)
    assert previous["margin_before"] == 0
    assert previous["margin_after"] > 0
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["adapter_config.json", WEIGHTS, "tuning"]


def test_finished_and_other_settings(first_round, glm, tmp_path, monkeypatch):
    out = shutil.copytree(first_round[0], tmp_path / "copy")
    before = snapshot(out)
    with monkeypatch.context() as patch:
        patch.setattr(kka.tune, "build_trainer", None)
        assert tune(glm, pink_pairs(), out, SMALL) == first_round[1]
        for other in (replace(SMALL, beta=0.2), replace(SMALL, seed=1)):
            with pytest.raises(
                UserError, match=r"other settings \((beta 0.1 there, 0.2 now|seed 42 there, 1 now)\)"
            ):
                tune(glm, pink_pairs(), out, other)
        with pytest.raises(UserError, match="pairs"):
            tune(glm, pink_pairs(n_train=12), out, SMALL)
    assert snapshot(out) == {**before, "tuning/run.lock": snapshot(out)["tuning/run.lock"]}
    assert tune(glm, pink_pairs(), out, replace(SMALL, max_steps=1), overwrite=True)["steps"] == 1
    assert sha256(out / WEIGHTS) != sha256(first_round[0] / WEIGHTS)


class KilledError(BaseException):
    """Stands for a signal: nothing in between may catch it."""


@pytest.mark.parametrize(
    ("step", "continued"),
    [(5, True), (None, False)],
    ids=["between", "saving"],
)
def test_resume(first_round, glm, tmp_path, monkeypatch, step, continued):
    """Interrupted in a second round between two checkpoints, or in a first one while the adapter is saved."""
    settings = replace(SMALL, reference="previous") if continued else SMALL
    adapter = first_round[0] if continued else None
    whole = tmp_path / "whole" if continued else first_round[0]
    if continued:
        tune(glm, pink_pairs(), whole, settings, adapter)

    def kill(entry):
        if "loss" in entry and entry["step"] == step:
            raise KilledError
        return metrics_line(entry)

    def kill_saving(*_, **__):
        raise KilledError

    metrics_line = kka.tune._metrics_line
    out = tmp_path / "resumed"
    with monkeypatch.context() as patch:
        patch.setattr(kka.tune, "_metrics_line", kill)
        if step is None:
            patch.setattr(kka.tune, "write_json", kill_saving)
        with pytest.raises(KilledError):
            tune(glm, pink_pairs(), out, settings, adapter)
    if step == 5:
        with pytest.raises(
            UserError, match=r"unfinished tuning with other settings \(lr 0.005 there, 1 now\)"
        ):
            tune(glm, pink_pairs(), out, replace(settings, lr=1), adapter)
    resumed = tune(glm, pink_pairs(), out, settings, adapter)
    files, expected = snapshot(out), snapshot(whole)
    assert files[WEIGHTS] == expected[WEIGHTS]
    assert files["tuning/metrics.jsonl"] == expected["tuning/metrics.jsonl"]
    assert files.keys() == expected.keys()
    told = read_json(whole / "tuning" / "results.json")
    assert {**resumed, "seconds": 0} == {**told, "seconds": 0}


def test_the_last_whole_checkpoint_counts(tmp_path):
    assert last_checkpoint(tmp_path, 30) is None
    for step, text in ((5, '{"global_step": 5}'), (10, '{"global_step": 10}'), (15, '{"log_his'), (20, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path, 30).name == "checkpoint-10"
    assert last_checkpoint(tmp_path, 10).name == "checkpoint-5"


def test_a_loss_that_is_not_finite_stops(glm, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(TrainingError, match=r"not finite at step \d; lower --lr"):
        tune(glm, pink_pairs(), out, replace(SMALL, lr=1e30))
    assert not (out / WEIGHTS).exists()


def test_without_validation(glm, tmp_path, caplog):
    results = tune(
        glm, pink_pairs(n_validation=0), tmp_path / "out", replace(SMALL, max_steps=1, warmup_steps=9)
    )
    assert "margin_after" not in results
    assert results["n_validation"] == 0
    assert "--lr is never reached: --warmup_steps 9, --max_steps 1" in caplog.text


def test_memory_is_freed(first_round):
    assert first_round[2] == [None, None, None]


def test_prompts_that_are_too_long(glm, tmp_path, monkeypatch):
    monkeypatch.setattr(kka.tune, "build_trainer", None)
    with pytest.raises(
        UserError, match=r"all 16 training pairs are too long: the shortest prompt has \d+ tokens"
    ):
        tune(glm, pink_pairs(), tmp_path / "out", replace(SMALL, max_prompt_length=10))
    with pytest.raises(UserError, match="--max_length 20"):
        tune(glm, pink_pairs(), tmp_path / "out", replace(SMALL, max_length=20))
    assert not (tmp_path / "out").exists()


def damage(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:200])


def set_card(folder, **values):
    card = read_json(folder / "adapter_config.json")
    (folder / "adapter_config.json").write_text(json.dumps({**card, **values}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "does not exist"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json does not exist"),
        (lambda folder: (folder / WEIGHTS).unlink(), "does not exist"),
        (lambda folder: set_card(folder, base_model_name_or_path="other/llm"), "trained for other/llm"),
        (lambda folder: set_card(folder, peft_type="PREFIX_TUNING"), "PREFIX_TUNING; only LoRA"),
        (lambda folder: set_card(folder, r=7), "does not fit"),
        (damage, "damaged"),
    ],
)  # fmt: skip
def test_a_bad_adapter_is_found_before_the_llm_is_loaded(
    glm, random_adapter, tmp_path, monkeypatch, spoil, message
):
    adapter = shutil.copytree(random_adapter, tmp_path / "adapter")
    spoil(adapter)
    monkeypatch.setattr(kka.preference_trainer, "load_base", None)
    with pytest.raises(UserError, match=message) as caught:
        tune(glm, pink_pairs(), tmp_path / "out", SMALL, adapter)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"--model .*nowhere does not exist"):
        tune(str(tmp_path / "nowhere"), pink_pairs(), tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_bad_settings_leave_nothing_that_refuses_the_mended_ones(glm, tmp_path):
    with pytest.raises(UserError, match="nope"):
        tune(glm, pink_pairs(), tmp_path, replace(SMALL, lora_targets=("nope",)))
    assert tune(glm, pink_pairs(), tmp_path, SMALL)["steps"] == 6


def test_a_foreign_adapter_is_not_replaced(glm, random_adapter, tmp_path):
    out = shutil.copytree(random_adapter, tmp_path / "out")
    before = snapshot(out)
    with pytest.raises(UserError, match=r"adapter from elsewhere.*--out"):
        tune(glm, pink_pairs(), out, SMALL, overwrite=True)
    assert snapshot(out) == before


def test_the_adapter_to_continue_is_not_replaced(glm, first_round):
    with pytest.raises(UserError, match="is the adapter to continue"):
        tune(glm, pink_pairs(), first_round[0], SMALL, adapter=first_round[0])


def test_too_little_memory(glm, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(kka.tune, "build_trainer", fail)
    with pytest.raises(UserError, match=r"memory .*--batch_size .*--four_bit"):
        tune(glm, pink_pairs(), tmp_path / "out", SMALL)
