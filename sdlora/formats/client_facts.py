"""What the rules about other programs look at of a file, and their verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ..adapters.canonical import AdapterWeights, ModuleKey
from ..families.facts import FamilyInfo, is_text_encoder
from ..families.layer_shapes import Shape
from ..families.table import family_info
from .base_shapes import BaseShapes
from .keys import FileKeys, ParsedKey
from .programs import PROGRAMS, is_known


@dataclass(frozen=True)
class Support:
    """How one client reads a file.

    Attributes:
        client: one of :data:`sdlora.formats.clients.CLIENTS`.
        full: whether every layer acts, at the right scale.
        reasons: why not.
        hint: another obstacle for its users, if there is one.
    """

    client: str
    full: bool
    reasons: tuple[str, ...] = ()
    hint: str = ""


@dataclass(frozen=True)
class Facts:
    """The facts about a file that the rules need.

    Attributes:
        format: a key of :data:`sdlora.formats.table.FORMATS`.
        family: ``sd1``, ``sd2``, ``sdxl`` or None.
        weights: the adapter in it, with the alphas that the file itself holds.
        file_keys: its keys.
        entries: the header's text entries, if they are known.
        base: the shapes of the base's layers, where they are known better than by the family.
    """

    format: str
    family: str | None
    weights: AdapterWeights
    file_keys: FileKeys
    entries: Mapping[str, str] | None
    base: BaseShapes | None = None

    @cached_property
    def shapes(self) -> BaseShapes:
        """The shapes of the base that it is for."""
        return self.base or BaseShapes.of_adapter(self.weights, self.family)

    @cached_property
    def misfits(self) -> Mapping[ModuleKey, tuple[Shape, Shape]]:
        """The plain pairs that are stored in another shape than their layer's: (has, wanted)."""
        return self.shapes.stored_otherwise(self.weights)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys as they are spelled."""
        return self.file_keys.names

    @property
    def info(self) -> FamilyInfo | None:
        """What the family declares."""
        return None if self.family is None else family_info(self.family)

    @property
    def original_names(self) -> bool:
        """Whether WebUI files of the family have the original U-Net's block names."""
        return self.info is not None and self.info.denoiser.webui_names == "ldm"

    @property
    def open_clip(self) -> str:
        """The text encoder that checkpoints keep in OpenCLIP's layout, if there is one."""
        encoders = self.info.text_encoders if self.info else ()
        return next((facts.component for facts in encoders if facts.checkpoint_layout == "openclip"), "")

    @property
    def denoiser(self) -> str:
        """The component that is not a text encoder, if it has modules."""
        return next((name for name in self.weights.components() if not is_text_encoder(name)), "")

    def unknown_to(self, client: str) -> dict[str, ParsedKey]:
        """Return the keys whose module or factor a client's loader does not find, by the names they have."""
        program = PROGRAMS[client]
        return {
            key: parsed
            for key, parsed in self.file_keys.parsed.items()
            if parsed is not None and not is_known(program, key, parsed)
        }

    def with_alpha(self) -> list[ModuleKey]:
        """Return the modules that have their own alpha."""
        parsed = self.file_keys.parsed.values()
        return [key.module for key in parsed if key is not None and key.part == "alpha"]

    def any_key(self, *starts: str) -> bool:
        return any(key.startswith(starts) for key in self.keys)

    def any_end(self, end: str) -> bool:
        return any(key.endswith(end) for key in self.keys)

    def any_part(self, *parts: str) -> bool:
        return any(part in key for key in self.keys for part in parts)

    @property
    def scaled_rank_one(self) -> bool:
        """Whether some module of rank 1 has its own alpha."""
        updates = [self.weights.updates[module] for module in self.with_alpha()]
        return any(update.has_rank and update.rank == 1 for update in updates)

    @property
    def ldm_names(self) -> bool:
        return self.any_key("lora_unet_input_blocks", "lora_unet_middle_block", "lora_unet_output_blocks")

    @property
    def diffusers_names(self) -> bool:
        return self.any_key("lora_unet_down_blocks", "lora_unet_mid_block", "lora_unet_up_blocks")
