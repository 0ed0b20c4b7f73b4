"""Features on disk: equal to the TSM's own, tied to the image's content and to the TSM, whole or absent."""

import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pictures import picture, write_task
from PIL import Image, ImageFile
from small_tsm import TASKS, make

from vitask_plugin.cli import main
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import sha256_file
from vitask_plugin.tsm import extraction
from vitask_plugin.tsm.features import FeatureStore, extract
from vitask_plugin.tsm.model import TSM


@pytest.fixture(scope="module")
def tsm_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tsm")
    make().save(folder)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    """7 images in train, 3 in val; general samples (with and without an image) in between."""
    write_task(tmp_path, "colour", ["red", "green", "blue"], 7)
    write_task(tmp_path, "colour", ["red", "green", "blue"], 3, split="val")
    rows = json.loads((tmp_path / "colour-train.json").read_text())
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello."}]
    general = {"id": "general", "image": "not-there.png", "conversations": turns}
    rows[3:3] = [general, {"id": "text", "conversations": turns}]
    rows.append(rows[0])  # an image that is named twice
    (tmp_path / "colour-train.json").write_text(json.dumps(rows))
    return tmp_path


def images(data: Path) -> list[str]:
    return sorted(str(path.relative_to(data / "images")) for path in (data / "images").rglob("*.png"))


@pytest.mark.parametrize("tokens", ["cls", "all"])
@pytest.mark.parametrize("workers", [0, 1])
def test_features_are_the_tsms_own(data, tsm_folder, tokens, workers):
    files = [data / "colour-train.json", data / "colour-val.json"]
    store = extract(tsm_folder, files, data / "images", data / "out", tokens, batch_size=4, workers=workers)
    tsm = TSM.load(tsm_folder)
    assert (store.tsm_hash, store.tokens, store.width) == (tsm.hash, tokens, 64)
    assert store.length == (1 if tokens == "cls" else 4)
    assert len(store) == len(images(data)) == 10
    for name in images(data):
        path = data / "images" / name
        output = tsm(tsm.preprocess(Image.open(path))[None])
        found = store.get(name, sha256_file(path))
        assert found.dtype == torch.float32 and found.shape == (store.length, 64)
        torch.testing.assert_close(found, tsm.tokens(output, tokens)[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(store.logits(name), output.logits[0], rtol=1e-5, atol=1e-6)
    assert store.get(images(data)[0], sha256_file(data / "images" / images(data)[0])).ne(0).any()


def test_opened_and_pickled_stores_hold_the_same(data, tsm_folder):
    store = extract(tsm_folder, [data / "colour-val.json"], data / "images", data / "out")
    name = "colour-val/001.png"
    sha256 = sha256_file(data / "images" / name)
    for other in (FeatureStore.open(data / "out"), pickle.loads(pickle.dumps(store))):
        assert torch.equal(other.get(name, sha256), store.get(name, sha256))
        assert name in other and "colour-train/001.png" not in other
    assert len(pickle.dumps(store)) < 2000  # the arrays stay on the disk


def test_a_changed_image_is_noticed(data, tsm_folder):
    store = extract(tsm_folder, [data / "colour-val.json"], data / "images", data / "out")
    path = data / "images" / "colour-val/001.png"
    picture("blue", 1234).save(path)
    with pytest.raises(VITaskError, match=r"image 'colour-val/001.png' has changed .*run `vitask tsm extract` again"):
        store.get("colour-val/001.png", sha256_file(path))


def test_an_unknown_image_is_refused(data, tsm_folder):
    store = extract(tsm_folder, [data / "colour-val.json"], data / "images", data / "out")
    for lookup in (lambda: store.get("colour-train/000.png", "0" * 64), lambda: store.logits("colour-train/000.png")):
        with pytest.raises(VITaskError, match=r"nothing for image 'colour-train/000.png'; run `vitask tsm extract`"):
            lookup()


def test_another_tsm_is_noticed(data, tsm_folder):
    store = extract(tsm_folder, [data / "colour-val.json"], data / "images", data / "out")
    store.check_tsm(TSM.load(tsm_folder).hash)
    other = make(mean=[0.1, 0.1, 0.1])
    with pytest.raises(VITaskError, match=f"by TSM {store.tsm_hash[:12]}, but the TSM in use is {other.hash[:12]}"):
        store.check_tsm(other.hash)


def test_nothing_is_left_of_an_interrupted_extraction(data, tsm_folder, monkeypatch):
    seen = []

    def interrupted(*args):
        seen.append(args)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return decode(*args)

    decode = extraction.decode
    before = sorted(os.listdir(data))
    monkeypatch.setattr(extraction, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(tsm_folder, [data / "colour-train.json"], data / "images", data / "out", batch_size=2)
    assert len(seen) == 6 and sorted(os.listdir(data)) == before


def test_an_older_store_survives_a_failure_and_is_replaced_by_success(data, tsm_folder, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval leaves it
    old = extract(tsm_folder, [data / "colour-val.json"], data / "images", data / "out")
    broken = data / "images" / "colour-train/002.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VITaskError, match=r"colour-train/002.png' cannot be read .*; replace or remove it"):
        extract(tsm_folder, [data / "colour-train.json"], data / "images", data / "out")
    assert len(FeatureStore.open(data / "out")) == len(old) == 3
    broken.write_bytes(whole)
    assert len(extract(tsm_folder, [data / "colour-train.json"], data / "images", data / "out")) == 7


def change_image_path(data: Path, path: str) -> None:
    rows = json.loads((data / "colour-val.json").read_text())
    rows[1]["image"] = path
    (data / "colour-val.json").write_text(json.dumps(rows))


def test_a_batch_from_a_worker_is_few_open_files(tmp_path, tsm_folder, monkeypatch):
    write_task(tmp_path, "colour", ["red", "green", "blue"], 120)
    forward, opened = TSM.forward, []

    def counted(self, pixels):
        opened.append(len(os.listdir("/proc/self/fd")) - before)
        return forward(self, pixels)

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(TSM, "forward", counted)
    arguments = (tsm_folder, [tmp_path / "colour-train.json"], tmp_path / "images", tmp_path / "out")
    assert len(extract(*arguments, batch_size=60, workers=1)) == 120
    assert max(opened) < 30  # beside the pixels: pipes to the worker


@pytest.mark.parametrize("workers", ["0", "1"])
def test_bad_images_end_the_command_with_one_sentence(data, tsm_folder, capsys, workers):
    command = [
        "tsm",
        "extract",
        "--tsm",
        str(tsm_folder),
        "--data",
        str(data / "colour-val.json"),
        "--workers",
        workers,
    ]
    command += ["--image-folder", str(data / "images"), "--out", str(data / "out"), "--device", "cpu"]
    before = sorted(os.listdir(data))
    expected = {
        "../colour-val.json": "image path '../colour-val.json' leaves the image folder",
        "/etc/hostname": "image path '/etc/hostname' leaves the image folder",
        "colour-val/777.png": "colour-val/777.png' cannot be read (No such file or directory); check the path",
    }
    (data / "images" / "link.png").symlink_to(data / "colour-val.json")
    expected["link.png"] = "link.png' cannot be read (not an image of a known format)"  # followed
    for path, sentence in expected.items():
        change_image_path(data, path)
        assert main(command) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("vitask: error: ") and sentence in error
        assert sorted(os.listdir(data)) == before


def test_foreign_folders_are_not_overwritten(data, tsm_folder):
    with pytest.raises(VITaskError, match=r"already holds 'colour-train.json', which is not an earlier output"):
        extract(tsm_folder, [data / "colour-val.json"], data / "images", data)
    assert (data / "colour-val.json").exists()


def test_data_without_a_task_or_a_disk_without_space(data, tsm_folder, monkeypatch):
    rows = json.loads((data / "colour-val.json").read_text())
    for row in rows:
        del row["vitask"]
    (data / "general.json").write_text(json.dumps(rows))
    with pytest.raises(VITaskError, match=r"general.json' has no sample with a 'vitask' block"):
        extract(tsm_folder, [data / "general.json"], data / "images", data / "out")
    monkeypatch.setattr(extraction.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(
        VITaskError, match=r"need 0.0 GiB, but .* free; use --dtype float16, --tokens cls or another disk"
    ):
        extract(tsm_folder, [data / "colour-val.json"], data / "images", data / "out")
    assert not (data / "out").exists()


def test_damaged_stores_are_refused(data, tsm_folder):
    extract(tsm_folder, [data / "colour-val.json"], data / "images", data / "out")
    array = data / "out" / "features.npy"
    whole = array.read_bytes()
    array.write_bytes(whole[:-5])
    with pytest.raises(VITaskError, match=r"are missing or damaged .*run `vitask tsm extract` again"):
        FeatureStore.open(data / "out")
    array.unlink()
    with pytest.raises(VITaskError, match="are missing or damaged"):
        FeatureStore.open(data / "out")
    array.write_bytes(whole)
    index = json.loads((data / "out" / "index.json").read_text())
    del index["images"]["colour-val/000.png"]
    (data / "out" / "index.json").write_text(json.dumps(index))
    with pytest.raises(VITaskError, match=r"row of image .colour-val/002.png. is 2, beyond the 2 images"):
        FeatureStore.open(data / "out")
    with pytest.raises(VITaskError, match=r"feature index .* does not exist"):
        FeatureStore.open(data / "nowhere")


def changed_index(change):
    def write(out: Path) -> None:
        index = json.loads((out / "index.json").read_text())
        change(index)
        (out / "index.json").write_text(json.dumps(index))

    return write


def changed_array(name, change):
    def write(out: Path) -> None:
        array = np.load(out / name)
        np.save(out / name, change(array))

    return write


def infinite(array: np.ndarray) -> np.ndarray:
    array[1] = np.inf
    return array


def without_hashes(out: Path) -> None:
    changed_index(lambda index: [index.pop(name) for name in ("features", "logits")])(out)


OTHERS = {
    "rows in another order": (
        changed_array("features.npy", lambda array: array[::-1]),
        "rows 0 to 2, are not",
    ),
    "other logits": (
        changed_array("logits.npy", lambda array: array + 1),
        "logits.npy', rows 0 to 2, are not",
    ),
    "a wider array": (changed_array("features.npy", lambda array: np.tile(array, 2)), "rows 0 to 2, are not"),
    "double precision": (
        changed_array("features.npy", np.float64),
        "are float64 of shape .3, 1, 64.; expected",
    ),
    "no width": (changed_array("features.npy", lambda array: array[..., :0]), "none of them 0"),
    "one more row": (changed_array("logits.npy", lambda array: np.tile(array, (2, 1))), "do not fit their index"),
    "a row twice": (
        changed_index(lambda index: index["images"].update({"colour-val/000.png": [1, "0" * 64]})),
        "the row of image 'colour-val/001.png' is 1, that of 'colour-val/000.png' too",
    ),
    "a row that is not there": (
        changed_index(lambda index: index["images"].update({"colour-val/000.png": [3, "0" * 64]})),
        "the row of image 'colour-val/000.png' is 3, beyond the 3 images",
    ),
    "no hash": (
        changed_index(lambda index: index["images"].update({"colour-val/000.png": [0, "00"]})),
        r"/images/colour-val~1000.png/1 is '00'; expected a text like",
    ),
    "a later format": (changed_index(lambda index: index.update(format=2)), "/format is 2; expected 1"),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stored")
    make().save(root / "tsm")
    write_task(root, "colour", ["red", "green", "blue"], 3, split="val")
    extract(root / "tsm", [root / "colour-val.json"], root / "images", root / "out")
    return root / "out"


@pytest.mark.parametrize("name", OTHERS)
def test_what_was_not_extracted_is_not_given_out(name, stored, tmp_path):
    change, sentence = OTHERS[name]
    out = shutil.copytree(stored, tmp_path / "out")
    change(out)
    with pytest.raises(VITaskError, match=rf"{sentence}.*run `vitask tsm extract` again"):
        store = FeatureStore.open(out)
        store.get("colour-val/000.png", store._hashes[0].tobytes().hex())
        store.logits("colour-val/000.png")


def test_a_store_without_hashes_is_read_and_holds_numbers(stored, tmp_path):
    out = shutil.copytree(stored, tmp_path / "out")
    without_hashes(out)
    known, old = FeatureStore.open(stored), FeatureStore.open(out)
    sha256 = known._hashes[0].tobytes().hex()
    assert torch.equal(old.get("colour-val/000.png", sha256), known.get("colour-val/000.png", sha256))
    changed_array("features.npy", infinite)(out)
    with pytest.raises(VITaskError, match="rows 0 to 2, hold NaN or infinity"):
        FeatureStore.open(out).get("colour-val/000.png", sha256)


def test_the_command_prints_what_it_wrote(data, tsm_folder, capsys):
    command = ["tsm", "extract", "--tsm", str(tsm_folder), "--data", str(data / "colour-val.json"), "--tokens", "all"]
    assert main([*command, "--image-folder", str(data / "images"), "--out", str(data / "out")]) == 0
    assert "3 images, 4 token(s) of width 64 each" in capsys.readouterr().out
    assert list(TSM.load(tsm_folder).record["tasks"]) == list(TASKS)


def test_features_that_float16_would_lose_are_refused(tmp_path):
    """Below 6e-5 float16 has fewer digits, and below 3e-8 nothing."""
    right = np.random.default_rng(0).normal(size=(3, 1, 64)).astype(np.float32)
    assert np.allclose(extraction._stored(right * 1e-3, "abc", "float16"), right * 1e-3, atol=1e-6)
    with pytest.raises(VITaskError, match="of which float16 loses 100%; use"):
        extraction._stored(right * np.float32(1e-25), "abc", "float16")
    for small in (1e-9, 3e-7):
        with pytest.raises(
            VITaskError, match=r"image 'b' has features of at most \S+e-\d+, of which float16 loses \d+%; use"
        ):
            extraction._stored(right * np.array([1, small, 1], np.float32)[:, None, None], "abc", "float16")
        assert np.array_equal(extraction._stored(right * small, "abc", "float32"), right * np.float32(small))
    assert not extraction._stored(right * 0, "abc", "float16").any()  # nothing to lose
