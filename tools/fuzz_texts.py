"""Fuzzing of all else that is read: settings, data folders, PNG texts, prompts, bases, the server's files.

Beside :mod:`tools.fuzz_readers` and :mod:`tools.fuzz_checkpoints` for tensors. Each case takes one kind of
file, damages a sample of it (:mod:`tools.text_damage`) and hands it to what reads it. An answer or one clear
refusal is right; anything else, more than 2 s of processor time or 1 GiB more memory is a crash. From the
repository:

    python -m tools.fuzz_texts --count 100000 [--keep build/fuzz]
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import random
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save
from sdlora_ui.captions import CaptionBook
from sdlora_ui.drafts import Drafts
from sdlora_ui.job_record import Job
from sdlora_ui.jobs import JobQueue
from sdlora_ui.progress import RunView
from sdlora_ui.server.allowed_paths import AllowedPaths
from sdlora_ui.server.png_import import from_parameters
from sdlora_ui.server.security import SecurityMiddleware
from sdlora_ui.server.uploads import import_files

from sdlora.adapters.strength import parse_adapter
from sdlora.config.foreign.programs import import_settings
from sdlora.config.prompt_lines import read_line, read_prompt_file
from sdlora.config.toml import load_config, save_config
from sdlora.data.captioning.tag_lists import read_tags, thresholds_of
from sdlora.data.captioning.tags import read_implications
from sdlora.data.check.doctor import examine, report_to_dict
from sdlora.data.reading.image_files import load_pixels, load_small
from sdlora.data.reading.items import ImageItem, Visit
from sdlora.data.reading.wording import Wording
from sdlora.events import read_events
from sdlora.families.emphasis import escape, layout, parse
from sdlora.families.loading import load_model
from sdlora.families.locating import ASSETS
from sdlora.families.recognition import recognise
from sdlora.generation.axes import read_axis
from sdlora.generation.lora_tags import take_tags
from sdlora.generation.png_info import parse_parameters, read_parameters
from sdlora.generation.prompt_parts import parts_of
from sdlora.training import checkpoint
from tools.fuzz_samples import AXES, FOREIGN, IMPLICATIONS, TAG_LISTS, THRESHOLDS
from tools.fuzzing import outcome_of, run_cases
from tools.text_damage import damaged

Run = Callable[[random.Random, bytes, Path], str]


@dataclass(frozen=True)
class Target:
    """A kind of file: sound samples of it, and what reads a damaged one; how often its turn comes."""

    samples: Sequence[bytes]
    run: Run
    weight: float = 4.0


def _settings(rng: random.Random, data: bytes, folder: Path) -> str:
    file = folder / "run.toml"
    file.write_bytes(data)
    config = load_config(file)
    save_config(config, folder / "saved.toml")
    assert load_config(folder / "saved.toml") == config, "saved settings are others"
    return "settings"


def _overrides(rng: random.Random, data: bytes, folder: Path) -> str:
    load_config(None, data.decode("utf-8", "replace").split("\n")[:200])
    return "settings"


def _folder(name: str) -> Run:
    """Return what looks at a folder of two images in which the file ``name`` is damaged."""

    def run(rng: random.Random, data: bytes, folder: Path) -> str:
        for stem in ("a", "b"):
            (folder / f"{stem}.png").write_bytes(_PNG)
        (folder / name).write_bytes(data)
        report = examine(folder, resolution=64, trigger_word=rng.choice((None, "x")))
        json.dumps(report_to_dict(report), default=str).encode("utf-8")
        return f"{report.num_images} images"

    return run


def _file_names(rng: random.Random, data: bytes, folder: Path) -> str:
    names = [part for part in data.decode("utf-8", "replace").split("\n") if part][:6]
    for name in names:
        with suppress(OSError, ValueError):  # names that this system has no place for
            place = folder / name.replace("..", "_").lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(_PNG)
    (folder / "a.png").write_bytes(_PNG)
    report = examine(folder, resolution=64)
    json.dumps(report_to_dict(report), default=str)
    return "folder"


def _image(rng: random.Random, data: bytes, folder: Path) -> str:
    file = folder / "a.png"
    file.write_bytes(data)
    (load_pixels if rng.random() < 0.5 else lambda path: load_small(path, 64))(file)
    return "image"


def _png_text(rng: random.Random, data: bytes, folder: Path) -> str:
    text = data.decode("utf-8", "replace")
    info = PngInfo()
    (info.add_itxt if rng.random() < 0.5 else info.add_text)("parameters", text, zip=rng.random() < 0.5)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG", pnginfo=info)
    whole = bytearray(buffer.getvalue())
    for _ in range(rng.choice((0, 0, 1, 3))):
        whole[rng.randrange(len(whole))] = rng.randrange(256)
    (folder / "a.png").write_bytes(whole)
    from_parameters(read_parameters(folder / "a.png"))
    return "settings of an image"


def _parameters(rng: random.Random, data: bytes, folder: Path) -> str:
    from_parameters(parse_parameters(data.decode("utf-8", "replace")))
    return "settings of an image"


def _prompt(rng: random.Random, data: bytes, folder: Path) -> str:
    prompt = data.decode("utf-8", "replace")
    layout(prompt, lambda part: [1] * len(part), 2)
    parse(escape(prompt))
    for part in parts_of(prompt, 20):
        assert part.at(0) is not None and part.texts[-1][0] == 20
    take_tags(prompt)
    return "prompt"


def _prompt_file(rng: random.Random, data: bytes, folder: Path) -> str:
    (folder / "prompts.txt").write_bytes(data)
    return f"{len([read_line(line) for line in read_prompt_file(folder / 'prompts.txt')]) > 1}"


def _foreign(kind: str) -> Run:
    """Return what imports another trainer's settings from a file with such an ending."""

    def run(rng: random.Random, data: bytes, folder: Path) -> str:
        file = folder / f"theirs.{kind}"
        file.write_bytes(data)
        return import_settings(file).program

    return run


def _tag_list(kind: str) -> Run:
    """Return what reads a list of tags from a file with such an ending."""

    def run(rng: random.Random, data: bytes, folder: Path) -> str:
        file = folder / f"tags.{kind}"
        file.write_bytes(data)
        return f"{len(read_tags(file)) > 1}"

    return run


def _implications(rng: random.Random, data: bytes, folder: Path) -> str:
    (folder / "implications.csv").write_bytes(data)
    return f"{len(read_implications(folder / 'implications.csv')) > 1}"


def _axis(rng: random.Random, data: bytes, folder: Path) -> str:
    return read_axis(data.decode("utf-8", "replace")).name


def _threshold(rng: random.Random, data: bytes, folder: Path) -> str:
    return ", ".join(thresholds_of([data.decode("utf-8", "replace")]))


def _caption(rng: random.Random, data: bytes, folder: Path) -> str:
    caption = data.decode("utf-8", "replace")
    item = ImageItem(Path("a.png"), caption, 8, 8, 1, "0" * 64, "a.png", lines=tuple(caption.splitlines()))
    Wording(shuffle=True, keep=1, tag_dropout=0.1, wildcards=True).at(item, Visit(0, 0, 0), seed=0)
    return "caption"


def _adapter(rng: random.Random, data: bytes, folder: Path) -> str:
    parse_adapter(data.decode("utf-8", "replace"))
    return "adapter"


def _base(name: str, *, load: bool) -> Run:
    """Return what looks at a base in which the file ``name`` is damaged; the rest is the built-in one's."""

    def run(rng: random.Random, data: bytes, folder: Path) -> str:
        for part in ASSETS.joinpath("mini").iterdir():
            target = folder / part.name
            if part.is_dir():
                target.mkdir()
                for file in part.iterdir():
                    (target / file.name).symlink_to(file)
            else:
                target.symlink_to(part)
        (folder / name).unlink()
        (folder / name).write_bytes(data)
        base = recognise(folder)
        base.check_family()
        base.prediction_type(), base.zero_terminal_snr()
        if load:
            model = load_model(str(folder), dtype=torch.float32, device=torch.device("meta"))
            model.token_ids if hasattr(model, "token_ids") else None
        return "base"

    return run


def _events(rng: random.Random, data: bytes, folder: Path) -> str:
    (folder / "events.jsonl").write_bytes(data)
    read_events(folder)
    view = RunView(folder / "events.jsonl")
    view.refresh()
    json.dumps([view.brief(), view.full()], allow_nan=False).encode("utf-8")
    return "events"


def _job(rng: random.Random, data: bytes, folder: Path) -> str:
    state = folder / "jobs" / "20261130-000000-abcdef"
    state.mkdir(parents=True)
    name = rng.choice(("job.json", "job.json", "job.json", "output.txt", "log.txt"))
    (state / "job.json").write_text(json.dumps(_JOB), encoding="utf-8")
    (state / name).write_bytes(data)
    queue = JobQueue(folder / "jobs", folder, program=[sys.executable, "-c", "0"])
    json.dumps([job.to_dict() for job in queue.all()], allow_nan=False).encode("utf-8")
    for job in queue.all():
        queue.command(job.id), queue.log(job.id)
    return "jobs"


def _draft(rng: random.Random, data: bytes, folder: Path) -> str:
    (folder / "train.json").write_bytes(data)
    json.dumps(Drafts(folder).kept("train")).encode("utf-8")
    return "draft"


def _history(rng: random.Random, data: bytes, folder: Path) -> str:
    images = folder / "data"
    images.mkdir()
    (images / "a.png").write_bytes(_PNG)
    paths = AllowedPaths.of(folder, runs=folder / "runs", images=folder / "drawn", data=images)
    book = CaptionBook(paths)
    book.set(images, {"a.png": "a cat"})
    (record,) = (paths.state / "captions").iterdir()
    record.write_bytes(data.replace(b"IMAGE", b"a.png"))
    book.changes(images)
    book.undo(images)
    return "history"


def _checkpoint(rng: random.Random, data: bytes, folder: Path) -> str:
    (folder / "step-000004").mkdir()
    (folder / "step-000004" / "optimizer.safetensors").write_bytes(_OPTIMIZER)
    (folder / "step-000004" / "state.json").write_bytes(data)
    checkpoint.micro_batches(folder)
    checkpoint.load_newest(folder, lambda text: None)
    return "checkpoint"


def _request(rng: random.Random, data: bytes, folder: Path) -> str:
    """Send a request with damaged headers or body through the server's outermost layer."""
    answers: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: Mapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answers.append(message["status"])

    headers = {b"host": b"127.0.0.1:7860", b"content-type": b"application/json"}
    if rng.random() < 0.7:
        name = rng.choice((b"host", b"origin", b"cookie", b"content-length", b"sec-fetch-site", b"accept"))
        headers[name] = data[:4000]
    path = rng.choice(("/sdlora/login", "/gradio_api/queue/join", "/sdlora/jobs", "/"))
    password = rng.choice((None, "a long password"))
    server = SecurityMiddleware(app, host="127.0.0.1", password=password)
    scope = {
        "type": "http",
        "method": rng.choice(("GET", "POST")),
        "path": path,
        "headers": list(headers.items()),
        "client": (data[:30].decode("latin-1"), 1),
    }
    asyncio.run(server(scope, receive, send))
    assert len(answers) == 1, answers
    return f"status {answers[0]}"


def _zip(rng: random.Random, data: bytes, folder: Path) -> str:
    (folder / "a.zip").write_bytes(data)
    import_files([folder / "a.zip"], folder / "data", "images")
    return "upload"


def _encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _zipped(method: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("a/b.png", _PNG)
        archive.writestr("a/b.txt", "a cat " * 50)
    return buffer.getvalue()


_GRADIENT = Image.linear_gradient("L").resize((24, 16)).convert("RGB")
_PNG = _encoded(_GRADIENT, "PNG")
_JOB = Job(
    "20261130-000000-abcdef", "ink", Path("runs/ink"), 1.0, "running", pid=1, process_started=1.0
).to_dict()
_OPTIMIZER = save({"master": torch.zeros(2)})
_TOML = (
    b'[data]\nfolder = "images"\nresolution = 64\n\n'
    b'[training]\nsteps = 40\nseed = 3\n\n[sample]\nprompts = ["a cat"]\n',
    b'[output]\nname = "ink"\n[adapter]\nrank = 8\nkind = "lora"\n[optimizer]\nlearning_rate = 1e-4\n'
    b"betas = [0.9, 0.99]\n",
    b'[[data.sources]]\nfolder = "a"\nrepeats = 2\n[[data.sources]]\nfolder = "b"\n[model]\nbase = "mini"\n',
)
_PARAMETERS = (
    b"a cat (in:1.2) the sun <lora:ink:0.8>\nNegative prompt: dark\nSteps: 20, Sampler: Euler a, "
    b'CFG scale: 7, Seed: 5, Size: 64x64, Lora hashes: "ink: 0123456789ab, b: c", Model: mini',
    b'x\nSteps: 1, Sampler: "a, \\"b\\"", Schedule type: Karras, Seed: -1',
)
_PROMPTS = (
    b"a (cat:1.3) on [a (mat)], blue BREAK the sun \\(x\\)",
    b"{red|blue|{1|2}} hat, <lora:a:1>, ((b))",
    b"a [cat:dog:0.5] AND [red|[blue|green]:3] hat:0.7 <lora:ink:0.2:0.8> [x::4]",
)
_PROMPT_FILES = (b"# c\na cat --n blurry --w 512 --h 64 --d 1 --l 7.5 --s 30 --ss euler_a\n\na dog -- b\n",)
_EVENTS = (
    b'{"event": "RunStarted", "name": "x", "steps": 4, "first_step": 0, "expected_seconds": 1.5, '
    b'"expected_bytes": 10, "time": 1.0}\n{"event": "StepDone", "step": 1, "steps": 4, "loss": 0.5, '
    b'"learning_rate": 0.1, "seconds_left": 3.0, "images_per_second": 2.0}\n',
    b'{"event": "Sampled", "step": 2, "files": ["a.png"], "grid": "g.png"}\n{"event": "Validated", '
    b'"step": 2, "loss": 0.25}\n{"event": "CheckpointSaved", "step": 2, "folder": "c"}\n'
    b'{"event": "Notice", "message": "m"}\n',
    b'{"event": "Caching", "done": 1, "total": 2}\n{"event": "Decided", "key": "adapter.rank", "value": 8, '
    b'"reason": "r"}\n{"event": "RunFinished", "adapter_file": "a", "seconds": 5.0}\n',
)


def _asset(name: str) -> tuple[bytes, ...]:
    return (ASSETS.joinpath("mini", name).read_bytes(),)


def targets() -> dict[str, Target]:
    """Return every kind of file by its name; what takes time once only is done here."""
    load_model("mini", dtype=torch.float32, device=torch.device("meta"))
    csv = (
        b'file_name,text\na.png,a cat\nb.png,"a, b""c"""\n',
        b"file_name,caption\r\na.png,x\r\nc.png,y\r\n",
    )
    lines = (b'{"file_name": "a.png", "text": "a cat"}\n{"file_name": "b.png", "text": ["x", "y"]}\n',)
    history = (b'[{"IMAGE": ["a dog", "a cat"]}]', b'[{"a.png": [null, "a cat"]}, {"IMAGE": ["x", null]}]')
    images = tuple(_encoded(_GRADIENT, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"))
    images += (_encoded(_GRADIENT.convert("RGBA"), "PNG"), _encoded(_GRADIENT.convert("P"), "PNG"))
    state = {
        "step": 4,
        "digests": {"optimizer.safetensors": hashlib.sha256(_OPTIMIZER).hexdigest()},
        "micro_batches": 2,
        "optimizer": {"lr": 1.0},
    }
    configs = ("unet/config.json", "vae/config.json", "text_encoder/config.json")
    tokenizer = [name for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json")]
    return {
        "settings": Target(_TOML, _settings),
        "overrides": Target(
            (b"training.steps=40\ndata.folder=x\nsample.prompts=['a']", b"model.base=mini"), _overrides
        ),
        "metadata csv": Target(csv, _folder("metadata.csv"), 2),
        "metadata jsonl": Target(lines, _folder("metadata.jsonl"), 2),
        "sidecar": Target((b'{"focus": [0.5, 0.25]}',), _folder("a.json"), 2),
        "caption file": Target(
            (b"a cat, on a mat\n", b"\xef\xbb\xbfline one\nline two"), _folder("a.txt"), 2
        ),
        "names": Target(
            (b"2_cat/a.png\n10_dog/b.png\nx.png", b"IMG_0123.jpg\n(1).webp\na b_c-02.png"), _file_names, 2
        ),
        "image": Target(images, _image),
        "image in a folder": Target(images, _folder("c.png"), 1),
        "PNG text": Target(_PARAMETERS, _png_text),
        "parameters": Target(_PARAMETERS, _parameters),
        "prompt": Target(_PROMPTS, _prompt),
        "file of prompts": Target(_PROMPT_FILES, _prompt_file),
        "caption": Target((*_PROMPTS, b"one, two, three, four\nfive"), _caption),
        **{f"foreign {kind}": Target(samples, _foreign(kind), 2) for kind, samples in FOREIGN.items()},
        **{f"tags {kind}": Target(samples, _tag_list(kind), 1) for kind, samples in TAG_LISTS.items()},
        "implications": Target(IMPLICATIONS, _implications, 2),
        "axis": Target(AXES, _axis, 1),
        "threshold": Target(THRESHOLDS, _threshold, 1),
        "adapter": Target((b"a.safetensors:0.8", b"C:\\x\\a.safetensors:1:0.5"), _adapter),
        "model index": Target(_asset("model_index.json"), _base("model_index.json", load=False)),
        "scheduler": Target(
            _asset("scheduler/scheduler_config.json"),
            _base("scheduler/scheduler_config.json", load=True),
            0.15,
        ),
        **{f"base {name}": Target(_asset(name), _base(name, load=True), 0.15) for name in configs},
        **{
            f"base tokenizer/{name}": Target(
                _asset(f"tokenizer/{name}"), _base(f"tokenizer/{name}", load=True), 0.15
            )
            for name in tokenizer
            if ASSETS.joinpath("mini", "tokenizer", name).is_file()
        },
        "events": Target(_EVENTS, _events),
        "job": Target((json.dumps(_JOB).encode(), b'{"adapter_file": "a", "stopped": false}\n'), _job),
        "draft": Target((b'{"output.name": "x", "training.steps": "40", "data.recursive": true}',), _draft),
        "history": Target(history, _history, 1),
        "checkpoint": Target((json.dumps(state).encode(),), _checkpoint),
        "request": Target(
            (b"http://127.0.0.1:7860", b'{"data": [{"path": "a"}]}', b"password=a%20long"), _request, 2
        ),
        "zip": Target(tuple(_zipped(method) for method in (0, 8, 12, 14)), _zip, 1),
    }


def run_case(number: int, known: Mapping[str, Target], folder: Path) -> str:
    """Run one case and return its outcome: what was read, the kind of refusal, or ``CRASH``."""
    rng = random.Random(number)
    name = rng.choices(list(known), [target.weight for target in known.values()])[0]
    data = damaged(rng, known[name].samples)
    try:
        return f"{name}: {known[name].run(rng, data, folder)}"
    except Exception as error:
        outcome = outcome_of(error, folder)
    return f"{outcome} [{name}]" if outcome.startswith("CRASH") else f"{name}: {outcome}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; return 1 if anything crashed."""
    return run_cases(__doc__ or "", run_case, targets(), 100_000, arguments)


if __name__ == "__main__":
    sys.exit(main())
