"""How strongly each module of an adapter counts: by component, and by block of the U-Net or text encoder.

A block is named by a component (``text_encoder_2``), by the start of a module's path
(``down_blocks.1``, ``unet.up_blocks.0.attentions.1``, ``text_model.encoder.layers.3``), or as WebUI's
block-weight extensions do: ``BASE`` for the text encoders, ``IN00`` to ``IN11``, ``MID`` and ``OUT00`` to
``OUT11`` for the blocks of the original U-Net code. The longest name that fits a module counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..adapters.canonical import AdapterWeights, ModuleKey
from ..adapters.strength import Strength, strength_of
from ..errors import ConfigError
from ..families.facts import is_text_encoder
from ..families.table import component_names
from ..formats import names

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_WEBUI_BLOCK = re.compile(r"BASE|IN\d\d|M00|MID|OUT\d\d")
_LDM_BLOCKS = {"input_blocks": "IN", "output_blocks": "OUT", "middle_block": "MID"}


@dataclass(frozen=True)
class ModuleStrength:
    """The strength of every module of one adapter.

    Attributes:
        strength: for all components, or by component (missing ones count as 0).
        blocks: block name -> factor on top; modules in no named block have factor 1.
    """

    strength: Strength = 1.0
    blocks: Mapping[str, float] = field(default_factory=dict)

    def of(self, module: ModuleKey) -> float:
        """Return the strength of a module."""
        fitting = [name for name in self.blocks if is_in_block(module, name)]
        factor = self.blocks[max(fitting, key=len)] if fitting else 1.0
        return strength_of(self.strength, module.component) * factor


def check_blocks(adapters: Sequence[tuple[AdapterWeights, ModuleStrength]]) -> None:
    """Check that every named block holds a module of an adapter it is for, so that no setting is ignored.

    Raises:
        ConfigError: naming the block that does not, and some that do.
    """
    for name in sorted({name for _, strength in adapters for name in strength.blocks}):
        meant = [weights for weights, strength in adapters if name in strength.blocks]
        if not any(is_in_block(module, name) for weights in meant for module in weights.updates):
            known = sorted({block_of(module) for weights in meant for module in weights.updates})
            raise ConfigError(
                f"--block {name}: the adapter has no module there; it has {', '.join(known[:12])}"
                + (" and more" if len(known) > 12 else "")
            )


def is_in_block(module: ModuleKey, name: str) -> bool:
    """Tell whether a block name covers a module."""
    if _WEBUI_BLOCK.fullmatch(name):
        return webui_block(module) == ("MID" if name == "M00" else name)
    whole = f"{module.component}.{module.path}."
    inner = f"{module.component}.{module.path.removeprefix(names.TEXT_PREFIX)}."
    return (
        whole.startswith(f"{name}.")
        or inner.startswith(f"{name}.")
        or f"{module.path}.".startswith(f"{name}.")
    )


def webui_block(module: ModuleKey) -> str | None:
    """Return a module's block as WebUI's extensions number it; None for modules that they do not number."""
    if is_text_encoder(module.component):
        return "BASE"
    path = names.to_ldm(module.path)
    if path is None:
        return None
    root, _, rest = path.partition(".")
    kind = _LDM_BLOCKS.get(root)
    return kind if kind in (None, "MID") else f"{kind}{int(rest.split('.', 1)[0]):02d}"


def block_of(module: ModuleKey) -> str:
    """Return the block a module is shown under: two steps of its path below the component."""
    parts = module.path.removeprefix(names.TEXT_PREFIX).split(".")
    if is_text_encoder(module.component):
        return f"{module.component}.{'.'.join(parts[1:3] if parts[0] == 'encoder' else parts[:1])}"
    if parts[0] in ("down_blocks", "up_blocks"):
        return ".".join(parts[:4])
    return ".".join(parts[:3]) if parts[0] == "mid_block" else parts[0]


def parse_blocks(texts: Sequence[str], num_adapters: int) -> list[dict[str, float]]:
    """Return {block: factor} for each adapter, of texts like ``IN04=0.5,OUT05=0`` or ``2:up_blocks.1=0.3``.

    A number and a colon in front mean that adapter alone (counted from 1), otherwise all of them.

    Raises:
        ConfigError: for a text that is not of this form, an unknown adapter, or a block named twice.
    """
    by_adapter: list[dict[str, float]] = [{} for _ in range(num_adapters)]
    for text in texts:
        head, colon, rest = text.partition(":")
        if colon and not (head.isdigit() and 1 <= int(head) <= num_adapters):
            raise ConfigError(
                f"--block {text}: `{head}` is not an adapter; give its number, 1 to {num_adapters}, or none"
            )
        chosen: Iterable[dict[str, float]] = [by_adapter[int(head) - 1]] if colon else by_adapter
        for part in (rest if colon else text).split(","):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not name or not equals or not _NUMBER.fullmatch(value):
                raise ConfigError(
                    f"--block {text}: `{part}` is not BLOCK=WEIGHT; give e.g. IN04=0.5 or up_blocks.1=0.3"
                )
            for blocks in chosen:
                if name in blocks:
                    raise ConfigError(f"--block {text}: `{name}` has a weight already; name each block once")
                blocks[name] = float(value)
    return by_adapter


def component_strengths(strength: Strength) -> dict[str, float]:
    """Return {component: strength} for all components."""
    return {component: strength_of(strength, component) for component in component_names()}
