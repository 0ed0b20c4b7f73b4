"""The VITask batch: features, negatives, extra rows, and the sampler's order."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from vitask_plugin.data.contents import survey
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import sha256_file
from vitask_plugin.method.sampler import Contrasted, ContrastiveSampler
from vitask_plugin.training.exemplars import Exemplars
from vitask_plugin.tsm.features import FeatureStore


def test_features_belong_to_the_image_and_general_samples_have_none(build, feature_store):
    dataset, collator = build()
    store = FeatureStore.open(feature_store)
    batch = collator([dataset[index] for index in range(len(dataset))])
    with_exemplar = 0
    for row, sample in enumerate(dataset.list_data_dict):
        feature = collator.exemplars.of(row)
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


def sampler_of(dataset, global_batch_size, seed=0, epoch=0):
    sampler = ContrastiveSampler(dataset.negatives, global_batch_size, seed, epoch=dataset.epoch)
    sampler.set_epoch(epoch)
    return sampler


def blocks(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]


@pytest.mark.parametrize("global_batch_size", [1, 2, 3, 4, 5, 8, 16, 64])
def test_every_sample_once_with_a_negative_of_its_instruction_and_another_response(global_batch_size, build):
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


def test_the_collator_finds_the_negative_or_adds_a_row_for_it(build):
    dataset, collator = build(vitask_stage=2)
    same = [dataset.negatives.answers[index] == dataset.negatives.answers[6] for index in range(len(dataset))]
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
    dataset, collator = build(vitask_stage=2)
    image = dataset.list_data_dict[3]["image"]
    negative = next(i for i in range(6, len(dataset)) if dataset.list_data_dict[i]["image"] == image)
    other = next(
        i for i in range(6, len(dataset)) if dataset.negatives.answers[i] != dataset.negatives.answers[negative]
    )
    instances = [dataset[Contrasted(3, -1)], dataset[Contrasted(other, negative)]]
    assert collator.negative_rows(instances) == ([-1, 2], [(1, negative)])


def test_without_a_chosen_negative_crt_is_not_silently_dropped(build):
    dataset, collator = build(vitask_stage=2)
    with pytest.raises(KeyError, match="negative"):
        collator([dataset[6], dataset[7]])


def test_a_step_contrasts_the_same_images_however_it_is_split(build):
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
    # Of 4 balanced responses: a batch without another one is rare, a pair without is not.
    assert 26 >= in_batch[8] >= in_batch[4] >= in_batch[2] >= 13 and in_batch[8] >= 24 and in_batch[1] == 0


def test_an_epoch_and_a_seed_have_an_order_and_negatives_of_their_own(build):
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


# Batch per device, processes, accumulation: all of 8 samples a step.
SPLITS = [(8, 1, 1), (4, 1, 2), (1, 1, 8), (4, 2, 1), (2, 2, 2), (1, 4, 2)]


def loaders(dataset, sampler, batch_size, processes):
    """The data loader of each rank, as accelerate makes it for the trainer; a batch is its (sample, negative) pairs."""
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader

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


def test_accelerate_deals_out_the_same_steps_to_any_number_of_processes(build):
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
def test_a_resumed_run_sees_what_the_whole_one_saw(epoch, processes, build):
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
    with pytest.raises(VITaskError, match=r"none of the 7 samples of task 'vitask_drawn' .* no negative"):
        build(path, vitask_stage=2)
    build(path, vitask_stage=1)  # without CRT one class is allowed: nothing is contrasted


def asked(sample, question):
    first, *others = sample["conversations"]
    return {**sample, "conversations": [{**first, "value": question}, *others]}


@pytest.fixture
def reworded(mixed_data, tmp_path):
    """The mixed data, samples 6 to 8 and one of several turns with a question of their own; returns the file."""
    samples = json.loads((mixed_data / "train.json").read_text())
    for index in (1, 6, 7, 8):
        samples[index] = asked(samples[index], f"<image>\nThe patient is {50 + index}. Which stripes?")
    path = tmp_path / "reworded.json"
    path.write_text(json.dumps(samples))
    return path


def test_a_question_of_its_own_takes_its_negative_from_its_task(build, reworded):
    dataset, collator = build(reworded, vitask_stage=2)
    # Sample 0 too: with sample 1 it lost the only other one that asked what it asks.
    assert dataset.negatives.relaxed == {0, 1, 6, 7, 8}
    for epoch in range(5):
        for items in blocks(list(sampler_of(dataset, 8, epoch=epoch)), 4):
            counts = collator([dataset[item] for item in items])["vitask"]["branches"].counts
            assert counts["relaxed_negatives"] == sum(item.index in (0, 1, 6, 7, 8) for item in items)
            assert counts["negatives"] == sum("vitask" in dataset.list_data_dict[item.index] for item in items)
            for index, negative in items:
                if negative >= 0:
                    own, other = dataset.list_data_dict[index], dataset.list_data_dict[negative]
                    assert own["vitask"]["label"] != other["vitask"]["label"]
                    if index not in (0, 1, 6, 7, 8):
                        assert own["conversations"][0] == other["conversations"][0]


def test_what_makes_a_question_a_label_and_an_answer(build, mixed_data, tmp_path):
    """Where <image> stands, letter case, spaces and the order of several labels make no difference."""
    samples = json.loads((mixed_data / "train.json").read_text())[6:]
    question = samples[0]["conversations"][0]["value"].removeprefix("<image>\n")
    choices, images = samples[0]["vitask"]["choices"], samples[:5]

    def of(label, answer, first):
        block = {"task": "several", "label": label, "choices": choices}
        turns = [{"from": "human", "value": first}, {"from": "gpt", "value": answer}]
        return {**images.pop(), "vitask": block, "conversations": turns}

    changed = [
        of([0, 2], "bars, slopes.", f"<image>\n{question}"),
        of([2, 0], "Slopes,  bars.", f"{question}\n<image>"),
        of([2, 0], "bars, slopes.", f"<image>\n{question}"),
        of([1], "Bars,  slopes.", f"<image>\n{question}"),  # another label in the same words
        of([], "no finding.", f"<image>\n{question}"),
    ]
    path = tmp_path / "several.json"
    path.write_text(json.dumps(changed))
    dataset, _ = build(path, vitask_stage=2)
    assert not dataset.negatives.relaxed
    may = [[other for other in range(5) if dataset.negatives.contrast(index, other)] for index in range(5)]
    assert may == [[4], [3, 4], [4], [1, 4], [0, 1, 2, 3]]


def test_words_that_differ_in_nothing_that_is_seen_are_the_same(build, mixed_data, tmp_path):
    """NFC, NFD and characters without width, in a question, an answer and the labels of two tasks."""
    images = json.loads((mixed_data / "train.json").read_text())[6:11]

    def of(task, name, label, question, answer):
        block = {"task": task, "label": label, "choices": [name, "mole"]}
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        return {**images.pop(), "vitask": block, "conversations": turns}

    composed, decomposed = "n\u00e9vus", "ne\u0301vus"
    changed = [
        of("a", composed, 0, f"A {composed}?", f"a {composed}."),
        of("a", composed, 0, f"A {decomposed}?", f"a {decomposed}."),
        of("a", composed, 1, f"A {composed}?", f"a {decomposed}."),  # another label in the same words
        of("a", composed, 1, f"A\u200b {decomposed}?", "mole."),
        of("b", decomposed, 0, f"A {composed}?", f"it is a {composed}."),
    ]
    path = tmp_path / "words.json"
    path.write_text(json.dumps(changed))
    dataset, _ = build(path, vitask_stage=2)
    assert not dataset.negatives.relaxed and len(set(dataset.negatives.groups)) == 1
    may = [[other for other in range(5) if dataset.negatives.contrast(index, other)] for index in range(5)]
    assert may == [[3], [3], [4], [0, 1, 4], [2, 3]]


def test_one_image_with_two_labels_is_refused(build, mixed_data, tmp_path):
    samples = json.loads((mixed_data / "train.json").read_text())
    first, other = next(
        (one, two) for one in samples[6:] for two in samples[6:] if one["vitask"]["label"] != two["vitask"]["label"]
    )
    path = tmp_path / "twice.json"
    path.write_text(json.dumps([*samples, {**other, "image": first["image"]}]))
    build()
    sentence = f"image {first['image']!r} has the label .*, and an earlier sample of task .* gives it"
    with pytest.raises(VITaskError, match=sentence):
        build(path)


def test_labels_that_are_asked_for_in_different_words_are_contrasted(build, mixed_data, tmp_path):
    """One label only ever with the complete question, the other ones with the incomplete one."""
    samples = [s for s in json.loads((mixed_data / "train.json").read_text())[6:] if s["vitask"]["label"] < 2]
    changed = [asked(s, "<image>\nWhich stripes?") if s["vitask"]["label"] else s for s in samples]
    path = tmp_path / "words.json"
    path.write_text(json.dumps(changed))
    dataset, _ = build(path, vitask_stage=2)
    assert len(dataset.negatives.relaxed) == len(samples)
    for index, negative in sampler_of(dataset, 4):
        assert samples[index]["vitask"]["label"] != samples[negative]["vitask"]["label"]


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
    dataset, collator = build()
    copy = tmp_path / "images"
    shutil.copytree(mixed_data / "images", copy)
    store, hashed = FeatureStore.open(feature_store), dataset.task_images()
    Exemplars(collator.vitask, dataset, survey(copy, dataset.images(), hashed), store)
    last = dataset.list_data_dict[-1]["image"]
    Image.new("RGB", (28, 28), "red").save(copy / last)
    with pytest.raises(VITaskError, match=last):
        Exemplars(collator.vitask, dataset, survey(copy, dataset.images(), hashed), store)
