"""What other programs' loaders take: which spellings of names and parts, and what they do with the rest.

One record a program, read in its source or tried by running it (``source`` says where and when). Whatever is
said of a file follows from these and from the rules of :mod:`.clients` about numbers; ``tests/formats/
test_programs.py`` generates files of every spelling and compares with the loaders that are at hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..adapters.kinds.table import part_at_end
from ..families.facts import is_text_encoder
from .keys import ParsedKey

_ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
_KOHYA = frozenset({"kohya", "kohya-ldm", "kohya-te", "kohya-te1", "kohya-te2"})
_BY_LOOKUP = _KOHYA | {"lycoris", "generic", "unet", "unet-processor", "bare", "bare-processor", "te"}
_OLD_PARTS = frozenset({"lora_down", "_lora.down", "lora.down", "linear_layer"})
_TEXT_LAYERS = re.compile(r"\.(?:[qkv]|out)_proj$|\.fc[12]$")


@dataclass(frozen=True)
class Program:
    """What one program's loader takes.

    Attributes:
        names: spellings of module names; see :func:`name_style`.
        parts: spellings of the two factors; see :func:`part_style`.
        source: where this was read or run, and of what date.
        most_unknown: keys it may not know before it refuses the whole file; None if it never does.
        only_text_layers: whether it knows only the attention and MLP layers of text encoders, in names that
            are not its own.
        own_text: name styles in which it knows every layer of a text encoder.
        kohya_parts: spellings of factors that it knows behind kohya's names, where those are fewer.
        text_parts: the same behind a text encoder's dotted names.
        unet_parts: the same behind a U-Net's dotted names.
    """

    names: frozenset[str]
    parts: frozenset[str]
    source: str
    most_unknown: int | None = None
    only_text_layers: bool = True
    own_text: frozenset[str] = frozenset()
    kohya_parts: frozenset[str] | None = None
    text_parts: frozenset[str] | None = None
    unet_parts: frozenset[str] | None = None


PROGRAMS: Mapping[str, Program] = {
    "ComfyUI": Program(
        _BY_LOOKUP | {"generic-te"},
        _OLD_PARTS | {"lora_A", "lora_A.default", "lora_A.bare"},
        "comfy/lora.py, comfy/weight_adapter/*.py, master of 2026-02; run for names of U-Nets",
        own_text=frozenset({"generic-te"}),
    ),
    "Forge": Program(
        frozenset(_BY_LOOKUP),
        _OLD_PARTS | {"lora_A"},
        "packages_3rdparty/comfyui_lora_collection/lora.py, extensions-builtin/sd_forge_lora/networks.py, "
        "dfdcbab of 2025-06-26",
        most_unknown=12,
    ),
    "WebUI": Program(
        frozenset(_KOHYA),
        frozenset({"lora_down", "lora_A"}),
        "extensions-builtin/Lora/networks.py and network_*.py, 1.10 of 2024-07",
        only_text_layers=False,
    ),
    "kohya sd-scripts": Program(
        frozenset(_KOHYA),
        frozenset({"lora_down"}),
        "networks/lora.py, 48d368f of 2026-02-16",
    ),
    "diffusers": Program(
        frozenset(_KOHYA | {"unet", "unet-attention", "unet-processor", "te", "te-flat", "kohya-te-flat"}),
        _OLD_PARTS | {"lora_A"},
        "loaders/lora_pipeline.py, loaders/lora_conversion_utils.py, 0.42.1; run here",
        only_text_layers=False,
        kohya_parts=frozenset({"lora_down"}),
        text_parts=frozenset({"lora_A", "linear_layer", "_lora.down"}),
        unet_parts=frozenset({"lora_A", "lora.down", "_lora.down"}),
    ),
    "stable-diffusion.cpp": Program(
        frozenset(
            _KOHYA
            | {"lycoris", "generic", "unet", "unet-attention", "unet-processor", "bare", "bare-attention"}
        ),
        frozenset({"lora_down", "lora.down", "_lora.down", "lora_A", "lora_A.default", "lora_A.bare"}),
        "src/model/adapter/lora.hpp, src/name_conversion.cpp, 97d2990 of 2026-08-19",
        only_text_layers=False,
    ),
}


def name_style(key: str, parsed: ParsedKey) -> str:
    """Return how a key spells its module's name.

    ``kohya`` (diffusers' block names), ``kohya-ldm`` (original ones), ``kohya-te``, ``-te1``, ``-te2`` and
    those with ``-flat`` (without ``text_model_``); ``lycoris``; ``generic`` and ``generic-te`` (ComfyUI's
    own), ``generic-other`` (the same with names it does not have); ``unet`` (behind the denoiser's name) and
    ``bare``, with ``-attention``
    where the layer is a projection of attention, with ``-processor`` in old files; ``te`` and ``te-flat``.
    """
    for start, style in (("lora_te_", "kohya-te"), ("lora_te1_", "kohya-te1"), ("lora_te2_", "kohya-te2")):
        if key.startswith(start):
            named = key.startswith((f"{start}text_model", f"{start}text_projection"))
            return style if named else "kohya-te-flat"
    if key.startswith("lora_unet_"):
        original = ("input_blocks", "middle_block", "output_blocks", "time_embed_", "label_emb", "out_")
        return "kohya-ldm" if key.removeprefix("lora_unet_").startswith(original) else "kohya"
    if key.startswith("lycoris_"):
        return "lycoris"
    if is_text_encoder(parsed.module.component):
        if key.startswith(f"{parsed.module.component}."):
            _, _, path = key.partition(".")
            return "te" if path.startswith(("text_model.", "text_projection")) else "te-flat"
        generic = re.match(r"text_encoders\.clip_[lgh]\.transformer\.(text_model|text_projection)", key)
        return "generic-te" if generic else "generic-other"
    if key.startswith("diffusion_model."):
        original = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
        return "generic" if key.removeprefix("diffusion_model.").startswith(original) else "generic-other"
    start = "unet" if key.startswith(f"{parsed.module.component}.") else "bare"
    if key.startswith("model.diffusion_model."):
        return "generic-other"
    if ".processor." in key:
        return f"{start}-processor"
    return f"{start}-attention" if parsed.module.layer.endswith(_ATTENTION) else start


def part_style(key: str) -> str:
    """Return how a key spells a factor of a plain pair; empty for every other part."""
    split = part_at_end(key)
    if split is None or split[1].name not in ("down", "up"):
        return ""
    ending = key.removeprefix(split[0])
    for direction in (("lora_down", "lora_up"), ("lora.down", "lora.up"), ("_lora.down", "_lora.up")):
        for word in direction:
            if ending.lstrip(".").startswith(word) or (word[0] == "_" and ending.startswith(word)):
                return direction[0]
    if "lora_linear_layer" in ending:
        return "linear_layer"
    if re.fullmatch(r"\.lora_[AB]\.weight", ending):
        return "lora_A"
    if re.fullmatch(r"\.lora_[AB]\.default\.weight", ending):
        return "lora_A.default"
    return "lora_A.bare" if re.fullmatch(r"\.lora_[AB]", ending) else "lora_A.name"


def is_known(program: Program, key: str, parsed: ParsedKey) -> bool:
    """Tell whether a program's loader finds the module of a key, and the part if it is a factor."""
    style, part = name_style(key, parsed), part_style(key)
    fewer = program.kohya_parts if style.startswith("kohya") else program.unet_parts
    if style in ("te", "te-flat"):
        fewer = program.text_parts
    parts = program.parts if fewer is None else fewer
    if style not in program.names or (part and part not in parts):
        return False
    if style.endswith("-flat") and parsed.module.component != "text_encoder":
        return False  # only encoders without a projection lost `text_model.` in transformers
    if not is_text_encoder(parsed.module.component) or not program.only_text_layers:
        return True
    path = parsed.module.layer
    return style in program.own_text or bool(_TEXT_LAYERS.search(path)) or path == "text_projection"
