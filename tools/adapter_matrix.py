"""The matrix of adapter files: every format, family and set of layers, and how far the updates move.

``python -m tools.adapter_matrix`` writes an adapter for every layer that a family can adapt (true names and
numbers of layers, sides an eighth of the true ones; mixed ranks, alpha not the rank, convolutions, text
encoders), reads each file back through sdlora's own reader and through the program the format belongs to, and
prints the largest difference of any element of any update: 0, or what rounding to the number format allows.
Then every format is converted to every other, older and other programs' spellings are read, and the kinds
beyond LoRA go through every format that can hold them. Exit code 1 if anything differs by more than rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdlora.adapters.canonical import AdapterFile, AdapterInfo, AdapterWeights, LowRankPair, ModuleKey, Update
from sdlora.adapters.kinds.dora import DoRA
from sdlora.adapters.kinds.loha import LoHa
from sdlora.adapters.kinds.lokr import LoKr
from sdlora.adapters.kinds.tucker import TuckerPair
from sdlora.errors import AdapterFileError
from sdlora.families.facts import FamilyInfo
from sdlora.families.locating import ASSETS
from sdlora.families.table import FAMILIES, family_info
from sdlora.formats import names
from sdlora.formats.adapter_files import OpenAdapter, read_adapter, write_adapter
from sdlora.formats.proof import compare, prove
from sdlora.formats.table import FORMATS, written_formats
from tools import other_files

TARGETS = ("attention", "linear", "all")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
STEPS = (("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "bf16"), ("fp32", "fp16"), ("fp32", "bf16"))
"""Number format of the trained values, and that of the file."""
_SHRINK, _SMALLEST = 8, 8
_RANKS, _SCALES = (4, 2, 8), (0.5, 1.0, 0.25)
_UNEVEN = (1.0, 1.5, 12.7 / 4)
"""Scales that are not powers of two, so that folding them into a factor must round."""


def true_shapes(family: str) -> dict[ModuleKey, tuple[int, ...]]:
    """Return the shape of every matrix of a family's U-Net and text encoders, without making a weight."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    info = family_info(family)

    def config(component: str) -> dict[str, Any]:
        path = ASSETS / info.assets / component / "config.json"
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return tree

    with torch.device("meta"):
        models: dict[str, Any] = {"unet": UNet2DConditionModel.from_config(config("unet"))}
        for encoder in info.text_encoders:
            kind = CLIPTextModelWithProjection if encoder.projected else CLIPTextModel
            models[encoder.component] = kind(CLIPTextConfig(**config(encoder.component)))
    shapes = {}
    for component, model in models.items():
        for key, tensor in model.state_dict().items():
            path = key.removesuffix(".weight")
            if key.endswith(".weight") and tensor.ndim in (2, 4) and "embedding." not in path:
                canonical = path if component == "unet" else names.with_text_prefix(path)
                shapes[ModuleKey(component, canonical)] = tuple(tensor.shape)
    return shapes


def shrunk(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a weight's shape with sides an eighth as long; kernels stay."""
    return (*(max(side // _SHRINK, _SMALLEST) for side in shape[:2]), *shape[2:])


def layers_of(family: str, targets: str) -> dict[ModuleKey, tuple[int, ...]]:
    """Return the layers that a preset adapts, and all of the text encoders', with their shrunk shapes."""
    presets = family_info(family).targets
    return {
        module: shrunk(shape)
        for module, shape in true_shapes(family).items()
        if f".{module.path}".endswith(presets[module.component][targets])
    }


def random_lora(
    shapes: Mapping[ModuleKey, tuple[int, ...]], dtype: torch.dtype, scales: Sequence[float] = _SCALES
) -> AdapterWeights:
    """Return random pairs; ranks and alpha / rank take turns."""
    generator = torch.Generator().manual_seed(0)
    pairs: dict[ModuleKey, Update] = {}
    for number, (module, shape) in enumerate(sorted(shapes.items())):
        rank = _RANKS[number % len(_RANKS)]
        down = torch.randn(rank, *shape[1:], generator=generator) * 0.3
        up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator) * 0.05
        pairs[module] = LowRankPair(down.to(dtype), up.to(dtype), rank * scales[number % len(scales)])
    return AdapterWeights(pairs)


def place(folder: Path, format: str, name: str = "adapter") -> Path:
    """Return where an adapter of a format goes."""
    return folder / (name if FORMATS[format].is_folder else f"{name}.safetensors")


def file_of(weights: AdapterWeights, family: str) -> AdapterFile:
    """Return an adapter with its family's name."""
    return AdapterFile(weights, AdapterInfo(family=family, name="matrix"))


class Table:
    """Prints rows and remembers whether any of them failed."""

    def __init__(self) -> None:
        self.num_rows = self.num_failures = 0

    def row(self, label: str, check: Callable[[], str]) -> None:
        """Print a label and what a check found; a refusal is a failure."""
        self.num_rows += 1
        try:
            result = check()
        except AdapterFileError as error:
            self.num_failures += 1
            result = f"FAILED: {error}"
        print(f"  {label:<58} {result}", flush=True)


def written_and_read(weights: AdapterWeights, family: str, format: str, dtype: torch.dtype) -> str:
    """Write an adapter, and compare what sdlora and the format's own program read, as export does."""
    info = family_info(family)
    with tempfile.TemporaryDirectory() as folder:
        path = place(Path(folder), format)
        write_adapter(file_of(weights, family), format, path, dtype, info)
        proof, clients = prove(weights, OpenAdapter(path), dtype, info)
    of_diffusers = next(support for support in clients if support.client == "diffusers")
    others = "+".join(proof.read_by)
    if format == "webui" and not of_diffusers.full:
        others += f" (diffusers {of_diffusers.reasons[0]})"
    exact = "0" if proof.largest_difference == 0 else f"{proof.largest_difference:.1e}"
    relative = (
        ""
        if proof.largest_difference == 0
        else f", relative {proof.relative_difference:.1e} of {proof.tolerance:.1e} allowed"
    )
    return f"{exact}{relative}; {proof.num_modules} modules, {proof.num_keys} keys, {others}"


def formats_part(table: Table, families: Sequence[str]) -> None:
    """Every format x family x targets x number format."""
    print("Written and read back: largest difference of any element of any update")
    for family in families:
        for targets in TARGETS:
            shapes = layers_of(family, targets)
            for trained, stored in STEPS:
                weights = random_lora(shapes, DTYPES[trained])
                for format in written_formats():
                    table.row(
                        f"{family} {targets}, {trained} -> {format} {stored}",
                        lambda w=weights, f=format, s=stored, n=family: written_and_read(w, n, f, DTYPES[s]),
                    )
        uneven = random_lora(layers_of(family, "linear"), torch.float16, _UNEVEN)
        for format in written_formats():
            table.row(
                f"{family} linear, alphas of their own, fp16 -> {format} fp16",
                lambda w=uneven, f=format, n=family: written_and_read(w, n, f, torch.float16),
            )


def chains_part(table: Table, families: Sequence[str]) -> None:
    """Every format into every other."""
    print("\nConverted from format to format (fp16, all layers): largest difference from the first adapter")

    def chain(weights: AdapterWeights, family: FamilyInfo, steps: tuple[str, str]) -> str:
        adapter = file_of(weights, family.name)
        with tempfile.TemporaryDirectory() as folder:
            for number, format in enumerate(steps):
                path = place(Path(folder), format, f"step-{number}")
                write_adapter(adapter, format, path, torch.float16, family)
                adapter = read_adapter(path)
        largest, _ = compare(weights, adapter.weights, torch.float16, " -> ".join(steps))
        alphas = all(adapter.weights.updates[m].alpha == update.alpha for m, update in weights.all_items())
        return f"{largest:g}" + ("" if alphas else "; alphas are others, updates the same")

    for family in families:
        weights = random_lora(layers_of(family, "all"), torch.float16)
        for first in written_formats():
            for second in written_formats():
                table.row(
                    f"{family} {first} -> {second}",
                    lambda w=weights, n=family, s=(first, second): chain(w, family_info(n), s),
                )


def respelled(tensors: Mapping[str, Tensor], family: FamilyInfo) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (whose spelling, tensors) of a file in our diffusers format, as others write it."""

    def renamed(name_of: Callable[[str, str], str]) -> dict[str, Tensor]:
        respelled_tensors = {}
        for key, tensor in tensors.items():
            path, _, part = key.removesuffix(".weight").rpartition(".lora_")
            respelled_tensors[name_of(path, "down" if part == "A" else "up")] = tensor
        return respelled_tensors

    def processor(path: str, part: str) -> str:
        parent, _, last = path.removesuffix(".0").rpartition(".")
        if last in ("to_q", "to_k", "to_v", "to_out"):
            return f"{parent}.processor.{last}_lora.{part}.weight"
        return f"{path}.lora.{part}.weight"

    def comfyui(path: str, part: str) -> str:
        component, _, inside = path.partition(".")
        clip = {"text_encoder": "clip_h" if family.header.is_v2 else "clip_l", "text_encoder_2": "clip_g"}
        name = (
            f"diffusion_model.{names.to_ldm(inside)}"
            if component == "unet"
            else f"text_encoders.{clip[component]}.transformer.{inside}"
        )
        return f"{name}.lora_{part}.weight"

    def lycoris(path: str, part: str) -> str:
        component, _, inside = path.partition(".")
        start = "lycoris" if component == "unet" else family.file_prefixes[component]
        return f"{start}_{names.to_underscores(inside)}.lora_{part}.weight"

    yield "diffusers, `.lora.down`", renamed(lambda path, part: f"{path}.lora.{part}.weight")
    yield "diffusers, attention processors", renamed(processor)
    yield "ComfyUI, `diffusion_model.`", renamed(comfyui)
    yield "LyCORIS, `lycoris_`", renamed(lycoris)


def spellings_part(table: Table, families: Sequence[str]) -> None:
    """Spellings that are only read."""
    print("\nSpellings of others, read: largest difference")

    def read(tensors: dict[str, Tensor], weights: AdapterWeights) -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "other.safetensors"
            save_file(tensors, path)
            again = read_adapter(path).weights
        largest, _ = compare(weights, again, torch.float16, "read")
        return f"{largest:g}; {len(again)} modules"

    for family in families:
        weights = random_lora(layers_of(family, "all"), torch.float16, (1.0,))
        info = family_info(family)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ours.safetensors"
            write_adapter(file_of(weights, family), "diffusers", path, torch.float16, info)
            tensors = load_file(path)
        for title, others in respelled(tensors, info):
            table.row(f"{family} {title}", lambda t=others, w=weights: read(t, w))


def kinds_of(shape: tuple[int, ...], alpha: float = 1.5, rank: int = 2) -> dict[str, Update]:
    """Return one update of each kind for a layer; LoKr is split as PEFT splits it."""
    from peft.tuners.lokr.layer import factorization

    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*sizes: int) -> Tensor:
        return (torch.randn(*sizes, generator=generator) * 0.3).half()

    out, width, *kernel = shape
    flat = width * (kernel[0] * kernel[1] if kernel else 1)
    size = (kernel[0], kernel[1]) if kernel else None
    (rows, own_rows), (columns, own_columns) = factorization(out, -1), factorization(width, -1)
    pair = LowRankPair(draw(rank, *shape[1:]), draw(out, rank, *[1] * len(kernel)), alpha)
    kinds: dict[str, Update] = {
        "LoHa": LoHa(
            draw(out, rank), draw(rank, flat), draw(out, rank), draw(rank, flat), alpha, kernel=size
        ),
        "LoKr": LoKr(draw(rows, columns), draw(own_rows, own_columns, *kernel), 1.0),
        "DoRA by output": DoRA(pair, draw(out, *[1] * (1 + len(kernel))).float().abs() + 0.5),
        "DoRA by input": DoRA(pair, draw(1, width, *[1] * len(kernel)).float().abs() + 0.5),
    }
    if kernel and kernel != [1, 1]:
        kinds["LoCon, Tucker"] = TuckerPair(
            draw(rank, width, 1, 1), draw(rank, rank, *kernel), draw(out, rank, 1, 1), alpha
        )
    return kinds


def kinds_part(table: Table, families: Sequence[str]) -> None:
    """Kinds beyond LoRA: exact, or refused with the reason."""
    print("\nOther kinds (fp16): largest difference of any factor, or why the format cannot hold them")

    def through(weights: AdapterWeights, family: str, format: str) -> str:
        info = family_info(family)
        with tempfile.TemporaryDirectory() as folder:
            path = place(Path(folder), format)
            try:
                write_adapter(file_of(weights, family), format, path, torch.float16, info)
            except AdapterFileError as error:
                return f"refused: {str(error).partition(': ')[2]}"
            proof, _ = prove(weights, OpenAdapter(path), torch.float16, info)
        return f"{proof.largest_difference:g}; {proof.num_modules} modules, {'+'.join(proof.read_by)}"

    for family in families:
        shapes = layers_of(family, "all")
        by_kind: dict[str, dict[ModuleKey, Update]] = {}
        for module, shape in shapes.items():
            for kind, update in kinds_of(shape).items():
                by_kind.setdefault(kind, {})[module] = update
        for kind, updates in by_kind.items():
            for format in written_formats():
                table.row(
                    f"{family} {kind} -> {format}",
                    lambda u=updates, n=family, f=format: through(AdapterWeights(u), n, f),
                )


def others_part(table: Table, families: Sequence[str]) -> None:
    """Generated files of others: what is read, written, merged and baked against float64 arithmetic."""
    print("\nFiles of others: largest error of an update, relative to its norm")
    for family in families:
        counts, failures, largest = other_files.run([family])
        errors = ", ".join(
            f"{name} {error:.1e} ({counts[f'checked {name}']}x)" for name, error in largest.items()
        )

        def result(n: int = counts["files"], e: str = errors, f: Sequence[str] = tuple(failures)) -> str:
            if f:
                raise AdapterFileError(f"{len(f)} of {n} files: {f[0]}")
            return f"{n} files; {e}"

        table.row(f"{family}: kinds x spellings x dimensions x alphas x formats", result)


PARTS: dict[str, Callable[[Table, Sequence[str]], None]] = {
    "formats": formats_part,
    "chains": chains_part,
    "spellings": spellings_part,
    "kinds": kinds_part,
    "others": others_part,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the matrix; return 1 if anything differs by more than rounding."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--family", action="append", choices=list(FAMILIES), help="one of them; may be repeated"
    )
    parser.add_argument("--part", action="append", choices=list(PARTS), help="may be repeated")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    started, table = time.perf_counter(), Table()
    for part in options.part or PARTS:
        PARTS[part](table, options.family or list(FAMILIES))
    print(f"\n{table.num_rows} rows, {table.num_failures} failures, {time.perf_counter() - started:.0f} s")
    return 1 if table.num_failures else 0


if __name__ == "__main__":
    sys.exit(main())
