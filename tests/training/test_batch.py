"""The VITask batch: features, negatives, extra rows, and the sampler's order."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import sha256_file
from vitask_plugin.tsm.features import FeatureStore


def test_features_belong_to_the_image_and_general_samples_have_none(build, feature_store):
    dataset, collator = build()
    store = FeatureStore.open(feature_store)
    batch = collator([dataset[index] for index in range(len(dataset))])
    with_exemplar = 0
    for row, sample in enumerate(dataset.list_data_dict):
        feature = dataset[row]["tsm_features"]
        assert (feature is not None) == ("vitask" in sample)
        if feature is not None:
            content = sha256_file(Path(dataset.data_args.image_folder) / sample["image"])
            assert torch.equal(feature, store.get(sample["image"], content))
            assert torch.equal(batch["vitask"]["features"][row], feature)
            with_exemplar += 1
    assert 0 < with_exemplar < len(dataset)
    branches = batch["vitask"]["branches"]
    assert branches.counts["branches"] == len(dataset) + with_exemplar
    assert len(branches.prompted) > 0 and len(branches.negative) == branches.counts["negatives"] == 0


def test_negatives_share_the_instruction_and_differ_in_the_response(build):
    dataset, collator = build(vitask_stage=2)
    indices = list(range(len(dataset)))
    rows, extra = collator.negative_rows(indices)
    assert extra == []
    counted = 0
    for sample, row in enumerate(rows):
        if "vitask" not in dataset.list_data_dict[sample]:
            assert row == -1
            continue
        assert 0 <= row < len(indices)
        own, other = dataset.list_data_dict[sample], dataset.list_data_dict[row]
        assert own["conversations"][0] == other["conversations"][0]
        assert own["conversations"][1] != other["conversations"][1]
        counted += 1
    assert counted >= 8
    counts = collator([dataset[index] for index in indices])["vitask"]["branches"].counts
    assert counts["negatives"] == counts["in_batch_negatives"] == counted


def test_a_batch_without_a_negative_takes_one_from_the_data_set(build):
    dataset, collator = build(vitask_stage=2)
    index = 6  # the first of many that ask one question
    # Of the first seeds, one that draws two images and one that draws the same twice.
    drawn = {}
    for collator.seed in range(40):
        drawn.setdefault(len(collator.negative_rows([index, index])[1]), collator.seed)
    assert drawn.keys() == {1, 2}
    collator.seed = drawn[1]
    assert collator.negative_rows([index, index])[0] == [2, 2]  # one row serves both
    collator.seed = drawn[2]
    batch = collator([dataset[index], dataset[index]])
    assert sorted(collator.negative_rows([index, index])[0]) == [2, 3]
    assert batch["input_ids"].shape[0] == 4 and batch["images"].shape[0] == 4
    assert (batch["labels"][2:] == -100).all()
    assert not torch.equal(batch["images"][2], batch["images"][0])
    # The extra rows hold the prefix alone: nothing after the image token (-200).
    for row in (2, 3):
        length = int(batch["attention_mask"][row].sum())
        assert batch["input_ids"][row, length - 1] == -200


def test_draws_depend_on_the_seed_and_the_batch_alone(build):
    dataset, collator = build(vitask_stage=2)
    indices = [index for index, sample in enumerate(dataset.list_data_dict) if "vitask" in sample][:8]
    first, second = (collator.negative_rows(indices) for _ in range(2))
    assert first == second
    others = []
    for seed in range(1, 6):
        collator.seed = seed
        others.append(collator.negative_rows(indices))
    assert any(first != other for other in others)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5])
def test_sampler_gives_every_sample_once_and_mixed_batches(build, batch_size):
    from vitask_plugin.llava.batch import NO_INSTRUCTION, ContrastiveSampler

    dataset, _ = build(vitask_stage=2)
    sampler = ContrastiveSampler(dataset, batch_size, seed=0)
    order = list(sampler)
    assert sorted(order) == list(range(len(dataset))) and len(sampler) == len(order)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mixed = 0
    for batch in batches:
        instructions = {dataset.instruction_ids[index] for index in batch}
        if (
            batch_size > 1
            and len(batch) == batch_size
            and len(instructions) == 1
            and NO_INSTRUCTION not in instructions
        ):
            assert len({dataset.response_ids[index] for index in batch}) >= 2
            mixed += 1
    assert batch_size == 1 or mixed >= 24 // batch_size - 1
    assert order == list(ContrastiveSampler(dataset, batch_size, seed=0))
    sampler.set_epoch(1)
    assert order != list(sampler)


def test_one_class_has_no_negative(build, mixed_data, tmp_path):
    samples = json.loads((mixed_data / "train.json").read_text())
    only = [sample for sample in samples if sample.get("vitask", {}).get("label") == 0]
    path = tmp_path / "one.json"
    path.write_text(json.dumps(only))
    with pytest.raises(VITaskError, match="no negative"):
        build(path, vitask_stage=2)
    build(path, vitask_stage=1)  # without CRT one class is allowed: nothing is contrasted


def test_image_outside_the_folder_and_missing_image(build, mixed_data, tmp_path):
    samples = json.loads((mixed_data / "train.json").read_text())
    path = tmp_path / "bad.json"
    for image, message in (("../outside.png", "leaves the image folder"), ("absent.png", "is not in the image folder")):
        bad = [dict(sample) for sample in samples]
        bad[0]["image"] = image
        path.write_text(json.dumps(bad))
        with pytest.raises(VITaskError, match=message):
            build(path)


def test_a_changed_image_is_noticed_before_the_first_batch(build, mixed_data, feature_store, tmp_path):
    dataset, _ = build()
    copy = tmp_path / "images"
    shutil.copytree(mixed_data / "images", copy)
    dataset.data_args.image_folder = str(copy)
    dataset.attach(FeatureStore.open(feature_store))
    last = dataset.list_data_dict[-1]["image"]
    Image.new("RGB", (28, 28), "red").save(copy / last)
    with pytest.raises(VITaskError, match=last):
        dataset.attach(FeatureStore.open(feature_store))


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_sampler_mixes_skewed_answers_where_it_can(share):
    """Of two answers in `share` and the rest: as many mixed batches as there are rare samples, or all of them."""
    from vitask_plugin.llava.batch import ContrastiveSampler

    rare = int(64 * share)
    data = SimpleNamespace(
        instruction_ids=[0] * 64, response_ids=[1] * rare + [0] * (64 - rare), list_data_dict=[{"image": ""}] * 64
    )
    order = list(ContrastiveSampler(data, 4, seed=0))
    assert sorted(order) == list(range(64))
    batches = [order[start : start + 4] for start in range(0, 64, 4)]
    mixed = sum(len({data.response_ids[index] for index in batch}) == 2 for batch in batches)
    assert mixed == min(rare, 16)


def test_sampler_keeps_text_only_samples_together_where_asked():
    from vitask_plugin.llava.batch import NO_INSTRUCTION, ContrastiveSampler

    samples = [{"image": ""} if index % 2 else {} for index in range(64)]
    data = SimpleNamespace(instruction_ids=[NO_INSTRUCTION] * 64, response_ids=range(64), list_data_dict=samples)
    kinds = {}
    for by_modality in (False, True):
        order = list(ContrastiveSampler(data, 8, seed=0, by_modality=by_modality))
        assert sorted(order) == list(range(64))
        kinds[by_modality] = [len({index % 2 for index in order[at : at + 8]}) for at in range(0, 64, 8)]
    assert kinds[True] == [1] * 8 and sum(kinds[False]) > 8
