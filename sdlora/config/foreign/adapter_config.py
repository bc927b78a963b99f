"""PEFT's ``adapter_config.json``: what an adapter is made of (peft/tuners/lora/config.py of PEFT 0.21)."""

from __future__ import annotations

from collections.abc import Sequence

from .ledger import Ledger, shown

_ATTENTION = {"to_q", "to_k", "to_v", "to_out.0"}
_LINEAR = _ATTENTION | {"proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"}


def translate(ledger: Ledger) -> None:
    """Translate PEFT's settings: a LoRA's only, as sdlora trains no other of its kinds from there."""
    kind = ledger.text("peft_type", "LORA").upper()
    kinds = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr"}
    ours = "dora" if kind == "LORA" and ledger.truth("use_dora") else kinds.get(kind)
    names = ["peft_type", *(["use_dora"] if ledger.truth("use_dora") else [])]
    if ours is None:
        ledger.put("peft_type", "adapter.kind", "lora", f"sdlora does not train {kind}: a plain LoRA")
    else:
        ledger.put(names, "adapter.kind", ours)
    if ledger.has("base_model_name_or_path"):
        ledger.put("base_model_name_or_path", "model.base", ledger.text("base_model_name_or_path"))
    rank = ledger.whole("r", 8)
    ledger.put("r", "adapter.rank", rank) if ledger.has("r") else ledger.implied(
        "r", "adapter.rank", 8, "PEFT's default"
    )
    for name in ("lora_alpha", "alpha"):
        if ledger.has(name):
            ledger.put(name, "adapter.alpha", ledger.number(name))
    if not ledger.has("lora_alpha") and not ledger.has("alpha"):
        ledger.implied("lora_alpha", "adapter.alpha", 8.0, "PEFT's default")
    if ledger.number("lora_dropout", 0.0):
        ledger.put("lora_dropout", "adapter.dropout", ledger.number("lora_dropout"))
    if ledger.truth("use_rslora"):
        ledger.put("use_rslora", "adapter.scaling", "rslora")
    _start(ledger)
    _targets(ledger)
    ledger.none(("rank_pattern", "alpha_pattern"), "given by block here: adapter.block_ranks")
    ledger.none(
        ("modules_to_save", "layers_to_transform", "layers_pattern", "exclude_modules"),
        "layers are chosen by adapter.targets and adapter.block_ranks",
    )
    ledger.none("bias", "sdlora trains no biases")
    ledger.default(
        ("task_type", "inference_mode", "auto_mapping", "revision", "peft_version", "fan_in_fan_out"),
        "says how PEFT loads it",
    )


def _start(ledger: Ledger) -> None:
    start = ledger.text("init_lora_weights", "true").lower()
    if start in ("true", "default"):
        ledger.default("init_lora_weights", "A uniform, B zero, as here")
    elif start.startswith("pissa"):
        ledger.put("init_lora_weights", "adapter.init", "pissa")
    else:
        ledger.put("init_lora_weights", "adapter.init", start)


def _targets(ledger: Ledger) -> None:
    given = ledger.raw("target_modules")
    if given is None:
        return
    if not isinstance(given, Sequence) or isinstance(given, str):
        ledger.put(
            "target_modules", "adapter.targets", "linear", f"`{shown(given)}` is a pattern; the linear layers"
        )
        return
    last = {str(name) for name in given}
    if last <= _ATTENTION:
        ledger.put("target_modules", "adapter.targets", "attention", "the attention's projections")
    elif last <= _LINEAR:
        ledger.put(
            "target_modules", "adapter.targets", "linear", "every linear layer of the transformer blocks"
        )
    elif any("conv" in name for name in last):
        ledger.put("target_modules", "adapter.targets", "all", "convolutions are among them")
    elif {"q_proj", "v_proj"} & last:
        ledger.none(
            "target_modules",
            "layers of a text encoder: adapter.text_encoder=true adapts them beside the U-Net",
        )
    else:
        ledger.put("target_modules", "adapter.targets", "linear", "the nearest set of layers")
