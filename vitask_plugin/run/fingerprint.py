"""What a stage's output depends on, in a form that can be compared and explained: settings, files, earlier outputs.

A file is known by its content. That of a large one is read once and then taken to be the same while size and time of
change are.
"""

import csv
import io
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from vitask_plugin.files import digest_of, sha256_file, write_json
from vitask_plugin.formats.json_text import read_json
from vitask_plugin.run.stage import Plan, Stage
from vitask_plugin.run.versions import versions

SMALL = 1 << 16  # bytes: read each time
ABSENT = "absent"
SHOWN = 3  # differences of a sentence
INHERITED = ("ACCELERATE_MIXED_PRECISION",)  # of this process's variables: commands compute in this precision
Fingerprint = dict[str, dict[str, str]]


class Contents:
    """Digests of files and folders, those of large files kept in `cache` from run to run."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self._known: dict[str, list[Any]] = read_json(cache, "digests of files") if cache.is_file() else {}
        self._changed = False

    def of(self, path: Path, *, follow: bool = True, only: Collection[str] | None = None) -> str:
        """The digest of a file, or of a folder: names and contents of all files in it, hidden ones left out.

        Args:
            follow: links to folders are read too; else they count by where they lead.
            only: names below a folder, of which those that are files count; None = all files.
        """
        if not os.path.lexists(path):
            return ABSENT
        if not path.is_dir():
            return self._file(path)
        if only is not None:
            return digest_of([[name, self._file(path / name)] for name in sorted(only) if _is_file(path / name)])
        return digest_of(sorted(self._entries(path, follow)))

    def save(self) -> None:
        """Keeps what was read."""
        if self._changed:
            write_json(self.cache, self._known)
            self._changed = False

    def _entries(self, folder: Path, follow: bool) -> Iterator[list[str]]:
        seen: set[str] = set()
        for place, folders, names in os.walk(folder, followlinks=follow):
            real = os.path.realpath(place)
            # Of a training, checkpoints are the way to its weights.
            skipped = [n for n in folders if n.startswith((".", "checkpoint-", "__pycache__"))]
            folders[:] = [] if real in seen else sorted(set(folders) - set(skipped))
            seen.add(real)
            for name in folders if not follow else ():
                if os.path.islink(os.path.join(place, name)):
                    yield [os.path.relpath(os.path.join(place, name), folder), os.readlink(os.path.join(place, name))]
            for name in names:
                path = Path(place, name)
                if not name.startswith(".") and path.is_file():
                    yield [os.path.relpath(path, folder), self._file(path)]

    def _file(self, path: Path) -> str:
        status = path.stat()
        if status.st_size <= SMALL:
            return sha256_file(path)
        key = os.path.abspath(path)
        known = self._known.get(key)
        if known is None or known[:2] != [status.st_size, status.st_mtime_ns]:
            known = self._known[key] = [status.st_size, status.st_mtime_ns, sha256_file(path)]
            self._changed = True
        return known[2]


def fingerprint(stage: Stage, plan: Plan, outputs: Mapping[str, str], contents: Contents) -> Fingerprint:
    """Everything that the output of a stage depends on.

    Args:
        outputs: {name of a stage: digest of its output}, of all that this one reads.
    """
    common = {name: os.environ[name] for name in INHERITED if name in os.environ}
    common |= {name: value for name, value in plan.environment.items() if name != "PATH"}
    settings = {**versions(), **common}
    for number, command in enumerate(stage.commands, start=1):
        own = f" (command {number})" if len(stage.commands) > 1 else ""
        found = {**settings_of(command.words), **command.environment}
        settings |= {f"{name}{own}": value for name, value in found.items()}
    # A run may be moved as a whole.
    settings = {name: value.replace(str(plan.out), "OUT") for name, value in settings.items()}
    only = None if stage.table is None else names_in(stage.table, stage.suffix)
    files = {str(path): contents.of(path, only=only) for path in stage.files}
    return {"settings": settings, "files": files, "reads": {name: outputs[name] for name in stage.reads}}


def names_in(table: Path, suffix: str) -> set[str]:
    """Every cell of a CSV that may be a file's name, whatever its columns are separated by, and each with `suffix`."""
    text = table.read_text(encoding="utf-8-sig", errors="replace") if table.is_file() else ""
    cells: set[str] = set()
    for delimiter in ",;\t":
        try:
            cells.update(cell.strip() for row in csv.reader(io.StringIO(text), delimiter=delimiter) for cell in row)
        except csv.Error:  # of another delimiter
            continue
    return {name for cell in cells if cell for name in (cell, cell + suffix)}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a cell that is no name of a file
        return False


def settings_of(words: tuple[str, ...]) -> dict[str, str]:
    """A command line as `{flag: value}`, and what stands before the first flag as "command"."""
    found = {"command": ""}
    name = "command"
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            found[name] = value
        else:
            found[name] = f"{found[name]} {word}".strip()
    return found


def difference(before: Fingerprint, now: Fingerprint) -> str:
    """Why a stage runs again, in words: "epochs 5 -> 6"; empty where the two are equal."""
    said = []
    for name in dict.fromkeys([*before["settings"], *now["settings"]]):
        old, new = before["settings"].get(name), now["settings"].get(name)
        if old != new:
            said.append(f"{name} {_word(old)} -> {_word(new)}")
    for kind, sentence in (("files", "{!r} changed"), ("reads", "the output of {} changed")):
        names = dict.fromkeys([*before[kind], *now[kind]])
        said += [sentence.format(name) for name in names if before[kind].get(name) != now[kind].get(name)]
    more = f", and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
    return ", ".join(said[:SHOWN]) + more


def _word(value: str | None) -> str:
    if value is None:
        return "not given"
    return value if value and " " not in value else json.dumps(value)
