"""trl's trainer as we set it up: the loss against our own, references, rows as in generation, settings."""

from dataclasses import replace

import pytest
import torch
from tiny_models import USER, tiny_glm
from toy_pairs import PROMPT, SMALL, load_policy, make_trainer, pink_pairs, tokenizer_of

from kka.errors import UserError
from kka.language_models import LanguageModelSettings, TransformersModel
from kka.preference_trainer import (
    GLM_MODULES,
    TuneSettings,
    check_settings,
    prepare_rows,
    to_row,
    trainer_config,
)
from kka.tune import dpo_loss

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # trl uses names that transformers renames


def log_probabilities(model, batch):
    """(2N,) log-probability of each answer, the hard ones first."""
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1]
    tokens = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return tokens * mask


def gradients(model):
    named = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return torch.cat([named[name].flatten() for name in sorted(named)])


def adapter_weights(trainer, name="default"):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if f".{name}." in n}


@pytest.mark.parametrize("reference", ["original", "previous"])
@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_trl_computes_our_loss(glm, random_adapter, tmp_path, reference, sft_weight):
    settings = replace(SMALL, reference=reference, sft_weight=sft_weight)
    trainer = make_trainer(glm, tmp_path, settings, random_adapter)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()

    policy = load_policy(glm, random_adapter)
    tokens = log_probabilities(policy, batch)
    with torch.no_grad():
        base = load_policy(glm, random_adapter if reference == "previous" else None)
        fixed = log_probabilities(base, batch).sum(1)
    ours = dpo_loss(*tokens.sum(1).chunk(2), *fixed.chunk(2), beta=0.1)
    hard_mask = batch["completion_mask"][:, 1:].chunk(2)[0]
    total = ours - sft_weight * tokens.chunk(2)[0].sum() / hard_mask.sum()
    total.backward()
    assert loss.item() == pytest.approx(total.item(), abs=1e-5)
    if sft_weight == 0:
        assert (abs(ours.item() - 0.693147) < 1e-5) == (reference == "previous")
    torch.testing.assert_close(gradients(trainer.model), gradients(policy), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("reference", ["original", "previous"])
def test_only_the_adapter_learns(glm, random_adapter, tmp_path, reference):
    trainer = make_trainer(glm, tmp_path, replace(SMALL, reference=reference, max_steps=2), random_adapter)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == set(adapter_weights(trainer))
    assert bool(adapter_weights(trainer, "ref")) == (reference == "previous")
    trainer.train()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name


def test_a_new_adapter_is_on_glms_modules(glm, tmp_path):
    trainer = make_trainer(glm, tmp_path)
    assert {name.split(".")[-4] for name in adapter_weights(trainer)} == set(GLM_MODULES)
    assert list(trainer.model.peft_config) == ["default"]  # no copy of it
    everything = make_trainer(glm, tmp_path, replace(SMALL, lora_targets=("all-linear",)))
    assert {name.split(".")[-4] for name in adapter_weights(everything)} == {*GLM_MODULES, "down_proj"}


def test_layers_that_are_not_there(glm, tmp_path):
    with pytest.raises(UserError, match=r"no linear layer 'query_key_value'; it has down_proj, .*q_proj"):
        make_trainer(glm, tmp_path, replace(SMALL, lora_targets=("q_proj", "query_key_value")))


def test_defaults_are_the_official_ones(tmp_path):
    config = trainer_config(tmp_path, TuneSettings(), evaluate=True)
    official = {
        "beta": 0.1, "learning_rate": 5e-5, "lr_scheduler_type": "cosine", "warmup_steps": 100,
        "max_steps": 150, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4,
        "per_device_eval_batch_size": 2, "eval_strategy": "steps", "eval_steps": 5, "save_steps": 15,
        "max_length": 1024, "seed": 42,
        "loss_type": ["sigmoid"], "weight_decay": 0.0, "gradient_checkpointing": True,
    }  # fmt: skip
    assert {key: getattr(config, key) for key in official} == official
    assert config.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert config.disable_dropout
    assert not trainer_config(tmp_path, replace(SMALL, keep_dropout=True), evaluate=True).disable_dropout
    lora = TuneSettings()
    assert (lora.lora_r, lora.lora_alpha, lora.lora_dropout, lora.max_prompt_length) == (8, 8, 0.1, 512)


@pytest.mark.parametrize("chat_template", [True, False])
def test_the_llm_is_asked_as_in_generation(tmp_path, chat_template):
    glm = str(tiny_glm(tmp_path / "glm", chat_template))
    trainer = make_trainer(glm, tmp_path)
    row, tokenizer = trainer.train_dataset[0], tokenizer_of(glm)
    asked = TransformersModel(LanguageModelSettings(model=glm, device="cpu"))._encode(PROMPT)["input_ids"]
    assert row["prompt_ids"] == asked[0].tolist()
    assert tokenizer.decode(row["chosen_ids"]) == pink_pairs().train[0]["chosen"] + " " + tokenizer.eos_token
    assert row["chosen_ids"].count(tokenizer.eos_token_id) == 1


def test_a_template_that_ends_answers_gets_no_second_end(glm):
    tokenizer = tokenizer_of(glm)
    row = to_row(pink_pairs().train[0], tokenizer)
    assert row["chosen"][0]["content"].endswith(tokenizer.eos_token)
    tokenizer.chat_template = "{% for m in messages %}" + USER + "{{ m.content }}<|endoftext|>\n{% endfor %}"
    assert to_row(pink_pairs().train[0], tokenizer)["chosen"][0]["content"] == pink_pairs().train[0]["chosen"]


def test_long_pairs_are_left_out(glm):
    pairs = pink_pairs()
    pairs.train[3]["chosen"] = "very " * 60 + "pink"
    pairs.validation[0]["rejected"] = "very " * 60 + "blue"
    train, validation, n_long = prepare_rows(pairs, tokenizer_of(glm), replace(SMALL, max_length=60))
    assert (len(train), len(validation), n_long) == (15, 7, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 0), ("batch_size", 0), ("accumulation", -1), ("lora_r", 0), ("beta", 0.0),
        ("lr", float("nan")), ("lr", float("inf")), ("sft_weight", -1.0), ("warmup_steps", -1), ("seed", -1),
        ("lora_dropout", 1.0), ("lora_targets", ()), ("four_bit", True),
    ],
)  # fmt: skip
def test_settings_without_sense(name, value):
    with pytest.raises(UserError, match=f"^--{name} "):
        check_settings(replace(SMALL, **{name: value}))
