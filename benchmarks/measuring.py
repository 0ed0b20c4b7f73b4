"""What the cost benchmarks share: rounds in turn and their medians, the machine's name, a line of JSON."""

import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitask_plugin.errors import VITaskError
from vitask_plugin.record.checkpoint import versions

# "cpu" is the time that this process computed, over all its threads: for a machine on which others compute too.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def turns(names: Iterable[str], repeats: int, warm_up: int = 1) -> Iterator[tuple[int, str]]:
    """(round, name): every name once a round, in an order that rotates; rounds below 0 are to warm up."""
    names = list(names)
    for number in range(-warm_up, repeats):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            yield number, name


def percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{level}": float(np.percentile(values, level)) for level in (20, 50, 80)}


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios within a round: what slows the whole machine for a while slows both."""
    return statistics.median(one / other for one, other in zip(above, below, strict=True))


def mean_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The ratio of the sums over rounds, where rounds differ in what they compute."""
    return sum(above) / sum(below)


def machine(device: str, threads: int) -> dict[str, Any]:
    """What a figure was measured on: processor, threads, versions."""
    return {
        "processor": torch.cuda.get_device_name() if device == "cuda" else _cpu(),
        "threads": threads,
        "versions": {"python": platform.python_version(), **versions()},
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1] if found else platform.machine()


def append_line(path: Path, result: dict[str, Any]) -> None:
    """Adds `result` to a file of one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def end_with_a_sentence(main: Callable[[], None]) -> None:
    """Runs a benchmark's `main`; bad input ends it with one sentence."""
    try:
        main()
    except VITaskError as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: error: {error}")
