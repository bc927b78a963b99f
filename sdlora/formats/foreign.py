"""What a safetensors file holds if it is not a LoRA that sdlora reads, by its keys, and what to do then."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..adapters.kinds.table import part_at_end
from ..errors import AdapterFileError, shown
from ..families.table import component_names
from ..tensor_file import TensorSpec

PEFT_MERGES = "PEFT can merge it into its base (PeftModel.merge_and_unload)"
WHOLE_LAYERS = "a PEFT adapter with whole layers or biases saved beside the LoRA"
_KINDS: tuple[tuple[str, str, str], ...] = (
    (r"\.(oft_[rR]|boft_[rRs])\b|\.boft_R\.", "an OFT or BOFT adapter of PEFT", PEFT_MERGES),
    (r"\.bm\.weight$", "a GLoRA adapter with Tucker factors", "LyCORIS can merge it into its base"),
    (
        r"\.modules_to_save\.|\.base_layer\.",
        WHOLE_LAYERS,
        PEFT_MERGES,
    ),
    (
        r"\.(vera|hra|fourierft|randlora|c3a|lora_ga)_",
        "an adapter of a kind that only PEFT has",
        PEFT_MERGES,
    ),
    (r"\.set_weight$|\.reshape_weight$", "an adapter that replaces whole weights", "ComfyUI loads it"),
    (r"lora_controlnet|^lora_controlnet", "a Control-LoRA", "ComfyUI and WebUI's ControlNet load it"),
)
_TRANSFORMER = re.compile(
    r"^lora_unet_(double|single)_blocks|^lora_unet_joint_blocks|^lora_te3_|^transformer\.|"
    r"transformer\.(single_)?transformer_blocks"
)
_LORA = re.compile(
    r"lora_(down|up|A|B|linear_layer)|\.lora\.(down|up)|_lora\.(down|up)|^(lora_unet|lora_te\d?|lycoris)_"
)
_MODELS = (
    (
        r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.",
        "a full model (checkpoint)",
    ),
    (r"^(down_blocks|up_blocks|mid_block)\.\d.*\.(weight|bias)$|^conv_in\.weight$", "a full U-Net"),
    (r"^(text_model\.)?(embeddings|encoder\.layers)\.", "a full text encoder"),
    (r"^(encoder|decoder)\.(conv_in|down|up|mid)", "a full VAE"),
    (r"^(control_model|controlnet_)", "a ControlNet"),
)
_EMBEDDING_WIDTHS = (768, 1024, 1280)
_EMBEDDING_KEYS = {"emb_params", "clip_l", "clip_g", "string_to_param", "string_to_token", "<concept>"}


def is_checkpoint(keys: Iterable[str]) -> bool:
    """Tell whether the keys are those of a whole model in one file."""
    return any(re.match(_MODELS[0][0], key) for key in keys)


def other_kind(keys: Iterable[str]) -> tuple[str, str] | None:
    """Return the kind that the keys are of, if sdlora does not read it, and who can do what with it."""
    names = list(keys)
    for pattern, kind, who in _KINDS:
        compiled = re.compile(pattern)
        if any(compiled.search(key) for key in names):
            return kind, who
    known = tuple(f"{name}." for name in component_names())
    if any(_TRANSFORMER.search(key) for key in names if not key.startswith(known)):
        return "a LoRA for a transformer model (SD3, Flux or similar)", "ComfyUI, Forge and diffusers load it"
    return None


def not_an_adapter(path: Path, tensors: Mapping[str, TensorSpec]) -> AdapterFileError:
    """Return the error for a file without any LoRA key, naming what the file is instead."""
    if not tensors:
        return AdapterFileError(f"{path}: holds no tensors at all; give the adapter's own .safetensors file")
    if len(tensors) <= 4 and (
        set(tensors) & _EMBEDDING_KEYS
        or all(len(spec.shape) in (1, 2) and spec.shape[-1] in _EMBEDDING_WIDTHS for spec in tensors.values())
    ):
        return AdapterFileError(
            f"{path}: is a textual-inversion embedding, not a LoRA; put it into WebUI's `embeddings` folder"
        )
    for pattern, what in _MODELS:
        compiled = re.compile(pattern)
        if any(compiled.search(key) for key in tensors):
            return AdapterFileError(
                f"{path}: is {what}, not a LoRA ({len(tensors)} tensors, no LoRA keys); "
                "give it as --base, and a LoRA file as the adapter"
            )
    return AdapterFileError(
        f"{path}: holds no LoRA ({listing(list(tensors))}); give a file made by a LoRA trainer"
    )


def unsupported(path: Path, kind: str, who: str, keys: Sequence[str]) -> AdapterFileError:
    """Return the error for an adapter of a kind that sdlora does not read, with who can do what with it."""
    return AdapterFileError(f"{path}: is {kind}, which sdlora does not read ({listing(keys)}); {who}")


def unknown_keys(path: Path, keys: Sequence[str]) -> AdapterFileError:
    """Return the error for keys that fit no module name: nothing is dropped silently."""
    return AdapterFileError(
        f"{path}: {len(keys)} keys are unknown to sdlora ({listing(keys)}); reading the rest would change "
        "the adapter, so export it again for Stable Diffusion or remove these keys"
    )


def has_lora(keys: Iterable[str]) -> bool:
    """Tell whether any key has the name of a LoRA factor."""
    return any(_LORA.search(key) or part_at_end(key) is not None for key in keys)


def listing(keys: Sequence[str], limit: int = 3) -> str:
    """Return the first keys and how many follow."""
    named = ", ".join(f"`{shown(key, 80)}`" for key in keys[:limit])
    return named if len(keys) <= limit else f"{named} and {len(keys) - limit} more"
