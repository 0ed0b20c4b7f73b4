"""What is said of validation data and the training, which goes into a file that is passed on."""

import json
from pathlib import Path

from vitask_plugin.evaluation.validation_data import compared_with_training
from vitask_plugin.files import sha256_file


def test_the_sentence_names_the_training_file_and_no_place(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A."}]
    for name in ("train", "val"):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"id": name, "conversations": turns}]))
    record = {"run": {"data": sha256_file(tmp_path / "train.json")}}
    said = compared_with_training(record, tmp_path / "val.json", tmp_path / "images", [])
    assert said == "no image and no group of it is in the training data 'train.json'"
