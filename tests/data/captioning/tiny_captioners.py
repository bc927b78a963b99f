"""Tiny captioners of real architectures with random weights, and a tagger in ONNX, written into folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

WORDS = ("a", "the", "red", "blue", "cat", "dog", "icon", "of", "on", "photo", "drawing", "image", ".", ",")
CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
_SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_EYES = {**_SMALL, "image_size": 32, "patch_size": 16}


def tokenizer_of(specials: Sequence[str], template: str | None, **named: Any) -> Any:
    """Return a tokenizer with one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*specials, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=specials[1]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        used = [(word, vocabulary[word]) for word in specials if word in template]
        words.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=specials[0], unk_token=specials[1], **named
    )


def saved(model: Any, folder: Path, *parts: Any) -> Path:
    """Write a model whose weights are so large that what it says depends on the image."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                size = 0.2 if "embed" in name and "patch" not in name else 2.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    model.save_pretrained(folder)
    for part in parts:
        part.save_pretrained(folder)
    return folder


def write_blip(folder: Path) -> Path:
    """Write a BLIP: a text decoder that looks at the image in each layer."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    tokenizer = tokenizer_of(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]"],
        "[CLS] $A [SEP]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        bos_token="[DEC]",
    )
    ids = {"bos_token_id": 4, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {**_SMALL, "vocab_size": len(tokenizer), "encoder_hidden_size": 16, **ids}
    config = BlipConfig(text_config={**text, "max_position_embeddings": 64}, vision_config=_EYES)
    eyes = BlipImageProcessor(size={"height": 32, "width": 32})
    return saved(BlipForConditionalGeneration(config), folder, BlipProcessor(eyes, tokenizer))


def write_blip2(folder: Path) -> Path:
    """Write a BLIP-2: a query transformer between the image and an OPT, which gets the image as tokens."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessor

    tokenizer = tokenizer_of(["<pad>", "<unk>", "<s>", "</s>"], "<s> $A", bos_token="<s>", eos_token="</s>")
    eyes = BlipImageProcessor(size={"height": 32, "width": 32})
    processor = Blip2Processor(eyes, tokenizer, num_query_tokens=4)
    text = {"model_type": "opt", "vocab_size": len(tokenizer), "hidden_size": 16, "word_embed_proj_dim": 16}
    text |= {"ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 128}
    text |= {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = Blip2Config(
        text_config=text,
        vision_config=_EYES,
        qformer_config={**_SMALL, "vocab_size": 30, "encoder_hidden_size": 16},
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return saved(Blip2ForConditionalGeneration(config), folder, processor)


def write_qwen2_vl(folder: Path) -> Path:
    """Write a Qwen2-VL: a chat model to which an image is as many tokens as its size gives."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    specials = ["<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>"]
    specials += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = tokenizer_of(
        specials, None, eos_token="<|im_end|>", additional_special_tokens=specials[2:], chat_template=CHAT
    )
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config={
            **_SMALL,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "rope_parameters": rope,
            **ids,
        },
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "mlp_ratio": 2},
        image_token_id=6,
        video_token_id=7,
        vision_start_token_id=4,
        vision_end_token_id=5,
    )
    eyes = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    return saved(Qwen2VLForConditionalGeneration(config), folder, tokenizer, eyes)


def write_florence2(folder: Path) -> Path:
    """Write a Florence-2: windows of an image and a question into a BART."""
    from transformers import (
        CLIPImageProcessor,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
    )

    specials = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
    named = {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": {"image_token": "<image>"}}
    tokenizer = tokenizer_of(specials, None, **named)
    side = {"height": 32, "width": 32}
    eyes = CLIPImageProcessor(size=side, crop_size=side)
    eyes.image_seq_length = 17  # of 4 x 4 patches at the end, and their mean
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "decoder_start_token_id": 3}
    layers = {f"{part}_layers": 1 for part in ("encoder", "decoder")}
    layers |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    layers |= {f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")}
    text = {"model_type": "bart", "vocab_size": len(tokenizer), "d_model": 16, **layers, **ids}
    vision = {"depths": (1, 1), "patch_size": (7, 3), "patch_stride": (4, 2), "patch_padding": (3, 1)}
    vision |= {"patch_prenorm": (False, True), "embed_dim": (8, 16), "num_heads": (2, 2)}
    vision |= {"num_groups": (2, 2), "window_size": 4, "projection_dim": 16}
    vision |= {"max_temporal_embeddings": 5, "max_position_embeddings": 10}
    config = Florence2Config(
        text_config={**text, "max_position_embeddings": 128, "forced_eos_token_id": None},
        vision_config=vision,
        image_token_id=4,
        **ids,
    )
    processor = Florence2Processor(eyes, tokenizer)
    return saved(Florence2ForConditionalGeneration(config), folder, processor)


TAGS = (
    ("general", 9),
    ("explicit", 9),
    ("cat_ears", 0),
    ("o_o", 0),
    ("red_sky", 0),
    ("alice_(wonderland)", 4),
    ("tree", 0),
    ("bob", 4),
)
"""A tagger's list: names and Danbooru's categories."""


def write_tagger(
    folder: Path,
    *,
    channels_first: bool = False,
    logits: bool = False,
    batch: int | str = "N",
    side: int = 16,
) -> Path:
    """Write a tagger: the mean of each half of the image, times random weights, and a sigmoid."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(3)
    size = 3 * side * side
    scale = 1.0 if channels_first else 1 / 255
    weights = (random.normal(size=(size, len(TAGS))) * scale * 8 / side).astype(np.float32)
    bias = random.normal(size=len(TAGS)).astype(np.float32)
    shape = [batch, 3, side, side] if channels_first else [batch, side, side, 3]
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weights", "bias"], ["scores" if logits else "sums"]),
    ]
    if not logits:
        nodes.append(helper.make_node("Sigmoid", ["sums"], ["scores"]))
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, len(TAGS)])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    rows = "\n".join(f"{number},{name},{category},1" for number, (name, category) in enumerate(TAGS))
    (folder / "selected_tags.csv").write_text(f"tag_id,name,category,count\n{rows}\n", encoding="utf-8")
    return folder
