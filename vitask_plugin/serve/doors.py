"""Which requests reach the page: gradio serves more than one page needs, and what is not named here is not there.

No open route gives out a file that was not shipped with gradio: `/gradio_api/file=`, `/gradio_api/proxy=`, streams and
custom components are closed. A request that names a file may name one that was uploaded, and nothing else: no other
path, and no address, which gradio would fetch.
"""

import json
import os
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

READ = re.compile(
    r"/|/(config|theme\.css|manifest\.json|favicon\.ico|robots\.txt)/?|/(assets|static)(/\w[\w.@-]*)+"
    r"|/gradio_api/(info|app_id|startup-events|theme\.css|upload_progress|heartbeat/\w+|queue/data|call/\w+/\w+)/?"
)
WRITE = re.compile(r"/gradio_api/(upload|queue/join|cancel|reset|call/\w+)/?")
UPLOAD = re.compile(r"/gradio_api/upload/?")  # the one whose body is no JSON
LARGEST_BODY = 1 << 20  # bytes of any other
METHODS = {"GET": READ, "HEAD": READ, "POST": WRITE}

# The browser asks nobody else, whatever the page holds; gradio's templates need `eval`.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Doors:
    """An ASGI application in front of another.

    Args:
        uploads: folder that gradio keeps uploaded files in.
        hosts: names that a request may have in its `Host` header, without port: a page of elsewhere whose name was made
            to point at this machine has another one. The page that a POST comes from (`Origin`, which browsers send)
            is of one of them too: a form of another page may send to this machine. None = any.
    """

    def __init__(self, app: Any, uploads: str, hosts: frozenset[str] | None) -> None:
        self.app, self.uploads, self.hosts = app, uploads, hosts

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif not self._is_open(scope):
            await _refuse(send, 404)
        elif scope["method"] != "POST" or UPLOAD.fullmatch(scope["path"]):
            await self.app(scope, receive, _with_headers(send))
        else:
            body = await _body(receive)
            if body is None or not self._names_uploads_only(body):
                await _refuse(send, 403)
            else:
                await self.app(scope, _again(body, receive), _with_headers(send))

    def _is_open(self, scope: Mapping[str, Any]) -> bool:
        path = scope["path"]  # decoded once; what is still encoded then is no name of ours
        known = METHODS.get(scope["method"])
        if known is None or not known.fullmatch(path) or ".." in path:
            return False
        if self.hosts is None:
            return True
        hosts, origins = (_header(scope, name) for name in (b"host", b"origin"))
        if scope["method"] == "POST" and not all(origin_of(origin) in self.hosts for origin in origins):
            return False
        return len(hosts) == 1 and host_of(hosts[0]) in self.hosts

    def _names_uploads_only(self, body: bytes) -> bool:
        try:
            return all(is_upload(path, self.uploads) for path in _paths(json.loads(body or b"null")))
        except (ValueError, RecursionError):
            return False


def is_upload(path: Any, uploads: str) -> bool:
    """Whether this is a file of the folder, and no link to one elsewhere."""
    try:
        own = isinstance(path, str) and os.path.isabs(path) and os.path.isfile(path)
        return own and os.path.realpath(path).startswith(os.path.realpath(uploads) + os.sep)
    except ValueError:  # a NUL character
        return False


def _paths(value: Any) -> Iterator[Any]:
    """What any `path` in a JSON value says."""
    if isinstance(value, dict):
        if "path" in value:
            yield value["path"]
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _paths(one)


async def _body(receive: Receive) -> bytes | None:
    """Of a request; None if it is too long, or cut short."""
    found, more = b"", True
    while more:
        message = await receive()
        found += message.get("body", b"")
        more = message.get("more_body", False)
        if message["type"] != "http.request" or len(found) > LARGEST_BODY:
            return None
    return found


def _again(body: bytes, receive: Receive) -> Receive:
    whole = [{"type": "http.request", "body": body, "more_body": False}]

    async def receiving() -> Message:
        return whole.pop() if whole else await receive()

    return receiving


async def _refuse(send: Send, status: int) -> None:
    await _with_headers(send)({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b"Not here.\n"})


def host_of(address: str) -> str:
    """The name in `name:port`, in small letters and without the brackets of IPv6."""
    match = re.fullmatch(r"\[(.*)\](?::\d+)?|([^:]*)(?::\d+)?", address.strip().lower())
    return (match[1] or match[2] or "") if match else ""


def origin_of(origin: str) -> str:
    """The name in `scheme://name:port`; "" in `null`, which is what a page without an address sends."""
    scheme, _, address = origin.partition("://")
    return host_of(address) if scheme.strip().lower() in ("http", "https") else ""


def _header(scope: Mapping[str, Any], name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *own]}
        await send(message)

    return sending
