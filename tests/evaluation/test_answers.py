"""Answers in words to labels, as tables of strings."""

import pytest

from vitask_plugin.data.instructions import label_sets, response
from vitask_plugin.evaluation.answers import parse_flexible, parse_strict

BREAST = label_sets()["medmnist_breast"].choices
RETINA = label_sets()["medmnist_retina"].choices
DERMA = label_sets()["medmnist_derma"].choices
BLOOD = label_sets()["medmnist_blood"].choices
OCT = label_sets()["medmnist_oct"].choices
ORGANS = label_sets()["medmnist_organa"].choices
PNEUMONIA = label_sets()["medmnist_pneumonia"].choices
TISSUE = label_sets()["medmnist_tissue"].choices
CHEST = label_sets()["medmnist_chest"].choices
NESTED = ("nevus", "melanocytic nevus", "melanoma")
NEGATED = ("retinopathy", "no retinopathy")
SIGNS = ("+", "?", "unclear")
KIDNEYS = ("left kidney", "right kidney")

STRICT = [
    ("malignant.", BREAST, 0),
    ("  normal or benign.\n", BREAST, 1),
    ("malignant", BREAST, 0),
    ("Malignant.", BREAST, None),
    ("malignant..", BREAST, None),
    ("malignant!", BREAST, None),
    ("It is malignant.", BREAST, None),
    ("benign.", BREAST, None),
    ("", BREAST, None),
    (".", BREAST, None),
    ("malignant, normal or benign.", BREAST, None),
    ("no diabetic retinopathy.", RETINA, 0),
    ("no finding.", BREAST, None),
]

STRICT_LISTS = [
    ("no finding.", []),
    ("mass.", [4]),
    ("effusion, mass.", [2, 4]),
    ("mass, effusion", [2, 4]),
    ("pleural thickening, hernia.", [12, 13]),
    ("Effusion, mass.", None),
    ("effusion and mass.", None),
    ("effusion,mass.", None),
    ("effusion, effusion.", None),
    ("effusion, no finding.", None),
    ("effusion, ", None),
    ("", None),
    ("normal.", None),
]

FLEXIBLE = [
    # as asked
    ("malignant.", BREAST, 0),
    ("no diabetic retinopathy.", RETINA, 0),
    # case, punctuation, articles, number, sentences
    ("Malignant!", BREAST, 0),
    ("MALIGNANT", BREAST, 0),
    ('"normal, or benign"', BREAST, 1),
    ("The diagnosis is malignant.", BREAST, 0),
    ("It shows a malignant mass", BREAST, 0),
    ("**Malignant**", BREAST, 0),
    ("malignant malignant malignant", BREAST, 0),
    ("Answer:malignant;", BREAST, 0),
    ("This eye has No diabetic retinopathy", RETINA, 0),
    ("a Neutrophil.", BLOOD, 6),
    ("neutrophils", BLOOD, 6),
    ("the spleen's outline", ORGANS, 10),
    ("Podocyte", TISSUE, 5),
    # synonyms, also inside a sentence
    ("benign", BREAST, 1),
    ("It is normal, not malignant.", BREAST, 1),
    ("normal, benign", BREAST, 1),
    ("mild NPDR", RETINA, 1),
    ("severe non-proliferative diabetic retinopathy", RETINA, 3),
    ("severe nonproliferative diabetic retinopathy", RETINA, 3),
    ("No signs of diabetic retinopathy.", RETINA, 0),
    ("PDR", RETINA, 4),
    ("Melanocytic naevus", DERMA, 5),
    ("This is a BCC.", DERMA, 1),
    ("seborrheic keratosis", DERMA, 2),
    ("actinic keratosis", DERMA, 0),
    ("DME is seen", OCT, 1),
    ("a healthy retina", OCT, 3),
    ("no finding", PNEUMONIA, 0),
    ("kidney-left", ORGANS, 4),
    ("left-kidney", KIDNEYS, 0),
    ("collecting duct", TISSUE, 0),
    # no label, or a part of a word or of a label
    ("", BREAST, None),
    (".", BREAST, None),
    ("I cannot tell.", BREAST, None),
    ("malignancy", BREAST, None),
    ("nonmalignant", BREAST, None),
    ("diabetic retinopathy", RETINA, None),
    ("nonproliferative diabetic retinopathy", RETINA, None),
    ("mild", RETINA, None),
    ("kidney", ORGANS, None),
    ("A", BREAST, None),
    ("0", BREAST, None),
    # two labels at once
    ("malignant, normal or benign", BREAST, None),
    ("malignant or benign", BREAST, None),
    ("The possible diagnoses are: malignant, normal or benign. malignant", BREAST, None),
    ("mild diabetic retinopathy or severe diabetic retinopathy", RETINA, None),
    ("mild to moderate diabetic retinopathy", RETINA, None),
    ("mild/moderate diabetic retinopathy", RETINA, None),
    ("the left or right kidney", ORGANS, None),
    ("normal, pneumonia", PNEUMONIA, None),
    # negation
    ("not malignant", BREAST, None),
    ("This is not malignant.", BREAST, None),
    ("It isn't malignant", BREAST, None),
    ("It isn\u2019t malignant", BREAST, None),
    ("non-malignant", BREAST, None),
    ("pre-malignant", BREAST, None),
    ("no evidence of anything malignant", BREAST, None),
    ("malignant is unlikely", BREAST, None),
    ("Malignant? No.", BREAST, None),
    ("malignant: no", BREAST, None),
    ("negative for pneumonia", PNEUMONIA, None),
    ("no pneumonia", PNEUMONIA, None),
    ("pneumonia is ruled out", PNEUMONIA, None),
    ("not malignant, normal or benign", BREAST, 1),
    ("It is not malignant but normal or benign.", BREAST, 1),
    ("benign rather than malignant", BREAST, 1),
    ("Rather than benign, malignant", BREAST, 0),
    ("neither malignant nor benign", BREAST, None),
    ("No, it is malignant", BREAST, 0),
    ("Is it benign? No. It is malignant.", BREAST, 0),
    ("malignant without doubt", BREAST, 0),
    ("no mild diabetic retinopathy", RETINA, None),
    ("No, moderate diabetic retinopathy", RETINA, 2),
    ("no sign of retinopathy", NEGATED, None),
    ("There is no retinopathy here", NEGATED, 1),
    ("retinopathy is there", NEGATED, 0),
    ("no diabetic retinopathy or mild diabetic retinopathy", RETINA, None),
    # a list after a negation
    ("no drusen, CNV", OCT, None),
    ("no drusen, or CNV is seen", OCT, None),
    ("no drusen, it is CNV", OCT, 0),
    ("no drusen, normal", OCT, 3),
    ("not normal, drusen", OCT, 2),
    ("Not the liver, spleen", ORGANS, None),
    ("Not the liver, it is the spleen", ORGANS, 10),
    ("not the liver (spleen)", ORGANS, None),
    ("not (malignant)", BREAST, None),
    ("not malignant, benign", BREAST, 1),
    ("not malignant (benign)", BREAST, 1),
    # other words that deny
    ("The lungs are free of pneumonia", PNEUMONIA, None),
    ("The lungs are clear of pneumonia", PNEUMONIA, None),
    ("It is clear that this is pneumonia", PNEUMONIA, 1),
    ("pneumonia-free", PNEUMONIA, None),
    ("The image fails to show pneumonia", PNEUMONIA, None),
    ("It failed to show pneumonia", PNEUMONIA, None),
    ("ruling out pneumonia", PNEUMONIA, None),
    ("rule out pneumonia", PNEUMONIA, None),
    ("This rules out pneumonia", PNEUMONIA, None),
    ("This excludes pneumonia", PNEUMONIA, None),
    ("excluding pneumonia", PNEUMONIA, None),
    ("unable to see pneumonia", PNEUMONIA, None),
    ("Pneumonia: False", PNEUMONIA, None),
    ("Pneumonia: not seen", PNEUMONIA, None),
    ("Pneumonia (not present)", PNEUMONIA, None),
    ("Pneumonia is seen", PNEUMONIA, 1),
    ("Pneumonia: present", PNEUMONIA, 1),
    ("anything but malignant", BREAST, None),
    ("far from malignant", BREAST, None),
    ("by far malignant", BREAST, 0),
    ("hardly malignant", BREAST, None),
    ("less likely malignant", BREAST, None),
    ("likely malignant", BREAST, 0),
    ("Malignant: false", BREAST, None),
    # brackets and dashes
    ("malignant (not benign)", BREAST, 0),
    ("malignant [not benign]", BREAST, 0),
    ("benign (non-malignant)", BREAST, 1),
    ("malignant - not benign", BREAST, 0),
    ("malignant \u2013 not benign", BREAST, 0),
    ("malignant \u2014 not benign", BREAST, 0),
    ("malignant\u2014not benign", BREAST, 0),
    ("malignant -- not benign", BREAST, 0),
    ("Malignant - no", BREAST, None),
    ("Normal (no pneumonia)", PNEUMONIA, 0),
    ("no (acute) pneumonia", PNEUMONIA, None),
    # underlines
    ("_malignant_", BREAST, 0),
    ("__not_malignant__", BREAST, None),
    # more synonyms, and what only looks like a label
    ("moderate non-proliferative DR", RETINA, 2),
    ("mild nonproliferative DR", RETINA, 1),
    ("seborrheic keratoses", DERMA, 2),
    ("nevi", DERMA, 5),
    ("gall bladder", ORGANS, None),
    ("gall-bladder", ORGANS, None),
    ("urinary bladder", ORGANS, 0),
    # names without words
    ("It is unclear", SIGNS, 2),
    ("+", SIGNS, 0),
    ("It is +", SIGNS, None),
    ("", SIGNS, None),
    # labels inside labels
    ("a melanocytic nevus", NESTED, 1),
    ("a nevus", NESTED, 0),
    ("Melanocytic nevus, not melanoma", NESTED, 1),
    ("a nevus, a melanocytic nevus", NESTED, None),
    # a synonym that is a label of its own here
    ("benign", ("normal or benign", "benign"), 1),
]

FLEXIBLE_LISTS = [
    ("effusion, mass.", [2, 4]),
    ("Mass and pleural effusion.", [2, 4]),
    ("There is cardiomegaly with pulmonary oedema", [1, 9]),
    ("Enlarged heart; nodules in both lungs", [1, 5]),
    ("No findings.", []),
    ("Normal chest X-ray.", []),
    ("None", []),
    ("No acute findings", []),
    ("cardiomegaly, no effusion", [1]),
    ("cardiomegaly without effusion", [1]),
    ("cardiomegaly and no effusion", [1]),
    ("mass but not pneumonia", [4]),
    # a list after a negation
    ("There is no nodule, mass, or effusion.", None),
    ("No effusion, pneumothorax, or consolidation is seen.", None),
    ("without effusion, mass or nodule", None),
    ("No focal consolidation, pleural effusion, or pneumothorax.", None),
    ("cardiomegaly without effusion, mass or nodule", [1]),
    ("No effusion, mass or nodule. There is cardiomegaly.", [1]),
    ("No effusion, but a mass, nodule", [4, 5]),
    ("No, mass, nodule", [4, 5]),
    ("pleural_thickening", [12]),
    ("Effusion (no mass)", [2]),
    ("No pleural (or other) effusion", None),
    # "normal" of a part of the image
    ("normal", []),
    ("The chest X-ray is normal.", []),
    ("Heart size is normal. Patchy opacity is seen.", None),
    ("Heart size is normal. No acute findings.", []),
    ("The heart is healthy, the lungs are hazy", None),
    # "no" label of the list is not the same as "no finding"
    ("no effusion", None),
    ("no finding, effusion", None),
    ("No findings of effusion", None),
    ("Otherwise normal, effusion", None),
    ("", None),
    ("The image shows a chest.", None),
]


@pytest.mark.parametrize(("text", "choices", "label"), STRICT)
def test_strict(text: str, choices: tuple[str, ...], label: int | None) -> None:
    assert parse_strict(text, choices) == label


@pytest.mark.parametrize(("text", "label"), STRICT_LISTS)
def test_strict_lists(text: str, label: list[int] | None) -> None:
    assert parse_strict(text, CHEST, multi_label=True) == label


@pytest.mark.parametrize(("text", "choices", "label"), FLEXIBLE)
def test_flexible(text: str, choices: tuple[str, ...], label: int | None) -> None:
    assert parse_flexible(text, choices) == label


@pytest.mark.parametrize(("text", "label"), FLEXIBLE_LISTS)
def test_flexible_lists(text: str, label: list[int] | None) -> None:
    assert parse_flexible(text, CHEST, multi_label=True) == label


@pytest.mark.parametrize("task", sorted(label_sets()))
def test_every_label_of_every_task_is_read_back_and_no_other(task: str) -> None:
    known = label_sets()[task]
    for index, name in enumerate(known.choices):
        label = [index] if known.multi_label else index
        options = {"multi_label": known.multi_label}
        assert parse_strict(response(known.choices, label), known.choices, **options) == label
        assert parse_strict(name.upper(), known.choices, **options) is None
        assert parse_flexible(f"The diagnosis is {name.upper()} here", known.choices, **options) == label
        assert parse_flexible(f"This is not {name}", known.choices, **options) is None
        if not known.multi_label:
            both = f"{name} or {known.choices[index - 1]}"
            assert parse_flexible(both, known.choices) is None, both


def test_several_labels_and_none_are_read_back() -> None:
    for label in ([], [0], [3, 7], list(range(len(CHEST)))):
        said = response(CHEST, label)
        assert parse_strict(said, CHEST, multi_label=True) == label
        assert parse_flexible(said.capitalize(), CHEST, multi_label=True) == label
