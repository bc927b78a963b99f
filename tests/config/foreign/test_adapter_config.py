"""PEFT's adapter_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoHaConfig, LoKrConfig, LoraConfig

from sdlora.config.foreign.programs import import_settings

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CASES: list[tuple[Any, dict[str, Any]]] = [
    (
        LoraConfig(r=8, lora_alpha=16, target_modules=ATTENTION),
        {"adapter.kind": "lora", "adapter.rank": 8, "adapter.alpha": 16, "adapter.targets": "attention"},
    ),
    (LoraConfig(r=4, use_dora=True, target_modules=ATTENTION), {"adapter.kind": "dora"}),
    (LoraConfig(r=4, use_rslora=True, lora_alpha=4, target_modules=ATTENTION), {"adapter.scaling": "rslora"}),
    (LoraConfig(r=4, init_lora_weights="gaussian", target_modules=ATTENTION), {"adapter.init": "gaussian"}),
    (LoraConfig(r=4, init_lora_weights="pissa", target_modules=ATTENTION), {"adapter.init": "pissa"}),
    (
        LoraConfig(r=4, lora_dropout=0.1, target_modules=[*ATTENTION, "ff.net.2", "proj_in"]),
        {"adapter.dropout": 0.1, "adapter.targets": "linear"},
    ),
    (LoraConfig(r=4, target_modules=[*ATTENTION, "conv1", "conv2"]), {"adapter.targets": "all"}),
    (LoHaConfig(r=4, alpha=2, target_modules=ATTENTION), {"adapter.kind": "loha", "adapter.alpha": 2}),
    (LoKrConfig(r=4, alpha=2, target_modules=ATTENTION), {"adapter.kind": "lokr"}),
]


@pytest.mark.parametrize(("config", "expected"), CASES)
def test_a_saved_peft_config_becomes_settings(config: Any, expected: dict[str, Any], tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    imported = import_settings(tmp_path / "adapter_config.json")
    assert {key: imported.values.get(key) for key in expected} == expected
    imported.config()
    given = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    told = {row.setting for row in imported.rows}
    assert {name for name, value in given.items() if value not in (None, "")} <= told
