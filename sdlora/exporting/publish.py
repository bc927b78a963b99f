"""An adapter with its model card and previews, on the hub."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config.toml import load_config
from ..errors import ConfigError, OutputError
from ..families.locating import is_hub_id
from ..files import write_bytes, write_text
from ..formats.adapter_files import OpenAdapter
from ..formats.hub_adapters import hub_reason
from ..run_folder import RunFolder
from .export import export_adapter
from .webui_card import card_image

MOST_PREVIEWS = 4
_REPO = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_SETTINGS = {
    "base": "ss_sd_model_name",
    "images": "ss_num_train_images",
    "resolution": "ss_resolution",
    "steps": "ss_steps",
    "rank": "ss_network_dim",
    "alpha": "ss_network_alpha",
    "learning rate": "ss_learning_rate",
    "optimizer": "ss_optimizer",
    "batch size": "ss_total_batch_size",
}
"""What the card's table says, and the header entry that it is read from."""


@dataclass(frozen=True)
class Publication:
    """What goes, or went, to the hub.

    Attributes:
        repo: ``OWNER/NAME``.
        card: the model card, Markdown with a YAML head.
        files: names in the repository.
        address: of its page, None after a dry run.
        notes: what the user may want to add.
    """

    repo: str
    card: str
    files: tuple[str, ...]
    address: str | None
    notes: tuple[str, ...]


def publish(
    source: Path,
    repo: str,
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    private_repo: bool = False,
    private: bool = False,
    strength: float | None = None,
    license: str | None = None,
) -> Publication:
    """Write an adapter, its previews and a model card into a repository of the hub.

    Args:
        source: a run folder, or an adapter file.
        repo: ``OWNER/NAME``; it is created if it is missing.
        dry_run: make everything, send nothing, and ask the hub nothing.
        overwrite: replace files that the repository holds already.
        private_repo: create it so that only its owner sees it.
        private: leave out captions, prompts and names of files.
        strength: recommended strength; the adapter's own, or 1, when None.
        license: SPDX id; what the adapter's header says when None.

    Raises:
        ConfigError: for a name that no repository can have.
        AdapterFileError: when the source cannot be read, or its copy fails the proof.
        OutputError: when the repository holds such files already, or the hub refuses.
    """
    if _REPO.fullmatch(repo) is None or ".." in repo:
        raise ConfigError(f"--to {repo!r}: give OWNER/NAME with letters, digits, ., - and _ only")
    with tempfile.TemporaryDirectory(prefix="sdlora-publish-") as place:
        folder = Path(place)
        run = RunFolder(source)
        config = load_config(run.config_file) if run.exists() else None
        private = private or (config is not None and config.output.private)
        report = export_adapter(
            source, "webui", folder / "export", preferred_strength=strength, private=private
        )
        file = folder / "repo" / report.adapter.name
        file.parent.mkdir()
        shutil.copyfile(report.adapter, file)
        prompts = [] if config is None or private else [line.prompt for line in config.sample.lines]
        previews = _previews(run, folder / "repo", prompts, private)
        base = config.model.base if config is not None else ""
        card, notes = _card(file, repo, previews, base, license)
        write_text(folder / "repo" / "README.md", card)
        files = [path for path in (folder / "repo").rglob("*") if path.is_file()]
        names = tuple(sorted(path.relative_to(folder / "repo").as_posix() for path in files))
        if dry_run:
            return Publication(repo, card, names, None, notes)
        address = _push(folder / "repo", repo, names, overwrite=overwrite, private_repo=private_repo)
    return Publication(repo, card, names, address, notes)


def _previews(run: RunFolder, target: Path, prompts: Sequence[str], private: bool) -> list[tuple[str, str]]:
    """Copy the last previews of a run; return (name, prompt) of each."""
    previews = run.list_previews() if run.exists() else []
    last = [preview for preview in previews if preview.step == previews[-1].step][:MOST_PREVIEWS]
    copied = []
    for preview in last:
        image = card_image(preview.file, private=private)
        assert image is not None
        name = f"images/{preview.number}.png"
        (target / "images").mkdir(exist_ok=True)
        write_bytes(target / name, image)
        copied.append((name, prompts[preview.number - 1] if preview.number <= len(prompts) else ""))
    return copied


def _card(
    file: Path, repo: str, previews: Sequence[tuple[str, str]], base: str, license: str | None
) -> tuple[str, tuple[str, ...]]:
    """Return the model card, and what it lacks."""
    from huggingface_hub import ModelCardData

    info = OpenAdapter(file).read().info
    entries = info.metadata
    license = license or entries.get("modelspec.license") or None
    trigger = ", ".join(info.trigger_words)
    notes = [] if license else ["no licence is stated; give one with --license ID, e.g. cc-by-4.0"]
    strength = entries.get("sdlora.preferred_strength") or "1"
    hub_base = base if is_hub_id(base) else None
    if hub_base is None:
        notes.append("the base is no hub id, so the card names it without a link")
    head = ModelCardData(
        license=license.lower() if license else None,
        base_model=hub_base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["lora", "stable-diffusion", "text-to-image", "sdlora"],
        instance_prompt=trigger or None,
        widget=[{"text": prompt, "output": {"url": name}} for name, prompt in previews if prompt] or None,
    ).to_yaml()
    title = _plain(entries.get("modelspec.title") or file.stem)
    parts = [f"---\n{head}\n---", f"# {title}"]
    if description := entries.get("modelspec.description"):
        parts.append(_plain(description))
    if previews:
        images = " | ".join(f"![{_plain(prompt)}]({name})" for name, prompt in previews)
        below = " | ".join(_plain(prompt) for _, prompt in previews)
        parts.append(f"| {images} |\n|{'---|' * len(previews)}\n| {below} |")
    parts.append(_usage(file.name, repo, trigger, strength))
    rows = {label: entries.get(key, "None") for label, key in _SETTINGS.items()}
    table = "\n".join(f"| {label} | {_plain(value)} |" for label, value in rows.items() if value != "None")
    parts.append(f"## How it was trained\n\n| | |\n|---|---|\n{table}\n\nWith sdlora.")
    terms = _plain(license) if license else "Not stated."
    parts.append(f"## Licence\n\n{terms} The base model has a licence of its own.")
    return "\n\n".join(parts) + "\n", tuple(notes)


def _usage(file: str, repo: str, trigger: str, strength: str) -> str:
    lines = [f"Recommended strength: {strength}."]
    if trigger:
        lines.insert(0, f"Trigger word: `{_plain(trigger)}`.")
    stem = file.removesuffix(".safetensors")
    return "\n".join(
        [
            f"## Use\n\n{' '.join(lines)}\n",
            f"- WebUI, Forge: put `{file}` into `models/Lora`, then write `<lora:{stem}:{strength}>`.",
            f'- diffusers: `pipeline.load_lora_weights("{repo}", weight_name="{file}")`.',
            f"- sdlora: `sdlora generate --base BASE --adapter {repo}:{strength} --prompt ... --output out`.",
        ]
    )


def _plain(text: str) -> str:
    """Return a text that has no meaning in Markdown or a table."""
    return re.sub(r"([\\|<>\[\]`*_#])", r"\\\1", " ".join(text.split()))


def _push(folder: Path, repo: str, names: Sequence[str], *, overwrite: bool, private_repo: bool) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    hub = HfApi(library_name="sdlora")
    try:
        try:
            there = {file.rfilename for file in hub.model_info(repo).siblings or ()}
        except RepositoryNotFoundError:
            there = set()
            hub.create_repo(repo, private=private_repo, exist_ok=True)
        taken = sorted(there & set(names))
        if taken and not overwrite:
            raise OutputError(f"{repo}: holds {', '.join(taken[:3])} already; --overwrite replaces them")
        hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="Adapter and card by sdlora")
    except OutputError:
        raise
    except Exception as error:
        raise OutputError(f"{repo}: nothing was published ({hub_reason(error)})") from error
    return f"{hub.endpoint}/{repo}"
