"""Speed of describe, draw and tune, and what they add to the bare calls of transformers, diffusers and trl.

    python benchmarks/generation.py                # the garden's tiny models, on a CPU
    python benchmarks/generation.py --scale full   # random weights of GLM-4-9B and SD 1.5, on a GPU

Ours and the bare call take turns, and the medians are compared.
"""

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from deep_sad import processor, table
from random_models import save_diffusion, save_glm, some_captions

from kka.datasets import garden
from kka.describe import describe
from kka.diffusion import Diffusers
from kka.draw import draw_captions
from kka.drawers import DrawerSettings, styled
from kka.errors import UserError, run_script
from kka.files import write_bytes, write_json
from kka.language_models import LanguageModelSettings, TransformersModel
from kka.pairs import Pairs
from kka.preference_trainer import TuneSettings, build_trainer, prepare_rows, trainer_config
from kka.prompts import generation_prompt
from kka.runs import ROOT, git_commit, machine
from kka.seeds import derive_seed
from kka.settings import build_parser, make_settings, option
from kka.tune import tune

MODELS = ROOT / "src" / "kka" / "garden_models"
RESULTS = Path(__file__).parent / "results" / "generation"
MATRIX = 8192  # side of the matrices whose product gives the chip's rate


@dataclass(frozen=True)
class BenchmarkSettings:
    """Options of the benchmark."""

    scale: str = option("tiny", "the garden's models, or models of full size", ("tiny", "full"))
    captions: tuple[int, ...] = option((16,), "captions asked for at once, one after the other")
    images: tuple[int, ...] = option((8,), "images drawn at once, one after the other")
    steps: int = option(20, "DPO steps, of 16 pairs each")
    repeats: int = option(5, "how often ours and the bare call are timed")
    four_bit: bool = option(False, "tune in 4 bits as well (full scale; needs bitsandbytes)")
    out: str | None = option(None, "results without suffix; None: benchmarks/results/generation_<scale>")


@dataclass(frozen=True)
class Scale:
    """The models, and how they are run."""

    llm: str
    drawer: DrawerSettings
    device: str
    new_tokens: int


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    parser = build_parser("Describe, draw and tune, timed.", BenchmarkSettings)
    s = make_settings(BenchmarkSettings, vars(parser.parse_args()))
    if s.scale == "full" and not torch.cuda.is_available():
        raise UserError("--scale full needs a GPU; the tiny models run on any machine")
    report: dict[str, Any] = {"machine": {**machine(), "processor": processor()}, "git_commit": git_commit()}
    report["matrix_tflops"] = matrix_rate(s)
    with tempfile.TemporaryDirectory() as scratch:
        scale = tiny_scale() if s.scale == "tiny" else full_scale(Path(scratch))
        report["describe"] = [time_describe(scale, n, s, Path(scratch)) for n in s.captions]
        report["draw"] = [time_draw(scale, n, s, Path(scratch)) for n in s.images]
        kinds = [False, True] if s.four_bit else [False]
        report["tune"] = [time_tune(scale, bits, s, Path(scratch)) for bits in kinds]
    out = s.out or f"{RESULTS}_{s.scale}"
    write_json(Path(f"{out}.json"), report, indent=2)
    write_bytes(Path(f"{out}.md"), to_markdown(report).encode())
    print(to_markdown(report))


def tiny_scale() -> Scale:
    """The committed stand-ins."""
    drawer = DrawerSettings(model=str(MODELS / "diffusion"), preset="own", device="cpu", suffix="")
    return Scale(str(MODELS / "glm"), drawer, "cpu", 64)


def full_scale(scratch: Path) -> Scale:
    """Random weights of full size, made on the GPU and written to `scratch`, some 20 GB."""
    llm = save_glm(scratch / "glm", torch.bfloat16, "cuda")
    model = save_diffusion(scratch / "diffusion", torch.float16, "cuda")
    torch.cuda.empty_cache()
    drawer = DrawerSettings(model=str(model), preset="own", steps=25, guidance=7.5, suffix="")
    return Scale(str(llm), drawer, "cuda", 64)


def matrix_rate(s: BenchmarkSettings) -> float | None:
    """Measured rate of a large bfloat16 matrix product on the GPU, TFLOP/s; None on a CPU."""
    if s.scale == "tiny":
        return None
    a = torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16)
    times = [seconds(lambda: a @ a) for _ in range(20)]
    return 2 * MATRIX**3 / statistics.median(times[5:]) / 1e12


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(ours: Callable[[], object], bare: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median seconds of both, by turns, and what ours takes more, in percent; peak memory of the GPU, GiB."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    pairs = [(seconds(ours), seconds(bare)) for _ in range(repeats + 1)][1:]  # the first does not count
    mine, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return {"ours": mine, "bare": theirs, "overhead": 100 * (mine / theirs - 1), "gpu_gib": peak}


def time_describe(scale: Scale, n: int, s: BenchmarkSettings, scratch: Path) -> dict[str, Any]:
    """`describe` of n captions against `generate` of as many answers."""
    settings = LanguageModelSettings(
        model=scale.llm, device=scale.device, max_new_tokens=scale.new_tokens, dtype="auto"
    )
    model, prompt = TransformersModel(settings), example_prompt()
    model.complete(prompt, 1, 0)
    inputs, tries = model._encode(prompt), iter(range(10**6))

    def ours() -> None:
        path = scratch / f"captions_{n}_{next(tries)}.jsonl"
        describe(model, prompt, [], n, 0, path, ask=n)

    def bare() -> None:
        for k in range(n_requests):
            torch.manual_seed(derive_seed(0, k))
            model._network.generate(**inputs, num_return_sequences=n)

    path = scratch / f"first_{n}.jsonl"
    n_requests = describe(model, prompt, [], n, 0, path, ask=n).requests
    timed = compare(ours, bare, s.repeats)
    tokens = n * n_requests * scale.new_tokens  # of random weights, which never end an answer
    rate = {"per_second": n * n_requests / timed["ours"], "tflops": flops(model._network, 2, tokens, timed)}
    return {"captions": n, "requests": n_requests, **timed, **rate}


def flops(network: Any, per_weight: int, tokens: int, timed: dict[str, float]) -> float:
    """TFLOP/s of so many operations per weight and token: 2 in a forward pass, as many in a backward one."""
    return per_weight * sum(p.numel() for p in network.parameters()) * tokens / timed["ours"] / 1e12


def example_prompt() -> str:
    """The request with a caption of the garden's normal species."""
    return generation_prompt(garden.SPEC, [some_captions()[0][0]])


def time_draw(scale: Scale, n: int, s: BenchmarkSettings, scratch: Path) -> dict[str, Any]:
    """`draw_captions` of n captions against the pipeline."""
    drawer = Diffusers(scale.drawer, garden.SPEC)
    captions, tries = [texts[0] for texts in some_captions(n)], iter(range(10**6))
    records = [{"caption": caption} for caption in captions]

    def ours() -> None:
        draw_captions(drawer, records, scratch / f"images_{n}_{next(tries)}", garden.SPEC, 0, n)

    def bare() -> None:
        drawer.pipe(
            prompt=[styled(caption, drawer.suffix) for caption in captions],
            generator=[torch.Generator("cpu").manual_seed(k) for k in range(n)],
            num_inference_steps=drawer.steps, guidance_scale=drawer.guidance,
        )  # fmt: skip

    timed = compare(ours, bare, s.repeats)
    return {"images": n, "steps": drawer.steps, **timed, "per_second": n / timed["ours"]}


def time_tune(scale: Scale, four_bit: bool, s: BenchmarkSettings, scratch: Path) -> dict[str, Any]:
    """`tune` against loading the LLM and trl's trainer alone, on the same rows."""
    settings = TuneSettings(
        max_steps=s.steps, warmup_steps=2, batch_size=4, accumulation=4, eval_every=s.steps, save_every=10**6,
        device=scale.device, four_bit=four_bit,
    )  # fmt: skip
    pairs, tries = example_pairs(), iter(range(10**6))

    def ours() -> None:
        tune(scale.llm, pairs, scratch / f"adapter_{four_bit}_{next(tries)}", settings)

    def bare() -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(scale.llm)
        train, validation, _ = prepare_rows(pairs, tokenizer, settings)
        config = replace(
            trainer_config(scratch / "bare", settings, True), save_strategy="no", eval_on_start=True
        )
        build_trainer(scale.llm, tokenizer, train, validation, config, settings).train()

    timed = compare(ours, bare, s.repeats)
    return {"four_bit": four_bit, "steps": s.steps, **timed, "per_second": s.steps / timed["ours"]}


def example_pairs() -> Pairs:
    """64 training and 16 validation pairs of captions."""
    texts = [text for block in some_captions() for text in block]
    prompt = example_prompt()
    rows = [
        {"prompt": prompt, "chosen": a, "rejected": b}
        for a, b in zip(texts[:80], texts[80:160], strict=True)
        if a != b
    ]
    return Pairs(prompt, rows[16:], rows[:16], {})


def to_markdown(report: dict[str, Any]) -> str:
    """Tables for the README."""
    where = report["machine"]
    rows = {
        "describe|captions at once|captions/s": rows_of(report["describe"], "captions"),
        "draw|images at once|images/s": rows_of(report["draw"], "images"),
        "tune|steps|steps/s": rows_of(report["tune"], "steps"),
    }
    lines = [
        f"{where['gpu'] or where['processor']}, {where['threads']} threads, commit {report['git_commit']}"
    ]
    if report["matrix_tflops"]:
        lines.append(f"\nbfloat16 matrix product: {report['matrix_tflops']:.0f} TFLOP/s")
    for header, body in rows.items():
        lines.append(table(f"{header}|ours, s|bare call, s|overhead, %|GPU memory, GiB", body))
    return "\n".join(lines)


def rows_of(report: Sequence[dict[str, Any]], count: str) -> list[list[str]]:
    """Cells of one table."""
    return [
        [
            "4 bits" if row.get("four_bit") else "", str(row[count]), f"{row['per_second']:.2f}",
            f"{row['ours']:.2f}", f"{row['bare']:.2f}", f"{row['overhead']:.1f}", f"{row['gpu_gib']:.1f}",
        ]
        for row in report
    ]  # fmt: skip


if __name__ == "__main__":
    run_script(main)
