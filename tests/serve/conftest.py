"""The real `vitask serve` on a tiny checkpoint with its TSM and the features of its training images."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from trained import Trained, make_trained

SECONDS = 300  # for a start beside other tests


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Trained:
    return make_trained(tmp_path_factory.mktemp("served"), tiny_checkpoint, "cls")


@dataclass
class Served:
    """A process that serves, and where."""

    process: subprocess.Popen
    checkpoint: Path
    tsm: Path
    address: str = ""
    output: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def read(self) -> None:
        """What it prints, until it ends."""
        for line in self.process.stdout:
            self.output.append(line)

    def end(self) -> tuple[int, str]:
        """Ctrl-C; its status and everything it has printed."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(SECONDS), "".join(self.output)


@pytest.fixture(scope="module")
def served(trained: Trained, drawn_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pytest.importorskip("gradio", reason="no gradio: it needs a newer huggingface-hub than transformers 4 has")
    from vitask_plugin.tsm.features import extract

    features = tmp_path_factory.mktemp("features") / "store"
    extract(trained.tsm, [drawn_data / "train.json"], drawn_data / "images", features)
    command = [sys.executable, "-m", "vitask_plugin.cli", "serve", str(trained.checkpoint), "--tsm", str(trained.tsm)]
    command += ["--features", str(features), "--data", str(drawn_data / "train.json"), "--port", "0", "--device", "cpu"]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": str(tmp_path_factory.mktemp("temporary"))}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **settings}
    )
    found = Served(process, trained.checkpoint, trained.tsm)
    late = threading.Timer(SECONDS, process.kill)
    late.start()
    reader = threading.Thread(target=found.read)
    try:
        for line in process.stdout:
            found.output.append(line)
            if address := re.search(r"http://\S+", line):
                found.address = address[0]
                break
        late.cancel()
        assert found.address, "".join(found.output)
        reader.start()
        yield found
    finally:
        late.cancel()
        process.kill()
        process.wait()
