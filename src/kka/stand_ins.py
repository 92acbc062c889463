"""Settings of Algorithm 1 in the garden, whose LLM and text-to-image model are tiny ones of this project.

They make a loop of minutes on a CPU. GLM-4 and Stable Diffusion are tuned and asked with the defaults of
src/iterate.py instead.
"""

from kka.runs import ROOT

MODELS = ROOT / "src" / "kka" / "garden_models"
GARDEN_LOOP: dict[str, object] = {
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
    "drawer_guidance": 4.5,
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
"""flags of src/iterate.py, without dashes"""
