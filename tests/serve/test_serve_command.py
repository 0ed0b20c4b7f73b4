"""`vitask serve` as it is used: by a program, by whoever looks for files, in a browser, and ended by Ctrl-C."""

import http.client
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Tab, browser
from PIL import Image
from trained import make_tsm

from vitask_plugin import Specialist
from vitask_plugin.cli import main
from vitask_plugin.data.instructions import DRAWN

HEADERS = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def image(drawn_data: Path) -> Path:
    return drawn_data / "images" / json.loads((drawn_data / "test.json").read_text())[3]["image"]


@pytest.fixture(scope="module")
def client(served) -> Any:
    from gradio_client import Client

    return Client(served.address, verbose=False, analytics_enabled=False)


def judged(client: Any, path: Path) -> dict[str, Any]:
    from gradio_client import handle_file

    return client.predict(handle_file(str(path)), api_name="/predict")


def test_the_figures_are_those_of_the_specialist(served, client, image: Path, drawn_data: Path) -> None:
    found = judged(client, image)
    specialist = Specialist.load(served.checkpoint, tsm=served.tsm, device="cpu")
    for who, ep in {"without_exemplar": False, "with_exemplar": True}.items():
        (expected,) = specialist.predict([image], ep=ep, answer=True)
        assert found[who]["probabilities"] == pytest.approx(dict(expected.probabilities), abs=1e-6)
        assert (found[who]["label"], found[who]["answer"]) == (expected.label, expected.answer)
    logits = specialist.tsm(specialist.tsm.preprocess(Image.open(image))[None]).logits[0]
    assert found["tsm"]["probabilities"] == pytest.approx(
        dict(zip(DRAWN.choices, logits.softmax(0).tolist(), strict=True)), abs=1e-6
    )
    assert found["tsm"]["label"] == DRAWN.choices[int(logits.argmax())]
    distances = [one["distance"] for one in found["nearest"]]
    assert len(distances) == 6 and distances == sorted(distances) and distances[0] > 0
    labels = {
        row["image"]: row["conversations"][1]["value"] for row in json.loads((drawn_data / "train.json").read_text())
    }
    assert all(labels[one["image"]] == f"{one['label']}." and one["error"] is None for one in found["nearest"])


def test_a_training_image_finds_itself(client, drawn_data: Path) -> None:
    sample = json.loads((drawn_data / "train.json").read_text())[5]
    first = judged(client, drawn_data / "images" / sample["image"])["nearest"][0]
    assert first["image"] == sample["image"] and first["distance"] == pytest.approx(0, abs=1e-5)


def test_what_is_no_image_is_an_answer_in_one_sentence(client, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    found = judged(client, tmp_path / "notes.png")
    assert found["error"] == ("image 'notes.png' cannot be read (not an image of a known format); replace or remove it")
    assert set(found) == {"name", "error", "nearest"} and found["nearest"] is None


# Files of the machine --------------------------------------------------------------------------------------------


def ask(served, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
    """One request with the path as it is written."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    try:
        given = None if body is None else json.dumps(body)
        connection.request(method, path, given, {**HEADERS, **headers})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def uploaded(served, path: Path) -> str:
    """Where a file is once it is uploaded."""
    import httpx

    with path.open("rb") as file:
        return httpx.post(f"{served.address}/gradio_api/upload", files={"files": file}, trust_env=False).json()[0]


def test_no_request_gives_a_file(served, image: Path) -> None:
    own = uploaded(served, image)
    files = ["/etc/passwd", f"{served.checkpoint}/config.json", str(image), own, f"{own}/../../../../../../etc/passwd"]
    files += ["../../../../../../etc/passwd", "%2e%2e/%2e%2e/%2e%2e/etc/passwd", "..%2f..%2f..%2fetc/passwd"]
    routes = ["/gradio_api/file=", "/file=", "/gradio_api/file/", "/assets/", "/static/", "/svelte/", "/"]
    routes += ["/gradio_api/proxy=file://", "/gradio_api/stream/a/b/c/", "/gradio_api/custom_component/a/b/c/"]
    for route in routes:
        for file in files:
            for method in ("GET", "HEAD"):
                assert ask(served, method, route + file)[0] == 404, (method, route + file)
    others = ["/monitoring", "/gradio_api/deep_link", "/docs", "/openapi.json", "/gradio_api/component_server"]
    for path in [*others, "/gradio_api/process_recording", "/gradio_api/vibe-edit", "/gradio_api/run/predict"]:
        assert {ask(served, method, path)[0] for method in ("GET", "POST", "PUT", "DELETE")} == {404}, path
    assert ask(served, "GET", "/config")[0] == 200  # the closed doors are not all doors
    assert ask(served, "GET", "/config", Host="elsewhere.example")[0] == 404


class Counting(http.server.BaseHTTPRequestHandler):
    """A server that nobody should ask."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def elsewhere() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Counting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/picture.png"
    server.shutdown()


def test_no_image_but_an_uploaded_one_is_judged(served, image: Path, elsewhere: str) -> None:
    own = Path(uploaded(served, image))
    link = own.with_name("link.png")
    link.symlink_to(image)
    folder = own.with_name("folder")
    folder.symlink_to(image.parent)
    names = ["/etc/passwd", str(image), str(link), str(folder / image.name), f"{own.parent}/../../../{image.name}"]
    for name in [*names, elsewhere, "file:///etc/passwd", str(own.parent), "", None, f"{own}\0", 7, [str(image)]]:
        given = {"path": name, "meta": {"_type": "gradio.FileData"}, "url": name}
        for route in ("queue/join", "call/predict", "call/predict/"):
            for data in ([given], [[given]], [{"value": given}]):
                request = {"data": data, "fn_index": 1, "session_hash": "abcdef"}
                assert ask(served, "POST", f"/gradio_api/{route}", request)[0] == 403, (route, name)
    assert Counting.asked == []
    link.unlink()
    folder.unlink()
    given = {"path": str(own), "meta": {"_type": "gradio.FileData"}, "url": elsewhere}
    request = {"data": [given], "fn_index": 1, "session_hash": "abcdef"}
    assert ask(served, "POST", "/gradio_api/queue/join", request)[0] == 200  # the same way in, for what was uploaded


# In a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with browser(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


WIDTHS = "[document.documentElement.scrollWidth, document.body.scrollWidth, window.innerWidth]"
SEEN = """[...document.querySelectorAll('#vitask-result tbody tr')].map(
    row => [...row.children].map(cell => cell.innerText.replace(/\\s+/g, ' ').trim()))"""

PICTURES = "[...document.querySelectorAll('#vitask-result img')].map(one => [one.naturalWidth, one.src.slice(0, 5)])"


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_the_page_shows_them(served, client, tab: Tab, image: Path, tmp_path: Path, width: int, dark: bool) -> None:
    tab.size(width, 900, dark=dark)
    tab.open(served.address, "input[type=file]")
    assert max(tab.value(WIDTHS)) == width
    tab.put_file(image)
    tab.wait("document.querySelectorAll('.vitask-nearest img').length === 6")
    found = judged(client, image)
    who = ("without_exemplar", "with_exemplar", "tsm")
    order = sorted(DRAWN.choices, key=found["with_exemplar"]["probabilities"].get, reverse=True)
    assert tab.value(SEEN) == [
        [name, *(f"{100 * found[one]['probabilities'][name]:.1f}%" for one in who)] for name in order
    ]
    pictures = tab.value(
        "[...document.querySelectorAll('#vitask-result img')].map(i => [i.naturalWidth, i.src.slice(0, 5)])"
    )
    assert pictures == [[28, "data:"]] * 7
    text = tab.value("document.querySelector('#vitask-result').innerText")
    assert found["with_exemplar"]["answer"] in text and f"{found['nearest'][5]['distance']:.3f}" in text
    assert max(tab.value(WIDTHS)) == width
    light = tab.value("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", light)[:3])) < 60) == dark
    (tmp_path / "notes.png").write_text("no picture")
    tab.put_file(tmp_path / "notes.png")
    tab.wait("document.querySelector('.vitask-error') !== null")
    assert "'notes.png' cannot be read" in tab.value("document.querySelector('.vitask-error').innerText")
    own = (served.address, "data:", f"blob:{served.address}")
    assert tab.errors == [] and [one for one in tab.requests if not one.startswith(own)] == []


# The end -----------------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_it_and_leaves_nothing(served, client, image: Path) -> None:
    uploads = Path(uploaded(served, image)).parent.parent
    assert uploads.is_dir()
    status, output = served.end()
    assert status == 0 and "Traceback" not in output, output
    assert not uploads.exists() and list(uploads.parent.iterdir()) == []


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert main(["serve", *map(str, arguments)]) == 1
    return capsys.readouterr().err


def test_what_does_not_fit_is_refused(
    trained, drawn_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("gradio")
    assert "give --tsm with this TSM and --data" in refused(capsys, trained.checkpoint, "--features", "f")
    assert "give --features too" in refused(capsys, trained.checkpoint, "--data", "d.json")
    assert "--port is 70000; it must be at most 65535" in refused(capsys, trained.checkpoint, "--port", 70000)
    assert "192.0.2.1:0 cannot be listened on" in refused(capsys, "nowhere", "--host", "192.0.2.1", "--port", 0)
    assert "'nowhere'" in refused(capsys, "nowhere", "--port", 0) and caplog.messages == []
    refused(capsys, "nowhere", "--port", 0, "--host", "0.0.0.0")
    assert [line.partition(":")[0] for line in caplog.messages] == ["--host 0.0.0.0 is reached from other machines"]
    other = tmp_path / "other"
    make_tsm(other, seed=5)
    from vitask_plugin.tsm.features import extract

    extract(other, [drawn_data / "train.json"], drawn_data / "images", tmp_path / "features")
    given = ("--tsm", trained.tsm, "--features", tmp_path / "features", "--data", drawn_data / "train.json")
    assert "were extracted by TSM" in refused(capsys, trained.checkpoint, *given, "--port", 0, "--device", "cpu")
