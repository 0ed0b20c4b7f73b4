"""A stand-in of the Hugging Face Hub's HTTP API, for its own client: repositories in memory, LFS, no xet."""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import yaml

TOKEN = "hf_" + "x" * 34


class Hub:
    """What it holds: {repository: {path: bytes}}, {repository: private}, and the messages of the commits."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool | None] = {}
        self.commits: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.address = ""
        self.refuses = False


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def _answer(self, found: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
            body = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_PUT(self) -> None:
            found = self._body()
            assert hashlib.sha256(found).hexdigest() == self.path.rpartition("/")[2]
            hub.objects[self.path.rpartition("/")[2]] = found
            self._answer(b"")

        def do_POST(self) -> None:
            body, path = self._body(), self.path.partition("?")[0]
            if path == "/api/validate-yaml":
                return self._validate(json.loads(body)["content"])
            if self.headers.get("Authorization") != f"Bearer {TOKEN}" or hub.refuses:
                return self._answer({"error": "Invalid username or password."}, 401)
            if path == "/api/repos/create":
                given = json.loads(body)
                name = f"{given.get('organization') or 'somebody'}/{given['name']}"
                hub.files.setdefault(name, {})
                hub.private.setdefault(name, given.get("private") or given.get("visibility") == "private")
                return self._answer({"url": f"{hub.address}/{name}", "id": name, "name": name})
            if "/preupload/" in path:
                kinds = [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if one["path"].endswith(("safetensors", "bin")) else "regular",
                        "shouldIgnore": False,
                    }
                    for one in json.loads(body)["files"]
                ]
                return self._answer({"files": kinds})
            if path.endswith("/objects/batch"):
                asked = json.loads(body)["objects"]
                put = {one["oid"]: {"upload": {"href": f"{hub.address}/lfs/{one['oid']}"}} for one in asked}
                return self._answer(
                    {"transfer": "basic", "objects": [{**one, "actions": put[one["oid"]]} for one in asked]}
                )
            return self._commit(re.fullmatch(r"/api/models/(.+)/commit/main", path)[1], body)

        def _commit(self, name: str, body: bytes) -> None:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.commits.append(value["summary"])
                elif line["key"] == "lfsFile":
                    hub.files[name][value["path"]] = hub.objects[value["oid"]]
                else:
                    assert line["key"] == "file"
                    hub.files[name][value["path"]] = base64.b64decode(value["content"])
            address = f"{hub.address}/{name}/commit/{'1' * 40}"
            self._answer({"success": True, "commitOid": "1" * 40, "commitUrl": address, "hookOutput": ""})

        def _validate(self, content: str) -> None:
            """What the Hub's own check asks of a model card's metadata."""
            front = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
            found = yaml.safe_load(front[1]) if front else None
            problems = [] if isinstance(found, dict) else ["no metadata"]
            for index in (found or {}).get("model-index", []):
                for result in index["results"]:
                    whole = {"task", "dataset", "metrics"} <= result.keys() and result["task"].get("type")
                    metrics = [one for one in result["metrics"] if not ({"type", "value"} <= one.keys())]
                    if not (index.get("name") and whole and result["dataset"].get("type") and not metrics):
                        problems.append(f"a result is not whole: {result}")
            self._answer({"error": "; ".join(problems)}, 400 if problems else 200)

        def do_GET(self) -> None:
            if hub.refuses:
                return self._answer({"error": "Invalid username or password."}, 401)
            found = re.fullmatch(r"/api/models/(.+)/revision/main", self.path.partition("?")[0])
            if found:
                siblings = [{"rfilename": path} for path in hub.files[found[1]]]
                return self._answer({"id": found[1], "modelId": found[1], "sha": "1" * 40, "siblings": siblings})
            found = re.fullmatch(r"/api/models/([^/]+/[^/]+)", self.path.partition("?")[0])
            if found:
                about = {"id": found[1], "private": bool(hub.private[found[1]]), "siblings": [], "tags": []}
                return self._answer({**about, "downloads": 0, "likes": 0})
            found = re.fullmatch(r"/api/models/(.+)/tree/[^/]+", self.path.partition("?")[0])
            if found:
                held = hub.files[found[1]].items()
                listed = [{"type": "file", "path": path, "size": len(data), "oid": "2" * 40} for path, data in held]
                return self._answer(listed)
            found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
            if found is None or found[2] not in hub.files.get(found[1], {}):
                return self._answer({"error": f"there is no {self.path}"}, 404, {"X-Error-Code": "EntryNotFound"})
            data = hub.files[found[1]][found[2]]
            tag = hashlib.sha256(data).hexdigest()
            self._answer(data, headers={"ETag": f'"{tag}"', "X-Repo-Commit": "1" * 40})

        do_HEAD = do_GET

    return Handler


@contextmanager
def _served(hub: Hub) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def speak_to(address: str) -> None:
    """The client of this process speaks to it from now on, with a token that it takes; see `ranks.launch`, `before`."""
    os.environ["HF_TOKEN"] = TOKEN
    constants = huggingface_hub.constants
    constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = address, False, True
    constants.HUGGINGFACE_CO_URL_TEMPLATE = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """What this process speaks to; others do after `speak_to`."""
    with _served(Hub()) as found:
        # So that they are as before afterwards.
        for name in ("ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HUGGINGFACE_CO_URL_TEMPLATE"):
            monkeypatch.setattr(huggingface_hub.constants, name, getattr(huggingface_hub.constants, name))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        speak_to(found.address)
        yield found
