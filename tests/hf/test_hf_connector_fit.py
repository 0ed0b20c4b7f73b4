"""`vitask connector fit` and `align` on a checkpoint in HF format: a tuned VLM is given another TSM."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from trained import make_tsm

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.cli import main
from vitask_plugin.files import sha256_file
from vitask_plugin.hf import loading
from vitask_plugin.hf.reference import branch_logits
from vitask_plugin.hf.tiny import make_tiny
from vitask_plugin.method.connector import ExemplarConnector
from vitask_plugin.record import checkpoint, connector_file
from vitask_plugin.tsm.model import TSM

WIDTH = 64
FAMILY = "internvl"


def tree_hash(directory: Path) -> dict[str, str]:
    return {str(path): sha256_file(path) for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory, drawn_texts, drawn_data):
    """A checkpoint as the host's training leaves it, its TSM, another TSM, and data."""
    root = tmp_path_factory.mktemp("hf-fit")
    tsms = {name: make_tsm(root / name, seed=seed) for name, seed in (("old", 0), ("new", 1))}
    directory = make_tiny(root / "vlm", family=FAMILY, texts=drawn_texts, seed=0)
    torch.manual_seed(1)
    width = tsms["old"].record["feature_width"]
    connector = ExemplarConnector("linear", width, WIDTH)
    connector_file.save_connector(connector, connector.state_dict(), directory)
    flags = VITaskArguments(vitask=True, vitask_ep="cls", vitask_tsm="tsm", vitask_connector="linear")
    identity = {"hash": tsms["old"].hash, "width": width}
    checkpoint.save_record(directory, flags, connector, identity, tsms["old"].record["tasks"], "chat template")
    return SimpleNamespace(root=root, checkpoint=directory, data=drawn_data, **tsms)


def command(made, name: str, output: Path, *words: object) -> list[str]:
    flags = {
        "checkpoint": made.checkpoint,
        "tsm": made.root / "new",
        "data": made.data / "train.json",
        "image-folder": made.data / "images",
        "out": output,
        "device": "cpu",
    }
    return ["connector", name, *(str(word) for flag in flags.items() for word in (f"--{flag[0]}", flag[1])), *words]


def test_one_step_of_a_fit_follows_ep_and_moves_the_connector_alone(made, tmp_path: Path) -> None:
    """AdamW's first step goes by the learning rate against the sign of L_EP's gradient, here by the stock forward."""
    before, data = tree_hash(made.checkpoint), tmp_path / "data.json"
    samples = json.loads((made.data / "train.json").read_text())[:2]
    data.write_text(json.dumps(samples))
    rate, output = 1e-4, tmp_path / "fitted"
    words = ["--data", str(data), "--steps", "1", "--batch-size", "2", "--learning-rate", str(rate)]
    assert main(command(made, "fit", output, *words)) == 0
    assert tree_hash(made.checkpoint) == before
    assert sorted(path.name for path in output.iterdir()) == ["vitask.json", "vitask_connector.safetensors"]

    loaded = loading.load(made.checkpoint)
    template, model = loaded.template, loaded.model
    torch.manual_seed(42)
    start = ExemplarConnector("mlp2x_gelu", made.new.record["feature_width"], WIDTH)
    total = torch.zeros(())
    for sample in samples:
        with Image.open(made.data / "images" / sample["image"]) as image:
            picture = image.convert("RGB")
        found = template.encode(sample["conversations"], [picture])
        item = {"input_ids": found.ids, "labels": found.labels, "end": found.end, "inputs": found.inputs}
        exemplar = start(made.new(made.new.preprocess(picture)[None]).pooled)
        logits = branch_logits(model, item, exemplar, image_id=template.image_id)
        answer = found.labels[1:][found.labels[1:] != -100]
        total = total + torch.nn.functional.cross_entropy(logits, answer, reduction="sum")
    total.backward()
    learnt, compared = connector_file.load_connector(output).state_dict(), 0
    for name, weight in start.named_parameters():
        clear = weight.grad.abs() > 1e-3 * weight.grad.abs().max()
        moved = learnt[name] - weight.detach()
        torch.testing.assert_close(moved[clear], -rate * weight.grad[clear].sign(), rtol=0, atol=0.02 * rate)
        compared += int(clear.sum())
    assert compared > 1000


@pytest.mark.parametrize(("name", "words"), [("fit", ["--steps", "3", "--batch-size", "4"]), ("align", [])])
def test_what_is_written_goes_with_the_checkpoint(made, tmp_path: Path, name: str, words: list[str]) -> None:
    output = tmp_path / "out"
    more = ["--from-tsm", str(made.root / "old")] if name == "align" else []
    assert main([*command(made, name, output, *words), *more]) == 0
    loaded = loading.load(made.checkpoint, connector=output)
    assert loaded.record["tsm"] == {"hash": made.new.hash, "width": made.new.record["feature_width"]}
    assert loaded.record["fitted"]["tsm"] == made.old.hash and loaded.record["version"] == "chat template"
    own = loading.load(made.checkpoint)
    assert loaded.model.vitask_connector.in_features == made.new.record["feature_width"]
    assert own.record["tsm"]["hash"] == made.old.hash
    feature = TSM.load(made.root / "new")(torch.zeros(1, 3, *[made.new.record["image_size"]] * 2)).pooled
    exemplars = [one.model.exemplars(feature[:, None]) for one in (loaded, own)]
    assert exemplars[0].shape == (1, 1, WIDTH) and not torch.equal(*exemplars)
