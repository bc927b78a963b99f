"""The page put together, and the server around it."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlora.errors import ConfigError

from .server.allowed_paths import AllowedPaths
from .server.passwords import check_password
from .server.security import SecurityMiddleware
from .server.splash import Splash
from .site import Site

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

_FONTS = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Consolas", "Liberation Mono", "monospace"]
MAX_UPLOAD = "2gb"


def serve(
    paths: AllowedPaths, *, host: str = "127.0.0.1", port: int = 7860, password: str | None = None
) -> None:
    """Serve the page until interrupted.

    Args:
        paths: the folders that may be used.
        host: address to listen on.
        port: to listen on.
        password: everyone must give it; required when others can reach the address.

    Raises:
        ConfigError: for an open address without a password, or a port in use.
    """
    refuse_open_door(host, password)
    _refuse_taken(host, port)
    import uvicorn

    site = Site.open(paths)
    app = SecurityMiddleware(Splash(lambda: make_app(site)), host=host, password=password)
    uvicorn.run(app, host=host, port=port, log_level="warning", ws="none", timeout_graceful_shutdown=2)


def refuse_open_door(host: str, password: str | None) -> None:
    """Refuse to listen to others without a password, and a password that is soon guessed.

    Raises:
        ConfigError: when anyone on the network could use the server, or soon could.
    """
    if host not in ("127.0.0.1", "::1", "localhost") and not password:
        raise ConfigError(
            f"--listen {host}: others can reach this address, so a password is needed; add --password TEXT "
            "or set SDLORA_UI_PASSWORD"
        )
    if password:
        check_password(password)


def make_app(site: Site) -> FastAPI:
    """Return the ASGI application of a site: our own routes, and the Gradio page on ``/``."""
    quiet(site.paths.state / "uploads")
    from contextlib import asynccontextmanager

    import gradio as gr
    from fastapi import FastAPI

    from .server.routes import routes

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        site.begin()
        yield
        site.end()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.router.routes.extend(
        routes(
            site.paths, site.queue, site.captioning, site.drafts, site.owner, site.adapters, site.shell_runs
        )
    )
    page = build(site)
    # Gradio checks that a file named by a request was uploaded only for pages started by its own launch()
    page.has_launched = True
    web = Path(__file__).parent / "web"
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        page,
        "/",
        ssr_mode=False,
        mcp_server=False,
        footer_links=[],
        max_file_size=MAX_UPLOAD,
        show_error=True,
        theme=_theme(gr),
        css=(web / "app.css").read_text(encoding="utf-8"),
        head='<script type="module" src="/sdlora/web/app.js"></script>'
        '<link rel="stylesheet" href="/sdlora/web/bench.css">'
        '<link rel="stylesheet" href="/sdlora/web/phone.css">'
        '<link rel="icon" href="/sdlora/web/icon.svg" type="image/svg+xml">',
    )
    return mounted


def quiet(uploads: Path) -> None:
    """Tell Gradio, before it is imported, to report nothing and where uploads go."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_SHARE"] = "False"
    # else every event's texts and images are written into the browser's storage, all of them anew each time
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def build(site: Site) -> gr.Blocks:
    """Return the page with its tabs."""
    import gradio as gr

    from .tabs.shared import Shell
    from .tabs.table import TABS

    with gr.Blocks(
        title="sdlora", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)
    ) as page:
        bridges = {
            name: gr.Textbox(elem_id=name, visible="hidden", label=name.replace("-", " "))
            for name in (
                "chosen-folder", "chosen-trigger", "chosen-demo", "try-run", "export-run", "clone-run",
                "chosen-cell", "import-png", "reset-setting", "tab-word", "use-masks", "preview-rows",
            )
        }  # fmt: skip
        gr.HTML(
            '<header class="sd-head"><img src="/sdlora/web/icon.svg" alt=""><h1 translate="no">sdlora</h1>'
            "<sd-language></sd-language><sd-theme></sd-theme></header>",
            elem_id="head",
        )
        with gr.Tabs(selected=next(iter(TABS)), elem_id="pages", overflow_behavior="wrap") as tabs:
            shell = Shell(tabs, *bridges.values())
            for number, (name, tab) in enumerate(TABS.items(), start=1):
                # the hidden ones are in the page, too: what one page sends must find the other's fields
                with gr.Tab(f"{number} {tab.title}", id=name, render_children=number > 1) as shown:
                    tab.build(site, shell, shown)
    return page


def _theme(gr: Any) -> Any:
    """Return a quiet theme on the system's own fonts."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=_FONTS,
        font_mono=_MONO,
    ).set(
        body_background_fill="white",
        body_background_fill_dark="*neutral_950",
        background_fill_secondary="*neutral_50",
        background_fill_secondary_dark="*neutral_900",
        border_color_primary="*neutral_200",
        border_color_primary_dark="*neutral_800",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_text_color="*body_text_color",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_text_weight="600",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        block_padding="0px",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        input_background_fill="white",
        input_background_fill_dark="*neutral_900",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_700",
        input_border_color_focus="*primary_500",
        input_border_color_focus_dark="*primary_500",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        button_secondary_background_fill="white",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover="*neutral_50",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_700",
        button_border_width="1px",
        button_large_text_weight="600",
    )


def _refuse_taken(host: str, port: int) -> None:
    """Check that a server can listen there.

    Raises:
        ConfigError: naming the address or the port that is not free.
    """
    if not 1 <= port <= 65535:
        raise ConfigError(f"--port {port}: must be from 1 to 65535, e.g. 7860")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or str(error)
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                problem = f"--listen {host}: is no address of this machine ({reason}); give another"
            else:
                problem = f"--port {port}: {reason}; choose another, e.g. --port {port % 65535 + 1}"
            raise ConfigError(problem) from None
