"""Files that nobody finds half written, content hashes, and paths that stay inside their folder."""

import contextlib
import functools
import hashlib
import json
import os
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
def _resolved(folder: str) -> Path:
    return Path(folder).resolve()


def inside(folder: str | Path, relative: str) -> Path:
    """`folder/relative`, refused if it leaves `folder` (absolute, `..`, or a link that points outside).

    Raises:
        VITaskError: if the resolved path is not below `folder`.
    """
    root = _resolved(os.path.abspath(folder))
    path = (root / relative).resolve()
    if not path.is_relative_to(root):
        raise VITaskError(f"image path {relative!r} leaves the image folder {str(folder)!r}; use paths below it")
    return path


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of the file `path`, renamed onto it when the block ends well, removed when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
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
    path.parent.mkdir(parents=True, exist_ok=True)
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
    """Refuses an output folder that holds anything but an earlier output: writing replaces the whole folder.

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


def read_json(path: str | Path, what: str) -> Any:
    """The parsed JSON file `path`; `what` names it in the error.

    Raises:
        VITaskError: if the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise VITaskError(f"{what} {str(path)!r} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise VITaskError(f"{what} {str(path)!r} is not readable JSON ({error}); write it again") from None


def write_json(path: str | Path, value: Any) -> None:
    """`value` as indented UTF-8 JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
