"""Proof by images: the adapter as trained and the file as written, drawn from the same noise.

Comparing updates is the stricter test; this one shows that the rounding that remains cannot be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..config.schema import ModelConfig, Precision, SampleConfig
from ..config.toml import load_config
from ..errors import ConfigError
from ..generation.image_generator import ImageGenerator
from ..generation.render import GeneratedImage, GenerateRequest, Progress, usual_guidance
from ..run_folder import RunFolder
from .export import open_source

STRENGTHS = (0.0, 0.5, 1.0, 1.5)
_TRAINED, _WRITTEN = "trained", "written"


@dataclass(frozen=True)
class ImageProof:
    """The result of comparing images; differences are those of one channel of one pixel, from 0 to 255.

    Attributes:
        num_pairs: pairs of images that were compared.
        largest: the largest difference in all of them.
        mean: the mean difference.
        by_strength: strength -> largest difference.
        effect: the largest difference that the adapter itself makes, to compare with.
        base: the base they were drawn on.
        seed: of the noise.
    """

    num_pairs: int
    largest: int
    mean: float
    by_strength: dict[str, int]
    effect: int
    base: str
    seed: int

    def line(self) -> str:
        """Return the result in one line for people."""
        each = ", ".join(f"{value} at strength {strength}" for strength, value in self.by_strength.items())
        return (
            f"{self.num_pairs} pairs drawn on {self.base} from seed {self.seed}: largest difference of a "
            f"pixel {self.largest} of 255 ({each}; mean {self.mean:.2g}); the adapter itself changes up to "
            f"{self.effect}"
        )

    def to_dict(self) -> dict[str, object]:
        """Return everything as JSON values."""
        return asdict(self)


def compare_images(
    source: Path,
    written: Path,
    *,
    base: str | None = None,
    prompts: Sequence[str] = (),
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    steps: int | None = None,
    device: str | None = None,
    precision: Precision = "fp32",
    progress: Progress | None = None,
) -> ImageProof:
    """Draw with the source's adapter and with the written file from the same noise, and compare.

    Args:
        source: a run folder or an adapter file, as given to the export.
        written: the file or folder that was written.
        base: the base to draw on; a run's own when left out.
        prompts: what to draw; the run's own, or the trigger words, when left out.
        strengths: both are drawn at each of these.
        seed: of the noise.
        steps: denoising steps; as for previews when left out.
        device: see :func:`sdlora.devices.choose_device`.
        precision: of the drawing; with less than fp32, the model's own rounding hides that of the file.
        progress: called after each denoising step.

    Raises:
        ConfigError: when no base is known.
        AdapterFileError: when one of them cannot be read or does not fit the base.
        ModelError: when the base cannot be loaded.
    """
    trained = open_source(source).adapter
    model_settings, usual = _base_and_prompts(source, base, trained.info.trigger_words)
    generator = ImageGenerator.load(model_settings, device=device, precision=precision)
    generator.add_adapter(trained, _TRAINED)
    generator.add_adapter(written, _WRITTEN)
    model = generator.model
    plain = GenerateRequest(
        "",
        height=model.facts.native_resolution,
        width=model.facts.native_resolution,
        steps=SampleConfig().steps if steps is None else steps,
        guidance=usual_guidance(model),
        sampler=SampleConfig().sampler,
        seed=seed,
    )
    requests = [
        replace(plain, prompt=prompt, strengths={name: strength})
        for prompt in (*prompts,) or usual
        for strength in strengths
        for name in (_TRAINED, _WRITTEN)
    ]
    images = generator.generate(requests, progress=progress)
    return _compared(images, strengths, model.base.title, seed)


def _base_and_prompts(
    source: Path, base: str | None, trigger_words: Sequence[str]
) -> tuple[ModelConfig, tuple[str, ...]]:
    """Return the base to draw on and the prompts; where left out, those of a run folder's settings.

    For another base than the run's own, the run's other settings of the base are not used.
    """
    usual = (", ".join(trigger_words) or "a picture",)
    if RunFolder(source).exists():
        config = load_config(RunFolder(source).config_file)
        other = base is not None and base != config.model.base
        return ModelConfig(base=str(base)) if other else config.model, config.sample.prompts or usual
    if base is None:
        raise ConfigError(
            f"{source}: is not a run folder, so it does not say which base to draw on; give --base with "
            "--verify-images"
        )
    return ModelConfig(base=base), usual


def _compared(
    images: Sequence[GeneratedImage], strengths: Sequence[float], base: str, seed: int
) -> ImageProof:
    import numpy as np

    pixels = np.stack([np.asarray(generated.image.convert("RGB"), dtype=np.int16) for generated in images])
    # (prompts, strengths, trained or written, height, width, 3)
    pixels = pixels.reshape(-1, len(strengths), 2, *pixels.shape[1:])
    difference = np.abs(pixels[:, :, 0] - pixels[:, :, 1])
    weakest, strongest = (pick(range(len(strengths)), key=lambda i: abs(strengths[i])) for pick in (min, max))
    effect = np.abs(pixels[:, strongest, 0] - pixels[:, weakest, 0])
    return ImageProof(
        num_pairs=difference.shape[0] * difference.shape[1],
        largest=int(difference.max()),
        mean=float(difference.mean()),
        by_strength={f"{value:g}": int(difference[:, i].max()) for i, value in enumerate(strengths)},
        effect=int(effect.max()),
        base=base,
        seed=seed,
    )
