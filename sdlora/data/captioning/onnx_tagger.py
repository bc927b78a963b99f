"""Taggers in ONNX: WD14 and its kin, through onnxruntime.

What differs between them follows from the model and the files beside it: size and layout from the shape of
the input, colours and range from ``config.json``, else from the layout. WD14 (batch, height, width, 3) wants
BGR from 0 to 255 on a white square; those in torch's layout (batch, 3, height, width) want RGB, normalised.
https://huggingface.co/SmilingWolf/wd-vit-tagger-v3
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...errors import ConfigError, ModelError
from .models import TaggerFiles, read_config
from .tag_lists import TagChoice, read_tags

PACKAGE = "onnxruntime"
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_USUAL_SIDE = 448
_MOST_SIDE = 4096


@dataclass(frozen=True)
class Pixels:
    """What a tagger's input holds.

    Attributes:
        bgr: whether blue comes first.
        scale: what values from 0 to 1 are multiplied with.
        mean: subtracted then, for each channel in the input's order.
        std: by which the rest is divided.
    """

    bgr: bool
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)


PIXELS = {
    "bgr-255": Pixels(bgr=True, scale=255.0),
    "rgb-255": Pixels(bgr=False, scale=255.0),
    "rgb-1": Pixels(bgr=False),
    "bgr-1": Pixels(bgr=True),
    "rgb-half": Pixels(bgr=False, mean=(0.5,) * 3, std=(0.5,) * 3),
    "bgr-half": Pixels(bgr=True, mean=(0.5,) * 3, std=(0.5,) * 3),
    "rgb-clip": Pixels(bgr=False, mean=_CLIP_MEAN, std=_CLIP_STD),
}
"""Name -> order and range: 0 to 255, 0 to 1, -1 to 1 (``half``), or CLIP's mean and deviation."""


class OnnxTagger:
    """A tagger, ready to work."""

    def __init__(
        self,
        files: TaggerFiles,
        choice: TagChoice,
        *,
        device: str | None = None,
        batch_size: int = 4,
        pixels: str | None = None,
    ) -> None:
        """Load it.

        Args:
            files: of the tagger.
            choice: which tags become a caption.
            device: ``cpu``, ``cuda`` or ``mps``; the fastest that onnxruntime has when None.
            batch_size: images at a time; one, if the model takes no more.
            pixels: key of :data:`PIXELS`; as the model's files say when None.

        Raises:
            ModelError: when it is no tagger, its list does not fit, or onnxruntime is not installed.
            ConfigError: when onnxruntime has no such device.
        """
        self.name = files.model.parent.name if files.model.stem == "model" else files.model.stem
        self._choice, self._tags = choice, read_tags(files.tags)
        self._session: Any = _session(files.model, device)
        self._input, channels_first, self._side, batch = _input_of(self._session, files.model)
        self.batch_size = batch_size if batch is None else batch
        self._fixed_batch = batch
        self._channels_first = channels_first
        self._pixels = PIXELS[pixels] if pixels else _pixels_of(files.config, channels_first)
        self._output = self._output_of(files)
        self._is_logits = self._speaks_logits()

    def describe(self, images: Sequence[Image.Image]) -> list[list[str]]:
        """Return the tags of each upright RGB image."""
        probabilities = self.probabilities(images)
        return [self._choice.of(self._tags, row.tolist()) for row in probabilities]

    def probabilities(self, images: Sequence[Image.Image]) -> NDArray[np.float64]:
        """Return each tag's probability: (images, tags), 0 to 1."""
        size = self._fixed_batch or len(images)
        groups = [images[start : start + size] for start in range(0, len(images), size)]
        raw = np.concatenate(
            [self._run(np.stack([self._array(image) for image in group]))[: len(group)] for group in groups]
        )
        return 1.0 / (1.0 + np.exp(-raw)) if self._is_logits else raw

    def close(self) -> None:
        """Free the session's memory."""
        self._session = None
        gc.collect()

    def _array(self, image: Image.Image) -> NDArray[np.float32]:
        """Return an image as one input: on a white square, resized (bicubic, as WD14's own code does it)."""
        side = max(image.size)
        square = Image.new("RGB", (side, side), (255, 255, 255))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        if side != self._side:
            square = square.resize((self._side, self._side), Image.Resampling.BICUBIC)
        values = np.asarray(square, dtype=np.float32)
        if self._pixels.bgr:
            values = values[:, :, ::-1]
        if self._pixels.scale != 255.0:
            values = values / 255.0 * self._pixels.scale
        if self._pixels.std != (1.0, 1.0, 1.0):
            values = (values - np.asarray(self._pixels.mean)) / np.asarray(self._pixels.std)
        ordered = values.transpose(2, 0, 1) if self._channels_first else values
        return np.ascontiguousarray(ordered, dtype=np.float32)

    def _run(self, batch: NDArray[np.float32]) -> NDArray[np.float64]:
        if self._fixed_batch is not None and len(batch) < self._fixed_batch:
            batch = np.concatenate([batch, np.repeat(batch[-1:], self._fixed_batch - len(batch), axis=0)])
        (output,) = self._session.run([self._output], {self._input: batch})
        return np.asarray(output, dtype=np.float64).reshape(len(batch), -1)

    def _output_of(self, files: TaggerFiles) -> str:
        """Return the output with one value for each tag, of several the one that is called a prediction."""
        outputs = self._session.get_outputs()
        fitting = [output.name for output in outputs if output.shape and output.shape[-1] == len(self._tags)]
        open_ones = [
            output.name for output in outputs if output.shape and not isinstance(output.shape[-1], int)
        ]
        names = fitting or open_ones
        if not names:
            sizes = ", ".join(str(output.shape[-1]) for output in outputs if output.shape)
            raise ModelError(
                f"{files.model}: puts out {sizes or 'no'} values, its list has {len(self._tags)} tags; "
                "they do not belong together"
            )
        return next((name for name in names if "pred" in name.lower() or "prob" in name.lower()), names[0])

    def _speaks_logits(self) -> bool:
        """Tell whether the output has still to go through a sigmoid: asked of a white and a grey image."""
        shades = [Image.new("RGB", (8, 8), shade) for shade in ("white", "grey")]
        most = self._fixed_batch or 1
        values = np.concatenate([self._run(np.stack([self._array(shade)] * most))[:1] for shade in shades])
        if values.shape[1] != len(self._tags):
            raise ModelError(
                f"{self.name}: puts out {values.shape[1]} values, but its list has {len(self._tags)} tags; "
                "they do not belong together"
            )
        return "logit" in self._output.lower() or bool((values < 0).any() or (values > 1).any())


def _session(model: Path, device: str | None) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise ModelError(
            f"{model.name}: taggers need the package {PACKAGE}, which is not installed; "
            f"run: pip install {PACKAGE}"
        ) from None
    there = onnxruntime.get_available_providers()
    wanted = {
        "cuda": "CUDAExecutionProvider",
        "mps": "CoreMLExecutionProvider",
        "cpu": "CPUExecutionProvider",
    }
    kind, _, number = (device or "").partition(":")
    if device is not None and (kind not in wanted or wanted[kind] not in there):
        fix = f"run: pip install {PACKAGE}-gpu, or use cpu" if kind == "cuda" else "use cpu"
        raise ConfigError(f"device `{device}`: onnxruntime has none such here; {fix}")
    first = wanted[kind] if device is not None else next(name for name in wanted.values() if name in there)
    options = {"device_id": number} if kind == "cuda" and number else {}
    try:
        providers = list(dict.fromkeys([first, wanted["cpu"]]))
        return onnxruntime.InferenceSession(
            str(model), providers=providers, provider_options=[options, {}][: len(providers)]
        )
    except Exception as error:  # onnxruntime has an exception class for each status, without a common base
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{model}: onnxruntime cannot load it ({reason})") from None


def _input_of(session: Any, model: Path) -> tuple[str, bool, int, int | None]:
    """Return name, whether channels come first, side in px, and the batch size if it is fixed."""
    (first, *_) = session.get_inputs()
    shape = list(first.shape)
    if len(shape) != 4 or 3 not in (shape[1], shape[3]) or first.type != "tensor(float)":
        raise ModelError(f"{model}: takes {shape} {first.type}, which is no batch of images; it is no tagger")
    channels_first = shape[3] != 3
    side = shape[2]
    side = side if isinstance(side, int) else _USUAL_SIDE
    if not 8 <= side <= _MOST_SIDE:
        raise ModelError(f"{model}: takes images of {side} px, which is no size for a tagger")
    return first.name, channels_first, side, shape[0] if isinstance(shape[0], int) else None


def _pixels_of(config: Path | None, channels_first: bool) -> Pixels:
    """Return what the input holds: by a timm ``config.json`` for torch's layout, else WD14's."""
    if not channels_first:
        return PIXELS["bgr-255"]
    given = read_config(config).get("pretrained_cfg", {}) if config is not None else {}
    mean, std = (_three(given.get(key)) if isinstance(given, dict) else () for key in ("mean", "std"))
    return Pixels(bgr=False, mean=mean, std=std) if mean and std and all(std) else PIXELS["rgb-half"]


def _three(values: Any) -> tuple[float, ...]:
    """Return three numbers, or nothing if it is something else."""
    good = (
        isinstance(values, list) and len(values) == 3 and all(type(value) in (int, float) for value in values)
    )
    return tuple(values) if good else ()
