"""Whatever is read gives an answer or one refusal; ``tools/fuzz_texts.py`` runs more of these cases."""

from __future__ import annotations

import gc
import random
import time
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the web UI is not installed: pip install -e '.[ui]'")

from tools import fuzzing
from tools.fuzz_texts import Target, run_case, targets
from tools.fuzzing import Watched
from tools.text_damage import MUTATIONS, damaged

CASES = 150


@pytest.fixture(scope="module")
def known() -> dict[str, Target]:
    return targets()


def test_the_samples_are_sound_before_they_are_damaged(known: dict[str, Target], tmp_path: Path) -> None:
    outcomes = {}
    for number, (name, target) in enumerate(known.items()):
        for sample in target.samples if target.weight >= 1 else ():
            place = tmp_path / f"{number}-{len(outcomes)}"
            place.mkdir()
            outcomes[f"{name} {len(outcomes)}"] = target.run(random.Random(1), sample, place)
    assert len(outcomes) > 50
    assert {name: answer for name, answer in outcomes.items() if "status 400" in answer} == {}


def test_no_damaged_file_crashes_what_reads_it(known: dict[str, Target], tmp_path: Path) -> None:
    watched = Watched(run_case, known)
    outcomes = [watched.outcome(number, tmp_path)[0] for number in range(CASES)]
    assert [outcome for outcome in outcomes if outcome.startswith("CRASH")] == []
    assert len({outcome.partition(":")[0] for outcome in outcomes}) > 20  # most kinds of files came
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_of_a_text_changes_it(mutation: object) -> None:
    assert callable(mutation)
    text = b'a = 1\nb, "two", {"c": [3]}\n'
    assert len({mutation(random.Random(number), text, [text, b"other text"]) for number in range(50)}) > 20
    assert all(len(damaged(random.Random(number), [text])) < 2_000_000 for number in range(300))


def test_what_takes_too_long_or_too_much_is_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "MOST_SECONDS", 0.05)
    monkeypatch.setattr(fuzzing, "MOST_BYTES", 2**25)
    held: list[bytes] = []
    gc.collect()

    def work(number: int, known: object, folder: Path) -> str:
        (folder / "input").write_text(str(number), encoding="utf-8")
        end = time.process_time() + {0: 0.0, 1: 0.1, 2: 60.0, 3: 0.0}[number]
        while time.process_time() < end:
            pass
        if number == 3:
            monkeypatch.setattr(fuzzing, "MOST_SECONDS", 60.0)
            held.extend(b"\1" * 2**25 for _ in range(8))  # what other tests leave may be freed meanwhile
        return "done"

    watched = Watched(work, None, tmp_path / "kept")
    outcomes = [watched.outcome(number, tmp_path)[0] for number in range(4)]
    assert outcomes[0] == "done"
    assert outcomes[1].startswith("CRASH: takes more than 0.05 s")
    assert outcomes[2].startswith("CRASH: hangs in test_fuzz_texts.py")
    assert outcomes[3].startswith("CRASH: takes more than 32 MiB")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["case-1", "case-2", "case-3"]
