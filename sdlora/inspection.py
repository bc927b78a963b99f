"""What an adapter file holds: layers, ranks, sizes of the updates, training, and who can load it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import formats
from .adapters.base import AdapterWeights, LowRankPair, Update
from .adapters.kinds import TITLES, DoRA, LoHa, LoKr, TuckerPair
from .errors import ConfigError
from .formats.clients import Support, client_support
from .formats.detection import detect_family
from .formats.editing import edit_header
from .tensor_file import DTYPE_NAMES, Header, data_sha256, shown

_SETTINGS = {
    "ss_steps": "steps",
    "ss_num_epochs": "epochs",
    "ss_num_train_images": "pictures per epoch",
    "ss_resolution": "resolution",
    "ss_learning_rate": "learning rate",
    "ss_text_encoder_lr": "text encoder learning rate",
    "ss_optimizer": "optimizer",
    "ss_lr_scheduler": "schedule",
    "ss_total_batch_size": "batch size",
    "ss_mixed_precision": "precision",
    "ss_min_snr_gamma": "min-SNR gamma",
    "ss_noise_offset": "noise offset",
    "ss_clip_skip": "clip skip",
    "ss_seed": "seed",
    "sdlora.final_loss": "final loss",
    "sdlora.validation_loss": "validation loss",
    "modelspec.date": "date",
    "modelspec.license": "licence",
}
_DTYPE_WORDS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F64": "fp64"}
_UNET_BLOCK = re.compile(
    r"^(?:(down|up)_blocks\.(\d+)\.(attentions|resnets|downsamplers|upsamplers)|mid_block)"
)
_TEXT_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
_BAR = 24


@dataclass(frozen=True)
class BlockNorm:
    """Size of the updates in one block.

    Attributes:
        component: e.g. ``unet``.
        block: e.g. ``down_blocks.0.attentions``.
        num_modules: adapted layers in it.
        norm: Frobenius norm of all their updates together.
    """

    component: str
    block: str
    num_modules: int
    norm: float


@dataclass(frozen=True)
class AdapterSummary:
    """Everything :func:`inspect_adapter` found out.

    Attributes:
        path: the file or folder.
        format: key of :data:`sdlora.formats.FORMATS`.
        family: ``sd1``, ``sd2``, ``sdxl`` or None.
        name: what prompts call it.
        base: the base it was trained on, by its header.
        num_bytes: size of the file or files.
        num_keys: tensors.
        modules: component -> adapted layers.
        kinds: kind of update, a key of :data:`sdlora.adapters.kinds.TITLES` -> layers.
        ranks: rank -> layers.
        alphas: alpha -> layers.
        dtypes: number format -> tensors.
        trigger_words: words that call the style.
        tags: the most frequent tags or captions of the training pictures.
        settings: training settings by their usual name.
        model_hash: SHA-256 of the tensor data.
        hash_matches: whether the header's own hash agrees; None if it has none.
        blocks: size of the updates by block.
        clients: which programs load it fully.
    """

    path: Path
    format: str
    family: str | None
    name: str
    base: str | None
    num_bytes: int
    num_keys: int
    modules: Mapping[str, int]
    kinds: Mapping[str, int]
    ranks: Mapping[int, int]
    alphas: Mapping[float, int]
    dtypes: Mapping[str, int]
    trigger_words: tuple[str, ...]
    tags: tuple[tuple[str, int], ...]
    settings: Mapping[str, str]
    model_hash: str
    hash_matches: bool | None
    blocks: tuple[BlockNorm, ...]
    clients: tuple[Support, ...]

    def to_dict(self) -> dict[str, object]:
        """Return everything as JSON values."""
        return {
            "path": str(self.path),
            "format": self.format,
            "family": self.family,
            "name": self.name,
            "base": self.base,
            "num_bytes": self.num_bytes,
            "num_keys": self.num_keys,
            "num_modules": sum(self.modules.values()),
            "modules": dict(self.modules),
            "kinds": dict(self.kinds),
            "ranks": {str(rank): count for rank, count in self.ranks.items()},
            "alphas": {f"{alpha:g}": count for alpha, count in self.alphas.items()},
            "dtypes": dict(self.dtypes),
            "trigger_words": list(self.trigger_words),
            "tags": [list(tag) for tag in self.tags],
            "settings": dict(self.settings),
            "model_hash": self.model_hash,
            "short_hash": self.model_hash[:12],
            "hash_matches": self.hash_matches,
            "blocks": [
                {"component": b.component, "block": b.block, "num_modules": b.num_modules, "norm": b.norm}
                for b in self.blocks
            ],
            "clients": {c.client: {"full": c.full, "reasons": list(c.reasons)} for c in self.clients},
        }

    def render(self) -> str:
        """Return the summary as text for a terminal."""
        layers = ", ".join(f"{count} in {component}" for component, count in self.modules.items())
        hash_note = {True: "", False: " (the header says another!)", None: ""}[self.hash_matches]
        rows = [
            ("file", f"{self.path} ({_size(self.num_bytes)})"),
            (
                "format",
                f"{formats.READERS[self.format].title}, {self.num_keys} tensors, {_counts(self.dtypes)}",
            ),
            ("family", self.family or "not told by the file"),
            ("name", self.name),
            ("base", self.base or "not told by the file"),
            ("kind", _counts({TITLES[kind]: count for kind, count in self.kinds.items()})),
            ("layers", layers),
            ("rank", _counts(self.ranks)),
            ("alpha", _counts({f"{alpha:g}": count for alpha, count in self.alphas.items()})),
            ("trigger words", ", ".join(self.trigger_words) or "none recorded"),
            ("tags", ", ".join(f"{tag} ({count})" for tag, count in self.tags[:8]) or "none recorded"),
            ("hash", f"{self.model_hash[:12]}{hash_note}"),
        ]
        lines = _table([(label, shown(text, 200)) for label, text in rows])
        if self.settings:
            lines += [
                "",
                "training",
                *_table([(k, shown(v, 120)) for k, v in self.settings.items()], indent=2),
            ]
        lines += ["", "size of the update by block (Frobenius norm)", *self._chart()]
        lines += ["", "loads fully in", *_table([(c.client, _verdict(c)) for c in self.clients], indent=2)]
        return "\n".join(lines)

    def _chart(self) -> list[str]:
        largest = max((block.norm for block in self.blocks), default=0.0) or 1.0
        rows = []
        for one in self.blocks:
            bar = "#" * max(1 if one.norm > 0 else 0, round(_BAR * one.norm / largest))
            label = f"{one.component} {one.block}"
            rows.append((label, f"{one.norm:10.4g}  {bar:<{_BAR}}  {one.num_modules} layers"))
        return _table(rows, indent=2)


def inspect_adapter(path: Path) -> AdapterSummary:
    """Describe an adapter file or PEFT folder.

    Raises:
        AdapterFileError: when it cannot be read, or is no adapter.
    """
    headers = formats.read_headers(path)
    format = formats.sniff(path)
    adapter = formats.read_adapter(path)
    entries = adapter.info.metadata
    updates = adapter.weights.updates.values()
    digest = data_sha256(headers[0].path, headers[0].data_offset)
    recorded = entries.get("sshs_model_hash")
    keys = [key for header in headers for key in header.tensors]
    return AdapterSummary(
        path=path,
        format=format,
        family=adapter.info.family,
        name=adapter.info.name,
        base=_known(entries, "ss_sd_model_name"),
        num_bytes=sum(header.num_bytes for header in headers),
        num_keys=len(keys),
        modules={c: len(adapter.weights.updates_of(c)) for c in adapter.weights.components()},
        kinds=adapter.weights.kinds(),
        ranks=dict(sorted(Counter(one.rank for one in updates).items())),
        alphas=dict(sorted(Counter(one.alpha for one in updates).items())),
        dtypes=_dtypes(headers),
        trigger_words=adapter.info.trigger_words,
        tags=_tags(entries.get("ss_tag_frequency")),
        settings={
            label: entries[key] for key, label in _SETTINGS.items() if _known(entries, key) is not None
        },
        model_hash=digest,
        hash_matches=None if recorded is None or len(headers) > 1 else recorded == digest,
        blocks=block_norms(adapter.weights),
        clients=client_support(format, adapter.info.family, formats.read_outline(path).weights, keys),
    )


def edit_adapter(
    path: Path, assignments: Sequence[str], removed: Sequence[str]
) -> dict[str, dict[str, str | None]]:
    """Change header entries of an adapter file, or of every file of a PEFT folder.

    Args:
        path: the file or folder.
        assignments: ``KEY=VALUE`` texts.
        removed: entries to take out.

    Returns:
        entry -> ``before`` and ``after``, shortened for people; None where there is none.

    Raises:
        AdapterFileError: when it cannot be read, or is no adapter.
        ConfigError: for what may not be changed so.
        OutputError: when it cannot be written.
    """
    values: dict[str, str] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: give KEY=VALUE, e.g. --set modelspec.license=CC-BY-4.0")
        values[key.strip()] = value
    formats.sniff(path)
    family = detect_family(formats.read_outline(path).weights, {})
    changes: dict[str, dict[str, str | None]] = {}
    for header in formats.read_headers(path):
        edit = edit_header(header, values, removed, family)
        for key in (*edit.after, *removed):
            before, after = edit.before.get(key), edit.after.get(key)
            changes[key] = {
                "before": None if before is None else shown(before, 80),
                "after": None if after is None else shown(after, 80),
            }
    return changes


def block_norms(weights: AdapterWeights) -> tuple[BlockNorm, ...]:
    """Return the Frobenius norm of the updates of each block, the components in canonical order."""
    found = []
    for component in weights.components():
        squares: dict[str, list[float]] = {}
        for path, update in weights.updates_of(component).items():
            squares.setdefault(_block(component, path), []).append(delta_norm(update) ** 2)
        for block in sorted(squares, key=_flow_order):
            found.append(BlockNorm(component, block, len(squares[block]), math.sqrt(sum(squares[block]))))
    return tuple(found)


def delta_norm(update: Update) -> float:
    """Return the Frobenius norm of dW, where possible without building dW; of a DoRA that of its direction.

    ``||up @ down||_F^2 = trace((up^T up) (down down^T))`` and ``||kron(a, b)|| = ||a|| ||b||``, in float64.
    """
    if isinstance(update, DoRA):
        return delta_norm(update.direction)
    if isinstance(update, LoKr):
        sides = (side[0] if len(side) == 1 else side[0] @ side[1] for side in update.matrices())
        return abs(update.scale) * math.prod(float(torch.linalg.norm(side.double())) for side in sides)
    if isinstance(update, LoHa):
        return float(torch.linalg.norm(update.delta().double()))
    pair = update.merged() if isinstance(update, TuckerPair) else update
    assert isinstance(pair, LowRankPair)
    up, down = pair.up.flatten(1).double(), pair.down.flatten(1).double()
    square = float(((up.T @ up) * (down @ down.T).T).sum())
    return abs(pair.scale) * math.sqrt(max(square, 0.0))


def _block(component: str, path: str) -> str:
    match = (_UNET_BLOCK if component == "unet" else _TEXT_LAYER).search(path)
    if match is None:
        return path.split(".", 1)[0]
    return match.group().rstrip(".")


def _flow_order(block: str) -> tuple[int, int, str]:
    """Order blocks as data flows: in, down, middle, up, out; text layers by number."""
    number = re.search(r"\d+", block)
    first = {"down_blocks": 1, "mid_block": 2, "up_blocks": 3, "conv_out": 4}.get(block.split(".", 1)[0], 0)
    return first, int(number.group()) if number else 0, block


def _dtypes(headers: Iterable[Header]) -> dict[str, int]:
    """Count the factors by number format; alphas are always fp32 and say nothing."""
    counts: Counter[str] = Counter()
    for header in headers:
        for key, spec in header.tensors.items():
            if not key.endswith((".alpha", ".scale")):
                name = DTYPE_NAMES[spec.dtype]
                counts[_DTYPE_WORDS.get(name, name)] += 1
    return dict(counts.most_common())


def _tags(text: str | None, limit: int = 24) -> tuple[tuple[str, int], ...]:
    try:
        tree = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return ()
    counts: Counter[str] = Counter()
    for tags in tree.values() if isinstance(tree, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, int):
                counts[tag.strip()] += count
    return tuple(counts.most_common(limit))


def _known(entries: Mapping[str, str], key: str) -> str | None:
    value = entries.get(key, "None")
    return None if value in ("None", "") else value


def _counts(counts: Mapping[str, int] | Mapping[int, int]) -> str:
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} ({count}x)" for value, count in counts.items())


def _verdict(support: Support) -> str:
    return "yes" if support.full else "no: " + "; ".join(support.reasons)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.1f} KiB"


def _table(rows: Iterable[tuple[str, str]], indent: int = 0) -> list[str]:
    listed = list(rows)
    width = max((len(label) for label, _ in listed), default=0)
    return [f"{'':{indent}}{label:<{width}}  {text}".rstrip() for label, text in listed]
