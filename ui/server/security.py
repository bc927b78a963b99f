"""Who may talk to the server, and what it sends: an ASGI layer around everything.

- The ``Host`` must be one of ours, so that a foreign domain name cannot point here (DNS rebinding).
- A request that another site's page makes is refused, whether it reads or writes; only following a link to
  the page itself is allowed.
- With a password, everything except the login needs the session's cookie.
- The size of bodies is limited while they arrive.
- Of Gradio's routes only those that the page itself uses are served, and no event may name a URL as a file,
  because Gradio would fetch it.
- The page's policy forbids loading anything from elsewhere; Gradio's references to other sites are removed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import re
import secrets
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from sdlora.files import parse_json

from ..languages import in_each_language, one_language, with_language
from .passwords import Guesses, same_password

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY = 2 * 2**30 + 2**20
MAX_JSON_BODY = 2**20
_COOKIE = "sdlora_session"
_JOIN = "/gradio_api/queue/join"
_USED = re.compile(
    r"/(?:|config|theme\.css|favicon\.ico|manifest\.json|svelte/.*|assets/.*|static/.*|sdlora/.*"
    r"|gradio_api/(?:startup-events|app_id|info|heartbeat/.*|queue/join|queue/data|cancel|reset/?|upload"
    r"|upload_progress|file=(?!https?:).*))"
)
"""The routes that the page uses; Gradio has more: runs by name, proxies, an editor."""
_SAFE = ("GET", "HEAD", "OPTIONS")
MOST_SESSIONS = 1000
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; worker-src 'self' blob:; frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)
SANDBOX = b"sandbox;"
"""How the policy of an answer begins in which nothing may run."""
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
]
# whole tags that name another site: Gradio's page refers to scripts, fonts and images on a CDN
_FOREIGN_TAG = re.compile(
    r"<(?:script|link|meta|img)\b[^>]*?(?:src|href|content)\s*=\s*[\"'](?:https?:)?//[^\"']*[\"'][^>]*?>"
    r"(?:\s*</script>)?",
    re.IGNORECASE | re.DOTALL,
)


class Refused(Exception):
    """An answer given without asking the application: status and text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class SecurityMiddleware:
    """The ASGI application around another one."""

    def __init__(self, app: App, *, host: str, password: str | None = None) -> None:
        """Wrap ``app``; ``host`` is the address listened on; with a ``password`` everyone must log in."""
        self.app = app
        self._password = password
        self._names = _own_names(host)
        self._any_address = host in ("0.0.0.0", "::")
        self._sessions: OrderedDict[str, None] = OrderedDict()
        self._guesses = Guesses()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it here."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check_host(headers)
            _check_origin(scope, headers)
            if scope["type"] == "websocket":
                self._check_session(headers)
                await self.app(scope, receive, send)
                return
            if self._password is not None and scope["path"] == "/sdlora/login":
                await self._login(scope, receive, send)
                return
            self._check_session(headers)
            if not _USED.fullmatch(scope["path"]):
                raise Refused(404, "there is nothing here")
            if scope["path"] == _JOIN:
                receive = _replayed(_without_addresses(await _body(receive, MAX_JSON_BODY)))
            limit = MAX_JSON_BODY if scope["path"].startswith("/sdlora/") else MAX_BODY
            body = _Body(receive, headers, limit)
            await self.app(scope, body.receive, body.refusing(_cleaned(send, scope["path"])))
        except Refused as refusal:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            elif refusal.status == 401 and "text/html" in headers.get("accept", ""):
                await _answer(send, 200, _login_page(""), "text/html; charset=utf-8")
            else:
                await _answer(send, refusal.status, refusal.text)

    def _check_host(self, headers: MutableMapping[str, str]) -> None:
        host = _hostname(headers.get("host", ""))
        if host in self._names or (self._any_address and _is_address(host)):
            return
        raise Refused(421, f"this server does not answer to the name `{host}`")

    def _check_session(self, headers: MutableMapping[str, str]) -> None:
        if self._password is None:
            return
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(_COOKIE)
        except CookieError:
            cookie = None
        if cookie is None or cookie.value not in self._sessions:
            raise Refused(401, "log in first: open the page in a browser")

    async def _login(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            await _answer(send, 200, _login_page(""), "text/html; charset=utf-8")
            return
        body = (await _body(receive, 4096)).decode("utf-8", "replace")
        # nothing is awaited from here to the count: see passwords.py
        client = scope.get("client") or ("", 0)
        address = str(client[0])
        if (wait := self._guesses.wait_for(address)) > 0:
            seconds = math.ceil(wait)
            text = _login_page(f"Too many wrong passwords: try again in {seconds} s.")
            retry = [(b"retry-after", str(seconds).encode())]
            await _answer(send, 429, text, "text/html; charset=utf-8", extra=retry)
            return
        assert self._password is not None
        try:
            given = parse_qs(body, max_num_fields=8).get("password", [""])[0]
        except ValueError:
            given = ""
        if not same_password(given, self._password):
            self._guesses.wrong(address)
            await _answer(send, 403, _login_page("That is not the password."), "text/html; charset=utf-8")
            return
        self._guesses.right(address)
        token = secrets.token_urlsafe(32)
        self._sessions[token] = None
        while len(self._sessions) > MOST_SESSIONS:
            self._sessions.popitem(last=False)
        cookie = f"{_COOKIE}={token}; Path=/; HttpOnly; SameSite=Strict"
        await _answer(send, 303, "", extra=[(b"location", b"/"), (b"set-cookie", cookie.encode())])


def _own_names(host: str) -> set[str]:
    names = {"localhost", "127.0.0.1", "::1", host.lower()}
    if host not in ("127.0.0.1", "::1", "localhost"):
        hostname = socket.gethostname().lower()
        names |= {hostname, hostname.partition(".")[0], f"{hostname.partition('.')[0]}.local"}
    return names


def _hostname(value: str) -> str:
    try:
        return (urlsplit(f"//{value}").hostname or "").lower()
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _place_of(origin: str) -> str | None:
    """Return host and port of an origin; None for an invalid one."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _check_origin(scope: Scope, headers: MutableMapping[str, str]) -> None:
    method = scope.get("method", "GET")
    follows_link = (
        method in _SAFE and headers.get("sec-fetch-mode") == "navigate" and scope.get("path") == "/"
    )
    if follows_link:
        return
    origin = headers.get("origin")
    if origin is not None and _place_of(origin) != headers.get("host", "").lower():
        raise Refused(403, "refused: the request comes from another site's page")
    if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        raise Refused(403, "refused: the request comes from another site's page")


class _Body:
    """A request's body that is refused above a limit, whatever length its header states."""

    def __init__(self, receive: Receive, headers: MutableMapping[str, str], limit: int) -> None:
        announced = headers.get("content-length", "0")
        self._receive, self._limit, self._taken, self._over = receive, limit, 0, False
        if announced.isdigit() and int(announced) > limit:
            raise self._refusal()

    async def receive(self) -> Message:
        message = await self._receive()
        self._taken += len(message.get("body", b""))
        if self._taken > self._limit:
            self._over = True
            raise self._refusal()
        return message

    def refusing(self, send: Send) -> Send:
        """Return a ``send`` that drops the application's answer to a body that was cut off."""

        async def refuse(message: Message) -> None:
            if not self._over:
                await send(message)

        return refuse

    def _refusal(self) -> Refused:
        return Refused(413, f"larger than {self._limit} bytes")


def _cleaned(send: Send, path: str) -> Send:
    """Return a ``send`` that adds our headers and removes references to other sites from the page."""
    start: Message | None = None
    page = bytearray()

    async def cleaned(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start":
            replaced = {name for name, _ in _HEADERS} | {b"access-control-allow-origin"}
            kept = [
                (name, value)
                for name, value in message["headers"]
                # a stricter policy of an answer holds besides ours: browsers obey both
                if name.lower() not in replaced or value.startswith(SANDBOX)
            ]
            message = {**message, "headers": [*kept, *_HEADERS]}
            if path == "/" and _is_html(kept):
                start = message
                return
        elif start is not None:
            page.extend(message.get("body", b""))
            if message.get("more_body"):
                return
            text = with_language(without_other_sites(page.decode("utf-8")))
            body, head = text.encode("utf-8"), start
            start = None
            length = [(n, v) for n, v in head["headers"] if n.lower() != b"content-length"]
            await send({**head, "headers": [*length, (b"content-length", str(len(body)).encode())]})
            message = {"type": "http.response.body", "body": body}
        await send(message)

    return cleaned


def without_other_sites(page: str) -> str:
    """Return an HTML page without tags that name another site."""
    return _FOREIGN_TAG.sub("", page)


def _is_html(headers: list[tuple[bytes, bytes]]) -> bool:
    return any(name.lower() == b"content-type" and value.startswith(b"text/html") for name, value in headers)


def _without_addresses(body: bytes) -> bytes:
    """Return an event's body.

    Raises:
        Refused: when a file in it is a URL.
    """
    try:
        waiting = [parse_json(body or b"{}")]
    except ValueError:
        raise Refused(400, "the request is not JSON") from None
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and re.match(r"\s*[a-z][a-z0-9+.-]*://", path, re.IGNORECASE):
                raise Refused(403, "refused: a file must be uploaded, not named by a URL")
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return body


def _replayed(body: bytes) -> Receive:
    """Return a ``receive`` that yields a body that was read already."""
    message: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def receive() -> Message:
        nonlocal message
        if message is None:
            await asyncio.Event().wait()  # the answer is under way; nothing more will come
        assert message is not None
        given, message = message, None
        return given

    return receive


async def _body(receive: Receive, limit: int) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > limit:
            raise Refused(413, f"larger than {limit} bytes")
        if not message.get("more_body"):
            return body


async def _answer(
    send: Send,
    status: int,
    text: str,
    kind: str = "text/plain; charset=utf-8",
    extra: list[tuple[bytes, bytes]] | None = None,
) -> None:
    body = text.encode("utf-8")
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    await send(
        {"type": "http.response.start", "status": status, "headers": [*headers, *_HEADERS, *(extra or [])]}
    )
    await send({"type": "http.response.body", "body": body})


def _login_page(problem: str) -> str:
    alert = f'<p role="alert">{in_each_language(problem)}</p>' if problem else ""
    return with_language(f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>sdlora</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root {{ color-scheme: light dark; font-family: system-ui, sans-serif }} {one_language()}
body {{ display: grid; place-items: center; min-height: 90vh; margin: 0 }}
form {{ display: grid; gap: .8rem; width: min(20rem, 86vw) }}
input, button {{ font: inherit; padding: .6rem .8rem; border-radius: .5rem; border: 1px solid #8888 }}
button {{ background: #4338ca; color: white; border: 0; cursor: pointer }}
p {{ color: light-dark(#b91c1c, #fca5a5); margin: 0 }}
</style></head><body><main><form method="post" action="/sdlora/login"><h1>sdlora</h1>
<label for="password">{in_each_language(_ASKED)}</label>
<input id="password" name="password" type="password" autofocus autocomplete="current-password">{alert}
<button>{in_each_language("Log in")}</button></form></main></body></html>""")


_ASKED = "The password of this server, printed when `sdlora ui` started"
