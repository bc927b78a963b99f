"""Keys of LoRA files: which layer and which part of it each one names, in every spelling that is in use.

A key is a module name and a part of the module (``.lora_down.weight``). Both have several spellings, which
programs combine freely, so each is recognised by itself. Sources: formats.md 1, 4.1 and 5.4.

==========  ====================================================  ======================================
spelling    module names                                          written by
==========  ====================================================  ======================================
webui       ``lora_unet_*``, ``lora_te_*``, ``lora_te1_*``, ...   kohya and most trainers
diffusers   ``unet.*``, ``text_encoder.*``, bare U-Net names,     diffusers, old and new, and trainers
            with ``.processor.`` in old files                     built on it
comfyui     ``diffusion_model.*``, ``text_encoders.clip_l.*``     ComfyUI and tools that follow it
lycoris     ``lycoris_*`` in diffusers' U-Net names               SimpleTuner, LyCORIS' wrapper
==========  ====================================================  ======================================
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ..adapters.canonical import ModuleKey
from ..adapters.kinds.table import part_at_end, parts_beside
from ..errors import AdapterFileError
from ..families.facts import is_text_encoder
from ..families.table import component_names
from ..tensor_file import FLOAT_DTYPES, FP8_DTYPES, TensorSpec, is_scale_of_fp8
from . import foreign, names

_UNET = "unet"
WEBUI_PREFIXES = {
    "lora_unet_": _UNET,
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_COMFYUI_TEXT = re.compile(r"^(?:text_encoders\.)?clip_(?P<which>[lgh])\.(?:transformer\.)?(?P<path>.+)$")
_COMFYUI_UNET = re.compile(r"^(?:model\.)?diffusion_model\.(?P<path>.+)$")
_CLIP = {"l": "text_encoder", "h": "text_encoder", "g": "text_encoder_2"}

_SCALES = (".alpha", ".scale")
"""Parts that every kind may have: single numbers."""
EMBEDDING_START = "bundle_emb."
"""WebUI's spelling of embeddings inside an adapter's file."""
_NO_WEIGHTS = ("position_ids", "num_batches_tracked", "scaled_fp8", "logit_scale")
_OLD_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_UNET_START = (*names.UNET_ROOTS, "input_blocks", "middle_block", "output_blocks")


Groups = Mapping[ModuleKey, Mapping[str, str]]
"""Module -> part -> key."""


class ParsedKey(NamedTuple):
    """What a key says.

    Attributes:
        module: the layer.
        part: ``alpha``, ``scale``, or a part of some kind, see :class:`sdlora.adapters.kinds.kind.FilePart`.
        spelling: how the layer is spelled: ``webui``, ``diffusers``, ``comfyui`` or ``lycoris``.
    """

    module: ModuleKey
    part: str
    spelling: str


class ParsedName(NamedTuple):
    """What the module name of a key says: the layer, and how it is spelled."""

    module: ModuleKey
    spelling: str


def parse_key(key: str) -> ParsedKey | None:
    """Return the module and part that a key of a LoRA names, or None if the layer or its part is unknown."""
    if (split := part_at_end(key)) is not None and (name := parse_name(split[0])) is not None:
        module = name.module.bias if split[1].of_bias else name.module
        return ParsedKey(module, split[1].name, name.spelling)
    for scale in _SCALES:
        if key.endswith(scale) and (name := parse_name(key.removesuffix(scale))) is not None:
            return ParsedKey(name.module, scale.removeprefix("."), name.spelling)
    return None


def parse_name(name: str) -> ParsedName | None:
    """Return the layer that a module name of any spelling means, or None if there is no such layer."""
    for spelling, spelled in _SPELLINGS.items():
        module = spelled(name)
        if module is not None:
            return ParsedName(module, spelling)
    return None


class FileKeys:
    """The keys of one file, each parsed once, when this is first needed.

    Args:
        names: the keys.
        where: the file, for messages.
        specs: number format and shape of each, where they are known.
    """

    def __init__(
        self,
        names: Iterable[str],
        where: Path | str = "",
        specs: Mapping[str, TensorSpec] | None = None,
    ) -> None:
        self.names = tuple(names)
        self._where = where
        self._specs = specs or {}

    @cached_property
    def parsed(self) -> Mapping[str, ParsedKey | None]:
        """Key of a module -> what it says, None where that is not known."""
        known = set(self.names)
        parsed: dict[str, ParsedKey | None] = {}
        for key in self.names:
            if key.startswith(EMBEDDING_START) or is_scale_of_fp8(key, known):
                continue
            meaning = parse_key(key) or _beside(key, known)
            if meaning is None and self._is_stray(key):
                continue
            parsed[key] = meaning
        # an alpha whose layer is not there changes nothing; most programs pass over it
        used = {meaning.module.layer for meaning in parsed.values() if meaning and not _is_scale(meaning)}
        lone = [key for key, m in parsed.items() if m and _is_scale(m) and m.module.layer not in used]
        return {key: meaning for key, meaning in parsed.items() if key not in lone} if used else parsed

    @cached_property
    def embeddings(self) -> tuple[str, ...]:
        """The keys of textual-inversion embeddings that came with the adapter."""
        return tuple(key for key in self.names if key.startswith(EMBEDDING_START))

    @cached_property
    def stray(self) -> tuple[str, ...]:
        """The keys that hold no weight, such as ``position_ids``."""
        known = set(self.names)
        return tuple(
            key
            for key in self.names
            if key not in self.parsed and key not in self.embeddings and not is_scale_of_fp8(key, known)
        )

    @property
    def mixes_block_names(self) -> bool:
        """Whether the U-Net's blocks have diffusers' names in some keys and the original ones in others."""
        original = ("lora_unet_input_blocks", "lora_unet_middle_block", "lora_unet_output_blocks")
        renamed = ("lora_unet_down_blocks", "lora_unet_mid_block", "lora_unet_up_blocks")
        return all(any(key.startswith(start) for key in self.names) for start in (original, renamed))

    def _is_stray(self, key: str) -> bool:
        """Tell whether a key that names no layer's part is none of a weight: whole numbers, or one number."""
        if key.endswith(_NO_WEIGHTS):
            return True
        spec = self._specs.get(key)
        if spec is None or key.endswith(_SCALES):
            return False
        return spec.dtype not in (*FLOAT_DTYPES, *FP8_DTYPES) or spec.shape in ((), (1,))

    @cached_property
    def spellings(self) -> Mapping[str, int]:
        """Spelling of layers -> keys with it, the most frequent first."""
        counts = Counter(parsed.spelling for parsed in self.parsed.values() if parsed is not None)
        return {spelling: counts[spelling] for spelling in sorted(counts, key=lambda s: (-counts[s], s))}

    @cached_property
    def groups(self) -> Groups:
        """The key of every part of every module.

        Raises:
            AdapterFileError: listing the keys that name no known layer, or naming a part that occurs twice.
        """
        groups: dict[ModuleKey, dict[str, str]] = {}
        for key, parsed in self.parsed.items():
            if parsed is None:
                continue
            group = groups.setdefault(parsed.module, {})
            if parsed.part in group:
                first, other = (part_at_end(name) for name in (group[parsed.part], key))
                is_named_alike = first is not None and other is not None and first[0] == other[0]
                why = (
                    "these are two adapters, save one of them alone"
                    if is_named_alike
                    else "the file mixes two namings, export it again"
                )
                raise AdapterFileError(
                    f"{self._where}: module `{parsed.module.component}.{parsed.module.path}` is there twice "
                    f"({foreign.listing([group[parsed.part], key])}); {why}"
                )
            group[parsed.part] = key
        unknown = [key for key, parsed in self.parsed.items() if parsed is None]
        if unknown:
            raise foreign.unknown_keys(Path(self._where), unknown)
        return groups


def _is_scale(parsed: ParsedKey) -> bool:
    return f".{parsed.part}" in _SCALES


def _beside(key: str, known: Container[str]) -> ParsedKey | None:
    """Return what a key says that means something only beside another one of its module."""
    for part in parts_beside():
        stem = re.sub(part.spelling, "", key)
        if stem != key and stem + part.beside in known and (name := parse_name(stem)) is not None:
            return ParsedKey(name.module, part.name, name.spelling)
    return None


def webui_module(name: str) -> ModuleKey | None:
    """Return the layer that a name in WebUI's spelling means, with either naming of the U-Net's blocks."""
    for prefix, component in WEBUI_PREFIXES.items():
        if name.startswith(prefix):
            # diffusers' own conversion to these names leaves the last dots of a DoRA's magnitudes
            path = names.to_dots(name.removeprefix(prefix).replace(".", "_"))
            if path is None:
                return None
            if component == _UNET:
                return _unet(path)
            if path.split(".", 1)[0] in _UNET_START:
                return None
            return ModuleKey(component, names.with_text_prefix(path))
    return None


def _lycoris_module(name: str) -> ModuleKey | None:
    if not name.startswith("lycoris_"):
        return None
    path = names.to_dots(name.removeprefix("lycoris_"))
    return None if path is None else _unet(path)


def _comfyui_module(name: str) -> ModuleKey | None:
    if match := _COMFYUI_UNET.match(name):
        return _unet(_current(match["path"]))
    if match := _COMFYUI_TEXT.match(name):
        return ModuleKey(_CLIP[match["which"]], names.with_text_prefix(match["path"]))
    return None


def _diffusers_module(name: str) -> ModuleKey | None:
    component, _, path = name.partition(".")
    if component not in component_names():
        if component not in _UNET_START or not path:
            return None
        component, path = _UNET, name
    if not path:
        return None
    if component == _UNET:
        return _unet(_current(path))
    if not is_text_encoder(component):
        return ModuleKey(component, path)
    parent, _, last = path.rpartition(".")
    # the oldest files name text projections like the U-Net's: `...self_attn.to_q_lora.down.weight`
    path = f"{parent}.{_OLD_TEXT_NAMES[last]}" if last in _OLD_TEXT_NAMES else path
    return ModuleKey(component, names.with_text_prefix(path))


def _unet(path: str) -> ModuleKey | None:
    canonical = names.from_ldm(path) if names.is_ldm(path) else path
    if canonical is None or canonical.split(".", 1)[0] not in names.UNET_ROOTS:
        return None
    return ModuleKey(_UNET, canonical)


def _current(path: str) -> str:
    """Return the present name of a dotted U-Net path, which may have that of attention processors."""
    path = path.replace(".processor.", ".")
    return path + ".0" if path.endswith(".to_out") else path


_SPELLINGS: dict[str, Callable[[str], ModuleKey | None]] = {
    "webui": webui_module,
    "diffusers": _diffusers_module,
    "comfyui": _comfyui_module,
    "lycoris": _lycoris_module,
}
