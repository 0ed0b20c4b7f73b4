"""Which requests get through, told from an application that writes down what reaches it."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from vitask_plugin.serve.doors import LARGEST_BODY, Doors, host_of


def through(
    doors_of: Path,
    method: str,
    path: str,
    parts: tuple[bytes, ...] = (b"",),
    host: str = "localhost",
    origin: str | None = None,
) -> Any:
    """(status of the answer, body that reached the application; None: nothing did)."""
    reached: list[bytes] = []
    sent: list[dict[str, Any]] = []
    waiting = [{"type": "http.request", "body": part, "more_body": part is not parts[-1]} for part in parts]

    async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:
        reached.append(b"")
        more = True
        while more:
            message = await receive()
            reached[0] += message["body"]
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> dict[str, Any]:
        return waiting.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    doors = Doors(application, str(doors_of), frozenset({"localhost", "::1"}))
    headers = [(b"host", host.encode()), *([] if origin is None else [(b"origin", origin.encode())])]
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(doors(scope, receive, send))
    assert dict(sent[0]["headers"])[b"content-security-policy"].startswith(b"default-src 'self';")
    return sent[0]["status"], reached[0] if reached else None


def test_a_body_arrives_as_it_was_sent(tmp_path: Path) -> None:
    (tmp_path / "own.png").write_bytes(b"")
    body = json.dumps({"data": [{"path": str(tmp_path / "own.png")}, {"other": ["/etc/passwd"]}]}).encode()
    parts = (body[:10], body[10:])
    assert through(tmp_path, "POST", "/gradio_api/queue/join", parts) == (200, body)
    assert through(tmp_path, "POST", "/gradio_api/upload", (b"no JSON",)) == (200, b"no JSON")
    assert through(tmp_path, "GET", "/gradio_api/queue/data") == (200, b"")


@pytest.mark.parametrize(
    "body",
    [
        b"no JSON",
        b"\xff",
        b"[" * 100_000,
        b'{"path": "/etc/passwd"}',
        b'[{"a": [{"path": null}]}]',
        b"1" * (LARGEST_BODY + 1),
    ],
    ids=["text", "bytes", "deep", "file", "null", "large"],
)
def test_a_body_that_is_none_of_the_page_is_refused(tmp_path: Path, body: bytes) -> None:
    assert through(tmp_path, "POST", "/gradio_api/queue/join", (body[:5], body[5:])) == (403, None)


def test_only_this_machines_names_are_answered(tmp_path: Path) -> None:
    for host in ("localhost", "LOCALHOST:7860", "[::1]:80", " localhost "):
        assert through(tmp_path, "GET", "/", host=host)[0] == 200, host
    for host in ("elsewhere.example", "localhost.example", "localhost:80:80", "localhost@elsewhere", "", "[::1"):
        assert through(tmp_path, "GET", "/", host=host) == (404, None), host
    assert host_of("[fe80::1]:80") == "fe80::1"


def test_a_form_of_another_page_sends_nothing(tmp_path: Path) -> None:
    for origin in (None, "http://localhost:7860", "https://LOCALHOST", "http://[::1]:80"):
        assert through(tmp_path, "POST", "/gradio_api/upload", (b"image",), origin=origin) == (200, b"image"), origin
    for origin in ("https://elsewhere.example", "http://localhost.example:7860", "null", "", "localhost"):
        for path in ("/gradio_api/upload", "/gradio_api/queue/join"):
            assert through(tmp_path, "POST", path, (b"{}",), origin=origin) == (404, None), (path, origin)
    assert through(tmp_path, "GET", "/", origin="https://elsewhere.example")[0] == 200  # a link to the page


def test_no_socket_is_opened(tmp_path: Path) -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(Doors(None, str(tmp_path), None)({"type": "websocket", "path": "/"}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
