"""SimpleTuner: config.json and the data backends, as its examples write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdlora.config.foreign.programs import import_settings
from sdlora.errors import ConfigError

CONFIG: dict[str, Any] = {  # simpletuner/examples/sd1x-dreamshaper.peft-lora/config.json
    "base_model_precision": "no_change",
    "caption_dropout_probability": 0.1,
    "checkpoint_step_interval": 50,
    "checkpoints_total_limit": 5,
    "data_backend_config": "config/multidatabackend.json",
    "disable_bucket_pruning": True,
    "gradient_checkpointing": True,
    "hub_model_id": "example",
    "learning_rate": 1e-4,
    "lora_rank": 16,
    "lora_type": "standard",
    "lr_scheduler": "constant",
    "max_train_steps": 100,
    "mixed_precision": "bf16",
    "model_family": "sd1x",
    "model_flavour": "dreamshaper",
    "pretrained_model_name_or_path": "Lykon/dreamshaper-8",
    "model_type": "lora",
    "num_train_epochs": 0,
    "optimizer": "adamw_bf16",
    "output_dir": "output/examples/sd1x",
    "push_to_hub": False,
    "report_to": "none",
    "resolution": 512,
    "resolution_type": "pixel",
    "seed": 42,
    "train_batch_size": 1,
    "use_ema": False,
    "validation_guidance": 7.0,
    "validation_num_inference_steps": 20,
    "validation_prompt": "domokun holding a sign",
    "validation_resolution": "512x512",
    "validation_seed": 42,
    "validation_steps": 50,
}
BACKENDS: list[dict[str, Any]] = [
    {
        "id": "images",
        "type": "local",
        "instance_data_dir": "/data/tree",
        "crop": False,
        "resolution": 512,
        "resolution_type": "pixel",
        "caption_strategy": "textfile",
        "cache_dir_vae": "/cache",
        "repeats": 4,
    },
    {
        "id": "text",
        "dataset_type": "text_embeds",
        "default": True,
        "type": "local",
        "cache_dir": "/cache/text",
    },
]
CASES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (
        {},
        {},
        {
            "model.base": "Lykon/dreamshaper-8",
            "training.steps": 100,
            "adapter.rank": 16,
            "adapter.alpha": 16.0,
            "adapter.targets": "attention",
            "optimizer.learning_rate": 1e-4,
            "optimizer.schedule": "constant",
            "training.precision": "bf16",
            "data.caption_dropout": 0.1,
            "training.checkpoint_every": 50,
            "training.keep_checkpoints": 5,
            "sample.prompts": ["domokun holding a sign"],
            "sample.every": 50,
            "sample.guidance": 7.0,
            "sample.steps": 20,
            "training.seed": 42,
            "data.resolution": 512,
            "data.caption_lines": "one",
            "data.sources": [{"folder": "/data/tree", "kohya_folders": False, "repeats": 5}],
        },
    ),
    ({"use_dora": True, "lora_alpha": 8}, {}, {"adapter.kind": "dora", "adapter.alpha": 8}),
    (
        {"use_dora": True, "lora_init_type": "pissa"},
        {},
        {"adapter.kind": "dora", "adapter.init": None},
    ),  # not both
    ({"max_train_steps": 0, "num_train_epochs": 3}, {}, {"training.epochs": 3, "training.steps": None}),
    (
        {"snr_gamma": 5, "offset_noise": True, "noise_offset": 0.05},
        {},
        {"training.min_snr_gamma": 5, "training.noise_offset": 0.05},
    ),
    (
        {},
        {"caption_strategy": "filename", "crop": True, "crop_aspect": "square", "crop_style": "random"},
        {"data.caption_from": "file name", "data.buckets": False, "data.crop": "random"},
    ),
    (
        {},
        {
            "resolution": 0.5,
            "resolution_type": "area",
            "instance_prompt": "cat girls",
            "prepend_instance_prompt": True,
        },
        {
            "data.resolution": 704,
            "data.sources": [
                {"folder": "/data/tree", "kohya_folders": False, "repeats": 5, "trigger_word": "cat girls"}
            ],
        },
    ),
    (
        {},
        {"caption_shuffle": {"enable": True, "count": 3, "position_start": 1}},
        {"data.shuffle_tags": True, "data.keep_tags": 1},
    ),
    (
        {
            "optimizer_config": "weight_decay=0.1",
            "lr_scheduler": "polynomial",
            "lr_power": 2,
            "lr_warmup_steps": 10,
        },
        {},
        {
            "optimizer.weight_decay": 0.1,
            "optimizer.schedule": "polynomial",
            "optimizer.schedule_power": 2,
            "optimizer.warmup_steps": 10,
        },
    ),
    (
        {"lora_type": "lycoris", "lycoris_config": "config/lycoris_config.json"},
        {},
        {"adapter.kind": "lokr", "adapter.lokr_factor": 12, "adapter.rank": 1024, "adapter.alpha": 1},
    ),
]


@pytest.mark.parametrize(("changed", "backend", "expected"), CASES)
def test_a_configuration_becomes_ours_with_the_files_that_it_names(
    changed: dict[str, Any], backend: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    spelled = {f"--{name}": value for name, value in {**CONFIG, **changed}.items()}
    (tmp_path / "multidatabackend.json").write_text(
        json.dumps([{**BACKENDS[0], **backend}, BACKENDS[1]]), encoding="utf-8"
    )
    lycoris = {
        "bypass_mode": True,
        "algo": "lokr",
        "multiplier": 1.0,
        "linear_dim": 10000,
        "linear_alpha": 1,
        "factor": 12,
    }
    (tmp_path / "lycoris_config.json").write_text(json.dumps(lycoris), encoding="utf-8")
    for document in ({**CONFIG, **changed}, spelled):
        (tmp_path / "config.json").write_text(json.dumps(document), encoding="utf-8")
        imported = import_settings(tmp_path / "config.json")
        assert {key: imported.values.get(key) for key in expected} == expected
        imported.config()


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"model_family": "flux"}, "`model_family=flux`"),
        ({"model_type": "full"}, "`model_type=full`"),
        ({"lora_rank": "x"}, "`lora_rank=x` is no number"),
    ],
)
def test_what_sdlora_does_not_train_is_refused(
    changed: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changed}), encoding="utf-8")
    with pytest.raises(ConfigError, match=complaint):
        import_settings(tmp_path / "config.json")
