"""A server that answers at once: a page says that it is starting while Gradio is still imported."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable
from contextlib import suppress

from starlette.applications import Starlette

from ..languages import in_each_language, one_language, with_language
from .security import App, Message, Receive, Scope, Send

_PAGE = with_language(f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>sdlora</title>
<meta http-equiv="refresh" content="1"><meta name="viewport" content="width=device-width, initial-scale=1">
<style>:root{{color-scheme:light dark;font-family:system-ui,sans-serif}} {one_language()}
body{{display:grid;place-items:center;min-height:90vh;margin:0}}</style></head>
<body><main role="status"><h1>sdlora</h1><p>{in_each_language("Opening …")}</p></main></body></html>""")


class Splash:
    """An ASGI application that is replaced by the real one as soon as that is ready."""

    def __init__(self, make: Callable[[], Starlette]) -> None:
        """Take the function that makes the real application; a thread calls it when the server starts."""
        self._make = make
        self._app: App | None = None
        self._ended = asyncio.Event()
        self.problem = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the real application once there is one."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif self._app is not None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._say(scope, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        task = asyncio.create_task(self._open())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._ended.set()
        with suppress(asyncio.CancelledError):
            await task
        await send({"type": "lifespan.shutdown.complete"})

    async def _open(self) -> None:
        try:
            app = await asyncio.to_thread(self._make)
            async with app.router.lifespan_context(app):
                self._app = app
                await self._ended.wait()
        except Exception:  # the page must show the problem instead of starting for ever
            self.problem = traceback.format_exc()
            logging.getLogger(__name__).error("the page could not be made:\n%s", self.problem)

    async def _say(self, scope: Scope, send: Send) -> None:
        page = scope["path"] == "/" and not self.problem
        text = _PAGE if page else self.problem or "starting"
        kind = b"text/html; charset=utf-8" if page else b"text/plain; charset=utf-8"
        start: Message = {
            "type": "http.response.start",
            "status": 200 if page else 503,
            "headers": [(b"content-type", kind), (b"retry-after", b"1"), (b"cache-control", b"no-store")],
        }
        await send(start)
        await send({"type": "http.response.body", "body": text.encode()})
