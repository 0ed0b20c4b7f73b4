"""Labelled pictures in, a checked data set on disk out: images, one LLaVA JSON per split, and the label set.

DIR/images/{train,val,test}/...   DIR/{train,val,test}.json   DIR/labels.json
"""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from vitask_plugin.data.class_names import check_choices, check_modality
from vitask_plugin.data.duplicate_list import DUPLICATES_FILE, NEAR, SAME, Place, write_pairs
from vitask_plugin.data.images import pixel_hash, to_rgb
from vitask_plugin.data.instructions import LabelSet, response, sample
from vitask_plugin.data.label_file import LABELS_FILE, read_labels
from vitask_plugin.data.levels import Levels
from vitask_plugin.data.near_duplicates import NearDuplicates
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_directory, check_replaceable, write_json

logger = logging.getLogger(__name__)
SPLITS = ("train", "val", "test")
SHOWN_PAIRS = 3  # of nearly the same pictures, in the log
OUTPUT_FILES = (LABELS_FILE, "images", *(f"{split}.json" for split in SPLITS), DUPLICATES_FILE)


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
        source: what its owner calls it, for the sample; None = nothing that is known.
    """

    name: str
    split: str
    stem: str
    label: int | list[int]
    image: Image.Image | None
    group: str | None = None
    jpeg: bytes | None = None
    source: str | None = None


Pair = tuple[Picture, Picture]


@dataclass
class _Duplicates:
    """The same picture, or nearly the same, in two splits: a test that is no test. And the same picture under two
    labels, one of which is wrong."""

    # By pixel hash, without the image: the first of each label in each split.
    known: dict[str, list[Picture]] = field(default_factory=dict)
    repeats: dict[str, list[Picture]] = field(
        default_factory=dict
    )  # there again, in the same split with the same label
    contradictions: list[Pair] = field(default_factory=list)
    found: list[Pair] = field(default_factory=list)
    seen: list[Picture] = field(default_factory=list)  # of those that near ones are looked for among
    near: NearDuplicates = field(default_factory=NearDuplicates)

    def see(self, picture: Picture, image: Image.Image) -> None:
        light = replace(picture, image=None, jpeg=None)
        key = pixel_hash(image)
        known = self.known.setdefault(key, [])
        self._compare(light, known, key)
        if known[0].split != picture.split:
            self.found.append((known[0], light))
        else:
            self.near.see(len(self.seen), picture.split, image)
            self.seen.append(light)

    def _compare(self, light: Picture, known: list[Picture], key: str) -> None:
        own = [other for other in known if other.split == light.split]
        contrary = [other for other in (*own, *known) if other.label != light.label]
        again = any(other.label == light.label for other in own)
        if contrary:
            self.contradictions.append((contrary[0], light))
        if again:
            self.repeats.setdefault(key, []).append(light)
        else:
            known.append(light)

    def groups(self) -> Iterator[list[Picture]]:
        """All copies of each picture that is there more than once."""
        for key, known in self.known.items():
            copies = [*known, *self.repeats.get(key, ())]
            if len(copies) > 1:
                yield copies

    def across(self) -> list[Picture]:
        """Copies that go if each picture is to be in one split: those in train, of val and test those in val."""
        found = []
        for copies in self.groups():
            stays = max((picture.split for picture in copies), key=SPLITS.index)
            found += [picture for picture in copies if picture.split != stays]
        return found

    def write(self, path: Path, near: Sequence[Pair], choices: Sequence[str], dropped: Collection[Picture] = ()) -> int:
        """The whole list of pairs; returns how many there are."""
        gone = {(picture.split, picture.stem) for picture in dropped}

        def place(picture: Picture) -> Place:
            label = response(choices, picture.label)[:-1]
            return Place(picture.split, picture.name, label, (picture.split, picture.stem) in gone)

        same = [(SAME, place(copies[0]), place(other)) for copies in self.groups() for other in copies[1:]]
        return write_pairs(path, [*same, *((NEAR, place(one), place(other)) for one, other in near)])

    def say_repeated(self, choices: Sequence[str]) -> None:
        """Warns about pictures with two labels; those that are only there twice are counted."""
        if self.contradictions:
            first, second = (_described(picture, choices) for picture in self.contradictions[0])
            more = ", ..." if len(self.contradictions) > 1 else ""
            logger.warning(
                "%d image(s) show exactly what another one shows and have another label, so one of the two is wrong: "
                "%s and %s%s; all pairs are in %s",
                *(len(self.contradictions), first, second, more, DUPLICATES_FILE),
            )
        if repeated := sum(map(len, self.repeats.values())):
            logger.info("%d image(s) are in their split more than once, with the same label", repeated)

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
                *(len(pairs), flat, shown, ", ..." if len(pairs) > SHOWN_PAIRS else "", DUPLICATES_FILE),
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
    drop_duplicates: bool = False,
    pixels: Mapping[str, Any] | None = None,
    file: str | None = None,
) -> dict[str, int]:
    """Writes the data set; an older one in `output` is replaced at the end.

    Args:
        complete: whether the instructions list the label set.
        total: number of pictures, for the progress bar.
        allow_duplicates: go on if a picture is in two splits; the pairs are kept in `labels.json`. Pairs of nearly the
            same picture, and of the same picture with two labels, are kept there too, and warned about, in any case.
            `duplicates.csv` lists all pairs.
        drop_duplicates: of a picture in two splits leave out the copies in train, or those in val of one in test, so
            that what is judged on stays as it is.
        pixels: what was done to the pixels, kept in `labels.json` under this name; None = nothing.
        file: name of the published data file whose rows these are, kept there too, so that results on both can be
            compared; None = none.

    Returns:
        Number of images per split that has any.

    Raises:
        VITaskError: one class only, a class without a training image (unless all are for evaluation), a picture in
            two splits (all pairs are then in a CSV file beside `output`), or nothing to see in any picture. Nothing
            else is left behind.
    """
    if allow_duplicates and drop_duplicates:
        raise VITaskError("--allow-duplicates and --drop-duplicates exclude each other; give one of them")
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
                    source=picture.source,
                )
            )
        levels.check(f"data set {labels.task!r}")
        dropped = duplicates.across() if drop_duplicates else []
        _drop(dropped, labels.task, samples, directory / "images")
        _check_classes(labels, samples)
        near = duplicates.near_pairs(labels.choices)
        if duplicates.found and not (allow_duplicates or drop_duplicates):
            beside = Path(output).resolve().with_name(f"{Path(output).resolve().name}-{DUPLICATES_FILE}")
            count = duplicates.write(beside, near, labels.choices)
            raise VITaskError(
                f"{duplicates.sentence(labels.choices)}; {str(beside)!r} lists all {count} pair(s); remove one of each "
                "or go on with --drop-duplicates, which leaves out those in train, or with --allow-duplicates"
            )
        duplicates.write(directory / DUPLICATES_FILE, near, labels.choices, dropped)
        if duplicates.found:
            done = f"; {len(dropped)} image(s) were left out of {_splits_of(dropped)}" if dropped else ""
            logger.warning("%s%s", duplicates.sentence(labels.choices), done)
        duplicates.say_repeated(labels.choices)
        filled = {split: rows for split, rows in samples.items() if rows}
        for split, rows in filled.items():
            write_json(directory / f"{split}.json", rows)
        record = _labels_record(labels, duplicates, near)
        if dropped:
            record["dropped"] = [{picture.split: picture.name} for picture in dropped]
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


def _drop(dropped: Sequence[Picture], task: str, samples: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Takes pictures that were written out of the samples, and their files away."""
    gone = {f"{task}-{picture.split}-{picture.stem}" for picture in dropped}
    for split, rows in samples.items():
        for row in rows:
            if row["id"] in gone:
                (folder / row["image"]).unlink()
        samples[split] = [row for row in rows if row["id"] not in gone]


def _splits_of(dropped: Sequence[Picture]) -> str:
    return " and ".join(split for split in SPLITS if any(picture.split == split for picture in dropped))


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


def _labels_record(labels: LabelSet, duplicates: _Duplicates, near: Sequence[Pair]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "task": labels.task,
        "choices": list(labels.choices),
        "modality": labels.modality,
        "type": labels.kind,
    }
    pairs = {"duplicates": duplicates.found, "near_duplicates": near}
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


def label_set_in(folder: str | Path) -> LabelSet:
    """The label set of a folder as one task in words."""
    found = read_labels(folder, "label set")
    return LabelSet(found["task"], found["task"], found["modality"], tuple(found["choices"]), found["type"])


def summary(counts: dict[str, int], labels: LabelSet, output: str | Path) -> str:
    """One line on what was written."""
    images = ", ".join(f"{count} {split}" for split, count in counts.items())
    return f"{labels.task}: {images} images of {len(labels.choices)} classes in {output}"
