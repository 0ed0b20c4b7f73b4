"""Stage-2 steps under DDP, ZeRO-2 and ZeRO-3 with 1 and 2 processes: time, and bytes sent against the formula.

    python benchmarks/scaling.py [--json FILE] [--lora] [--gradient-checkpointing]
    python benchmarks/scaling.py --predict [choice] [communication] [memory]

The second form prints the tables of docs/deepspeed.md, from formulas alone. The first one measures, on CPUs with gloo:
the processes talk through the loopback device of a network namespace of their own, where nobody else sends anything,
and its counter is what is compared. That needs root and iproute2; without them only times are measured.

A small model is less than the 1e9 elements that DeepSpeed keeps gathered at most, so that limit is made smaller in
proportion: as many elements of this model as 1e9 are of a 7B one.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measuring import append_line, end_with_a_sentence, machine
from rich.console import Console
from rich.table import Table
from scaling_prediction import TABLES
from scaling_worker import RUNS, expected_bytes
from workload import add_flags, make_workload, settings_of

from vitask_plugin.errors import VITaskError

WIDTH = 120  # of the tables at least: narrower, they lose figures
SMALL = {"batch": 2, "hidden": 256, "vocabulary": 4000, "image_tokens": 64, "layers": 6, "threads": 1}
LIMIT = 900  # seconds for the processes of one launch


def own_namespace() -> list[str]:
    """What to put before a command so that it has a loopback device of its own; nothing where that is not allowed."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        return []
    prefix = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    return prefix if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0 else []


def measure(directory: Path, processes: int, repeats: int, namespace: list[str]) -> dict[str, Any]:
    """What rank 0 of `processes` found: {run: {"seconds": ..., "bytes": per rank and step, ...}}."""
    output = directory / f"{processes}.json"
    worker = [str(Path(__file__).with_name("scaling_worker.py")), str(directory), str(output), str(repeats)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "VITASK_COUNT_BYTES": str(int(bool(namespace))), "GLOO_SOCKET_IFNAME": "lo"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*namespace, *command, *worker], env=environment, **pipes) as launcher:
        try:
            _, errors = launcher.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            launcher.terminate()  # it ends its ranks
            raise VITaskError(f"{processes} processes were not done after {LIMIT} s; use a smaller model") from None
    if not output.is_file():
        raise VITaskError(f"{processes} processes failed; the last of what they printed: {errors[-2000:]}")
    return json.loads(output.read_text(encoding="utf-8"))


def table_of(found: dict[int, dict[str, Any]], batch: int) -> Table:
    table = Table(title="a stage-2 step; MB: sent by one rank in one step", title_justify="left")
    for column in ("run", "processes", "ms a step", "samples/s", "MB sent", "by formula", "measured / formula"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for processes, runs in found.items():
        for name, run in runs.items():
            seconds, sent, expected = run["seconds"]["p50"], run["bytes"], run["expected_bytes"]
            bytes_ = ("n/a", f"{expected / 1e6:.1f}", "n/a")
            if sent is not None and expected:
                bytes_ = (f"{sent / 1e6:.1f}", f"{expected / 1e6:.1f}", f"{sent / expected:.3f}")
            speed = f"{processes * batch / seconds:.2f}"
            table.add_row(RUNS[name].words, str(processes), f"{1000 * seconds:.0f}", speed, *bytes_)
        table.add_section()
    return table


def wide_console() -> Console:
    return Console(width=max(WIDTH, Console().width))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    parser.set_defaults(**SMALL, device="cpu", dtype="float32", vision_hidden=64, vision_layers=2)
    add = parser.add_argument
    add("--processes", type=int, nargs="+", default=[1, 2], metavar="N", help="(default 1 2)")
    add("--repeats", type=int, default=8, metavar="N", help="measured steps (default 8)")
    add("--json", type=Path, metavar="FILE", help="append the result as one line")
    add("--predict", nargs="*", choices=list(TABLES), metavar="TABLE", help=f"of {', '.join(TABLES)}; nothing is run")
    args = parser.parse_args(argv)
    if args.predict is not None:
        for name in args.predict or TABLES:
            wide_console().print(TABLES[name]())
        return
    settings = settings_of(args)
    if settings.device != "cpu":
        raise VITaskError("--device must be cpu here: bytes are counted on the loopback device")
    torch.set_num_threads(settings.threads)
    console, namespace = wide_console(), own_namespace()
    with tempfile.TemporaryDirectory(prefix="scaling-") as directory:
        with console.status("data"):
            make_workload(settings, Path(directory), balanced=True)
        (Path(directory) / "settings.json").write_text(json.dumps(asdict(settings)), encoding="utf-8")
        found = {}
        for processes in args.processes:
            with console.status(f"{processes} processes"):
                found[processes] = measure(Path(directory), processes, args.repeats, namespace)
    for processes, runs in found.items():
        for name, run in runs.items():
            run["expected_bytes"] = expected_bytes(RUNS[name], run["elements"], processes, settings)
    console.print(table_of(found, settings.batch))
    if not namespace:
        console.print("Bytes were not counted: no network namespace could be made (root and iproute2 are needed).")
    if args.json:
        config = {**asdict(settings), "repeats": args.repeats}
        append_line(args.json, {"config": config, **machine(settings.device, settings.threads), "processes": found})


if __name__ == "__main__":
    end_with_a_sentence(main)
