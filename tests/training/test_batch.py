"""The VITask batch: features, negatives, extra rows, and the sampler's order."""

import json
import random
import shutil
from collections import Counter
from itertools import groupby
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


@pytest.fixture
def sampler_of():
    """Makes the sampler; for hand-made data, of instructions and responses alone."""
    from vitask_plugin.llava import compat

    compat.prepare()
    from vitask_plugin.llava.sampler import ContrastiveSampler

    def make(data, global_batch_size, seed=0, epoch=0, **flags):
        sampler = ContrastiveSampler(data, global_batch_size, seed, **flags)
        sampler.set_epoch(epoch)
        return sampler

    return make


def plain_data(response_ids, instruction_ids=None):
    count = len(response_ids)
    return SimpleNamespace(
        instruction_ids=instruction_ids or [0] * count,
        response_ids=response_ids,
        list_data_dict=[{"image": ""}] * count,
    )


def blocks(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]


@pytest.mark.parametrize("global_batch_size", [1, 2, 3, 4, 5, 8, 16, 64])
def test_every_sample_once_with_a_negative_of_its_instruction_and_another_response(
    global_batch_size, build, sampler_of
):
    dataset, _ = build(vitask_stage=2)
    sampler, contrasted = sampler_of(dataset, global_batch_size), 0
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(item.index for item in order) == list(range(len(dataset))) and len(sampler) == len(order)
        for item in order:
            sample = dataset.list_data_dict[item.index]
            assert (item.negative >= 0) == ("vitask" in sample)
            if item.negative >= 0:
                other = dataset.list_data_dict[item.negative]
                assert sample["conversations"][0::2] == other["conversations"][0::2]
                assert sample["conversations"][1::2] != other["conversations"][1::2]
                contrasted += 1
    assert contrasted == 3 * 26


@pytest.mark.parametrize("global_batch_size", [2, 4, 5, 8])
def test_a_whole_chunk_of_one_instruction_holds_two_responses(global_batch_size, build, sampler_of):
    dataset, _ = build(vitask_stage=2)
    mixed = 0
    for chunk in blocks(list(sampler_of(dataset, global_batch_size)), global_batch_size):
        instructions = {dataset.instruction_ids[item.index] for item in chunk}
        if len(chunk) == global_batch_size and len(instructions) == 1 and min(instructions) >= 0:
            assert len({dataset.response_ids[item.index] for item in chunk}) >= 2
            assert {item.negative for item in chunk} <= {item.index for item in chunk}
            mixed += 1
    assert mixed >= 24 // global_batch_size


def test_the_collator_finds_the_negative_or_adds_a_row_for_it(build):
    from vitask_plugin.llava.sampler import Contrasted

    dataset, collator = build(vitask_stage=2)
    same = [dataset.response_ids[index] == dataset.response_ids[6] for index in range(len(dataset))]
    twin, one, two = same.index(True, 7), same.index(False, 7), same.index(False, 8)

    def rows(*items):
        instances = [dataset[Contrasted(*item)] for item in items]
        return collator.negative_rows(instances), collator(instances)

    assert rows((6, one), (one, 6))[0] == ([1, 0], [])
    assert rows((6, one), (twin, one), (one, 6))[0] == ([2, 2, 0], [])
    assert rows((2, -1), (6, one), (4, -1))[0] == ([-1, 3, -1], [(1, one)])
    # One row serves all whose negative it is.
    found, batch = rows((6, one), (twin, one))
    assert found == ([2, 2], [(0, one)]) and batch["images"].shape[0] == 3
    found, batch = rows((6, one), (twin, two))
    assert found == ([2, 3], [(0, one), (1, two)])
    assert batch["input_ids"].shape[0] == 4 and (batch["labels"][2:] == -100).all()
    assert batch["vitask"]["branches"].counts["negatives"] == 2
    assert batch["vitask"]["branches"].counts["in_batch_negatives"] == 0
    for row, negative in ((2, one), (3, two)):
        assert torch.equal(batch["images"][row], dataset[negative]["image"])
        assert not torch.equal(batch["images"][row], batch["images"][row - 2])
        # The extra rows hold the prefix alone: nothing after the image token (-200).
        length = int(batch["attention_mask"][row].sum())
        assert batch["input_ids"][row, length - 1] == -200


def test_a_general_samples_row_serves_no_negative(build):
    """Its image may stand behind another prefix, as sample 3's, which answers before it."""
    from vitask_plugin.llava.sampler import Contrasted

    dataset, collator = build(vitask_stage=2)
    image = dataset.list_data_dict[3]["image"]
    negative = next(i for i in range(6, len(dataset)) if dataset.list_data_dict[i]["image"] == image)
    other = next(i for i in range(6, len(dataset)) if dataset.response_ids[i] != dataset.response_ids[negative])
    instances = [dataset[Contrasted(3, -1)], dataset[Contrasted(other, negative)]]
    assert collator.negative_rows(instances) == ([-1, 2], [(1, negative)])


def test_without_a_chosen_negative_crt_is_not_silently_dropped(build):
    dataset, collator = build(vitask_stage=2)
    with pytest.raises(KeyError, match="negative"):
        collator([dataset[6], dataset[7]])


def test_a_step_contrasts_the_same_images_however_it_is_split(build, sampler_of):
    """Of 8 samples a step, as batches of 8, 4, 2 and 1: the same (sample, negative image) pairs, in the tensors too."""
    dataset, collator = build(vitask_stage=2)
    order = list(sampler_of(dataset, 8))
    compared, in_batch = 0, dict.fromkeys((8, 4, 2, 1), 0)
    for step in blocks(order, 8):
        pairs = {}
        for size in in_batch:
            pairs[size] = set()
            for items in blocks(step, size):
                instances = [dataset[item] for item in items]
                rows, extra = collator.negative_rows(instances)
                batch = collator(instances)
                assert batch["input_ids"].shape[0] == len(items) + len(extra)
                counts = batch["vitask"]["branches"].counts
                assert counts["negatives"] == sum(row >= 0 for row in rows)
                in_batch[size] += counts["in_batch_negatives"]
                for item, row in zip(items, rows, strict=True):
                    if row >= 0:
                        pairs[size].add((item.index, batch["images"][row].numpy().tobytes()))
        expected = {(item.index, dataset[item.negative]["image"].numpy().tobytes()) for item in step if item[1] >= 0}
        assert all(found == expected for found in pairs.values())
        compared += len(expected)
    assert compared == 26
    # 24 of 4 balanced responses, and two of several turns that are each other's negative, found wherever they meet.
    assert in_batch[8] == in_batch[4] == in_batch[2] == 26 and in_batch[1] == 0


# Samples of each response -> batch size -> the share of negatives in the batch. No order could reach more: a batch
# without one of the rarer responses has no negative.
SHARES = {
    (160, 160, 160, 160): {2: 1.0, 4: 1.0, 8: 1.0},
    (320, 320): {2: 1.0, 4: 1.0, 8: 1.0},
    (480, 80, 80): {2: 0.5, 4: 1.0, 8: 1.0},
    (576, 64): {2: 0.2, 4: 0.4, 8: 0.8},
}


@pytest.mark.parametrize("counts", SHARES, ids=str)
@pytest.mark.parametrize("global_batch_size", [8, 32, 128])
def test_batches_hold_the_negatives_they_need(global_batch_size, counts, sampler_of):
    data = plain_data([response for response, count in enumerate(counts) for _ in range(count)])
    for epoch in range(2):
        order = list(sampler_of(data, global_batch_size, epoch=epoch))
        for size, share in SHARES[counts].items():
            found = sum(
                item.negative in {other.index for other in batch} for batch in blocks(order, size) for item in batch
            )
            assert found / len(order) >= share


@pytest.mark.parametrize("counts, most", [((320, 320), 1), ((160, 160, 160, 160), 1), ((480, 80, 80), 3)])
def test_no_image_serves_more_than_it_must(counts, most, sampler_of):
    """Which keeps the packed rows even: three of the frequent response share one of a rarer one."""
    data = plain_data([response for response, count in enumerate(counts) for _ in range(count)])
    used = Counter(item.negative for item in sampler_of(data, 8))
    assert max(used.values()) == most


def test_the_least_used_come_first(sampler_of):
    """Four samples far from the two that may be their negatives share them evenly, whatever the draw."""
    data = plain_data([0] * 6 + [1, 2])
    for seed in range(8):
        negatives = [item.negative for item in sampler_of(data, 8).contrast(range(8), random.Random(seed))]
        assert Counter(negatives[:4]) == {6: 2, 7: 2}
        assert negatives[6:] == [7, 6]


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_as_many_chunks_are_mixed_as_there_are_rare_samples(share, sampler_of):
    """Of two answers in `share` and the rest: as many mixed chunks as there are rare samples, or all of them."""
    rare = int(64 * share)
    data = plain_data([1] * rare + [0] * (64 - rare))
    chunks = blocks(list(sampler_of(data, 4)), 4)
    mixed = sum(len({data.response_ids[item.index] for item in chunk}) == 2 for chunk in chunks)
    assert mixed == min(rare, 16)


def test_an_epoch_and_a_seed_have_an_order_and_negatives_of_their_own(build, sampler_of):
    dataset, _ = build(vitask_stage=2)
    for global_batch_size in (1, 4, 30):
        runs = {
            key: list(sampler_of(dataset, global_batch_size, seed=key[0], epoch=key[1]))
            for key in ((0, 0), (0, 1), (1, 0))
        }
        first = runs[0, 0]
        assert first == list(sampler_of(dataset, global_batch_size))  # and nothing else decides
        for other in (runs[0, 1], runs[1, 0]):
            assert [item.index for item in other] != [item.index for item in first]
            changed = sum(dict(other)[index] != negative for index, negative in first)
            assert changed >= 12  # of 24 that have a choice of 18


def test_a_sample_alone_meets_every_other_response_in_time(sampler_of):
    data = plain_data([0, 0, 1, 2, 2, 2], [5] * 6)
    met = {index: Counter() for index in range(6)}
    for epoch in range(400):
        for item in sampler_of(data, 1, epoch=epoch):
            met[item.index][item.negative] += 1
    for index, negatives in met.items():
        others = {other for other in range(6) if data.response_ids[other] != data.response_ids[index]}
        assert negatives.keys() == others
        # 400 draws among 3 to 5: less than half of what is expected has a chance below 1e-6.
        assert min(negatives.values()) > 200 / len(others)


def test_samples_of_one_instruction_stay_together_in_a_remainder(sampler_of):
    """Of 7, 6 and 4 samples and 9 general ones, no group fills a chunk of 8: odd ones come after even ones."""
    instructions = [0] * 7 + [1] * 6 + [2] * 4 + [-1] * 9
    data = plain_data([index % 2 for index in range(26)], instructions)
    for epoch in range(5):
        order = list(sampler_of(data, 26, epoch=epoch))
        asked = [instructions[item.index] for item in order]
        runs = [instruction for instruction, _ in groupby(asked)]
        assert sorted(runs[:2]) == [1, 2] and runs[2:] == [0, -1]
        found = sum(item.negative in {other.index for other in batch} for batch in blocks(order, 2) for item in batch)
        assert found == 6 + 4 + 6  # the seventh of 7 has no partner left
        # Chunks of 8 are shuffled as a whole.
        chunks = blocks(list(sampler_of(data, 8, epoch=epoch)), 8)
        assert sorted(len(chunk) for chunk in chunks) == [2, 8, 8, 8] and len(chunks[-1]) == 2


# Batch per device, processes, accumulation: all of 8 samples a step.
SPLITS = [(8, 1, 1), (4, 1, 2), (1, 1, 8), (4, 2, 1), (2, 2, 2), (1, 4, 2)]


def loaders(dataset, sampler, batch_size, processes):
    """The data loader of each rank, as accelerate makes it for the trainer; a batch is its (sample, negative) pairs."""
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader

    dataset.sampler = sampler

    def pairs(instances):
        return [(instance["index"], instance["negative"]) for instance in instances]

    return [
        prepare_data_loader(
            DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=pairs),
            num_processes=processes,
            process_index=rank,
            put_on_device=False,
        )
        for rank in range(processes)
    ]


def test_accelerate_deals_out_the_same_steps_to_any_number_of_processes(build, sampler_of):
    dataset, _ = build(vitask_stage=2)
    whole = [{tuple(item) for item in step} for step in blocks(list(sampler_of(dataset, 8, epoch=1)), 8)][:-1]
    assert [len(step) for step in whole] == [8, 8, 8]
    for batch_size, processes, accumulation in SPLITS:
        ranks = []
        for loader in loaders(dataset, sampler_of(dataset, 8), batch_size, processes):
            loader.set_epoch(1)
            ranks.append(blocks(list(loader), accumulation))
        steps = [{pair for micro in step for batch in micro for pair in batch} for step in zip(*ranks, strict=True)]
        assert steps[: len(whole)] == whole, (batch_size, processes, accumulation)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_run_sees_what_the_whole_one_saw(epoch, processes, build, sampler_of):
    from accelerate import skip_first_batches

    dataset, _ = build(vitask_stage=2)
    for rank in range(processes):
        whole = loaders(dataset, sampler_of(dataset, 8), 4, processes)[rank]
        whole.set_epoch(epoch)
        expected = list(whole)
        resumed = skip_first_batches(loaders(dataset, sampler_of(dataset, 8), 4, processes)[rank], 2)
        resumed.set_epoch(epoch)
        assert list(resumed) == expected[2:] and len(expected) > 3


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


def test_text_only_samples_stay_together_where_asked(sampler_of):
    samples = [{"image": ""} if index % 2 else {} for index in range(64)]
    data = SimpleNamespace(instruction_ids=[-1] * 64, response_ids=range(64), list_data_dict=samples)
    kinds = {}
    for by_modality in (False, True):
        order = [item.index for item in sampler_of(data, 8, by_modality=by_modality)]
        assert sorted(order) == list(range(64))
        kinds[by_modality] = [len({index % 2 for index in chunk}) for chunk in blocks(order, 8)]
    assert kinds[True] == [1] * 8 and sum(kinds[False]) > 8
