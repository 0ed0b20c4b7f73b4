"""Images that are used later, compared with what training has recorded of its own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from vitask_plugin.data.dataset import LABELS_FILE
from vitask_plugin.data.difference import Difference, Images, difference, flags_for
from vitask_plugin.data.images import say_once
from vitask_plugin.data.names import look
from vitask_plugin.errors import VITaskError

ANYWAY = "give --any-image-size if that is meant"
Resize = Callable[[tuple[int, int]], str | None]  # size in training -> what gives images of it, if the caller can


@dataclass(frozen=True)
class Seen:
    """The images that somebody was trained on, or those of some data.

    Attributes:
        who: opens the sentence ("TSM 1234 was trained"), or names the data.
        images: by task; None = nobody has kept it.
        tasks: {task: its labels}.
    """

    who: str
    images: Images | None
    tasks: Mapping[str, Sequence[str]] = field(default_factory=dict)


def tasks_alike(tasks: Mapping[str, Sequence[str]], task: str, choices: Sequence[str]) -> list[str]:
    """Which of `tasks` {task: its labels} is `task`: the one of its name, or else, as for an external set, those with
    the same labels in any order and spelling that look alike."""
    wanted = looks(choices)
    return [task] if task in tasks else [name for name, names in tasks.items() if looks(names) == wanted]


def looks(choices: Sequence[str]) -> frozenset[str]:
    """A label set without order and spelling: equal for two that look alike."""
    return _looks(tuple(choices))


@lru_cache(maxsize=64)
def _looks(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(map(look, names))


def _nothing(size: tuple[int, int]) -> None:
    return None


def check_prepared(trained: Seen, used: Seen, anyway: str = ANYWAY, resize: Resize = _nothing) -> None:
    """Refuses images of another size than those of training, or prepared in another way.

    Compared is what both sides have a record of; of sizes, those of tasks whose images all have one.

    Args:
        anyway: how to go on all the same.
        resize: the caller's way to the size of training.

    Raises:
        VITaskError: naming both sides.
    """
    for task, name in _pairs(trained, used):
        _say_unknown(trained.who, trained.images[name], used.who, used.images[task], name)
    for name, found in _unlike(trained, used):
        remedy = (found.size and resize(found.size)) or found.remedy
        both = f"{trained.who} on {found.trained} of task {name!r}, those of {used.who} {found.used}"
        raise VITaskError(f"{both}; {remedy}, or {anyway}")


def check_together(tsm: Seen, vlm: Seen, used: Seen, anyway: str) -> None:
    """Refuses a TSM that was trained on images unlike those of the VLM, as far as the tasks of `used` are concerned.

    Where `used` has a record, `check_prepared` of both says the same; this one needs none.

    Raises:
        VITaskError: naming both sides.
    """
    wanted = {name for task, names in used.tasks.items() for name in tasks_alike(vlm.tasks, task, names)}
    images = {task: entry for task, entry in (vlm.images or {}).items() if task in wanted}
    for name, found in _unlike(tsm, Seen(vlm.who, images, vlm.tasks)):
        raise VITaskError(
            f"{tsm.who} on {found.trained} of task {name!r}, and {vlm.who} on those that {found.used}; train both on "
            f"images that were prepared in one way, or {anyway}"
        )


def check_all(trained: Sequence[Seen], used: Seen, anyway: str = ANYWAY, resize: Resize = _nothing) -> None:
    """`check_prepared` of a VLM, which comes first, and of TSMs, and `check_together` of each TSM with the VLM."""
    for one in trained:
        check_prepared(one, used, anyway, resize)
    for tsm in trained[1:]:
        check_together(tsm, trained[0], used, anyway)


def _pairs(trained: Seen, used: Seen) -> list[tuple[str, str]]:
    """(task of `used`, one of `trained` that it is and has a record)."""
    images = trained.images or {}
    return [
        (task, name)
        for task in used.images or {}
        for name in ([task] if task in images else tasks_alike(trained.tasks, task, used.tasks.get(task, ())))
        if name in images
    ]


def _unlike(trained: Seen, used: Seen) -> Iterator[tuple[str, Difference]]:
    """Tasks of `trained` whose images differ; of several with the labels of a task, one that agrees will do."""
    found: dict[str, list[tuple[str, Difference | None]]] = {}
    for task, name in _pairs(trained, used):
        found.setdefault(task, []).append((name, difference(trained.images[name], used.images[task])))
    for differences in found.values():
        if all(one for _, one in differences):
            yield differences[0]


def _say_unknown(who: str, trained: Mapping[str, Any], data: str, used: Mapping[str, Any], task: str) -> None:
    """Where one side alone says that something was done to the pixels."""
    if trained.get("pixels") and "pixels" not in used:
        line = f"{who} on images of task {task!r} that were written with {flags_for(trained['pixels'])}; no "
        line += f"{LABELS_FILE} tells how those of {data} were"
    elif used.get("pixels") and "pixels" not in trained:
        line = f"the images of {data} were written with {flags_for(used['pixels'])}; no record tells how those of task "
        line += f"{task!r} were that {who} on"
    else:
        return
    say_once(f"{line}, so the two are not compared", line)
