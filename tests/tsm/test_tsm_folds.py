"""`vitask tsm train --folds`: which image is in which fold, and features from networks that have not seen the image."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import save
from PIL import Image

from vitask_plugin.data.instructions import sample
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import sha256_file
from vitask_plugin.method.alignment import Alignment
from vitask_plugin.tsm.features import FeatureStore, extract
from vitask_plugin.tsm.folds import assigned
from vitask_plugin.tsm.model import TSM
from vitask_plugin.tsm.out_of_fold import OutOfFold
from vitask_plugin.tsm.samples import LabelledImage, read_labelled
from vitask_plugin.tsm.train import Settings, train

FOLDS = 3
HEART = {"arch": "test_vit", "image_size": 32, "batch_size": 12, "device": "cpu", "epochs": 8, "lr": 1e-3}


def labelled(folder: Path, labels: list[int], groups: list[str | None], task: str = "t") -> list[LabelledImage]:
    images = []
    for number, (label, group) in enumerate(zip(labels, groups, strict=True)):
        block = {"task": task, "label": label, "choices": ["a", "b"]} | ({} if group is None else {"group": group})
        images.append(LabelledImage(save(folder / f"{number}.png", "grey", number), block, "t.json"))
    return images


def test_folds_have_the_classes_shares_and_follow_the_seed(tmp_path):
    images = labelled(tmp_path, [0] * 12 + [1] * 6, [None] * 18)
    folds = assigned(images, FOLDS, 0)
    held = Counter((number, image.block["label"]) for number, image in zip(folds.numbers, images, strict=True))
    assert folds.by == "class" and held == {(fold, label): (4, 2)[label] for fold in range(3) for label in (0, 1)}
    assert assigned(images, FOLDS, 0).numbers == folds.numbers != assigned(images, FOLDS, 1).numbers
    assert [len(folds.without(fold, images)) for fold in range(3)] == [12, 12, 12]


def test_groups_and_copies_of_a_file_stay_together(tmp_path):
    images = labelled(tmp_path, [0, 1] * 9, [f"patient {number // 3}" for number in range(18)])
    copy = tmp_path / "copy.png"
    copy.write_bytes(images[0].path.read_bytes())
    images.append(replace(images[17], path=copy))  # of the last patient, and so of the first one too
    folds = assigned(images, FOLDS, 0)
    of = {}
    for number, image in zip(folds.numbers, images, strict=True):
        of.setdefault(image.block["group"], set()).add(number)
    assert folds.by == "group" and all(len(numbers) == 1 for numbers in of.values())
    assert of["patient 0"] == of["patient 5"] and len(set(folds.numbers)) == 3


@pytest.mark.parametrize(
    ("labels", "groups", "sentence"),
    [
        ([0, 1], [None] * 2, r"has 2 different images, too few for --folds 3"),
        ([0] * 8 + [1], [None] * 9, r"class 'b' of task 't' has 1 different images, all in one fold"),
        ([0, 1] * 4, ["x"] * 8, r"has 1 groups of images, too few for --folds 3"),
    ],
)
def test_too_little_for_the_folds(tmp_path, labels, groups, sentence):
    with pytest.raises(VITaskError, match=sentence):
        assigned(labelled(tmp_path, labels, groups), FOLDS, 0)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> Path:
    """Noise with labels drawn by lot, other noise, and a TSM that has learnt the labels by heart: it is validated on
    some of what it was trained on, so that the epoch that knows them best is kept."""
    root = tmp_path_factory.mktemp("noisy")
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("other", 12)):
        labels = generator.permutation([0, 1] * (count // 2)).tolist()
        rows = []
        for number, label in enumerate(labels):
            name = f"{split}/{number}.png"
            save(root / "images" / name, "grey", (5000 if split == "train" else 6000) + number)
            about = {"modality": "noise", "task": "lot", "choices": ["heads", "tails"]}
            rows.append(sample(identifier=name, image=name, label=label, **about))
        (root / f"lot-{split}.json").write_text(json.dumps(rows))
        (root / "lot-val.json").write_text(json.dumps(rows_of(root, "train")[:12]))
    settings = Settings(**HEART, folds=FOLDS)
    train(settings, [root / "lot-train.json"], [root / "lot-val.json"], [root / "images"], root / "tsm")
    extract(root / "tsm", [root / "lot-train.json", root / "lot-other.json"], root / "images", root / "features")
    return root


def rows_of(root: Path, split: str) -> list[dict]:
    return json.loads((root / f"lot-{split}.json").read_text())


def accuracy(rows: list[dict], logits: list[torch.Tensor]) -> float:
    pairs = zip(rows, logits, strict=True)
    return float(np.mean([int(one.argmax()) == row["vitask"]["label"] for row, one in pairs]))


def pixels_of(tsm: TSM, root: Path, rows: list[dict]) -> torch.Tensor:
    return torch.stack([tsm.preprocess(Image.open(root / "images" / row["image"])) for row in rows])


def test_what_was_learnt_by_heart_is_not_in_the_features(noisy):
    tsm, store, rows = TSM.load(noisy / "tsm"), FeatureStore.open(noisy / "features"), rows_of(noisy, "train")
    by_heart = accuracy(rows, list(tsm(pixels_of(tsm, noisy, rows)).logits))
    unseen = accuracy(rows, [store.logits(row["image"]) for row in rows])
    assert by_heart > 0.9 and unseen < 0.75
    assert store.tsm_hash == tsm.hash


def test_every_feature_is_of_the_network_without_its_fold(noisy):
    """Compared with the folders of the networks, read one by one."""
    tsm, store = TSM.load(noisy / "tsm"), FeatureStore.open(noisy / "features")
    folds = assigned(read_labelled([noisy / "lot-train.json"], [noisy / "images"], training=True), FOLDS, 0)
    together = OutOfFold.load(noisy / "tsm", tsm)
    rows = rows_of(noisy, "train")
    for fold in range(FOLDS):
        part = TSM.load(noisy / f"tsm/folds/{fold}")
        own = [row for row, number in zip(rows, folds.numbers, strict=True) if number == fold]
        output = part(pixels_of(part, noisy, own))
        assert len(own) == 8 and part.hash == tsm.record["folds"]["tsms"][fold] != tsm.hash
        aligned = together.alignments[fold]["cls"](output.pooled).float()
        for row, feature, logits in zip(own, aligned, output.logits, strict=True):
            assert torch.allclose(store.get(row["image"], sha(noisy, row))[0], feature, atol=1e-4)
            assert torch.allclose(store.logits(row["image"]), logits, atol=1e-4)
    other = rows_of(noisy, "other")
    output = tsm(pixels_of(tsm, noisy, other))
    for row, feature in zip(other, output.pooled, strict=True):
        assert torch.allclose(store.get(row["image"], sha(noisy, row))[0], feature, atol=1e-4)


def sha(root: Path, row: dict) -> str:
    return sha256_file(root / "images" / row["image"])


def test_the_record_says_what_the_folds_are(noisy):
    record = json.loads((noisy / "tsm/tsm.json").read_text())["folds"]
    assert record["count"] == 3 and record["by"] == "class" and record["images"] == [8, 8, 8]
    assert sorted(path.name for path in (noisy / "tsm/folds/0").iterdir()) == [
        *("alignment.safetensors", "log.jsonl", "metrics.json", "tsm.json", "tsm.safetensors")
    ]
    assert len(record["residual"]) == 3
    assert all(0 < one["cls"] < 1 and one["all"] > 0 for one in record["residual"])


def test_an_alignment_brings_a_fold_nearer_to_the_whole(noisy):
    tsm = TSM.load(noisy / "tsm")
    together, rows = OutOfFold.load(noisy / "tsm", tsm), rows_of(noisy, "other")
    pixels = pixels_of(tsm, noisy, rows)
    wanted = tsm(pixels).pooled
    for part, alignments in zip(together.parts, together.alignments, strict=True):
        own = part(pixels).pooled
        assert (alignments["cls"](own) - wanted).norm() < 0.9 * (own - wanted).norm()


def test_an_image_in_another_fold_has_another_feature(noisy):
    tsm = TSM.load(noisy / "tsm")
    together, row = OutOfFold.load(noisy / "tsm", tsm), rows_of(noisy, "train")[0]
    name, pixels = sha(noisy, row), pixels_of(tsm, noisy, [row])
    fold = together.fold_of[bytes.fromhex(name)]
    moved = replace(together, fold_of={**together.fold_of, bytes.fromhex(name): (fold + 1) % FOLDS})
    for tokens, shape in (("cls", (1, 1, 64)), ("all", (1, *tsm(pixels).patches.shape[1:]))):
        before, logits = together(pixels, [name], tokens)
        after, others = moved(pixels, [name], tokens)
        assert before.shape == after.shape == shape
        assert not torch.allclose(before, after, atol=1e-3) and not torch.allclose(logits, others, atol=1e-3)
    assert isinstance(together.alignments[0]["cls"], Alignment)


def test_a_network_that_is_missing_or_another_is_named(noisy, tmp_path):
    import shutil

    shutil.copytree(noisy / "tsm", tmp_path / "tsm")
    shutil.copy(noisy / "tsm/folds/1/tsm.safetensors", tmp_path / "tsm/folds/0/tsm.safetensors")
    shutil.copy(noisy / "tsm/folds/1/tsm.json", tmp_path / "tsm/folds/0/tsm.json")
    attempt = [tmp_path / "tsm", [noisy / "lot-train.json"], noisy / "images", tmp_path / "features"]
    with pytest.raises(VITaskError, match=r"folds/0' is not the network of its fold"):
        extract(*attempt)
    shutil.rmtree(tmp_path / "tsm/folds")
    with pytest.raises(
        VITaskError, match=r"trained with --folds, and '.*assignment.safetensors' is missing or changed"
    ):
        extract(*attempt)
    assert TSM.load(tmp_path / "tsm").hash == TSM.load(noisy / "tsm").hash  # enough for new images
