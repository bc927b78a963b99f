"""Draw every learning-rate schedule into one PNG, as ``docs/training.md`` shows them.

python tools/draw_schedules.py docs/images/schedules.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sdlora.config.schema import OptimizerConfig
from sdlora.training.schedules import SCHEDULES, schedule_factor

STEPS, WARMUP = 400, 40
OWN: dict[str, dict[str, Any]] = {
    "cosine_with_restarts": {"schedule_cycles": 3},
    "polynomial": {"schedule_power": 2.0},
}
"""Settings of single schedules in the image."""


def curves() -> dict[str, list[float]]:
    """Return the factor at every step, by the name shown."""
    shown = {}
    for name in SCHEDULES:
        more = OWN.get(name, {})
        settings = OptimizerConfig.model_validate({"schedule": name, "warmup_steps": WARMUP, **more})
        words = [f"{key.removeprefix('schedule_')} {value:g}" for key, value in more.items()]
        label = ", ".join([name, *words])
        shown[label] = [schedule_factor(settings, step, STEPS) for step in range(STEPS)]
    floor = OptimizerConfig(schedule="cosine", warmup_steps=WARMUP, schedule_floor=0.2)
    shown["cosine, floor 0.2"] = [schedule_factor(floor, step, STEPS) for step in range(STEPS)]
    return shown


def draw(file: Path) -> None:
    """Write the PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.8), dpi=110, layout="constrained")
    panels = figure.subplots(2, 4, sharex=True, sharey=True)
    for panel, (label, factors) in zip(panels.flat, curves().items(), strict=True):
        panel.plot(range(STEPS), factors, color="#1f5f99", linewidth=1.6)
        panel.set_title(label, fontsize=9)
        panel.set_ylim(-0.03, 1.05)
        panel.grid(alpha=0.25)
    figure.supxlabel(f"step of {STEPS}, the first {WARMUP} of them warm-up", fontsize=9)
    figure.supylabel("share of the peak learning rate", fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Software": "sdlora tools/draw_schedules.py"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    draw(parser.parse_args().file)
