"""What can be done next, as lines to copy: after a run was trained, after an adapter was exported."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SdloraError
from ..files import parse_json
from ..run_folder import RunFolder
from .arguments import command_line

if TYPE_CHECKING:
    from ..exporting.export import ExportReport

_STRENGTHS = "0,0.5,0.75,1"


def after_training(folder: Path, adapter_file: Path) -> list[str]:
    """Return the commands that draw with a finished run's adapter and take it elsewhere.

    Args:
        folder: of the run.
        adapter_file: what it wrote.
    """
    from ..config.schema import ModelConfig
    from ..config.toml import load_config

    export = command_line("sdlora", "export", folder, "--format", "webui", "--output", "exported")
    with suppress(SdloraError):  # the settings of the run could be gone or changed by now
        config = load_config(RunFolder(folder).config_file)
        base: list[object] = []
        for name, value in config.model:
            flag = f"--{name.replace('_', '-')}"
            if name == "base":
                base += [flag, value]
            elif value is True or value is False:
                base.append(flag if value else f"--no{flag[1:]}")
            elif value != ModelConfig.model_fields[name].default:
                base += [flag, value]
        prompts = [line.prompt for line in config.sample.lines]
        prompt = prompts[0] if prompts else config.data.trigger_word or "a house by the sea"
        words = ["sdlora", "generate", *base, "--adapter", adapter_file, "--prompt", prompt]
        draw = command_line(*words, "--strengths", _STRENGTHS, "--output", "images")
        return ["next, see it at several strengths, then take it to a WebUI:", f"  {draw}", f"  {export}"]
    return ["next, take it to a WebUI:", f"  {export}"]


def after_export(report: ExportReport, *, in_webui: bool) -> str:
    """Return how the exported files are used.

    Args:
        report: of the export.
        in_webui: whether they were copied into a WebUI as well.
    """
    adapter = report.adapter
    if report.format == "webui":
        trigger, strength = _card(adapter)
        prompt = f"<lora:{adapter.stem}:{strength:g}>{f' {trigger}' if trigger else ''}"
        first = (
            "refresh the WebUI's list of LoRAs" if in_webui else f"copy {adapter} to the WebUI's models/Lora"
        )
        return f"next: {first}, and write {prompt} into the prompt"
    if report.format == "diffusers":
        return f"next: pipeline.load_lora_weights({str(adapter)!r})"
    return f"next: PeftModel.from_pretrained(model, {str(adapter)!r})"


def _card(adapter: Path) -> tuple[str, float]:
    """Return trigger words and recommended strength from the card beside a file; 1 where it names none."""
    with suppress(OSError, ValueError):
        card = parse_json(adapter.with_suffix(".json").read_text(encoding="utf-8"))
        return str(card.get("activation text") or ""), float(card.get("preferred weight") or 1.0)
    return "", 1.0
