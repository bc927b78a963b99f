"""What several trainers spell alike becomes the same of ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdlora.config.foreign.ledger import Outcome
from sdlora.config.foreign.programs import import_settings

KOHYA = "train_network.py --pretrained_model_name_or_path=m.safetensors --train_data_dir=data "
JOB = "job: extension\nconfig:\n  name: n\n  process:\n  - type: sd_trainer\n    model:\n      {}\n"
ONETRAINER = {"training_method": "LORA", "model_type": "STABLE_DIFFUSION_XL_10_BASE"}
SIMPLETUNER = {"model_type": "lora", "model_family": "sdxl", "data_backend_config": "none.json"}

SAID: dict[str, tuple[str, str, str | None]] = {
    "kohya": ("command", KOHYA + "--fp8_base", "fp8"),
    "kohya, U-Net": ("command", KOHYA + "--fp8_base --fp8_base_unet", "fp8"),
    "kohya, nothing": ("command", KOHYA, None),
    "ai-toolkit": ("job.yaml", JOB.format("quantize: true"), "fp8"),
    "ai-toolkit, 4 bits": ("job.yaml", JOB.format("quantize: true\n      qtype: uint4"), "nf4"),
    "ai-toolkit, off": ("job.yaml", JOB.format("quantize: false\n      qtype: uint4"), None),
    "OneTrainer": ("c.json", json.dumps({**ONETRAINER, "unet": {"weight_dtype": "FLOAT_8"}}), "fp8"),
    "OneTrainer, 4 bits": ("c.json", json.dumps({**ONETRAINER, "unet": {"weight_dtype": "NFLOAT_4"}}), "nf4"),
    "OneTrainer, whole": ("c.json", json.dumps({**ONETRAINER, "unet": {"weight_dtype": "BFLOAT_16"}}), None),
    "SimpleTuner": ("config.json", json.dumps({**SIMPLETUNER, "base_model_precision": "int8-quanto"}), "fp8"),
    "SimpleTuner, 4 bits": (
        "config.json",
        json.dumps({**SIMPLETUNER, "base_model_precision": "nf4-bnb"}),
        "nf4",
    ),
    "SimpleTuner, whole": (
        "config.json",
        json.dumps({**SIMPLETUNER, "base_model_precision": "no_change"}),
        None,
    ),
}


@pytest.mark.parametrize("program", SAID)
def test_the_format_of_the_base_is_taken_over(program: str, tmp_path: Path) -> None:
    name, text, wanted = SAID[program]
    if name != "command":
        (tmp_path / name).write_text(text, encoding="utf-8")
    imported = import_settings(text if name == "command" else tmp_path / name)
    assert imported.values.get("training.base_format") == wanted
    rows = [row for row in imported.rows if row.ours.startswith("training.base_format")]
    assert bool(rows) == (wanted is not None)
    assert all(row.outcome == Outcome.TRANSLATED and "text encoders stay whole" in row.reason for row in rows)
