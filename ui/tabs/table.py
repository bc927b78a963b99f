"""The tabs of the page in their order: a new one is a file beside this one, and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gradio as gr

from ..site import Site
from . import dataset, generate, tools, train
from .shared import Shell


@dataclass(frozen=True)
class Tab:
    """One tab.

    Attributes:
        title: what stands on it, after its number.
        build: puts the page into the current tab, given what all share, how pages send to each other, and
            the tab itself (to listen to its being chosen).
    """

    title: str
    build: Callable[[Site, Shell, gr.Tab], None]


TABS: dict[str, Tab] = {
    "dataset": Tab("Data set", dataset.build),
    "train": Tab("Train", train.build),
    "generate": Tab("Generate", generate.build),
    "tools": Tab("Export & tools", tools.build),
}
"""Id, by which pages send to each other (``gr.Tabs(selected="train")``) -> tab."""
