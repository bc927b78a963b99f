"""Scenarios that draw, and the doors people come in by: the command line and the UI's worker."""

from __future__ import annotations

import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any

from .stage import MIB, Play, Stage, draw_images, only_card, train


def _request(sampler: str, strengths: Any = None, seed: int = 1) -> Any:
    import sdlora

    return sdlora.GenerateRequest(
        *("a (red:1.3) fox", "bad"),
        **{"height": 64, "width": 64, "steps": 3, "guidance": 4.0, "sampler": sampler, "seed": seed},
        strengths=strengths or {},
    )


def _adapters(stage: Stage, *kinds: str) -> list[Path]:
    """Train an adapter of each kind, and forget what that took."""
    files = []
    for kind in kinds:
        file = train(
            *(stage, "training.steps=1", f"adapter.kind={kind}", "training.precision=bf16"),
            *("adapter.text_encoder=true", f"output.name={kind}", f"output.folder={stage.folder / kind}"),
        )
        files.append(file)
    stage.cards.ledger.clear()
    return files


def samplers(precision: str) -> Play:
    """Return a scenario that draws with every sampler there is."""

    def play(stage: Stage) -> None:
        import sdlora
        from sdlora.config.schema import SamplerName

        names = SamplerName.__args__
        assert len(names) >= 5, names
        generator = sdlora.ImageGenerator.load("mini", device="cuda", precision=precision)
        for name in names:
            images = generator.generate([_request(name), _request(name, seed=2)])
            assert [generated.image.size for generated in images] == [(64, 64)] * 2

    return play


def several_adapters(stage: Stage) -> None:
    """Two adapters of different kinds at once, each at its strength; then one of them; then it is gone."""
    import sdlora

    files = _adapters(stage, "lora", "loha")
    generator = sdlora.ImageGenerator.load("mini", device="cuda", precision="bf16")
    names = [generator.add_adapter(file) for file in files]
    strengths = ({names[0]: 0.5, names[1]: 1.0}, {names[1]: {"unet": 0.3, "text_encoder": 0.0}}, {})
    images = generator.generate([_request("Euler a", setting) for setting in strengths])
    assert len(images) == 3
    generator.remove_adapter(names[0])
    generator.generate([_request("Euler a", {names[1]: 1.0})])


def strength_zero(stage: Stage) -> None:
    """An adapter at strength 0 leaves no trace: as many launches as without it."""
    import sdlora

    (file,) = _adapters(stage, "lora")
    generator = sdlora.ImageGenerator.load("mini", device="cuda", precision="bf16")
    before = sum(stage.cards.ledger.launches.values())
    generator.generate([_request("Euler")])
    plain = sum(stage.cards.ledger.launches.values()) - before
    name = generator.add_adapter(file)
    before = sum(stage.cards.ledger.launches.values())
    generator.generate([_request("Euler", {name: 0.0})])
    launches = sum(stage.cards.ledger.launches.values()) - before
    assert launches == plain, f"{launches} launches at strength 0, {plain} without the adapter"


def merged(*kinds: str) -> Play:
    """Return a scenario that merges adapters, draws, and undoes it; the copy must not lie on the card."""

    def play(stage: Stage) -> None:
        import sdlora

        files = _adapters(stage, *kinds)
        generator = sdlora.ImageGenerator.load("mini", device="cuda", precision="bf16")
        names = [generator.add_adapter(file) for file in files]
        before = stage.cards.ledger.alive(0)
        generator.merge({name: {"unet": 0.7, "text_encoder": 0.2} for name in names})
        extra = stage.cards.ledger.alive(0) - before
        generator.generate([_request("Euler")])
        generator.unmerge()
        generator.generate([_request("Euler", {names[0]: 0.5})], merge=True)
        stage.facts["bytes_kept_on_card_while_merged"] = extra
        assert extra <= MIB, f"merging keeps {extra / MIB:.1f} MiB more on the card"

    return play


def offloaded_and_merged(stage: Stage) -> None:
    """With ``--offload`` the denoiser is on the card when adapters are merged; it goes home with them."""
    import sdlora

    (file,) = _adapters(stage, "lora")
    generator = sdlora.ImageGenerator.load("mini", device="cuda", precision="bf16", offload=True)
    generator.generate([_request("Euler")])
    name = generator.add_adapter(file)
    generator.merge({name: 1.0})
    generator.generate([_request("Euler")])
    generator.unmerge()
    generator.generate([_request("Euler", {name: 1.0})], merge=True)
    generator.remove_adapter(name)
    generator.generate([_request("Euler")])


def offloaded(stage: Stage) -> None:
    """``--offload``: only the component that works is on the card, and it stays there while it works."""
    import sdlora

    (file,) = _adapters(stage, "lora")
    generator = sdlora.ImageGenerator.load("mini", device="cuda", precision="bf16", offload=True)
    name = generator.add_adapter(file)
    images = generator.generate([_request("Euler a", {name: 0.5}), _request("Euler a", {name: 0.5}, seed=2)])
    assert len(images) == 2
    weights = {
        key: sum(p.numel() * p.element_size() for p in module.parameters())
        for key, module in (("unet", generator.model.unet), ("vae", generator.model.vae))
    }
    _moves_once_a_component(stage, generator, name)
    peak = stage.cards.ledger.peak()
    stage.facts["weights"] = weights
    assert peak < sum(weights.values()), f"{peak} bytes at once on the card, components {weights}"


def _moves_once_a_component(stage: Stage, generator: Any, name: str) -> None:
    """However many denoising steps there are, components are walked through and copied as often."""
    from torch import nn

    import sdlora

    walk = nn.Module.named_modules
    seen: list[int] = []
    copied: list[int] = []
    for steps in (2, 7):
        walks: list[int] = []

        def counted(self: nn.Module, *args: Any, walks: list[int] = walks, **kwargs: Any) -> Any:
            if not args and not kwargs:  # not one of the walk's own steps downwards
                walks.append(1)
            return walk(self, *args, **kwargs)

        nn.Module.named_modules = counted  # type: ignore[method-assign]
        before = stage.cards.ledger.copied("to card")
        request = sdlora.GenerateRequest(
            "a fox",
            **{"height": 64, "width": 64, "steps": steps, "guidance": 4.0, "sampler": "Euler", "seed": 1},
            strengths={name: 0.5},
        )
        try:
            generator.generate([request])
        finally:
            nn.Module.named_modules = walk  # type: ignore[method-assign]
        seen.append(len(walks))
        copied.append(stage.cards.ledger.copied("to card") - before)
    stage.facts["module_walks"], stage.facts["bytes_to_card"] = seen, copied
    assert seen[0] == seen[1], f"modules are walked {seen} times in 2 and 7 steps"
    assert copied[1] - copied[0] < 64 * 1024, f"{copied} bytes are copied to the card in 2 and 7 steps"


def command_line(stage: Stage) -> None:
    """``sdlora train`` and ``sdlora generate`` as typed in a shell."""
    images, run = draw_images(stage.folder / "images"), stage.folder / "run"
    _shell(
        *("train", str(images), "--output", str(run), "training.device=cuda", "training.steps=1"),
        *("training.batch_size=2", "data.validation=0", "sample.prompts=[]", "output.name=typed"),
    )
    adapter = run / "typed.safetensors"
    assert adapter.is_file()
    _shell(
        *(
            "generate",
            "--prompt",
            "a fox",
            "--adapter",
            f"{adapter}:0.5",
            "--output",
            str(stage.folder / "out"),
        ),
        *("--device", "cuda", "--steps", "2", "--size", "64"),
    )
    assert len(list((stage.folder / "out").glob("*.png"))) == 1


def _shell(*words: str) -> None:
    arguments, sys.argv = sys.argv, ["sdlora", *words]
    try:
        runpy.run_module("sdlora", run_name="__main__")
    except SystemExit as ended:
        if ended.code not in (0, None):
            raise RuntimeError(f"sdlora {words[0]} ended with {ended.code}; see what it printed") from None
    finally:
        sys.argv = arguments


def ui_worker(stage: Stage) -> None:
    """The UI's worker: plans a run and draws a strip of strengths on the fastest device here."""
    from sdlora_ui.worker import serve

    (file,) = _adapters(stage, "lora")
    values = {
        "data.folder": str(stage.folder / "images"),
        "data.cache_folder": str(stage.folder / "cache"),
        "model.base": "mini",
        "training.batch_size": 2,
    }
    drawing = {
        "base": "mini",
        "prompt": "a fox",
        "negative": "",
        "seed": 1,
        "width": 64,
        "height": 64,
        "steps": 2,
        "guidance": 4.0,
        "sampler": "Euler",
        "folder": str(stage.folder / "drawn"),
        "rows": [[{"file": str(file), "denoiser": 0.8, "text": None}]],
        "strengths": [0, 1],
    }
    tasks = [
        {"id": 1, "task": "plan", "arguments": {"values": values}},
        {"id": 2, "task": "draw", "arguments": drawing},
    ]
    answers = io.StringIO()
    serve(io.StringIO("".join(json.dumps(task) + "\n" for task in tasks)), answers)
    lines = [json.loads(line) for line in answers.getvalue().splitlines()]
    errors = [line["error"] for line in lines if "error" in line]
    if errors:
        raise RuntimeError(errors[0])
    results = {line["id"]: line["result"] for line in lines if "result" in line}
    assert sorted(results) == [1, 2], f"answers to {sorted(results)}"
    assert results[1]["device"].startswith("cuda") and len(results[2]["images"]) == 2
    stage.facts["planned"] = results[1]["bytes"]


def draw_on_second_card(stage: Stage) -> None:
    """Draw on cuda:1; the first card must not be touched."""
    import sdlora

    generator = sdlora.ImageGenerator.load("mini", device="cuda:1", precision="fp16")
    generator.generate([_request("DPM++ 2M Karras")])
    only_card(stage, 1)
