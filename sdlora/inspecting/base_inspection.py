"""What a base model is, for people and scripts, from its header or configs alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AdapterFileError
from ..families.loading import is_hub_id, locate
from ..families.recognition import Recognised, is_checkpoint, recognise
from ..families.table import family_info
from ..tensor_file import read_header


@dataclass(frozen=True)
class BaseSummary:
    """A recognised base and how to show it."""

    found: Recognised

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        found = self.found
        return {
            "kind": "base",
            "path": str(found.path),
            "layout": found.layout,
            "family": found.family,
            "families": {one.where: one.value for one in found.families},
            "title": found.title,
            "prediction_types": {one.where: one.value for one in found.predictions},
            "zero_terminal_snr": {one.where: one.value for one in found.terminal_snr},
            "missing": list(found.missing),
            "formats": dict(found.formats or {}),
            "has_ema": found.has_ema,
            "num_bytes": found.num_bytes,
            "short_hash": found.short_hash,
            "stated_hash": found.stated_hash,
        }

    def render(self) -> str:
        """Return the facts as lines for people."""
        found = self.found
        predictions = "; ".join(f"{one.value} (says {one.where})" for one in found.predictions)
        rows = [
            ("base model", str(found.path)),
            ("family", f"{family_info(found.family).title} ({found.family}), by {found.families[0].where}"),
            ("title", found.title),
            ("layout", "one LDM-layout file" if found.layout == "file" else "diffusers folder"),
            ("predicts", predictions),
        ]
        rows += [
            ("but", f"{one.where} says {one.value}") for one in found.families if one.value != found.family
        ]
        if any(one.value for one in found.terminal_snr):
            said = "; ".join(f"{one.value} (says {one.where})" for one in found.terminal_snr)
            rows.append(("zero terminal SNR", said))
        if found.formats:
            rows.append(
                ("U-Net in", ", ".join(f"{name} {share:.0%}" for name, share in found.formats.items()))
            )
        rows.append(
            ("size", f"{found.num_bytes / 2**20:,.0f} MiB" + ("" if found.short_hash else " (U-Net)"))
        )
        if found.short_hash:
            rows.append(("short hash", found.short_hash))
        if found.stated_hash:
            rows.append(("stated SHA-256", found.stated_hash))
        if found.has_ema:
            rows.append(("also holds", "averaged (EMA) weights, which are not used"))
        if found.missing:
            rows.append(("lacks", " and ".join(found.missing)))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def is_base(source: str) -> bool:
    """Tell whether something given to ``inspect`` is a base model rather than an adapter."""
    path = Path(source).expanduser()
    if source == "mini" or (path / "model_index.json").is_file() or is_hub_id(source):
        return True
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return False
    try:
        return is_checkpoint(read_header(path))
    except AdapterFileError:
        return False


def inspect_base(source: str) -> BaseSummary:
    """Describe a base model without loading it, and without fetching it from the hub.

    Raises:
        ModelError: if it is none, by what it is instead.
    """
    return BaseSummary(recognise(locate(source, fetch=False)))
