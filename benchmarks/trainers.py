"""The two trainers as commands with equal settings, and one run of either, measured from outside.

Equal means: base, images, captions, resolution, batch, LoRA layers, rank, alpha, precision of the frozen
base, AdamW with its rates, constant learning rate, min-SNR weight, clipping, threads. Neither previews,
validates or saves before its end. Every run starts in a fresh folder with cold caches of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdlora.data.reading.folder import load_pixels, scan

Trainer = Literal["sdlora", "diffusers"]
Device = Literal["cpu", "cuda"]
TRAINERS: tuple[Trainer, Trainer] = ("sdlora", "diffusers")


class BenchmarkError(Exception):
    """The comparison cannot be made; the message says why."""


@dataclass(frozen=True)
class Settings:
    """What both trainers are given.

    Attributes:
        base: diffusers folder of the base.
        peer_script: diffusers' ``train_text_to_image_lora.py``.
        batch_size: images a step.
        rank: of the LoRA; alpha is the rank, as the peer has no other.
        precision: of the frozen base.
        learning_rate: constant, no warm-up.
        resolution: px.
        min_snr_gamma: limit of the loss weight.
        threads: OpenMP threads of either process.
        peer_workers: the peer's data loading processes.
        schedule: of the learning rate, a name that both know.
        warmup_steps: over which the rate rises.
        device: of both.
    """

    base: Path
    peer_script: Path
    batch_size: int
    rank: int
    precision: Literal["fp32", "bf16"]
    learning_rate: float
    resolution: int
    min_snr_gamma: float
    threads: int
    peer_workers: int
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 0
    device: Device = "cpu"


@dataclass(frozen=True)
class Images:
    """The same images for each trainer: captions beside them, and captions in ``metadata.jsonl``."""

    folders: Mapping[Trainer, Path]
    captions: Mapping[str, str]


@dataclass(frozen=True)
class Measured:
    """One process from start to end: wall and CPU seconds, peak memory, and the LoRA file it left."""

    steps: int
    wall_s: float
    cpu_s: float
    peak_bytes: int
    adapter: Path


def prepare_images(source: Path, target: Path, batch_size: int) -> Images:
    """Copy captioned images for both trainers, flattened to RGB at their own size.

    As many as fill whole batches, so that every step of both sees ``batch_size`` images.

    Raises:
        BenchmarkError: if there are fewer than one batch.
    """
    items = scan(source, recursive=False).items
    items = items[: len(items) // batch_size * batch_size]
    if not items:
        raise BenchmarkError(f"{source}: fewer than {batch_size} images; use a smaller --batch")
    folders: dict[Trainer, Path] = {name: target / name for name in TRAINERS}
    for folder in folders.values():
        folder.mkdir(parents=True)
    captions: dict[str, str] = {}
    for item in items:
        name = f"{item.path.stem}.png"
        captions[name] = item.caption
        image = load_pixels(item)
        for folder in folders.values():
            image.save(folder / name)
        (folders["sdlora"] / name).with_suffix(".txt").write_text(item.caption, encoding="utf-8")
    lines = [json.dumps({"file_name": name, "text": caption}) for name, caption in captions.items()]
    (folders["diffusers"] / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return Images(folders, captions)


def run(
    trainer: Trainer, settings: Settings, images: Images, folder: Path, *, steps: int, seed: int
) -> Measured:
    """Train for ``steps`` in a new process and a new folder.

    Raises:
        BenchmarkError: if the process fails or leaves no LoRA; its output is in ``FOLDER/output.txt``.
    """
    folder.mkdir(parents=True)
    command, adapter = (_ours if trainer == "sdlora" else _peers)(settings, images, folder, steps, seed)
    wall, cpu, peak = measured(trainer, command, folder, adapter, settings.threads, settings.device)
    return Measured(steps, wall, cpu, peak, adapter)


def measured(
    name: str, command: list[str], folder: Path, adapter: Path, threads: int, device: Device = "cpu"
) -> tuple[float, float, int]:
    """Run a trainer's command; return its wall and CPU seconds and the most memory it held, in bytes.

    Raises:
        BenchmarkError: if the process fails or leaves no LoRA; its output is in ``FOLDER/output.txt``.
    """
    log = folder / "output.txt"
    with log.open("wb") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=_environment(threads, device), cwd=folder
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0 or not adapter.is_file():
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise BenchmarkError(f"{name} ended with code {process.returncode} ({log}):\n{tail}")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def _environment(threads: int, device: Device) -> dict[str, str]:
    return {
        **os.environ,
        **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _ours(settings: Settings, images: Images, folder: Path, steps: int, seed: int) -> tuple[list[str], Path]:
    values = {
        "data.resolution": settings.resolution,
        "data.buckets": "false",
        "data.caption_dropout": 0,
        "data.validation": 0,
        "data.cache_folder": json.dumps(str(folder / "cache")),
        "adapter.targets": "attention",
        "adapter.rank": settings.rank,
        "adapter.alpha": settings.rank,
        "optimizer.learning_rate": settings.learning_rate,
        "optimizer.schedule": settings.schedule,
        "optimizer.warmup_steps": settings.warmup_steps,
        "optimizer.betas": "[0.9, 0.999]",
        "optimizer.epsilon": 1e-8,
        "optimizer.weight_decay": 0.01,
        "optimizer.max_grad_norm": 1.0,
        "training.steps": steps,
        "training.batch_size": settings.batch_size,
        "training.precision": settings.precision,
        "training.device": settings.device,
        "training.seed": seed,
        "training.min_snr_gamma": settings.min_snr_gamma,
        "training.checkpoint_every": steps,
        "sample.prompts": "[]",
        "judge.every": "0",
        "output.dtype": "fp32",
    }
    start = [sys.executable, "-m", "sdlora", "train", str(images.folders["sdlora"])]
    place = ["--base", str(settings.base), "--name", "speed", "--output", str(folder / "run")]
    settings_given = [f"{key}={value}" for key, value in values.items()]
    return [*start, *place, *settings_given], folder / "run" / "speed.safetensors"


def _peers(settings: Settings, images: Images, folder: Path, steps: int, seed: int) -> tuple[list[str], Path]:
    options = {
        "pretrained_model_name_or_path": settings.base,
        "train_data_dir": images.folders["diffusers"],
        "cache_dir": folder / "cache",
        "output_dir": folder / "run",
        "resolution": settings.resolution,
        "train_batch_size": settings.batch_size,
        "max_train_steps": steps,
        "checkpointing_steps": steps + 1,
        "learning_rate": settings.learning_rate,
        "lr_scheduler": settings.schedule,
        "lr_warmup_steps": settings.warmup_steps,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "adam_weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "snr_gamma": settings.min_snr_gamma,
        "rank": settings.rank,
        "mixed_precision": {"fp32": "no", "bf16": "bf16"}[settings.precision],
        "dataloader_num_workers": settings.peer_workers,
        "seed": seed,
    }
    launcher = Path(__file__).parent / "run_peer.py"
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, str(launcher), str(settings.peer_script), "--center_crop", *flags]
    return command, folder / "run" / "pytorch_lora_weights.safetensors"
