"""The cost benchmarks at a tiny size: what they report, and that packed and branch by branch agree in it."""

import dataclasses
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZES = {"batch": 2, "hidden": 64, "layers": 2, "vocabulary": 1200, "image-tokens": 16, "continuation": 60}
FLAGS = [text for name, size in SIZES.items() for text in (f"--{name}", str(size))] + ["--threads", "1"]
EXACT = 1e-5


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory):
    """What a measurement runs on. Read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        from workload import Settings, make_workload
    settings = Settings(
        **{name.replace("-", "_"): size for name, size in SIZES.items()},
        vision_hidden=32,
        vision_layers=2,
        lora=False,
        gradient_checkpointing=False,
        dtype="float32",
        device="cpu",
        threads=1,
    )
    return make_workload(settings, tmp_path_factory.mktemp("workload"))


@pytest.mark.parametrize("flags", [[], ["--lora", "--gradient-checkpointing"]], ids=["full", "lora"])
def test_step_cost_appends_a_line(tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    import step_cost

    path = tmp_path / "results.jsonl"
    path.write_text("{}\n")
    step_cost.main([*FLAGS, *flags, "--repeats", "2", "--no-memory", "--json", str(path)])
    first, line = path.read_text().splitlines()
    result = json.loads(line)
    ours = {"stage1_packed", "stage2_packed", "stage2_branches"}
    assert first == "{}" and result["ratio"].keys() == ours
    assert result["config"]["lora"] == result["config"]["gradient_checkpointing"] == bool(flags)
    assert result["config"]["continuation"][1] == SIZES["continuation"] and min(result["ratio"].values()) > 0
    # Not zero either: the engines add up in different orders, so equal bits would mean that one engine ran twice.
    assert 0 < result["max_rel_diff"]["grad"] <= EXACT and result["max_rel_diff"]["loss"] <= EXACT
    positions = result["positions"]
    assert positions["vanilla"] == positions["lean_vanilla"] < positions["stage1_packed"] < positions["stage2_packed"]
    assert positions["stage2_packed"] < positions["stage2_branches"] >= 3 * positions["vanilla"]
    assert result["versions"]["torch"] and result["matrix_rate"] is None
    printed = capsys.readouterr().out
    assert "branches / packed" in printed and ("LoRA" in printed) == bool(flags)


def test_peak_memory_is_of_a_process_of_its_own(workload) -> None:
    import step_cost
    import torch

    held = torch.ones(1 << 27)  # 512 MiB in this process
    memory = step_cost.measure_memory(workload, ["stage2_packed"])
    found, own = memory["stage2_packed"], step_cost._memory("cpu", peak=True)
    assert len(held) == 1 << 27 and 0 < found["before"] < found["peak"] < own - held.nbytes / 2


def test_baselines_are_upstreams(workload) -> None:
    """Upstream's class and its loss; the lean baseline takes the same loss and leaves out logits alone."""
    import step_cost
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from steps import Steps
    from workload import VARIANTS, Batches

    batches = Batches(workload)
    steps, alone = Steps(batches), Steps(batches, upstream=True)
    vanilla, lean = VARIANTS["vanilla"], VARIANTS["lean_vanilla"]
    batch, _ = batches(vanilla, 0)
    assert "vitask" not in batch and type(alone.model) is LlavaLlamaForCausalLM is type(steps._vanilla)
    loss, gradients = alone.gradients(vanilla, batch)
    shared_loss, shared_gradients = steps.gradients(vanilla, batch)
    lean_loss, lean_gradients = steps.gradients(lean, batch)
    assert loss == shared_loss and loss == pytest.approx(lean_loss, rel=EXACT)
    assert gradients.keys() == shared_gradients.keys() == lean_gradients.keys() and len(gradients) > 15
    for name, expected in gradients.items():
        assert step_cost.relative_difference(shared_gradients[name], expected) == 0, name
        assert step_cost.relative_difference(lean_gradients[name], expected) <= EXACT, name
    steps.run(vanilla, batch)
    answers = int((batch["labels"] != -100).sum())
    spared = step_cost.linear_flops(steps, batches, "vanilla") - step_cost.linear_flops(steps, batches, "lean_vanilla")
    # Forward, and backward to states and weights: three products of 2 x hidden x vocabulary a position.
    assert spared == 3 * 2 * SIZES["hidden"] * SIZES["vocabulary"] * (steps.positions - answers)
    assert step_cost.matrix_rate(workload.settings, side=64, repeats=2) > 1e6


def test_differences_show_a_wrong_gradient() -> None:
    import step_cost
    import torch

    gradient = torch.tensor([4.0, -8.0])
    assert step_cost.relative_difference(gradient + torch.tensor([0.0, 2.0]), gradient) == 0.25
    assert step_cost.relative_difference(torch.zeros(2), torch.zeros(2)) == 0
    assert step_cost.relative_difference(gradient, torch.zeros(2)) == float("inf")


def test_growth_and_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import growth
    import growth_plot

    path, picture = tmp_path / "growth.jsonl", tmp_path / "growth.svg"
    flags = ["--batches", "1", "2", "--images", "16", "36", "--continuations", "--repeats", "1"]
    growth.main([*FLAGS, *flags, "--json", str(path)])
    result = json.loads(path.read_text())
    batch = result["sweeps"]["batch"]
    assert [point["batch"] for point in batch] == [1, 2] and batch[1] == result["base"]
    assert [point["image_tokens"] for point in result["sweeps"]["image_tokens"]] == [16, 36]
    assert result["sweeps"]["continuation"] == [result["base"]]
    for name, ratio in result["base"]["predicted"].items():
        # Counted from mean lengths, the last token of a branch and pads aside.
        assert result["base"]["positions"][name] == pytest.approx(ratio, rel=0.05), name
    # Alone, a sample needs another image's prefix for its negative, padded to the length of its own row.
    assert batch[0]["positions"]["stage2_packed"] > batch[0]["predicted"]["stage2_packed"] > 2
    growth_plot.main([str(path), str(picture)])
    words = {element.text for element in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")}
    assert {"image tokens", "samples a step", "stage 2, packed", "measured"} <= words
    assert "(3.01)" in capsys.readouterr().out  # three whole sequences and an exemplar token


def test_connector_rate_appends_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import connector_rate

    monkeypatch.setenv("MEDMNIST_ROOT", "")  # it sets it for the rest of its process
    path = tmp_path / "results.jsonl"
    tiny = ["--images", "32", "--tsm-epochs", "1", "--first-steps", "1", "--threads", "1", "--tuning", "full"]
    rates = ["--rates", "0", "1e-3", "--steps", "3", "2"]
    connector_rate.main([*tiny, *rates, "--out", str(tmp_path / "out"), "--json", str(path)])
    result = json.loads(path.read_text())
    rows = {(row["rate"], row["steps"]): row for row in result["rows"]}
    assert rows.keys() == {(0.0, 3), (1e-3, 3), (1e-3, 2)}
    assert rows[0.0, 3]["loss"] != rows[1e-3, 3]["loss"] != rows[1e-3, 2]["loss"]  # each run is another
    assert all(0 <= row["accuracy"] <= 1 for row in rows.values()) and result["enough_steps"].keys() == {"full"}
    assert "3 steps of 16" in capsys.readouterr().out
    by_steps = {240: {"accuracy": 0.9}, 120: {"accuracy": 0.86}, 60: {"accuracy": 0.84}}
    assert connector_rate.enough_steps(by_steps) == 120


def test_bad_sizes_are_refused(workload) -> None:
    import torch
    from workload import make_workload

    from vitask_plugin.errors import VITaskError

    for changes, words in (
        ({"image_tokens": 2880}, "square grid"),
        ({"hidden": 100}, "multiple of 64"),
        *([] if torch.cuda.is_available() else [({"device": "cuda"}, "give --device cpu")]),
    ):
        with pytest.raises(VITaskError, match=words):
            dataclasses.replace(workload.settings, **changes)
    with pytest.raises(VITaskError, match="--continuation is 8"):
        make_workload(dataclasses.replace(workload.settings, continuation=8), workload.directory / "short")
    import growth_plot

    with pytest.raises(VITaskError, match="run that first"):
        growth_plot.main([str(workload.directory / "absent.jsonl"), "unused.svg"])
