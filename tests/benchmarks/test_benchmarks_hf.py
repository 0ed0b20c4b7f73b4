"""The step's cost on models in HF format, at a tiny size: a line a family, and the same gradients from both engines."""

import json
from pathlib import Path

import pytest

from vitask_plugin.hf.tiny import FAMILIES

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZES = {"batch": 2, "hidden": 64, "layers": 2, "vocabulary": 1200, "image-tokens": 64, "continuation": 80}
EXACT = 1e-5


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_every_family_can_be_scaled() -> None:
    import hf_workload

    assert hf_workload.SCALED.keys() == {*FAMILIES}


def test_step_cost_appends_a_line_for_each_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One whose images have tiles, and one of three-dimensional positions and features in several layers."""
    import step_cost

    path, families = tmp_path / "results.jsonl", ["internvl", "qwen3_vl"]
    flags = [text for name, size in SIZES.items() for text in (f"--{name}", str(size))]
    words = ["--host", "hf", "--families", *families, "--threads", "1", "--repeats", "1", "--no-memory"]
    step_cost.main([*flags, *words, "--json", str(path)])
    results = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(result["host"], result["family"]) for result in results] == [("hf", family) for family in families]
    for result in results:
        assert result["config"]["continuation"][1] == SIZES["continuation"] and min(result["ratio"].values()) > 0
        assert SIZES["image-tokens"] / 2 < result["config"]["image_tokens"] <= SIZES["image-tokens"]
        # Not zero either: equal bits would mean that one engine ran twice.
        assert 0 < result["max_rel_diff"]["grad"] <= EXACT and result["max_rel_diff"]["loss"] <= EXACT
        positions = result["positions"]
        assert positions["vanilla"] == positions["lean_vanilla"] < positions["stage1_packed"]
        assert positions["stage1_packed"] < positions["stage2_packed"] < positions["stage2_branches"]
        width = sum(result["config"][name] for name in ("prefix_text", "image_tokens")) + SIZES["continuation"]
        assert positions["vanilla"] <= SIZES["batch"] * width
    printed = capsys.readouterr().out
    assert all(f"{family}, one step" in printed for family in families)


def test_the_lean_step_has_the_stock_loss(tmp_path: Path) -> None:
    import step_cost
    from hf_workload import make_workload
    from workload import VARIANTS, Settings

    sizes = {name.replace("-", "_"): size for name, size in SIZES.items()}
    more = {"vision_hidden": 64, "vision_layers": 2, "gradient_checkpointing": False, "lora": True}
    settings = Settings(**sizes, **more, dtype="float32", device="cpu", threads=1)
    batches, steps = step_cost.opened(make_workload(settings, tmp_path, "gemma3"), 1)
    _, alone = step_cost.opened(batches.workload, 1, upstream=True)
    vanilla, lean = VARIANTS["vanilla"], VARIANTS["lean_vanilla"]
    batch, _ = batches(vanilla, 0)
    assert "vitask" not in batch and type(alone.model).__mro__[1].__name__ != "VITaskStep"
    loss, gradients = steps.gradients(vanilla, batch)
    lean_loss, lean_gradients = steps.gradients(lean, batch)
    assert alone.gradients(vanilla, batch)[0] == loss == pytest.approx(lean_loss, rel=EXACT)
    assert gradients.keys() == lean_gradients.keys()
    # LoRA: adapters and projector.
    assert all("lora_" in name or "multi_modal_projector" in name for name in gradients) and len(gradients) > 15
    for name, expected in gradients.items():
        assert step_cost.relative_difference(lean_gradients[name], expected) <= EXACT, name
