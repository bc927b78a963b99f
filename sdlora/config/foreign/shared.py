"""What several trainers spell alike: optimizers, schedules, number formats, samplers, previews' prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ...errors import ConfigError
from ..prompt_lines import MOST_LINES, read_line
from .ledger import Ledger, key_values, numbers

PRECISIONS = {
    "no": "fp32",
    "float": "fp32",
    "float32": "fp32",
    "fp32": "fp32",
    "float_32": "fp32",
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "float_16": "fp16",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "bfloat_16": "bf16",
}
OPTIMIZERS = {
    "adamw": "adamw",
    "adam": "adamw",
    "adamw_adv": "adamw",
    "adamw_bf16": "adamw",
    "torch_adamw": "adamw",
    "adamw8bit": "adamw8bit",
    "adamw8": "adamw8bit",
    "pagedadamw8bit": "adamw8bit",
    "adam8bit": "adamw8bit",
    "adam_8bit": "adamw8bit",
    "adamw_8bit": "adamw8bit",
    "bnb_adamw8bit": "adamw8bit",
    "adam8": "adamw8bit",
    "pagedadamw": "adamw",
    "pagedadamw32bit": "adamw",
    "lion": "lion",
    "lion8bit": "lion",
    "pagedlion8bit": "lion",
    "lion_8bit": "lion",
    "bnb_lion": "lion",
    "adafactor": "adafactor",
    "optimi_lion": "lion",
    "optimi_adamw": "adamw",
    "prodigy": "prodigy",
    "prodigy_plus_schedule_free": "prodigy",
    "prodigy8bit": "prodigy",
    "adamwschedulefree": "adamw_schedulefree",
    "schedule_free_adamw": "adamw_schedulefree",
    "adamw_schedulefree": "adamw_schedulefree",
    "schedulefree": "adamw_schedulefree",
    "schedulefreeadamw": "adamw_schedulefree",
    "came": "came",
    "came_8bit": "came",
    "muon": "muon",
}
"""Their names in lower case -> the nearest of ours; which of these there are, the schema says."""
EXACT_OPTIMIZERS = ("adamw", "adafactor", "lion", "prodigy", "adamw8bit", "came", "adamwschedulefree", "muon")
SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "cosine_with_restarts": "cosine_with_restarts",
    "cosine_with_hard_restarts": "cosine_with_restarts",
    "polynomial": "polynomial",
    "rex": "rex",
    "inverse_sqrt": "inverse_sqrt",
}
SAMPLERS = {
    "ddim": "DDIM",
    "euler": "Euler",
    "k_euler": "Euler",
    "euler_a": "Euler a",
    "k_euler_a": "Euler a",
    "euler a": "Euler a",
    "dpmsolver++": "DPM++ 2M",
    "dpmsolver": "DPM++ 2M",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_karras": "DPM++ 2M Karras",
    "unipc": "UniPC",
    "uni_pc": "UniPC",
    "heun": "Heun",
    "dpmpp": "DPM++ 2M",
    "dpmpp_karras": "DPM++ 2M Karras",
    "euler_karras": "Euler",
    "lcm": "LCM",
    "dpmpp_2m_sde_karras": "DPM++ 2M SDE Karras",
    "dpmpp_sde_karras": "DPM++ SDE Karras",
}
_OPTION = re.compile(r"\s--([a-z]+)\s")


def optimizer(ledger: Ledger, name_of: str, args: Any = None, args_name: str = "") -> None:
    """Translate an optimizer and its ``name=value`` arguments."""
    given = ledger.text(name_of, "adamw")
    plain = given.rpartition(".")[2].lower().replace("-", "_")
    ours = OPTIMIZERS.get(plain)
    if not ledger.has(name_of):
        ours = str(ledger.values.get("optimizer.name", "adamw"))  # AdamW everywhere where nothing is said
    elif ours is None or not ledger.allows("optimizer.name", ours):
        fallback = "adamw8bit" if "8" in plain and ledger.allows("optimizer.name", "adamw8bit") else "adamw"
        ledger.put(
            name_of,
            "optimizer.name",
            fallback,
            f"sdlora has no {given}; its learning rate may not suit {fallback}",
        )
        ours = fallback
    elif plain in EXACT_OPTIMIZERS:
        ledger.put(name_of, "optimizer.name", ours)
    else:
        ledger.put(name_of, "optimizer.name", ours, f"the nearest to {given}")
    if args_name and ledger.has(args_name):
        optimizer_arguments(ledger, args, args_name, ours)
    if ours == "prodigy" and "optimizer.d0" not in ledger.values and not ledger.has("optimizer.d0"):
        ledger.implied("d0", "optimizer.d0", 1e-6, "its default there")


def optimizer_arguments(ledger: Ledger, args: Any, label: str, ours: str) -> None:
    """Translate arguments of an optimizer, one row each."""
    table = key_values(args) if not isinstance(args, dict) else {k: str(v) for k, v in args.items()}
    keys = {
        "weight_decay": "optimizer.weight_decay",
        "eps": "optimizer.epsilon",
        "epsilon": "optimizer.epsilon",
        "d_coef": "optimizer.d_coef",
        "d0": "optimizer.d0",
    }
    done = {
        "decouple": "true",
        "use_bias_correction": "true",
        "safeguard_warmup": "true",
        "scale_parameter": "false",
        "relative_step": "false",
        "warmup_init": "false",
    }
    for name, value in table.items():
        full, amounts = ledger.inner(label, name, value), numbers(value)
        if name == "betas" and len(amounts) >= 2:
            ledger.put(full, "optimizer.betas", (amounts[0], amounts[1]))
        elif name in keys and amounts and ledger.allows(keys[name], amounts[0]):
            ledger.put(full, keys[name], amounts[0])
        elif done.get(name) == value.lower():
            ledger.default(full, "as sdlora's does")
        else:
            ledger.none(full, f"sdlora's {ours} has no such setting")


def schedule(ledger: Ledger, name_of: str, default: str = "constant") -> None:
    """Translate a schedule of the learning rate."""
    given = ledger.text(name_of, default).lower()
    ours = SCHEDULES.get(given)
    if not ledger.has(name_of):
        ledger.implied(name_of, "optimizer.schedule", ours, "its default there")
    elif ours is not None and ledger.allows("optimizer.schedule", ours):
        exact = given == ours or given in ("cosine_with_hard_restarts",)
        if exact:
            ledger.put(name_of, "optimizer.schedule", ours)
        else:
            ledger.put(name_of, "optimizer.schedule", ours, "with optimizer.warmup_steps or its floor apart")
    else:
        nearest = "cosine" if ours == "cosine_with_restarts" or "cos" in given else "linear"
        ledger.put(name_of, "optimizer.schedule", nearest, f"sdlora has no {given}; the nearest")


def precision(ledger: Ledger, name_of: str, key: str) -> None:
    """Translate a number format."""
    if not ledger.has(name_of):
        return
    given = ledger.text(name_of).lower()
    ours = PRECISIONS.get(given)
    if ours is None:
        ledger.none(name_of, "sdlora has fp32, bf16 and fp16")
    elif ours == given:
        ledger.put(name_of, key, ours)
    else:
        ledger.put(name_of, key, ours)


def sampler(ledger: Ledger, name_of: str) -> None:
    """Translate a sampler of previews."""
    if not ledger.has(name_of):
        return
    given = ledger.text(name_of)
    ours = SAMPLERS.get(given.lower())
    if ours is not None and ledger.allows("sample.sampler", ours):
        ledger.put(name_of, "sample.sampler", ours)
    else:
        ledger.none(name_of, f"sdlora has no {given}; previews are drawn with its default sampler")


class RefusedOption(NamedTuple):
    """An option of a line of prompts that sdlora does not have, or whose value it does not take."""

    line: int
    name: str
    value: str
    reason: str


def prompt_lines(text: str) -> tuple[list[str], list[RefusedOption]]:
    """Return the prompts of kohya's prompt file as :mod:`sdlora.config.prompt_lines` reads them.

    Each keeps the options of its own line (negative, size, seed, guidance, steps, sampler); what
    cannot be kept is told beside. Sizes become multiples of 8 px, as kohya makes them.
    """
    prompts: list[str] = []
    refused: list[RefusedOption] = []
    for number, line in enumerate(text.splitlines()[:MOST_LINES], 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        prompt, *parts = _OPTION.split(line)
        kept = [prompt.strip()]
        for name, value in zip(parts[::2], (part.strip() for part in parts[1::2]), strict=True):
            if name.lower() in ("w", "h") and value.isdecimal() and len(value) < 6:
                value = str(max(64, int(value) - int(value) % 8))
            if name.lower() == "am":  # of gen_img.py; taken here, images would differ
                refused.append(RefusedOption(number, name, value, "training there takes no notice of it"))
                continue
            try:
                read_line(f"x --{name} {value}")
            except ConfigError as error:
                refused.append(RefusedOption(number, name, value, str(error).partition(": ")[2]))
            else:
                kept.append(f"--{name} {value}")
        prompts.append(" ".join(kept))
    return prompts, refused


def base_format(ledger: Ledger, names: Sequence[str], format_name: str) -> None:
    """Translate what another program keeps the frozen U-Net in.

    Args:
        ledger: the other program's settings.
        names: the settings that say so; only those that are given.
        format_name: its word for the format, e.g. ``nf4-bnb`` or ``qfloat8``.
    """
    ours = "fp8" if "8" in format_name else "nf4"
    reason = "the U-Net, with a scale for each row or block; text encoders stay whole"
    ledger.put(names, "training.base_format", ours, reason)
