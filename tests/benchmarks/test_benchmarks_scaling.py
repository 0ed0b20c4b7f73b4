"""The scaling benchmark at a tiny size: bytes that two processes really send against the formula, in every strategy."""

import json
import math
from pathlib import Path

import pytest

from vitask_plugin.errors import VITaskError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZES = {"batch": 2, "hidden": 128, "layers": 4, "vocabulary": 1200, "image-tokens": 16, "continuation": 60}
FLAGS = [text for name, size in SIZES.items() for text in (f"--{name}", str(size))]
OVERHEAD = 1.1  # TCP, barriers and scalars; less in a larger model


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.mark.parametrize("flags", [[], ["--lora", "--gradient-checkpointing"]], ids=["full", "lora"])
def test_bytes_sent_are_those_of_the_formula(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import scaling
    from scaling_worker import RUNS

    path = tmp_path / "scaling.jsonl"
    scaling.main([*FLAGS, *flags, "--processes", "2", "--repeats", "3", "--json", str(path)])
    result = json.loads(path.read_text())
    runs = result["processes"]["2"]
    assert runs.keys() == RUNS.keys() and result["versions"]["deepspeed"]
    assert all(run["seconds"]["p50"] > 0 for run in runs.values())
    expected = {name: run["expected_bytes"] for name, run in runs.items()}
    elements = runs["zero3"]["elements"]
    assert expected["ddp"] == 4 * elements["trained"] == expected["ddp_branches"]
    assert expected["zero2"] == expected["zero2_branches"] == 1.5 * expected["ddp"]
    # Per forward and its backward: 2 or 3 gathers, half of each from the other rank; then gloo's all-reduce.
    gathers = 3 if flags else 2
    own = 4 * elements["trained"] + 2 * elements["persistent"]
    assert expected["zero3"] == pytest.approx(own + gathers * 2 * elements["gathered"])
    repeated = elements["gathered"] + 2 * elements["layers"]
    assert expected["zero3_branches"] == pytest.approx(own + gathers * 2 * repeated)
    shown = capsys.readouterr().out
    assert "ZeRO-3, branch by branch" in shown and "measured / formula" in shown
    if not scaling.own_namespace():
        assert {run["bytes"] for run in runs.values()} == {None} and "were not counted" in shown
        return
    ratio = {name: run["bytes"] / run["expected_bytes"] for name, run in runs.items()}
    for name in ("ddp", "ddp_branches", "zero2", "zero2_branches"):
        assert 1 <= ratio[name] <= OVERHEAD, (name, ratio)
    # At most: DeepSpeed keeps some weights from one use to the next, most of them where forwards follow each other.
    assert 0.75 <= ratio["zero3"] <= OVERHEAD, ratio
    assert 0.7 <= ratio["zero3_branches"] <= OVERHEAD, ratio
    assert runs["zero3_branches"]["bytes"] > 1.4 * runs["zero3"]["bytes"]


def test_the_configurations_are_filled_as_the_trainer_does() -> None:
    from scaling_worker import filled
    from workload import Settings

    settings = Settings(2, 64, 2, 100, 16, 60, 32, 2, False, False, "float32", "cpu", 1)
    for name, stage in (("zero2", 2), ("zero3", 3)):
        config = filled(name, settings, 10**6)
        zero = config["zero_optimization"]
        assert '"auto"' not in json.dumps(config)
        assert (zero["stage"], zero["reduce_bucket_size"], config["train_micro_batch_size_per_gpu"]) == (
            stage,
            64**2,
            2,
        )
    assert zero["stage3_param_persistence_threshold"] == 640
    assert zero["stage3_max_live_parameters"] == math.floor(1e6 * 1e9 / 6.74e9)


def test_predicted_tables(capsys: pytest.CaptureFixture[str]) -> None:
    import scaling
    import scaling_prediction

    from vitask_plugin.deepspeed import communication
    from vitask_plugin.llava.sizes import sizes_of

    scaling.main(["--predict", "communication"])
    shown = capsys.readouterr().out
    sizes = sizes_of("7b")
    assert f"{communication.zero2(sizes.trained, 8) / 1e9:.1f} / " in shown
    assert scaling_prediction.sent(sizes, 2, 64, lora=False, forwards=3) == communication.zero2(sizes.trained, 64)
    lora = sizes_of("7b", 128)
    packed, branches = (scaling_prediction.sent(lora, 3, 64, lora=True, forwards=forwards) for forwards in (1, 3))
    assert 2.5 < branches / packed < 3
    packed, branches = (
        scaling_prediction.memory(sizes, "zero3", 16, lora=False, packed=packed) for packed in (True, False)
    )
    assert branches.activations > 2 * packed.activations and branches.weights == packed.weights


def test_a_gpu_is_refused_and_a_failed_launch_is_told(tmp_path: Path) -> None:
    import scaling

    with pytest.raises(VITaskError, match=r"--device must be cpu|finds no GPU"):
        scaling.main([*FLAGS, "--device", "cuda"])
    with pytest.raises(VITaskError, match=r"1 processes failed[\s\S]*settings"):
        scaling.measure(tmp_path, 1, 1, [])


def test_the_page_quotes_the_recorded_measurement() -> None:
    root = BENCHMARKS.parent
    lines = (root / "benchmarks" / "results" / "scaling.jsonl").read_text().splitlines()
    results = [json.loads(line) for line in lines]
    full, lora = (next(each for each in results[::-1] if each["config"]["lora"] == lora) for lora in (False, True))
    assert lora["config"]["gradient_checkpointing"] and full["config"]["hidden"] == lora["config"]["hidden"]
    page = " ".join((root / "docs" / "deepspeed.md").read_text().split())
    for strategy, words in (("ddp", "DDP"), ("zero2", "ZeRO-2"), ("zero3", "ZeRO-3")):
        cells = []
        for runs in (full["processes"]["2"], lora["processes"]["2"]):
            pair = (runs[strategy], runs[f"{strategy}_branches"])
            cells.append(" / ".join(f"{run['bytes'] / run['expected_bytes']:.2f}" for run in pair))
        assert f"| {words}, packed / branch by branch | {cells[0]} | {cells[1]} |" in page
    sent, formula = (
        [
            result["processes"]["2"]["zero3_branches"][key] / result["processes"]["2"]["zero3"][key]
            for result in (full, lora)
        ]
        for key in ("bytes", "expected_bytes")
    )
    assert f"sent {sent[0]:.2f} times the bytes" in page and f"(by the formula {formula[0]:.2f})" in page
    assert f"and {sent[1]:.2f} times with LoRA ({formula[1]:.2f})" in page
