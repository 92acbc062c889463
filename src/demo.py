"""`make demo`: Algorithm 1 on drawn flowers, two rounds, in minutes and without network, GPU or data.

LLM and text-to-image model are tiny ones that this project has trained itself (see src/kka/garden_models),
stand-ins for GLM-4 and Stable Diffusion. It is src/iterate.py with the flags below; further ones go behind
`python src/demo.py`.
"""

import shlex
import sys
import time

import iterate
from kka.errors import run_script
from kka.runs import ROOT

MODELS = ROOT / "src" / "kka" / "garden_models"
FLAGS = {
    "dataset_name": "garden",
    "name": "demo",
    "mode": "add",
    "rounds": 2,
    "n_initial": 100,
    "n_fresh": 80,
    "n_untuned": 80,
    "per_round": 30,
    "device": "cpu",
    "n_epochs": 50,
    "lr": 3e-4,
    "lr_milestone": 38,
    "pretrain": False,
    "llm_model": MODELS / "glm",
    "llm_device": "cpu",
    "drawer_backend": "diffusers",
    "drawer_model": MODELS / "diffusion",
    "drawer_preset": "own",
    "drawer_steps": 15,
    "drawer_guidance": 3.0,
    "drawer_device": "cpu",
    "draw_batch": 40,
    "pairs_validation_share": 0.3,
    "tune_device": "cpu",
    "tune_beta": 0.5,
    "tune_sft_weight": 3.0,
    "tune_lr": 2e-3,
    "tune_max_steps": 80,
    "tune_warmup_steps": 8,
    "tune_batch_size": 16,
    "tune_accumulation": 1,
    "tune_eval_every": 40,
    "tune_eval_batch_size": 16,
    "tune_lora_r": 32,
    "tune_lora_alpha": 64,
    "tune_lora_targets": "all-linear",
    "tune_gradient_checkpointing": False,
}


def main() -> None:
    """Run the loop; a second call finds it finished."""
    began = time.monotonic()
    words = [str(word) for name, value in FLAGS.items() for word in (f"--{name}", value)]
    print(f"the same as: {shlex.join(['python', 'src/iterate.py', *words, *sys.argv[1:]])}", flush=True)
    sys.argv[1:1] = words
    iterate.main()
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    run_script(main)
