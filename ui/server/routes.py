"""The routes for the page's own elements, below ``/sdlora/``: files, thumbnails, data sets, captions, jobs.

Every path in a request goes through :class:`sdlora_ui.server.allowed_paths.AllowedPaths`.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from sdlora.config.schema import Config
from sdlora.config.toml import load_config
from sdlora.data.reading.image_files import IMAGE_ENDINGS
from sdlora.errors import ConfigError, SdloraError
from sdlora.generation.png_info import read_parameters
from sdlora.run_folder import SAMPLE, SAVE, STOP, RunFolder

from ..adapter_cards import AdapterCards
from ..captioning import Captioning
from ..captions import CaptionBook
from ..dataset_view import DataSets, for_folder
from ..device_watch import DeviceWatch
from ..drafts import TRAIN_FORM, Drafts
from ..gallery import list_images
from ..job_memory import MemoryWatch
from ..job_process import process_of
from ..job_record import Job
from ..jobs import JobQueue
from ..languages import translated_report
from ..owner import Owner
from ..progress import RunView
from ..settings import data_settings
from ..shell_runs import PREFIX, ShellRuns
from ..site import Choice
from ..thumbs import MAX_THUMB, Thumbs
from ..words import labels, page_words
from .allowed_paths import AllowedPaths, PathRefused
from .answers import reading, resolution_of, writing
from .folders import list_folders
from .workbench import Workbench

MOST_ADAPTERS = 1000
MOST_CURVES = 8
"""Runs in one plot."""
_REQUESTS = {"stop": STOP, "save": SAVE, "sample": SAMPLE}
_SERVED = IMAGE_ENDINGS | {".safetensors", ".zip"}


def routes(
    paths: AllowedPaths,
    queue: JobQueue,
    captioning: Captioning,
    drafts: Drafts,
    owner: Owner,
    adapters: Callable[[], Sequence[Choice]] = tuple,
    shell_runs: ShellRuns | None = None,
) -> list[BaseRoute]:
    """Return the routes of one server; ``adapters`` lists those that can be drawn with."""
    endpoints = _Own(paths, queue, captioning, drafts, owner)
    endpoints.shell_runs = shell_runs or endpoints.shell_runs
    cards = AdapterCards(paths)

    def shown(request: Request) -> dict[str, Any]:
        listed = list(adapters())[:MOST_ADAPTERS]
        return {"adapters": [vars(choice) | cards.of(Path(choice.path)) for choice in listed]}

    web = Path(__file__).parent.parent / "web"
    return [
        Mount("/sdlora/web", StaticFiles(directory=web)),
        Route("/sdlora/file", endpoints.file),
        Route("/sdlora/thumb", endpoints.thumb),
        Route("/sdlora/dataset", reading(endpoints.dataset)),
        Route("/sdlora/dataset/progress", reading(endpoints.reading)),
        Route("/sdlora/folders", reading(endpoints.folders)),
        Route("/sdlora/allow", writing(endpoints.allow), methods=["POST"]),
        Route("/sdlora/settings", reading(endpoints.settings)),
        Route("/sdlora/images", reading(endpoints.images)),
        Route("/sdlora/adapters", reading(shown)),
        Route("/sdlora/captions/{what}", writing(endpoints.captions), methods=["POST"]),
        Route("/sdlora/captioning", reading(endpoints.captioning_state)),
        Route("/sdlora/captioning/{what}", writing(endpoints.caption), methods=["POST"]),
        Route("/sdlora/device", reading(lambda request: endpoints.device.state())),
        Route("/sdlora/curves", reading(endpoints.curves)),
        Route("/sdlora/jobs", reading(endpoints.jobs)),
        Route("/sdlora/jobs/{id}", reading(endpoints.job)),
        Route("/sdlora/jobs/{id}/log", reading(endpoints.log)),
        Route("/sdlora/jobs/{id}/report", endpoints.report),
        Route("/sdlora/jobs/{id}/{action}", writing(endpoints.act), methods=["POST"]),
        *Workbench(paths, endpoints.sets, endpoints.book, endpoints._data_settings).routes(),
    ]


class _Own:
    """The handlers, with the objects they share."""

    def __init__(
        self, paths: AllowedPaths, queue: JobQueue, captioning: Captioning, drafts: Drafts, owner: Owner
    ) -> None:
        self.owner = owner
        self.paths, self.queue, self.captioning, self.drafts = paths, queue, captioning, drafts
        self.book, self.sets, self.memory = CaptionBook(paths), DataSets(), MemoryWatch()
        self.device, self.shell_runs = DeviceWatch(paths.runs), ShellRuns(paths)
        self.thumbs = Thumbs(paths.state / "thumbs")

    async def file(self, request: Request) -> Response:
        try:
            path = self.paths.readable(request.query_params.get("path", ""))
        except PathRefused as error:
            return JSONResponse({"error": str(error)}, 403)
        if path.suffix.lower() not in _SERVED:
            return JSONResponse({"error": f"{path.name}: only images and adapters are served"}, 403)
        if not path.is_file():
            return JSONResponse({"error": f"{path.name}: there is no such file (any more)"}, 404)
        return FileResponse(path, headers={"cache-control": "private, max-age=5"})

    async def thumb(self, request: Request) -> Response:
        try:
            path = self.paths.readable(request.query_params.get("path", ""))
            side = min(MAX_THUMB, max(16, int(request.query_params.get("side", "256"))))
            data = await run_in_threadpool(self.thumbs.of, path, side)
        except PathRefused as error:
            return JSONResponse({"error": str(error)}, 403)
        except (SdloraError, OSError, ValueError) as error:
            return JSONResponse({"error": str(error)}, 404)
        return Response(data, media_type="image/webp", headers={"cache-control": "private, max-age=86400"})

    def dataset(self, request: Request) -> dict[str, Any]:
        asked = request.query_params
        folder = self.paths.readable(asked.get("folder", ""))
        seen = self.sets.look(
            folder,
            trigger=asked.get("trigger") or None,
            resolution=resolution_of(request),
            page=max(0, int(asked.get("page") or 0)),
            only=asked.get("only", ""),
            settings=self._data_settings(request, folder),
            known=asked.get("known", ""),
            at=asked.get("at", ""),
        )
        return seen | {"undo": self.book.changes(folder), "may_change": self.paths.local}

    def reading(self, request: Request) -> dict[str, Any]:
        """Return how far the reading of a folder is; when it is not being read, its version."""
        folder = self.paths.readable(request.query_params.get("folder", ""))
        progress = self.sets.progress(folder)
        config = for_folder(
            folder, request.query_params.get("trigger") or None, self._data_settings(request, folder)
        )
        return {"progress": progress, "version": None if progress else self.sets.versions.of(config)}

    def _data_settings(self, request: Request, folder: Path) -> Config | None:
        """Return the data settings in the training form of the request's tab, if they are of this folder."""
        held = self.drafts.kept(TRAIN_FORM, request.query_params.get("tab", ""))
        return data_settings(self.paths, held, folder)

    def folders(self, request: Request) -> dict[str, Any]:
        return list_folders(self.paths, request.query_params.get("path", ""))

    def allow(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        return {"folder": str(self.owner.allow(str(body["path"])))}

    def settings(self, request: Request) -> dict[str, Any]:
        return dict(read_parameters(self.paths.readable(request.query_params.get("path", ""))))

    def images(self, request: Request) -> dict[str, Any]:
        limit = min(1000, max(1, int(request.query_params.get("limit") or 48)))
        return list_images(self.paths, limit)

    def captions(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        folder, what = self.paths.writable(str(body["folder"])), request.path_params["what"]
        if what == "set":
            texts = {str(name): str(text) for name, text in dict(body["texts"]).items()}
            changed = self.book.set(folder, texts, typing=str(body.get("typing") or ""))
        elif what == "replace":
            changed = self.book.replace(folder, str(body["find"]), str(body["put"]))
        elif what == "trigger":
            changed = self.book.add_trigger(folder, str(body["word"]))
        elif what == "undo":
            changed = self.book.undo(folder)
        else:
            raise ConfigError(f"{what}: is not an action for captions")
        self.sets.versions.forget()
        return {"changed": changed, "undo": self.book.changes(folder)}

    def captioning_state(self, request: Request) -> dict[str, Any]:
        return self.captioning.state(self.paths.readable(request.query_params.get("folder", "")))

    def caption(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        folder, what = self.paths.writable(str(body["folder"])), request.path_params["what"]
        if what == "stop":
            self.captioning.stop(folder)
        elif what in ("preview", "start"):
            if any(job.status in ("running", "stopping") for job in self.queue.all()):
                raise ConfigError("a run is training, and would share its memory; caption when it has ended")
            self.captioning.start(folder, body, preview=what == "preview")
        else:
            raise ConfigError(f"{what}: is not an action for captioning")
        return self.captioning.state(folder)

    def jobs(self, request: Request) -> dict[str, Any]:
        jobs = self.queue.all()
        others = self.shell_runs.listed({job.run for job in jobs})
        listed = [*map(self._brief, jobs), *(run.to_dict() for run in others)]
        return {"jobs": sorted(listed, key=lambda run: run["created"])}

    def curves(self, request: Request) -> dict[str, Any]:
        """Return the losses of several runs, of all steps or of those that a plot shows."""
        asked = request.query_params
        first, last = (float(asked.get(key) or usual) for key, usual in (("from", 0), ("to", math.inf)))
        runs = [self._run(job_id) for job_id in asked.getlist("run")[:MOST_CURVES]]
        shown = [{"id": run_id, "name": name} | view.curve(first, last) for run_id, name, _, view in runs]
        return {"curves": shown}

    def _run(self, run_id: str) -> tuple[str, str, Path, RunView]:
        """Return id, name, folder and events of a job's run, or of one that was started in a shell."""
        if run_id.startswith(PREFIX):
            run = self.shell_runs.get(run_id)
            return run.id, run.folder.path.name, run.folder.path, run.view
        job = self.queue.get(run_id)
        return job.id, job.name, job.run, self.queue.view(job.id)

    def job(self, request: Request) -> dict[str, Any]:
        run_id, _, folder, view = self._run(request.path_params["id"])
        job = None if run_id.startswith(PREFIX) else self.queue.get(run_id)
        brief = self.shell_runs.get(run_id).to_dict() if job is None else self._brief(job)
        full = brief | view.full()
        adapter = full["adapter_file"]
        return full | {
            "defaults": [
                [key, value, page_words(reason), labels().get(key, key)]
                for key, value, reason in full["defaults"]
            ],
            "notes": [page_words(note) for note in full["notes"]],
            "memory": None if job is None else self.memory.of(process_of(job)),
            "prompts": self._prompts(folder, job),
            "command": "" if job is None else shlex.join(self.queue.command(job.id)),
            "shown_run": self.paths.shown(folder),
            "shown_adapter": self.paths.shown(Path(adapter)) if adapter else "",
        }

    async def report(self, request: Request) -> Response:
        """Serve a run's report, in which nothing can run and which can load nothing."""
        try:
            page = self.paths.readable(str(RunFolder(self._run(request.path_params["id"])[2]).report))
        except PathRefused as error:
            return JSONResponse({"error": str(error)}, 403)
        except SdloraError as error:
            return JSONResponse({"error": str(error)}, 422)
        if not page.is_file():
            return JSONResponse({"error": "this run has no report (any more)"}, 404)
        policy = "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        text = await run_in_threadpool(page.read_text, encoding="utf-8", errors="replace")
        shown = await run_in_threadpool(translated_report, text, request.query_params.get("lang", "en"))
        return HTMLResponse(shown, headers={"content-security-policy": policy})

    def log(self, request: Request) -> dict[str, Any]:
        return {"text": self.queue.log(request.path_params["id"])}

    def act(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        job_id, action = request.path_params["id"], request.path_params["action"]
        if job_id.startswith(PREFIX):
            if action not in _REQUESTS:
                raise ConfigError(f"{action}: is not an action for a run that was started in a shell")
            return self.shell_runs.request(job_id, _REQUESTS[action]).to_dict()
        if action == "delete":
            if body.get("confirmed") is not True:
                raise ConfigError("deleting needs a confirmation")
            self.queue.delete(job_id, with_run=body.get("with_run") is True)
            return {"deleted": job_id}
        if action in ("save", "sample"):
            self.queue.request(job_id, SAVE if action == "save" else SAMPLE)
            return self._brief(self.queue.get(job_id))
        known = {
            "start": self.queue.start,
            "stop": self.queue.stop,
            "kill": self.queue.kill,
            "resume": self.queue.resume,
            "move": lambda job_id: self.queue.move(job_id, _whole(body, "by")),
            "wait": lambda job_id: self.queue.wait_until(job_id, _moment(body, "until")),
            "extend": lambda job_id: self.queue.extend(job_id, _whole(body, "steps")),
        }
        if action not in known:
            raise ConfigError(f"{action}: is not an action for a job")
        return self._brief(known[action](job_id))

    def _brief(self, job: Job) -> dict[str, Any]:
        more = {"error": page_words(job.error), "order": job.order[0], "waits": job.waits}
        more["behind"] = self.queue.waits_for(job) if job.status == "waiting" and not job.waits else ""
        return job.to_dict() | self.queue.view(job.id).brief() | more

    def _prompts(self, folder: Path, job: Job | None) -> list[str]:
        of_job = () if job is None else (self.queue.settings(job.id),)
        for file in (RunFolder(folder).config_file, *of_job):
            if file.is_file() and self.paths.reaches(file):
                sample = load_config(file).sample
                if sample.prompts is not None:
                    return [line.prompt for line in sample.lines]
        return []


def _whole(body: Mapping[str, Any], key: str) -> int:
    """Return a whole number of a request.

    Raises:
        TypeError: when it is none.
    """
    value = body[key]
    if type(value) is not int:
        raise TypeError(f"`{key}`: is no whole number")
    return value


def _moment(body: Mapping[str, Any], key: str) -> float | None:
    """Return a time of a request, in seconds since 1970, or None.

    Raises:
        TypeError: when it is none.
    """
    value = body[key]
    if value is not None and type(value) not in (int, float):
        raise TypeError(f"`{key}`: is no time")
    return None if value is None else float(value)
