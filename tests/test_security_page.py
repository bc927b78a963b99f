"""The limits that docs/security.md names are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

import sdlora
from sdlora import files, tensor_file
from sdlora.config import prompt_lines, toml
from sdlora.data.reading import captions, decoding, metadata_files
from sdlora.diffusion import ddpm
from sdlora.families import base_files, emphasis
from sdlora.generation import adapter_folders, axes, png_info, prompt_parts

PAGE = (Path(sdlora.__file__).parent.parent / "docs" / "security.md").read_text(encoding="utf-8")


def row(start: str) -> str:
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {start}")]
    return line


READ = {
    "an image file": f"{decoding.MAX_FILE_BYTES // 2**30} GiB",
    "an image's pixels": f"{int(Image.MAX_IMAGE_PIXELS or 0) // 10**6} million",
    "pixels being decoded": f"{decoding.MAX_PIXELS_AT_ONCE // 10**6} million",
    "a PNG's": f"{png_info.MAX_TEXT:,} characters",
    "a prompt or caption": f"{emphasis.MAX_CHARS:,} characters",
    "changing brackets": (
        f"{prompt_parts.MOST_CHANGES}; {prompt_parts.MOST_CHARS:,} characters; {prompt_parts.MOST_PARTS}"
    ),
    "a file of prompts": f"{prompt_lines.MOST_BYTES // 2**20} MiB, {prompt_lines.MOST_LINES:,} prompts",
    "files looked at": f"{adapter_folders.MOST_FILES:,} a folder; {axes.MOST_VALUES}",
    "a caption file": (
        f"{captions.MAX_CAPTION_BYTES // 1024} KiB; {metadata_files.MAX_SIDECAR_BYTES // 2**20} MiB; "
        f"{metadata_files.MAX_METADATA_BYTES // 2**20} MiB"
    ),
    "JSON and TOML": f"{files.MAX_LEVELS}; {files.MAX_DIGITS} ",
    "a settings file": f"{files.MAX_TOML_CHARS:,} characters; {toml.MOST_PROBLEMS} problems",
    "a base's JSON": f"{base_files.MAX_JSON_BYTES // 2**20} MiB; {base_files.MAX_LAYERS}",
    "steps of a base's": f"{ddpm.MOST_STEPS:,}",
    "a safetensors header": (
        f"{tensor_file.MAX_HEADER_BYTES // 2**20} MiB; "
        f"{tensor_file.MAX_ENTRY_CHARS // 2**20} Mi characters each; "
        f"{tensor_file.MAX_STRINGS:,} strings and {tensor_file.MAX_STRUCTURE_BYTES // 2**20} MiB of other "
        f"structure; {tensor_file.MAX_NUM_DIMENSIONS}"
    ),
}


@pytest.mark.parametrize("start", READ)
def test_what_is_read_has_the_limits_of_the_page(start: str) -> None:
    assert READ[start] in row(start)


def test_the_server_has_the_limits_of_the_page() -> None:
    pytest.importorskip("gradio", reason="the web UI is not installed: pip install -e '.[ui]'")
    from sdlora_ui import (
        adapter_cards,
        bases,
        drafts,
        image_bin,
        image_edits,
        jobs,
        model_places,
        owner,
        repairs,
        thumbs,
    )
    from sdlora_ui import captions as book
    from sdlora_ui.server import adapter_files, folders, passwords, security, uploads, workbench

    limits = {
        "a request with JSON": f"{security.MAX_JSON_BODY // 2**20} MiB",
        "any request's body": f"{security.MAX_BODY // 2**30} GiB + {security.MAX_BODY % 2**30 // 2**20} MiB",
        "sessions kept": f"{security.MOST_SESSIONS},",
        "addresses remembered": f"{passwords.MOST_ADDRESSES:,}",
        "an uploaded file": f"{uploads.MAX_FILE_BYTES // 2**20} MiB",
        "an upload |": f"{uploads.MAX_TOTAL_BYTES // 2**30} GiB and {uploads.MAX_FILES} files",
        "a caption typed": f"{book.MAX_CAPTION:,} characters; {book.MAX_UNDO}",
        "a thumbnail's": f"{thumbs.MAX_THUMB} px; {thumbs.MAX_BYTES // 2**20} MiB",
        "images changed": (
            f"{image_edits.MOST_IMAGES:,}; {image_edits.MAX_MASK_SIDE} px; "
            f"{image_bin.MAX_RECORD_BYTES // 2**20} MiB"
        ),
        "tags listed": f"{workbench.MOST_TAGS:,}; {repairs.MOST_SHOWN}",
        "an adapter dropped": (
            f"{adapter_files.MAX_ADAPTER_BYTES // 2**30} GiB; {adapter_cards.MAX_HEADER_BYTES // 2**20} MiB, "
            f"{adapter_cards.MAX_CARD_BYTES // 2**20} MiB"
        ),
        "a log shown": f"{jobs.MAX_LOG:,} bytes",
        "searching for models": (
            f"{model_places.MOST_FOLDERS:,}; {model_places.MOST_SECONDS:g}; {model_places.MOST_ENTRIES:,}; "
            f"{bases.MOST_FILES}"
        ),
        "another program's": f"{model_places.MAX_PATHS_BYTES // 2**10} KiB",
        "folders listed": f"{folders.MOST_LISTED}; {folders.MOST_COUNTED:,}; {owner.MOST}",
        "forms kept": f"of {drafts.MOST_TABS} tabs",
    }
    assert {start: limit for start, limit in limits.items() if limit not in row(start)} == {}
    (password,) = re.findall(r"- \*\*The password\*\*.*?(?=\n- )", PAGE, re.DOTALL)
    rules = " ".join(password.split())
    assert f"at least {passwords.LEAST_CHARACTERS} characters" in rules
    assert f"{passwords.FREE_GUESSES} are free" in rules
    assert f"from {passwords.FIRST_WAIT:g} s to {passwords.LONGEST_WAIT / 60:g} min" in rules
    assert passwords.STRANGERS_WINDOW == 60 and f"have {passwords.STRANGERS} a minute" in rules
