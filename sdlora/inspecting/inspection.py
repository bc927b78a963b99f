"""What an adapter file holds: layers, ranks, sizes of the updates, training, and who can load it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapters.canonical import AdapterWeights, ModuleKey, Update
from ..errors import ConfigError, shown
from ..formats.adapter_files import OpenAdapter
from ..formats.clients import Support
from ..formats.detection import detect_family
from ..formats.editing import edit_header
from ..formats.folding import original_alpha
from ..formats.support import client_support
from ..number_formats import dtype_name
from ..tensor_file import Header, entry_json
from .norms import BlockNorm, block_norms

_SETTINGS = {
    "ss_steps": "steps",
    "ss_num_epochs": "epochs",
    "ss_num_train_images": "images per epoch",
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
    "modelspec.prediction_type": "base predicts",
    "ss_zero_terminal_snr": "base ends in pure noise",
    "ss_new_sd_model_hash": "base SHA-256",
    "sdlora.final_loss": "final loss",
    "sdlora.validation_loss": "validation loss",
    "ss_training_comment": "comment",
    "modelspec.author": "author",
    "modelspec.date": "date",
    "modelspec.license": "licence",
}


@dataclass(frozen=True)
class AdapterSummary:
    """Everything :func:`inspect_adapter` found out.

    Attributes:
        path: the file or folder.
        format: key of :data:`sdlora.formats.table.FORMATS`.
        family: ``sd1``, ``sd2``, ``sdxl`` or None.
        name: what prompts call it.
        base: the base it was trained on, by its header.
        num_bytes: size of the file or files.
        num_keys: tensors.
        modules: component -> adapted layers.
        kinds: kind of update, a key of :data:`sdlora.adapters.kinds.table.KINDS` -> layers.
        ranks: rank -> layers.
        alphas: alpha -> layers.
        dtypes: number format -> tensors.
        trigger_words: words that call the style.
        tags: the most frequent tags or captions of the training images.
        settings: training settings by their usual name.
        model_hash: SHA-256 of the tensor data; the header's own, or empty, where no data was read.
        hash_matches: whether the header's own hash agrees; None if it has none, or no data was read.
        blocks: size of the updates by block; empty where no data was read.
        clients: which programs load it fully.
        entries: all text entries of the header.
        has_values: whether the tensor data was read.
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
    entries: Mapping[str, str]
    has_values: bool = True

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
            "clients": {
                c.client: {"full": c.full, "reasons": list(c.reasons), **({"hint": c.hint} if c.hint else {})}
                for c in self.clients
            },
            **({} if self.has_values else {"header": dict(self.entries)}),
        }


def inspect_adapter(path: Path, *, values: bool = True) -> AdapterSummary:
    """Describe an adapter file or PEFT folder, with one of its modules in memory at a time.

    Args:
        path: the file or folder.
        values: read the tensors, for the hash and the norms. Otherwise only headers and single numbers are
            read, so that a large file takes no longer than a small one.

    Raises:
        AdapterFileError: when it cannot be read, or is not an adapter.
    """
    adapter = OpenAdapter(path)
    headers, outline = adapter.headers, adapter.outline
    entries, weights = outline.info.metadata, outline.weights
    recorded = _known(entries, "sshs_model_hash")
    if values:
        ranks, alphas, blocks = _measured(adapter)
        digest = adapter.data_hash()
    else:
        ranks, alphas = _outlined(headers, weights)
        blocks, digest = (), recorded or ""
    return AdapterSummary(
        path=path,
        format=adapter.format,
        family=outline.info.family,
        name=outline.info.name,
        base=_known(entries, "ss_sd_model_name"),
        num_bytes=sum(header.num_bytes for header in headers),
        num_keys=len(adapter.keys.names),
        modules={c: len(weights.updates_of(c)) for c in weights.components()},
        kinds=weights.kinds(),
        ranks=dict(sorted(ranks.items())),
        alphas=dict(sorted(alphas.items())),
        dtypes=_dtypes(headers),
        trigger_words=outline.info.trigger_words,
        tags=_tags(entries.get("ss_tag_frequency")),
        settings={
            label: entries[key] for key, label in _SETTINGS.items() if _known(entries, key) is not None
        },
        model_hash=digest,
        hash_matches=None if not values or recorded is None or len(headers) > 1 else recorded == digest,
        blocks=blocks,
        clients=client_support(adapter.format, outline.info.family, weights, adapter.keys, entries),
        entries=entries,
        has_values=values,
    )


def _measured(adapter: OpenAdapter) -> tuple[Counter[int], Counter[float], tuple[BlockNorm, ...]]:
    """Return how often each rank and alpha occurs, and the norms of the blocks, module by module."""
    ranks: Counter[int] = Counter()
    alphas: Counter[float] = Counter()

    def counted() -> Iterator[tuple[ModuleKey, Update]]:
        for module, update in adapter.modules():
            if update.has_rank:
                ranks[update.rank] += 1
                alphas[update.alpha] += 1
            yield module, update

    blocks = block_norms(counted())
    return ranks, alphas, blocks


def _outlined(headers: Sequence[Header], weights: AdapterWeights) -> tuple[Counter[int], Counter[float]]:
    """Return the same counts from an outline, with the alphas that a header says were trained."""
    trained: dict[str, float] = {}
    for header in headers:
        trained |= original_alpha(header.path, header.metadata)
    alphas = Counter(
        trained.get(f"{module.component}.{module.path}", trained.get(module.component, update.alpha))
        for module, update in weights.all_items()
        if update.has_rank
    )
    return Counter(update.rank for update in weights.updates.values() if update.has_rank), alphas


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
        AdapterFileError: when it cannot be read, or is not an adapter.
        ConfigError: for an entry that may not be changed this way.
        OutputError: when it cannot be written.
    """
    values: dict[str, str] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: give KEY=VALUE, e.g. --set modelspec.license=CC-BY-4.0")
        values[key.strip()] = value
    adapter = OpenAdapter(path)
    family = detect_family(adapter.outline.weights, {})
    changes: dict[str, dict[str, str | None]] = {}
    for header in adapter.headers:
        edit = edit_header(header, values, removed, family)
        for key in (*edit.after, *removed):
            before, after = edit.before.get(key), edit.after.get(key)
            changes[key] = {
                "before": None if before is None else shown(before, 80),
                "after": None if after is None else shown(after, 80),
            }
    return changes


def _dtypes(headers: Iterable[Header]) -> dict[str, int]:
    """Count the factors by number format; alphas are always fp32, so they are left out."""
    counts: Counter[str] = Counter()
    for header in headers:
        for key, spec in header.tensors.items():
            if not key.endswith((".alpha", ".scale")):
                counts[dtype_name(spec.dtype)] += 1
    return dict(counts.most_common())


def _tags(text: str | None, limit: int = 24) -> tuple[tuple[str, int], ...]:
    try:
        tree = entry_json(text or "{}")
    except ValueError:
        return ()
    counts: Counter[str] = Counter()
    for tags in tree.values() if isinstance(tree, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if type(count) is int and abs(count) < 2**53:
                counts[tag.strip()] += count
    return tuple(counts.most_common(limit))


def _known(entries: Mapping[str, str], key: str) -> str | None:
    value = entries.get(key, "None")
    if key.endswith("_hash") and not set(value.lower()) <= set("0123456789abcdef"):
        return None  # kohya's trainer writes words like `IsADirectory` for a base that it could not hash
    return None if value in ("None", "") else value
