"""Encode each image and caption once, keep the result on disk, and find it again by content.

What is kept of an image is the VAE's posterior (mean and log-variance, unscaled), so that training
draws fresh latents at every visit. The key covers everything the result depends on: the file's bytes,
the geometry, the background, mirroring and the encoder's own weights. A stale entry cannot be hit;
files are written under a temporary name, so a killed run leaves no half entry.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...errors import DatasetError
from ...families.base import Conditioning, DiffusionModel, Posterior, SizeHint
from ...families.emphasis import escape
from ...tensor_file import all_finite
from ..reading.cache_folder import mark_used
from ..reading.image_files import PIXELS_VERSION, load_pixels
from ..reading.items import ImageItem
from ..reading.lookahead import ahead
from ..reading.masks import load_mask, refuse_empty
from .buckets import Placement
from .caption_plan import CaptionRun
from .entries import read_entry, write_entry
from .views import AugmentationView, AugmentationViews, Colours, shown, shown_mask

_FORMAT = "2"  # part of every key: raise it when what is stored changes meaning
_PROMPTS = "3"  # raise it when a prompt comes to mean something else, or is kept in another number format
_MEMORY_BUDGET = 1 << 30  # bytes of encoded data kept in RAM; the rest is read again when needed


@dataclass(frozen=True)
class EncodedImage:
    """One image as training sees it: posterior (1, C, h, w), pixel sizes, and mask (1, 1, h, w) in 0..1."""

    posterior: Posterior
    size: SizeHint
    mask: Tensor | None = None


@dataclass(frozen=True)
class EncoderPrints:
    """Fingerprints of the encoders, a part of every key; the encoders' weights are read for them.

    Attributes:
        images: of the image encoder.
        captions: of the text encoders; empty if captions are not encoded before training.
    """

    images: str
    captions: str

    @classmethod
    def of(cls, model: DiffusionModel, *, captions: bool) -> Self:
        """Compute those of a model."""
        return cls(
            model.encoder_fingerprint("images"), model.encoder_fingerprint("captions") if captions else ""
        )


_Decoded = tuple[int, AugmentationView, Future[Tensor] | None]
"""Image, view, and its pixels where it must be encoded."""
_Encoded = tuple[int, AugmentationView, Posterior | None]


def to_pixels(
    image: Image.Image, placement: Placement, *, mirror: bool = False, colours: Colours | None = None
) -> Tensor:
    """Bring an image to its bucket; return (1, 3, H, W) float32 in [-1, 1]."""
    seen = shown(image, AugmentationView(placement, mirror, colours))
    pixels = np.asarray(seen, dtype=np.float32) / 127.5 - 1.0
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


class EncodedDataset:
    """Images and captions as the denoiser needs them, encoded on first use.

    Args:
        items: the images.
        views: how each is shown.
        model: encodes; needs its encoders on the device until :meth:`encode_all` has run.
        folder: where encodings are kept, shared between runs.
        background: colour behind transparent images.
        encode_captions: off if the text encoder is trained, as its outputs change then.
        captions: how they vary from visit to visit, and where they are encoded.
        alpha_mask: whether transparency is the mask; if not, images may have mask files.
        prints: fingerprints of the model's encoders, if they are known already.
    """

    def __init__(
        self,
        items: Sequence[ImageItem],
        views: AugmentationViews,
        model: DiffusionModel,
        folder: Path,
        *,
        background: str = "#ffffff",
        encode_captions: bool = True,
        captions: CaptionRun | None = None,
        alpha_mask: bool = False,
        prints: EncoderPrints | None = None,
    ) -> None:
        assert len(items) == len(views.placements)
        self.items, self.views = tuple(items), views
        self.encode_captions, self.captions = encode_captions, captions or CaptionRun()
        self._model, self._folder = model, folder
        self._background, self._alpha_mask = background, alpha_mask
        self._kept_texts = {"", *self.captions.texts, *(item.caption for item in items)}
        self._memory: dict[Path, dict[str, Tensor]] = {}
        self._memory_bytes = 0
        self._prints = prints or EncoderPrints.of(model, captions=encode_captions)

    @property
    def placements(self) -> tuple[Placement, ...]:
        """The geometry of each image, without chance."""
        return self.views.placements

    @property
    def has_masks(self) -> bool:
        """Whether any image has a mask."""
        return any(self._masked(item) for item in self.items)

    def encode_all(
        self, emit: Callable[[int, int], None] = lambda done, total: None, share: tuple[int, int] = (0, 1)
    ) -> None:
        """Encode what is not on disk yet; ``emit`` gets (done, total).

        Captions come first, then images: the text encoders leave for good before the image encoder comes.
        Images are decoded ahead on all cores, so that the encoder does not wait for them. With several
        processes each encodes its ``share``: (its number from 0, number of processes).

        Raises:
            DatasetError: if latents are not finite, or a mask lets nothing through, naming the file.
        """
        views = [(index, view) for index in range(len(self.items)) for view in self.views.to_encode(index)]
        captions = sorted(self._kept_texts) if self.encode_captions else []
        rank, count = share
        views, captions = views[rank::count], captions[rank::count]
        total = len(views) + len(captions)
        workers = max(1, min(16, os.cpu_count() or 1))
        done = 0
        for caption in captions:
            if not self._is_kept("captions", self._caption_key(caption)):
                self.caption(caption)
            emit(done := done + 1, total)
        with ThreadPoolExecutor(workers) as pool, self._encoders() as encoders:
            decoded = ahead(self._started(pool, views), 2 * workers)
            for future in ahead(self._encoding(encoders, decoded), torch.get_num_threads()):
                index, view, posterior = future.result()
                if posterior is not None:
                    self._keep(index, view, posterior)
                emit(done := done + 1, total)
        if count == 1:
            self._refuse_empty_masks(views)

    def _refuse_empty_masks(self, views: Sequence[tuple[int, AugmentationView]]) -> None:
        seen: dict[int, float] = {}
        for index, view in views:
            if self._masked(self.items[index]):
                mask = self._mask(index, view)
                seen[index] = seen.get(index, 0.0) + float(mask.sum())
        for index, share in seen.items():
            refuse_empty(self.items[index], share)

    def _started(
        self, pool: ThreadPoolExecutor, views: Sequence[tuple[int, AugmentationView]]
    ) -> Iterator[tuple[int, AugmentationView, Future[Tensor] | None]]:
        """Yield each view, with a future of its pixels if it must be encoded."""
        for index, view in views:
            kept = self._is_kept("images", self._image_key(index, view))
            yield index, view, None if kept else pool.submit(self._pixels, index, view)

    def _encoders(self) -> ThreadPoolExecutor:
        """Return who encodes: on a CPU as many as it has cores, each on a single one; elsewhere one."""
        if self._model.facts.device.type != "cpu":
            return ThreadPoolExecutor(1)
        return ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))

    def _encoding(
        self, encoders: ThreadPoolExecutor, views: Iterable[_Decoded]
    ) -> Iterator[Future[_Encoded]]:
        """Yield each view, on its way through the encoder where it must be.

        Each by itself: what comes out depends on how many images are encoded together (in the last bits), so
        an entry encoded again later, or by another number of processes, would not be the same.
        """
        for decoded in views:
            yield encoders.submit(self._encoded, decoded)

    def _encoded(self, decoded: _Decoded) -> _Encoded:
        """Return a view with its posterior, if it was to be encoded."""
        index, view, pixels = decoded
        return index, view, None if pixels is None else self._model.encode_images(pixels.result())

    def _encoded_late(self, index: int, view: AugmentationView) -> Posterior:
        """Encode a view in the middle of a run: one that was never kept, or whose entry has gone."""
        pixels = self._pixels(index, view)
        if self._is_fleeting(index, view):
            return self._model.encode_images(pixels)
        with self._encoders() as encoders:  # on as many threads as before, or its last bits would differ
            return encoders.submit(self._model.encode_images, pixels).result()

    def image(self, index: int, view: AugmentationView | None = None) -> EncodedImage:
        """Return one encoded image, by default in its view without random parts.

        Raises:
            DatasetError: if its latents are not finite, naming the file.
        """
        return self._keep(index, view or self.views.plain(index), None)

    def prompt(self, text: str) -> str:
        """Return the prompt that the text encoder gets for a caption."""
        return text if self.captions.emphasis else escape(text)

    def caption(self, text: str) -> Conditioning:
        """Return one encoded caption, tensors without batch axis, in the number format of the denoiser.

        It rounds them so at every use; kept in 16 bit they are half as large on disk and in memory.

        Raises:
            DatasetError: if its encoding is not finite, naming the caption.
        """

        def encode() -> dict[str, Tensor]:
            with torch.no_grad():
                encoded = self._model.encode_text([self.prompt(text)])
            dtype = self._model.facts.dtype
            return {name: tensor[0].to("cpu", dtype).contiguous() for name, tensor in encoded.items()}

        what = f"caption `{text[:60]}`: its encoding is"
        keep = not self.captions.in_loop or text in self._kept_texts
        return self._tensors("captions", self._caption_key(text), encode, what, keep=keep)

    def _keep(self, index: int, view: AugmentationView, ready: Posterior | None) -> EncodedImage:
        """Return one encoded image, from what was encoded already if there is anything."""
        item, used = self.items[index], view.placement

        def encode() -> dict[str, Tensor]:
            posterior = ready or self._encoded_late(index, view)
            return {"mean": posterior.mean, "logvar": posterior.logvar}

        what = f"{item.path}: its latents are"
        tensors = self._tensors(
            "images", self._image_key(index, view), encode, what, keep=not self._is_fleeting(index, view)
        )
        size = SizeHint((item.height, item.width), used.crop, used.bucket)
        mask = self._mask(index, view) if self._masked(item) else None
        return EncodedImage(Posterior(tensors["mean"], tensors["logvar"]), size, mask)

    def _masked(self, item: ImageItem) -> bool:
        return "transparent" in item.traits if self._alpha_mask else item.mask is not None

    def _mask(self, index: int, view: AugmentationView) -> Tensor:
        """Return a mask (1, 1, h, w) at the size of the latents, each value the mean of its area."""
        item = self.items[index]
        _, height, width = self._model.facts.latents.shape(*view.placement.bucket)

        def make() -> dict[str, Tensor]:
            mask = load_mask(item, alpha=self._alpha_mask)
            if mask is None:
                return {"mask": torch.ones((1, 1, height, width))}
            small = np.asarray(shown_mask(mask, view, height, width), dtype=np.float32) / 255
            return {"mask": torch.from_numpy(small)[None, None].contiguous()}

        source = "alpha" if self._alpha_mask else item.mask_digest
        key = f"mask {source} {item.digest} {_way(view)} {height} {width} {PIXELS_VERSION}"
        keep = not self._is_fleeting(index, view)
        return self._tensors("images", key, make, f"{item.path}: its mask is", keep=keep)["mask"]

    def _is_fleeting(self, index: int, view: AugmentationView) -> bool:
        """Tell whether a view is used for one visit only, so that keeping it would just fill the disk."""
        return self.views.in_loop and view != self.views.plain(index)

    def _pixels(self, index: int, view: AugmentationView) -> Tensor:
        image = load_pixels(self.items[index], self._background)
        return to_pixels(image, view.placement, mirror=view.mirror, colours=view.colours)

    def _image_key(self, index: int, view: AugmentationView) -> str:
        geometry = f"{_way(view)} {self._background} {PIXELS_VERSION}"
        return f"{self._prints.images} {self.items[index].digest} {geometry}"

    def _caption_key(self, text: str) -> str:
        return f"{_PROMPTS} {self._model.facts.dtype} {self._prints.captions} {self.prompt(text)}"

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
        self, kind: str, key: str, make: Callable[[], Mapping[str, Tensor]], what: str, *, keep: bool
    ) -> dict[str, Tensor]:
        file = self._file(kind, key)
        if file in self._memory:
            return self._memory[file]
        tensors = read_entry(file)
        if tensors is None:  # missing, pruned, or damaged by something else
            tensors = dict(make())
            _refuse_non_finite(tensors, what)  # before it is written: a cache must not keep it
            if not keep:
                return tensors
            write_entry(file, tensors)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._memory_bytes + size <= _MEMORY_BUDGET:
            self._memory[file] = tensors
            self._memory_bytes += size
        return tensors


def _way(view: AugmentationView) -> str:
    """Return everything about a view that affects the pixels, as part of a key."""
    used = view.placement
    way = f"{used.resized} {used.crop} {used.bucket} {view.mirror}"
    return f"{way} {view.colours}" if view.colours else way


def _refuse_non_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    if not all(all_finite(tensor) for tensor in tensors.values()):
        raise DatasetError(
            f"{what} not finite numbers; the base cannot encode it (change or remove it, use "
            "training.precision=fp32, or another base)"
        )
