"""What is wrong with a setting, so that the next try succeeds: the value, and how to write it."""

from __future__ import annotations

import datetime
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from ..errors import shown
from ..files import parse_toml
from .schema import Config, choices_of, fields

_ELSEWHERE = {
    "optimizer.learning_rate": ("lr", "learn_rate"),
    "optimizer.text_encoder_learning_rate": ("text_encoder_lr", "te_lr"),
    "optimizer.name": ("optimizer_type", "optimizer", "optim"),
    "optimizer.schedule": ("lr_scheduler", "lr_scheduler_type", "scheduler"),
    "optimizer.warmup_steps": ("lr_warmup_steps", "warmup"),
    "adapter.rank": ("network_dim", "network_rank", "lora_rank", "dim", "r"),
    "adapter.alpha": ("network_alpha", "lora_alpha"),
    "adapter.dropout": ("network_dropout", "lora_dropout"),
    "adapter.from_file": ("network_weights",),
    "adapter.kind": ("network_module", "algo"),
    "training.steps": ("max_train_steps", "num_train_steps", "total_steps", "iterations"),
    "training.epochs": ("max_train_epochs", "num_train_epochs", "epoch"),
    "training.batch_size": ("train_batch_size", "batch"),
    "training.gradient_accumulation": ("gradient_accumulation_steps", "grad_accum"),
    "training.precision": ("mixed_precision", "dtype", "weight_dtype"),
    "training.checkpoint_every": ("save_every_n_steps", "save_every", "checkpointing_steps"),
    "training.min_snr_gamma": ("snr_gamma",),
    "sample.every": ("sample_every_n_steps", "sample_every", "validation_steps"),
    "sample.prompts": ("sample_prompts", "prompts", "validation_prompt"),
    "data.folder": ("train_data_dir", "instance_data_dir", "dataset", "image_folder", "images", "path"),
    "data.trigger_word": ("trigger", "instance_prompt", "activation_text"),
    "data.repeats": ("num_repeats", "dataset_repeats"),
    "data.shuffle_tags": ("shuffle_caption",),
    "data.keep_tags": ("keep_tokens",),
    "data.tag_dropout": ("caption_tag_dropout_rate",),
    "data.caption_dropout": ("caption_dropout_rate",),
    "data.flip": ("flip_aug", "random_flip"),
    "data.colour_jitter": ("color_aug", "color_jitter"),
    "data.buckets": ("enable_bucket",),
    "data.prior_preservation": ("prior_loss_weight",),
    "model.base": ("pretrained_model_name_or_path", "base_model", "checkpoint"),
    "model.prediction_type": ("v_parameterization",),
    "output.folder": ("output_dir", "dir"),
    "output.name": ("output_name", "lora_name"),
}
"""Settings, and what other trainers call them."""
_SYNONYMS = {name: key for key, names in _ELSEWHERE.items() for name in names}
_PATTERNS = {
    "training.device": "must be cpu, cuda, cuda:1 or mps",
    "data.background": "must be a colour such as #ffffff",
}
"""The message for a text that does not match the pattern of its setting."""
_LONGEST_NAME = 200  # of which a nearest one is looked for
_MOST_NAMES = 20  # of a section that there is not
_AT_LINE = re.compile(r"at line (\d+)")


def nearest_settings(key: str) -> list[str]:
    """Return the settings that a wrong key most likely means; none if no setting resembles it.

    A name that exists in another section, or that other trainers use, goes before one that is spelled alike.
    """
    key = key[:_LONGEST_NAME]
    if called := _called(key):
        return called
    known = [name for name, _ in fields()]
    if close := difflib.get_close_matches(key, known, 1, cutoff=0.6):
        return close
    names = sorted({other.partition(".")[2] for other in known})
    alike = difflib.get_close_matches(_name_in(key), names, 1, cutoff=0.75)
    return [other for other in known if other.partition(".")[2] in alike]


def _name_in(key: str) -> str:
    return key.rpartition(".")[2].strip("-").replace("-", "_").lower()


def _called(key: str) -> list[str]:
    """Return the settings that have this name in any section, or else in another trainer."""
    section, name = key.rpartition(".")[0], _name_in(key)
    if name.endswith("_lr") and name not in _SYNONYMS:  # of the denoiser, whatever it is called
        name = "lr"
    same = [other for other, _ in fields() if other.partition(".")[2] == name]
    if len(same) > 1:
        sections = difflib.get_close_matches(section, [other.partition(".")[0] for other in same], 1)
        return [f"{sections[0]}.{name}"] if sections else same
    return same or ([_SYNONYMS[name]] if name in _SYNONYMS else [])


def nearest(key: str) -> str:
    """Return a hint for a key that is not a setting."""
    if "[" in key:
        return _nearest_in_table(key)
    close = " or ".join(f"`{name}`" for name in nearest_settings(key))
    return f"; did you mean {close}?" if close else "; see `sdlora train --help` for all settings"


def as_setting(flag: str, value: str, *, exactly: bool = False) -> str:
    """Return a hint for a setting that was given as an option such as ``--lr 1e-4``, or nothing.

    Args:
        flag: the option.
        value: what stood behind it.
        exactly: only if it is called so here or in another trainer, not if it is spelled alike.
    """
    keys = _called(flag) if exactly else nearest_settings(flag)
    written = " or ".join(f"{key}={value or 'VALUE'}" for key in keys)
    return f"; settings are given without dashes: {written}" if keys else ""


def _nearest_in_table(key: str) -> str:
    """Return a hint for a key such as ``data.sources[1].wieght``."""
    table, _, wanted = key[:_LONGEST_NAME].rpartition(".")
    field = dict(fields()).get(table.partition("[")[0])
    record = next(iter(get_args(field.annotation)), None) if field else None
    known = list(getattr(record, "model_fields", ()))
    if not known:
        return "; see `sdlora train --help` for all settings"
    close = difflib.get_close_matches(wanted, known, 1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else f"; it may have {', '.join(known)}"


def explain(item: Mapping[str, Any], typed: Mapping[str, str]) -> str:
    """Return what is wrong with one setting, in the user's words.

    Args:
        item: an error of pydantic.
        typed: dotted key -> what stood behind its ``=`` on a command line.
    """
    location = [str(part) for part in item["loc"]]
    key = ".".join(location[:2])
    if len(location) > 2 and _is_union(key, location[2]):
        location = location[:2]
    if len(location) > 2:  # inside a table of a list: data.sources[1].weight
        key += "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in location[2:])
    kind, given = item["type"], item.get("input")
    if kind == "extra_forbidden" and len(location) == 1 and isinstance(given, dict):  # a whole section
        names = [f"{key}.{name}" for name in list(given)[:_MOST_NAMES]]
        return "; ".join(f"`{shown(name)}` is not a setting{nearest(name)}" for name in names) or (
            f"[{shown(key)}] is not a section of settings; there are {', '.join(Config.model_fields)}"
        )
    if kind == "extra_forbidden":
        return f"`{shown(key)}` is not a setting{nearest(key)}"
    if kind == "model_type":
        return f"`{shown(key)}` is a section: write [{shown(key)}] in a TOML file, and its settings below"
    value = typed.get(key, given)
    return f"`{shown(key)}={shown(_brief(value))}`: {_message(key, item, value, key in typed)}"


def _message(key: str, item: Mapping[str, Any], value: Any, on_command_line: bool) -> str:
    """Return what is wrong with a value."""
    kind, given = item["type"], item.get("input")
    if on_command_line and value == "":
        return "is empty; give a value, or leave it out"
    if kind == "literal_error":
        choices = choices_of(dict(fields())[key.partition("[")[0]])
        close = difflib.get_close_matches(_brief(given)[:_LONGEST_NAME], choices, 1)
        return "must be one of " + ", ".join(choices) + (f" (did you mean {close[0]}?)" if close else "")
    if kind in ("tuple_type", "dict_type"):
        return _as_list_or_table(key, kind, shown(_brief(value)), on_command_line)
    if kind in ("string_type", "path_type") and not isinstance(given, list | dict):
        return f"is {_name_of(given)} where a text is meant; put it in quotes: {_quoted(key, given)}"
    if kind in ("int_parsing", "float_parsing", "int_type", "float_type"):
        whole = kind.startswith("int")
        number = "whole number (integer)" if whole else "number"
        return f"must be a {number}{_as_number(shown(_brief(given)), whole=whole)}"
    if kind in ("bool_parsing", "bool_type"):
        return "must be true or false"
    if kind == "string_pattern_mismatch" and key in _PATTERNS:
        return _PATTERNS[key]
    return str(item["msg"]).removeprefix("Input ").removeprefix("Value error, ")


def _brief(given: Any) -> str:
    """Return a given value as text; an endless one only by its type."""
    try:
        return str(given)
    except (ValueError, RecursionError):
        return type(given).__name__


def _is_union(key: str, inside: str) -> bool:
    """Tell whether ``inside`` is one of a setting's possible types: pydantic reports each of them."""
    field = dict(fields()).get(key)
    return field is not None and not inside.isdigit() and get_origin(field.annotation) is not dict


def _as_number(text: str, *, whole: bool) -> str:
    """Return how to write a number with a decimal comma; an empty text for anything else."""
    if whole and re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+", text):
        return f"; write {text.replace(',', '')}"
    if not whole and re.fullmatch(r"[+-]?\d+,\d+([eE][+-]?\d+)?", text):
        return f"; write {text.replace(',', '.')}, with a point"
    return ""


def _name_of(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, datetime.date | datetime.time):
        return "a date or time"
    return "a number" if isinstance(value, int | float) else f"of the kind {type(value).__name__}"


def _quoted(key: str, value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else shown(_brief(value))
    return f"{key.rpartition('.')[2]} = {json.dumps(text, ensure_ascii=False)}"


def _as_list_or_table(key: str, kind: str, given: Any, on_command_line: bool) -> str:
    """Return how to write the list or table where a plain value was given."""
    if key == "data.sources":
        return "is a list of tables: write [[data.sources]] tables in a TOML file, and give it with --config"
    text = str(given).strip().strip("[]{}")
    if kind == "dict_type":
        return _written(key, '{"mid_block" = 4}', "is a table", on_command_line)
    parts = [part.strip(" '\"") for part in text.split(",")]
    try:
        parse_toml(f"value = [{text}]")
        value = f"[{text}]"
    except ValueError:
        value = json.dumps([part for part in parts if part], ensure_ascii=False)
    return _written(key, value, "is a list", on_command_line)


def _written(key: str, value: str, what: str, on_command_line: bool) -> str:
    if on_command_line:
        return f"{what}: write {key}='{value}', in single quotes for the shell"
    return f"{what}: write {key.rpartition('.')[2]} = {value}"


def toml_problem(error: ValueError, text: str) -> str:
    """Return what is wrong with a TOML file, and how the line is written if Windows paths are the cause."""
    place = _AT_LINE.search(str(error))
    lines = text.splitlines()
    line = lines[int(place[1]) - 1].strip()[:300] if place and int(place[1]) <= len(lines) else ""
    key, equals, value = (part.strip() for part in line.partition("="))
    if "\\" in value and '"' in value:
        return (
            f"a backslash between double quotes begins an escape ({error}); put Windows paths between single "
            f"quotes: {key} = {value.replace(chr(34), chr(39))}"
        )
    if text.lstrip().startswith("{"):
        return f"is JSON, and settings are TOML ({error}); `sdlora import` reads other trainers' settings"
    if value in ("True", "False"):
        return f"not valid TOML: {error}; write it in small letters: {key} = {value.lower()}"
    if equals and re.match(r"[^\W\d_]|[~./\\]", value) and "'" not in value:
        return f"not valid TOML: {error}; texts stand in quotes: {key} = '{value}'"
    return f"not valid TOML: {error}; correct that line"


def of_another_trainer(keys: Iterable[str], file: Path) -> list[str]:
    """Return a hint for a file whose settings are called as another trainer calls them."""
    theirs = [key for key in keys if key in _SYNONYMS]
    if len(theirs) < 2:
        return []
    return [f"these are another trainer's settings: `sdlora import {file}` makes ours of them"]


def where(file: Path | None) -> str:
    """Return the source of settings, for the start of a message."""
    return f" in {file} and the command line" if file else ""
