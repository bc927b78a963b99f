"""Names in diffusers' layout and in the original one (LDM), which users' single-file checkpoints have.

Every tensor of a component has one place in a checkpoint. Nearly all are only renamed. The exceptions are the
autoencoder's attention (1x1 convolutions there, linear layers here) and OpenCLIP text encoders, which hold
query, key and value as thirds of one matrix, and the projection transposed. Only names count, so narrow or
shallow models of the same structure are mapped, too. Source: formats.md 1.3, checked there against ComfyUI's
models, and the weight names of the checkpoints that CompVis and Stability published.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import ModelError

if TYPE_CHECKING:
    from .facts import TextEncoderInfo

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_ROOT = "text_model."

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE_LEVELS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_WORDS = (
    (r"^encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block."),
    (r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)
_OPENCLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_FUSED = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class StoredKey:
    """Where a checkpoint keeps one tensor.

    Attributes:
        key: its key there.
        third: 0, 1 or 2 if it is only that third of the rows under ``key``.
        transposed: whether rows and columns are exchanged there.
    """

    key: str
    third: int | None = None
    transposed: bool = False

    def take(self, stored: Tensor, shape: Iterable[int]) -> Tensor:
        """Return the tensor of that shape from the one stored under :attr:`key`; a view if possible.

        Raises:
            ValueError: if the stored tensor has another number of values.
        """
        if self.third is not None:
            if stored.shape[0] % 3:
                raise ValueError(f"{stored.shape[0]} rows are not query, key and value")
            rows = stored.shape[0] // 3
            stored = stored[self.third * rows : (self.third + 1) * rows]
        if self.transposed:
            stored = stored.T
        wanted = tuple(shape)
        if tuple(n for n in stored.shape if n != 1) != tuple(n for n in wanted if n != 1):
            raise ValueError(f"has shape {tuple(stored.shape)}, not {wanted}")
        return stored.reshape(wanted)

    def put(self, stored: Tensor, tensor: Tensor) -> None:
        """Write the tensor into its part of the one stored under :attr:`key`, in place and format."""
        if self.third is not None:
            rows = stored.shape[0] // 3
            stored = stored[self.third * rows : (self.third + 1) * rows]
        target = stored.T if self.transposed else stored
        target.copy_(tensor.reshape(target.shape))


def unet_key_map(names: Iterable[str]) -> dict[str, StoredKey]:
    """Return the key map of a ``UNet2DConditionModel``: diffusers' name -> where the tensor is.

    Raises:
        ModelError: for a name that such checkpoints have no place for.
    """
    known = list(names)
    layers = 1 + max(int(m[1]) for n in known if (m := re.match(r"down_blocks\.\d+\.resnets\.(\d+)\.", n)))
    levels = 1 + max(int(m[1]) for n in known if (m := re.match(r"down_blocks\.(\d+)\.", n)))
    attending = {int(m[1]) for n in known if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", n))}
    blocks = unet_blocks(layers, levels, attending)

    def stored(name: str) -> StoredKey:
        path, _, value = name.rpartition(".")
        original = to_ldm(path, blocks)
        if original is None:
            raise ModelError(
                f"the U-Net tensor `{name}` has no place in an LDM checkpoint; keep the diffusers layout"
            )
        return StoredKey(f"{UNET_PREFIX}{original}.{value}")

    return {name: stored(name) for name in known}


def unet_blocks(layers: int = 2, levels: int = 4, attending: Container[int] = range(4)) -> dict[str, str]:
    """Return diffusers' name of each block of a U-Net -> the original's.

    This table serves checkpoints and adapters. The defaults are those of SD1, SD2 and SDXL (which has three
    of the four levels).

    Args:
        layers: residual layers of a level on the way down; on the way up there is one more.
        levels: number of resolutions.
        attending: levels on the way up that have attention: an upsampler follows the residual layer and, if
            there is one, the attention.
    """
    blocks = dict(_OUTSIDE_LEVELS)
    for i in range(levels):
        first = (layers + 1) * i
        for j in range(layers):
            blocks[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{1 + first + j}.0"
            blocks[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{1 + first + j}.1"
        blocks[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{first + layers + 1}.0.op"
        for j in range(layers + 1):
            blocks[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{first + j}.0"
            blocks[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{first + j}.1"
        place = 2 if i in attending else 1
        blocks[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{first + layers}.{place}.conv"
    return blocks


def to_ldm(path: str, blocks: Mapping[str, str]) -> str | None:
    """Return a diffusers path of a U-Net's module in the original's names; None if it has none there.

    Args:
        path: of a module.
        blocks: of :func:`unet_blocks`.
    """
    return _renamed(path, blocks, _RESNET)


def from_ldm(path: str, blocks: Mapping[str, str]) -> str | None:
    """Return the diffusers path of an original one; None if it has none.

    Args:
        path: of a module.
        blocks: the original's name -> diffusers'.
    """
    return _renamed(path, blocks, {original: name for name, original in _RESNET.items()})


def _renamed(path: str, blocks: Mapping[str, str], inside_resnet: Mapping[str, str]) -> str | None:
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        block = blocks.get(".".join(parts[:count]))
        if block is None:
            continue
        rest: str | None = ".".join(parts[count:])
        if "resnets" in parts[:count] or ".resnets." in f".{block}.":
            rest = inside_resnet.get(rest or "")
            if rest is None:
                return None
        return f"{block}.{rest}" if rest else block
    return None


def vae_key_map(names: Iterable[str], prefix: str = VAE_PREFIX) -> dict[str, StoredKey]:
    """Return the key map of an ``AutoencoderKL``: diffusers name -> where the tensor lies."""
    known = list(names)
    last = max((int(m[1]) for n in known if (m := re.match(r"decoder\.up_blocks\.(\d+)\.", n))), default=0)

    def stored(name: str) -> StoredKey:
        # the original numbers the decoder's blocks from the finest one
        renamed = re.sub(
            r"^decoder\.up_blocks\.(\d+)\.resnets\.", lambda m: f"decoder.up.{last - int(m[1])}.block.", name
        )
        renamed = re.sub(
            r"^decoder\.up_blocks\.(\d+)\.upsamplers\.0\.",
            lambda m: f"decoder.up.{last - int(m[1])}.upsample.",
            renamed,
        )
        for pattern, words in _VAE_WORDS:
            renamed = re.sub(pattern, words, renamed)
        return StoredKey(prefix + renamed)

    return {name: stored(name) for name in known}


def text_key_map(names: Iterable[str], encoder: TextEncoderInfo) -> dict[str, StoredKey]:
    """Return the key map of a CLIP text encoder: name -> where the tensor lies.

    Args:
        names: with or without ``text_model.`` in front, as the installed transformers has them.
        encoder: says how and under which prefix checkpoints of the family keep it.

    Raises:
        ModelError: for a name that such checkpoints have no place for.
    """
    stored = _openclip_key if encoder.checkpoint_layout == "openclip" else _clip_key
    return {name: stored(name.removeprefix(TEXT_ROOT), encoder.checkpoint_prefix) for name in names}


def _clip_key(name: str, prefix: str) -> StoredKey:
    return StoredKey(
        f"{prefix}{name}" if name.startswith("text_projection") else f"{prefix}{TEXT_ROOT}{name}"
    )


def _openclip_key(name: str, prefix: str) -> StoredKey:
    if name == "text_projection.weight":
        return StoredKey(f"{prefix}text_projection", transposed=True)
    if name in _OPENCLIP_ENDS:
        return StoredKey(prefix + _OPENCLIP_ENDS[name])
    m = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if m:
        block, inner, kind = f"{prefix}transformer.resblocks.{m[1]}", m[2], m[3]
        if inner in _OPENCLIP_LAYER:
            return StoredKey(f"{block}.{_OPENCLIP_LAYER[inner]}.{kind}")
        projection = inner.removeprefix("self_attn.")
        if projection in _FUSED:
            return StoredKey(f"{block}.attn.in_proj_{kind}", third=_FUSED.index(projection))
    raise ModelError(f"the text-encoder tensor `{name}` has no place in an LDM checkpoint")


def by_key(key_map: Mapping[str, StoredKey]) -> dict[str, list[str]]:
    """Return checkpoint key -> the names of the tensors that lie under it."""
    names_by_key: dict[str, list[str]] = {}
    for name, stored_key in key_map.items():
        names_by_key.setdefault(stored_key.key, []).append(name)
    return names_by_key
