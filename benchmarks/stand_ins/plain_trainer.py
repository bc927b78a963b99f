"""A LoRA trained the plain way, with diffusers, PEFT and accelerate: what there is to compare with where
diffusers' own script is not at hand. It takes the flags that ``benchmarks/trainers.py`` gives that script.

As that script does, it encodes image and caption in every step, keeps the LoRA in float32 and computes
under autocast. It is no copy of it, so its times are not that script's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params, compute_snr
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

FORMATS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    """Train."""
    given = _parser().parse_args()
    set_seed(given.seed)
    accelerator = Accelerator(mixed_precision=given.mixed_precision)
    unet, vae, encoder, tokenizer, schedule = _base(given, accelerator)
    unet.add_adapter(
        LoraConfig(
            r=given.rank,
            lora_alpha=given.rank,
            init_lora_weights="gaussian",
            target_modules=["to_k", "to_q", "to_v", "to_out.0"],
        )
    )
    if given.mixed_precision == "fp16":
        cast_training_params(unet, dtype=torch.float32)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=given.learning_rate,
        betas=(given.adam_beta1, given.adam_beta2),
        weight_decay=given.adam_weight_decay,
        eps=given.adam_epsilon,
    )
    rate = get_scheduler(
        given.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=given.lr_warmup_steps,
        num_training_steps=given.max_train_steps,
    )
    loader = torch.utils.data.DataLoader(
        _images(given.train_data_dir, given.resolution, tokenizer),
        batch_size=given.train_batch_size,
        shuffle=True,
        num_workers=given.dataloader_num_workers,
    )
    unet, optimizer, loader, rate = accelerator.prepare(unet, optimizer, loader, rate)
    unet.train()
    step = 0
    while step < given.max_train_steps:
        for pixels, tokens in loader:
            loss = _loss(given, unet, vae, encoder, schedule, pixels, tokens)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained, given.max_grad_norm)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            step += 1
            loss.detach().item()  # shown by every trainer
            if step == given.max_train_steps:
                break
    layers = convert_state_dict_to_diffusers(
        get_peft_model_state_dict(accelerator.unwrap_model(unet).float())
    )
    StableDiffusionPipeline.save_lora_weights(given.output_dir, unet_lora_layers=layers)


def _base(given: argparse.Namespace, accelerator: Accelerator) -> tuple[Any, ...]:
    """Return the frozen parts in the format that is computed in."""
    name, dtype = given.pretrained_model_name_or_path, FORMATS[given.mixed_precision]
    parts = (
        UNet2DConditionModel.from_pretrained(name, subfolder="unet"),
        AutoencoderKL.from_pretrained(name, subfolder="vae"),
        CLIPTextModel.from_pretrained(name, subfolder="text_encoder"),
    )
    for part in parts:
        part.requires_grad_(False)
        part.to(accelerator.device, dtype)
    tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer")
    return (*parts, tokenizer, DDPMScheduler.from_pretrained(name, subfolder="scheduler"))


def _images(folder: Path, side: int, tokenizer: Any) -> list[tuple[Tensor, Tensor]]:
    """Return (pixels (3, side, side) in [-1, 1], token numbers) of every captioned image."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]
    images = []
    for row in rows:
        with Image.open(folder / row["file_name"]) as opened:
            square = opened.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.asarray(square, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
        tokens = tokenizer(
            row["text"],
            max_length=tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        images.append((pixels, tokens.input_ids[0]))
    return images


def _loss(
    given: argparse.Namespace,
    unet: Any,
    vae: Any,
    encoder: Any,
    schedule: Any,
    pixels: Tensor,
    tokens: Tensor,
) -> Tensor:
    """Return the min-SNR weighted error of a batch (Hang et al. 2023)."""
    with torch.no_grad():
        latents = vae.encode(pixels.to(vae.dtype)).latent_dist.sample() * vae.config.scaling_factor
        states = encoder(tokens, return_dict=False)[0]
    noise = torch.randn_like(latents)
    times = torch.randint(0, schedule.config.num_train_timesteps, (len(latents),), device=latents.device)
    noisy = schedule.add_noise(latents, noise, times)
    predicted = unet(noisy, times, states, return_dict=False)[0]
    velocity = schedule.config.prediction_type == "v_prediction"
    target = schedule.get_velocity(latents, noise, times) if velocity else noise
    ratio = compute_snr(schedule, times)
    weight = ratio.clamp(max=given.snr_gamma) / (ratio + 1 if velocity else ratio)
    error = functional.mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    return (error * weight).mean()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("pretrained_model_name_or_path", "lr_scheduler", "mixed_precision"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("train_data_dir", "cache_dir", "output_dir"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("resolution", "train_batch_size", "max_train_steps", "checkpointing_steps", "rank", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("lr_warmup_steps", "dataloader_num_workers"):
        parser.add_argument(f"--{name}", type=int, default=0)
    for name in ("learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay"):
        parser.add_argument(f"--{name}", type=float, required=True)
    for name in ("max_grad_norm", "snr_gamma"):
        parser.add_argument(f"--{name}", type=float, required=True)
    parser.add_argument("--center_crop", action="store_true")
    return parser


if __name__ == "__main__":
    main()
