"""Which trainer a text is of, and its settings in ours: the table of the programs that are read.

A further program is a module with a translation and one line in :data:`PROGRAMS`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from ...errors import ConfigError
from ..contradictions import contradictions
from ..schema import Config
from ..toml import load_config, toml_line
from . import (
    adapter_config,
    ai_toolkit,
    diffusers_scripts,
    kohya,
    kohya_dataset,
    kohya_gui,
    onetrainer,
    simpletuner,
)
from .ledger import Ledger, Row, shown
from .texts import command_words, flags, flattened, line_of, read_table, read_text

_KEY = re.compile(r"`([a-z]+\.[a-z0-9_]+)")
_LORA_SCRIPTS = ("train_text_to_image_lora", "train_dreambooth_lora")
_DATASET_FLAGS = {"train_batch_size": "batch_size", "dataset_repeats": "num_repeats"}


@dataclass(frozen=True)
class Imported:
    """What another trainer's settings become.

    Attributes:
        program: whose they are, in words.
        values: our settings, dotted key -> value.
        rows: what became of each of theirs.
        notes: what is to be known or done besides.
    """

    program: str
    values: Mapping[str, Any]
    rows: Sequence[Row]
    notes: Sequence[str]

    def config(self) -> Config:
        """Return our settings, validated.

        Raises:
            ConfigError: when they contradict each other, which a translation must not bring about.
        """
        return load_config(values=self.values)

    def toml(self) -> str:
        """Return our settings as TOML; each stands under the names of those that it comes from."""
        sources: dict[str, list[str]] = {}
        for row in self.rows:
            sources.setdefault(row.ours.partition(" = ")[0], []).append(row.setting)
        lines = [f"# Imported from {self.program} by `sdlora import`."]
        for section in Config.model_fields:
            inside = {
                key.partition(".")[2]: value
                for key, value in self.values.items()
                if key.startswith(f"{section}.")
            }
            tables = inside.pop("sources", None)
            if not inside and not tables:
                continue
            lines += ["", f"[{section}]"]
            for name, value in inside.items():
                names = dict.fromkeys(sources.get(f"{section}.{name}", []))
                lines += [f"# from {', '.join(names)}"] if names else []
                lines.append(toml_line(name, list(value) if isinstance(value, tuple) else value))
            for table in tables or []:
                lines += [
                    "",
                    f"[[{section}.sources]]",
                    *(toml_line(name, value) for name, value in table.items()),
                ]
        return "\n".join(lines) + "\n"


class Source(NamedTuple):
    """A text to be imported: what it holds once parsed, where from, and where files beside it are looked for
    (None: nowhere, not even under their full paths)."""

    document: Any
    text: str
    where: str
    folder: Path | None


class Program(NamedTuple):
    """A program whose settings are read.

    Attributes:
        title: its name for people.
        claims: whether a parsed document is its own.
        translate: document -> ledger with all that became of it.
    """

    title: str
    claims: Callable[[Any], bool]
    translate: Callable[[Source], Ledger]


def import_settings(
    source: str | Path,
    *,
    program: str | None = None,
    folder: Path | None = None,
    kind: str = "",
    alone: bool = False,
) -> Imported:
    """Read another trainer's settings and say them in ours.

    Args:
        source: a settings file, or the text of a command line.
        program: a key of :data:`PROGRAMS`, where a text may be of several; recognised when left out.
        folder: where the files that a command line names are looked for; the current one when left out.
        kind: ``json``, ``toml`` or ``yaml`` for the text of a settings file; empty for a command line.
        alone: read no file that the text names, for a text whose sender may not read files here.

    Raises:
        ConfigError: when the text cannot be read (naming its line), is of no known program, or of a model
            that sdlora does not train.
    """
    if isinstance(source, Path):
        text, where, folder = read_text(source), str(source), source.parent
        kind = source.suffix.lower().lstrip(".")
    else:
        text, where = source, "the text" if kind else "the command"
    beside = None if alone else folder or Path()
    parsed = Source(_parsed(text, kind, where), text, where, beside)
    if program is not None:
        if program not in PROGRAMS:
            raise ConfigError(f"--from {program}: sdlora reads {', '.join(PROGRAMS)}")
        chosen = PROGRAMS[program]
    else:
        claimant = next((entry for entry in PROGRAMS.values() if entry.claims(parsed.document)), None)
        if claimant is None:
            titles = "; ".join(entry.title for entry in PROGRAMS.values())
            raise ConfigError(
                f"{where}: is of no trainer that sdlora reads: {titles}. If it is, say which with --from"
            )
        chosen = claimant
    try:
        ledger = chosen.translate(parsed)
    except ConfigError as error:
        raise ConfigError(_with_line(str(error), text, where)) from None
    except (KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{where}: is not laid out as {chosen.title} writes it; check it, or --from"
        ) from None
    ledger.finish()
    _give_up_contradictions(ledger)
    return Imported(chosen.title, ledger.values, tuple(ledger.rows), tuple(ledger.notes))


def _give_up_contradictions(ledger: Ledger) -> None:
    """Drop settings that sdlora refuses together, one after another, each with sdlora's own words as the
    reason."""
    for _ in range(len(ledger.values)):
        problems = contradictions(Config().with_values(ledger.values))
        keys = [key for problem in problems[:1] for key in _KEY.findall(problem) if key in ledger.values]
        if not keys:
            return
        ledger.refuse(keys[0], problems[0])


def _parsed(text: str, kind: str, where: str) -> Any:
    """Return a table or list for JSON, TOML and YAML, the words of a command line for the rest."""
    start = text.lstrip()[:1]
    if kind == "json" or (kind not in ("toml", "yaml", "yml", "bat", "cmd", "sh", "ps1") and start == "{"):
        return read_table(text, "json", where)
    if kind == "toml":
        return read_table(text, "toml", where)
    if kind in ("yaml", "yml"):
        return read_table(text, "yaml", where)
    words = command_words(text)
    return words if words else text.split()


def _with_line(message: str, text: str, where: str) -> str:
    """Add the line of the setting that an error names, where the text has several."""
    if not message.startswith(f"{where}: `") or "\n" not in text.strip():
        return message
    name = message.split("`")[1].partition("=")[0].rpartition(": ")[2]
    line = line_of(text, name)
    return message if line is None else message.replace(f"{where}: ", f"{where}, line {line}: ", 1)


def _script(document: Any, names: Sequence[str]) -> str | None:
    """Return the script that a command line starts, without ``.py``, if it is one of those named."""
    if not isinstance(document, list) or not all(isinstance(word, str) for word in document):
        return None
    for word in document:
        stem = PureWindowsPath(word).name.removesuffix(".py")
        if word.endswith(".py") or stem in names:
            return stem if stem in names or any(stem.startswith(f"{name}_") for name in names) else None
    return None


def _claims_kohya_command(document: Any) -> bool:
    if not isinstance(document, list) or not all(isinstance(word, str) for word in document):
        return False
    scripts = [PureWindowsPath(word).name for word in document if word.endswith("train_network.py")]
    return (
        bool(scripts)
        or "--network_module" in document
        or any(word.startswith("--network_module=") for word in document)
    )


def _kohya_command(source: Source) -> Ledger:
    script = next(
        (PureWindowsPath(word).stem for word in source.document if word.endswith("train_network.py")),
        "train_network",
    )
    _refuse_other_models(script, source.where)
    words = list(source.document)
    start = next((n for n, word in enumerate(words) if word.endswith("train_network.py")), -1)
    launcher = (
        {f"accelerate: {name}": value for name, value in flags(words[:start]).items()} if start > 0 else {}
    )
    given = flags(words[start + 1 :])
    config = given.get("config_file")
    ledger_notes: list[str] = []
    if isinstance(config, str):
        beside = _beside(source.folder, config if config.endswith(".toml") else f"{config}.toml")
        if beside is None:
            ledger_notes.append(
                f"`--config_file {shown(config)}` is not found from here: import that file, too"
            )
        else:
            given = {**_config_file(read_table(read_text(beside), "toml", str(beside))), **given}
    ledger = _kohya(given, source, launcher)
    ledger.default("config_file", "read, too")
    for note in ledger_notes:
        ledger.note(note)
    return ledger


def _config_file(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of kohya's ``config_file``, whose sections have no meaning
    (train_util.read_config_from_file)."""
    plain: dict[str, Any] = {}
    for name, value in document.items():
        plain.update(value) if isinstance(value, dict) else plain.update({name: value})
    return plain


def _claims_config_file(document: Any) -> bool:
    known = {
        "network_module",
        "network_dim",
        "pretrained_model_name_or_path",
        "train_data_dir",
        "max_train_epochs",
    }
    return (
        isinstance(document, dict)
        and "datasets" not in document
        and bool(known & _config_file(document).keys())
    )


def _kohya(given: Mapping[str, Any], source: Source, launcher: Mapping[str, Any] = {}) -> Ledger:
    """Return the account of sd-scripts' arguments, with the data sets and prompts of the files that they
    name."""
    dataset = given.get("dataset_config")
    general: dict[str, Any] = {}
    sets: list[dict[str, Any]] = []
    missing = ""
    if isinstance(dataset, str) and dataset:
        beside = _beside(source.folder, dataset)
        if beside is None:
            missing = f"`dataset_config={shown(dataset)}` is not found from here: import that file, "
            "too, or name the folders"
        else:
            kind = "json" if beside.suffix == ".json" else "toml"
            general, sets = kohya_dataset.tables(
                read_table(read_text(beside), kind, str(beside)), str(beside)
            )
    shared = {_DATASET_FLAGS.get(name, name): given[name] for name in kohya_dataset.OPTIONS if name in given}
    outer = {**shared, **general}
    ledger = Ledger({**launcher, **given, **kohya_dataset.given(general, sets)}, source.where)
    if sets:
        kohya_dataset.translate(ledger, outer, sets)
    kohya.translate(ledger, sets, _prompts(given.get("sample_prompts"), source.folder))
    processes = ledger.whole("accelerate: num_processes", 1) or 1
    if processes > 1:
        ledger.note(f"{processes} processes: start with `sdlora train --processes {processes} --config ...`")
    ledger.default(list(launcher), "how accelerate starts it")
    ledger.default("dataset_config", "read, too")
    if missing:
        ledger.note(missing)
    return ledger


def _refuse_other_models(script: str, where: str) -> None:
    model = next((name for name in kohya.OTHER_MODELS if script.startswith(name)), None)
    if model:
        raise ConfigError(f"{where}: {script}.py trains {model}; sdlora trains Stable Diffusion 1, 2 and XL")


def _prompts(name: Any, folder: Path | None) -> str | None:
    if not isinstance(name, str) or not name:
        return None
    beside = _beside(folder, name)
    return None if beside is None or beside.suffix != ".txt" else read_text(beside)


def _beside(folder: Path | None, name: str) -> Path | None:
    """Return the file that a setting names: as it says, or of that name beside the text that names it."""
    if folder is None:
        return None
    for place in (Path(name), folder / name, folder / PureWindowsPath(name).name):
        if os.path.isfile(place):  # unlike Path's, it says no to a name that is too long
            return place
    return None


def _kohya_dataset(source: Source) -> Ledger:
    general, sets = kohya_dataset.tables(source.document, source.where)
    ledger = Ledger(kohya_dataset.given(general, sets), source.where)
    kohya_dataset.translate(ledger, general, sets)
    ledger.note("a data set only: import the command or config_file that names it for the rest")
    return ledger


def _kohya_gui(source: Source) -> Ledger:
    arguments = kohya_gui.as_arguments(source.document)
    model = next((name for name in ("flux1_checkbox", "sd3_checkbox") if source.document.get(name)), None)
    if model:
        raise ConfigError(f"{source.where}: `{model}=true`: sdlora trains Stable Diffusion 1, 2 and XL")
    ledger = _kohya(arguments, source)
    ledger.default(kohya_gui.OF_THE_PAGE, "of the page, or of another choice on it")
    return ledger


def _diffusers(source: Source) -> Ledger:
    script = _script(source.document, _LORA_SCRIPTS)
    if script is None:
        script = _LORA_SCRIPTS[0]
    if script not in (*_LORA_SCRIPTS, *(f"{name}_sdxl" for name in _LORA_SCRIPTS)):
        raise ConfigError(
            f"{source.where}: {script}.py trains another model; sdlora trains Stable Diffusion 1, 2 and XL"
        )
    start = next((n for n, word in enumerate(source.document) if word.endswith(".py")), -1)
    launcher = {
        f"accelerate: {name}": value for name, value in flags(source.document[: max(start, 0)]).items()
    }
    ledger = Ledger({**launcher, **flags(source.document[start + 1 :])}, source.where)
    diffusers_scripts.translate(ledger, script)
    ledger.default(list(launcher), "how accelerate starts it")
    return ledger


def _onetrainer(source: Source) -> Ledger:
    document = source.document
    if onetrainer.is_concepts(document):
        document = {"concepts": document}
    else:
        onetrainer.refuse_others(document, source.where)
    concepts = _listed(document, "concepts", "concept_file_name", source)
    samples = _listed(document, "samples", "sample_definition_file_name", source)
    given = flattened(
        {name: value for name, value in document.items() if name not in ("concepts", "samples")}
    )
    for label, items in (("concept", concepts), ("sample", samples)):
        for number, item in enumerate(items, 1):
            given.update({f"{label} {number}: {name}": value for name, value in flattened(item).items()})
    ledger = Ledger(given, source.where)
    onetrainer.translate(ledger, concepts, samples)
    return ledger


def _listed(document: Mapping[str, Any], name: str, file_name: str, source: Source) -> list[dict[str, Any]]:
    """Return a list that stands in a document or in the file that it names."""
    items = document.get(name)
    if items is None and isinstance(document.get(file_name), str):
        beside = _beside(source.folder, document[file_name])
        items = read_table(read_text(beside), "json", str(beside)) if beside else None
    return [item for item in items or [] if isinstance(item, dict)]


def _ai_toolkit(source: Source) -> Ledger:
    process = ai_toolkit.process_of(source.document, source.where)
    datasets = [dataset for dataset in process.get("datasets") or [] if isinstance(dataset, dict)]
    ledger = Ledger(ai_toolkit.given(source.document, {**process, "datasets": datasets}), source.where)
    ai_toolkit.translate(ledger, datasets)
    return ledger


def _simpletuner(source: Source) -> Ledger:
    lycoris = None
    if simpletuner.is_backends(source.document):
        options, backends = {}, source.document
    else:
        options = simpletuner.given(source.document, source.where)
        backends, lycoris = (
            _named(options, "data_backend_config", source),
            _named(options, "lycoris_config", source),
        )
    backends = [backend for backend in backends or [] if isinstance(backend, dict)]
    given = dict(options)
    for backend in backends:
        given.update({f"backend {backend.get('id')}: {name}": value for name, value in backend.items()})
    ledger = Ledger(given, source.where)
    simpletuner.translate(ledger, backends, lycoris if isinstance(lycoris, dict) else None)
    return ledger


def _named(options: Mapping[str, Any], name: str, source: Source) -> Any:
    """Return what a JSON file holds that an option names, or None where it is not found."""
    value = options.get(name)
    beside = _beside(source.folder, value) if isinstance(value, str) and value else None
    return None if beside is None else read_table(read_text(beside), "json", str(beside))


def _adapter_config(source: Source) -> Ledger:
    ledger = Ledger(source.document, source.where)
    adapter_config.translate(ledger)
    ledger.note("it says what the adapter is made of, not how it is trained: the rest follows the images")
    return ledger


def _is_adapter_config(document: Any) -> bool:
    return (
        isinstance(document, dict)
        and "peft_type" in document
        and ("r" in document or "target_modules" in document)
    )


PROGRAMS: dict[str, Program] = {
    "kohya": Program("a command of kohya's sd-scripts", _claims_kohya_command, _kohya_command),
    "kohya-dataset": Program(
        "a dataset_config of kohya's sd-scripts",
        lambda document: isinstance(document, dict) and "datasets" in document and "config" not in document,
        _kohya_dataset,
    ),
    "kohya-gui": Program("settings saved by kohya_ss", kohya_gui.recognised, _kohya_gui),
    "onetrainer": Program(
        "a configuration of OneTrainer",
        lambda document: onetrainer.recognised(document) or onetrainer.is_concepts(document),
        _onetrainer,
    ),
    "ai-toolkit": Program("a job of ai-toolkit", ai_toolkit.recognised, _ai_toolkit),
    "simpletuner": Program(
        "a configuration of SimpleTuner",
        lambda document: simpletuner.recognised(document) or simpletuner.is_backends(document),
        _simpletuner,
    ),
    "diffusers": Program(
        "a command of diffusers' scripts",
        lambda document: _script(document, _LORA_SCRIPTS) is not None,
        _diffusers,
    ),
    "adapter-config": Program("an adapter_config.json of PEFT", _is_adapter_config, _adapter_config),
    "kohya-config": Program(
        "a config_file of kohya's sd-scripts",
        _claims_config_file,
        lambda source: _kohya(_config_file(source.document), source),
    ),
}
"""Asked in this order: the first that claims a document reads it."""
