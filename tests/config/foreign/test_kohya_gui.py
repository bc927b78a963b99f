"""kohya_ss: the JSON that its LoRA tab saves (presets/lora of that repository give the form)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdlora.config.foreign.programs import import_settings

FORM = {
    "LoRA_type": "Standard",
    "adaptive_noise_scale": 0,
    "additional_parameters": "",
    "block_alphas": "",
    "block_dims": "",
    "bucket_no_upscale": False,
    "bucket_reso_steps": 64,
    "cache_latents": True,
    "cache_latents_to_disk": True,
    "caption_dropout_every_n_epochs": 0.0,
    "caption_dropout_rate": 0.05,
    "caption_extension": ".txt",
    "clip_skip": "1",
    "color_aug": False,
    "conv_alpha": 1,
    "conv_dim": 1,
    "decompose_both": False,
    "dim_from_weights": False,
    "enable_bucket": True,
    "epoch": 50,
    "factor": -1,
    "flip_aug": False,
    "full_bf16": False,
    "full_fp16": False,
    "gradient_accumulation_steps": "1",
    "gradient_checkpointing": True,
    "keep_tokens": "0",
    "learning_rate": 3e-05,
    "lora_network_weights": "",
    "lr_scheduler": "constant",
    "lr_scheduler_args": "",
    "lr_scheduler_num_cycles": "",
    "lr_scheduler_power": "",
    "lr_warmup": 0,
    "max_bucket_reso": 2048,
    "max_data_loader_n_workers": "0",
    "max_resolution": "1024,1024",
    "max_timestep": 1000,
    "max_token_length": "75",
    "max_train_epochs": "50",
    "max_train_steps": "",
    "mem_eff_attn": False,
    "min_bucket_reso": 256,
    "min_snr_gamma": 5,
    "min_timestep": 0,
    "mixed_precision": "fp16",
    "module_dropout": 0,
    "multires_noise_discount": 0,
    "multires_noise_iterations": 0,
    "network_alpha": 32,
    "network_dim": 32,
    "network_dropout": 0,
    "noise_offset": 0,
    "noise_offset_type": "Original",
    "num_cpu_threads_per_process": 2,
    "optimizer": "AdamW",
    "optimizer_args": "",
    "prior_loss_weight": 1.0,
    "random_crop": False,
    "rank_dropout": 0,
    "save_every_n_epochs": 1,
    "save_every_n_steps": 0,
    "save_precision": "fp16",
    "scale_weight_norms": 0,
    "sdxl": True,
    "sdxl_cache_text_encoder_outputs": False,
    "sdxl_no_half_vae": True,
    "seed": "",
    "shuffle_caption": False,
    "stop_text_encoder_training_pct": 0,
    "text_encoder_lr": 3e-05,
    "train_batch_size": 3,
    "train_on_input": True,
    "training_comment": "3 repeats",
    "unet_lr": 3e-05,
    "unit": 1,
    "use_cp": False,
    "v2": False,
    "v_parameterization": False,
    "vae_batch_size": 0,
    "weighted_captions": False,
    "xformers": "xformers",
}

CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {},
        {
            "adapter.rank": 32,
            "adapter.alpha": 32,
            "training.epochs": 50,
            "training.batch_size": 3,
            "training.precision": "fp16",
            "data.resolution": 1024,
            "optimizer.learning_rate": 3e-05,
            "adapter.text_encoder": True,
            "optimizer.text_encoder_learning_rate": 3e-05,
            "training.min_snr_gamma": 5,
            "training.attention": "xformers",
            "output.description": "3 repeats",
            "adapter.targets": "linear",
        },
    ),
    (
        {"LoRA_type": "Kohya LoCon", "conv_dim": 32, "conv_alpha": 32},
        {"adapter.kind": None, "adapter.targets": "all"},
    ),
    (
        {"LoRA_type": "LyCORIS/LoHa", "conv_dim": 8, "network_dim": 8, "LyCORIS_preset": "full"},
        {"adapter.kind": "loha", "adapter.targets": "all", "adapter.rank": 8},
    ),
    ({"LoRA_type": "LyCORIS/LoKr", "factor": 8}, {"adapter.kind": "lokr", "adapter.lokr_factor": 8}),
    ({"text_encoder_lr": 0}, {"adapter.text_encoder": None, "optimizer.text_encoder_learning_rate": None}),
    (
        {"noise_offset": 0.05, "min_snr_gamma": 0},
        {"training.noise_offset": 0.05, "training.min_snr_gamma": 0.0},
    ),
    (
        {"lr_warmup": 10, "lr_scheduler": "cosine"},
        {"optimizer.warmup_share": 0.1, "optimizer.schedule": "cosine"},
    ),
    (
        {"max_train_epochs": "0", "epoch": 10, "max_train_steps": "2500", "seed": "1234"},
        {"training.steps": 2500, "training.epochs": None, "training.seed": 1234},
    ),
    (
        {
            "train_data_dir": "/data/img",
            "reg_data_dir": "",
            "output_dir": "/out",
            "output_name": "cat",
            "pretrained_model_name_or_path": "/m/xl.safetensors",
        },
        {
            "data.folder": "/data/img",
            "output.folder": "/out/cat",
            "output.name": "cat",
            "model.base": "/m/xl.safetensors",
        },
    ),
]


@pytest.mark.parametrize(("changed", "expected"), CASES)
def test_saved_settings_become_ours(
    changed: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "preset.json"
    file.write_text(json.dumps({**FORM, **changed}), encoding="utf-8")
    imported = import_settings(file)
    assert imported.program == "settings saved by kohya_ss"
    assert {key: imported.values.get(key) for key in expected} == expected
    imported.config()


def test_nothing_of_the_page_is_called_unknown(tmp_path: Path) -> None:
    (tmp_path / "preset.json").write_text(json.dumps(FORM), encoding="utf-8")
    imported = import_settings(tmp_path / "preset.json")
    lost = {row.setting for row in imported.rows if row.outcome == "without counterpart"}
    assert lost == {"save_every_n_epochs"}  # checkpoints are counted in steps
    assert len(imported.rows) >= 60
