"""Language models behind one small interface: `complete(prompt, n, seed)` gives up to n answers.

Here are the settings and the models that run on this machine; kka.chat_servers asks servers.
"""

import importlib.util
import logging
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from kka.errors import UserError
from kka.files import read_json, sha256, user_path
from kka.seeds import derive_seed
from kka.settings import option

DEFAULT_MODEL = {
    "transformers": "zai-org/glm-4-9b-chat-hf",  # the paper's GLM-4, as transformers reads it
    "openai": "zai-org/glm-4-9b-chat-hf",
    "zhipuai": "glm-4-flash-250414",
}
SMALLER = "choose a smaller --model, or --four_bit, or --device cpu"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LanguageModelSettings:
    """The language model (Eq. 3)."""

    backend: str = option("transformers", "where the LLM runs", ("transformers", "openai", "zhipuai"))
    model: str | None = option(
        None,
        "folder, hub id or name on the server; None: GLM-4, "
        + " or ".join(dict.fromkeys(DEFAULT_MODEL.values())),
    )
    adapter: str | None = option(None, "folder of a peft adapter, from dpo/dpo_train.py (transformers)")
    four_bit: bool = option(False, "load the weights in 4 bits (transformers; needs bitsandbytes)")
    dtype: str = option("auto", "of the weights", ("auto", "bfloat16", "float16", "float32"))
    device: str = option("cuda", "cpu, cuda or cuda:N; without a GPU the CPU is taken")
    base_url: str | None = option(
        None, "address of an OpenAI-compatible server, e.g. http://localhost:8000/v1"
    )
    temperature: float = option(1.0, "of sampling")
    top_p: float = option(0.95, "share of the probability that is sampled from")
    greedy: bool = option(False, "take the likeliest token each time: one answer per prompt (official code)")
    max_new_tokens: int = option(128, "longest answer in tokens; a line cut off there is dropped")
    timeout: float = option(120.0, "seconds to wait for an answer of the server")
    parallel: int = option(4, "requests to the server at the same time")
    max_requests: int | None = option(None, "stop after that many requests to the server; None: no limit")


class LanguageModel(Protocol):
    """What `kka.describe` needs."""

    id: str
    """folder, hub id or name on the server"""
    adapter: str | None
    """name and content hash of its adapter"""
    failures: Counter[str]
    """answers that came to nothing so far, by reason"""

    def complete(self, prompt: str, n: int, seed: int) -> list[str]:
        """Up to `n` answers to a prompt; the same seed gives the same ones if the model can do that."""


def load_language_model(settings: LanguageModelSettings) -> LanguageModel:
    """The model that the settings name; raises UserError if it is not there or a setting makes no sense."""
    check_settings(settings)
    if settings.backend == "transformers":
        return TransformersModel(settings)
    from kka.chat_servers import ChatServer

    return ChatServer(settings)


def check_settings(settings: LanguageModelSettings) -> None:
    """Raises UserError naming the first flag that makes no sense."""
    s = settings
    served = s.backend != "transformers"
    wrong = {
        "--temperature must be above 0; give --greedy for the likeliest answer": not s.temperature > 0,
        "--top_p must lie in (0, 1]": not 0 < s.top_p <= 1,
        "--max_new_tokens must be at least 1": s.max_new_tokens < 1,
        "--timeout must be above 0": not s.timeout > 0,
        "--parallel must be at least 1": s.parallel < 1,
        "--max_requests must be at least 1": s.max_requests is not None and s.max_requests < 1,
        "--model is empty; leave it out for the default": s.model == "",
        f"--adapter does not work with --backend {s.backend}; name it with --model if the server has it": (
            served and s.adapter is not None
        ),
        f"--four_bit does not work with --backend {s.backend}": served and s.four_bit,
        "--base_url needs --backend openai or zhipuai": not served and s.base_url is not None,
    }
    for sentence, is_wrong in wrong.items():
        if is_wrong:
            raise UserError(sentence)


class TransformersModel:
    """Any causal language model of transformers, from a folder or the hub, with or without an adapter.

    The constructor checks what it can without the weights; they are loaded at the first request. A prompt
    is a user's turn where the tokenizer has a chat template, plain text otherwise.
    """

    def __init__(self, settings: LanguageModelSettings) -> None:
        from transformers import AutoConfig, AutoTokenizer

        if settings.four_bit and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError("--four_bit needs bitsandbytes; install it with pip install -e '.[quantization]'")
        self.id = settings.model or DEFAULT_MODEL["transformers"]
        self.adapter = check_adapter(Path(settings.adapter), self.id) if settings.adapter else None
        self.failures: Counter[str] = Counter()
        self._settings = settings
        self._config = load_pretrained(AutoConfig, self.id)
        self._tokenizer = load_pretrained(AutoTokenizer, self.id)
        self._rows = sys.maxsize  # answers sampled at once; halved when the memory is full

    def complete(self, prompt: str, n: int, seed: int) -> list[str]:
        """`n` samples less those cut off at max_new_tokens; one if greedy.

        A batch shares one random stream, so that they depend on `seed` and on `n`.
        Raises UserError if the prompt is too long for the model or the memory too small.
        """
        wanted, done, answers = (1 if self._settings.greedy else n), 0, []
        while done < wanted:
            rows = min(self._rows, wanted - done)
            try:
                answers += self._sample(prompt, rows, derive_seed(seed, done))
            except torch.OutOfMemoryError:
                self._halve(rows)
                continue
            done += rows
        return answers

    @torch.inference_mode()
    def _sample(self, prompt: str, rows: int, seed: int) -> list[str]:
        network, inputs = self._network, self._encode(prompt)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            sequences = network.generate(**inputs, num_return_sequences=rows).cpu()
        ends = torch.tensor(network.generation_config.eos_token_id)
        answers = []
        for tokens in sequences[:, inputs["input_ids"].shape[1] :]:
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            text = text if torch.isin(tokens, ends).any() else whole_lines(text)
            if text is None:
                self.failures["cut off at --max_new_tokens"] += 1
            else:
                answers.append(text)
        return answers

    def _halve(self, rows: int) -> None:
        if rows == 1:
            raise UserError(f"the memory of {self._device} is too small for {self.id}; {SMALLER}") from None
        self._rows = rows // 2
        torch.cuda.empty_cache()
        log.warning("out of memory with %d answers at once; going on with %d", rows, self._rows)

    def _encode(self, prompt: str) -> dict[str, torch.Tensor]:
        """Token ids and mask of the prompt, (1, T) each; a batch repeats them, so that nothing is padded."""
        if self._tokenizer.chat_template:
            encoded = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            )
        else:
            encoded = self._tokenizer(prompt, return_tensors="pt")
        length, longest = (
            encoded["input_ids"].shape[1],
            getattr(self._config, "max_position_embeddings", None),
        )
        if longest and length + self._settings.max_new_tokens > longest:
            raise UserError(
                f"the prompt has {length} tokens and an answer up to {self._settings.max_new_tokens}, but "
                f"{self.id} reads {longest} in all; give fewer examples or a smaller --max_new_tokens"
            )
        return {key: encoded[key].to(self._device) for key in ("input_ids", "attention_mask")}

    @cached_property
    def _device(self) -> torch.device:
        from kka.experiment import find_device

        return find_device(self._settings.device, strict=False)

    @cached_property
    def _network(self) -> Any:
        """The model with its adapter, ready to generate as the settings say, whatever its own defaults."""
        from transformers import AutoModelForCausalLM

        s, options = self._settings, {}
        if s.four_bit:
            options["quantization_config"] = four_bit_config()
        if self._device.type == "cuda":
            options["device_map"] = {"": self._device}
        try:
            network = load_pretrained(AutoModelForCausalLM, self.id, dtype=s.dtype, **options)
            network.generation_config = self._generation_config(network.generation_config.eos_token_id)
            return (attach_adapter(network, Path(s.adapter)) if s.adapter else network).eval()
        except torch.OutOfMemoryError:
            raise UserError(f"{self.id} does not fit into the memory of {self._device}; {SMALLER}") from None

    def _generation_config(self, ends: int | list[int] | None) -> Any:
        from transformers import GenerationConfig

        s, tokenizer = self._settings, self._tokenizer
        ends = [ends] if isinstance(ends, int) else ends or [tokenizer.eos_token_id]
        sampling = {} if s.greedy else {"temperature": s.temperature, "top_p": s.top_p, "top_k": 0}
        return GenerationConfig(
            do_sample=not s.greedy,
            max_new_tokens=s.max_new_tokens,
            eos_token_id=ends,
            pad_token_id=ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            **sampling,
        )


def whole_lines(text: str) -> str | None:
    """The complete lines of an answer that was cut off; None if there are none."""
    return text.rpartition("\n")[0] or None


def four_bit_config() -> Any:
    """nf4 with bfloat16 arithmetic, for a GPU."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


def load_pretrained(loader: Any, model: str, **options: Any) -> Any:
    """`loader.from_pretrained(model)` from a folder or the cache, else from the hub if that can be reached.

    Never runs code of a checkpoint. Raises UserError naming the model and what to do.
    """
    import transformers

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    folder = user_path(model)
    if not folder.is_dir() and (folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1):
        raise UserError(f"--model {model} does not exist; give the folder of a model or its id on the hub")
    source = str(folder) if folder.is_dir() else model
    try:
        try:
            return loader.from_pretrained(source, local_files_only=True, trust_remote_code=False, **options)
        except OSError:
            if folder.is_dir():
                raise
        probe_hub(model)
        return loader.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        raise UserError(
            f"--model {model} cannot be loaded ({first_sentence(error)}); give a whole model that needs no "
            f"code of its own, such as {DEFAULT_MODEL['transformers']}"
        ) from None


def probe_hub(model: str) -> None:
    """Raises UserError at once where a download would fail after many attempts."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    other = "or give a local folder with --model PATH"
    try:
        get_hf_file_metadata(hf_hub_url(model, "config.json"), timeout=10)
    except GatedRepoError:
        reason = f"accept its licence on its page on the hub and set HF_TOKEN, {other}"
        raise UserError(f"--model {model} is gated; {reason}") from None
    except (RepositoryNotFoundError, EntryNotFoundError, HFValidationError):
        reason = f"check the id, set HF_TOKEN if it is private, {other}"
        raise UserError(f"--model {model} is no model of the hub; {reason}") from None
    except Exception as error:  # whatever keeps a machine from the hub
        reason = f"and the hub cannot be reached ({type(error).__name__}); connect to the internet, {other}"
        raise UserError(f"--model {model} is not on this machine, {reason}") from None


def check_adapter(folder: Path, model: str) -> str:
    """Name and content hash of a peft adapter; raises UserError unless it is one for `model`.

    Reads no weights but the adapter's own.
    """
    card, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in (folder, card, weights):
        if not path.exists():
            raise UserError(
                f"--adapter {folder}: {path} does not exist; give a folder that dpo/dpo_train.py wrote"
            )
    content = read_json(card)
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    # The hub id of a model and a local copy of it have the last part in common.
    if base and Path(base).resolve() != Path(model).resolve() and Path(base).name != Path(model).name:
        raise UserError(f"--adapter {folder} was trained for {base}, not for {model}; give it as --model")
    return f"{folder.resolve().name}@{sha256(weights)[:12]}"


def attach_adapter(network: Any, folder: Path) -> Any:
    """The model with the adapter's weights beside its own; raises UserError if they do not fit."""
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses a name that transformers has changed
            return PeftModel.from_pretrained(network, str(folder))
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise UserError(f"--adapter {folder} does not fit the model ({first_sentence(error)})") from None


def first_sentence(error: BaseException) -> str:
    """The first line of a library's message, short enough for one of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")
