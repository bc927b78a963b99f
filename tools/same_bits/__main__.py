"""Record the bits of seeded runs of a checkout, and compare two records.

Usage: python -m tools.same_bits record --checkout DIR --output FILE.json [--only NAME ...]
       python -m tools.same_bits compare BEFORE.json AFTER.json [--renamed OLD=NEW] [--only NAME ...]
       python -m tools.same_bits list

``record`` is told a word of the command lines that the checkout spells in another way, ``compare`` a word of
keys and texts that was renamed on purpose: ``--renamed=--picture=--image``, ``--renamed Noticed=Notice``.
``record --train-with training.fast=off`` adds a setting that the other checkout does not know.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .artefacts import artefact, artefacts, settled
from .cases import CASES, with_needs
from .commands import Commands
from .comparison import compare, renamed, table
from .material import lay_out


class Recorder:
    """Runs cases of one checkout in a folder.

    Args:
        commands: of the checkout.
        work: an empty folder.
        names: words of the command lines that this checkout spells in another way (old -> new).
        settings: added to the command lines that train.
    """

    def __init__(
        self, commands: Commands, work: Path, names: Mapping[str, str], settings: Sequence[str] = ()
    ) -> None:
        self._commands, self._work, self._names, self._settings = commands, work, names, settings
        self._material = lay_out(commands.checkout, commands.python, work / "material")
        self._places = {
            str(work.resolve()): "<work>",
            str(work): "<work>",
            str(commands.checkout): "<checkout>",
        }

    def record(self, name: str) -> dict[str, Any]:
        """Return what a case answers and writes."""
        case, here = CASES[name], self._work / name
        here.mkdir()
        places = self._material | {"here": here, "work": self._work, "cache": self._work / "caches" / name}

        def filled(text: str) -> str:
            for key, place in places.items():
                text = text.replace("{" + key + "}", place.as_posix())
            return text

        for folder in case.folders:
            Path(filled(folder)).mkdir(parents=True)
        for source, target in case.copies:
            shutil.copy2(filled(source), filled(target))
        answers = []
        for number, command in enumerate(case.commands):
            words = [filled(word) for word in renamed(list(command.arguments), self._names)]
            if words[0] == "train":
                words += self._settings
            stop = None
            if command.stopped:
                events = self._work / f"events-{name}-{number}.jsonl"
                words += ["--events", str(events)]
                stop = (events, here / "run")
            outcome = self._commands.run(words, command.threads, stop)
            if outcome.code not in (0, 1, 2) or "Traceback" in outcome.stderr:
                print(outcome.stderr[-2000:], file=sys.stderr)
            answers.append({"code": outcome.code, "answer": settled(outcome.answer, self._places)})
        result: dict[str, Any] = {"answers": answers, "files": artefacts(here, self._places)}
        if case.same_as:
            pairs = [
                tuple(artefact(Path(filled(file)), {}).get("tensors") for file in pair)
                for pair in case.same_as
            ]
            result["same bits as without a stop"] = [first == other for first, other in pairs]
        return result


def record(options: argparse.Namespace) -> int:
    """Write the record of a checkout; return 1 if a resumed run differs or a command broke."""
    unknown = [name for name in options.only or () if name not in CASES]
    if unknown:
        raise SystemExit(f"no case named {', '.join(unknown)}; python -m tools.same_bits list shows all")
    asked = list(options.only or CASES)
    checkout = options.checkout.absolute()
    broken: list[str] = []
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="same-bits-", dir=options.output.parent.absolute()) as folder:
        work = Path(folder)
        with Commands(checkout, work, options.python, options.threads) as commands:
            recorder = Recorder(commands, work, _pairs(options.renamed), options.train_with)
            about = {"commit": _commit(checkout), "threads": options.threads, **commands.versions()}
            cases = _kept(options.output, about) if options.only else {}
            for name in with_needs(asked):
                began = time.monotonic()
                case = recorder.record(name)
                codes = [answer["code"] for answer in case["answers"]]
                print(f"{name:28} {time.monotonic() - began:6.1f} s  exit codes {codes}", flush=True)
                if not set(codes) <= {0, 1, 2} or not all(case.get("same bits as without a stop", ())):
                    broken.append(name)
                if name in asked:  # written at once: a long record that is cut short keeps what it has
                    cases[name] = case
                    text = json.dumps({"about": about, "cases": cases}, indent=1)
                    options.output.write_text(text, encoding="utf-8")
    print(f"{len(cases)} cases in {options.output}" + (f"; broken: {', '.join(broken)}" if broken else ""))
    return int(bool(broken))


def compared(options: argparse.Namespace) -> int:
    """Print two records side by side; return 1 if anything differs or is missing."""
    before, after = (json.loads(file.read_text(encoding="utf-8")) for file in (options.before, options.after))
    for key in sorted(before["about"].keys() | after["about"].keys()):
        old, new = before["about"].get(key), after["about"].get(key)
        if old != new:
            print(f"{key}: {old} -> {new}")
    if options.only:
        for record_of in (before, after):
            cases = record_of["cases"]
            record_of["cases"] = {name: cases[name] for name in options.only if name in cases}
        absent = [name for name in options.only if name not in before["cases"]]
        if absent:
            raise SystemExit(f"{options.before}: has no case named {', '.join(absent)}")
    rows = compare(before["cases"], after["cases"], _pairs(options.renamed), options.without)
    print(table(rows))
    bad = [row.case for row in rows if row.verdict in ("differs", "missing")]
    if bad:
        print(f"not the same: {', '.join(bad)}")
    return int(bool(bad))


def _kept(file: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cases of an earlier record of the same commit, to which some are added."""
    if not file.exists():
        return {}
    earlier = json.loads(file.read_text(encoding="utf-8"))
    if earlier["about"] != about:
        raise SystemExit(f"{file}: is a record of {earlier['about']}, not of {about}; give another --output")
    cases: dict[str, Any] = earlier["cases"]
    return cases


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    """Return OLD=NEW texts as a table; OLD may be an option such as ``--picture``."""
    bad = [text for text in texts if "=" not in text.strip("=")]
    if bad:
        raise SystemExit(f"--renamed {bad[0]}: give OLD=NEW")
    return dict(text.split("=", 1) for text in texts)


def _commit(checkout: Path) -> str:
    """Return the checkout's commit, with a + if files were changed since."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True)
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.same_bits", description=__doc__.split("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    recording = actions.add_parser("record", help="write the hashes of a checkout's seeded runs")
    recording.add_argument("--checkout", type=Path, default=Path(), metavar="DIR")
    recording.add_argument("--output", type=Path, required=True, metavar="FILE")
    recording.add_argument(
        "--only", nargs="+", metavar="NAME", help="these cases (and what they need); others in FILE stay"
    )
    recording.add_argument(
        "--python", type=Path, metavar="FILE", help="interpreter; the checkout's .venv if there"
    )
    recording.add_argument("--threads", type=int, default=1)
    recording.add_argument(
        "--renamed", action="append", default=[], metavar="OLD=NEW", help="word of the command lines"
    )
    recording.add_argument(
        "--train-with", action="append", default=[], metavar="KEY=VALUE", help="setting of every training"
    )
    two = actions.add_parser("compare", help="show what differs between two records")
    two.add_argument("before", type=Path)
    two.add_argument("after", type=Path)
    two.add_argument(
        "--renamed", action="append", default=[], metavar="OLD=NEW", help="word of keys and texts BEFORE"
    )
    two.add_argument("--without", action="append", default=[], metavar="KEY", help="leave these keys out")
    two.add_argument("--only", nargs="+", metavar="NAME", help="these cases")
    actions.add_parser("list", help="show the cases")
    options = parser.parse_args(arguments)
    if options.action == "list":
        for name, case in CASES.items():
            print(f"{name:28} {len(case.commands):2} commands  needs {', '.join(case.needs) or 'nothing'}")
        return 0
    return record(options) if options.action == "record" else compared(options)


if __name__ == "__main__":
    raise SystemExit(main())
