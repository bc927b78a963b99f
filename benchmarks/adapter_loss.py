"""How well a LoRA file fits the images it was trained on, by one measure for every trainer.

Every file, and the base without any, meets the same noise at the same timesteps, in float32, through
sdlora's own model code; a trainer that is fast because it leaves something out shows here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sdlora.adapters.attach import attach, detach
from sdlora.adapters.canonical import AdapterWeights
from sdlora.data.batching.batches import generator_for
from sdlora.data.batching.buckets import place, square_bucket
from sdlora.data.batching.cache import to_pixels
from sdlora.data.reading.folder import load_pixels
from sdlora.diffusion.process import Corrupted, draw_noise, per_image_loss
from sdlora.families.base import Conditioning, DiffusionModel, SizeHint
from sdlora.families.loading import load_model
from sdlora.formats.adapter_files import read_adapter

_TIMESTEPS = 4


class LossMeter:
    """Measures the training objective of LoRA files on fixed images, noise and timesteps.

    Args:
        base: diffusers folder.
        folder: the images.
        captions: file name -> caption.
        resolution: px.
        min_snr_gamma: limit of the loss weight, as both trainers had it.
    """

    def __init__(
        self, base: Path, folder: Path, captions: Mapping[str, str], *, resolution: int, min_snr_gamma: float
    ) -> None:
        self._model = load_model(str(base), dtype=torch.float32, device=torch.device("cpu"))
        self._model.prepare(training=False)
        self._cases = [
            _case(self._model, folder / name, caption, resolution) for name, caption in captions.items()
        ]
        self._gamma = min_snr_gamma

    def measure(self, adapter: Path | None) -> float:
        """Return the mean objective with the adapter at strength 1, or of the bare base for None."""
        return float(torch.tensor(self.losses(adapter), dtype=torch.float64).mean())

    @torch.no_grad()
    def losses(self, adapter: Path | None) -> tuple[float, ...]:
        """Return the objective of each image."""
        if adapter is not None:
            attach(self._model, read_adapter(adapter).weights, "measured")
        try:
            process = self._model.process
            losses = []
            for case, text, size in self._cases:
                prediction = self._model.predict(case.noisy, case.timesteps, text, [size] * _TIMESTEPS)
                weights = process.loss_weights(case.timesteps, self._gamma)
                losses.append((per_image_loss(prediction, case.target) * weights).mean())
        finally:
            if adapter is not None:
                detach(self._model, "measured")
        return tuple(float(loss) for loss in losses)


def layout(adapter: Path) -> dict[str, tuple[int, float]]:
    """Return (rank, alpha / rank) of each adapted layer, to see that two files are of one make."""
    weights: AdapterWeights = read_adapter(adapter).weights
    return {f"{key.component}.{key.path}": (pair.rank, pair.scale) for key, pair in weights.items()}


@torch.no_grad()
def _case(
    model: DiffusionModel, file: Path, caption: str, resolution: int
) -> tuple[Corrupted, Conditioning, SizeHint]:
    image = load_pixels(file)
    placement = place(image.height, image.width, square_bucket(resolution, model.facts.size_multiple))
    posterior = model.encode_images(to_pixels(image, placement, mirror=False))
    clean: Tensor = model.facts.latents.scaled(posterior.mean).repeat(_TIMESTEPS, 1, 1, 1)
    noise = draw_noise(clean.shape, generator_for("benchmark", file.name))
    corrupted = model.process.corrupt(clean, noise, model.process.spread_timesteps(_TIMESTEPS))
    text = {name: tensor.repeat(_TIMESTEPS, 1, 1) for name, tensor in model.encode_text([caption]).items()}
    size = SizeHint((image.height, image.width), placement.crop, placement.bucket)
    return corrupted, text, size
