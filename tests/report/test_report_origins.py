"""What a checkpoint says of its training: real arguments, pickled; a TSM per seed; and files that mean harm."""

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import write_task
from transformers import TrainingArguments

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.record.checkpoint import save_record
from vitask_plugin.report.origins import ARGUMENTS_FILE, differences, read_origin
from vitask_plugin.tsm.record_format import FORMAT
from vitask_plugin.tsm.settings import Settings
from vitask_plugin.tsm.train import train


def save_arguments(folder: Path, **changes: Any) -> Path:
    """As the Trainer saves its arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "learning_rate": 1e-3, **changes}
    torch.save(TrainingArguments(**given), folder / ARGUMENTS_FILE)
    return folder


def test_trainings_without_a_record_are_compared_by_their_arguments(tmp_path: Path) -> None:
    first, second, third = (
        read_origin(save_arguments(tmp_path / str(seed), seed=seed, save_steps=10 + seed, **changes))
        for seed, changes in ((0, {}), (1, {}), (2, {"learning_rate": 2e-3, "optim": "sgd"}))
    )
    assert (first.seed, second.seed, third.seed) == (0, 1, 2)
    assert differences(first, second) == []
    assert differences(first, third) == ["learning_rate 0.001, not 0.002", "optim adamw_torch_fused, not sgd"] or (
        differences(first, third) == ["learning_rate 0.001, not 0.002", "optim adamw_torch, not sgd"]
    )
    # Of LoRA they lie in the checkpoints alone; the newest counts.
    for step, rate in ((90, 1e-3), (100, 5e-4)):
        save_arguments(tmp_path / f"lora/checkpoint-{step}", seed=4, learning_rate=rate)
    lora = read_origin(tmp_path / "lora")
    assert lora.seed == 4 and differences(lora, first) == ["learning_rate 0.0005, not 0.001"]


@pytest.mark.parametrize(
    ("bases", "steps", "expected"),
    [
        (("here/base", "there/base"), (40, 40), []),
        (("base-seed0", "base-seed1"), (40, 40), []),
        (("base-1.5", "base-1.6"), (40, 40), ["base model base-1.5, not base-1.6"]),
        (("base", "base"), (40, 48), ["max_steps 40, not 48"]),
    ],
)
def test_another_base_or_other_data_are_no_seeds(tmp_path: Path, bases: Any, steps: Any, expected: list[str]) -> None:
    for seed, (base, count) in enumerate(zip(bases, steps, strict=True)):
        folder = save_arguments(tmp_path / str(seed), seed=seed)
        (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "_name_or_path": base}))
        (folder / "trainer_state.json").write_text(json.dumps({"max_steps": count, "log_history": []}))
    assert differences(read_origin(tmp_path / "0"), read_origin(tmp_path / "1")) == expected


def test_specialists_of_other_data_are_no_seeds(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_task(tmp_path, "two", ["red", "blue"], 8, split=split)
    rows = json.loads((tmp_path / "two-train.json").read_text())
    (tmp_path / "fewer.json").write_text(json.dumps(rows[:-1]))
    (tmp_path / "again.json").write_text((tmp_path / "two-train.json").read_text())
    found = []
    for seed, name in enumerate(("two-train", "again", "fewer")):
        settings = Settings(arch="test_resnet", image_size=32, batch_size=8, device="cpu", epochs=1, seed=seed)
        files = [tmp_path / f"{name}.json"], [tmp_path / "two-val.json"], [tmp_path / "images"]
        train(settings, *files, tmp_path / name)
        found.append(read_origin(tmp_path / name))
    assert differences(found[0], found[1]) == []
    assert any(text.startswith("training data ") for text in differences(found[0], found[2]))


def test_with_vitask_and_without_are_not_alike(tmp_path: Path) -> None:
    for name in ("plain", "tuned"):
        save_arguments(tmp_path / name, seed=3)
    save_record(tmp_path / "tuned", VITaskArguments(vitask_ep="none"), None, None, {}, "v1", run={"seed": 3})
    plain, tuned = (read_origin(tmp_path / name) for name in ("plain", "tuned"))
    assert plain.seed == tuned.seed == 3
    assert differences(plain, tuned) == ["--vitask False, not True"]


def test_networks_and_adapters_are_compared(tmp_path: Path) -> None:
    found = []
    for name, size, layers in (("a", 64, ["q", "v"]), ("b", 64, ["v", "q"]), ("c", 128, ["q"])):
        folder = save_arguments(tmp_path / name)
        (folder / "config.json").write_text(json.dumps({"hidden_size": size, "_name_or_path": f"{name}/base"}))
        adapter = {"r": 8, "target_modules": layers, "base_model_name_or_path": f"{name}/base"}
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
        found.append(read_origin(folder))
    assert differences(found[0], found[1]) == []
    assert differences(found[0], found[2]) == ["hidden_size 64, not 128", "target_modules ['q', 'v'], not ['q']"]


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {os.environ['HARM']}",)


class Call:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({os.environ['HARM']!r}, 'w')",)


@pytest.mark.parametrize("what", [Harm, Call, None])
def test_arguments_that_mean_harm_do_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: Any) -> None:
    monkeypatch.setenv("HARM", str(tmp_path / "done"))
    path = tmp_path / ARGUMENTS_FILE
    if what is None:
        path.write_bytes(b"PK\x03\x04 broken")
    else:
        torch.save(what(), path)
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            pickle.loads(archive.read(name))  # it would
        (tmp_path / "done").unlink()
    origin = read_origin(tmp_path)
    assert origin is None or origin.seed is None
    assert not (tmp_path / "done").exists()


def test_each_seed_may_have_a_tsm_of_its_own(tmp_path: Path) -> None:
    """Trained alike, they are no difference; trained otherwise, or gone, they are."""
    origins, tasks = {}, {"colour": {"choices": ["red", "blue"], "multi_label": False}}
    for name, seed, epochs in (("zero", 0, 5), ("one", 1, 5), ("longer", 2, 9), ("gone", 3, 5)):
        digest = str(seed) * 64
        record = {
            "format": FORMAT,
            "source": {"timm": "test_vit"},
            "image_size": 32,
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
        }
        (tmp_path / f"tsm-{name}").mkdir()
        (tmp_path / f"tsm-{name}/tsm.json").write_text(json.dumps({**record, "tasks": tasks, "sha256": digest}))
        settings = {"arch": "test_vit", "epochs": epochs, "seed": seed, "workers": seed}
        (tmp_path / f"tsm-{name}/metrics.json").write_text(json.dumps({"settings": settings, "best": {}}))
        folder = tmp_path / name
        folder.mkdir()
        arguments = VITaskArguments(vitask_tsm=str(tmp_path / f"tsm-{name}"))
        identity = {"hash": digest, "width": 64}
        save_record(folder, arguments, None, identity, {}, "v1", run={"seed": seed, "tsm": digest})
    (tmp_path / "tsm-gone").rename(tmp_path / "moved")
    for name in ("zero", "one", "longer", "gone"):
        origins[name] = read_origin(tmp_path / name)
    assert differences(origins["zero"], origins["one"]) == []
    assert differences(origins["zero"], origins["longer"]) == ["TSM: epochs 5, not 9"]
    assert differences(origins["zero"], origins["gone"]) == ["TSM none, not 333333333333"]
    # Where it is now is what the evaluation was given.
    assert differences(origins["zero"], read_origin(tmp_path / "gone", tmp_path / "moved")) == []
    # One that is judged alone.
    alone = [read_origin(tmp_path / f"tsm-{name}") for name in ("zero", "one", "longer")]
    assert [origin.seed for origin in alone] == [0, 1, 2]
    assert differences(alone[0], alone[1]) == [] and differences(alone[0], alone[2]) == ["epochs 5, not 9"]
