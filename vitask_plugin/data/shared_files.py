"""Image files of two lists that hold the same bytes."""

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from vitask_plugin.files import sha256_file


def shared_files(training: Iterable[Path], validation: Iterable[Path]) -> list[tuple[Path, Path]]:
    """(validation, training) file of each validation file whose bytes a training file has too.

    Only files of one size are read.
    """
    known: dict[int, dict[str, Path]] = defaultdict(dict)  # size -> real path -> path
    for path in training:
        known[path.stat().st_size].setdefault(os.path.realpath(path), path)
    hashes: dict[int, dict[str, Path]] = {}
    found = []
    paths = tqdm(dict.fromkeys(validation), "Comparing images", leave=False, unit="image", disable=None)
    for path in paths:
        size = path.stat().st_size
        if size not in known:
            continue
        other = known[size].get(os.path.realpath(path))
        if other is None:
            if size not in hashes:
                hashes[size] = {_hash(candidate): candidate for candidate in known[size].values()}
            other = hashes[size].get(_hash(path))
        if other is not None:
            found.append((path, other))
    return found


def _hash(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError:  # named when it is to be trained on
        return str(path)
