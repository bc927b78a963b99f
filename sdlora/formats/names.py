"""Module names in files: tables, and for each of them a function in either direction.

A canonical path uses diffusers' dotted names (``down_blocks.0.attentions.0...``) or, for text encoders,
transformers' with ``text_model.`` in front. Files spell them with underscores, and SDXL files use the
block names of the original code (LDM). Source: formats.md 1.3, checked there against ComfyUI's models.
"""

from __future__ import annotations

import re

from ..families import ldm
from ..families.facts import is_text_encoder

TEXT_PREFIX = ldm.TEXT_ROOT

_TOKENS = (
    # diffusers' U-Net
    *("down_blocks", "up_blocks", "mid_block", "attentions", "resnets", "downsamplers", "upsamplers"),
    *("transformer_blocks", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "ff", "net", "proj"),
    *("proj_in", "proj_out", "conv", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut"),
    *("time_emb_proj", "time_embedding", "add_embedding", "linear_1", "linear_2", "conv_norm_out"),
    *("norm", "norm1", "norm2", "norm3", "group_norm"),
    # the original U-Net
    *("input_blocks", "middle_block", "output_blocks", "in_layers", "emb_layers", "out_layers"),
    *("skip_connection", "op", "time_embed", "label_emb", "out"),
    # transformers' CLIP
    *("text_model", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    *("mlp", "fc1", "fc2", "text_projection", "layer_norm1", "layer_norm2", "final_layer_norm"),
    *("embeddings", "token_embedding", "position_embedding"),
)
_TOKEN = re.compile("(?:" + "|".join(sorted(_TOKENS, key=len, reverse=True)) + r"|\d{1,4})(?=_|$)")

_LDM_BLOCKS = ldm.unet_blocks()
_DIFFUSERS_BLOCKS = {
    # SD1 and SD2: the first up-block has no attention, so its upsampler comes second
    original: name
    for blocks in (ldm.unet_blocks(attending=()), _LDM_BLOCKS)
    for name, original in blocks.items()
}
_LDM_ROOTS = ("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out")
UNET_ROOTS = (
    *("down_blocks", "up_blocks", "mid_block", "conv_in", "conv_out", "conv_norm_out"),
    *("time_embedding", "add_embedding"),
)


def to_underscores(path: str) -> str:
    """Return a dotted path as WebUI-format files spell it."""
    return path.replace(".", "_")


def to_dots(name: str) -> str | None:
    """Undo :func:`to_underscores` with the table of known words; None if the name has an unknown one."""
    words: list[str] = []
    position = 0
    while position < len(name):
        match = _TOKEN.match(name, position)
        if match is None:
            return None
        words.append(match.group())
        position = match.end() + 1
    return ".".join(words) if words and not name.endswith("_") else None


def is_ldm(path: str) -> bool:
    """Tell whether a dotted U-Net path uses the original code's block names."""
    return path.split(".", 1)[0] in _LDM_ROOTS


def to_ldm(path: str) -> str | None:
    """Return a diffusers U-Net path in the original code's names; None if it has none there."""
    return ldm.to_ldm(path, _LDM_BLOCKS)


def from_ldm(path: str) -> str | None:
    """Return the diffusers path of an original U-Net path; None if it has none."""
    return ldm.from_ldm(path, _DIFFUSERS_BLOCKS)


def canonical_path(component: str, path: str) -> str:
    """Return a module's path in a component as adapters have it, whatever release wrote it."""
    return with_text_prefix(path) if is_text_encoder(component) else path


def with_text_prefix(path: str) -> str:
    """Return a text-encoder path in canonical form, whatever transformers release wrote it."""
    if path.startswith((TEXT_PREFIX, "text_projection")):
        return path
    return TEXT_PREFIX + path
