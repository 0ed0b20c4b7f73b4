"""Several seeds of one configuration: which runs are one row, what keeps others apart, and the paired differences."""

import csv
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from lmms_output import write_file, write_run
from scipy import stats
from test_report_page import check_self_contained

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.cli import main
from vitask_plugin.record.checkpoint import save_record
from vitask_plugin.report.compared import compare
from vitask_plugin.report.runs import read_runs
from vitask_plugin.report.seeds import Configuration, configurations

FLAGS = {"vitask_stage": 2, "vitask_ep": "cls", "vitask_rda_weight": 1.0, "vitask_crt_weight": 0.1}
RUN = {"processes": 1, "batch": 16, "data": "d" * 64, "schedule": {"learning_rate": "0.001"}, "save_only_model": False}
BREAST = {"breastmnist": 1.0}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("breastmnist", "retinamnist"):
        write_file(tmp_path / "data", name, 30)
    return tmp_path / "data"


def checkpoint(folder: Path, seed: int, run: dict[str, Any] | None = None, **flags: Any) -> Path:
    """What a training with VITask leaves for the report to read."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = VITaskArguments(**{**FLAGS, "vitask_connector_path": str(folder / "elsewhere"), **flags})
    tasks = {"medmnist_breast": {"choices": ["a", "b"]}}
    save_record(folder, arguments, None, None, tasks, "v1", run={**RUN, **(run or {}), "seed": seed})
    return folder


def judged(tmp_path: Path, root: Path, name: str, skill: float, made: Path, extra: str = "", **how: Any) -> Path:
    data = how.pop("data", BREAST)
    given = {flag: skill for flag in data}
    how = {"variants": ("",), **how}
    return write_run(tmp_path / name, given, root, model_args=f"pretrained={made}{extra}", **how)


def of(*folders: Path) -> list[Configuration]:
    return configurations(read_runs(folders))


def metrics(path: Path, task: str = "medmnist_breast") -> dict[str, Any]:
    return json.loads(path.read_text())["results"][task]


def test_three_seeds_are_one_row(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    both = {"breastmnist": 0.0, "retinamnist": 0.0}
    found: dict[str, list[Path]] = {"plain": [], "tuned": []}
    for name, skill in (("plain", 0.5), ("tuned", 2.0)):
        for seed in (2, 0, 1):
            made = checkpoint(tmp_path / f"out/{name}{seed}", seed, vitask_rda_weight=float(name == "tuned"))
            path = judged(tmp_path, root, f"{name}-seed{seed}", skill, made, data=both, seed=5 * seed)
            found[name].append(path)
    folders = [f"{name}-seed{seed}" for name in found for seed in (2, 0, 1)]
    assert main(["report", *folders, "--out", "r.html", "--markdown", "--csv"]) == 0
    markdown = (tmp_path / "r.md").read_text()
    check_self_contained((tmp_path / "r.html").read_text())
    section = markdown[markdown.index("## Seeds") : markdown.index("## Main")]
    assert "| plain | 0, 1, 2 | plain-seed0, plain-seed1, plain-seed2 | \N{EN DASH} |" in section
    assert "| tuned | 0, 1, 2 |" in section and "plain: --vitask\\_rda\\_weight 1.0, not 0.0 |" in section
    # The means, and their deviations over the seeds, from what lmms-eval wrote.
    main_table = markdown[markdown.index("## Main") : markdown.index("## Paired")]
    assert re.search(r"^\| data set \| plain \| tuned \|", main_table, re.MULTILINE)
    for paths in found.values():
        values = [[metrics(path)[f"{metric},none"] for path in paths] for metric in ("subset_accuracy", "macro_f1")]
        assert statistics.stdev(values[0]) > 0
        means, deviations = (
            " / ".join(f"{of(column):.3f}" for column in values) for of in (statistics.fmean, statistics.stdev)
        )
        assert f"{means} (± {deviations}, 3 seeds)" in main_table
    # The mean over both sets is made seed by seed.
    per_seed = [
        statistics.fmean(metrics(path, f"medmnist_{task}")["macro_f1,none"] for task in ("breast", "retina"))
        for path in found["tuned"]
    ]
    (mean,) = re.findall(r"^\| mean of 2 sets .*$", main_table, re.MULTILINE)
    assert f" / {statistics.fmean(per_seed):.3f} (± " in mean.split("|")[3]
    assert f" / {statistics.stdev(per_seed):.3f}, 3 seeds" in mean.split("|")[3]
    # Each run stands alone in its data set's section.
    assert all(markdown.count(folder) >= 2 for folder in folders)
    check_csv(tmp_path / "r.csv", found)


def check_csv(path: Path, found: dict[str, list[Path]]) -> None:
    with open(path, encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    means = {(row["run"], row["task"], row["metric"]): row for row in table if row["source"] == "mean over seeds"}
    values = [metrics(path)["macro_f1,none"] for path in found["tuned"]]
    row = means["tuned", "medmnist_breast", "macro_f1"]
    assert float(row["value"]) == pytest.approx(statistics.fmean(values)) and row["seeds"] == "0 1 2"
    assert float(row["deviation"]) == pytest.approx(statistics.stdev(values))
    assert {row["seeds"] for row in table if row["run"] == "plain-seed1"} == {"1"}
    rows = {row["task"]: row for row in table if row["source"] == "difference" and row["metric"] == "macro_f1"}
    raw = {}
    for task, row in rows.items():
        one, two = ([metrics(path, task)["macro_f1,none"] for path in found[name]] for name in ("plain", "tuned"))
        paired = stats.ttest_rel(two, one)
        ends = paired.confidence_interval(0.95)
        assert row["run"] == "tuned minus plain" and row["from"] == "3 seeds: t" and row["seeds"] == "0 1 2"
        assert float(row["value"]) == pytest.approx(statistics.fmean(two) - statistics.fmean(one))
        assert [float(row["low"]), float(row["high"])] == pytest.approx([ends.low, ends.high], abs=1e-4)
        assert float(row["p"]) == pytest.approx(paired.pvalue)
        raw[task] = paired.pvalue
    smaller, larger = sorted(raw, key=raw.get)
    assert float(rows[smaller]["p_holm"]) == pytest.approx(min(1, 2 * raw[smaller]))
    assert float(rows[larger]["p_holm"]) == pytest.approx(max(raw[larger], 2 * raw[smaller]))


APART = {
    "schedule": ({"run": {"schedule": {"learning_rate": "0.002"}}}, "--learning_rate 0.002, not 0.001"),
    "batch": ({"run": {"batch": 8}}, "batch 8, not 16"),
    "data": ({"run": {"data": "e" * 64}}, f"data {'e' * 37}..., not {'d' * 37}..."),
    "flag": ({"vitask_crt_weight": 1.0}, "--vitask_crt_weight 1.0, not 0.1"),
    "same seed": ({"seed": 0}, "the same seed, 0"),
    "arguments": ({"extra": ",image_size=any"}, "image_size any (not given there)"),
    "limit": ({"limit": 12}, "judged on another part of the images (--limit)"),
    "tasks": ({"variants": ("", "score")}, "judged by other tasks"),
    "model": ({"model": "llava"}, "--model llava, not vitask_llava"),
}


@pytest.mark.parametrize("difference", APART)
def test_runs_that_differ_in_more_than_the_seed_say_in_what(tmp_path: Path, root: Path, difference: str) -> None:
    changes, sentence = APART[difference]
    changes = dict(changes)
    evaluation = {name: changes.pop(name) for name in ("extra", "limit", "variants", "model") if name in changes}
    first = checkpoint(tmp_path / "first", 0)
    second = checkpoint(tmp_path / "second", **{"seed": 1, **changes})
    judged(tmp_path, root, "a0", 1.0, first)
    judged(tmp_path, root, "a1", 1.0, second, **evaluation)
    found = of(tmp_path / "a0", tmp_path / "a1")
    assert [one.name for one in found] == ["a0", "a1"]
    assert found[1].apart == (sentence,) and found[1].like == "a0"


def test_what_is_no_difference(tmp_path: Path, root: Path) -> None:
    """Places, and how a checkpoint is written."""
    for seed in (0, 1):
        made = checkpoint(
            tmp_path / f"out{seed}", seed, run={"save_only_model": bool(seed)}, vitask_features=f"f{seed}"
        )
        judged(tmp_path, root, f"s{seed}-x", 1.0, made, f",model_base=base{seed}")
    (one,) = of(tmp_path / "s1-x", tmp_path / "s0-x")
    assert one.name == "x" and one.seeds == (0, 1) and one.row.seed is not None
    assert one.row.tasks["medmnist_breast"].over_seeds and one.row.tasks["medmnist_breast"].intervals == {}


def test_names_without_a_seed_in_them(tmp_path: Path, root: Path) -> None:
    for name, seed in (("first", 0), ("again", 1)):
        judged(tmp_path, root, name, 1.0, checkpoint(tmp_path / f"out{seed}", seed))
    (one,) = of(tmp_path / "first", tmp_path / "again")
    assert one.name == "first and 1 more"


def test_runs_whose_training_nobody_knows_stay_apart(tmp_path: Path, root: Path) -> None:
    for number in (0, 1):
        judged(tmp_path, root, f"r{number}", 1.0, Path(f"nowhere/{number}"), seed=number)
    found = of(tmp_path / "r0", tmp_path / "r1")
    assert found[1].apart == ("the seed of r1 is not known (no record of its training can be read here)",)


def test_specialists_of_two_seeds_in_one_folder(tmp_path: Path, root: Path) -> None:
    """Each seed's specialists are one run; two seeds of them are one row."""
    for day, (seed, data) in enumerate(
        [(0, "breastmnist"), (1, "retinamnist"), (0, "retinamnist"), (1, "breastmnist")]
    ):
        made = checkpoint(tmp_path / f"{data}{seed}", seed, run={"data": data})
        judged(tmp_path, root, "out", 1.0, made, data=[data], date=f"2026010{day + 1}_000000")
    (one,) = of(tmp_path / "out")
    assert one.seeds == (0, 1)
    for run in one.runs:
        assert sorted(run.tasks) == ["medmnist_breast", "medmnist_retina"]
        assert run.arguments["pretrained"].count(f"mnist{run.seed}") == 2


# Differences over images -------------------------------------------------------------------------------------------


def test_one_training_each_is_compared_over_the_images(tmp_path: Path, root: Path) -> None:
    paths = [
        judged(
            tmp_path, root, name, skill, checkpoint(tmp_path / f"out-{name}", 3, vitask_rda_weight=skill), seed=noise
        )
        for name, skill, noise in (("weak", 0.2, 0), ("strong", 2.0, 1))
    ]
    differences = {one.metric: one for one in compare(of(tmp_path / "weak", tmp_path / "strong"))}
    one = differences["subset_accuracy"]
    right = []
    for path in paths:
        lines = path.with_name("20260101_000000_samples_medmnist_breast.jsonl").read_text().splitlines()
        logged = [json.loads(line)["n"] for line in lines]
        right.append([entry["label"] == entry["prediction"] for entry in logged])
    gained = sum(b > a for a, b in zip(*right, strict=True))
    lost = sum(a > b for a, b in zip(*right, strict=True))
    assert gained > lost > 0 and one.seeds == (3,) and one.images == 30
    assert one.value == pytest.approx((gained - lost) / 30)
    assert one.p == pytest.approx(stats.binomtest(gained, gained + lost).pvalue) == one.corrected
    assert one.interval[0] < one.value < one.interval[1] and one.how == "images: bootstrap, McNemar"
    assert differences["macro_f1"].p is None and differences["macro_f1"].how == "images: bootstrap"


def test_two_seeds_are_too_few_for_an_interval_over_seeds(tmp_path: Path, root: Path) -> None:
    for name, skill in (("weak", 0.2), ("strong", 3.0)):
        for seed in (0, 1):
            made = checkpoint(tmp_path / f"out-{name}{seed}", seed, vitask_rda_weight=skill)
            judged(tmp_path, root, f"{name}{seed}", skill, made, seed=seed)
    # A third seed of one alone has no partner.
    judged(tmp_path, root, "weak2", 0.2, checkpoint(tmp_path / "out-weak2", 2, vitask_rda_weight=0.2), seed=2)
    found = of(*(tmp_path / f"{name}{seed}" for name in ("weak", "strong") for seed in (0, 1)), tmp_path / "weak2")
    assert [one.seeds for one in found] == [(0, 1, 2), (0, 1)]
    (one, _) = compare(found)
    assert one.seeds == (0, 1) and one.p is None and one.how == "2 seeds; images: bootstrap (seed 0, 1)"
    pairs = [[run.tasks["medmnist_breast"].metrics["subset_accuracy"] for run in side.runs[:2]] for side in found]
    assert one.value == pytest.approx(statistics.fmean(pairs[1]) - statistics.fmean(pairs[0]))
    assert one.interval[0] < one.value < one.interval[1]


def test_an_untuned_model_meets_every_seed(tmp_path: Path, root: Path) -> None:
    judged(tmp_path, root, "untuned", 0.2, Path("nowhere"))
    for seed in (0, 1, 2):
        judged(tmp_path, root, f"t{seed}", 3.0, checkpoint(tmp_path / f"out{seed}", seed), seed=seed)
    found = of(tmp_path / "untuned", *(tmp_path / f"t{seed}" for seed in (0, 1, 2)))
    assert [len(one.runs) for one in found] == [1, 3]
    one = compare(found)[0]
    assert (
        one.how == "3 seeds: t (of one side: the other is one run)"
        and one.seeds == (0, 1, 2)
        and (one.first, one.second) == ("untuned", "t")
    )


def test_a_single_run_meets_its_own_seed_where_there_is_one(tmp_path: Path, root: Path) -> None:
    for name, seed in (("t0", 0), ("t1", 1), ("t2", 2), ("same", 1), ("other", 5)):
        made = checkpoint(tmp_path / f"out-{name}", seed, vitask_rda_weight={"same": 2.0, "other": 3.0}.get(name, 1.0))
        judged(tmp_path, root, name, 1.0, made, seed=seed)
    found = of(*(tmp_path / name for name in ("t0", "t1", "t2", "same", "other")))
    hows = {(one.first, one.second): one.how for one in compare(found) if one.metric == "subset_accuracy"}
    assert hows == {
        ("t", "same"): "images: bootstrap, McNemar (seed 1)",
        ("t", "other"): "3 seeds: t (of one side: the other is one run)",
        ("same", "other"): "images: bootstrap, McNemar",
    }


def test_without_samples_or_on_other_images(tmp_path: Path, root: Path) -> None:
    made = [checkpoint(tmp_path / f"out{number}", 0, vitask_rda_weight=float(number)) for number in range(3)]
    judged(tmp_path, root, "all", 1.0, made[0])
    judged(tmp_path, root, "bare", 2.0, made[1], samples=False)
    judged(tmp_path, root, "part", 2.0, made[2], limit=12)
    found = compare(of(tmp_path / "all", tmp_path / "bare", tmp_path / "part"))
    assert {(one.first, one.second) for one in found} == {("all", "bare")}
    assert {(one.interval, one.p, one.how) for one in found} == {(None, None, "no samples logged")}
