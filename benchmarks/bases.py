"""Bases of the true sizes in every form users own them, taken through all that users do, by users' commands.

``python benchmarks/bases.py table --folder DIR`` makes SD1.5, SD2.1 and SDXL with random weights as one file,
as a diffusers folder and in the hub's cache (fp16; 14 GB of disk at most, deleted unless ``--keep``), and for
each runs the commands: load, recognise, train, resume, generate, export, reload. A cell is ``ok`` only if its
check holds (see the functions below), and says seconds and peak memory. The commands run offline, and where
Linux allows it without any network. (Peak memory is read as Linux tells it.)

``python benchmarks/bases.py memory --base FILE`` compares planned and measured memory of a training step,
``python benchmarks/bases.py speed --base FILE --resolution 1024`` trains and tells images a second and the
peak. Both work on the device that sdlora would choose.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from sdlora.config.schema import Config  # noqa: E402
from tools.measure_step import measure_memory, measure_speed, settings  # noqa: E402
from tools.true_sizes import fill_hub_cache, write_checkpoint, write_folder  # noqa: E402

FAMILIES = ("sd1", "sd2", "sdxl")
FORMS = ("file", "folder", "hub cache")
STAGES = ("load", "recognise", "train", "resume", "generate", "export", "reload")
GIB = 2**30
STRENGTHS = "0,300"  # two steps learn little: far up, the image must change


@dataclass
class Cell:
    """One command and what came of it."""

    ok: bool
    command: str
    seconds: float
    peak_bytes: int
    facts: dict[str, Any] = field(default_factory=dict)

    def shown(self) -> str:
        """Return the cell of the table."""
        return f"{'ok' if self.ok else 'FAILED'} {self.seconds:.0f} s {self.peak_bytes / GIB:.1f} GiB"


@dataclass
class Row:
    """One base in one form, and the folder its files are in."""

    family: str
    form: str
    base: str
    folder: Path
    env: dict[str, str]
    options: argparse.Namespace
    cells: dict[str, Cell] = field(default_factory=dict)

    def run(self, stage: str, arguments: Sequence[str], check: Callable[[dict[str, Any]], bool]) -> None:
        """Run a command of the sdlora CLI with ``--json`` and judge its answer by ``check``."""
        command = [sys.executable, "-m", "sdlora", *arguments, "--json"]
        self.cells[stage] = measured(command, f"sdlora {shlex.join(arguments)}", self.env, check)


def measured(
    command: Sequence[str], shown: str, env: Mapping[str, str], check: Callable[[dict[str, Any]], bool]
) -> Cell:
    """Run a command that ends with one line of JSON; return its time, peak memory and whether it is right."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        offline = ["unshare", "-rn"] if no_network() else []
        process = subprocess.Popen([*offline, *command], stdout=out, stderr=err, env={**os.environ, **env})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - began
        out.seek(0)
        err.seek(0)
        lines, errors = out.read().decode().splitlines(), err.read().decode()
    facts: dict[str, Any] = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    ok = process.returncode == 0 and check(facts)
    if not ok:
        print(f"FAILED: {shown}\n{errors[-3000:]}\n{lines[-1:]}", file=sys.stderr)
    return Cell(ok, shown, seconds, usage.ru_maxrss * 1024, facts)


def no_network() -> bool:
    """Tell whether this system can run a command without any network."""
    return shutil.which("unshare") is not None and subprocess.call(["unshare", "-rn", "true"]) == 0


# --- the stages ----------------------------------------------------------------------------------------


def load(row: Row) -> None:
    """The weights arrive finite, with at most 1 GiB beside them; their digest is compared later."""
    command = [sys.executable, __file__, "load", "--base", row.base, "--precision", row.options.precision]
    shown = f"python benchmarks/bases.py load --base {row.base} --precision {row.options.precision}"

    def check(facts: dict[str, Any]) -> bool:
        return facts.get("family") == row.family and facts["extra_bytes"] < GIB

    row.cells["load"] = measured(command, shown, row.env, check)


def recognise(row: Row) -> None:
    """`inspect` names the family."""
    row.run("recognise", ["inspect", row.base], lambda facts: facts["family"] == row.family)


def train(row: Row) -> None:
    """Two steps end in an adapter file whose up factors are no longer zero."""
    options = row.options
    settings = [
        *(f"data.resolution={options.size}", "data.validation=0", "sample.prompts=[]", "adapter.rank=4"),
        *("adapter.text_encoder=true", "training.batch_size=1", "training.steps=2"),
        *("training.checkpoint_every=1", f"training.precision={options.precision}"),
    ]
    images, run = row.folder / "images", row.folder / "run"
    for number, file in enumerate(sorted((ROOT / "datasets" / "ink-icons").glob("*.png"))[:2]):
        images.mkdir(exist_ok=True)
        shutil.copy(file, images / f"{number}.png")
        shutil.copy(file.with_suffix(".txt"), images / f"{number}.txt")

    def check(facts: dict[str, Any]) -> bool:
        tensors = load_file(facts["adapter_file"])
        facts["digest"] = tensors_digest(tensors)
        ups = [tensor for key, tensor in tensors.items() if key.endswith("lora_up.weight")]
        return len(ups) > 100 and all(bool(torch.isfinite(t).all()) for t in ups) and any(map(torch.any, ups))

    row.run("train", ["train", str(images), "--base", row.base, "--output", str(run), *settings], check)


def resume(row: Row) -> None:
    """A copy of the run, as a crash after step 1 would leave it, is resumed and ends with the same bits."""
    run, again = row.folder / "run", row.folder / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "step-000002")
    (again / "lora.safetensors").unlink()

    def check(facts: dict[str, Any]) -> bool:
        last = Path("checkpoints") / "step-000002" / "optimizer.safetensors"
        first, other = load_file(run / last), load_file(again / last)
        return first.keys() == other.keys() and all(torch.equal(first[key], other[key]) for key in first)

    config = (again / "config.toml").read_text(encoding="utf-8")
    (again / "config.toml").write_text(config.replace(str(run), str(again)), encoding="utf-8")
    row.run("resume", ["train", "--resume", "--output", str(again)], check)


def draw(row: Row, stage: str, adapter: Path) -> Cell:
    """Draw one prompt at strength 0 and far above 1; images must differ."""
    arguments = ["generate", "--base", row.base, "--adapter", str(adapter), "--prompt", "an icon of a cat"]
    arguments += ["--size", f"{row.options.size}x{row.options.size}", "--steps", "2", "--seed", "1"]
    arguments += ["--strengths", STRENGTHS, "--precision", row.options.precision]

    def check(facts: dict[str, Any]) -> bool:
        first, other = (pixels(Path(file)) for file in facts["files"])
        facts["digest"] = f"{first} {other}"
        return first != other

    row.run(stage, [*arguments, "--output", str(row.folder / stage)], check)
    return row.cells[stage]


def generate(row: Row) -> None:
    """The run's adapter changes the image; strength 0 does not (its digest is compared across forms)."""
    draw(row, "generate", row.folder / "run" / "lora.safetensors")


def export(row: Row) -> None:
    """Written for WebUI, read back, and equal to what was trained."""
    arguments = ["export", str(row.folder / "run"), "--format", "webui", "--output", str(row.folder / "out")]
    row.run("export", arguments, lambda facts: bool(facts["files"]))


def reload(row: Row) -> None:
    """The exported file draws the same images as the run's adapter."""
    before = row.cells["generate"].facts.get("digest")
    cell = draw(row, "reload", Path(row.cells["export"].facts["files"][0]))
    cell.ok = cell.ok and cell.facts["digest"] == before


STAGE_FUNCTIONS = (load, recognise, train, resume, generate, export, reload)


def pixels(file: Path) -> str:
    """Return a digest of an image's pixels."""
    from PIL import Image

    with Image.open(file) as image:
        return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()[:16]


# --- the table -----------------------------------------------------------------------------------------


def make_forms(folder: Path, family: str) -> dict[str, tuple[str, dict[str, str]]]:
    """Make a base in all its forms; return form -> (what users would give, environment)."""
    file, diffusers, cache = folder / f"{family}.safetensors", folder / family, folder / "hub"
    if not file.exists():
        write_checkpoint(file, family, torch.float16)
    if not (diffusers / "model_index.json").exists():
        write_folder(diffusers, file, family, torch.float16)
    fill_hub_cache(cache, diffusers, f"somebody/{family}")
    env = {"HF_HUB_OFFLINE": "1"}
    return {
        "file": (str(file), env),
        "folder": (str(diffusers), env),
        "hub cache": (f"somebody/{family}", {**env, "HF_HUB_CACHE": str(cache)}),
    }


def table(options: argparse.Namespace) -> int:
    """Fill and print the table; return 1 if any cell failed."""
    rows: list[Row] = []
    options.folder.mkdir(parents=True, exist_ok=True)
    for family in options.families.split(","):
        forms = make_forms(options.folder, family)
        for form in options.forms.split(","):
            base, env = forms[form]
            work = Path(tempfile.mkdtemp(dir=options.folder, prefix=f"{family}-"))
            env = {**env, "SDLORA_CACHE_FOLDER": str(work / "cache"), "OMP_WAIT_POLICY": "PASSIVE"}
            row = Row(family, form, base, work, env, options)
            for stage in STAGE_FUNCTIONS:
                stage(row)
                print(family, form, stage.__name__, row.cells[stage.__name__].shown(), flush=True)
            rows.append(row)
            if options.json:
                kept = [{"family": r.family, "form": r.form, **as_json(r)} for r in rows]
                options.json.write_text(json.dumps(kept, indent=2), encoding="utf-8")
        if not options.keep:
            (options.folder / f"{family}.safetensors").unlink()
            shutil.rmtree(options.folder / family)
    print(rendered(rows))
    failed = [row for row in rows if not all(cell.ok for cell in row.cells.values())]
    return 1 if failed or not equal_across_forms(rows) else 0


def as_json(row: Row) -> dict[str, Any]:
    """Return the cells of a row."""
    return {name: asdict(cell) for name, cell in row.cells.items()}


def equal_across_forms(rows: Sequence[Row]) -> bool:
    """Tell whether all forms of a family gave the same weights, the same adapter and the same images."""
    equal = True
    for family in dict.fromkeys(row.family for row in rows):
        family_rows = [row for row in rows if row.family == family]
        for what, stage in (("weights", "load"), ("adapter", "train"), ("images", "generate")):
            digests = {row.cells[stage].facts.get("digest") for row in family_rows}
            same = len(digests) == 1 and None not in digests
            print(
                f"{family}: {what} {'equal' if same else 'DIFFER'} in {len(family_rows)} forms, bit for bit"
            )
            equal = equal and same
    return equal


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of a file's tensors, whatever its header says."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def rendered(rows: Sequence[Row]) -> str:
    """Return the table as Markdown, and the commands of each row."""
    lines = [f"| family | form | {' | '.join(STAGES)} |", f"|---|---|{'---|' * len(STAGES)}"]
    for row in rows:
        cells = " | ".join(row.cells[stage].shown() for stage in STAGES)
        lines.append(f"| {row.family} | {row.form} | {cells} |")
    for row in rows:
        lines += ["", f"{row.family}, {row.form}: {' '.join(f'{k}={v}' for k, v in row.env.items())}"]
        lines += [f"    {row.cells[stage].command}" for stage in STAGES]
    return "\n".join(lines)


# --- one process each ----------------------------------------------------------------------------------


def load_once(options: argparse.Namespace) -> int:
    """Load a base in this process; print time, memory and a digest of the weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401  (libraries are not weights)
    from transformers import CLIPTextModel, CLIPTextModelWithProjection  # noqa: F401

    from sdlora.devices import choose_dtype
    from sdlora.families.fingerprint import module_fingerprint
    from sdlora.families.loading import load_model

    device = torch.device("cpu")
    before = restart_peak()
    began, used = time.perf_counter(), time.process_time()
    model = load_model(options.base, dtype=choose_dtype(options.precision, device), device=device)
    seconds, used = time.perf_counter() - began, time.process_time() - used
    peak = peak_bytes()
    modules = [model.unet, model.vae, *model.text_encoders.values()]
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    weights = sum(t.numel() * t.element_size() for t in tensors)
    finite = all(bool(torch.isfinite(t).all()) for t in tensors)
    digest = hashlib.sha256("".join(map(module_fingerprint, modules)).encode()).hexdigest()[:16]
    figures = {
        "family": model.info.name,
        "seconds": round(seconds, 2),
        "processor_seconds": round(used, 2),
        "weights_bytes": weights,
        "extra_bytes": peak - before - weights,
        "peak_bytes": peak,
        "digest": digest,
    }
    print(json.dumps(figures))
    return 0 if finite else 1


def restart_peak() -> int:
    """Forget the peak of this process so far (Linux); return the bytes it has now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def peak_bytes() -> int:
    """Return the most bytes this process had since the last :func:`restart_peak` (Linux)."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def memory(options: argparse.Namespace) -> int:
    """Print planned and measured memory of a step in bytes; fail if they differ by more than 15 %."""
    with tempfile.TemporaryDirectory() as work:
        measured_step = measure_memory(_short_run(options, Path(work)))
    plan = measured_step.plan
    figures = {
        "planned": plan.peak,
        "weights": plan.weights,
        "adapter": plan.adapter,
        "step": plan.activations,
        "measured": measured_step.bytes,
        "ratio": round(measured_step.ratio, 3),
    }
    print(json.dumps(figures))
    return 0 if abs(measured_step.ratio - 1) <= 0.15 else 1


def speed(options: argparse.Namespace) -> int:
    """Train and print images a second and the peak of CUDA's memory."""
    with tempfile.TemporaryDirectory() as work:
        print(json.dumps(measure_speed(_short_run(options, Path(work)))))
    return 0


def _short_run(options: argparse.Namespace, work: Path) -> Config:
    given = [f"data.resolution={options.resolution}", f"training.batch_size={options.batch}"]
    given += [f"training.steps={options.steps}", f"training.precision={options.precision}", *options.set]
    given += [f"training.device={options.device}"] if options.device else []
    # encoding images is not what is measured
    return settings(options.base, work, *given, count=2 * options.batch + 1)


def main() -> int:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    table_parser = commands.add_parser("table")
    table_parser.add_argument("--folder", type=Path, required=True, help="where everything is made")
    table_parser.add_argument("--families", default=",".join(FAMILIES))
    table_parser.add_argument("--forms", default=",".join(FORMS))
    table_parser.add_argument("--size", type=int, default=64, help="px")
    table_parser.add_argument("--keep", action="store_true", help="leave the bases there")
    table_parser.add_argument("--json", type=Path)
    others = {"load": load_once, "memory": memory, "speed": speed}
    for name in others:
        other = commands.add_parser(name)
        other.add_argument("--base", required=True)
        other.add_argument("--resolution", type=int, default=512)
        other.add_argument("--batch", type=int, default=1)
        other.add_argument("--steps", type=int, default=50)
        other.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
        other.add_argument("--device", help="the fastest one here when left out")
    for subparser in commands.choices.values():
        subparser.add_argument("--precision", default="bf16", choices=["fp32", "bf16", "fp16"])
    options = parser.parse_args()
    return {"table": table, **others}[options.command](options)


if __name__ == "__main__":
    sys.exit(main())
