"""What the start of a run takes per sample: reading the JSON, finding the images, hashing them, and the same once more.

`data_cost.py --samples N` runs it on N generated samples, whose image files are links to a few of usual size.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from vitask_plugin.data.contents import Contents, survey
from vitask_plugin.data.instructions import label_set, read_samples, sample
from vitask_plugin.files import inside

FILES, BYTES = 100, 40_000  # different image files, and the size of each
MILLION = 1_000_000


def generate(directory: Path, count: int) -> None:
    """`data.json` of `count` samples, and an image file for each."""
    known = label_set("organa")
    images, noise = directory / "images", np.random.default_rng(0)
    images.mkdir(parents=True)
    for number in range(FILES):
        (directory / f"{number}.png").write_bytes(noise.bytes(BYTES))
    words = {"modality": known.modality, "task": known.task, "choices": known.choices}
    rows = []
    for number in range(count):
        name = f"{number % 1000:03d}/{number:07d}.png"
        (images / name).parent.mkdir(exist_ok=True)
        os.link(directory / f"{number % FILES}.png", images / name)
        rows.append(sample(identifier=f"sample-{number}", image=name, label=number % len(known.choices), **words))
    (directory / "data.json").write_text(json.dumps(rows, indent=2))
    for number in range(FILES):
        os.utime(directory / f"{number}.png", (0, 0))


def measure(directory: Path, count: int) -> dict[str, Any]:
    """Seconds of each part of a start on one process, and the memory that the samples take, in bytes."""
    generate(directory, count)
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = work()
        seconds[name] = time.perf_counter() - start
        return found

    before = _resident()
    samples = timed("read", lambda: read_samples(directory / "data.json"))
    held = _resident() - before
    images = [one["image"] for one in samples]
    folder = directory / "images"
    timed("find", lambda: all(os.path.isfile(inside(folder, image)) for image in images))
    timed("hash", lambda: survey(folder, images, images)).save(directory / "node-0.npz")
    timed("again", lambda: survey(folder, images, images, [Contents.open(directory / "node-0.npz")]))
    return {"samples": count, "seconds": seconds, "bytes": held}


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def start_table(result: dict[str, Any]) -> Table:
    count = result["samples"]
    measured = "" if count == MILLION else f"; per {MILLION:,} is extrapolated"
    table = Table(title=f"start of one process, {count:,} samples{measured}", title_justify="left")
    for column in ("", "seconds", f"per {MILLION:,}", "who"):
        table.add_column(column, justify="right" if "s" in column else "left")
    says = {"read": "every rank", "find": "a node's ranks share it", "hash": "shared, first start"}
    for name, seconds in result["seconds"].items():
        who = says.get(name, "shared, a restart")
        table.add_row(name, f"{seconds:.1f}", f"{seconds * MILLION / count:.0f}", who)
    held = result["bytes"] / 2**30
    table.add_row("memory, GiB", f"{held:.2f}", f"{held * MILLION / count:.2f}", "every rank")
    return table
