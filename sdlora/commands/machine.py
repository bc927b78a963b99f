"""``sdlora doctor``: one page about this machine."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

from ..files import size_text
from ..machine import MachineFacts, examine, remedies, unserved, why_idle

Result = tuple[dict[str, Any], int]

_SIGNS = {True: "ok", False: "NO", None: "  "}

_LITTLE = 2 * 2**30  # bytes of main memory below which little can be done


@dataclass(frozen=True)
class Row:
    """One line of the page.

    Attributes:
        topic: what the line is about.
        value: its state.
        good: whether that is good; None where it is neither good nor bad.
        remedies: commands that correct it, one after the other.
    """

    topic: str
    value: str
    good: bool | None = None
    remedies: tuple[str, ...] = ()


def declare_doctor(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``sdlora doctor``: none."""


def run_doctor(options: argparse.Namespace) -> Result:
    """Run ``sdlora doctor``; the exit code is 1 if something is wrong, e.g. a card cannot be used."""
    facts = examine()
    chosen = _chosen()
    rows = page(facts, chosen)
    for row in rows:
        print(f"{_SIGNS[row.good]}  {row.topic:<14} {row.value}")
        for command in row.remedies:
            print(f"      {'':<14}   {command}")
    answer = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "chosen": chosen,
        "facts": dataclasses.asdict(facts),
    }
    return answer, int(any(row.good is False for row in rows))


def page(facts: MachineFacts, chosen: dict[str, str]) -> list[Row]:
    """Return the page about a machine, given what sdlora would choose on it."""
    built = f"built for CUDA {facts.cuda_build}" if facts.cuda_build else "built without CUDA"
    rows = [
        Row("python", facts.python),
        Row("torch", f"{facts.torch}, {built}", None if facts.cuda_build or not facts.present else False),
        *_cards(facts),
        Row("CPU", f"{facts.cores} cores"),
        Row("memory", f"{size_text(facts.free)} of {size_text(facts.memory)} free", facts.free > _LITTLE),
        *_packages(facts),
    ]
    return rows + [Row("chosen", f"{key}: {value}") for key, value in chosen.items()]


def _cards(facts: MachineFacts) -> list[Row]:
    rows = []
    reason = why_idle(facts)
    if facts.driver is not None:
        rows.append(Row("NVIDIA driver", facts.driver, True))
    for number, card in enumerate(facts.cards):
        lack = unserved(facts.architectures, card)
        rows.append(Row(f"cuda:{number}", lack or str(card), lack is None))
    if reason is not None:
        rows.append(Row("card", reason, False, tuple(remedies(facts))))
    elif facts.mps:
        rows.append(Row("card", "an Apple GPU (mps)", True))
    elif not facts.cards:
        rows.append(Row("card", "none: training runs on the CPU"))
    return rows


def _packages(facts: MachineFacts) -> list[Row]:
    """Return which packages for NVIDIA cards are installed; nothing here requires them."""
    uses = {
        "xformers": "another attention; torch's own is as good",
        "triton": "compiles kernels; comes with torch for CUDA on Linux",
        "bitsandbytes": "optimizers in 8 bits",
    }
    rows = []
    for name, use in uses.items():
        version = facts.packages.get(name) or facts.packages.get(f"{name}-windows")
        rows.append(Row(name, version if version else f"not installed ({use})", True if version else None))
    return rows


def _chosen() -> dict[str, str]:
    """Return what training chooses on this machine when nothing is set."""
    from ..errors import ConfigError
    from ..families.compute import Compute
    from ..number_formats import dtype_name

    try:
        compute = Compute.choose()
    except ConfigError as error:
        return {"training.device": str(error)}
    attention = compute.attention.training
    return {
        "training.device": str(compute.device),
        "training.precision": dtype_name(compute.dtype),
        "training.attention": f"{attention.name} ({attention.reason})",
    }
