"""How the page's own routes answer: in JSON, with an error as one line in the words of the page."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sdlora.config.data import RESOLUTIONS
from sdlora.errors import ConfigError, SdloraError
from sdlora.files import parse_json

from ..words import page_words
from .allowed_paths import PathRefused

Handler = Callable[[Request], dict[str, Any]]


def reading(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """Answer with what a handler returns."""

    @functools.wraps(handler)
    async def answer(request: Request) -> Response:
        return await run_in_threadpool(_answered, handler, request)

    return answer


def writing(
    handler: Callable[[Request, dict[str, Any]], dict[str, Any]],
) -> Callable[[Request], Awaitable[Response]]:
    """Accept only JSON, with a header that a form of another site cannot send."""

    @functools.wraps(handler)
    async def answer(request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0]
        if kind != "application/json" or "x-sdlora" not in request.headers:
            return JSONResponse({"error": "refused: not a request of this page"}, 403)
        try:
            body = parse_json(await request.body() or b"{}")
        except ValueError:
            body = None
        if not isinstance(body, dict):
            return JSONResponse({"error": "the request is not a JSON object"}, 400)
        return await run_in_threadpool(_answered, lambda given: handler(given, body), request)

    return answer


def resolution_of(request: Request) -> int:
    """Return the resolution in pixels that a request asks about, 512 where it names none.

    Raises:
        ConfigError: if the setting of that name does not allow it.
        ValueError: if it is no whole number.
    """
    asked, (smallest, largest) = int(request.query_params.get("resolution") or 512), RESOLUTIONS
    if not smallest <= asked <= largest:
        raise ConfigError(f"data.resolution={asked}: give {smallest} to {largest}")
    return asked


def _answered(handler: Handler, request: Request) -> Response:
    try:
        return JSONResponse(handler(request))
    except PathRefused as error:
        return JSONResponse({"error": str(error)}, 403)
    except SdloraError as error:
        return JSONResponse({"error": page_words(str(error))}, 422)
    except (OSError, ValueError, LookupError, TypeError, OverflowError) as error:
        return JSONResponse({"error": f"invalid request: {error}"}, 400)
