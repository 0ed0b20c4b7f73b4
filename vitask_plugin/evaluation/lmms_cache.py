"""lmms-eval's response cache (`--use_cache`) beside our model: keyed by content, and of use to a run that was killed.

By itself the harness writes answers when all of them are there, and never reads those of a run that did not end.
"""

import functools
import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.caching.response_cache import ResponseCache
from loguru import logger

TOGETHER = 128  # images whose answers are written at one time: what a killed run loses at most


def place(request: Instance) -> tuple[str, int]:
    """Split and document: in this order the questions that several tasks ask about one image come together."""
    return request.args[5], request.args[3]


class ByContent:
    """A model whose answers the cache keeps by what is in its checkpoint, its TSM and its data, as they are made.

    The cache's own key knows names only: a model retrained in the same folder would get the old one's answers. The
    harness asks the cache and not the model, so the first such model to be made changes how the cache is asked.

    Attributes:
        batch_size: requests at a time.
    """

    batch_size: int

    def __init__(self) -> None:
        super().__init__()
        if not hasattr(ResponseCache.execute, "by_content"):
            ResponseCache.execute = _by_content(ResponseCache.execute)

    def announce(self, requests: Iterable[Instance]) -> None:
        """Told all requests, before they come in pieces."""
        raise NotImplementedError


def _by_content(execute: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """The cache's `execute`, which keys the answers of a `ByContent` by its `content`."""

    @functools.wraps(execute)
    def call(cache: ResponseCache, lm: Any, reqtype: str, requests: list[Instance]) -> list[Any]:
        if not isinstance(lm, ByContent):
            return execute(cache, lm, reqtype, requests)
        if reqtype in ("generate_until", "loglikelihood"):
            lm.announce(requests)
        identity = f"{cache.model_fingerprint} {content(lm)}"
        cache._model_fingerprint_hash = hashlib.sha256(identity.encode()).hexdigest()
        _take_over(cache)
        results: list[Any] = [None] * len(requests)
        for piece in _pieces(requests, max(TOGETHER, lm.batch_size)):
            found = execute(cache, lm, reqtype, [requests[number] for number in piece])
            for number, result in zip(piece, found, strict=True):
                results[number] = result
        return results

    call.by_content = True
    return call


def _take_over(cache: ResponseCache) -> None:
    """Copies the answers of runs that did not end into the cache of this one."""
    folders = Path(cache._run_dir).parent.iterdir() if hasattr(cache, "_run_dir") else ()
    unfinished = [folder for folder in folders if not (folder / ".merged").exists() and str(folder) != cache._run_dir]
    for path in (path for folder in unfinished for path in sorted(folder.glob("rank_*.db"))):
        try:
            ResponseCache.merge_shards([str(path)], cache.db_path)
        except sqlite3.DatabaseError as error:
            logger.warning(
                f"the answers in {str(path)!r}, of a run that did not end, are unreadable ({error}); left out"
            )


def _pieces(requests: Sequence[Instance], images: int) -> Iterator[list[int]]:
    """Numbers of the requests about so many images at a time."""
    by_place: dict[tuple[str, int], list[int]] = {}
    for number, request in enumerate(requests):
        by_place.setdefault(place(request), []).append(number)
    groups = [by_place[key] for key in sorted(by_place)]
    for start in range(0, len(groups), images):
        yield [number for group in groups[start : start + images] for number in group]


def content(model: Any) -> str:
    """A hash over names, sizes and times of all files of the model, over which documents it prompts with exemplars, and
    over the checksums of the data of each split.

    Args:
        model: has `folders`, `prompting` and lmms-eval's `task_dict`.
    """
    facts = [
        (str(path), status.st_size, status.st_mtime_ns)
        for folder in model.folders
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (status := path.stat())
    ]
    data = [
        (name, split, str(part.info.download_checksums))
        for name, parts in model.task_dict.items()
        for split, part in parts.items()
    ]
    return hashlib.sha256(repr((facts, model.prompting, sorted(data))).encode()).hexdigest()
