"""The routes of the workbench: tags of a folder, images changed, masks, duplicates, repaired copies.

Captions and tags may be changed by everyone who may use the page. Image files may only where no one else can
reach the server: others may add data sets, not change the owner's images.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Route

from sdlora.config.schema import Config
from sdlora.data.captioning.tags import TagEdit, TagFolder
from sdlora.data.captioning.wording import tags_of
from sdlora.errors import ConfigError

from ..captions import CaptionBook
from ..dataset_view import DataSets
from ..image_edits import ImageEdits, mask_folder, mask_of
from ..repairs import Repairs
from .allowed_paths import AllowedPaths, PathRefused
from .answers import reading, resolution_of, writing

MOST_TAGS = 2000
_SHOWN = 8
SettingsOf = Callable[[Request, Path], Config | None]


class Workbench:
    """The handlers, with the objects they share with the other routes."""

    def __init__(self, paths: AllowedPaths, sets: DataSets, book: CaptionBook, settings: SettingsOf) -> None:
        """Serve folders of ``paths``; ``settings`` gives what a tab's training form says about a folder."""
        self._paths, self._sets, self._book, self._settings = paths, sets, book, settings
        self._edits, self._repairs = ImageEdits(paths), Repairs(paths)

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [
            Route("/sdlora/workbench/history", reading(self.history)),
            Route("/sdlora/workbench/undo", writing(self.undo), methods=["POST"]),
            Route("/sdlora/workbench/names", reading(self.names)),
            Route("/sdlora/workbench/tags", reading(self.tags)),
            Route("/sdlora/workbench/tags", writing(self.change_tags), methods=["POST"]),
            Route("/sdlora/workbench/duplicates", reading(self.duplicates)),
            Route("/sdlora/workbench/excluded", reading(self.excluded)),
            Route("/sdlora/workbench/mask", reading(self.mask)),
            Route("/sdlora/workbench/repair", reading(self.repair_state)),
            Route("/sdlora/workbench/repair", writing(self.repair), methods=["POST"]),
            Route("/sdlora/workbench/images/{what}", writing(self.change_images), methods=["POST"]),
        ]

    def history(self, request: Request) -> dict[str, Any]:
        """Return what can be undone, the newest first."""
        return {"changes": self._book.listed(self._folder(request))}

    def undo(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Take back the newest changes, as many as are asked for."""
        folder, times = self._paths.writable(str(body["folder"])), int(body.get("times", 1))
        times = min(max(1, times), max(1, self._book.changes(folder)))
        changed = sum(self._book.undo(folder) for _ in range(times))
        self._sets.versions.forget()
        return {"changed": changed, "undo": self._book.changes(folder)}

    def names(self, request: Request) -> dict[str, Any]:
        """Return the names of all images of a kind, to choose them."""
        folder = self._folder(request)
        return {"names": self._sets.names(folder, **self._view(request, folder))}

    def tags(self, request: Request) -> dict[str, Any]:
        """Return in how many captions each tag is."""
        tags = TagFolder(self._folder(request))
        counted = list(tags.counts.items())
        return {
            "captions": tags.num_captions,
            "tags": counted[:MOST_TAGS],
            "more": max(0, len(counted) - MOST_TAGS),
            "notes": tags.notes[:_SHOWN],
        }

    def change_tags(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Change the tags of chosen images or of all; with ``preview``, only say what would change."""
        folder, edit, what = self._paths.writable(str(body["folder"])), *_tag_edit(body)
        chosen = body.get("names")
        tags = TagFolder(folder, bare=bool(edit.add or edit.add_first))
        changes = tags.changes(edit)
        if chosen is not None:
            wanted = {str(name) for name in chosen}
            changes = [change for change in changes if change.image in wanted]
        shown = [
            {"image": change.image, "before": " | ".join(change.before), "after": " | ".join(change.after)}
            for change in changes[:_SHOWN]
        ]
        if body.get("preview") is True:
            return {"count": len(changes), "shown": shown, "notes": tags.notes[:_SHOWN]}
        failed = tags.apply(changes, what)
        self._sets.versions.forget()
        return {"changed": len(changes) - len(failed), "failed": failed, "undo": self._book.noted(folder)}

    def duplicates(self, request: Request) -> dict[str, Any]:
        """Return images that are the same or nearly so, in groups."""
        folder = self._folder(request)
        view = self._view(request, folder)
        return self._sets.duplicates(
            folder, trigger=view["trigger"], resolution=view["resolution"], settings=view["settings"]
        )

    def excluded(self, request: Request) -> dict[str, Any]:
        """Return the images that were left out."""
        return {"images": self._edits.excluded(self._folder(request))}

    def mask(self, request: Request) -> dict[str, Any]:
        """Return the mask of an image, where masks are kept, and whether the settings name that folder."""
        folder = self._folder(request)
        named, masks = self._masks(request, folder)
        file = mask_of(masks, str(request.query_params.get("name", "")))
        return {
            "path": str(file) if file else None,
            "changed": file.stat().st_mtime_ns if file else 0,
            "folder": str(masks),
            "used": named,
            "inside": masks.is_relative_to(folder),
        }

    def repair_state(self, request: Request) -> dict[str, Any]:
        """Return how far the repair of a folder is, or what it found."""
        return self._repairs.state(self._folder(request))

    def repair(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Look what is to be repaired, or write the repaired copy."""
        self._refuse_visitors()
        folder = self._paths.folder(str(body["folder"]))
        self._repairs.start(folder, write=body.get("write") is True)
        return self._repairs.state(folder)

    def change_images(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Delete, exclude, take back or turn images, or change the focus or the mask of one."""
        self._refuse_visitors()
        folder, what = self._paths.writable(str(body["folder"])), request.path_params["what"]
        names = [str(name) for name in body.get("names") or []]
        _, masks = self._masks(request, folder)
        answer: dict[str, Any] = {}
        if what == "delete":
            answer["changed"] = self._edits.delete(folder, names)
        elif what == "exclude":
            answer["changed"] = self._edits.exclude(folder, names)
        elif what == "include":
            answer["changed"] = self._edits.include(folder, names)
        elif what == "turn":
            answer = self._edits.turn(folder, names, int(body.get("quarters", 1)), masks)
        elif what == "focus":
            self._edits.set_focus(folder, _one(names), body.get("point"))
        elif what == "mask" and body.get("png") is None:
            answer["changed"] = int(self._edits.remove_mask(folder, _one(names), masks))
        elif what == "mask":
            answer["path"] = str(self._edits.set_mask(folder, _one(names), _png(body["png"]), masks))
        elif what == "masks":
            answer["changed"] = self._edits.masks_from_transparency(folder, names, masks)
        else:
            raise ConfigError(f"{what}: is not an action for images")
        self._sets.versions.forget()
        return answer | {"undo": self._book.noted(folder), "masks": str(masks)}

    def _folder(self, request: Request) -> Path:
        return self._paths.readable(request.query_params.get("folder", ""))

    def _view(self, request: Request, folder: Path) -> dict[str, Any]:
        asked = request.query_params
        return {
            "trigger": asked.get("trigger") or None,
            "resolution": resolution_of(request),
            "only": asked.get("only", ""),
            "settings": self._settings(request, folder),
            "known": asked.get("known", ""),
        }

    def _masks(self, request: Request, folder: Path) -> tuple[bool, Path]:
        """Return whether the settings of the tab name a folder of masks, and the folder."""
        config = self._settings(request, folder)
        named = config.data.mask_folder if config is not None else None
        return named is not None, mask_folder(folder, named.resolve() if named is not None else None)

    def _refuse_visitors(self) -> None:
        if not self._paths.local:
            raise PathRefused(
                "images are changed only where nobody else can reach the server: start it without --listen"
            )


def _one(names: Sequence[str]) -> str:
    if len(names) != 1:
        raise ConfigError("choose one image")
    return names[0]


def _png(text: str) -> bytes:
    try:
        return base64.b64decode(str(text).partition(",")[2], validate=True)
    except (ValueError, binascii.Error):
        raise ConfigError("mask: is not an image in the way the page sends it") from None


def _tag_edit(body: dict[str, Any]) -> tuple[TagEdit, str]:
    """Return what a request wants done with tags, and how it is called among the restore points."""
    what, text, put = str(body.get("do")), str(body.get("tags") or ""), str(body.get("put") or "")
    tags, keep = tags_of(text), int(body.get("keep_first") or 0)
    if what in ("add", "add first", "remove", "replace") and not tags:
        raise ConfigError("tags: type at least one")
    edits = {
        "add": TagEdit(add=tags),
        "add first": TagEdit(add_first=tags),
        "remove": TagEdit(remove=tags),
        "replace": TagEdit(replace=dict.fromkeys(tags, put)),
        "sort by name": TagEdit(sort="name", keep_first=keep),
        "sort by frequency": TagEdit(sort="frequency", keep_first=keep),
        "once": TagEdit(once=True),
        "prune": TagEdit(prune=True, keep_first=keep),
    }
    if what not in edits:
        raise ConfigError(f"{what}: is not an action for tags")
    named = ", ".join(tags[:5])
    words = {"replace": f"tags: replace {named} by {put or 'nothing'}"}
    return edits[what], words.get(what, f"tags: {what} {named}".strip())
