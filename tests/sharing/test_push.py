"""Training and `vitask push` against a stand-in of the Hub, through its own client: what arrives, and that it loads."""

import functools
import json
from pathlib import Path

import pytest
import torch
import transformers
from hf_runs import LORA, vitask
from hub_stand_in import Hub, speak_to
from huggingface_hub import ModelCard, snapshot_download
from mixture import flags as llava_flags
from ranks import Ended, launch
from trained import make_trained

from vitask_plugin.cli import main
from vitask_plugin.data.instructions import DRAWN
from vitask_plugin.record.calibration import Calibration
from vitask_plugin.record.calibration_file import write_calibration
from vitask_plugin.sharing.card import CARD_FILE
from vitask_plugin.sharing.facts import FACTS_FILE
from vitask_plugin.sharing.pushed import is_place

PUSH = ("--push_to_hub", "True", "--hub_model_id", "lab/specialist")
OTHERS = {"trainer_state.json", "training_args.bin"}  # which lie in the folder too


def run(hub: Hub, flags: list[str], logs: Path, host: str) -> Ended:
    return launch(1, flags, logs, before={0: functools.partial(speak_to, hub.address)}, host=host)


def texts(files: dict[str, bytes]) -> str:
    return "\n".join(data.decode() for name, data in files.items() if name.endswith((".json", ".md", ".jinja")))


def check_sent(files: dict[str, bytes], output: Path, places: list[Path]) -> None:
    """Files of the folder, byte for byte but for settings, and no place of this machine."""
    assert {"README.md", "vitask.json", "vitask_connector.safetensors"} <= files.keys()
    assert files.keys().isdisjoint(OTHERS) and OTHERS & {path.name for path in output.iterdir()}
    for name, data in files.items():
        if name.endswith((".safetensors", ".bin", "tokenizer.json", ".model", ".md")):
            assert data == (output / name).read_bytes(), name
    for place in places:
        assert str(place) not in texts(files)
    record = json.loads(files["vitask.json"])
    assert record["tasks"] and record["tsm"] and "run" not in record


def test_a_lora_run_of_the_hf_host_pushes_what_the_stock_classes_load(
    hub, tmp_path, tiny_hf, sized_mixture, sized_mixture_features
) -> None:
    family = "llava_onevision"
    output, model = tmp_path / "out", tiny_hf(family).folder
    saves = ("--save_strategy", "steps", "--save_steps", "2")
    flags = vitask(model, sized_mixture, sized_mixture_features, output, *LORA, *PUSH)
    ended = run(hub, [*flags, *saves], tmp_path / "log", "hf")
    assert ended.statuses == [0], ended.text
    files = hub.files["lab/specialist"]
    assert hub.commits == ["Upload a model tuned by VITask"]  # once, though it was saved before
    check_sent(files, output, [tmp_path, model.parent, sized_mixture, sized_mixture_features, Path.home()])
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files.keys()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == model.name
    assert all(f"vitask:   {name}, {len(data):,} bytes" in ended.text for name, data in files.items())

    from peft import PeftModel

    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, "Not for clinical use" in card.text) == ("peft", True)
    assert "More Information Needed" not in card.text and "- seed: 42" in card.text
    got = snapshot_download("lab/specialist", cache_dir=tmp_path / "cache")
    base = transformers.AutoModelForImageTextToText.from_pretrained(model)
    loaded = dict(PeftModel.from_pretrained(base, got).named_parameters())
    wrote = dict(
        PeftModel.from_pretrained(
            transformers.AutoModelForImageTextToText.from_pretrained(model), output
        ).named_parameters()
    )
    assert any("lora_B" in name and weight.abs().sum() > 0 for name, weight in wrote.items())
    assert all(torch.equal(weight, loaded[name]) for name, weight in wrote.items())


def test_a_run_of_the_llava_host_pushes_what_upstream_loads(
    hub, tmp_path, tiny_llava, mixture, mixture_features, monkeypatch
) -> None:
    output = tmp_path / "llava-out"
    ended = run(hub, llava_flags(tiny_llava, mixture, mixture_features, output, *PUSH), tmp_path / "log", "llava")
    assert ended.statuses == [0], ended.text
    files = hub.files["lab/specialist"]
    check_sent(files, output, [tmp_path, tiny_llava.base.parent, mixture, mixture_features, Path.home()])
    assert json.loads(files["config.json"])["mm_vision_tower"] == tiny_llava.tower.name
    tsm = json.loads(files["vitask.json"])["tsm"]
    assert f"- task-specific model: SHA-256 {tsm['hash'][:12]}, features of width" in files["README.md"].decode()
    counts = json.loads(files["vitask_card.json"])["data"]
    assert all(sum(one["counts"]["train"].values()) > 0 for one in counts) and counts

    from llava.model.builder import load_pretrained_model

    got = snapshot_download("lab/specialist", local_dir=tmp_path / "got" / "llava-specialist")
    monkeypatch.chdir(tiny_llava.tower.parent)  # where the tower of that name lies
    _, loaded, _, _ = load_pretrained_model(got, None, "llava-specialist", device="cpu", device_map="cpu")
    _, wrote, _, _ = load_pretrained_model(str(output), None, "llava-out", device="cpu", device_map="cpu")
    weights = wrote.state_dict()
    assert len(weights) > 20 and all(torch.equal(w, weights[name]) for name, w in loaded.state_dict().items())


def test_a_run_that_may_not_push_ends_before_its_first_step(
    hub, tmp_path, tiny_llava, mixture, mixture_features
) -> None:
    hub.refuses = True
    output = tmp_path / "llava-out"
    ended = run(hub, llava_flags(tiny_llava, mixture, mixture_features, output, *PUSH), tmp_path / "log", "llava")
    assert ended.statuses == [1] and "the Hub does not take 'lab/specialist'" in ended.text
    assert "Traceback" not in ended.text and not (output / "vitask.json").exists()


# The command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path, tiny_checkpoint) -> Path:
    """With files beside it that are nobody else's."""
    found = make_trained(tmp_path, tiny_checkpoint, "cls").checkpoint
    for name in ("patient-7.png", "train.json", "optimizer.pt", "vitask_features/features.npy"):
        (found / name).parent.mkdir(exist_ok=True)
        (found / name).write_bytes(b"private")
    record = json.loads((found / "vitask.json").read_text())
    record["arguments"] |= {"vitask_tsm": f"{tmp_path}/tsm", "vitask_features": "/data/patients/features"}
    (found / "vitask.json").write_text(json.dumps(record))
    return found


def test_vitask_push_lists_and_sends_the_checkpoint_and_nothing_else(hub, checkpoint, tmp_path, capsys) -> None:
    assert main(["push", str(checkpoint), "lab/breast", "--private", "--dry-run"]) == 0
    assert hub.files == {} and "vitask_connector.safetensors" in capsys.readouterr().out
    assert main(["push", str(checkpoint), "lab/breast", "--private"]) == 0
    files, shown = hub.files["lab/breast"], capsys.readouterr().out
    assert hub.private == {"lab/breast": True} and "lab/breast/commit/" in shown
    assert all(f"  {name}, {len(data):,} bytes" in shown for name, data in files.items())
    assert not any(name in files for name in ("patient-7.png", "train.json", "optimizer.pt"))
    assert not any("/" in name for name in files) and b"private" not in files.values()
    given = json.loads(files["vitask.json"])["arguments"]
    assert (given["vitask_tsm"], given["vitask_features"]) == ("tsm", "features")
    assert "'/data/patients/features' is a place of this machine; others read 'features'" in shown
    assert str(tmp_path) not in texts(files)
    assert "vitask_drawn" in files["README.md"].decode()  # made of vitask.json: there was no card


def test_a_card_that_is_not_ours_is_written_anew(hub, checkpoint) -> None:
    """PEFT leaves one with nothing filled in, in checkpoints of mid-run too."""
    (checkpoint / CARD_FILE).write_text("# Model Card for Model ID\n\n[More Information Needed]\n")
    assert main(["push", str(checkpoint), "lab/breast"]) == 0
    sent = hub.files["lab/breast"]
    assert "vitask_drawn" in sent[CARD_FILE].decode() and b"More Information Needed" not in sent[CARD_FILE]
    assert FACTS_FILE in sent
    edited = (checkpoint / CARD_FILE).read_text() + "\nOf the second visit.\n"
    (checkpoint / CARD_FILE).write_text(edited)
    assert main(["push", str(checkpoint), "lab/breast"]) == 0
    assert hub.files["lab/breast"][CARD_FILE].decode() == edited  # ours, with somebody's words


def test_a_calibration_tells_no_place_wherever_one_stands(hub, checkpoint, tmp_path, monkeypatch) -> None:
    """Fitted with a path that leads to nothing from here, and by an earlier version, whose sentence has a path."""
    about = {
        "data": {"path": "clinic-9/mri/val.json", "sha256": "a" * 64},
        "judged_by": {"path": f"{tmp_path}/mri/test.json", "sha256": "b" * 64},
        "training_data": f"no image and no group of it is in the training data '{tmp_path}/mri/train.json'",
        "images": 40,
    }
    write_calibration(checkpoint, Calibration("vitask_drawn", False, DRAWN.choices, 1.5, (0.0,) * 4), about)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["push", str(checkpoint), "lab/breast"]) == 0
    sent = texts(hub.files["lab/breast"])
    assert [line for line in sent.splitlines() if str(tmp_path) in line or "clinic-9" in line] == []
    (block,) = json.loads(hub.files["lab/breast"]["calibration.json"])["calibrations"]
    assert block["about"] == {
        "data": {"path": "val.json", "sha256": "a" * 64},
        "judged_by": {"path": "test.json", "sha256": "b" * 64},
        "training_data": "no image and no group of it is in the training data 'train.json'",
        "images": 40,
    }
    assert (block["temperature"], block["classes"]) == (1.5, list(DRAWN.choices))


def test_a_public_repository_does_not_get_what_is_to_be_private(hub, checkpoint, capsys) -> None:
    hub.files["lab/breast"], hub.private["lab/breast"] = {}, False
    assert main(["push", str(checkpoint), "lab/breast", "--private"]) == 1
    assert "'lab/breast' is there already and public, so nothing is sent" in capsys.readouterr().err
    assert hub.files == {"lab/breast": {}} and hub.commits == []
    assert main(["push", str(checkpoint), "lab/breast"]) == 0 and hub.files["lab/breast"]
    hub.files["lab/own"], hub.private["lab/own"] = {}, True
    assert main(["push", str(checkpoint), "lab/own", "--private"]) == 0 and hub.files["lab/own"]


def test_a_card_that_names_a_place_is_not_sent(hub, checkpoint, capsys) -> None:
    assert main(["card", str(checkpoint)]) == 0
    card = checkpoint / CARD_FILE
    card.write_text(f"{card.read_text()}\nThe images are in {checkpoint}/images.\n")
    assert main(["push", str(checkpoint), "lab/breast"]) == 1
    assert hub.files == {} and "a place of this machine; take it out" in capsys.readouterr().err


@pytest.mark.parametrize(("remove", "says"), [("vitask.json", "no output of a"), ("model.safetensors", "no weights")])
def test_what_is_no_whole_checkpoint_is_refused(remove, says, hub, checkpoint, capsys) -> None:
    assert main(["card", str(checkpoint)]) == 0
    (checkpoint / remove).unlink()
    assert main(["push", str(checkpoint), "lab/breast"]) == 1
    assert says in capsys.readouterr().err and hub.files == {}


def test_a_hub_that_refuses_is_one_sentence(hub, checkpoint, capsys) -> None:
    hub.refuses = True
    assert main(["push", str(checkpoint), "lab/breast"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("vitask: error: the Hub does not take 'lab/breast' (") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("/home/somebody/llava", True),
        ("~/llava", True),
        ("../out/stage1", True),
        ("C:\\models\\llava", True),
        ("openai/clip-vit-large-patch14-336", False),
        ("</s>", False),
        ("/", False),
        ("{% for message in messages %}/x/y{% endfor %}", False),
        ("https://huggingface.co/x/y", False),
    ],
)
def test_what_a_place_looks_like(text: str, place: bool) -> None:
    assert is_place(text) is place
