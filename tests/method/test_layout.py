"""What the collator foresees of upstream's expansion is what upstream does, whole and cut; branches share tokens."""

import pytest
import torch

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.method import layout

IMAGE, IGNORE = -200, -100


def expanded_rows(*args, **kwargs):
    from vitask_plugin.llava import compat

    compat.prepare()
    from vitask_plugin.llava import expansion

    return expansion.expanded_rows(*args, **kwargs)


@pytest.fixture
def model(tiny_checkpoint):
    from vitask_plugin.llava.loading import load

    model = load(tiny_checkpoint).model
    model.config.tokenizer_padding_side = "right"  # as in training
    return model


def image_tokens(model):
    return model.get_vision_tower().num_patches


@pytest.mark.parametrize("limit", [2048, 90, 70, 40, 8, 1])
def test_rows_are_where_upstream_puts_them(limit, model, build):
    """Places, labels and the width, on samples of every kind, for limits that cut answers, questions and images."""
    dataset, collator = build()
    batch = collator([dataset[index] for index in range(11)])
    labels = torch.stack([item for item in batch["labels"]])
    model.config.tokenizer_model_max_length = limit
    _, _, mask, _, embeds, expected = model.prepare_inputs_labels_for_multimodal(
        batch["input_ids"], None, batch["attention_mask"], None, labels.clone(), batch["images"]
    )
    given = labels.clone()
    rows, width, kept = expanded_rows(
        batch["input_ids"], batch["attention_mask"], given, image_tokens=image_tokens(model), limit=limit
    )
    assert width == embeds.shape[1]
    assert torch.equal(given, labels)  # the caller's are not written into
    lost = 0
    for number, row in enumerate(rows):
        places = torch.cat([row.prefix, row.text])
        assert places.tolist() == (number * width + mask[number].nonzero().squeeze(-1)).tolist()
        found = torch.cat([torch.full((len(row.prefix),), IGNORE), row.labels])
        assert torch.equal(found, expected[number][mask[number]])
        # The loss is divided by the labels that are left, and by no others.
        assert int((kept[number] != IGNORE).sum()) == int((row.labels != IGNORE).sum())
        lost += int((labels[number] != IGNORE).sum()) - int((row.labels != IGNORE).sum())
    assert (lost > 0) == (limit < 2048)


def test_the_prefix_ends_with_the_image(model, build):
    dataset, collator = build()
    batch = collator([dataset[index] for index in (6, 4, 3)])
    tokens = image_tokens(model)
    rows, _, _ = expanded_rows(
        batch["input_ids"], batch["attention_mask"], batch["labels"], image_tokens=tokens, limit=2048
    )
    task, text_only, answers_before_image = rows
    assert task.is_image.tolist() == [False] * (len(task.prefix) - tokens) + [True] * tokens
    assert len(text_only.prefix) == len(answers_before_image.prefix) == 0
    assert len(answers_before_image.text) > tokens


def three_rows(tokens=4, limit=100):
    """Prefix 2 + image, question 11 12 13, and answers of 1, 2 and 3 tokens; two of them begin alike."""
    answers = ([21], [22, 23], [22, 24, 25])
    ids = torch.zeros(3, 9, dtype=torch.int64)
    labels = torch.full((3, 9), IGNORE)
    for row, answer in enumerate(answers):
        sequence = [1, IMAGE, 11, 12, 13, *answer]
        ids[row, : len(sequence)] = torch.tensor(sequence)
        labels[row, 5 : len(sequence)] = torch.tensor(answer)
    return expanded_rows(ids, ids != 0, labels, image_tokens=tokens, limit=limit)


def branches(negatives, lengths, limit=100, engine="packed", replaces=False):
    rows, width, _ = three_rows(limit=limit)
    asked = [
        layout.Asked(number, number + 1, length, negative)
        for number, (length, negative) in enumerate(zip(lengths, negatives, strict=True))
    ]
    return layout.branches_of(rows, asked, width=width, slots=2, replaces=replaces, limit=limit, engine=engine)


def test_a_negative_lays_out_its_answer_alone():
    plain = branches([-1, -1, -1], [0, 0, 0])
    negative = branches([1, 2, 1], [0, 0, 0])
    # Laid out are prefix 5, question 3, and answers without their last token.
    assert (plain.layout.source > 0).sum() == 3 * (5 + 3) + 0 + 1 + 2 - 1  # place 0 is the first row's first token
    # Added: nothing for the answer of one token, nothing for the first of two (shared), 22 and 24 on the image of 1.
    assert (negative.layout.source > 0).sum() == (plain.layout.source > 0).sum() + 0 + 0 + 1
    assert negative.counts["negatives"] == negative.counts["in_batch_negatives"] == 3
    assert len(negative.negative) == len(negative.answers) == 6
    assert negative.negative_as.tolist() == [0, 1, 2, 3, 4, 5]


def test_branches_are_cut_where_upstream_would_cut_them():
    """Of 11 positions at most, prefix 5 and question 3 leave 3 for an answer, 1 with an exemplar of 2."""
    found = branches([1, 2, 1], [2, 2, 0], limit=10)
    # Plain: all of 1 and 2 tokens, 2 of 3. With exemplars: 10 - 5 - 2 - 3 leaves nothing.
    assert found.answers.tolist() == [21, 22, 23, 22, 24]
    assert len(found.prompted) == 0
    assert found.counts["cut_branches"] == 2 + 2  # both exemplar branches; plain and negative of the longest answer
    assert found.unanswered == []
    found = branches([1, 2, 1], [1, 1, 1], limit=10)
    assert found.prompted_as.tolist() == [0, 1, 3]  # one answer token each, the first
    gone = branches([1, 2, 1], [1, 0, 0], limit=8)
    assert gone.unanswered == [0, 1, 2] and gone.counts["unanswered"] == 3
    assert len(gone.answers) == len(gone.plain) == 0


def test_unequal_prefixes_cut_unequal_tails():
    """A negative image behind a longer prefix leaves less room, and only the tokens that are left are contrasted."""
    ids = torch.tensor([[1, IMAGE, 11, 21, 22, 23, 0, 0], [1, 5, 6, IMAGE, 11, 31, 0, 0]])
    labels = torch.where(ids > 20, ids, IGNORE)
    rows, width, _ = expanded_rows(ids, ids != 0, labels, image_tokens=2, limit=8)
    asked = [layout.Asked(0, 3, 0, 1), layout.Asked(1, 1, 0, 0)]
    found = layout.branches_of(rows, asked, width=width, slots=0, replaces=False, limit=8, engine="packed")
    assert found.answers.tolist() == [21, 22, 23, 31]
    assert found.negative_as.tolist() == [0, 1, 3]  # 23 of the first sample does not fit behind the second image
    assert found.counts["cut_branches"] == 1


def test_replace_has_a_document_of_its_own():
    found = branches([-1, -1, -1], [2, 1, 0], engine="branches", replaces=True)
    # 3 plain rows, then 2 without image tokens: 1 + exemplar + question + answer.
    (sources,) = found.layout.sources
    assert [int(length) for length in found.layout.masks[0].sum(dim=1)] == [9, 10, 11, 1 + 2 + 3 + 1, 1 + 1 + 3 + 2]
    assert sources.shape[0] == 5 and len(found.prompted) == 3


def test_both_engines_lay_out_the_same_tokens():
    for negatives, lengths in (([1, 2, 1], [2, 1, 0]), ([-1, 0, 0], [0, 0, 2])):
        packed = branches(negatives, lengths)
        separate = branches(negatives, lengths, engine="branches")
        for name in ("plain", "answers", "prompted", "prompted_as", "negative", "negative_as"):
            assert torch.equal(getattr(packed, name), getattr(separate, name)), name
        assert packed.counts == separate.counts


def test_a_batch_is_built_by_workers_and_moves_as_a_whole(build):
    """DataLoader workers hand the branches over, and what places a batch on a device finds them."""
    from accelerate.utils import send_to_device

    from vitask_plugin.method.sampler import ContrastiveSampler

    dataset, collator = build(vitask_stage=2)
    order = list(ContrastiveSampler(dataset.negatives, 6, seed=0))
    loader = torch.utils.data.DataLoader(dataset, batch_size=6, sampler=order, collate_fn=collator, num_workers=1)
    batch = next(iter(loader))
    here = collator([dataset[item] for item in order[:6]])["vitask"]["branches"]
    assert torch.equal(batch["vitask"]["branches"].layout.source, here.layout.source)
    moved = send_to_device({"vitask": batch["vitask"]}, "meta")["vitask"]["branches"]
    assert moved.layout.until.device.type == moved.answers.device.type == "meta"
    assert moved.counts == here.counts


def test_a_projector_that_merges_patches_is_refused(model, build):
    from vitask_plugin.errors import VITaskError
    from vitask_plugin.llava.batch import VITaskCollator

    dataset, collator = build(vitask_stage=1, vitask_ep="none")
    merged = VITaskCollator(dataset, collator.exemplars, collator.vitask, image_tokens=collator.image_tokens - 1)
    batch = merged([dataset[6], dataset[7]])
    model.connect(VITaskArguments(vitask=True, vitask_ep="none"), None)
    batch["vitask"]["denominator"] = torch.tensor(4)
    with pytest.raises(VITaskError, match="one token per patch"):
        model(**batch)
