"""(c) What a run needs is changed, deleted or damaged between stop and resume.

What is only kept for speed or for show may go: the run comes to the same bits. What the numbers follow from
may not: it is refused, nothing is lost, and when it is back the run comes to the same bits.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from tools.tiny_base import write_tiny_base

from .play import Place, Play, Tally, changed_byte, complaints
from .warm import Fault

Change = Callable[[Place, random.Random], None]
Expected = Literal["same", "refused", "same or refused"]


@dataclass(frozen=True)
class Disturbance:
    """A change between stop and resume, what is to come of it, and what may differ then."""

    change: Change
    expected: Expected
    may_differ: frozenset[str] = frozenset()


def _one(folder: Path, pattern: str, rng: random.Random) -> Path:
    return rng.choice(sorted(file for file in folder.rglob(pattern) if file.is_file()))


def _edit_image(place: Place, rng: random.Random) -> None:
    file = _one(place.images, "*.png", rng)
    with Image.open(file) as image:
        changed = image.convert("RGB")
    changed.putpixel((rng.randrange(changed.width), rng.randrange(changed.height)), (1, 2, 3))
    changed.save(file)


def _delete(part: str, pattern: str) -> Change:
    return lambda place, rng: _one(place.folder / part, pattern, rng).unlink()


def _damage(part: str, pattern: str) -> Change:
    return lambda place, rng: changed_byte(_one(place.folder / part, pattern, rng), rng)


def _shorten(part: str, pattern: str) -> Change:
    def change(place: Place, rng: random.Random) -> None:
        file = _one(place.folder / part, pattern, rng)
        file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])

    return change


def _remove(part: str) -> Change:
    return lambda place, rng: shutil.rmtree(place.folder / part)


def _newest_checkpoint(place: Place) -> Path:
    return max((place.run / "checkpoints").glob("step-*"))


def _damage_newest(place: Place, rng: random.Random) -> None:
    file = _one(_newest_checkpoint(place), "*", rng)
    rng.choice((changed_byte, lambda file, rng: file.unlink(), lambda file, rng: file.write_bytes(b"")))(
        file, rng
    )


def _damage_every_checkpoint(place: Place, rng: random.Random) -> None:
    for folder in (place.run / "checkpoints").glob("step-*"):
        changed_byte(folder / "optimizer.safetensors", rng)


def _strangers(place: Place, rng: random.Random) -> None:
    """Leave behind what people and programs that keep folders alike leave behind."""
    run = place.run
    shutil.copytree(_newest_checkpoint(place), run / "checkpoints" / "step-000004 copy")
    (run / "checkpoints" / "step-000099").write_text("a file", encoding="utf-8")
    (run / "checkpoints" / ".DS_Store").write_bytes(b"\0")
    for name in ("step-000004-1 (1).png", "step-000004-best.png", "step-x-1.png", "Thumbs.db"):
        (run / "samples").mkdir(exist_ok=True)
        (run / "samples" / name).write_bytes(b"no image")
    (run / "events.jsonl.tmp").write_text("x", encoding="utf-8")
    (run / "desktop.ini").write_text("x", encoding="utf-8")


def _other_base(place: Place, rng: random.Random) -> None:
    shutil.rmtree(place.base)
    write_tiny_base(place.base, seed=8)


def _words(text: str) -> Change:
    def change(place: Place, rng: random.Random) -> None:
        _one(place.images, "*.txt", rng).write_text(text, encoding="utf-8")

    return change


def _not_text(place: Place, rng: random.Random) -> None:
    _one(place.images, "*.txt", rng).write_bytes(b"\xff\xfe\x00a cat")


def _add_image(place: Place, rng: random.Random) -> None:
    shutil.copy(_one(place.images, "*.png", rng), place.images / "more.png")
    (place.images / "more.txt").write_text("another", encoding="utf-8")


def _events_gone(place: Place, rng: random.Random) -> None:
    (place.run / "events.jsonl").unlink()


def _settings_short(place: Place, rng: random.Random) -> None:
    file = place.run / "config.toml"
    file.write_text(file.read_text(encoding="utf-8")[: rng.randrange(400)] + "\n= [", encoding="utf-8")


_CURVES = frozenset({"losses", "validation losses"})
_SHOWN = frozenset({"previews"})
DISTURBANCES: dict[str, Disturbance] = {
    "an image is changed": Disturbance(_edit_image, "refused"),
    "an image is deleted": Disturbance(_delete("images", "*.png"), "refused"),
    "an image is cut off": Disturbance(_shorten("images", "*.png"), "refused"),
    "an image is added": Disturbance(_add_image, "refused"),
    "all images are gone": Disturbance(_remove("images"), "refused"),
    "a caption is changed": Disturbance(_words("a dog"), "refused"),
    "a caption is deleted": Disturbance(_delete("images", "*.txt"), "refused"),
    "a caption is damaged": Disturbance(_not_text, "refused"),
    "the cache is deleted": Disturbance(_remove("cache"), "same"),
    "a file of the cache is deleted": Disturbance(_delete("cache", "*"), "same"),
    "a file of the cache is damaged": Disturbance(_damage("cache", "*"), "same"),
    "a file of the cache is cut off": Disturbance(_shorten("cache", "*"), "same"),
    "the base is another one": Disturbance(_other_base, "refused"),
    "the base is gone": Disturbance(_remove("base"), "refused"),
    "weights of the base are damaged": Disturbance(_damage("base", "*.safetensors"), "refused"),
    "weights of the base are cut off": Disturbance(_shorten("base", "*.safetensors"), "refused"),
    "a setting of the base is cut off": Disturbance(_shorten("base", "config.json"), "refused"),
    "the newest checkpoint is damaged": Disturbance(_damage_newest, "same"),
    "every checkpoint is damaged": Disturbance(_damage_every_checkpoint, "refused"),
    "the events are gone": Disturbance(_events_gone, "same", _CURVES),
    "the events are cut off": Disturbance(_shorten("run", "events.jsonl"), "same", _CURVES),
    "the events are damaged": Disturbance(_damage("run", "events.jsonl"), "same", _CURVES),
    "the previews are gone": Disturbance(_remove("run/samples"), "same", _SHOWN),
    "a preview is damaged": Disturbance(_shorten("run/samples", "*.png"), "same", _SHOWN),
    "strange files lie in the run": Disturbance(_strangers, "same"),
    "the settings are gone": Disturbance(_delete("run", "config.toml"), "refused"),
    "the settings are cut off": Disturbance(_settings_short, "refused"),
}


def changes(play: Play, trials: int, seed: int, say: Callable[[str], None]) -> Tally:
    """Stop a run, disturb it in every way in turn, and go on."""
    tally, names = Tally(), list(DISTURBANCES)
    for number in range(trials):
        name = names[(seed + number) % len(names)]
        problems = disturbed(play, name, seed + number)
        words = f"--only c --seed {seed + number} --trials 1 ({name})"
        tally.add(problems, words, say, play.folder / f"change-{seed + number}")
    return tally


def disturbed(play: Play, name: str, seed: int) -> list[str]:
    """Stop a run, disturb it in one way and go on; return what did not hold.

    Args:
        play: where.
        name: of :data:`DISTURBANCES`.
        seed: of what is drawn.
    """
    rng, place = random.Random(seed), play.place(f"change-{seed}")
    stopped = _stopped(play, place)
    problems = [stopped] if stopped else _disturbed(play, place, DISTURBANCES[name], rng)
    return problems


def _stopped(play: Play, place: Place) -> str:
    """Kill a run when it has two checkpoints; return what went wrong with that."""
    for share in (0.75, 0.8, 0.85, 0.9):
        play.warm.run(*place.begin(), fault=Fault(place.folder, int(share * play.calls), 0))
        if len(list((place.run / "checkpoints").glob("step-*"))) == 2 and not list(place.run.glob("ink.*")):
            return ""
        for part in (place.run, place.cache):
            shutil.rmtree(part, ignore_errors=True)
    return "could not be stopped with two checkpoints"


def _disturbed(play: Play, place: Place, disturbance: Disturbance, rng: random.Random) -> list[str]:
    kept = place.folder.with_name(f"{place.folder.name}-kept")
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(place.folder, kept)
    disturbance.change(place, rng)
    before = _state(place)
    ended = play.warm.run(*place.go_on())
    problems = complaints(ended)
    if ended.code == 0:
        if disturbance.expected == "refused":
            problems.append("went on as if nothing had happened")
        else:
            allowed = {f"{key} differ" for key in disturbance.may_differ}
            problems += [problem for problem in play.differing(place.run) if problem not in allowed]
    elif disturbance.expected == "same":
        problems.append(f"does not go on (code {ended.code}): {ended.err.strip()[-300:]}")
    else:
        if _state(place) != before:
            problems.append("was refused, but what was saved is another one than before")
        shutil.rmtree(place.folder)
        shutil.copytree(kept, place.folder)
        problems += play.carried_on(place)[0]
    if not problems:
        shutil.rmtree(kept)
    return problems


def _state(place: Place) -> dict[str, str]:
    """Return the digests of what a refused command must leave alone."""
    files = [file for file in (place.run / "checkpoints").rglob("*") if file.is_file()]
    files += [file for file in (place.run / "config.toml",) if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
