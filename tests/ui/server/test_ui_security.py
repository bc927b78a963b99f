"""Who gets in: hosts, origins, passwords, sizes; and what the page may load."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sdlora_ui.app import refuse_open_door
from sdlora_ui.server import security as gate
from sdlora_ui.server.passwords import FREE_GUESSES
from sdlora_ui.server.security import SecurityMiddleware, without_other_sites
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from sdlora.errors import ConfigError

PAGE = """<html><head><meta property="og:url" content="https://gradio.app/" />
<link rel="preconnect" href="https://fonts.googleapis.com" /><link rel="stylesheet" href="/own.css">
<script src="https://cdn.example/iframe.js" async></script><script src="./own.js"></script>
</head><body>see http://example.org</body></html>"""


async def _size(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


def client(password: str | None = None, host: str = "127.0.0.1") -> TestClient:
    async def page(request: Request) -> Response:
        return HTMLResponse(PAGE)

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/gradio_api/upload", _size, methods=["POST", "GET"]),
            Route("/sdlora/jobs/x", _size, methods=["POST", "GET"]),
            Route("/{everything:path}", _size, methods=["POST", "GET"]),
        ]
    )
    return TestClient(SecurityMiddleware(app, host=host, password=password), base_url="http://127.0.0.1:7860")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:7860", "", "[::1"])
def test_a_name_of_a_stranger_is_refused(host: str) -> None:
    assert client().get("/", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "LOCALHOST", "[::1]:7860"])
def test_our_own_names_are_served(host: str) -> None:
    assert client().get("/", headers={"host": host}).status_code == 200


def test_listening_to_all_serves_addresses_but_no_strange_names() -> None:
    open_client = client("a secret", "0.0.0.0")
    assert open_client.get("/", headers={"host": "192.168.1.7:7860"}).status_code == 401
    assert open_client.get("/", headers={"host": "rebound.example"}).status_code == 421


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/sdlora/jobs/x"])
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_request_from_another_sites_page_is_refused(
    path: str, headers: dict[str, str], method: str
) -> None:
    assert client().request(method, path, headers=headers).status_code == 403


def test_our_own_page_may_ask_and_a_link_to_the_page_may_be_followed() -> None:
    headers = {"origin": "http://127.0.0.1:7860", "sec-fetch-site": "same-origin"}
    assert client().post("/gradio_api/upload", content=b"abc", headers=headers).text == "3"
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client().get("/", headers=link).status_code == 200
    assert client().get("/sdlora/jobs/x", headers=link).status_code == 403


def test_bodies_are_bounded_with_and_without_their_announcement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MAX_JSON_BODY", 10)
    assert client().post("/sdlora/jobs/x", content=b"x" * 11).status_code == 413

    def chunks() -> Any:
        yield b"x" * 6
        yield b"x" * 6

    assert client().post("/sdlora/jobs/x", content=chunks()).status_code == 413
    assert client().post("/sdlora/jobs/x", content=b"x" * 10).text == "10"


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/run/take", "/gradio_api/call/take", "/gradio_api/proxy=http://x.example/", "/docs",
     "/gradio_api/file=http://x.example/a.png", "/gradio_api/vibe-edit/", "/gradio_api/process_recording",
     "/gradio_api/mcp/sse"],
)  # fmt: skip
def test_what_the_page_does_not_use_is_not_served(path: str) -> None:
    assert client().post(path, content=b"{}").status_code == 404


def test_an_event_may_not_name_an_address_as_a_file() -> None:
    path = "/gradio_api/queue/join"
    for address in ("http://x.example/a.png", " HTTPS://x.example", "file:///etc/passwd", "ftp://x"):
        body = {"data": [1, [{"path": address, "meta": {"_type": "gradio.FileData"}}]]}
        assert client().post(path, json=body).status_code == 403
    fine = {"data": ["a prompt with http://in.it", {"path": "/tmp/uploaded.png"}]}
    answer = client().post(path, json=fine)
    assert answer.status_code == 200 and int(answer.text) > 50  # the whole body comes through
    assert client().post(path, content=b"{").status_code == 400


def test_the_page_names_no_other_site_and_may_load_from_none() -> None:
    answer = client().get("/")
    assert "googleapis" not in answer.text and "cdn.example" not in answer.text
    assert "gradio.app" not in answer.text
    assert 'href="/own.css"' in answer.text and 'src="./own.js"' in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_an_answer_in_which_nothing_may_run_keeps_that_policy() -> None:
    async def report(request: Request) -> Response:
        return HTMLResponse(PAGE, headers={"content-security-policy": "sandbox; default-src 'none'"})

    async def loose(request: Request) -> Response:
        return HTMLResponse(PAGE, headers={"content-security-policy": "default-src *"})

    app = Starlette(routes=[Route("/sdlora/jobs/x/report", report), Route("/sdlora/file", loose)])
    door = TestClient(
        SecurityMiddleware(app, host="127.0.0.1", password=None), base_url="http://127.0.0.1:7860"
    )
    policies = door.get("/sdlora/jobs/x/report").headers.get_list("content-security-policy")
    assert policies[0] == "sandbox; default-src 'none'" and "frame-ancestors 'none'" in policies[1]
    (policy,) = door.get("/sdlora/file").headers.get_list("content-security-policy")
    assert "default-src 'self'" in policy


def test_taking_out_other_sites_keeps_the_text() -> None:
    assert "see http://example.org" in without_other_sites(PAGE)


def test_a_password_is_asked_for_and_opens_the_door() -> None:
    asked = client("open sesame")
    assert asked.get("/sdlora/jobs/x").status_code == 401
    page = asked.get("/", headers={"accept": "text/html"})
    assert 'type="password"' in page.text and "og:url" not in page.text
    wrong = asked.post("/sdlora/login", data={"password": "sesame"}, follow_redirects=False)
    assert wrong.status_code == 403 and "set-cookie" not in wrong.headers
    right = asked.post("/sdlora/login", data={"password": "open sesame"}, follow_redirects=False)
    assert right.status_code == 303
    cookie = right.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert asked.get("/sdlora/jobs/x").status_code == 200


def test_a_made_up_session_does_not_open_the_door() -> None:
    asked = client("open sesame")
    assert asked.get("/sdlora/jobs/x", headers={"cookie": "sdlora_session=guess"}).status_code == 401


def test_many_guesses_at_once_are_no_more_than_one_after_another() -> None:
    """800 connections whose bodies arrive only when all are open got 800 guesses."""

    async def guesses() -> list[int]:
        gate_app = client("open sesame").app
        waiting, everyone_is_here, codes = 0, asyncio.Event(), []

        async def guess(number: int) -> None:
            nonlocal waiting

            async def receive() -> dict[str, Any]:
                nonlocal waiting
                waiting += 1
                if waiting == 800:
                    everyone_is_here.set()
                await everyone_is_here.wait()
                return {"type": "http.request", "body": f"password=guess{number}".encode()}

            async def send(message: dict[str, Any]) -> None:
                if message["type"] == "http.response.start":
                    codes.append(message["status"])

            scope = {
                "type": "http",
                "method": "POST",
                "path": "/sdlora/login",
                "query_string": b"",
                "headers": [(b"host", b"127.0.0.1:7860")],
                "client": ("192.168.1.66", 5000 + number),
            }
            await gate_app(scope, receive, send)

        await asyncio.gather(*(guess(number) for number in range(800)))
        return codes

    codes = asyncio.run(guesses())
    assert (codes.count(403), codes.count(429)) == (FREE_GUESSES, 800 - FREE_GUESSES)


def test_wrong_guesses_say_how_long_to_wait_and_a_session_never_waits() -> None:
    asked = client("open sesame")
    assert asked.post("/sdlora/login", data={"password": "open sesame"}).status_code in (200, 303)
    codes = [asked.post("/sdlora/login", data={"password": str(n)}).status_code for n in range(10)]
    assert codes == [403] * FREE_GUESSES + [429] * (10 - FREE_GUESSES)
    refused = asked.post("/sdlora/login", data={"password": "open sesame"})
    assert refused.status_code == 429 and 0 < int(refused.headers["retry-after"]) <= 4
    assert asked.get("/sdlora/jobs/x").status_code == 200


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "null", "\u00e9", "http://a b/", "://"])
def test_an_origin_that_is_no_address_is_refused(origin: str) -> None:
    answer = client().post("/sdlora/jobs/x", headers={"origin": origin.encode("utf-8")})  # type: ignore[dict-item]
    assert answer.status_code == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "::"])
def test_listening_to_others_needs_a_password(host: str) -> None:
    with pytest.raises(ConfigError, match="password"):
        refuse_open_door(host, None)
    with pytest.raises(ConfigError, match="password"):
        refuse_open_door(host, "")
    refuse_open_door(host, "eight or more")
    with pytest.raises(ConfigError, match="has 7 characters, at least 8"):
        refuse_open_door(host, "sevenxx")


def test_streams_are_passed_on_unbuffered() -> None:
    sent: list[str] = []

    async def app(
        scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        kind = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        sent.append("after the first part")
        await send({"type": "http.response.body", "body": b"two"})

    parts: list[Any] = []

    async def collect(message: Any) -> None:
        parts.append((message["type"], list(sent)))

    import asyncio

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/gradio_api/queue/data",
        "headers": [(b"host", b"localhost")],
    }

    async def nothing() -> Any:
        return {"type": "http.request", "body": b""}

    asyncio.run(SecurityMiddleware(app, host="127.0.0.1")(scope, nothing, collect))
    assert parts[1] == ("http.response.body", [])
