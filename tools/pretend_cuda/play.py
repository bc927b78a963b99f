"""Plays one scenario in this process, which :mod:`.command` starts with the shims preloaded.

``python -m tools.pretend_cuda.play NAME LIBRARIES FOLDER ANSWER`` writes the answer as JSON.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from .ledger import ROOT
from .scenarios import SCENARIOS
from .stage import Stage


def play(name: str, libraries: Path, folder: Path) -> dict[str, Any]:
    """Play a scenario and return its outcome, the facts it states, and what the ledger holds."""
    from .device import Cards
    from .dispatch import install
    from .ledger import Ledger

    scenario = SCENARIOS[name]
    folder.mkdir(parents=True)
    stage = Stage(folder, Cards(scenario.cards, libraries, Ledger()))
    mode = install(stage.cards)
    began, outcome, where, trace = time.process_time(), "ok", "", ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with mode:
                scenario.play(stage)
        except Exception as error:  # whatever it is, it is what a user would have seen
            text = str(error).strip().splitlines()
            outcome = f"{type(error).__name__}: {text[0] if text else ''}"
            where, trace = _origin(error), traceback.format_exc()
    answer = {
        "outcome": outcome,
        "where": where,
        "trace": trace,
        "seconds": round(time.process_time() - began, 1),
        "facts": stage.facts,
        "notices": [getattr(event, "message", "") for event in stage.told("Notice")],
    }
    return answer | dict(stage.cards.ledger.to_dict())


def _origin(error: BaseException) -> str:
    """Return the innermost line of ours that an error passed."""
    lines = [
        f"{Path(frame.filename).relative_to(ROOT).as_posix()}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith((f"{ROOT / 'sdlora'}/", f"{ROOT / 'ui'}/"))
    ]
    return lines[-1] if lines else ""


if __name__ == "__main__":
    scenario_name, library_folder, work_folder, answer_file = sys.argv[1:]
    played = play(scenario_name, Path(library_folder), Path(work_folder))
    Path(answer_file).write_text(json.dumps(played, indent=1, default=str), encoding="utf-8")
