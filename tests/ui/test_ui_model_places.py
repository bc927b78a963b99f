"""Models are found where people keep them, by what the folders hold; a search costs no more than it may."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sdlora_ui.model_places import MAX_PATHS_BYTES, Budget, Place, find_places, hub_models, usual_roots


def put(root: Path, *names: str, **texts: str) -> Path:
    """Make folders (names that end in a slash) and files."""
    for name in names:
        path = root / name
        path.mkdir(parents=True) if name.endswith("/") else path.parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text(texts.get(Path(name).stem, ""), encoding="utf-8")
    return root


def found(*roots: Path, budget: Budget | None = None) -> dict[str, tuple[set[Path], set[Path]]]:
    places: dict[str, tuple[set[Path], set[Path]]] = {}
    for place in find_places(roots, budget):
        bases, adapters = places.setdefault(place.program, (set(), set()))
        bases |= set(place.bases)
        adapters |= set(place.adapters)
    return places


def test_every_program_is_found_on_any_drive_under_any_name(tmp_path: Path) -> None:
    home, drive = tmp_path / "home", tmp_path / "D"
    put(home, "my webui/models/Stable-diffusion/", "my webui/models/Lora/", "my webui/webui.py")
    put(home, "AI/sd.webui/webui/models/Stable-diffusion/", "AI/sd.webui/webui/modules_forge/")
    put(home, "sdnext/models/Stable-diffusion/", "sdnext/installer.py")
    put(drive, "ComfyUI_windows_portable/ComfyUI/models/checkpoints/")
    put(drive, "ComfyUI_windows_portable/ComfyUI/models/loras/")
    put(drive, "tools/Fooocus_win64_2-5-0/Fooocus/models/checkpoints/")
    put(drive, "invoke/models/sdxl/main/", "invoke/invokeai.yaml")
    put(drive, "StabilityMatrix/Data/Models/StableDiffusion/", "StabilityMatrix/Data/Models/Lora/")
    put(drive, "StabilityMatrix/Data/Packages/reforge/models/Stable-diffusion/")
    places = found(home, drive)
    assert set(places) == {
        "WebUI", "Forge", "SD.Next", "ComfyUI", "Fooocus", "InvokeAI", "Stability Matrix"
    }  # fmt: skip
    assert places["WebUI"] == (
        {
            home / "my webui/models/Stable-diffusion",
            drive / "StabilityMatrix/Data/Packages/reforge/models/Stable-diffusion",
        },
        {home / "my webui/models/Lora"},
    )
    assert places["ComfyUI"][0] == {drive / "ComfyUI_windows_portable/ComfyUI/models/checkpoints"}
    assert places["InvokeAI"][0] == {drive / "invoke/models"}
    assert places["Stability Matrix"][1] == {drive / "StabilityMatrix/Data/Models/Lora"}


def test_each_programs_own_file_of_paths_is_followed(tmp_path: Path) -> None:
    shared = put(tmp_path / "shared", "ckpt/", "more/", "loras/", "xl/")
    extra = f"""
# a comment with an *alias
a1111:
    base_path: {shared}
    checkpoints: |
        ckpt
        more
    loras: loras
"""
    put(tmp_path / "ComfyUI", "models/checkpoints/", "extra_model_paths.yaml", extra_model_paths=extra)
    config = json.dumps(
        {"path_checkpoints": [str(shared / "xl"), 3, "nowhere"], "path_loras": str(shared / "loras")}
    )
    put(tmp_path / "Fooocus", "models/checkpoints/", "config.txt", config=config)
    put(
        tmp_path / "webui", "models/Stable-diffusion/", "webui-user.bat",
        **{"webui-user": f'set COMMANDLINE_ARGS=--xformers --ckpt-dir "{shared / "more"}"'},
    )  # fmt: skip
    places = found(tmp_path)
    assert places["ComfyUI"][0] >= {shared / "ckpt", shared / "more"}
    assert places["ComfyUI"][1] == {shared / "loras"}
    assert places["Fooocus"] == ({tmp_path / "Fooocus/models/checkpoints", shared / "xl"}, {shared / "loras"})
    assert places["WebUI"][0] == {tmp_path / "webui/models/Stable-diffusion", shared / "more"}


@pytest.mark.parametrize(
    "text",
    [
        "a: &a {b: 1}\nc: *a\n",
        "[" * 5000,
        "a: !!python/object/apply:os.system ['touch owned']\n",
        "x: " + "1" * MAX_PATHS_BYTES,
        "- just a list\n",
        "\x00",
    ],
)
def test_a_file_of_paths_that_means_harm_says_nothing(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "ComfyUI", "models/checkpoints/", "extra_model_paths.yaml", extra_model_paths=text)
    assert find_places([tmp_path]) == [Place("ComfyUI", (tmp_path / "ComfyUI/models/checkpoints",))]
    assert not (tmp_path / "owned").exists()


def test_a_search_ends_after_its_folders_and_its_time(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"f{number:02d}" / "deep").mkdir(parents=True)
    put(tmp_path / "f29" / "ComfyUI", "models/checkpoints/")
    assert found(tmp_path) and not found(tmp_path, budget=Budget(folders=20))
    ticks = iter(range(1000))
    assert not found(tmp_path, budget=Budget(seconds=5, clock=lambda: float(next(ticks))))
    (tmp_path / "loop").symlink_to(tmp_path)
    assert len(find_places([tmp_path])) == 1


def test_hidden_and_system_folders_are_left_alone(tmp_path: Path) -> None:
    for name in (".secret", "Windows", "Program Files", "venv"):
        put(tmp_path / name / "ComfyUI", "models/checkpoints/")
    assert find_places([tmp_path]) == []
    assert usual_roots(tmp_path / "no such home", [tmp_path]) == [tmp_path]


def test_pipelines_of_the_hubs_cache_go_by_their_ids(tmp_path: Path) -> None:
    put(
        tmp_path,
        "models--ann--base/snapshots/abc/model_index.json",
        "models--ann--lora/snapshots/abc/x.safetensors",
    )
    put(
        tmp_path,
        "datasets--ann--set/snapshots/abc/model_index.json",
        "models--bert/snapshots/a/model_index.json",
    )
    assert list(hub_models(tmp_path)) == [("ann/base", tmp_path / "models--ann--base/snapshots/abc")]
