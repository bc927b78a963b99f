"""OneTrainer: its training configuration with concepts and samples (modules/util/config of that
repository)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdlora.config.foreign.programs import Imported, import_settings
from sdlora.errors import ConfigError

CONCEPT: dict[str, Any] = {
    "name": "cats",
    "path": "D:/data/cats",
    "seed": 12,
    "enabled": True,
    "type": "STANDARD",
    "include_subdirectories": False,
    "image_variations": 1,
    "text_variations": 1,
    "balancing": 3.0,
    "balancing_strategy": "REPEATS",
    "loss_weight": 1.0,
    "image": {"enable_crop_jitter": True, "enable_random_flip": False, "random_rotate_max_angle": 0.0},
    "text": {
        "prompt_source": "sample",
        "prompt_path": "",
        "enable_tag_shuffling": False,
        "tag_delimiter": ",",
        "keep_tags_count": 1,
        "tag_dropout_enable": False,
        "tag_dropout_mode": "FULL",
        "tag_dropout_probability": 0.0,
    },
}
CONFIG: dict[str, Any] = {
    "__version": 10,
    "training_method": "LORA",
    "model_type": "STABLE_DIFFUSION_XL_10_BASE",
    "base_model_name": "D:/models/xl.safetensors",
    "output_dtype": "FLOAT_16",
    "output_model_destination": "D:/loras/kitty.safetensors",
    "concepts": [CONCEPT],
    "learning_rate": 3e-4,
    "learning_rate_scheduler": "CONSTANT",
    "learning_rate_warmup_steps": 100.0,
    "epochs": 40,
    "batch_size": 2,
    "train_dtype": "BFLOAT_16",
    "resolution": "1024",
    "unet": {"train": True, "learning_rate": None},
    "text_encoder": {"train": False, "learning_rate": None},
    "prior": {"train": True},
    "peft_type": "LORA",
    "lora_rank": 16,
    "lora_alpha": 8.0,
    "optimizer": {"optimizer": "ADAMW", "beta1": 0.9, "beta2": 0.999},
    "ema": "OFF",
    "loss_weight_fn": "CONSTANT",
    "secrets": {"huggingface_token": "hf_secret"},
}
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {},
        {
            "model.base": "D:/models/xl.safetensors",
            "adapter.rank": 16,
            "adapter.alpha": 8.0,
            "adapter.targets": "all",
            "optimizer.learning_rate": 3e-4,
            "optimizer.warmup_steps": 100,
            "training.epochs": 40,
            "output.name": "kitty",
            "training.precision": "bf16",
            "output.dtype": "fp16",
            "data.resolution": 1024,
            "training.min_snr_gamma": 0.0,
            "data.sources": [
                {"folder": "D:/data/cats", "kohya_folders": False, "recursive": False, "repeats": 3}
            ],
        },
    ),
    ({"lora_decompose": True}, {"adapter.kind": "dora"}),
    ({"peft_type": "LOHA"}, {"adapter.kind": "loha"}),
    ({"peft_type": "LOKR", "lokr_decompose_factor": 8}, {"adapter.kind": "lokr", "adapter.lokr_factor": 8}),
    (
        {"text_encoder": {"train": True, "learning_rate": 1e-5}, "unet": {"learning_rate": 2e-4}},
        {
            "adapter.text_encoder": True,
            "optimizer.text_encoder_learning_rate": 1e-5,
            "optimizer.learning_rate": 2e-4,
        },
    ),
    (
        {"loss_weight_fn": "MIN_SNR_GAMMA", "loss_weight_strength": 4.0, "offset_noise_weight": 0.1},
        {"training.min_snr_gamma": 4.0, "training.noise_offset": 0.1},
    ),
    (
        {
            "resolution": "512,768",
            "layer_filter": "attentions",
            "learning_rate_scheduler": "COSINE",
            "learning_rate_warmup_steps": 0.1,
        },
        {
            "data.resolution": 512,
            "data.more_resolutions": [768],
            "adapter.targets": "linear",
            "optimizer.schedule": "cosine",
            "optimizer.warmup_share": 0.1,
        },
    ),
    (
        {
            "samples": [
                {
                    "enabled": True,
                    "prompt": "a cat",
                    "negative_prompt": "blurry",
                    "diffusion_steps": 25,
                    "cfg_scale": 6.0,
                    "seed": 5,
                    "height": 1024,
                }
            ],
            "sample_after": 200,
            "sample_after_unit": "STEP",
        },
        {
            "sample.prompts": ["a cat"],
            "sample.negative_prompt": "blurry",
            "sample.steps": 25,
            "sample.guidance": 6.0,
            "sample.seed": 5,
            "sample.every": 200,
        },
    ),
    (
        {
            "concepts": [
                CONCEPT
                | {
                    "image": {"enable_random_flip": True},
                    "text": {"enable_tag_shuffling": True, "keep_tags_count": 2, "prompt_source": "filename"},
                },
                CONCEPT | {"path": "reg", "type": "PRIOR_PREDICTION", "balancing": 1.0},
                CONCEPT | {"path": "off", "enabled": False},
            ]
        },
        {
            "data.flip": True,
            "data.shuffle_tags": True,
            "data.keep_tags": 2,
            "data.caption_from": "file name",
            "data.prior_preservation": 1.0,
        },
    ),
    (
        {
            "force_v_prediction": True,
            "rescale_noise_scheduler_to_zero_terminal_snr": True,
            "text_encoder_layer_skip": 1,
            "model_type": "STABLE_DIFFUSION_15",
        },
        {"model.prediction_type": "v_prediction", "model.zero_terminal_snr": True, "model.clip_skip": 2},
    ),
]


def imported(document: Any, folder: Path) -> Imported:
    """Import a document as a JSON file."""
    (folder / "config.json").write_text(json.dumps(document), encoding="utf-8")
    return import_settings(folder / "config.json")


@pytest.mark.parametrize(("changed", "expected"), CASES)
def test_a_configuration_becomes_ours(
    changed: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    result = imported({**CONFIG, **changed}, tmp_path)
    assert {key: result.values.get(key) for key in expected} == expected
    result.config()


def test_concepts_in_a_file_of_their_own_are_found_beside_it(tmp_path: Path) -> None:
    (tmp_path / "concepts.json").write_text(json.dumps([CONCEPT]), encoding="utf-8")
    document = {name: value for name, value in CONFIG.items() if name != "concepts"}
    result = imported({**document, "concept_file_name": "training_concepts/concepts.json"}, tmp_path)
    assert [source["folder"] for source in result.values["data.sources"]] == ["D:/data/cats"]
    alone = import_settings(tmp_path / "concepts.json")
    assert alone.values["data.sources"] == result.values["data.sources"]


def test_secrets_are_not_shown_and_unknown_settings_are(tmp_path: Path) -> None:
    rows = {row.setting: row for row in imported({**CONFIG, "mystery": 3}, tmp_path).rows}
    assert rows["secrets.huggingface_token"].value == "(kept back)"
    assert rows["mystery"].outcome == "without counterpart"
    assert rows["prior.train"].outcome == "default anyway"


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"model_type": "FLUX_DEV_1"}, "`model_type=FLUX_DEV_1`: sdlora trains"),
        ({"training_method": "FINE_TUNE"}, "`training_method=FINE_TUNE`: sdlora trains LoRA"),
        ({"lora_rank": "lots"}, "`lora_rank=lots` is no number"),
    ],
)
def test_what_sdlora_does_not_train_is_refused(
    changed: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        imported({**CONFIG, **changed}, tmp_path)
    assert complaint in str(caught.value)
