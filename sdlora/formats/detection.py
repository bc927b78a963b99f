"""Which model family an adapter was made for: by its layers or, if they do not tell, by its header.

The families declare what distinguishes them (:class:`sdlora.families.facts.FamilyInfo`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ..adapters.canonical import AdapterWeights
from ..errors import AdapterFileError, ConfigError
from ..families.facts import FamilyInfo, is_text_encoder
from ..families.table import FAMILIES, family_info

_CONTEXT = (".attn2.to_k", ".attn2.to_v")
_TEXT_INPUTS = (".q_proj", ".k_proj", ".v_proj")


def detect_family(weights: AdapterWeights, metadata: Mapping[str, str]) -> str | None:
    """Return the name of a family or None; the layers take precedence over the header."""
    fitting = [
        family.info
        for family in FAMILIES.values()
        if all(component in family.info.components for component in weights.components())
    ]
    for told in (
        fitting if weights.updates else [],
        _by_denoiser(weights, fitting),
        _by_header(metadata),
        _by_text_encoder(weights, fitting),
    ):
        names = {info.name for info in told}
        if len(names) == 1:
            return names.pop()
    return None


def _by_denoiser(weights: AdapterWeights, fitting: list[FamilyInfo]) -> Iterator[FamilyInfo]:
    """Yield the family with such a width of cross-attention, or else those with such module paths."""
    updates = {key.path: update for key, update in weights.all_items() if not is_text_encoder(key.component)}
    widths = [u.shape[1] for path, u in updates.items() if path.endswith(_CONTEXT) and len(u.shape) > 1]
    known = {info.denoiser.context_width: info for info in fitting if info.denoiser.context_width}
    told = next((known[width] for width in widths if width in known), None)
    if told is not None:
        yield told
        return
    for info in fitting:
        mark = info.denoiser.module_path
        if mark and any(mark in path for path in updates):
            yield info


def _by_header(metadata: Mapping[str, str]) -> Iterator[FamilyInfo]:
    """Yield the family of the version that the header states, or else of the architecture."""
    version, architecture = (metadata.get(e, "") for e in ("ss_base_model_version", "modelspec.architecture"))
    infos = [family.info for family in FAMILIES.values()]
    stated = [info for info in infos if version.startswith(info.header.version_start)]
    yield from stated or (i for i in infos if architecture.startswith(i.header.architecture_start))


def _by_text_encoder(weights: AdapterWeights, fitting: list[FamilyInfo]) -> Iterator[FamilyInfo]:
    """Yield the families with text encoders of that width: 768 is that of both SD1 and SDXL's first one."""
    for info in fitting:
        for encoder in info.text_encoders:
            updates = weights.updates_of(encoder.component)
            widths = {
                update.shape[1]
                for path, update in updates.items()
                if path.endswith(_TEXT_INPUTS) and len(update.shape) > 1
            }
            if widths == {encoder.width}:
                yield info


def stated_family(
    where: Path, weights: AdapterWeights, detected: str | None, asked: str | None
) -> str | None:
    """Return the family of an adapter: what was found, or else what is asked for.

    Args:
        where: the adapter, for messages.
        weights: of it.
        detected: as :func:`detect_family` found it.
        asked: what the user says it is; None for nothing.

    Raises:
        ConfigError: for a family that there is not.
        AdapterFileError: when the adapter is of another one, or has parts that it has not.
    """
    if asked is None:
        return detected
    if asked not in FAMILIES:
        raise ConfigError(f"--family {asked}: no such family; there are {', '.join(FAMILIES)}")
    if detected not in (None, asked):
        raise AdapterFileError(
            f"{where}: its layers are those of {detected}, not of {asked}; leave --family out"
        )
    missing = [part for part in weights.components() if part not in family_info(asked).components]
    if missing:
        raise AdapterFileError(
            f"{where}: has layers of {', '.join(missing)}, which {family_info(asked).title} has not; give "
            "another --family"
        )
    return asked


def known_family(where: Path, family: str | None) -> FamilyInfo:
    """Return the family of an adapter that will be written.

    Args:
        where: the adapter, for messages.
        family: as :func:`detect_family` found it, or :func:`stated_family` took it.

    Raises:
        AdapterFileError: when it is unknown, or not one of this version's families.
    """
    if family is None:
        raise AdapterFileError(
            f"{where}: does not tell which base model it is for (no cross-attention layers, no header entry "
            f"`ss_base_model_version`); say it with --family, one of {', '.join(FAMILIES)}"
        )
    if family not in FAMILIES:
        raise AdapterFileError(
            f"{where}: is for the model family `{family}`, which this version cannot write; it knows "
            f"{', '.join(FAMILIES)}"
        )
    return family_info(family)
