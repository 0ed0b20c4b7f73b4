"""The order of stage 2 and its negatives, on ids alone: mixed steps, and the paper's draw whatever the proportions."""

import random
from collections import Counter
from itertools import chain

import pytest

from vitask_plugin.method.negatives import Negatives
from vitask_plugin.method.sampler import Contrasted, ContrastiveSampler

# Training images per class, as MedMNIST v2 publishes them; OCT's are a tenth.
COUNTS = {
    "derma": (228, 359, 769, 80, 779, 4693, 99),
    "retina": (486, 128, 206, 194, 66),
    "oct": (3348, 1021, 775, 4603),
}
# Training images of the twelve sets, in hundreds.
SETS = (900, 785, 70, 975, 47, 11, 5, 120, 1655, 346, 130, 139)


def sampler_of(responses, global_batch_size, instructions=None, tasks=None, labels=None, seed=0, **flags):
    count = len(responses)
    negatives = Negatives(
        instruction_ids=instructions or [0] * count,
        label_ids=labels or responses,
        response_ids=responses,
        task_ids=tasks or [0] * count,
    )
    return ContrastiveSampler(negatives, global_batch_size, seed, **flags)


def classes(counts):
    return [response for response, count in enumerate(counts) for _ in range(count)]


def epochs(sampler, number):
    for epoch in range(number):
        sampler.set_epoch(epoch)
        yield list(sampler)


def blocks(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]


@pytest.mark.parametrize("name, global_batch_size", [("derma", 4), ("derma", 128), ("retina", 4), ("oct", 128)])
def test_negatives_are_drawn_as_the_paper_draws_them(name, global_batch_size):
    """Total variation between P(class of the negative | class) over 20 epochs and that of the uniform draw.

    20 epochs of the rarest class are 1,300 draws, whose chance alone gives .02.
    """
    counts = COUNTS[name]
    responses, total = classes(counts), sum(counts)
    met = {response: Counter() for response in range(len(counts))}
    served = Counter()
    for order in epochs(sampler_of(responses, global_batch_size), 20):
        for index, negative in order:
            met[responses[index]][responses[negative]] += 1
            served[negative] += 1
    for own, found in met.items():
        expected = {other: count / (total - counts[own]) for other, count in enumerate(counts) if other != own}
        variation = sum(abs(found[other] / found.total() - share) for other, share in expected.items()) / 2
        assert found[own] == 0 and variation <= 0.04, (own, variation)
    # Within a class, images serve alike: nobody more than three times as often as the mean, and few never.
    for own, count in enumerate(counts):
        uses = [served[index] for index, response in enumerate(responses) if response == own]
        mean = sum(uses) / count
        assert max(uses) <= 3 * mean + 12, own
        assert sum(abs(use - mean) for use in uses) / sum(uses) / 2 <= 0.8 / mean**0.5, own


# Samples of each answer -> batch size -> extra images a sample, at most. Of one answer with share p, a batch of b has
# p^b batches without another one: each pays for one image.
EXTRA = {
    COUNTS["derma"]: {2: 0.25, 4: 0.055, 8: 0.007, 16: 0.001},
    COUNTS["retina"]: {2: 0.16, 4: 0.015, 8: 0.001, 16: 0},
    (3494, 1214): {2: 0.32, 4: 0.085, 8: 0.015, 16: 0.002},
}


@pytest.mark.parametrize("counts", EXTRA, ids=str)
@pytest.mark.parametrize("global_batch_size", [16, 128])
def test_batches_hold_the_negatives_they_need(counts, global_batch_size):
    responses = classes(counts)
    (order,) = epochs(sampler_of(responses, global_batch_size), 1)
    for size, most in EXTRA[counts].items():
        extra = sum(len({item.negative for item in b} - {item.index for item in b}) for b in blocks(order, size))
        assert extra <= most * len(order), (size, extra / len(order))


def mixture(sets, general=0):
    """Instructions and responses: six in ten of each set have one answer, the others one of two."""
    instructions = [number for number, count in enumerate(sets) for _ in range(count)]
    responses = [3 * number + (0, 0, 0, 1, 2)[place % 5] for place, number in enumerate(instructions)]
    return [*instructions, *[-1] * general], [*responses, *[-1] * general]


@pytest.mark.parametrize("sets", [SETS, (100,) * 12], ids=["medmnist", "equal"])
@pytest.mark.parametrize("general, global_batch_size", [(0, 32), (0, 128), (1500, 128)])
def test_a_step_is_mixed_over_data_sets(sets, general, global_batch_size):
    """At least nine tenths of the sets a step that a random order gives (9.7 of 12 at 128 samples a step)."""
    instructions, responses = mixture(sets, general)

    def held(order):
        steps = [step for step in blocks(order, global_batch_size) if len(step) == global_batch_size]
        return sum(len({instructions[index] for index in step}) for step in steps) / len(steps)

    shuffled = random.Random(0).sample(range(len(instructions)), len(instructions))
    (order,) = epochs(sampler_of(responses, global_batch_size, instructions, tasks=instructions), 1)
    assert held([item.index for item in order]) >= 0.9 * held(shuffled)
    assert all((item.negative < 0) == (instructions[item.index] < 0) for item in order)


@pytest.mark.parametrize("global_batch_size", [1, 3, 8, 20, 64])
def test_every_sample_once_and_general_ones_without_negative(global_batch_size):
    instructions, responses = mixture((7, 6, 4, 61, 2), general=9)
    for order in epochs(sampler_of(responses, global_batch_size, instructions, tasks=instructions), 3):
        assert sorted(item.index for item in order) == list(range(89))
        for index, negative in order:
            assert (negative < 0) == (instructions[index] < 0)
            if negative >= 0:
                assert instructions[index] == instructions[negative] and responses[index] != responses[negative]


def test_blocks_stand_where_batches_do_not_cut_them():
    """Of 12 equal sets, at 128 samples a step, nearly all batches of 8 hold one."""
    instructions, responses = mixture((160,) * 12)
    (order,) = epochs(sampler_of(responses, 128, instructions, tasks=instructions), 1)
    batches = blocks(order[: len(order) // 128 * 128], 8)
    whole = sum(len({instructions[item.index] for item in batch}) == 1 for batch in batches)
    assert whole >= 0.85 * len(batches)


def test_neighbours_of_one_answer_share_a_negative_from_beyond():
    """And 32 of one answer, too many for a batch, two of them."""
    sampler = sampler_of([0] * 32 + [1] * 200, 32)
    negatives = [item.negative for item in sampler.contrast(range(32), random.Random(0))]
    assert len({*negatives[:16]}) == len({*negatives[16:]}) == 1 and min(negatives) >= 32
    step = [0, 1, 2, 3, 40, 41, 42, 43]
    negatives = [item.negative for item in sampler.contrast(step, random.Random(0))]
    assert len({*negatives[:4]}) == len({*negatives[4:]}) == 1
    assert negatives[0] in step[4:] and negatives[4] in step[:4]


def test_a_sample_alone_meets_every_other_response_in_time():
    sampler = sampler_of([0, 0, 1, 2, 2, 2], 1)
    met = {index: Counter() for index in range(6)}
    for order in epochs(sampler, 400):
        for index, negative in order:
            met[index][negative] += 1
    for index, negatives in met.items():
        others = {other for other in range(6) if sampler.negatives.contrast(index, other)}
        assert negatives.keys() == others
        # 400 draws among 3 to 5: less than half of what is expected has a chance below 1e-6.
        assert min(negatives.values()) > 200 / len(others)


def test_text_only_samples_stay_together_where_asked():
    text = range(0, 64, 2)
    kinds = {}
    for by_modality in (False, True):
        (order,) = epochs(sampler_of([0] * 64, 8, [-1] * 64, text_only=text, by_modality=by_modality), 1)
        assert sorted(item.index for item in order) == list(range(64))
        kinds[by_modality] = [len({item.index % 2 for item in step}) for step in blocks(order, 8)]
    assert kinds[True] == [1] * 8 and sum(kinds[False]) > 8


def test_text_only_samples_are_kept_from_images_that_have_negatives():
    instructions, responses = mixture((30, 33), general=21)
    sampler = sampler_of(responses, 8, instructions, tasks=instructions, text_only=range(63, 84), by_modality=True)
    for order in epochs(sampler, 3):
        assert sorted(item.index for item in order) == list(range(84))
        kinds = [{item.index >= 63 for item in step} for step in blocks(order, 8)]
        # 63 with an image and 21 without: the remainders, 7 and 5, make a step of both and a short one.
        assert kinds.count({False}) == 7 and kinds.count({True}) == 3 and len(kinds) == 11


# Relaxed negatives -------------------------------------------------------------------------------------------------


def test_a_question_of_its_own_draws_from_its_task():
    """Two samples with own questions among 40 of one; uniform among all of the task with another label."""
    responses = [0] * 20 + [1] * 10 + [2] * 10 + [0, 1] + [3] * 9
    instructions = [0] * 40 + [1, 2] + [3] * 4 + [4] * 5
    tasks = [0] * 42 + [1] * 9
    labels = [0] * 20 + [1] * 10 + [2] * 10 + [0, 1] + [3] * 4 + [4] * 5
    responses[46:] = [4] * 5
    sampler = sampler_of(responses, 8, instructions, tasks, labels)
    assert sampler.negatives.relaxed == {40, 41, *range(42, 51)} and sampler.negatives.unmatched == []
    met = Counter()
    for order in epochs(sampler, 600):
        negatives = dict(order)
        assert all(tasks[index] == tasks[negative] and labels[index] != labels[negative] for index, negative in order)
        assert all(instructions[negatives[index]] == 0 for index in range(40))
        met[negatives[40]] += 1
    # 21 samples of the task have another label than sample 40, sample 41 among them.
    assert met.keys() == {*range(20, 40), 41}
    assert min(met.values()) > 600 / 21 / 3 and max(met.values()) < 2 * 600 / 21


def test_own_questions_of_a_whole_task_meet_in_the_batch():
    """A question for each sample (the patient's age in it) costs no more than one for all."""
    responses = classes(COUNTS["derma"])[::8]
    own = sampler_of(responses, 16, instructions=list(range(len(responses))))
    assert len(own.negatives.relaxed) == len(responses)
    (order,) = epochs(own, 1)
    extra = sum(len({i.negative for i in b} - {i.index for i in b}) for b in blocks(order, 8))
    assert extra <= 0.02 * len(order)


def test_another_label_and_another_answer():
    """Same label in other words, and other labels in the same words, are no negatives."""
    labels, responses = [0, 0, 1, 2, 2], [0, 1, 2, 2, 3]
    sampler = sampler_of(responses, 1, labels=labels)
    may = {index: {other for other in range(5) if sampler.negatives.contrast(index, other)} for index in range(5)}
    assert may == {0: {2, 3, 4}, 1: {2, 3, 4}, 2: {0, 1, 4}, 3: {0, 1}, 4: {0, 1, 2}}
    met = {index: set() for index in range(5)}
    for index, negative in chain.from_iterable(epochs(sampler, 100)):
        met[index].add(negative)
    assert met == may


def test_a_rare_answer_is_found_among_many_labels_with_one():
    """Labels 1 to 3,000 are all answered alike: of label 0's kind only the last sample answers otherwise."""
    responses = [0, *[0] * 3000, 1]
    sampler = sampler_of(responses, 1, labels=list(range(3002)))
    assert {sampler.negatives.drawn(0, random.Random(seed)) for seed in range(3)} == {3001}


def test_who_has_nobody_in_the_task():
    negatives = sampler_of([0, 0, 1, 1, 2], 4, [0, 1, 2, 2, 2], tasks=[0, 0, 1, 1, 1]).negatives
    assert negatives.unmatched == [0, 1] and negatives.relaxed == {0, 1}


def test_order_and_negatives_follow_seed_and_epoch_alone():
    instructions, responses = mixture((40, 30, 20), general=10)
    first, second = (list(sampler_of(responses, 8, instructions, tasks=instructions)) for _ in range(2))
    other = list(sampler_of(responses, 8, instructions, tasks=instructions, seed=1))
    assert first == second != other and isinstance(first[0], Contrasted)
