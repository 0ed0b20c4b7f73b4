"""What a model card says, as data: `vitask_card.json` beside the checkpoint, from which the card is written again."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vitask_plugin.data import medmnist
from vitask_plugin.data.instructions import label_sets
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import write_json
from vitask_plugin.formats.json_text import read_json

FACTS_FILE = "vitask_card.json"
UNKNOWN_LICENSE = "unknown: see its source"
Counts = dict[str, int]


@dataclass(frozen=True)
class BaseModel:
    """What was tuned.

    Attributes:
        name: for people: a name of the Hub, or of the folder.
        hub: its name on the Hub, None where that is not known.
        license: as its own card has it, None where it has none.
    """

    name: str
    hub: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class DataSet:
    """One data set of the training.

    Attributes:
        modality: what its images are, None if unknown.
        license: None if unknown.
        counts: {split: {class: images}}; of several labels an image counts for each of its own.
    """

    name: str
    modality: str | None
    license: str | None
    counts: Mapping[str, Counts] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """What one way of using the model reached on one split of one set.

    Attributes:
        model: "with EP", "without EP", or what else was judged beside it. own: whether that is the model of the card.
        figures: {metric: value}, None = not defined. intervals: {metric: [low, high]}, 95%.
        n: images. unmapped: answers that name no label.
    """

    set: str
    split: str
    model: str
    figures: Mapping[str, float | None]
    intervals: Mapping[str, list[float]]
    n: int
    unmapped: int | None
    own: bool = True


@dataclass(frozen=True)
class Facts:
    """What a card says.

    Attributes:
        title: of the card. library: the Hub's word for what loads the checkpoint.
        training: a sentence each. rows: of the judging, if there was one.
    """

    title: str
    library: str
    base: BaseModel
    data: tuple[DataSet, ...]
    training: tuple[str, ...]
    versions: Mapping[str, str]
    rows: tuple[Row, ...] = ()

    def judged(self, rows: Iterable[Row]) -> "Facts":
        return replace(self, rows=tuple(rows))


def write_facts(facts: Facts, folder: str | Path) -> None:
    write_json(Path(folder) / FACTS_FILE, asdict(facts))


def read_facts(folder: str | Path) -> Facts | None:
    """None where there is no such file.

    Raises:
        VITaskError: a file that holds something else.
    """
    path = Path(folder) / FACTS_FILE
    if not path.is_file():
        return None
    found: Any = read_json(path, "facts of the model card")
    try:
        return Facts(
            **{
                **found,
                "base": BaseModel(**found["base"]),
                "data": tuple(DataSet(**one) for one in found["data"]),
                "training": tuple(found["training"]),
                "rows": tuple(Row(**one) for one in found["rows"]),
            }
        )
    except (TypeError, KeyError) as error:
        raise VITaskError(
            f"{str(path)!r} does not hold what a model card says ({error}); remove it, and `vitask card` makes do with "
            "vitask.json"
        ) from None


def license_of(task: str) -> str | None:
    """What the data of a task are published under, if it is one of MedMNIST's."""
    return medmnist.license_of(label_sets()[task]) if task in label_sets() else None


def modality_of(task: str) -> str | None:
    return label_sets()[task].modality if task in label_sets() else None


def class_counts(samples: Iterable[Mapping[str, Any]]) -> dict[str, Counts]:
    """{task: {class: images}} of LLaVA's JSON; samples without a `vitask` block count for nothing."""
    found: dict[str, Counter[int]] = {}
    choices: dict[str, list[str]] = {}
    for sample in samples:
        if "vitask" not in sample:
            continue
        block = sample["vitask"]
        choices.setdefault(block["task"], block["choices"])
        label = block["label"]
        found.setdefault(block["task"], Counter()).update(label if isinstance(label, list) else [label])
    return {task: {name: found[task][index] for index, name in enumerate(names)} for task, names in choices.items()}
