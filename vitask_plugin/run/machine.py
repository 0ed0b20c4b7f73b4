"""What a recipe asks of the machine, before any work: GPUs, a folder, room on the disk, programs and their flags."""

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from vitask_plugin.data.instructions import DRAWN, label_set
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import check_creatable
from vitask_plugin.run.plan import tokens_of
from vitask_plugin.run.recipe import DataSet, Recipe, filled
from vitask_plugin.run.stage import Plan

FLOAT32_BYTES = 4


def device_of(recipe: Recipe, *, dry: bool) -> str:
    """cpu or cuda.

    Args:
        dry: nothing is to run here, so what the machine has is not asked for, but by `auto`.

    Raises:
        VITaskError: fewer GPUs than processes, or several nodes outside of a Slurm job.
    """
    import torch

    launch, there = recipe.launch, torch.cuda.device_count()
    device = launch.device if launch.device != "auto" else "cuda" if there else "cpu"
    if dry:
        return device
    if launch.device != "cpu" and launch.processes > max(there, launch.device == "auto"):
        raise VITaskError(
            f"recipe: launch.processes is {launch.processes}, one for each GPU, and this machine has {there}; "
            "change it, or give launch.device: cpu"
        )
    if launch.nodes > 1 and "SLURM_JOB_ID" not in os.environ:
        raise VITaskError(
            f"recipe: launch.nodes is {launch.nodes}, and this is no Slurm job; `vitask run ... --slurm FILE` writes "
            "one to submit, and --dry-run prints the commands for other clusters"
        )
    return device


def check_place(out: Path, mark: str, before: Collection[str]) -> None:
    """Refuses a folder that the run cannot use.

    Args:
        mark: the file that tells an earlier run's folder. before: what is written before that.

    Raises:
        VITaskError: naming what is in the way.
    """
    check_creatable(out)
    if not out.is_file():
        check_creatable(out / mark)
    if "," in str(out):
        raise VITaskError(f"recipe: out {str(out)!r} holds a comma, which lmms-eval takes for the end of a path")
    found = {name for name in os.listdir(out) if not name.startswith(".")} if out.is_dir() else set()
    foreign = sorted(found - set(before)) if mark not in found else []
    if out.is_file() or foreign:
        what = "is a file" if out.is_file() else f"already holds {foreign[0]!r}, which is not of an earlier run"
        raise VITaskError(f"recipe: out {str(out)!r} {what}; choose another folder")


def check_room(recipe: Recipe, out: Path) -> None:
    """Refuses a disk that is too small for the TSM's features.

    Raises:
        VITaskError: with what is needed and what is free; or no such architecture.
    """
    recipe = filled(recipe)
    if recipe.tsm.folder is not None or (out / "features").exists():
        return
    values = _feature_values(recipe.tsm.arch, recipe.tsm.image_size, tokens_of(recipe))
    images = sum(map(_training_images, recipe.data))
    needed = images * values * FLOAT32_BYTES
    place = next(parent for parent in (out, *out.parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise VITaskError(
            f"the TSM's features of {images} images take {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free in "
            f"{str(place)!r}; choose another --out"
        )


def _feature_values(arch: str, size: int | None, tokens: str | None) -> int:
    """Numbers per image that are kept, as the untrained network says without computing."""
    import torch

    from vitask_plugin.tsm.backbone import Backbone, build_timm, native_image_size, timm_options

    network = build_timm(arch, 2, timm_options(arch, 2, size)).eval()
    side = size or native_image_size(network)
    with torch.no_grad():
        pooled, patches, _ = Backbone(network.to("meta"))(torch.zeros(1, 3, side, side, device="meta"))
    return {"cls": pooled.numel(), "all": patches.numel()}.get(tokens, 0)


def _training_images(one: DataSet) -> int:
    """At most so many are in the training split."""
    if one.medmnist is not None:
        from medmnist.info import INFO

        flag = label_set(one.medmnist).flag
        return 0 if flag == DRAWN.flag else INFO[flag]["n_samples"]["train"]
    path = Path(one.images)
    if path.is_file():
        with open(path, "rb") as file:
            return sum(1 for _ in file)
    return sum(len(names) for _, _, names in os.walk(path / "train" if (path / "train").is_dir() else path))


def check_commands(plan: Plan, *, dry: bool) -> None:
    """Refuses what no command takes: each of `vitask`'s own is parsed, and every program looked for.

    Args:
        dry: programs may be elsewhere.

    Raises:
        VITaskError: with the parser's sentence, or the program that is missing.
    """
    from vitask_plugin.cli import build_parser

    for stage in plan.stages:
        for command in stage.commands:
            program, *words = command.words
            if not dry and shutil.which(program, path=plan.environment["PATH"]) is None:
                raise VITaskError(
                    f"{stage.title}: there is no program {program!r}; `vitask doctor` says what to install"
                )
            if program == "vitask":
                _parse(build_parser(words).parse_args, words, stage.title)


def _parse(parse: Callable[[list[str]], Any], words: list[str], title: str) -> None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parse(words)
    except SystemExit:
        why = said.getvalue().strip().rpartition("error: ")[2]
        raise VITaskError(f"recipe: {title}: `vitask {' '.join(words[:2])}` does not take it: {why}") from None
