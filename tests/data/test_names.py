"""Names that look equal: in folders, tables, --labels, hand-written JSON, label sets of a TSM, and answers."""

import itertools
import json
import unicodedata

import pytest
from own_images import converts, csv, fails, fill
from pictures import save

from vitask_plugin.data.class_names import check_choices
from vitask_plugin.data.instructions import read_samples, same_task, sample, tasks_of
from vitask_plugin.data.names import look, plain
from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.answers import parse_flexible, parse_strict

NFC, NFD = "n\u00e9vus", "ne\u0301vus"
INVISIBLE = [NFD, f"{NFC} ", f"\u00a0{NFC}", "n\u200b\u00e9vus", f"{NFC}\ufeff", f"{NFC}\u00ad", f"\u202a{NFC}\u202c"]
ALIKE = [
    ("Red", "red"),
    ("1", "01"),
    ("1", "1.0"),
    ("grade 1", "grade 01"),
    ("x-ray", "x\u2011ray"),
    ("x-ray", "x\u2013ray"),
    ("x-ray", "x ray"),
    ("\uff21\uff22", "AB"),
    ("\u0441at", "cat"),
    ("Bowen\u2019s", "Bowen's"),
    ("stra\u00dfe", "STRASSE"),
    ("\ufb01brosis", "fibrosis"),
]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source" / "names"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", INVISIBLE)
def test_what_cannot_be_seen_is_one_name(name):
    assert plain(name) == NFC and unicodedata.is_normalized("NFC", plain(name))


@pytest.mark.parametrize(("left", "right"), ALIKE)
def test_names_that_look_alike_are_refused_and_both_shown(left, right):
    assert look(left) == look(right) and plain(left) != plain(right)
    with pytest.raises(VITaskError) as caught:
        check_choices([left, "other", right], "here")
    assert repr(left) in str(caught.value) and repr(right) in str(caught.value)
    assert all(name.isascii() or ascii(name) in str(caught.value) for name in (left, right))


def test_names_that_differ():
    names = ["T1", "T2", "grade 1", "grade 10", "A+", "A-", "-1", "1", "n\u00e9vus", "nevus", "\u0440\u0430\u043a"]
    for left, right in itertools.combinations(names, 2):
        assert look(left) != look(right)
    check_choices(names, "here")
    # Joiners shape Persian letters: they stay.
    assert plain("\u0645\u06cc\u200c\u0634\u0648\u062f") == "\u0645\u06cc\u200c\u0634\u0648\u062f"


def test_folders_of_one_name_in_two_forms_are_one_class(source):
    fill(source, {"red": 4, "blue": 4})
    for number, name in enumerate([NFC, NFD, f"{NFC}\u200b"]):
        save(source / name / f"{number}.png", "green", 500 + number)
    found = converts(source)
    assert found["train"][0]["vitask"]["choices"] == ["blue", NFC, "red"]
    assert sum(row["vitask"]["label"] == 1 for rows in found.values() for row in rows) == 3


def test_folders_whose_names_look_alike(source, capsys):
    fill(source, {"red": 4, "blue": 4})
    save(source / "Red" / "a.png", "red", 900)
    error = fails(source, capsys)
    assert "the classes 'Red' and 'red' look the same; put their images into one folder, or rename one" in error


def test_labels_of_a_table(source, capsys):
    fill(source, {"red": 6})
    cells = [NFC, NFD, f" {NFC}\u00a0", "b", "b\u200b", "b  "]
    lines = [f"red/{number:02d}.png,{cell}" for number, cell in enumerate(cells)]
    found = converts(csv(source, "image,label\n" + "\n".join(lines)), "--val", "0", "--test", "0")
    assert {row["conversations"][1]["value"] for row in found["train"]} == {f"{NFC}.", "b."}
    lines = [f"red/{number:02d}.png,{cell}" for number, cell in enumerate(["1", "1.0", "2", "2.0", "1", "2"])]
    table = csv(source, "image,label\n" + "\n".join(lines))
    assert "'1.0' is there twice, the other time as '1'" in fails(table, capsys)
    error = fails(table, capsys, "--labels", "1,2", "--val", "0", "--test", "0")
    assert "row 3 ('red/01.png'): label '1.0' is unknown; expected one of 1, 2; it looks like '1'" in error
    assert set(converts(csv(source, f"image,label\nred/00.png,{NFD}\nred/01.png,b\n"), "--labels", f"b,{NFC}",
                        "--val", "0", "--test", "0")) == {"train"}  # fmt: skip


def test_image_names_of_a_table_in_another_form_than_on_disk(source, capsys):
    save(source / "bilder" / f"{NFD}.png", "red", 1)
    save(source / "bilder" / "b.png", "blue", 2)
    table = csv(source, f"image,label\nbilder/{NFC}.png,a\nbilder/b.png,b\n")
    assert len(converts(table, "--val", "0", "--test", "0")["train"]) == 2
    table = csv(source, f"image,label\nbilder/{NFC}.png,a\nbilder/B.PNG,b\n")
    error = fails(table, capsys, "--val", "0", "--test", "0")
    assert "row 3: there is no image 'B.PNG' in" in error and "but 'b.png'; write the name as the file's" in error


def test_hand_written_json(tmp_path):
    words = {"image": "a.png", "modality": "x", "task": "t"}
    rows = [sample(identifier=str(n), choices=[name, "b"], label=0, **words) for n, name in enumerate([NFC, NFD])]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(VITaskError) as caught:
        read_samples(path)
    assert r"'n\xe9vus'" in str(caught.value) and r"'ne\u0301vus'" in str(caught.value)
    for name in (NFC, NFD):  # each by itself is what earlier versions wrote
        path.write_text(json.dumps([sample(identifier="0", choices=[name, "b"], label=0, **words)]))
        assert read_samples(path)[0]["vitask"]["choices"][0] == name


def test_label_sets_of_two_files_may_differ_in_what_cannot_be_seen():
    words = {"image": "a.png", "modality": "x", "task": "t", "label": 0}
    rows = [sample(identifier=str(n), choices=[name, "b"], **words) for n, name in enumerate([NFC, NFD])]
    assert tasks_of(rows)["t"]["choices"] == [NFC, "b"]
    left, right = ({"choices": [name, "b"], "multi_label": False} for name in (NFC, NFD))
    assert same_task(left, right) and not same_task(left, {**right, "choices": ["b", NFD]})


@pytest.mark.parametrize(("said", "known"), [(NFD, NFC), (NFC, NFD), (f"{NFC}\u200b", NFC), (NFC, NFC)])
def test_answers_in_another_form_are_read(said, known):
    choices = ["melanoma", known]
    assert parse_strict(f"{said}.", choices) == parse_flexible(f"{said}.", choices) == 1
    assert parse_strict(f"melanoma, {said}.", choices, multi_label=True) == [0, 1]
    assert parse_flexible(f"This is a {said.upper()}", choices) == 1


def test_answers_in_other_widths_and_hyphens_are_read():
    choices = ["x-ray artefact", "tumour"]
    assert parse_flexible("It is an x\u2011ray artefact", choices) == 0
    assert parse_flexible("\uff34\uff35\uff2d\uff2f\uff35\uff32\uff0e", choices) == 1
    assert parse_strict("x-ray\nartefact.", choices) is None
