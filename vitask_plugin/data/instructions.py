"""The words: instruction and response of a sample, natural class names, and LLaVA JSON in and out.

Training data and evaluation tasks both take their words from here, so they cannot differ.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from vitask_plugin.data.class_names import IMAGE_TOKEN, MULTI_LABEL, NO_FINDING, check_choices
from vitask_plugin.data.llava_format import SAMPLE
from vitask_plugin.data.names import look, same_names, told_apart
from vitask_plugin.errors import VITaskError
from vitask_plugin.formats.json_list import items, without_collector
from vitask_plugin.formats.shown import short

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


def question_text(value: str) -> str:
    """A human's turn without its image tokens."""
    return value.replace(IMAGE_TOKEN, "").strip()


def answers_of(classes: Sequence[str], *, multi_label: bool) -> list[str]:
    """What label scores are of: each class as an answer; of several labels to an image each alone, and then none."""
    answers = [response(classes, [label] if multi_label else label) for label in range(len(classes))]
    return [*answers, f"{NO_FINDING}."] if multi_label else answers


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


def read_samples(path: str | Path) -> list[dict[str, Any]]:
    """The samples of a LLaVA JSON file, checked.

    Samples without a `vitask` block (general instruction data) and without an image (text only) are welcome. Task
    samples that say the same share their conversation and block, which a million would not fit without: change neither.

    Raises:
        VITaskError: naming file and sample, if the file is not LLaVA's JSON, or if a `vitask` block lacks an
            image, a valid label, or the choices that the other samples of its task have; if the answer names other
            classes than the label, or an image has two labels of one task.
    """
    samples: list[dict[str, Any]] = []
    checked: dict[Hashable, tuple[dict[str, Any], dict[str, Label], Label]] = {}
    tasks: dict[str, Known] = {}
    with without_collector():
        for index, item in enumerate(items(path)):
            same = _same_words(item)
            known = checked.get(same)
            if known is None:
                SAMPLE.check(item, lambda: _where(path, index, item))  # noqa: B023 (called at once)
                if "vitask" not in item:
                    samples.append(item)
                    continue
                known = _shared(item, _where(path, index, item), tasks)
                if same is not None:
                    checked[same] = known
            shared, labels, label = known
            item |= shared
            if labels.setdefault(item["image"], label) is not label:
                _check_label(labels[item["image"]], label, item, _where(path, index, item))
            samples.append(item)
    if not samples:
        raise VITaskError(f"data file {str(path)!r} is not LLaVA's JSON; expected a non-empty list of samples")
    return samples


@dataclass
class Known:
    """A task so far: its choices, whether a sample has several labels, and the label of each image."""

    choices: list[str]
    several: bool
    where: str
    labels: dict[str, Label] = field(default_factory=dict)


def _where(path: str | Path, index: int, item: Any) -> str:
    named = f" (id {short(item['id'])})" if isinstance(item, dict) and "id" in item else ""
    return f"data file {str(path)!r}, sample {index}{named}"


def _check_label(first: Label, label: Label, item: Mapping[str, Any], where: str) -> None:
    """Refuses an image with two labels of one task; those of several classes may be in any order."""
    if (sorted(first) if isinstance(first, list) else first) != (sorted(label) if isinstance(label, list) else label):
        raise VITaskError(
            f"{where}: image {item['image']!r} has the label {label}, and an earlier sample of task "
            f"{item['vitask']['task']!r} gives it {first}; correct one of the two"
        )


def _shared(
    item: dict[str, Any], where: str, tasks: dict[str, Known]
) -> tuple[dict[str, Any], dict[str, Label], Label]:
    """What equal samples of a task have in common, the labels of the images of their task so far, and their label.

    Raises:
        VITaskError: the sample is unlike the earlier ones of its task, or contradicts itself.
    """
    block = item["vitask"]
    task, choices = block["task"], block["choices"]
    if task not in tasks:
        check_choices(choices, where)
        tasks[task] = Known(choices, isinstance(block["label"], list), where.rpartition(", ")[2])
    known = tasks[task]
    if known.choices != choices:
        raise VITaskError(
            f"{where}: task {task!r} has choices {told_apart(choices, known.choices)}, but {known.where} has "
            f"{told_apart(known.choices, choices)}; one task has one list of choices in one order"
        )
    if known.several != isinstance(block["label"], list):
        raise VITaskError(f"{where}: task {task!r} has both single labels (a number) and lists; use one of them")
    answer = next(turn["value"] for turn in item["conversations"][1:] if turn["from"] == "gpt")
    if _names_another(answer, block):
        raise VITaskError(
            f"{where}: the answer is {short(answer)}, but its label means {response(choices, block['label'])!r}; "
            "labels count from 0, so correct one of the two"
        )
    return {"conversations": item["conversations"], "vitask": block}, known.labels, block["label"]


def _same_words(item: Any) -> Hashable | None:
    """Equal for task samples that have everything in common that is checked; None for samples to be checked alone."""
    try:
        if "vitask" not in item:
            return None
        turns, block, image = item["conversations"], item["vitask"], item["image"]
        plain = len(block) == 3 or block.keys() <= {"task", "label", "choices", "group"}
        label = block["label"]
        # By how it is written: 1, 1.0 and true are equal, and two of them no label.
        label = label if type(label) is int else repr(label)
        words = [text for turn in turns for text in (turn["from"], turn["value"], len(turn))]
        same = (len(words), *words, block["task"], label, repr(block.get("group", "")), *block["choices"])
        hash(same)
    except (KeyError, TypeError, AttributeError):
        return None
    plain = plain and words[2::3].count(2) == len(turns)
    return same if plain and isinstance(image, str) and image else None


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
