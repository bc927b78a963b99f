"""Atomic writing: whole or not at all, and errors that name what the user named."""

from __future__ import annotations

import ast
import errno
import json
import math
import tomllib
from pathlib import Path

import pytest
from safetensors import SafetensorError

import sdlora
from sdlora.errors import OutputError
from sdlora.files import (
    MAX_LEVELS,
    MAX_TOML_CHARS,
    as_file_name,
    given_path,
    list_files,
    name_problem,
    parse_json,
    parse_toml,
    refuse_bad_names,
    refuse_used_folder,
    replacing,
    size_text,
)


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


def test_files_that_are_being_written_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in ("z.png", "b/A.PNG", "b/c/d.png", "._z.png", ".hidden/e.png", "b/x.txt"):
        (tmp_path / name).touch()
    with replacing(tmp_path / "new.png") as half, replacing(tmp_path / "folder") as folder:
        half.touch()
        folder.mkdir()
        (folder / "inside.png").touch()
        listed = list_files(tmp_path, ".png", ".jpg")
    assert [file.relative_to(tmp_path).as_posix() for file in listed] == ["b/A.PNG", "b/c/d.png", "z.png"]
    assert list_files(tmp_path / "missing", ".png") == []


def test_amounts_of_bytes_are_told_in_mebibytes_until_a_gibibyte() -> None:
    assert [size_text(5 * 2**20), size_text(5.26 * 2**20, 1)] == ["5 MiB", "5.3 MiB"]
    assert [size_text(2**30 - 1), size_text(3 * 2**30)] == ["1024 MiB", "3.0 GiB"]


def test_what_a_killed_process_left_half_written_makes_no_folder_used(tmp_path: Path) -> None:
    for name in (".lock", ".0123456789ab.toml", ".fedcba987654"):
        (tmp_path / name).touch()
    refuse_used_folder(tmp_path, "a training run")
    for name in (".hidden", "0123456789ab", ".0123456789ab.toml.txt", ".0123456789AB"):
        (tmp_path / name).touch()
        with pytest.raises(OutputError, match="not empty"):
            refuse_used_folder(tmp_path, "a training run")
        (tmp_path / name).unlink()


DEEP = [
    "[" * 400_000,
    "[" * 5_000 + "]" * 5_000,
    '{"a":' * 5_000 + "1" + "}" * 5_000,
    "9" * 5_000,
    "-" + "9" * 400,
]
NOT_JSON = [
    *DEEP,
    '{"a": 1, "a": 2}',
    "NaN",
    "[-Infinity]",
    "1e999",
    '"\\ud800"',
    '{"\\udfff": 1}',
    '"' * 100_000,
    "",
]


@pytest.mark.parametrize("text", NOT_JSON, ids=lambda text: text[:12] or "nothing")
def test_json_that_is_too_much_is_one_line(text: str) -> None:
    for given in (text, text.encode()):
        with pytest.raises(ValueError) as caught:
            parse_json(given)
        assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 200


def test_json_that_is_fine_is_what_python_reads() -> None:
    deep = "[" * MAX_LEVELS + "]" * MAX_LEVELS
    texts = [deep, '"' + "[" * 1000 + '"', '{"a\\"[[": [[1], {"b": -2.5e3}]}', '"\\ud83d\\ude00"', str(2**64)]
    assert [parse_json(text) for text in texts] == [json.loads(text) for text in texts]
    assert parse_json("[NaN, -Infinity, 1e999]", finite=False)[1:] == [-math.inf, math.inf]


@pytest.mark.parametrize(
    "text",
    [
        *(f"a = {value}" for value in DEEP),
        "a." * 100_000 + "b = 1",
        f"[{'a.' * 100}b]",
        "'a' . " * 100 + "b = 1",
        "a = 1e999",
        f"a = {2**63}",
        f"a = 0x{'f' * 100_000}",
        'a = "' + "x" * MAX_TOML_CHARS + '"',
        'a = """' + '""\\' * 10_000,
    ],
    ids=lambda text: text[:12],
)
def test_toml_that_is_too_much_is_one_line(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_toml(text)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 200


def test_toml_that_is_fine_is_what_python_reads() -> None:
    brackets = "[" * 500
    text = f"""# {brackets}
a = "{brackets}"  # {brackets}
b = '''
{brackets} ' ''
'''
c = '\\'
d = "\\"{brackets}"
e = inf
[f.g.h]
i = [[1, 2], [{{ j = "{"k." * 200}" }}]]
"""
    assert parse_toml(text) == tomllib.loads(text)


PLAIN_PARSERS = {
    "json": {"load", "loads", "JSONDecoder"},
    "tomllib": {"load", "loads"},
    "pickle": {"load", "loads"},
}
OWN_MESSAGES = {
    "sdlora/files.py": "is where the bounds are",
    "sdlora/training/processes.py": "between the processes of one run",
    "sdlora/training/validation.py": "between the processes of one run",
    "sdlora/training/checkpoint.py": "between the processes of one run",
    "sdlora/surgery/checkpoints.py": "a file of this package",
    "ui/worker.py": "between the server and its child",
    "ui/worker_client.py": "between the server and its child",
    "ui/machine_view.py": "between the server and its child",
}
"""Where plain parsers may stand: nothing that a stranger wrote comes there unparsed."""


def test_what_comes_from_outside_is_parsed_with_bounds_everywhere() -> None:
    root = Path(sdlora.__file__).parent.parent
    plainly_parsed: set[str] = set()
    files = [*root.glob("sdlora/**/*.py"), *root.glob("ui/**/*.py")]
    assert len(files) > 150
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                plain = node.attr in PLAIN_PARSERS.get(node.value.id, ())
            elif isinstance(node, ast.ImportFrom):
                plain = any(alias.name in PLAIN_PARSERS.get(node.module or "", ()) for alias in node.names)
            else:
                plain = False
            if plain:
                plainly_parsed.add(file.relative_to(root).as_posix())
    assert plainly_parsed == set(OWN_MESSAGES)


BAD_NAMES = [
    *("", " ", ".", "..", ".hidden", " a", "a ", "a.", "..."),
    *("CON", "con.txt", "Nul", "COM1", "lpt9.tar.gz", "com\u00b9", "CONIN$", "aux .x"),
    *("a/b", "a\\b", "a:b", "a*", "a?", 'a"', "a<", "a>", "a|"),
    *("a\nb", "a\x00", "a\x7f", "a\x9f", "a\u2028", "a\udcff"),
    *("\U0001f600" * 70, "x" * 201, "\u00e9" * 101),
]
GOOD_NAMES = [
    "lora",
    "my style",
    "bl\u00fcten",
    "\U0001f600" * 50,
    "con1",
    "COM",
    "icon",
    "a.b",
    "-x",
    "x" * 200,
    "nul-1",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_some_system_refuses_is_refused_everywhere(name: str, tmp_path: Path) -> None:
    assert name_problem(name) is not None
    if name.strip(". ") and not set(name) & {"/", "\0"}:
        for target in (tmp_path / name.lstrip("."), tmp_path / "new" / f"{name}" / "x.safetensors"):
            parts = target.name, target.parent.name.lstrip(".")
            if any(name_problem(part, 240) for part in parts):  # with its ending a name may be longer
                with pytest.raises(OutputError, match="the name"):
                    refuse_bad_names(target)
    assert name_problem(as_file_name(name, "images")) is None


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_name_that_every_system_takes_stays_as_it_is(name: str, tmp_path: Path) -> None:
    assert name_problem(name) is None
    refuse_bad_names(tmp_path / name / f"{name}.safetensors")
    (tmp_path / f"{name}.safetensors").write_bytes(b"")
    if len(name) <= 80:
        assert as_file_name(name, "images") in (name, name.strip("-"))


def test_a_name_made_from_a_text_keeps_its_ending_and_is_never_too_long() -> None:
    cases = {
        "a" * 300 + ".png": "a" * 76 + ".png",
        "\U0001f600" * 70 + ".png": "\U0001f600" * 49 + ".png",
        "con.png": "_con.png",
        "a/b:c": "a-b-c",
        " . - ": "images",
        "e.g. a very long text without ending": "e.g. a very long text without ending",
    }
    assert {text: as_file_name(text, "images") for text in cases} == cases


def test_what_stands_already_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "COM1"
    folder.mkdir()
    refuse_bad_names(folder / "lora.safetensors")
    refuse_bad_names(tmp_path / ".cache" / "out")  # hidden folders are no mistake


@pytest.mark.parametrize("text", ["", "  ", "\t", "C:\new", "a\x00b"])
def test_a_path_that_names_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is empty|control character"):
        given_path(text)


def test_a_path_may_begin_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    cases = {"~/x": tmp_path / "x", "~": tmp_path, "a/~": Path("a/~"), "~nobody-of-this-name/x": None}
    for text, path in cases.items():
        assert given_path(text) == (path or Path(text))
