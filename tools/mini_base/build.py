"""The stages of the build, from icon packages to the shipped folder."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from . import (
    card,
    classifier,
    denoiser,
    evaluate,
    ink,
    models,
    parallel,
    renders,
    tokenizer,
    vae,
)
from .captions import sheet_prompts
from .denoiser import DenoiserSettings
from .files import read_json, write_json
from .vae import VaeSettings

STAGES = ("tokenizer", "renders", "vae", "latents", "denoiser", "export", "evaluate", "card", "datasets")
"""Every stage, in order."""


@dataclass(frozen=True)
class Build:
    """What to build, where, and how long to train.

    Attributes:
        output: Folder of the finished pipeline; work in progress lives beside it.
        cache: Folder of the fetched icon packages.
        start_from: Pipeline folder to go on from instead of untrained networks.
        datasets: Where to write the sample data sets, if anywhere.
        device: Where to train.
        classifier_steps: Steps of the judge's training.
        machine: How the model card names the machine; found out when ``None``.
        denoiser: How to train the text encoder and the U-Net.
        vae: How to train the VAE.
    """

    output: Path
    cache: Path
    start_from: Path | None = None
    datasets: Path | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    classifier_steps: int = classifier.STEPS
    machine: str | None = None
    denoiser: DenoiserSettings = field(default_factory=DenoiserSettings)
    vae: VaeSettings = field(default_factory=VaeSettings)

    @property
    def work(self) -> Path:
        """Folder of checkpoints and figures."""
        return self.output.with_name(self.output.name + ".work")

    @cached_property
    def tokenizer_folder(self) -> Path:
        """The tokenizer: trained by an earlier stage, else the one to start from."""
        trained = self.work / "tokenizer"
        if not trained.exists() and self.start_from is not None:
            return self.start_from / "tokenizer"
        return trained

    @property
    def renders_file(self) -> Path:
        """The drawings that the VAE learns from."""
        return self.work / "renders.safetensors"

    def load_vae(self) -> AutoencoderKL:
        """Returns the VAE of the latest checkpoint, else the one to start from."""
        model = (
            AutoencoderKL.from_pretrained(self.start_from / "vae", dtype=torch.float32)
            if self.start_from is not None
            else models.new_vae()
        )
        vae.restore(model, self.work / "vae")
        return model

    def load_denoiser(self) -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer]:
        """Returns the networks to start training from."""
        words = models.load_tokenizer(self.tokenizer_folder)
        if self.start_from is None:
            torch.manual_seed(self.denoiser.seed)
            return models.new_unet(), models.new_text_encoder(words), words
        unet = UNet2DConditionModel.from_pretrained(self.start_from / "unet", dtype=torch.float32)
        text_encoder = CLIPTextModel.from_pretrained(self.start_from / "text_encoder", dtype=torch.float32)
        return unet, text_encoder, words

    def note(self, **figures: object) -> None:
        """Adds figures to ``figures.json``, from which the model card is written."""
        write_json(self._figures_file, {**self.figures(), **figures})

    def figures(self) -> dict[str, Any]:
        """Returns the figures noted so far."""
        return read_json(self._figures_file) if self._figures_file.exists() else {}

    @property
    def _figures_file(self) -> Path:
        return self.work / "figures.json"


def run_tokenizer(build: Build) -> None:
    """Trains the tokenizer, unless this run or the folder to go on from has one."""
    if build.start_from is None and not (build.work / "tokenizer").exists():
        tokenizer.train(build.work / "tokenizer")


def run_renders(build: Build) -> None:
    """Draws what the VAE learns from, once for all workers and all runs."""
    if not build.renders_file.exists():
        renders.save_images(renders.render_seen(build.cache, build.vae.icons), build.renders_file)


def run_vae(build: Build) -> None:
    """Trains the VAE, or fine-tunes the decoder of the one to start from."""
    images = renders.load_images(build.renders_file)
    trainer = vae.VaeTrainer(build.load_vae(), images, build.vae, build.device)
    started = time.time()
    trainer.run(build.work / "vae")
    if parallel.rank() == 0:
        known = build.figures().get("vae_seconds", 0)
        build.note(
            vae_samples=trainer.done,
            vae_decoder_only=build.vae.decoder_only,
            vae_seconds=round(known + time.time() - started),
        )


def run_latents(build: Build) -> None:
    """Renders and encodes the icons, once for all workers."""
    icon_images = renders.base_images(build.cache)
    images = renders.render_variants(icon_images, build.cache)
    encoder = build.load_vae().to(build.device).eval()
    latents = denoiser.encode(encoder, torch.from_numpy(images), icon_images, build.device)
    denoiser.save_latents(latents, build.work / "latents")


def run_denoiser(build: Build) -> None:
    """Trains the text encoder and the U-Net, going on from their checkpoint."""
    latents = denoiser.load_latents(build.work / "latents")
    unet, text_encoder, words = build.load_denoiser()
    trainer = denoiser.Trainer(unet, text_encoder, words, latents, build.denoiser, build.device)
    folder = build.work / "denoiser"
    trainer.resume(folder)
    trainer.run(folder)
    if parallel.rank() == 0:
        build.note(
            samples=trainer.done,
            batch=build.denoiser.batch,
            seconds=round(trainer.elapsed),
            images=len(latents.images),
            prediction=build.denoiser.prediction,
            trained_on=build.machine or evaluate.machine(build.device),
        )


def run_export(build: Build) -> None:
    """Writes the pipeline folder from the averaged weights of the latest checkpoint."""
    unet, text_encoder, words = build.load_denoiser()
    denoiser.restore_average(unet, text_encoder, build.work / "denoiser")
    pipeline = models.make_pipeline(build.load_vae(), text_encoder, words, unet, build.denoiser.prediction)
    models.export_pipeline(pipeline, build.output)


def run_evaluate(build: Build) -> None:
    """Measures the exported folder and draws its contact sheet."""
    pipeline = evaluate.load_pipeline(build.output, build.device)
    drawn = evaluate.draw_nouns(pipeline)
    prompts = sheet_prompts()
    evaluate.write_sheet(evaluate.generate(pipeline, prompts), prompts, build.work / "contact-sheet.png")
    folder = build.work / "classifier"
    judge = classifier.train_or_load(folder, build.cache, build.device, build.classifier_steps)
    build.note(**evaluate.measure(pipeline, drawn, judge, build.cache))


def run_card(build: Build) -> None:
    """Writes the model card, nouns, licences and hashes into the folder."""
    card.write(build.output, build.work, build.start_from is not None)


def run_datasets(build: Build) -> None:
    """Writes the ink data sets, if a place for them is given."""
    if build.datasets is not None:
        ink.write_datasets(build.datasets, build.cache)


RUNNERS = {
    "tokenizer": run_tokenizer,
    "renders": run_renders,
    "vae": run_vae,
    "latents": run_latents,
    "denoiser": run_denoiser,
    "export": run_export,
    "evaluate": run_evaluate,
    "card": run_card,
    "datasets": run_datasets,
}
