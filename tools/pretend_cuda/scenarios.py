"""What the program is taken through on the pretended device: each scenario a real public call.

A scenario gets a :class:`Stage`, does what a user would do, and raises where something is wrong. It runs in a
process of its own (:mod:`.play`), within the pretence.
"""

from __future__ import annotations

import io
import json
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cards import CONTEXT_BYTES, Card

if TYPE_CHECKING:
    from sdlora.events import Event

    from .device import Cards

MIB = 2**20
PROMPTS = '["a (red:1.2) fox", "a house"]'


@dataclass
class Stage:
    """Where a scenario plays.

    Attributes:
        folder: for everything it writes.
        cards: the pretended machine.
        facts: what is to be reported besides the ledger.
        events: everything the runs told.
    """

    folder: Path
    cards: Cards
    facts: dict[str, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    def hear(self, event: Event) -> None:
        """Listen to a run."""
        self.events.append(event)
        planned = getattr(event, "expected_bytes", None)
        if planned is not None:
            self.facts["planned"] = planned
            self.facts["phases"] = dict(getattr(event, "expected_phases", {}))

    def told(self, kind: str) -> list[Event]:
        """Return the events of one kind."""
        return [event for event in self.events if type(event).__name__ == kind]


Play = Callable[[Stage], None]


@dataclass(frozen=True)
class Scenario:
    """A scenario: what plays, in a few words, and on which cards."""

    play: Play
    what: str
    cards: tuple[Card, ...] = (Card(),)


def draw_images(folder: Path, count: int = 6, side: int = 96) -> Path:
    """Draw captioned images of mixed shapes, no two alike, transparent around, unless they are there."""
    import random

    from PIL import Image, ImageDraw

    if not folder.is_dir():
        folder.mkdir(parents=True)
        for number in range(count):
            width, height = [(side, side), (side, side * 2 // 3), (side * 2 // 3, side)][number % 3]
            image, chance = Image.new("RGBA", (width, height), (0, 0, 0, 0)), random.Random(number)
            for _ in range(12):
                x, y = chance.randrange(width // 2), chance.randrange(height // 2)
                corners = (x, y, x + chance.randrange(8, width // 2), y + chance.randrange(8, height // 2))
                ImageDraw.Draw(image).rectangle(corners, fill=(*chance.randbytes(3), 255))
            image.save(folder / f"thing{number:02d}.png")
            (folder / f"thing{number:02d}.txt").write_text(f"an icon, a cat, {number}", encoding="utf-8")
    return folder


def train(stage: Stage, *overrides: str, base: str = "mini", resume: bool = False, stop_at: int = 0) -> Path:
    """Train with ``sdlora.train``; return the adapter's file, or the run's folder if it was stopped."""
    import sdlora

    fixed = {
        "training.steps": 2,
        "training.device": "cuda",
        "training.batch_size": 2,
        "sample.prompts": [],
        "data.validation": 0,
    }
    given = {text.partition("=")[0] for text in overrides}
    values = {
        **fixed,
        "data.folder": draw_images(stage.folder / "images"),
        "data.cache_folder": stage.folder / "cache",
        "output.folder": stage.folder / "run",
        "model.base": base,
    }
    rest = {key: value for key, value in values.items() if key not in given}
    config = sdlora.load_config(None, overrides, rest)
    control = sdlora.Control()

    def stop(event: Event) -> None:
        if type(event).__name__ == "StepDone" and getattr(event, "step", 0) == stop_at:
            control.stop()

    result = sdlora.train(config, resume=resume, listeners=[stage.hear, stop], control=control)
    if stop_at:
        assert result.stopped, "the run was to be stopped"
        return result.folder
    assert result.step == config.training.steps, f"{result.step} of {config.training.steps} steps"
    assert result.adapter_file is not None and result.adapter_file.is_file(), "no adapter file"
    return result.adapter_file


def training(*overrides: str, base: str = "mini") -> Play:
    """Return a scenario that trains two steps with these settings."""
    return lambda stage: _trained(stage, overrides, base)


def _trained(stage: Stage, overrides: Sequence[str], base: str) -> None:
    train(stage, *overrides, base=base)
    wanted = len(stage.told("StepDone"))
    assert wanted, "no step was told"


def resumed(*overrides: str) -> Play:
    """Return a scenario that stops after one step of three and goes on from the checkpoint."""

    def play(stage: Stage) -> None:
        settings = ("training.steps=3", *overrides)
        train(stage, *settings, stop_at=1)
        stage.cards.ledger.clear()
        train(stage, *settings, resume=True)
        steps = [getattr(event, "step", None) for event in stage.told("StepDone")]
        assert steps == [1, 2, 3], f"steps {steps}"

    return play


def whole_run(stage: Stage) -> None:
    """Train with validation and previews, stop, resume, export: what most users do."""
    settings = (
        *("training.precision=bf16", "training.steps=3", "data.validation=0.25", "training.validate_every=1"),
        *(f"sample.prompts={PROMPTS}", "sample.steps=2", "sample.every=1"),
    )
    train(stage, *settings, stop_at=1)
    train(stage, *settings, resume=True)
    counts = {kind: len(stage.told(kind)) for kind in ("StepDone", "Validated", "Sampled", "CheckpointSaved")}
    stage.facts["events"] = counts
    assert counts == {"StepDone": 3, "Validated": 4, "Sampled": 4, "CheckpointSaved": 2}, counts
    _plan_agrees(stage)


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
    peak = stage.cards.ledger.peak()
    stage.facts["weights"] = weights
    assert peak < sum(weights.values()), f"{peak} bytes at once on the card, components {weights}"


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


def true_base(family: str, *overrides: str, side: int) -> Play:
    """Return a scenario that trains a step of a base of the true size, with validation and a preview."""

    def play(stage: Stage) -> None:
        from .true_bases import reading_zeros, write_hollow_checkpoint

        base = stage.folder / f"{family}.safetensors"
        write_hollow_checkpoint(base, family)
        draw_images(stage.folder / "images", count=4, side=side)
        with reading_zeros():
            train(
                *(stage, "training.steps=1", "training.precision=bf16", "training.batch_size=1"),
                *("data.validation=1", 'sample.prompts=["a fox"]', "sample.steps=1", *overrides),
                base=str(base),
            )
        _plan_agrees(stage)

    return play


def _plan_agrees(stage: Stage) -> None:
    """Compare the plan with the live peak of the card, phase by phase."""
    planned, peaks = stage.facts["phases"], stage.cards.ledger.memory[0].peaks
    assert len(planned) >= 5, planned
    shares = {phase: round(size / peaks.get(phase, 1), 4) for phase, size in planned.items()}
    stage.facts["plan_by_peak"] = shares
    wrong = {phase: share for phase, share in shares.items() if not 0.95 <= share <= 1.05}
    assert not wrong, f"the plan divided by the live peak: {wrong}"


def second_card(stage: Stage) -> None:
    """Train on cuda:1 with everything; the first card is another program's and must not be touched."""
    train(
        *(stage, "training.device=cuda:1", "training.precision=bf16", "data.validation=0.25"),
        *(f"sample.prompts={PROMPTS}", "sample.steps=2", "adapter.text_encoder=true", "adapter.dropout=0.1"),
    )
    _only_card(stage, 1)


def draw_on_second_card(stage: Stage) -> None:
    """Draw on cuda:1; the first card must not be touched."""
    import sdlora

    generator = sdlora.ImageGenerator.load("mini", device="cuda:1", precision="fp16")
    generator.generate([_request("DPM++ 2M Karras")])
    _only_card(stage, 1)


def _only_card(stage: Stage, wanted: int) -> None:
    others = {card: place for card, place in stage.cards.ledger.touched.items() if card != wanted}
    assert not others, "; ".join(f"cuda:{card} was touched by {p.site}" for card, p in others.items())


def previews_out_of_memory(stage: Stage) -> None:
    """Previews do not fit on the card: a notice, and training goes on."""
    train(
        *(stage, "training.precision=bf16", f"sample.prompts={PROMPTS}", "sample.steps=2"),
        *("data.validation=0.25", "data.resolution=64", "training.batch_size=1"),
    )
    notices = [getattr(event, "message", "") for event in stage.told("Notice")]
    skipped = [text for text in notices if "skipped, and training goes on" in text]
    assert len(skipped) == 2 and all("previews" in text for text in skipped), notices
    counts = {kind: len(stage.told(kind)) for kind in ("StepDone", "Validated", "Sampled")}
    assert counts == {"StepDone": 2, "Validated": 2, "Sampled": 0}, counts


def refusals(stage: Stage) -> None:
    """The pretence itself: it refuses what a card refuses, and counts what a card would have to do."""
    import torch

    ledger, host = stage.cards.ledger, torch.ones(1000)
    first, second = host.to("cuda:0"), host.to("cuda:1")
    step = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8}
    step |= {"amsgrad": False, "maximize": False}
    index = torch.zeros(3, dtype=torch.long)
    wrong: dict[str, Callable[[], object]] = {
        "card and host": lambda: first + host,
        "two cards": lambda: first + second,
        "a table on the host": lambda: host[index.to("cuda")],
        "a generator of the host": lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
        "an optimizer's state": lambda: torch._fused_adamw_(
            *([first], [first], [first], [first], [], [torch.ones(())]), **step
        ),
        "a card that is not there": lambda: torch.ones(3, device="cuda:2"),
        "more than there is": lambda: torch.empty(30 * 2**30, dtype=torch.uint8, device="cuda"),
    }
    accepted = []
    for name, do in wrong.items():
        try:
            do()
        except (RuntimeError, torch.OutOfMemoryError):
            continue
        accepted.append(name)
    assert not accepted, f"accepted: {accepted}"
    assert float((first * 2).sum()) == 1.0 and str(first.device) == "cuda:0"
    del wrong
    ledger.clear()
    kept = (first + 1).cpu()
    first.copy_(host.pin_memory(), non_blocking=True)
    first.copy_(host, non_blocking=True)
    first[index] = 0.0
    assert kept.device.type == "cpu" and kept.shape == (1000,)
    counted = ledger.copied("to host"), ledger.copied("to card"), sum(ledger.launches.values())
    assert counted == (4000, 8000 + 24, 2), f"bytes to the host, to the card, launches: {counted}"
    assert sum(ledger.waits.values()) == 2, ledger.waits  # to the host; the index: in the background nothing
    before = ledger.alive(1), ledger.alive(0)
    torch.cuda.set_device(1)
    third = torch.zeros(256, device="cuda")
    assert third.device == torch.device("cuda:1") and (ledger.alive(1), ledger.alive(0)) == (
        before[0] + 1024,
        before[1],
    )
    del third
    assert ledger.alive(1) == before[0], "what is dead still counts"
    same, other = first.cpu(), first.add_(1).cpu()
    assert not torch.equal(same, other), "what was written to looks unchanged"
    assert torch.equal(other, first.detach().cpu()) and bool(torch.isfinite(first).cpu().all())


TRAINING: dict[str, tuple[str, tuple[str, ...]]] = {
    "train-fp32": ("fp32", ("training.precision=fp32",)),
    "train-bf16": ("bf16", ("training.precision=bf16",)),
    "train-fp16": ("fp16 with a scaler", ("training.precision=fp16",)),
    "train-text": (
        "text encoder, dropout",
        ("training.precision=bf16", "adapter.text_encoder=true", "adapter.dropout=0.1"),
    ),
    "train-all": (
        "all targets, checkpointing, accumulation",
        (
            *("training.precision=bf16", "adapter.targets=all", "training.gradient_checkpointing=true"),
            "training.gradient_accumulation=2",
        ),
    ),
    "train-dora": ("DoRA", ("training.precision=bf16", "adapter.kind=dora", "adapter.targets=all")),
    "train-loha": ("LoHa", ("training.precision=bf16", "adapter.kind=loha", "adapter.targets=all")),
    "train-lokr": ("LoKr", ("training.precision=bf16", "adapter.kind=lokr", "adapter.targets=all")),
    "train-pissa": ("PiSSA", ("training.precision=bf16", "adapter.init=pissa")),
    "train-olora": ("OLoRA in fp16", ("training.precision=fp16", "adapter.init=olora")),
    "train-prior": ("prior preservation", ("training.precision=bf16", "data.prior_preservation=1.0")),
    "train-captions": (
        "captions encoded in the loop",
        (
            *("training.precision=bf16", "data.shuffle_tags=true", 'data.encode_captions="in loop"'),
            *("training.noise_offset=0.05", f"sample.prompts={PROMPTS}", "sample.steps=2"),
        ),
    ),
    "train-crops": (
        "random crops encoded in the loop",
        (
            *("training.precision=bf16", "data.crop=random", "data.variants=0", "data.colour_jitter=0.1"),
            *(f"sample.prompts={PROMPTS}", "sample.steps=2"),
        ),
    ),
    "train-masks": (
        "masks from transparency",
        ("training.precision=bf16", "data.alpha_mask=true", "training.min_snr_gamma=0"),
    ),
    "train-lora-plus": (
        "LoRA+, text encoder, checkpointing",
        (
            *("training.precision=bf16", "optimizer.lora_plus_ratio=16", "adapter.text_encoder=true"),
            "training.gradient_checkpointing=true",
        ),
    ),
    "train-validation": (
        "validation at every step",
        ("training.precision=bf16", "data.validation=0.25", "training.validate_every=1"),
    ),
    "train-previews": (
        "previews at every step",
        ("training.precision=fp16", f"sample.prompts={PROMPTS}", "sample.steps=2", "sample.every=1"),
    ),
}

SCENARIOS: dict[str, Scenario] = {
    name: Scenario(training(*overrides), f"training: {what}") for name, (what, overrides) in TRAINING.items()
} | {
    "refusals": Scenario(refusals, "the pretence refuses what a card refuses", (Card(), Card())),
    "resume-bf16": Scenario(resumed("training.precision=bf16"), "--resume, bf16"),
    "resume-fp16": Scenario(resumed("training.precision=fp16"), "--resume, fp16 with a scaler"),
    "resume-pissa": Scenario(
        resumed("training.precision=bf16", "adapter.init=pissa", "optimizer.lora_plus_ratio=4"),
        "--resume, PiSSA and LoRA+",
    ),
    "whole-run": Scenario(whole_run, "training with validation and previews, stopped and resumed"),
    "oom-previews": Scenario(
        previews_out_of_memory, "previews that do not fit", (Card(bytes=CONTEXT_BYTES + 39_000_000),)
    ),
    "samplers-fp16": Scenario(samplers("fp16"), "drawing with every sampler, fp16"),
    "samplers-fp32": Scenario(samplers("fp32"), "drawing with every sampler, fp32"),
    "adapters": Scenario(several_adapters, "drawing with several adapters"),
    "strength-0": Scenario(strength_zero, "drawing at strength 0"),
    "merge": Scenario(merged("lora"), "merge, draw, undo"),
    "merge-kinds": Scenario(merged("loha", "lokr", "dora"), "merge of other kinds, draw, undo"),
    "offload": Scenario(offloaded, "drawing with --offload"),
    "offload-merge": Scenario(offloaded_and_merged, "merge with --offload"),
    "command-line": Scenario(command_line, "sdlora train, sdlora generate"),
    "ui-worker": Scenario(ui_worker, "the UI's worker: a plan, a strip of strengths"),
    "sd1": Scenario(true_base("sd1", "data.resolution=512", side=512), "a step of the true SD1.5, 512 px"),
    "sd2": Scenario(true_base("sd2", "data.resolution=768", side=768), "a step of the true SD2.1, 768 px"),
    "sdxl": Scenario(
        true_base("sdxl", "data.resolution=1024", side=1024), "a step of the true SDXL, 1024 px"
    ),
    "cuda1-train": Scenario(second_card, "training on cuda:1", (Card(), Card())),
    "cuda1-draw": Scenario(draw_on_second_card, "drawing on cuda:1", (Card(), Card())),
}
