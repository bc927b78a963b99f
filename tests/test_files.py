"""Atomic writing: whole or not at all, and errors that name what the user named."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from sdlora.errors import OutputError
from sdlora.files import refuse_used_folder, replacing, size_text


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("IoError: No space left")]
)
def test_a_full_disk_is_told_with_the_final_name_and_the_old_file_stays(
    tmp_path: Path, failure: Exception
) -> None:
    target = tmp_path / "folder" / "adapter.safetensors"
    target.parent.mkdir()
    target.write_bytes(b"old")
    with (
        pytest.raises(OutputError) as caught,
        replacing(target.parent) as folder,
        replacing(folder / target.name) as temporary,
    ):
        temporary.write_bytes(b"ne")
        raise failure
    assert str(caught.value).startswith(f"{target}: the disk is full")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", target.name]
    assert target.read_bytes() == b"old"


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    for place in (file, file / "run", file / "runs" / "one"):
        with pytest.raises(OutputError, match="is a file"):
            refuse_used_folder(place, "a run")
    refuse_used_folder(tmp_path / "new" / "run", "a run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_amounts_of_bytes_are_told_in_mebibytes_until_a_gibibyte() -> None:
    assert [size_text(5 * 2**20), size_text(5.26 * 2**20, 1)] == ["5 MiB", "5.3 MiB"]
    assert [size_text(2**30 - 1), size_text(3 * 2**30)] == ["1024 MiB", "3.0 GiB"]
