"""What this machine can compute with, as the page shows it: `sdlora doctor` in a separate process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from html import escape
from typing import Any

_SECONDS = 120
_SIGNS = {True: "ok", False: "problem", None: ""}


def machine_html() -> str:
    """Run the doctor and return its page; torch, and its memory on the card, stay out of this process."""
    command = [sys.executable, "-m", "sdlora", "doctor", "--json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=_SECONDS)
        return page_html(json.loads(done.stdout.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, LookupError) as error:
        return (
            f'<p class="sd-problem" role="alert">The machine could not be examined ({escape(str(error))}); '
            "run <code>sdlora doctor</code> in a shell.</p>"
        )


def page_html(answer: Mapping[str, Any]) -> str:
    """Return the doctor's answer as a table; commands that correct something stand below it."""
    rows = "".join(
        f"<tr><th scope='row'>{escape(row['topic'])}</th><td>{_SIGNS[row['good']]}</td>"
        f"<td>{escape(row['value'])}{_commands(row['remedies'])}</td></tr>"
        for row in answer["rows"]
    )
    return f'<div class="sd-scroll"><table class="sd-reasons"><tbody>{rows}</tbody></table></div>'


def _commands(commands: list[str]) -> str:
    return "".join(f"<br><code>{escape(command)}</code>" for command in commands)
