"""Fuzzing of the adapter readers: damaged and made-up files must give an adapter or one clear refusal.

Every case is a pure function of its number, so a finding is repeated with ``--first N --count 1``. Files are
mutations of valid ones of every format and spelling, of their bytes and of their parsed headers, and
headers made up from a grammar. Run from the repository:

    python -m tools.fuzz_readers --count 100000
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save

from sdlora.errors import SdloraError
from sdlora.formats import read_adapter, read_outline
from sdlora.inspection import edit_adapter, inspect_adapter
from sdlora.inspection_view import render

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


def corpus() -> dict[str, bytes]:
    """Return valid files of every format, spelling and kind, and of things that are no adapter."""
    generator = torch.Generator().manual_seed(0)

    def low_rank(*names: str, down: str, up: str, alpha: bool = True) -> dict[str, torch.Tensor]:
        found = {}
        for name in names:
            found[name + down] = torch.randn(2, 3, generator=generator)
            found[name + up] = torch.randn(4, 2, generator=generator)
            if alpha:
                found[f"{name}.alpha"] = torch.tensor(1.5)
        return found

    def several(name: str, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
        return {f"{name}.{part}": torch.randn(shape, generator=generator) for part, shape in shapes.items()}

    dotted = MODULE.replace(".", "_")
    webui = ("lora_unet_" + dotted, "lora_te_" + TEXT.replace(".", "_"))
    kohya = low_rank(*webui, down=".lora_down.weight", up=".lora_up.weight")
    processor = "unet." + MODULE.replace(".to_k", ".processor.to_k")
    settings = {"unet.r": 2, "unet.lora_alpha": 3, "unet.alpha_pattern": {MODULE: 5}, "text_encoder.r": 2}
    files: dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]] = {
        "webui": (kohya, {"ss_output_name": "x", "sdlora.alphas": '{"unet":3,"text_encoder":1.5}'}),
        "sdxl": (
            low_rank(
                "lora_unet_input_blocks_4_1_proj_in",
                "lora_te2_" + TEXT.replace(".", "_"),
                down=".lora_down.weight",
                up=".lora_up.weight",
            ),
            {"ss_base_model_version": "sdxl_base_v1-0", "ss_tag_frequency": '{"a":{"b":1}}'},
        ),
        "diffusers": (
            low_rank(
                f"unet.{MODULE}",
                f"text_encoder.{TEXT}",
                down=".lora_A.weight",
                up=".lora_B.weight",
                alpha=False,
            ),
            {"lora_adapter_metadata": json.dumps(settings), "format": "pt"},
        ),
        "processor": (low_rank(processor, down="_lora.down.weight", up="_lora.up.weight", alpha=False), {}),
        "comfyui": (
            low_rank(
                "diffusion_model.middle_block.1.proj_in",
                f"text_encoders.clip_l.transformer.{TEXT}",
                down=".lora_down.weight",
                up=".lora_up.weight",
            ),
            {},
        ),
        "lycoris": (low_rank("lycoris_" + dotted, down=".lora_down.weight", up=".lora_up.weight"), {}),
        "peft": (
            low_rank(f"base_model.model.{MODULE}", down=".lora_A.weight", up=".lora_B.weight", alpha=False),
            {"format": "pt"},
        ),
        "loha": (
            several(
                webui[0], hada_w1_a=(4, 2), hada_w1_b=(2, 3), hada_w2_a=(4, 2), hada_w2_b=(2, 3), alpha=()
            ),
            {},
        ),
        "lokr": (several(webui[0], lokr_w1=(2, 2), lokr_w2_a=(2, 1), lokr_w2_b=(1, 3), alpha=()), {}),
        "dora": (kohya | several(webui[0], dora_scale=(4, 1)), {}),
        "checkpoint": ({"model.diffusion_model.out.2.weight": torch.ones(2)}, {}),
        "embedding": ({"emb_params": torch.ones(2, 768)}, {}),
    }
    return {name: save(tensors, entries) for name, (tensors, entries) in files.items()}


PEFT_CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 3,
    "alpha_pattern": {MODULE: 5},
    "use_rslora": False,
}


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


def run_case(number: int, files: dict[str, bytes], folder: Path) -> str:
    """Run one case and return its outcome: ``adapter``, the kind of refusal, or ``CRASH`` with what it was.

    Args:
        number: of the case.
        files: from :func:`corpus`.
        folder: for the file; it is used again and again.
    """
    rng = random.Random(number)
    name = rng.choice(sorted(files))
    mutation = rng.choice(MUTATIONS)
    data = mutation(rng, files[name])
    path = folder / ("adapter_model.safetensors" if name == "peft" else "case.safetensors")
    path.write_bytes(data)
    if name == "peft":
        write_config(rng, folder / "adapter_config.json")
        path = rng.choice((folder, path))
    action = rng.randrange(10)
    try:
        if action == 0:
            render(inspect_adapter(path))
        elif action == 1:
            edit_adapter(path, [f"{rng.choice(ENTRIES)}={rng.choice(NASTY_TEXTS)}"], [])
        elif action == 2:
            read_outline(path)
        else:
            read_adapter(path)
    except SdloraError as error:
        text = str(error)
        if any(ord(c) < 32 and c != "\n" for c in text) or len(text) > 3000:
            return "CRASH: a message with control characters or without end"
        return "refused: " + kind_of_refusal(text, folder)
    except Exception as error:  # the finding this is for
        line = traceback.extract_tb(error.__traceback__)[-1]
        return (
            f"CRASH: {type(error).__name__} in {Path(line.filename).name}:{line.lineno}: {str(error)[:80]!r}"
        )
    return "adapter"


def write_config(rng: random.Random, path: Path) -> None:
    """Write PEFT settings, most often with something wrong in them."""
    config: dict[str, Any] = dict(PEFT_CONFIG)
    if rng.random() < 0.6:
        key = rng.choice(
            ("peft_type", "r", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "target_modules")
        )
        config[key] = rng.choice((*NASTY_VALUES, "LOHA", {"a.b": 1}, {"(a+)+$": 1}, {MODULE: "x"}, {"": 0}))
    data = json.dumps(config).encode()
    path.write_bytes(damaged_bytes(rng, data) if rng.random() < 0.2 else data)


def kind_of_refusal(text: str, folder: Path) -> str:
    """Return a message without what differs from file to file."""
    text = text.replace(str(folder), "").split(";")[0]
    text = re.sub(r"`[^`]*`|\([^)]*\)?|\[[^\]]*\]?", "_", text)
    text = re.sub(r"^\S*: ", "", text)
    return re.sub(r"-?\d+", "N", text)[:60].strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases, print how often each outcome came, and return 1 if anything crashed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    options = parser.parse_args(arguments)
    outcomes: Counter[str] = Counter()
    examples: dict[str, int] = {}
    slowest = (0.0, -1)
    started, files = time.perf_counter(), corpus()
    with tempfile.TemporaryDirectory() as name:
        for number in range(options.first, options.first + options.count):
            before = time.perf_counter()
            outcome = run_case(number, files, Path(name))
            slowest = max(slowest, (time.perf_counter() - before, number))
            outcomes[outcome] += 1
            examples.setdefault(outcome, number)
    for outcome, times in outcomes.most_common():
        print(f"{times:8}  {outcome}  (first: case {examples[outcome]})")
    crashes = sum(times for outcome, times in outcomes.items() if outcome.startswith("CRASH"))
    memory = psutil.Process().memory_info().rss / 2**20
    print(
        f"{options.count} cases in {time.perf_counter() - started:.0f} s: {crashes} crashes, "
        f"{len(outcomes)} kinds of outcome; slowest {slowest[0]:.2f} s (case {slowest[1]}), "
        f"{memory:.0f} MiB of memory at the end"
    )
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
