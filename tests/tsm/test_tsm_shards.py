"""Extraction in parts: killed and gone on with, shared by processes, in half precision; the same bit for bit."""

import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import picture, write_task
from small_tsm import make

from vitask_plugin.cli import main
from vitask_plugin.data.contents import Contents, survey
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import sha256_file
from vitask_plugin.tsm import extraction, shards
from vitask_plugin.tsm.extraction import Extraction
from vitask_plugin.tsm.features import FeatureStore, extract
from vitask_plugin.tsm.model import TSM

ARRAYS = ("features.npy", "logits.npy")
IMAGES = 19  # in parts of 4 batches of 2: 8, 8 and 3


@pytest.fixture(scope="module")
def tsm_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tsm")
    make().save(folder)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    write_task(tmp_path, "colour", ["red", "green", "blue"], IMAGES)
    for path in (tmp_path / "images").rglob("*.png"):
        os.utime(path, (1e9, 1e9))  # long ago: such files are taken to stay as they are
    return tmp_path


def names(data: Path) -> list[str]:
    return [row["image"] for row in json.loads((data / "colour-train.json").read_text())]


def run(data: Path, tsm: Path, output: str, **settings) -> FeatureStore:
    arguments = (tsm, [data / "colour-train.json"], data / "images", data / output)
    return extract(*arguments, **({"batch_size": 2} | settings))


def same(data: Path, first: str, second: str) -> bool:
    whole = [[(data / store / name).read_bytes() for name in (*ARRAYS, "index.json")] for store in (first, second)]
    return whole[0] == whole[1]


def one_pass(data: Path, tsm_folder: Path, tokens: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and logits in batches of 2 from the first image to the last, without parts."""
    from PIL import Image

    tsm = TSM.load(tsm_folder)
    pixels = torch.stack([tsm.preprocess(Image.open(data / "images" / name)) for name in names(data)])
    outputs = [tsm(batch) for batch in pixels.split(2)]
    features = torch.cat([tsm.tokens(output, tokens) for output in outputs])
    return features.numpy(), torch.cat([output.logits for output in outputs]).numpy()


class Killed(BaseException):
    """In place of SIGKILL, after which no code of ours runs either."""


def killed_after(monkeypatch, count: int) -> list[str]:
    """Ends the process when it reads its image number `count`; returns the names of the images that are read."""
    seen: list[str] = []
    total = itertools.count(1)
    decode = extraction.decode

    def counted(image: bytes, name: Path):
        seen.append(Path(name).name)
        if next(total) == count:
            raise Killed
        return decode(image, name)

    monkeypatch.setattr(extraction, "decode", counted)
    return seen


@pytest.mark.parametrize("tokens", ["cls", "all"])
def test_a_killed_extraction_goes_on_with_its_finished_parts(data, tsm_folder, monkeypatch, tokens):
    seen = killed_after(monkeypatch, 12)
    with pytest.raises(Killed):
        run(data, tsm_folder, "out", tokens=tokens)
    assert not (data / "out").exists()
    del seen[:]
    run(data, tsm_folder, "out", tokens=tokens)
    assert seen == [Path(name).name for name in names(data)[8:]]  # not the first part's
    for name, wanted in zip(ARRAYS, one_pass(data, tsm_folder, tokens), strict=True):
        found = np.load(data / "out" / name)
        assert found.dtype == np.float32 and np.array_equal(found, wanted)
    assert sorted(os.listdir(data / "out")) == ["contents.npz", "features.npy", "index.json", "logits.npy"]
    assert not list(data.glob(".out*"))


def test_what_has_changed_since_is_computed_again(data, tsm_folder, monkeypatch, tmp_path):
    def begin() -> list[str]:
        with pytest.raises(Killed):
            run(data, tsm_folder, "out")
        del seen[:]
        return seen

    seen = killed_after(monkeypatch, 18)
    begin()
    picture("blue", 777).save(data / "images" / names(data)[3])
    run(data, tsm_folder, "out")
    assert seen == [Path(name).name for name in (*names(data)[:8], *names(data)[16:])]
    assert np.array_equal(np.load(data / "out" / "features.npy"), one_pass(data, tsm_folder, "cls")[0])

    monkeypatch.undo()
    seen = killed_after(monkeypatch, 18)
    shutil.rmtree(data / "out")
    begin()
    os.utime(data / "images" / names(data)[3])  # another time, the same content
    run(data, tsm_folder, "out")
    assert len(seen) == 3

    monkeypatch.undo()
    seen = killed_after(monkeypatch, 18)
    shutil.rmtree(data / "out")
    begin()
    make(mean=[0.1, 0.1, 0.1]).save(tmp_path / "other-tsm")
    assert run(data, tmp_path / "other-tsm", "out").tsm_hash == TSM.load(tmp_path / "other-tsm").hash
    assert len(seen) == IMAGES and not list(data.glob(".out*"))


def test_killed_while_the_parts_are_put_together(data, tsm_folder, monkeypatch):
    write, calls = shards._write_rows, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 4:
            raise Killed
        return write(*args)

    monkeypatch.setattr(shards, "_write_rows", killed)
    with pytest.raises(Killed):
        run(data, tsm_folder, "out")
    monkeypatch.setattr(shards, "_write_rows", write)
    seen = killed_after(monkeypatch, 99)
    run(data, tsm_folder, "out")
    assert seen == [] and np.array_equal(np.load(data / "out" / "features.npy"), one_pass(data, tsm_folder, "cls")[0])


def test_a_share_for_each_process_is_the_same_store(data, tsm_folder):
    run(data, tsm_folder, "alone")

    def part() -> Extraction:
        return Extraction(tsm_folder, names(data), data / "images", data / "shared", batch_size=2)

    part().compute((1, 2))
    part().compute((0, 2))
    part().finish()
    assert same(data, "alone", "shared")
    shutil.rmtree(data / "shared")
    part().compute((1, 2))
    part().finish()  # the other's parts never came
    assert same(data, "alone", "shared")


def test_a_bad_image_later_on_leaves_the_finished_parts(data, tsm_folder, capsys):
    broken = data / "images" / names(data)[10]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:50])
    command = ["tsm", "extract", "--tsm", str(tsm_folder), "--data", str(data / "colour-train.json"), "--out"]
    command += [str(data / "out"), "--image-folder", str(data / "images"), "--batch-size", "2", "--device", "cpu"]
    assert main(command) == 1
    assert "cannot be read" in capsys.readouterr().err and len(list(data.glob(".out*/parts/*rows*"))) == 1
    broken.write_bytes(whole)
    assert main(command) == 0
    run(data, tsm_folder, "alone")
    assert same(data, "alone", "out")


def test_float16_halves_the_disk_and_reads_as_float32(data, tsm_folder):
    full, half = (
        run(data, tsm_folder, "full", tokens="all"),
        run(data, tsm_folder, "half", tokens="all", dtype="float16"),
    )
    sizes = [(data / store / "features.npy").stat().st_size - 128 for store in ("full", "half")]
    assert sizes[0] == 2 * sizes[1] == IMAGES * 4 * 64 * 4
    assert json.loads((data / "half" / "index.json").read_text())["dtype"] == "float16"
    for name in names(data):
        content = sha256_file(data / "images" / name)
        found, wanted = half.get(name, content), full.get(name, content)
        assert found.dtype == torch.float32 and torch.equal(found, wanted.half().float())
        assert half.logits(name).dtype == torch.float32 and torch.equal(half.logits(name), full.logits(name))


@pytest.mark.parametrize(
    ("scale", "dtype", "sentence"),
    [
        (1e5, "float16", r"image 'colour-train/000.png' has a feature of \S+, and float16 ends at 65504; use float32"),
        (float("nan"), "float32", "image 'colour-train/000.png' has a feature that is not finite"),
    ],
)
def test_a_feature_that_the_dtype_cannot_hold_is_refused(data, tsm_folder, monkeypatch, scale, dtype, sentence):
    tokens = TSM.tokens
    monkeypatch.setattr(TSM, "tokens", lambda *args: tokens(*args) * scale)
    with pytest.raises(VITaskError, match=sentence):
        run(data, tsm_folder, "out", dtype=dtype)
    assert not (data / "out").exists() and not list(data.glob(".out*"))


def test_stores_of_the_released_version_open(data, tsm_folder):
    store = run(data, tsm_folder, "out")
    index = json.loads((data / "out" / "index.json").read_text())
    del index["dtype"]
    (data / "out" / "index.json").write_text(json.dumps(index))
    (data / "out" / "contents.npz").unlink()
    name = names(data)[5]
    content = sha256_file(data / "images" / name)
    assert torch.equal(FeatureStore.open(data / "out").get(name, content), store.get(name, content))


def test_contents_are_trusted_only_while_size_and_time_agree(data, monkeypatch):
    from vitask_plugin.data import contents

    read: list[str] = []
    monkeypatch.setattr(contents, "sha256_file", lambda path: read.append(path.name) or sha256_file(path))
    images = names(data)[:3]
    first = survey(data / "images", images, images)
    first.save(data / "contents.npz")
    remembered = Contents.open(data / "contents.npz")
    del read[:]
    assert survey(data / "images", images, images, [remembered]).digest(images) == first.digest(images)
    assert read == []
    path = data / "images" / images[1]
    path.write_bytes(path.read_bytes()[::-1])  # as long as before
    again = survey(data / "images", images, images, [remembered])
    assert read == ["001.png"] and again.sha256(images[1]) == sha256_file(path) != first.sha256(images[1])
    del read[:]
    survey(data / "images", images, images, [again])
    assert read == ["001.png"]  # written a moment ago: another write in the same tick would go unnoticed
    for damage in (b"", b"PK\x03\x04 cut", b"nonsense"):
        (data / "contents.npz").write_bytes(damage)
        assert len(Contents.open(data / "contents.npz")) == 0
