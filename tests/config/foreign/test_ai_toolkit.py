"""ai-toolkit: jobs in YAML, as config/examples of that repository write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdlora.config.foreign.programs import import_settings
from sdlora.errors import ConfigError

JOB = """---
job: extension
config:
  # this name will be the folder and filename name
  name: "my_first_lora_v1"
  process:
    - type: 'sd_trainer'
      training_folder: "output"
      device: cuda:0
      trigger_word: "p3r5on"
      network:
        type: "lora"
        linear: 16
        linear_alpha: 8
        {network}
      save:
        dtype: float16 # precision to save
        save_every: 250 # save every this many steps
        max_step_saves_to_keep: 4
        push_to_hub: false
      datasets:
        - folder_path: "/path/to/images/folder"
          caption_ext: "txt"
          {dataset}
      train:
        batch_size: 1
        steps: 2000
        gradient_accumulation_steps: 1
        train_unet: true
        noise_scheduler: "ddpm"
        optimizer: "adamw"
        lr: 1e-4
        dtype: bf16
        {train}
      model:
        name_or_path: "stabilityai/stable-diffusion-xl-base-1.0"
        {model}
      sample:
        sampler: "ddpm"
        sample_every: 250
        width: 1024
        height: 1024
        prompts:
          - "[trigger] holding a coffee cup"
        neg: ""
        seed: 42
        guidance_scale: 4
        sample_steps: 20
meta:
  name: "[name]"
  version: '1.0'
"""
CASES: list[tuple[dict[str, str], dict[str, Any]]] = [
    (
        {},
        {
            "model.base": "stabilityai/stable-diffusion-xl-base-1.0",
            "data.trigger_word": "p3r5on",
            "adapter.rank": 16,
            "adapter.alpha": 8,
            "adapter.targets": "linear",
            "training.steps": 2000,
            "training.batch_size": 1,
            "optimizer.learning_rate": 1e-4,
            "training.precision": "bf16",
            "output.name": "my_first_lora_v1",
            "output.folder": "output/my_first_lora_v1",
            "output.dtype": "fp16",
            "training.checkpoint_every": 250,
            "training.keep_checkpoints": 4,
            "sample.prompts": ["p3r5on holding a coffee cup"],
            "sample.every": 250,
            "sample.guidance": 4,
            "data.caption_dropout": 0.0,
            "data.resolution": 512,
            "data.sources": [{"folder": "/path/to/images/folder", "kohya_folders": False, "repeats": 1}],
        },
    ),
    (
        {"dataset": "resolution: [ 512, 768, 1024 ]"},
        {"data.resolution": 512, "data.more_resolutions": [768, 1024]},
    ),
    (
        {"dataset": "caption_dropout_rate: 0.05\n          shuffle_tokens: true\n          keep_tokens: 1"},
        {"data.caption_dropout": 0.05, "data.shuffle_tags": True, "data.keep_tags": 1},
    ),
    (
        {"network": "conv: 16\n        conv_alpha: 8\n        dropout: 0.1"},
        {"adapter.targets": "all", "adapter.dropout": 0.1},
    ),
    (
        {"train": "min_snr_gamma: 5.0\n        noise_offset: 0.05"},
        {"training.min_snr_gamma": 5.0, "training.noise_offset": 0.05},
    ),
    (
        {"train": "train_text_encoder: true\n        text_encoder_lr: 5e-5"},
        {"adapter.text_encoder": True, "optimizer.text_encoder_learning_rate": 5e-5},
    ),
    (
        {
            "train": "lr_scheduler: cosine\n        optimizer_params:\n          weight_decay: 1e-2\n   "
            "       betas: [0.9, 0.95]"
        },
        {"optimizer.schedule": "cosine", "optimizer.weight_decay": 0.01, "optimizer.betas": (0.9, 0.95)},
    ),
    (
        {
            "dataset": "num_repeats: 5\n          is_reg: true\n          loss_multiplier: 0.5\n        "
            "- folder_path: other\n"
            "          default_caption: a cat\n          flip_x: true",
            "model": "is_v_pred: true",
        },
        {
            "model.prediction_type": "v_prediction",
            "data.flip": True,
            "data.sources": [
                {
                    "folder": "/path/to/images/folder",
                    "kohya_folders": False,
                    "repeats": 5,
                    "weight": 0.5,
                    "regularisation": True,
                },
                {"folder": "other", "kohya_folders": False, "repeats": 1, "caption": "a cat"},
            ],
        },
    ),
    (
        {"train": "gradient_checkpointing: true\n        xformers: true\n        max_grad_norm: 0.5"},
        {
            "training.recompute": "blocks",
            "training.attention": "xformers",
            "optimizer.max_grad_norm": 0.5,
        },
    ),
]


def job(**parts: str) -> str:
    """Return the example with lines put in."""
    text = JOB
    for name in ("network", "dataset", "train", "model"):
        text = text.replace("{" + name + "}", parts.get(name, "# nothing"))
    return text


@pytest.mark.parametrize(("parts", "expected"), CASES)
def test_a_job_becomes_settings(parts: dict[str, str], expected: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(job(**parts), encoding="utf-8")
    imported = import_settings(tmp_path / "job.yaml")
    assert {key: imported.values.get(key) for key in expected} == expected
    imported.config()
    assert not [row.setting for row in imported.rows if row.outcome == "without counterpart" and not parts]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (job(model="is_flux: true"), "`model.is_flux=true`: sdlora trains"),
        (job(train="steps2: [1"), r"job\.yaml: not valid YAML: line"),
        ("a: &a [x, x]\nb: *a\n", "line 2: an alias"),
        ("[" * 5000, "nested too deep"),
        (job(model='arch: "flux"'), "sdlora trains Stable Diffusion"),
        ("config: {process: []}\n", "holds no process"),
    ],
)
def test_a_job_that_cannot_be_imported_is_refused_in_one_line(
    text: str, complaint: str, tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=complaint) as caught:
        import_settings(tmp_path / "job.yaml")
    assert "\n" not in str(caught.value)
