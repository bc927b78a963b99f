"""Encode each picture and caption once, keep the result on disk, and find it again by content.

What is kept of a picture is the VAE's posterior (mean and log-variance, unscaled), so that training
draws fresh latents at every visit. The key covers everything the result depends on: the file's bytes,
the geometry, the background, mirroring and the encoder's own weights. A stale entry cannot be hit;
files are written under a temporary name, so a killed run leaves no half entry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import DatasetError
from ..families.base import Conditioning, DiffusionModel, Posterior, SizeHint
from ..files import replacing
from .buckets import Placement, flipped, source_box
from .folder import ImageItem, load_pixels
from .picture_files import PIXELS_VERSION

_FORMAT = "1"  # part of every key: raise it when what is stored changes meaning
_MEMORY_BUDGET = 1 << 30  # bytes of encoded data kept in RAM; the rest is read again when needed


@dataclass(frozen=True)
class EncodedImage:
    """One picture as training sees it: its posterior (1, C, h, w) and pixel sizes."""

    posterior: Posterior
    size: SizeHint


def to_pixels(image: Image.Image, placement: Placement, *, mirror: bool) -> Tensor:
    """Resize and crop a picture to its bucket; return (1, 3, H, W) float32 in [-1, 1]."""
    if mirror:
        image = ImageOps.mirror(image)
    height, width = placement.bucket
    if placement.resized != (image.height, image.width):
        # only the part that is kept: resizing all of a 20000 x 1 px picture first would take gigabytes
        box = source_box(image.height, image.width, placement)
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    else:
        top, left = placement.crop
        image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1.0
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


class EncodedDataset:
    """Pictures and captions as the denoiser needs them, encoded on first use.

    Args:
        items: the pictures.
        placements: the geometry of each.
        model: encodes; needs its encoders on the device until :meth:`encode_all` has run.
        folder: where encodings are kept, shared between runs.
        flip: whether mirror images are needed too.
        background: colour behind transparent pictures.
        encode_captions: off when the text encoder is trained, whose outputs change.
    """

    def __init__(
        self,
        items: Sequence[ImageItem],
        placements: Sequence[Placement],
        model: DiffusionModel,
        folder: Path,
        *,
        flip: bool = False,
        background: str = "#ffffff",
        encode_captions: bool = True,
    ) -> None:
        assert len(items) == len(placements)
        self.items, self.placements = tuple(items), tuple(placements)
        self.flip, self.encode_captions = flip, encode_captions
        self._model, self._folder, self._background = model, folder, background
        self._memory: dict[Path, dict[str, Tensor]] = {}
        self._memory_bytes = 0
        self._image_print = model.encoder_fingerprint("images")
        self._text_print = model.encoder_fingerprint("captions") if encode_captions else ""

    def encode_all(self, tell: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Encode what is not kept yet; ``tell`` gets (done, total)."""
        mirrors = (False, True) if self.flip else (False,)
        captions = sorted({item.caption for item in self.items} | {""}) if self.encode_captions else []
        total = len(self.items) * len(mirrors) + len(captions)
        done = 0
        for index in range(len(self.items)):
            for mirror in mirrors:
                self.image(index, mirror=mirror)
                tell(done := done + 1, total)
        for caption in captions:
            self.caption(caption)
            tell(done := done + 1, total)

    def image(self, index: int, *, mirror: bool = False) -> EncodedImage:
        """Return one encoded picture.

        Raises:
            DatasetError: if its latents are not finite, naming the file.
        """
        item, placement = self.items[index], self.placements[index]
        used = flipped(placement) if mirror else placement
        geometry = f"{used.resized} {used.crop} {used.bucket} {mirror} {self._background} {PIXELS_VERSION}"
        tensors = self._tensors(
            "images", f"{self._image_print} {item.digest} {geometry}", lambda: self._encode(index, mirror)
        )
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise DatasetError(
                f"{item.path}: its latents are not finite numbers; the VAE cannot encode this picture "
                "(remove it, or use another base)"
            )
        size = SizeHint((item.height, item.width), used.crop, used.bucket)
        return EncodedImage(Posterior(tensors["mean"], tensors["logvar"]), size)

    def caption(self, text: str) -> Conditioning:
        """Return one encoded caption, tensors without batch axis, float32."""
        return self._tensors("captions", f"{self._text_print} {text}", lambda: self._encode_caption(text))

    def _encode(self, index: int, mirror: bool) -> dict[str, Tensor]:
        image = load_pixels(self.items[index], self._background)
        # mirrored first, so the placement's own crop applies to the mirrored picture
        placement = self.placements[index]
        pixels = to_pixels(image, flipped(placement) if mirror else placement, mirror=mirror)
        posterior = self._model.encode_images(pixels)
        return {"mean": posterior.mean, "logvar": posterior.logvar}

    def _encode_caption(self, text: str) -> dict[str, Tensor]:
        with torch.no_grad():
            encoded = self._model.encode_text([text])
        return {name: tensor[0].float().cpu().contiguous() for name, tensor in encoded.items()}

    def _tensors(self, kind: str, key: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        digest = hashlib.sha256(f"{_FORMAT} {kind} {key}".encode()).hexdigest()
        file = self._folder / kind / digest[:2] / f"{digest}.safetensors"
        if file in self._memory:
            return self._memory[file]
        tensors: dict[str, Tensor] | None = None
        if file.is_file():
            try:
                tensors = load_file(file)
            except (SafetensorError, OSError):
                tensors = None  # damaged by something else than us: encode again
        if tensors is None:
            tensors = dict(make())
            with replacing(file) as temporary:
                save_file(tensors, temporary)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._memory_bytes + size <= _MEMORY_BUDGET:
            self._memory[file] = tensors
            self._memory_bytes += size
        return tensors
