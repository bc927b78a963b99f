"""PEFT folders: one for each component, with ``adapter_config.json`` beside the tensors.

Ranks and alphas that differ between modules go into ``rank_pattern`` and ``alpha_pattern`` under full
module names. Text encoders are named as the installed transformers names them (releases from 5.6 on have
no ``text_model.`` in ``CLIPTextModel``), since PEFT finds modules by name; reading takes both.
"""

from __future__ import annotations

import functools
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..adapters.canonical import AdapterFile, AdapterWeights, LowRankPair, ModuleKey, Update
from ..adapters.kinds.full import PEFT_BIAS
from ..adapters.kinds.ia3 import IA3
from ..adapters.kinds.kind import ADAPTER_NAME
from ..adapters.kinds.table import KINDS, file_parts, kind_of
from ..errors import AdapterFileError, OutputError, shown
from ..families.facts import is_text_encoder
from ..families.layer_shapes import has_bias
from ..families.table import component_names
from ..files import parse_json, replacing, write_json
from ..tensor_file import MAX_ENTRY_CHARS, PICKLE_SUFFIXES, Header, Load, write_tensors
from . import folding, foreign, kinds, metadata, names
from .clients import peft_reasons
from .format_code import FormatCode, ReadBack
from .keys import FileKeys, Groups
from .other_readers import TEXT_CLASSES, through_peft

if TYPE_CHECKING:
    from ..families.facts import FamilyInfo

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

_LITERAL_PATTERN = re.compile(r"^\^?[\w.\\-]+\$?$")
_BIAS = re.compile(rf"^{re.escape(PREFIX)}(?P<path>.+?){PEFT_BIAS.spelling}")
_OPEN_CLIP_WIDTH = 1280
"""Width of SDXL's second text encoder; no other encoder of these families has it."""


def encode(
    where: str, weights: AdapterWeights, component: str, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the settings of one component's folder.

    Raises:
        AdapterFileError: for what PEFT's settings cannot describe, or values too large for the format.
    """
    updates = weights.updates_of(component)
    spelled = {path: installed_name(component, path) for path in updates}  # those of biases are not used
    tensors: dict[str, Tensor] = {}
    if any(kind_of(update).peft is not None for update in updates.values()):
        settings = other_settings(f"{where}: {component}", updates, spelled)
        for path, update in updates.items():
            at = f"{where}: module `{component}.{path}`"
            for name, factor in update.tensors().items():
                tensors[f"{PREFIX}{spelled[path]}.{name}"] = folding.fitting(at, factor, dtype)
        return tensors, settings
    component_weights = AdapterWeights(
        {ModuleKey(component, path): update for path, update in updates.items()}
    )
    stored = kinds.as_low_rank(where, "PEFT", component_weights)
    pairs = stored.weights.component(component)
    for path, pair in pairs.items():
        at = f"{where}: module `{component}.{path}`"
        tensors[f"{PREFIX}{spelled[path]}.lora_A.weight"] = folding.fitting(at, pair.down, dtype)
        tensors[f"{PREFIX}{spelled[path]}.lora_B.weight"] = folding.fitting(at, pair.up, dtype)
        if (bias := stored.biases.get(ModuleKey(component, path))) is not None:
            value = folding.scaled(bias, 1.0 / pair.scale)  # PEFT multiplies it by the scale
            tensors[f"{PREFIX}{spelled[path]}.lora_B.bias"] = folding.fitting(at, value, dtype)
        if (magnitude := stored.magnitudes.get(ModuleKey(component, path))) is not None:
            name = f"{PREFIX}{spelled[path]}.lora_magnitude_vector"
            tensors[name] = folding.fitting(at, magnitude, torch.float32)
    settings = settings_of(pairs, spelled)
    settings |= {"use_dora": bool(stored.magnitudes), "lora_bias": bool(stored.biases)}
    return tensors, settings


def settings_of(
    pairs: Mapping[str, LowRankPair], spelled: Mapping[str, str], anchor: str = "^"
) -> dict[str, Any]:
    """Return the settings with which PEFT gives every module its rank and alpha.

    Args:
        pairs: by canonical path.
        spelled: canonical path -> name of the module in the model.
        anchor: what patterns start with; with ``^`` they match whole names only.
    """
    rank = int(folding.common(pair.rank for pair in pairs.values()))
    alpha = folding.common(pair.alpha for pair in pairs.values())
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted(spelled[path] for path in pairs),
        "rank_pattern": {
            f"{anchor}{spelled[path]}": pair.rank for path, pair in pairs.items() if pair.rank != rank
        },
        "alpha_pattern": {
            f"{anchor}{spelled[path]}": _plain(pair.alpha)
            for path, pair in pairs.items()
            if pair.alpha != alpha
        },
    }


def other_settings(where: str, updates: Mapping[str, Update], spelled: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings with which PEFT makes factors of these shapes, for kinds other than plain pairs.

    PEFT does not take the shapes of factors from a file: it makes factors from its settings, then loads
    values into them. So a folder can hold what those settings can describe; anything else is refused.

    Args:
        where: file and component, for messages.
        updates: by canonical path, all of one kind.
        spelled: canonical path -> name of the module in the model.

    Raises:
        AdapterFileError: for factors that PEFT's settings cannot describe.
    """
    (kind, *others) = {kind_of(update) for update in updates.values()}
    folder = kind.peft
    if others or folder is None:
        raise AdapterFileError(
            f"{where}: mixes kinds of layers, but a PEFT folder holds one kind; export as webui"
        )
    spatial = [update for update in updates.values() if update.shape[2:] not in ((), (1, 1))]
    cores = {core for update in spatial if (core := folder.core(update)) is not None}
    if len(cores) > 1:
        raise AdapterFileError(
            f"{where}: only some convolutions have Tucker factors, PEFT makes all or none; export as webui"
        )
    more = folder.more(where, updates)
    ranks = {path: folder.rank(update) for path, update in updates.items()}
    alphas = {path: _plain(folder.alpha(update)) for path, update in updates.items()}
    rank, alpha = int(folding.common(ranks.values())), _plain(folding.common(alphas.values()))
    return {
        "peft_type": kind.peft_type,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "alpha": alpha,
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        "use_effective_conv2d": True in cores,
        "target_modules": sorted(spelled[path] for path in updates),
        "rank_pattern": {f"^{spelled[path]}": value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{spelled[path]}": value for path, value in alphas.items() if value != alpha},
        **more,
    }


def read_modules(header: Header, groups: Groups, load: Load) -> Iterator[tuple[ModuleKey, Update]]:
    """Yield every module of one PEFT folder with its update, in sorted order, holding one at a time.

    Args:
        header: of the folder's tensors; the settings lie beside them.
        groups: the key of every part of every module.
        load: gives the tensor of a key.

    Raises:
        AdapterFileError: naming an incomplete module.
    """
    path = header.path
    config = read_config(path.with_name(CONFIG_FILE))
    kind = str(config.get("peft_type", "LORA"))
    types = dict.fromkeys(known.peft_type for known in KINDS.values() if known.peft_type)
    if kind not in types:
        raise AdapterFileError(
            f"{path.with_name(CONFIG_FILE)}: peft_type is `{shown(kind, 20)}`, not one of "
            f"{', '.join(types)}; convert it to a LoRA with PEFT"
        )
    if kind != "LORA":
        config = {**config, "lora_alpha": config.get("alpha", 8)}
    alphas = Alphas(str(path.with_name(CONFIG_FILE)), config)
    ranks = Alphas(
        str(path.with_name(CONFIG_FILE)),
        {"lora_alpha": config.get("r", 8), "alpha_pattern": config.get("rank_pattern")},
    )
    for module, parts in sorted(groups.items()):
        where = f"{path}: module `{module.component}.{module.path}`"
        tensors = {part: load(key) for part, key in parts.items()}
        folding.check_sides(where, tensors)
        rank = tensors["down"].shape[0] if "down" in tensors else 1
        scaled = alphas.of(where, ModuleKey(module.component, module.layer), rank)
        update = kinds.update_of(where, module, tensors, scaled)
        if "up_bias" in parts:
            layer = ModuleKey(module.component, module.layer)
            down = groups.get(layer, {}).get("down")
            if down is None:
                raise AdapterFileError(f"{where}: is a bias without its factors; export the adapter again")
            rank = header.tensors[down].shape[0] if header.tensors[down].shape else 1
            if not folding.is_zero(update):
                yield module, folding.times(update, alphas.of(where, layer, rank) / max(rank, 1))
            continue
        if kind_of(update).peft_type != kind:
            raise AdapterFileError(f"{where}: is not a {kind}, as its settings say; export the adapter again")
        if (folder := kind_of(update).peft) is not None:
            update = folder.rescaled(update, update.alpha / ranks.of(where, module, 1))
        yield module, update
        if isinstance(update, IA3) and not update.on_input and has_bias(module.path):
            yield module.bias, update.of_bias()  # PEFT scales all that a layer puts out


def group_keys(header: Header, keys: FileKeys) -> Groups:
    """Return the key of every part of every module; the component is the folder's name or follows from keys.

    Raises:
        AdapterFileError: listing keys that belong to no module, or naming a part that occurs twice.
    """
    part_names = {part.peft: part.name for part in file_parts().values() if part.peft is not None}
    factor = re.compile(  # the adapter's name may stand behind the part's
        rf"^base_model\.model\.(?P<path>.+?)\.(?P<part>{'|'.join(part_names)}){ADAPTER_NAME}(?:\.weight)?$"
    )
    parts_by_path: dict[str, dict[str, str]] = {}
    unknown: list[str] = []
    for key in keys.names:
        match = factor.match(key)
        if match is None and (bias := _BIAS.match(key)) is not None:
            parts_by_path.setdefault(f"{bias['path']}.bias", {})[PEFT_BIAS.name] = key
        elif match is None:
            unknown.append(key)
        elif (part := part_names[match["part"]]) in parts_by_path.setdefault(match["path"], {}):
            raise AdapterFileError(
                f"{header.path}: `{shown(match['path'])}` has two adapters "
                f"({foreign.listing([parts_by_path[match['path']][part], key])}); save one of them alone"
            )
        else:
            parts_by_path[match["path"]][part] = key
    if unknown:
        if _saves_more(header.path.with_name(CONFIG_FILE)):
            raise foreign.unsupported(header.path, foreign.WHOLE_LAYERS, foreign.PEFT_MERGES, unknown)
        raise foreign.unknown_keys(header.path, unknown)
    folder = header.path.parent.name
    component = folder if folder in component_names() else _component_of(header, parts_by_path)
    groups: dict[ModuleKey, dict[str, str]] = {}
    for name, parts in parts_by_path.items():
        module = ModuleKey(component, names.canonical_path(component, name))
        if module in groups:
            raise AdapterFileError(
                f"{header.path}: module `{component}.{shown(name)}` is there twice, with and without "
                "`text_model.`; export it again"
            )
        groups[module] = parts
    return groups


def _saves_more(config: Path) -> bool:
    """Tell whether a folder's settings say that whole layers or biases of the base lie beside the factors."""
    settings = read_config(config)
    return bool(settings.get("modules_to_save")) or settings.get("bias", "none") != "none"


def read_config(path: Path) -> dict[str, Any]:
    """Read ``adapter_config.json``.

    Raises:
        AdapterFileError: when it is missing, too large or not a JSON object.
    """
    try:
        if path.stat().st_size > MAX_ENTRY_CHARS:
            raise AdapterFileError(
                f"{path}: is far too large for settings; get the adapter from another source"
            )
        tree = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterFileError(
            f"{path}: is missing, and PEFT keeps alpha there; put it beside {WEIGHTS_FILE}"
        ) from None
    except OSError as error:
        raise AdapterFileError(
            f"{path}: cannot be read ({error.strerror or error}); check its permissions"
        ) from None
    except ValueError as error:
        raise AdapterFileError(
            f"{path}: is not valid JSON ({shown(error)}); export the adapter again"
        ) from None
    if not isinstance(tree, dict):
        raise AdapterFileError(f"{path}: is not a JSON object; export the adapter again")
    return tree


class Alphas:
    """The alpha of every module by one component's settings, without trying the patterns one by one.

    PEFT tries ``(.*\\.)?PATTERN$`` for each pattern in turn. Only plain names are accepted here: a regular
    expression from a stranger's file can take for ever.
    """

    def __init__(self, where: str, config: Mapping[str, Any]) -> None:
        """Sort the patterns of settings.

        Raises:
            AdapterFileError: for patterns that are not a table of plain names.
        """
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise AdapterFileError(f"{where}: `alpha_pattern` is not a table; export the adapter again")
        self._config = config
        self._whole: dict[str, tuple[int, object]] = {}
        self._endings: dict[str, tuple[int, object]] = {}
        for number, (pattern, value) in enumerate(patterns.items()):
            if not _LITERAL_PATTERN.match(pattern):
                raise AdapterFileError(
                    f"{where}: `alpha_pattern` has the regular expression `{shown(pattern, 60)}`; "
                    "write full module names there"
                )
            literal = pattern.removeprefix("^").removesuffix("$").replace("\\", "")
            table = self._whole if pattern.startswith("^") else self._endings
            table.setdefault(literal, (number, value))

    def of(self, where: str, module: ModuleKey, rank: int) -> float:
        """Return the alpha with which alpha / rank is the scale that PEFT would use.

        rsLoRA scales by alpha / sqrt(rank) (Kalajdzievski 2023), so its alpha is multiplied by sqrt(rank).

        Raises:
            AdapterFileError: for a value that is not a finite number.
        """
        paths = {module.path}
        if is_text_encoder(module.component):
            paths.add(module.path.removeprefix(names.TEXT_PREFIX))
        candidates = [self._whole[path] for path in paths if path in self._whole]
        for path in paths:
            parts = path.split(".")
            endings = (".".join(parts[start:]) for start in range(len(parts)))
            candidates += [self._endings[ending] for ending in endings if ending in self._endings]
        usual = self._config.get("lora_alpha", 8)  # 8 is PEFT's own default
        alpha = min(candidates, key=lambda candidate: candidate[0])[1] if candidates else usual
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < 1e30:
            raise AdapterFileError(f"{where}: lora_alpha is `{shown(alpha, 20)}`; set it to a number")
        return float(alpha) * (math.sqrt(rank) if self._config.get("use_rslora") else 1.0)


def installed_name(component: str, path: str) -> str:
    """Return a canonical path as the installed diffusers and transformers name the module."""
    if not is_text_encoder(component) or _has_text_model(component):
        return path
    return path.removeprefix(names.TEXT_PREFIX)


@functools.cache
def _has_text_model(component: str) -> bool:
    """Tell whether the installed transformers nests this encoder in ``text_model``; builds a tiny one."""
    import transformers

    settings = transformers.CLIPTextConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.device("meta"):
        encoder = getattr(transformers, TEXT_CLASSES[component])(settings)
    return any(name.startswith(names.TEXT_PREFIX) for name, _ in encoder.named_modules())


def _component_of(header: Header, parts_by_path: Mapping[str, Mapping[str, str]]) -> str:
    """Return the component that modules belong to, by their names and, for text encoders, their width."""
    if any(path.split(".", 1)[0] in names.UNET_ROOTS for path in parts_by_path):
        return "unet"
    widths = {
        header.tensors[parts["down"]].shape[-1:]
        for path, parts in parts_by_path.items()
        if "down" in parts and path.endswith((".q_proj", ".k_proj", ".v_proj", ".fc1"))
    }
    return "text_encoder_2" if widths == {(_OPEN_CLIP_WIDTH,)} else "text_encoder"


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else value


def components_in(folder: Path) -> list[str]:
    """Return the components that have their own PEFT folder inside ``folder``."""
    return [name for name in component_names() if (folder / name / CONFIG_FILE).is_file()]


def tensor_files(path: Path) -> list[Path]:
    """Return the tensor files of a PEFT folder, one for each component; none for another folder.

    Raises:
        AdapterFileError: for a folder that has its weights only as a pickle.
    """
    folders = [path / component for component in components_in(path)] or [path]
    if not (folders[0] / CONFIG_FILE).is_file():
        return []
    for folder in folders:
        if not (folder / WEIGHTS_FILE).exists() and any(
            file.suffix in PICKLE_SUFFIXES for file in folder.iterdir()
        ):
            raise AdapterFileError(
                f"{folder}: has its weights only as a pickle (.bin), which can run code when opened; load it "
                f"with peft and save_pretrained(..., safe_serialization=True) to get {WEIGHTS_FILE}"
            )
    return [folder / WEIGHTS_FILE for folder in folders]


def write(adapter: AdapterFile, target: Path, dtype: torch.dtype, info: FamilyInfo) -> list[Path]:
    """Write a folder for each component, atomically, and return the files."""
    entries = metadata.for_file(adapter, info, {"format": "pt"})
    files: list[Path] = []
    with replacing(target) as folder:
        for component in adapter.weights.components():
            tensors, config = encode(str(target), adapter.weights, component, dtype)
            write_tensors(folder / component / WEIGHTS_FILE, tensors, entries)
            write_json(folder / component / CONFIG_FILE, config)
            files += [target / component / CONFIG_FILE, target / component / WEIGHTS_FILE]
        make_room(target)
    return files


def make_room(target: Path) -> None:
    """Make room for a folder, but only if nothing except a PEFT adapter would be lost.

    Raises:
        OutputError: when more would be lost.
    """
    if not target.exists():
        return
    ours = {target / c for c in component_names()} | {
        target / c / file for c in component_names() for file in (CONFIG_FILE, WEIGHTS_FILE)
    }
    if not target.is_dir() or set(target.rglob("*")) - ours:
        raise OutputError(
            f"{target}: exists and holds other files; nothing was overwritten. Choose another --output"
        )
    shutil.rmtree(target)


def _claims(keys: FileKeys) -> int:
    return len(keys.names) if any(key.startswith(PREFIX) for key in keys.names) else 0


CODE = FormatCode(
    write,
    _claims,
    group_keys,
    read_modules,
    peft_reasons,
    files=tensor_files,
    make_room=make_room,
    read_back=ReadBack("peft", through_peft),
)
