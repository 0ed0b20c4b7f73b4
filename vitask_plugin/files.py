"""Files that nobody finds half written, content hashes, and paths that stay inside their folder."""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vitask_plugin.errors import VITaskError


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@functools.lru_cache(maxsize=16)
def _resolved(folder: str) -> str:
    return os.path.realpath(folder)


def inside(folder: str | Path, relative: str) -> Path:
    """`folder/relative`, refused if its text names something outside of `folder`; links are followed.

    A data file comes from anywhere, so it may not name a path of its own choice. A link below the folder is its owner's
    doing: image folders are often put together from links. Only the text is looked at, so that a million paths are
    cheap; whether there is a file is the caller's question.

    Raises:
        VITaskError: the path is absolute (of POSIX or Windows), an address, empty, no possible file name, or leaves the
            folder by `..`.
    """
    reason = _outside(relative)
    if reason:
        raise VITaskError(f"image path {relative!r} {reason.format(folder=repr(str(folder)))}; use paths below it")
    root = _resolved(os.path.abspath(folder))
    path = os.path.join(root, relative)
    if ".." in relative:
        path = os.path.normpath(path)
        # Behind a link, `..` means the parent of what the link leads to: that is another file than the text says.
        if os.path.realpath(path) != os.path.realpath(os.path.join(root, relative)):
            raise VITaskError(f"image path {relative!r} leaves the image folder {str(folder)!r}; use paths below it")
    return Path(path)


_ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:[/\\]")  # POSIX, a Windows drive or share
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")


def _outside(relative: str) -> str | None:
    """What is wrong with the text of a path below a folder, None = nothing."""
    if not isinstance(relative, str) or not relative.strip():
        return "is empty, and no file of the image folder {folder}"
    if "\0" in relative:
        return "holds a NUL character, so it is no file of the image folder {folder}"
    if _ADDRESS.match(relative):
        return "is an address, not a file of the image folder {folder}"
    if _ABSOLUTE.match(relative):
        return "leaves the image folder {folder}"
    if ".." in relative:
        depth = 0
        for part in re.split(r"[/\\]", relative):
            depth += -1 if part == ".." else part not in ("", ".")
            if depth < 0:
                return "leaves the image folder {folder}"
    try:
        encoded = os.fsencode(relative)
    except UnicodeEncodeError:
        return "is not valid text, so it is no file of the image folder {folder}"
    if len(encoded) > 255 and max(map(len, encoded.split(b"/"))) > 255:
        return "is longer than a file name can be, so it is no file of the image folder {folder}"
    return None


def check_folder(path: str | Path, what: str) -> None:
    """Refuses what is no folder; `what` names it in the error.

    Raises:
        VITaskError: saying whether there is anything.
    """
    if not os.path.isdir(path):
        found = "is a file" if os.path.exists(path) else "does not exist"
        raise VITaskError(f"{what} {str(path)!r} {found}; give a folder")


def make_parent(path: Path) -> None:
    """Makes the folder that `path` is to be written into.

    Raises:
        VITaskError: naming what is in its place, or keeps it from being made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error.filename, error) from None


def check_creatable(path: str | Path) -> None:
    """Refuses a path at which nothing can be made, before any work for it: the nearest folder above it is tried out.

    Permissions alone would not tell: a file system may be read-only or full.

    Raises:
        VITaskError: naming what is in the way.
    """
    absolute = Path(os.path.abspath(path))
    above = next(parent for parent in absolute.parents if os.path.lexists(parent))
    longest = max(absolute.relative_to(above).parts, key=lambda name: len(os.fsencode(name)))
    try:
        os.rmdir(tempfile.mkdtemp(dir=above, prefix=f".{longest}."))
    except OSError as error:
        raise _unwritable(path, above, error) from None


def _unwritable(path: str | Path, place: str | Path, error: OSError) -> VITaskError:
    if os.path.lexists(place) and not os.path.isdir(place):
        reason = f"{str(place)!r} is a file and no folder"
    else:
        reason = f"nothing can be made in {str(place)!r} ({error.strerror})"
    return VITaskError(f"{str(path)!r} cannot be written, for {reason}; choose another path")


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of the file `path`, renamed onto it when the block ends well, removed when it does not."""
    path = Path(path)
    make_parent(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    # mkstemp gives 0600; the finished file gets what open() would have given it.
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """A temporary sibling folder of `path` that becomes `path` when the block ends well and vanishes when it does not.

    An existing `path` is replaced only at the very end; it is untouched if the block fails.
    """
    path = Path(path)
    make_parent(path)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    temporary.chmod(0o755)
    try:
        yield temporary
        replace_directory(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_directory(new: Path, path: Path) -> None:
    """Renames the folder `new` to `path`, in place of what was there."""
    if not path.exists():
        os.replace(new, path)
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old.")) / "old"
    os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old.parent)


def check_replaceable(path: str | Path, own: Sequence[str]) -> None:
    """Refuses an output folder that cannot be made, or that holds anything but an earlier output, which is replaced.

    Every command that writes a folder calls it first.

    Raises:
        VITaskError: see `check_creatable` and `check_contents`.
    """
    check_creatable(path)
    check_contents(path, own)


def check_contents(path: str | Path, own: Sequence[str]) -> None:
    """Refuses an output folder that holds anything but an earlier output.

    Args:
        own: names of all files and folders that the output consists of, the one that identifies it first.

    Raises:
        VITaskError: naming what is in the way.
    """
    path = Path(path)
    if not path.exists():
        return
    found = {entry.name for entry in path.iterdir()} if path.is_dir() else {path.name}
    foreign = sorted(found - set(own)) or (sorted(found) if found and own[0] not in found else [])
    if foreign:
        raise VITaskError(
            f"{str(path)!r} already holds {foreign[0]!r}, which is not an earlier output of this command; "
            "choose another folder"
        )


def digest_of(value: Any) -> str:
    """Hex SHA-256 of anything that is JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: str | Path, value: Any) -> None:
    """`value` as indented UTF-8 JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
