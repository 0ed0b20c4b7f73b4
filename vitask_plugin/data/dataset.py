"""Labelled pictures in, a checked data set on disk out: images, one LLaVA JSON per split, and the label set.

DIR/images/{train,val,test}/...   DIR/{train,val,test}.json   DIR/labels.json
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from vitask_plugin.data.images import pixel_hash, to_rgb
from vitask_plugin.data.instructions import KINDS, LabelSet, check_choices, check_modality, response, sample
from vitask_plugin.data.levels import Levels
from vitask_plugin.data.near_duplicates import NearDuplicates
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_directory, check_replaceable, read_json, write_json

logger = logging.getLogger(__name__)
SPLITS = ("train", "val", "test")
LABELS_FILE = "labels.json"
SHOWN_PAIRS = 3  # of nearly the same pictures, in the log
OUTPUT_FILES = (LABELS_FILE, "images", *(f"{split}.json" for split in SPLITS))


@dataclass(frozen=True)
class Picture:
    """One labelled image.

    Attributes:
        name: where it comes from, for messages.
        split: train, val or test.
        stem: name of the written file, without suffix; unique in its split.
        label: class index, or the sorted class indices of a multi-label image.
        image: the picture itself, None once it is written.
        group: what it shares with others (patient, lesion, slide), None = nothing that is known.
        jpeg: the bytes of its file, where they are to be written as they are; None = as PNG.
    """

    name: str
    split: str
    stem: str
    label: int | list[int]
    image: Image.Image | None
    group: str | None = None
    jpeg: bytes | None = None


Pair = tuple[Picture, Picture]


@dataclass
class _Duplicates:
    """The same picture, or nearly the same, in two splits: a test that is no test. And the same picture under two
    labels, one of which is wrong."""

    # By pixel hash, without the image: the first of each label in each split.
    known: dict[str, list[Picture]] = field(default_factory=dict)
    repeated: int = 0  # images that are there again, in the same split with the same label
    contradictions: list[Pair] = field(default_factory=list)
    found: list[Pair] = field(default_factory=list)
    seen: list[Picture] = field(default_factory=list)  # of those that near ones are looked for among
    near: NearDuplicates = field(default_factory=NearDuplicates)

    def see(self, picture: Picture, image: Image.Image) -> None:
        light = replace(picture, image=None, jpeg=None)
        known = self.known.setdefault(pixel_hash(image), [])
        self._compare(light, known)
        if known[0].split != picture.split:
            self.found.append((known[0], light))
        else:
            self.near.see(len(self.seen), picture.split, image)
            self.seen.append(light)

    def _compare(self, light: Picture, known: list[Picture]) -> None:
        own = [other for other in known if other.split == light.split]
        contrary = [other for other in (*own, *known) if other.label != light.label]
        again = any(other.label == light.label for other in own)
        if contrary:
            self.contradictions.append((contrary[0], light))
        elif again:
            self.repeated += 1
        if not again:
            known.append(light)

    def say_repeated(self, choices: Sequence[str]) -> None:
        """Warns about pictures with two labels; those that are only there twice are counted."""
        if self.contradictions:
            first, second = (_described(picture, choices) for picture in self.contradictions[0])
            more = ", ..." if len(self.contradictions) > 1 else ""
            logger.warning(
                "%d image(s) show exactly what another one shows and have another label, so one of the two is wrong: "
                "%s and %s%s; all pairs are in %s",
                *(len(self.contradictions), first, second, more, LABELS_FILE),
            )
        if self.repeated:
            logger.info("%d image(s) are in their split more than once, with the same label", self.repeated)

    def sentence(self, choices: Sequence[str]) -> str:
        first, second = (_described(picture, choices) for picture in self.found[0])
        more = f", and {len(self.found) - 1} more are like it" if len(self.found) > 1 else ""
        return f"the same image is in {first} and in {second}{more}"

    def near_pairs(self, choices: Sequence[str]) -> list[Pair]:
        """Pairs of nearly the same picture in two splits, and a warning about them."""
        pairs = [(self.seen[first], self.seen[second]) for first, second in self.near.pairs(SPLITS)]
        flat = f" ({self.near.flat} images of nearly one colour were not compared)" if self.near.flat else ""
        if pairs:
            shown = "; ".join(f"{_described(a, choices)} and {_described(b, choices)}" for a, b in pairs[:SHOWN_PAIRS])
            logger.warning(
                "%d image(s) show nearly the same as one of another split%s, which makes a test easier than it should "
                "be: %s%s; all pairs are in %s; where they are of one patient, --group keeps them together",
                *(len(pairs), flat, shown, ", ..." if len(pairs) > SHOWN_PAIRS else "", LABELS_FILE),
            )
        elif flat:
            logger.info("no two splits show nearly the same image%s", flat)
        return pairs


def _described(picture: Picture, choices: Sequence[str]) -> str:
    group = "" if picture.group is None else f", group {picture.group!r}"
    return f"{picture.split} ({picture.name}, labelled {response(choices, picture.label)[:-1]!r}{group})"


def write_dataset(
    output: str | Path,
    labels: LabelSet,
    pictures: Iterable[Picture],
    *,
    complete: bool = True,
    total: int | None = None,
    allow_duplicates: bool = False,
    pixels: Mapping[str, Any] | None = None,
    file: str | None = None,
) -> dict[str, int]:
    """Writes the data set; an older one in `output` is replaced at the end.

    Args:
        complete: whether the instructions list the label set.
        total: number of pictures, for the progress bar.
        allow_duplicates: go on if a picture is in two splits; the pairs are kept in `labels.json`. Pairs of nearly the
            same picture, and of the same picture with two labels, are kept there too, and warned about, in any case.
        pixels: what was done to the pixels, kept in `labels.json` under this name; None = nothing.
        file: name of the published data file whose rows these are, kept there too, so that results on both can be
            compared; None = none.

    Returns:
        Number of images per split that has any.

    Raises:
        VITaskError: one class only, a class without a training image (unless all are for evaluation), a picture in
            two splits, or nothing to see in any picture. Nothing is left behind.
    """
    check_replaceable(output, OUTPUT_FILES)
    check_choices(labels.choices, f"data set {labels.task!r}")
    check_modality(labels.modality)
    duplicates, levels = _Duplicates(), Levels()
    samples: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    with atomic_directory(output) as directory:
        for picture in tqdm(pictures, desc=labels.task, total=total, unit="image", disable=None):
            seen = to_rgb(picture.image)
            duplicates.see(picture, seen)
            levels.see(seen, picture.name)
            path = _write(picture, directory / "images")
            samples[picture.split].append(
                sample(
                    identifier=f"{labels.task}-{picture.split}-{picture.stem}",
                    image=path,
                    modality=labels.modality,
                    task=labels.task,
                    choices=labels.choices,
                    label=picture.label,
                    complete=complete,
                    group=picture.group,
                )
            )
        levels.check(f"data set {labels.task!r}")
        _check_classes(labels, samples)
        if duplicates.found:
            sentence = duplicates.sentence(labels.choices)
            if not allow_duplicates:
                raise VITaskError(f"{sentence}; remove one of each pair, or go on with --allow-duplicates")
            logger.warning("%s", sentence)
        duplicates.say_repeated(labels.choices)
        filled = {split: rows for split, rows in samples.items() if rows}
        for split, rows in filled.items():
            write_json(directory / f"{split}.json", rows)
        record = _labels_record(labels, duplicates)
        published = {} if file is None else {"file": file}
        write_json(directory / LABELS_FILE, record | {"pixels": pixels or {}} | published)
    return {split: len(rows) for split, rows in filled.items()}


def _write(picture: Picture, folder: Path) -> str:
    """Writes the image; returns its path in the folder."""
    path = f"{picture.split}/{picture.stem}.{'jpg' if picture.jpeg else 'png'}"
    (folder / picture.split).mkdir(parents=True, exist_ok=True)
    if picture.jpeg:
        (folder / path).write_bytes(picture.jpeg)
    else:
        picture.image.save(folder / path)
    return path


def _check_classes(labels: LabelSet, samples: dict[str, list[dict[str, Any]]]) -> None:
    if not samples["train"]:
        return
    present: set[int] = set()
    for row in samples["train"]:
        label = row["vitask"]["label"]
        present.update(label if isinstance(label, list) else [label])
    empty = [name for index, name in enumerate(labels.choices) if index not in present]
    if empty:
        others = sum(
            labels.choices.index(empty[0]) in (label if isinstance(label, list) else [label])
            for split in ("val", "test")
            for label in (row["vitask"]["label"] for row in samples[split])
        )
        elsewhere = f" ({others} in val and test)" if others else ""
        raise VITaskError(
            f"data set {labels.task!r}: class {empty[0]!r} is empty, it has no training image{elsewhere}; "
            "add images of it or leave the class out"
        )


def _labels_record(labels: LabelSet, duplicates: _Duplicates) -> dict[str, Any]:
    record: dict[str, Any] = {
        "task": labels.task,
        "choices": list(labels.choices),
        "modality": labels.modality,
        "type": labels.kind,
    }
    pairs = {"duplicates": duplicates.found, "near_duplicates": duplicates.near_pairs(labels.choices)}
    for key, found in pairs.items():
        if found:
            record[key] = [{picture.split: picture.name for picture in pair} for pair in found]
    if duplicates.contradictions:
        record["contradictions"] = [
            [
                {"split": picture.split, "name": picture.name, "answer": response(labels.choices, picture.label)}
                for picture in pair
            ]
            for pair in duplicates.contradictions
        ]
    return record


def read_labels(folder: str | Path, what: str = "label set") -> dict[str, Any]:
    """The label set in the folder of a data set, with task, choices, modality and type.

    Args:
        what: names it in an error.

    Raises:
        VITaskError: absent, or not as `write_dataset` writes it.
    """
    path = Path(folder) / LABELS_FILE
    labels = read_json(path, what)
    if not isinstance(labels, dict) or not {"task", "choices", "modality", "type"} <= labels.keys():
        raise VITaskError(f"{str(path)!r} is no label set; write the folder with `vitask data folder`")
    if labels["type"] not in KINDS or not isinstance(labels["choices"], list):
        raise VITaskError(
            f"{str(path)!r}: the type is {labels['type']!r} and the choices are {labels['choices']!r}; expected one of "
            f"{', '.join(map(repr, KINDS))} and a list of names, so write the folder with `vitask data folder`"
        )
    check_choices(labels["choices"], repr(str(path)))
    check_modality(str(labels["modality"]))
    return labels


def label_set_in(folder: str | Path) -> LabelSet:
    """The same as one task in words."""
    found = read_labels(folder)
    return LabelSet(found["task"], found["task"], found["modality"], tuple(found["choices"]), found["type"])


def summary(counts: dict[str, int], labels: LabelSet, output: str | Path) -> str:
    """One line on what was written."""
    images = ", ".join(f"{count} {split}" for split, count in counts.items())
    return f"{labels.task}: {images} images of {len(labels.choices)} classes in {output}"
