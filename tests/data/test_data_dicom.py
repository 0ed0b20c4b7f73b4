"""DICOM: what its header says about its pixels, held against pydicom's own functions; and the one reader of all images,
for data sets, training, evaluation and prediction.
"""

import json
import sys
from pathlib import Path

import dicoms
import numpy as np
import pydicom
import pytest
from own_images import converts, fails
from PIL import Image

from vitask_plugin.data.checking import read_image
from vitask_plugin.data.images import decode, pixel_hash
from vitask_plugin.data.picture_reader import PictureReader
from vitask_plugin.data.window import Window
from vitask_plugin.errors import VITaskError

DRAW = np.random.default_rng(0)
CT = DRAW.integers(0, 2000, (6, 5)).astype(np.int16)  # Hounsfield units + 1024, as scanners store them
BYTES = DRAW.integers(0, 256, (6, 5), dtype=np.uint8)


def grey(path: Path, **how: object) -> np.ndarray:
    """[H, W], after a look that all colours are one."""
    seen = np.asarray(PictureReader(**how).read(path)[0])
    assert (seen == seen[..., :1]).all()
    return seen[..., 0]


def by_pydicom(path: Path) -> np.ndarray:
    """What a viewer shows [H, W], from 0 to 1."""
    dataset = pydicom.dcmread(path)
    values = pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset)
    if dataset.get("VOILUTSequence"):
        seen, (low, high) = pydicom.pixels.apply_voi(values.astype(int), dataset), (0, 2**12 - 1)
    else:
        seen = pydicom.pixels.apply_windowing(values, dataset)
        ends = (-(2**15), 2**15 - 1) if dataset.PixelRepresentation else (0, 2**dataset.BitsStored - 1)
        low, high = (end * dataset.get("RescaleSlope", 1) + dataset.get("RescaleIntercept", 0) for end in ends)
    shown = (seen - low) / (high - low)
    return 1 - shown if dataset.PhotometricInterpretation == "MONOCHROME1" else shown


SEEN = {
    "a window": {"WindowCenter": 40, "WindowWidth": 1400},
    "the first of several windows": {"WindowCenter": [300, 40], "WindowWidth": [1500, 1400]},
    "an exact window": {"WindowCenter": 40, "WindowWidth": 1400, "VOILUTFunction": "LINEAR_EXACT"},
    "a sigmoid": {"WindowCenter": 40, "WindowWidth": 1400, "VOILUTFunction": "SIGMOID"},
    "a table": {"VOILUTSequence": dicoms.table(-100, np.arange(0, 4000, 4), 12)},
    "a table before a window": {
        **{"VOILUTSequence": dicoms.table(-100, np.arange(4000, 0, -4), 12)},
        **{"WindowCenter": 40, "WindowWidth": 1400},
    },
}


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("name", SEEN)
def test_what_a_file_says_is_what_a_viewer_shows(name: str, photometric: str, tmp_path: Path) -> None:
    rescaled = {"RescaleSlope": 1.5, "RescaleIntercept": -1024, "PhotometricInterpretation": photometric}
    path = dicoms.write(tmp_path / "a.dcm", CT, **rescaled, **SEEN[name])
    expected = by_pydicom(path) * 255
    assert np.abs(grey(path) - expected).max() <= 0.5 + 1e-6 and len(np.unique(expected)) > 5


def test_a_window_of_the_data_set_is_of_the_modalitys_values(tmp_path: Path) -> None:
    """And counts more than what the file says."""
    more = {"RescaleSlope": 2, "RescaleIntercept": -1024, "WindowCenter": 0, "WindowWidth": 10}
    path = dicoms.write(tmp_path / "a.dcm", CT, **more)
    expected = Window(-500, 1500).apply(CT * 2.0 - 1024)
    assert np.array_equal(grey(path, window=Window(-500, 1500)), expected)
    assert not np.array_equal(grey(path), expected)
    inverted = dicoms.write(tmp_path / "b.dcm", CT, **more, PhotometricInterpretation="MONOCHROME1")
    assert np.abs(grey(inverted, window=Window(-500, 1500)).astype(int) - (255 - expected)).max() <= 1
    padded = dicoms.write(tmp_path / "c.dcm", CT, **more, PixelPaddingValue=int(CT[2, 3]))
    black = grey(padded, window=Window(-5000, 1500))
    assert ((black == 0) == (int(CT[2, 3]) == CT)).all()


def test_eight_bits_stay_as_they_are(tmp_path: Path) -> None:
    assert np.array_equal(grey(dicoms.write(tmp_path / "a.dcm", BYTES)), BYTES)
    assert np.array_equal(grey(tmp_path / "a.dcm", window=Window(100, 200)), BYTES)
    inverted = dicoms.write(tmp_path / "b.dcm", BYTES, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(grey(inverted), 255 - BYTES)
    windowed = dicoms.write(tmp_path / "c.dcm", BYTES, WindowCenter=100, WindowWidth=51)
    assert np.array_equal(grey(windowed), Window(74.5, 124.5).apply(BYTES))


def test_twelve_bits_without_a_window_are_refused(tmp_path: Path) -> None:
    path = dicoms.write(tmp_path / "a.dcm", CT.astype(np.uint16), BitsStored=12)
    with pytest.raises(VITaskError, match=r"holds uint16 values \(.*DICOM, 12 bits\), and no window says which"):
        PictureReader().read(path)


def test_colours(tmp_path: Path) -> None:
    rgb = DRAW.integers(0, 256, (6, 4, 3), dtype=np.uint8)
    seen, kept = PictureReader().read(dicoms.write(tmp_path / "rgb.dcm", rgb))
    assert np.array_equal(np.asarray(seen), rgb) and seen.mode == "RGB" and kept is None
    ybr = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    path = dicoms.write(tmp_path / "ybr.dcm", ybr, PhotometricInterpretation="YBR_FULL")
    assert np.abs(np.asarray(PictureReader().read(path)[0]).astype(int) - rgb).max() <= 3  # rounded twice
    entries = {
        f"{colour}PaletteColorLookupTable{part}": value
        for colour, scale in {"Red": 1, "Green": 2, "Blue": 3}.items()
        for part, value in {
            "Descriptor": [256, 0, 16],
            "Data": (np.arange(256, dtype=np.uint16) * 80 * scale).tobytes(),
        }.items()
    }
    path = dicoms.write(tmp_path / "p.dcm", BYTES, PhotometricInterpretation="PALETTE COLOR", **entries)
    expected = (BYTES[..., None].astype(int) * 80 * np.array([1, 2, 3])) >> 8
    assert np.array_equal(np.asarray(PictureReader().read(path)[0]), expected)


def test_frames_have_values_of_their_own(tmp_path: Path) -> None:
    frames = np.stack([CT, CT[::-1]])
    groups = [
        dicoms.item(
            PixelValueTransformationSequence=[dicoms.item(RescaleSlope=1, RescaleIntercept=shift)],
            FrameVOILUTSequence=[dicoms.item(WindowCenter=500, WindowWidth=800)],
        )
        for shift in (0, -300)
    ]
    path = dicoms.write(tmp_path / "a.dcm", frames, PerFrameFunctionalGroupsSequence=groups)
    window = Window(500 - 0.5 - 799 / 2, 500 - 0.5 + 799 / 2)
    for frame, shift in enumerate((0, -300)):
        assert np.array_equal(grey(path, frame=frame), window.apply(frames[frame] + shift))
    with pytest.raises(VITaskError, match=r"has 2 frame\(s\), so no --frame 2"):
        PictureReader(frame=2).read(path)


def broken(path: Path) -> Path:
    dicoms.write(path, BYTES)
    path.write_bytes(path.read_bytes()[:-10])
    return path


def test_what_is_no_picture_is_one_sentence(tmp_path: Path) -> None:
    said = {}
    for name, path in {"cut": broken(tmp_path / "cut.dcm"), "report": tmp_path / "report.dcm"}.items():
        if name == "report":
            dicoms.write(path, BYTES)
            dataset = pydicom.dcmread(path)
            del dataset.Rows, dataset.PixelData
            dataset.save_as(path)
        with pytest.raises(VITaskError) as stopped:
            PictureReader().read(path)
        said[name] = str(stopped.value)
        assert f"image {str(path)!r} cannot be read (" in said[name] and "\n" not in said[name]
    assert "the header is of no picture" in said["report"]


def test_without_pydicom_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = dicoms.write(tmp_path / "a.dcm", BYTES)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(
        VITaskError, match=r"is a DICOM file, .*; install it with `pip install 'vitask-plugin\[dicom\]'`"
    ):
        PictureReader().read(path)


# A data set of DICOM files -------------------------------------------------------------------------------------------


def scans(folder: Path, **elements: object) -> Path:
    """Class folders of ten different images each, with the endings that scanners give: .dcm, .IMA, none."""
    for label, shift in {"high": 900, "low": 0}.items():
        for number in range(10):
            values = np.random.default_rng(shift + number).integers(0, 1000, (40, 40)).astype(np.int16) + shift
            name = f"{label}/{number}{('.dcm', '.IMA', '')[number % 3]}"
            dicoms.write(folder / name, values, RescaleIntercept=-1024, **elements)
    return folder


@pytest.mark.parametrize("own", [True, False])
def test_a_data_set_training_evaluation_and_prediction_see_one_picture(
    own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vitask_plugin.evaluation.pictures import read_document

    elements = {"WindowCenter": -100, "WindowWidth": 1800} if own else {}
    source = scans(tmp_path / "in" / "scans", **elements)
    by_split = converts(source, "--val", "0.2", "--test", "0.2")
    out = tmp_path / "out"
    labels = json.loads((out / "labels.json").read_text())
    assert ("window" in labels.get("pixels", {})) == (not own)
    assert ("each of these DICOM files itself says" in caplog.text) == own
    reader = PictureReader.of(labels.get("pixels"))
    hashes = set()
    for sample in by_split["train"] + by_split["test"]:
        predicted = pixel_hash(reader.read(source / sample["source"])[0])
        assert predicted == pixel_hash(read_image(sample, out / "images"))  # of training, on both hosts
        hashes.add(predicted)
    assert len(hashes) == 16
    pytest.importorskip("lmms_eval")
    from vitask_plugin.eval_tasks import folder

    documents = folder.read(out, "test", "out")
    for number, sample in enumerate(by_split["test"]):
        _, (judged,) = read_document(documents, number, lambda row: [row["image"].convert("RGB")], "vitask_folder")
        assert pixel_hash(judged) == pixel_hash(reader.read(source / sample["source"])[0])


def test_a_data_file_that_names_dicom_is_refused_with_the_way_on(tmp_path: Path) -> None:
    """Other programs read it too."""
    path = dicoms.write(tmp_path / "a.dcm", BYTES)
    with pytest.raises(VITaskError, match=r"a DICOM file, .*; write the data set with the former"):
        decode(path.read_bytes(), path)


def test_a_broken_file_of_a_set_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = scans(tmp_path / "in" / "scans", WindowCenter=-100, WindowWidth=1800)
    broken(source / "low" / "0.dcm")
    assert "low/0.dcm" in fails(source, capsys)
