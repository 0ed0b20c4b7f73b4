"""`vitask run` killed with SIGKILL at random moments and started again: the same `results.json` as of a run left alone?

    python benchmarks/run_kills.py [--kills 20] [--seed 0] [--all] [--out run-kills]

Draws a folder of PNGs, runs the tiny model on it once without and once with kills, on the test split (`--all`: all
arms, and val too), and compares the two files byte by byte; ends with status 1 where they differ. A kill comes after 2
to 30 % of the CPU time that the run left alone took, whatever else the machine does; a run that ends before all kills
are spent is followed by another.
Appends a line to `benchmarks/results/run_kills.jsonl`.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from vitask_plugin.data.drawn import draw_dataset
from vitask_plugin.data.instructions import DRAWN

RESULTS = Path(__file__).resolve().parent / "results" / "run_kills.jsonl"
SIZES = {"train": 48, "val": 16, "test": 16}
FEW = ("evaluate.splits=[test]", "evaluate.untuned=false")
SHARES = (0.02, 0.3)
LOOK_EVERY = 0.1  # seconds
SETTINGS = ("tsm.epochs=3", "training.save_steps=1", "training.batch_size=8")


def draw(folder: Path, seed: int) -> Path:
    """`folder`/{train,val,test}/CLASS/*.png of the drawn set."""
    archive = draw_dataset(folder.with_suffix(".npz"), seed=seed, sizes=SIZES)
    with np.load(archive) as arrays:
        for split in SIZES:
            for index, (image, label) in enumerate(
                zip(arrays[f"{split}_images"], arrays[f"{split}_labels"], strict=True)
            ):
                path = folder / split / DRAWN.choices[int(label[0])] / f"{index:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)
    return folder


def start(images: Path, out: Path, everything: bool) -> subprocess.Popen:
    words = ["--images", images, "--modality", "drawn texture", "--model", "tiny", "--device", "cpu"]
    words += ["--baseline"] * everything
    settings = [word for setting in (*SETTINGS, *(() if everything else FEW)) for word in ("--set", setting)]
    command = [sys.executable, "-m", "vitask_plugin.cli", "run", *map(str, words), *settings, "--out", str(out)]
    log = open(out.parent / f"{out.name}.log", "a")  # noqa: SIM115  (the process keeps it)
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def spent(process: psutil.Process) -> float:
    """CPU seconds of a process and of all that it started, ended or not."""
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
    return total


def ended(process: subprocess.Popen, seconds: float) -> bool:
    """Whether it ended by itself within so much CPU time; else it is killed."""
    watched = psutil.Process(process.pid)
    while spent(watched) < seconds:
        try:
            process.wait(LOOK_EVERY)
            return True
        except subprocess.TimeoutExpired:
            continue
    process.send_signal(signal.SIGKILL)
    process.wait()
    return False


def killed(images: Path, out: Path, kills: int, seed: int, alone: float, everything: bool) -> tuple[list[str], bool]:
    """Runs below `out` beside `out`/alone, killed so often between them.

    Args:
        alone: CPU seconds of the run left alone.

    Returns:
        The stage that each kill came in, and whether every run ended with the same figures; the first that does not is
        the last one.
    """
    moments, hits, same = random.Random(seed), [], []
    reference = (out / "alone/results.json").read_bytes()
    while len(hits) < kills and all(same):
        folder = out / f"killed-{len(same)}"
        while len(hits) < kills and not ended(start(images, folder, everything), alone * moments.uniform(*SHARES)):
            logs = sorted((folder / "logs").glob("*.log"), key=os.path.getmtime)
            hits.append(logs[-1].stem if logs else "the start")
            print(f"killed in {hits[-1]}", flush=True)
        done = start(images, folder, everything).wait() == 0
        same.append(done and (folder / "results.json").read_bytes() == reference)
        print(f"{folder.name}: results.json {'is the same' if same[-1] else 'DIFFERS'}", flush=True)
    return hits, all(same)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="(default 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the images and the moments (default 0)")
    parser.add_argument("--out", type=Path, default=Path("run-kills"), metavar="DIR", help="folder, must not exist")
    parser.add_argument("--all", action="store_true", help="all arms, vanilla among them, on val and test")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    images, begin = draw(args.out / "stripes", args.seed), time.monotonic()
    if start(images, args.out / "alone", args.all).wait():
        print(f"the run left alone failed: see {args.out / 'alone.log'}")
        return 1
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, cpu = time.monotonic() - begin, used.ru_utime + used.ru_stime
    print(f"left alone: {seconds:.0f} s, {cpu:.0f} s of CPU", flush=True)
    hits, same = killed(images, args.out, args.kills, args.seed, cpu, args.all)
    line = {"kills": len(hits), "in": hits, "same": same, "alone_s": round(seconds), "alone_cpu_s": round(cpu)}
    found = json.loads((args.out / "alone/results.json").read_text())["versions"]
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "seed": args.seed, "versions": found}) + "\n")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
