"""`vitask run`: from images to a judged specialist, by a recipe file, by flags, or by flags over a file."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_path
from vitask_plugin.formats.json_text import read_json
from vitask_plugin.options import COUNT, SEED, at_least
from vitask_plugin.run.recipe_file import parsed, read_recipe, with_settings, written

# Flag -> the key of the recipe that it is.
KEYS = {
    "model": "model",
    "host": "host",
    "out": "out",
    "seed": "seed",
    "baseline": "baseline",
    "processes": "launch.processes",
    "nodes": "launch.nodes",
    "deepspeed": "launch.deepspeed",
    "device": "launch.device",
}
COMMANDS_FILE = "commands.sh"
SHARE = at_least(0, 1)
SET_KEYS = (
    "modality",
    "size",
    "val",
    "test",
    "drop_duplicates",
    "allow_duplicates",
)  # of the one data set of the command line


def recipe_values(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe file's values under those of the flags.

    Raises:
        VITaskError: flags that name no set, or several where one is meant.
    """
    values: dict[str, Any] = {} if args.recipe is None else read_recipe(args.recipe)
    for flag, key in KEYS.items():
        given = getattr(args, flag)
        if given is not None and given is not False:
            section, _, name = key.rpartition(".")
            if section:
                inner = values.get(section) or {}
                values[section] = {**inner, name: given} if isinstance(inner, Mapping) else inner
            else:
                values[name] = given
    return with_settings(_with_data(values, args), args.set)


def _with_data(values: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    sets = [{"images": path} for path in args.images or []]
    sets += [{"medmnist": name} for name in _medmnist_names(args.medmnist or [])]
    own = {name: getattr(args, name) for name in SET_KEYS if getattr(args, name) not in (None, False)}
    if not sets:
        if own:
            raise VITaskError(f"--{next(iter(own)).replace('_', '-')} is of --images or --medmnist; give one of them")
        return values
    if args.recipe is not None and values.get("data"):
        raise VITaskError("the recipe names its data, and --images or --medmnist other ones; leave one of them out")
    if len(args.images or []) > 1 and "modality" in own:
        raise VITaskError("--modality is of one set, and --images names several; write them into a recipe file")
    for one in sets:
        taken = {name: value for name, value in own.items() if "images" in one or name != "modality"}
        one |= {name: value for name, value in taken.items() if "medmnist" in one or name != "size"}
    return {**values, "data": sets}


def _medmnist_names(given: list[str]) -> list[str]:
    """As given, with `all` as the name of each set that is published."""
    if "all" not in given:
        return given
    from vitask_plugin.data.medmnist import several

    return [labels.flag for labels in several(given, "--medmnist")]


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", nargs="?", metavar="RECIPE.yaml", help="all settings; --print-recipe prints one")
    add("--images", nargs="+", metavar="DIR", help="labelled images: DIR/CLASS/*.png, or a CSV; several sets: several")
    add("--medmnist", nargs="+", metavar="NAME", help="MedMNIST sets, such as breastmnist, or all")
    add("--modality", metavar="TEXT", help='of --images: what they are, such as "brain MRI"')
    add("--size", type=int, metavar="N", help="of --medmnist: side in pixels (default 28)")
    add(
        "--val",
        type=float,
        action=SHARE,
        metavar="X",
        help="share of images for validation, where no split is given (default 0.1)",
    )
    add(
        "--test",
        type=float,
        action=SHARE,
        metavar="X",
        help="share of images for the test, where no split is given (default 0.1)",
    )
    add("--drop-duplicates", action="store_true", help="leave an image in two splits out of train (val, if in test)")
    add("--allow-duplicates", action="store_true", help="go on if the same image is in two splits, and keep both")
    add("--model", metavar="DIR", help="LLaVA-1.5, or a VLM in HF format; `tiny` makes one on the spot")
    add("--host", metavar="NAME", help="llava or hf (default: as the model's folder says)")
    add("--out", metavar="DIR", help="folder for everything; the same command goes on with what is in it")
    add("--baseline", action="store_true", help="also tune without VITask, on as many samples")
    add("--seed", type=int, action=SEED, metavar="N", help="of TSM and training (default 0)")
    add("--device", metavar="NAME", help="auto (default), cuda or cpu")
    add(
        "--processes",
        type=int,
        action=COUNT,
        metavar="N",
        help="training processes per node, one for each GPU (default 1)",
    )
    add("--nodes", type=int, action=COUNT, metavar="N", help="nodes, inside of a Slurm job (default 1)")
    add("--deepspeed", metavar="NAME", help="zero2, zero3, zero2_offload, zero3_offload, or a JSON file")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting, such as tsm.epochs=10")
    add("--dry-run", action="store_true", help="print all commands and run none")
    add("--print-recipe", action="store_true", help="print the recipe with every setting and a comment on each")
    add("--slurm", metavar="FILE", help="write a Slurm job for this recipe and run nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    recipe = parsed(recipe_values(args))
    if args.print_recipe:
        tqdm.write(written(recipe), end="")
        return
    from rich.console import Console

    from vitask_plugin.run import checks, engine, machine
    from vitask_plugin.run.judging_stages import ARMS, RECIPE_FILE, REPORT_FILE, RESULTS_FILE
    from vitask_plugin.run.plan import make_plan

    out = Path(recipe.out or "").absolute()
    checks.check(recipe, out)
    dry = args.dry_run or args.slurm is not None
    plan = make_plan(recipe, out, machine.device_of(recipe, dry=dry))
    machine.check_commands(plan, dry=dry)
    if args.slurm is not None:
        _write_job(args.slurm, recipe, out)
        return
    if dry:
        tqdm.write(engine.script_of(plan), end="")
        return
    machine.check_place(out, engine.STAGES_FILE, (RECIPE_FILE, COMMANDS_FILE))
    machine.check_room(recipe, out)
    console = Console()
    running = engine.Engine(plan, console)
    with running.opened() as stages:  # before, the files may be those of a run that is going on
        _write_recipe(out / RECIPE_FILE, recipe)
        with atomic_path(out / COMMANDS_FILE) as path:
            path.write_text(engine.script_of(plan), encoding="utf-8")
        running.bring_up_to_date(stages)
    _show(read_json(out / RESULTS_FILE, "results")["rows"], ARMS, console)
    for name in (REPORT_FILE, RESULTS_FILE):
        console.print(str(out / name), highlight=False, soft_wrap=True)


def _write_recipe(path: Path, recipe: Any) -> None:
    """Keeps the file that says the same already: it may be the user's own, with other comments."""
    if path.is_file() and parsed(read_recipe(str(path))) == recipe:
        return
    with atomic_path(path) as temporary:
        temporary.write_text(written(recipe), encoding="utf-8")


def _write_job(name: str, recipe: Any, out: Path) -> None:
    from vitask_plugin.run.judging_stages import RECIPE_FILE
    from vitask_plugin.run.lock import locked
    from vitask_plugin.run.slurm import job

    if Path(name).exists():
        raise VITaskError(f"--slurm {name!r} is there already; choose another name")
    path = out / RECIPE_FILE
    with locked(out):
        _write_recipe(path, recipe)
    with atomic_path(name) as temporary:
        temporary.write_text(job(recipe, name, [str(path)]), encoding="utf-8")
    tqdm.write(f"{name}: submit it with `sbatch {name}`; the recipe is {path}")


def _show(rows: list[dict[str, Any]], names: Mapping[str, str], console: Any) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, padding=0, pad_edge=False)  # 80 columns hold it, medmnist_pneumonia among it
    for column in ("set", "split", "model"):
        table.add_column(column, no_wrap=True)
    for column in ("accuracy", "macro-F1", "AUC", "unread", "n"):
        table.add_column(column, justify="right")
    for row in rows:
        figures = (row[name] for name in ("accuracy", "macro_f1", "auc"))
        cells = ["n/a" if value is None else f"{value:.3f}" for value in figures]
        counts = str(row["unmapped"]), str(row["n"])
        table.add_row(row["set"], row["split"], names[row["arm"]], *cells, *counts)
    console.print(table)
