"""The first stages of a plan: the data sets, the task-specific model, its features."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitask_plugin.data.folder import task_name
from vitask_plugin.data.instructions import DRAWN, LabelSet, label_set
from vitask_plugin.data.medmnist import ALLOW_MODIFIED, ROOT, root
from vitask_plugin.run.recipe import DataSet, Recipe
from vitask_plugin.run.stage import Command, Stage, files_of, flags

MEDMNIST_SIZE = 28  # where the recipe says none


@dataclass(frozen=True)
class Source:
    """One data set of the recipe.

    Attributes:
        given: as the recipe has it.
        name: of its stage and its folder.
        folder: that it is written into.
        medmnist: its label set there, None of own images.
    """

    given: DataSet
    name: str
    folder: Path
    medmnist: LabelSet | None

    @property
    def size(self) -> int | None:
        """Side in pixels of a medmnist set, None of own images."""
        return (self.given.size or MEDMNIST_SIZE) if self.medmnist else None


def source(given: DataSet, out: Path) -> Source:
    """A set and where it goes.

    Raises:
        VITaskError: no such medmnist set, or nothing to call it by.
    """
    if given.medmnist is not None:
        labels = label_set(given.medmnist)
        return Source(given, labels.flag, out / "data" / labels.flag, labels)
    name = given.name or task_name(Path(given.images))
    return Source(given, name, out / "data" / name, None)


def medmnist_variables(recipe: Recipe) -> dict[str, str]:
    """What commands are told of MedMNIST's files: by the recipe, or else by this process's environment."""
    known = {**os.environ, **recipe.launch.environment}
    return {name: known[name] for name in (ROOT, ALLOW_MODIFIED) if name in known}


def written(one: Source, recipe: Recipe) -> Stage:
    """The stage that writes a set, with every split that the recipe trains or judges on."""
    given = one.given
    environment, table, suffix = {}, None, ""
    if one.medmnist is not None:
        words = flags({"task": one.medmnist.flag, "out": one.folder, "size": one.size})
        kind, files = "medmnist", []
        environment = medmnist_variables(recipe)
        if one.medmnist.flag == DRAWN.flag or ALLOW_MODIFIED in environment:
            files = [root(environment) / f"{one.medmnist.flag}.npz"]  # any other is known by its published checksum
    else:
        labels = None if given.labels is None else ",".join(given.labels)
        values = {"modality": given.modality, "task": given.name, "labels": labels, "out": one.folder}
        values |= {"val": given.val, "test": given.test, "seed": given.seed, "group_pattern": given.group_pattern}
        images = Path(given.images).absolute()
        words, kind, files = [str(images), *flags(values)], "folder", [images]
        if images.is_file():
            table, suffix = images, _flag(given, "image_suffix") or ""
            files.append(Path(_flag(given, "image_folder") or images.parent).absolute())
    files += files_of(given.flags, ["window_from"])
    duplicates = {"drop_duplicates": given.drop_duplicates, "allow_duplicates": given.allow_duplicates}
    words += [*flags(duplicates), *flags(given.flags)]
    command = Command(("vitask", "data", kind, *words), environment)
    title = f"Data {one.name} written"
    how = {"files": tuple(files), "table": table, "suffix": suffix}
    how |= {"needed": _needed(one, recipe), "bar": "[^%]*:"}
    return Stage(f"data-{one.name}", title, (command,), (one.folder,), **how)


def _needed(one: Source, recipe: Recipe) -> dict[Path, str]:
    """Splits that the recipe trains or judges on, which the images or their shares may lack."""
    needed, trains = {}, recipe.tsm.folder is None
    for split in ("val", "test"):
        judged = split in recipe.evaluate.splits
        if judged or (trains and split == "val"):
            advice = f"give the set such images, or a share of all where they have no splits ({split})"
            leave = judged and not (trains and split == "val")
            needed[one.folder / f"{split}.json"] = advice + f", or leave {split} out of evaluate.splits" * leave
    return needed


def _flag(given: DataSet, name: str) -> str | None:
    """A flag of the set's own, with underscores or hyphens."""
    found = given.flags.get(name, given.flags.get(name.replace("_", "-")))
    return None if found is None else str(found)


def merged(sources: Sequence[Source], folder: Path, *, allow_duplicates: bool) -> Stage:
    """The stage that puts several sets below one folder. `allow_duplicates`: between two sets."""
    words = [*(str(one.folder) for one in sources), *flags({"out": folder})]
    words += flags({"allow_duplicates": allow_duplicates})
    reads = tuple(f"data-{one.name}" for one in sources)
    return Stage("data", "Data sets merged", (Command(("vitask", "data", "merge", *words)),), (folder,), reads)


@dataclass(frozen=True)
class Training:
    """What is trained on: the one data set, or all of them merged.

    Attributes:
        folder: with train.json, val.json, images. reads: names of the stages that write it.
    """

    folder: Path
    reads: tuple[str, ...]


def tsm(recipe: Recipe, data: Training, out: Path, device: str) -> Stage:
    """The stage that trains the task-specific model, jointly on all sets."""
    own = recipe.tsm
    values = {
        "data": data.folder / "train.json",
        "val": data.folder / "val.json",
        "image_folder": data.folder / "images",
        "arch": own.arch,
        "pretrained": own.pretrained,
        "image_size": own.image_size,
        "epochs": own.epochs,
        "batch_size": own.batch_size,
        "lr": own.lr,
        "seed": recipe.seed,
        "device": device,
        "out": out,
    }
    command = Command(("vitask", "tsm", "train", *flags(values), *flags(own.flags)))
    files = [Path(own.pretrained)] if isinstance(own.pretrained, str) and Path(own.pretrained).exists() else []
    files += files_of(own.flags, ["init"])
    return Stage("tsm", "TSM trained", (command,), (out,), data.reads, tuple(files), resumes=True, bar="TSM:")


def features(recipe: Recipe, folder: Path, data: Training, out: Path, device: str, tokens: str) -> Stage:
    """The stage that extracts the TSM's features of the training images."""
    values = {
        "tsm": folder,
        "data": data.folder / "train.json",
        "image_folder": data.folder / "images",
        "tokens": tokens,
        "device": device,
        "out": out,
    }
    command = Command(("vitask", "tsm", "extract", *flags(values)))
    own = recipe.tsm.folder is None
    reads = (*data.reads, *(("tsm",) if own else ()))
    # Finished parts lie beside the output, and the same command goes on with them.
    files = () if own else (folder,)
    return Stage("features", "TSM features extracted", (command,), (out,), reads, files, resumes=True, bar="[^%]*:")
