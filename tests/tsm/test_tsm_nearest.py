"""The nearest training images: against a slow search by hand, and what is refused."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from trained import make_tsm

from vitask_plugin.data.images import decode
from vitask_plugin.data.instructions import DRAWN
from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm.features import FeatureStore, extract
from vitask_plugin.tsm.nearest import TrainingImages, _units

COUNT = 5


@pytest.fixture(scope="module")
def tsm(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tsm")
    tsm = make_tsm(folder)
    tsm.folder = folder
    return tsm


@pytest.fixture(scope="module", params=["cls", "all"])
def store(request, tsm, drawn_data: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    output = tmp_path_factory.mktemp("features") / request.param
    files = [drawn_data / "train.json", drawn_data / "val.json"]
    return extract(tsm.folder, files, drawn_data / "images", output, request.param)


def opened(store: FeatureStore, data: Path, task: str = DRAWN.task) -> TrainingImages:
    return TrainingImages(store, [data / "train.json"], data / "images", task, DRAWN.choices)


def by_hand(tsm, store: FeatureStore, data: Path, query: Path) -> list[tuple[float, str, str]]:
    """(distance, image, label) of every training image, nearest first, one pair at a time and in Python's floats."""

    def vector(path: Path) -> list[float]:
        output = tsm(tsm.preprocess(decode(path.read_bytes(), path))[None])
        tokens = tsm.tokens(output, store.tokens)[0].double()
        return [sum(column) / len(column) for column in tokens.T.tolist()]

    own, found = vector(query), []
    for sample in json.loads((data / "train.json").read_text()):
        other = vector(data / "images" / sample["image"])
        product = sum(a * b for a, b in zip(own, other, strict=True))
        distance = 1 - product / math.hypot(*own) / math.hypot(*other)
        found.append((distance, sample["image"], sample["conversations"][1]["value"][:-1]))
    return sorted(found)


def test_they_are_those_that_a_slow_search_finds(tsm, store: FeatureStore, drawn_data: Path) -> None:
    training = opened(store, drawn_data)
    assert len(training) == 24 < len(store)  # those of val are in the store, and no training images
    for sample in json.loads((drawn_data / "val.json").read_text())[:3]:
        path = drawn_data / "images" / sample["image"]
        output = tsm(tsm.preprocess(decode(path.read_bytes(), path))[None])
        found = training.nearest(tsm.tokens(output, store.tokens)[0], COUNT)
        expected = by_hand(tsm, store, drawn_data, path)
        assert [(one.image, one.label) for one in found] == [(image, label) for _, image, label in expected[:COUNT]]
        assert [one.distance for one in found] == pytest.approx([one[0] for one in expected[:COUNT]], abs=1e-6)
        assert expected[-1][0] > 1.2 * expected[0][0] > 1e-4  # there is something to choose


def test_a_training_image_is_nearest_to_itself_and_shown_as_it_is(tsm, store: FeatureStore, drawn_data: Path) -> None:
    training, sample = opened(store, drawn_data), json.loads((drawn_data / "train.json").read_text())[7]
    path = drawn_data / "images" / sample["image"]
    picture = decode(path.read_bytes(), path)
    first = training.nearest(tsm.tokens(tsm(tsm.preprocess(picture)[None]), store.tokens)[0], 1)[0]
    assert first.image == sample["image"] and first.distance == pytest.approx(0, abs=1e-6)
    assert training.picture(first).tobytes() == picture.tobytes()


def test_a_changed_image_is_not_shown(tsm, store: FeatureStore, drawn_data: Path, tmp_path: Path) -> None:
    data = shutil.copytree(drawn_data, tmp_path / "data")
    training = opened(store, data)
    first = training.nearest(torch.from_numpy(store.vectors([next(iter(training._labels))])), 1)[0]
    shutil.copy(
        data / "images" / json.loads((data / "val.json").read_text())[0]["image"], data / "images" / first.image
    )
    with pytest.raises(VITaskError, match=f"'{first.image}' has changed since"):
        training.picture(first)


def test_a_vector_without_direction_is_at_distance_one() -> None:
    vectors = np.array([[0, 0, 0], [3, 4, 0]], np.float32)
    assert _units(vectors).tolist() == [[0, 0, 0], pytest.approx([0.6, 0.8, 0])]


def test_data_of_another_task_and_images_without_features_are_refused(
    tsm, store: FeatureStore, drawn_data: Path
) -> None:
    with pytest.raises(VITaskError, match=r"train\.json'.*no sample of task 'other'; give --data"):
        TrainingImages(store, [drawn_data / "train.json"], drawn_data / "images", "other", ["a", "b"])
    with pytest.raises(VITaskError, match="hold nothing for image 'test/"):
        TrainingImages(store, [drawn_data / "test.json"], drawn_data / "images", DRAWN.task, DRAWN.choices)
