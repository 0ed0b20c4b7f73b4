"""The words: instruction and response of a sample, natural class names, and LLaVA JSON in and out.

Training data and evaluation tasks both take their words from here, so they cannot differ.
"""

import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vitask_plugin.data.json_list import items, without_collector
from vitask_plugin.data.names import look, same_names, shown, told_apart
from vitask_plugin.data.reserved import IN_NAMES, reserved_in, turn_problem
from vitask_plugin.errors import VITaskError

logger = logging.getLogger(__name__)
IMAGE_TOKEN = "<image>"
NO_FINDING = "no finding"
MULTI_LABEL = "multi-label, binary-class"  # medmnist's own word for it
KINDS = ("multi-class", "binary-class", "ordinal-regression", MULTI_LABEL)
Label = int | list[int]


def kind_of(choices: Sequence[str], *, multi_label: bool, ordinal: bool = False) -> str:
    """`medmnist`'s word for a task of these classes, which metrics go by."""
    if multi_label:
        return MULTI_LABEL
    return "ordinal-regression" if ordinal else "binary-class" if len(choices) == 2 else "multi-class"


@dataclass(frozen=True)
class LabelSet:
    """One classification task in words.

    Attributes:
        flag: name of the data file, as in `medmnist.INFO` ("breastmnist").
        task: name of the task ("medmnist_breast").
        modality: what stands before "image" in the instruction.
        choices: class names in the order of the file's label ids.
        kind: `medmnist`'s word: multi-class, binary-class, ordinal-regression, or
            "multi-label, binary-class".
    """

    flag: str
    task: str
    modality: str
    choices: tuple[str, ...]
    kind: str

    @property
    def multi_label(self) -> bool:
        return self.kind == MULTI_LABEL


# Two tasks never share a modality: an instruction without its label set still says which task is meant.
_MODALITIES = {
    "pathmnist": "colon histology",
    "chestmnist": "chest X-ray",
    "dermamnist": "dermatoscopy",
    "octmnist": "retinal OCT",
    "pneumoniamnist": "pediatric chest X-ray",
    "retinamnist": "retinal fundus",
    "breastmnist": "breast ultrasound",
    "bloodmnist": "blood cell microscopy",
    "tissuemnist": "kidney cortex microscopy",
    "organamnist": "axial abdominal CT",
    "organcmnist": "coronal abdominal CT",
    "organsmnist": "sagittal abdominal CT",
}

# Where `medmnist.INFO` holds a number, an abbreviation, or a comma (which would read as two labels).
_NAMES = {
    # DeepDRiD grades by the International Clinical Diabetic Retinopathy scale (Wilkinson et al., 2003).
    # "Nonproliferative" is left out of grades 1-3: it contains the name of grade 4.
    "retinamnist": {
        0: "no diabetic retinopathy",
        1: "mild diabetic retinopathy",
        2: "moderate diabetic retinopathy",
        3: "severe diabetic retinopathy",
        4: "proliferative diabetic retinopathy",
    },
    "breastmnist": {1: "normal or benign"},
    "chestmnist": {12: "pleural thickening"},  # ChestX-ray14 writes Pleural_Thickening
    "bloodmnist": {3: "immature granulocyte"},
    "tissuemnist": {0: "collecting duct or connecting tubule"},
}
_ORGANS = {"femur-left", "femur-right", "kidney-left", "kidney-right", "lung-left", "lung-right"}

# The drawn data set of `vitask demo`, laid out like a medmnist file.
DRAWN = LabelSet(
    flag="drawn",
    task="vitask_drawn",
    modality="drawn texture",
    choices=("horizontal stripes", "vertical stripes", "rising stripes", "falling stripes"),
    kind="multi-class",
)


def _natural_name(flag: str, index: int, name: str) -> str:
    if index in _NAMES.get(flag, {}):
        return _NAMES[flag][index]
    if name in _ORGANS:
        organ, side = name.split("-")
        return f"{side} {organ}"
    return name.lower()


@lru_cache(maxsize=1)
def label_sets() -> dict[str, LabelSet]:
    """The 12 MedMNIST 2D tasks and the drawn one, by task name."""
    from medmnist.info import INFO

    sets = {DRAWN.task: DRAWN}
    for flag, modality in _MODALITIES.items():
        names = INFO[flag]["label"]
        choices = tuple(_natural_name(flag, index, names[str(index)]) for index in range(len(names)))
        task = "medmnist_" + flag.removesuffix("mnist")
        sets[task] = LabelSet(flag, task, modality, choices, INFO[flag]["task"])
    return sets


def label_set(name: str) -> LabelSet:
    """The label set of a task by any of its names: `breastmnist`, `breast`, `medmnist_breast`.

    Raises:
        VITaskError: if there is none, with the names there are.
    """
    for known in label_sets().values():
        if name in (known.flag, known.task, known.flag.removesuffix("mnist")):
            return known
    names = ", ".join(sorted(known.flag for known in label_sets().values()))
    raise VITaskError(f"data set {name!r} is unknown; choose one of {names}")


def instruction(modality: str, choices: Sequence[str] | None, *, multi_label: bool = False) -> str:
    """The paper's instruction; without `choices`, its incomplete form (no label set).

    Args:
        multi_label: also list "no finding", which is then one of the possible answers.
    """
    text = f"Analyze the given {modality} image."
    if choices is None:
        return text
    listed = [*choices, NO_FINDING] if multi_label else choices
    return f"{text} The possible diagnoses are: {', '.join(listed)}."


def response(choices: Sequence[str], label: Label) -> str:
    """The answer `{label}.`; several labels are joined by ", ", and none of them is "no finding."."""
    if isinstance(label, int):
        return f"{choices[label]}."
    return ", ".join(choices[index] for index in label) + "." if label else f"{NO_FINDING}."


def sample(
    *,
    identifier: str,
    image: str,
    modality: str,
    task: str,
    choices: Sequence[str],
    label: Label,
    complete: bool = True,
    group: str | None = None,
    source: str | None = None,
) -> dict[str, Any]:
    """One sample of LLaVA's JSON with its `vitask` block.

    Args:
        image: path relative to the image folder.
        label: class index, or the sorted class indices of a multi-label sample.
        complete: whether the instruction lists the choices.
        group: what the image shares with others that have to stay in its split (patient, lesion, slide).
        source: the file that the image was made of, as its owner calls it.
    """
    question = instruction(modality, choices if complete else None, multi_label=isinstance(label, list))
    return {
        "id": identifier,
        "image": image,
        # Beside the block, which samples of one label share once they are read.
        **({} if source is None else {"source": source}),
        "conversations": [
            {"from": "human", "value": f"{IMAGE_TOKEN}\n{question}"},
            {"from": "gpt", "value": response(choices, label)},
        ],
        "vitask": {
            "task": task,
            "label": label,
            "choices": list(choices),
            **({} if group is None else {"group": group}),
        },
    }


def check_choices(choices: Sequence[str], where: str) -> None:
    """Refuses class names that a list in a sentence cannot hold.

    Raises:
        VITaskError: fewer than two names, an empty or repeated one, two that look alike, one without a letter or digit,
            or one with a comma, a line break, a full stop at its end, spaces around it, or a string that separates the
            turns of a conversation; `where` opens the sentence.
    """
    if len(choices) < 2:
        raise VITaskError(f"{where}: {len(choices)} class(es) {list(choices)!r}; at least two are needed")
    seen: dict[str, str] = {}
    for position, name in enumerate(choices):
        if not isinstance(name, str) or not name or name != name.strip():
            raise VITaskError(f"{where}: class name {name!r} is not a plain, non-empty text; rename it")
        if not any(map(str.isalnum, name)):
            raise VITaskError(
                f"{where}: class name {name!r} holds no letter or digit; an answer with it could not be read back, so "
                "rename it"
            )
        if any(mark in name for mark in (",", "\n", "\r", IMAGE_TOKEN)) or name.endswith("."):
            raise VITaskError(
                f"{where}: class name {name!r} holds a comma, a line break or {IMAGE_TOKEN}, or ends in a full "
                "stop; an answer with it could not be read back, so rename it"
            )
        found = reserved_in(name, IN_NAMES)
        if found is not None:
            raise VITaskError(
                f"{where}: class name {name!r} holds {found!r}, which separates the turns of a conversation or is a "
                "special token; rename it"
            )
        other = seen.setdefault(look(name), name)
        if len(seen) != position + 1:
            alike = "" if other == name else f", the other time as {shown(other)}, which looks the same"
            raise VITaskError(
                f"{where}: class name {shown(name)} is there twice{alike}; rename one, or write them alike"
            )
        if look(name) == NO_FINDING:
            raise VITaskError(f"{where}: class name {name!r} is the answer for 'no class applies'; rename it")


def check_task(task: str) -> None:
    """Refuses a name of a task that a line of a log cannot show.

    Raises:
        VITaskError: it is blank, or holds what is not seen.
    """
    if not task.strip() or not task.isprintable():
        raise VITaskError(f"task {task!r} is no name that can be shown; give one of letters, digits and '_'")


def check_modality(modality: str) -> None:
    """Refuses words for the images that an instruction cannot hold.

    Raises:
        VITaskError: they are empty, hold a line break, or a string that separates the turns of a conversation.
    """
    found = reserved_in(modality, (*IN_NAMES, IMAGE_TOKEN, "\n", "\r"))
    if not modality.strip() or found is not None:
        wrong = "is empty" if found is None else f"holds {found!r}, which a question cannot hold as text"
        raise VITaskError(f"modality {modality!r} {wrong}; say what the images are, as in 'brain MRI'")


def read_samples(path: str | Path) -> list[dict[str, Any]]:
    """The samples of a LLaVA JSON file, checked.

    Samples without a `vitask` block (general instruction data) and without an image (text only) are welcome. Task
    samples that say the same share their conversation and block, which a million would not fit without: change neither.

    Raises:
        VITaskError: naming file and sample, if the file is not LLaVA's JSON, or if a `vitask` block lacks an
            image, a valid label, or the choices that the other samples of its task have.
    """
    samples: list[dict[str, Any]] = []
    checked: dict[Hashable, dict[str, Any]] = {}
    tasks: dict[str, tuple[list[str], bool, int]] = {}
    contrary: list[int] = []  # one of each kind of sample
    with without_collector():
        for index, item in enumerate(items(path)):
            same = _same_words(item)
            if same in checked:
                item |= checked[same]
            else:
                _check_sample(item, index, path, tasks)
                if "vitask" in item and _names_another(_answer(item), item["vitask"]):
                    contrary.append(index)
                if same is not None:
                    checked[same] = {"conversations": item["conversations"], "vitask": item["vitask"]}
            samples.append(item)
    if not samples:
        raise VITaskError(f"data file {str(path)!r} is not LLaVA's JSON; expected a non-empty list of samples")
    if contrary:
        first = samples[contrary[0]]
        logger.warning(
            "data file %r, sample %d (id %r): the answer is %r, but its label means %r, and %d more kind(s) of sample "
            "are like it; labels count from 0, so correct one of the two if both are about the same question",
            *(str(path), contrary[0], first.get("id"), _answer(first)),
            *(response(first["vitask"]["choices"], first["vitask"]["label"]), len(contrary) - 1),
        )
    return samples


def _check_sample(item: Any, index: int, path: str | Path, tasks: dict[str, tuple[list[str], bool, int]]) -> None:
    """`tasks`: choices, several labels?, first sample of each task so far."""
    where = f"data file {str(path)!r}, sample {index}"
    if not isinstance(item, dict):
        raise VITaskError(f"{where}: not LLaVA's JSON; expected an object, found {type(item).__name__}")
    if "id" in item:
        where += f" (id {item['id']!r})"
    _check_conversations(item, where)
    if "vitask" not in item:
        return
    _check_block(item, where, tasks)
    block = item["vitask"]
    known = tasks.setdefault(block["task"], (block["choices"], isinstance(block["label"], list), index))
    if known[0] != block["choices"]:
        raise VITaskError(
            f"{where}: task {block['task']!r} has choices {told_apart(block['choices'], known[0])}, but sample "
            f"{known[2]} has {told_apart(known[0], block['choices'])}; one task has one list of choices in one order"
        )
    if known[1] != isinstance(block["label"], list):
        raise VITaskError(
            f"{where}: task {block['task']!r} has both single labels (a number) and lists; use one of them"
        )


def _same_words(item: Any) -> Hashable | None:
    """Equal for task samples that have everything in common that is checked; None for samples to be checked alone."""
    try:
        turns, block, image = item["conversations"], item["vitask"], item["image"]
        plain = block.keys() <= {"task", "label", "choices", "group"} and all(
            turn.keys() == {"from", "value"} for turn in turns
        )
        said = tuple((turn["from"], turn["value"]) for turn in turns)
        # By how it is written: 1, 1.0 and true are equal, and two of them no label.
        same = said, block["task"], repr(block["label"]), tuple(block["choices"]), repr(block.get("group", ""))
        hash(same)
    except (KeyError, TypeError, AttributeError):
        return None
    return same if plain and isinstance(image, str) and image else None


def _check_conversations(item: Mapping[str, Any], where: str) -> None:
    turns = item.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise VITaskError(f"{where}: no 'conversations' list; this is not LLaVA's JSON")
    image = item.get("image")
    if "image" in item and (not isinstance(image, str) or not image):
        raise VITaskError(f"{where}: 'image' is {image!r}; expected one path relative to the image folder")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise VITaskError(f"{where}: turn {number} has no text in 'value'; this is not LLaVA's JSON")
        if turn.get("from") not in ("human", "gpt"):
            raise VITaskError(f"{where}: turn {number} is from {turn.get('from')!r}, not 'human' or 'gpt'")
        if number and turn["from"] == turns[number - 1]["from"]:
            raise VITaskError(
                f"{where}: turns {number - 1} and {number} are both from {turn['from']!r}; they alternate"
            )
        if turn["from"] == "gpt" and IMAGE_TOKEN in turn["value"]:
            raise VITaskError(f"{where}: turn {number}, an answer, holds {IMAGE_TOKEN}; it belongs in a question")
    if all(turn["from"] != "gpt" for turn in turns[1:]):
        raise VITaskError(f"{where}: no answer from 'gpt' to a question; there is nothing to learn")
    tokens = sum(turn["value"].count(IMAGE_TOKEN) for turn in turns)
    if tokens and image is None:
        raise VITaskError(f"{where}: holds {IMAGE_TOKEN} but has no 'image'; add its path or remove {IMAGE_TOKEN}")
    if tokens > 1:
        raise VITaskError(f"{where}: holds {tokens} {IMAGE_TOKEN} but one image; keep one")


def _check_block(item: Mapping[str, Any], where: str, tasks: Mapping[str, tuple[list[str], bool, int]]) -> None:
    block = item["vitask"]
    if not isinstance(block, dict) or not isinstance(block.get("task"), str) or not block["task"].strip():
        raise VITaskError(f"{where}: its 'vitask' block names no 'task'")
    if "image" not in item:
        raise VITaskError(f"{where}: belongs to task {block['task']!r} but has no 'image'; add its path")
    if IMAGE_TOKEN not in item["conversations"][0]["value"]:
        raise VITaskError(f"{where}: belongs to task {block['task']!r} but turn 0 has no {IMAGE_TOKEN}; put it there")
    choices = block.get("choices")
    if not isinstance(choices, list):
        raise VITaskError(f"{where}: its 'vitask' block has no list of 'choices'")
    if block["task"] not in tasks or tasks[block["task"]][0] != choices:
        check_choices(choices, where)
    label = block.get("label")
    indices = label if isinstance(label, list) else [label]
    for index in indices:
        if type(index) is not int or not 0 <= index < len(choices):
            raise VITaskError(f"{where}: label {index!r} is not the index of a choice (0 to {len(choices) - 1})")
    if len(set(indices)) != len(indices):
        raise VITaskError(f"{where}: label {label!r} names a class twice")
    if not isinstance(block.get("group", ""), str):
        raise VITaskError(f"{where}: its 'group' is {block['group']!r}; expected a text")
    problem = turn_problem(item["conversations"])
    if problem is not None:
        raise VITaskError(f"{where}: {problem}")


def _answer(item: Mapping[str, Any]) -> str:
    return next(turn["value"] for turn in item["conversations"][1:] if turn["from"] == "gpt")


def _names_another(answer: str, block: Mapping[str, Any]) -> bool:
    """Whether an answer names classes, and nothing else, that are not those of its label; own words may be any."""
    choices, label = block["choices"], block["label"]
    said, names = answer.strip().removesuffix("."), {look(name): index for index, name in enumerate(choices)}
    if isinstance(label, list) and look(said) == NO_FINDING:
        return bool(label)
    found = [names.get(look(part)) for part in said.split(",")]
    return None not in found and set(found) != set(label if isinstance(label, list) else [label])


def tasks_of(samples: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`{task: {"choices": [str], "multi_label": bool}}` of the samples with a `vitask` block, as they appear.

    Raises:
        VITaskError: if a task comes with two lists of choices (for instance from two files).
    """
    tasks: dict[str, dict[str, Any]] = {}
    for item in samples:
        if "vitask" not in item:
            continue
        block = item["vitask"]
        found = {"choices": list(block["choices"]), "multi_label": isinstance(block["label"], list)}
        known = tasks.setdefault(block["task"], found)
        if not same_task(known, found):
            raise VITaskError(
                f"task {block['task']!r} comes with two different label sets, {known!r} and {found!r} "
                f"(sample {item.get('id')!r}); one task has one list of choices in one order"
            )
    return tasks


def same_task(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether two entries of `tasks_of` have the same labels, but for what cannot be seen in their names."""
    return left["multi_label"] == right["multi_label"] and same_names(left["choices"], right["choices"])


def require_two_classes(samples: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Refuses training samples of a task that all have one answer.

    Raises:
        VITaskError: naming the file, the task and the one class.
    """
    answers: dict[str, set[str]] = {}
    for item in samples:
        if "vitask" in item:
            block = item["vitask"]
            answers.setdefault(block["task"], set()).add(response(block["choices"], block["label"]))
    for task, found in answers.items():
        if len(found) == 1:
            raise VITaskError(
                f"data file {str(path)!r}: every sample of task {task!r} has the answer {found.pop()!r}, so there "
                "is nothing to tell apart and no negative for CRT; add samples of another class"
            )
