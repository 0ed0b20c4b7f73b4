"""How often samples are drawn: shares of sets and classes as they are promised, and off the order is what it was."""

import hashlib
import random
from collections import Counter

import pytest
from test_sampler import COUNTS, SETS, mixture, sampler_of

from vitask_plugin.method.balance import Balance
from vitask_plugin.method.negatives import Negatives
from vitask_plugin.method.sampler import ContrastiveSampler

# (samples of each class) of each set; None: general data.
DATA = {"derma": COUNTS["derma"], "retina": COUNTS["retina"], "breast": (147, 399), None: (500,)}


def balance_of(data, power, temperature):
    sets = [name for name, counts in data.items() for _ in range(sum(counts))]
    classes = [number for counts in data.values() for number, count in enumerate(counts) for _ in range(count)]
    return Balance(sets, classes, power=power, temperature=temperature), sets, classes


def expected(data, power, temperature):
    """Draws of each (set, class), written from the definition: every sample has a weight, and weights are shares."""
    sizes = {name: sum(counts) for name, counts in data.items() if name is not None}
    total = sum(sizes.values())
    all_sets = sum(size ** (1 / temperature) for size in sizes.values())
    found = {(None, 0): sum(data.get(None, ()))} if None in data else {}
    for name, size in sizes.items():
        weights = [count * count**-power for count in data[name]]
        for number, weight in enumerate(weights):
            share = size ** (1 / temperature) / all_sets * weight / sum(weights)
            found[name, number] = total * share
    return found


@pytest.mark.parametrize(("power", "temperature"), [(0.5, 1), (1, 1), (0, 2), (0.5, 4), (1, 1e9)])
def test_sets_and_classes_get_their_shares(power, temperature):
    balance, sets, classes = balance_of(DATA, power, temperature)
    wanted = expected(DATA, power, temperature)
    assert {(one.set, one.name or 0): one.draws for one in balance.classes} == pytest.approx(wanted)
    met = Counter()
    epochs = 40
    for epoch in range(epochs):
        drawn = balance.epoch(random.Random(epoch))
        assert len(drawn) == len(sets)
        once = Counter((sets[index], classes[index]) for index in drawn)
        assert all(abs(once[key] - draws) < 1 + 1e-6 for key, draws in wanted.items())
        met += once
    # Which epochs get the one more is chance; over 40 of them it comes out.
    assert {key: met[key] / epochs for key in wanted} == pytest.approx(wanted, abs=0.25)


def test_no_image_of_a_class_comes_twice_before_all_have_come_once():
    balance, sets, classes = balance_of(DATA, 1, 1e9)
    total = Counter()
    for epoch in range(20):
        drawn = Counter(balance.epoch(random.Random(epoch)))
        assert all(drawn[index] == 1 for index, name in enumerate(sets) if name is None)
        for one in balance.classes:
            counts = [drawn[index] for index in one.members]
            assert max(counts) - min(counts) <= 1
        total += drawn
    # Frequent classes are not drawn whole; over the epochs nobody is left out for good.
    nevi = [total[index] for index, key in enumerate(zip(sets, classes, strict=True)) if key == ("derma", 5)]
    assert sum(count == 0 for count in nevi) / len(nevi) < 0.2


def test_all_twelve_sets_of_medmnist_with_a_temperature():
    """The largest has 331 times the images of the smallest, and with T = 2 the root of that, 18 times the draws."""
    data = dict(enumerate(zip(SETS, strict=True)))
    balance, *_ = balance_of(data, 0, 2)
    draws = [one.draws for one in balance.classes]
    assert sum(draws) == pytest.approx(sum(SETS)) and max(draws) / min(draws) == pytest.approx(331**0.5)


def balanced(responses, size, instructions, **flags):
    """A sampler over labelled samples whose sets are their instructions."""
    sets = [None if instruction < 0 else instruction for instruction in instructions]
    balance = Balance(sets, responses, power=1, temperature=4)
    return sampler_of(responses, size, instructions, tasks=instructions, balance=balance, **flags)


def drawn_by(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("size", [1, 8, 20, 64])
def test_steps_are_dealt_of_what_is_drawn_and_negatives_stay_negatives(size):
    instructions, responses = mixture((7, 6, 4, 61, 2), general=9)
    sampler = balanced(responses, size, instructions)
    for epoch in range(3):
        order = drawn_by(sampler, epoch)
        assert len(order) == len(sampler) == 89
        counts = Counter(item.index for item in order)
        assert [counts[index] for index in range(80, 89)] == [1] * 9
        for index, negative in order:
            assert (negative < 0) == (instructions[index] < 0)
            if negative >= 0:
                assert instructions[index] == instructions[negative] and responses[index] != responses[negative]
        # The set of 61 gives way to that of 2, whose images come several times.
        of_set = Counter(instructions[item.index] for item in order)
        assert of_set[3] < 40 and of_set[4] > 8


def test_the_order_follows_seed_and_epoch_alone():
    """A sampler that has run an epoch goes on as one that begins there, as after a resume."""
    instructions, responses = mixture((40, 30, 20), general=10)
    first, second = (balanced(responses, 8, instructions) for _ in range(2))
    orders = [drawn_by(first, epoch) for epoch in range(3)]
    assert drawn_by(second, 2) == orders[2] and drawn_by(second, 0) == orders[0]
    assert orders[0] != orders[1] and orders[0] != drawn_by(balanced(responses, 8, instructions, seed=1), 0)


def test_without_negatives_the_same_is_drawn_and_text_stays_apart():
    instructions, responses = mixture((30, 33), general=21)
    sets = [None if instruction < 0 else instruction for instruction in instructions]
    balance = Balance(sets, responses, power=1, temperature=1)
    sampler = ContrastiveSampler(
        Negatives.of_nobody(84), 8, 0, text_only=range(63, 84), by_modality=True, balance=balance
    )
    order = drawn_by(sampler, 0)
    assert len(order) == 84 and {item.negative for item in order} == {-1}
    kinds = [{item.index >= 63 for item in order[start : start + 8]} for start in range(0, 84, 8)]
    assert kinds.count({False}) == 7 and kinds.count({True}) == 2 + 1
    rare = Counter(responses[item.index] for item in order if item.index < 30)
    assert max(rare.values()) - min(rare.values()) <= 1  # of 18, 6 and 6


def test_without_a_balance_the_order_is_what_it_was():
    """The digest is of the order before there was one."""
    draw = random.Random(3)
    instructions = [draw.choice([-1, -1, 0, 0, 0, 1, 2]) for _ in range(203)]
    responses = [-1 if one < 0 else 3 * one + draw.randrange(3) for one in instructions]
    text = [index for index in range(203) if instructions[index] < 0 and index % 2]
    sampler = sampler_of(responses, 32, instructions, tasks=instructions, seed=3, text_only=text, by_modality=True)
    orders = [tuple(item) for epoch in range(3) for item in drawn_by(sampler, epoch)]
    digest = hashlib.sha256(repr(orders).encode()).hexdigest()
    assert digest == "c0480d133eede30aedc8ad4e17d019ffb92fa1770060b132f2467003627bc32e"
