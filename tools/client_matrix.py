"""What diffusers and PEFT really do with generated files, against what sdlora says, reads and writes.

    python -m tools.client_matrix [--part claims|written|peft] [--family sd1] [--every 10]

``claims``: every file of :mod:`tools.other_files` goes into a real pipeline of the family's build (an eighth
as wide, few layers); whether it then computes what the file means must be what ``inspect`` says of diffusers.
``written``: each is converted to the diffusers format and to PEFT folders, which diffusers and PEFT load.
``peft``: folders that PEFT itself saves, of every kind and setting, are read as PEFT computes them. Then the
table of all programs by kind and by spelling, as ``inspect`` states it. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdlora.adapters.canonical import ModuleKey
from sdlora.errors import SdloraError
from sdlora.families.table import FAMILIES
from sdlora.formats import names
from sdlora.formats.adapter_files import read_adapter
from sdlora.inspecting.inspection import inspect_adapter
from sdlora.surgery.convert import convert_adapter
from tools import other_files, peft_folders
from tools.narrow_models import fresh, module_of, pipeline_of

_TOLERANCE = 5e-4


@dataclass
class Tally:
    """What was compared.

    Attributes:
        counts: what happened, how often.
        failures: what differed.
        table: (what, program) -> "full" or a reason -> how often.
    """

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    table: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)


def changes(models: Mapping[str, nn.Module]) -> dict[ModuleKey, Tensor]:
    """Return what PEFT's layers in some models do to the weights and biases, merged by PEFT itself."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    changed = {}
    for component, model in models.items():
        for path, layer in list(model.named_modules()):
            if not isinstance(layer, BaseTunerLayer):
                continue
            inner: Any = layer.get_base_layer()
            before = {name: value.detach().clone().double() for name, value in inner.named_parameters()}
            if any(value.is_meta for value in layer.parameters()):
                raise RuntimeError(f"{path} has no values")
            merging: Any = layer
            merging.merge()
            key = ModuleKey(component, names.canonical_path(component, path))
            for name, value in inner.named_parameters():
                delta = value.detach().double() - before[name]
                if name == "weight" or bool(delta.any()):
                    changed[key if name == "weight" else key.bias] = delta
            merging.unmerge()
    return changed


def difference(actual: Mapping[ModuleKey, Tensor], wanted: Mapping[ModuleKey, Tensor]) -> float:
    """Return the largest difference of an update, relative to it; infinite where a layer is left out."""
    largest = 0.0
    for key in {*actual, *wanted}:
        zero = torch.zeros(())
        first, second = actual.get(key, zero), wanted.get(key, zero)
        if first.ndim and second.ndim:  # else one is the zero of a layer that the other leaves out
            second = second.reshape(first.shape)
        error = float((first - second).norm())
        size = float(second.norm())
        if error > 1e-6:
            largest = max(largest, error / size if size > 1e-9 else float("inf"))
    return largest


class Loader:
    """A real pipeline that files go into, one after the other."""

    def __init__(self, family: str) -> None:
        self._family = family
        self._pristine = fresh(family)
        self.models = copy.deepcopy(self._pristine)

    def loaded(self, path: Path) -> dict[ModuleKey, Tensor] | None:
        """Return what diffusers makes of a file; None if it refuses it."""
        pipeline = pipeline_of(self._family, self.models)
        try:
            pipeline.load_lora_weights(str(path))
            computed = changes(self.models)
            for model in self.models.values():
                _check_computes(model)
        except (ValueError, LookupError, RuntimeError, TypeError, AttributeError, NotImplementedError):
            computed = None
        self.models = copy.deepcopy(self._pristine)
        return computed

    def loaded_by_peft(self, folder: Path) -> dict[ModuleKey, Tensor] | None:
        """Return what PEFT makes of the folders of an adapter; None if it refuses one."""
        from peft import PeftModel

        computed: dict[ModuleKey, Tensor] | None = {}
        for component in self.models:
            if not (folder / component).is_dir():
                continue
            try:
                model: Any = PeftModel.from_pretrained(self.models[component], str(folder / component))
                computed = {**(computed or {}), **changes({component: model.base_model.model})}
            except (ValueError, LookupError, RuntimeError, TypeError, AttributeError):
                computed = None
                break
        self.models = copy.deepcopy(self._pristine)
        return computed


def _check_computes(model: nn.Module) -> None:
    """Run each of PEFT's layers once, as some number formats load but compute nothing."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            weight: Any = layer.get_base_layer().weight
            layer(torch.zeros(1, weight.shape[1], *[4] * (weight.ndim - 2)))


def claims_part(tally: Tally, family: str, every: int) -> None:
    """Compare what is said of diffusers with what it does, over the matrix of files."""
    loader = Loader(family)
    with tempfile.TemporaryDirectory() as name:
        for case in itertools.islice(other_files.cases([family]), 0, None, every):
            path, references = other_files.written(case, Path(name))
            wanted = _wanted(loader, references)
            clients = {client.client: client for client in inspect_adapter(path).clients}
            for client, support in clients.items():
                claim = "full" if support.full else support.reasons[0]
                if case.spelling == "kohya":
                    tally.table.setdefault((f"kind {case.kind}", client), Counter())[claim] += 1
                if case.kind == "lora":
                    tally.table.setdefault((f"spelling {case.spelling}", client), Counter())[claim] += 1
            computed = loader.loaded(path)
            works = computed is not None and difference(computed, wanted) < _TOLERANCE
            tally.counts["claims about diffusers compared"] += 1
            tally.counts[f"of them, diffusers loads {'fully' if works else 'not fully'}"] += 1
            if works != clients["diffusers"].full:
                verdict = (
                    "refuses it" if computed is None else f"is off by {difference(computed, wanted):.1e}"
                )
                tally.failures.append(
                    f"{case}: diffusers {'loads it' if works else verdict}, but is said to "
                    f"{'load it fully' if clients['diffusers'].full else str(clients['diffusers'].reasons)}"
                )


def written_part(tally: Tally, family: str, every: int) -> None:
    """Convert the files to what diffusers and PEFT read, and compare what they then compute."""
    loader = Loader(family)
    cases = [case for case in other_files.cases([family]) if case.spelling == "kohya"]
    with tempfile.TemporaryDirectory() as name:
        for case in cases[::every]:
            path, references = other_files.written(case, Path(name))
            wanted = _wanted(loader, references)
            for format in ("diffusers", "peft"):
                target = Path(name) / ("folder" if format == "peft" else "new.safetensors")
                try:
                    convert_adapter(path, target, format=format, dtype="fp32", overwrite=True)
                except SdloraError as error:
                    reason = str(error).partition("`: ")[2] or str(error).partition(" is ")[2]
                    tally.table.setdefault((f"write {case.kind}", format), Counter())[reason[:90]] += 1
                    tally.counts[f"not written as {format}: no place for the kind"] += 1
                    continue
                computed = loader.loaded(target) if format == "diffusers" else loader.loaded_by_peft(target)
                error_of = float("inf") if computed is None else difference(computed, wanted)
                tally.counts[f"written as {format} and loaded there"] += 1
                tally.table.setdefault((f"write {case.kind}", format), Counter())["full"] += 1
                if error_of >= _TOLERANCE:
                    tally.failures.append(f"{case} as {format}: off by {error_of:.1e}")


def peft_part(tally: Tally, family: str, every: int) -> None:
    """Read folders that PEFT itself made, and compare with what PEFT computes."""
    pristine = fresh(family)
    settings = [*itertools.product(pristine, peft_folders.SETTINGS, (torch.float32, torch.bfloat16))]
    with tempfile.TemporaryDirectory() as name:
        for number, (component, (title, config), dtype) in enumerate(settings[::every]):
            folder = Path(name) / str(number) / component
            model = peft_folders.saved(copy.deepcopy(pristine[component]), config, dtype, folder)
            wanted = changes({component: model.base_model.model})
            tally.counts["folders of PEFT read"] += 1
            where = f"{family} {component}, {title}, {dtype}"
            try:
                adapter = read_adapter(folder)
                computed = {
                    key: update.delta(_parameter(pristine, key)).double()
                    for key, update in adapter.weights.updates.items()
                }
            except SdloraError as error:
                tally.table.setdefault((f"PEFT's {title}", "sdlora"), Counter())[str(error)[-90:]] += 1
                if not title.startswith("refused: "):
                    tally.failures.append(f"{where}: {error}")
                continue
            tally.table.setdefault((f"PEFT's {title}", "sdlora"), Counter())["full"] += 1
            error_of = difference(computed, wanted)
            if error_of >= (_TOLERANCE if dtype == torch.float32 else 2e-2):
                tally.failures.append(f"{where}: read with an error of {error_of:.1e}")


def _wanted(loader: Loader, references: Mapping[ModuleKey, Any]) -> dict[ModuleKey, Tensor]:
    return {
        key: delta(module_of(loader.models, key).weight.detach()).double()
        for key, ((_, delta), _) in references.items()
    }


def _parameter(models: Mapping[str, nn.Module], key: ModuleKey) -> Tensor:
    parameter: Tensor = getattr(module_of(models, key), key.parameter)
    return parameter.detach()


PARTS: dict[str, Callable[[Tally, str, int], None]] = {
    "claims": claims_part,
    "written": written_part,
    "peft": peft_part,
}


def show(tally: Tally, seconds: float) -> None:
    """Print counts, the table and what differs."""
    for what, count in sorted(tally.counts.items()):
        print(f"{count:7} {what}")
    for (what, client), claims in sorted(tally.table.items()):
        total = sum(claims.values())
        full = claims.pop("full", 0)
        reason = "; ".join(text for text, _ in claims.most_common(2))
        print(f"{what:<22} {client:<20} {full:>4} of {total:<4} fully  {reason}")
    for failure in tally.failures:
        print("DIFFERS", failure)
    print(f"{len(tally.failures)} differences, {seconds:.0f} s")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; return 1 if anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", action="append", choices=list(FAMILIES))
    parser.add_argument("--part", action="append", choices=list(PARTS))
    parser.add_argument("--every", type=int, default=1, help="only every so many files")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    started, tally = time.perf_counter(), Tally()
    for part in options.part or PARTS:
        for family in options.family or list(FAMILIES):
            PARTS[part](tally, family, options.every)
    show(tally, time.perf_counter() - started)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
