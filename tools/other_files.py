"""Generated files of others: families x kinds x spellings x dimensions x alphas x number formats.

Every file has layers of each sort (linear, cross-attention, 1x1 and 3x3 convolution, text encoder) under true
names, with sides an eighth of the true ones. What sdlora reads, writes, merges and bakes is compared
with float64 arithmetic that shares no code with it (:mod:`tools.adapter_references`).
"""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sdlora.adapters.canonical import AdapterFile, ModuleKey, Update
from sdlora.errors import AdapterFileError
from sdlora.families.facts import FamilyInfo, is_text_encoder
from sdlora.families.layer_shapes import true_shapes
from sdlora.families.table import family_info
from sdlora.formats import names
from sdlora.formats.adapter_files import read_adapter, write_adapter
from sdlora.surgery.merge import merge_adapters
from tools.adapter_references import KINDS, Made

SPELLINGS = ("kohya", "other blocks", "lycoris", "comfyui", "dotted", "mixed")
ALPHAS = (None, 1.5, 2.0, 0.0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
_SHRINK = 8
_BY_ROTATION = ("oft", "oft_diag", "boft", "ia3 out", "ia3 in")
_TEXT = (*(f".self_attn.{name}_proj" for name in ("q", "k", "v", "out")), ".mlp.fc1")
_CLIP = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


@dataclass(frozen=True)
class Case:
    """One file."""

    family: str
    kind: str
    spelling: str
    turned: bool
    alpha: float | None
    dtype: torch.dtype
    number: int


def cases(families: Sequence[str]) -> Iterator[Case]:
    """Yield every combination that means something."""
    number = 0
    for family, kind, spelling, turned, alpha, dtype in itertools.product(
        families, KINDS, SPELLINGS, (False, True), ALPHAS, DTYPES
    ):
        takes_alpha = kind not in ("full", "ia3 out", "ia3 in", "oft_diag", "boft")
        if (not takes_alpha and alpha is not None) or (turned and kind not in ("lora", "dora", "full")):
            continue
        if kind == "oft" and alpha == 0.0:
            continue
        number += 1
        yield Case(family, kind, spelling, turned, alpha, dtype, number)


def layers(family: str) -> dict[ModuleKey, tuple[int, ...]]:
    """Return one layer of each sort with shrunk sides."""
    endings = (".attn1.to_out.0", ".attn2.to_k", ".proj_in", ".resnets.0.conv1", ".ff.net.0.proj", ".0.conv")
    shapes_found: dict[ModuleKey, tuple[int, ...]] = {}
    for component, shapes in true_shapes(family).items():
        wanted = _TEXT if is_text_encoder(component) else endings
        for ending in wanted:
            path = next(path for path in shapes if path.endswith(ending))
            out, width, *kernel = shapes[path]
            shapes_found[ModuleKey(component, path)] = (
                *(max(side // _SHRINK, 8) // 8 * 8 for side in (out, width)),
                *kernel,
            )
    return shapes_found


def named(spelling: str, info: FamilyInfo, module: ModuleKey, number: int) -> str:
    """Return a module's name in a spelling; ``mixed`` takes one after the other."""
    component, path = module
    if spelling == "mixed":
        spelling = ("kohya", "comfyui", "dotted")[number % 3]
    if spelling == "dotted":
        return f"{component}.{path}"
    if spelling == "comfyui":
        if is_text_encoder(component):
            return f"text_encoders.{_CLIP[component]}.transformer.{path}"
        return f"diffusion_model.{names.to_ldm(path)}"
    if spelling == "lycoris" and not is_text_encoder(component):
        return "lycoris_" + names.to_underscores(path)
    start = info.file_prefixes[component]
    original = (info.denoiser.webui_names == "ldm") != (spelling == "other blocks")
    inside = names.to_ldm(path) if original and not is_text_encoder(component) else path
    return f"{start}_{names.to_underscores(inside or path)}"


def written(case: Case, folder: Path) -> tuple[Path, dict[ModuleKey, tuple[Made, tuple[int, ...]]]]:
    """Write the file of a case and return what each of its layers does."""
    info, references = family_info(case.family), {}
    tensors: dict[str, Tensor] = {}
    for number, (module, shape) in enumerate(layers(case.family).items()):
        references[module] = (KINDS[case.kind](shape, 2, case.alpha, case.number + number, case.dtype), shape)
        name = named(case.spelling, info, module, number)
        for part, tensor in references[module][0][0].items():
            if case.turned and part != "alpha":
                if tensor.ndim == 2:
                    tensor = tensor[:, :, None, None]
                elif tensor.ndim == 4 and tuple(tensor.shape[2:]) == (1, 1) and tuple(shape[2:]) != (3, 3):
                    tensor = tensor[:, :, 0, 0]
            tensors[f"{name}.{part}"] = tensor.contiguous()
    path = folder / "file.safetensors"
    save_file(tensors, path, {"ss_base_model_version": info.header.version})
    return path, references


def weight_for(module: ModuleKey, shape: tuple[int, ...]) -> Tensor:
    """Return the base's weight of a layer."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(module.path)))


def worst(
    updates: dict[ModuleKey, Update],
    references: dict[ModuleKey, tuple[Made, tuple[int, ...]]],
    times: float = 1.0,
) -> float:
    """Return the largest difference of any update, relative to the norm of what it should be."""
    if set(updates) != set(references):
        raise AdapterFileError(f"{len(set(updates) ^ set(references))} modules are others")
    largest = 0.0
    for module, ((_, delta), shape) in references.items():
        weight = weight_for(module, shape)
        wanted = delta(weight) * times
        actual = updates[module].delta(weight).double().reshape(shape)
        size = float(wanted.norm()) + float(weight.double().norm()) * 1e-3
        largest = max(largest, float((actual - wanted).norm()) / size)
    return largest


def check(case: Case, folder: Path) -> dict[str, float]:
    """Return the relative error of each operation on the file of a case.

    Raises:
        AdapterFileError: when sdlora refuses it.
    """
    path, references = written(case, folder)
    adapter = read_adapter(path)
    updates = dict(adapter.weights.updates)
    errors = {"read": worst(updates, references)}
    baked = max(
        float(
            (
                (weight_for(m, s) + 0.5 * updates[m].delta(weight_for(m, s)).reshape(s)).double()
                - (weight_for(m, s).double() + 0.5 * delta(weight_for(m, s)))
            ).norm()
            / weight_for(m, s).double().norm()
        )
        for m, ((_, delta), s) in references.items()
    )
    errors["bake"] = baked
    info, again = family_info(case.family), folder / "again.safetensors"
    write_adapter(AdapterFile(adapter.weights, adapter.info), "webui", again, torch.float32, info)
    errors["write"] = worst(dict(read_adapter(again).weights.updates), references)
    if case.kind in ("lora", "full", "loha", "lokr") and case.number % 4 == 0:
        target = folder / "merged.safetensors"
        merge_adapters([(path, 0.5), (path, 0.25)], target, dtype="fp32", overwrite=True)
        errors["merge"] = worst(dict(read_adapter(target).weights.updates), references, 0.75)
    return errors


def run(families: Sequence[str], step: int = 1) -> tuple[Counter[str], list[str], dict[str, float]]:
    """Check all cases, or every so many; return counts, what failed, and the largest error by operation."""
    counts: Counter[str] = Counter()
    failures: list[str] = []
    largest: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        for case in itertools.islice(cases(families), 0, None, step):
            counts["files"] += 1
            counts[f"{case.family}"] += 1
            counts[f"kind {case.kind}"] += 1
            try:
                errors = check(case, Path(name))
            except AdapterFileError as error:
                failures.append(f"{case}: {error}")
                continue
            for operation, error in errors.items():
                counts[f"checked {operation}"] += 1
                largest[operation] = max(largest.get(operation, 0.0), error)
                if not error < 5e-6 * (100 if case.kind in _BY_ROTATION else 1):
                    failures.append(f"{case}: {operation} is off by {error:.2e}")
    return counts, failures, largest
