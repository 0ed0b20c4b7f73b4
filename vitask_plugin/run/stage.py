"""What a plan consists of: stages, each a few commands with the files they read and the files they leave."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """One command line, as a person would type it.

    Attributes:
        words: the program and its arguments.
        environment: variables it needs beside those of the whole run.
        leaves: endings of names: it leaves a new file of each in the stage's outputs, or has failed, whatever its
            status.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """Commands that together make one output.

    Attributes:
        name: of its log and of what is remembered of it. title: for people.
        commands: run in this order.
        outputs: files and folders, all there when it has ended well, and nobody else's.
        reads: names of the stages whose outputs it reads.
        files: files and folders from outside of the run that it reads.
        table: one of the files, a CSV: of the folders only those files count that a cell of it names.
        suffix: what the cells lack of a file's name.
        resumes: the same commands go on from what a killed run left in the outputs, which else is removed first.
        needed: {file in the outputs that later stages read: what to do where the commands have not made it}.
        bar: what stands before the progress bar in its log (a regular expression).
    """

    name: str
    title: str
    commands: tuple[Command, ...]
    outputs: tuple[Path, ...]
    reads: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    table: Path | None = None
    suffix: str = ""
    resumes: bool = False
    needed: Mapping[Path, str] = field(default_factory=dict)
    bar: str = ""


@dataclass(frozen=True)
class Plan:
    """The stages of a run in their order.

    Attributes:
        out: the run's folder, absolute.
        environment: variables of every command.
        at_once: so many stages may run side by side, of which none reads another.
    """

    out: Path
    stages: tuple[Stage, ...]
    environment: Mapping[str, str]
    at_once: int = 1


def flags(values: Mapping[str, object]) -> list[str]:
    """`{name: value}` as words; None is left out, True is the flag alone, False nothing, a list several words."""
    words: list[str] = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += map(str, value) if isinstance(value, list | tuple) else [str(value)]
    return words


def trainer_flags(values: Mapping[str, object]) -> list[str]:
    """`{name: value}` as words in the way of training scripts: underscores, and True and False as values."""
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


def files_of(given: Mapping[str, object], names: Collection[str]) -> list[Path]:
    """The files and folders that some of a recipe's `flags` read, with hyphens in their names or underscores."""
    found = (value for name, value in given.items() if name.replace("-", "_") in names)
    return [Path(str(value)).absolute() for value in found]
