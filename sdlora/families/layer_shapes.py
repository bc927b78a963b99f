"""The shape of every weight of a family's true model, from its configs alone: no model is made, no torch.

What is said of other programs, and the proof of a written adapter, go by these shapes and not by those of the
file in question. ``tests/families/test_layer_shapes.py`` compares them with diffusers' and transformers' own
models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from ..files import ASSETS, parse_json
from .facts import FamilyInfo
from .ldm import TEXT_ROOT
from .table import FAMILIES, family_info

Shape = tuple[int, ...]
_NO_BIAS = (".to_q", ".to_k", ".to_v", "_embedding", "text_projection")
_CONVOLUTIONS: Mapping[str, tuple[int, int]] = {
    **{ending: (3, 3) for ending in (".conv1", ".conv2", ".conv", "conv_in", "conv_out")},
    ".conv_shortcut": (1, 1),
}


@functools.cache
def true_shapes(family: str) -> Mapping[str, Mapping[str, Shape]]:
    """Return component -> module path -> shape of its weight, for every module of the family's true model.

    Empty for a family whose configs do not come with the program. Text-encoder paths start with
    ``text_model.``.
    """
    info = family_info(family)
    if not info.assets:
        return {}
    shapes: dict[str, Mapping[str, Shape]] = {}
    denoiser = _DENOISERS.get(info.denoiser.diffusers_class)
    if denoiser is not None:
        shapes[info.denoiser.component] = denoiser(_config(info, info.denoiser.component))
    for encoder in info.text_encoders:
        shapes[encoder.component] = clip_shapes(_config(info, encoder.component), encoder.projected)
    return shapes


def kernel_of(family: str | None, component: str, path: str) -> tuple[int, int] | None:
    """Return height and width of a layer's kernel, None for one that is no convolution.

    What the family's true model does not have is told by the end of its name.
    """
    known = true_shapes(family).get(component, {}).get(path) if family in FAMILIES and family else None
    if known is not None:
        return (known[2], known[3]) if len(known) == 4 else None
    if path.startswith(TEXT_ROOT) or family is None:
        return None
    denoiser = family_info(family).denoiser if family in FAMILIES else None
    if denoiser is None or denoiser.component != component or denoiser.diffusers_class not in _DENOISERS:
        return None
    if denoiser.conv_projections and path.endswith((".proj_in", ".proj_out")):
        return (1, 1)
    return kernel_by_name(path)


def kernel_by_name(path: str) -> tuple[int, int] | None:
    """Return the kernel that a U-Net's layer of such a name has, whatever its family; None if it has none."""
    return next((size for ending, size in _CONVOLUTIONS.items() if path.endswith(ending)), None)


def has_bias(path: str) -> bool:
    """Tell whether the layer at a path has a bias, in U-Nets and text encoders of these families."""
    return not path.endswith(_NO_BIAS)


def _config(info: FamilyInfo, component: str) -> dict[str, Any]:
    text = (ASSETS / info.assets / component / "config.json").read_text(encoding="utf-8")
    tree = parse_json(text)
    assert isinstance(tree, dict)
    return tree


def clip_shapes(config: Mapping[str, Any], projected: bool) -> dict[str, Shape]:
    """Return the shapes of a CLIP text encoder's weights, by transformers' config."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, Shape] = {
        "embeddings.token_embedding": (config.get("vocab_size", 49408), width),
        "embeddings.position_embedding": (config.get("max_position_embeddings", 77), width),
        "final_layer_norm": (width,),
    }
    for number in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{number}"
        shapes |= {f"{layer}.self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        shapes |= {f"{layer}.layer_norm{n}": (width,) for n in (1, 2)}
        shapes |= {f"{layer}.mlp.fc1": (inner, width), f"{layer}.mlp.fc2": (width, inner)}
    named = {TEXT_ROOT + path: shape for path, shape in shapes.items()}
    return named | ({"text_projection": (config["projection_dim"], width)} if projected else {})


def unet_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the shapes of a U-Net's weights, by diffusers' config (of SD1, SD2 and SDXL, of any width)."""
    channels = [int(width) for width in config["block_out_channels"]]
    layers, context = int(config.get("layers_per_block", 2)), config["cross_attention_dim"]
    depths = config.get("transformer_layers_per_block", 1)
    depths = [depths] * len(channels) if isinstance(depths, int) else list(depths)
    time, pointwise = 4 * channels[0], () if config.get("use_linear_projection") else (1, 1)
    shapes: dict[str, Shape] = {
        "conv_in": (channels[0], config["in_channels"], 3, 3),
        "conv_norm_out": (channels[0],),
        "conv_out": (config["out_channels"], channels[0], 3, 3),
        "time_embedding.linear_1": (time, channels[0]),
        "time_embedding.linear_2": (time, time),
    }
    if config.get("addition_embed_type") == "text_time":
        inputs = config["projection_class_embeddings_input_dim"]
        shapes |= {"add_embedding.linear_1": (time, inputs), "add_embedding.linear_2": (time, time)}

    def attention(path: str, width: int, depth: int) -> None:
        shapes.update(_attention(path, width, depth, context, pointwise))

    width, skips = channels[0], [channels[0]]
    for number, (out, kind) in enumerate(zip(channels, config["down_block_types"], strict=True)):
        for layer in range(layers):
            shapes |= _resnet(f"down_blocks.{number}.resnets.{layer}", width, out, time)
            if kind.startswith("CrossAttn"):
                attention(f"down_blocks.{number}.attentions.{layer}", out, depths[number])
            width = out
            skips.append(width)
        if number < len(channels) - 1:
            shapes[f"down_blocks.{number}.downsamplers.0.conv"] = (out, out, 3, 3)
            skips.append(width)
    shapes |= _resnet("mid_block.resnets.0", width, width, time)
    attention("mid_block.attentions.0", width, depths[-1])
    shapes |= _resnet("mid_block.resnets.1", width, width, time)
    for number, kind in enumerate(config["up_block_types"]):
        out, depth = channels[-1 - number], depths[-1 - number]
        for layer in range(layers + 1):
            shapes |= _resnet(f"up_blocks.{number}.resnets.{layer}", width + skips.pop(), out, time)
            if kind.startswith("CrossAttn"):
                attention(f"up_blocks.{number}.attentions.{layer}", out, depth)
            width = out
        if number < len(channels) - 1:
            shapes[f"up_blocks.{number}.upsamplers.0.conv"] = (out, out, 3, 3)
    return shapes


def _resnet(path: str, width: int, out: int, time: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {
        f"{path}.norm1": (width,),
        f"{path}.conv1": (out, width, 3, 3),
        f"{path}.time_emb_proj": (out, time),
        f"{path}.norm2": (out,),
        f"{path}.conv2": (out, out, 3, 3),
    }
    return shapes if width == out else shapes | {f"{path}.conv_shortcut": (out, width, 1, 1)}


def _attention(path: str, width: int, depth: int, context: int, pointwise: Shape) -> dict[str, Shape]:
    square = (width, width)
    shapes: dict[str, Shape] = {f"{path}.norm": (width,)}
    shapes |= {f"{path}.proj_{way}": square + pointwise for way in ("in", "out")}
    for number in range(depth):
        block = f"{path}.transformer_blocks.{number}"
        shapes |= {f"{block}.norm{n}": (width,) for n in (1, 2, 3)}
        for attn, inputs in (("attn1", width), ("attn2", context)):
            shapes |= {f"{block}.{attn}.to_q": square, f"{block}.{attn}.to_out.0": square}
            shapes |= {f"{block}.{attn}.to_{name}": (width, inputs) for name in ("k", "v")}
        shapes |= {f"{block}.ff.net.0.proj": (8 * width, width), f"{block}.ff.net.2": (width, 4 * width)}
    return shapes


_DENOISERS: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Shape]]] = {
    "UNet2DConditionModel": unet_shapes
}
