"""The images of a task as the model of the harness sees them: as in training, or refused."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from evaluating import ask, load_tasks
from pictures import png16, write_every_mode
from PIL import Image
from trained import Trained

from vitask_plugin.cli import main
from vitask_plugin.data.images import decode
from vitask_plugin.data.instructions import DRAWN, sample
from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.pictures import read_document
from vitask_plugin.files import sha256_file
from vitask_plugin.tsm.features import extract


def test_both_models_see_what_they_were_trained_on(
    trained: Trained, everywhere: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    for name in write_every_mode(tmp_path):
        words = {"modality": DRAWN.modality, "task": DRAWN.task, "choices": list(DRAWN.choices), "label": 0}
        rows.append(sample(identifier=name, image=name, **words))
    (tmp_path / "data.json").write_text(json.dumps(rows))
    store = extract(trained.tsm, [tmp_path / "data.json"], tmp_path, tmp_path / "features")
    vlm, see_tower, see_tsm = everywhere.model.model, [], []
    encode, embed = vlm.vitask_rows, vlm.exemplars

    def tower(ids: Any, mask: Any, pixels: torch.Tensor, **kwargs: Any) -> Any:
        see_tower.extend(pixels)
        return encode(ids, mask, pixels, **kwargs)

    def tsm(features: torch.Tensor) -> torch.Tensor:
        see_tsm.extend(features)
        return embed(features)

    monkeypatch.setattr(vlm, "vitask_rows", tower)
    monkeypatch.setattr(vlm, "exemplars", tsm)
    for row in rows:
        ask(everywhere.model, [([Image.open(tmp_path / row["image"])], "Analyze.")], max_new_tokens=2)
    for row, pixels, features in zip(rows, see_tower, see_tsm, strict=True):
        path = tmp_path / row["image"]
        assert torch.allclose(features, store.get(row["image"], sha256_file(path)), atol=1e-5), path
        one = decode(path.read_bytes(), path)
        expected = everywhere.model.image_processor.preprocess(one, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pixels, expected), path


def test_deep_pixels_of_any_task_are_refused(prompted: SimpleNamespace) -> None:
    deep = Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64))
    with pytest.raises(SystemExit) as stopped:
        ask(prompted.model, [([deep], "Analyze.")], max_new_tokens=2)
    assert "task 'own', document 0, image: image 'in memory' holds uint16 values (0 to 4095" in stopped.value.code


@pytest.mark.parametrize("kind", ["grey", "colour"])
@pytest.mark.parametrize("stored", ["bytes", "path"])
def test_deep_pixels_that_a_task_has_converted_are_refused(kind: str, stored: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (8, 8, 3), dtype=np.uint16)
    path = tmp_path / "deep.png"
    if kind == "grey":
        Image.fromarray(values[..., 0]).save(path)
    else:
        path.write_bytes(png16(values))
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8), "red").save(plain)
    named = [str(one) for one in (plain, path)]
    rows = named if stored == "path" else [{"bytes": Path(one).read_bytes(), "path": None} for one in named]
    data = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())

    def see(document: dict[str, Any]) -> list[Image.Image]:
        return [document["image"].convert("RGB")]

    assert read_document(data, 0, see, "own")[1][0].getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(VITaskError, match=r"task 'own', document 1: image .* holds uint16 values"):
        read_document(data, 1, see, "own")


def two_columns(deep: str = "depth") -> datasets.Dataset:
    values = np.random.default_rng(0).integers(0, 4096, (8, 8), dtype=np.uint16)
    files = {}
    for name in ("image", "depth"):
        file = io.BytesIO()
        Image.fromarray(values if name == deep else values.astype(np.uint8)).save(file, "PNG")
        files[name] = [{"bytes": file.getvalue(), "path": None}]
    data = datasets.Dataset.from_dict(files)
    return data.cast_column("image", datasets.Image()).cast_column("depth", datasets.Image())


def test_deep_pixels_that_nobody_looks_at_are_not_refused() -> None:
    looks = [lambda row: [row["image"].convert("RGB")], lambda row: [row.get("image")], lambda row: []]
    for see in looks:
        document, pictures = read_document(two_columns(), 0, see, "own")
        assert len(pictures) == len(see(document)) and document["depth"].mode == "I;16"


@pytest.mark.parametrize(
    "see",
    [
        lambda row: [row["depth"].convert("RGB")],
        lambda row: [row.get("depth").convert("RGB")],
        lambda row: [dict(row)["image"]],
        lambda row: [{**row}["image"]],
        lambda row: [row.copy()["image"]],
        lambda row: [picture.convert("RGB") for picture in row.values()],
        lambda row: [picture.convert("RGB") for _, picture in row.items()],
        lambda row: [row[name].convert("RGB") for name in row],
    ],
)
def test_deep_pixels_that_a_task_may_have_looked_at_are_refused(see: Any) -> None:
    with pytest.raises(VITaskError, match=r"task 'own', document 0: image .* holds uint16 values"):
        read_document(two_columns(), 0, see, "own")


def test_the_images_of_a_data_set_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data, calls = two_columns(), []
    cast = datasets.Dataset.cast_column
    monkeypatch.setattr(datasets.Dataset, "cast_column", lambda *args: calls.append(args[1]) or cast(*args))
    for _ in range(3):
        read_document(data, 0, lambda row: [row["image"]], "own")
    assert calls == ["image", "depth"]


@pytest.fixture
def breast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for BreastMNIST's file of 28 pixels, in the folder that is returned."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = generator.integers(0, 256, (4, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.array([[0], [1], [0], [1]], dtype=np.uint8)
    np.savez(tmp_path / "breastmnist.npz", **arrays)
    monkeypatch.setenv("MEDMNIST_ALLOW_MODIFIED", "1")
    return tmp_path


def recorded_sizes(width: list[int], height: list[int]) -> dict[str, Any]:
    return {"images": {"medmnist_breast": {"width": width, "height": height, "images": 4}}}


@pytest.mark.parametrize("side", ["checkpoint", "TSM"])
def test_images_of_another_size_than_in_training_are_refused(
    side: str, prompted: SimpleNamespace, breast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MEDMNIST_SIZE forgotten: 28-pixel images on a model of 224-pixel ones."""
    model = prompted.model
    tasks = load_tasks(model, breast, "medmnist_breast")
    of_224, of_28 = recorded_sizes([224, 224], [224, 224]), recorded_sizes([28, 28], [28, 28])
    monkeypatch.setattr(model, "record", model.record | (of_224 if side == "checkpoint" else of_28))
    monkeypatch.setattr(model.tsm, "record", model.tsm.record | (of_224 if side == "TSM" else of_28))
    monkeypatch.setattr(model, "_announced", set())
    requests = tasks["medmnist_breast"].instances
    with pytest.raises(SystemExit) as stopped:
        model.generate_until(requests)
    assert f"error: {side} " in stopped.value.code
    assert "was trained on 224x224 images of task 'medmnist_breast'" in stopped.value.code
    assert "those of task 'medmnist_breast' are 28x28; set MEDMNIST_SIZE=224, or add image_size=any" in (
        stopped.value.code
    )
    monkeypatch.setattr(model, "any_size", True)
    assert len(model.generate_until(requests)) == 4


def test_images_of_training_of_several_sizes_or_none_known_are_not_compared(
    prompted: SimpleNamespace, breast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prompted.model
    tasks = load_tasks(model, breast, "medmnist_breast")
    for record in ({}, recorded_sizes([28, 28], [28, 28]), recorded_sizes([200, 224], [224, 224])):
        monkeypatch.setattr(model, "record", {k: v for k, v in model.record.items() if k != "images"} | record)
        monkeypatch.setattr(model, "_announced", set())
        assert len(model.generate_until(tasks["medmnist_breast"].instances[:1])) == 1


@pytest.fixture
def deep_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes deep images as an external set that is only judged, with the labels of training and a name of its own."""
    for number, name in enumerate(DRAWN.choices):
        path = tmp_path / "source" / name / "image.png"
        path.parent.mkdir(parents=True)
        values = np.random.default_rng(number).integers(0, 4096, (28, 28))
        Image.fromarray(values.astype(np.uint16)).save(path)

    def write(*flags: str) -> None:
        words = ["--modality", DRAWN.modality, "--labels", ",".join(DRAWN.choices), "--val", "0", "--test", "1"]
        output = tmp_path / "external"
        assert main(["data", "folder", str(tmp_path / "source"), "--out", str(output), *words, *flags]) == 0
        monkeypatch.setenv("VITASK_FOLDER", str(output))

    return write


@pytest.mark.parametrize("side", ["checkpoint", "TSM"])
def test_images_through_another_window_than_in_training_are_refused(
    side: str, prompted: SimpleNamespace, drawn_root: Path, deep_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else tells: size and depth are the same."""
    model = prompted.model
    of_4095 = {"width": [28, 28], "height": [28, 28], "images": 4, "pixels": {"window": [0, 4095]}}
    record = {"images": {DRAWN.task: of_4095}}
    monkeypatch.setattr(model, "record", model.record | (record if side == "checkpoint" else {}))
    monkeypatch.setattr(model.tsm, "record", model.tsm.record | (record if side == "TSM" else {}))

    def answers() -> list[str]:
        monkeypatch.setattr(model, "_announced", set())
        return model.generate_until(load_tasks(model, drawn_root, "vitask_folder")["vitask_folder"].instances)

    deep_folder("--window", "0", "4095")
    assert len(answers()) == 4
    deep_folder("--window", "0", "65535")
    with pytest.raises(SystemExit) as stopped:
        answers()
    assert f"error: {side} " in stopped.value.code
    assert "was trained on images through the window 0 to 4095 of task 'vitask_drawn'" in stopped.value.code
    assert "those of task 'vitask_folder' are through the window 0 to 65535; write them with" in stopped.value.code
    assert "--window 0 4095`, or add image_size=any to --model_args" in stopped.value.code
    monkeypatch.setattr(model, "any_size", True)
    assert len(answers()) == 4


def test_a_tsm_of_another_window_than_the_checkpoints_is_refused(
    prompted: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On documents that no record tells anything of."""
    model = prompted.model
    of_4095, of_8_bits = (
        {"images": {DRAWN.task: {"width": [28, 28], "height": [28, 28], "images": 4, "pixels": pixels}}}
        for pixels in ({"window": [0, 4095]}, {})
    )
    monkeypatch.setattr(model, "record", model.record | of_4095)
    monkeypatch.setattr(model.tsm, "record", model.tsm.record | of_8_bits)
    monkeypatch.setattr(model, "_announced", set())
    with pytest.raises(SystemExit, match=r"error: TSM .* through no window .*, and checkpoint .* 0 to 4095; train"):
        model.generate_until(prompted.tasks["vitask_drawn"].instances[:1])


def test_a_broken_image_names_its_document_and_file(prompted: SimpleNamespace, tmp_path: Path) -> None:
    """Of any task: the harness lets PIL fill up what is missing, and a model would answer about grey."""
    import datasets
    from lmms_eval.api.instance import Instance

    whole, cut = (Image.effect_noise((64, 64), 90) for _ in range(2))
    whole.save(tmp_path / "whole.png")
    cut.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    paths = [str(tmp_path / name) for name in ("whole.png", "cut.png")]
    rows = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    prompted.model.task_dict["other"] = {"test": rows}
    words = ("Analyze.", {"max_new_tokens": 2}, lambda row: [row["image"].convert("RGB")])
    metadata = {"task": "other", "doc_id": 0, "repeats": 1}
    requests = [
        Instance(request_type="generate_until", arguments=(*words, n, "other", "test"), idx=0, metadata=metadata)
        for n in range(2)
    ]
    with pytest.raises(SystemExit) as stopped:
        prompted.model.generate_until(requests)
    assert stopped.value.code.startswith(f"vitask: error: task 'other', document 1: its image {paths[1]!r} cannot be")
    assert "truncated" in stopped.value.code and "\n" not in stopped.value.code
