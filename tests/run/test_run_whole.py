"""`vitask run` from a folder of PNGs to report, figures and card; killed and started again: the same figures."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
from whole_runs import draw_folder, finished, start

from vitask_plugin.run.recipe import filled
from vitask_plugin.run.recipe_file import parsed, read_recipe

SMALL = {
    "tsm.epochs": 2,
    "training.save_steps": 1,
    "training.batch_size": 8,
    "evaluate.splits": "[test]",
    "evaluate.untuned": "false",
}
ARMS = ("tsm", "vitask", "vitask-ep")


def words(images: Path, out: Path) -> list[object]:
    settings = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    shares = ["--val", 0.2, "--test", 0.4]
    return ["--images", images, "--modality", "drawn texture", "--model", "tiny", "--out", out, *shares, *settings]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to: its folder, what it printed, and how long it took in seconds."""
    folder = tmp_path_factory.mktemp("run")
    images, begin = draw_folder(folder / "stripes", 20, classes=2), time.monotonic()
    printed = finished(*words(images, folder / "out"), "--device", "cpu")
    return folder / "out", printed, time.monotonic() - begin


@pytest.mark.timeout(1500)
def test_a_folder_of_pngs_becomes_a_judged_specialist(whole) -> None:
    out, _, _ = whole
    results = json.loads((out / "results.json").read_text())
    assert [(row["set"], row["split"], row["arm"]) for row in results["rows"]] == [
        ("stripes", "test", arm) for arm in ARMS
    ]
    for row in results["rows"]:
        assert row["n"] == 16
        assert 0 <= row["accuracy"] <= 1 and 0 <= row["macro_f1"] <= 1 and 0 <= row["auc"] <= 1
        assert 0 <= row["unmapped"] <= row["n"]
    assert results["recipe"] == filled(parsed(read_recipe(str(out / "recipe.yaml")))).digest
    assert {"vitask-plugin", "llava-torch", "lmms_eval", "torch"} <= set(results["versions"])
    assert str(out) not in (out / "results.json").read_text()


@pytest.mark.timeout(1500)
def test_rows_are_what_lmms_eval_wrote(whole) -> None:
    out, _, _ = whole
    for row in json.loads((out / "results.json").read_text())["rows"]:
        (path,) = (out / "evaluation" / row["arm"]).rglob("*_results.json")
        written = json.loads(path.read_text())["results"]
        assert row["accuracy"] == pytest.approx(written["vitask_folder"]["accuracy,none"])
        assert row["macro_f1"] == pytest.approx(written["vitask_folder"]["macro_f1,none"])
        assert row["auc"] == pytest.approx(written["vitask_folder_score"]["auc,none"])


@pytest.mark.timeout(1500)
def test_report_card_and_commands_are_there(whole) -> None:
    out, printed, _ = whole
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    for row in json.loads((out / "results.json").read_text())["rows"]:
        assert f"{row['accuracy']:.3f}" in card and f"{row['accuracy']:.3f}"[1:] in page
    assert "Not for clinical use" in card and "| across | 8 | 4 | 8 |" in card
    commands = (out / "commands.sh").read_text()
    lines = [line for line in commands.splitlines() if line.split(" ")[0].endswith(("vitask", "python"))]
    assert len(lines) >= 8 and all(f"$ {line}" in printed for line in lines)
    assert printed.index("✓ TSM trained") < printed.index("✓ VITask, stage 1") < printed.index("✓ Report written")


@pytest.mark.timeout(1500)
def test_the_same_command_again_does_nothing(whole) -> None:
    out, _, _ = whole
    before = (out / "results.json").read_bytes()
    printed = finished(*words(out.parent / "stripes", out), "--device", "cpu")
    assert "✓" not in printed and "= VITask, stage 2: as it is" in printed
    assert (out / "results.json").read_bytes() == before


@pytest.mark.timeout(3000)
def test_killed_at_random_moments_it_gives_the_same_figures(whole, tmp_path) -> None:
    """At a moment that a seed draws, and when stage 2 has its first checkpoint (benchmarks/run_kills.py: more)."""
    reference, _, seconds = whole
    command = [*words(reference.parent / "stripes", tmp_path / "out"), "--device", "cpu"]
    process = start(*command)
    time.sleep(seconds * random.Random(0).uniform(0.1, 0.4))
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process = start(*command)
    folder, deadline = tmp_path / "out/llava-vitask", time.monotonic() + 600
    while not list(folder.glob("checkpoint-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list(folder.glob("checkpoint-*")) and not (tmp_path / "out/results.json").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    printed = finished(*command)
    assert "= Data stripes written: as it is" in printed and "vitask: was not finished" in printed
    assert "resum" in (tmp_path / "out/logs/vitask.log").read_text().lower()
    weights = "llava-vitask/model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (reference / weights).read_bytes()
    assert (tmp_path / "out/results.json").read_bytes() == (reference / "results.json").read_bytes()
