"""Safetensors files: read without trusting them, written so that equal content gives equal bytes.

Nothing in a file is believed before it is checked against the file's true size, so a hostile header
cannot make us allocate more than the file holds. Only safetensors is read: pickles run code.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import AdapterFileError, shown
from .files import parse_json, replacing
from .number_formats import NUMBER_FORMATS

MAX_HEADER_BYTES = 32 * 2**20
"""Longest header we parse: real ones stay under a few MiB, even with cover images inside."""
MAX_NUM_DIMENSIONS = 8
MAX_ENTRY_CHARS = 4 * 2**20
"""Longest text entry that is parsed as JSON itself."""
_SMALL_HEADER_BYTES = 2**20
"""Headers up to this size are always parsed: the result takes some tens of MiB at most."""
MAX_STRINGS = 100_000
MAX_STRUCTURE_BYTES = 4 * 2**20
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)

DTYPES = {known.file_name: known.dtype for known in NUMBER_FORMATS}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOAT_DTYPES = tuple(known.dtype for known in NUMBER_FORMATS if known.is_factor)
FP8_DTYPES = tuple(known.dtype for known in NUMBER_FORMATS if known.name.startswith("F8_"))
"""Read as fp16, which holds every value of both exactly; torch computes little in them itself."""
_FP8_SCALES = (".scale_weight", ".weight_scale")

PICKLE_SUFFIXES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"}
_FOREIGN_STARTS = (
    (b"PK\x03\x04", "a zip archive, as PyTorch writes .pt and .ckpt files,"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself,"),
    (b"<!DOCTYPE", "a web page, not the file itself,"),
    (b"<!doctype", "a web page, not the file itself,"),
    (b"<html", "a web page, not the file itself,"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
)
CONVERT = (
    'convert it where you trust it: python -c "import torch, safetensors.torch as s; '
    "d = torch.load('IN', 'cpu', weights_only=True); d = d.get('state_dict', d); "
    "s.save_file({k: t.contiguous().clone() for k, t in d.items() if hasattr(t, 'shape')}, "
    "'OUT.safetensors')\""
)
_CONVERT = f"sdlora reads only .safetensors, because such files can run code when opened; {CONVERT}"
_DOWNLOAD = "download the .safetensors file itself"


@dataclass(frozen=True)
class TensorSpec:
    """Where one tensor lies: bytes ``start`` to ``end`` after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The checked header of a safetensors file.

    Attributes:
        path: the file.
        metadata: its text entries.
        tensors: its tensors by key, in the order of the header.
        data_offset: bytes before the tensor data.
        num_bytes: size of the file.
    """

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorSpec]
    data_offset: int
    num_bytes: int


Load = Callable[[str], Tensor]
"""Gives the tensor of a key."""


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file, without reading any tensor.

    Raises:
        AdapterFileError: for a missing, empty, truncated, foreign or malformed file.
    """
    try:
        if path.is_dir():
            raise AdapterFileError(
                f"{path}: is a folder, but a .safetensors file is needed here; name the file"
            )
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise AdapterFileError(f"{path}: is a pipe or a device, not a file; name a .safetensors file")
        with path.open("rb") as stream:
            num_bytes = stream.seek(0, 2)
            stream.seek(0)
            start = stream.read(32)
            length = _header_length(path, start, num_bytes)
            stream.seek(8)
            raw = stream.read(length)
    except FileNotFoundError:
        raise AdapterFileError(f"{path}: no such file or folder; check the path of the adapter") from None
    except OSError as error:
        reason = error.strerror or error
        raise AdapterFileError(f"{path}: cannot be read ({reason}); check its permissions") from None
    if len(raw) != length:
        raise _broken(path, f"ends inside its header ({len(raw)} of {length} bytes are there)")
    _check_amount(path, raw)
    tree = _parse(path, raw)
    metadata = _metadata(path, tree.pop("__metadata__", None))
    tensors = {key: _tensor_spec(path, key, entry) for key, entry in tree.items()}
    _check_layout(path, tensors, num_bytes - 8 - length)
    return Header(path, metadata, tensors, 8 + length, num_bytes)


@contextmanager
def opened(header: Header) -> Iterator[Load]:
    """Give a function that loads one tensor by its key, into memory of its own, while the file is open.

    Raises:
        AdapterFileError: when a tensor holds NaN or infinity, or the file changed meanwhile.
    """
    try:
        with header.path.open("rb") as stream:

            def load(key: str) -> Tensor:
                spec = header.tensors[key]
                stream.seek(header.data_offset + spec.start)
                tensor = _tensor(header.path, key, spec, stream.read(spec.end - spec.start))
                if spec.dtype in FP8_DTYPES:
                    tensor = tensor.to(torch.float16)
                    if (scale := scale_key(header, key)) is not None:
                        tensor = tensor.float() * load(scale).float()
                if tensor.dtype in FLOAT_DTYPES and not all_finite(tensor):
                    raise AdapterFileError(
                        f"{header.path}: tensor `{shown(key)}` holds NaN or infinite values; the training "
                        "that made it diverged, use an earlier checkpoint of it"
                    )
                return tensor

            yield load
    except OSError as error:
        raise AdapterFileError(
            f"{header.path}: cannot be read ({error.strerror or error}); try again"
        ) from None


@contextmanager
def shapes_only(header: Header) -> Iterator[Load]:
    """Give a function like that of :func:`opened` that reads single numbers only.

    All larger tensors come as meta tensors, which have a shape and a number format but no values.
    """
    with opened(header) as load:

        def outline(key: str) -> Tensor:
            spec = header.tensors[key]
            if math.prod(spec.shape) == 1:
                return load(key)
            dtype = torch.float16 if spec.dtype in FP8_DTYPES else spec.dtype
            return torch.empty(spec.shape, dtype=dtype, device="meta")

        yield outline


def scale_key(header: Header, key: str) -> str | None:
    """Return the key of the number that an fp8 tensor is multiplied by, if the file has one.

    Raises:
        AdapterFileError: when it is not one floating-point number.
    """
    stem = key.removesuffix(".weight")
    for name in (stem + _FP8_SCALES[0], stem + _FP8_SCALES[1]):
        spec = header.tensors.get(name)
        if spec is not None:
            if math.prod(spec.shape) != 1 or spec.dtype not in FLOAT_DTYPES:
                raise AdapterFileError(
                    f"{header.path}: the scale `{shown(name)}` is not one floating-point number; "
                    "export the file again"
                )
            return name
    return None


def is_scale_of_fp8(key: str, known: Container[str]) -> bool:
    """Tell whether a key is the scale of another one's fp8 tensor, which :func:`opened` multiplies it by."""
    return any(key.endswith(end) and f"{key.removesuffix(end)}.weight" in known for end in _FP8_SCALES)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically; equal tensors and entries give equal bytes.

    safetensors' own writer keeps the entries in a hash map, so its files differ from run to run.
    """
    ordered = in_file_order(tensors)
    with replacing(path) as temporary, temporary.open("wb") as stream:
        stream.write(header_bytes(ordered, metadata))
        for tensor in ordered.values():
            stream.write(tensor_bytes(tensor))


def in_file_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as safetensors lays them out: wide number formats first, then by key."""
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))


def header_bytes(ordered: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the length field and the JSON header, padded to 8 bytes as safetensors does."""
    tree: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for key, tensor in ordered.items():
        end = position + tensor.numel() * tensor.element_size()
        tree[key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the little-endian bytes of a tensor in row-major order."""
    if tensor.numel() == 0:
        return b""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def data_sha256(path: Path, data_offset: int) -> str:
    """Return the SHA-256 (hex) of everything after the header, which is what WebUI calls the hash."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        stream.seek(data_offset)
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _header_length(path: Path, start: bytes, num_bytes: int) -> int:
    if num_bytes == 0:
        raise AdapterFileError(f"{path}: is empty (0 bytes); {_DOWNLOAD} again or export the adapter again")
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else None
    brace = start[8:9]
    # the length field of a 640-byte header is also the start of a pickle: so safetensors is considered first
    plausible = length is not None and brace == b"{" and 2 <= length <= num_bytes - 8
    for magic, what in _FOREIGN_STARTS:
        if start.startswith(magic) and not plausible:
            fix = _CONVERT if "pickle" in what or "zip" in what else _DOWNLOAD
            raise AdapterFileError(f"{path}: is {what} and not safetensors; {fix}")
    if length is None or brace != b"{" or length < 2 or length > num_bytes - 8:
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise AdapterFileError(f"{path}: is a {path.suffix} file and not safetensors; {_CONVERT}")
        if length is not None and brace == b"{" and length > num_bytes - 8:
            raise _broken(path, f"is cut off or damaged: its header claims {length} of {num_bytes} bytes")
        raise AdapterFileError(f"{path}: is not a safetensors file ({num_bytes} bytes); {_DOWNLOAD}")
    if length > MAX_HEADER_BYTES:
        raise AdapterFileError(
            f"{path}: has a header of {length} bytes, more than the {MAX_HEADER_BYTES} any adapter needs; "
            "it is damaged or made to harm, get it from another source"
        )
    return int(length)


def _check_amount(path: Path, raw: bytes) -> None:
    """Refuse a header that would take far more memory parsed than as text, as millions of tiny values do.

    Long texts, such as cover images and lists of tags, do no harm.
    """
    if len(raw) <= _SMALL_HEADER_BYTES:
        return
    rest, num_strings = _STRING.subn(b"", raw, count=MAX_STRINGS + 1)
    if num_strings > MAX_STRINGS or len(rest) > MAX_STRUCTURE_BYTES:
        raise AdapterFileError(
            f"{path}: has a header of {len(raw)} bytes with more values than any adapter has; it is damaged "
            "or made to harm, get it from another source"
        )


def entry_json(text: str) -> object:
    """Return the JSON value in a text entry of a header.

    Raises:
        ValueError: when it is not JSON, nested too deep, or longer than :data:`MAX_ENTRY_CHARS`.
    """
    if len(text) > MAX_ENTRY_CHARS:
        raise ValueError(f"longer than {MAX_ENTRY_CHARS} characters")
    value: object = parse_json(text, finite=False)  # other trainers write NaN
    return value


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        tree = parse_json(raw.decode("utf-8"))
    except ValueError as error:
        raise _broken(path, f"has a header that is not valid JSON ({shown(error)})") from None
    if not isinstance(tree, dict):
        raise _broken(path, f"has a header that is a JSON {type(tree).__name__}, not an object")
    return tree


def _metadata(path: Path, entries: object) -> dict[str, str]:
    if entries is None:
        return {}
    if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
        raise _broken(path, "has text entries that are not text")
    return entries


def _tensor_spec(path: Path, key: str, entry: object) -> TensorSpec:
    where = f"has a malformed entry for tensor `{shown(key)}`"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, where)
    dtype, shape, offsets = DTYPES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
    if dtype is None:
        raise AdapterFileError(
            f"{path}: tensor `{shown(key)}` has the number format {shown(entry['dtype'], 20)}, which no LoRA "
            "client reads; save it as F16, BF16 or F32"
        )
    if not _whole_numbers(shape) or len(shape) > MAX_NUM_DIMENSIONS:
        raise _broken(path, f"{where}: shape {shown(shape, 40)}")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken(path, f"{where}: offsets {shown(offsets, 60)}")
    if math.prod(side for side in shape if side) >= 2**62:  # empty tensors may claim any other side
        raise _broken(path, f"{where}: shape {shown(shape, 40)} is beyond any memory")
    needed = math.prod(shape) * dtype.itemsize
    if needed != offsets[1] - offsets[0]:
        raise _broken(
            path, f"{where}: shape {shape} needs {needed} bytes, offsets give {offsets[1] - offsets[0]}"
        )
    return TensorSpec(dtype, tuple(shape), offsets[0], offsets[1])


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_layout(path: Path, tensors: Mapping[str, TensorSpec], available: int) -> None:
    """Require what safetensors itself requires: tensors side by side, no overlap, no gap, no rest."""
    position = 0
    for key, spec in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if spec.end > available:
            raise _broken(
                path, f"is cut off: tensor `{shown(key)}` ends at byte {spec.end}, the data has {available}"
            )
        if spec.start < position:
            raise _broken(path, f"has overlapping tensors (`{shown(key)}` starts inside another)")
        if spec.start > position:
            raise _broken(path, f"has {spec.start - position} unexplained bytes before tensor `{shown(key)}`")
        position = spec.end
    if position != available:
        raise _broken(path, f"has {available - position} unexplained bytes at its end")


def _tensor(path: Path, key: str, spec: TensorSpec, data: bytes) -> Tensor:
    if len(data) != spec.end - spec.start:
        raise _broken(path, f"became shorter while tensor `{shown(key)}` was read")
    if not data:
        return torch.empty(spec.shape, dtype=spec.dtype)
    return torch.frombuffer(bytearray(data), dtype=spec.dtype).reshape(spec.shape)


def _broken(path: Path, what: str) -> AdapterFileError:
    return AdapterFileError(f"{path}: {what}; the file is damaged, {_DOWNLOAD} again or export it again")


def all_finite(tensor: Tensor) -> bool:
    """Return whether a floating-point tensor of any shape holds neither NaN nor infinity.

    Looks at minimum and maximum, both of which are NaN if any value is: one pass, no extra memory.
    ``isfinite(tensor).all()`` says the same but takes 20 times as long on a CPU: in a bake it was half of all
    processor time.
    """
    if tensor.numel() == 0:
        return True
    if tensor.device.type != "cpu":  # fast there, and does not depend on how a backend's aminmax treats NaN
        return bool(torch.isfinite(tensor).all())
    return all(bool(end.isfinite()) for end in torch.aminmax(tensor))
