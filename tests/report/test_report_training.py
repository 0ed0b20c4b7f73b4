"""Training folders in the report: what the real Trainer logged, with validation and without, and what is no log."""

import json
import re
from pathlib import Path

import pytest
import torch
from lmms_output import write_file, write_run
from test_report_page import check_self_contained
from transformers import Trainer, TrainingArguments

from vitask_plugin.cli import main
from vitask_plugin.report.training_folders import read_logs

# Beside the loss, as validation rounds name it.
MEASURED = {"breast_accuracy": 0.5, "ep_loss": 0.25}


class Line(torch.nn.Module):
    """The smallest model that the Trainer trains."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((self.slope * x - labels) ** 2).mean(), "logits": self.slope * x}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a training of 6 steps that is evaluated after each second."""
    folder = tmp_path_factory.mktemp("training") / "out"
    data = [{"x": torch.tensor([float(n)]), "labels": torch.tensor([2.0 * n])} for n in range(1, 5)]
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        max_steps=6,
        learning_rate=0.1,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=3,
        seed=7,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(Line(), arguments, train_dataset=data, eval_dataset=data, compute_metrics=lambda found: MEASURED)
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    return folder


def test_a_training_folder_alone(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(trained), "--markdown", "--csv"]) == 0
    text = (tmp_path / "report.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Training runs"]
    history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    last = [entry["loss"] for entry in history if "loss" in entry][-1]
    assert f"| out | no VITask record | 7 | 6 | 6.00 | {last:.3f} |" in text
    assert "| out | breast\\_accuracy | 0.500 | 2 | 0.500 |" in text
    page = check_self_contained((tmp_path / "report.html").read_text())
    assert page.tags.count("svg") == 2  # losses, scores
    assert "runtime" not in text and "per\\_second" not in text
    (log,) = read_logs([trained])
    assert [step for step, _ in log.curves["total"]] == [1, 2, 3, 4, 5, 6]
    measured = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    assert log.curves["validation, EP"] == [(2, 0.25), (4, 0.25), (6, 0.25)] and set(log.scores) == {"breast_accuracy"}
    assert log.curves["validation"] == measured and [step for step, _ in measured] == [2, 4, 6]


def test_beside_results(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order; a folder may hold both, and the results then name the checkpoint that was trained."""
    monkeypatch.chdir(tmp_path)
    write_file(tmp_path / "data", "breastmnist", 12)
    arguments = f"pretrained={trained}"
    write_run(tmp_path / "judged", {"breastmnist": 1.0}, tmp_path / "data", variants=("",), model_args=arguments)
    for words in ([str(trained), "judged"], ["judged", str(trained)]):
        assert main(["report", *words, "--markdown"]) == 0
        text = (tmp_path / "report.md").read_text()
        assert re.findall(r"^## (.*)$", text, re.MULTILINE)[0] == "Runs" and "## Training runs" in text
        # The run's seed is that of the checkpoint's training.
        assert re.search(r"^\| judged \| vitask\\_llava \| .* \| no VITask record \| 7 \| 1 \|", text, re.MULTILINE)


def test_of_a_training_that_was_cut_short_the_newest_checkpoint_counts(trained: Path, tmp_path: Path) -> None:
    for step in (3, 6):
        state = json.loads((trained / f"checkpoint-{step}/trainer_state.json").read_text())
        path = tmp_path / f"cut/checkpoint-{9 if step == 3 else 10}/trainer_state.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(state))
    (log,) = read_logs([tmp_path])
    assert (log.name, log.steps) == ("cut", 6)


def test_long_logs_are_drawn_with_few_points(tmp_path: Path) -> None:
    entries = [{"step": step, "loss": float(step), "eval_ece": float("nan")} for step in range(1, 4001)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": entries, "global_step": 4000}))
    (log,) = read_logs([tmp_path])
    assert len(log.curves["total"]) == 400 and log.curves["total"][0] == (5.5, 5.5)


def test_what_is_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    assert main(["report", "out"]) == 1
    assert "and no log of a training (trainer_state.json)" in capsys.readouterr().err
    (tmp_path / "out/trainer_state.json").write_text('{"log_history": [{"loss": 1}]}')
    assert main(["report", "out"]) == 1
    assert "trainer_state.json' is not the log of a training" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
