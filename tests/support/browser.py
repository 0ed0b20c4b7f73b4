"""Headless Chromium, driven by its DevTools protocol: sizes, colour scheme, files into a page, requests, pictures."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 60  # for anything to happen


class Tab:
    """A tab of the browser.

    Attributes:
        requests: addresses that were asked for since the last `open`. errors: what the page could not do.
    """

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing, self._numbers = reading, writing, itertools.count(1)
        self._rest, self._session = b"", {}
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Network", "Runtime", "DOM", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command, and what it gave."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters, **self._session}
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self._note(message)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._reading], [], [], SECONDS)
            assert ready, f"Chromium said nothing for {SECONDS} s"
            found = os.read(self._reading, 1 << 20)
            assert found, "Chromium has ended"
            self._rest += found
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, message: dict[str, Any]) -> None:
        what, about = message.get("method"), message.get("params", {})
        if what == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif what == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(about["exceptionDetails"])[:500])
        elif what == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.errors.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        """Before `open`; below 600 pixels a phone."""
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, address: str, ready: str) -> None:
        """Goes there and waits until the selector `ready` is on the page."""
        self.requests.clear()
        self.errors.clear()
        self.call("Page.navigate", url=address)
        self.wait(f"document.readyState === 'complete' && document.querySelector({json.dumps(ready)}) !== null")

    def value(self, expression: str) -> Any:
        """Of JavaScript."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until JavaScript is true."""
        end = time.monotonic() + SECONDS
        while not self.value(expression):
            assert time.monotonic() < end, f"{expression} did not become true in {SECONDS} s; {self.errors}"
            time.sleep(0.1)

    def put_file(self, path: Path) -> None:
        """Into the page's first place for files."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="input[type=file]")["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def picture(self, path: Path) -> None:
        """Of the whole page, as PNG."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Tab]:
    """A tab of a Chromium of its own, which keeps what it keeps in `folder`."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
    command += ["--disable-background-networking", "--hide-scrollbars", "--remote-debugging-pipe"]
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()

    def as_three_and_four() -> None:  # where Chromium reads and writes
        spare = os.dup(theirs_out), os.dup(theirs_in)
        os.dup2(spare[1], 3)
        os.dup2(spare[0], 4)

    process = subprocess.Popen(
        [*command, f"--user-data-dir={folder}"],
        **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL},
        **{"close_fds": False, "preexec_fn": as_three_and_four},
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Tab(ours_in, ours_out)
    finally:
        process.terminate()
        process.wait(SECONDS)
        os.close(ours_in)
        os.close(ours_out)
