"""Mended copies of adapter files: what was wrong is right, and no update changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlora.adapters.canonical import ModuleKey
from sdlora.commands.cli import main
from sdlora.errors import OutputError
from sdlora.formats.adapter_files import OpenAdapter, read_adapter
from sdlora.inspecting.fix import fix_adapter

TO_Q = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
TO_K = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k"


def broken(path: Path) -> Path:
    save_file(
        {
            f"{TO_Q}.lora_down.weight": torch.randn(2, 8, 1, 1),
            f"{TO_Q}.lora_up.weight": torch.randn(8, 2, 1, 1),
            f"{TO_Q}.alpha": torch.tensor(1.0),
            f"{TO_K}.lora_down.weight": torch.randn(2, 8),
            f"{TO_K}.lora_up.weight": torch.randn(8, 2),
            f"{TO_K}.scale": torch.tensor(0.25),
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.randn(2, 6),
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.randn(12, 2),
            "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(0.0),
            "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.randn(2, 6),
            "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.randn(12, 2),
            "lora_te1_text_model_embeddings_position_ids": torch.arange(77)[None],
        },
        path,
        {"ss_output_name": "old", "modelspec.title": "old", "ss_v2": "True", "sshs_model_hash": "0" * 64},
    )
    return path


def test_a_broken_file_is_mended_into_a_new_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, target = broken(tmp_path / "old.safetensors"), tmp_path / "new.safetensors"
    before = file.read_bytes()
    assert main(["inspect", str(file), "--fix", str(target), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    text = " ".join(told["mended"])
    for word in ("dimensions", "two namings", "alpha", "`scale`", "alpha 0", "position_ids", "ss_v2", "hash"):
        assert word in text, word
    assert "largest delta difference" in told["proof"] and file.read_bytes() == before
    old, new = read_adapter(file).weights.updates, read_adapter(target).weights.updates
    assert sorted(old) == sorted(new) and len(new) == 4
    for key, update in old.items():
        torch.testing.assert_close(new[key].delta(), update.delta(), rtol=1e-6, atol=1e-7)
    assert not new[ModuleKey("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1")].delta().any()
    entries = OpenAdapter(target).headers[0].metadata
    assert (entries["ss_output_name"], entries["modelspec.title"]) == ("new", "new")
    assert entries["ss_v2"] == "False" and entries["ss_base_model_version"].startswith("sdxl")
    assert entries["sshs_model_hash"] == OpenAdapter(target).data_hash()
    assert all(key.startswith(("lora_unet_middle", "lora_te1_", "lora_te2_")) for key in load_file(target))
    again = fix_adapter(target, tmp_path / "third.safetensors")
    assert again.file is None and again.mended == () and not (tmp_path / "third.safetensors").exists()
    with pytest.raises(OutputError, match="exists"):
        fix_adapter(file, target)
    with pytest.raises(OutputError, match="one of the inputs"):
        fix_adapter(file, file, overwrite=True)
