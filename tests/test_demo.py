"""The whole demo at a small size: what it writes, what it refuses, and that an interrupt leaves nothing in the way."""

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from vitask_plugin import demo as module_under_test
from vitask_plugin.cli import main
from vitask_plugin.data.drawn import draw_dataset
from vitask_plugin.data.instructions import DRAWN
from vitask_plugin.demo import Demo, Judged, demo, output_files
from vitask_plugin.demo_hosts import HOSTS, Settings
from vitask_plugin.errors import VITaskError
from vitask_plugin.inference.metrics import Outcome
from vitask_plugin.run.engine import Engine
from vitask_plugin.stages import Stages, last_lines, module

SIZES = {"train": 64, "val": 16, "test": 24}


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """A small demo in the folder `one`, its results, what it printed; the same without judging in the folder `two`."""
    root = tmp_path_factory.mktemp("demo")
    with open(root / "printed.txt", "w", encoding="utf-8") as printed:
        results = demo("drawn", root / "one", seed=3, console=Console(file=printed, width=120), sizes=SIZES)
    again = Demo(DRAWN, root / "two", seed=3, epochs=1, console=quiet(), sizes=SIZES)
    again.out.mkdir()
    draw_dataset(again.out / module_under_test.DRAWN_FILE, seed=3, sizes=SIZES)
    made = tuple(stage for stage in again.plan.stages if not stage.name.startswith("judge-"))
    Engine(replace(again.plan, stages=made), quiet()).run()
    return root, results, (root / "printed.txt").read_text(encoding="utf-8")


def test_results_have_the_promised_form(two_runs):
    root, results, _ = two_runs
    written = json.loads((root / "one" / "results.json").read_text())
    assert written == results
    assert list(written) == ["data", "split", "seed", "settings", "versions", "rows"]
    assert (written["data"], written["split"], written["seed"]) == ("drawn", "test", 3)
    assert written["settings"] == {
        "batch": 16,
        "learning_rate": 1e-3,
        "rda_weight": 2.0,
        "crt_weight": 0.1,
        "connector_lr": 2e-3,
    }
    assert {"torch", "transformers", "llava-torch", "lmms_eval", "vitask-plugin"} <= set(written["versions"])
    kinds = {"model": str, "ep": bool, "accuracy": float, "macro_f1": float, "auc": float, "unmapped": int, "n": int}
    assert [(row["model"], row["ep"]) for row in written["rows"]] == [
        ("tsm", False),
        ("vanilla", False),
        ("vitask", False),
        ("vitask", True),
    ]
    for row in written["rows"]:
        assert {name: type(value) for name, value in row.items()} == kinds
        assert all(0 <= row[name] <= 1 for name in ("accuracy", "macro_f1", "auc"))
        assert row["n"] == SIZES["test"]


def test_same_seed_same_weights(two_runs):
    """From which lmms-eval makes the same table: test_run_whole.py compares figures."""
    root, _, _ = two_runs
    for weights in ("llava-vanilla/model.safetensors", "llava-vitask/model.safetensors", "tsm/tsm.safetensors"):
        assert (root / "one" / weights).read_bytes() == (root / "two" / weights).read_bytes(), weights


def test_vanilla_has_as_many_epochs_as_both_stages(two_runs):
    root, _, _ = two_runs
    steps = {
        name: json.loads((root / "one" / name / "trainer_state.json").read_text())["global_step"]
        for name in ("llava-vanilla", "llava-vitask-stage1", "llava-vitask")
    }
    assert steps["llava-vanilla"] == steps["llava-vitask-stage1"] + steps["llava-vitask"] > 0


def test_rows_come_from_the_harness_and_its_answers(two_runs):
    """The table is what lmms-eval wrote, model by model."""
    root, results, _ = two_runs
    for row, folder in zip(results["rows"][1:], ("vanilla", "vitask", "vitask-ep"), strict=True):
        (path,) = (root / "one" / "evaluation" / folder).rglob("*_results.json")
        written = json.loads(path.read_text())["results"]
        assert row["accuracy"] == pytest.approx(written["vitask_drawn"]["accuracy,none"])
        assert row["macro_f1"] == pytest.approx(written["vitask_drawn"]["macro_f1,none"])
        assert row["auc"] == pytest.approx(written["vitask_drawn_score"]["auc,none"])


def test_report_shows_table_curves_confusions_and_answers(two_runs):
    root, results, _ = two_runs
    page = (root / "one" / "report.html").read_text(encoding="utf-8")
    for row in results["rows"]:
        assert f"{row['accuracy']:.3f}" in page
    assert page.count("<svg") == 3
    for term in ("vanilla", "EP", "RDA", "CRT"):
        assert term in page
    assert page.count("data:image/png;base64,") == module_under_test.IMAGES_IN_REPORT
    assert page.count("no label") >= 4
    assert all(choice in page for choice in DRAWN.choices)
    assert not re.search(r'(?:src|href)="(?!data:|#)', page), "the page needs nothing from elsewhere"


def test_console_says_every_stage_one_table_and_a_verdict(two_runs):
    root, _, printed = two_runs
    for title in ("Vanilla tuning", "TSM trained", "VITask, stage 1", "VITask, stage 2", "VITask with EP judged"):
        assert printed.count(f"✓ {title}") == 1, title
    assert printed.count("drawn, test split, seed 3") == 1
    assert re.search(r"VITask without EP is (above|below|level with) vanilla tuning", printed)
    log = (root / "one" / "logs" / "vitask.log").read_text(encoding="utf-8")
    assert log.startswith("$ ") and "--vitask_stage 2" in log.splitlines()[0]
    assert set(os.listdir(root / "one")) == set(output_files(HOSTS["llava"]))


def test_val_is_judged_where_it_is_asked_for(two_runs):
    """TSM and VLM answer for the val images, and nothing for the test images."""
    root, _, _ = two_runs
    run = Demo(DRAWN, root / "two", seed=3, epochs=1, console=quiet(), split="val")
    labels = [sample["vitask"]["label"] for sample in json.loads((root / "two/data/drawn/val.json").read_text())]
    without = ("judge-vanilla", "judge-vitask")
    engine = Engine(replace(run.plan, stages=tuple(one for one in run.plan.stages if one.name not in without)), quiet())
    engine.run()
    assert engine.ran.keys() == {"judge-tsm", "judge-vitask-ep"}, "nothing else depends on the split"
    for judged in (run.judged_arm("tsm"), run.judged_arm("vitask-ep")):
        assert [outcome.target for outcome in judged.outcomes] == labels and len(labels) == SIZES["val"]
        assert judged.row()["n"] == SIZES["val"] and judged.auc is not None


def test_verdict_does_not_flatter(two_runs):
    assert module_under_test._against(0.4, 0.5) == "is below"
    assert module_under_test._against(0.5, 0.5) == "is level with"
    assert module_under_test._against(0.6, 0.5) == "is above"


# The HF host --------------------------------------------------------------------------------------------------


@pytest.fixture
def commands(tmp_path):
    """What each host's demo runs, by log; nothing is run."""

    def of(host: str) -> dict[str, list[str]]:
        run = Demo(DRAWN, tmp_path, seed=3, epochs=2, console=quiet(), sizes=SIZES, host=HOSTS[host])
        return {stage.name: list(command.words) for stage in run.plan.stages for command in stage.commands}

    return of


def flags_of(command: list[str]) -> dict[str, str]:
    return {word[2:]: value for word, value in itertools.pairwise(command) if word.startswith("--")}


def test_the_hf_host_runs_the_same_stages_by_its_own_script(commands, tmp_path):
    """The same data, TSM and settings; flags that its script knows; lmms-eval's own model for it."""
    from transformers import HfArgumentParser

    from vitask_plugin.hf.train import CLASSES

    llava, hf = commands("llava"), commands("hf")
    assert llava.keys() == hf.keys()
    assert llava["tsm"] == hf["tsm"] and llava["features"] == hf["features"] and llava["data-drawn"] == hf["data-drawn"]
    for name, start, epochs in (
        ("vanilla", "tiny", "4"),
        ("vitask-stage1", "tiny", "2"),
        ("vitask", "hf-vitask-stage1", "2"),
    ):
        (_, _, script, *words), ours, theirs = hf[name], flags_of(hf[name]), flags_of(llava[name])
        assert script == "vitask_plugin.hf.train" and llava[name][2] == "vitask_plugin.llava.train"
        assert ours["model_name_or_path"] == str(tmp_path / start) and ours["num_train_epochs"] == epochs
        shared = ours.keys() & theirs.keys() - {"model_name_or_path"}
        assert len(shared) > 10 and ours.keys() <= theirs.keys()
        own = {flag: ours[flag].replace(str(tmp_path / "hf-"), str(tmp_path / "llava-")) for flag in shared}
        assert own == {flag: theirs[flag] for flag in shared}
        *_, unknown = HfArgumentParser(CLASSES).parse_args_into_dataclasses(words, return_remaining_strings=True)
        assert not set(unknown) - {"--warmup_ratio", "0.03"}, "flags that the script does not know"
    judged = flags_of(hf["judge-vitask-ep"])
    assert judged["model"] == "vitask_hf" and judged["model_args"].startswith(f"pretrained={tmp_path / 'hf-vitask'}")
    assert flags_of(llava["judge-vitask-ep"])["model"] == "vitask_llava"


@pytest.mark.parametrize("host", HOSTS)
def test_settings_reach_the_commands(host, tmp_path, monkeypatch):
    """Each number is in its commands, vanilla has none of VITask's, and the drawn file is the demo's own."""
    monkeypatch.setenv("MEDMNIST_ROOT", "/somebody/elses")
    settings = Settings(batch=8, learning_rate=0.5, rda_weight=3.0, crt_weight=0.25, connector_lr=0.75)
    run = Demo(DRAWN, tmp_path, seed=7, epochs=2, console=quiet(), host=HOSTS[host], split="val", settings=settings)
    stages = {stage.name: stage for stage in run.plan.stages}
    trained = {"per_device_train_batch_size": "8", "learning_rate": "0.5", "model_max_length": "1024", "seed": "7"}
    weights = {"vitask_rda_weight": "3.0", "vitask_crt_weight": "0.25", "vitask_connector_lr": "0.75"}
    for name, own in (("vanilla", {}), ("vitask-stage1", weights), ("vitask", weights)):
        found = flags_of(list(stages[name].commands[0].words))
        assert {flag: found[flag] for flag in (*trained, "save_strategy")} == {**trained, "save_strategy": "no"}
        assert {flag: found[flag] for flag in weights if flag in found} == own
    assert flags_of(list(stages["tsm"].commands[0].words))["lr"] == "0.002"
    assert "judge-untuned" not in stages and "report" not in stages and run.plan.at_once == 2
    for name in ("data-drawn", "judge-vanilla", "judge-vitask-ep"):
        assert stages[name].commands[0].environment["MEDMNIST_ROOT"] == str(tmp_path), name
    assert stages["judge-vitask"].commands[0].environment["MEDMNIST_SPLIT"] == "val"
    assert {name: run.plan.environment[name] for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE")} == {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def test_the_hf_hosts_tiny_model_is_one_for_its_script(commands, drawn_data, tmp_path, monkeypatch):
    from transformers import AutoConfig

    from vitask_plugin.hf import tiny

    _, _, script, *words = commands("hf")["tiny"]
    assert script == tiny.__name__
    (tmp_path / "data").mkdir()
    (tmp_path / "data/drawn").symlink_to(drawn_data)
    monkeypatch.setattr(sys, "argv", ["tiny", *words])
    tiny.main()
    config = AutoConfig.from_pretrained(tmp_path / "tiny")
    assert config.architectures == ["LlavaForConditionalGeneration"] and config.text_config.hidden_size == 128


def test_its_table_says_whose_it_is(tmp_path):
    judged = [
        Judged(name, "vitask", False, 0.5, [Outcome(0, 0)], []) for name in ("TSM alone", "vanilla", "without", "with")
    ]
    for host, title in (("llava", "drawn, test split"), ("hf", "HF host: drawn, test split")):
        printed = io.StringIO()
        console = Console(file=printed, width=120)
        Demo(DRAWN, tmp_path, seed=3, epochs=1, console=console, host=HOSTS[host])._show(judged)
        assert printed.getvalue().split("\n")[0].strip().startswith(title)


# Bad input, failures, interrupts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nosuch"], "data set 'nosuch' is unknown"),
        (["--epochs", "0"], "--epochs is 0"),
        (["--seed", "-1"], "--seed is -1"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "out"), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_absent_data_ends_with_the_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MEDMNIST_ROOT", str(tmp_path / "empty"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network, wherever this runs
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert main(["demo", "--data", "breastmnist", "--out", str(tmp_path / "out")]) == 1
    out, error = capsys.readouterr()
    log = tmp_path / "out" / "logs" / "data-breastmnist.log"
    assert str(log) in error and "Data breastmnist written: failed with status 1" in error
    assert "breastmnist.npz" in out and "cannot be downloaded" in out
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(VITaskError, match=r"already holds 'thesis.txt'"):
        demo("drawn", tmp_path, console=quiet())
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_an_earlier_demo_is_removed_also_if_it_was_killed(tmp_path):
    for name in ("demo.json", "results.json"):
        (tmp_path / name).write_text("{}")
    for name in ("tsm", ".tsm.x1y2z3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "left.bin").write_text("left")
    module_under_test._clear(tmp_path)
    assert os.listdir(tmp_path) == []


def test_interrupt_stops_the_running_command_and_the_folder_can_be_used_again(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        module("vitask_plugin.cli", "demo", "--out", out),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell that runs the tests in the background has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = out / "logs" / "vanilla.log"
    deadline = time.monotonic() + 120
    while not log.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert log.exists(), process.communicate()[0]
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "vitask: interrupted" in printed and "Traceback" not in printed
    assert running(str(out)) == []
    assert not (out / "results.json").exists()
    module_under_test._clear(out)
    assert os.listdir(out) == []


def running(text: str) -> list[str]:
    """Command lines of running processes with `text` in them."""
    found = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in found if text in line]


# Stages --------------------------------------------------------------------------------------------------------


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_failing_command_shows_its_tail_and_names_its_log(tmp_path):
    console = Console(record=True, file=io.StringIO(), width=200)
    with (
        Stages(console, tmp_path, {}) as stages,
        pytest.raises(VITaskError, match=rf"Thing: failed with status 3; .*{re.escape(str(tmp_path / 'thing.log'))}"),
    ):
        stages.command("Thing", "thing", python("print('first'); print('[red]last'); raise SystemExit(3)"))
    assert "[red]last" in console.export_text()  # shown as it is, not as markup


def test_a_failure_gives_up_what_runs_beside_it(tmp_path):
    start = time.monotonic()
    with Stages(quiet(), tmp_path, {}) as stages, pytest.raises(VITaskError, match="Bad: failed with status 1"):
        stages.together(
            lambda: stages.command("Slow", "slow", python("import time; time.sleep(60)")),
            lambda: stages.command("Bad", "bad", python("import time; time.sleep(0.5); raise SystemExit(1)")),
        )
    assert time.monotonic() - start < 30


def test_commands_side_by_side_keep_the_order_of_their_results(tmp_path):
    with Stages(quiet(), tmp_path, {"VITASK_TEST": "seen"}) as stages:
        code = "import os, time; time.sleep({}); print(os.environ['VITASK_TEST'])"
        slow = lambda: stages.command("a", "a", python(code.format(0.5))) or "slow"  # noqa: E731
        fast = lambda: stages.command("b", "b", python(code.format(0))) or "fast"  # noqa: E731
        assert stages.together(slow, fast) == ["slow", "fast"]
    assert [last_lines(tmp_path / name)[-1] for name in ("a.log", "b.log")] == ["seen", "seen"]


def test_last_lines_leave_out_what_a_progress_bar_overwrote(tmp_path):
    log = Path(tmp_path / "x.log")
    log.write_bytes(b"start\n 0%|\r 50%|\r100%|\nTraceback\n\nError: \xff bad\n")
    assert last_lines(log) == ["start", "100%|", "Traceback", "Error: \ufffd bad"]
