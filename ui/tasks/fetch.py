"""A base fetched from the hub into its usual cache, with progress.

Files that are there are not fetched again. Weights, which take long, are continued inside a file, where the
library of the hub would begin again. They are put where it looks for them, once their SHA-256 is the one
that the hub names.
"""

from __future__ import annotations

import hashlib
import re
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from sdlora.errors import ModelError
from sdlora.families.locating import wanted_files

from ..worker import Emit

_LARGE = 4 * 2**20
"""Bytes from which a file is fetched so that it can be continued."""
_BLOCK = 2**20
_SECONDS = 30.0
_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch(arguments: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """Fetch ``base``, an ``owner/name``, from ``endpoint``; return its id and number of bytes.

    Raises:
        ModelError: in one line, for what the hub does not give.
    """
    from huggingface_hub import HfApi, hf_hub_download

    base, endpoint = str(arguments["base"]), str(arguments.get("endpoint") or "") or None
    try:
        siblings = HfApi(endpoint=endpoint).model_info(base, files_metadata=True).siblings or ()
        sizes = {file.rfilename: file.size or 0 for file in siblings}
        names = wanted_files(list(sizes))
        if "model_index.json" not in names:
            raise ModelError(f"{base}: holds no model_index.json, so it is no base in diffusers' layout")
        count = _Count(emit, sum(sizes[name] for name in names))
        for name in names:
            count.begin(name)
            if sizes[name] >= _LARGE:
                _fetch_large(base, name, endpoint, count)
            hf_hub_download(base, name, endpoint=endpoint)
            count.end(sizes[name])
    except ModelError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise ModelError(
            f"{base}: the hub did not give it ({reason}); check the spelling and the network, then press "
            "Download again: it continues where it ended"
        ) from None
    return {"base": base, "bytes": count.total}


class _Count:
    """Tells how many bytes are there, file by file; a cancelled task ends in it."""

    def __init__(self, emit: Emit, total: int) -> None:
        self.total, self._emit = total, emit
        self._before, self._note = 0, ""

    def begin(self, name: str) -> None:
        self._note = name
        self.tell(0)

    def end(self, size: int) -> None:
        self._before += size
        self.tell(0)

    def tell(self, here: int) -> None:
        self._emit.progress(min(self.total, self._before + here), self.total, self._note)


def _fetch_large(base: str, name: str, endpoint: str | None, count: _Count) -> None:
    """Put a file's content into the cache under its SHA-256, where the hub names it by that."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import build_hf_headers

    facts = get_hf_file_metadata(hf_hub_url(base, name, endpoint=endpoint))
    digest = facts.etag or ""
    if not _SHA256.fullmatch(digest) or not facts.size:
        return
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=base, repo_type="model") / "blobs"
    folder.mkdir(parents=True, exist_ok=True)
    target, part = folder / digest, folder / f"{digest}.sdlora.incomplete"
    try:
        with FileLock(folder / f"{digest}.sdlora.lock", timeout=0):
            if target.exists():
                return
            headers = dict(build_hf_headers())
            # what answers for the hub, such as a storage service, is not told who asks
            if urlsplit(facts.location).netloc != urlsplit(hf_hub_url(base, name, endpoint=endpoint)).netloc:
                headers = {key: value for key, value in headers.items() if key.lower() != "authorization"}
            _continue(facts.location, headers, part, int(facts.size), count)
            if _digest(part) != digest:
                part.unlink()
                raise ModelError(f"{base}: {name} arrived damaged; press Download again")
            part.replace(target)
    except Timeout:
        raise ModelError(f"{base}: {name} is being fetched by another program; wait for it") from None


def _continue(address: str, headers: dict[str, str], part: Path, size: int, count: _Count) -> None:
    """Fetch what a file lacks."""
    start = part.stat().st_size if part.exists() else 0
    if start > size:
        start = 0
    count.tell(start)
    if start == size:
        return
    asked = headers | ({"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(urllib.request.Request(address, headers=asked), timeout=_SECONDS) as answer:
        start = start if answer.status == 206 else 0
        with part.open("r+b" if start else "wb") as out:
            out.seek(start)
            while start < size and (block := answer.read(min(_BLOCK, size - start))):
                out.write(block)
                start += len(block)
                count.tell(start)
    if start < size:
        raise OSError(f"the connection broke off after {start} of {size} bytes")


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
