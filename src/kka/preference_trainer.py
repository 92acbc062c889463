"""trl's DPOTrainer for Eq. (7): settings, rows as the LLM is asked and answers, adapter and reference."""

import importlib.util
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kka.errors import UserError
from kka.files import read_json
from kka.language_models import check_adapter, four_bit_config, load_pretrained
from kka.pairs import Pair, Pairs
from kka.settings import option
from kka.tracking import HELP as REPORT_TO
from kka.tracking import check_report_to

# The official query_key_value, dense and dense_h_to_4h under their names in transformers.
GLM_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj")
ALL_LINEAR = "all-linear"
WEIGHTS, CARD = "adapter_model.safetensors", "adapter_config.json"

Row = dict[str, Any]  # prompt, chosen and rejected, as text or as chat messages

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TuneSettings:
    """Preference tuning by DPO; the defaults are the official code's."""

    beta: float = option(0.1, "weight of the distance to the reference, Eq. (7)")
    sft_weight: float = option(
        0.0, "weight of the likelihood of hard captions beside Eq. (7), which keeps captions valid"
    )
    reference: str = option(
        "original",
        "p in Eq. (7): the LLM without adapter, or with the previous one",
        ("original", "previous"),
    )
    lr: float = option(5e-5, "highest learning rate of AdamW")
    lr_scheduler: str = option(
        "cosine", "its course after the warm-up", ("cosine", "linear", "constant_with_warmup")
    )
    warmup_steps: int = option(100, "steps until --lr is reached")
    max_steps: int = option(150, "optimiser steps")
    batch_size: int = option(4, "pairs per device and forward pass")
    accumulation: int = option(4, "forward passes per step")
    eval_batch_size: int = option(2, "validation pairs per device and forward pass")
    eval_every: int = option(5, "steps between two validations")
    save_every: int = option(15, "steps between two checkpoints")
    max_length: int = option(1024, "tokens of prompt and caption; longer pairs are left out")
    max_prompt_length: int = option(512, "tokens of the prompt; pairs with a longer one are left out")
    lora_r: int = option(8, "rank of a new adapter")
    lora_alpha: int = option(8, "its scale times the rank")
    lora_dropout: float = option(0.1, "its dropout, which is on only with --keep_dropout")
    lora_targets: tuple[str, ...] = option(
        GLM_MODULES, f"linear layers that it changes; GLM has down_proj besides, {ALL_LINEAR} takes every one"
    )
    keep_dropout: bool = option(False, "leave dropout on; trl switches it off, also in the official code")
    seed: int = option(42, "of the adapter, the order of the pairs and the held-out captions")
    four_bit: bool = option(False, "load the LLM in 4 bits (needs CUDA and bitsandbytes)")
    gradient_checkpointing: bool = option(True, "compute activations twice, which saves memory")
    device: str = option("cuda", "cuda or cpu; without a GPU the CPU is taken", ("cuda", "cpu"))
    report_to: tuple[str, ...] = option((), REPORT_TO)

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is wanted and there."""
        return self.device == "cuda" and torch.cuda.is_available()


def check_settings(s: TuneSettings) -> None:
    """Raises UserError naming the flag of the first value that makes no sense."""
    check_report_to(s.report_to)
    counts = ("max_steps", "batch_size", "accumulation", "eval_batch_size", "eval_every", "save_every")
    for name in (*counts, "max_length", "max_prompt_length", "lora_r", "lora_alpha"):
        if getattr(s, name) < 1:
            raise UserError(f"--{name} must be at least 1, it is {getattr(s, name)}")
    wrong = {
        "--beta must be above 0": not 0 < s.beta < math.inf,
        "--lr must be above 0": not 0 < s.lr < math.inf,
        "--sft_weight must be at least 0": not 0 <= s.sft_weight < math.inf,
        "--warmup_steps must be at least 0": s.warmup_steps < 0,
        "--seed must be at least 0 and below 2**32": not 0 <= s.seed < 2**32,
        "--lora_dropout must lie in [0, 1)": not 0 <= s.lora_dropout < 1,
        "--lora_targets is empty; name the layers that get an adapter": not s.lora_targets,
        "--four_bit needs a CUDA GPU": s.four_bit and not s.on_gpu,
        "--four_bit needs bitsandbytes; install it with pip install -e '.[quantization]'": (
            s.four_bit and importlib.util.find_spec("bitsandbytes") is None
        ),
    }
    for sentence, is_wrong in wrong.items():
        if is_wrong:
            raise UserError(sentence)
    if s.warmup_steps >= s.max_steps:
        log.warning("--lr is never reached: --warmup_steps %d, --max_steps %d", s.warmup_steps, s.max_steps)


def prepare_rows(pairs: Pairs, tokenizer: Any, settings: TuneSettings) -> tuple[list[Row], list[Row], int]:
    """Training rows, validation rows, and the number of pairs that are too long.

    Raises UserError if no training row is left.
    """
    parts = [
        [pair for pair in part if _fits(pair, tokenizer, settings)]
        for part in (pairs.train, pairs.validation)
    ]
    if not parts[0]:
        shortest = min(len(prompt_ids(pair["prompt"], tokenizer)) for pair in pairs.train)
        raise UserError(
            f"all {len(pairs.train)} training pairs are too long: the shortest prompt has {shortest} tokens, "
            f"--max_prompt_length is {settings.max_prompt_length}, --max_length {settings.max_length}; raise "
            "them or show the LLM fewer examples"
        )
    n_long = len(pairs.train) + len(pairs.validation) - sum(map(len, parts))
    if n_long:
        log.warning("%d pairs are longer than --max_prompt_length or --max_length and are left out", n_long)
    train, validation = ([to_row(pair, tokenizer) for pair in part] for part in parts)
    return train, validation, n_long


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """Tokens of the request, as generation sends them."""
    if not tokenizer.chat_template:
        return tokenizer(prompt)["input_ids"]
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]


def _fits(pair: Pair, tokenizer: Any, settings: TuneSettings) -> bool:
    n_prompt = len(prompt_ids(pair["prompt"], tokenizer))
    n_answer = 2 + max(len(tokenizer(pair[key])["input_ids"]) for key in ("chosen", "rejected"))
    return n_prompt <= settings.max_prompt_length and n_prompt + n_answer <= settings.max_length


def to_row(pair: Pair, tokenizer: Any) -> Row:
    """A pair as chat turns where the tokenizer has a template, else the answers on a line of their own.

    trl ends plain answers by itself.
    """
    if not tokenizer.chat_template:
        return {
            "prompt": pair["prompt"],
            "chosen": "\n" + pair["chosen"],
            "rejected": "\n" + pair["rejected"],
        }
    end = _end_of_answer(tokenizer)
    return {
        "prompt": [{"role": "user", "content": pair["prompt"]}],
        "chosen": [{"role": "assistant", "content": pair["chosen"] + end}],
        "rejected": [{"role": "assistant", "content": pair["rejected"] + end}],
    }


def _end_of_answer(tokenizer: Any) -> str:
    """The token that ends an answer, unless the chat template writes one (GLM-4's does not)."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    is_open = tokenizer.apply_chat_template(turns, tokenize=False).rstrip().endswith("!")
    return tokenizer.eos_token or "" if is_open else ""


def trainer_config(folder: Path, settings: TuneSettings, evaluate: bool) -> Any:
    """The trl.DPOConfig of the settings, with checkpoints in `folder`."""
    from trl import DPOConfig

    paged = settings.on_gpu and importlib.util.find_spec("bitsandbytes") is not None
    losses = {"sigmoid": 1.0, "sft": settings.sft_weight}  # the first is Eq. (7)
    used = [name for name, weight in losses.items() if weight]
    config = DPOConfig(
        output_dir=str(folder),
        beta=settings.beta,
        loss_type=used,
        loss_weights=[losses[name] for name in used],
        learning_rate=settings.lr,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_steps,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        per_device_eval_batch_size=settings.eval_batch_size,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=settings.eval_every,
        save_steps=settings.save_every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        max_length=settings.max_length,
        disable_dropout=not settings.keep_dropout,
        seed=settings.seed,
        optim="paged_adamw_32bit" if paged else "adamw_torch",
        bf16=settings.on_gpu,
        use_cpu=not settings.on_gpu,
        dataloader_pin_memory=settings.on_gpu,
        ddp_find_unused_parameters=False,
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        disable_tqdm=not sys.stderr.isatty(),
        report_to="none",  # tracking.py does it, without a step twice after an interruption
    )
    if config.n_gpu > 1:  # trl refuses to share one process among several
        log.warning("training on the first of %d GPUs; `accelerate launch` takes all", config.n_gpu)
        config._n_gpu = 1
    return config


def build_trainer(
    model: str,
    tokenizer: Any,
    train: Sequence[Row],
    validation: Sequence[Row],
    config: Any,
    settings: TuneSettings,
    adapter: Path | None = None,
) -> Any:
    """trl's DPOTrainer of the LLM with a new adapter, or with `adapter` to continue.

    trl keeps a frozen copy of the adapter as reference. Where the reference is the original LLM the copy is
    removed: trl then computes the reference with adapters switched off, so that there is neither a second
    LLM nor a second adapter in memory.
    """
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PrinterCallback
    from trl import DPOTrainer

    base = load_base(model, settings, config)
    if adapter is None:
        policy = new_adapter(base, settings)
    else:
        policy = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    trainer = DPOTrainer(
        model=policy,
        args=config,
        train_dataset=Dataset.from_list(list(train)),
        eval_dataset=Dataset.from_list(list(validation)) if validation else None,
        processing_class=tokenizer,
    )
    if adapter is None or settings.reference == "original":
        policy.delete_adapter("ref")
    trainer.remove_callback(PrinterCallback)
    return trainer


def load_base(model: str, settings: TuneSettings, config: Any) -> Any:
    """The LLM: bfloat16 on a GPU, float32 on the CPU, or 4 bits; raises UserError if it is not there."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.bfloat16 if settings.on_gpu else torch.float32}
    if settings.four_bit:
        options |= {"quantization_config": four_bit_config(), "device_map": {"": config.local_process_index}}
    return load_pretrained(AutoModelForCausalLM, model, **options)


def new_adapter(base: Any, settings: TuneSettings) -> Any:
    """The LLM with a LoRA adapter that changes nothing yet; raises UserError for names of no layer."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    targets = list(settings.lora_targets)
    if targets != [ALL_LINEAR]:
        linear = {n.rpartition(".")[2] for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
        unknown = [name for name in targets if name not in linear]
        if unknown:
            raise UserError(
                f"--lora_targets: {base.name_or_path} has no linear layer {unknown[0]!r}; it has "
                f"{', '.join(sorted(linear))}, and {ALL_LINEAR} takes all but the last"
            )
    lora = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        task_type="CAUSAL_LM",
    )
    set_seed(settings.seed)
    return get_peft_model(base, lora)


def check_continuable(folder: Path, model: str) -> None:
    """Raises UserError unless `folder` holds a LoRA adapter for `model`; loads no weights of the LLM."""
    import safetensors
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoConfig, AutoModelForCausalLM

    check_adapter(folder, model)
    kind = read_json(folder / CARD).get("peft_type")
    if kind != "LORA":
        raise UserError(f"--adapter {folder} is of type {kind}; only LoRA adapters can be trained further")
    with torch.device("meta"):  # shapes without memory
        empty = AutoModelForCausalLM.from_config(load_pretrained(AutoConfig, model))
        policy = get_peft_model(empty, PeftConfig.from_pretrained(str(folder)))
    state = get_peft_model_state_dict(policy, save_embedding_layers=False)
    try:
        with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
            found = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError:
        raise UserError(f"--adapter: {folder / WEIGHTS} is damaged; restore it") from None
    if found != {key: list(tensor.shape) for key, tensor in state.items()}:
        raise UserError(f"--adapter {folder} does not fit {model}: its weights have other names or shapes")
