"""A base that stays loaded while adapters are added, removed, and given other strengths."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ..adapters.attach import Merged, attach, detach, set_strengths
from ..adapters.canonical import AdapterFile
from ..adapters.strength import Strength, strength_of
from ..config.schema import AttentionName, ModelConfig, Precision
from ..errors import AdapterFileError, ConfigError
from ..families.compute import Compute
from ..families.loading import load_model
from ..formats import dropping
from ..formats.adapter_files import OpenAdapter
from ..formats.hub_adapters import locate_adapter
from .render import GeneratedImage, GenerateRequest, Progress, check_request, render

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..families.base import DiffusionModel


class ImageGenerator:
    """A loaded base that makes images with any adapters, at strengths that may differ at each call."""

    def __init__(self, model: DiffusionModel) -> None:
        """Take over a loaded model, which nothing else may use together with this object."""
        self.model = model
        self._names: list[str] = []
        self._files: dict[str, OpenAdapter] = {}
        self._merged: tuple[Merged, dict[str, Strength]] | None = None
        model.prepare(training=False)

    @classmethod
    def load(
        cls,
        base: str | ModelConfig,
        *,
        device: str | None = None,
        precision: Precision | None = None,
        attention: AttentionName = "auto",
        offload: bool = False,
    ) -> Self:
        """Load a base.

        Args:
            base: ``mini``, a folder, a .safetensors file or a hub id; or the settings of one, e.g. with
                another VAE.
            device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; the fastest one present by default.
            precision: ``fp32``, ``bf16`` or ``fp16``; the fastest safe one by default.
            attention: see :func:`sdlora.families.attention.choose_attention`.
            offload: keep only the component that is working in the device's memory.

        Raises:
            ConfigError: for a device that does not exist, or a setting that has no effect with the base.
            ModelError: for a base that cannot be loaded.
        """
        compute = Compute.choose(device, precision, attention)
        if compute.idle_card:
            warnings.warn(compute.idle_card, stacklevel=2)
        return cls(
            load_model(
                base,
                dtype=compute.dtype,
                device=compute.device,
                attention=compute.attention,
                offload=offload,
            )
        )

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are loaded."""
        return tuple(self._names)

    def add_adapter(self, adapter: str | Path | AdapterFile, name: str | None = None) -> str:
        """Load an adapter and return its name: the one given, or else the file's.

        Raises:
            AdapterFileError: if it cannot be read, does not fit the base, or the name is taken.
        """
        self._refuse_while_merged("adding an adapter")
        read, where, usual, file = _read(adapter)
        name = name or _free_name(usual, self._names)
        if name in self._names:
            raise AdapterFileError(f"{where}: an adapter named `{name}` is loaded already; give another name")
        info = self.model.info
        if read.info.family is not None and read.info.family != info.name:
            raise AdapterFileError(
                f"{where}: an adapter for {read.info.family} bases, but {self.model.base.title} is "
                f"{info.name}; use a {read.info.family} base"
            )
        try:
            attach(self.model, read.weights, name)
        except AdapterFileError as error:
            raise AdapterFileError(f"{where}: {str(error).removeprefix(f'{name}: ')}") from error
        set_strengths(self.model, {})
        self._names.append(name)
        if file is not None:
            self._files[name] = file
        return name

    def hash_of(self, name: str) -> str:
        """Return the SHA-256 (hex) of a loaded file's tensors, as WebUI computes it; empty for a folder."""
        file = self._files.get(name)
        return "" if file is None or file.path.is_dir() else file.data_hash()

    def remove_adapter(self, name: str) -> None:
        """Unload an adapter; the base is as it was without it.

        Raises:
            ConfigError: if no such adapter is loaded, or adapters are merged.
        """
        self._refuse_while_merged("removing an adapter")
        self._check_loaded([name])
        detach(self.model, name)
        self._names.remove(name)
        self._files.pop(name, None)

    def generate(
        self,
        requests: Iterable[GenerateRequest],
        *,
        merge: bool = False,
        strengths_together: bool = True,
        progress: Progress | None = None,
    ) -> list[GeneratedImage]:
        """Return the images of ``requests``, in their order, each with its own adapter strengths.

        After :meth:`merge`, requests must ask for the merged strengths or for none.

        Args:
            requests: what to make; those with equal strengths are made together.
            merge: fold the adapters into the base's weights while each group is drawn.
            strengths_together: those with other strengths of the same adapters share batches, too, which
                changes an image by rounding only.
            progress: called after each denoising step.

        Raises:
            ConfigError: for an adapter that is not loaded, or anything :func:`render` refuses.
            ModelError: if the numbers overflow.
        """
        asked = [self._as_merged(request) for request in requests]
        for request in asked:
            check_request(self.model, request)
            self._check_loaded(request.strengths)
        total, before = sum(request.calls for request in asked), 0
        images: dict[int, Image] = {}
        together = strengths_together and not merge and self._merged is None
        for groups in _that_share_batches(_by_strengths(asked), self.model, together=together):
            indices = [i for _, of_group in groups for i in of_group]
            members = [asked[i] for i in indices]
            shifted = None if progress is None else _shifted(progress, before, total)
            with self._acting(groups[0][0], merge):
                rendered = render(
                    self.model, members, progress=shifted, each_at_its_strengths=len(groups) > 1
                )
                images |= zip(indices, rendered, strict=True)
            before += sum(request.calls for request in members)
        return [GeneratedImage(images[i], request) for i, request in enumerate(asked)]

    def merge(self, strengths: Mapping[str, Strength]) -> None:
        """Fold adapters into the base's weights: they then cost no time, and images differ only by rounding.

        Raises:
            ConfigError: for an adapter that is not loaded, or if adapters are merged already.
        """
        self._refuse_while_merged("merging again")
        self._check_loaded(strengths)
        self._merged = Merged(self.model, strengths), dict(strengths)

    def unmerge(self) -> None:
        """Undo :meth:`merge`: every weight of the base is restored bit for bit. No effect without a merge."""
        if self._merged is not None:
            self._merged[0].undo()
            self._merged = None

    def _check_loaded(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._names:
                loaded = ", ".join(f"`{loaded_name}`" for loaded_name in self._names) or "none"
                raise ConfigError(f"adapter `{name}`: not loaded (loaded: {loaded}); call add_adapter first")

    @contextlib.contextmanager
    def _acting(self, strengths: Mapping[str, Strength], merge: bool) -> Iterator[None]:
        """Let adapters act at these strengths: merged before, merged within the block, or as layers."""
        if self._merged is not None:
            yield
            return
        try:
            if merge:
                self.merge(strengths)
            else:
                set_strengths(self.model, strengths)
            yield
        finally:
            self.unmerge()
            set_strengths(self.model, {})

    def _as_merged(self, request: GenerateRequest) -> GenerateRequest:
        if self._merged is None:
            return request
        merged = self._merged[1]
        if request.strengths and dict(request.strengths) != merged:
            raise ConfigError(
                f"strengths {dict(request.strengths)} asked for while {merged} are merged; call unmerge first"
            )
        return dataclasses.replace(request, strengths=merged)

    def _refuse_while_merged(self, what: str) -> None:
        if self._merged is not None:
            raise ConfigError(f"{what} while adapters are merged; call unmerge first")


_Group = tuple[Mapping[str, Strength], list[int]]
"""Strengths, and the numbers of the requests that have them."""


def _by_strengths(requests: Sequence[GenerateRequest]) -> list[_Group]:
    groups: list[_Group] = []
    for i, request in enumerate(requests):
        for strengths, indices in groups:
            if strengths == request.strengths:
                indices.append(i)
                break
        else:
            groups.append((request.strengths, [i]))
    return groups


def _that_share_batches(
    groups: Sequence[_Group], model: DiffusionModel, *, together: bool
) -> list[list[_Group]]:
    """Return groups of equal strengths by what may share a batch: the same adapters act in the denoiser.

    At strength 0 an adapter is to be left out of the computation, not to be multiplied by 0.
    """
    component, shared = model.info.denoiser.component, dict[object, list[_Group]]()
    for number, (strengths, indices) in enumerate(groups):
        acting = frozenset(name for name, value in strengths.items() if strength_of(value, component) != 0.0)
        key: object = acting if together and acting else number
        shared.setdefault(key, []).append((strengths, indices))
    return list(shared.values())


def _shifted(progress: Progress, before: int, total: int) -> Progress:
    return lambda done, _: progress(before + done, total)


def _read(adapter: str | Path | AdapterFile) -> tuple[AdapterFile, str, str, OpenAdapter | None]:
    """Return the adapter, where it came from, its usual name, and its file if it has one."""
    if isinstance(adapter, AdapterFile):
        name = adapter.info.name or "adapter"
        return adapter, name, name, None
    place, hub_name = locate_adapter(Path(adapter).expanduser())
    file = OpenAdapter(place)
    name = hub_name or (file.path.name if file.path.is_dir() else file.path.stem)
    read = file.read()
    for note in dropping.untouched(file.path, read):
        warnings.warn(note, stacklevel=3)
    return read, str(file.path), name, file


def _free_name(wanted: str, taken: Iterable[str]) -> str:
    names = set(taken)
    if wanted not in names:
        return wanted
    return next(name for i in range(2, len(names) + 3) if (name := f"{wanted}-{i}") not in names)
