"""diffusers' example scripts, by the command lines of their READMEs."""

from __future__ import annotations

from typing import Any

import pytest

from sdlora.config.foreign.programs import import_settings
from sdlora.errors import ConfigError

START = "accelerate launch --mixed_precision=fp16 "
CASES: list[tuple[str, dict[str, Any]]] = [
    (
        "train_text_to_image_lora.py --pretrained_model_name_or_path=m --train_data_dir=d "
        "--resolution=512 --random_flip "
        "--train_batch_size=1 --num_train_epochs=100 --checkpointing_steps=5000 --learning_rate=1e-04 "
        "--lr_scheduler=constant --lr_warmup_steps=0 --seed=42 --output_dir=out "
        "--validation_prompt='cute dragon'",
        {
            "model.base": "m",
            "data.folder": "d",
            "data.resolution": 512,
            "data.flip": True,
            "data.buckets": False,
            "data.crop": "random",
            "training.batch_size": 1,
            "training.epochs": 100,
            "training.checkpoint_every": 5000,
            "optimizer.learning_rate": 1e-4,
            "training.seed": 42,
            "sample.prompts": ["cute dragon"],
            "adapter.rank": 4,
            "adapter.alpha": 4.0,
            "adapter.init": "gaussian",
            "adapter.targets": "attention",
            "optimizer.warmup_steps": 0,
        },
    ),
    (
        "train_text_to_image_lora.py --pretrained_model_name_or_path=m",
        {"training.batch_size": 16, "training.epochs": 100},
    ),
    (
        "train_text_to_image_lora_sdxl.py --pretrained_model_name_or_path=m --train_text_encoder --rank=8 "
        "--pretrained_vae_model_name_or_path=vae --snr_gamma=5.0",
        {
            "data.resolution": 1024,
            "adapter.text_encoder": True,
            "adapter.rank": 8,
            "adapter.alpha": 8.0,
            "model.vae": "vae",
            "training.min_snr_gamma": 5.0,
            "optimizer.text_encoder_learning_rate": 1e-4,
        },
    ),
    (
        "train_dreambooth_lora.py --pretrained_model_name_or_path=m --instance_data_dir=dog "
        "--instance_prompt='a photo of sks dog' --train_batch_size=1 --gradient_accumulation_steps=1 "
        "--learning_rate=1e-4 "
        "--max_train_steps=500",
        {"data.folder": "dog", "data.trigger_word": "a photo of sks dog", "training.steps": 500},
    ),
    (
        "train_dreambooth_lora.py --pretrained_model_name_or_path=m --instance_data_dir=dog "
        "--with_prior_preservation "
        "--class_data_dir=dogs --class_prompt='a dog' --prior_loss_weight=0.8",
        {
            "data.sources": [{"folder": "dogs", "regularisation": True, "weight": 0.8, "caption": "a dog"}],
            "optimizer.learning_rate": 5e-4,
        },
    ),
    (
        "train_dreambooth_lora_sdxl.py --pretrained_model_name_or_path=m --use_dora --optimizer=AdamW "
        "--text_encoder_lr=5e-6 "
        "--train_text_encoder",
        {
            "adapter.kind": "dora",
            "optimizer.text_encoder_learning_rate": 5e-6,
            "optimizer.weight_decay": 1e-4,
        },
    ),
    (
        "train_text_to_image_lora.py --scale_lr --train_batch_size=4 --gradient_accumulation_steps=2 "
        "--learning_rate=1e-5",
        {"optimizer.learning_rate": 8e-5},
    ),
    (
        "train_text_to_image_lora.py --lr_scheduler=cosine --adam_beta1=0.8 --adam_beta2=0.95 "
        "--noise_offset=0.1 --center_crop "
        "--enable_xformers_memory_efficient_attention --gradient_checkpointing",
        {
            "optimizer.schedule": "cosine",
            "optimizer.warmup_steps": 500,
            "optimizer.betas": (0.8, 0.95),
            "training.noise_offset": 0.1,
            "data.crop": None,
            "training.attention": "xformers",
            "training.recompute": "blocks",
        },
    ),
]


@pytest.mark.parametrize(("command", "expected"), CASES)
def test_a_command_becomes_settings(command: str, expected: dict[str, Any]) -> None:
    imported = import_settings(START + command)
    assert {key: imported.values.get(key) for key in expected} == {
        key: pytest.approx(value) if isinstance(value, float) else value for key, value in expected.items()
    }
    imported.config()


def test_a_script_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train_dreambooth_lora_flux\.py trains another model"):
        import_settings(START + "train_dreambooth_lora_flux.py --rank=4")
