"""Whether data keep up: the TSM's feature extraction beside its bare forward, and the loader beside the training step.

    python benchmarks/data_cost.py [--arch vit_small_patch16_224] [--images 128] [--workers 2] [--json FILE]

- Extraction: images per second of `vitask tsm extract` (its own function, from image files to the finished store, the
  TSM's loading included) over those of the bare timm forward on the same preprocessed pixels, already in memory.
- Reading: the time to look up the features of a batch, as a share of a training step.
- Loader: samples per second of the real data set and collator (stage 2) in a DataLoader with worker processes, over
  those of the training step they feed. The step's time is taken with the loader at rest.

The step is that of `step_cost.py`, whose flags these are. On a CPU the workers take their time from the same cores that
compute; beside a GPU they do not.

`--samples 1000000` measures the start of a run of so many samples instead (`start_cost.py`).
"""

import argparse
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from measuring import append_line, end_with_a_sentence, machine, median_ratio, percentiles, wait
from PIL import Image
from rich.console import Console
from rich.table import Table
from start_cost import measure as measure_start
from start_cost import start_table
from steps import Steps
from torch.utils.data import DataLoader
from workload import VARIANTS, Batches, Settings, Workload, add_flags, make_workload, settings_of

from vitask_plugin.data.drawn import draw_dataset
from vitask_plugin.data.instructions import DRAWN, sample
from vitask_plugin.files import sha256_file, write_json
from vitask_plugin.tsm.backbone import build_timm, pixel_statistics
from vitask_plugin.tsm.features import FeatureStore, extract
from vitask_plugin.tsm.model import TSM

BATCH = 64  # of `vitask tsm extract`
STEP = VARIANTS["stage2_packed"]


# Extraction ----------------------------------------------------------------------------------------------------------


def make_images(directory: Path, count: int, side: int) -> None:
    """Writes `count` drawn pictures of `side` pixels, and LLaVA JSON that names them."""
    drawn = np.load(draw_dataset(directory / "drawn.npz", seed=0, sizes={"train": count, "val": 4, "test": 4}))
    (directory / "images").mkdir()
    samples = []
    for number, (pixels, label) in enumerate(zip(drawn["train_images"], drawn["train_labels"][:, 0], strict=True)):
        picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        picture.save(directory / "images" / f"{number}.png")
        words = {"modality": DRAWN.modality, "task": DRAWN.task, "choices": list(DRAWN.choices), "label": int(label)}
        samples.append(sample(identifier=str(number), image=f"{number}.png", **words))
    write_json(directory / "data.json", samples)


def make_tsm(directory: Path, arch: str) -> TSM:
    torch.manual_seed(0)
    network = build_timm(arch, len(DRAWN.choices), {})
    mean, std = pixel_statistics(network)
    side = timm.data.resolve_model_data_config(network)["input_size"][-1]
    tasks = {DRAWN.task: {"choices": list(DRAWN.choices), "multi_label": False}}
    tsm = TSM(network, {"source": {"timm": arch}, "image_size": side, "mean": mean, "std": std, "tasks": tasks})
    tsm.save(directory / "tsm")
    return tsm


def measure_extraction(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Images per second of extraction and of the bare forward, which take turns."""
    tsm = make_tsm(directory, args.arch)
    side = tsm.record["image_size"]
    make_images(directory, args.images, side)
    network = timm.create_model(args.arch, num_classes=len(DRAWN.choices)).eval().to(args.device)
    files = sorted((directory / "images").iterdir())
    pixels = torch.stack([tsm.preprocess(Image.open(path)) for path in files]).to(args.device)
    seconds: dict[str, list[float]] = {"extract": [], "bare": []}
    for number in range(-1, args.repeats):
        start = time.perf_counter()
        extract(
            directory / "tsm",
            [directory / "data.json"],
            directory / "images",
            directory / "features",
            batch_size=BATCH,
            workers=args.workers,
            device=args.device,
        )
        middle = time.perf_counter()
        with torch.no_grad():
            for batch in pixels.split(BATCH):
                network(batch)
        wait(args.device)
        end = time.perf_counter()
        if number >= 0:
            seconds["extract"].append(middle - start)
            seconds["bare"].append(end - middle)
    rates = {name: percentiles([args.images / one for one in values]) for name, values in seconds.items()}
    return {"arch": args.arch, "images": args.images, "image_side": side, "images_per_second": rates} | {
        "extraction_over_bare": median_ratio(seconds["bare"], seconds["extract"])
    }


# The loader ----------------------------------------------------------------------------------------------------------


def measure_loader(args: argparse.Namespace, settings: Settings, directory: Path) -> dict[str, Any]:
    """Samples per second of the loader and of the step, and what reading features takes."""
    workload = make_workload(settings, directory)
    batches = Batches(workload)
    steps = Steps(batches)
    batch, _ = batches(STEP, 0)
    step = [steps.run(STEP, batch) for _ in range(1 + args.repeats)][1:]
    rates = [_loader_rate(workload, batches, args.workers) for _ in range(args.repeats)]
    step_seconds = percentiles(step)
    reading = _reading_seconds(workload, settings.batch)
    return {
        "step_samples_per_second": settings.batch / step_seconds["p50"],
        "loader_samples_per_second": percentiles(rates),
        "loader_over_step": percentiles(rates)["p50"] * step_seconds["p50"] / settings.batch,
        "reading_seconds_per_batch": reading,
        "reading_share_of_step": reading / step_seconds["p50"],
    }


def _loader_rate(workload: Workload, batches: Batches, workers: int, rounds: int = 4) -> float:
    """Samples per second from the first batch on: the start of the workers is not counted."""
    collator = batches.collator(STEP)
    order = batches.order * rounds
    loader = DataLoader(
        batches.dataset,
        batch_size=workload.settings.batch,
        sampler=order,
        collate_fn=collator,
        num_workers=workers,
        drop_last=True,
    )
    found = iter(loader)
    next(found)
    start = time.perf_counter()
    count = _exhausted(found)
    return count * workload.settings.batch / (time.perf_counter() - start)


def _exhausted(found: Iterable[Any]) -> int:
    return sum(1 for _ in found)


def _reading_seconds(workload: Workload, batch: int, rounds: int = 200) -> float:
    """Seconds to look up the features of a batch, the store opened anew."""
    store = FeatureStore.open(workload.directory / "features")
    images = sorted((workload.directory / "images").iterdir())[:batch]
    contents = {path.name: sha256_file(path) for path in images}
    start = time.perf_counter()
    for _ in range(rounds):
        for name, content in contents.items():
            store.get(name, content)
    return (time.perf_counter() - start) / rounds


# The report ----------------------------------------------------------------------------------------------------------


def table_of(result: dict[str, Any]) -> Table:
    extraction, loader = result["extraction"], result["loader"]
    images, samples = extraction["images_per_second"], loader["loader_samples_per_second"]
    table = Table(title=f"data, {result['config']['workers']} workers", title_justify="left")
    for column in ("", "per second", "beside", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row(
        f"extraction, {extraction['arch']}, images",
        f"{images['extract']['p50']:.1f}",
        f"bare forward {images['bare']['p50']:.1f}",
        f"{extraction['extraction_over_bare']:.2f}",
    )
    table.add_row(
        "loader, samples",
        f"{samples['p50']:.1f}",
        f"step {loader['step_samples_per_second']:.2f}",
        f"{loader['loader_over_step']:.1f}",
    )
    table.add_row(
        "features read, batches",
        f"{1 / loader['reading_seconds_per_batch']:.0f}",
        "share of a step",
        f"{loader['reading_share_of_step']:.1e}",
    )
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    add = parser.add_argument
    add("--arch", default="vit_small_patch16_224", metavar="NAME", help="timm's name of the TSM")
    add("--images", type=int, default=128, metavar="N", help="extracted (default 128)")
    add("--workers", type=int, default=2, metavar="N", help="processes that load data (default 2)")
    add("--repeats", type=int, default=3, metavar="N", help="measured rounds (default 3)")
    add("--samples", type=int, metavar="N", help="measure the start of a run of N generated samples, and nothing else")
    add("--json", type=Path, metavar="FILE", help="append the result as one line")
    args = parser.parse_args(argv)
    if args.samples:
        with tempfile.TemporaryDirectory(prefix="start-cost-") as name:
            started = measure_start(Path(name), args.samples)
        Console().print(start_table(started))
        if args.json:
            append_line(args.json, {"start": started, "machine": machine(args.device, args.threads)})
        return
    settings = settings_of(args)
    torch.set_num_threads(args.threads)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="data-cost-") as name, console.status("extraction") as status:
        (Path(name) / "tsm-data").mkdir()
        extraction = measure_extraction(args, Path(name) / "tsm-data")
        status.update("loader and step")
        loader = measure_loader(args, settings, Path(name) / "workload")
    config = {**asdict(settings), "workers": args.workers, "repeats": args.repeats}
    result = {
        "config": config,
        "extraction": extraction,
        "loader": loader,
        "machine": machine(args.device, args.threads),
    }
    console.print(table_of(result))
    if args.json:
        append_line(args.json, result)


if __name__ == "__main__":
    end_with_a_sentence(main)
