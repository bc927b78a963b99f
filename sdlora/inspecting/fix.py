"""Mending what is safe in an adapter's file: into a new file, with a proof that no update changed.

Safe is what says the same in another way: dimensions of factors, alphas, spellings of names, the header's
entries that follow from the tensors. Whatever would change an update is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..adapters.canonical import AdapterFile
from ..errors import ConfigError
from ..families.facts import FamilyInfo
from ..formats import dropping
from ..formats.adapter_files import OpenAdapter
from ..formats.base_shapes import BaseShapes
from ..formats.clients import Support
from ..formats.detection import known_family
from ..formats.folding import own_dtype
from ..formats.proof import write_proven
from ..formats.table import written_formats
from ..number_formats import dtype_name
from ..surgery.sources import check_target
from ..tensor_file import FP8_DTYPES


@dataclass(frozen=True)
class Fix:
    """What was mended.

    Attributes:
        file: the new file; None where nothing was to be mended.
        mended: what, for people.
        proof: the comparison with the old file, in one line.
        clients: what each program makes of the new file.
    """

    file: Path | None
    mended: tuple[str, ...]
    proof: str = ""
    clients: tuple[Support, ...] = ()


def fix_adapter(path: Path, target: Path, *, overwrite: bool = False) -> Fix:
    """Write a mended copy of an adapter's file.

    Args:
        path: the file or folder.
        target: the new one.
        overwrite: replace what is there.

    Raises:
        AdapterFileError: when it cannot be read, or its family is not known.
        OutputError: when the place is taken, is the file itself, or cannot be written.
    """
    opened = OpenAdapter(path)
    adapter = opened.read()
    info = known_family(path, adapter.info.family)
    format = opened.format if opened.format in written_formats() else "webui"
    if len(opened.keys.spellings) > 1:
        format = "webui"
    mended = _wrong(opened, adapter, info, format)
    if not mended:
        return Fix(None, ())
    check_target(target, format, overwrite, [path])
    dtype = own_dtype(adapter.weights)
    adapter = replace(adapter, info=replace(adapter.info, name=target.stem))
    written = write_proven(adapter, format, target, dtype, info)
    proof = written.proof
    if proof is None:
        raise ConfigError(f"{target}: was not proven; please report this")
    line = (
        f"{proof.num_modules} modules read back by {' and '.join(proof.read_by)}, largest delta difference "
        f"{proof.largest_difference:.1e} in {dtype_name(dtype)}"
    )
    return Fix(target, tuple(mended), line, written.clients)


def _wrong(opened: OpenAdapter, adapter: AdapterFile, info: FamilyInfo, format: str) -> list[str]:
    """Return what is to be mended, for people."""
    outline, problems = opened.outline, []
    shapes = BaseShapes.of_adapter(outline.weights, info.name)
    turned = shapes.stored_otherwise(outline.weights)
    if turned:
        problems.append(f"{len(turned)} layers: factors in the layer's own number of dimensions")
    if len(opened.keys.spellings) > 1 or format != opened.format:
        spellings = " and ".join(opened.keys.spellings)
        problems.append(f"names in {spellings} spelling: all in that of {format}")
    elif opened.format == "webui" and opened.keys.mixes_block_names:
        problems.append("blocks in two namings: all in that of the family")
    parsed = [key for key in opened.keys.parsed.values() if key is not None]
    alphas = {key.module for key in parsed if key.part in ("alpha", "scale")}
    ranked = {key for key, update in adapter.weights.updates.items() if update.has_rank}
    if format == "webui" and alphas and ranked - alphas:
        problems.append(f"{len(ranked - alphas)} layers beside others: the alpha that they lack")
    if any(key.part == "scale" for key in parsed):
        problems.append("`scale` entries: alphas, which every program knows")
    zero = [key for key in ranked if adapter.weights.updates[key].alpha == 0.0]
    if zero:
        problems.append(f"{len(zero)} layers of alpha 0: zero by their factors, as programs differ about it")
    if any(spec.dtype in FP8_DTYPES for header in opened.headers for spec in header.tensors.values()):
        problems.append("fp8 values: in a format that all programs read")
    problems += dropping.stray_notes(opened.path, adapter)
    return problems + _wrong_entries(opened, info, format)


def _wrong_entries(opened: OpenAdapter, info: FamilyInfo, format: str) -> list[str]:
    """Return the header's entries that are missing or say something else than the tensors."""
    entries, words = opened.outline.info.metadata, info.header
    problems = []
    if entries.get("ss_base_model_version") not in words.versions:
        problems.append(f"header: `ss_base_model_version` is {words.version}")
    if entries.get("ss_v2", "False") != str(words.is_v2):
        problems.append(f"header: `ss_v2` is {words.is_v2}")
    if entries.get("modelspec.architecture", words.architecture) not in words.architectures:
        problems.append(f"header: `modelspec.architecture` is {words.architecture}")
    stated = entries.get("sshs_model_hash")
    if stated is not None and format == opened.format and stated != opened.data_hash():
        problems.append("header: `sshs_model_hash` is that of the tensors")
    return problems
