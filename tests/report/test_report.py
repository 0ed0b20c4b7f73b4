"""`vitask report`: from lmms-eval's folders to a page, Markdown and CSV; what is refused, and that nothing is lost."""

import base64
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lmms_output import write_file, write_own_folder, write_record, write_run
from PIL import Image
from test_report_page import check_self_contained

from vitask_plugin.cli import main
from vitask_plugin.data.instructions import label_sets

TASKS = Path(__file__).parents[2] / "eval_tasks"
SETS = {"breastmnist": 1.5, "chestmnist": 1.5, "retinamnist": 1.5}


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on three data sets in one/ and two/, the data in data/. Read only."""
    folder = tmp_path_factory.mktemp("runs")
    for name in SETS:
        write_file(folder / "data", name, 40)
    write_run(folder / "one", SETS, folder / "data", seed=1)
    write_run(folder / "two", {name: 4.0 for name in SETS}, folder / "data", seed=2)
    return folder


@pytest.fixture
def folder(tmp_path: Path, two_runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `two_runs`, where the test stands."""
    shutil.copytree(two_runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("MEDMNIST_ROOT", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_report_of_two_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "one", "two", "--out", "r.html", "--markdown", "--csv"]) == 0
    assert capsys.readouterr().out.split() == ["r.html", "r.md", "r.csv"]
    text = (folder / "r.html").read_text()
    page = check_self_contained(text)
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        "Runs",
        "Main results: the paper&#39;s table 1",
        "Paired differences",
        "Incomplete instructions: the paper&#39;s figure 4",
        "Response ranking: the paper&#39;s figure 3",
        "chest",
        "retina",
        "breast",
    ]
    # Per data set and run a reliability diagram and a density; bars per data set and for the paper's derma.
    assert page.tags.count("svg") == 3 * 2 * 2 + 4
    # Two single-label sets with three variants of two runs.
    assert text.count('class="confusion') == 2 * 3 * 2
    assert "0.632 / 0.522" in page.cells  # the paper's retina
    assert "In italics: the figures of the paper" in text
    found = json.loads((folder / "one/somewhere__llava/20260101_000000_results.json").read_text())["results"]
    measured = found["medmnist_retina"]
    assert f"{measured['subset_accuracy,none']:.3f} / {measured['macro_f1,none']:.3f}" in page.cells
    low, high = measured["macro_f1_ci95,none"]
    assert f"{low:.2f}\N{EN DASH}{high:.2f}" in text
    markdown = (folder / "r.md").read_text()
    assert f"{measured['subset_accuracy,none']:.3f} / {measured['macro_f1,none']:.3f}" in markdown
    _, data_set = markdown.split("## retina\n")
    assert "**Likelihood of labels**" in data_set and f"{measured['balanced_accuracy,none']:.3f} (" in data_set
    assert "*0.632 / 0.522*" in markdown and "<" not in markdown.replace("<!-- vitask report -->", "")


def test_the_csv_holds_every_figure(folder: Path) -> None:
    assert main(["report", "one", "two", "--out", "r.html", "--csv"]) == 0
    table = rows(folder / "r.csv")
    for run in ("one", "two"):
        results = json.loads((folder / run / "somewhere__llava/20260101_000000_results.json").read_text())["results"]
        mine = {(row["task"], row["metric"]): row for row in table if row["run"] == run}
        for task, figures in results.items():
            for key, value in figures.items():
                name = key.removesuffix(",none")
                if not key.endswith(",none") or name.endswith("_ci95"):
                    continue
                row = mine.pop((task, name))
                assert float(row["value"]) == value and row["source"] == "measured" and row["n"] == "40"
                ends = figures.get(f"{name}_ci95,none", ["", ""])
                assert [row["low"], row["high"]] == [str(end) for end in ends]
        assert {metric for _, metric in mine} == {"ranking_overlap", "ranked_right"} and len(mine) == 6
    theirs = [row for row in table if row["source"] == "paper"]
    # Table 1 with its means, table 2, figure 4, and the external sets.
    assert len(theirs) == 13 * 5 * 2 + 4 * 5 + 2 * 2 + 4 * 3 * 2 and all(row["low"] == "" for row in theirs)
    published = {(row["run"], row["task"], row["metric"]): row["value"] for row in theirs}
    assert len(published) == len(theirs)
    assert published["VITask w/ EP", "mean of 12 sets", "macro_f1"] == "0.771"
    assert published["vanilla + RDA (table 2)", "medmnist_oct", "macro_f1"] == "0.837"
    assert published["vanilla (figure 4)", "medmnist_derma_incomplete", "macro_f1"] == "0.423"
    assert published["VITask-plug (external)", "IDRiD", "subset_accuracy"] == "0.544"


def test_wrong_answers_are_shown_with_their_images(folder: Path) -> None:
    assert main(["report", "one", "two", "--errors", "5"]) == 0
    text = (folder / "report.html").read_text()
    retina = text[text.index("<h2>retina") : text.index("<h2>breast")]
    articles = re.findall(r"<article.*?</article>", retina, re.DOTALL)
    assert len(articles) == 5
    samples = {}
    for run in ("one", "two"):
        path = folder / run / "somewhere__llava/20260101_000000_samples_medmnist_retina.jsonl"
        samples[run] = {sample["doc_id"]: sample for sample in map(json.loads, path.read_text().splitlines())}
    misses = {
        index: sum(samples[run][index]["n"]["prediction"] != samples[run][index]["n"]["label"] for run in samples)
        for index in samples["one"]
    }
    assert f"5 of the {sum(map(bool, misses.values()))} images" in retina
    with np.load(folder / "data/retinamnist.npz") as file:
        images = file["test_images"]
    shown = []
    for article in articles:
        index = int(re.search(r"test image (\d+)", article)[1])
        shown.append(misses[index])
        for run in samples:
            sample = samples[run][index]
            mark = "✓" if sample["n"]["prediction"] == sample["n"]["label"] else "✗"
            assert f"<dt>{run}</dt><dd>{mark} {sample['filtered_resps']}</dd>" in article
        encoded = re.search(r"base64,([^\"]+)", article)[1]
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
            assert np.array_equal(np.asarray(picture), images[index])
    # Those that most runs have wrong come first.
    assert shown == sorted(misses.values(), reverse=True)[:5]


def test_without_the_data_errors_are_counted_and_nothing_is_downloaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "nothing").mkdir()
    monkeypatch.setenv("MEDMNIST_ROOT", str(folder / "nothing"))
    assert main(["report", "one"]) == 0
    text = (folder / "report.html").read_text()
    assert "<article" not in text and "<img" not in text
    assert text.count("does not exist (MEDMNIST_ROOT names its folder)") == 3
    assert list((folder / "nothing").iterdir()) == []


@pytest.mark.parametrize("damage", ["other labels", "no numpy file", "too short"])
def test_other_or_damaged_data_are_not_shown(folder: Path, damage: str) -> None:
    path = folder / "data/breastmnist.npz"
    with np.load(path) as file:
        arrays = dict(file)
    if damage == "other labels":
        arrays["test_labels"] = 1 - arrays["test_labels"]
    else:
        arrays = {name: array[:1] for name, array in arrays.items()}
    np.savez(path, **arrays)
    if damage == "no numpy file":
        path.write_bytes(b"PK\x03\x04 broken")
    assert main(["report", "one"]) == 0
    text = (folder / "report.html").read_text()
    breast = text[text.index("<h2>breast") :]
    assert "<article" not in breast and "they are not shown, because" in breast
    assert ("holds other labels" in breast) == (damage == "other labels")


def test_a_part_of_the_images_and_no_samples(folder: Path) -> None:
    write_run(folder / "part", {"retinamnist": 1.0}, folder / "data", limit=12)
    write_run(folder / "bare", {"retinamnist": 1.0}, folder / "data", samples=False)
    assert main(["report", "part", "bare"]) == 0
    page = check_self_contained(text := (folder / "report.html").read_text())
    assert "part (--limit)" in page.cells and "all" in page.cells
    assert "Some runs kept no samples" in text
    assert text.count('class="confusion') == 3
    assert main(["report", "one"]) == 0
    assert "Some runs kept no samples" not in (folder / "report.html").read_text()


def test_one_variant_alone(folder: Path) -> None:
    write_run(folder / "scored", {"breastmnist": 1.0}, folder / "data", variants=("score",))
    assert main(["report", "scored"]) == 0
    text = (folder / "report.html").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Runs", "Response ranking: the paper&#39;s figure 3", "breast"]
    assert "<article" in text


def test_the_ablation_shows_what_a_checkpoint_was_trained_with(folder: Path) -> None:
    flags = {"vitask_stage": 2, "vitask_ep": "cls", "vitask_rda_weight": 1.0, "vitask_crt_weight": 0.0}
    write_record(folder / "checkpoint", flags)
    arguments = f"pretrained={folder / 'checkpoint'},tsm=t"
    write_run(folder / "rda", {"retinamnist": 1.0}, folder / "data", model_args=arguments)
    assert main(["report", "rda", "--markdown"]) == 0
    markdown = (folder / "report.md").read_text()
    section = markdown[markdown.index("## Ablation") : markdown.index("## Incomplete")]
    assert re.search(r"^\| rda \| yes \| no \| yes \| \S \| \S \| \S \| 0\.\d{3} .* \| \S \|$", section, re.MULTILINE)
    theirs = "| *yes* | *no* | *no* | *0.078* | *0.585* | *0.837* | *0.401* | *0.523* |"
    assert f"| *vanilla + RDA (paper)* {theirs}" in section


def test_controls_are_named_in_the_ablation(folder: Path) -> None:
    for name, flags, given in (
        ("star", {"vitask_ep": "cls", "vitask_rda_detach": False}, "tsm=t"),
        ("learned", {"vitask_ep": "learned"}, "ep=True"),
        ("off", {"vitask_ep": "text"}, "ep=False"),
    ):
        usual = {"vitask_stage": 1, "vitask_rda_weight": 1.0, "vitask_crt_weight": 0.0}
        write_record(folder / "checkpoints" / name, usual | flags)
        arguments = f"pretrained={folder / 'checkpoints' / name},{given}"
        write_run(folder / name, {"retinamnist": 1.0}, folder / "data", variants=("",), model_args=arguments)
    assert main(["report", "star", "learned", "off", "--markdown"]) == 0
    page = check_self_contained((folder / "report.html").read_text())
    rows = {page.cells[i]: page.cells[i + 1 : i + 4] for i, cell in enumerate(page.cells) if cell in ("star", "off")}
    assert rows == {"star": ["RDA* (not detached)", "no", "yes"], "off": ["yes", "no", "no"]}
    assert "| learned | yes | no | yes (learned) |" in (folder / "report.md").read_text()


@pytest.fixture
def own_sets(folder: Path) -> Path:
    """Two folders of `vitask data folder`, aptos and idrid_score, judged by one model into plug/."""
    for day, (name, seed) in enumerate((("aptos", 1), ("idrid_score", 2)), start=1):
        write_file(folder / f"{name}-data", "retinamnist", 20 + day, seed=seed)
        write_own_folder(folder / name, "retinamnist", folder / f"{name}-data")
        write_run(
            folder / "plug", {"retinamnist": 1.0}, folder, own=folder / name, date=f"2026010{day}_000000", seed=seed
        )
    return folder


def test_own_data_and_tasks_of_the_harness(own_sets: Path) -> None:
    paths = [own_sets / f"plug/somewhere__llava/2026010{day}_000000_results.json" for day in (1, 2)]
    records = [json.loads(path.read_text()) for path in paths]
    records[0]["results"]["mme"] = {"perception,none": 1234.5, "perception_stderr,none": 3}
    records[0]["results"]["gsm8k"] = {
        "exact_match,flexible-extract": 0.25,
        "exact_match_stderr,flexible-extract": 0.125,
        "exact_match,strict-match": 0.5,
    }
    paths[0].write_text(json.dumps(records[0]))
    assert main(["report", "plug", "--markdown", "--csv"]) == 0
    markdown = (own_sets / "report.md").read_text()
    external = markdown[markdown.index("## External data sets") : markdown.index("## aptos")]
    assert "| *VITask-plug (paper)* |  |  | *0.668 / 0.407* | *0.544 / 0.359* | *0.652 / 0.438* |" in external
    aptos, idrid = (
        f"{found['subset_accuracy,none']:.3f} / {found['macro_f1,none']:.3f}"
        for found in (record["results"]["vitask_folder"] for record in records)
    )
    assert aptos != idrid
    assert re.search(rf"^\| plug \| {aptos} \(\S+ / \S+\) \| {idrid} \(", external, re.MULTILINE)
    assert re.search(r"^\| run \| aptos \| idrid-score \|", external, re.MULTILINE)
    table = {(row["task"], row["metric"]): row["n"] for row in rows(own_sets / "report.csv")}
    names = {
        f"vitask_{name}{variant}" for name in ("aptos", "idrid-score") for variant in ("", "_incomplete", "_score")
    }
    assert {task for task, _ in table if task.startswith("vitask_")} == names
    assert (table["vitask_aptos", "n"], table["vitask_idrid-score_score", "n"]) == ("21", "22")
    others = markdown[markdown.index("## Other tasks") :]
    assert "| plug | mme | perception | 1234.500 |" in others
    assert "exact\\_match (flexible-extract) | 0.250 |" in others
    assert "exact\\_match (strict-match) | 0.500 |" in others
    assert "stderr" not in others


def test_images_of_ones_own_folder(own_sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITASK_FOLDER", str(own_sets / "aptos"))
    assert main(["report", "plug", "--errors", "3"]) == 0
    text = (own_sets / "report.html").read_text()
    aptos, idrid = text[text.index("<h2>aptos") :].split("<h2>idrid-score")
    articles = re.findall(r"<article.*?</article>", aptos, re.DOTALL)
    assert len(articles) == 3 and "<article" not in idrid
    assert "images of one&#39;s own folder need VITASK_FOLDER, and it names no folder &#39;idrid_score&#39;" in idrid
    # Several folders, each with its own images.
    monkeypatch.setenv("VITASK_FOLDER", os.pathsep.join(str(own_sets / name) for name in ("idrid_score", "aptos")))
    assert main(["report", "plug", "--errors", "3"]) == 0
    both = (own_sets / "report.html").read_text()
    assert both.count("<article") == 6 and "own folder need VITASK_FOLDER" not in both
    monkeypatch.setenv("VITASK_FOLDER", str(own_sets / "aptos"))
    samples = json.loads((own_sets / "aptos/test.json").read_text())
    for article in articles:
        index = int(re.search(r"test image (\d+)", article)[1])
        assert f"<dt>test image {index}: {samples[index]['source']}</dt>" in article
        encoded = re.search(r"base64,([^\"]+)", article)[1]
        with (
            Image.open(io.BytesIO(base64.b64decode(encoded))) as shown,
            Image.open(own_sets / "aptos/images" / samples[index]["image"]) as image,
        ):
            assert np.array_equal(np.asarray(shown), np.asarray(image))
    # Other labels than those judged, and no folder at all.
    samples.reverse()
    (own_sets / "aptos/test.json").write_text(json.dumps(samples))
    assert main(["report", "plug"]) == 0
    text = (own_sets / "report.html").read_text()
    assert "<article" not in text and "holds other labels than those judged" in text
    monkeypatch.delenv("VITASK_FOLDER")
    assert main(["report", "plug"]) == 0
    assert (own_sets / "report.html").read_text().count("own folder need VITASK_FOLDER") == 2


def test_a_run_may_be_called_like_a_formula(folder: Path) -> None:
    (folder / "two").rename(folder / "a$_$")
    assert main(["report", "one", "a$_$"]) == 0
    text = (folder / "report.html").read_text()
    assert any("a$_$" in svg for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL))


def test_means_are_over_the_same_sets_for_all(folder: Path) -> None:
    write_run(folder / "few", {"retinamnist": 1.0}, folder / "data")
    assert main(["report", "one", "few", "--markdown"]) == 0
    (mean,) = re.findall(r"^\| mean of 3 sets .*$", (folder / "report.md").read_text(), re.MULTILINE)
    cells = [cell.strip() for cell in mean.strip("|").split("|")]
    results = json.loads((folder / "one/somewhere__llava/20260101_000000_results.json").read_text())["results"]
    means = [
        sum(results[f"medmnist_{name}"][f"{metric},none"] for name in ("breast", "chest", "retina")) / 3
        for metric in ("subset_accuracy", "macro_f1")
    ]
    assert cells[1].startswith(f"{means[0]:.3f} / {means[1]:.3f} ")
    assert cells[2] == "\N{EN DASH}"  # a run that lacks a set has none
    # (.517 + .632 + .865) / 3, (.129 + .522 + .828) / 3
    assert cells[-1] == "*0.671 / 0.493*"
    assert "computed here from the paper's figures" in (folder / "report.md").read_text()


def test_all_twelve_sets_have_the_papers_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = {known.flag: 1.0 for known in label_sets().values() if known.task.startswith("medmnist_")}
    for name in sets:
        write_file(tmp_path / "data", name, 28)
    monkeypatch.setenv("MEDMNIST_ROOT", str(tmp_path / "data"))
    write_run(tmp_path / "out", sets, tmp_path / "data", variants=("",))
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "r.html"), "--markdown"]) == 0
    text = (tmp_path / "r.html").read_text()
    # So many sets are folded.
    assert check_self_contained(text).tags.count("details") == 12
    (mean,) = re.findall(r"^\| mean of 12 sets .*$", (tmp_path / "r.md").read_text(), re.MULTILINE)
    assert "computed here" not in text
    assert mean.endswith("| *0.816 / 0.772* | *0.759 / 0.624* | *0.742 / 0.604* | *0.806 / 0.710* | *0.847 / 0.771* |")


# Bad input -------------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one sentence with which the command ends; no file has changed."""
    before = {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()}
    assert main(["report", *words]) == 1
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("vitask: error: ") and output.err.count("\n") == 1
    assert {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()} == before
    return output.err


def test_bad_folders(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty").mkdir()
    assert "'nowhere' does not exist" in refused(capsys, "nowhere")
    assert "'empty' holds no results of lmms-eval" in refused(capsys, "one", "empty")
    assert "'data' holds no results of lmms-eval" in refused(capsys, "data")
    path = folder / "two/somewhere__llava/20260101_000000_results.json"
    path.write_text(path.read_text().replace('"medmnist_breast": 2.0', '"medmnist_breast": 1.0'))
    assert "task 'medmnist_breast' is of version 1.0" in refused(capsys, "one", "two")
    path.write_text("{}")
    assert "is not a results file of lmms-eval" in refused(capsys, "one", "two")


def test_mixed_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_file(folder / "other", "breastmnist", 41)
    with np.load(folder / "other/breastmnist.npz") as file:
        arrays = {name: array[::-1] for name, array in file.items()}
    np.savez(folder / "other/breastmnist.npz", **arrays | {"test_labels": 1 - arrays["test_labels"]})
    write_run(folder / "three", {"breastmnist": 1.0}, folder / "other")
    assert "mixed data: image 0 of 'medmnist_breast'" in refused(capsys, "one", "three")


def test_what_is_no_report_is_not_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes.html").write_text("<p>mine</p>")
    assert "'notes.html' exists and is no earlier report" in refused(capsys, "one", "--out", "notes.html")
    Path("r.csv").write_text("a,b\n1,2\n")
    assert "'r.csv' exists and is no earlier report" in refused(capsys, "one", "--out", "r.html", "--csv")
    Path("r.md").mkdir()
    assert "'r.md' exists and is no earlier report" in refused(capsys, "one", "--out", "r.html", "--markdown")
    Path("r.md").rmdir()
    Path("r.csv").unlink()
    for _ in range(2):
        # An earlier report is.
        assert main(["report", "one", "--out", "r.html", "--markdown", "--csv"]) == 0


def test_bad_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "it ends in .html" in refused(capsys, "one", "--out", "r.pdf")
    assert "--errors is -1" in refused(capsys, "one", "--errors", "-1")


# The real harness ------------------------------------------------------------------------------------------------


def test_what_lmms_eval_itself_writes(
    tmp_path: Path, drawn_root: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command of the README, with an untuned tiny model, and its report."""
    command = [
        *(sys.executable, "-m", "lmms_eval", "--model", "vitask_llava"),
        *("--model_args", f"pretrained={tiny_checkpoint}"),
        *("--tasks", "vitask_drawn,vitask_drawn_score", "--include_path", str(TASKS), "--device", "cpu"),
        *("--batch_size", "8", "--output_path", str(tmp_path / "untuned"), "--log_samples"),
    ]
    environment = {**os.environ, "MEDMNIST_ROOT": str(drawn_root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.setenv("MEDMNIST_ROOT", str(drawn_root))
    out = tmp_path / "r.html"
    assert main(["report", str(tmp_path / "untuned"), "--out", str(out), "--csv"]) == 0
    page = check_self_contained(out.read_text())
    assert {"untuned", "vitask_llava"} <= set(page.cells)
    assert "In italics" not in out.read_text()  # nothing of the paper's can be compared with
    assert page.tags.count("img") and page.tags.count("svg") == 2
    table = {(row["task"], row["metric"]): row for row in rows(tmp_path / "r.csv") if row["source"] == "measured"}
    (results,) = tmp_path.rglob("*_results.json")
    found = json.loads(results.read_text())["results"]
    for task in ("vitask_drawn", "vitask_drawn_score"):
        assert float(table[task, "accuracy"]["value"]) == found[task]["accuracy,none"]
        assert float(table[task, "macro_f1"]["low"]) == found[task]["macro_f1_ci95,none"][0]
