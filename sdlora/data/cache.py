"""Encode each picture and caption once, keep the result on disk, and find it again by content.

What is kept of a picture is the VAE's posterior (mean and log-variance, unscaled), so that training
draws fresh latents at every visit. The key covers everything the result depends on: the file's bytes,
the geometry, the background, mirroring and the encoder's own weights. A stale entry cannot be hit;
files are written under a temporary name, so a killed run leaves no half entry.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import DatasetError
from ..families.base import Conditioning, DiffusionModel, Posterior, SizeHint
from .buckets import Placement, flipped, source_box
from .cache_folder import mark_used
from .entries import read_entry, write_entry
from .folder import ImageItem, load_pixels
from .lookahead import ahead
from .picture_files import PIXELS_VERSION

_FORMAT = "2"  # part of every key: raise it when what is stored changes meaning
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
        """Encode what is not kept yet; ``tell`` gets (done, total).

        Pictures are decoded ahead on all cores, so that the encoder does not wait for them.

        Raises:
            DatasetError: if latents are not finite, naming the file.
        """
        mirrors = (False, True) if self.flip else (False,)
        looks = [(index, mirror) for index in range(len(self.items)) for mirror in mirrors]
        captions = sorted({item.caption for item in self.items} | {""}) if self.encode_captions else []
        total = len(looks) + len(captions)
        workers = max(1, min(16, os.cpu_count() or 1))
        done = 0
        with ThreadPoolExecutor(workers) as pool:
            for index, mirror, pixels in ahead(self._started(pool, looks), 2 * workers):
                if pixels is not None:
                    self._keep(index, mirror, pixels)
                tell(done := done + 1, total)
        for caption in captions:
            if not self._is_kept("captions", self._caption_key(caption)):
                self.caption(caption)
            tell(done := done + 1, total)

    def _started(
        self, pool: ThreadPoolExecutor, looks: Sequence[tuple[int, bool]]
    ) -> Iterator[tuple[int, bool, Future[Tensor] | None]]:
        """Yield each look, with its pixels on their way where it must be encoded."""
        for index, mirror in looks:
            kept = self._is_kept("images", self._image_key(index, mirror))
            yield index, mirror, None if kept else pool.submit(self._pixels, index, mirror)

    def image(self, index: int, *, mirror: bool = False) -> EncodedImage:
        """Return one encoded picture.

        Raises:
            DatasetError: if its latents are not finite, naming the file.
        """
        return self._keep(index, mirror, None)

    def caption(self, text: str) -> Conditioning:
        """Return one encoded caption, tensors without batch axis, float32.

        Raises:
            DatasetError: if its encoding is not finite, naming the caption.
        """

        def encode() -> dict[str, Tensor]:
            with torch.no_grad():
                encoded = self._model.encode_text([text])
            return {name: tensor[0].float().cpu().contiguous() for name, tensor in encoded.items()}

        what = f"caption `{text[:60]}`: its encoding is"
        return self._tensors("captions", self._caption_key(text), encode, what)

    def _keep(self, index: int, mirror: bool, pixels: Future[Tensor] | None) -> EncodedImage:
        """Return one encoded picture, from pixels that are decoded already if there are any."""
        item, used = self.items[index], self._placement(index, mirror)

        def encode() -> dict[str, Tensor]:
            ready = self._pixels(index, mirror) if pixels is None else pixels.result()
            posterior = self._model.encode_images(ready)
            return {"mean": posterior.mean, "logvar": posterior.logvar}

        what = f"{item.path}: its latents are"
        tensors = self._tensors("images", self._image_key(index, mirror), encode, what)
        size = SizeHint((item.height, item.width), used.crop, used.bucket)
        return EncodedImage(Posterior(tensors["mean"], tensors["logvar"]), size)

    def _placement(self, index: int, mirror: bool) -> Placement:
        # mirrored first, so the placement's own crop applies to the mirrored picture
        return flipped(self.placements[index]) if mirror else self.placements[index]

    def _pixels(self, index: int, mirror: bool) -> Tensor:
        image = load_pixels(self.items[index], self._background)
        return to_pixels(image, self._placement(index, mirror), mirror=mirror)

    def _image_key(self, index: int, mirror: bool) -> str:
        used = self._placement(index, mirror)
        geometry = f"{used.resized} {used.crop} {used.bucket} {mirror} {self._background} {PIXELS_VERSION}"
        return f"{self._image_print} {self.items[index].digest} {geometry}"

    def _caption_key(self, text: str) -> str:
        return f"{self._text_print} {text}"

    def _is_kept(self, kind: str, key: str) -> bool:
        """Tell whether an entry is there, without reading it, and note that it is used."""
        file = self._file(kind, key)
        kept = file.is_file()
        if kept:
            mark_used(file)
        return kept

    def _file(self, kind: str, key: str) -> Path:
        digest = hashlib.sha256(f"{_FORMAT} {kind} {key}".encode()).hexdigest()
        return self._folder / kind / digest[:2] / f"{digest}.safetensors"

    def _tensors(
        self, kind: str, key: str, make: Callable[[], Mapping[str, Tensor]], what: str
    ) -> dict[str, Tensor]:
        file = self._file(kind, key)
        if file in self._memory:
            return self._memory[file]
        tensors = read_entry(file)
        if tensors is None:  # not there, thinned out, or damaged by something else than us
            tensors = dict(make())
            _refuse_non_finite(tensors, what)  # before it is written: a cache must not keep it
            write_entry(file, tensors)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._memory_bytes + size <= _MEMORY_BUDGET:
            self._memory[file] = tensors
            self._memory_bytes += size
        return tensors


def _refuse_non_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise DatasetError(
            f"{what} not finite numbers; the base cannot encode it (change or remove it, use "
            "training.precision=fp32, or another base)"
        )
