"""The task `vitask_folder`: anybody's images, and external sets, inside the real lmms-eval."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lmms_eval.tasks import TaskManager, get_task_dict
from PIL import Image

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.cli import main
from vitask_plugin.data.class_names import MULTI_LABEL
from vitask_plugin.data.instructions import DRAWN
from vitask_plugin.method.connector import ExemplarConnector
from vitask_plugin.tsm.backbone import build_timm, timm_options
from vitask_plugin.tsm.model import TSM

TASKS = Path(__file__).parents[2] / "eval_tasks"
VARIANTS = ("vitask_folder", "vitask_folder_incomplete", "vitask_folder_score")


@pytest.fixture(scope="module")
def external(tmp_path_factory, drawn_data) -> Path:
    """The drawn test images under class folders of their own, as `vitask data folder` writes an external set."""
    root = tmp_path_factory.mktemp("external")
    for number, sample in enumerate(json.loads((drawn_data / "test.json").read_text())):
        folder = root / "source" / DRAWN.choices[sample["vitask"]["label"]].replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(drawn_data / "images" / sample["image"], folder / f"{number}.png")
    words = ["--modality", DRAWN.modality, "--task", "another_lab", "--val", "0", "--test", "1"]
    labels = ["--labels", ",".join(DRAWN.choices)]
    assert main(["data", "folder", str(root / "source"), "--out", str(root / "set"), *words, *labels]) == 0
    return root / "set"


def lmms_eval(folder: Path | None, *words) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("lmms-eval"), "--include_path", TASKS, "--device", "cpu", *words]
    environment = {name: value for name, value in os.environ.items() if name != "VITASK_FOLDER"}
    if folder is not None:
        environment["VITASK_FOLDER"] = str(folder)
    return subprocess.run(
        [str(word) for word in command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def results(output: Path) -> dict[str, dict]:
    (path,) = output.rglob("*_results.json")
    return json.loads(path.read_text())["results"]


def samples(output: Path, task: str) -> list[dict]:
    (path,) = output.rglob(f"*_samples_{task}.jsonl")
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda entry: entry["doc_id"])


def test_vitask_llava_and_dummy_run_all_variants(external, tiny_checkpoint, tmp_path):
    """A checkpoint trained on the task of that name with the same labels; the set itself it has never seen."""
    from vitask_plugin.record import checkpoint, connector_file

    torch.manual_seed(0)
    options = timm_options("test_vit", len(DRAWN.choices), 32)
    tasks = {DRAWN.task: {"choices": list(DRAWN.choices), "multi_label": False}}
    shape = {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "tasks": tasks}
    network = build_timm("test_vit", len(DRAWN.choices), options)
    tsm = TSM(network, {"source": {"timm": "test_vit", "options": options}, **shape})
    tsm.save(tmp_path / "tsm")
    directory = shutil.copytree(tiny_checkpoint, tmp_path / "llava-tuned")
    connector = ExemplarConnector("linear", tsm.record["feature_width"], 64)
    connector_file.save_connector(connector, connector.state_dict(), directory)
    identity = {"hash": tsm.hash, "width": connector.in_features}
    flags = VITaskArguments(vitask=True, vitask_tsm="tsm")
    checkpoint.save_record(directory, flags, connector, identity, tasks, "v1")

    expected = json.loads((external / "test.json").read_text())
    models = {
        "vitask_llava": ["--model_args", f"pretrained={directory},tsm={tmp_path / 'tsm'}"],
        "dummy": [],
    }
    for model, words in models.items():
        output = tmp_path / model
        done = lmms_eval(
            external,
            *("--model", model, *words, "--tasks", ",".join(VARIANTS), "--batch_size", "8"),
            *("--output_path", output, "--log_samples"),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found = results(output)
        assert set(found) == set(VARIANTS), done.stdout + done.stderr
        for task in VARIANTS:
            assert found[task]["n,none"] == len(expected) == 16
            logged = samples(output, task)
            assert [entry["n"]["label"] for entry in logged] == [sample["vitask"]["label"] for sample in expected]
            assert all(entry["n"]["file"] == "set/test.json" for entry in logged)
        assert ("auc,none" in found["vitask_folder_score"]) and "auc,none" not in found["vitask_folder"]
        if model == "vitask_llava":
            probabilities = np.array([entry["n"]["probabilities"] for entry in logged])
            assert np.allclose(probabilities.sum(axis=1), 1) and len(np.unique(probabilities)) > len(logged)


@pytest.fixture
def documents(monkeypatch):
    """The documents of the task for a folder, as lmms-eval makes them."""

    def load(folder: Path, variant: str = "vitask_folder"):
        monkeypatch.setenv("VITASK_FOLDER", str(folder))
        manager = TaskManager("ERROR", include_path=str(TASKS), model_name="vitask_llava")
        task = get_task_dict([variant], manager)[variant]
        return task, task.test_docs()

    return load


def test_documents_are_the_files_words_and_pixels(external, documents):
    task, rows = documents(external)
    expected = json.loads((external / "test.json").read_text())
    assert len(rows) == len(expected)
    for row, sample in zip(rows, expected, strict=True):
        question, answer = (turn["value"] for turn in sample["conversations"])
        assert question == f"<image>\n{task.doc_to_text(row)}" and row["answer"] == answer
        assert row["candidates"][sample["vitask"]["label"]] == answer and len(row["candidates"]) == 4
        assert row["vitask"] == sample["vitask"]
        with Image.open(external / "images" / sample["image"]) as image:
            assert np.array_equal(np.asarray(row["image"]), np.asarray(image))
    incomplete, _ = documents(external, "vitask_folder_incomplete")
    assert incomplete.doc_to_text(rows[0]) == f"Analyze the given {DRAWN.modality} image."


def test_a_sample_says_what_its_owner_calls_the_file(external, documents, tmp_path):
    """And its group; a folder that does not know them, or says something else there, is read as well."""
    expected = json.loads((external / "test.json").read_text())
    assert {sample["source"] for sample in expected} == {
        path.relative_to(external.parent / "source").as_posix() for path in (external.parent / "source").rglob("*.png")
    }
    folder = shutil.copytree(external, tmp_path / "set")
    expected[0]["vitask"]["group"] = "p7"
    del expected[1]["source"]
    expected[2]["source"] = 5
    (folder / "test.json").write_text(json.dumps(expected))
    task, rows = documents(folder)
    logged = [task.process_results(row, [row["answer"]])["n"] for row in rows]
    assert [entry.get("source") for entry in logged] == [expected[0]["source"], None, None] + [
        sample["source"] for sample in expected[3:]
    ]
    assert [entry.get("group") for entry in logged] == ["p7", *[None] * (len(logged) - 1)]
    assert ["source" in entry for entry in logged[:2]] == [True, False]


def test_several_labels_to_an_image(tmp_path, external, documents):
    for number, name in enumerate(("a", "b", "c", "d")):
        source = sorted((external / "images" / "test").glob("*.png"))[number]
        (tmp_path / "source").mkdir(exist_ok=True)
        shutil.copy(source, tmp_path / "source" / f"{name}.png")
    lines = ["image,label,split", "a.png,mass;fluid,test", "b.png,,test", "c.png,mass,test", "d.png,fluid,test"]
    (tmp_path / "source" / "labels.csv").write_text("\n".join(lines))
    words = ["--modality", "scan", "--multi-label", "--out", str(tmp_path / "set")]
    assert main(["data", "folder", str(tmp_path / "source" / "labels.csv"), *words]) == 0
    _, rows = documents(tmp_path / "set")
    assert [row["answer"] for row in rows] == ["fluid, mass.", "no finding.", "mass.", "fluid."]
    assert [row["vitask"]["label"] for row in rows] == [[0, 1], [], [1], [0]]
    assert rows[0]["candidates"] == ["fluid.", "mass.", "no finding."]
    assert rows[0]["question"].endswith("fluid, mass, no finding.")


def test_grades_get_the_quadratic_kappa(external, documents, tmp_path):
    """Of the same images, written with --ordinal and without."""
    source = shutil.copytree(external.parent / "source", tmp_path / "source")
    words = ["--modality", DRAWN.modality, "--val", "0", "--test", "1", "--labels", ",".join(DRAWN.choices)]
    assert main(["data", "folder", str(source), "--out", str(tmp_path / "set"), *words, "--ordinal"]) == 0
    task, rows = documents(tmp_path / "set")
    values = [task.process_results(row, [row["answer"]]) for row in rows]
    assert {row["kind"] for row in rows} == {"ordinal-regression"}
    assert task.aggregation()["quadratic_kappa"]([value["quadratic_kappa"] for value in values]) == 1
    task, rows = documents(external)
    assert "quadratic_kappa" not in task.process_results(rows[0], [rows[0]["answer"]])


def test_the_checksum_follows_the_images(external, documents, tmp_path):
    """lmms-eval's response cache must not give the answers of other pixels."""
    changed = shutil.copytree(external, tmp_path / "set")
    before = documents(changed)[1].info.download_checksums
    path = next((changed / "images" / "test").glob("*.png"))
    with Image.open(path) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    assert documents(changed)[1].info.download_checksums.keys() == before.keys()
    assert documents(changed)[1].info.download_checksums != before


def broken(external: Path, directory: Path, change) -> Path:
    folder = shutil.copytree(external, directory / "broken")
    change(folder)
    return folder


def other_labels(folder: Path) -> None:
    labels = json.loads((folder / "labels.json").read_text())
    labels["choices"] = list(reversed(labels["choices"]))
    (folder / "labels.json").write_text(json.dumps(labels))


def label_set(**changes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        labels = json.loads((folder / "labels.json").read_text())
        (folder / "labels.json").write_text(json.dumps(labels | changes))

    return change


def truncated_image(folder: Path) -> None:
    path = next((folder / "images" / "test").glob("*.png"))
    path.write_bytes(path.read_bytes()[:100])


def no_blocks(folder: Path) -> None:
    rows = json.loads((folder / "test.json").read_text())
    (folder / "test.json").write_text(json.dumps([{k: v for k, v in row.items() if k != "vitask"} for row in rows]))


BROKEN = {
    "no label set": (lambda folder: (folder / "labels.json").unlink(), "labels.json' does not exist"),
    "not a label set": (
        lambda folder: (folder / "labels.json").write_text("[]"),
        "is []; expected an object; this is no label set",
    ),
    "no test split": (lambda folder: (folder / "test.json").unlink(), "has no test split; write it with --test X"),
    "other labels": (other_labels, "is not that of labels.json"),
    "names that are none": (label_set(choices=[1, 2]), "/choices/0 is 1; expected a text"),
    "no list of names": (label_set(choices="ab"), "/choices is 'ab'; expected a list"),
    "an unknown type": (label_set(type="grades"), "/type is 'grades'; expected 'multi-class', 'binary-class'"),
    "another type": (label_set(type=MULTI_LABEL), f"and labels.json has the type {MULTI_LABEL!r}"),
    "no modality": (label_set(modality=""), "modality '' is empty"),
    "no blocks": (no_blocks, "has no sample with a 'vitask' block"),
    "a truncated image": (truncated_image, "cannot be read (image file is truncated"),
    "a missing image": (lambda folder: shutil.rmtree(folder / "images"), "No such file or directory"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_sentence(name, external, documents, tmp_path):
    change, sentence = BROKEN[name]
    with pytest.raises(SystemExit) as stopped:
        documents(broken(external, tmp_path, change))
    assert str(stopped.value).startswith("vitask: error: ") and sentence in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_without_the_folder_the_command_says_so():
    done = lmms_eval(None, "--model", "dummy", "--tasks", "vitask_folder")
    assert done.returncode == 1
    assert "vitask: error: VITASK_FOLDER is not set" in done.stderr
