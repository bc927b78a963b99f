"""Adapters that PEFT itself makes and saves, of every kind and setting that U-Nets and text encoders take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"]
_LAYERS = [*_ATTENTION, "ff.net.0.proj", "fc1", "fc2", "proj_in", "conv1", "conv"]
_LINEAR = [*_ATTENTION, "ff.net.0.proj", "fc1", "fc2"]
_BIASED = ["to_out.0", "q_proj", "k_proj", "out_proj", "ff.net.0.proj", "fc1", "proj_in", "conv1"]
Config = Callable[[], Any]


def lora(targets: list[str] | str = _LAYERS, **more: Any) -> Config:
    """Return the settings of a LoRA whose factors do not start at zero."""
    return lambda: peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": False} | more
    )


SETTINGS: list[tuple[str, Config]] = [
    ("LoRA", lora()),
    ("LoRA, alpha = r", lora(lora_alpha=4)),
    ("LoRA, rank 1", lora(r=1, lora_alpha=1)),
    ("LoRA, every linear layer by `all-linear`", lora(_LINEAR)),
    ("LoRA, targets as an expression", lora(r".*(to_q|q_proj|conv1)")),
    ("rsLoRA", lora(use_rslora=True)),
    ("LoRA, patterns", lora(rank_pattern={"to_q": 2, "fc1": 3}, alpha_pattern={"to_k": 1.5, "conv1": 2})),
    ("rsLoRA, patterns", lora(use_rslora=True, rank_pattern={"to_q": 2, "q_proj": 8})),
    ("LoRA, negative alpha", lora(lora_alpha=-3)),
    ("LoRA with biases", lora(_BIASED, lora_bias=True)),
    ("LoRA with biases, patterns", lora(_BIASED, lora_bias=True, rank_pattern={"to_out.0": 2, "fc1": 8})),
    ("DoRA", lora(use_dora=True)),
    ("DoRA, rsLoRA and patterns", lora(use_dora=True, use_rslora=True, rank_pattern={"to_q": 2, "fc1": 3})),
    ("LoHa", lambda: peft.LoHaConfig(r=3, alpha=2, target_modules=_LAYERS, init_weights=False)),
    (
        "LoHa, effective convolutions and patterns",
        lambda: peft.LoHaConfig(
            r=3,
            alpha=2,
            use_effective_conv2d=True,
            rank_pattern={"conv1": 2},
            alpha_pattern={"to_q": 5},
            target_modules=_LAYERS,
            init_weights=False,
        ),
    ),
    ("LoKr", lambda: peft.LoKrConfig(r=3, alpha=2, target_modules=_LAYERS, init_weights=False)),
    (
        "LoKr, both factors split",
        lambda: peft.LoKrConfig(
            r=2, alpha=1, decompose_both=True, target_modules=_LINEAR, init_weights=False
        ),
    ),
    (
        "LoKr, factor 4, effective convolutions",
        lambda: peft.LoKrConfig(
            r=3,
            alpha=2,
            decompose_factor=4,
            use_effective_conv2d=True,
            target_modules=_LAYERS,
            init_weights=False,
        ),
    ),
    (
        "IA3",
        lambda: peft.IA3Config(
            target_modules=_LINEAR,
            feedforward_modules=["ff.net.0.proj", "fc1", "fc2"],
            init_ia3_weights=False,
        ),
    ),
    (
        "refused: OFT",
        lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=_ATTENTION, init_weights=False),
    ),
    (
        "refused: BOFT",
        lambda: peft.BOFTConfig(boft_block_size=4, target_modules=_ATTENTION, init_weights=False),
    ),
    ("refused: LoRA beside whole layers", lora(modules_to_save=["conv_out", "final_layer_norm"])),
]


def saved(model: nn.Module, config: Config, dtype: torch.dtype, folder: Path) -> Any:
    """Save a random adapter for a model in a folder as PEFT does, and return PEFT's model with it."""
    torch.manual_seed(11)
    trained: Any = peft.get_peft_model(model, config())  # type: ignore[arg-type]
    for name, parameter in trained.named_parameters():
        if any(part in name for part in ("lora_", "ia3_", "hada_", "lokr_")):
            noise = torch.randn_like(parameter) * 0.1
            kept = parameter.data if ("magnitude" in name or "ia3" in name) else torch.zeros_like(noise)
            parameter.data = (kept + noise).to(dtype).float()
    trained.save_pretrained(str(folder))
    if dtype != torch.float32:
        from safetensors.torch import load_file, save_file

        file = folder / "adapter_model.safetensors"
        save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    return trained
