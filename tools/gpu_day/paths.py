"""The ways through the program that are taken on the card, each a few settings; imports no torch."""

from __future__ import annotations

from typing import get_args

from sdlora.config.schema import OptimizerName, SamplerName

BF16 = ("training.precision=bf16",)

KINDS: dict[str, tuple[str, ...]] = {
    "checkpointing": ("training.recompute=blocks",),
    "accumulation": ("training.gradient_accumulation=2",),
    "xformers": ("training.attention=xformers",),
    "text-encoder": ("adapter.text_encoder=true",),
    "dora": ("adapter.kind=dora",),
    "loha": ("adapter.kind=loha",),
    "lokr": ("adapter.kind=lokr",),
    "pissa": ("adapter.init=pissa",),
    "olora": ("adapter.init=olora",),
    "all-layers": ("adapter.targets=all",),
    "rank-64": ("adapter.rank=64",),
    "buckets": ("data.more_resolutions=[{smaller}]", "training.batch_size=2"),
    "batch-4": ("training.batch_size=4",),
    "captions-in-loop": ("data.shuffle_tags=true", 'data.encode_captions="in loop"'),
    "crops-in-loop": ("data.crop=random", "data.variants=0", "data.buckets=false"),
    "masks": ("data.alpha_mask=true",),
    "prior": ("data.prior_preservation=1.0",),
    "lora-plus": ("optimizer.lora_plus_ratio=16",),
    "dropout": ("adapter.dropout=0.1",),
    **{f"optimizer-{name}": (f"optimizer.name={name}",) for name in get_args(OptimizerName)[1:]},
}
"""Each a path of its own beside the plain one, in bf16."""

TRAINING: dict[str, tuple[str, ...]] = {
    "bf16": BF16,
    "fp16": ("training.precision=fp16",),
    "fp32": ("training.precision=fp32",),
    **{name: (*BF16, *settings) for name, settings in KINDS.items()},
}
"""Name -> settings of 50 steps on a base of the true size."""

EXACT: dict[str, tuple[str, ...]] = {
    "plain": (),
    **{
        name: settings
        for name, settings in KINDS.items()
        if not name.startswith(("optimizer-", "rank-", "dropout", "buckets"))
    },
}
"""Name -> settings whose loss and gradient on the card are compared with the CPU's, in each format. Dropout
draws other numbers on a card, and optimizers do not change the gradient."""

TURNED = ("pissa", "olora")
"""Starts from singular or orthonormal vectors, whose signs are free: gradients compare by length alone."""

DRAWING = ("plain", "fp32", "batch-4", "adapter", "merged", "offload")
"""What is drawn, and how: see :func:`.draw.draw`."""

SAMPLERS: tuple[str, ...] = get_args(SamplerName)
