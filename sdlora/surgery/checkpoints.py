"""Where a checkpoint keeps the weights that adapters change: LDM single files and diffusers folders.

A module's weight is a whole tensor or a third of a tensor's rows: OpenCLIP text encoders of LDM files hold
query, key and value as one matrix. Names alone decide, so nothing is loaded; each tensor is read when it
is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..adapters.canonical import ModuleKey
from ..errors import ModelError, shown
from ..families.facts import FamilyInfo, TextEncoderInfo, component_order, is_text_encoder
from ..families.ldm import UNET_PREFIX, StoredKey, text_key_map
from ..families.table import FAMILIES, component_names, family_info
from ..families.weights import checked_header
from ..files import ASSETS
from ..formats import names
from ..tensor_file import FLOAT_DTYPES, Header, TensorSpec

_TEXT_LAYER_INSIDES = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
    *("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"),
)
_TEXT_ENDS = ("embeddings.token_embedding", "embeddings.position_embedding", "final_layer_norm")
_LAYER_NUMBER = {
    "clip": re.compile(r"text_model\.encoder\.layers\.(\d+)\."),
    "openclip": re.compile(r"transformer\.resblocks\.(\d+)\."),
}
_CONTEXT = ".attn2.to_k"
_VARIANT = re.compile(r"^(?:diffusion_pytorch_)?model(?:\.(?P<variant>[\w-]+?))?(?:-\d{5}-of-\d{5})?$")
_ENDING = ".weight"
_BIAS = ".bias"
_ENDINGS = (_ENDING, _BIAS)
PICKLE_ENDINGS = (".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Site:
    """Where one module's weight lies in a file."""

    header: Header
    stored_key: StoredKey

    @property
    def spec(self) -> TensorSpec:
        """The tensor that holds it, perhaps among others."""
        return self.header.tensors[self.stored_key.key]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the module's weight: (out, in) or (out, in, kh, kw)."""
        rows, *rest = self.spec.shape
        shape = (rows if self.stored_key.third is None else rows // 3, *rest)
        return tuple(reversed(shape)) if self.stored_key.transposed else shape

    def read(self) -> Tensor:
        """Return the module's weight, float32 (float64 stays)."""
        stored = read_tensor(self.header, self.stored_key.key)
        return self.stored_key.take(stored, self.shape).to(wide_dtype(stored.dtype))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's files and what adapters can change in them.

    Attributes:
        path: the file or folder.
        layout: ``file`` (one LDM-layout checkpoint) or ``folder`` (diffusers).
        headers: of all files with weights of adaptable components.
    """

    path: Path
    layout: Literal["file", "folder"]
    headers: tuple[Header, ...]
    _sites: Mapping[ModuleKey, tuple[Site, ...]] = field(repr=False)

    def sites(self, module: ModuleKey) -> tuple[Site, ...]:
        """Return where a module's weight lies; several in a folder with several variants of its files."""
        return self._sites.get(module, ())

    @property
    def modules(self) -> tuple[ModuleKey, ...]:
        """All modules that have a weight matrix or kernel, in the order of the files."""
        return tuple(self._sites)

    @cached_property
    def shapes(self) -> dict[ModuleKey, tuple[int, ...]]:
        """The shape of every module's weight."""
        return {module: sites[0].shape for module, sites in self._sites.items()}

    def variants(self, component: str) -> set[str]:
        """Return which variants of a component's weights a folder holds; one for a single file."""
        if self.layout == "file":
            return {""}
        return {variant_of(h.path) for h in self.headers if h.path.parent.name == component} or {""}

    @cached_property
    def components(self) -> tuple[str, ...]:
        """The adaptable components that are there."""
        present = {module.component for module in self._sites}
        return tuple(sorted(present, key=component_order))

    @cached_property
    def family(self) -> FamilyInfo:
        """The model family.

        Raises:
            ModelError: when nothing tells it.
        """
        if self.layout == "file":
            return _family_of_file(self.headers[0])
        encoders = len(self.components) - 1
        widths = {self._sites[module][0].shape[1] for module in self._sites if module.path.endswith(_CONTEXT)}
        infos = [family_class.info for family_class in FAMILIES.values()]
        fitting = [
            info
            for info in infos
            if len(info.text_encoders) == encoders and info.denoiser.component in self.components
        ]
        exact = [info for info in fitting if widths == {info.denoiser.context_width}]
        if not (exact or fitting):
            raise ModelError(
                f"{self.path}: fits no known model family; give a complete Stable Diffusion model"
            )
        return (exact or fitting)[0]


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of a checkpoint.

    Raises:
        ModelError: when it is missing, damaged, holds pickles only, or is not a Stable Diffusion model.
    """
    if path.is_dir():
        return _open_folder(path)
    if path.suffix.lower() in PICKLE_ENDINGS:
        raise ModelError(
            f"{path}: {path.suffix} files can run code when opened and are not read; use the .safetensors "
            "version of this checkpoint"
        )
    if not path.is_file():
        raise ModelError(f"{path}: no such checkpoint; give a .safetensors file or a diffusers folder")
    header = checked_header(path)
    if not any(key.startswith(UNET_PREFIX) for key in header.tensors):
        raise ModelError(
            f"{path}: holds no `{UNET_PREFIX}...` tensors, so it is not a Stable Diffusion checkpoint; give "
            "the full .safetensors file or a diffusers folder"
        )
    if any(key.endswith((".scale_weight", "scaled_fp8", ".weight_scale")) for key in header.tensors):
        raise ModelError(
            f"{path}: holds scaled fp8 weights, whose numbers mean nothing without their scales; use the "
            "fp16 version"
        )
    return Checkpoint(path, "file", (header,), _sites_of_file(header))


def read_tensor(header: Header, key: str) -> Tensor:
    """Return one tensor of a file as a copy in memory.

    Raises:
        ModelError: when the file became shorter meanwhile.
    """
    spec = header.tensors[key]
    tensor = torch.empty(spec.shape, dtype=spec.dtype)
    if tensor.numel():
        read_into(header, spec.start, tensor.reshape(-1).view(torch.uint8))
    return tensor


def read_into(header: Header, start: int, block: Tensor) -> None:
    """Fill a flat uint8 tensor with a file's bytes from ``start`` of its data on.

    Raises:
        ModelError: when the file became shorter meanwhile.
    """
    view = block.numpy().data
    with header.path.open("rb", buffering=0) as stream:
        stream.seek(header.data_offset + start)
        while view:
            count = stream.readinto(view)
            if not count:
                raise ModelError(f"{header.path}: became shorter while it was read; check the disk")
            view = view[count:]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the number format to compute in: float64 for float64, float32 for all narrower ones."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def component_files(folder: Path) -> list[Path]:
    """Return the files with a component's weights in a diffusers folder: all variants and shards."""
    return sorted(
        file
        for file in folder.glob("*.safetensors")
        if _VARIANT.match(file.name.removesuffix(".safetensors"))
    )


def variant_of(file: Path) -> str:
    """Return which variant of a component's weights a file belongs to, e.g. ``fp16``; usually ``""``."""
    match = _VARIANT.match(file.name.removesuffix(".safetensors"))
    return (match["variant"] or "") if match else ""


def _open_folder(path: Path) -> Checkpoint:
    if not (path / "model_index.json").is_file():
        raise ModelError(
            f"{path}: no model_index.json inside, so this is not a diffusers model folder; give the folder "
            "that holds model_index.json, or a .safetensors checkpoint"
        )
    headers: list[Header] = []
    sites: dict[ModuleKey, list[Site]] = {}
    for component in component_names():
        files = component_files(path / component)
        others = sorted(file.name for file in (path / component).glob("*.bin"))
        if not files and others:
            raise ModelError(
                f"{path / component}: holds its weights as {others[0]}, which can run code when opened and "
                "is not read; get the .safetensors files of this model"
            )
        for file in files:
            header = checked_header(file)
            headers.append(header)
            for key, spec in header.tensors.items():
                if key.endswith(_ENDINGS) and _is_weight(spec):
                    module = ModuleKey(component, names.canonical_path(component, _path_of(key)))
                    sites.setdefault(module, []).append(Site(header, StoredKey(key)))
    if all(is_text_encoder(module.component) for module in sites):
        infos = [family_class.info.denoiser for family_class in FAMILIES.values()]
        titles = {info.component: info.title for info in infos}
        wanted = " or ".join(f"{title} weights in {path / name}" for name, title in titles.items())
        raise ModelError(f"{path}: holds no {wanted}; check that the download is complete")
    return Checkpoint(
        path, "folder", tuple(headers), {m: tuple(module_sites) for m, module_sites in sites.items()}
    )


def _sites_of_file(header: Header) -> dict[ModuleKey, tuple[Site, ...]]:
    sites: dict[ModuleKey, tuple[Site, ...]] = {}
    family = _family_of_file(header)
    for key, spec in header.tensors.items():
        if key.startswith(UNET_PREFIX) and key.endswith(_ENDINGS) and _is_weight(spec):
            stem, ending = _split(key.removeprefix(UNET_PREFIX))
            path = names.from_ldm(stem)
            if path is not None:
                module = ModuleKey(family.denoiser.component, path)
                sites[module.bias if ending == _BIAS else module] = (Site(header, StoredKey(key)),)
    for encoder in family.text_encoders:
        for name, stored_key in _key_map(header, encoder, family.assets):
            module = ModuleKey(encoder.component, names.with_text_prefix(_path_of(name)))
            sites[module] = (Site(header, stored_key),)
    return sites


def _key_map(header: Header, encoder: TextEncoderInfo, assets: str) -> Iterator[tuple[str, StoredKey]]:
    """Yield (transformers name, place) of the weights and biases of a text encoder that are in the file.

    SD2's checkpoints hold one layer more than is used; no adapter has that layer.
    """
    config = json.loads((ASSETS / assets / encoder.component / "config.json").read_text(encoding="utf-8"))
    last = int(config["num_hidden_layers"])
    pattern = _LAYER_NUMBER[encoder.checkpoint_layout]
    numbers = {
        int(match[1])
        for key in header.tensors
        if key.startswith(encoder.checkpoint_prefix)
        and (match := pattern.match(key, len(encoder.checkpoint_prefix)))
    }
    wanted = [
        f"encoder.layers.{n}.{inside}{ending}"
        for n in sorted(numbers)
        if n < last
        for inside in _TEXT_LAYER_INSIDES
        for ending in _ENDINGS
    ]
    wanted += [f"{name}{_ENDING}" for name in _TEXT_ENDS] + [f"final_layer_norm{_BIAS}"]
    if encoder.projected:
        wanted.append(f"text_projection{_ENDING}")
    for name, stored_key in text_key_map(wanted, encoder).items():
        if stored_key.key in header.tensors:
            yield name, stored_key


def _family_of_file(header: Header) -> FamilyInfo:
    keys: Sequence[str] = tuple(header.tensors)
    for family in reversed(FAMILIES.values()):
        for encoder in family.info.text_encoders:
            prefix = encoder.checkpoint_prefix
            if prefix and any(key.startswith(prefix) for key in keys):
                return family.info
    widths = {
        spec.shape[-1]
        for key, spec in header.tensors.items()
        if key.endswith(f"{_CONTEXT}{_ENDING}") and spec.shape
    }
    for name in FAMILIES:
        if widths == {family_info(name).denoiser.context_width}:
            return family_info(name)
    raise ModelError(
        f"{header.path}: has no text encoder, and its U-Net fits no known family "
        f"({', '.join(shown(width) for width in sorted(widths)) or 'no'} cross-attention width); give a "
        "complete checkpoint"
    )


def _split(key: str) -> tuple[str, str]:
    """Return a key without its ending, and the ending."""
    ending = next(end for end in _ENDINGS if key.endswith(end))
    return key.removesuffix(ending), ending


def _path_of(key: str) -> str:
    """Return the module path that a key's adapter would have: of a weight, or of a bias."""
    return key.removesuffix(_ENDING)


def _is_weight(spec: TensorSpec) -> bool:
    return len(spec.shape) in (1, 2, 4) and spec.dtype in (
        *FLOAT_DTYPES,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    )
