"""What the fuzzers share: mutations of safetensors files, how an outcome is called, the run over many cases.

Every case is a pure function of its number, so a finding is repeated with ``--first N --count 1``.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import shutil
import signal
import struct
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from sdlora.errors import SdloraError

MOST_SECONDS = 2.0
"""Of processor time that a case may take."""
MOST_BYTES = 2**30
"""Of memory that a case may take beside what was there."""
MODULE = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
NASTY_TEXTS = (
    *(
        "",
        "None",
        "{",
        "[" * 2000,
        '{"a":' * 500,
        "\ud800",
        "\x00\x1b[2J",
        "../../x",
        "C:\\con",
        "1e999",
        "nan",
    ),
    *("-1", "9" * 5000, '{"unet":0}', '{"unet":1e999}', '{"unet.r":4,"unet.lora_alpha":-3}', "[null]", '"'),
    *('{"unet.alpha_pattern":{"(a+)+$":1}}', "true", "{}", "[]", "0", "\u202e", "x" * 100_000),
)
NASTY_NUMBERS = (
    0,
    1,
    2,
    3,
    4,
    5,
    8,
    255,
    2**31,
    2**32 + 1,
    2**53,
    2**62 + 1,
    2**63,
    2**64,
    10**40,
    -1,
    -(2**63),
)
NASTY_VALUES: tuple[Any, ...] = (
    *NASTY_NUMBERS,
    None,
    True,
    1.5,
    "1",
    [],
    {},
    [[]],
    "F32",
    [2, 2],
    [0, 2**62, 2**62],
)
DTYPES = ("F32", "F16", "BF16", "F64", "F8_E4M3", "I8", "BOOL", "U64", "F4", "f32", "")
ENTRIES = (
    *(
        "sdlora.alphas",
        "lora_adapter_metadata",
        "ss_output_name",
        "ss_tag_frequency",
        "ss_base_model_version",
    ),
    *(
        "sdlora.trigger_words",
        "modelspec.trigger_phrase",
        "sshs_model_hash",
        "format",
        "modelspec.architecture",
    ),
)


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return a file with some of its bytes changed, cut, doubled or put elsewhere."""
    whole = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(whole) or 1)
        span = rng.randint(1, 40)
        kind = rng.randrange(7)
        if kind == 0 and whole:
            whole[at % len(whole)] = rng.randrange(256)
        elif kind == 1 and whole:
            whole[at % len(whole)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del whole[at:]
        elif kind == 3:
            del whole[at : at + span]
        elif kind == 4:
            whole[at:at] = whole[at : at + span]
        elif kind == 5:
            whole[at:at] = rng.choice((b"\x00" * span, b'"', b"{", b"}", b"[", b",", b"\xff\xfe", b"\\ud800"))
        else:
            lengths = (rng.choice(NASTY_NUMBERS) % 2**64, rng.randrange(2 * len(whole) + 9))
            whole[:8] = struct.pack("<Q", rng.choice(lengths))
    return bytes(whole)


def damaged_header(rng: random.Random, data: bytes) -> bytes:
    """Return a file whose header is well-formed JSON but says something else."""
    length = struct.unpack("<Q", data[:8])[0]
    tree, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(rng.randint(1, 3)):
        keys = [key for key in tree if key != "__metadata__"] or ["x"]
        key = rng.choice(keys)
        entry = tree.get(key)
        kind = rng.randrange(9)
        if kind == 0:
            tree[key] = copy.deepcopy(rng.choice(NASTY_VALUES))
        elif kind == 1 and isinstance(entry, dict):
            field = rng.choice(("dtype", "shape", "data_offsets", "more"))
            entry[field] = copy.deepcopy(rng.choice((*NASTY_VALUES, *DTYPES)))
        elif kind == 2 and isinstance(entry, dict):
            entry["dtype"] = rng.choice(DTYPES)
        elif kind == 3 and isinstance(entry, dict):
            entry["shape"] = [rng.choice(NASTY_NUMBERS) for _ in range(rng.randint(0, 9))]
        elif kind == 4 and isinstance(entry, dict):
            entry["data_offsets"] = [
                rng.choice((*NASTY_NUMBERS, len(body))) for _ in range(rng.choice((2, 2, 3)))
            ]
        elif kind == 5:
            tree[made_up_key(rng, key)] = tree.pop(key, None)
        elif kind == 6:
            tree.pop(key, None)
        elif kind == 7:
            entries = tree.setdefault("__metadata__", {})
            if isinstance(entries, dict):
                entries[rng.choice(ENTRIES)] = rng.choice(NASTY_TEXTS)
        else:
            tree["__metadata__"] = copy.deepcopy(rng.choice(NASTY_VALUES))
    return with_header(rng, json.dumps(tree).encode("utf-8", "surrogatepass"), body)


def made_up(rng: random.Random, data: bytes) -> bytes:
    """Return a file with a header from a grammar: consistent offsets, keys and shapes from what is in use."""
    tree: dict[str, Any] = {}
    position = 0
    for _ in range(rng.randint(0, 6)):
        shape = [rng.choice((0, 1, 1, 2, 2, 3, 4)) for _ in range(rng.choice((0, 1, 2, 2, 2, 4)))]
        dtype = rng.choice(("F32", "F32", "F16", "BF16", "F64", "I8", "F8_E5M2"))
        size = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I8": 1, "F8_E5M2": 1}[dtype]
        for side in shape:
            size *= side
        name = rng.choice(("lora_unet_" + MODULE.replace(".", "_"), f"unet.{MODULE}", f"text_encoder.{TEXT}"))
        tree[made_up_key(rng, name)] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [position, position + size],
        }
        position += size
    if rng.random() < 0.5:
        tree["__metadata__"] = {
            rng.choice(ENTRIES): rng.choice(NASTY_TEXTS) for _ in range(rng.randint(0, 3))
        }
    body = rng.choice((bytes(position), rng.randbytes(position), b"\xff" * position))
    return with_header(rng, json.dumps(tree).encode("utf-8", "surrogatepass"), body)


def changed_inside(rng: random.Random, data: bytes) -> bytes:
    """Return a file of right structure with other values, entries or parts of keys, to get far inside."""
    length = struct.unpack("<Q", data[:8])[0]
    tree, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    for _ in range(rng.randint(0, 4)):
        kind = rng.randrange(4)
        if kind == 0 and body:
            body[rng.randrange(len(body))] = rng.randrange(256)
        elif kind == 1:
            entries = tree.setdefault("__metadata__", {})
            entries[rng.choice(ENTRIES)] = rng.choice(NASTY_TEXTS)
        elif kind == 2:
            key = rng.choice([key for key in tree if key != "__metadata__"])
            tree[key.replace("0", rng.choice("0123"), 1)] = tree.pop(key)
        else:
            key = rng.choice([key for key in tree if key != "__metadata__"])
            swaps = (("lora_down", "lora_A"), ("lora_up", "lora_B"), ("alpha", "scale"), ("_te_", "_te1_"))
            tree[key.replace(*rng.choice(swaps))] = tree.pop(key)
    return with_header(rng, json.dumps(tree).encode("utf-8", "surrogatepass"), bytes(body))


def made_up_key(rng: random.Random, name: str) -> str:
    """Return a key near those in use: a known module or nearly so, with a known part or nearly so."""
    parts = (
        *(
            ".lora_down.weight",
            ".lora_up.weight",
            ".alpha",
            ".scale",
            ".lora_A.weight",
            ".lora_B.default.weight",
        ),
        *(".dora_scale", ".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".lokr_w1"),
        *(
            ".lokr_w2",
            ".lokr_w2_a",
            ".lokr_w2_b",
            ".lora_mid.weight",
            "_lora.up.weight",
            ".diff",
            ".weight",
            "",
        ),
    )
    stem = re.sub(r"\.(lora_|alpha|hada|lokr|dora|weight).*$", "", name)
    if rng.random() < 0.15:
        at = rng.randrange(len(stem) + 1)
        stem = stem[:at] + rng.choice((".", "_", "9" * 5, "\u00e9", "..", "to_q", " ")) + stem[at:]
    return stem + rng.choice(parts)


def with_header(rng: random.Random, text: bytes, body: bytes) -> bytes:
    """Return a file of a header and data; now and then the header has a key twice or is padded."""
    if rng.random() < 0.05 and text.startswith(b'{"'):
        text = text[:-1] + b"," + text[1:-1] + b"}"
    text += b" " * rng.choice((0, 0, 0, 8, 200))
    return struct.pack("<Q", len(text)) + text + body


MUTATIONS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    damaged_bytes,
    damaged_header,
    made_up,
    changed_inside,
)


def outcome_of(error: Exception, folder: Path) -> str:
    """Return what an error of a reader counts as: the kind of refusal, or ``CRASH`` with what it was."""
    text = str(error)
    if not isinstance(error, SdloraError):
        line = traceback.extract_tb(error.__traceback__)[-1]
        return f"CRASH: {type(error).__name__} in {Path(line.filename).name}:{line.lineno}: {text[:80]!r}"
    lines = text.split("\n")
    if any(ord(c) < 32 and c != "\n" for c in text) or len(lines) > 60 or max(map(len, lines)) > 3000:
        return "CRASH: a message with control characters or without end"
    return "refused: " + kind_of_refusal(text, folder)


def kind_of_refusal(text: str, folder: Path) -> str:
    """Return a message without what differs from file to file."""
    text = text.replace(str(folder), "").split(";")[0]
    text = re.sub(r"`[^`]*`|\([^)]*\)?|\[[^\]]*\]?", "_", text)
    text = re.sub(r"^\S*: ", "", text)
    return re.sub(r"-?\d+", "N", text)[:60].strip()


class Hang(BaseException):
    """A case that was ended because it went on and on."""


@contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """Raise :class:`Hang` inside after so much processor time, where the system has such a clock."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Hang

    previous = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


_FORGET_PEAK = Path("/proc/self/clear_refs")


def peak_bytes(*, anew: bool = False) -> int:
    """Return the most memory this process has had; what it has now where the system does not remember.

    Args:
        anew: from now on the most since now is meant, where the system can forget (Linux).
    """
    if anew and _FORGET_PEAK.exists():
        _FORGET_PEAK.write_text("5", encoding="ascii")
    with suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


@dataclass
class Watched:
    """Runs cases and holds each against the bounds of time and memory.

    Attributes:
        run_case: number, what is damaged and a folder to use -> outcome.
        corpus: what is damaged.
        keep: where the folder of a crashed case is copied to; None for nowhere.
        most_bytes: the most memory that the process had in a case.
    """

    run_case: Callable[[int, Any, Path], str]
    corpus: Any
    keep: Path | None = None
    most_bytes: int = 0

    def outcome(self, number: int, folder: Path) -> tuple[str, float]:
        """Return the outcome of a case, ``CRASH`` also beyond a bound, and its seconds of processor time."""
        place = Path(tempfile.mkdtemp(dir=folder))
        peak, before = peak_bytes(anew=True), time.process_time()
        try:
            with ended_after(5 * MOST_SECONDS):
                outcome = self.run_case(number, self.corpus, place)
        except Hang as error:
            line = traceback.extract_tb(error.__traceback__)[-2]  # the last one is the clock's
            outcome = f"CRASH: hangs in {Path(line.filename).name}:{line.lineno}"
        seconds, grown = time.process_time() - before, peak_bytes() - peak
        if not outcome.startswith("CRASH"):
            if seconds > MOST_SECONDS:
                outcome = f"CRASH: takes more than {MOST_SECONDS:g} s: {outcome}"
            elif grown > MOST_BYTES:
                outcome = f"CRASH: takes more than {MOST_BYTES // 2**20} MiB: {outcome}"
        self.most_bytes = max(self.most_bytes, peak_bytes())
        if outcome.startswith("CRASH") and self.keep is not None:
            shutil.copytree(place, self.keep / f"case-{number}", symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        return outcome, seconds


def run_cases(
    description: str,
    run_case: Callable[[int, Any, Path], str],
    corpus: Any,
    count: int,
    arguments: Sequence[str] | None,
) -> int:
    """Run the cases that the command line asks for, print how often each outcome came, return the exit code.

    Args:
        description: for ``--help``.
        run_case: number, what is damaged and a folder to use -> outcome.
        corpus: what is damaged.
        count: cases when the command line does not say.
        arguments: the command line.

    Returns:
        1 if anything crashed.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--keep", type=Path, help="folder for the input of what crashed")
    options = parser.parse_args(arguments)
    outcomes: Counter[str] = Counter()
    examples: dict[str, int] = {}
    slowest = (0.0, -1)
    started = time.perf_counter()
    watched = Watched(run_case, corpus, options.keep)
    with tempfile.TemporaryDirectory() as name:
        for number in range(options.first, options.first + options.count):
            outcome, seconds = watched.outcome(number, Path(name))
            slowest = max(slowest, (seconds, number))
            outcome = outcome.encode(
                "ascii", "backslashreplace"
            ).decode()  # half characters cannot be printed
            outcomes[outcome] += 1
            examples.setdefault(outcome, number)
    for outcome, times in outcomes.most_common():
        print(f"{times:8}  {outcome}  (first: case {examples[outcome]})")
    crashes = sum(times for outcome, times in outcomes.items() if outcome.startswith("CRASH"))
    print(
        f"{options.count} cases in {time.perf_counter() - started:.0f} s: {crashes} crashes, "
        f"{len(outcomes)} kinds of outcome; slowest {slowest[0]:.2f} s of processor time "
        f"(case {slowest[1]}), {watched.most_bytes / 2**20:.0f} MiB of memory at most"
    )
    return 1 if crashes else 0
