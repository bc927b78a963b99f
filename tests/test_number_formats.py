"""One list of number formats: settings, torch, files and headers follow from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlora.errors import ConfigError
from sdlora.number_formats import NUMBER_FORMATS, PRECISIONS, by_dtype, dtype_name, dtype_of, named
from sdlora.tensor_file import read_header


def test_every_number_format_that_can_be_chosen_is_in_the_list_with_kohyas_word() -> None:
    assert len(PRECISIONS) == 3
    assert [named(name).kohya is not None and named(name).is_factor for name in PRECISIONS] == [True] * 3
    assert [dtype_name(dtype_of(name)) for name in PRECISIONS] == list(PRECISIONS)


def test_names_and_dtypes_are_each_there_once() -> None:
    assert len(NUMBER_FORMATS) == len(by_dtype()) == len({known.file_name for known in NUMBER_FORMATS}) == 12


def test_the_names_in_files_are_those_of_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "all.safetensors"
    save_file({known.name: torch.zeros(2, dtype=known.dtype) for known in NUMBER_FORMATS}, file)
    assert {name: tensor.dtype for name, tensor in load_file(file).items()} == {
        known.name: known.dtype for known in NUMBER_FORMATS
    }

    specs = read_header(file).tensors
    assert {name: spec.dtype for name, spec in specs.items()} == {
        known.name: known.dtype for known in NUMBER_FORMATS
    }


def test_an_unknown_number_format_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match="--dtype fp8: is not a number format; give one of fp32, bf16, fp16"
    ):
        dtype_of("fp8")


def test_the_list_is_read_without_torch() -> None:
    script = "import sys, sdlora.number_formats; assert not {'torch', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
