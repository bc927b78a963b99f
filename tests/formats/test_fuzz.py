"""Damaged and made-up files give an adapter or one clear refusal; ``tools/fuzz_readers.py`` runs more."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlora.formats.adapter_files import read_adapter
from tools import fuzz_readers
from tools.fuzz_readers import PEFT_CONFIG, corpus, run_case
from tools.fuzzing import MUTATIONS

FILES = corpus()
NO_ADAPTERS = {"checkpoint", "embedding"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_files_that_are_damaged_are_sound_before(name: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(FILES[name])
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT_CONFIG))
    if name not in NO_ADAPTERS:
        assert len(read_adapter(path).weights) >= 1


@given(number=st.integers(0, 2**40))
@settings(max_examples=500, deadline=None)
def test_no_file_crashes_the_readers(number: int) -> None:
    outcome = run_case(number, FILES, FOLDER)
    assert not outcome.startswith("CRASH"), outcome


def test_a_case_is_repeated_by_its_number(tmp_path: Path) -> None:
    numbers = range(200)
    first = [run_case(number, FILES, tmp_path) for number in numbers]
    assert first == [run_case(number, FILES, tmp_path) for number in reversed(numbers)][::-1]
    assert len(set(first)) > 15 and "adapter" in first


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_changes_files(mutation: object, tmp_path: Path) -> None:
    assert callable(mutation)
    changed = {mutation(random.Random(number), FILES["webui"]) for number in range(50)}
    assert len(changed) > 30


def test_a_crash_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> None:
        raise IndexError("out of range")

    for name in ("read_adapter", "OpenAdapter", "inspect_adapter"):
        monkeypatch.setattr(fuzz_readers, name, broken)
    outcomes = {run_case(number, FILES, tmp_path) for number in range(20)}
    assert any(outcome.startswith("CRASH: IndexError in test_fuzz.py") for outcome in outcomes)


_TEMPORARY = tempfile.TemporaryDirectory()
FOLDER = Path(_TEMPORARY.name)
