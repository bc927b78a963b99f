"""Further bases for the training page: a folder named once, one fetched from the hub, a mirror of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from sdlora.errors import ConfigError, SdloraError

from ..settings import HUB_ID
from ..site import Site
from ..worker_client import CallCancelled
from .shared import choices, hint, problem, working

_FETCH = "fetch"
NO_BASE = (
    "Choose your base model: the checkpoint that you draw with, as the LoRA works with it and its relatives. "
    "To try it out, choose mini; under “Models elsewhere” a folder can be named, or one fetched."
)


def build(site: Site, base: gr.Dropdown) -> None:
    """Put the folded part below the choice of a base."""
    with gr.Accordion("Models elsewhere", open=False, elem_id="more-bases"):
        if site.paths.local:
            with gr.Row(elem_classes="sd-beside"):
                folder = gr.Textbox(
                    label="Folder with checkpoints",
                    info="Looked into from now on, with all folders inside",
                    elem_id="model-folder",
                    max_lines=1,
                )
                add = gr.Button("Look there", elem_id="add-models", min_width=90)
        with gr.Row(elem_classes="sd-beside"):
            wanted = gr.Textbox(
                label="From Hugging Face",
                placeholder="owner/name",
                info="Fetched once; goes on where it was stopped",
                elem_id="hub-id",
                max_lines=1,
            )
            get = gr.Button("Download", elem_id="download", min_width=90)
            end = gr.Button("Stop", elem_id="stop-download", min_width=60)
        if site.paths.local:
            mirror = gr.Textbox(
                site.owner.endpoint,
                label="Mirror of Hugging Face",
                placeholder="https://huggingface.co",
                info="For where it cannot be reached; remembered",
                elem_id="mirror",
                max_lines=1,
            )
        answer_box = gr.HTML("", elem_id="bases-said")

    def fetched(name: str | None) -> Iterator[tuple[Any, Any]]:
        yield from _fetched(site, name)

    get.click(fetched, wanted, [answer_box, base], show_progress="hidden")
    end.click(lambda: site.fetch.cancel(_FETCH), None, None, show_progress="hidden")
    if site.paths.local:
        add.click(lambda text: _added(site, text), folder, [answer_box, base], show_progress="minimal")
        mirror.blur(lambda text: _mirrored(site, text), mirror, answer_box, show_progress="hidden")


def listed(site: Site, value: Any = None) -> Any:
    """Return the list of bases as it is now; its value stays unless one is given."""
    return gr.Dropdown(choices=choices(site.bases()), **({} if value is None else {"value": value}))


def _added(site: Site, text: str | None) -> tuple[Any, Any]:
    before = {base.source for base in site.known_bases.listed()}
    try:
        folder = site.owner.add_models(text or "")
    except SdloraError as error:
        return problem(str(error)), gr.skip()
    site.known_bases.search()
    new = [base.source for base in site.known_bases.listed() if base.source not in before and base.family]
    text = f"{len(new)} found in {site.paths.shown(folder)}, which is remembered."
    return hint(text), listed(site, new[0] if new else None)


def _fetched(site: Site, name: str | None) -> Iterator[tuple[Any, Any]]:
    wanted = (name or "").strip()
    try:
        if not HUB_ID.fullmatch(wanted):
            raise ConfigError(f"{wanted or 'nothing'}: give a model of the hub as owner/name")
        yield working(0, 1, "asking the hub"), gr.skip()
        values = {"base": wanted, "endpoint": site.owner.endpoint}
        for answer in site.fetch.call("fetch", values, replace=_FETCH):
            if answer.progress is not None:
                done, total, note = answer.progress
                yield (
                    working(done, total, f"{note}: {done / 2**20:.0f} of {total / 2**20:.0f} MiB"),
                    gr.skip(),
                )
            elif answer.result is not None:
                site.known_bases.search()
                yield hint(f"{wanted} is here, and chosen."), listed(site, wanted)
    except CallCancelled:
        yield hint("Stopped; Download goes on where it ended."), gr.skip()
    except SdloraError as error:
        yield problem(str(error)), gr.skip()


def _mirrored(site: Site, text: str | None) -> str:
    try:
        before = site.owner.endpoint
        address = site.owner.set_endpoint(text or "")
    except SdloraError as error:
        return problem(str(error))
    if address == before:
        return ""
    site.use_endpoint()
    return hint(f"Models come from {address or 'https://huggingface.co'} from now on.")
