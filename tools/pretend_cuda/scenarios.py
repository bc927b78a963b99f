"""What the program is taken through on the pretended device: each scenario a real public call.

A scenario gets a :class:`.stage.Stage`, does what a user would do, and raises where something is wrong. It
runs in a process of its own (:mod:`.play`), within the pretence.
"""

from __future__ import annotations

from typing import get_args

from sdlora.config.schema import OptimizerName

from .cards import Card
from .draw_plays import (
    command_line,
    draw_on_second_card,
    merged,
    offloaded,
    offloaded_and_merged,
    samplers,
    several_adapters,
    strength_zero,
    ui_worker,
)
from .refusal_plays import refusals
from .stage import PROMPTS, Scenario
from .train_plays import (
    card_settings,
    judged,
    judging_out_of_memory,
    not_waiting,
    one_step,
    optimizers_resumed,
    previews_out_of_memory,
    resumed,
    second_card,
    served_by_the_second_card,
    training,
    true_base,
    validation_out_of_memory,
    whole_run,
)

TRAINING: dict[str, tuple[str, tuple[str, ...]]] = {
    "train-fp32": ("fp32", ("training.precision=fp32",)),
    "train-bf16": ("bf16", ("training.precision=bf16",)),
    "train-fp16": ("fp16 with a scaler", ("training.precision=fp16",)),
    "train-text": (
        "text encoder, dropout",
        ("training.precision=bf16", "adapter.text_encoder=true", "adapter.dropout=0.1"),
    ),
    "train-all": (
        "all targets, checkpointing, accumulation",
        (
            *("training.precision=bf16", "adapter.targets=all", "training.recompute=blocks"),
            "training.gradient_accumulation=2",
        ),
    ),
    "train-dora": ("DoRA", ("training.precision=bf16", "adapter.kind=dora", "adapter.targets=all")),
    "train-loha": ("LoHa", ("training.precision=bf16", "adapter.kind=loha", "adapter.targets=all")),
    "train-lokr": ("LoKr", ("training.precision=bf16", "adapter.kind=lokr", "adapter.targets=all")),
    "train-pissa": ("PiSSA", ("training.precision=bf16", "adapter.init=pissa")),
    "train-olora": ("OLoRA in fp16", ("training.precision=fp16", "adapter.init=olora")),
    "train-fp8": (
        "base in fp8, checkpointing",
        ("training.precision=bf16", "training.base_format=fp8", "training.gradient_checkpointing=true"),
    ),
    "train-nf4": (
        "base in nf4, all targets, fp16",
        ("training.precision=fp16", "training.base_format=nf4", "adapter.targets=all"),
    ),
    "train-prior": ("prior preservation", ("training.precision=bf16", "data.prior_preservation=1.0")),
    "train-captions": (
        "captions encoded in the loop",
        (
            *("training.precision=bf16", "data.shuffle_tags=true", 'data.encode_captions="in loop"'),
            *("training.noise_offset=0.05", f"sample.prompts={PROMPTS}", "sample.steps=2"),
        ),
    ),
    "train-crops": (
        "random crops encoded in the loop",
        (
            *("training.precision=bf16", "data.crop=random", "data.variants=0", "data.colour_jitter=0.1"),
            *(f"sample.prompts={PROMPTS}", "sample.steps=2"),
        ),
    ),
    "train-masks": (
        "masks from transparency",
        ("training.precision=bf16", "data.alpha_mask=true", "training.min_snr_gamma=0"),
    ),
    "train-lora-plus": (
        "LoRA+, text encoder, checkpointing",
        (
            *("training.precision=bf16", "optimizer.lora_plus_ratio=16", "adapter.text_encoder=true"),
            "training.recompute=blocks",
        ),
    ),
    "train-validation": (
        "validation at every step",
        ("training.precision=bf16", "data.validation=0.25", "training.validate_every=1"),
    ),
    "train-previews": (
        "previews at every step",
        ("training.precision=fp16", f"sample.prompts={PROMPTS}", "sample.steps=2", "sample.every=1"),
    ),
}

SCENARIOS: dict[str, Scenario] = {
    name: Scenario(training(*overrides), f"training: {what}") for name, (what, overrides) in TRAINING.items()
} | {
    "refusals": Scenario(refusals, "the pretence refuses what a card refuses", (Card(), Card())),
    "resume-bf16": Scenario(resumed("training.precision=bf16"), "--resume, bf16"),
    "resume-fp16": Scenario(resumed("training.precision=fp16"), "--resume, fp16 with a scaler"),
    "resume-pissa": Scenario(
        resumed("training.precision=bf16", "adapter.init=pissa", "optimizer.lora_plus_ratio=4"),
        "--resume, PiSSA and LoRA+",
    ),
    **{
        f"no-wait-{name}": Scenario(not_waiting(*overrides), f"steps that do not wait for the card: {what}")
        for name, what, overrides in (
            ("bf16", "bf16", ("training.precision=bf16",)),
            (
                "fp16",
                "fp16, two micro-batches",
                ("training.precision=fp16", "training.gradient_accumulation=2"),
            ),
            ("text", "text encoder", ("training.precision=bf16", "adapter.text_encoder=true")),
            (
                "more",
                "Huber loss, LoRA+, masks, an average",
                (
                    *("training.precision=bf16", "training.loss=huber", "optimizer.lora_plus_ratio=4"),
                    *("data.alpha_mask=true", "training.average=ema", "optimizer.max_update_norm=1"),
                ),
            ),
        )
    },
    "whole-run": Scenario(whole_run, "training with validation and previews, stopped and resumed"),
    "oom-previews": Scenario(previews_out_of_memory, "previews that do not fit"),
    "oom-validation": Scenario(validation_out_of_memory, "validation that does not fit"),
    "oom-judging": Scenario(judging_out_of_memory, "judging that does not fit"),
    "resume-optimizers": Scenario(
        optimizers_resumed, "the state of torch's and others' optimizers, taken back"
    ),
    **{
        f"resume-{name}": Scenario(
            resumed("training.precision=bf16", f"optimizer.name={name}", "adapter.text_encoder=true"),
            f"--resume, {name}",
        )
        for name in get_args(OptimizerName)[1:]
        if "8bit" not in name and "8-bit" not in name  # these bring kernels of their own, which need a card
    },
    "card-settings": Scenario(
        card_settings, "TF32, cuDNN and the current card follow the run", (Card(), Card())
    ),
    "second-card-serves": Scenario(
        served_by_the_second_card,
        "an old card that this torch has no kernels for beside one that it serves",
        (Card("Old GT, 4 GiB", (5, 2), 4 * 2**30), Card(), Card()),
    ),
    "samplers-fp16": Scenario(samplers("fp16"), "drawing with every sampler, fp16"),
    "samplers-fp32": Scenario(samplers("fp32"), "drawing with every sampler, fp32"),
    "adapters": Scenario(several_adapters, "drawing with several adapters"),
    "strength-0": Scenario(strength_zero, "drawing at strength 0"),
    "merge": Scenario(merged("lora"), "merge, draw, undo"),
    "merge-kinds": Scenario(merged("loha", "lokr", "dora"), "merge of other kinds, draw, undo"),
    "offload": Scenario(offloaded, "drawing with --offload"),
    "offload-merge": Scenario(offloaded_and_merged, "merge with --offload"),
    "command-line": Scenario(command_line, "sdlora train, sdlora generate"),
    "ui-worker": Scenario(ui_worker, "the UI's worker: a plan, a strip of strengths"),
    **{
        f"step-{name}{ending}": Scenario(
            one_step(name.partition("-")[0], f"data.resolution={side}", *targets, *fast, side=side),
            f"{title}: one step counted{what}",
        )
        for name, title, side, targets in (
            ("sd1", "SD1.5, 512 px", 512, ()),
            ("sdxl", "SDXL, 1024 px", 1024, ()),
            ("sdxl-linear", "SDXL, 1024 px, all linear layers", 1024, ("adapter.targets=linear",)),
        )
        for ending, what, fast in (
            ("", ", with the kernels in Triton if that is installed", ()),
            ("-torch", ", by torch alone", ("training.fast=blocks,lora,joint",)),
        )
    },
    "sd1": Scenario(true_base("sd1", "data.resolution=512", side=512), "a step of the true SD1.5, 512 px"),
    "sd2": Scenario(true_base("sd2", "data.resolution=768", side=768), "a step of the true SD2.1, 768 px"),
    "sdxl": Scenario(
        true_base("sdxl", "data.resolution=1024", side=1024), "a step of the true SDXL, 1024 px"
    ),
    **{
        f"{family}-{base_format}": Scenario(
            true_base(
                *(family, f"data.resolution={side}", f"training.base_format={base_format}", extra),
                side=side,
            ),
            f"a step of the true {title} kept in {base_format}, {side} px",
        )
        for family, title, side, extra in (
            ("sd1", "SD1.5", 512, "adapter.targets=attention"),
            ("sd2", "SD2.1", 768, "adapter.targets=all"),
            ("sdxl", "SDXL", 1024, "training.fast=off"),  # a proof of its paths takes minutes
        )
        for base_format in ("fp8", "nf4")
    },
    **{
        f"{family}-{rung}": Scenario(
            true_base(family, f"data.resolution={side}", f"training.recompute={rung}", side=side),
            f"the same, {rung} made again",
        )
        for family, side in (("sd1", 512), ("sdxl", 1024))
        for rung in ("gates", "projections", "blocks")
    },
    **{
        f"{family}-small": Scenario(
            true_base(
                *(family, f"data.resolution={side}", "training.autoencoder=banded", *rungs),
                *("training.recompute=blocks", 'training.fast="blocks, lora"'),
                side=side,
            ),
            f"a step of the true {title} in bands, blocks made again{more}, {side} px",
        )
        for family, title, side, rungs, more in (
            ("sd1", "SD1.5", 512, ("training.offload_blocks=9",), " and nine of them in main memory"),
            ("sd2", "SD2.1", 768, (), ""),
            ("sdxl", "SDXL", 1024, (), ""),
        )
    },
    **{
        f"{family}{ending}-judged": Scenario(
            judged(family, f"data.resolution={side}", *settings, side=side),
            f"a step of the true {title}{what}, judged, {side} px",
        )
        for family, ending, title, side, what, settings in (
            ("sd1", "", "SD1.5", 512, "", ()),
            ("sd1", "-fp8", "SD1.5", 512, " kept in fp8", ("training.base_format=fp8",)),
            (
                *("sd2", "-nf4", "SD2.1", 768, " kept in nf4, all layers, in bands"),
                ("training.base_format=nf4", "adapter.targets=all", "training.autoencoder=banded"),
            ),
            ("sdxl", "", "SDXL", 1024, "", ("training.fast=off",)),
            (
                *("sdxl", "-small", "SDXL", 1024, " kept in fp8, in bands, blocks made again"),
                (
                    *("training.base_format=fp8", "training.autoencoder=banded"),
                    *("training.recompute=blocks", 'training.fast="blocks, lora"'),
                ),
            ),
        )
    },
    "cuda1-train": Scenario(second_card, "training on cuda:1", (Card(), Card())),
    "cuda1-draw": Scenario(draw_on_second_card, "drawing on cuda:1", (Card(), Card())),
}
