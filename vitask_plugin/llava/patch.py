"""`vitask patch DIR`: the few lines that a LLaVA checkout needs, so that its own training scripts know `--vitask`.

A file of patches/ names an upstream version and holds the added lines, each group with the line before which it goes.
Every added line ends with a mark, so that taking exactly these lines out again restores the file byte for byte.
"""

import argparse
import hashlib
import importlib.resources
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_path

MARK = "  # vitask"


@dataclass(frozen=True)
class Insertion:
    """Lines (without the mark and the line ending) that go right before the one line that equals `before`."""

    before: str
    add: tuple[str, ...]


@dataclass(frozen=True)
class Patch:
    """What one upstream version needs. `sha256` is over the file with \\n endings; `needs` are lines it must hold."""

    upstream: str
    versions: tuple[str, ...]
    file: str
    sha256: tuple[str, ...]
    needs: tuple[str, ...]
    insertions: tuple[Insertion, ...]

    def added(self) -> list[str]:
        """The added lines as they stand in a patched file, in order, without line endings."""
        return [line + MARK for insertion in self.insertions for line in insertion.add]


def patches() -> list[Patch]:
    """Every patch that is installed with the package."""
    found = []
    for file in sorted(importlib.resources.files("vitask_plugin.patches").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".json"):
            fields = json.loads(file.read_text(encoding="utf-8"))
            insertions = tuple(Insertion(i["before"], tuple(i["add"])) for i in fields.pop("insertions"))
            lists = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
            found.append(Patch(insertions=insertions, **lists))
    return found


def split(content: bytes) -> list[tuple[str, str]]:
    """`(text, ending)` of each line; the ending is "\\n", "\\r\\n" or, on a last line without one, "".

    Latin-1 maps every byte to one character and back, so the bytes of the untouched lines cannot change.
    """
    lines = []
    for line in content.decode("latin-1").split("\n"):
        text = line.removesuffix("\r")
        lines.append((text, line[len(text) :] + "\n"))
    text, ending = lines.pop()
    return [*lines, (text, ending[:-1])] if text or ending[:-1] else lines


def join(lines: list[tuple[str, str]]) -> bytes:
    """The inverse of `split`."""
    return "".join(text + ending for text, ending in lines).encode("latin-1")


def is_added(text: str) -> bool:
    return text.endswith(MARK)


def without_marked(content: bytes) -> bytes:
    """`content` with every added line taken out: what it was before."""
    return join([line for line in split(content) if not is_added(line[0])])


def identity(content: bytes) -> str:
    """SHA-256 of the content with \\n endings, so that a checkout with \\r\\n counts as the same file."""
    return hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest()


def checkout_version(directory: Path) -> str | None:
    """Version in the checkout's pyproject.toml; None if there is no such file or it is not LLaVA's."""
    try:
        text = (directory / "pyproject.toml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    name = re.search(r'^name\s*=\s*"([^"]+)"', text, re.MULTILINE)
    version = re.search(r'^version\s*=\s*"([^"]+)"', text, re.MULTILINE)
    return version[1] if version and name and name[1] in ("llava", "llava-torch") else None


def choose(directory: Path, original: bytes) -> Patch:
    """The patch for this checkout: by the file's hash, or by the version where the file has local changes.

    Raises:
        VITaskError: if no patch is for this upstream, with the reason.
    """
    known = patches()
    version = checkout_version(directory)
    for patch in known:
        if identity(original) in patch.sha256:
            return patch
    names = ", ".join(name for patch in known for name in patch.versions)
    if version is None:
        raise VITaskError(
            f"{str(directory)!r}: its {known[0].file} is no version that a patch is for (LLaVA {names}), and no "
            "pyproject.toml says which it is; use one of these versions or `python -m vitask_plugin.llava.train`"
        )
    for patch in known:
        if version in patch.versions:
            return patch
    raise VITaskError(
        f"{str(directory)!r} is LLaVA {version}, and there are patches for {names}; check one of these out "
        "or use `python -m vitask_plugin.llava.train`"
    )


def insert(original: bytes, patch: Patch, where: Path) -> bytes:
    """`original` with the patch's lines in place, each with the line ending of its anchor.

    Raises:
        VITaskError: if a line that the patch stands on is missing or is there more than once.
    """
    lines = split(original)
    for anchor in (*patch.needs, *(insertion.before for insertion in patch.insertions)):
        count = sum(text == anchor for text, _ in lines)
        if count != 1:
            raise VITaskError(
                f"{str(where)!r} was changed near a place that the patch needs: the line {anchor!r} is there {count} "
                f"times instead of once; restore {patch.upstream}'s file or use `python -m vitask_plugin.llava.train`"
            )
    added = {insertion.before: insertion.add for insertion in patch.insertions}
    result: list[tuple[str, str]] = []
    for text, ending in lines:
        result += [(line + MARK, ending or "\n") for line in added.get(text, ())]
        result.append((text, ending))
    return join(result)


def read_script(directory: Path) -> tuple[Path, bytes]:
    """Path and content of the checkout's training script.

    Raises:
        VITaskError: if `directory` holds none.
    """
    path = directory / patches()[0].file
    if not path.is_file():
        raise VITaskError(
            f"{str(directory)!r} is no LLaVA checkout: it has no {patches()[0].file}; give the folder that holds llava/"
        )
    return path, path.read_bytes()


def write(path: Path, content: bytes) -> None:
    """`content` in place of the file, whole or not at all, with the file's permissions; a link stays a link."""
    target = path.resolve()
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)
        shutil.copymode(target, temporary)


def apply(directory: str | Path) -> Iterator[str]:
    """Patches a checkout; yields one sentence on what was done. Applied again, it changes nothing.

    Raises:
        VITaskError: if the folder is no LLaVA checkout, of a version without a patch, changed where the lines go, or
            holds lines of another version of this patch.
    """
    directory = Path(directory)
    path, content = read_script(directory)
    marked = [text for text, _ in split(content) if is_added(text)]
    original = without_marked(content)
    patch = choose(directory, original)
    patched = insert(original, patch, path)
    if content == patched:
        yield f"{path} has the lines already; nothing was changed"
        return
    if marked:
        raise VITaskError(
            f"{str(path)!r} holds lines of another version of this patch; run `vitask patch --revert {directory}` first"
        )
    write(path, patched)
    yield f"{path}: {len(patch.added())} lines added for {patch.upstream}; its training scripts now know --vitask"


def revert(directory: str | Path) -> Iterator[str]:
    """Takes the added lines out again, which restores the bytes; yields one sentence on what was done.

    Raises:
        VITaskError: if the folder is no LLaVA checkout.
    """
    path, content = read_script(Path(directory))
    original = without_marked(content)
    if content == original:
        yield f"{path} has no lines of the patch; nothing was changed"
        return
    write(path, original)
    yield f"{path} is as it was before the patch"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vitask patch`."""
    parser.add_argument("directory", metavar="DIR", type=Path, help="LLaVA checkout: the folder that holds llava/")
    parser.add_argument("--revert", action="store_true", help="take the lines out again")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Patches or reverts, and says so."""
    from rich.console import Console

    for sentence in (revert if args.revert else apply)(args.directory):
        Console(soft_wrap=True, highlight=False).print(sentence, markup=False)
