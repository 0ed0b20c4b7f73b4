"""`calibration.json`: what is written is read back, and nothing that belongs to other weights."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from vitask_plugin.errors import VITaskError
from vitask_plugin.model_folder import CONNECTOR_FILE
from vitask_plugin.record.calibration import Abstention, Calibration, Rate, Threshold
from vitask_plugin.record.calibration_file import connector_hash, read_calibration, weights_hash, write_calibration

RATE, NONE = Rate(0.9, 0.7, 0.97, 20), Rate(None, None, None, 0)
PLAIN = Calibration(
    *("scans", False, ("ill", "well"), 1.7, (0.25, -0.25)),
    question="What is it?",
    thresholds=(
        Threshold("ill", "sensitivity", 0.9, 0.4, RATE, RATE, {"sensitivity": RATE, "specificity": NONE}),
        Threshold("well", "specificity", 0.9, 1.5, RATE, RATE, {"sensitivity": RATE, "specificity": RATE}),
    ),
    abstention=Abstention(0.05, 0.8, NONE, RATE, {"error": NONE, "answered": RATE}),
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two files of weights, one of them larger than what is read of it."""
    generator = np.random.default_rng(0)
    save_file({"a": generator.standard_normal((1500, 1000)).astype(np.float32)}, tmp_path / "model.safetensors")
    save_file({"b": np.ones((4, 4), np.float32)}, tmp_path / CONNECTOR_FILE)
    return tmp_path


def test_what_is_written_is_read_back(checkpoint: Path) -> None:
    prompted = replace(PLAIN, ep=True, tsm="1234", connector=connector_hash(checkpoint), thresholds=(), abstention=None)
    several = Calibration("findings", False, ("a", "b"), 0.5, (1.0, -1.0, 0.0), multi_label=True)
    assert read_calibration(checkpoint, "scans", False) is None
    for one in (prompted, PLAIN, several):
        path = write_calibration(checkpoint, one, {"figures": {"ece": 0.1}})
    assert read_calibration(checkpoint, "scans", False) == PLAIN
    assert read_calibration(checkpoint, "scans", True, tsm="1234") == prompted
    assert read_calibration(checkpoint, "findings", False) == several
    assert read_calibration(checkpoint, "findings", True) is None and read_calibration(checkpoint, "x", False) is None
    again = replace(PLAIN, temperature=2.0)
    write_calibration(checkpoint, again, {})
    assert read_calibration(checkpoint, "scans", False) == again
    blocks = json.loads(path.read_text())["calibrations"]
    assert [(block["task"], block["ep"]) for block in blocks] == [
        ("findings", False),
        ("scans", False),
        ("scans", True),
    ]
    assert blocks[0]["about"] == {"figures": {"ece": 0.1}}


def test_other_weights_another_tsm_and_another_connector_are_refused(checkpoint: Path, tmp_path_factory) -> None:
    own = connector_hash(checkpoint)
    write_calibration(checkpoint, replace(PLAIN, ep=True, tsm="1234", connector=own), {})
    with pytest.raises(VITaskError, match="'scans' with exemplars of another TSM than the one in use"):
        read_calibration(checkpoint, "scans", True, tsm="5678")
    elsewhere = tmp_path_factory.mktemp("connector")
    save_file({"b": np.zeros((4, 4), np.float32)}, elsewhere / CONNECTOR_FILE)
    with pytest.raises(VITaskError, match="of another connector than the one in use"):
        read_calibration(checkpoint, "scans", True, tsm="1234", connector=elsewhere)
    before = weights_hash(checkpoint)
    save_file({"b": np.full((4, 4), 1.001, np.float32)}, checkpoint / CONNECTOR_FILE)
    assert weights_hash(checkpoint) != before
    with pytest.raises(VITaskError, match="was made for other weights than those beside it; fit it again"):
        read_calibration(checkpoint, "scans", True, tsm="1234")
    # A new one drops those of the old weights.
    write_calibration(checkpoint, PLAIN, {})
    assert read_calibration(checkpoint, "scans", True, tsm="1234") is None


def test_the_hash_sees_training_in_a_large_file_and_nothing_else(checkpoint: Path) -> None:
    before = weights_hash(checkpoint)
    (checkpoint / "training_args.bin").write_bytes(b"x")
    (checkpoint / "calibration.json").write_text("{}")
    assert weights_hash(checkpoint) == before
    generator = np.random.default_rng(0)
    weights = generator.standard_normal((1500, 1000)).astype(np.float32)
    save_file({"a": weights}, checkpoint / "model.safetensors")
    assert weights_hash(checkpoint) == before
    for rows in (slice(None), slice(700, 800), slice(-300, None)):  # all, or one layer in the middle or at the end
        changed = weights.copy()
        changed[rows] *= np.float32(1 + 1e-6)
        save_file({"a": changed}, checkpoint / "model.safetensors")
        assert weights_hash(checkpoint) != before, rows
    for path in checkpoint.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(VITaskError, match="holds no weights; give the folder of a checkpoint"):
        weights_hash(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "no calibration of format 1"),
        ({"calibrations": {}}, "no 'weights' or no 'calibrations'"),
        ({"calibrations": [{"task": "scans"}]}, "no 'task' or no 'ep'"),
    ],
)
def test_a_damaged_file_is_refused(change: dict, message: str, checkpoint: Path) -> None:
    path = write_calibration(checkpoint, PLAIN, {})
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(VITaskError, match=message):
        read_calibration(checkpoint, "scans", False)


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0}, {"temperature": "hot"}, {"bias": [1.0]}, {"bias": [1.0, float("nan")]}, {"new": 1}],
)
def test_a_damaged_block_is_refused(change: dict, checkpoint: Path) -> None:
    path = write_calibration(checkpoint, PLAIN, {})
    written = json.loads(path.read_text())
    written["calibrations"][0] |= change
    path.write_text(json.dumps(written))
    with pytest.raises(VITaskError, match=r"is damaged \(its block of task 'scans'.*fit it again"):
        read_calibration(checkpoint, "scans", False)
