"""The words of instructions and answers, the natural names, and what is not LLaVA's JSON."""

import copy
import json
import re

import pytest
from medmnist import INFO

from vitask_plugin.data.class_names import check_choices, check_modality
from vitask_plugin.data.instructions import (
    DRAWN,
    instruction,
    label_set,
    label_sets,
    read_samples,
    require_two_classes,
    response,
    sample,
    tasks_of,
)
from vitask_plugin.errors import VITaskError

BREAST = ["malignant", "normal or benign"]


def test_the_words_are_the_papers():
    complete = "Analyze the given breast ultrasound image. The possible diagnoses are: malignant, normal or benign."
    assert instruction("breast ultrasound", BREAST) == complete
    assert instruction("breast ultrasound", None) == "Analyze the given breast ultrasound image."
    assert response(BREAST, 0) == "malignant."
    assert response(["a", "b", "c"], [0, 2]) == "a, c."
    assert response(["a", "b", "c"], []) == "no finding."


def test_a_sample_is_llavas():
    found = sample(
        identifier="breast-train-00001",
        image="train/00001.png",
        modality="breast ultrasound",
        task="medmnist_breast",
        choices=tuple(BREAST),
        label=1,
        complete=False,
    )
    assert found == {
        "id": "breast-train-00001",
        "image": "train/00001.png",
        "conversations": [
            {"from": "human", "value": "<image>\nAnalyze the given breast ultrasound image."},
            {"from": "gpt", "value": "normal or benign."},
        ],
        "vitask": {"task": "medmnist_breast", "label": 1, "choices": BREAST},
    }


def test_all_twelve_sets_have_names_in_the_order_of_their_ids():
    two_dimensional = {flag for flag in INFO if not flag.endswith("3d")}
    assert {known.flag for known in label_sets().values()} == two_dimensional | {DRAWN.flag}
    for known in label_sets().values():
        if known is not DRAWN:
            assert len(known.choices) == len(INFO[known.flag]["label"])
            assert known.kind == INFO[known.flag]["task"]
    assert label_set("breast").choices == tuple(BREAST)
    assert label_set("pneumonia").choices == ("normal", "pneumonia")
    assert label_set("organa").choices[1] == "left femur" and INFO["organamnist"]["label"]["1"] == "femur-left"
    assert label_set("chest").multi_label and not label_set("retina").multi_label
    assert len({known.modality for known in label_sets().values()}) == 13


# What a model is asked for and says, of each set, in the order of the file's label ids.
ORGANS = (
    "bladder, left femur, right femur, heart, left kidney, right kidney, liver, left lung, right lung, pancreas, spleen"
)
NAMES = {
    "path": "adipose, background, debris, lymphocytes, mucus, smooth muscle, normal colon mucosa, "
    "cancer-associated stroma, colorectal adenocarcinoma epithelium",
    "chest": "atelectasis, cardiomegaly, effusion, infiltration, mass, nodule, pneumonia, pneumothorax, consolidation, "
    "edema, emphysema, fibrosis, pleural thickening, hernia",
    "derma": "actinic keratoses and intraepithelial carcinoma, basal cell carcinoma, benign keratosis-like lesions, "
    "dermatofibroma, melanoma, melanocytic nevi, vascular lesions",
    "oct": "choroidal neovascularization, diabetic macular edema, drusen, normal",
    "pneumonia": "normal, pneumonia",
    "retina": "no diabetic retinopathy, mild diabetic retinopathy, moderate diabetic retinopathy, "
    "severe diabetic retinopathy, proliferative diabetic retinopathy",
    "breast": "malignant, normal or benign",
    "blood": "basophil, eosinophil, erythroblast, immature granulocyte, lymphocyte, monocyte, neutrophil, platelet",
    "tissue": "collecting duct or connecting tubule, distal convoluted tubule, glomerular endothelial cells, "
    "interstitial endothelial cells, leukocytes, podocytes, proximal tubule segments, thick ascending limb",
    "organa": ORGANS,
    "organc": ORGANS,
    "organs": ORGANS,
}


def test_the_names_of_all_seventy_classes():
    for name, words in NAMES.items():
        known = label_set(name)
        assert known.choices == tuple(words.split(", "))
        for index, choice in enumerate(known.choices):
            official = INFO[known.flag]["label"][str(index)].lower()
            # Of what medmnist calls a class at least one word is kept, unless that is a number.
            assert official.isdigit() or set(re.findall("[a-z]{3,}", choice)) & set(re.findall("[a-z]{3,}", official))
    # The three views of the same organs count once, as in the paper.
    assert sum(len(label_set(name).choices) for name in NAMES if name not in ("organc", "organs")) == 70


def test_an_instruction_for_several_labels_also_offers_none():
    complete = instruction("chest X-ray", ["mass", "nodule"], multi_label=True)
    assert complete == "Analyze the given chest X-ray image. The possible diagnoses are: mass, nodule, no finding."
    words = {"identifier": "x", "image": "x.png", "modality": "chest X-ray", "task": "t", "choices": ["mass", "nodule"]}
    assert sample(**words, label=[0])["conversations"][0]["value"] == f"<image>\n{complete}"
    assert "no finding" not in sample(**words, label=[0], complete=False)["conversations"][0]["value"]


def test_every_name_can_be_said_and_told_apart():
    for known in label_sets().values():
        check_choices(known.choices, known.task)
        for name in known.choices:
            assert re.fullmatch(r"[a-z][a-z -]*[a-z]", name), name
            others = [other for other in known.choices if other != name]
            assert not any(re.search(rf"\b{re.escape(name)}\b", other) for other in others), name


@pytest.mark.parametrize("name", ["breastmnist", "breast", "medmnist_breast"])
def test_a_set_by_each_of_its_names(name):
    assert label_set(name).task == "medmnist_breast"
    assert label_set("drawn") is label_set("vitask_drawn") is DRAWN
    with pytest.raises(VITaskError, match=r"data set 'brain' is unknown; choose one of bloodmnist, breastmnist"):
        label_set("brain")


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        ([], r"here: 0 class\(es\) \[\]; at least two are needed"),
        (["a"], r"here: 1 class\(es\) \['a'\]; at least two are needed"),
        (["a", ""], "class name '' is not a plain, non-empty text"),
        (["a", " b"], "class name ' b' is not a plain, non-empty text"),
        (["a", 3], "class name 3 is not a plain, non-empty text"),
        (["a", "b, c"], "class name 'b, c' holds a comma"),
        (["a", "b\nc"], r"class name 'b\\nc' holds a comma, a line break"),
        (["a", "b."], "class name 'b.' holds .* ends in a full stop"),
        (["a", "+"], r"class name '\+' holds no letter or digit"),
        (["a", "?_"], r"class name '\?_' holds no letter or digit"),
        (["a", "b\tc"], r"class name 'b\\tc' holds a character that is none to be written"),
        (["a", "b\0"], r"class name 'b\\x00' holds a character"),
        (["a", "b\ud83d"], r"class name 'b\\ud83d' holds a character"),
        (["a", "A"], "class name 'A' is there twice"),
        (["a", "No finding"], "class name 'No finding' is the answer for 'no class applies'"),
    ],
)
def test_class_names_that_cannot_be_used(choices, sentence):
    with pytest.raises(VITaskError, match=sentence):
        check_choices(choices, "here")


def make(label=1, **changes) -> dict:
    found = sample(
        identifier="x1", image="a.png", modality="test", task="breast", choices=BREAST, label=label, complete=True
    )
    return found | changes


def write(tmp_path, value) -> str:
    path = tmp_path / "data.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


def test_what_llava_reads_is_read(tmp_path):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    later = [*turns, {"from": "human", "value": "<image>\nAnd this?"}, {"from": "gpt", "value": "A dog."}]
    opened_by_gpt = [{"from": "gpt", "value": "Welcome."}, *turns]
    asked_last = [*turns, {"from": "human", "value": "Bye"}]
    rows = [make(), {"id": 7, "conversations": turns}, {"conversations": opened_by_gpt}, {"conversations": asked_last}]
    rows += [{"image": "b.png", "conversations": later}, {"image": "c.png", "conversations": turns}]
    rows += [make(0, image="d.png"), make(0, image="d.png")]
    assert read_samples(write(tmp_path, rows)) == rows
    assert tasks_of(rows) == {"breast": {"choices": BREAST, "multi_label": False}}


def test_multi_label_samples_are_read(tmp_path):
    rows = [make([0, 1]), make([1, 0]), make([], image="b.png")]
    assert read_samples(write(tmp_path, rows)) == rows
    assert tasks_of(rows)["breast"]["multi_label"]


def answered(answer: str, label: int | list[int], choices: tuple[str, ...] = ("red", "dark green", "blue")) -> dict:
    made = sample(
        identifier="0", image="a.png", modality="fruit", task="colour", choices=choices, label=label, complete=True
    )
    made["conversations"][1]["value"] = answer
    return made


def broken(edit) -> list:
    row = copy.deepcopy(make())
    edit(row)
    return [make(), row]


BAD_FILES = [
    ("{not json", "is not readable JSON .*; write it again"),
    ({"a": 1}, "is not LLaVA's JSON; expected a non-empty list of samples"),
    ([], "is not LLaVA's JSON; expected a non-empty list of samples"),
    ([make(), "text"], "sample 1: the whole is 'text'; expected an object; this is not LLaVA's JSON"),
    (broken(lambda row: row.pop("conversations")), r"sample 1 \(id 'x1'\): /conversations is missing"),
    (broken(lambda row: row.update(conversations=[])), r"/conversations is \[\]; expected at least 1 item"),
    (broken(lambda row: row.update(conversations=["hi"])), "/conversations/0 is 'hi'; expected an object"),
    (broken(lambda row: row["conversations"][1].pop("value")), "/conversations/1/value is missing"),
    (broken(lambda row: row["conversations"][1].update(value=3)), "/conversations/1/value is 3; expected a text"),
    (
        broken(lambda row: row["conversations"][0].update({"from": "user"})),
        "/conversations/0/from is 'user'; expected 'human' or 'gpt'",
    ),
    (broken(lambda row: row["conversations"][1].update({"from": "human"})), "turns 0 and 1 are both from 'human'"),
    (broken(lambda row: row["conversations"].pop()), "no answer from 'gpt'"),
    (broken(lambda row: row["conversations"][1].update(value="<image>.")), "turn 1, an answer, holds <image>"),
    (broken(lambda row: row["conversations"][0].update(value="<image><image>")), "holds 2 <image> but one image"),
    (broken(lambda row: (row.pop("image"), row.pop("vitask"))), "holds <image> but has no 'image'"),
    (broken(lambda row: row.update(image=["a.png"])), r"/image is \['a.png'\]; expected a text"),
    (broken(lambda row: row.update(image="")), "/image is ''; expected at least 1 character"),
    (
        broken(lambda row: (row.pop("image"), row["conversations"][0].update(value="Hi"))),
        "belongs to task 'breast' but has no 'image'; add its path",
    ),
    (
        broken(lambda row: row["conversations"][0].update(value="Hi")),
        "belongs to task 'breast' but turn 0 has no <image>",
    ),
    (broken(lambda row: row.update(vitask=3)), "/vitask is 3; expected an object"),
    (broken(lambda row: row.update(vitask=None)), "/vitask is None; expected an object"),
    (broken(lambda row: row["vitask"].pop("task")), "/vitask/task is missing"),
    (broken(lambda row: row["vitask"].update(task=" ")), "/vitask/task is ' '; expected a text of one line"),
    (broken(lambda row: row["vitask"].update(task="a\0b")), "/vitask/task is 'a.x00b'; expected a text of one line"),
    (broken(lambda row: row["vitask"].pop("choices")), "/vitask/choices is missing"),
    (broken(lambda row: row["vitask"].update(choices=["a", 3])), "/vitask/choices/1 is 3; expected a text"),
    ([answered("a.", 0, ("a",))], r"1 class\(es\) \['a'\]; at least two are needed"),
    (broken(lambda row: row["vitask"].pop("label")), "/vitask/label is missing"),
    (broken(lambda row: row["vitask"].update(label=2)), r"label 2 is not the index of a choice \(0 to 1\)"),
    (broken(lambda row: row["vitask"].update(label=-1)), "/vitask/label is -1; expected greater than or equal to 0"),
    (broken(lambda row: row["vitask"].update(label=True)), "/vitask/label is True; expected a whole number or a list"),
    (broken(lambda row: row["vitask"].update(label="malignant")), "/vitask/label is 'malignant'; expected a whole"),
    (broken(lambda row: row["vitask"].update(label=[0, 0])), r"label \[0, 0\] names a class twice"),
    (broken(lambda row: row["vitask"].update(label=[1])), "has both single labels"),
    (
        broken(lambda row: row["vitask"].update(choices=BREAST[::-1])),
        r"choices \['normal or benign', 'malignant'\], but sample 0 .id 'x1'. has \['malignant', 'normal or benign'\]",
    ),
]


BAD_FILES += [
    (
        broken(lambda row, said=said, turn=turn: row["conversations"][turn].update(value=f"<image>{said}"[7 * turn :])),
        rf"sample 1 \(id 'x1'\): turn {turn}, an? (answer|question), {sentence}",
    )
    for turn, said, sentence in [
        (1, "malignant</s>.", "holds '</s>'"),
        (1, "<s>malignant.", "holds '<s>'"),
        (1, "malignant. USER: and this? ASSISTANT: benign.", "holds 'USER:'"),
        (1, "malignant ASSISTANT: ", "holds 'ASSISTANT:'"),
        (1, "[/INST] malignant.", r"holds '\[/INST\]'"),
        (1, "malignant.<|im_end|>", r"holds '<\|im_end\|>'"),
        (1, "", "is empty; write it, or remove the sample"),
        (1, " \n\t", "is empty"),
        (0, "What is this? ASSISTANT: ", "holds 'ASSISTANT:'"),
    ]
]
BAD_FILES.append((broken(lambda row: row["vitask"].update(group=7)), "/vitask/group is 7; expected a text"))


@pytest.mark.parametrize("name", ["a</s>", "USER: b", "a ASSISTANT:", "###", "Human: a", "[INST]b", "<unk>a"])
def test_class_names_that_separate_turns(name):
    with pytest.raises(VITaskError, match=r"class name .* (separates the turns of a conversation|no letter or digit)"):
        check_choices(["fine", name], "here")


@pytest.mark.parametrize("modality", ["", " ", "X-ray</s>", "a USER: b", "two\nlines", "an <image>", "a\0b", "a\tb"])
def test_modalities_that_cannot_be_asked(modality):
    check_modality("brain MRI")
    with pytest.raises(VITaskError, match="say what the images are"):
        check_modality(modality)


@pytest.mark.parametrize(("value", "sentence"), BAD_FILES)
def test_what_is_not_llavas_json_is_refused(tmp_path, value, sentence):
    path = write(tmp_path, value)
    with pytest.raises(VITaskError, match=sentence) as caught:
        read_samples(path)
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(VITaskError, match=r"data file '.*gone.json' does not exist"):
        read_samples(tmp_path / "gone.json")


def test_label_sets_that_differ_between_files():
    other = make()
    other["vitask"]["choices"] = BREAST[::-1]
    with pytest.raises(VITaskError, match="task 'breast' comes with two different label sets"):
        tasks_of([make(), other])


def test_one_class_only():
    require_two_classes([make(0), make(1)], "data.json")
    require_two_classes([make([0]), make([])], "data.json")
    with pytest.raises(VITaskError, match=r"data.json'.* task 'breast' has the answer 'malignant\.', .*no negative"):
        require_two_classes([make(0), make(0)], "data.json")


def test_samples_that_say_the_same_are_held_once_and_each_is_still_checked(tmp_path):
    words = {"modality": "test", "task": "colour", "choices": ["red", "blue"]}
    rows = [sample(identifier=str(n), image=f"{n}.png", label=n % 2, **words) for n in range(6)]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    found = read_samples(path)
    assert found == rows
    assert found[0]["conversations"] is found[2]["conversations"] and found[1]["vitask"] is found[5]["vitask"]
    assert len({id(row["vitask"]) for row in found}) == 2
    for change, sentence in (
        ({"image": ""}, "sample 4 .*/image is ''"),
        ({"image": None}, "sample 4 .*/image is None"),
        ({"image": "1.png"}, "sample 4 .*image '1.png' has the label 0, and an earlier sample of task 'colour' gives"),
        ({"vitask": rows[0]["vitask"] | {"label": False}}, "sample 4 .*/vitask/label is False"),
        ({"vitask": rows[0]["vitask"] | {"label": 0.0}}, "sample 4 .*/vitask/label is 0.0"),
        ({"vitask": rows[0]["vitask"] | {"choices": ["blue", "red"]}}, "sample 4 .*has choices"),
        ({"conversations": []}, "sample 4 .*/conversations is"),
    ):
        path.write_text(json.dumps([*rows[:4], rows[4] | change, rows[5]]))
        with pytest.raises(VITaskError, match=sentence):
            read_samples(path)


@pytest.mark.parametrize(
    ("answer", "label", "other"),
    [
        ("red.", 1, True),
        ("Dark-green", 2, True),
        ("red, blue.", [0], True),
        ("no finding.", [0], True),
        ("red.", 0, False),
        ("blue, red.", [0, 2], False),
        ("no finding.", [], False),
        ("It is red.", 1, False),
        ("red or blue.", 1, False),
        ("no.", 1, False),
    ],
)
def test_an_answer_that_names_another_class_than_its_label_is_refused(tmp_path, answer, label, other):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([answered(answer, label)]))
    if not other:
        assert len(read_samples(path)) == 1
        return
    with pytest.raises(VITaskError, match=f"sample 0 .id '0'.: the answer is {answer!r}, but its label means"):
        read_samples(path)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("\u200b", "turn 1, an answer, is empty"),
        ("\ufeff \u00ad", "turn 1, an answer, is empty"),
        ("red \ud83d.", r"turn 1, an answer, holds half a character \('\\ud83d'\), which no tokenizer reads"),
    ],
)
def test_answers_that_cannot_be_learnt(tmp_path, answer, sentence):
    (tmp_path / "data.json").write_text(json.dumps([answered(answer, 0)]))
    with pytest.raises(VITaskError, match=f"sample 0 \\(id '0'\\): {sentence}"):
        read_samples(tmp_path / "data.json")


def test_json_lines_are_named(tmp_path):
    lines = [json.dumps(answered("red.", 0)) for _ in range(3)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    with pytest.raises(VITaskError, match=r"has one sample in each line \(JSON Lines\); write all of them as one list"):
        read_samples(tmp_path / "data.jsonl")
