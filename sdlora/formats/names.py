"""Module names in files: tables, and the two functions that follow from each.

A canonical path uses diffusers' dotted names (``down_blocks.0.attentions.0...``) or, for text encoders,
transformers' with ``text_model.`` in front. Files spell them with underscores, and SDXL files use the
block names of the original code (LDM). Source: formats.md 1.3, checked there against ComfyUI's models.
"""

from __future__ import annotations

import re

from ..families.facts import is_text_encoder

TEXT_PREFIX = "text_model."

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
)
_TOKEN = re.compile("(?:" + "|".join(sorted(_TOKENS, key=len, reverse=True)) + r"|\d{1,4})(?=_|$)")

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_LDM_RESNET = {ldm: name for name, ldm in _RESNET.items()}

_NUM_LEVELS = 4  # SD1 and SD2 have four; SDXL uses the first three
_LDM_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    **{f"down_blocks.{i}.resnets.{j}": f"input_blocks.{1 + 3 * i + j}.0" for i in range(4) for j in range(2)},
    **{
        f"down_blocks.{i}.attentions.{j}": f"input_blocks.{1 + 3 * i + j}.1"
        for i in range(4)
        for j in range(2)
    },
    **{f"down_blocks.{i}.downsamplers.0.conv": f"input_blocks.{3 * i + 3}.0.op" for i in range(_NUM_LEVELS)},
    **{f"up_blocks.{i}.resnets.{j}": f"output_blocks.{3 * i + j}.0" for i in range(4) for j in range(3)},
    **{f"up_blocks.{i}.attentions.{j}": f"output_blocks.{3 * i + j}.1" for i in range(4) for j in range(3)},
    # 2: both SDXL blocks that have an upsampler have attention before it
    **{f"up_blocks.{i}.upsamplers.0.conv": f"output_blocks.{3 * i + 2}.2.conv" for i in range(_NUM_LEVELS)},
}
_DIFFUSERS_BLOCKS = {
    **{ldm: name for name, ldm in _LDM_BLOCKS.items()},
    # SD1 and SD2: the first up-block has no attention, so its upsampler comes second
    **{f"output_blocks.{3 * i + 2}.1.conv": f"up_blocks.{i}.upsamplers.0.conv" for i in range(_NUM_LEVELS)},
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
    """Undo :func:`to_underscores` by the table of known words; None if the name holds an unknown one."""
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
    return _replace_block(path, _LDM_BLOCKS, _RESNET)


def from_ldm(path: str) -> str | None:
    """Return the diffusers path of an original U-Net path; None if it has none."""
    return _replace_block(path, _DIFFUSERS_BLOCKS, _LDM_RESNET)


def canonical_path(component: str, path: str) -> str:
    """Return a module's path in a component as adapters call it, whatever release wrote it."""
    return with_text_prefix(path) if is_text_encoder(component) else path


def with_text_prefix(path: str) -> str:
    """Return a text-encoder path in canonical form, whatever transformers release wrote it."""
    if path.startswith((TEXT_PREFIX, "text_projection")):
        return path
    return TEXT_PREFIX + path


def _replace_block(path: str, blocks: dict[str, str], inside_resnet: dict[str, str]) -> str | None:
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        block = blocks.get(".".join(parts[:count]))
        if block is None:
            continue
        rest: str | None = ".".join(parts[count:])
        is_resnet = "resnets" in parts[:count] or ".resnets." in f".{block}."
        if is_resnet:
            rest = inside_resnet.get(rest or "")
            if rest is None:
                return None
        return f"{block}.{rest}" if rest else block
    return None
