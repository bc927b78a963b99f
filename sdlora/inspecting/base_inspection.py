"""What a base model is, for people and scripts, from its header or configs alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AdapterFileError
from ..families.locating import is_hub_id, locate
from ..families.recognition import Recognised, is_checkpoint, recognise
from ..families.table import family_info
from ..tensor_file import read_header


@dataclass(frozen=True)
class BaseSummary:
    """A recognised base and how to show it."""

    recognised: Recognised

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        recognised = self.recognised
        return {
            "kind": "base",
            "path": str(recognised.path),
            "layout": recognised.layout,
            "family": recognised.family,
            "families": {evidence.where: evidence.value for evidence in recognised.families},
            "title": recognised.title,
            "prediction_types": {evidence.where: evidence.value for evidence in recognised.predictions},
            "zero_terminal_snr": {evidence.where: evidence.value for evidence in recognised.terminal_snr},
            "missing": list(recognised.missing),
            "formats": dict(recognised.formats or {}),
            "has_ema": recognised.has_ema,
            "num_bytes": recognised.num_bytes,
            "short_hash": recognised.short_hash,
            "stated_hash": recognised.stated_hash,
        }

    def render(self) -> str:
        """Return the facts as lines for people."""
        recognised = self.recognised
        predictions = "; ".join(
            f"{evidence.value} (says {evidence.where})" for evidence in recognised.predictions
        )
        family = family_info(recognised.family).title
        rows = [
            ("base model", str(recognised.path)),
            ("family", f"{family} ({recognised.family}), by {recognised.families[0].where}"),
            ("title", recognised.title),
            ("layout", "one LDM-layout file" if recognised.layout == "file" else "diffusers folder"),
            ("predicts", predictions),
        ]
        rows += [
            ("but", f"{evidence.where} says {evidence.value}")
            for evidence in recognised.families
            if evidence.value != recognised.family
        ]
        if any(evidence.value for evidence in recognised.terminal_snr):
            statements = "; ".join(
                f"{evidence.value} (says {evidence.where})" for evidence in recognised.terminal_snr
            )
            rows.append(("zero terminal SNR", statements))
        if recognised.formats:
            rows.append(
                ("U-Net in", ", ".join(f"{name} {share:.0%}" for name, share in recognised.formats.items()))
            )
        rows.append(
            (
                "size",
                f"{recognised.num_bytes / 2**20:,.0f} MiB" + ("" if recognised.short_hash else " (U-Net)"),
            )
        )
        if recognised.short_hash:
            rows.append(("short hash", recognised.short_hash))
        if recognised.stated_hash:
            rows.append(("stated SHA-256", recognised.stated_hash))
        if recognised.has_ema:
            rows.append(("also holds", "averaged (EMA) weights, which are not used"))
        if recognised.missing:
            rows.append(("lacks", " and ".join(recognised.missing)))
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
        ModelError: if it is not a base model; the text says what it is instead.
    """
    return BaseSummary(recognise(locate(source, fetch=False)))
