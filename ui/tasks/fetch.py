"""A base fetched from the hub into its usual cache, with progress; going on where an earlier try ended."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from sdlora.errors import ModelError
from sdlora.families.locating import wanted_files

from ..worker import Emit


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
            count.at(name)
            more = (
                {"tqdm_class": count.bar()}
                if "tqdm_class" in inspect.signature(hf_hub_download).parameters
                else {}
            )
            hf_hub_download(base, name, endpoint=endpoint, **more)
            count.done(sizes[name])
    except ModelError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise ModelError(
            f"{base}: the hub did not give it ({reason}); check the spelling and the network, then press "
            "Download again: it goes on where it ended"
        ) from None
    return {"base": base, "bytes": count.total}


class _Count:
    """Tells how many bytes are there, file by file."""

    def __init__(self, emit: Emit, total: int) -> None:
        self.total, self._emit = total, emit
        self._before, self._note = 0, ""

    def at(self, name: str) -> None:
        self._note = name
        self.tell(0)

    def done(self, size: int) -> None:
        self._before += size
        self.tell(0)

    def tell(self, here: int) -> None:
        self._emit.progress(min(self.total, self._before + here), self.total, self._note)

    def bar(self) -> type:
        """Return what the hub's library takes for a progress bar; a cancelled task ends in it."""
        from huggingface_hub.utils import tqdm

        tell = self.tell

        class Bar(tqdm):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                options.pop("name", None)
                super().__init__(*arguments, **{**options, "disable": True})
                self.count = int(options.get("initial") or 0)

            def update(self, n: float | None = 1) -> bool | None:
                self.count += int(n or 0)
                tell(self.count)
                return None

        return Bar
